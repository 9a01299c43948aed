"""A measure over the strengths of a concept: its trend, its test against random directions, its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from affectlens.experiments import Experiment
from affectlens.experiments.field import Field, plain
from affectlens.experiments.published import ACT
from affectlens.experiments.trends import Means, Prediction, Turn, against_controls, means, slope_weights, turning
from affectlens.stats import Array, Estimate
from affectlens.studies import ALPHA

LABELS = ("rises", "falls", "rises then falls", "falls then rises", "no trend found", "cannot be tested here")
"""What the shape of a sweep is called."""


@dataclass(frozen=True, eq=False)
class Measure:
    """What is counted or scored in every episode and arm.

    Args:
        id: ``act`` or the name of a scale.
        what: In words.
        all, coherent: Means among all episodes and among the coherent ones.
        factor, unit: In which changes are printed: points for shares.
    """

    id: str
    what: str
    all: Means
    coherent: Means
    factor: float
    unit: str


@dataclass(frozen=True, eq=False)
class Swept:
    """A measure over the strengths of a concept.

    Args:
        name: The concept.
        arms: Numbers of its arms, the baseline among them, in the order of their strength.
        strengths: Theirs.
        trend: Change along the line of least squares, from the lowest strength to the highest; ``p`` of such a change by chance.
        ends: Change from the lowest strength to the highest; ``ends_coherent`` among coherent episodes alone.
        random: Where that of the next random direction is expected.
        shuffled: The same change of vectors of shuffled stories.
        turn: The best way to see a turn; None with fewer than three strengths.
        turn_p: The larger one of its p values, among all and among the coherent episodes.
        beyond: Where the same change of the next random direction is expected, between the baseline and the ends.
        label: One of :data:`LABELS`; ``why`` says more.
    """

    name: str
    arms: list[int]
    strengths: list[float]
    trend: Estimate
    p: float
    ends: Estimate
    ends_coherent: Estimate
    random: Prediction
    shuffled: list[float]
    turn: Turn | None
    turn_p: float
    beyond: Prediction | None
    label: str = ""
    why: str = ""

    @property
    def tested(self) -> bool:
        """Whether anything could be tested."""
        return self.label != LABELS[-1]


def measures(field: Field, experiment: Experiment) -> list[Measure]:
    """The share of acts, where some outcome is one, and every scale that was scored and varies."""
    coherent = field.column("coherent") > 0

    def both(values: Array, shares: bool) -> tuple[Means, Means]:
        alone = np.where(coherent, values, np.nan)
        return means(values, field.codes, shares=shares), means(alone, field.codes, shares=shares)

    ends = " or ".join(f"“{name.replace('_', ' ')}”" for name in experiment.acts)
    rate = Measure(ACT, f"rate of {ends}", *both(field.column("act"), True), 100.0, "points")
    made = [rate] if experiment.acts else []
    for scale in experiment.scales:
        values = _scores(field, scale)
        known = values[np.isfinite(values)]
        if len(known) > 1 and np.ptp(known) > 0:
            made.append(Measure(scale, f"mean score of {scale}", *both(values, False), 1.0, ""))
    return made


def _scores(field: Field, scale: str) -> Array:
    def score(row: int) -> float:
        given = plain(field.table["scores"][row]).get(scale) if "scores" in field.table else None
        return math.nan if given is None else float(given)

    return field.values(score)


def swept(field: Field, measure: Measure, name: str, *, seed: int = 0, draws: int = 2000) -> Swept:
    """What a measure does over the strengths of a concept.

    Args:
        field: What was played.
        measure: Of :func:`measures`.
        name: The concept.
        seed, draws: Behind the p value of a turn.
    """
    arms = field.sweep(name)
    strengths = [field.lanes[i].strength for i in arms]
    k = len(field.lanes)
    slope, ends = np.zeros(k), np.zeros(k)
    slope[arms] = slope_weights(strengths)
    ends[[arms[0], arms[-1]]] = -1, 1
    of = measure.all
    controls, bends, symmetric = _controls(field, strengths)
    random = against_controls(of, ends, controls["random"], symmetric=symmetric)
    turn, turn_p, beyond = turning(of, arms, seed=seed, draws=draws), math.nan, None
    if turn is not None:
        again = turning(measure.coherent, arms, seed=seed, draws=draws)
        turn_p = max(turn.p, again.p) if again is not None and again.first == turn.first else 1.0
        sign = 1.0 if turn.first == "rises" else -1.0
        beyond = against_controls(of, turn.weights, [sign * bend for bend in bends], symmetric=False)
    made = Swept(
        name=name,
        arms=arms,
        strengths=strengths,
        trend=of.estimate(slope, factor=measure.factor, unit=measure.unit),
        p=of.p(slope),
        ends=of.estimate(ends, factor=measure.factor, unit=measure.unit),
        ends_coherent=measure.coherent.estimate(ends, factor=measure.factor, unit=measure.unit),
        random=random,
        shuffled=[measure.factor * of.change(own) for own in controls["shuffled"]],
        turn=turn,
        turn_p=turn_p,
        beyond=beyond,
    )
    label, why = _shape(measure, made)
    return replace(made, label=label, why=why)


def _controls(field: Field, strengths: Sequence[float]) -> tuple[dict[str, list[Array]], list[Array], bool]:
    """The contrasts of the controls that answer to a sweep's change from end to end, those that answer to its turn (the baseline
    above the ends), and whether the former change their sign with the direction."""
    k, baseline = len(field.lanes), field.where("baseline")[0]
    below, above = min(strengths) < 0, max(strengths) > 0
    found: dict[str, list[Array]] = {"random": [], "shuffled": []}
    bends, symmetric = [], below and above
    for kind, changes in found.items():
        for name in field.names(kind):
            arms = field.where(kind, name)
            low, high = arms[0], arms[-1]
            has_low, has_high = field.lanes[low].strength < 0, field.lanes[high].strength > 0
            if (below and not has_low) or (above and not has_high):
                continue
            change = np.zeros(k)
            change[low if below else baseline] -= 1
            change[high if above else baseline] += 1
            changes.append(change)
            if kind == "random":
                symmetric = symmetric and math.isclose(-field.lanes[low].strength, field.lanes[high].strength)
                bend, outer = np.zeros(k), [low] * below + [high] * above
                bend[baseline] = 1
                bend[outer] -= 1 / len(outer)
                bends.append(bend)
    return found, bends, symmetric


def beyond_random(measure: Measure, each: Swept) -> bool:
    """Whether a turn is more than what random directions do between the baseline and their ends."""
    if each.turn is None or each.beyond is None:
        return False
    return each.beyond.p <= ALPHA and measure.all.change(each.turn.weights) > each.beyond.centre


def _shape(measure: Measure, each: Swept) -> tuple[str, str]:
    """The label of a sweep, and what a reader should know beside it."""
    if reason := _stuck(measure, each):
        return LABELS[-1], reason
    alone = not math.isfinite(each.random.p)
    why = "no random directions to compare with" if alone else ""
    if each.turn is not None and each.turn.p <= ALPHA:
        way = "rises then falls" if each.turn.first == "rises" else "falls then rises"
        if each.turn_p > ALPHA:
            why = f"it {way} among all episodes, but not among the coherent ones alone: there coherence changes"
        elif alone or beyond_random(measure, each):
            return way, why
        else:
            why = f"it {way}, but no more than random directions between the baseline and their ends"
    if each.p <= ALPHA and (alone or each.random.p <= ALPHA):
        return ("rises" if each.trend.value > 0 else "falls"), why
    if each.p <= ALPHA:
        why = why or "it changes with the strength, but no more than with random directions"
    return "no trend found", why


def _stuck(measure: Measure, each: Swept) -> str:
    """Why a sweep cannot be tested; empty when it can."""
    counts, values = measure.all.counts[each.arms], measure.all.value[each.arms]
    if not (counts > 0).all():
        return "in some arm nothing was measured"
    if measure.id == ACT and (values == 0).all():
        return f"floor: none of the {int(counts.sum())} episodes at any strength is an act"
    if measure.id == ACT and (values == 1).all():
        return f"ceiling: each of the {int(counts.sum())} episodes at every strength is an act"
    return ""
