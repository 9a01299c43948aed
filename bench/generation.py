"""How fast many replies are generated: affectlens beside ``model.generate`` and transformers' continuous batching.

    python bench/generation.py           32 replies of 16 to 64 tokens, three rounds, five minutes
    python bench/generation.py --short   six short ones from a tiny model

Every way answers the same prompts greedily with replies of the same lengths, which differ from request to request; end tokens are
off. The clock runs from the texts of the prompts to the texts of the replies. All ways take turns in one process, in an order
that is turned each round.

**Equal outputs.** A matrix product over many rows rounds otherwise than one over a single row, so that in bfloat16 greedy replies
part where two tokens are nearly as likely, whoever generates them. Whether a way does the same as ``model.generate`` one at a
time is therefore asked in float32, of half of the requests: it counts only if every reply has exactly the same tokens there. In
the dtype that is timed the replies with the same tokens are counted, and where others part it is told how far apart the model,
asked alone, finds the two tokens, in steps of that dtype.

Writes ``bench/results/generation.json``.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from affectlens.engine import Request, Result, Sampling
from affectlens.engines.hf import HFEngine
from host import MODEL, RESULTS, begun, keep, peak, say, threads, tiny_model
from monitoring import endless, prompts_of
from speed_tables import generation

Replies = list[list[int]]


@dataclass(frozen=True)
class Asked:
    """A prompt, and how many tokens its reply has."""

    prompt: str
    tokens: int


@dataclass(frozen=True)
class Way:
    """One way to answer all requests.

    Args:
        label: What the table calls it.
        run: Requests to the tokens of their replies: what is timed.
        around: Entered before the clock starts, left after it has stopped.
    """

    label: str
    run: Callable[[Sequence[Asked]], Replies]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Setting:
    """A model, and every way to generate with it."""

    def __init__(self, engine: HFEngine, asked: Sequence[Asked]) -> None:
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer
        self.pad = endless(engine)
        self.asked = asked
        self.manager: Any = None

    def ways(self) -> dict[str, Way]:
        return {
            "one": Way("`model.generate`, one at a time", self.one_by_one),
            "padded": Way("`model.generate`, all in one padded batch", self.padded),
            "continuous": Way("transformers' continuous batching", self.continuous, self.managed),
            "session": Way("**affectlens**, requests that come and go (`Engine.session`)", self.session),
            "run": Way("**affectlens**, `Engine.run`", self.run),
        }

    def config(self, tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, eos_token_id=None, pad_token_id=self.pad
        )

    def generate(self, asked: Sequence[Asked]) -> Replies:
        inputs = self.tokenizer([each.prompt for each in asked], return_tensors="pt", padding=True).to(self.model.device)
        out = self.model.generate(**inputs, generation_config=self.config(max(each.tokens for each in asked)))
        start = inputs["input_ids"].shape[1]
        replies = [row[: each.tokens] for row, each in zip(out[:, start:].tolist(), asked, strict=True)]
        self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return replies

    def one_by_one(self, asked: Sequence[Asked]) -> Replies:
        return [reply for each in asked for reply in self.generate([each])]

    def padded(self, asked: Sequence[Asked]) -> Replies:
        return self.generate(asked)

    @contextmanager
    def managed(self) -> Iterator[None]:
        """The manager of continuous batching, which takes its memory and warms up before the clock starts."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        lengths = [len(ids) for ids in self.tokenizer([each.prompt for each in self.asked])["input_ids"]]
        longest = max(each.tokens for each in self.asked)
        with self.model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=longest, eos_token_id=-1, pad_token_id=self.pad),
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
            workload_hints=WorkloadHints(max(lengths), longest, len(self.asked)),
            timeout=30,
        ) as self.manager:
            yield

    def continuous(self, asked: Sequence[Asked]) -> Replies:
        ids = self.tokenizer([each.prompt for each in asked])["input_ids"]
        tickets = [
            self.manager.add_request(list(own), max_new_tokens=each.tokens, eos_token_id=-1)
            for own, each in zip(ids, asked, strict=True)
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(tickets):
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("the thread of continuous batching has ended")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                done[result.request_id] = list(result.generated_tokens)
        replies = [done[ticket] for ticket in tickets]
        self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return replies

    def requests(self, asked: Sequence[Asked]) -> list[Request]:
        return [Request(each.prompt, sampling=Sampling(max_tokens=each.tokens, temperature=0)) for each in asked]

    def run(self, asked: Sequence[Asked]) -> Replies:
        return [_reply(result) for result in self.engine.run(self.requests(asked))]

    def session(self, asked: Sequence[Asked]) -> Replies:
        session = self.engine.session()
        tickets = [session.submit(request) for request in self.requests(asked)]
        done: dict[int, list[int]] = {}
        while session.live:
            for ticket, result in session.step():
                if not isinstance(result, Result):
                    raise result
                if result.done:
                    done[ticket] = _reply(result)
        session.close()
        return [done[ticket] for ticket in tickets]

    def apart(self, each: Asked, one: Sequence[int], other: Sequence[int]) -> float | None:
        """How far apart, in steps of the dtype, the model finds the first two tokens that differ; None where none does."""
        n = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if n is None:
            return None
        ids = [*self.tokenizer(each.prompt)["input_ids"], *one[:n]]
        with torch.inference_mode():
            logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, -1].float()
        two = logits[[one[n], other[n]]]
        size = 2.0 ** (math.frexp(float(two.abs().max()))[1] - 1)
        return float((two[0] - two[1]).abs()) / (size * torch.finfo(self.model.dtype).eps)


