"""Rules along a conversation, token after token, whether it has been said or is being generated.

A token takes a time that depends neither on the length of the conversation nor on that of the windows. What the rules mean is
defined in :mod:`affectlens.rules`.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from affectlens.actions import Policy
from affectlens.conversations import STRETCH
from affectlens.engine import Layout
from affectlens.rules import Compare, Condition, Every, Kind, Not, Rule, Signal, Some, Window
from affectlens.traces import NOBODY, Alert, Trace

STEP = 2**20
"""Scores count in steps of one through this."""

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


class Watch:
    """A rule on its way along one conversation.

    ``active`` says whether its alarm has not been released yet, ``latest`` holds the latest score of each of its signals.

    Args:
        rule: The rule.

    Example:
        >>> from affectlens.rules import parse
        >>> watch = Watch(parse("desperate > 3 for 2 tokens"))
        >>> [watch.step("assistant", (score,)) for score in (4.0, 2.0, 4.0, 4.0, 4.0)]
        [False, False, False, True, False]
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.active = False
        self.latest: list[float | None] = [None] * len(rule.signals)
        self._speakers = [signal.speakers for signal in rule.signals]
        self._condition = _watched(rule.condition, rule.signals)
        self._until = None if rule.until is None else _watched(rule.until, rule.signals)
        self._since = rule.cooldown

    def step(self, speaker: str, scores: Sequence[float]) -> bool:
        """Take the next token.

        Args:
            speaker: Whose it is.
            scores: Its score for each of ``rule.signals``, nan where there is none; those of other speakers do not count.

        Returns:
            Whether the rule fires at this token.
        """
        new = [
            round(score * STEP) if speaker in speakers and math.isfinite(score) else None
            for score, speakers in zip(scores, self._speakers, strict=True)
        ]
        if all(score is None for score in new):
            return False
        self.latest = [old if score is None else score / STEP for old, score in zip(self.latest, new, strict=True)]
        # Both go on at every token: windows and runs must not miss any.
        holds = self._condition(new)
        released = holds is not True if self._until is None else self._until(new) is True
        self._since += 1
        if self.active:
            self.active = not released
            return False
        self.active = holds is True and self._since > self.rule.cooldown
        if self.active:
            self._since = 0
        return self.active


_Scores = Sequence[int | None]


def _watched(condition: Condition, signals: Sequence[Signal]) -> Callable[[_Scores], bool | None]:
    """What gives the truth of a condition at each token, fed with all tokens in order."""
    if isinstance(condition, Compare):
        value, compare, threshold = _valued(condition.value, signals), _COMPARE[condition.operator], condition.threshold

        def compared(new: _Scores) -> bool | None:
            known = value(new)
            return None if known is None else compare(known, threshold)

        return compared
    if isinstance(condition, Every | Some):
        parts = [_watched(part, signals) for part in condition.parts]
        decisive = isinstance(condition, Some)

        def joined(new: _Scores) -> bool | None:
            truths = [part(new) for part in parts]  # all of them, whatever the first says
            return decisive if decisive in truths else None if None in truths else not decisive

        return joined
    part = _watched(condition.part, signals)
    if isinstance(condition, Not):

        def negated(new: _Scores) -> bool | None:
            truth = part(new)
            return None if truth is None else not truth

        return negated
    n, run = condition.n, 0

    def lasting(new: _Scores) -> bool | None:
        nonlocal run
        truth = part(new)
        run = run + 1 if truth else 0
        return None if truth is None else run >= n

    return lasting


