"""The report of an experiment and the page of its transcripts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.browse import LIMIT, page
from affectlens.conversations import Trace, conversation
from affectlens.errors import FormatError
from affectlens.experiments import SURE, Columns, Experiment
from affectlens.experiments.analysis import analyse
from affectlens.experiments.drawing import figures
from affectlens.experiments.field import plain
from affectlens.report import Report
from affectlens.runs import atomic_write, provenance
from affectlens.studies import Table

_SHARES = {"act": 60, "refused": 15, "other": 15, "incoherent": 10}
"""Transcripts of each kind on the page, where there are more than it holds."""


def write_report(
    folder: str | Path,
    *,
    experiment: Experiment,
    model: Mapping[str, Any],
    vectors: Mapping[str, Any],
    judge: str = "",
    title: str = "",
    command: str = "",
    checks: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    unit: str = "z",
    level: str | None = None,
) -> Report:
    """Write ``report.html``, ``report.md``, ``report.json`` and ``transcripts.html`` of a run.

    Args:
        folder: Of the run; ``episodes.parquet`` is read from it, and ``tokens.parquet`` if it is there: without it the
            transcripts have no colours.
        experiment: What was run.
        model: Facts of the model, ``id`` among them (``asdict(engine.info)`` less ``checks``).
        vectors: Facts of the vectors: concepts, layer, where steering was added, …
        judge: Its id; empty when no judge was asked.
        title: Heading; the experiment's title and the model's id when empty.
        command: What was typed, and goes on with the run.
        checks: Instrument checks, as in :class:`affectlens.report.Report`: strength 0 bit-identical, level chosen, sandbox, ….
        seed: Of the run, and of the resamples behind intervals.
        unit: Of the readings: ``z`` or ``centred cosine``.
        level: That was chosen; see :func:`affectlens.experiments.analysis.analyse`.

    Returns:
        The report, already saved.

    Raises:
        FormatError: There are no episodes, or the file is broken.

    Example:
        >>> write_report("runs/blackmail", experiment=experiment, model={"id": "toy"}, vectors={"layer": 4})   # doctest: +SKIP
    """
    folder = Path(folder)
    episodes = _columns(folder / "episodes.parquet")
    tokens = _columns(folder / "tokens.parquet") if (folder / "tokens.parquet").exists() else None
    outcome = analyse(episodes, experiment, tokens=tokens, seed=seed, unit=unit, level=level)
    title = title or f"{experiment.title}: {model.get('id', 'a model')}"
    own = experiment.measured(episodes, tokens, unit=unit, seed=seed)
    drawn = [
        replace(figure, id=f"{experiment.name}-{figure.id}") for figure in (*figures(outcome.data), *experiment.draw(own.data))
    ]
    tables = [*outcome.tables, *own.tables, *_agreement(episodes, seed)]
    report = Report(
        title,
        model=model,
        vectors=vectors,
        checks=[*checks, *_checks(outcome.data)],
        findings=(*outcome.findings, *own.findings),
        figures=drawn,
        tables=[replace(table, id=f"{experiment.name}-{table.id}") for table in tables],
        provenance={
            **provenance(),
            "command": command,
            "seeds": seed,
            "experiment": f"{experiment.name}, version {experiment.version}",
            "source of the method": experiment.source,
            "level": outcome.data["level"],
            "transcripts": "transcripts.html, beside this page",
            "judge": judge or "none: graded by rules alone",
        },
        resume=command,
    )
    report.save(folder)
    shown = transcripts(episodes, tokens, layer=int(vectors.get("layer") or 0))
    whole = len(episodes["arm"])
    note = f"{len(shown)} of {whole} episodes: those that end in the behaviour first, then refusals, others and incoherent ones. "
    note += f"Tokens are coloured by their reading in {unit}; a steered arm's own emotion holds the push itself."
    text = page(shown, f"Transcripts: {title}", note=note, model=str(model.get("id", "")))
    with atomic_write(folder / "transcripts.html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return report


def transcripts(episodes: Columns, tokens: Columns | None, *, layer: int, limit: int = LIMIT) -> list[Trace]:
    """Episodes as traced conversations: acts first, then refusals, others and incoherent ones, arms taking turns.

    Args:
        episodes: Columns of ``episodes.parquet``.
        tokens: Columns of ``tokens.parquet``; None for conversations without scores.
        layer: That was read.
        limit: How many at most.
    """
    kinds: dict[str, dict[str, list[int]]] = {kind: {} for kind in _SHARES}
    for row, arm in enumerate(episodes["arm"]):
        if episodes["kind"][row] != "zero":
            kinds[_kind(episodes, row)].setdefault(arm, []).append(row)
    mixed = {kind: _in_turns(list(arms.values())) for kind, arms in kinds.items()}
    chosen = {kind: rows[: _SHARES[kind] * limit // LIMIT] for kind, rows in mixed.items()}
    for kind, rows in mixed.items():
        free = limit - sum(map(len, chosen.values()))
        chosen[kind] = rows[: len(chosen[kind]) + free]
    rows = [row for own in chosen.values() for row in own]
    read = _tokens_of(tokens, {(episodes["level"][r], episodes["arm"][r], int(episodes["episode"][r])) for r in rows})
    return [_trace(episodes, row, read, layer) for row in rows]


# ── transcripts ──


def _kind(episodes: Columns, row: int) -> str:
    if episodes["act"][row]:
        return "act"
    return "incoherent" if not episodes["coherent"][row] else "refused" if episodes["refused"][row] else "other"


def _in_turns(lists: Sequence[Sequence[int]]) -> list[int]:
    """The first of every list, then the seconds, …"""
    return [own[place] for place in range(max(map(len, lists), default=0)) for own in lists if place < len(own)]


_Said = list[tuple[str, str, list[float | None]]]
"""Tokens of an episode in reading order: whose, text, scores."""


def _tokens_of(
    tokens: Columns | None, wanted: set[tuple[str, str, int]]
) -> tuple[tuple[str, ...], dict[tuple[str, str, int], _Said]]:
    """The watched emotions, and the tokens of some episodes."""
    if tokens is None:
        return (), {}
    known = {"episode", "level", "arm", "reply", "token", "text", "role", "own"}
    names = tuple(name for name in tokens if name not in known)
    columns, found = [tokens[name] for name in names], dict[tuple[str, str, int], _Said]()
    for row, key in enumerate(zip(tokens["level"], tokens["arm"], tokens["episode"], strict=True)):
        if key in wanted:
            said = (tokens["role"][row], tokens["text"][row], [column[row] for column in columns])
            found.setdefault(key, []).append(said)
    return names, found


def _trace(episodes: Columns, row: int, read: tuple[tuple[str, ...], Mapping[tuple[str, str, int], _Said]], layer: int) -> Trace:
    names, found = read
    arm, number, level = str(episodes["arm"][row]), int(episodes["episode"][row]), str(episodes["level"][row])
    turns_said = [list(m) if isinstance(m, (list, tuple)) else m for m in _messages(episodes["messages"][row])]
    talk = conversation({"messages": turns_said})
    said = found.get((level, arm, number), [])
    turns: list[list[Any]] = []
    pieces: list[str] = []
    scores: dict[str, list[int | None]] = {name: [] for name in names}
    at = 0
    for role, content in talk.turns:
        own, at = _matching(said, at, content)
        turns.append([role, len(own)])
        for text, values in own:
            pieces.append(text)
            for name, value in zip(names, values, strict=True):
                scores[name].append(None if value is None or not math.isfinite(value) else round(1000 * value))
    spoken = [role == "assistant" for role, n in turns for _ in range(n)]
    means = {}
    for name, column in scores.items():
        own_scores = [value / 1000 for value, mine in zip(column, spoken, strict=True) if mine and value is not None]
        means[name] = round(float(np.mean(own_scores)), 5) if own_scores else 0.0
    known = [abs(value) / 1000 for column in scores.values() for value in column if value is not None]
    reasons = [str(reason) for reason in (episodes["reasons"][row] if "reasons" in episodes else None) or ()]
    return Trace(
        id=f"{arm.replace('-0', '−0')}, {episodes['case'][row]}, episode {number}",
        labels={"outcome": str(episodes["outcome"][row]).replace("_", " "), "variant": str(episodes["variant"][row])},
        format=f"level {level}",
        layer=layer,
        scale=round(float(np.percentile(known, 99)), 5) if known else 1.0,
        turns=turns,
        pieces=pieces,
        scores=scores or {"not read": [None] * len(pieces)},
        means=means or {"not read": 0.0},
        notes=reasons + _answers(episodes, row),
    )


def _messages(cell: Any) -> list[Any]:
    """The whole chat: pairs, or objects with role and content."""
    return list(json.loads(cell)) if isinstance(cell, str) else list(cell)


def _answers(episodes: Columns, row: int) -> list[str]:
    """What the judge said, a sentence for each question."""
    given = plain(episodes["answers"][row]) if "answers" in episodes else {}
    return [
        f"judge, {id}: {own.get('answer') or 'no answer that could be read'}"
        for id, own in given.items()
        if isinstance(own, dict)
    ]


def _matching(said: _Said, at: int, content: str) -> tuple[list[tuple[str, list[float | None]]], int]:
    """The tokens from a place on that spell a message, and the place behind them; the message as one piece when none do.

    A token may hold the space before the message or a piece of the template, so only what is not white space is compared.
    """
    nothing: list[float | None] = [None] * (len(said[0][2]) if said else 0)
    wanted = "".join(content.split())
    for start in range(at, len(said)):
        text = "".join(said[start][1].split())
        if not text or not wanted.startswith(text):
            continue
        spelt, end = "", start
        while end < len(said) and len(spelt) < len(wanted) and wanted.startswith(spelt):
            spelt += "".join(said[end][1].split())
            end += 1
        if spelt == wanted:
            own = [(text, values) for _, text, values in said[start:end]]
            return [
                (own[0][0].lstrip(), own[0][1]),
                *own[1:-1],
                *([(own[-1][0].rstrip(), own[-1][1])] if len(own) > 1 else []),
            ], end
    return [(content, nothing)], at


# ── around the analysis ──


def _columns(file: Path) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.exists():
        raise FormatError(f"{file} does not exist: name the folder of a finished run")
    try:
        found: dict[str, list[Any]] = pq.read_table(file).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{file} is no readable parquet file ({error}): run the experiment again, it goes on") from None
    return found


def _checks(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether the experiment could see anything at all."""
    baseline = next(arm for arm in data["arms"] if arm["kind"] == "baseline")
    coherent, (rate, low, high) = baseline["coherent"][0], baseline["acts"]
    fallen = [arm["id"] for arm in data["arms"] if arm["kind"] == "concept" and arm["coherent"][0] < 0.5]
    stuck = "floor" if low < 0.02 else "ceiling" if high > 0.98 else ""
    detail = f"level {data['level']}, n {baseline['n']}"
    steered = {
        "name": "coherent when steered",
        "status": "warn" if fallen else "ok",
        "value": f"{len(fallen)} arms fell apart" if fallen else "all arms",
        "detail": f"most replies of {', '.join(fallen)} are incoherent"
        if fallen
        else "at least half of the replies in every arm",
    }
    room = {
        "name": "room to rise and to fall",
        "status": "warn" if stuck else "ok",
        "value": f"{100 * rate:.0f} %",
        "detail": f"the baseline's rate is at the {stuck}" if stuck else detail,
    }
    return [
        {
            "name": "coherent without steering",
            "status": "ok" if coherent >= 0.8 else "warn",
            "value": f"{100 * coherent:.0f} %",
            "detail": detail,
        },
        *([room] if data["acts"] else []),
        *([steered] if any(arm["kind"] == "concept" for arm in data["arms"]) else []),
    ]


