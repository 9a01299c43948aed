"""What vectors are composed of, where it is known: planted dictionaries, and the toy's own directions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp

from affectlens.activations import Text
from affectlens.engines.toy import TOPICS, ToyEngine
from affectlens.errors import FormatError, MismatchError
from affectlens.features import Firing, compose, observe, part, pursue
from affectlens.sparse import SparseAutoencoder
from planted import toy_bench

LAYER = 4


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------- the pursuit


def test_a_planted_sum_is_found_exactly() -> None:
    """Three of 300 directions in 64 dimensions, in any order and with either sign; then nothing is left."""
    rng = np.random.default_rng(0)
    dictionary = unit(rng.normal(size=(300, 64)))
    planted = np.array([[3, 50, 299], [7, 8, 120]])
    weights = np.array([[1.0, 0.7, -0.5], [-1.0, 0.8, 0.6]])
    targets = unit(np.einsum("nk,nkd->nd", weights, dictionary[planted]))
    order, found, explained = pursue(dictionary, targets, size=6)
    for n in range(2):
        assert set(order[n].tolist()) == set(planted[n]) and len(order[n]) == 3
        ratio = found[n, planted[n]] / weights[n]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-8)
    assert (np.diff(explained, axis=1) >= -1e-12).all()
    np.testing.assert_allclose(explained[:, 2:], 1, atol=1e-10)
    assert (explained[:, 1] < 0.999).all()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_pursuit_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dictionary, targets = unit(rng.normal(size=(80, 24))), unit(rng.normal(size=(7, 24)))
    for size in (1, 4, 9):
        _, found, explained = pursue(dictionary, targets, size=size)
        theirs = orthogonal_mp(dictionary.T, targets.T, n_nonzero_coefs=size).T
        np.testing.assert_allclose(found, theirs, atol=1e-8)
        np.testing.assert_allclose(explained[:, -1], 1 - ((targets - theirs @ dictionary) ** 2).sum(1), atol=1e-8)


def test_rows_of_zeros_and_doubles_do_no_harm() -> None:
    rng = np.random.default_rng(1)
    dictionary = unit(rng.normal(size=(20, 6)))
    dictionary[4], dictionary[9] = 0, dictionary[8]
    order, found, explained = pursue(dictionary, dictionary[[8]], size=4)
    assert order[0].tolist() == [8] and np.isfinite(found).all()
    np.testing.assert_allclose(explained[0], 1)


# --------------------------------------------------------------------------------- the toy


@lru_cache
def planted(effect: float = 1.0) -> tuple[SparseAutoencoder, Firing]:
    """An autoencoder of the toy's planted directions and 100 random ones, and what it does in the toy's stories."""
    bench = toy_bench(effect=effect)
    engine = bench.engine
    assert isinstance(engine, ToyEngine)
    names, rng = bench.vectors.names, np.random.default_rng(0)
    rows = np.concatenate([[engine.truth[n][LAYER] for n in names], unit(rng.normal(size=(100, 64)))]).astype(np.float32)
    sae = SparseAutoencoder(
        LAYER, np.ascontiguousarray(rows.T), np.full(len(rows), -1, np.float32), rows, bench.vectors.centre[LAYER]
    )
    texts = [
        Text(f"{name} {i}", engine.write(name, topic, seed=i + 1000), name, topic)
        for i, topic in enumerate(f"{TOPICS[i % len(TOPICS)].split()[0]} {i}" for i in range(6))
        for name in names
    ]
    return sae, observe(engine, sae, [*texts, Text("short", "the sea", "calm")])


def test_what_fires_is_counted_over_tokens() -> None:
    sae, firing = planted()
    bench = toy_bench()
    assert "short" not in {text.id for text in firing.texts}
    from affectlens.engine import Readout, Where

    read = next(bench.engine.read([firing.texts[3].text], Readout((LAYER,), Where(after=49), "none"))).values[0]
    fired = sae.encode(read)
    np.testing.assert_allclose(firing.means[3], fired.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(firing.residuals[3], read.mean(0), rtol=1e-4, atol=1e-5)
    assert ((firing.share >= 0) & (firing.share <= 1)).all()
    np.testing.assert_allclose(firing.per_token, firing.share.sum(), rtol=1e-9)
    often = firing.share > 0.05
    assert (firing.typical[often] > 0).all()
    assert firing.explained.low <= firing.explained.value <= firing.explained.high <= 1


def test_planted_features_are_found() -> None:
    """Each concept's own feature is taken in first, fires in its texts, and beats what chance finds among all features."""
    sae, firing = planted()
    vectors = toy_bench().vectors
    found = compose(sae, vectors, firing, fitted=toy_bench().activations, size=5, draws=100)
    assert [one.name for one in found] == list(vectors.names)
    right = [one.chosen[0] == n for n, one in enumerate(found)]
    assert np.mean(right) > 0.9
    for n, one in enumerate(found):
        own = next(f for f in one.features if f.id == n)
        assert own.auroc > 0.8 and own.difference.low > 0 and own.cosine > 0.5
        assert one.random[-1].draws == 100 and one.random[-1].p <= 0.05
        weights, rows = np.array(one.weights), sae.directions[list(one.chosen)]
        left = vectors.at(LAYER)[n] - weights @ rows
        np.testing.assert_allclose(1 - left @ left, one.explained[-1], atol=1e-5)
    # Contrasts of exchanged texts mix all concepts a little: one feature makes up less of them than of a concept.
    assert np.mean([one.explained[0] > one.exchanged[0].value for one in found]) > 0.8
    telling = [min(f.p for f in one.features if f.id == n) for n, one in enumerate(found)]
    assert np.mean(np.array(telling) < 0.05) > 0.8


