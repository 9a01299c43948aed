"""What steering half of the activities at their own tokens does to their ratings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.elo import elo, resampled, shares
from affectlens.studies import ALPHA, Bench, Finding
from affectlens.studies.preferences import choices
from affectlens.studies.preferences.choices import Arm
from affectlens.studies.preferences.probes import (
    CLAIMS,
    FEW_ARMS,
    MASS,
    Asked,
    correlation,
    correlations,
    mass_of,
    middle,
    null_of,
    preferred,
    wider,
)
from affectlens.vectors import centred_cosine

STRENGTH, DOSES = 0.5, (0.1, 0.25)
EMOTIONS, RANDOM, AGAIN, QUICK = 35, 20, 4, 8
"""Steered emotions; random directions; of how many emotions one is steered at held-out activities; emotions in a first look."""
DRAWS = 200
"""Most bootstrap draws in which the ratings of every arm are fitted again."""

STEERED = ("steering", "raises", "lowers", "further", "specific", "moves_held_out")
"""Findings of the steering arm."""


@dataclass(frozen=True)
class Steered:
    """The steering arms that can be used.

    Args:
        arms: What was added.
        answers: Log-probabilities of A and B, ``(arms, n, n, 2)``.
        won: Share of encounters that i wins against j, ``(arms, n, n)``.
        shift: Change of the mean Elo of the steered half ``(arms,)``.
        r: Of each direction's reading with the ratings of the *first* activities before steering ``(arms,)``.
        left_out: Arms in which A and B had too little of the probability.
        again: The same with held-out activities, for some of the emotions.
    """

    arms: list[Arm]
    answers: np.ndarray
    won: np.ndarray
    shift: np.ndarray
    r: np.ndarray
    left_out: list[str]
    again: Steered | None = None

    def rows(self, kind: str) -> np.ndarray:
        """The arms of a kind at full strength."""
        return np.flatnonzero([arm.kind == kind and arm.strength == STRENGTH for arm in self.arms])


def steered_arms(bench: Bench, asked: Asked, r: np.ndarray, held_out: Asked | str) -> Steered | str:
    """Ask with half of the activities steered, or say in a whole sentence why that cannot be done."""
    vectors, layers = bench.vectors, middle(bench)
    if not np.isfinite(vectors.residual_norms).all():
        return "The vectors were imported without residual norms, so a strength has no unit."
    if unclear := asked.activities.unclear():
        return f"Tokens of an activity are not its own: {unclear}."
    count = min(QUICK if bench.quick else EMOTIONS, len(r))
    if count < FEW_ARMS:
        return f"There are vectors of {count} emotions: {FEW_ARMS} are needed."
    order = np.argsort(r).tolist()
    names = [vectors.names[i] for i in _spaced(order, count)]
    arms = choices.emotions(vectors, names, layers, STRENGTH)
    if not bench.quick:
        arms += choices.random(vectors, RANDOM, layers, STRENGTH, bench.seed)
        for strength in DOSES:
            arms += choices.emotions(vectors, [names[0], names[-1]], layers, strength)
    steered = _answered(bench, asked, asked, arms, r)
    if len(steered.rows("emotion")) < FEW_ARMS:
        return f"In all but {len(steered.rows('emotion'))} emotions the steered model answers neither A nor B."
    if bench.quick or isinstance(held_out, str) or held_out.activities.unclear():
        return steered
    some = _spaced(names, max(FEW_ARMS, -(-count // AGAIN)))
    again = _answered(bench, held_out, asked, choices.emotions(vectors, some, layers, STRENGTH), r)
    return replace(steered, again=again)


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced, the first and the last among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _answered(bench: Bench, asked: Asked, first: Asked, arms: list[Arm], r: np.ndarray) -> Steered:
    answers = choices.ask(bench, asked.activities, arms)
    steered = asked.activities.steered
    # An arm after which the model answers neither A nor B says nothing about preferences.
    used = [a for a, each in enumerate(answers) if mass_of(each) >= MASS]
    left_out = [arm.name for a, arm in enumerate(arms) if a not in used]
    arms, answers = [arms[a] for a in used], answers[used]
    # Two activities that are not steered are what they were.
    untouched = ~(steered[:, None] | steered[None])
    answers = np.where(untouched[None, :, :, None], asked.answers, answers)
    won = np.array([shares(preferred(each)) for each in answers]).reshape(len(arms), *asked.won.shape)
    shift = elo(won)[:, steered].mean(axis=1) - asked.ratings[steered].mean() if arms else np.zeros(0)
    own = {}
    if random := [arm for arm in arms if arm.kind == "random"]:
        own = dict(
            zip([arm.name for arm in random], correlations(_random_scores(bench, first, random), first.ratings), strict=True)
        )
    known = np.array([own[arm.name] if arm.kind == "random" else r[bench.vectors.index(arm.name)] for arm in arms])
    return Steered(arms, answers, won, shift, known, left_out)


def _random_scores(bench: Bench, asked: Asked, arms: Sequence[Arm]) -> np.ndarray:
    """How random directions read the activities, as the emotions' were read, ``(n, arms)``."""
    vectors = bench.vectors
    residuals = np.stack([r.readings[0].values for r in bench.read(choices.feelings(bench, asked.activities))], axis=1)
    return np.mean([
        centred_cosine(residuals[row], np.stack([arm.steering.terms[0].directions[row] for arm in arms]), vectors.centre[row])
        for row in map(vectors.row, middle(bench))
    ], axis=0)  # fmt: skip


