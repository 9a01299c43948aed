"""Every token of a conversation with its scores: the words in their context, the replies read alone, the vectors of the other
speaker.

What a trace is read for is the comparison along a conversation and between its speakers, so all tokens but the first are read,
and nothing is averaged. :mod:`affectlens.baseline` turns the cosines into standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from affectlens import conversations
from affectlens.conversations import CHUNK, Conversation, Read, Run, pieces_of
from affectlens.engine import Layout, Readout, Request, Result, batched
from affectlens.vectors import ConceptVectors

NOBODY = ("template", "special")
"""Roles of tokens that no speaker said."""


@dataclass(frozen=True)
class Alert:
    """A rule has fired, as plain data.

    Args:
        rule: Its name.
        text: The rule as it was written.
        token: The token at which it fired, counted in the conversation as the model sees it.
        turn: Number of the turn, from 0.
        speaker: Whose turn it is.
        words: The latest words up to that token.
        scores: The latest value of each score that the rule names.
        noticed: The token that had been read when it was noticed: later than ``token`` where a second reading was waited for.
        steering: What was added to the model's residual stream at that token; the scores are those of the untouched model.
        expected: False alarms per 1,000 replies and the ends of the interval, as the rule was tried; None when it was not.
        conversation: Id of the conversation.
    """

    rule: str
    text: str
    token: int
    turn: int
    speaker: str
    words: str
    scores: Mapping[str, float]
    noticed: int
    steering: str = ""
    expected: tuple[float, float, float] | None = None
    conversation: str = ""


@dataclass(frozen=True, eq=False)
class Trace:
    """A conversation with scores of all its tokens.

    Args:
        id: Of the conversation.
        layout: Its ``T`` tokens, with roles.
        format: How it was put to the model.
        names: The ``N`` concepts.
        layer: The layer that was read.
        unit: ``centred cosine``, or ``z`` after :meth:`affectlens.baseline.Baseline.standardise`.
        scores: The words in their context, ``(T, N)`` float32; nan where nothing was read. Where the model was steered, this is
            what the untouched model reads in the same words.
        visible: The words of each reply read alone, ``(T, N)``; nan elsewhere; None when that was not read.
        gap: How far the reading in context lies above that of the words alone, ``(T, N)``; only in z.
        other: Scores by the vectors of the other speaker, ``(T, M)``.
        other_names: Their ``M`` concepts.
        steered: What was read of the reply while the model was steered, ``(T, N)``; nan elsewhere; None when it never was.
        steering: What was added.
        alerts: What fired, in the order of the tokens.
    """

    id: str
    layout: Layout
    format: str
    names: tuple[str, ...]
    layer: int
    scores: np.ndarray
    unit: str = "centred cosine"
    visible: np.ndarray | None = None
    gap: np.ndarray | None = None
    other: np.ndarray | None = None
    other_names: tuple[str, ...] = ()
    steered: np.ndarray | None = None
    steering: str = ""
    alerts: tuple[Alert, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def turns(self) -> np.ndarray:
        """Number of the turn that each token belongs to, ``(T,)``; -1 for nobody's."""
        return turns_of(self.layout.roles)

    def of(self, speaker: str) -> np.ndarray:
        """Which tokens are a speaker's and were read, boolean ``(T,)``."""
        return np.array([role == speaker for role in self.layout.roles]) & np.isfinite(self.scores).all(axis=1)

    def mean(self, speaker: str = "assistant") -> np.ndarray:
        """Mean score of each concept over a speaker's words, ``(N,)``; nan when none was read."""
        own = self.scores[self.of(speaker)]
        return own.mean(axis=0) if len(own) else np.full(len(self.names), np.nan, np.float32)

    def top_other(self, k: int = 5, *, speaker: str = "assistant") -> list[tuple[str, float]]:
        """:meth:`top` by the vectors of the other speaker: what these words say of the one who listens; empty without any."""
        own = None if self.other is None else self.other[self.of(speaker)]
        if own is None or not len(own):
            return []
        mean = own.mean(axis=0)
        return [(self.other_names[i], float(mean[i])) for i in np.argsort(-mean, kind="stable")[:k]]

    def top(self, k: int = 5, *, speaker: str = "assistant") -> list[tuple[str, float]]:
        """The ``k`` concepts with the highest mean over a speaker's words, highest first."""
        mean = self.mean(speaker)
        return [(self.names[i], float(mean[i])) for i in np.argsort(-mean, kind="stable")[:k]]

    def select(self, names: Sequence[str], other: Sequence[str] = ()) -> Trace:
        """The same with these concepts only; they must be there."""
        columns, others = [self.names.index(name) for name in names], [self.other_names.index(name) for name in other]
        kept = {
            key: values[:, columns].copy()
            for key in ("scores", "visible", "gap", "steered")
            if (values := getattr(self, key)) is not None
        }
        if self.other is not None:
            kept["other"] = self.other[:, others].copy()
        return replace(self, names=tuple(names), other_names=tuple(other) if self.other is not None else (), **kept)

    def as_dict(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain data for JSON, of some concepts or of all; what was not read is None."""
        chosen = self if names is None else self.select(names, [name for name in names if name in self.other_names])
        table = {
            key: {name: _plain(values[:, i]) for i, name in enumerate(chosen.other_names if key == "other" else chosen.names)}
            for key in ("scores", "visible", "gap", "other", "steered")
            if (values := getattr(chosen, key)) is not None
        }
        facts = {"id": self.id, "format": self.format, "layer": self.layer, "unit": self.unit, "steering": self.steering}
        words = {"tokens": list(self.layout.tokens), "roles": list(self.layout.roles), "turns": self.turns.tolist()}
        return {**facts, **words, **table, "alerts": [dict(vars(alert)) for alert in self.alerts]}

    def shown(self, probes: Sequence[str]) -> conversations.Trace:
        """For the page of conversations: the scores of some concepts, and beside them the other readings that there are.

        Example:
            >>> browse.page([trace.shown(["desperate"])], "A conversation")      # doctest: +SKIP
        """
        columns: dict[str, np.ndarray] = {}
        kinds = (("", "scores"), (" alone", "visible"), (" gap", "gap"), (" steered", "steered"))
        for name in dict.fromkeys(probes):
            i = self.names.index(name)
            columns |= {name + what: values[:, i] for what, key in kinds if (values := getattr(self, key)) is not None}
            if self.other is not None and name in self.other_names:
                columns[f"{name} of the other"] = self.other[:, self.other_names.index(name)]
        turns, pieces, groups = pieces_of(self.layout)
        known = self.scores[np.isfinite(self.scores).all(axis=1)]
        own = self.of("assistant") if self.of("assistant").any() else np.isfinite(self.scores).all(axis=1)
        fired = "; ".join(f"{alert.rule} at token {alert.token}" for alert in self.alerts)
        return conversations.Trace(
            id=self.id,
            labels={"alarms": fired} if fired else {},
            format=self.format,
            layer=self.layer,
            scale=round(float(np.percentile(np.abs(known), 99)), 5) if len(known) else 1.0,
            turns=[list(turn) for turn in turns],
            pieces=pieces,
            scores={
                name: [None if np.isnan(v := column[group].mean()) else round(1000 * float(v)) for group in groups]
                for name, column in columns.items()
            },
            means={name: round(float(np.nan_to_num(_mean(column[own]))), 5) for name, column in columns.items()},
            alone={} if self.visible is None else {name: self._alone(name) for name in dict.fromkeys(probes)},
        )

    def _alone(self, name: str) -> list[int | None]:
        """Mean score of each turn's words read alone, in thousandths; None where they were not."""
        assert self.visible is not None
        column, turns = self.visible[:, self.names.index(name)], self.turns
        means = (column[(turns == turn) & np.isfinite(column)] for turn in range(int(turns.max()) + 1))
        return [round(1000 * float(own.mean())) if len(own) else None for own in means]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if v != v else round(float(v), 4) for v in values.tolist()]


