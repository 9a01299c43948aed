"""Rates and scores of arms that played the same episodes, and what can be said of their differences.

All arms play the same episodes with the same random numbers, so their means vary together. :func:`means` gives the means with
their covariance; whatever is asked of a sweep is then a contrast of those means:

* :func:`slope_weights`: the change along the line of least squares, from the lowest strength to the highest;
* :func:`against_controls`: whether a contrast is larger than the same one of random directions. There are few of them, so that
  no rank among them could be rare: five give no p below 1/6. Instead the next random direction is predicted from them, with
  Student's t and a variance that has both parts, between directions and of the sample;
* :func:`turning`: whether the means rise and then fall (or fall and then rise) by more than chance.

Near 0 and 1 the sample's own variance is too small, and 0 where nothing happened at all. So an episode is added in which only the
one arm acted, and one in which only the other did: for two arms this is the interval of Bonett and Price (Journal of Educational
and Behavioral Statistics 37, 2012), which Agresti and Caffo's is for independent ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from affectlens.stats import Array, Estimate, Null

BLOCKS = 12
"""A turn is looked for at so many places at most: with more strengths, neighbours are taken together."""


@dataclass(frozen=True, eq=False)
class Means:
    """Means of ``k`` arms.

    Args:
        value: ``(k,)``; nan for an arm in which nothing was measured.
        pulled: ``value`` drawn a little to the common mean, as the added episodes do; what contrasts are made of.
        covariance: Of ``pulled``, ``(k, k)``.
        counts: Episodes that were measured, ``(k,)``.
        units: Of which so many are independent.
        shares: Whether they are means of 0 and 1, so that a contrast has an end.
    """

    value: Array
    pulled: Array
    covariance: Array
    counts: Array
    units: int
    shares: bool

    @property
    def freedom(self) -> int:
        return max(1, self.units - 1)

    def variance(self, weights: ArrayLike) -> float:
        """Of a contrast."""
        w = np.asarray(weights, dtype=np.float64)
        used = w != 0
        return float(w[used] @ self.covariance[np.ix_(used, used)] @ w[used])

    def change(self, weights: ArrayLike) -> float:
        """The value of a contrast, drawn to 0 as its interval is; nan when an arm that it names was not measured."""
        w = np.asarray(weights, dtype=np.float64)
        return float(w[w != 0] @ self.pulled[w != 0])

    def estimate(self, weights: ArrayLike, *, factor: float = 1.0, unit: str = "") -> Estimate:
        """A contrast with its 95 % interval.

        Args:
            weights: ``(k,)``, sum 0.
            factor: To print the value in another unit, 100 for points.
            unit: Printed after it.
        """
        w = np.asarray(weights, dtype=np.float64)
        value, change = float(w[w != 0] @ self.value[w != 0]), self.change(w)
        half = float(distributions.t.ppf(0.975, self.freedom)) * math.sqrt(self.variance(w))
        n = int(self.counts[w != 0].min()) if w.any() else 0
        low, high = min(change - half, value), max(change + half, value)
        if self.shares:
            most = float(w[w > 0].sum())  # where every arm that counts up is 1 and every other is 0
            low, high = max(low, -most), min(high, most)
        return Estimate(factor * value, factor * low, factor * high, n, unit=unit)

    def with_interval(self, arm: int) -> tuple[float, float, float]:
        """The mean of an arm and its 95 % interval; for shares use Wilson's."""
        value = float(self.value[arm])
        half = float(distributions.t.ppf(0.975, self.freedom)) * math.sqrt(self.covariance[arm, arm])
        return value, value - half, value + half

    def p(self, weights: ArrayLike) -> float:
        """How often a contrast is so far from 0 by chance, when there is nothing; two-sided."""
        t = self.change(weights) / math.sqrt(self.variance(weights))
        return float(2 * distributions.t.sf(abs(t), self.freedom))


def means(values: ArrayLike, units: ArrayLike, *, shares: bool = True) -> Means:
    """Means of arms over the same episodes.

    Args:
        values: ``(episodes, arms)``; nan where nothing was measured.
        units: What each episode was drawn with, ``(episodes,)``: itself, or its case when cases are the sample.
        shares: Whether values are 0 and 1, so that the added episodes are needed. Of scores only the variance gets a little more,
            by that of one episode, which keeps it from being 0.

    Example:
        >>> both = means([[0, 1], [0, 1], [0, 0], [0, 1]] * 10, range(40))
        >>> print(both.estimate([-1, 1]))
        0.75 [0.56, 0.86] (n = 40)
        >>> print(means([[0, 0]] * 40, range(40)).estimate([-1, 1]))
        0.00 [-0.07, 0.07] (n = 40)
    """
    y = np.asarray(values, dtype=np.float64)
    codes = np.unique(np.asarray(units), return_inverse=True)[1]
    known, u = np.isfinite(y), int(codes.max()) + 1
    counts = known.sum(axis=0).astype(np.float64)
    value = np.where(known, y, 0.0).sum(axis=0) / np.where(counts == 0, np.nan, counts)
    moved = np.where(known, y - value, 0.0)
    keep, extra = (counts / (counts + 2), 1.0) if shares else (np.ones_like(counts), _spread(y[known], moved[known]))
    together = np.zeros((u, y.shape[1]))
    np.add.at(together, codes, moved / np.maximum(counts, 1))
    covariance = np.outer(keep, keep) * (together.T @ together) * (u / max(1, u - 1))
    covariance += np.diag(extra / (counts + 2) ** 2)
    covariance[:, counts == 0] = covariance[counts == 0, :] = np.nan
    common = float(y[known].mean()) if known.any() else math.nan
    return Means(value, keep * value + (1 - keep) * common, covariance, counts, u, shares)


