"""Statistics against independent oracles (scipy, scikit-learn), and on simulated data with a known truth."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats as oracle
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from affectlens.stats import (
    Estimate,
    Null,
    adjusted_rand_with_null,
    auroc,
    auroc_per_label,
    benjamini_hochberg,
    bootstrap,
    bootstrap_each,
    correlation_with_null,
    explained_components,
    permutation_null,
    selection_adjusted_null,
    top_k_accuracy,
    top_k_hits,
    wilson,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ── the two records ──


@pytest.mark.parametrize(
    "record",
    [
        Estimate(0.5, 0.4, 0.6, 12, 0.9, "Elo"),
        Estimate(math.nan, 0.0, math.inf, 0),
        Null(0.0, -0.3, 0.3, 0.001, 999, "exchange y"),
    ],
)
def test_records_survive_strict_json(record: Estimate | Null) -> None:
    text = json.dumps(record.as_dict(), allow_nan=False)
    again = type(record).from_dict(json.loads(text))
    assert again.as_dict() == record.as_dict()
    assert type(again) is type(record)


def test_from_dict_refuses_unknown_fields() -> None:
    with pytest.raises(TypeError, match="verdict"):
        Estimate.from_dict({"value": 1, "low": 0, "high": 2, "n": 3, "verdict": "holds"})


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.8123, 0.674, 0.9012, 45), "0.81 [0.67, 0.90] (n = 45)"),
        (Estimate(1512.34, 1498.2, 1530.9, 64, unit="Elo"), "1,512 Elo [1,498, 1,531] (n = 64)"),
        (Estimate(-0.0001, -0.21, 0.19, 9, 0.9), "0.00 [-0.21, 0.19] (90 % interval, n = 9)"),
        (Estimate(math.nan, math.nan, math.nan, 0), "nan [nan, nan] (n = 0)"),
        (Estimate(1.0, 1.0, 1.0, 5), "1.00 [1.00, 1.00] (n = 5)"),
        (Estimate(0.0, 0.0, 0.0, 5), "0.00 [0.00, 0.00] (n = 5)"),
    ],
)
def test_estimates_print_as_many_digits_as_they_deserve(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


# ── intervals ──


def test_bootstrap_of_a_mean_agrees_with_the_t_interval() -> None:
    x = rng().normal(size=400)
    ours = bootstrap(lambda i: x[i].mean(), 400, draws=4000)
    low, high = oracle.t.interval(0.95, 399, x.mean(), oracle.sem(x))
    assert ours.value == x.mean() and ours.n == 400
    assert ours.low == pytest.approx(low, abs=0.01) and ours.high == pytest.approx(high, abs=0.01)


def test_bootstrap_is_repeatable_and_follows_seed_and_level() -> None:
    x = rng().normal(size=30)
    one = bootstrap(lambda i: x[i].mean(), 30, seed=1)
    assert one == bootstrap(lambda i: x[i].mean(), 30, seed=1)
    assert one != bootstrap(lambda i: x[i].mean(), 30, seed=2)
    narrow = bootstrap(lambda i: x[i].mean(), 30, seed=1, level=0.5, unit="s")
    assert one.low < narrow.low < narrow.high < one.high and narrow.level == 0.5 and narrow.unit == "s"


def test_bootstrap_covers_the_truth_for_small_and_skewed_samples() -> None:
    covered = {8: 0, 40: 0}
    for n in covered:
        for repeat in range(300):
            x = rng(repeat).exponential(size=n) if n == 40 else rng(repeat).normal(1.0, size=n)
            interval = bootstrap(lambda i, x=x: x[i].mean(), n, draws=300, seed=repeat)
            covered[n] += interval.low <= 1.0 <= interval.high
    # Measured: 0.89 for the plain percentile interval at n = 8.
    assert 0.92 <= covered[8] / 300 <= 0.985 and 0.90 <= covered[40] / 300 <= 0.975


def test_stratified_bootstrap_keeps_labels_in_place_and_covers_with_three_units_each() -> None:
    labels = np.array(list("bacbacbac"))

    def check(index: np.ndarray) -> float:
        assert (labels[index] == labels).all()
        return float(len(set(index.tolist())))

    assert bootstrap(check, labels, draws=200).low < 9

    # 20 concepts of very different mean, 3 stories each: the truth is the mean over *these* concepts.
    concepts = np.repeat(np.arange(20), 3)
    means = rng(1).normal(scale=10, size=20)
    covered, widths = 0, []
    for repeat in range(300):
        x = means[concepts] + rng(100 + repeat).normal(size=60)
        interval = bootstrap(lambda i, x=x: x[i].mean(), concepts, draws=300, seed=repeat)
        covered += interval.low <= means.mean() <= interval.high
        widths.append(interval.high - interval.low)
    # Measured: 0.85 for the plain percentile interval; without labels the width is 3, not 0.5.
    assert 0.92 <= covered / 300 <= 0.985
    assert 0.4 < np.mean(widths) < 0.65


def test_bootstrap_each_equals_bootstrap_one_by_one() -> None:
    x = rng().normal(size=(25, 3))
    together = bootstrap_each(lambda i: x[i].mean(axis=0), 25, draws=200, seed=4)
    alone = [bootstrap(lambda i, c=c: x[i, c].mean(), 25, draws=200, seed=4) for c in range(3)]
    for a, b in zip(together, alone, strict=True):
        assert (a.low, a.high) == pytest.approx((b.low, b.high)) and a.value == pytest.approx(b.value)


def test_bootstrap_leaves_out_undefined_resamples() -> None:
    x = np.array([0.0, 0.0, 0.0, 0.0, 1.0])  # without the last unit, the statistic is not defined
    some = bootstrap(lambda i: 1.0 if x[i].any() else math.nan, 5, draws=400)
    assert (some.low, some.high) == (1.0, 1.0)
    assert math.isnan(bootstrap(lambda i: math.nan, 5, draws=50).high)


@pytest.mark.parametrize("units", [0, 1, ["a", "b", "c"], []])
def test_bootstrap_refuses_what_cannot_vary(units: object) -> None:
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap(lambda i: 1.0, units)  # type: ignore[arg-type]


def test_wilson_has_its_closed_form_and_covers() -> None:
    for k, n in [(0, 7), (3, 7), (7, 7), (22, 50), (1, 1000)]:
        z = oracle.norm.ppf(0.975)
        centre = (k + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
        ours = wilson(k, n)
        ends = (max(0, centre - half), min(1, centre + half))
        assert (ours.low, ours.high) == pytest.approx(ends, abs=1e-9)
        assert ours.value == k / n and ours.n == n
    intervals = [wilson(k, 50) for k in range(51)]
    for truth in (0.03, 0.2, 0.5, 0.72):
        chance = oracle.binom.pmf(np.arange(51), 50, truth)
        assert sum(c for c, i in zip(chance, intervals, strict=True) if i.low <= truth <= i.high) > 0.92
    nothing = wilson(0, 0)
    assert math.isnan(nothing.value) and (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)
    with pytest.raises(ValueError):
        wilson(3, 2)


# ── nulls ──


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
def test_permutation_p_agrees_with_scipy(side: str) -> None:
    x, y = rng(3).normal(0.6, size=12), rng(4).normal(size=12)
    pooled = np.concatenate([x, y])

    def difference(values: np.ndarray) -> float:
        return float(values[:12].mean() - values[12:].mean())

    null = permutation_null(difference, difference(pooled), permute=lambda r: r.permutation(pooled), draws=4000, side=side)
    theirs = oracle.permutation_test((x, y), lambda a, b: a.mean() - b.mean(), alternative=side, n_resamples=4000, rng=rng(9))
    assert null.p == pytest.approx(theirs.pvalue, abs=0.02)
    assert null.low < null.value < null.high and abs(null.value) < 0.05 and null.draws == 4000


def test_permutation_p_is_uniform_when_the_claim_is_false_and_never_zero() -> None:
    p = []
    for repeat in range(300):
        x = rng(repeat).normal(size=16)
        sign = np.repeat([1.0, -1.0], 8)
        null = permutation_null(lambda s, x=x: x @ s, x @ sign, permute=lambda r, s=sign: r.permutation(s), draws=99, seed=repeat)
        p.append(null.p)
    assert oracle.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    sure = permutation_null(lambda s: s, 100.0, permute=lambda r: r.normal(), draws=99, side="greater")
    assert sure.p == 0.01


def test_permutation_counts_equal_arrangements_as_ties_despite_rounding() -> None:
    values = np.array([0.1, 0.2, 0.3])

    def total(v: np.ndarray) -> float:
        return float(v[0] + v[1] + v[2])  # depends on the order in the last bits

    for side in ("greater", "less", "two-sided"):
        assert permutation_null(total, total(values), permute=lambda r: r.permutation(values), draws=200, side=side).p == 1.0


def test_permutation_refuses_undefined_statistics() -> None:
    with pytest.raises(ValueError, match="not finite"):
        permutation_null(lambda s: math.nan, 1.0, permute=lambda r: r.normal(), draws=5)
    with pytest.raises(ValueError, match="not finite"):
        permutation_null(lambda s: 0.0, math.nan, permute=lambda r: r.normal(), draws=5)


def test_correlation_agrees_with_scipy() -> None:
    x = rng().normal(size=45)
    y = 0.8 * x + 0.6 * rng(1).normal(size=45)
    estimate, null = correlation_with_null(x, y, draws=3000)
    theirs = oracle.pearsonr(x, y)
    assert estimate.value == pytest.approx(theirs.statistic, abs=1e-12) and estimate.n == 45
    fisher = theirs.confidence_interval()  # the right oracle here: the data are normal
    assert (estimate.low, estimate.high) == pytest.approx((fisher.low, fisher.high), abs=0.06)
    assert null.p == pytest.approx(2 / 3001)
    assert (null.low, null.high) == pytest.approx((-0.294, 0.294), abs=0.03)  # the critical r for n = 45
    assert correlation_with_null(x, -y, side="greater")[1].p > 0.99
    assert correlation_with_null(1e6 + 1e-3 * x, y)[0].value == pytest.approx(theirs.statistic, abs=1e-4)


def test_correlation_covers_and_its_null_is_calibrated() -> None:
    # Measured once with 2,000 repetitions, as the docstring says; here within three standard errors.
    measured = {"normal": 0.942, "two humps": 0.919, "growing noise": 0.861}
    covered = dict.fromkeys(measured, 0)
    p = []
    for repeat in range(200):
        r = rng(repeat)
        humps = (r.choice([-1.0, 1.0], 45) + 0.25 * r.normal(size=45)) / math.sqrt(1.0625)
        shapes = {"normal": r.normal(size=45), "two humps": humps, "growing noise": r.normal(size=45)}
        for kind, x in shapes.items():
            noise = r.normal(size=45) * (np.abs(x) if kind == "growing noise" else 1.0)
            estimate, _ = correlation_with_null(x, 0.8 * x + 0.6 * noise, draws=300, seed=repeat)
            covered[kind] += estimate.low <= 0.8 <= estimate.high
        p.append(correlation_with_null(r.normal(size=20), r.exponential(size=20), draws=99, seed=repeat)[1].p)
    for kind, share in measured.items():
        assert covered[kind] / 200 == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 200)), kind
    assert oracle.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2, 3], [1, 2], "equally long"),
        ([1, 2], [1, 2], "3 or more"),
        ([1, 1, 1], [1, 2, 3], "constant"),
        ([1, 2, math.nan], [1, 2, 3], "x: 1 values are nan"),
    ],
)
def test_correlation_refuses_what_has_none(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        correlation_with_null(x, y)


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
def test_selection_adjustment_controls_false_positives(side: str) -> None:
    naive, adjusted = [], []
    for repeat in range(200):
        r = rng(repeat)
        # Layers resemble their neighbours, as in a model.
        layers = np.cumsum(r.normal(size=(12, 25)), axis=0)
        layers = (layers - layers.mean(1, keepdims=True)) / layers.std(1, keepdims=True)
        y = r.normal(size=25)
        y = (y - y.mean()) / y.std()

        def curve(target: np.ndarray, layers: np.ndarray = layers) -> np.ndarray:
            return layers @ target / 25

        def permute(r: np.random.Generator, y: np.ndarray = y) -> np.ndarray:
            return r.permutation(y)

        options = {"permute": permute, "draws": 99, "seed": repeat, "side": side}
        best, null = selection_adjusted_null(curve, curve(y), **options)
        alone = permutation_null(lambda t, best=best, curve=curve: curve(t)[best], curve(y)[best], **options)
        adjusted.append(null.p)
        naive.append(alone.p)
    assert np.mean(np.array(naive) <= 0.05) > 0.1  # the mistake that the adjustment is for
    assert np.mean(np.array(adjusted) <= 0.05) < 0.09
    assert oracle.kstest(adjusted, "uniform").pvalue > 0.01


def test_selection_finds_the_planted_layer() -> None:
    y = rng().normal(size=60)
    layers = rng(1).normal(size=(20, 60))
    layers[7] -= 1.5 * y

    def curve(target: np.ndarray) -> np.ndarray:
        return np.array([np.corrcoef(layer, target)[0, 1] for layer in layers])

    for side in ("two-sided", "less"):
        best, null = selection_adjusted_null(curve, curve(y), permute=lambda r: r.permutation(y), draws=199, side=side)
        assert best == 7 and null.p == 0.005
        assert (null.value > 0) == (side == "two-sided")  # the null describes |r|, or the most negative r
    best, null = selection_adjusted_null(curve, curve(y), permute=lambda r: r.permutation(y), draws=99, side="greater")
    assert best != 7 and null.p > 0.05


def test_adjusted_rand_agrees_with_scikit_learn_and_its_null_is_calibrated() -> None:
    for repeat in range(20):
        a, b = rng(repeat).integers(0, 4, 30), rng(repeat + 50).integers(0, 6, 30)
        assert adjusted_rand_with_null(a, b, draws=10)[0].value == pytest.approx(adjusted_rand_score(a, b))
    words = np.array(["joy", "fear", "anger"])[a % 3]
    assert adjusted_rand_with_null(words, a % 3, draws=99)[0].value == 1.0
    for trivial in (np.zeros(5), np.arange(5)):
        estimate, null = adjusted_rand_with_null(trivial, trivial, draws=20)
        assert estimate.value == 1.0 == null.p
    p = []
    for repeat in range(200):
        a, b = rng(repeat).integers(0, 3, 60), rng(repeat + 999).integers(0, 4, 60)
        p.append(adjusted_rand_with_null(a, b, draws=99, seed=repeat)[1].p)
    assert np.mean(np.array(p) <= 0.05) < 0.1 and 0.4 < np.mean(p) < 0.62
    with pytest.raises(ValueError, match="equally long"):
        adjusted_rand_with_null([1, 2, 3], [1, 2])


def test_adjusted_rand_interval_covers() -> None:
    def draw(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        reference = rng(seed).integers(0, 5, n)
        return np.where(rng(seed + 1).random(n) < 0.7, reference, rng(seed + 2).integers(0, 5, n)), reference

    truth = adjusted_rand_score(*draw(0, 200_000))
    inside = 0
    for repeat in range(200):
        estimate, _ = adjusted_rand_with_null(*draw(10 * repeat + 7, 171), draws=2)
        inside += estimate.low <= truth <= estimate.high
    assert 0.90 <= inside / 200 <= 0.99


# ── ranks ──


def test_auroc_agrees_with_scikit_learn_with_ties() -> None:
    scores = rng().integers(0, 6, size=(80, 5)) / 5
    positive = rng(1).random(80) < 0.3
    theirs = [roc_auc_score(positive, scores[:, c]) for c in range(5)]
    assert auroc(scores, positive) == pytest.approx(theirs)
    assert float(auroc(scores[:, 0], positive)) == pytest.approx(theirs[0])
    labels = np.arange(80) % 4
    ours = auroc_per_label(scores, labels)
    assert ours[:4] == pytest.approx([roc_auc_score(labels == c, scores[:, c]) for c in range(4)])
    assert math.isnan(ours[4])  # a concept without rows
    assert auroc(np.zeros((10, 1)), np.arange(10) < 3) == pytest.approx([0.5])
    assert math.isnan(float(auroc([1.0, 2.0], [True, True])))


def test_auroc_and_hits_refuse_nan_instead_of_ranking_it() -> None:
    scores = np.zeros((4, 2))
    scores[1, 1] = math.nan
    for call in (auroc_per_label, top_k_hits, top_k_accuracy):
        with pytest.raises(ValueError, match="1 values are nan"):
            call(scores, [0, 1, 0, 1])


def test_top_k_counts_ties_against_the_hit() -> None:
    scores = rng().normal(size=(60, 7))
    labels = rng(1).integers(0, 7, 60)
    order = np.argsort(-scores, axis=1)
    for k in (1, 3, 7):
        expected = (order[:, :k] == labels[:, None]).any(axis=1)
        assert (top_k_hits(scores, labels, k=k) == expected).all()
        assert top_k_accuracy(scores, labels, k=k) == wilson(int(expected.sum()), 60)
    assert top_k_accuracy(np.zeros((10, 5)), np.zeros(10, dtype=int), k=4).value == 0.0


def test_benjamini_hochberg_by_hand_and_with_untestable_claims() -> None:
    assert benjamini_hochberg([0.04, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    with_nan = benjamini_hochberg([0.04, math.nan, 0.01, 0.03])
    assert with_nan[[0, 2, 3]] == pytest.approx([0.04, 0.03, 0.04]) and math.isnan(with_nan[1])
    assert np.isnan(benjamini_hochberg([math.nan, math.nan])).all()
    assert benjamini_hochberg([]).shape == (0,)
    with pytest.raises(ValueError):
        benjamini_hochberg([0.5, 1.5])
    # 80 true nulls among 100: of what is kept at q <= 0.1, at most a tenth is false on average.
    shares = []
    for repeat in range(100):
        p = np.concatenate([rng(repeat).random(80), rng(repeat).beta(0.1, 30, 20)])
        kept = np.flatnonzero(benjamini_hochberg(p) <= 0.1)
        shares.append((kept < 80).mean() if len(kept) else 0.0)
    assert np.mean(shares) < 0.11


# ── components ──


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (200, 6)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 1.0])
def test_components_agree_with_scikit_learn(shape: tuple[int, int], share: float) -> None:
    x = (rng().normal(size=shape) * np.exp(-np.arange(shape[1]) / 4) + 100).astype(np.float32)
    basis, ratios = explained_components(x, share)
    pca = PCA(svd_solver="full").fit(x.astype(np.float64))
    k = len(basis)
    cumulative = np.cumsum(pca.explained_variance_ratio_)
    assert cumulative[k - 1] >= share - 1e-9 and (k == 1 or cumulative[k - 2] < share)
    assert ratios == pytest.approx(pca.explained_variance_ratio_[: len(ratios)], abs=1e-9)
    assert len(ratios) == min(shape[0] - 1, shape[1]) and basis.dtype == np.float64
    assert np.abs((basis * pca.components_[:k]).sum(axis=1)) == pytest.approx(np.ones(k), abs=1e-6)
    assert basis @ basis.T == pytest.approx(np.eye(k), abs=1e-12)
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1) > 0).all()


def test_components_do_not_depend_on_sign_order_or_offset() -> None:
    x = rng().normal(size=(30, 8)) * np.arange(1, 9)
    basis, ratios = explained_components(x)
    for same in (x[::-1], -x, x + 1e3, 5 * x):
        other, other_ratios = explained_components(same)
        assert other == pytest.approx(basis, abs=1e-8) and other_ratios == pytest.approx(ratios, abs=1e-8)


def test_components_survive_a_massive_dimension() -> None:
    x = rng().normal(size=(20, 50))
    x[:, 3] *= 1e4  # residual streams have such coordinates
    basis, _ = explained_components(x, 0.5)
    assert len(basis) == 1 and basis[0, 3] == pytest.approx(1.0, abs=1e-6)
    rest, ratios = explained_components(x, 1.0)
    assert len(rest) == len(ratios) == 19 and rest @ rest.T == pytest.approx(np.eye(19), abs=1e-9)
    assert (x - x.mean(0)) @ rest.T @ rest == pytest.approx(x - x.mean(0), abs=1e-4)


def test_components_of_equal_rows_and_bad_input() -> None:
    basis, ratios = explained_components(np.ones((5, 3)))
    assert basis.shape == (0, 3) and ratios.shape == (0,)
    for x, share, message in [
        (np.ones((3, 2)), 0.0, "share"), (np.ones((3, 2)), 1.1, "share"), (np.ones(3), 0.5, "shape"),
        (np.array([[1.0, np.inf]]), 0.5, "infinite"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            explained_components(x, share)
