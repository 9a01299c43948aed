"""The main job: vectors, every study and the report of one model, in one run directory that can be killed and resumed.

Run it as ``affectlens study MODEL``, or call :func:`study` with an engine of your own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.browse import page
from affectlens.calibrate import calibration_of
from affectlens.calibration import write_calibration
from affectlens.concepts import SHOWCASE, ConceptSet
from affectlens.conversations import Trace
from affectlens.corpus import FILES, bundled, identity
from affectlens.discovery import CorpusStories, Discovery, Recipe, StorySource, make_vectors, open_run, open_stories
from affectlens.engine import Engine, Request, Where
from affectlens.errors import EngineError, MismatchError
from affectlens.exchange import load_vectors
from affectlens.readings import Readings
from affectlens.report import Report
from affectlens.runs import Progress, Run, Stage, atomic_write, content_id, provenance, read_json, sha256_file, write_json
from affectlens.studies import STUDIES, Bench, Checkpoint, Finding, Outcome, Sources, Study, load_study
from affectlens.vectors import ConceptVectors


def study(
    engine: Engine,
    concepts: str | Path | ConceptSet = "emotions",
    *,
    out: str | Path,
    stories: str | Path | None = None,
    recipe: Recipe = Recipe(),
    writer: Engine | None = None,
    only: Sequence[str] = STUDIES,
    base: Engine | None = None,
    sources: Sources = Sources(),
) -> Report:
    """Vectors, studies and the report of a model; whatever ``out`` already holds is used.

    Args:
        engine: The model under study.
        concepts: A concept set, its name, or a TOML file.
        out: Run directory.
        stories: Where they come from, see :func:`affectlens.discovery.open_stories`.
        recipe: How vectors are made.
        writer: The model that writes stories (default: ``engine``).
        only: Names of the studies to run.
        base: An earlier checkpoint of the same architecture to compare with.
        sources: Texts of yours for the studies to read.

    Returns:
        The report, which is also in ``out`` as ``report.html``, ``report.md`` and ``report.json``.

    Raises:
        UnknownName: There is no such study.
        AffectlensError: As :func:`affectlens.discover`.
    """
    concepts = concepts if isinstance(concepts, ConceptSet) else ConceptSet.load(concepts)
    source = open_stories(stories, concepts, engine, recipe, writer=writer)
    with open_run(out, engine, source, recipe) as run:
        return study_run(engine, source, run, recipe, writer=writer, only=only, base=base, sources=sources)


def study_run(
    engine: Engine,
    source: StorySource,
    run: Run,
    recipe: Recipe,
    *,
    writer: Engine | None = None,
    only: Sequence[str] = STUDIES,
    draws: int = 1000,
    base: Engine | None = None,
    sources: Sources = Sources(),
    quick: bool = False,
) -> Report:
    """What :func:`study` does in an open run directory.

    Args:
        draws: Resamples and permutations behind intervals and nulls.
        quick: Read only a part of the largest bundled files.
    """
    studies = [load_study(name) for name in only]
    found = make_vectors(engine, source, run, recipe, writer=writer)
    bench = Bench(
        found.vectors, found.concepts, found.activations, found.neutral, engine, draws, recipe.seed, sources,
        readings=_readings(engine, run), base=_checkpoint(base, found, run, recipe) if base else None, quick=quick,
    )  # fmt: skip
    outcomes = _calibrated_first(studies, bench, run, found.stage_id)
    with Progress() as progress:
        progress.start(1, "report")
        report = _report(engine, found, run, outcomes, draws)
        report.save(run.path)
        _write_conversations(engine, run)
        progress.advance()
    return report


def _calibrated_first(studies: Sequence[Study], bench: Bench, run: Run, vectors_id: str) -> dict[str, Outcome]:
    """Run the studies: first those that calibrate, whose calibration is kept with the vectors and used by those that steer.

    The vectors' layer, at which studies read, stays the published one: what a report says must not depend on whether its
    vectors were calibrated before.
    """
    first = [each for each in studies if each.name in ("separation", "calibration")]
    outcomes = run_studies(first, bench, run, vectors_id)
    folder, kept = run.path / "vectors", None
    if "calibration" in outcomes:
        data = outcomes["separation"].data if "separation" in outcomes else {}
        kept = calibration_of(outcomes["calibration"], data)
        if kept:
            write_calibration(kept, folder, vectors=sha256_file(folder / "vectors.safetensors"))
    kept = kept or ConceptVectors.load(folder).calibration
    rest = [each for each in studies if each not in first]
    outcomes |= run_studies(rest, replace(bench, vectors=replace(bench.vectors, calibration=kept)), run, vectors_id)
    return {each.name: outcomes[each.name] for each in studies}


def _write_conversations(engine: Engine, run: Run) -> None:
    """The conversations that the study of transcripts traced, as a page to browse beside the report."""
    kept = run.path / "study-transcripts" / "traces.json"
    traced = read_json(kept) if kept.exists() else {"traces": []}
    if not traced["traces"]:
        return
    traces = [Trace(**trace) for trace in traced["traces"]]
    html = page(traces, f"Conversations read by {engine.info.id}", note=traced["note"], model=engine.info.id)
    with atomic_write(run.path / "conversations.html") as temporary:
        temporary.write_text(html, encoding="utf-8")


def study_vectors(
    vectors: str | Path,
    out: str | Path,
    *,
    concepts: ConceptSet,
    only: Sequence[str] = STUDIES,
    draws: int = 1000,
    seed: int = 0,
    command: str = "",
    fresh: bool = False,
) -> Report:
    """The studies of vectors without their model: what needs a text to be read is untestable and says so.

    Args:
        vectors: A folder of vectors, or an ``.npz`` file of raw vectors (:func:`affectlens.exchange.load_vectors`).
        out: Run directory.
        concepts: The set with ratings and families.
        only, draws, seed: As in :func:`study_run`.
        command, fresh: As in :meth:`affectlens.runs.Run.open`.

    Raises:
        FormatError: Not vectors.
        AffectlensError: ``out`` was made of other vectors.
    """
    loaded = load_vectors(str(vectors))
    digest = content_id([loaded.names, loaded.layers, loaded.layer, hashlib.sha256(loaded.directions.tobytes()).hexdigest()])
    what = {"vectors": digest, "concepts": concepts.hash, "seed": seed}
    with Run.open(out, what=what, command=command, fresh=fresh) as run:
        bench = Bench(loaded, concepts, draws=draws, seed=seed)
        outcomes = run_studies([load_study(name) for name in only], bench, run, digest)
        report = Report(
            f"Emotion vectors of {loaded.model.get('id', vectors)}",
            model=dict(loaded.model),
            vectors={"concepts": len(loaded), "layer": loaded.layer, "layers": len(loaded.layers), **loaded.method},
            **parts(outcomes),
            provenance={**provenance(), "command": command, "seeds": seed, "draws": draws},
            resume=command,
        )
        report.save(run.path)
    return report


def run_studies(studies: Sequence[Study], bench: Bench, run: Run, vectors_id: str) -> dict[str, Outcome]:
    """Run the studies whose outcome is not there yet; all that they read, they read in one pass over the distinct prompts."""
    stages: dict[str, Stage] = {}
    for each in studies:
        inputs: dict[str, Any] = {"vectors": vectors_id, "version": each.version, "draws": bench.draws, "seed": bench.seed}
        inputs |= {"quick": True} if bench.quick else {}
        folder = f"study-{each.name.replace('_', '-')}"
        stages[each.name] = run.stage(folder, inputs | {use: _identity(use, bench) for use in each.uses})
    todo = [each for each in studies if not stages[each.name].done]
    with Progress() as progress:
        refused = _gather(todo, bench, progress)
        for each in todo:
            stage = stages[each.name]
            progress.start(1, f"study: {each.name}")
            try:
                reason = refused.get(each.name)
                outcome = _refused(each, reason) if reason else each.run(replace(bench, folder=stage.path))
            except EngineError as error:
                outcome = _refused(each, str(error))
            for name, columns in outcome.raw.items():
                _write_table(stage.path / f"{name}.parquet", columns)
            write_json(stage.path / "outcome.json", outcome.as_dict())
            stage.finish({})
            progress.advance()
    return {name: Outcome.from_dict(read_json(stage.path / "outcome.json")) for name, stage in stages.items()}


def _gather(studies: Sequence[Study], bench: Bench, progress: Progress) -> dict[str, str]:
    """Read what the studies ask, each distinct prompt once; say of which study the model refused a request, and why."""
    if bench.readings is None:
        return {}
    asked = {each.name: list(each.requests(bench)) for each in studies}
    waiting = len(bench.readings.missing(request for own in asked.values() for request in own))
    if waiting:
        progress.start(waiting, "reading what the studies ask")
    try:
        bench.readings.gather((request for own in asked.values() for request in own), progress.advance)
    except EngineError:  # a dialogue too long for the model, say: the other studies can do without it
        refused = {}
        for name, own in asked.items():
            try:
                bench.readings.gather(own, progress.advance)
            except EngineError as error:
                refused[name] = str(error)
        return refused
    return {}


def _refused(study: Study, reason: str) -> Outcome:
    """The outcome of a study whose texts the model cannot run."""
    rule = "the model must be able to run every text of the study"
    finding = Finding(
        study.name, "refused", study.question, None, None, None, "untestable", rule, f"{reason[0].upper()}{reason[1:]}."
    )
    return Outcome((finding,), (), {"reason": reason})


def _write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path) as temporary:
        pq.write_table(pa.table({name: np.asarray(values).tolist() for name, values in columns.items()}), temporary)


def _readings(engine: Engine, run: Run, name: str = "readings") -> Readings:
    info = engine.info
    stage = run.stage(name, {"fingerprint": info.fingerprint, "dtype": info.dtype, "template": info.template})
    return Readings(engine, stage.path)


def _checkpoint(base: Engine, found: Discovery, run: Run, recipe: Recipe) -> Checkpoint:
    """Vectors of an earlier checkpoint from the very stories of the model under study, whoever wrote those.

    Raises:
        MismatchError: It is another architecture, or the same weights.
    """
    mine = found.vectors.model
    for key in ("family", "n_layers", "width"):
        if mine[key] != getattr(base.info, key):
            raise MismatchError(
                f"{base.info.id} ({key} {getattr(base.info, key)}) is no checkpoint of the architecture of "
                f"{mine['id']} ({key} {mine[key]}): name one that is with --base"
            )
    if base.info.fingerprint == mine["fingerprint"]:
        raise MismatchError(f"{base.info.id} has the very weights of {mine['id']}: name an earlier checkpoint with --base")
    source = CorpusStories(found.activations.folder.parent / "stories", found.concepts, name=found.stories["source"])
    with open_run(run.path / "base", base, source, recipe) as nested:
        return Checkpoint(base, make_vectors(base, source, nested, recipe).vectors, _readings(base, nested))


def _identity(use: str, bench: Bench) -> Any:
    """What a study depends on, as plain data: a change starts the study again."""
    if use == "base":
        return bench.base and bench.base.engine.info.fingerprint
    if use == "calibration":
        return bench.vectors.calibration and bench.vectors.calibration.as_dict()
    if use == "texts":
        folder = bench.sources.texts
        files = [folder / f"{name}.jsonl" if folder else bundled(name) for name in FILES]
        return content_id([sha256_file(file) for file in [*map(bundled, FILES), *files] if file.exists()])
    value = getattr(bench.sources, use)
    return value and identity(value)


def _report(engine: Engine, found: Discovery, run: Run, outcomes: Mapping[str, Outcome], draws: int) -> Report:
    vectors = found.vectors
    model = {key: value for key, value in asdict(engine.info).items() if key != "checks"}
    if engine.info.reply_token:
        model["reply_token"] = repr(engine.info.reply_token)  # often a line break, which would not be seen
    return Report(
        f"Emotion vectors of {engine.info.id}"
        if found.concepts.name == "emotions"
        else f"{found.concepts.title}: {engine.info.id}",
        model=model,
        vectors={
            "concepts": len(vectors),
            "layer": vectors.layer,
            "stories": f"{found.stories['source']}; {len(found.activations)} read",
            "mean residual norm": f"{vectors.residual_norms[vectors.row()]:.4g} at layer {vectors.layer}",
            "read from token": vectors.method["first_token"],
            "neutral texts": vectors.method["neutral"],
            "projected out": f"{vectors.method['share']:.0%} of their variance, {vectors.method['neutral components']}",
        },
        checks=_checks(engine, found),
        **parts(outcomes),
        stories=_token_view(engine, found),
        provenance={**provenance(), "command": run.command, "seeds": vectors.method["seed"], "draws": draws},
        resume=run.command,
    )


def parts(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Findings, figures and tables of all studies for a report; ids get the study's name, as each study counts its own."""
    drawn = {name: load_study(name).draw(outcome.data) for name, outcome in outcomes.items()}
    return {
        "findings": [finding for outcome in outcomes.values() for finding in outcome.findings],
        "figures": [replace(figure, id=f"{name}-{figure.id}") for name, figures in drawn.items() for figure in figures],
        "tables": [replace(table, id=f"{name}-{table.id}") for name, outcome in outcomes.items() for table in outcome.tables],
    }


