"""Separation, geometry and lens: planted effects are found, absent ones are not, numbers agree with other people's code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from affectlens.concepts import Concept, ConceptSet
from affectlens.engines.toy import ToyEngine
from affectlens.space import principal_components
from affectlens.stats import explained_components
from affectlens.studies import Bench, Outcome, Study
from affectlens.studies import geometry as geometry_module
from affectlens.studies import separation as separation_module
from affectlens.studies.geometry import STUDY as GEOMETRY
from affectlens.studies.lens import STUDY as LENS
from affectlens.studies.lens import own_tokens
from affectlens.studies.separation import STUDY as SEPARATION
from affectlens.studies.separation import best_layer, held_out_scores
from affectlens.vectors import ConceptVectors, centred_cosine, fit_means, group_means

EMOTIONS = ConceptSet.load("emotions")
RATED = EMOTIONS.rated().names
WIDTH, LAYERS = 24, (-1, 0, 1, 2)
LAYERS_DRAWN = ("layers", "layers-cosine")


class Collection:
    """Activations in memory: what the studies use of :class:`affectlens.activations.Activations`."""

    def __init__(self, values: np.ndarray, concepts: Any, topics: Any, layers: tuple[int, ...] = LAYERS) -> None:
        self.values, self.layers, self.width = values.astype(np.float32), layers, values.shape[2]
        self.concepts, self.topics = np.array(concepts, dtype=object), np.array(topics, dtype=object)
        self.ids = [str(i) for i in range(len(values))]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.concepts.tolist())))

    def layer(self, layer: int) -> np.ndarray:
        return self.values[:, self.layers.index(layer)]


def stories(
    names: tuple[str, ...],
    *,
    strength: tuple[float, ...] = (0, 0, 1, 0),
    topics: int = 6,
    each: int = 2,
    seed: int = 0,
    means: Any = None,
) -> Collection:
    """Stories whose residuals carry their concept with so much strength at each layer, their topic, noise and a large offset."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(names), WIDTH)) if means is None else means
    about = 2 * rng.normal(size=(topics, WIDTH))
    concept = np.repeat(np.arange(len(names)), topics * each)
    topic = np.tile(np.repeat(np.arange(topics), each), len(names))
    values = rng.normal(size=(len(concept), len(LAYERS), WIDTH)) + about[topic][:, None] + 50
    values += np.array(strength)[:, None] * means[concept][:, None]
    return Collection(values, [names[c] for c in concept], [f"topic {t}" for t in topic])


def neutral_texts(seed: int = 5) -> Collection:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(40, len(LAYERS), WIDTH)) * np.array([6.0, 5.0, *[1.0] * (WIDTH - 2)])
    return Collection(values, [""] * 40, [""] * 40)


def fitted(texts: Collection, neutral: Collection | None = None, *, layer: int = 1, share: float = 0.5) -> ConceptVectors:
    layers = tuple(layer for layer in texts.layers if layer >= 0)
    bases = [
        np.zeros((0, WIDTH)) if neutral is None else explained_components(neutral.layer(layer), share)[0] for layer in layers
    ]
    fits = [
        fit_means(group_means(texts.layer(layer), texts.concepts, texts.names), basis)
        for layer, basis in zip(layers, bases, strict=True)
    ]
    return ConceptVectors(
        names=texts.names,
        layers=layers,
        layer=layer,
        directions=np.stack([f.directions for f in fits]).astype(np.float32),
        norms=np.stack([f.norms for f in fits]).astype(np.float32),
        centre=np.stack([f.centre for f in fits]).astype(np.float32),
        residual_norms=np.full(len(layers), 10, np.float32),
        neutral=tuple(basis.astype(np.float32) for basis in bases),
        baseline=np.zeros((len(layers), len(texts.names), 2), np.float32),
        stability=np.ones((len(layers), len(texts.names)), np.float32),
        counts=np.array([(texts.concepts == name).sum() for name in texts.names]),
        model={"id": "synthetic"},
        method={"share": share},
    )


