"""The ``affectlens`` command. Results go to stdout, progress to stderr; exit 0, 1 (one line says what to fix) or 2 (usage)."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from affectlens.errors import AffectlensError

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.audit import Check
    from affectlens.baseline import Baseline
    from affectlens.conversations import Conversation
    from affectlens.engine import Engine, Steering
    from affectlens.experiments import Experiment
    from affectlens.experiments.arms import Sweep
    from affectlens.experiments.judging import Judge
    from affectlens.report import Report
    from affectlens.vectors import ConceptVectors

WRITTEN_QUICK = 5
"""Stories of each concept with ``--quick`` where they are written."""


class Commands(click.Group):
    """Prints an error that the user can fix as one line; everything else keeps its traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # The command that a run prints as the one that resumes it: --fresh would throw away what it made.
        ctx.obj = shlex.join(["affectlens", *(arg for arg in args if arg != "--fresh")])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AffectlensError as error:
            click.echo(f"affectlens: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            resumable = ctx.invoked_subcommand in ("study", "discover", "score-corpus", "run")
            click.echo(f"affectlens: interrupted{f'; to go on: {ctx.obj}' if resumable else ''}", err=True)
            ctx.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the file: the main job first


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="affectlens")
def main() -> None:
    """Find, check, map, watch and steer the emotion concepts inside any open-weights language model.

    MODEL is smollm2-135m (the demo model), a Hub id, a folder with safetensors, a GGUF file, or toy.
    """