def _check(name: str, status: str, value: Any, detail: str) -> dict[str, Any]:
    return {"name": name, "status": status, "value": value, "detail": detail}


def _checks(engine: Engine, found: Discovery) -> list[dict[str, Any]]:
    """Instrument checks: whether the readings mean what they say, before any finding is looked at."""
    vectors, row = found.vectors, found.vectors.row()
    checks = []
    for name, outcome in engine.info.checks:
        fell_back = "instead" in outcome or "unusable" in outcome or outcome.startswith("none")
        checks.append(_check(name, "warn" if fell_back else "ok", "falls back" if fell_back else "passed", outcome))
    counts = found.stories["counts"]
    total, kept = found.stories["total"], counts.get("kept", 0)
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()) if reason != "kept") or "none dropped"
    checks.append(_check("stories used", "ok" if kept >= 0.8 * total else "warn", f"{kept} of {total}", dropped))
    leaks = counts.get("names the concept", 0)
    checks.append(
        _check(
            "leakage",
            "ok" if leaks <= 0.02 * total else "warn",
            f"{leaks} of {total}",
            "stories that name their concept; dropped",
        )
    )
    tokens = found.activations.n_tokens
    low, middle, high = np.percentile(tokens, [5, 50, 95])
    short = kept - len(found.activations)
    first = vectors.method["first_token"]
    detail = f"5 % have {low:.0f} or fewer, 5 % {high:.0f} or more; {short} stories end before token {first}"
    checks.append(
        _check("tokens read per story", "ok" if low >= 10 and short <= 0.1 * kept else "warn", f"median {middle:.0f}", detail)
    )
    if left_out := [name for name in found.concepts.names if name not in vectors]:
        detail = f"no usable story, or all too short to read: {', '.join(left_out)}"
        checks.append(_check("concepts left out", "warn", len(left_out), detail))
    least = int(vectors.counts.min())
    scarce = f"fewest: {vectors.names[int(vectors.counts.argmin())]}; most: {int(vectors.counts.max())}"
    checks.append(_check("stories per concept", "ok" if least >= 10 else "warn", f"at least {least}", scarce))
    components = len(vectors.neutral[row])
    detail = f"reach {vectors.method['share']:.0%} of the variance of {len(found.neutral)} neutral texts at layer {vectors.layer}"
    checks.append(_check("neutral components", "ok", components, detail))
    stability = vectors.stability[row]
    worst = vectors.names[int(stability.argmin())]
    detail = f"cosine of refits on resampled stories; lowest {worst} {stability.min():.2f}"
    checks.append(
        _check("stability", "ok" if np.median(stability) >= 0.8 else "warn", f"median {np.median(stability):.2f}", detail)
    )
    return checks