def bench(texts: Collection | None, vectors: ConceptVectors | None = None, **more: Any) -> Bench:
    options = {"concepts": EMOTIONS, "draws": 100} | more
    return Bench(vectors or fitted(texts, more.get("neutral")), activations=texts, **options)  # type: ignore[arg-type]


def verdicts(outcome: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in outcome.findings}


def finding(outcome: Outcome, id: str) -> Any:
    return next(finding for finding in outcome.findings if finding.id == id)


def draws_itself(study: Study, outcome: Outcome) -> list[str]:
    """Draw from data that went through JSON; return the figures' ids."""
    data = json.loads(json.dumps(outcome.data, allow_nan=False))
    assert data == outcome.data
    figures = study.draw(data)
    json.dumps([figure.plotly for figure in figures], allow_nan=False)
    json.dumps([table.rows for table in outcome.tables], allow_nan=False)
    assert all(len(row) == len(table.columns) for table in outcome.tables for row in table.rows)
    return [figure.id for figure in figures]


# ── separation ──

FIVE = ("afraid", "angry", "calm", "happy", "sad")


def test_topics_are_dealt_so_that_every_concept_can_be_held_out() -> None:
    """Concepts on four of sixty topics each: by chance alone many would fall into one or two of the five folds."""
    rng = np.random.default_rng(0)
    names = [f"concept {c:03d}" for c in range(171) for _ in range(4)]
    topics = [f"topic {t}" for _ in range(171) for t in rng.permutation(60)[:4]]
    texts = Collection(rng.normal(size=(len(names), len(LAYERS), WIDTH)), names, topics)
    design = separation_module._plan(bench(texts))
    assert not isinstance(design, str)
    assert all(len(set(design.fold[design.labels == c])) >= 3 for c in range(171))
    assert all(len(set(design.fold[design.topics == t])) == 1 for t in range(60))  # whole topics
    assert set(np.bincount([design.fold[design.topics == t][0] for t in range(60)])) == {12}  # as many in each fold


def test_separation_finds_what_was_planted_and_where() -> None:
    texts, neutral = stories(FIVE, strength=(0.1, 0, 1.5, 0.3)), neutral_texts()
    outcome = SEPARATION.run(bench(texts, neutral=neutral))
    assert verdicts(outcome) == dict.fromkeys(("top1", "top3", "auroc", "best_layer", "beats_embedding"), "holds")
    assert best_layer(outcome.data) == 1 and outcome.data["chosen"] == [1] * 5
    top1 = finding(outcome, "top1")
    assert top1.estimate.low > 0.5 and top1.null.p == pytest.approx(1 / 21)
    assert abs(top1.null.value - 0.2) < 0.12 and "whole topics" in top1.note and "over topics" in top1.note
    drawn = draws_itself(SEPARATION, outcome)
    assert drawn == ["accuracy", "auroc", "concepts", "readings"] and {f.figure for f in outcome.findings} <= set(drawn)
    raw = outcome.raw["texts"]
    assert set(raw["layer"]) == {1} and raw["id"] == texts.ids
    hits = [np.mean(np.array(raw["top 1"])[np.array(raw["concept"]) == name]) for name in FIVE]
    assert top1.estimate.value == pytest.approx(np.mean(hits))


def test_separation_is_reproducible() -> None:
    texts = stories(FIVE)
    assert SEPARATION.run(bench(texts)) == SEPARATION.run(bench(texts))


@pytest.mark.parametrize("with_neutral", [False, True])
def test_held_out_scores_agree_with_the_plain_way(with_neutral: bool) -> None:
    texts = stories(FIVE, each=3)
    x, labels = texts.layer(1), np.array([FIVE.index(c) for c in texts.concepts])
    fold = np.array([int(topic.split()[1]) % 4 for topic in texts.topics])
    basis = explained_components(neutral_texts().layer(1), 0.5)[0] if with_neutral else np.zeros((0, WIDTH))
    expected = np.empty((len(x), len(FIVE)))
    for f in range(4):
        fit = fit_means(group_means(x[fold != f], labels[fold != f], range(len(FIVE))), basis)  # type: ignore[arg-type]
        expected[fold == f] = centred_cosine(x[fold == f], fit.directions, fit.centre)
    np.testing.assert_allclose(held_out_scores(x, labels, fold=fold, basis=basis), expected, atol=1e-5)


