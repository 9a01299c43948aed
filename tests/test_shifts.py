"""Shifts since a start: planted ones are found with the right interval, and what moves everything is not taken for an emotion."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats as reference

from affectlens.errors import FormatError
from affectlens.shifts import DIRECTIONS, Drift, Shift, Start, check_texts, drift_of
from affectlens.vectors import ConceptVectors, fit_means

WIDTH, PROMPTS = 64, 30
NAMES = tuple(f"e{i}" for i in range(40))


def vectors(seed: int = 0, names: tuple[str, ...] = NAMES, basis: int = 3) -> ConceptVectors:
    """Vectors that resemble each other, as emotions do, without some neutral components."""
    rng = np.random.default_rng(seed)
    neutral = np.linalg.qr(rng.normal(size=(WIDTH, max(basis, 1))))[0].T[:basis]
    means = rng.normal(size=(len(names), WIDTH)) + rng.normal(size=(len(names), 2)) @ rng.normal(size=(2, WIDTH)) * 3
    found = fit_means(means, neutral)
    n = len(names)
    return ConceptVectors(
        names=names,
        layers=(2,),
        layer=2,
        directions=found.directions[None].astype(np.float32),
        norms=found.norms[None].astype(np.float32),
        centre=rng.normal(size=(1, WIDTH)).astype(np.float32),
        residual_norms=np.ones(1, np.float32),
        neutral=(neutral.astype(np.float32),),
        baseline=np.ones((1, n, 2), np.float32),
        stability=np.ones((1, n), np.float32),
        counts=np.ones(n, np.int64),
        model={},
    )


def prompts(seed: int = 0, n: int = PROMPTS) -> np.ndarray:
    return np.random.default_rng([seed, 9]).normal(size=(n, WIDTH)) * 2 + 1


def test_nothing_has_moved_at_the_start() -> None:
    shift = Start(vectors(), prompts()).shift(prompts())
    assert not shift.z.any() and not shift.margin.any() and not shift.beyond.any()
    assert shift.distance.value == shift.distance.high == shift.still == shift.random == shift.random_distance == 0


def test_z_and_its_interval_agree_with_an_independent_computation() -> None:
    own, before = vectors(), prompts()
    after = before + np.random.default_rng(3).normal(size=before.shape) * 0.3 + 0.2
    shift = Start(own, before).shift(after)

    def cosines(residuals: np.ndarray) -> np.ndarray:
        moved = residuals - own.centre[0].astype(np.float64)
        return np.array([[r @ d / np.linalg.norm(r) for d in own.directions[0].astype(np.float64)] for r in moved])

    change = (cosines(after) - cosines(before)) / cosines(before).std(axis=0, ddof=1)
    np.testing.assert_allclose(shift.z, change.mean(axis=0), atol=1e-9)
    low, high = reference.t.interval(0.95, PROMPTS - 1, change.mean(axis=0), reference.sem(change))
    np.testing.assert_allclose(shift.z - shift.margin, low, atol=1e-9)
    np.testing.assert_allclose(shift["e3"].high, high[3], atol=1e-9)
    assert shift["e3"].n == PROMPTS
    assert shift.distance.value == pytest.approx(np.sqrt((change.mean(axis=0) ** 2).mean()))
    assert [shift.rank(name) for name in NAMES] == list(reference.rankdata(-shift.z))


def test_a_planted_emotion_stands_out_and_no_other_does() -> None:
    own, before = vectors(), prompts()
    after = before + 6 * own.directions[0, 7]
    shift = Start(own, before).shift(after)
    assert shift.rank("e7") == 1 and shift.beyond[7]
    assert shift.beyond.sum() <= 3  # what resembles it may come along
    assert shift.distance.low > shift.still


def test_what_moves_everything_is_no_emotion() -> None:
    """Along a direction without meaning most shifts are certain, and about 5 % stand out, as many as of random directions."""
    certain, beyond = [], []
    for seed in range(12):
        own, before = vectors(seed), prompts(seed)
        push = np.random.default_rng([seed, 5]).normal(size=WIDTH)
        shift = Start(own, before).shift(before + push)
        certain.append((np.abs(shift.z) > shift.margin).mean())
        beyond.append(shift.beyond.mean())
    assert np.mean(certain) > 0.6
    assert np.mean(beyond) < 0.09


def test_noise_of_the_prompts_is_no_distance() -> None:
    distances = []
    for seed in range(40):
        before = prompts(seed)
        noise = np.random.default_rng([seed, 6]).normal(size=before.shape) * 0.2
        shift = Start(vectors(seed), before).shift(before + noise)
        distances.append(shift.distance.value > shift.still)
    assert np.mean(distances) < 0.2  # 5 % is meant


def test_since_another_training_counts_what_is_beyond_it() -> None:
    own, before = vectors(), prompts()
    push = np.random.default_rng(5).normal(size=WIDTH)
    tuned, control = before + push + 4 * own.directions[0, 7], before + push
    start = Start(own, before)
    assert start.shift(tuned, since=control).rank("e7") == 1
    np.testing.assert_allclose(start.shift(tuned, since=control).z, start.shift(tuned).z - start.shift(control).z, atol=1e-9)


def test_few_vectors_are_not_compared_with_mixtures_of_themselves() -> None:
    for n, kinds in ((9, 1), (10, 2)):
        assert Start(vectors(names=NAMES[:n]), prompts())._random[0].shape == (WIDTH, kinds * DIRECTIONS)


def test_plain_data_come_back() -> None:
    own, before = vectors(), prompts()
    shift = Start(own, before).shift(before + 0.5)
    back = Shift.from_dict(json.loads(json.dumps(shift.as_dict())), NAMES)
    np.testing.assert_allclose(back.z, shift.z, atol=1e-5)
    assert (back.distance, back.random, back.names) == (shift.distance, shift.random, NAMES)


def test_too_little_is_refused() -> None:
    with pytest.raises(FormatError, match="9 prompts: give 10 or more"):
        Start(vectors(), prompts(n=9))
    with pytest.raises(FormatError, match="the prompts all read the same for 'e0'"):
        Start(vectors(), np.ones((12, WIDTH)))
    for concepts in (["e1"] * 4, ["e1", "e1", "e2"]):
        with pytest.raises(FormatError, match="two concepts or more, with two texts of each"):
            check_texts(concepts)


# ── drift ──


def stories(own: ConceptVectors, *, noise: float, rotate: float = 0.0, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of twelve emotions at the start, and after the directions of these emotions have turned."""
    rng = np.random.default_rng([seed, 8])
    concepts = [name for name in NAMES[:12] for _ in range(4)]
    at = own.directions[0, :12].astype(np.float64)
    turned = at + rotate * np.linalg.qr(rng.normal(size=(WIDTH, 12)))[0].T
    each, start = rng.normal(size=(48, WIDTH)) * noise, own.centre[0]
    return concepts, start + np.repeat(at, 4, axis=0) + each, start + np.repeat(turned, 4, axis=0) + each