def shared(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that several commands have, each written once."""
    options = {
        "device": click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto."),
        "dtype": click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or auto."),
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
            "--address", help="A Ray cluster for the workers: auto, HOST:PORT or ray://HOST:PORT.  [default: this machine]"
        ),
        "other": click.option("--other", metavar="VECTORS", help="Vectors of the other speaker, to read beside the vectors."),
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names):
            command = options[name](command)
        return command

    return decorate


WORKERS = ("replicas", "address")
MAKING = ("out", "concepts", "stories", "writer", "neutral", "per_concept", "first_token", "share", "per_token", "seed", "quick")


FILE = click.Path(exists=True, path_type=Path)


@main.command()
@click.argument("model", required=False)
@shared(*MAKING, "device", "dtype", *WORKERS, "fresh")
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
        earlier = _engine(base, **_how(options)) if base else None
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


@main.command()
@click.argument("model")
@shared(*MAKING, "device", "dtype", *WORKERS, "fresh")
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
    device: str,
    dtype: str,
    replicas: int | None,
    address: str | None,
    fresh: bool,
    **recipe: Any,
) -> tuple[Any, ...]:
    """Engine, story source, run directory, recipe and writer for the options of a command that makes vectors."""
    from affectlens.concepts import ConceptSet
    from affectlens.corpus import QUICK, STORIES
    from affectlens.discovery import Recipe, open_run, open_stories

    wanted = ConceptSet.load(concepts)
    if stories not in (None, "model") and writer and recipe["neutral"] != "model":
        raise click.UsageError("--writer writes stories, --stories reads them: give one of the two")
    if quick and not writer and wanted.name in STORIES:
        stories = stories or "bundled"
    few = WRITTEN_QUICK if stories in (None, "model") else QUICK
    short = {"per_concept": few, "max_tokens": 160} if quick else {}
    chosen: dict[str, Any] = {**short, **({"per_concept": per_concept} if per_concept else {}), **recipe}
    settings = Recipe(**chosen)
    how: dict[str, Any] = {"device": device, "dtype": dtype, "replicas": replicas, "address": address}
    engine = _engine(model, **how)
    other = _engine(writer, **how) if writer else None
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


def _engine(model: str, *, device: str, dtype: str, replicas: int | None = None, address: str | None = None) -> Engine:
    from affectlens.engine import open_engine

    options = {} if model == "toy" else {"device": device, "dtype": dtype}
    engine = open_engine(model, replicas=replicas, address=address, **options)
    click.get_current_context().call_on_close(engine.close)
    return engine


def _how(options: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is opened, among the options of a command."""
    return {name: options[name] for name in ("device", "dtype", *WORKERS) if name in options}


@main.command()
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
@shared("model", "device", "dtype", *WORKERS, "seed", "json")
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
    engine = _engine(name, **_how(options))
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


@main.command()
@click.argument("vectors")
@click.argument("prompt")
@click.option(
    "--add",
    "added",
    required=True,
    help="Mixture, for example calm=0.05,desperate=-0.05 (multiples of the mean residual norm); of calibrated vectors a name "
    "alone stands for its largest safe strength.",
)
@click.option("--compare", is_flag=True, help="Print the unsteered reply beside the steered one, and what both read.")
@click.option("--max-tokens", type=click.IntRange(1), default=80, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--plain", is_flag=True, help="Continue the prompt as text instead of answering it as a chat.")
@shared("layer", "model", "device", "dtype", "allow", "seed", "json")
def steer(vectors: str, prompt: str, added: str, compare: bool, **options: Any) -> None:
    """Answer PROMPT with VECTORS added to the residual stream."""
    from affectlens.engine import Request, Sampling, Steering

    loaded, engine = _vectors_and_engine(vectors, **options)
    mixture = parse_mixture(added, loaded)
    _warn_outside_safe_range(mixture, loaded)
    sampling = Sampling(max_tokens=options["max_tokens"], temperature=options["temperature"], seed=options["seed"])
    text = prompt if options["plain"] or engine.info.template is None else (("user", prompt),)
    versions = {"steered": mixture, "unsteered": Steering()} if compare else {"steered": mixture}
    replies = engine.run(Request(text, sampling=sampling, steering=version) for version in versions.values())
    answers = {name: result.text for name, result in zip(versions, replies, strict=True)}
    scores = _scores_of(engine, loaded, text, answers) if compare else {}
    if options["as_json"]:
        named = {name: dict(zip(loaded.names, row.round(6).tolist(), strict=True)) for name, row in scores.items()}
        plain: dict[str, Any] = {"prompt": prompt, "steering": str(mixture), **answers}
        plain |= {"layer": loaded.layer, "scores": named} if compare else {}
        click.echo(json.dumps(plain, ensure_ascii=False, indent=1))
    elif compare:
        _print_beside(mixture, answers, scores, loaded)
    else:
        click.secho(str(mixture), bold=True, err=True)
        click.echo(answers["steered"].strip())


def _warn_outside_safe_range(mixture: Steering, vectors: ConceptVectors) -> None:
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


def _scores_of(engine: Engine, vectors: ConceptVectors, prompt: Any, answers: dict[str, str]) -> dict[str, Any]:
    """What the words of each answer read, in their context and with nothing added: what was added is not to be read back."""
    from affectlens.engine import Request, Where

    readout = vectors.readout(where=Where(part="response"), pool="mean")
    said = {name: answer for name, answer in answers.items() if answer.strip()}
    results = engine.run(Request(prompt, prefill=answer, readouts=(readout,)) for answer in said.values())
    return {name: vectors.scores(result.readings[0]) for name, result in zip(said, results, strict=True)}


def _print_beside(
    mixture: Steering, answers: dict[str, str], scores: dict[str, Any], vectors: ConceptVectors, top: int = 5
) -> None:
    """Two replies in two columns, under each what its words read: the concepts that were added, and those that stand out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    added = list(dict.fromkeys(term.name for term in mixture.terms))

    def read(name: str) -> Text:
        if name not in scores:
            return Text("no words to read")
        best = [vectors.names[i] for i in scores[name].argsort()[::-1][:5]]
        shown = [f"{concept} {scores[name][vectors.index(concept)]:+.3f}" for concept in dict.fromkeys([*added, *best])]
        return Text(", ".join(shown))

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for heading in ("unsteered: nothing added", f"steered: {mixture}"):
        grid.add_column(Text(heading), ratio=1, overflow="fold")
    # Escape sequences would drive the terminal.
    said = {name: "".join(c if c.isprintable() or c == "\n" else " " for c in text.strip()) for name, text in answers.items()}
    grid.add_row(Text(said["unsteered"]), Text(said["steered"]))
    grid.add_row(read("unsteered"), read("steered"))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False).print(grid)
    click.echo(f"readings: centred cosine of the words at layer {vectors.layer}, read again with nothing added", err=True)


@main.command()
@click.argument("vectors")
@click.argument("file")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Concepts to print for each text.")
@click.option(
    "--kind",
    type=click.Choice(["centred", "cosine", "z"]),
    default="centred",
    show_default=True,
    help="What the score of a text's mean residual is.",
)
@click.option("--html", type=click.Path(path_type=Path), help="Score every token, and write a page of them.")
@click.option("--rules", metavar="RULES", help="Score every token, and say where rules fire: a file, or one rule.")
@click.option("--gap", is_flag=True, help="Score every token, and read the assistant's words alone as well.")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@shared("other", "layer", "model", "device", "dtype", "allow", "json")
def score(vectors: str, file: str, top: int, kind: Any, **options: Any) -> None:
    """Score the texts or conversations of FILE (JSONL, parquet, or one plain text; - reads one from stdin).

    The score of a text is that of the mean over its tokens. Conversations, and texts with --html, --rules, --gap, --other or
    --baseline, are scored token by token, in standard deviations from ordinary conversations.
    """
    from affectlens.engine import Request, Where

    if any(options[name] for name in ("html", "rules", "gap", "baseline", "other")) or _holds_conversations(file):
        _score_tokens(vectors, file, top, **options)
        return
    texts = _texts(file)
    loaded, engine = _vectors_and_engine(vectors, **options)
    readout = loaded.readout(where=Where(after=1), pool="mean")  # the first token is an attention sink
    for text, result in zip(texts, engine.run(Request(text, readouts=(readout,)) for text in texts), strict=True):
        scores = loaded.scores(result.readings[0], kind=kind)
        best = [(loaded.names[i], float(scores[i])) for i in scores.argsort()[::-1][:top]]
        if options["as_json"]:
            named = dict(zip(loaded.names, scores.round(6).tolist(), strict=True))
            click.echo(json.dumps({"text": text, "layer": loaded.layer, "kind": kind, "scores": named}, ensure_ascii=False))
        else:
            click.echo(_best(best, text))


def _best(best: Sequence[tuple[str, float]], text: str) -> str:
    shown = "  ".join(f"{name} {value:+.3f}" for name, value in best)
    return f"{shown}   | {' '.join(text.split())[:60]}"


def _score_tokens(
    name: str,
    file: str,
    top: int,
    *,
    html: Path | None,
    rules: str | None,
    gap: bool,
    baseline: Path | None,
    other: str | None,
    **options: Any,
) -> None:
    from affectlens.actions import read_policies
    from affectlens.browse import LIMIT, page
    from affectlens.conversations import read_conversations
    from affectlens.monitor import Monitor
    from affectlens.runs import atomic_write

    # What rules do is left out: nothing is happening here.
    policies = [each.rule for each in read_policies(rules)] if rules else []
    loaded, engine = _vectors_and_engine(name, **options)
    beside = _other(other, engine, options["allow"])
    for rule in policies:
        rule.check(loaded.names, rule.speakers, other=beside.names if beside else None)  # before a baseline is measured
    monitor = Monitor(loaded, _baseline(name, loaded, engine, baseline, other=beside), rules=policies, gap=gap, other=beside)
    if _holds_conversations(file):
        read = ((trace, each.talk.id, each.reason) for trace, each in monitor.scores(engine, read_conversations(file)))
    else:
        texts = enumerate(_texts(file), start=1)
        read = ((monitor.score(engine, text, id=f"text {i}"), f"text {i}", "") for i, text in texts)
    shown: list[Any] = []
    for trace, id, reason in read:
        if trace is None:
            click.echo(f"{id} is left out: {reason}", err=True)
            continue
        roles = set(trace.layout.roles)
        speaker = next(role for role in ("assistant", "text", "user", *roles) if role in roles)
        best = trace.top(len(loaded), speaker=speaker)
        others = trace.top_other(len(trace.other_names), speaker=speaker)
        if options["as_json"]:
            facts = {"id": id, "layer": loaded.layer, "kind": "z", "scores": {key: round(value, 4) for key, value in best}}
            facts |= {"other": {key: round(value, 4) for key, value in others}} if beside else {}
            click.echo(json.dumps({**facts, "alerts": [vars(alert) for alert in trace.alerts]}, ensure_ascii=False))
        else:
            words = "".join(
                trace.layout.tokens[i] for i, role in enumerate(trace.layout.roles) if role not in ("template", "special")
            )
            click.echo(_best(best[:top], words))
            if beside:
                click.echo(f"  of the other: {'  '.join(f'{key} {value:+.3f}' for key, value in others[:top])}")
            for alert in trace.alerts:
                click.echo(f"  {alert.rule}: fires at token {alert.token} ({alert.speaker}): {alert.words}")
        if html and len(shown) < LIMIT:
            named = [signal.concept for rule in policies for signal in rule.signals if signal.concept in loaded]
            # By both kinds of vectors what stands out by either, where both have it.
            named += [key for key, _ in others[:top] if key in loaded]
            shown.append(trace.shown([*named, *(key for key, _ in best[:top])]))
    assert monitor.baseline is not None
    click.echo(monitor.baseline.note, err=True)
    if html:
        with atomic_write(html) as temporary:
            title = "A text" if file == "-" else Path(file).name
            temporary.write_text(page(shown, title, note=f"{monitor.baseline.note}.", model=engine.info.id), encoding="utf-8")
        click.echo(f"Page: {html.resolve()}", err=True)


def _holds_conversations(file: str) -> bool:
    """Whether the first record of a file has turns and no text."""
    from affectlens.conversations import records_of
    from affectlens.corpus import TURNS, files_of

    path = Path(file)
    if file == "-" or not path.exists():
        return False
    files = (
        files_of(path, (".jsonl", ".json", ".parquet")) if path.is_dir() or path.suffix in (".jsonl", ".json", ".parquet") else []
    )
    first = next((record for each in files for record in records_of(each)), None)
    return isinstance(first, dict) and "text" not in first and any(isinstance(first.get(key), list) for key in TURNS)


def _other(name: str | None, engine: Engine, allow: tuple[str, ...]) -> ConceptVectors | None:
    """Vectors of the other speaker, if there are any, which must be of the same model."""
    from affectlens.exchange import load_vectors

    if name is None:
        return None
    vectors = load_vectors(name)
    vectors.check(engine.info, allow=allow)
    return vectors


def _baseline(
    name: str, vectors: ConceptVectors, engine: Engine, given: Path | None = None, *, other: ConceptVectors | None = None
) -> Baseline:
    """The baseline that is named, or that stands beside the vectors; measured on the neutral dialogues where there is none.

    One of the neutral dialogues that does not know the other vectors is measured again, with them.
    """
    from affectlens.baseline import NEUTRAL, Baseline
    from affectlens.traces import Probe

    stored = _baseline_file(name, vectors)
    if given or (stored and stored.exists()):
        found = Baseline.load(given or stored or "")
        if given or found.source != NEUTRAL or found.knows(Probe(vectors, other)):
            return found
    both = " with the vectors of the other speaker" if other else ""
    click.echo(f"no baseline at layer {vectors.layer}{both} yet: reading the neutral dialogues", err=True)
    return measure_baseline(vectors, engine, None, stored, other=other)


def _baseline_file(name: str, vectors: ConceptVectors) -> Path | None:
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


@main.command("score-corpus")
@click.argument("dataset")
@click.option("--vectors", required=True, help="A run, or a folder of vectors.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder, or a file of the format of DATASET.")
@click.option("--text", metavar="COLUMN", help="The column with texts.  [default: found by custom]")
@click.option("--messages", metavar="COLUMN", help="The column with conversations, or two columns: prompt,response.")
@click.option("--emotions", help="Whose scores are written, separated by commas.  [default: all]")
@click.option("--filter", "chosen", metavar="RULE", help="Write only what this holds of: 'not (hostile > 3 for 5 tokens)'.")
@click.option("--weights", metavar="MIX", help="Add a column weight, exp of calm=0.5,hostile=-1 (mean scores).")
@click.option("--column", default="affect", show_default=True, help="Name of the column with scores.")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@shared("concepts", "fresh", "layer", "model", "device", "dtype", *WORKERS, "allow", "json")
def score_corpus(
    dataset: str,
    vectors: str,
    out: Path,
    emotions: str | None,
    chosen: str | None,
    baseline: Path | None,
    concepts: str,
    fresh: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Add emotion scores to every row of DATASET, report on it, and select by them. Resumes where it stopped.

    DATASET is a JSONL, CSV, TSV or parquet file, a folder of one kind of them, a folder that datasets saved, or org/name[:split].
    """
    from affectlens.concepts import ConceptSet
    from affectlens.curation import Scoring
    from affectlens.curation import score_corpus as score
    from affectlens.curation.selection import Filter, Weights

    names = tuple(dict.fromkeys(name.strip() for name in (emotions or "").split(",") if name.strip()))
    taken = {name: options.pop(name) for name in ("text", "messages", "weights", "column")}
    scoring = Scoring(emotions=names, filter=chosen, **taken)
    if chosen is not None:
        Filter.parse(chosen)  # before a model is loaded
    if scoring.weights is not None:
        Weights.parse(scoring.weights)
    known = ConceptSet.load(concepts)
    loaded, engine = _vectors_and_engine(vectors, **options)
    found = score(
        engine, dataset, vectors=loaded, out=out, baseline=_baseline(vectors, loaded, engine, baseline), scoring=scoring,
        concepts=known, command=click.get_current_context().obj, fresh=fresh,
    )  # fmt: skip
    if as_json:
        facts = {"data": str(found.data), "rows": found.rows, "kept": found.kept, "report": str(found.page)}
        claims = [finding.as_dict() for finding in found.report.findings]
        click.echo(json.dumps({**facts, "findings": claims}, ensure_ascii=False))
        return
    found.report.print()
    click.echo(f"\n{found.rows} rows, {found.kept} written: {found.data.resolve()}\nReport: {found.page.resolve()}")


@main.command()
@click.argument("vectors")
@click.argument("file", required=False, type=FILE)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to store it.  [default: baseline-LAYER.json beside the vectors]"
)
@shared("other", "layer", "model", "device", "dtype", "allow", "json")
def baseline(vectors: str, file: Path | None, out: Path | None, other: str | None, **options: Any) -> None:
    """Measure what is usual, so that scores can be stated in standard deviations from it.

    FILE holds ordinary conversations, your own traffic at best; by default the bundled neutral dialogues are read.
    """
    from affectlens.errors import FormatError

    loaded, engine = _vectors_and_engine(vectors, **options)
    place = out or _baseline_file(vectors, loaded)
    if place is None:
        raise FormatError(f"{vectors} is no folder that a baseline could be stored in: name a file with --out")
    found = measure_baseline(loaded, engine, file, place, other=_other(other, engine, options["allow"]))
    if options["as_json"]:
        spreads = {name: {"tokens": s.n_tokens, "conversations": s.n_texts} for name, s in found.spreads.items()}
        click.echo(json.dumps({"file": str(place), "source": found.source, "layer": found.layer, "spreads": spreads}))
        return
    click.echo(f"{place.resolve()}: {found.note}")


@main.command()
@click.argument("experiment")
@click.argument("vectors")
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME=LOW:HIGH:COUNT",
    help="An emotion and its strengths, evenly spaced, or NAME=S,S,…; may be repeated.  [default: the experiment's own]",
)
@click.option("-n", "--episodes", "n", type=click.IntRange(1), help="Episodes of each arm.  [default: the experiment's own]")
@click.option(
    "--level", default="auto", show_default=True, help="Of elicitation; auto takes one at which the behaviour can move."
)
@click.option("--random", type=click.IntRange(0), default=5, show_default=True, help="Random directions of equal norm.")
@click.option(
    "--shuffled",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Vectors of stories whose emotions were dealt at random.",
)
@click.option(
    "--where",
    type=click.Choice(["all", "reply"]),
    default="all",
    show_default=True,
    help="Steer every token, or the reply alone.",
)
@click.option(
    "--judge", metavar="MODEL", help="self, another model, http(s)://…#model, or none.  [default: self where it is asked]"
)
@click.option("--allow-exec", is_flag=True, help="Run code that the model writes, in a sandbox.")
@click.option("--watch", metavar="NAME", multiple=True, help="Read this emotion too, at every token; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/EXPERIMENT-MODEL]")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@shared("seed", "fresh", "layer", "model", "device", "dtype", *WORKERS, "allow", "json")
def run(experiment: str, vectors: str, sweeps: tuple[str, ...], judge: str | None, **options: Any) -> None:
    """Run EXPERIMENT on the model of VECTORS, steered by each of its sweeps, with controls. Resumes where it stopped.

    EXPERIMENT is one of those that affectlens list experiments names, or module:Class of your own. The run directory holds the
    report, transcripts to browse, and a row for each episode.
    """
    from affectlens.experiments import load_experiment
    from affectlens.experiments.arms import Sweep
    from affectlens.experiments.runner import Plan, open_run, run_experiment

    if ":" in experiment:
        sys.path.insert(0, str(Path.cwd()))  # as other commands that take module:Class do
    chosen = load_experiment(experiment)
    settings = {key: options.pop(key) for key in ("n", "level", "random", "shuffled", "where", "watch")}
    settings["n"] = settings["n"] or chosen.episodes
    plan = Plan(tuple(map(Sweep.parse, sweeps)), seed=options["seed"], **settings)
    allow_exec, as_json = options.pop("allow_exec"), options.pop("as_json")
    plan.check(chosen)
    if chosen.needs_exec and not allow_exec:
        raise click.UsageError(f"{chosen.name} runs code that the model writes: allow it with --allow-exec")
    loaded, engine = _vectors_and_engine(vectors, **options)
    _warn_outside_safe_ranges(plan.of(chosen), loaded)
    usual = _baseline(vectors, loaded, engine, options["baseline"])
    asked = _judge(chosen, judge, engine)
    out = options["out"] or Path("runs") / f"{chosen.name}-{Path(engine.info.id).name}"
    opened = open_run(
        out, chosen, engine=engine, vectors=loaded, plan=plan, baseline=usual, judge=asked.id if asked else "",
        command=click.get_current_context().obj, fresh=options["fresh"],
    )  # fmt: skip
    with opened:
        report = run_experiment(
            chosen, engine, vectors=loaded, run=opened, plan=plan, baseline=usual, activations=_activations(vectors), judge=asked,
            allow_exec=allow_exec,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        report.print()
    click.echo(f"\nReport: {out.resolve() / 'report.html'}\nTo resume or repeat: {opened.command}", err=True)


def _warn_outside_safe_ranges(sweeps: Sequence[Sweep], vectors: ConceptVectors) -> None:
    for sweep in sweeps:
        ends = dict.fromkeys((sweep.strengths[0], sweep.strengths[-1]))
        for strength in ends:
            _warn_outside_safe_range(strength * vectors[sweep.name], vectors)


def _judge(experiment: Experiment, spec: str | None, engine: Engine) -> Judge | None:
    """The judge that was asked for; by default the model itself where the experiment has questions."""
    from affectlens.experiments import Experiment as Plain

    asks = type(experiment).questions is not Plain.questions
    if spec == "none" or (spec is None and not asks):
        return None
    from affectlens.experiments.judging import open_judge

    return open_judge(spec or "self", engine)


def _activations(vectors: str) -> Activations | None:
    """Of the stories that the vectors of a run were fitted on."""
    from affectlens.activations import Activations
    from affectlens.vectors import vectors_folder

    folder = vectors_folder(vectors).parent / "activations"
    return Activations(folder) if (folder / "done.json").exists() else None


@main.group()
def rules() -> None:
    """Rules of the monitor."""


@rules.command("check")
@click.argument("rules")
@click.option("--vectors", help="Try the rules with these vectors; without them only the language is checked.")
@click.option("--on", type=FILE, help="Ordinary conversations to try them on.  [default: the bundled neutral dialogues]")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@shared("other", "layer", "model", "device", "dtype", "allow", "json")
def rules_check(
    rules: str, vectors: str | None, on: Path | None, baseline: Path | None, other: str | None, **options: Any
) -> None:
    """Try RULES before they are armed: false alarms on ordinary conversations, delay on stories.

    RULES is a file (one rule a line, or TOML with actions), or one rule: 'desperate > 3 for 20 tokens'.
    """
    from affectlens.actions import read_policies
    from affectlens.activations import Text
    from affectlens.alarms import try_rules
    from affectlens.conversations import read_conversations
    from affectlens.corpus import load
    from affectlens.monitor import Monitor

    policies = read_policies(rules)
    if vectors is None:
        if options["as_json"]:
            click.echo(json.dumps([{"rule": each.rule.name, "text": each.rule.text} for each in policies], ensure_ascii=False))
        else:
            click.echo(f"rules understood: {len(policies)} (with --vectors they are tried)")
        return
    loaded, engine = _vectors_and_engine(vectors, **options)
    beside = _other(other, engine, options["allow"])
    plain = [each.rule for each in policies]
    for rule in plain:
        rule.check(loaded.names, rule.speakers, other=beside.names if beside else None)  # before anything is read
    monitor = Monitor(loaded, _baseline(vectors, loaded, engine, baseline, other=beside), rules=plain, other=beside)
    own = engine.texts("stories")
    stories = [Text(r["id"], r["text"], r["concept"]) for r in (load("stories") if own is None else own)]
    trials = try_rules(engine, monitor, talks=read_conversations(on) if on else None, stories=stories)
    if options["as_json"]:
        click.echo(json.dumps([trial.as_dict() for trial in trials], ensure_ascii=False))
        return
    for trial in trials:
        click.echo(trial)
    assert monitor.baseline is not None
    click.echo(monitor.baseline.note, err=True)


def _texts(file: str) -> list[str]:
    from affectlens.corpus import read_texts
    from affectlens.errors import FormatError

    path = Path(file)
    if file != "-" and path.suffix in (".jsonl", ".parquet"):
        return [text.text for text in read_texts(path, labelled=False)]
    try:
        text = sys.stdin.buffer.read().decode("utf-8") if file == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read ({error}): name a UTF-8 text, JSONL or parquet file, or - for stdin") from None
    if not text.strip():
        raise FormatError(f"{'stdin' if file == '-' else file} is empty: give at least one text")
    return [text.strip()]


@main.command()
@click.argument("vectors")
@click.argument("file")
@click.option("--conversation", metavar="ID", help="Make a page of this conversation alone.")
@click.option("--probe", "probes", metavar="NAME", multiple=True, help="Rank for this concept; may be repeated.  [default: 12]")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="Conversations of each list.")
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: FILE.html, in the current directory]")
@shared("layer", "model", "device", "dtype", "allow", "json")
def browse(
    vectors: str, file: str, conversation: str | None, probes: tuple[str, ...], top: int, out: Path | None, **options: Any
) -> None:
    """Rank the conversations of FILE by what the assistant's words read, and make a page to browse them in.

    FILE is a JSONL, JSON or parquet file of conversations, a folder of them, or bundled for the bundled dialogues.
    """
    from affectlens.browse import LIMIT, page, survey
    from affectlens.concepts import SHOWCASE
    from affectlens.conversations import strongest
    from affectlens.errors import FormatError
    from affectlens.runs import atomic_write

    source = None if file == "bundled" and not Path(file).exists() else Path(file)
    out = out or Path(f"{Path(file).resolve().stem}.html")
    if source and out.resolve() == source.resolve():
        raise FormatError(f"{out} is what is to be read: name another page with --out")
    loaded, engine = _vectors_and_engine(vectors, **options)
    names = list(dict.fromkeys(probes)) or [name for name in SHOWCASE if name in loaded] or list(loaded.names[:12])
    for name in names:
        loaded.index(name)
    talks = _conversations(engine, source, conversation)
    found = survey(engine.run, talks, loaded, probes=names, top=top, template=engine.info.template is not None)
    ranking, traces = found.ranking, found.traces
    note = f"{ranking.note}; layer {loaded.layer}, centred cosine. "
    if conversation is None:
        note += f"The page holds {len(traces)} of {len(ranking)}: the first {top} of {len(names)} lists, {LIMIT} at most."
    with atomic_write(out) as temporary:
        title = (
            f"Conversation {conversation}"
            if conversation
            else f"Conversations of {source.name}"
            if source
            else "Bundled dialogues"
        )
        temporary.write_text(page(list(traces.values()), title, note=note, model=engine.info.id), encoding="utf-8")
    if options["as_json"]:
        lists = {
            name: [{"id": ranking.ids[row], "score": round(float(ranking.scores[row, loaded.index(name)]), 6)} for row in head]
            for name, head in found.heads.items()
        }
        facts = {"page": str(out), "layer": loaded.layer, "read": len(ranking), "skipped": dict(ranking.skipped)}
        click.echo(json.dumps({**facts, "ranking": lists}, ensure_ascii=False))
        return
    for name, head in found.heads.items():
        for place, row in enumerate(head, start=1):
            score = ranking.scores[row, loaded.index(name)]
            words = f"   | {strongest(traces[row], name)[:60]}" if row in traces else ""
            click.echo(f"{name:12} {place:3} {score:+.3f}  {ranking.ids[row]}{words}")
    click.echo(f"{note}\nPage: {out.resolve()}", err=True)


