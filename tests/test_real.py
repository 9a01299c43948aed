"""The real demo model: what is bundled separates concepts on held-out topics; outside stories do too where they lie at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from affectlens.activations import Text
from affectlens.concepts import ConceptSet
from affectlens.discovery import Recipe, open_stories
from affectlens.engine import Engine, Readout, Where, open_engine
from affectlens.space import principal_components
from affectlens.studies.separation import held_out_scores

pytestmark = pytest.mark.real
MUFXIO = Path(__file__).resolve().parents[2] / "shared" / "data" / "mufxio" / "corpus" / "stories"
LAYER = 18


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("smollm2-135m")


def accuracy(engine: Engine, texts: list[Text], layer: int, *, seed: int | None = None) -> float:
    """Top-1 accuracy on held-out topics; with a seed the labels are exchanged within each topic."""
    names = sorted({text.concept for text in texts})
    topics = sorted({text.topic for text in texts})
    labels = np.array([names.index(text.concept) for text in texts])
    topic = np.array([topics.index(text.topic) for text in texts])
    readout = Readout((layer,), Where(after=49), "mean")
    values = np.stack([reading.values[0] for reading in engine.read([text.text for text in texts], readout)])
    if seed is not None:
        rng = np.random.default_rng(seed)
        for t in range(len(topics)):
            labels[topic == t] = rng.permutation(labels[topic == t])
    scores = held_out_scores(values, labels, fold=topic % 5, basis=np.zeros((0, engine.info.width)))
    return float((scores.argmax(1) == labels).mean())


@pytest.fixture(scope="module")
def rated(engine: Engine) -> tuple[list[Text], np.ndarray]:
    """The first four bundled stories of each of the 45 rated words, and their residuals at LAYER."""
    source = open_stories("bundled", ConceptSet.load("emotions").rated(), engine, Recipe(per_concept=4))
    texts = [text for i in range(source.shards()) for text in source.shard(i)]
    readout = Readout((LAYER,), Where(after=49), "mean")
    return texts, np.stack([reading.values[0] for reading in engine.read([text.text for text in texts], readout)])


def test_bundled_stories_tell_emotions_apart(rated: tuple[list[Text], np.ndarray]) -> None:
    """Each story is scored by vectors of the other three of its emotion: they lie on other topics."""
    texts, values = rated
    names = sorted({text.concept for text in texts})
    labels = np.array([names.index(text.concept) for text in texts])
    fold = np.arange(len(texts)) % 4
    assert all(len(set(fold[labels == c])) == 4 for c in range(len(names)))
    basis = np.zeros((0, values.shape[1]))
    scores = held_out_scores(values, labels, fold=fold, basis=basis)
    assert (scores.argmax(1) == labels).mean() > 0.3  # chance is 0.02
    shuffled = np.random.default_rng(0).permutation(labels)
    fold = np.concatenate([np.arange(4)] * len(names))[np.argsort(np.argsort(shuffled, kind="stable"))]
    assert (held_out_scores(values, shuffled, fold=fold, basis=basis).argmax(1) == shuffled).mean() < 0.1


def test_bundled_stories_have_a_valence_axis(rated: tuple[list[Text], np.ndarray]) -> None:
    texts, values = rated
    concepts = ConceptSet.load("emotions")
    names = sorted({text.concept for text in texts})
    labels = np.array([names.index(text.concept) for text in texts])
    means = np.stack([values[labels == c].mean(axis=0) for c in range(len(names))])
    first = principal_components(means, 1)[0][:, 0]
    pleasure = [concepts[name].rating.pleasure for name in names]
    assert abs(np.corrcoef(first, pleasure)[0, 1]) > 0.7


@pytest.mark.skipif(not MUFXIO.exists(), reason="the outside stories are not at hand")
def test_outside_stories_separate_on_held_out_topics(engine: Engine) -> None:
    records = [json.loads(line) for file in sorted(MUFXIO.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    topics = sorted({record["topic"] for record in records})[:15]
    texts = [
        Text(str(n), r["text"], r["emotion"], r["topic"])
        for n, r in enumerate(records)
        if r["topic"] in topics and r["story_index"] == 0
    ]
    assert accuracy(engine, texts, LAYER) > 0.4  # chance is 0.05
    assert accuracy(engine, texts, LAYER, seed=0) < 0.12