def moved(bench: Bench, asked: Asked, r: np.ndarray, exchanged: np.ndarray, steered: Steered, where: str) -> Iterator[Finding]:
    """What steering does, by emotions and by random directions."""
    half, kinds = asked.activities.steered, (steered.rows("emotion"), steered.rows("random"))
    emotions, random = kinds
    every = np.concatenate(kinds)
    columns = [bench.vectors.index(steered.arms[a].name) for a in emotions]
    top, bottom = (int(pick(r[columns])) for pick in (np.argmax, np.argmin))
    draws = min(bench.draws, DRAWS)
    without = f"; left out, because A and B had less than {MASS:.0%}: {', '.join(steered.left_out)}" if steered.left_out else ""
    where = f"{STRENGTH:g} mean residual norms over {where}{without}"
    if np.ptp(steered.shift[emotions]) < 1e-3:
        reason = "No emotion moves any preference: there is nothing to correlate."
        yield from (CLAIMS[id].untestable(reason) for id in STEERED)
        return

    def refitted(items: np.ndarray) -> np.ndarray:
        before, after = resampled(asked.won, items), resampled(steered.won[every], items)
        own = items[half[items]]
        shift = after[:, own].mean(axis=1) - before[own].mean()
        return np.array([*shift, correlation(shift[: len(emotions)], correlations(asked.scores[items], before[items])[columns])])

    *shifts, over_activities = stats.bootstrap_each(refitted, half, draws=draws, seed=bench.seed, unit="Elo")
    known, shift = r[columns], steered.shift[emotions]
    over_emotions = stats.bootstrap(
        lambda rows: float(correlation(known[rows], shift[rows])), len(shift), draws=bench.draws, seed=bench.seed
    )
    estimate = wider(over_emotions, over_activities, len(shift))
    null = null_of(correlation(shift, exchanged[:, columns]), estimate.value, "greater", "ratings exchanged between activities")
    slope, base = np.polyfit(known, shift, 1)
    note = f"{slope:+.0f} Elo for r = 1, {base:+.0f} at r = 0 (published -45) over {len(shift)} emotions; {where}."
    yield CLAIMS["steering"].tested(estimate, null, estimate.low > 0, note)
    if 1 / (1 + len(random)) > ALPHA:
        reason = f"{len(random)} random directions were steered: with so few p could not reach {ALPHA}."
        yield from (CLAIMS[id].untestable(reason) for id in ("raises", "lowers", "further", "specific"))
    else:
        for id, k, side in (("raises", top, "greater"), ("lowers", bottom, "less")):
            null = null_of(steered.shift[random], shifts[k].value, side, "random directions")  # type: ignore[arg-type]
            clear = shifts[k].low > 0 if side == "greater" else shifts[k].high < 0
            note = f"{steered.arms[emotions[k]].name}, r = {known[k]:+.2f}; {int(half.sum())} steered activities; {where}."
            yield CLAIMS[id].tested(shifts[k], null, clear, note)
        yield from _against_random(bench, steered, emotions, random, where)
    yield _moves_held_out(bench, exchanged, steered, where)


def _against_random(bench: Bench, steered: Steered, emotions: np.ndarray, random: np.ndarray, where: str) -> Iterator[Finding]:
    every = np.concatenate([emotions, random])
    kind, shift, r = np.arange(len(every)) < len(emotions), steered.shift[every], steered.r[every]
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}

    def further(rows: np.ndarray, group: np.ndarray) -> float:
        size = np.abs(shift[rows])
        return float(size[group].mean() - size[~group].mean())

    def closer(rows: np.ndarray, group: np.ndarray) -> float:
        return float(correlation(r[rows][group], shift[rows][group]) - correlation(r[rows][~group], shift[rows][~group]))

    sizes = np.abs(steered.shift[emotions]).mean(), np.abs(steered.shift[random]).mean()
    among = float(correlation(r[~kind], shift[~kind]))
    notes = {
        "further": f"Mean change, whichever way: {sizes[0]:.0f} Elo along emotions, {sizes[1]:.0f} along random ones; {where}.",
        "specific": f"Among random directions the correlation is {among:+.2f}; {where}.",
    }
    for id, statistic, unit in (("further", further, "Elo"), ("specific", closer, "")):
        estimate = stats.bootstrap(lambda rows, f=statistic: f(rows, kind), kind, unit=unit, **options)  # type: ignore[misc]
        null = stats.permutation_null(
            lambda group, f=statistic: f(np.arange(len(kind)), group),  # type: ignore[misc]
            estimate.value,
            permute=lambda rng: rng.permutation(kind),
            side="greater",
            kind="emotions and random directions exchanged",
            **options,
        )
        yield CLAIMS[id].tested(estimate, null, estimate.low > 0, notes[id])


def _moves_held_out(bench: Bench, exchanged: np.ndarray, steered: Steered, where: str) -> Finding:
    again = steered.again
    if again is None or len(again.arms) < FEW_ARMS or np.ptp(again.shift) < 1e-3:
        few = 0 if again is None else len(again.arms)
        return CLAIMS["moves_held_out"].untestable(f"Held-out activities were steered by {few} emotions: {FEW_ARMS} are needed.")
    estimate = stats.bootstrap(
        lambda rows: float(correlation(again.r[rows], again.shift[rows])), len(again.arms), draws=bench.draws, seed=bench.seed
    )
    columns = [bench.vectors.index(arm.name) for arm in again.arms]
    null = null_of(
        correlation(again.shift, exchanged[:, columns]), estimate.value, "greater", "ratings exchanged between activities"
    )
    note = f"Over {len(again.arms)} emotions, by their correlations among the first activities; {where}."
    return CLAIMS["moves_held_out"].tested(estimate, null, estimate.low > 0, note)