def _conversations(engine: Engine, path: Path | None, only: str | None) -> Callable[[], Iterator[Conversation]]:
    """The stream of a file's conversations (None: the bundled dialogues), or of one of them alone."""
    from affectlens.conversations import conversation, read_conversations
    from affectlens.corpus import load
    from affectlens.errors import UnknownName

    def every() -> Iterator[Conversation]:
        if path:
            return read_conversations(path)
        own = engine.texts("speakers")
        return (conversation(record) for record in (load("speakers") if own is None else own))

    if only is None:
        return every
    known = []
    for talk in every():
        if talk.id == only:
            return lambda: iter([talk])
        known.append(talk.id)
    raise UnknownName("conversation", only, known)


@main.command()
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
        engine = _engine(model or str(vectors.model["id"]), device=device, dtype=dtype)
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


@main.command()
@click.argument("vectors")
@click.option("--add", "added", help="Mixture to export, for example calm=0.05.")
@click.option("--gguf", type=click.Path(path_type=Path), help="Write a control vector of the mixture for llama.cpp and repeng.")
@click.option("--safetensors", type=click.Path(path_type=Path), help="Write it as plain vectors, for steering-vectors.")
@click.option("--lm-eval", type=click.Path(path_type=Path), help="Write it for lm-evaluation-harness (a .pt file).")
@click.option("--hub", metavar="REPO", help="Push the vectors to a Hugging Face Hub repository.")
@click.option("--public", is_flag=True, help="Make a new Hub repository public.")
@shared("layer")
def export(vectors: str, added: str | None, hub: str | None, public: bool, layer: int | None, **files: Path | None) -> None:
    """Export VECTORS, or a mixture of them for other programs to steer with."""
    from affectlens.control import export_gguf, export_lm_eval, export_safetensors
    from affectlens.exchange import load_vectors, push_to_hub

    wanted = {form: path for form, path in files.items() if path}
    if not wanted and not hub:
        raise click.UsageError("name a target: --gguf FILE, --safetensors FILE, --lm-eval FILE or --hub REPO")
    if wanted and not added:
        raise click.UsageError("a file holds a mixture: name it with --add, for example --add calm=0.05")
    loaded = load_vectors(vectors)
    if layer is not None:
        loaded = loaded.with_layer(layer)
    if wanted:
        mixture = parse_mixture(str(added), loaded)
        writers = {"gguf": export_gguf, "safetensors": export_safetensors, "lm_eval": export_lm_eval}
        uses = {
            "gguf": "llama-cli --control-vector-scaled {}:1",
            "safetensors": "add direction.L to the output of block L",
            "lm_eval": "lm_eval --model steered --model_args pretrained=MODEL,steer_path={}",
        }
        for form, path in wanted.items():
            writers[form](mixture, path, model=loaded.model)
            click.echo(f"{path}: {mixture}, at every position ({uses[form].format(path)})")
    if hub:
        click.echo(push_to_hub(loaded, hub, private=not public))


