"""What steering and monitoring cost while a model generates: affectlens beside what people use today.

    python bench/monitoring.py                     the whole run: batches of 1, 8 and 32, about nine minutes
    python bench/monitoring.py --short             a tiny model, 4 tokens, two rounds: does everything still work?
    python bench/monitoring.py --only read-all --batches 32 --minutes 2

Every way generates the same number of tokens for the same prompts, greedily, with end tokens off. The clock runs from the texts
of the prompts to the texts of the replies (and the scores of their tokens): tokenizing, the pass over the prompts and, where a
reply is read, the pass over its last token are in it. In a round every way runs once at every batch size, and the order is turned
by one way each round; what a way costs is its time over that of plain generation in the same round. Vectors are random
directions, as many as there are emotions: what they cost does not depend on where they point.

Before anything is timed, numbers are compared: the tokens with those of ``model.generate`` (steered ones with those of repeng and
steering-vectors), and the scores with projections of ``output_hidden_states``. Writes ``bench/results/monitoring.json`` with
every raw round; ``bench/table.py`` makes the table in ``docs/benchmarks.md`` of it.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from affectlens.baseline import Baseline, Spread, vectors_id
from affectlens.concepts import ConceptSet
from affectlens.corpus import load
from affectlens.engine import Engine, ModelInfo, Readout, Request, Sampling, Steering, Term, Where
from affectlens.engines.hf import HFEngine
from affectlens.monitor import Monitor
from affectlens.vectors import ConceptVectors
from host import MODEL, RESULTS, begun, keep, peak, say, threads, tiny_model
from speed_tables import MONITORING_TARGETS, monitoring

SEED = 20261129
STRENGTH = 0.05
PROMPT_WORDS = (12, 24)
FEWEST_ROUNDS = 2
OFTEN = 4

PACKAGES = {"repeng": "repeng", "sv": "steering_vectors"}
"""What the keys of peers begin with, and the packages that these need; `make bench` installs them (``tests/peers.txt``)."""


@dataclass(frozen=True)
class Replies:
    """What a way gives back: the tokens of each reply and, where it was read, its scores ``(layers, tokens, directions)``."""

    tokens: list[list[int]]
    scores: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Args:
        key: Name for ``--only`` and the results.
        label: What the table calls it.
        run: Prompts to replies: what is timed.
        like: The way whose tokens (and scores) these should be.
        around: Entered before the clock starts, left after it has stopped.
        batches: Where it makes sense; None for every size.
    """

    key: str
    label: str
    run: Callable[[Sequence[str]], Replies]
    like: str = "transformers"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    batches: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MadeUp:
    """Random directions for all emotions, which cost what fitted ones do, and what is usual of them.

    Args:
        info: The model's.
        names: The ``N`` emotions.
        directions: Unit directions ``(L, N, D)``.
        norms: Mean residual norm of each layer.
    """

    info: ModelInfo
    names: tuple[str, ...]
    directions: np.ndarray
    norms: np.ndarray

    @classmethod
    def of(cls, engine: Engine) -> MadeUp:
        info, names = engine.info, tuple(ConceptSet.load("emotions").names)
        directions = np.random.default_rng(SEED).normal(size=(info.n_layers, len(names), info.width))
        directions = (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)
        readings = engine.read(prompts_of(8), Readout(tuple(range(info.n_layers)), Where(after=1), "norm"))
        return cls(info, names, directions, np.mean([reading.values for reading in readings], axis=0).astype(np.float32))

    def vectors(self) -> ConceptVectors:
        """The directions as if they had been fitted."""
        n_layers, n, width = self.directions.shape
        return ConceptVectors(
            names=self.names,
            layers=tuple(range(n_layers)),
            layer=self.info.default_layer,
            directions=self.directions,
            norms=np.ones((n_layers, n), np.float32),
            centre=np.zeros((n_layers, width), np.float32),
            residual_norms=self.norms,
            neutral=tuple(np.zeros((0, width), np.float32) for _ in range(n_layers)),
            baseline=np.stack([np.zeros((n_layers, n)), np.ones((n_layers, n))], axis=-1).astype(np.float32),
            stability=np.ones((n_layers, n), np.float32),
            counts=np.ones(n, np.int64),
            model=asdict(self.info),
        )

    def baseline(self) -> Baseline:
        """As if scores had been seen to be spread like cosines of random directions."""
        n, zeros = len(self.names), np.zeros(len(self.names), np.float32)
        spread = Spread(zeros, np.full(n, self.info.width**-0.5, np.float32), zeros, zeros, 1, 1)
        return Baseline(
            names=self.names,
            layer=self.info.default_layer,
            spreads=dict.fromkeys(("text", "assistant", "user", "gap"), spread),
            source="random directions",
            formats={"none": 1},
            model={"id": self.info.id, "fingerprint": self.info.fingerprint},
            vectors=vectors_id(self.vectors()),
        )


