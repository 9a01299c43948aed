"""How many pairs of activities a second: shared beginnings against one forward pass a pair, for docs/benchmarks.md.

    python bench/preferences.py                  # 2 first options with all 63 others, 3 rounds; five minutes on one core
    python bench/preferences.py --short          # a tiny model, one first option, one round, results not kept
    python bench/preferences.py --clock cpu      # on a machine that is busy with other things: compares processor time

Every way answers the same question, "Would you prefer to (A) … or (B) …?", for the same pairs, from strings to log-probabilities
of A and B: rendering and tokenising are in the time. Ways take turns in one process, in another order each round. In the steered
task half of the activities get one of several directions at their own tokens over the middle layers, as in the study. The
matrix-multiply peak of the machine is measured in the same run (``peers/peak.py``); a way's share of it counts the linear layers
for the tokens that this way runs through each block. Writes ``results/preferences.json``; ``table.py`` puts it into the page.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affectlens import corpus
from affectlens.engine import Request, Steering, Term, Where
from affectlens.engines.hf import HFEngine
from host import MODEL, RESULTS, begun, keep, peak, say, threads, tiny_model
from speed_tables import preferences

QUESTION, LETTERS, BATCH = "Would you prefer to (A) {} or (B) {}?", ("A", "B"), 8
DIRECTIONS, STRENGTH, SEED = 8, 0.5, 20261
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}

Pair = tuple[str, str]
Way = Callable[[list[Pair]], np.ndarray]


class Ways:
    """Every way of asking, around one loaded model."""

    def __init__(self, engine: HFEngine, activities: list[str]) -> None:
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer
        self.letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS]
        self.steered = set(activities[::2])
        depth, width = engine.info.n_layers, engine.info.width
        self.layers = tuple(range(-(-depth // 3), -(-2 * depth // 3)))
        every = tuple(range(depth))
        drawn = np.random.default_rng(SEED).normal(size=(DIRECTIONS, width)).astype(np.float32)
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        norms = np.full(depth, 100.0, np.float32)
        self.directions = [
            Steering((Term(f"d{i}", STRENGTH, self.layers, every, np.repeat(d[None], depth, axis=0), norms),))
            for i, d in enumerate(drawn)
        ]

    def ids(self, pair: Pair) -> list[int]:
        chat = [{"role": "user", "content": QUESTION.format(*pair)}]
        return self.tokenizer(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "(")[
            "input_ids"
        ]

    def one_by_one(self, pairs: list[Pair]) -> np.ndarray:
        """The ordinary loop: one forward pass a pair."""
        with torch.inference_mode():
            logits = [self.model(torch.tensor([self.ids(pair)])).logits[0, -1].float() for pair in pairs]
            return torch.stack(logits).log_softmax(-1)[:, self.letters].numpy()

    def padded(self, pairs: list[Pair]) -> np.ndarray:
        """The ordinary loop in padded batches, in the order of the pairs."""
        found = []
        for start in range(0, len(pairs), BATCH):
            rows = [self.ids(pair) for pair in pairs[start : start + BATCH]]
            ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for n, row in enumerate(rows):
                ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
            with torch.inference_mode():
                logits = self.model(ids, attention_mask=mask).logits
                last = logits[torch.arange(len(rows)), mask.sum(1) - 1].float()
                found.append(last.log_softmax(-1)[:, self.letters].numpy())
        return np.concatenate(found)

    def requests(self, pairs: list[Pair], directions: list[Steering]) -> list[Request]:
        """Of every pair along every direction (a direction of no terms is plain)."""
        made = []
        for direction in directions:
            for pair in pairs:
                steering = Steering()
                for text in pair:
                    if text in self.steered:
                        steering += direction.at(Where(role="user", text=text))
                made.append(Request((("user", QUESTION.format(*pair)),), prefill="(", choices=LETTERS, steering=steering))
        return made

    def affectlens(self, pairs: list[Pair], *, steered: bool = False, share: bool = True, fork: bool = True) -> np.ndarray:
        """Through the engine, with its fast ways or without some of them."""
        before = self.engine.share_limit, self.engine.can_fork
        self.engine.share_limit, self.engine.can_fork = before[0] * share, before[1] and fork
        try:
            directions = self.directions if steered else [Steering()]
            return np.array([result.choice_logprobs for result in self.engine.run(self.requests(pairs, directions))])
        finally:
            self.engine.share_limit, self.engine.can_fork = before

    def steered_one_by_one(self, pairs: list[Pair]) -> np.ndarray:
        """One forward pass a pair, with hooks, each request in a run of its own; the first direction only."""
        made = self.requests(pairs, self.directions[:1])
        return np.array([next(self.engine.run([request])).choice_logprobs for request in made])

    def counted(self, pairs: list[Pair], way: str) -> float:
        """Operations that the model must do for these pairs in this way, attention and the unembedding of one token included."""
        seen = [0] * len(self.engine.blocks)

        def count(i: int) -> Callable[..., None]:
            return lambda module, args, kwargs: seen.__setitem__(
                i, seen[i] + int(np.prod((args[0] if args else kwargs["hidden_states"]).shape[:2]))
            )

        handles = [b.register_forward_pre_hook(count(i), with_kwargs=True) for i, b in enumerate(self.engine.blocks)]
        answers = len(self.all[way][1](pairs))
        for handle in handles:
            handle.remove()
        per_block = sum(p.numel() for p in self.engine.blocks[0].parameters())
        unembedding = self.model.get_output_embeddings().weight.numel()
        return 2.0 * (sum(seen) * per_block + answers * unembedding)

    @property
    def all(self) -> dict[str, tuple[str, Way]]:
        """Name: task and way."""
        return {
            "one forward pass a pair": ("plain", self.one_by_one),
            f"padded batches of {BATCH}": ("plain", self.padded),
            "affectlens, nothing shared": ("plain", lambda pairs: self.affectlens(pairs, share=False)),
            "affectlens": ("plain", self.affectlens),
            "one forward pass a pair, steered": ("steered", self.steered_one_by_one),
            "affectlens, steered, nothing shared": ("steered", lambda pairs: self.affectlens(pairs, steered=True, share=False)),
            "affectlens, steered, beginnings shared": ("steered", lambda pairs: self.affectlens(pairs, steered=True, fork=False)),
            "affectlens, steered": ("steered", lambda pairs: self.affectlens(pairs, steered=True)),
        }


def timed(way: Way, pairs: list[Pair]) -> tuple[dict[str, float], np.ndarray]:
    start = {name: clock() for name, clock in CLOCKS.items()}
    answers = way(pairs)
    return {name: clock() - start[name] for name, clock in CLOCKS.items()} | {"answers": len(answers)}, answers


def measure(short: bool = False) -> dict[str, Any]:
    """Time every way of asking for the same preferences."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with threads(args.threads):
        return _measured(args)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    engine = HFEngine.load(str(tiny_model()) if args.short else args.model, device="cpu", dtype=args.dtype)
    activities = [record["text"] for record in corpus.load("activities") if not record["held_out"]]
    ways = Ways(engine, activities)
    pairs = [(a, b) for a in activities[: args.firsts] for b in activities if a != b][: args.pairs]
    few = pairs[:63]
    rng = random.Random(SEED)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways.all}
    answers: dict[str, np.ndarray] = {}
    for _, way in ways.all.values():
        way(pairs[:8])
    operations = {name: ways.counted(few, name) / len(ways.all[name][1](few)) for name in ways.all}
    for n in range(args.rounds):
        for name in rng.sample(list(ways.all), len(ways.all)):
            task, way = ways.all[name]
            # Steered, the pairs of one first option that is steered are asked along every direction.
            taken, answers[name] = timed(way, pairs if task == "plain" else few)
            rounds[name].append(taken)
            say(f"round {n + 1}: {name}: {taken['answers'] / taken['seconds']:.1f} pairs/s")
    width, hidden = engine.info.width, engine.model.config.intermediate_size
    result = {
        **begun("preferences"),
        "model": engine.info.id if not args.short else "tiny",
        "dtype": args.dtype,
        "threads": args.threads,
        "clock": "cpu_seconds" if args.clock == "cpu" else "seconds",
        "pairs": len(pairs),
        "steered_pairs": len(few),
        "directions": DIRECTIONS,
        "peak": peak(args.threads, width=width, hidden=hidden, short=args.short)[args.dtype],
        "ways": {
            name: {"task": task, "operations": operations[name], "rounds": rounds[name]} for name, (task, _) in ways.all.items()
        },
        "difference": _differences(answers),
    }
    return result


def _differences(answers: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean absolute difference of the probability of A against B from one forward pass a pair, where the pairs are the same."""
    p = {name: 1 / (1 + np.exp(found[:, 1] - found[:, 0])) for name, found in answers.items()}
    plain, steered = p["one forward pass a pair"], p["one forward pass a pair, steered"]
    return {
        name: float(np.abs(own[: len(steered)] - steered).mean() if "steered" in name else np.abs(own - plain).mean())
        for name, own in p.items()
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--firsts", type=int, default=2, help="first options; each meets all others")
    parser.add_argument("--pairs", type=int, help="no more than so many of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine, with one thread only")
    parser.add_argument("--short", action="store_true", help="a tiny model, a few pairs, one round, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "preferences.json")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("threads that wait for each other use processor time: --clock cpu needs --threads 1")
    if args.short:
        args.firsts, args.pairs, args.rounds, args.out, args.dtype = 1, 6, 1, None, "float32"
    return args


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(preferences(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
