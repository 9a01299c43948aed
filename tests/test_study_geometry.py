"""Geometry in full: tree, clusters for several k, layers and the embedding; and other people's vectors, recomputed elsewhere."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from scipy.stats import pearsonr
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.metrics.pairwise import cosine_similarity

from affectlens.concepts import ConceptSet
from affectlens.errors import FormatError, MismatchError
from affectlens.exchange import load_vectors, read_vectors
from affectlens.space import kmeans, likeness, likeness_with_null, principal_components, rand_indices, silhouette, tree
from affectlens.studies import Bench, Finding, Outcome
from affectlens.studies.geometry import CLAIMS, STUDY
from affectlens.vectors import ConceptVectors

EMOTIONS = ConceptSet.load("emotions")
MUFXIO = Path(__file__).resolve().parents[2] / "shared" / "data" / "mufxio" / "results"
FILES = sorted(MUFXIO.glob("*/raw_vectors.npz"))
FAMILIES = {name: EMOTIONS[name].cluster for name in EMOTIONS.names}


def by_id(outcome: Outcome) -> dict[str, Finding]:
    return {finding.id: finding for finding in outcome.findings}


def archive(path: Path, seed: int = 0, *, families: float = 1.0, layers: tuple[int, ...] = (3, 6, 9), width: int = 40) -> Path:
    """Vectors of six words from each of eight families, whose members share a direction as strongly as asked."""
    rng = np.random.default_rng(seed)
    names = [[n for n in EMOTIONS.names if FAMILIES[n] == family][:6] for family in EMOTIONS.clusters]
    names = [own for own in names if len(own) == 6]
    common = families * rng.normal(size=(len(names), width))
    own = {name: common[i] + rng.normal(size=width) for i, group in enumerate(names) for name in group}
    arrays = {f"layer_{layer}__{name}": row + 0.3 * rng.normal(size=width) for layer in layers for name, row in own.items()}
    np.savez(path, **{key: row.astype(np.float32) for key, row in arrays.items()})
    return path


def bench(vectors: ConceptVectors, draws: int = 200, **more: Any) -> Bench:
    return Bench(vectors, EMOTIONS, draws=draws, **more)


# ── the space ──


def test_the_tree_is_scipys_average_linkage() -> None:
    x = np.random.default_rng(0).normal(size=(25, 6))
    cosines = cosine_similarity(x)
    order, joints = tree(cosines)
    merges = linkage(squareform(np.clip(1 - cosines, 0, None) * (1 - np.eye(25)), checks=False), "average")
    assert sorted(order) == list(range(25))
    np.testing.assert_allclose(np.sort(joints[:, 1, 1]), np.sort(merges[:, 2]), atol=1e-12)
    assert joints[..., 0].min() == 0 and joints[..., 0].max() == 24


def test_clusters_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(4), 10)
    x = rng.normal(size=(4, 30))[truth] + 0.2 * rng.normal(size=(40, 30))
    found = kmeans(x, 4)
    assert (rand_indices(found, truth) == 1).all()
    assert adjusted_rand_score(found[0], KMeans(4, n_init=20, random_state=9).fit_predict(x)) == 1
    rough, labels = rng.integers(0, 5, size=(6, 40)), rng.integers(0, 3, size=40)
    np.testing.assert_allclose(rand_indices(rough, labels), [adjusted_rand_score(labels, own) for own in rough], atol=1e-12)
    assert silhouette(cosine_similarity(x), labels) == pytest.approx(silhouette_score(x, labels, metric="cosine"), abs=1e-12)


def test_likeness_is_what_the_plain_way_gives() -> None:
    one, other = (cosine_similarity(np.random.default_rng(seed).normal(size=(9, 4))) for seed in (0, 1))
    correlations, cosines = likeness(np.stack([one, other]))
    above = np.triu_indices(9, 1)
    assert correlations[0, 1] == pytest.approx(pearsonr(one[above], other[above]).statistic)
    assert cosines[0, 1] == pytest.approx((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
    (r, null), _ = likeness_with_null(np.stack([one, other]))
    assert r.value == pytest.approx(correlations[0, 1]) and null.p > 0.01  # strangers


# ── the study ──


def test_planted_families_are_found_at_their_number_and_absent_ones_are_not(tmp_path: Path) -> None:
    outcome = STUDY.run(bench(read_vectors(archive(tmp_path / "x.npz", families=1.5))))
    found = by_id(outcome)
    assert {found[id].verdict for id in ("clusters", "clusters_best_k", "cohesion", "layers", "layers_cosine")} == {"holds"}
    table = next(table for table in outcome.tables if table.id == "clusters")
    assert len(table.rows) == 8 and sum(row[1] for row in table.rows) == 48
    assert all(row[4] == "6 of 6" and row[5] == "" for row in table.rows)  # each cluster is a whole family
    absent = by_id(STUDY.run(bench(read_vectors(archive(tmp_path / "y.npz", families=0)))))
    assert "holds" not in {absent[id].verdict for id in ("clusters", "clusters_best_k", "cohesion", "valence", "arousal")}


def test_everything_is_there_without_a_model(tmp_path: Path) -> None:
    vectors = read_vectors(archive(tmp_path / "x.npz"))
    outcome = STUDY.run(bench(vectors))
    found = by_id(outcome)
    assert list(found) == list(CLAIMS)
    untestable = {id for id, finding in found.items() if finding.verdict == "untestable"}
    assert untestable == {"beyond_embedding", "embedding"}  # these need the stories
    data = json.loads(json.dumps(outcome.data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert {finding.figure for finding in found.values() if finding.verdict != "untestable"} <= drawn
    assert {claim.figure for claim in CLAIMS.values()} <= drawn
    raw = outcome.raw
    assert len(raw["components"]["PC5"]) == 3 * len(vectors) and set(raw["components"]["layer"]) == {3, 6, 9}
    at = np.array(raw["components"]["layer"]) == vectors.layer
    mine = np.column_stack([np.array(raw["components"][f"PC{i + 1}"])[at] for i in range(5)])
    np.testing.assert_allclose(np.abs(mine), np.abs(PCA(5).fit_transform(vectors.at().astype(float))), atol=1e-6)
    np.testing.assert_allclose(raw["cosines"]["calm"], vectors.similarity()[vectors.index("calm")])
    assert list(raw["clusters"]) == ["concept", "published", *(f"k = {k}" for k in (4, 6, 8, 10, 12, 15, 20))]


@pytest.mark.parametrize("installed", [True, False])
def test_umap_is_drawn_where_it_is_installed(installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Umap:
        def __init__(self, **options: Any) -> None:
            assert options["metric"] == "cosine"

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap) if installed else None)
    figures = {f.id: f for f in STUDY.draw(STUDY.run(bench(read_vectors(archive(tmp_path / "x.npz")), draws=20)).data)}
    assert ("umap" in figures) is installed
    assert ("affectlens[umap]" in figures["circumplex"].caption) is not installed


# ── vectors of others ──


@pytest.mark.skipif(not FILES, reason="shared/data/mufxio is not here")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_five_real_models_agree_with_an_independent_computation(file: Path) -> None:
    with np.load(file, allow_pickle=False) as archive:
        layers = sorted({int(key.split("__")[0].removeprefix("layer_")) for key in archive})
        names = sorted({key.split("__")[1] for key in archive})
        unit = {}
        for layer in layers:
            x = np.stack([archive[f"layer_{layer}__{name}"] for name in names]).astype(float)
            x -= x.mean(axis=0)
            unit[layer] = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
    vectors = load_vectors(file)
    assert (sorted(vectors.names), list(vectors.layers), vectors.layer) == (names, layers, layers[2])
    outcome = STUDY.run(bench(vectors, draws=50))
    found, x = by_id(outcome), unit[vectors.layer]

    pca = PCA().fit(x)
    for j, id in enumerate(("pc1_share", "pc2_share")):
        assert found[id].estimate.value / 100 == pytest.approx(pca.explained_variance_ratio_[j], abs=1e-6)
    rated = [i for i, name in enumerate(names) if name in EMOTIONS and EMOTIONS[name].rating]
    ratings = np.array([(EMOTIONS[names[i]].rating.pleasure, EMOTIONS[names[i]].rating.arousal) for i in rated])
    for j, id in enumerate(("valence", "arousal")):
        r = abs(pearsonr(pca.transform(x)[rated, j], ratings[:, j]).statistic)
        assert found[id].estimate.value == pytest.approx(r, abs=1e-6) and found[id].estimate.n == len(rated) == 10

    raw = outcome.raw
    cosines = cosine_similarity(x)
    mine = np.array([[raw["cosines"][b][raw["cosines"]["concept"].index(a)] for b in names] for a in names])
    np.testing.assert_allclose(mine, cosines, atol=1e-6)
    family = np.array([FAMILIES.get(name) or "" for name in names])
    known = np.flatnonzero(family != "")
    assert len(known) == 19  # "hopeless" is none of the 171
    labels = dict(zip(raw["clusters"]["concept"], raw["clusters"]["k = 8"], strict=True))
    index = adjusted_rand_score(family[known], [labels[names[i]] for i in known])
    assert found["clusters"].estimate.value == pytest.approx(index, abs=1e-6)
    pairs = [(a, b) for a in known for b in known if a < b]
    within = np.mean([cosines[a, b] for a, b in pairs if family[a] == family[b]])
    between = np.mean([cosines[a, b] for a, b in pairs if family[a] != family[b]])
    assert found["cohesion"].estimate.value == pytest.approx(within - between, abs=1e-6)

    late = [unit[layer] @ unit[layer].T for layer in layers if layer >= layers[-1] / 3]
    above = np.triu_indices(len(names), 1)
    both = [(pearsonr(a[above], b[above]).statistic, (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
            for i, a in enumerate(late) for b in late[i + 1 :]]  # fmt: skip
    assert (found["layers"].estimate.value, found["layers_cosine"].estimate.value) == pytest.approx(
        np.mean(both, axis=0), abs=1e-6
    )
    assert "2 words are rated pleasant" in found["opposites"].note and found["opposites"].verdict == "untestable"
    assert {figure.id for figure in STUDY.draw(outcome.data)} >= {"circumplex", "similarity", "families", "pleasure", "layers"}


@pytest.mark.skipif(not FILES, reason="shared/data/mufxio is not here")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_numbers_are_those_that_their_authors_published(file: Path) -> None:
    """They took the vectors without neutral components, not scaled to unit length for their PCA."""
    vectors = read_vectors(file.with_name("denoised_vectors.npz"))
    published = json.loads((file.parent / "validation_results.json").read_text())
    for layer in vectors.layers:
        theirs = published[f"layer_{layer}"]["cosine"]
        order = [vectors.index(name) for name in theirs["emotions"]]
        np.testing.assert_allclose(vectors.similarity(layer)[np.ix_(order, order)], theirs["matrix"], atol=1e-5)
        long = vectors.at(layer) * vectors.norms[vectors.row(layer)][:, None]
        shares = published[f"layer_{layer}"]["pca"]["pc_explained_variance"][:5]
        np.testing.assert_allclose(principal_components(long, len(shares))[1], shares, atol=2e-6)
    correlations, _ = likeness(np.stack([vectors.similarity(layer) for layer in vectors.layers]))
    mean = correlations[np.triu_indices(len(correlations), 1)].mean()
    assert mean == pytest.approx(published["cross_layer_stability"]["mean_correlation"], abs=1e-6)


def test_vectors_from_a_file_neither_steer_nor_read_centred(tmp_path: Path) -> None:
    vectors = read_vectors(archive(tmp_path / "x.npz"))
    np.testing.assert_allclose(np.linalg.norm(vectors.directions, axis=2), 1, atol=1e-6)
    with pytest.raises(MismatchError, match="a strength has no unit"):
        _ = vectors["calm"]
    reading = SimpleNamespace(values=np.ones((1, len(vectors) + 1)), norms=np.ones(1))
    assert np.isfinite(vectors.scores(reading, kind="cosine")).all()  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="cannot be read centred"):
        vectors.scores(reading)  # type: ignore[arg-type]
    vectors.save(tmp_path / "kept")
    again = ConceptVectors.load(tmp_path / "kept")
    np.testing.assert_array_equal(again.directions, vectors.directions)
    assert again.method["source"] == "imported from x.npz" and "base_model" not in again.card()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"layer_1__calm": np.ones(3)}, "two at least"),
        ({"layer_1__calm": np.ones(3), "layer_1__sad": np.zeros(3), "layer_2__sad": np.ones(3)}, "same concepts at every layer"),
        ({"layer_1__calm": np.ones(3), "layer_1__sad": np.ones(4)}, "different widths"),
        ({"layer_1__calm": np.ones(3), "layer_1__sad": np.array([1, np.nan, 0])}, "not finite"),
        ({"layer_1__calm": np.ones(3), "layer_1__sad": np.ones(3)}, "has no direction"),
        ({"layer_1__calm": np.ones(3), "concepts": np.array(["calm"])}, "'concepts', which is no vector"),
        ({"layer_1__calm": np.ones((2, 3))}, "which is no vector"),
        ({"layer_1__calm": np.array([{}], dtype=object)}, "no whole .npz file of plain arrays"),
        ({}, "two at least"),
    ],
)
def test_other_archives_are_refused_in_one_line(arrays: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FormatError) as caught:
        read_vectors(tmp_path / "x.npz")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = archive(tmp_path / "x.npz").read_bytes()
    for i, content in enumerate((b"", b"no zip", whole[:500], whole[:2000] + b"\0" * 500 + whole[2500:])):
        (tmp_path / f"{i}.npz").write_bytes(content)
        with pytest.raises(FormatError, match=r"no whole \.npz file"):
            read_vectors(tmp_path / f"{i}.npz")
    with pytest.raises(FormatError, match="there is no file"):
        read_vectors(tmp_path / "none.npz")


def test_a_set_with_one_family_has_a_silhouette_and_no_rand_index(tmp_path: Path) -> None:
    one = replace(EMOTIONS, concepts=tuple(replace(c, cluster="all") for c in EMOTIONS))
    vectors = read_vectors(archive(tmp_path / "x.npz"))
    outcome = STUDY.run(replace(bench(vectors, draws=20), concepts=one))
    assert by_id(outcome)["clusters"].verdict == "untestable"
    assert "silhouette" in {figure.id for figure in STUDY.draw(outcome.data)}
