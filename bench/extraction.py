"""How fast, and in how much memory, the mean residual of stories is read: affectlens beside what people use today.

    python bench/extraction.py                     48 stories, 3 rounds, every library at its best: a quarter of an hour
    python bench/extraction.py --short             a few texts through a tiny model: does everything still work?
    python bench/extraction.py --only all --texts 512 --rounds 5     every configuration: hours
    python bench/extraction.py --only nnsight-8-stop affectlens --rounds 3

Two tasks: (one) the mean over each story from its 50th own token on at one layer at two thirds of the depth, (all) the same at
every layer, which is measured in every other round. A subject is a library in one configuration; it runs in a process of its own
(``bench/peers``) in an environment of its own (``bench/.envs``, made on demand), once per round and task, in an order that is
shuffled each round. Numbers are checked twice against float32 means made with plain hooks: in float32 on a few texts, tightly
enough to see a mean that is off by one token, and in the dtype that is timed on all texts. A subject with other numbers is
marked wrong.

Writes ``bench/results/extraction.json`` with every raw round; ``bench/table.py`` makes the table in ``docs/benchmarks.md`` of it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from host import CACHE, MODEL, PEERS, RESULTS, Environment, begun, keep, peak, say, tiny_model
from speed_tables import extraction, one_line

TEXT_TOKENS = (80, 300)
FIRST_TOKEN = 50
SEED = 20260402

EXACT_TEXTS = 16
EXACT_ERROR = 1e-4
"""Largest relative error in float32. Rounding gives 1e-6; a mean that is off by one token, 3e-3 to 2e-2."""
TIMED_COSINE = 0.999
"""Smallest cosine with the float32 reference in the dtype that is timed."""

# The same allocator for all. A threshold at glibc's limit neither hoards large blocks, which would blur the peaks, nor asks the
# kernel for every activation anew, which would slow the subjects that allocate most.
MALLOC = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
}


@dataclass(frozen=True)
class Subject:
    """A library in one configuration.

    Args:
        key: Name for ``--only`` and the results.
        label: What the table calls it.
        script: In ``bench/peers``.
        environment: None runs in this process's own.
        options: Passed to the script.
        tasks: Stopping early, for instance, is nothing to try at every layer.
        reads: ``mean``, or ``last`` when the library can only return the last token.
        normed_end: What it returns for the last layer is after the model's final norm.
        best: Whether this is how the library is fastest here: the others are measured only when they are asked for.
    """

    key: str
    label: str
    script: str
    environment: Environment | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("one", "all")
    reads: str = "mean"
    normed_end: bool = False
    best: bool = False

    @property
    def python(self) -> str:
        return sys.executable if self.environment is None else str(self.environment.python)


STEERING_VECTORS = Environment("steering-vectors", ("steering-vectors==0.12.2", "transformers==4.57.6"))
REPENG = Environment("repeng", ("repeng==0.4.0", "transformers==5.23.0"))
TRANSFORMER_LENS = Environment("transformer-lens", ("transformer-lens==4.3.0", "transformers==5.23.0"))
NNSIGHT = Environment("nnsight", ("nnsight==0.8.1", "transformers==5.23.0"))
ORDINARY = "loop-8"
OURS = ("affectlens", "affectlens-compiled")

_LOOP, _RECORD = "transformers_loop.py", "steering_vectors_reader.py"
_LENS, _SIGHT = "transformer_lens_reader.py", "nnsight_reader.py"
_END = {"normed_end": True}
_LAST = {"reads": "last", **_END}
_ONE = {"tasks": ("one",)}
_BEST = {"best": True}

SUBJECTS = (
    Subject(
        ORDINARY,
        "ordinary loop: `output_hidden_states=True`, padded batches of 8",
        _LOOP,
        options={"batch": 8},
        **_END,
        **_BEST,
    ),
    Subject("loop-16", "ordinary loop, batches of 16", _LOOP, options={"batch": 16}, **_END),
    Subject("loop-1", "ordinary loop, one text at a time", _LOOP, options={"batch": 1}, **_END),
    Subject(
        "loop-1-body",
        "ordinary loop, one text at a time, without the unembedding",
        _LOOP,
        options={"batch": 1, "head": False},
        **_END,
        **_BEST,
    ),
    Subject("steering-vectors-8", "steering-vectors, batches of 8", _RECORD, STEERING_VECTORS, {"batch": 8}),
    Subject("steering-vectors-1", "steering-vectors, one at a time", _RECORD, STEERING_VECTORS, {"batch": 1}),
    Subject(
        "steering-vectors-1-body",
        "steering-vectors, one at a time, without the unembedding",
        _RECORD,
        STEERING_VECTORS,
        {"batch": 1, "head": False},
        **_BEST,
    ),
    Subject("repeng-32", "repeng, batches of 32 (its default)", "repeng_reader.py", REPENG, {"batch": 32}, **_LAST, **_BEST),
    Subject("repeng-1", "repeng, one at a time", "repeng_reader.py", REPENG, {"batch": 1}, **_LAST),
    Subject("transformer-lens-8", "TransformerLens bridge, batches of 8", _LENS, TRANSFORMER_LENS, {"batch": 8}),
    Subject(
        "transformer-lens-8-stop",
        "TransformerLens bridge, batches of 8, stopped early",
        _LENS,
        TRANSFORMER_LENS,
        {"batch": 8, "stop": True},
        **_ONE,
    ),
    Subject(
        "transformer-lens-1-stop",
        "TransformerLens bridge, stopped early, hooks in place of the cache, one at a time",
        _LENS,
        TRANSFORMER_LENS,
        {"batch": 1, "stop": True, "hooks": True},
        **_ONE,
        **_BEST,
    ),
    Subject("nnsight-8", "nnsight, batches of 8", _SIGHT, NNSIGHT, {"batch": 8}),
    Subject("nnsight-8-stop", "nnsight, batches of 8, stopped early", _SIGHT, NNSIGHT, {"batch": 8, "stop": True}),
    Subject("nnsight-1-stop", "nnsight, stopped early, one at a time", _SIGHT, NNSIGHT, {"batch": 1, "stop": True}, **_BEST),
    Subject(OURS[0], "**affectlens**", "affectlens_reader.py", **_BEST),
    Subject(OURS[1], "**affectlens**, compiled blocks", "affectlens_reader.py", options={"compile": True}, **_BEST),
)


@dataclass(frozen=True)
class Shapes:
    """The sizes of the model that the operations are counted from."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int

    @classmethod
    def of(cls, model: Path) -> Shapes:
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def layer(self) -> int:
        """The layer at two thirds of the depth, as ``ModelInfo.default_layer`` has it."""
        return min(self.layers - 1, round(self.layers * 2 / 3))

    def flops(self, blocks: int, lengths: Sequence[int]) -> float:
        """Multiplications and additions that these texts need in the first ``blocks`` blocks: a gated MLP and causal attention.

        Nothing that a way of doing it adds is counted: no padding, no masked half of the attention, no unembedding.
        """
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        per_token = 2 * (self.width * (2 * queries + 2 * keys) + 3 * self.width * self.hidden)
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return blocks * (per_token * sum(lengths) + 2 * 2 * queries * pairs)