def turns_of(roles: Sequence[str]) -> np.ndarray:
    """Number of the turn of each token; -1 for nobody's. Turns of one role in a row count as one.

    Example:
        >>> turns_of(["special", "user", "user", "template", "assistant", "template", "user"])
        array([-1,  0,  0, -1,  1, -1,  2])
    """
    numbers, turn, last = [], -1, ""
    for role in roles:
        if role in NOBODY:
            numbers.append(-1)
            continue
        turn += role != last
        last = role
        numbers.append(turn)
    return np.array(numbers, dtype=np.int64)


# ── reading ──


@dataclass(frozen=True)
class Probe:
    """What to read of every token, and how: shared by all that makes traces.

    Args:
        vectors: At their layer.
        other: Vectors of the other speaker, at theirs.
        alone: Whether replies are read alone as well.
        template: Whether the model has a chat template.
    """

    vectors: ConceptVectors
    other: ConceptVectors | None = None
    alone: bool = False
    template: bool = True

    @cached_property
    def readouts(self) -> tuple[Readout, ...]:
        """What to record of every request: of the vectors, and of those of the other speaker. The same objects each time:
        engines batch by them."""
        return tuple(conversations.trace_readout(each) for each in (self.vectors, self.other) if each is not None)

    def scores(self, result: Result) -> tuple[np.ndarray, np.ndarray | None]:
        """Centred cosines of all tokens of a result, ``(T, N)`` and ``(T, M)``; nan where nothing was read."""
        tables = []
        for vectors, reading in zip((self.vectors, self.other), result.readings, strict=False):
            assert vectors is not None, "there is a readout for each of the vectors"
            table = np.full((len(result.layout), len(vectors)), np.nan, np.float32)
            table[reading.positions] = vectors.scores(reading)
            tables.append(table)
        return tables[0], tables[1] if len(tables) > 1 else None