def endless(engine: HFEngine) -> int:
    """Let nothing end a reply early, neither here nor in ``model.generate``, so that all ways generate equally much.

    Returns:
        The token that prompts are padded with, on the left.
    """
    engine.model.generation_config.eos_token_id = None
    pad = engine.tokenizer.pad_token_id or 0
    engine.tokenizer.pad_token_id, engine.tokenizer.eos_token = pad, None
    engine.tokenizer.padding_side = "left"
    return pad


class Setting:
    """The model, the directions, and every way to use them."""

    def __init__(self, engine: HFEngine, tokens: int) -> None:
        self.engine, self.model, self.tokenizer = engine, engine.model, engine.tokenizer
        self.tokens, self.pad = tokens, endless(engine)
        info = engine.info
        self.every = tuple(range(info.n_layers))
        third = info.n_layers // 3
        self.one, self.third = (info.default_layer,), self.every[third : 2 * third]
        self.made_up = MadeUp.of(engine)
        self.names, self.directions, self.norms = self.made_up.names, self.made_up.directions, self.made_up.norms

    def steering(self, layers: tuple[int, ...]) -> Steering:
        return Steering((Term(self.names[0], STRENGTH, layers, self.every, self.directions[:, 0], self.norms),))

    def vectors_at(self, layers: tuple[int, ...]) -> dict[int, np.ndarray]:
        """What the steering adds at each layer, for libraries that take nothing else."""
        return {layer: self.steering(layers).at_layer(layer)[0][0].vector for layer in layers}

    def ways(self) -> list[Way]:
        one, third, every, n = self.one, self.third, self.every, len(self.names)
        where = f"layer {one[0]}", f"{len(third)} of {len(every)} layers"
        ways = [
            Way("plain", "**affectlens**, plain", self.ours()),
            Way("steer-one", f"**affectlens**, steered at {where[0]}", self.ours(steer=one), like="repeng-one"),
            Way("steer-third", f"**affectlens**, steered at {where[1]}", self.ours(steer=third), like="repeng-third"),
            Way("read-one", f"**affectlens**, {n} emotions at {where[0]}", self.ours(read=one), like="hidden-one"),
            Way("read-all", f"**affectlens**, {n} emotions at every layer", self.ours(read=every), like="hidden-all"),
            Way(
                "both",
                f"**affectlens**, steered at {where[1]}, {n} emotions at every layer",
                self.ours(steer=third, read=every),
                like="steer-third",
            ),
            Way("stream", "**affectlens**, token by token (`Engine.stream`)", self.streamed(), batches=(1,)),
            Way(
                "monitor",
                f"**affectlens**, `Monitor.stream`: {n} emotions at {where[0]} in z, a rule",
                self.monitored(),
                batches=(1,),
            ),
            Way("transformers", "transformers, `model.generate`", self.peer()),
            Way("repeng-one", f"repeng at {where[0]}", self.peer(), "steer-one", lambda: self.repeng(one)),
            Way("repeng-third", f"repeng at {where[1]}", self.peer(), "steer-third", lambda: self.repeng(third)),
            Way("sv-one", f"steering-vectors at {where[0]}", self.peer(), "repeng-one", lambda: self.steering_vectors(one)),
            Way("sv-third", f"steering-vectors at {where[1]}", self.peer(), "repeng-third", lambda: self.steering_vectors(third)),
            Way("hidden-one", f"`output_hidden_states`, {n} emotions at {where[0]}", self.hidden(one)),
            Way("hidden-all", f"`output_hidden_states`, {n} emotions at every layer", self.hidden(every)),
        ]
        absent = {key for key, package in PACKAGES.items() if find_spec(package) is None}
        return [way for way in ways if way.key.partition("-")[0] not in absent]

    # ── affectlens ──

    def ours(self, *, steer: tuple[int, ...] = (), read: tuple[int, ...] = ()) -> Callable[[Sequence[str]], Replies]:
        sampling = Sampling(max_tokens=self.tokens, temperature=0)
        steering = self.steering(steer) if steer else Steering()
        readouts = (Readout(read, Where("response"), "none", self.directions[list(read)]),) if read else ()

        def run(prompts: Sequence[str]) -> Replies:
            requests = [Request(prompt, sampling=sampling, steering=steering, readouts=readouts) for prompt in prompts]
            results = list(self.engine.run(requests))
            replies = [list(result.layout.ids[result.layout.n_prompt :]) for result in results]
            return Replies(replies, [reading.values for result in results for reading in result.readings])

        return run

    def streamed(self) -> Callable[[Sequence[str]], Replies]:
        sampling = Sampling(max_tokens=self.tokens, temperature=0)

        def run(prompts: Sequence[str]) -> Replies:
            tokens = []
            for prompt in prompts:
                *_, last = self.engine.stream(Request(prompt, sampling=sampling))
                tokens.append(list(last.layout.ids[last.layout.n_prompt :]))
            return Replies(tokens)

        return run

    def monitored(self) -> Callable[[Sequence[str]], Replies]:
        sampling = Sampling(max_tokens=self.tokens, temperature=0)
        monitor = Monitor(self.made_up.vectors(), self.made_up.baseline(), rules=[f"{self.names[0]} > 3 for 20 tokens"])

        def run(prompts: Sequence[str]) -> Replies:
            tokens = []
            for prompt in prompts:
                stream = monitor.stream(self.engine, prompt, sampling=sampling)
                for _ in stream:
                    pass
                assert stream.trace is not None
                tokens.append(list(stream.trace.layout.ids[stream.trace.layout.n_prompt :]))
            return Replies(tokens)

        return run

    # ── peers ──

    def generate(self, prompts: Sequence[str], **options: Any) -> Any:
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)
        config = GenerationConfig(
            do_sample=False,
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            eos_token_id=None,
            pad_token_id=self.pad,
            **options,
        )
        return inputs["input_ids"].shape[1], self.model.generate(**inputs, generation_config=config)

    def peer(self) -> Callable[[Sequence[str]], Replies]:
        """``model.generate`` of whatever the model has been made into."""

        def run(prompts: Sequence[str]) -> Replies:
            start, out = self.generate(prompts)
            self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
            return Replies(out[:, start:].tolist())

        return run

    @contextmanager
    def repeng(self, layers: tuple[int, ...]) -> Iterator[None]:
        # repeng 0.4.0 names np.float_ in an annotation, which NumPy 2 has no more; nothing else in it minds.
        np.float_ = np.float64  # type: ignore[attr-defined]
        import repeng

        wrapped = repeng.ControlModel(self.model, layers)
        wrapped.set_control(repeng.ControlVector("llama", self.vectors_at(layers)), 1.0)
        try:
            yield
        finally:
            wrapped.unwrap()

    @contextmanager
    def steering_vectors(self, layers: tuple[int, ...]) -> Iterator[None]:
        from steering_vectors import SteeringVector

        # In the model's dtype: handed over in float32 it would make the stream float32.
        activations = {n: torch.from_numpy(vector).to(self.model.dtype) for n, vector in self.vectors_at(layers).items()}
        with SteeringVector(activations).apply(self.model):
            yield

    def hidden(self, layers: tuple[int, ...]) -> Callable[[Sequence[str]], Replies]:
        """What is written in a few lines: every hidden state is kept, and projected at the end."""
        onto = torch.from_numpy(self.directions[list(layers)])

        def run(prompts: Sequence[str]) -> Replies:
            start, out = self.generate(prompts, output_hidden_states=True, return_dict_in_generate=True)
            self.tokenizer.batch_decode(out.sequences[:, start:], skip_special_tokens=True)
            # The first entry is the pass over the prompts; the last token drawn is in none.
            scores = [
                torch.cat([step[layer + 1] for step in out.hidden_states[1:]], dim=1).float() @ onto[i].T
                for i, layer in enumerate(layers)
            ]
            return Replies(out.sequences[:, start:].tolist(), list(torch.stack(scores, dim=1).numpy()))

        return run