def measure(short: bool = False) -> dict[str, Any]:
    """Read with every library at its best; the short form reads a few texts with those that need no environment of their own."""
    return measured(arguments(["--short"] if short else []))


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(extraction(result))
    return 0


def measured(args: argparse.Namespace) -> dict[str, Any]:
    CACHE.mkdir(exist_ok=True)
    if args.short:
        model = tiny_model()
    else:
        from affectlens.models import locate

        model = Path(locate(args.model, log=say).location)
    shapes = Shapes.of(model)
    texts, lengths = stories(model, args.texts)
    subjects = [subject for subject in SUBJECTS if subject.key in args.only]
    unavailable = prepare(subjects)
    bench = Bench(model, shapes, texts, args.threads, args.dtype, unavailable)
    layers = {"one": [shapes.layer], "all": list(range(shapes.layers))}
    plan = [(subject, task) for subject in subjects for task in args.tasks if task in subject.tasks]

    checked = [s for s in subjects if s.key in OURS] if args.short else [] if args.skip_exact else subjects
    verdicts = {subject.key: bench.exact(subject, layers["all"]) for subject in checked}
    result: dict[str, Any] = {
        **begun("extraction"),
        "model": model.name if args.short else args.model,
        "shapes": asdict(shapes),
        "layer": shapes.layer,
        "dtype": args.dtype,
        "threads": args.threads,
        "clock": "seconds" if args.clock == "wall" else "cpu_seconds",
        "malloc": MALLOC,
        "texts": {
            "source": "bundled stories, cut at sentence ends; longer texts are two stories of one emotion",
            "count": len(texts),
            "tokens": sum(lengths),
            "shortest": min(lengths),
            "longest": max(lengths),
            "padded_tokens_in_8": sum(8 * max(lengths[i : i + 8]) for i in range(0, len(lengths), 8)),
        },
        "flops": {task: shapes.flops(max(layers[task]) + 1, lengths) for task in layers},
        "subjects": {s.key: {"label": s.label, "options": s.options, "reads": s.reads, "end": s.normed_end} for s in subjects},
        "ordinary": ORDINARY,
        "ours": OURS,
        "exact": verdicts,
        "rounds": [],
    }
    shuffle = random.Random(SEED)
    for number in range(1, args.rounds + 1):
        say(f"round {number} of {args.rounds}")
        if number > 1:
            peak.cache_clear()  # a peak of its own for every round
        measured_peak = peak(args.threads, width=shapes.width, hidden=shapes.hidden, short=args.short)
        entry: dict[str, Any] = {"peak_tflops": measured_peak, "load": os.getloadavg()[0], "runs": []}
        for subject, task in shuffle.sample(plan, len(plan)):
            if task == "all" and number % 2 == 0:
                continue
            run = bench.measure(subject, task, layers[task])
            entry["runs"].append({"subject": subject.key, "task": task, **run})
            say(f"  {subject.key:24} {task:4} " + one_line(run, sum(lengths)))
        result["rounds"].append(entry)
    return result


