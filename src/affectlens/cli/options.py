"""Options that several commands have, each written once, and what they name: a model, vectors, a baseline, a mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from affectlens.baseline import Baseline
    from affectlens.engine import Engine, Steering
    from affectlens.vectors import ConceptVectors


def shared(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that several commands have, each written once."""
    options = {
        "device": click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto."),
        "dtype": click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."),
        "compile": click.option(
            "--compile",
            "compile_blocks",
            is_flag=True,
            help="Compile the model's blocks: reads much text faster, after some seconds at the start.",
        ),
        "out": click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/MODEL]"),
        "concepts": click.option(
            "--concepts", default="emotions", show_default=True, help="Bundled set, or a TOML file of your own."
        ),
        "stories": click.option(
            "--stories",
            help="bundled, model (it writes them), or a JSONL or parquet file or folder.  [default: bundled for models under "
            "3 billion parameters and with --quick, if the concepts have bundled stories; else model]",
        ),
        "writer": click.option("--writer", metavar="MODEL", help="Another model to write the stories."),
        "neutral": click.option(
            "--neutral", default="bundled", show_default=True, help="Neutral texts: bundled, model, or a file."
        ),
        "per_concept": click.option(
            "--per-concept",
            type=click.IntRange(1),
            help="Stories to use of each concept.  [default: all if they are read, 24 if they are written]",
        ),
        "first_token": click.option(
            "--first-token", type=click.IntRange(1), default=50, show_default=True, help="Read stories from this token on."
        ),
        "share": click.option(
            "--share",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.5,
            show_default=True,
            help="Neutral variance to project out.",
        ),
        "per_token": click.option("--per-token", is_flag=True, help="Neutral components over tokens instead of texts."),
        "seed": click.option(
            "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything that is drawn at random."
        ),
        "quick": click.option(
            "--quick",
            is_flag=True,
            help="A first look: four stories of each concept that are read, or five short ones written, and short dialogues.",
        ),
        "fresh": click.option("--fresh", is_flag=True, help="Discard what the run directory holds."),
        "layer": click.option("--layer", type=int, help="Layer.  [default: that of the vectors]"),
        "json": click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        "allow": click.option(
            "--allow",
            multiple=True,
            type=click.Choice(["fingerprint", "template"]),
            help="Accept vectors of another checkpoint of the architecture, or another chat template.",
        ),
        "model": click.option("--model", help="Model to use.  [default: the one the vectors name]"),
        "replicas": click.option(
            "--replicas",
            type=click.IntRange(1),
            help="Spread the work over so many workers, each with the model, with Ray.  [default: this process]",
        ),
        "address": click.option(
            "--address",
            help="A Ray cluster that this machine belongs to: auto or HOST:PORT.  [default: Ray starts here alone]",
        ),
        "other": click.option("--other", metavar="VECTORS", help="Vectors of the other speaker, to read beside the vectors."),
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names):
            command = options[name](command)
        return command

    return decorate


WORKERS = ("device", "dtype", "replicas", "address")
READING = (*WORKERS, "compile")
MAKING = ("out", "concepts", "stories", "writer", "neutral", "per_concept", "first_token", "share", "per_token", "seed", "quick")


FILE = click.Path(exists=True, path_type=Path)


