"""Quantity ladders: trends are found where they are planted, in the declared direction, not where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import linregress, spearmanr

from affectlens.studies import Bench, Sources
from affectlens.studies.dose import CLAIMS, STUDY, line_change, step_correlation
from planted import findings, outcome, toy_bench, verdicts


def with_ladders(bench: Bench, folder: Path, **changes) -> Bench:
    """The same bench with its own ladders, each changed by a function of the record (or left out where that gives None)."""
    change = changes.get("change", lambda record: record)
    rows = [row for record in bench.texts("ladders") if (row := change(dict(record))) is not None]
    (folder / "ladders.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return replace(bench, sources=Sources(texts=folder))


@pytest.mark.parametrize("template", [True, False])
def test_planted_quantities_are_followed(template: bool) -> None:
    assert verdicts("dose", toy_bench(template=template)) == dict.fromkeys(CLAIMS, "holds")


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_holds_where_nothing_is_planted(seed: int) -> None:
    assert "holds" not in verdicts("dose", toy_bench(seed, effect=0.0)).values()


def test_a_reversed_declaration_is_refuted_not_confirmed(tmp_path) -> None:
    turned = with_ladders(toy_bench(), tmp_path, change=lambda r: {**r, "rise": r["fall"], "fall": r["rise"]})
    found = findings("dose", turned)
    assert found["trend"].estimate.value < -0.5 and found["signs"].estimate.value < 0.2
    assert {found[id].verdict for id in ("signs", "trend", "size", "specific")} == {"fails"}


def test_what_large_numbers_do_to_every_ladder_alike_is_not_meaning(tmp_path) -> None:
    """All ladders declare the same: then they follow their own declaration no better than another's."""
    fever = with_ladders(toy_bench(), tmp_path, change=lambda r: None if r["id"].startswith("exam") else r)
    found = findings("dose", fever)
    assert found["trend"].verdict == "holds" and found["meaning"].verdict == "fails"


def test_the_trend_agrees_with_an_independent_computation() -> None:
    bench = toy_bench()
    found = outcome("dose", bench)
    row, per_ladder, changes = bench.vectors.row(), [], []
    for record in bench.texts("ladders"):
        if record["control"]:
            continue
        signed, moved = [], []
        requests = [
            bench.ask(record["text"].format(value=value), STUDY.requests(bench)[0].readouts[0]) for value in record["values"]
        ]
        residuals = [result.readings[0].values[row] for result in bench.engine.run(requests)]
        for sign, names in ((1, record["rise"]), (-1, record["fall"])):
            for name in names:
                direction = bench.vectors.at()[bench.vectors.index(name)]
                cosines = [residual @ direction / np.linalg.norm(residual) for residual in residuals]
                signed.append(sign * spearmanr(range(len(cosines)), cosines).statistic)
                moved.append(sign * linregress(range(len(cosines)), cosines).slope * (len(cosines) - 1))
        per_ladder.append(np.mean(signed))
        changes.append(np.mean(moved))
    values = {finding.id: finding.estimate.value for finding in found.findings}
    assert values["trend"] == pytest.approx(np.mean(per_ladder), abs=1e-6)
    assert values["size"] == pytest.approx(np.mean(changes), abs=1e-6)


def test_ties_and_flat_readings_have_a_trend_too() -> None:
    readings = np.random.default_rng(0).integers(0, 4, (9, 5)).astype(float)
    np.testing.assert_allclose(step_correlation(readings), [spearmanr(range(9), column).statistic for column in readings.T])
    assert step_correlation(np.ones((5, 1))).tolist() == [0.0] and line_change(np.ones((5, 1))).tolist() == [0.0]


def test_random_directions_are_mixtures_with_their_own_length() -> None:
    """The band of random directions that is computed from cosines alone is that of real mixtures of the directions."""
    bench = toy_bench()
    data = outcome("dose", bench).data
    residuals = np.stack([r.readings[0].values[bench.vectors.row()] for r in bench.engine.run(STUDY.requests(bench))])
    mixed = np.random.default_rng(5).normal(size=(4000, len(bench.vectors))) @ bench.vectors.at().astype(float)
    cosines = residuals @ mixed.T / np.linalg.norm(residuals, axis=1)[:, None] / np.linalg.norm(mixed, axis=1)
    first = cosines[: len(data["ladders"][0]["values"])]
    assert data["ladders"][0]["band"] == pytest.approx(np.quantile(np.abs(step_correlation(first)), 0.95), abs=0.05)


def test_missing_conditions_are_said(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("dose", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    assert STUDY.requests(replace(bench, engine=None)) == ()
    few = with_ladders(bench, tmp_path, change=lambda r: r if r["control"] or r["id"] in ("fever-0", "exam-0") else None)
    assert {f.verdict for f in outcome("dose", few).findings} == {"untestable"}
    real = findings("dose", with_ladders(bench, tmp_path, change=lambda r: None if r["control"] else r))
    assert real["control"].verdict == "untestable" and real["trend"].verdict == "holds"
    happy = findings("dose", with_ladders(bench, tmp_path, change=lambda r: {**r, "rise": ["happy"], "fall": []}))
    assert happy["calm"].verdict == "untestable" and "0 ladders" in happy["calm"].note


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(outcome("dose", toy_bench()).data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"ladders", "controls", "pairs", "layers"} == {claim.figure for claim in CLAIMS.values()}
