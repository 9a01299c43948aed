"""What is asked and read of a set of activities, and how probes go with the ratings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.elo import elo, resampled, shares
from affectlens.studies import ALPHA, Bench, Claim, Finding
from affectlens.studies.preferences import choices
from affectlens.studies.preferences.choices import Activities
from affectlens.vectors import centred_cosine

NAME = "preferences"
FEW, FEW_ARMS, FEW_RATED = 12, 8, 5
MASS = 0.5
"""The answers A and B must have so much of the probability, in the median question."""

WANTED, SHUNNED = ("helpful", "engaging", "social", "self-curiosity"), ("aversive", "misaligned", "unsafe")
PUBLISHED = {
    "helpful": (2002, 1793), "engaging": (1980, 1655), "social": (1795, 1620), "self-curiosity": (1920, 1593),
    "neutral": (1583, 1482), "aversive": (1177, 1182), "misaligned": (944, 1475), "unsafe": (599, 1200),
}  # fmt: skip
"""Mean Elo of each category, of the paper's post-trained and of its base model (Table 17)."""

_PUBLISHED_APART = np.mean([PUBLISHED[c][0] for c in WANTED]) - np.mean([PUBLISHED[c][0] for c in SHUNNED])
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_BELOW = f"holds: p <= {ALPHA} and the interval below 0; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "orders", "Preferences are the same whichever option is named first", _ABOVE, figure="elo"),
        Claim(
            NAME,
            "categories",
            "Helping, engaging, social and curious activities are preferred to aversive, misaligned and unsafe ones",
            _ABOVE,
            f"{_PUBLISHED_APART:.0f} Elo",
            "elo",
        ),
        Claim(NAME, "blissful", "Activities that read blissful are preferred", _ABOVE, "0.71", "probes"),
        Claim(NAME, "hostile", "Activities that read hostile are not", _BELOW, "-0.74", "probes"),
        Claim(NAME, "strongest", "Some probe goes with the preferences, or against them", _ABOVE, "0.74", "probes"),
        Claim(
            NAME,
            "valence",
            "The more pleasant an emotion, the more its probe goes with the preferences",
            _ABOVE,
            "0.76 (valence as a model judged it)",
            "valence",
        ),
        Claim(NAME, "within", "So it is among the activities of one category", _ABOVE, figure="valence"),
        Claim(NAME, "replicates", "Probes go with preferences between held-out activities as between the first", _ABOVE),
        Claim(NAME, "steering", "Steering moves preferences as the probe's correlation says", _ABOVE, "0.85", "steering"),
        Claim(
            NAME,
            "raises",
            "The emotion that goes with preferences most raises what it is added to",
            _ABOVE,
            "212 Elo (blissful)",
            "steering",
        ),
        Claim(NAME, "lowers", "The one that goes against them most lowers it", _BELOW, "-303 Elo (hostile)", "steering"),
        Claim(NAME, "further", "Emotions move preferences further than random directions do", _ABOVE, figure="steering"),
        Claim(NAME, "specific", "They follow their correlations better than random directions do", _ABOVE, figure="steering"),
        Claim(NAME, "moves_held_out", "Held-out activities move as correlations among the first say", _ABOVE, figure="steering"),
    )
}


def middle(bench: Bench) -> list[int]:
    """The layers from one to two thirds of the depth."""
    assert bench.engine is not None
    depth = bench.engine.info.n_layers
    return [layer for layer in bench.vectors.layers if depth <= 3 * layer < 2 * depth]


# ── what was asked and read ──


@dataclass(frozen=True)
class Asked:
    """Answers and readings of one set of activities.

    Args:
        activities: What was asked about.
        answers: Log-probabilities of A and B, ``(n, n, 2)``.
        won: Share of encounters that i wins against j, ``(n, n)``.
        ratings: Elo ``(n,)``.
        scores: Centred cosines averaged over the middle layers, ``(n, N)``.
        layered: Centred cosines at every layer, ``(L, n, N)``.
        mass: Probability of A and B together in the median question.
    """

    activities: Activities
    answers: np.ndarray
    won: np.ndarray
    ratings: np.ndarray
    scores: np.ndarray
    layered: np.ndarray
    mass: float

    @property
    def groups(self) -> np.ndarray:
        """The category of each activity as a number."""
        return np.asarray(np.unique(self.activities.categories, return_inverse=True)[1])


