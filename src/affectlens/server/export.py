"""Records for others: as JSONL that loses nothing, as scores for Langfuse, as a page that needs no network.

The JSONL is readable (each concept with its score at each token, under its name) and still exact: numbers have as many digits as
tell them apart from every other float32, so :func:`read_jsonl` gives back the same bits, and ``affectlens replay`` can
run from it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from affectlens import browse
from affectlens.errors import FormatError, UnknownName
from affectlens.server.records import Record, alert_from, layout_from
from affectlens.traces import Trace

FORMAT = 1
_TABLES = ("scores", "visible", "gap", "other", "steered")
_LANGFUSE = uuid.UUID("5e1b8c1e-6a0f-4d5c-9c57-1b9a7d0c2f11")
"""Names events: an export that is sent twice makes nothing twice."""

_HIDDEN = "▒"
"""Stands for a token on a page whose words were not kept."""


# ── JSONL ──


def jsonl(records: Iterable[Record]) -> Iterator[str]:
    """Records as lines of JSON, one each.

    Example:
        >>> list(jsonl([]))
        []
    """
    for record in records:
        yield json.dumps(record_data(record), allow_nan=False) + "\n"


def record_data(record: Record) -> dict[str, Any]:
    """A record as plain data, exactly."""
    trace = record.trace
    tables = {name: values for name in _TABLES if (values := getattr(trace, name)) is not None}
    facts = {name: getattr(trace, name) for name in ("id", "format", "layer", "unit", "steering")}
    names = {"names": list(trace.names), "other_names": list(trace.other_names)}
    return {
        "affectlens": "record",
        "format": FORMAT,
        **{name: getattr(record, name) for name in ("id", "kind", "key", "text", "finish", "company")},
        "created": record.created.isoformat(),
        **{name: dict(getattr(record, name)) for name in ("model", "request", "usage", "timing")},
        "layout": asdict(trace.layout),
        "trace": {**facts, **names, "dtypes": {name: values.dtype.name for name, values in tables.items()}},
        **{name: _columns(values, trace.other_names if name == "other" else trace.names) for name, values in tables.items()},
        "alerts": [asdict(alert) for alert in trace.alerts],
    }


def read_jsonl(path: str | Path) -> Iterator[Record]:
    """The records of a file that :func:`jsonl` wrote.

    Raises:
        FormatError: No such file, or a line that is no record; names the line.
    """
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}): name a file that was exported as jsonl") from None


def _record(line: str, where: str) -> Record:
    fix = "export it again with format=jsonl"
    try:
        data = json.loads(line)
        if data["affectlens"] != "record" or data["format"] != FORMAT:
            raise ValueError("another kind or format")
        layout, facts = layout_from(data["layout"]), dict(data["trace"])
        dtypes, names, others = facts.pop("dtypes"), tuple(facts.pop("names")), tuple(facts.pop("other_names"))
        tables: dict[str, Any] = {
            name: _table(data[name], others if name == "other" else names, len(layout), np.dtype(dtype))
            for name, dtype in dtypes.items()
        }
        alerts = tuple(alert_from(json.dumps(alert)) for alert in data["alerts"])
        trace = Trace(layout=layout, names=names, other_names=others, alerts=alerts, **facts, **tables)
        fields = {
            name: data[name] for name in ("id", "kind", "key", "model", "request", "text", "finish", "usage", "timing", "company")
        }
        return Record(created=datetime.fromisoformat(data["created"]), trace=trace, **fields)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise FormatError(f"{where} is no record ({' '.join(str(error).split())[:80]}): {fix}") from None


def _columns(values: np.ndarray, names: Sequence[str]) -> dict[str, list[float | None]]:
    """Each concept's scores; the shortest decimals that mean the same float32, None for nan."""
    return {
        name: [None if text == "nan" else float(text) for text in values[:, i].astype(str).tolist()]
        for i, name in enumerate(names)
    }


def _table(columns: dict[str, list[float | None]], names: Sequence[str], size: int, dtype: np.dtype[Any]) -> np.ndarray:
    if set(columns) != set(names) or any(len(column) != size for column in columns.values()):
        raise ValueError("its scores are of other concepts, or of another number of tokens")
    table = np.empty((size, len(names)), dtype)
    for i, name in enumerate(names):
        table[:, i] = [np.nan if value is None else value for value in columns[name]]
    return table


