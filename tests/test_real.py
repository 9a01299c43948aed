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


def test_starter_stories_separate_on_held_out_topics(engine: Engine) -> None:
    source = open_stories("bundled", ConceptSet.load("emotions"), engine, Recipe())
    texts = [text for i in range(source.shards()) for text in source.shard(i)]
    assert len(texts) == 250
    found = accuracy(engine, texts, LAYER)
    assert found > 0.35  # chance is 0.02
    assert found > accuracy(engine, texts, -1) + 0.1  # the mean token embedding
    assert accuracy(engine, texts, LAYER, seed=0) < 0.08


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
