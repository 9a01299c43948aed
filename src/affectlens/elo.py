"""Elo ratings from choices between pairs: Bradley-Terry strengths, from probabilities as well as from wins.

The chance that i is preferred to j is ``1 / (1 + 10 ** ((elo_j - elo_i) / 400))`` (R. A. Bradley and M. E. Terry, Biometrika 39,
1952, on the scale that chess uses). The mean of all ratings is 1500: only differences mean anything, and what moves all items
alike cannot be seen. Source: method 9 (paper, Table 17), method 22.15.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from affectlens.stats import Array, Estimate, Index, bootstrap_each

SCALE = 400 / math.log(10)
"""Elo points for a change of 1 in the logarithm of the odds."""

MEAN = 1500.0
STEPS, TOLERANCE, STRIDE = 100, 1e-10, 4.0


def shares(first: ArrayLike) -> Array:
    """What share of its encounters each item wins, over both orders.

    Args:
        first: Probability that item i is preferred where it is named first and j second, ``(n, n)``; the diagonal is ignored.

    Returns:
        ``(n, n)``: how often i is preferred to j. A place that is preferred whatever stands there takes away from all differences
        alike and favours nobody.

    Example:
        >>> shares([[0.0, 0.9], [0.5, 0.0]])
        array([[0.5, 0.7],
               [0.3, 0.5]])
    """
    p = np.array(first, dtype=np.float64)
    both = (p + 1 - p.T) / 2
    np.fill_diagonal(both, 0.5)
    return np.asarray(both)


def elo(won: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    """Elo ratings by maximum likelihood; shares of wins may be probabilities.

    Args:
        won: ``won[..., i, j]`` is the share of encounters with j that i wins, ``(..., n, n)``; ``won[..., j, i]`` is the rest.
        weights: How often each item is among the opponents, ``(n,)``; default once. An item of weight 0 is rated by how it fares
            against the others and changes none of them.

    Returns:
        Ratings ``(..., n)`` with the mean 1500.

    Raises:
        ValueError: Shares are outside 0..1 or do not add up to 1; or there is no finite answer, because some items win (or lose)
            every encounter with all others.

    Example:
        >>> elo([[0.5, 0.75, 0.9], [0.25, 0.5, 0.75], [0.1, 0.25, 0.5]]).round()
        array([1691., 1500., 1309.])
    """
    s = np.array(won, dtype=np.float64)
    n = s.shape[-1] if s.ndim > 1 else 0
    w = np.ones(n) if weights is None else np.array(weights, dtype=np.float64)
    if s.shape[-2:] != (n, n) or w.shape != (n,) or (w > 0).sum() < 2 or (w < 0).any():
        raise ValueError(f"won must be (..., n, n) with two or more items that have a weight: {s.shape}, {w.shape}")
    apart = ~np.eye(n, dtype=bool)
    if not ((s >= 0) & (s <= 1))[..., apart].all() or np.abs(s + s.swapaxes(-1, -2) - 1)[..., apart].max() > 1e-6:
        raise ValueError("won must hold shares from 0 to 1 that add up to 1 for i against j and j against i")
    for one in s.reshape(-1, n, n):
        _refuse_separated(one, w)
    weight = np.where(apart, w, 0.0)
    theta = np.zeros(s.shape[:-1])
    for _ in range(STEPS):
        expected = 1 / (1 + np.exp(theta[..., None, :] - theta[..., :, None]))
        surplus = (weight * (s - expected)).sum(axis=-1)
        slope = weight * expected * (1 - expected)
        # A common shift changes nothing: the added constant keeps the mean where it is and makes the system solvable.
        system = slope.sum(axis=-1)[..., None] * np.eye(n) - slope + 1 / n
        step = np.linalg.solve(system, surplus[..., None])[..., 0]
        size = np.abs(step).max(axis=-1, keepdims=True)
        theta += step * np.minimum(1.0, STRIDE / np.maximum(size, 1e-300))
        if size.max() < TOLERANCE:
            break
    return np.asarray(MEAN + SCALE * (theta - theta.mean(axis=-1, keepdims=True)))


def elo_with_intervals(won: ArrayLike, *, draws: int = 1000, seed: int = 0) -> list[Estimate]:
    """Ratings with bootstrap intervals over items: how each would move with other opponents.

    Args:
        won: As for :func:`elo`.
        draws, seed: How many sets of opponents are drawn, and from which random numbers.

    Raises:
        ValueError: As :func:`elo`.

    Example:
        >>> won = shares(np.random.default_rng(0).uniform(0.2, 0.8, (12, 12)))
        >>> rating = elo_with_intervals(won, draws=50)[0]
        >>> rating.low < rating.value < rating.high, rating.unit
        (True, 'Elo')
    """
    s = np.array(won, dtype=np.float64)
    return bootstrap_each(lambda items: resampled(s, items), len(s), draws=draws, seed=seed, unit="Elo")


def resampled(won: Array, items: Index) -> Array:
    """Ratings of all items ``(..., n)`` where the opponents are ``items``, some of them several times; nan without an answer.

    Example:
        >>> resampled(np.array([[0.5, 0.75], [0.25, 0.5]]), np.array([0, 1])).round()
        array([1595., 1405.])
    """
    try:
        return elo(won, weights=np.bincount(items, minlength=won.shape[-1]))
    except ValueError:
        return np.full(won.shape[:-1], np.nan)


def _refuse_separated(s: Array, w: Array) -> None:
    """There is a finite answer only if each item is reached from each other by wins (L. R. Ford, 1957)."""
    apart = ~np.eye(len(s), dtype=bool)
    if ((s > 0) & (s < 1))[apart].all():  # every item has won a part of every encounter
        return
    from scipy.sparse.csgraph import connected_components

    beats, among, rest = (s > 0) & apart, w > 0, w <= 0
    rated = beats[np.ix_(rest, among)].any(axis=1) & beats[np.ix_(among, rest)].any(axis=0)
    if connected_components(beats[np.ix_(among, among)], connection="strong")[0] > 1 or not rated.all():
        raise ValueError("some items win or lose every encounter with all others: ratings would be infinite")