def _spread(values: Array, moved: Array) -> float:
    """Variance within arms, and never nothing."""
    reach = float(np.ptp(values)) if len(values) else 0.0
    return max(float((moved**2).mean()) if len(moved) else 0.0, (1e-4 * reach) ** 2, 1e-24)


def design_effect(values: ArrayLike, units: ArrayLike) -> float:
    """How many episodes tell as much as one that shares its unit with no other: 1 where every episode is a unit.

    It is 1 + (m - 1) ρ for m episodes a unit, ρ being their correlation within an arm (analysis of variance, all arms together).

    Example:
        >>> design_effect([[0], [0], [1], [1]] * 5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9])
        2.0
    """
    y = np.asarray(values, dtype=np.float64)
    codes = np.unique(np.asarray(units), return_inverse=True)[1]
    sizes = np.bincount(codes).astype(np.float64)
    u, n = len(sizes), len(y)
    if u == n or u < 2:
        return 1.0
    y = np.where(np.isfinite(y), y - np.nan_to_num(np.nanmean(np.where(np.isfinite(y), y, np.nan), axis=0)), 0.0)
    sums = np.zeros((u, y.shape[1]))
    np.add.at(sums, codes, y)
    between = float((sums**2 / sizes[:, None]).sum()) / (u - 1)
    within = (float((y**2).sum()) - float((sums**2 / sizes[:, None]).sum())) / (n - u)
    size = (n - float((sizes**2).sum()) / n) / (u - 1)
    whole = between + (size - 1) * within
    rho = (between - within) / whole if whole > 0 else 0.0
    return 1 + (float((sizes**2).sum()) / n - 1) * min(1.0, max(0.0, rho))


def slope_weights(strengths: Sequence[float]) -> Array:
    """The contrast whose value is the change along the line of least squares from the lowest strength to the highest.

    Example:
        >>> slope_weights([-0.1, 0.0, 0.1])
        array([-1.,  0.,  1.])
    """
    s = np.asarray(strengths, dtype=np.float64)
    moved = s - s.mean()
    return np.asarray(moved * np.ptp(s) / (moved @ moved)) + 0.0


@dataclass(frozen=True)
class Prediction:
    """Where the next random direction would be expected, and how rare the observed contrast would be among such.

    Args:
        centre: Expected value; 0 where a direction and its opposite were both run.
        half: The central 95 % reach so far to either side.
        p: Two-sided; nan when there are too few controls.
        freedom: Of Student's t.
        values: Of the controls.
    """

    centre: float
    half: float
    p: float
    freedom: int
    values: tuple[float, ...]

    def null(self, *, factor: float = 1.0) -> Null:
        """As a finding states it."""
        low, high = self.centre - self.half, self.centre + self.half
        kind = f"random directions of equal norm, Student's t with {self.freedom} degrees of freedom"
        return Null(factor * self.centre, factor * low, factor * high, self.p, len(self.values), kind)