def _valued(value: Signal | Window, signals: Sequence[Signal]) -> Callable[[_Scores], float | None]:
    """What gives a value at each token; it keeps the one that it had where its speaker is silent."""
    place = signals.index(value.signal if isinstance(value, Window) else value)
    known: float | None = None
    if isinstance(value, Signal):

        def latest(new: _Scores) -> float | None:
            nonlocal known
            score = new[place]
            known = known if score is None else score / STEP
            return known

        return latest
    n, rising = value.n, value.how == "rise"
    window: deque[int] = deque()
    total = moment = 0  # the sum of the window's scores, and of each times its place in the window, from 0

    def windowed(new: _Scores) -> float | None:
        nonlocal known, total, moment
        score = new[place]
        if score is None:
            return known
        if len(window) == n:
            total -= window.popleft()
            moment -= total
        moment += len(window) * score
        total += score
        window.append(score)
        if len(window) == n:
            # The slope is 12 · Σ (i - (n - 1) / 2) x / (n (n² - 1)); the line rises over n - 1 steps.
            known = 6 * (2 * moment - (n - 1) * total) / (n * (n + 1) * STEP) if rising else total / (n * STEP)
        return known

    return windowed


# ── several rules, and what they see ──


@dataclass
class Cell:
    """A token as rules see it.

    Args:
        position, turn, role: Of the token.
        span: Where it stands in the text.
        inner, gap, other: Its scores in z, a row each.
        steering: What was added to the model there.
        raw: Its centred cosines under steering, while those of the untouched model are waited for.
        words: Where in the text the latest words begin.
    """

    position: int
    turn: int
    role: str
    span: tuple[int, int]
    inner: np.ndarray
    gap: np.ndarray | None = None
    other: np.ndarray | None = None
    steering: str = ""
    raw: np.ndarray | None = None
    words: int = 0


def cells_of(trace: Trace) -> Iterator[Cell]:
    """The tokens of a trace in z that somebody said."""
    turns, starts = trace.turns, [a for a, _ in trace.layout.offsets]
    for i, role in enumerate(trace.layout.roles):
        if role in NOBODY:
            continue
        gap = None if trace.gap is None else trace.gap[i]
        other = None if trace.other is None else trace.other[i]
        first = max(0, i - STRETCH + 1)
        while turns[first] != turns[i]:
            first += 1
        yield Cell(i, int(turns[i]), role, trace.layout.offsets[i], trace.scores[i], gap, other, words=starts[first])


class Course:
    """Rules on their way along one conversation.

    Args:
        policies: The rules.
        names: Concepts of the rows of scores.
        other_names: Concepts of the rows by the vectors of the other speaker.
    """

    def __init__(self, policies: Sequence[Policy], names: Sequence[str], other_names: Sequence[str] = ()) -> None:
        known: dict[Kind, Sequence[str]] = {"inner": names, "gap": names, "other": other_names}
        self._watches = [
            (each, Watch(each.rule), [(signal.kind, known[signal.kind].index(signal.concept)) for signal in each.rule.signals])
            for each in policies
        ]

    def step(self, cell: Cell) -> list[tuple[Policy, Watch]]:
        """Which rules fire at a token."""
        rows = {"inner": cell.inner, "gap": cell.gap, "other": cell.other}
        fired = []
        for each, watch, columns in self._watches:
            scores = [np.nan if (row := rows[kind]) is None else float(row[column]) for kind, column in columns]
            if watch.step(cell.role, scores):
                fired.append((each, watch))
        return fired


def alert_of(each: Policy, watch: Watch, cell: Cell, layout: Layout, *, noticed: int, id: str) -> Alert:
    """What is to be told of a rule that fires at a token."""
    return Alert(
        rule=each.rule.name,
        text=each.rule.text,
        token=cell.position,
        turn=cell.turn,
        speaker=cell.role,
        words=" ".join(layout.text[cell.words : cell.span[1]].split()),
        scores={
            str(signal): round(latest, 3)
            for signal, latest in zip(each.rule.signals, watch.latest, strict=True)
            if latest is not None
        },
        noticed=noticed,
        steering=cell.steering,
        expected=each.expected,
        conversation=id,
    )


def watched(trace: Trace, policies: Sequence[Policy]) -> Trace:
    """A trace in z with the alerts of all rules.

    Args:
        trace: In z.
        policies: Their rules; actions do not act.
    """
    course = Course(policies, trace.names, trace.other_names)
    alerts = [
        alert_of(each, watch, cell, trace.layout, noticed=cell.position, id=trace.id)
        for cell in cells_of(trace)
        for each, watch in course.step(cell)
    ]
    return replace(trace, alerts=tuple(alerts))