def _token_view(engine: Engine, found: Discovery, n: int = 6) -> list[dict[str, Any]]:
    """A few stories with a score per token for their own concept and the showcase ones.

    The vectors were fitted on these stories too: the view shows where in a text a direction lights up, it is no test.
    """
    vectors: ConceptVectors = found.vectors
    shown = [name for name in SHOWCASE if name in vectors] or list(vectors.names[:12])
    first = {concept: i for i, concept in reversed(list(enumerate(found.activations.concepts.tolist())))}
    chosen = [first[name] for name in shown if name in first][:n]
    texts = _texts(found, [found.activations.ids[i] for i in chosen])
    probes = [vectors.index(name) for name in shown]
    readout = vectors.readout(where=Where(after=1), pool="none")  # the first token is an attention sink
    out = []
    for i, result in zip(chosen, engine.run(Request(text, readouts=(readout,)) for text in texts), strict=True):
        layout, reading = result.layout, result.readings[0]
        scores = np.full((len(layout), len(probes)), np.nan)
        scores[reading.positions] = vectors.scores(reading)[:, probes]
        out.append(
            {
                "concept": found.activations.concepts[i],
                "topic": found.activations.topics[i],
                "layer": vectors.layer,
                "scale": float(np.nanpercentile(np.abs(scores), 99)),
                "tokens": list(layout.tokens),
                "scores": {name: scores[:, k] for k, name in enumerate(shown)},
            }
        )
    return out


def _texts(found: Discovery, ids: list[str]) -> list[str]:
    import pyarrow.parquet as pq

    wanted: dict[str, str] = {}
    for path in sorted((found.activations.folder.parent / "stories").glob("*.parquet")):
        for record in pq.read_table(path, columns=["id", "text"], filters=[("id", "in", ids)]).to_pylist():
            wanted[record["id"]] = record["text"]
    return [wanted[i] for i in ids]
