"""The commands that make vectors and find out what they are worth: ``study``, ``discover``, ``calibrate``, ``import``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from affectlens.cli.options import FILE, MAKING, READING, engine_options, open_model, shared

WRITTEN_QUICK = 5
"""Stories of each concept with ``--quick`` where they are written."""


@click.command()
@click.argument("model", required=False)
@shared(*MAKING, *READING, "fresh")
@click.option("--only", help="Studies to run, separated by commas.  [default: all]")
@click.option("--draws", type=click.IntRange(100), default=1000, show_default=True, help="Resamples and permutations.")
@click.option("--base", metavar="MODEL", help="An earlier checkpoint of the architecture, to compare with.")
@click.option("--corpus", metavar="PATH|DATASET", help="Texts to search for the strongest passages.  [default: bundled]")
@click.option("--labels", type=FILE, help="TOML file that maps the labels of --corpus to concepts.")
@click.option("--conversations", type=FILE, help="Conversations to rank.  [default: bundled]")
@click.option("--texts", type=FILE, help="Folder with scenarios.jsonl and the like, to read instead of the bundled ones.")
@click.option("--vectors", type=FILE, help="Study these vectors without a model: a folder, or an .npz file of raw vectors.")
def study(model: str | None, only: str | None, draws: int, **options: Any) -> None:
    """The main job: vectors, every study and the report of MODEL. Resumes where it stopped."""
    from affectlens.pipeline import study_run
    from affectlens.studies import STUDIES, Sources, load_study

    names = tuple(name.strip() for name in only.split(",") if name.strip()) if only else STUDIES
    for name in names:
        load_study(name)
    base, vectors = options.pop("base"), options.pop("vectors")
    sources = Sources(**{key: options.pop(key) for key in ("texts", "corpus", "labels", "conversations")})
    if (model is None) == (vectors is None):
        raise click.UsageError("name a MODEL, or --vectors to study vectors without one")
    if model is None:
        _study_vectors(vectors, names, draws=draws, **options)
        return
    engine, source, run, recipe, writer = _open(model, **options)
    with run:
        earlier = open_model(base, **engine_options(options)) if base else None
        how = {"only": names, "draws": draws, "base": earlier, "sources": sources, "quick": options["quick"]}
        report = study_run(engine, source, run, recipe, writer=writer, **how)
        report.print()
        click.echo(f"\nReport: {run.path.resolve() / 'report.html'}")
        click.echo(f"To resume or repeat: {run.command}", err=True)


def _study_vectors(
    vectors: Path, names: Sequence[str], *, draws: int, out: Path | None, concepts: str, seed: int, fresh: bool, **_: Any
) -> None:
    from affectlens.concepts import ConceptSet
    from affectlens.pipeline import study_vectors

    folder = out or Path("runs") / f"{vectors.resolve().parent.name}-{vectors.stem}"
    report = study_vectors(
        vectors, folder, concepts=ConceptSet.load(concepts), only=names, draws=draws, seed=seed,
        command=click.get_current_context().obj, fresh=fresh,
    )  # fmt: skip
    report.print()
    click.echo(f"\nReport: {folder.resolve() / 'report.html'}")


@click.command()
@click.argument("model")
@shared(*MAKING, *READING, "fresh")
def discover(model: str, **options: Any) -> None:
    """The vectors of MODEL, without studies."""
    from affectlens.discovery import make_vectors

    engine, source, run, recipe, writer = _open(model, **options)
    with run:
        found = make_vectors(engine, source, run, recipe, writer=writer)
        vectors = found.vectors
        click.echo(f"{len(vectors)} vectors at {len(vectors.layers)} layers: {run.path.resolve() / 'vectors'}")
        click.echo(f"stories: {found.stories['source']}, {', '.join(f'{n} {why}' for why, n in found.stories['counts'].items())}")
        click.echo(f"To resume or repeat: {run.command}", err=True)


def _open(
    model: str,
    *,
    out: Path | None,
    concepts: str,
    stories: str | None,
    writer: str | None,
    per_concept: int | None,
    quick: bool,
    fresh: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """Engine, story source, run directory, recipe and writer for the options of a command that makes vectors."""
    from affectlens.concepts import ConceptSet
    from affectlens.corpus import QUICK, STORIES
    from affectlens.discovery import Recipe, open_run, open_stories

    how = engine_options(options)
    recipe = {name: value for name, value in options.items() if name not in how}
    wanted = ConceptSet.load(concepts)
    if stories not in (None, "model") and writer and recipe["neutral"] != "model":
        raise click.UsageError("--writer writes stories, --stories reads them: give one of the two")
    if quick and not writer and wanted.name in STORIES:
        stories = stories or "bundled"
    few = WRITTEN_QUICK if stories in (None, "model") else QUICK
    short = {"per_concept": few, "max_tokens": 160} if quick else {}
    chosen: dict[str, Any] = {**short, **({"per_concept": per_concept} if per_concept else {}), **recipe}
    settings = Recipe(**chosen)
    engine = open_model(model, **how)
    other = open_model(writer, **how) if writer else None
    source = open_stories(stories, wanted, engine, settings, writer=other)
    out = out or Path("runs") / "-".join(
        [
            Path(engine.info.id).absolute().resolve().name,
            *([wanted.name] if concepts != "emotions" else []),
            *(["quick"] if quick else []),
        ]
    )
    run = open_run(out, engine, source, settings, command=click.get_current_context().obj, fresh=fresh)
    return engine, source, run, settings, other


@click.command()
@click.argument("vectors", type=FILE)
@click.option(
    "--perplexity",
    type=click.FloatRange(1, min_open=True),
    default=1.2,
    show_default=True,
    help="How many times as high the perplexity of neutral text may be.",
)
@click.option("--quick", is_flag=True, help="Compare six layers, and measure the safe ranges of twelve emotions.")
@click.option("--draws", type=click.IntRange(100), default=1000, show_default=True, help="Resamples and permutations.")
@shared("model", *READING, "seed", "json")
def calibrate(vectors: Path, perplexity: float, quick: bool, draws: int, as_json: bool, **options: Any) -> None:
    """Find out where and how strongly VECTORS should steer, and keep it beside them.

    From then on they steer at the calibrated layer, are read at the layer that tells held-out stories apart best, and steer warns
    outside the safe range. VECTORS is a folder; resumes where it stopped.
    """
    from affectlens.calibrate import calibrate as measure
    from affectlens.calibration import Bounds
    from affectlens.pipeline import parts
    from affectlens.report import Report
    from affectlens.runs import provenance
    from affectlens.vectors import ConceptVectors, vectors_folder

    folder = vectors_folder(vectors)
    name = options["model"] or str(ConceptVectors.load(folder, calibrated=False).model["id"])
    engine = open_model(name, **engine_options(options))
    loaded, outcome = measure(engine, folder, bounds=Bounds(perplexity), quick=quick, draws=draws, seed=options["seed"])
    found = loaded.calibration
    assert found is not None  # measure() raises otherwise
    command = click.get_current_context().obj
    report = Report(
        f"Calibration of {engine.info.id}",
        model=dict(loaded.model),
        vectors={"concepts": len(loaded), "steered at layer": found.layer, "read at layer": found.reading_layer},
        **parts({"calibration": outcome}),
        provenance={**provenance(), "command": command, "seeds": options["seed"], "draws": draws},
        resume=command,
    )
    page = report.save(folder / "calibration")
    if as_json:
        click.echo(json.dumps(found.as_dict(), ensure_ascii=False))
    else:
        report.print()
        click.echo(f"\nsteers at layer {found.layer}, is read at layer {found.reading_layer}; {found.bounds}")
    click.echo(f"Calibration: {(folder / 'calibration.json').resolve()}\nReport: {page.resolve()}", err=True)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--convention",
    type=click.Choice(["block", "block-from-1", "hidden-states"]),
    required=True,
    help="What layer N of FILE is: the output of block N counted from 0, or from 1, or entry N of output_hidden_states.",
)
@click.option("--model", required=True, help="The model that the vectors belong to.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the vectors to.")
@click.option("--name", help="What a control vector is a vector of.  [default: the name of FILE]")
@click.option("--contrast", is_flag=True, help="Subtract the mean over the concepts: for files of mean residuals.")
@shared("neutral", "first_token", "device", "dtype")
def import_(
    file: Path,
    convention: Any,
    model: str,
    out: Path,
    name: str | None,
    contrast: bool,
    neutral: str,
    first_token: int,
    **how: Any,
) -> None:
    """Make vectors of somebody's FILE (.npz, .safetensors, .gguf), with units measured on MODEL.

    FILE holds layer_N__NAME or NAME (layers, width), or a control vector. Nothing in it tells how layers are counted: say so.
    """
    from affectlens.concepts import ConceptSet
    from affectlens.discovery import Recipe, neutral_texts
    from affectlens.exchange import import_vectors

    engine = open_model(model, **how)
    texts = neutral_texts(Recipe(neutral=neutral, first_token=first_token), ConceptSet.load("emotions"), engine)
    what = {"convention": convention, "name": name, "contrast": contrast, "first_token": first_token}
    vectors = import_vectors(file, engine, texts=texts, **what)
    vectors.save(out)
    layers = ", ".join(map(str, vectors.layers))
    click.echo(f"{len(vectors)} vectors at layers {layers}, default {vectors.layer}: {out.resolve()}")
    click.echo(f"layer N of {file} taken as {vectors.method['convention']}", err=True)
    if (left_out := vectors.method["left out"]) != "nothing":
        click.echo(f"left out, because they are no layers of the residual stream: {left_out}", err=True)