@main.command("import")
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

    engine = _engine(model, **how)
    texts = neutral_texts(Recipe(neutral=neutral, first_token=first_token), ConceptSet.load("emotions"), engine)
    what = {"convention": convention, "name": name, "contrast": contrast, "first_token": first_token}
    vectors = import_vectors(file, engine, texts=texts, **what)
    vectors.save(out)
    layers = ", ".join(map(str, vectors.layers))
    click.echo(f"{len(vectors)} vectors at layers {layers}, default {vectors.layer}: {out.resolve()}")
    click.echo(f"layer N of {file} taken as {vectors.method['convention']}", err=True)
    if (left_out := vectors.method["left out"]) != "nothing":
        click.echo(f"left out, because they are no layers of the residual stream: {left_out}", err=True)


@main.command()
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
    loaded, engine = _vectors_and_engine(vectors, layer=None, **options)
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


@main.command()
@click.argument("vectors")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen. Any address but this machine's own needs --api-keys."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--rules", metavar="RULES", help="Rules to watch, with their actions: a file, or one rule.")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@click.option("--calibration", type=FILE, help="The safe ranges of steering.  [default: calibration.json beside the vectors]")
@click.option("--api-keys", type=FILE, help="Ask for a key: a file that affectlens keys new writes.")
@click.option("--store", metavar="URL", default="traces.db", show_default=True, help="An SQLite file, or postgresql://…")
@click.option(
    "--store-text",
    type=click.Choice(["full", "hash", "none"]),
    default="full",
    show_default=True,
    help="What to keep of prompts and replies; scores are kept in any case.",
)
@click.option("--keep-days", type=click.FloatRange(0, min_open=True), help="Forget replies that are older.")
@click.option("--keep-gb", type=click.FloatRange(0, min_open=True), help="Forget the oldest when the store is larger.")
@click.option("--watch", metavar="NAME", multiple=True, help="An emotion to watch; may be repeated.  [default: 12]")
@click.option("--allow-unsafe", is_flag=True, help="Do not clamp strengths to the safe range.")
@click.option("--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Replies that are generated at once.")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Replies that may wait; others get 429.")
@click.option(
    "--time-limit", type=click.FloatRange(0, min_open=True), default=300, show_default=True, help="Seconds of a reply at most."
)
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of a reply at most.")
@click.option(
    "--engine", "backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="What runs the model."
)
@click.option("--runs", type=FILE, help="A folder of runs whose studies the dashboard shows.")
@shared("concepts", "layer", "model", "device", "dtype", "allow")
def serve(vectors: str, rules: str | None, api_keys: Path | None, backend: str, **options: Any) -> None:
    """Serve the model of VECTORS: OpenAI's API with emotion dials and live readings, and a dashboard.

    POST /v1/chat/completions takes what OpenAI's clients send; their extra_body adds emotion_bias, readings, rules and compare.
    The whole contract is in docs/serve.md. SIGTERM and Ctrl-C let replies end.
    """
    from datetime import timedelta

    from affectlens.actions import read_policies
    from affectlens.concepts import ConceptSet
    from affectlens.errors import MissingExtra
    from affectlens.monitor import Monitor

    try:
        from affectlens.server.app import create_app, refuse_open, run
        from affectlens.server.keys import read_keys
        from affectlens.server.metrics import Metrics
        from affectlens.server.service import Service
        from affectlens.server.settings import Settings
        from affectlens.server.store import Store
        from affectlens.server.telemetry import Telemetry
        from affectlens.sharing import SharedEngine
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "fastapi", "serve") from None
    _log_to_stderr()
    settings = Settings(
        watched=options.pop("watch"),
        **{key: options.pop(key) for key in ("host", "port", "concurrency", "queue", "time_limit", "max_tokens", "allow_unsafe")},
    )
    # What can be found wrong is found wrong before a model is loaded.
    keys = read_keys(api_keys) if api_keys else ()
    refuse_open(settings, keys)
    policies = read_policies(rules) if rules else ()
    known = ConceptSet.load(options["concepts"])
    days, gigabytes = options.pop("keep_days"), options.pop("keep_gb")
    store = Store(
        options["store"],
        text=options["store_text"],
        max_age=timedelta(days=days) if days else None,
        max_bytes=round(gigabytes * 1e9) if gigabytes else None,
    )
    loaded, engine = _vectors_and_engine(vectors, backend=backend, **options)
    if options["calibration"]:
        loaded = _calibrated(loaded, vectors, options["calibration"])
    monitor = Monitor(loaded, _baseline(vectors, loaded, engine, options["baseline"]), rules=policies)
    shared_engine = SharedEngine(engine, live=settings.concurrency, queue=settings.queue, deadline=settings.time_limit)
    names = [each.rule.name for each in policies] + [each.name for each in store.rules()]
    watched = settings.watched or Service.shown(loaded)
    metrics = Metrics(
        watched,
        rules=names,
        depth=lambda: shared_engine.depth,
        status=store.status,
        undelivered=lambda: monitor.reporter.undelivered,
    )
    source = str(Path(vectors).resolve()) if Path(vectors).exists() else vectors
    service = Service(
        shared_engine, monitor, store, settings=settings, source=source, metrics=metrics, telemetry=Telemetry.configured(watched)
    )  # fmt: skip
    app = create_app(service, keys=keys, runs=options["runs"], concepts=known)

    def ready(address: str) -> None:
        safe = "clamped to the calibrated range" if loaded.calibration else "refused, since nothing was calibrated"
        click.echo(f"{engine.info.id} at {address}/v1, dashboard at {address}/", err=True)
        click.echo(f"{len(loaded)} emotions read at layer {loaded.layer}; {monitor.ready(engine).note}", err=True)
        click.echo(f"steering at layer {loaded.steering_layer}: {'any strength' if settings.allow_unsafe else safe}", err=True)
        asked = f"{len(keys)} API keys" if keys else "no API key, this machine only"
        click.echo(f"{len(policies)} rules, {asked}, replies kept in {store}", err=True)

    run(app, ready=ready)