def asked_and_read(bench: Bench, activities: Activities) -> Asked | str:
    """Ask and read, or say in a whole sentence why nothing can be said."""
    vectors = bench.vectors
    answers = choices.ask(bench, activities, [None])[0]
    mass = mass_of(answers)
    if not mass >= MASS:
        return (
            f"In the median question A and B together have {mass:.0%} of the probability: {MASS:.0%} are needed ({bench.format})."
        )
    won = shares(preferred(answers))
    ratings = elo(won)
    if np.ptp(ratings) < 1e-3:
        return "The answers do not depend on the activities: all have the same rating."
    residuals = np.stack([result.readings[0].values for result in bench.read(choices.feelings(bench, activities))], axis=1)
    if not np.isfinite(residuals).all():
        return "The tokens of an activity could not be found in the question."
    layered = np.stack([
        centred_cosine(x, d.astype(np.float64), centre.astype(np.float64))
        for x, d, centre in zip(residuals, vectors.directions, vectors.centre, strict=True)
    ])  # fmt: skip
    scores = layered[[vectors.row(layer) for layer in middle(bench)]].mean(axis=0)
    return Asked(activities, answers, won, ratings, scores, layered, mass)


def mass_of(answers: np.ndarray) -> float:
    return float(np.nanmedian(np.exp(answers).sum(axis=-1)))


def preferred(answers: np.ndarray) -> np.ndarray:
    """Probability of A against B; one half where an activity would meet itself."""
    with np.errstate(over="ignore"):
        p = 1 / (1 + np.exp(answers[..., 1] - answers[..., 0]))
    return np.where(np.isnan(p), 0.5, p)