def test_vectors_that_stay_are_kept_and_vectors_that_turn_have_moved() -> None:
    own = vectors()
    concepts, start, _ = stories(own, noise=0.05)
    same = drift_of(own, concepts, start, start)
    assert same.verdict == "kept" and same.change.value == same.change.low == same.change.high == 0
    assert same.kept == same.most and same.chance < same.most.low
    moved = drift_of(own, *stories(own, noise=0.05, rotate=1.0))
    assert moved.verdict == "moved" and moved.change.value == pytest.approx(moved.kept.value - moved.most.value)
    assert Drift.from_dict(json.loads(json.dumps(moved.as_dict()))) == moved


def test_texts_that_tell_nothing_say_so() -> None:
    own = vectors()
    concepts = [name for name in NAMES[:12] for _ in range(4)]
    noise = np.random.default_rng(1).normal(size=(48, WIDTH))
    assert drift_of(own, concepts, noise, noise).verdict == "untestable"


def test_other_noise_alone_is_no_drift() -> None:
    moved = 0
    for seed in range(20):
        own = vectors(seed)
        concepts, start, _ = stories(own, noise=0.15, seed=seed)
        later = start + np.random.default_rng([seed, 7]).normal(size=start.shape) * 0.02
        moved += drift_of(own, concepts, start, later).verdict == "moved"
    assert moved <= 4