def _reply(result: Result) -> list[int]:
    return list(result.layout.ids[result.layout.n_prompt :])


def measure(short: bool = False) -> dict[str, Any]:
    """Time every way of answering the same requests."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with threads(args.threads):
        return _measured(args)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    gc.freeze()  # what is there already need not be looked through before every run
    model = str(tiny_model()) if args.short else args.model
    low, high = args.tokens
    spread = [low + i * (high - low) // max(1, args.replies - 1) for i in range(args.replies)]
    # Lengths in an order of their own: a batch that is cut from the front has short and long ones.
    asked = [Asked(prompt, spread[7 * i % args.replies]) for i, prompt in enumerate(prompts_of(args.replies))]
    few = asked[: len(asked) // 2]
    say("in float32")
    exact = compared(Setting(HFEngine.load(model, dtype="float32"), few))
    engine = HFEngine.load(model, dtype=args.dtype)
    say(f"in {engine.info.dtype}")
    setting = Setting(engine, asked)
    ways, found = setting.ways(), compared(setting)
    for key, way in found.items():
        way["exact"] = exact[key].get("same", 0)
    config = engine.model.config
    tokens = sum(each.tokens for each in asked)
    result: dict[str, Any] = {
        **begun("generation"),
        "model": engine.info.id if not args.short else "tiny",
        "dtype": engine.info.dtype,
        "parameters": engine.info.n_parameters,
        "threads": args.threads,
        "replies": len(asked),
        "tokens": tokens,
        "lengths": [low, high],
        "compared in float32": len(few),
        "rows": engine.generate_rows,
        "peak_tflops": peak(args.threads, width=config.hidden_size, hidden=config.intermediate_size, short=args.short),
        "ways": found,
        "step": _step_times(setting, args.short),
        "rounds": [],
    }
    usable = [key for key in ways if "problem" not in found[key]]
    for number in range(args.rounds):
        entry: dict[str, float] = {}
        for key in usable[number % len(usable) :] + usable[: number % len(usable)]:
            with ways[key].around():
                gc.collect()
                start = time.perf_counter()
                ways[key].run(asked)
                entry[key] = time.perf_counter() - start
            say(f"round {number + 1}: {key:10} {tokens / entry[key]:7.1f} tokens/s")
        result["rounds"].append(entry)
    return result


def compared(setting: Setting) -> dict[str, dict[str, Any]]:
    """Run every way once: its label, and how many replies have the tokens of those one at a time, how far apart the others are.

    A peer that fails says why in place of that.
    """
    asked, plain = setting.asked, Replies()
    found: dict[str, dict[str, Any]] = {}
    for key, way in setting.ways().items():
        found[key] = {"label": way.label}
        try:
            with way.around():
                replies = way.run(asked)
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
            if "affectlens" in way.label:
                raise
            found[key]["problem"] = (str(error).strip() or type(error).__name__).splitlines()[-1]
            say(f"  {key}: {found[key]['problem']}")
            continue
        plain = plain or replies
        steps = [setting.apart(*each) for each in zip(asked, plain, replies, strict=True)]
        parted = [step for step in steps if step is not None]
        found[key] |= {"same": len(steps) - len(parted), "apart": max(parted, default=0.0)}
        say(f"  {key:10} {found[key]['same']} of {len(asked)} same, others {found[key]['apart']:.2f} steps apart at most")
    return found


def _step_times(setting: Setting, short: bool) -> dict[str, float]:
    """Seconds of one step of the model alone, over one row and over a full batch: what any way of batching can gain at most."""
    model, rows = setting.model, setting.engine.generate_rows
    taken = {}
    for n in sorted({1, rows}):
        ids = torch.full((n, 32), setting.pad, device=model.device)
        with torch.inference_mode():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            times = []
            for _ in range(3 if short else 12):
                start = time.perf_counter()
                cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
                times.append(time.perf_counter() - start)
        taken[str(n)] = sorted(times)[len(times) // 2]
    return taken


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="a folder or a name that affectlens knows")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--replies", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 64), metavar=("LOW", "HIGH"), help="of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--short", action="store_true", help="a tiny model, a few short replies, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "generation.json")
    args = parser.parse_args(argv)
    if args.short:
        args.replies, args.tokens, args.rounds, args.out, args.dtype = 6, (2, 6), 1, None, "float32"
    return args


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(generation(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