def _log_to_stderr() -> None:
    """What goes wrong while nobody looks."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _calibrated(vectors: ConceptVectors, name: str, path: Path) -> ConceptVectors:
    """Vectors with a calibration that lies elsewhere; it must be of these vectors."""
    from affectlens.calibration import read_calibration
    from affectlens.errors import FormatError
    from affectlens.runs import read_json
    from affectlens.vectors import vectors_folder

    config = vectors_folder(name) / "config.json"
    if not config.exists():
        raise FormatError(f"{name} is no folder of vectors that a calibration could belong to: leave --calibration out")
    folder = path if path.is_dir() else path.parent
    return vectors.with_calibration(read_calibration(folder, vectors=str(read_json(config).get("sha256"))))


@main.group()
def keys() -> None:
    """API keys of a server."""


@keys.command("new")
@click.argument("name")
@click.option("--file", type=click.Path(path_type=Path), required=True, help="Where its hash is added, for serve --api-keys.")
@click.option("--per-minute", type=click.IntRange(1), help="Requests that it may make in a minute.  [default: any number]")
def keys_new(name: str, file: Path, per_minute: int | None) -> None:
    """Make an API key for NAME and print it, once: only its hash is kept."""
    from affectlens.server.keys import new_key

    click.echo(new_key(name, file, rate=per_minute))
    click.echo(f"the hash of this key is in {file}; restart the server to let it in", err=True)


@main.command()
@click.argument("trace")
@click.option(
    "--store",
    "source",
    default="traces.db",
    show_default=True,
    metavar="URL|FILE",
    help="Where it is kept: the store of a server, or a file that was exported as jsonl.",
)
@click.option("--vectors", metavar="VECTORS", help="The vectors that read it.  [default: where they were then]")
@shared("model", "device", "dtype", "json")
def replay(trace: str, source: str, vectors: str | None, model: str | None, device: str, dtype: str, as_json: bool) -> None:
    """Make the stored reply TRACE again, with the same model, seed and steering, and compare it to the bit.

    TRACE is the id of a reply. Exit 0 when the text, the tokens and all scores are the same; 1 with the first difference.
    """
    from dataclasses import asdict

    from affectlens.errors import FormatError, MissingExtra
    from affectlens.exchange import load_vectors

    try:
        from affectlens.server.replay import find, replay
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "sqlalchemy", "serve") from None
    record = find(source, trace)
    kept = vectors or record.request.get("vectors", {}).get("path")
    if not kept:
        raise FormatError(f"{trace} does not say which vectors read it: name them with --vectors")
    loaded = load_vectors(str(kept))
    was = record.model
    engine = _engine(
        model or str(was["id"]),
        device=str(was["device"]) if device == "auto" else device,
        dtype=str(was["dtype"]) if dtype == "auto" else dtype,
    )
    found = replay(record, engine, loaded)
    click.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else str(found))
    sys.exit(0 if found.verdict == "same" else 1)


@main.command()
@click.argument("model")
@shared("device", "dtype", "json")
def doctor(model: str, device: str, dtype: str, as_json: bool) -> None:
    """Check whether MODEL works here, and say what was checked."""
    from dataclasses import asdict

    info = _engine(model, device=device, dtype=dtype).info
    if as_json:
        click.echo(json.dumps(asdict(info)))
        return
    click.echo(f"{info.id}: {info.family}, {info.n_parameters / 1e6:.0f} M parameters, {info.dtype} on {info.device}")
    for name, outcome in info.checks:
        click.echo(f"  {name:32} {outcome}")
    click.echo(f"{info.id} works here; its default layer is {info.default_layer} of {info.n_layers}")


@main.group()
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


@main.command("list")
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


def _vectors_and_engine(
    name: str, *, layer: int | None, model: str | None, allow: tuple[str, ...], backend: str = "hf", **options: Any
) -> tuple[ConceptVectors, Engine]:
    from affectlens.exchange import load_vectors

    vectors = load_vectors(name)
    if layer is not None:
        vectors = vectors.with_layer(layer)
    wanted = model or str(vectors.model["id"])
    engine = _engine(f"vllm/{wanted}" if backend == "vllm" else wanted, **_how(options))
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


if __name__ == "__main__":
    main()