def prompts_of(count: int) -> list[str]:
    """Beginnings of stories, of different lengths."""
    stories = load("stories")
    low, high = PROMPT_WORDS
    step = len(stories) // count
    return [" ".join(stories[i * step]["text"].split()[: low + i % (high - low + 1)]) for i in range(count)]


def compare(ways: Sequence[Way], prompts: Sequence[str], every: int) -> dict[str, dict[str, Any]]:
    """For each way the share of replies with the tokens of the way it should be like, and how far its scores are from there.

    The last layer is left out of the scores: ``output_hidden_states`` has it after the final norm. So is the last token, which
    it does not have.
    """
    got: dict[str, Replies] = {}
    for way in ways:
        with way.around():
            got[way.key] = way.run(prompts[:1] if way.batches == (1,) else prompts)
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        mine, theirs = got[way.key], got.get(way.like)
        entry = found[way.key] = {"like": way.like, "same_tokens": None, "score_error": None}
        if theirs is None:
            continue
        same = [a == b for a, b in zip(mine.tokens, theirs.tokens, strict=False)]
        entry["same_tokens"] = sum(same) / len(same)
        if mine.scores and theirs.scores:
            errors = []
            for a, b, equal in zip(mine.scores, theirs.scores, same, strict=True):
                if equal:
                    shared, layers = min(a.shape[1], b.shape[1]), len(a) - (len(a) == every)
                    a, b = a[:layers, :shared], b[:layers, :shared]
                    errors.append(float(np.abs(a - b).max() / np.abs(b).max()))
            entry["score_error"] = max(errors, default=None)
    return found