def test_where_nothing_is_planted_nothing_tells_the_texts_apart() -> None:
    sae, firing = planted(effect=0.0)
    bench = toy_bench(effect=0.0)
    found = compose(sae, bench.vectors, firing, fitted=bench.activations, size=3, draws=100)
    assert np.mean([min(f.p for f in one.features) <= 0.05 for one in found]) <= 0.25
    assert np.mean([one.exchanged[-1].p <= 0.05 for one in found]) <= 0.25


def test_the_same_seed_gives_the_same() -> None:
    sae, firing = planted()
    vectors = toy_bench().vectors
    one, two = (compose(sae, vectors, firing, names=["calm"], size=3, draws=100, seed=4)[0].as_dict() for _ in range(2))
    assert one == two


def test_a_part_steers_like_the_features_that_make_it_up() -> None:
    sae, firing = planted()
    vectors = toy_bench().vectors.with_layer(LAYER)
    (calm,) = compose(sae, vectors, firing, names=["calm"], size=6, draws=100)
    whole = vectors["calm"].at_layer(LAYER)[0][0].vector
    pushed = part(sae, vectors, calm).at_layer(LAYER)[0][0].vector
    unit_norm = vectors.residual_norms[vectors.row(LAYER)]
    np.testing.assert_allclose(
        pushed, unit_norm * np.array(calm.weights) @ sae.directions[list(calm.chosen)], rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(1 - ((whole - pushed) ** 2).sum() / unit_norm**2, calm.explained[-1], atol=1e-4)
    two = part(sae, vectors, calm, k=2)
    np.testing.assert_allclose((two.at_layer(LAYER)[0][0].vector / unit_norm) @ vectors.at(LAYER)[vectors.index("calm")],
                               calm.explained[1], atol=1e-4)  # fmt: skip
    assert str(0.1 * two).endswith("calm by 2 features @ layer 4")


def test_what_cannot_be_asked() -> None:
    sae, firing = planted()
    bench = toy_bench()
    engine = bench.engine
    wide = SparseAutoencoder(LAYER, np.ones((8, 4), "f"), np.ones(4, "f"), np.ones((4, 8), "f"), np.ones(8, "f"))
    with pytest.raises(MismatchError, match="8 wide, but toy has 6 layers and is 64 wide"):
        observe(engine, wide, firing.texts)
    with pytest.raises(FormatError, match="0 texts have 5000 tokens"):
        observe(engine, sae, firing.texts[:3], first_token=5000)
    few = observe(engine, sae, [text for text in firing.texts if text.concept == "calm"])
    with pytest.raises(FormatError, match="no texts of 'angry'"):
        compose(sae, bench.vectors, few, names=["angry"])
    with pytest.raises(FormatError, match="no texts of 'calm', or of no other"):
        compose(sae, bench.vectors, few, names=["calm"])
