"""How fast are stories, replies and readings with vLLM, in process, and with the model's own ``generate``?

    python bench/with_vllm.py        writes results/with_vllm.json; with the Python of the environment that has vLLM (.venv-vllm)

Each way is a process of its own that loads the model once and then answers when it is asked, one way at a time, in another order
each round. All get the same prompts, greedy, and as many threads.

* **generate**: ``model.generate`` of transformers, one prompt after the other: what somebody writes first.
* **hf**: :class:`HFEngine`, all prompts at once (left-padded batches).
* **bare**: vLLM without us, to see what taps cost.
* **vllm**, **compiled**: :class:`VLLMEngine`, as it comes and compiled.

Tasks: *stories* (a prompt each, many tokens), *replies* (short chats, a few tokens; plain, and each steered and read in its own
way), *reading* (the mean residual of stories at two thirds of the depth). A way that cannot do a task leaves it out.
"""

from __future__ import annotations

import argparse
import datetime
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

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
WAYS = ("generate", "hf", "bare", "vllm", "compiled")
TASKS = ("stories", "replies", "monitored", "reading")


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
        raise RuntimeError(f"{self.name} has ended: see the log")

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
    lines = ["| way | start, s | " + " | ".join(result["tasks"]) + " |", "|---|---|" + "---|" * len(result["tasks"])]
    for way, found in result["ways"].items():
        cells = []
        for task, given in result["tasks"].items():
            rates = [each["tokens"] / each["seconds"] for each in found["rounds"].get(task, ()) if each["tokens"]]
            if not rates:
                cells.append("–")
                continue
            base = [
                e["tokens"] / e["seconds"]
                for e in result["ways"].get("generate", {"rounds": {}})["rounds"].get(task, ())
                if e["tokens"]
            ]
            times = f", × {statistics.median(rates) / statistics.median(base):.1f}" if base else ""
            each = statistics.median(given["count"] / e["seconds"] for e in found["rounds"][task] if e["tokens"])
            cells.append(f"{statistics.median(rates):.0f} tok/s ({min(rates):.0f}–{max(rates):.0f}), {each:.2f}/s{times}")
        lines.append(f"| {way} | {found['start']:.0f} | " + " | ".join(cells) + " |")
    quiet = "" if result["quiet"] else "\n\n**Not quiet**: other things ran on this machine meanwhile."
    return "\n".join(lines) + quiet


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--short", action="store_true", help="few and short, results not kept")
    parser.add_argument("--not-quiet", action="store_true", help="say that other things ran meanwhile")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "with_vllm.json")
    args = parser.parse_args(arguments)
    if args.way:
        work(args.way, args.dtype)
        return 0
    from affectlens.runs import provenance

    sizes = {"stories": (16, 64), "replies": (32, 16), "monitored": (32, 16), "reading": (96, 1)}
    if args.short:
        sizes, args.rounds = {"stories": (2, 8), "replies": (3, 4), "monitored": (3, 4), "reading": (4, 1)}, 1
        args.out = HERE / ".cache" / "short.json"
    args.out.parent.mkdir(exist_ok=True)
    result: dict[str, Any] = {
        "benchmark": "with_vllm",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "dtype": args.dtype,
        "threads": args.threads,
        "quiet": not args.not_quiet,
        "tasks": {task: {"count": count, "tokens": tokens} for task, (count, tokens) in sizes.items()},
        "ways": {},
        "provenance": provenance(),
    }
    (HERE / ".cache").mkdir(exist_ok=True)
    with (HERE / ".cache" / "vllm.log").open("w") as log:
        ways: list[Way] = []
        try:
            for name in args.only:
                ways.append(Way(name, threads=args.threads, dtype=args.dtype, log=log))
                result["ways"][name] = {"start": ways[-1].start, "rounds": {}}
                print(f"{name} has started in {ways[-1].start:.0f} s", file=sys.stderr)
            for way in ways:  # caches of shapes
                for task in sizes:
                    way.ask(task, 2, 4)
            for number in range(args.rounds):
                for task, (count, tokens) in sizes.items():
                    for way in random.Random(f"{number} {task}").sample(ways, len(ways)):
                        found = way.ask(task, count, tokens)
                        result["ways"][way.name]["rounds"].setdefault(task, []).append(found)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        finally:
            for way in ways:
                way.end()
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