def correlations(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of each column ``(n, N)`` with ``y`` ``(n,)`` or each row of ``(draws, n)``; nan where one side is constant."""
    x, y = columns - columns.mean(axis=0), y - y.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(y @ x / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=-1)[..., None]))


def correlation(x: np.ndarray, y: np.ndarray) -> Any:
    """Correlation of ``x`` ``(n,)`` with ``y`` ``(n,)``, or with each row of ``(draws, n)``."""
    return correlations(x[:, None], y)[..., 0]


def less_groups(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values along the first axis less the mean of their group."""
    means = np.zeros((groups.max() + 1, *values.shape[1:]))
    np.add.at(means, groups, values)
    sizes = np.maximum(np.bincount(groups, minlength=len(means)), 1)
    return np.asarray(values - (means / sizes.reshape(-1, *[1] * (values.ndim - 1)))[groups])


def exchanges(values: np.ndarray, groups: np.ndarray, draws: int, seed: Sequence[int]) -> np.ndarray:
    """``draws`` rows of values that have changed places within their group."""
    rng, order = np.random.default_rng(seed), np.argsort(groups, kind="stable")
    rows = np.empty((draws, len(values)))
    for row in rows:
        row[order] = values[np.lexsort((rng.random(len(values)), groups))]
    return rows


def null_of(drawn: np.ndarray, observed: float, side: stats.Side, kind: str) -> stats.Null:
    """The null whose draws are at hand."""
    each = iter(drawn)
    return stats.permutation_null(float, observed, permute=lambda _: next(each), draws=len(drawn), side=side, kind=kind)


def wider(a: stats.Estimate, b: stats.Estimate, n: int) -> stats.Estimate:
    """The first estimate with whichever end of the two intervals is further out."""
    return replace(a, low=min(a.low, b.low), high=max(a.high, b.high), n=n)


# ── findings ──


def pleasures(bench: Bench) -> list[float | None]:
    """How pleasant people rate each emotion's word; None without a rating."""
    ratings = [bench.concepts[name].rating if name in bench.concepts else None for name in bench.vectors.names]
    return [rating.pleasure if rating else None for rating in ratings]


@dataclass(frozen=True)
class PerEmotion:
    """Of each emotion's correlation: interval, p and q."""

    intervals: list[stats.Estimate]
    p: np.ndarray
    q: np.ndarray


def readings(bench: Bench, asked: Asked, r: np.ndarray, exchanged: np.ndarray, where: str) -> tuple[list[Finding], PerEmotion]:
    """Everything about probes and preferences between the first activities."""
    vectors, scores, groups, n = bench.vectors, asked.scores, asked.groups, len(asked.activities)
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    known = pleasures(bench)
    rated = [i for i, pleasure in enumerate(known) if pleasure is not None]
    pleasure = np.array([known[i] for i in rated], dtype=float)
    best = int(np.nanargmax(np.abs(r)))
    sides = np.array([(c in WANTED) - (c in SHUNNED) for c in asked.activities.categories])
    inside = correlations(less_groups(scores, groups), less_groups(asked.ratings, groups))
    enough = len(rated) >= FEW_RATED and np.ptp(pleasure) > 0

    def everything(items: np.ndarray) -> np.ndarray:
        ratings = resampled(asked.won, items)[items]
        drawn = correlations(scores[items], ratings)
        within = correlations(less_groups(scores[items], groups[items]), less_groups(ratings, groups[items]))
        over = [correlation(pleasure, drawn[rated]), correlation(pleasure, within[rated])] if enough else []
        return np.array([*drawn, abs(drawn[best]), _apart(ratings, sides[items]), *over])

    intervals = stats.bootstrap_each(everything, n, **options)
    per_probe, rest = intervals[: len(r)], intervals[len(r) :]
    p = np.array([null_of(column, value, "two-sided", "").p for column, value in zip(exchanged.T, r, strict=True)])
    per_emotion = PerEmotion(per_probe, p, stats.benjamini_hochberg(p))
    findings = [_orders(bench, asked), _categories(bench, asked, sides, replace(rest[1], unit="Elo"))]
    for name, side in (("blissful", "greater"), ("hostile", "less")):
        if name not in vectors:
            findings.append(CLAIMS[name].untestable(f"There is no vector for {name}."))
            continue
        i = vectors.index(name)
        estimate = per_probe[i]
        null = null_of(exchanged[:, i], estimate.value, side, "ratings exchanged between activities")  # type: ignore[arg-type]
        clear = estimate.low > 0 if side == "greater" else estimate.high < 0
        place = int((r > r[i]).sum()) + 1 if side == "greater" else int((r < r[i]).sum()) + 1
        note = f"Number {place} of {len(r)} from {'above' if side == 'greater' else 'below'}; {where}."
        findings.append(CLAIMS[name].tested(estimate, null, clear, note))
    null = null_of(np.abs(exchanged).max(axis=1), abs(float(r[best])), "greater", "ratings exchanged, best of all probes")
    note = (
        f"{vectors.names[best]}, r = {r[best]:+.2f}, chosen by looking: the value is optimistic, p is corrected. "
        f"{(per_emotion.q <= ALPHA).sum()} of {len(r)} probes have q <= {ALPHA}; {where}."
    )
    findings.append(CLAIMS["strongest"].tested(rest[0], null, rest[0].low > 0, note))
    if not enough:
        findings += [
            CLAIMS[id].untestable(f"{len(rated)} emotions have ratings: {FEW_RATED} are needed.") for id in ("valence", "within")
        ]
        return findings, per_emotion
    estimate = replace(rest[2], n=len(rated))
    null = null_of(correlation(pleasure, exchanged[:, rated]), estimate.value, "greater", "ratings exchanged between activities")
    note = f"Over {len(rated)} emotions with ratings of pleasure by people; interval over {n} activities; {where}."
    findings.append(CLAIMS["valence"].tested(estimate, null, estimate.low > 0, note))
    estimate = replace(rest[3], n=len(rated))
    swapped = exchanges(less_groups(asked.ratings, groups), groups, bench.draws, [bench.seed, 2])
    swapped = correlations(less_groups(scores, groups), swapped)
    null = null_of(correlation(pleasure, swapped[:, rated]), estimate.value, "greater", "ratings exchanged within categories")
    note = f"Readings and ratings less the mean of the category; the largest r is then {np.nanmax(np.abs(inside)):.2f}; {where}."
    findings.append(CLAIMS["within"].tested(estimate, null, estimate.low > 0, note))
    return findings, per_emotion


def _orders(bench: Bench, asked: Asked) -> Finding:
    """Do the log-odds of i over j agree when they change places? 1: fully; 0: only the place counts."""
    odds = asked.answers[..., 0] - asked.answers[..., 1]
    apart = ~np.eye(len(odds), dtype=bool)
    first = float(odds[apart].mean())
    x = np.where(apart, odds - first, 0.0)

    def agreement(items: np.ndarray, other: np.ndarray) -> float:
        one, two = x[np.ix_(items, items)], other[np.ix_(items, items)].T
        return float(-(one * two).sum() / max((one**2).sum(), 1e-300))

    every = np.arange(len(x))
    estimate = stats.bootstrap(lambda items: agreement(items, x), len(x), draws=bench.draws, seed=bench.seed)
    null = stats.permutation_null(
        lambda order: agreement(every, x[np.ix_(order, order)]),
        estimate.value,
        permute=lambda rng: rng.permutation(len(x)),
        draws=bench.draws,
        seed=bench.seed,
        side="greater",
        kind="activities exchanged in one of the orders",
    )
    chance = float(np.mean(preferred(asked.answers)[apart]))
    both = f"A and B have {asked.mass:.0%} of the probability in the median question"
    note = f"Over all questions A has {chance:.0%} against B, whatever they are; {both}; {bench.format}."
    return CLAIMS["orders"].tested(estimate, null, estimate.low > 0, note)


def _apart(ratings: np.ndarray, sides: np.ndarray) -> float:
    """Mean rating of the categories that the paper's model prefers less that of those it shuns; nan without either."""
    if not ((sides > 0).any() and (sides < 0).any()):
        return float("nan")
    return float(ratings[sides > 0].mean() - ratings[sides < 0].mean())


def _categories(bench: Bench, asked: Asked, sides: np.ndarray, estimate: stats.Estimate) -> Finding:
    if min((sides > 0).sum(), (sides < 0).sum()) < 2:
        return CLAIMS["categories"].untestable("The activities are not of the published categories.")
    null = stats.permutation_null(
        lambda exchanged: _apart(asked.ratings, exchanged),
        estimate.value,
        permute=lambda rng: rng.permutation(sides),
        draws=bench.draws,
        seed=bench.seed,
        side="greater",
        kind="categories exchanged between activities",
    )
    note = f"Standard deviation of all ratings {asked.ratings.std():.0f} Elo (published 618); {bench.format}."
    return CLAIMS["categories"].tested(estimate, null, estimate.low > 0, note)


def replicates(bench: Bench, r: np.ndarray, held_out: Asked | str, where: str) -> Finding:
    if isinstance(held_out, str):
        return CLAIMS["replicates"].untestable(f"Held-out activities cannot be used. {held_out}")
    estimate = stats.bootstrap(
        lambda items: float(correlation(r, correlations(held_out.scores[items], resampled(held_out.won, items)[items]))),
        len(held_out.activities), draws=bench.draws, seed=bench.seed,
    )  # fmt: skip
    again = exchanges(held_out.ratings, held_out.groups * 0, bench.draws, [bench.seed, 3])
    drawn = correlation(r, correlations(held_out.scores, again))
    null = null_of(drawn, estimate.value, "greater", "ratings exchanged between held-out activities")
    note = f"Over {len(r)} emotions; interval over {len(held_out.activities)} held-out activities; {where}."
    return CLAIMS["replicates"].tested(replace(estimate, n=len(r)), null, estimate.low > 0, note)
