"""Implied emotions: found where they are planted, not where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from affectlens.studies import Sources
from affectlens.studies.scenarios import STUDY, centred
from planted import findings, outcome, toy_bench, verdicts

HEADLINE = ("top1", "top3", "held_out", "diagonal", "specific", "best_layer")


@pytest.mark.parametrize("template", [True, False])
def test_planted_emotions_are_read_where_the_reply_begins(template: bool) -> None:
    found = findings("scenarios", toy_bench(template=template))
    assert {id: found[id].verdict for id in HEADLINE} == dict.fromkeys(HEADLINE, "holds")
    assert ("chat template" in found["top1"].note) and (("no chat template" in found["top1"].note) is not template)


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_holds_where_nothing_is_planted(seed: int) -> None:
    assert "holds" not in verdicts("scenarios", toy_bench(seed, effect=0.0)).values()


def test_scores_agree_with_an_independent_computation() -> None:
    bench = toy_bench()
    raw = outcome("scenarios", bench).raw["cosines"]
    record, result = next(zip(bench.texts("scenarios"), bench.engine.run(STUDY.requests(bench)), strict=False))
    residual = result.readings[0].values[bench.vectors.row()]
    for name in ("calm", record["concept"]):
        direction = bench.vectors.at()[bench.vectors.index(name)]
        assert raw[name][0] == pytest.approx(residual @ direction / np.linalg.norm(residual), abs=1e-5)


def test_centring_takes_away_what_reads_high_everywhere() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 8, 4))
    np.testing.assert_allclose(centred(scores + np.array([5, 0, 0, 0])), centred(scores))


def test_without_a_model_or_with_too_few_emotions_it_says_so(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("scenarios", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    rows = [record for record in bench.texts("scenarios") if record["concept"] in ("calm", "sad")]
    (tmp_path / "scenarios.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    few = outcome("scenarios", replace(bench, sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in few.findings} == {"untestable"} and "2 emotions" in few.findings[0].note


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(outcome("scenarios", toy_bench()).data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"matrix", "layers"} == {claim.figure for claim in findings("scenarios", toy_bench()).values()}
