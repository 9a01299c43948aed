"""The commands that read texts and conversations: ``score``, ``score-corpus``, ``baseline``, ``rules``, ``browse``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from affectlens.cli.options import (
    FILE,
    READING,
    baseline_file,
    find_baseline,
    measure_baseline,
    other_vectors,
    shared,
    vectors_and_engine,
)

if TYPE_CHECKING:
    from affectlens.conversations import Conversation
    from affectlens.engine import Engine


@click.command()
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
    loaded, engine = vectors_and_engine(vectors, **options)
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
    loaded, engine = vectors_and_engine(name, **options)
    beside = other_vectors(other, engine, options["allow"])
    for rule in policies:
        rule.check(loaded.names, rule.speakers, other=beside.names if beside else None)  # before a baseline is measured
    monitor = Monitor(loaded, find_baseline(name, loaded, engine, baseline, other=beside), rules=policies, gap=gap, other=beside)
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


@click.command("score-corpus")
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
@shared("concepts", "fresh", "layer", "model", *READING, "allow", "json")
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
    loaded, engine = vectors_and_engine(vectors, **options)
    found = score(
        engine, dataset, vectors=loaded, out=out, baseline=find_baseline(vectors, loaded, engine, baseline), scoring=scoring,
        concepts=known, command=click.get_current_context().obj, fresh=fresh,
    )  # fmt: skip
    if as_json:
        facts = {"data": str(found.data), "rows": found.rows, "kept": found.kept, "report": str(found.page)}
        claims = [finding.as_dict() for finding in found.report.findings]
        click.echo(json.dumps({**facts, "findings": claims}, ensure_ascii=False))
        return
    found.report.print()
    click.echo(f"\n{found.rows} rows, {found.kept} written: {found.data.resolve()}\nReport: {found.page.resolve()}")


@click.command()
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

    loaded, engine = vectors_and_engine(vectors, **options)
    place = out or baseline_file(vectors, loaded)
    if place is None:
        raise FormatError(f"{vectors} is no folder that a baseline could be stored in: name a file with --out")
    found = measure_baseline(loaded, engine, file, place, other=other_vectors(other, engine, options["allow"]))
    if options["as_json"]:
        spreads = {name: {"tokens": s.n_tokens, "conversations": s.n_texts} for name, s in found.spreads.items()}
        click.echo(json.dumps({"file": str(place), "source": found.source, "layer": found.layer, "spreads": spreads}))
        return
    click.echo(f"{place.resolve()}: {found.note}")


@click.group()
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
    loaded, engine = vectors_and_engine(vectors, **options)
    beside = other_vectors(other, engine, options["allow"])
    plain = [each.rule for each in policies]
    for rule in plain:
        rule.check(loaded.names, rule.speakers, other=beside.names if beside else None)  # before anything is read
    monitor = Monitor(loaded, find_baseline(vectors, loaded, engine, baseline, other=beside), rules=plain, other=beside)
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


@click.command()
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
    loaded, engine = vectors_and_engine(vectors, **options)
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