def open_model(
    model: str,
    *,
    device: str,
    dtype: str,
    replicas: int | None = None,
    address: str | None = None,
    compile_blocks: bool = False,
) -> Engine:
    from affectlens.engine import open_engine

    options: dict[str, Any] = {} if model == "toy" else {"device": device, "dtype": dtype}
    if compile_blocks:
        if model == "toy" or model.startswith("vllm/"):
            raise click.UsageError(f"--compile is for models that transformers runs, and {model} is none: leave it out")
        options["compile"] = True
    engine = open_engine(model, replicas=replicas, address=address, **options)
    click.get_current_context().call_on_close(engine.close)
    return engine


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is opened, among the options of a command."""
    return {name: options[name] for name in (*WORKERS, "compile_blocks") if name in options}


def vectors_and_engine(
    name: str, *, layer: int | None, model: str | None, allow: tuple[str, ...], backend: str = "hf", **options: Any
) -> tuple[ConceptVectors, Engine]:
    from affectlens.exchange import load_vectors

    vectors = load_vectors(name)
    if layer is not None:
        vectors = vectors.with_layer(layer)
    wanted = model or str(vectors.model["id"])
    engine = open_model(f"vllm/{wanted}" if backend == "vllm" else wanted, **engine_options(options))
    vectors.check(engine.info, allow=allow)
    return vectors, engine


def parse_mixture(text: str, vectors: ConceptVectors) -> Steering:
    """``calm=0.05,desperate=-0.05`` to a steering; of calibrated vectors ``calm`` alone is its largest safe strength.

    Raises:
        UnknownName: There is no such concept.
        FormatError: Not of this form.
    """
    from affectlens.engine import Steering
    from affectlens.errors import FormatError

    mixture = Steering()
    for part in text.split(","):
        name, equals, strength = part.rpartition("=")
        if not equals and part.strip() and vectors.calibration:
            mixture = mixture + vectors.calibrated(part.strip())
            continue
        try:
            value = float(strength)
        except ValueError:
            value = float("nan")
        if not name or value != value or abs(value) == float("inf"):
            raise FormatError(
                f"{part!r} is no mixture: write NAME=STRENGTH, separated by commas, for example calm=0.05,desperate=-0.05"
                + ("" if equals or vectors.calibration else " (NAME alone needs affectlens calibrate)")
            )
        mixture = mixture + value * vectors[name.strip()]
    return mixture


def warn_outside_safe_range(mixture: Steering, vectors: ConceptVectors) -> None:
    found = vectors.calibration
    if found is None:
        return
    strengths: dict[str, float] = {}
    for term in mixture.terms:
        strengths[term.name] = strengths.get(term.name, 0.0) + term.strength
    if (share := found.share(strengths)) > 1:
        ranges = ", ".join(f"{name} {found.safe[name][0]:.3g} to {found.safe[name][1]:.3g}" for name in strengths)
        times = f"{share:.2g} times the safe range" if share < float("inf") else "where no strength is safe"
        click.echo(f"warning: {mixture} is {times} ({ranges}): the text may fall apart", err=True)


def other_vectors(name: str | None, engine: Engine, allow: tuple[str, ...]) -> ConceptVectors | None:
    """Vectors of the other speaker, if there are any, which must be of the same model."""
    from affectlens.exchange import load_vectors

    if name is None:
        return None
    vectors = load_vectors(name)
    vectors.check(engine.info, allow=allow)
    return vectors


def find_baseline(
    name: str, vectors: ConceptVectors, engine: Engine, given: Path | None = None, *, other: ConceptVectors | None = None
) -> Baseline:
    """The baseline that is named, or that stands beside the vectors; measured on the neutral dialogues where there is none.

    One of the neutral dialogues that does not know the other vectors is measured again, with them.
    """
    from affectlens.baseline import NEUTRAL, Baseline
    from affectlens.traces import Probe

    stored = baseline_file(name, vectors)
    if given or (stored and stored.exists()):
        found = Baseline.load(given or stored or "")
        if given or found.source != NEUTRAL or found.knows(Probe(vectors, other)):
            return found
    both = " with the vectors of the other speaker" if other else ""
    click.echo(f"no baseline at layer {vectors.layer}{both} yet: reading the neutral dialogues", err=True)
    return measure_baseline(vectors, engine, None, stored, other=other)


def baseline_file(name: str, vectors: ConceptVectors) -> Path | None:
    """Where the baseline of vectors stands; None when they are in no folder of ours."""
    for folder in (Path(name) / "vectors", Path(name)):
        if (folder / "config.json").exists():
            return folder / f"baseline-{vectors.layer}.json"
    return None


def measure_baseline(
    vectors: ConceptVectors, engine: Engine, file: Path | None, out: Path | None, *, other: ConceptVectors | None = None
) -> Baseline:
    """Measure a baseline on a file of conversations (None: the neutral dialogues), and store it.

    Args:
        vectors: At their layer.
        engine: The model.
        file: What :func:`affectlens.conversations.read_conversations` reads.
        out: Where to store it; None for nowhere.
        other: Vectors of the other speaker, at theirs.
    """
    from affectlens.baseline import NEUTRAL, Baseline, neutral_dialogues
    from affectlens.conversations import read_conversations
    from affectlens.traces import Probe

    talks = neutral_dialogues(engine) if file is None else read_conversations(file)
    probe = Probe(vectors, other, template=engine.info.template is not None)
    found = Baseline.measure(engine, talks, probe=probe, source=file.name if file else NEUTRAL)
    if out is not None:
        found.save(out)
    return found
