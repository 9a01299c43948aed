"""Continuations and descriptions under steering: what is planted is found, what is not is not, and the matrix is right."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from affectlens.studies import Bench, Outcome, load_study
from affectlens.studies.continuation import CLAIMS
from affectlens.studies.description import CLAIMS as DESCRIBED
from affectlens.studies.description import kept
from planted import toy_bench, with_calibration


def calibrated(strength: float = 0.15, layer: int = 3, seed: int = 0, **options: Any) -> Bench:
    return with_calibration(replace(toy_bench(seed, **options), quick=True), strength=strength, layer=layer)


@lru_cache(maxsize=8)
def outcome(study: str, seed: int = 0, **options: Any) -> Outcome:
    return load_study(study).run(calibrated(seed=seed, **options))


def verdicts(found: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in found.findings}


def test_planted_words_rise_and_others_do_not() -> None:
    assert verdicts(outcome("continuation")) == dict.fromkeys(CLAIMS, "holds")


def test_nothing_holds_where_nothing_is_planted() -> None:
    found = verdicts(outcome("continuation", effect=0.0))
    assert "holds" not in found.values() and found["others"] == "untestable"
    assert "holds" not in {v for id, v in verdicts(outcome("description", effect=0.0)).items() if id != "content"}


def test_the_matrix_agrees_with_a_plain_computation() -> None:
    bench = calibrated()
    data = outcome("continuation").data
    held_out = [r for r in bench.texts("openings") if r["held_out"] and r["kind"] != "event"]
    openings = [r for r in held_out[::2] if r["kind"] == "self"]  # a quick look takes every other one
    means = []
    for name in data["names"]:
        steering = data["strength"] * bench.vectors[name]
        chats = [(("user", r["text"]),) for r in openings]
        before, after = (
            bench.engine.choose(chats, [f" {name}"], prefill=openings[0]["prefill"], steering=s) for s in (0 * steering, steering)
        )
        means.append((after - before).mean())
    assert data["means"]["self"]["own word"][0] == pytest.approx(np.mean(means), abs=1e-4)


def test_exchanged_vectors_raise_the_wrong_words() -> None:
    """Vectors under each other's names: own words do not rise, so nothing holds but what is not about names."""
    bench = calibrated()
    vectors = bench.vectors
    turned = replace(vectors, directions=np.roll(vectors.directions, 5, axis=1))
    found = verdicts(load_study("continuation").run(replace(bench, vectors=turned)))
    assert "holds" not in {found[id] for id in ("specific", "shuffled", "first", "prefill", "opposite")}


def test_missing_conditions_are_said() -> None:
    for study in ("continuation", "description"):
        run, bench = load_study(study).run, calibrated()
        assert "no model" in run(replace(bench, engine=None)).findings[0].note
        assert "not calibrated" in run(replace(bench, vectors=replace(bench.vectors, calibration=None))).findings[0].note
        assert "no strength is safe" in run(calibrated(strength=0.0)).findings[0].note
        few = run(replace(bench, vectors=bench.vectors.select(["calm", "sad"])))
        assert "2 emotions" in few.findings[0].note and set(verdicts(few).values()) == {"untestable"}
    without = load_study("continuation").run(replace(calibrated(), activations=None))
    assert verdicts(without)["shuffled"] == "untestable" and verdicts(without)["specific"] == "holds"


def test_figures_and_tables_are_plain_data() -> None:
    for study, drawn in (("continuation", ["matrix", "means", "dose", "related", "told"]), ("description", ["doses"])):
        found = outcome(study)
        data = json.loads(json.dumps(found.data, allow_nan=False))
        assert data == found.data
        assert [figure.id for figure in load_study(study).draw(data)] == drawn
        assert {finding.figure for finding in found.findings} <= {*drawn, ""}
        assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
        assert load_study(study).draw({"reason": "none"}) == []


def test_descriptions_take_the_word_of_the_emotion() -> None:
    """The toy says which word it feels; it describes nothing, so tone and content have nothing to show there."""
    found = verdicts(outcome("description"))
    assert (found["word"], found["rank"]) == ("holds", "holds") and set(found) == set(DESCRIBED)


def test_content_that_is_only_repeated_does_not_count() -> None:
    assert kept("They write code all day.", "write code") == 1.0
    assert kept("code code code code code code", "write code") == pytest.approx(0.5 * 1 / 5)
    assert kept("", "write code") == 0.0 and np.isnan(kept("anything", "do it"))