def against_controls(of: Means, own: ArrayLike, controls: Sequence[ArrayLike], *, symmetric: bool) -> Prediction:
    """Whether a contrast is larger than that of a random direction would be.

    Args:
        of: All arms, controls included.
        own: The contrast.
        controls: The same one of every random direction.
        symmetric: The contrast changes its sign when the direction is turned round. A random direction's sign is arbitrary, so
            the expected value is 0 and need not be estimated.

    Returns:
        The prediction. Its variance is the controls' own spread, which holds what differs between directions and what the sample
        adds, but never less than the sample's variance of the contrast.
    """
    w, each = np.asarray(own, dtype=np.float64), [np.asarray(c, dtype=np.float64) for c in controls]
    found = np.array([of.change(c) for c in each])
    k, value = len(each), of.change(w)
    freedom = k if symmetric else k - 1
    if freedom < 1 or not np.isfinite([*found, value]).all():
        return Prediction(math.nan, math.nan, math.nan, max(0, freedom), tuple(found.tolist()))
    if symmetric:
        centre, spread, mine = 0.0, float((found**2).mean()), of.variance(w)
        theirs = float(np.mean([of.variance(c) for c in each]))
    else:
        middle = np.mean(each, axis=0)
        centre, spread, mine = float(found.mean()), float(found.var(ddof=1)) * (1 + 1 / k), of.variance(w - middle)
        # What the sample adds to the spread: each control against the mean of the others.
        theirs = float(np.mean([of.variance((c - middle) * k / (k - 1)) for c in each])) * (1 - 1 / k**2)
    variance = max(spread + max(0.0, mine - theirs), mine)
    t = (value - centre) / math.sqrt(variance)
    half = float(distributions.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Prediction(centre, half, float(2 * distributions.t.sf(abs(t), freedom)), freedom, tuple(found.tolist()))


@dataclass(frozen=True)
class Turn:
    """The best way to see means rise and then fall, or fall and then rise.

    Args:
        first: ``rises`` or ``falls``: what they do before the turn.
        weights: The smaller of the two changes as a contrast, positive when there is such a turn, ``(k,)``.
        p: Of so large a change against means that only rise or only fall.
        middle: From which to which strength the top (or bottom) reaches, numbers of arms.
        chance: Median and 97.5th percentile of the statistic by chance, in the unit of the contrast.
        draws: Behind ``p``.
    """

    first: str
    weights: Array
    p: float
    middle: tuple[int, int]
    chance: tuple[float, float]
    draws: int


def turning(of: Means, arms: Sequence[int], *, draws: int = 2000, seed: int = 0) -> Turn | None:
    """Look for a turn in the means of arms that stand in the order of their strength.

    Strengths are cut into three neighbouring pieces in every possible way. The means rise and then fall when those of the middle
    piece lie above those of both others: a large smaller one of the two changes is evidence, in standard errors. If the truth
    only rises, the fall must be chance: p is how often the largest of all falls between neighbouring pieces is so large by
    chance, all of them looked at (max-T; Gaussian draws with the covariance of the means).

    Args:
        of: All arms.
        arms: Numbers of the sweep's arms, in the order of their strength.
        draws, seed: Behind the p value.

    Returns:
        The more likely one of the two turns; None with fewer than three arms, or when one was not measured.
    """
    chosen, k = np.asarray(arms, dtype=np.intp), len(arms)
    if k < 3 or not np.isfinite(of.pulled[chosen]).all():
        return None
    cuts = np.unique(np.linspace(0, k, min(k, BLOCKS) + 1).round().astype(int))
    pieces = {(a, b): _share(k, a, b) for a, b in itertools.combinations(cuts.tolist(), 2)}
    covariance = of.covariance[np.ix_(chosen, chosen)]
    neighbours = [pieces[a, b] - pieces[b, c] for a, b, c in itertools.combinations(cuts.tolist(), 3)]
    falls = np.array(neighbours)
    errors = np.sqrt(np.einsum("ij,jk,ik->i", falls, covariance, falls))
    rng = np.random.default_rng([seed, 31])
    drawn = rng.multivariate_normal(np.zeros(k), covariance, size=draws, method="eigh")
    drawn /= np.sqrt(rng.chisquare(of.freedom, size=(draws, 1)) / of.freedom)
    largest = (drawn @ falls.T / errors).max(axis=1)

    t = falls @ of.pulled[chosen] / errors
    row = {cut: i for i, cut in enumerate(itertools.combinations(cuts.tolist(), 3))}
    turns = []
    for a, b, c, d in itertools.combinations(cuts.tolist(), 4):
        for first, way in (("rises", 1.0), ("falls", -1.0)):
            sides = ((row[a, b, c], -way), (row[b, c, d], way))
            at, sign = min(sides, key=lambda side: side[1] * t[side[0]])
            turns.append((float(sign * t[at]), first, at, sign, (b, c - 1)))
    score, first, at, sign, middle = max(turns, key=lambda turn: turn[0])
    weights = np.zeros(len(of.value))
    weights[chosen] = sign * falls[at]
    p = (1 + int((largest >= score).sum())) / (1 + draws)
    typical, high = np.quantile(largest, [0.5, 0.975]) * errors[at]
    return Turn(first, weights, p, middle, (float(typical), float(high)), draws)


def _share(k: int, a: int, b: int) -> Array:
    """The mean of arms ``a`` to ``b - 1`` as weights."""
    weights = np.zeros(k)
    weights[a:b] = 1 / (b - a)
    return weights


def places_of_largest(of: Means, arms: Sequence[int], *, draws: int = 2000, seed: int = 0) -> list[int]:
    """Which of the arms could have the largest mean: the fewest that hold it in 95 % of draws, as places in ``arms``.

    Example:
        >>> places_of_largest(means([[0, 1, 0], [0, 1, 1], [0, 1, 0]] * 10, range(30)), [0, 1, 2])
        [1]
    """
    chosen = np.asarray(arms, dtype=np.intp)
    rng = np.random.default_rng([seed, 32])
    covariance = of.covariance[np.ix_(chosen, chosen)]
    drawn = rng.multivariate_normal(of.value[chosen], covariance, size=draws, method="eigh")
    shares = np.bincount(drawn.argmax(axis=1), minlength=len(chosen)) / draws
    order = np.argsort(-shares, kind="stable")
    enough = int(np.searchsorted(np.cumsum(shares[order]), 0.95 - 1e-12)) + 1
    return sorted(order[:enough].tolist())