# ── Langfuse ──


def langfuse(records: Iterable[Record], emotions: Sequence[str]) -> Iterator[str]:
    """Scores as Langfuse takes them, one event a line: ``{"batch": [lines …]}`` is a body for ``POST /api/public/ingestion``.

    For each record an event that makes its trace, then a score for the peak and for the mean of each emotion, and one for each
    rule that fired. No texts. Ids depend on the record alone, so that sending an export again changes nothing.

    Args:
        records: What to export.
        emotions: Which emotions; those that a record does not have are left out.
    """
    for record in records:
        moment = record.created.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        facts = {
            "model": record.model.get("id"),
            "fingerprint": record.model.get("fingerprint"),
            "layer": record.trace.layer,
            "finish": record.finish,
            "steering": record.steering,
            "usage": dict(record.usage),
        }
        trace = {
            "id": record.id,
            "timestamp": moment,
            "name": f"affectlens {record.kind}",
            "metadata": facts,
            "tags": ["affectlens"],
        }
        yield _event("trace-create", trace, moment)
        extremes = record.extremes()
        for emotion in emotions:
            for what, value in zip(("peak", "mean"), extremes.get(emotion, ()), strict=False):
                comment = f"{what} z over the reply, layer {record.trace.layer}"
                yield _score(record, f"{emotion} {what}", round(value, 4), "NUMERIC", comment, moment)
        for rule in dict.fromkeys(alert.rule for alert in record.trace.alerts):
            first = next(alert for alert in record.trace.alerts if alert.rule == rule)
            count = sum(alert.rule == rule for alert in record.trace.alerts)
            comment = f"{first.text}; at token {first.token}" + (f", {count} times" if count > 1 else "")
            yield _score(record, f"alarm {rule}", 1, "BOOLEAN", comment, moment)


def _score(record: Record, name: str, value: float, kind: str, comment: str, moment: str) -> str:
    id = str(uuid.uuid5(_LANGFUSE, f"{record.id}\n{name}"))
    body = {"id": id, "traceId": record.id, "name": name, "value": value, "dataType": kind, "comment": comment}
    return _event("score-create", body, moment)


def _event(kind: str, body: dict[str, Any], moment: str) -> str:
    id = str(uuid.uuid5(_LANGFUSE, f"{kind}\n{body['id']}"))
    return json.dumps({"id": id, "timestamp": moment, "type": kind, "body": body}, allow_nan=False) + "\n"


# ── the page ──


def page(records: Sequence[Record], emotions: Sequence[str], *, more: int = 5) -> str:
    """A self-contained page of conversations, every token coloured.

    Args:
        records: One, or several to be listed.
        emotions: What to show.
        more: How many of the emotions that stand out in the replies to show besides.

    Raises:
        UnknownName: An emotion that none of them has.
    """
    known = {name for record in records for name in record.trace.names}
    for name in emotions:
        if name not in known:
            raise UnknownName("emotion", name, sorted(known))
    shown = []
    for record in records:
        trace = _visible(record.trace)
        peaks = sorted(record.extremes().items(), key=lambda each: -each[1][0])
        probes = [name for name in emotions if name in trace.names] + [name for name, _ in peaks[:more]]
        shown.append(trace.shown(list(dict.fromkeys(probes)) or list(trace.names[:1])))
    first = records[0]
    title = first.title if len(records) == 1 and first.title and first.request.get("text", "full") == "full" else "Conversations"
    note = f"z at layer {first.trace.layer}, {first.created:%Y-%m-%d %H:%M} UTC"
    if any(len(record.trace) and not record.trace.layout.text for record in records):
        note += f"; the words were not kept, each {_HIDDEN} is a token"
    return browse.page(shown, title, note=note, model=str(first.model.get("id", "")))


def _visible(trace: Trace) -> Trace:
    """A trace with something to colour in place of words that were not kept."""
    layout = trace.layout
    if layout.text or not len(layout):
        return trace
    step = len(_HIDDEN)
    offsets = tuple((i * step, (i + 1) * step) for i in range(len(layout)))
    return replace(trace, layout=replace(layout, text=_HIDDEN * len(layout), tokens=(_HIDDEN,) * len(layout), offsets=offsets))
