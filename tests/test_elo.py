"""Ratings from pairs: planted strengths come back, with intervals that hold them; what has no answer is refused."""

from __future__ import annotations

import numpy as np
import pytest

from affectlens.elo import MEAN, SCALE, elo, elo_with_intervals, resampled, shares


def planted(strengths: np.ndarray, first: float = 0.0) -> np.ndarray:
    """Probability that i is preferred to j by Bradley and Terry, with an advantage of being named first (in log-odds)."""
    return 1 / (1 + np.exp(-(strengths[:, None] - strengths[None]) / SCALE - first))


@pytest.mark.parametrize("n", [2, 8, 64])
def test_planted_strengths_come_back(n: int) -> None:
    strengths = np.random.default_rng(n).normal(0, 400, n)
    ratings = elo(shares(planted(strengths)))
    np.testing.assert_allclose(ratings, strengths - strengths.mean() + MEAN, atol=1e-6)
    assert ratings.mean() == pytest.approx(MEAN)


def test_the_answer_is_where_the_likelihood_is_largest() -> None:
    """An independent computation: shares that no strengths explain exactly, and a general minimiser."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(3)
    p = rng.uniform(0.02, 0.98, (7, 7))
    won = shares(p)

    def loss(theta: np.ndarray) -> float:
        expected = np.log(1 / (1 + np.exp(theta[None] - theta[:, None])))
        return -float((won * expected)[~np.eye(7, dtype=bool)].sum())

    found = minimize(loss, np.zeros(7), tol=1e-12).x
    np.testing.assert_allclose(elo(won), MEAN + SCALE * (found - found.mean()), atol=0.05)


def test_a_preferred_place_favours_nobody() -> None:
    strengths = np.random.default_rng(0).normal(0, 200, 12)
    ratings = elo(shares(planted(strengths, first=2.0)))
    assert np.corrcoef(ratings, strengths)[0, 1] > 0.999
    flat = elo(shares(planted(np.zeros(12), first=3.0)))
    np.testing.assert_allclose(flat, MEAN, atol=1e-9)


def test_wins_and_losses_are_shares_too() -> None:
    rng = np.random.default_rng(1)
    strengths = np.linspace(-150, 150, 6)
    wins = rng.binomial(400, planted(strengths)) / 400
    ratings = elo(np.where(np.tri(6, k=-1, dtype=bool), 1 - wins.T, wins) * (1 - np.eye(6)) + 0.5 * np.eye(6))
    np.testing.assert_allclose(ratings, strengths + MEAN, atol=40)


def test_far_apart_is_still_found() -> None:
    strengths = np.array([-3000.0, -1000.0, 0.0, 1200.0, 2800.0])
    np.testing.assert_allclose(elo(shares(planted(strengths))), strengths + MEAN, rtol=1e-4)


def test_a_weight_is_a_number_of_copies() -> None:
    rng = np.random.default_rng(5)
    won = shares(rng.uniform(0.1, 0.9, (5, 5)))
    weights = np.array([2, 1, 0, 1, 3])
    copies = np.repeat(np.arange(5), weights)
    many = won[np.ix_(copies, copies)]
    # Copies never meet each other: an encounter with itself says nothing, and with shares of one half changes nothing.
    together = elo(many)
    of_copies = {int(item): together[i] for i, item in enumerate(copies)}
    ratings = elo(won, weights=weights)
    for a in of_copies:
        assert ratings[a] - ratings[0] == pytest.approx(of_copies[a] - of_copies[0], abs=1e-6)
    expected = 1 / (1 + 10 ** ((ratings - ratings[2]) / 400))
    assert (weights * (won[2] - expected))[weights > 0].sum() == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(ratings, resampled(won, copies))


def test_intervals_hold_the_rating_that_other_opponents_give() -> None:
    """Preferences that are no strengths alone: an item's rating depends on whom it meets, and the interval says how much."""
    rng = np.random.default_rng(8)
    inside = []
    for _ in range(40):
        strengths, quirks = rng.normal(0, 1.0, 401), rng.normal(0, 0.8, (401, 401))
        odds = strengths[:, None] - strengths[None] + quirks - quirks.T
        won = 1 / (1 + np.exp(-odds))
        sample = np.arange(25)
        estimate = elo_with_intervals(won[np.ix_(sample, sample)], draws=100)[0]
        # The same item against 400 opponents, on the scale of the sample: its rating less that of the sample's others.
        many = elo(won)
        target = many[0] - many[sample].mean() + MEAN
        inside.append(estimate.low <= target <= estimate.high)
    assert np.mean(inside) > 0.85


@pytest.mark.parametrize(
    ("won", "message"),
    [
        (np.array([[0.5, 1.0], [0.0, 0.5]]), "infinite"),
        (np.array([[0.5, 0.7], [0.7, 0.5]]), "add up"),
        (np.array([[0.5, np.nan], [0.5, 0.5]]), "shares"),
        (np.array([[0.5, 1.2], [-0.2, 0.5]]), "shares"),
        (np.ones((2, 3)), "two or more"),
        (np.array([[0.5]]), "two or more"),
    ],
)
def test_what_has_no_answer_is_refused(won: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elo(won)


def test_a_draw_without_an_answer_is_nan() -> None:
    won = np.array([[0.5, 1.0, 0.3], [0.0, 0.5, 0.9], [0.7, 0.1, 0.5]])
    assert np.isfinite(elo(won)).all()
    assert np.isnan(resampled(won, np.array([0, 1, 1]))).all()
