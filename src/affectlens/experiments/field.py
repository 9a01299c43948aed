"""The table of episodes, checked and laid out as episodes by arms."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens.errors import FormatError
from affectlens.experiments import Columns
from affectlens.experiments.trends import design_effect
from affectlens.stats import Array, Estimate, wilson

CASES = 10
"""With so many cases or more, cases are the sample, and what is found should hold for others of their kind. With fewer they are
given, and what is found holds for these."""

_NEEDED = ("episode", "case", "variant", "level", "arm", "kind", "name", "strength", "outcome", "act", "coherent", "refused")
_FIX = "give episodes.parquet as the run wrote it"


def units(cases: Sequence[str], numbers: Sequence[int]) -> tuple[Any, ...]:
    """What was sampled: cases where there are :data:`CASES` of them, else episodes."""
    return tuple(cases) if len(set(cases)) >= CASES else tuple(numbers)


def share(values: Array, of: Sequence[Any] | np.ndarray) -> Estimate:
    """A share of episodes with Wilson's interval, widened by the design effect of the units that they are of.

    Example:
        >>> print(share(np.array([1.0, 1.0, 0.0, 0.0]), [1, 2, 3, 4]))
        0.50 [0.15, 0.85] (n = 4)
    """
    design = design_effect(values[:, None], np.array(of)) if len(values) > 1 else 1.0
    return wilson(int(values.sum()), len(values), design=design)


@dataclass(frozen=True)
class Lane:
    """An arm as the table names it. ``kind`` is ``baseline``, ``concept``, ``random`` or ``shuffled``."""

    id: str
    kind: str
    name: str
    strength: float


@dataclass(frozen=True)
class Rates:
    """Shares in one arm with Wilson's intervals: of acts among all episodes and among the coherent ones, of coherent ones, of
    refusals."""

    acts: Estimate
    among: Estimate
    coherent: Estimate
    refused: Estimate


@dataclass(frozen=True, eq=False)
class Field:
    """Everything that was played at one level: ``n`` episodes by ``k`` arms.

    Args:
        level: Which.
        lanes: The arms, the baseline first.
        numbers: Of the episodes.
        cases, variants: Of each episode.
        rows: Row of the table for each episode and arm, ``(n, k)``; -1 where it was not played.
        table: All columns.
    """

    level: str
    lanes: tuple[Lane, ...]
    numbers: tuple[int, ...]
    cases: tuple[str, ...]
    variants: tuple[str, ...]
    rows: np.ndarray
    table: Columns

    @property
    def units(self) -> tuple[Any, ...]:
        """What was sampled."""
        return units(self.cases, self.numbers)

    @property
    def codes(self) -> np.ndarray:
        """Number of the unit of each episode, ``(n,)``."""
        return np.asarray(np.unique(np.array(self.units), return_inverse=True)[1])

    def values(self, of: Callable[[int], float]) -> Array:
        """A measure of every episode and arm, ``(n, k)``; nan where it was not played.

        Args:
            of: Its value in a row of the table.
        """
        found = [[of(row) if row >= 0 else np.nan for row in line] for line in self.rows.tolist()]
        return np.array(found, dtype=np.float64).reshape(self.rows.shape)

    def column(self, name: str) -> Array:
        """A column of numbers; all nan when the table has none."""
        given = self.table.get(name)
        return self.values(lambda row: np.nan if given is None or given[row] is None else float(given[row]))

    def rates(self, arm: int, variant: str | None = None) -> Rates:
        """Shares in an arm, of all episodes or of those of a variant; where cases are the sample their design effect is in it."""
        act, coherent, refused = (self.column(name)[:, arm] for name in ("act", "coherent", "refused"))
        known = np.isfinite(act) & np.array([variant in (None, own) for own in self.variants])

        whole, codes = known & (coherent > 0), self.codes
        pairs = ((act, known), (act, whole), (coherent, known), (refused, known))
        return Rates(*(share(values[among], codes[among]) for values, among in pairs))

    def count(self, arm: int, outcome: str) -> int:
        """Episodes of an arm that ended so."""
        return sum(row >= 0 and self.table["outcome"][row] == outcome for row in self.rows[:, arm].tolist())

    def where(self, kind: str, name: str | None = None) -> list[int]:
        """Numbers of the arms of a kind, in the order of their strength."""
        chosen = [i for i, lane in enumerate(self.lanes) if lane.kind == kind and name in (None, lane.name)]
        return sorted(chosen, key=lambda i: self.lanes[i].strength)

    def sweep(self, name: str) -> list[int]:
        """Numbers of the arms of a concept and of the baseline, which is its strength 0."""
        return sorted([*self.where("concept", name), *self.where("baseline")], key=lambda i: self.lanes[i].strength)

    def names(self, kind: str) -> list[str]:
        """Directions of a kind, as they come."""
        return list(dict.fromkeys(lane.name for lane in self.lanes if lane.kind == kind))


def fields(episodes: Columns, *, experiment: str, levels: Sequence[str], without: Collection[str] = ()) -> dict[str, Field]:
    """What was played at each level, from gentle to strong; levels that were not played are left out.

    Args:
        episodes: Columns of ``episodes.parquet``.
        experiment, levels: Whose.
        without: Variants to leave out.

    Raises:
        FormatError: A column is missing, columns differ in length, an episode stands twice in an arm, the rows are of another
            experiment or of several versions of it, or an act is said to be incoherent.
    """
    names = list(episodes.keys())
    if missing := [name for name in _NEEDED if name not in names]:
        raise FormatError(f"the episodes lack the column {missing[0]!r}: {_FIX}")
    table = {str(name): list(episodes[name]) for name in names}
    lengths = {len(column) for column in table.values()}
    if len(lengths) != 1 or not max(lengths):
        raise FormatError(f"the episodes have {'no rows' if lengths == {0} else 'columns of different lengths'}: {_FIX}")
    if others := set(table.get("experiment", [experiment])) - {experiment}:
        raise FormatError(f"the episodes are of {', '.join(sorted(map(str, others)))}, not of {experiment}: {_FIX}")
    if len(versions := set(table.get("version", [1]))) > 1:
        raise FormatError(f"the episodes are of versions {', '.join(map(str, sorted(versions)))}: run them again with one")
    for row, (act, coherent) in enumerate(zip(table["act"], table["coherent"], strict=True)):
        if act and not coherent:
            raise FormatError(f"row {row + 1}: an incoherent reply is no act: {_FIX}")
    if without:
        kept = [row for row, variant in enumerate(table["variant"]) if variant not in without]
        table = {name: [column[row] for row in kept] for name, column in table.items()}
        if not kept:
            raise FormatError("all episodes are of control variants: run more of them")
    order = [*levels, *sorted(set(table["level"]) - set(levels))]
    return {level: found for level in order if (found := _field(table, level)) is not None}


def _field(table: dict[str, list[Any]], level: str) -> Field | None:
    rows = [i for i, own in enumerate(table["level"]) if own == level]
    lanes: dict[str, Lane] = {}
    place: dict[tuple[int, str], int] = {}
    for i in rows:
        arm, number, kind = str(table["arm"][i]), int(table["episode"][i]), str(table["kind"][i])
        if kind == "zero":
            continue  # the runner refuses a run whose strength 0 is not the baseline to the last bit
        if (number, arm) in place:
            raise FormatError(f"episode {number} stands twice in the arm {arm!r} at the level {level!r}: {_FIX}")
        place[number, arm] = i
        lanes.setdefault(arm, Lane(arm, kind, str(table["name"][i]), float(table["strength"][i])))
    if not lanes:
        return None
    if "baseline" not in {lane.kind for lane in lanes.values()}:
        raise FormatError(f"the level {level!r} has no baseline: {_FIX}")
    arms = sorted(lanes.values(), key=lambda lane: lane.kind != "baseline")
    first = {int(table["episode"][i]): i for i in reversed(rows)}
    numbers = tuple(sorted({number for number, _ in place}))
    cases, variants = ([str(table[what][first[number]]) for number in numbers] for what in ("case", "variant"))
    grid = np.array([[place.get((number, lane.id), -1) for lane in arms] for number in numbers])
    return Field(level, tuple(arms), numbers, tuple(cases), tuple(variants), grid, table)


def plain(value: Any) -> dict[str, Any]:
    """A JSON column's cell as an object: it may come as text, as an object, or empty."""
    if isinstance(value, str):
        value = json.loads(value or "{}")
    return dict(value or {})