def test_placements_are_the_area_under_the_curve() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, size=(60, 4)).astype(np.float32), rng.integers(0, 4, size=60)  # with many ties
    placements = separation_module._placements(scores, labels)
    for c in range(4):
        assert placements[labels == c].mean() == pytest.approx(roc_auc_score(labels == c, scores[:, c]), abs=1e-12)


def test_accuracy_of_a_fold_does_not_choose_its_own_layer() -> None:
    """The inner accuracy of a fold must not change when that fold's texts do."""
    texts = stories(FIVE)
    design = separation_module._plan(bench(texts))
    assert not isinstance(design, str)
    x, basis = texts.layer(1), np.zeros((0, WIDTH))
    changed = x.copy()
    changed[design.fold == 0] = np.random.default_rng(1).normal(size=changed[design.fold == 0].shape)

    def inner(values: np.ndarray) -> list[np.ndarray]:
        """Dot products of the other folds with the vectors fitted without them and without fold 0, minus a row constant."""
        scored = separation_module._scored(values, design.labels[None], design.fold, basis)
        return [dots[:, 0, 0] - dots[:, 0, 0].mean(1, keepdims=True) for f, _, _, dots in scored if f != 0]

    for a, b in zip(inner(x), inner(changed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_separation_does_not_find_what_is_not_there() -> None:
    """p <= 0.05 in one run of 21 by design; more than four of 20 would have a probability of 0.3 %."""
    found = {"top1": 0, "best_layer": 0, "auroc": 0}
    for seed in range(20):
        outcome = SEPARATION.run(bench(stories(FIVE, strength=(0, 0, 0, 0), seed=seed), seed=seed))
        for id in found:
            found[id] += finding(outcome, id).null.p <= 0.05
            assert finding(outcome, id).verdict != "holds"
        null = finding(outcome, "auroc").null
        assert null.low < 0.5 < null.high
    assert max(found.values()) <= 4, found


def test_a_signal_that_is_tied_to_topics_does_not_count() -> None:
    texts, rng = stories(FIVE, strength=(0, 0, 0, 0), each=4), np.random.default_rng(3)
    for cell in sorted({(c, t) for c, t in zip(texts.concepts, texts.topics, strict=True)}):
        texts.values[(texts.concepts == cell[0]) & (texts.topics == cell[1])] += 3 * rng.normal(size=WIDTH)
    by_topic = SEPARATION.run(bench(texts))
    assert finding(by_topic, "top1").verdict != "holds" and finding(by_topic, "top1").estimate.value < 0.45
    texts.topics[:] = "one"  # the same texts pass when topics are not known: that is what the note warns of
    by_text = SEPARATION.run(bench(texts))
    assert finding(by_text, "top1").verdict == "holds" and "told by its topic" in finding(by_text, "top1").note


def test_topics_of_one_concept_each_are_exchanged_as_a_whole() -> None:
    texts = stories(FIVE, strength=(0, 0, 3, 0))
    texts.topics = np.array([f"{c} {t}" for c, t in zip(texts.concepts, texts.topics, strict=True)], dtype=object)
    outcome = SEPARATION.run(bench(texts))
    assert finding(outcome, "top1").null.kind.startswith("labels exchanged between topics")
    assert finding(outcome, "top1").verdict == "holds"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (None, "no activations"),
        (stories(("calm", "sad"), topics=1, each=2), "fewer than two concepts"),
    ],
)
def test_separation_says_why_it_cannot_be_tested(texts: Collection | None, reason: str) -> None:
    outcome = SEPARATION.run(bench(texts, fitted(stories(FIVE))))
    assert set(verdicts(outcome).values()) == {"untestable"} and reason in outcome.findings[0].note.lower()
    assert best_layer(outcome.data) == 1 and SEPARATION.draw(outcome.data) == []