def prepare(subjects: Sequence[Subject]) -> dict[str, str]:
    """Make the environments of these; which could not be made, and why: the others are measured all the same."""
    found = {}
    for environment in {s.environment.name: s.environment for s in subjects if s.environment}.values():
        try:
            environment.prepare()
        except (subprocess.CalledProcessError, OSError) as error:
            found[environment.name] = f"its environment could not be made ({error})"
            say(f"  {environment.name}: {found[environment.name]}")
    return found


@dataclass(frozen=True)
class Bench:
    """What all runs share; ``unavailable`` says why an environment of this name is not there."""

    model: Path
    shapes: Shapes
    texts: list[str]
    threads: int
    dtype: str
    unavailable: dict[str, str] = field(default_factory=dict)

    def measure(self, subject: Subject, task: str, layers: list[int]) -> dict[str, Any]:
        """Run a subject once and compare its numbers with the reference; an error is a result too."""
        answer, values = self._run(subject, layers, self.dtype, self.texts, f"{subject.key}-{task}")
        if values is None:
            return answer
        wanted = self._wanted(subject, layers, self.texts)
        cosine = float((_unit(values) * _unit(wanted)).sum(-1).min())
        return {**answer, "cosine": cosine, "right": cosine > TIMED_COSINE}

    def exact(self, subject: Subject, layers: list[int]) -> dict[str, Any]:
        """Compare a subject with the reference in float32, on a few texts and in every layer."""
        texts = self.texts[:EXACT_TEXTS]
        answer, values = self._run(subject, layers, "float32", texts, f"{subject.key}-exact")
        if values is None:
            say(f"  {subject.key:24} failed: {answer['error']}")
            return answer
        wanted = self._wanted(subject, layers, texts)
        error = float((np.linalg.norm(values - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())
        say(f"  {subject.key:24} float32 error {error:.1e}{'' if error < EXACT_ERROR else ': WRONG'}")
        return {"error_float32": error, "right": error < EXACT_ERROR, "versions": answer["versions"]}

    def _run(
        self, subject: Subject, layers: list[int], dtype: str, texts: list[str], name: str
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        if subject.environment and subject.environment.name in self.unavailable:
            return {"error": self.unavailable[subject.environment.name]}, None
        out = CACHE / f"{name}.npy"
        out.unlink(missing_ok=True)
        job = {
            "model": str(self.model),
            "texts": str(_texts_file(texts)),
            "layers": layers,
            "first_token": FIRST_TOKEN,
            "threads": self.threads,
            "dtype": dtype,
            "out": str(out),
            "options": subject.options,
        }
        done = self._process(subject.python, subject.script, job)
        if done.returncode != 0:
            return {"error": (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]}, None
        values = np.load(out).astype(np.float64)
        out.unlink()
        return json.loads(done.stdout), values

    def _process(self, python: str, script: str, job: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        environ = {
            **os.environ,
            **MALLOC,
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run(
            [python, PEERS / script], input=json.dumps(job), capture_output=True, text=True, env=environ, check=False
        )

    def _wanted(self, subject: Subject, layers: list[int], texts: list[str]) -> np.ndarray:
        reference = self._reference(texts)
        wanted = reference[subject.reads][:, layers].astype(np.float64)
        if subject.normed_end and layers[-1] == self.shapes.layers - 1:
            wanted[:, -1] = reference[f"{subject.reads}_normed"]
        return wanted

    def _reference(self, texts: list[str]) -> Any:
        described = f"{self.model} {(self.model / 'config.json').read_text()} {FIRST_TOKEN} {json.dumps(texts)}"
        named = hashlib.sha256(described.encode()).hexdigest()[:16]
        path = CACHE / f"reference-{named}.npz"
        if not path.is_file():
            say(f"computing the float32 reference of {len(texts)} texts")
            job = {"texts": str(_texts_file(texts)), "model": str(self.model), "first_token": FIRST_TOKEN, "out": str(path)}
            done = self._process(sys.executable, "reference.py", {**job, "threads": self.threads})
            if done.returncode != 0:
                raise RuntimeError(f"the reference failed: {done.stderr[-2000:]}")
        return np.load(path)


def stories(model: Path, count: int) -> tuple[list[str], list[int]]:
    """Texts of 80 to 300 tokens that end where a sentence ends, and their lengths in tokens.

    The bundled stories are shorter. A length is drawn evenly from the range for each text, and sentences of one story, then of a
    second one of the same emotion, are taken until it is reached.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = random.Random(SEED)
    low, high = TEXT_TOKENS
    texts, lengths = [], []
    for sentences in _story_pairs(rng):
        target, text, length = rng.randint(low, high), "", 0
        for sentence in sentences:
            longer = f"{text} {sentence}".strip()
            tokens = len(tokenizer.encode(longer).ids)
            if tokens > high or length >= target:
                break
            text, length = longer, tokens
        if length >= low:
            texts.append(text)
            lengths.append(length)
        if len(texts) == count:
            break
    return texts, lengths


def _story_pairs(rng: random.Random) -> Iterator[list[str]]:
    from affectlens.corpus import load

    ordered = sorted(load("stories"), key=lambda record: record["concept"])
    by_emotion = [[r["text"] for r in own] for _, own in itertools.groupby(ordered, key=lambda record: record["concept"])]
    while True:
        first, second = rng.sample(rng.choice(by_emotion), 2)
        yield re.split(r"(?<=[.!?\"”])\s+", f"{first} {second}")


def _texts_file(texts: list[str]) -> Path:
    content = json.dumps(texts)
    path = CACHE / f"texts-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        path.write_text(content)
    return path


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    keys, best = [s.key for s in SUBJECTS], [s.key for s in SUBJECTS if s.best]
    parser.add_argument("--model", default=MODEL, help="a folder or a name that affectlens knows")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="one thread leaves a core to the rest of the machine")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tasks", nargs="+", choices=("one", "all"), default=["one", "all"])
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu compares processor time: for a machine that is busy with other things, with one thread only",
    )
    parser.add_argument("--only", nargs="+", choices=["all", *keys], default=best, metavar="SUBJECT", help="all, or some")
    parser.add_argument("--skip-exact", action="store_true", help="leave out the check in float32")
    parser.add_argument("--short", action="store_true", help="a tiny model, a few texts, one round, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "extraction.json")
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("threads that wait for each other use processor time: --clock cpu needs --threads 1")
    if "all" in args.only:
        args.only = keys
    if args.short:
        args.texts, args.rounds, args.out, args.dtype = 8, 1, None, "float32"
        args.only, args.tasks = [ORDINARY, *OURS], ["one"]
    return args


if __name__ == "__main__":
    sys.exit(main())
