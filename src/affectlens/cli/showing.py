"""The commands that show what there is: ``show``, ``features``, ``doctor``, ``corpus``, ``list``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from affectlens.cli.options import FILE, open_model, shared, vectors_and_engine

if TYPE_CHECKING:
    from affectlens.audit import Check
    from affectlens.report import Report


@click.command()
@click.argument("path")
@click.argument("other", required=False)
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison with OTHER as a page.")
@click.option("--lens", is_flag=True, help="Print the tokens each direction promotes, as JSON lines (loads the model).")
@shared("json", "layer", "model", "device", "dtype")
def show(
    path: str,
    other: str | None,
    html: Path | None,
    as_json: bool,
    layer: int | None,
    lens: bool,
    model: str | None,
    device: str,
    dtype: str,
) -> None:
    """Show a run, a report or vectors; with OTHER, the findings of two runs beside each other."""
    from affectlens.errors import FormatError
    from affectlens.exchange import load_vectors
    from affectlens.report import Report

    if other is not None:
        _compare(Report.load(path), Report.load(other), html, as_json)
        return
    if html is not None:
        raise click.UsageError("--html writes a comparison: name two runs")
    folder = Path(path)
    report = folder if folder.suffix == ".json" else folder / "report.json"
    if report.exists() and report.name != "config.json" and not lens and layer is None:
        loaded = Report.load(report)
        click.echo(json.dumps(loaded.as_dict(), ensure_ascii=False)) if as_json else loaded.print()
        return
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{path} is no run, report or vectors: name a folder or a report.json")
    vectors = load_vectors(path)
    if layer is not None:
        vectors = vectors.with_layer(layer)
    if lens:
        engine = open_model(model or str(vectors.model["id"]), device=device, dtype=dtype)
        vectors.check(engine.info)
        for name, (up, down) in vectors.top_tokens(engine, vectors.names).items():
            click.echo(json.dumps({"concept": name, "up": up, "down": down}, ensure_ascii=False))
    elif as_json:
        click.echo(
            json.dumps(
                {"names": vectors.names, "layer": vectors.layer, "model": dict(vectors.model), "method": dict(vectors.method)}
            )
        )
    else:
        click.echo(vectors.card().split("---\n", 2)[-1].strip())


def _compare(mine: Report, theirs: Report, html: Path | None, as_json: bool) -> None:
    from affectlens.runs import atomic_write

    if html is not None:
        with atomic_write(html) as temporary:
            temporary.write_text(mine.html(theirs), encoding="utf-8")
        click.echo(f"Comparison: {html.resolve()}", err=True)
    if as_json:
        click.echo(json.dumps([mine.as_dict(), theirs.as_dict()], ensure_ascii=False))
    else:
        mine.print(other=theirs)


@click.command()
@click.argument("vectors")
@click.option("--sae", type=FILE, required=True, help="Folder with a sparse autoencoder in SAELens format.")
@click.option("--concept", "chosen", metavar="NAME", multiple=True, help="Take this one apart; may be repeated.  [default: 12]")
@click.option("--size", type=click.IntRange(1), default=16, show_default=True, help="Features in the sparse approximation.")
@click.option("--draws", type=click.IntRange(100), default=200, show_default=True, help="Draws behind each null.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the features as vectors, to score, steer and export with.")
@shared("stories", "concepts", "per_concept", "first_token", "model", "device", "dtype", "allow", "seed", "json")
def features(
    vectors: str,
    sae: Path,
    chosen: tuple[str, ...],
    size: int,
    draws: int,
    out: Path | None,
    stories: str | None,
    concepts: str,
    per_concept: int | None,
    first_token: int,
    **options: Any,
) -> None:
    """Which features of a sparse autoencoder compose VECTORS, and how well few of them do.

    VECTORS is best a run: contrasts of texts with exchanged labels are then made of the texts that the vectors were fitted on.
    """
    from dataclasses import asdict

    from affectlens.activations import Activations
    from affectlens.concepts import SHOWCASE, ConceptSet
    from affectlens.discovery import Recipe, open_stories, why_dropped
    from affectlens.features import compose, observe
    from affectlens.sparse import SparseAutoencoder, as_vectors

    coder = SparseAutoencoder.load(sae)
    loaded, engine = vectors_and_engine(vectors, layer=None, **options)
    coder.check(loaded)
    names = list(dict.fromkeys(chosen)) or [name for name in SHOWCASE if name in loaded] or list(loaded.names[:12])
    for name in names:
        loaded.index(name)
    known = ConceptSet.load(concepts)
    known = known.select([name for name in loaded.names if name in known])
    source = open_stories(stories, known, engine, Recipe(per_concept=per_concept, first_token=first_token))
    seen: set[str] = set()
    texts = [t for i in range(source.shards()) for t in source.shard(i) if not why_dropped(t, source.concepts, seen)]
    firing = observe(engine, coder, texts, first_token=first_token)
    folder = Path(vectors) / "activations"
    fitted = Activations(folder) if folder.is_dir() else None
    found = compose(coder, loaded, firing, fitted=fitted, names=names, size=size, draws=draws, seed=options["seed"])
    if out is not None:
        union = list(dict.fromkeys(feature for one in found for feature in one.chosen))
        as_vectors(coder, loaded, union, texts=firing.residuals).save(out)
        click.echo(f"{len(union)} features as vectors: {out.resolve()}", err=True)
    if options["as_json"]:
        what = {
            "layer": coder.layer,
            "features": len(coder),
            "explained": asdict(firing.explained),
            "per_token": firing.per_token,
        }
        click.echo(json.dumps({**what, "concepts": [one.as_dict() for one in found]}, ensure_ascii=False))
        return
    click.echo(
        f"{len(coder)} features of layer {coder.layer}: they reconstruct {firing.explained} of the variance of "
        f"{len(firing.texts)} texts, {firing.per_token:.1f} fire at a token"
    )
    for one in found:
        k = len(one.explained)
        click.echo(f"\n{one.name}: {k} features make up {one.explained[-1]:.2f} of the direction")
        click.echo(f"  random directions: {one.random[-1]}\n  texts with exchanged labels: {one.exchanged[-1]}")
        click.echo("  feature  weight  cosine  fires more in its texts          AUROC  p")
        for f in one.features:
            weight = f"{f.weight:+.3f}" if f.weight else "     –"
            click.echo(f"  {f.id:7}  {weight}  {f.cosine:+.3f}  {f.difference!s:32} {f.auroc:.2f}   {f.p:.2g}")


@click.command()
@click.argument("model")
@shared("device", "dtype", "json")
def doctor(model: str, device: str, dtype: str, as_json: bool) -> None:
    """Check whether MODEL works here, and say what was checked."""
    from dataclasses import asdict

    info = open_model(model, device=device, dtype=dtype).info
    if as_json:
        click.echo(json.dumps(asdict(info)))
        return
    click.echo(f"{info.id}: {info.family}, {info.n_parameters / 1e6:.0f} M parameters, {info.dtype} on {info.device}")
    for name, outcome in info.checks:
        click.echo(f"  {name:32} {outcome}")
    click.echo(f"{info.id} works here; its default layer is {info.default_layer} of {info.n_layers}")


@click.group()
def corpus() -> None:
    """Collections of stories: the bundled one, or yours."""


@corpus.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@shared("concepts", "json")
def check(path: Path | None, concepts: str, as_json: bool) -> None:
    """Check stories for what spoils vectors.

    PATH is a JSONL or parquet file or a folder; the bundled corpus by default. Exit 1 when something is to be mended.
    """
    from dataclasses import asdict

    from affectlens.audit import audit
    from affectlens.concepts import ConceptSet

    checks = audit(path, ConceptSet.load(concepts))
    if as_json:
        click.echo(json.dumps([{**asdict(row), "passed": row.passed} for row in checks], ensure_ascii=False))
    else:
        _print_checks(checks)
    sys.exit(0 if all(row.passed for row in checks) else 1)


def _print_checks(checks: Sequence[Check], shown: int = 5) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "file", "check", "found", "allowed", box=None, pad_edge=False)
    for row in checks:
        table.add_row("ok" if row.passed else "FAIL", row.file, row.what, row.found, row.allowed)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table)
    for row in checks:
        for fault in row.faults[:shown]:
            click.echo(f"{row.file}: {row.what}: {fault}")
        if len(row.faults) > shown:
            click.echo(f"{row.file}: {row.what}: and {len(row.faults) - shown} more (--json lists all)")
    failed = sum(not row.passed for row in checks)
    click.echo(f"{len(checks)} checks, {failed} failed")


@click.command("list")
@click.argument("what", type=click.Choice(["engines", "concepts", "corpus", "studies", "experiments"]))
@shared("json")
def list_(what: str, as_json: bool) -> None:
    """List what there is: engines, concepts, files of the bundled corpus, studies, or experiments."""
    if what == "engines":
        rows = {
            "hf": "transformers: a Hub id, a folder or a GGUF file",
            "smollm2-135m": "the demo model",
            "toy": "planted directions",
            "ray": "any of these on several workers: --replicas",
            "vllm": "vLLM here (vllm/NAME), or a vllm serve (vllm/http://HOST:PORT)",
        }
    elif what == "concepts":
        from affectlens.concepts import ConceptSet

        rows = {concept.name: concept.definition for concept in ConceptSet.load("emotions")}
    elif what == "corpus":
        from affectlens.corpus import FILES

        rows = dict(FILES)
    elif what == "experiments":
        from affectlens.experiments import EXPERIMENTS, load_experiment

        rows = {name: load_experiment(name).title for name in EXPERIMENTS}
    else:
        from affectlens.studies import STUDIES, load_study

        rows = {name: load_study(name).question for name in STUDIES}
    click.echo(json.dumps(rows, ensure_ascii=False) if as_json else "\n".join(f"{name:20} {text}" for name, text in rows.items()))
