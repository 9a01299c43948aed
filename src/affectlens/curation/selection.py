"""Which documents to keep, and how much each is to count: filters in the language of rules, and weights.

A **filter** is a condition of :mod:`affectlens.rules`, said of a whole document:

    not (hostile > 3 for 5 tokens)
    desperate < 1 and tokens >= 20
    mean(angry, 50) > 2 or user.afraid > 1.5

*A name alone is the mean over the document's words; what counts tokens speaks of some place in it.* So ``hostile > 3`` compares
the mean, ``hostile > 3 for 5 tokens`` is true where there are five such tokens in a row somewhere, ``mean(hostile, 50) > 2``
where some 50 tokens have that mean, and ``not (…)`` where there is no such place. ``and``, ``or`` and ``not`` are about the
document. A name alone means the words that are the document's own: the text, or the assistant's words; ``user.afraid`` those of
the user. Beside the emotions there are ``valence``, ``arousal`` and ``tokens``. A document of which something that is asked is
unknown (it has no words, or none of that speaker) is not kept.

**Weights** tilt a dataset: ``calm=0.5,hostile=-1`` gives a document the weight ``exp(0.5 calm - hostile)`` of its mean scores. Of
all ways to reweight a dataset so that these means move by so much, this one changes it least otherwise (the smallest
Kullback-Leibler divergence; Csiszar 1975). No document is lost; how many are left in effect is :func:`effective`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from affectlens.errors import FormatError, RuleError, UnknownName, nearest
from affectlens.rules import OWN, Compare, Condition, Every, Lasting, Not, Rule, Signal, Some, Window, comparisons, parse
from affectlens.watching import Watch

FACTS = ("valence", "arousal", "tokens")
"""What a filter may name beside emotions."""

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True)
class Filter:
    """What documents to keep, as data; made by :meth:`parse`.

    Args:
        text: As it was written.
        condition: What must hold.
    """

    text: str
    condition: Condition

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read a filter.

        Raises:
            RuleError: It is none; the message shows the column.

        Example:
            >>> Filter.parse("not (hostile > 3 for 5 tokens)").condition.part.n
            5
            >>> Filter.parse("hostile > 3 cooldown 5 tokens")
            Traceback (most recent call last):
            ...
            affectlens.errors.RuleError: until and cooldown are for alarms, a filter is about whole documents: leave them out, ...
        """
        rule = parse(text)
        if rule.until is not None or rule.cooldown:
            problem = "until and cooldown are for alarms, a filter is about whole documents: leave them out"
            raise RuleError(problem, text, 0, len(text))
        return cls(text, rule.condition)

    def check(self, names: Sequence[str], speakers: Sequence[str], *, axes: bool) -> None:
        """Refuse what it cannot mean here.

        Args:
            names: The emotions.
            speakers: Whose words have scores; ``text`` alone where documents are plain texts.
            axes: Whether there are valence and arousal.

        Raises:
            RuleError: Names what is not there, shows where.
        """
        places = {id(compare) for leaf in _leaves(self.condition) if _in_place(leaf) for compare, _ in comparisons(leaf)}
        for compare, _ in comparisons(self.condition):
            signal, span = compare.signal, compare.signal.span
            facts = FACTS if axes else FACTS[2:]
            if signal.kind != "inner":
                raise RuleError(f"filters read words in their context: leave {signal.kind}() out", self.text, *span)
            if signal.concept not in names:
                if signal.concept not in facts:
                    problem = f"unknown emotion {signal.concept!r}: {nearest(signal.concept, [*names, *facts])}"
                    raise RuleError(problem, self.text, *span)
                if id(compare) in places or signal.speaker is not None:
                    raise RuleError(f"{signal.concept} is a number of the whole document: compare it alone", self.text, *span)
            if signal.speaker is not None and signal.speaker not in speakers:
                problem = (
                    "documents are plain texts here: leave the speaker out"
                    if tuple(speakers) == ("text",)
                    else f"nobody is called {signal.speaker!r}: {nearest(signal.speaker, speakers)}"
                )
                raise RuleError(problem, self.text, *span)

    def sieve(self, names: Sequence[str]) -> Sieve:
        """The filter on its way along one document."""
        return Sieve(self, names)