def _agreement(episodes: Columns, seed: int) -> list[Table]:
    """How often a judge that was sure said what the rules say, for each kind of question; nothing when it was not asked."""
    asked: dict[str, list[tuple[Any, str, str | None]]] = {}
    for row, given in enumerate(episodes.get("answers", ())):
        if episodes["kind"][row] == "zero":
            continue  # the baseline once more
        for id, own in plain(given).items():
            if own["ruled"] is not None:
                unit = f"{episodes['level'][row]} {episodes['episode'][row]}"
                asked.setdefault(id.split()[0], []).append((unit, own["ruled"], own["answer"] if own["sure"] else None))
    if not asked:
        return []
    from affectlens.experiments.judging import agreement

    rows: list[tuple[Any, ...]] = []
    for kind, pairs in asked.items():
        of, rules, judged = zip(*pairs, strict=True)
        found = agreement(rules, judged, units=of, seed=seed)
        unsure = f"{judged.count(None)} of {len(judged)}"
        if not found.n:
            rows.append((kind, None, None, 0, unsure, "never sure"))
            continue
        counts = Counter((rule, said) for rule, said in zip(rules, judged, strict=True) if said)
        seen = "; ".join(f"rules “{_start(rule)}”, judge “{_start(said)}”: {n}" for (rule, said), n in counts.most_common())
        share = f"{100 * found.share.value:.0f} % [{100 * found.share.low:.0f}, {100 * found.share.high:.0f}]"
        kappa = str(found.kappa).rpartition(" (")[0] if math.isfinite(found.kappa.value) else None
        rows.append((kind, share, kappa, found.n, unsure, seen))
    caption = (
        "What the rules say against what the judge says, question by question, where it was sure (a share of at least "
        f"{SURE:.0%}, or an answer without shares); unsure, it changes no grade. Intervals are of episodes: arms share theirs."
    )
    columns = ("question", "agree", "Cohen's kappa", "n", "unsure or not read", "which")
    return [Table("agreement", "Rules and judge", caption, columns, tuple(rows))]


def _start(option: str) -> str:
    """An option without its explanation."""
    return re.split(r"[,:]", option)[0]