def timed(way: Way, prompts: Sequence[str]) -> dict[str, float]:
    with way.around():
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        way.run(prompts)
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def measure(short: bool = False) -> dict[str, Any]:
    """Time every way of generating, plain, steered and monitored."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with threads(args.threads), torch.no_grad():
        return _measured(args)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    gc.freeze()  # what is there already need not be looked through before every run
    model = str(tiny_model()) if args.short else args.model
    setting = Setting(HFEngine.load(model, device=args.device, dtype=args.dtype), args.tokens)
    engine = setting.engine
    ways = [way for way in setting.ways() if not args.only or way.key in {"plain", *args.only}]
    prompts = prompts_of(max(args.batches))
    compared = compare(ways, prompts[:8], len(setting.every))
    for key, entry in compared.items():
        say(f"  {key:14} like {entry['like']:14} tokens {entry['same_tokens']}, error of scores {entry['score_error']}")
    lengths = [len(engine.layout(Request(prompt))) for prompt in prompts]
    config = engine.model.config.get_text_config(decoder=True)
    result: dict[str, Any] = {
        **begun("monitoring"),
        "model": engine.info.id if not args.short else "tiny",
        "dtype": engine.info.dtype,
        "parameters": engine.info.n_parameters,
        "threads": args.threads,
        "clock": "seconds" if args.clock == "wall" else "cpu_seconds",
        "tokens": args.tokens,
        "emotions": len(setting.names),
        "batches": args.batches,
        "prompt_tokens": [min(lengths), max(lengths)],
        "peak_tflops": peak(args.threads, width=config.hidden_size, hidden=config.intermediate_size, short=args.short),
        "ways": {way.key: {"label": way.label, **compared[way.key]} for way in ways},
        "rounds": [],
    }
    for way in ways:  # caches of shapes, pages of memory
        timed(way, prompts[: min(args.batches)])
    longest = 0.0
    while len(result["rounds"]) < FEWEST_ROUNDS or time.perf_counter() - started + longest < 60 * args.minutes:
        start, number = time.perf_counter(), len(result["rounds"])
        turned = ways[number % len(ways) :] + ways[: number % len(ways)]
        # What has a target of a few percent is timed more often than the others.
        turned += (0 if args.short else OFTEN - 1) * [way for way in turned if way.key in ("plain", *MONITORING_TARGETS)]
        entry: dict[str, Any] = {"load": os.getloadavg()[0], "runs": []}
        for batch in args.batches:
            for way in turned:
                if way.batches is None or batch in way.batches:
                    entry["runs"].append({"way": way.key, "batch": batch, **timed(way, prompts[:batch])})
        result["rounds"].append(entry)
        longest = max(longest, time.perf_counter() - start)
        say(f"round {number + 1}: {time.perf_counter() - start:.0f} s")
    return result


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder or a name that affectlens knows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each reply")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--minutes", type=float, default=9.0, help="as many rounds as fit, two at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu compares processor time: for a machine that is busy with other things, with one thread only",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WAY", help="some ways only; plain is always there")
    parser.add_argument("--short", action="store_true", help="a tiny model, 4 tokens, two rounds, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "monitoring.json")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("threads that wait for each other use processor time: --clock cpu needs --threads 1")
    if args.short:
        args.tokens, args.minutes, args.batches, args.out, args.dtype = 4, 0.0, [1, 2], None, "float32"
    return args


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(monitoring(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