class Sieve:
    """A filter on its way along one document: fed with all tokens in order, then asked.

    Args:
        chosen: The filter.
        names: The emotions, in the order of the scores.

    Example:
        >>> sieve = Filter.parse("not (angry > 2 for 2 tokens) and calm < 1").sieve(["angry", "calm"])
        >>> sieve.step("text", np.array([3.0, 0.0])); sieve.step("text", np.array([1.0, 0.0]))
        >>> sieve.keeps({"calm": 0.0}.get)
        True
    """

    def __init__(self, chosen: Filter, names: Sequence[str]) -> None:
        self._condition = chosen.condition
        self._found: dict[int, bool] = {}
        self._watches = []
        for leaf in _leaves(chosen.condition):
            if _in_place(leaf):
                watch = Watch(Rule(chosen.text, chosen.text, leaf))
                columns = [names.index(signal.concept) for signal in watch.rule.signals]
                self._watches.append((id(leaf), watch, columns))
                self._found[id(leaf)] = False

    def step(self, speaker: str, scores: np.ndarray) -> None:
        """Take the next token with its scores of all emotions, ``(N,)``."""
        for leaf, watch, columns in self._watches:
            if not self._found[leaf]:
                self._found[leaf] = watch.step(speaker, [float(scores[column]) for column in columns])

    @property
    def steps(self) -> bool:
        """Whether it has to see tokens."""
        return bool(self._watches)

    def keeps(self, value: Callable[[str], float | None]) -> bool:
        """Whether the document is kept.

        Args:
            value: Number of the whole document by name (``calm``, ``user.calm``, ``tokens``); None where it has none.
        """
        return self._holds(self._condition, value) is True

    def _holds(self, condition: Condition, value: Callable[[str], float | None]) -> bool | None:
        if id(condition) in self._found:
            return self._found[id(condition)]
        if isinstance(condition, Compare):
            known = value(_key(condition.signal))
            return None if known is None else _COMPARE[condition.operator](known, condition.threshold)
        if isinstance(condition, Every | Some):
            truths = [self._holds(part, value) for part in condition.parts]
            decisive = isinstance(condition, Some)
            return decisive if decisive in truths else None if None in truths else not decisive
        assert isinstance(condition, Not)
        truth = self._holds(condition.part, value)
        return None if truth is None else not truth


def _key(signal: Signal) -> str:
    return signal.concept if signal.speaker is None or signal.speaker in OWN else f"{signal.speaker}.{signal.concept}"


def _leaves(condition: Condition) -> Iterator[Compare | Lasting]:
    """What and, or and not join: comparisons, and what lasts."""
    if isinstance(condition, Every | Some):
        for part in condition.parts:
            yield from _leaves(part)
    elif isinstance(condition, Not):
        yield from _leaves(condition.part)
    else:
        yield condition


def _in_place(leaf: Compare | Lasting) -> bool:
    """Whether it speaks of some place in a document."""
    return isinstance(leaf, Lasting) or isinstance(leaf.value, Window)


@dataclass(frozen=True)
class Weights:
    """How much a document counts: ``exp`` of a linear combination of its mean scores.

    Args:
        coefficients: Of each emotion that it names, and of valence and arousal.
    """

    coefficients: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Weights:
        """``calm=0.5,hostile=-1``.

        Raises:
            FormatError: It is not of this form.

        Example:
            >>> Weights.parse("calm=0.5, hostile=-1").coefficients
            {'calm': 0.5, 'hostile': -1.0}
        """
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.rpartition("="))
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if not name or not math.isfinite(value) or name in found:
                raise FormatError(
                    f"{part.strip()!r} is no weight: write EMOTION=NUMBER, each once, for example calm=0.5,hostile=-1"
                )
            found[name] = value
        return cls(found)

    def check(self, names: Sequence[str], *, axes: bool) -> None:
        """Refuse names that do not exist.

        Raises:
            UnknownName: The message names the nearest ones.
        """
        known = [*names, *(FACTS[:2] if axes else ())]
        if odd := [name for name in self.coefficients if name not in known]:
            raise UnknownName("emotion", odd[0], known)

    def of(self, value: Callable[[str], float | None], where: str) -> float | None:
        """The weight of a document; None where a score is unknown.

        Args:
            value: Number of the whole document by name.
            where: Names the document in an error.

        Raises:
            FormatError: The number is too large to write.

        Example:
            >>> Weights({"calm": 1.0, "hostile": -2.0}).of({"calm": 0.5, "hostile": 1.0}.get, "row 1")
            0.22313
        """
        power = 0.0
        for name, coefficient in self.coefficients.items():
            if (known := value(name)) is None:
                return None
            power += coefficient * known
        if abs(power) > 80:
            raise FormatError(f"{where} gets the weight exp({power:.0f}): use smaller coefficients")
        return float(f"{math.exp(power):.6g}")


def effective(total: float, squares: float) -> float:
    """How many documents of equal weight would tell as much: ``(sum w)² / sum w²`` (Kish 1965).

    Example:
        >>> effective(4.0, 8.0)
        2.0
    """
    return total**2 / squares if squares else math.nan
