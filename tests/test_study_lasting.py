"""A lasting state: read in every condition where a preamble is carried, not where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from affectlens.studies import Sources
from affectlens.studies.lasting import CLAIMS, STUDY
from affectlens.studies.lasting.probe import choose, fit, folds
from planted import findings, outcome, toy_bench, verdicts

READ = ("open", "hidden", "neutral", "story", "others", "told", "one_state", "to_neutral", "best_layer")


def test_a_planted_state_is_read_in_every_condition_and_carries_over() -> None:
    found = findings("lasting", toy_bench())
    assert {id: found[id].verdict for id in READ} == dict.fromkeys(READ, "holds")
    # What is told is carried beside the story directions: the probe does not read stories, and neutral texts hardly move it.
    assert (found["stories"].verdict, found["ordinary"].verdict) == ("fails", "holds")


def test_a_state_in_the_story_directions_carries_over_to_stories() -> None:
    found = findings("lasting", toy_bench(coupled=True))
    assert found["stories"].verdict == "holds" and found["ordinary"].verdict != "holds"


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_holds_where_nothing_is_planted(seed: int) -> None:
    assert "holds" not in verdicts("lasting", toy_bench(seed, effect=0.0)).values()


def test_the_probe_is_an_ordinary_logistic_regression() -> None:
    """The turn into the space of the texts, which keeps wide models cheap, changes nothing."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 4
    texts, others = rng.normal(size=(4, 200))[labels] + rng.normal(size=(60, 200)), rng.normal(size=(9, 200))
    scaler = StandardScaler().fit(texts)
    reference = LogisticRegression(C=0.01, tol=1e-8, max_iter=2000).fit(scaler.transform(texts), labels)
    logits = fit(texts, labels, strength=0.01, n=4).logits(others)
    np.testing.assert_allclose(logits, reference.decision_function(scaler.transform(others)), atol=0.02)
    assert fit(texts[labels < 3], labels[labels < 3], strength=0.01, n=4).logits(others).argmax(axis=1).max() < 3


def test_whole_topics_are_held_out_and_weak_penalties_are_not_preferred() -> None:
    topics = np.array([f"topic {i % 12}" for i in range(60)])
    dealt = folds(topics, n=5, seed=0)
    assert all(len(set(dealt[topics == topic])) == 1 for topic in topics) and set(dealt) == set(range(5))
    assert choose(np.zeros((60, 3)), np.arange(60) % 5, topics, n=5, seed=0) == 1e-4


def test_raw_values_give_the_accuracies() -> None:
    made = outcome("lasting", toy_bench())
    raw = made.raw["scenes"]
    for finding in made.findings[:5]:
        own = [
            real == read
            for real, read, kind in zip(raw["real"], raw["read"], raw["condition"], strict=True)
            if kind == finding.id
        ]
        assert finding.estimate.value == pytest.approx(np.mean(own))
    names = made.data["names"]
    assert raw["read"][7] == max(names, key=lambda name: raw[name][7])
    assert sum(raw[name][7] for name in names) == pytest.approx(1)


def test_what_is_missing_is_said(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("lasting", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    rows = [record for record in bench.texts("concealment") if record["condition"] != "story"]
    (tmp_path / "concealment.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    few = outcome("lasting", replace(bench, sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in few.findings} == {"untestable"} and "0 scenes in the smallest" in few.findings[0].note
    without = outcome("lasting", replace(bench, activations=None, neutral=None))
    missing = {f.id for f in without.findings if f.verdict == "untestable"}
    assert missing == {"stories", "ordinary"} and STUDY.draw(without.data)


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(outcome("lasting", toy_bench()).data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"conditions", "transfer", "ordinary", "layers", "confusion"}
    assert {claim.figure for claim in CLAIMS.values()} <= drawn