def test_a_concept_on_too_few_topics_is_named() -> None:
    texts = stories(FIVE)
    texts.topics[texts.concepts == "calm"] = "topic 0"
    assert "'calm' would be missing" in SEPARATION.run(bench(texts)).findings[0].note


def test_two_concepts_and_no_embedding() -> None:
    texts = stories(("calm", "sad"), strength=(0, 0, 2, 0))
    bare = Collection(texts.values[:, 1:], texts.concepts, texts.topics, LAYERS[1:])
    found = verdicts(SEPARATION.run(bench(bare)))
    assert (found["top1"], found["top3"], found["beats_embedding"]) == ("holds", "untestable", "untestable")


# ── geometry ──


def ratings_of(names: Any) -> np.ndarray:
    found = [EMOTIONS[name].rating for name in names]
    return np.array([[rating.pleasure, rating.arousal] for rating in found if rating is not None])


def circle(strength: float = 3.0, *, names: tuple[str, ...] = RATED, seed: int = 0, clusters: float = 0.0) -> Collection:
    """Stories of rated words whose concepts lie on planted valence and arousal axes, in planted families."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    families = {cluster: rng.normal(size=WIDTH) for cluster in EMOTIONS.clusters}
    means = strength * ratings_of(sorted(names)) * (2.0, 1.5) @ axes + 0.3 * rng.normal(size=(len(names), WIDTH))
    means += clusters * np.stack([families[EMOTIONS[name].cluster or ""] for name in sorted(names)])
    return stories(tuple(sorted(names)), means=means, seed=seed)


def test_principal_components_agree_with_scikit_learn() -> None:
    x = np.random.default_rng(0).normal(size=(30, 12)) * np.arange(1, 13)
    coordinates, shares = principal_components(x, 4)
    other = PCA(4).fit(x)
    np.testing.assert_allclose(shares, other.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(other.transform(x)), atol=1e-6)


def test_geometry_finds_planted_axes_and_agrees_with_scipy() -> None:
    texts = circle(strength=3, clusters=0.0)
    vectors = fitted(texts)
    outcome = GEOMETRY.run(bench(texts, vectors))
    found = verdicts(outcome)
    for id in ("valence", "arousal", "arousal_component", "valence_best_layer", "arousal_best_layer", "opposites"):
        assert found[id] == "holds", id
    axes = PCA(3).fit_transform(vectors.at(1).astype(float))
    ratings = ratings_of(vectors.names)
    for j, id in enumerate(("valence", "arousal")):
        assert finding(outcome, id).estimate.value == pytest.approx(abs(pearsonr(axes[:, j], ratings[:, j]).statistic), abs=1e-6)
        assert finding(outcome, id).estimate.n == 45
    share = 100 * PCA().fit(vectors.at(1).astype(float)).explained_variance_ratio_
    assert finding(outcome, "pc1_share").estimate.value == pytest.approx(share[0], abs=1e-6)
    low, high = finding(outcome, "pc1_share").estimate.low, finding(outcome, "pc1_share").estimate.high
    assert low - 1e-6 <= share[0] <= high + 1e-6 and finding(outcome, "pc1_share").null.high < share[0]
    assert finding(outcome, "beyond_embedding").verdict == "holds"  # nothing was planted in the embedding
    clusters = ["similarity", "families", "silhouette"]
    assert draws_itself(GEOMETRY, outcome) == ["circumplex", *clusters, "pleasure", "arousal", "along", "shares", *LAYERS_DRAWN]


def test_signs_of_components_do_not_matter() -> None:
    vectors = fitted(circle())
    mirrored = replace(vectors, directions=-vectors.directions)
    one, two = (GEOMETRY.run(bench(None, v)) for v in (vectors, mirrored))
    for id in ("valence", "arousal", "arousal_best_layer"):
        assert finding(one, id).estimate.value == pytest.approx(finding(two, id).estimate.value, abs=1e-9)
    np.testing.assert_allclose(np.array(one.data["x"]), np.array(two.data["x"]), atol=1e-3)


def test_geometry_finds_planted_families() -> None:
    found = verdicts(GEOMETRY.run(bench(None, fitted(circle(strength=0.2, clusters=3)))))
    assert found["clusters"] == found["cohesion"] == "holds"


def test_geometry_does_not_find_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tests of 5 % each in 20 runs; more than four of 20 would have a probability of 0.3 %. No refits: not their turn."""
    monkeypatch.setattr(geometry_module, "_families", lambda space, by_layer, runs: ([], {}))
    monkeypatch.setattr(geometry_module, "kmeans", lambda vectors, k, seed: np.arange(len(vectors))[None] % k)
    ids = ("valence", "valence_best_layer", "arousal_best_layer", "arousal_component", "opposites")
    hits = dict.fromkeys(ids, 0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        directions = rng.normal(size=(3, len(RATED), WIDTH)) * np.linspace(3, 1, WIDTH)
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        vectors = replace(fitted(circle()) if seed == 0 else vectors, directions=directions.astype(np.float32))  # noqa: F821
        outcome = GEOMETRY.run(bench(None, vectors, seed=seed))
        for id in ids:
            hits[id] += finding(outcome, id).null.p <= 0.05
    assert max(hits.values()) <= 4, hits


def test_share_of_variance_is_not_news_without_concepts() -> None:
    """Strongly anisotropic noise alone gives a large first component: the relabelled stories show it."""
    texts = circle(strength=0)
    texts.values[..., 0] *= 1 + 4 * np.random.default_rng(0).random(len(texts.values))[:, None]
    pc1 = finding(GEOMETRY.run(bench(texts)), "pc1_share")
    assert pc1.estimate.value > 20 and pc1.null.p > 0.05 and pc1.verdict != "holds"


def test_without_stories_intervals_are_over_words_and_shares_at_most_weak() -> None:
    outcome = GEOMETRY.run(bench(None, fitted(circle())))
    pc1 = finding(outcome, "pc1_share")
    assert pc1.null is None and pc1.verdict in ("weak", "fails") and "over words" in pc1.note and pc1.estimate.n == 45
    assert finding(outcome, "beyond_embedding").verdict == "untestable"
    assert all(math.isfinite(f.estimate.low) for f in outcome.findings if f.estimate)


def test_geometry_without_ratings_clusters_or_concepts() -> None:
    bare = replace(EMOTIONS, concepts=tuple(Concept(c.name, c.definition) for c in EMOTIONS))
    outcome = GEOMETRY.run(bench(None, fitted(circle()), concepts=bare))
    found = verdicts(outcome)
    assert {id for id, verdict in found.items() if verdict == "untestable"} == {
        "valence", "arousal", "arousal_component", "valence_best_layer", "arousal_best_layer", "beyond_embedding",
        "opposites", "clusters", "clusters_best_k", "cohesion", "embedding",
    }  # fmt: skip
    assert draws_itself(GEOMETRY, outcome) == ["circumplex", "similarity", "silhouette", "shares", *LAYERS_DRAWN]
    few = GEOMETRY.run(bench(None, fitted(circle(names=RATED[:9]))))
    assert set(verdicts(few).values()) == {"untestable"} and "too few" in few.findings[0].note and GEOMETRY.draw(few.data) == []


def test_a_concept_that_the_set_does_not_know_is_no_error() -> None:
    vectors = replace(fitted(circle()), names=("zest", *sorted(RATED)[1:]))
    assert finding(GEOMETRY.run(bench(None, vectors)), "valence").estimate.n == 44


# ── lens ──


def toy(effect: float = 1.0) -> Bench:
    engine = ToyEngine(effect=effect)
    truth = engine.truth
    layers, n, width = truth.directions.shape
    vectors = ConceptVectors(
        truth.names, tuple(range(layers)), 4, truth.directions.astype(np.float32), np.ones((layers, n), np.float32),
        np.zeros((layers, width), np.float32),
        np.full(layers, 5, np.float32), (np.zeros((0, width), np.float32),) * layers, np.zeros((layers, n, 2), np.float32),
        np.ones((layers, n), np.float32), np.ones(n, int), {},
    )  # fmt: skip
    return Bench(vectors, EMOTIONS, engine=engine, draws=200)


def test_lens_finds_planted_words() -> None:
    outcome = LENS.run(toy())
    assert verdicts(outcome) == dict.fromkeys(("percentile", "share", "auroc", "own_direction"), "holds")
    assert [row[0] for row in outcome.tables[0].rows][:3] == ["happy", "inspired", "loving"]
    assert all("happy" in row[1] for row in outcome.tables[0].rows if row[0] == "happy")
    assert "␣" in outcome.tables[0].rows[0][1]
    assert draws_itself(LENS, outcome) == ["lift", "layers"]
    assert {f.figure for f in outcome.findings} == {"lift", "layers", ""}  # the AUROC stands in the table
    raw = outcome.raw["concepts"]
    lift = np.stack([outcome.raw["lift"][name] for name in raw["concept"]], axis=1)
    np.testing.assert_allclose(np.diagonal(lift), raw["lift"])
    gain = raw["lift"] - (lift.sum(axis=0) - raw["lift"]) / (len(lift) - 1)
    assert finding(outcome, "own_direction").estimate.value == pytest.approx(gain.mean())


def test_lens_finds_nothing_in_random_directions() -> None:
    """Four tests of 5 % each, 10 runs; concepts share one engine, so only the directions vary."""
    base, hits = toy(), {"percentile": 0, "share": 0, "auroc": 0, "own_direction": 0}
    for seed in range(10):
        directions = np.random.default_rng(100 + seed).normal(size=base.vectors.directions.shape)
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        vectors = replace(base.vectors, directions=directions.astype(np.float32))
        outcome = LENS.run(replace(base, vectors=vectors, draws=100, seed=seed))
        for id in hits:
            hits[id] += finding(outcome, id).null.p <= 0.05
    assert max(hits.values()) <= 3, hits


def test_lens_with_directions_of_other_concepts_fails_its_control() -> None:
    base = toy()
    wrong = replace(base.vectors, directions=np.roll(base.vectors.directions, 5, axis=1))
    assert finding(LENS.run(replace(base, vectors=wrong)), "own_direction").verdict == "fails"


def test_area_under_the_curve_of_own_tokens_agrees_with_scikit_learn() -> None:
    base = toy()
    engine, vectors = base.engine, base.vectors
    assert engine is not None
    own = own_tokens(EMOTIONS["sad"], engine.vocabulary)
    logits = engine.unembed(vectors.at(4)[[vectors.index("sad")]] * 5)[0]
    expected = roc_auc_score(np.isin(np.arange(len(logits)), own), logits)
    row = next(row for row in LENS.run(base).tables[1].rows if row[0] == "sad")
    assert row[4] == pytest.approx(expected, abs=1e-4)


def test_own_tokens_are_forms_and_long_beginnings() -> None:
    words = ["Ġdesper", " Desperate", "des", "desk", "▁desperation", "DESPERATE", "desperados"]
    assert own_tokens(EMOTIONS["desperate"], words) == [0, 1, 4, 5]
    hopeful = Concept("hopeful", "")
    assert own_tokens(hopeful, ["hope", "hopef"]) == [0, 1]
    assert own_tokens(hopeful, ["hope", "hopef"], others=[Concept("hope", "")]) == [1]
    assert own_tokens(Concept("nervous", ""), ["nerv", "Nervo"], others=[Concept("nervy", "")]) == [1]
    assert own_tokens(Concept("overwhelmed", ""), ["over", "overwh"]) == [1]  # less than half of the word says nothing


def test_lens_says_why_it_cannot_be_tested() -> None:
    base = toy()
    outcome = LENS.run(replace(base, engine=None))
    assert set(verdicts(outcome).values()) == {"untestable"} and "no engine" in outcome.findings[0].note
    strange = replace(EMOTIONS, concepts=tuple(Concept(f"xq{i}", "") for i in range(3)))
    assert "0 concepts" in LENS.run(replace(base, concepts=strange)).findings[0].note and LENS.draw(outcome.data) == []
