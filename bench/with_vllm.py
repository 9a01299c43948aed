"""How fast are stories, replies and readings with vLLM, in process, and with the model's own ``generate``?

    python bench/with_vllm.py          with the Python of the environment that has vLLM (.venv-vllm); ten minutes on two cores
    python bench/with_vllm.py --short  few and short, results not kept

Each way is a process of its own that loads the model once and then answers when it is asked, one way at a time, in another order
each round. All get the same prompts, greedy, and as many threads. Where prompts are answered one after the other, each costs the
same however many there are: there a part of them is asked, and tokens a second are what counts.

* **generate**: ``model.generate`` of transformers, one prompt after the other: what somebody writes first.
* **hf**: :class:`HFEngine`, all prompts at once (left-padded batches).
* **bare**: vLLM without us, to see what taps cost.
* **vllm**, **compiled**: :class:`VLLMEngine`, as it comes and compiled.

Tasks: *stories* (a prompt each, many tokens), *replies* (short chats, a few tokens; plain, and each steered and read in its own
way), *reading* (the mean residual of stories at two thirds of the depth). A way that cannot do a task leaves it out. Writes
``results/with_vllm.json``; ``table.py`` puts the table into ``docs/scale.md``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from host import CACHE, MODEL, RESULTS, begun, keep, say
from speed_tables import on, packages, spread, table

WAYS = {
    "generate": "`model.generate`, one at a time",
    "hf": "**affectlens** in process (`hf`)",
    "bare": "vLLM without affectlens",
    "vllm": "**affectlens** with vLLM",
    "compiled": "**affectlens** with vLLM, compiled",
}
TASKS = {
    "stories": "stories",
    "replies": "replies",
    "monitored": "replies steered and read",
    "reading": "reading",
}
PART = 4
"""One at a time, one in so many is asked."""


# ── what is asked ──


def story_prompts(n: int) -> list[Any]:
    from affectlens.corpus import load

    records = load("stories")
    return [(("user", f"Tell me a long story about {records[i * (len(records) // n)]['topic']}."),) for i in range(n)]


def texts(n: int) -> list[str]:
    from affectlens.corpus import load

    records = load("stories")
    return [str(records[i * (len(records) // n)]["text"]) for i in range(n)]


def requests(task: str, count: int, tokens: int, info: Any) -> list[Any]:
    import numpy as np

    from affectlens.engine import Readout, Request, Sampling, Steering, Term, Where

    if task == "reading":
        return [Request(text, readouts=(Readout((info.default_layer,), Where(), "mean"),)) for text in texts(count)]
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    plain = [Request(prompt, sampling=sampling) for prompt in story_prompts(count)]
    if task != "monitored":
        return plain
    rng = np.random.default_rng(0)
    x = rng.normal(size=(171, info.width)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    layer = info.default_layer
    watched = (Readout((layer,), Where("response"), "none", x[None]),)
    norm = np.array([300.0], np.float32)

    def push(i: int) -> Steering:
        return Steering((Term(f"d{i}", 0.05 * (-1) ** i, (layer,), (layer,), x[i : i + 1], norm),))

    return [Request(each.prompt, sampling=sampling, readouts=watched, steering=push(i)) for i, each in enumerate(plain)]


# ── the ways, each in a process of its own ──


def work(way: str, dtype: str) -> None:
    """Answer orders from standard input: a task, how many, how many tokens; say seconds and tokens."""
    do = opened(way, dtype)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    out.write(json.dumps({"ready": True}) + "\n")
    out.flush()
    for line in sys.stdin:
        order = json.loads(line)
        begin = time.perf_counter()
        tokens = do(order["task"], order["count"], order["tokens"])
        out.write(json.dumps({"seconds": time.perf_counter() - begin, "tokens": tokens}) + "\n")
        out.flush()


def opened(way: str, dtype: str) -> Callable[[str, int, int], int | None]:
    if way == "generate":
        return plain_generate(dtype)
    if way == "bare":
        return bare_vllm(dtype)
    from affectlens.engine import open_engine

    options: dict[str, Any] = {"dtype": dtype}
    name = MODEL if way == "hf" else f"vllm/{MODEL}"
    if way == "compiled":
        options["compiled"] = True
    engine = open_engine(name, **options)

    def do(task: str, count: int, tokens: int) -> int:
        results = list(engine.run(requests(task, count, tokens, engine.info)))
        if task == "reading":
            return sum(len(result.layout) for result in results)
        return sum(len(result.layout) - result.layout.n_prompt for result in results)

    return do


def plain_generate(dtype: str) -> Callable[[str, int, int], int | None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from affectlens.models import locate

    source = locate(MODEL)
    model = AutoModelForCausalLM.from_pretrained(source.location, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.location)

    def do(task: str, count: int, tokens: int) -> int | None:
        if task in ("monitored", "reading"):
            return None
        made = 0
        for chat in story_prompts(count):
            turns = [{"role": role, "content": content} for role, content in chat]
            inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            made += ids.shape[1] - inputs["input_ids"].shape[1]
        return made

    return do


def bare_vllm(dtype: str) -> Callable[[str, int, int], int | None]:
    for variable in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"):
        os.environ.setdefault(variable, "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    from affectlens.models import locate

    llm = LLM(
        locate(MODEL).location,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=8192,
        kv_cache_memory_bytes=2 * 2**30,
        enable_prefix_caching=True,
        async_scheduling=False,
        generation_config="vllm",
    )

    def do(task: str, count: int, tokens: int) -> int | None:
        if task == "monitored":
            return None
        if task == "reading":  # no reading, but all that must be run for one
            outputs = llm.generate(texts(count), SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            llm.reset_prefix_cache()
            return sum(len(output.prompt_token_ids) for output in outputs)
        chats = [[{"role": role, "content": content} for role, content in chat] for chat in story_prompts(count)]
        outputs = llm.chat(chats, SamplingParams(max_tokens=tokens, temperature=0), use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return do


class Way:
    """A process that answers in one way."""

    def __init__(self, name: str, *, threads: int, dtype: str, log: Any) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--way", name, "--dtype", dtype]
        self.name = name
        begin = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        self._answer()
        self.start = time.perf_counter() - begin

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} has ended: see {CACHE / 'vllm.log'}")

    def ask(self, task: str, count: int, tokens: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, "count": count, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def tables(result: dict[str, Any]) -> str:
    """Tokens a second of each way and task, median and range over rounds, and what that is beside ``generate``."""

    def rates(way: str, task: str) -> list[float]:
        found = result["ways"].get(way, {"rounds": {}})["rounds"].get(task, ())
        return [each["tokens"] / each["seconds"] for each in found if each["tokens"]]

    rows = []
    for way, found in result["ways"].items():
        if "problem" in found:
            rows.append([WAYS[way], f"failed: {found['problem'][:80]}", *("–" for _ in result["tasks"])])
            continue
        cells = []
        for task in result["tasks"]:
            own, plain = rates(way, task), rates("generate", task)
            times = f", × {statistics.median(own) / statistics.median(plain):.1f}" if own and plain else ""
            cells.append(f"{spread(own)}{times}" if own else "–")
        rows.append([WAYS[way], f"{found['start']:.0f}", *cells])
    stories, replies, reading = (result["tasks"][task] for task in ("stories", "replies", "reading"))
    rounds = max(len(own) for found in result["ways"].values() for own in found["rounds"].values())
    caption = (
        f"{stories['count']} stories of {stories['tokens']} tokens, {replies['count']} replies of {replies['tokens']}, "
        f"{reading['count']} stories read. {result['model']}, {result['dtype']}, {result['threads']} thread(s), "
        f"{rounds} round(s), medians (ranges), on {on(result['machine'])}. Versions: {packages(result)}."
    )
    heads = ["way", "start, s", *(f"{TASKS[task]}: tokens/s (range), × generate" for task in result["tasks"])]
    heads[-1] = heads[-1].removesuffix(", × generate")
    return "\n".join([caption, "", *table(heads, rows)])


def measure(short: bool = False) -> dict[str, Any]:
    """Time every way; the short form asks little of two of them."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"stories": (16, 64), "replies": (32, 16), "monitored": (32, 16), "reading": (48, 1)}
    if args.short:
        sizes = {"stories": (2, 8), "replies": (3, 4), "monitored": (3, 4), "reading": (4, 1)}
    result: dict[str, Any] = {
        **begun("with_vllm"),
        "model": MODEL,
        "dtype": args.dtype,
        "threads": args.threads,
        "tasks": {task: {"count": count, "tokens": tokens} for task, (count, tokens) in sizes.items()},
        "ways": {},
    }
    for built in importlib.metadata.distributions(name="vllm-cpu"):
        result["provenance"]["packages"]["vllm"] = built.version
    CACHE.mkdir(exist_ok=True)
    ways: list[Way] = []
    with (CACHE / "vllm.log").open("w") as log:
        try:
            for name in args.only:
                found = result["ways"][name] = {"rounds": {}}
                try:
                    ways.append(Way(name, threads=args.threads, dtype=args.dtype, log=log))
                except RuntimeError as error:
                    found["problem"] = str(error)
                    say(f"  {error}")
                    continue
                found["start"] = ways[-1].start
                say(f"  {name} has started in {ways[-1].start:.0f} s")
            for way in ways:  # caches of shapes
                for task in sizes:
                    way.ask(task, 2, 4)
            for number in range(args.rounds):
                for task, (count, tokens) in sizes.items():
                    for way in random.Random(f"{number} {task}").sample(ways, len(ways)):
                        few = -(-count // PART) if way.name == "generate" else count
                        found = way.ask(task, few, tokens)
                        result["ways"][way.name]["rounds"].setdefault(task, []).append(found)
                say(f"  round {number + 1} of {args.rounds}")
        finally:
            for way in ways:
                way.end()
    if not ways:
        raise RuntimeError(f"no way has started: see {CACHE / 'vllm.log'}")
    return result


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--short", action="store_true", help="two ways, few and short, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "with_vllm.json")
    args = parser.parse_args(argv)
    if args.short:
        args.only, args.rounds, args.threads, args.out = ["hf", "vllm"], 1, 1, None
    return args


def main() -> int:
    args = arguments()
    if args.way:
        work(args.way, args.dtype)
        return 0
    result = measured(args)
    keep(result, args.out)
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