def read_traces(run: Run, talks: Iterable[Conversation], probe: Probe) -> Iterator[tuple[Trace | None, Read]]:
    """Read conversations token by token, in order; those that the model cannot take come back without a trace, with a reason.

    Args:
        run: What runs requests: ``engine.run``.
        talks: A stream of conversations; some are held at a time.
        probe: What to read.
    """
    for chunk in batched(conversations.read(run, talks, *probe.readouts, template=probe.template), CHUNK):
        traces = iter(_traces(run, [each for each in chunk if each.result is not None], probe))
        for each in chunk:
            yield (next(traces) if each.result is not None else None), each


def read_text(run: Run, text: str, probe: Probe, *, id: str = "text") -> Trace:
    """Read a plain text token by token; all of it is one speaker's, whose role is ``text``.

    Raises:
        EngineError: It does not fit the model.
    """
    (result,) = run([Request(text, readouts=probe.readouts)])
    return trace_of(result, probe, id=id, format="plain text")


def read_chat(run: Run, talk: Conversation, probe: Probe) -> Trace:
    """Read one conversation, whoever speaks in it.

    Raises:
        EngineError: It does not fit the model.
    """
    asked = conversations.request(talk, *probe.readouts, template=probe.template)
    (result,) = run([asked])
    format = conversations.TRANSCRIPT if asked.transcript else conversations.TEMPLATE
    return _traces(run, [Read(talk, result, format)], probe)[0]


def read_alone(run: Run, traces: Sequence[Trace], probe: Probe) -> list[Trace]:
    """The same traces with what each reply reads alone, as a plain text."""
    traces = [replace(trace, visible=np.full_like(trace.scores, np.nan)) for trace in traces]
    asked = [(trace, words) for trace in traces for words in replies(trace.layout).values()]
    results = run([Request(words.text, readouts=probe.readouts[:1]) for _, words in asked]) if asked else iter(())
    for (trace, words), result in zip(asked, results, strict=True):
        assert trace.visible is not None
        trace.visible[words.tokens] = carried_over(words.spans, result.layout.offsets, probe.scores(result)[0])
    return traces


def _traces(run: Run, read: Sequence[Read], probe: Probe) -> list[Trace]:
    traces = [trace_of(each.result, probe, id=each.talk.id, format=each.format) for each in read if each.result is not None]
    return read_alone(run, traces, probe) if probe.alone else traces


def trace_of(result: Result, probe: Probe, *, id: str, format: str) -> Trace:
    """The trace of a result that was asked for with the readouts of the probe, in centred cosines."""
    scores, other = probe.scores(result)
    return Trace(
        id,
        result.layout,
        format,
        probe.vectors.names,
        probe.vectors.layer,
        scores,
        other=other,
        other_names=() if probe.other is None else probe.other.names,
    )


@dataclass(frozen=True)
class Words:
    """A turn as a text of its own: the text, its tokens in the conversation, and where each of them stands in the text."""

    text: str
    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]


def replies(layout: Layout, role: str = "assistant") -> dict[int, Words]:
    """The words of each turn of a role, by number of the turn; turns of white space are left out."""
    found, turns = {}, turns_of(layout.roles)
    for turn in dict.fromkeys(turns[turns >= 0].tolist()):
        tokens = np.flatnonzero(turns == turn)
        if layout.roles[tokens[0]] != role:
            continue
        start, end = layout.offsets[tokens[0]][0], layout.offsets[tokens[-1]][1]
        said = layout.text[start:end]
        start += len(said) - len(said.lstrip())
        if said.strip():
            spans = tuple((max(a - start, 0), max(b - start, 0)) for a, b in (layout.offsets[i] for i in tokens))
            found[turn] = Words(said.strip(), tokens, spans)
    return found


def carried_over(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], scores: np.ndarray) -> np.ndarray:
    """Scores of one way to cut a text into tokens, at the tokens of another: the mean over those that share characters with it.

    Args:
        spans: ``(start, end)`` of the ``t`` tokens that want scores.
        offsets: The same of the ``T`` tokens that have them, in order.
        scores: Theirs, ``(T, N)``; nan does not count.

    Returns:
        ``(t, N)``; nan where there is none.

    Example:
        >>> carried_over([(0, 4), (4, 6)], [(0, 2), (2, 4), (4, 6)], np.array([[1.0], [3.0], [5.0]]))
        array([[2.],
               [5.]])
    """
    out = np.full((len(spans), scores.shape[1]), np.nan, scores.dtype)
    known = np.isfinite(scores).all(axis=1)
    first = 0
    for n, (a, b) in enumerate(spans):
        while first < len(offsets) and offsets[first][1] <= a:
            first += 1
        rows, last = [], first
        while last < len(offsets) and offsets[last][0] < b:
            if known[last] and offsets[last][1] > a:
                rows.append(last)
            last += 1
        if rows:
            out[n] = scores[rows].mean(axis=0)
    return out
