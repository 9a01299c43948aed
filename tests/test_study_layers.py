"""From the word to its meaning: context is read where it is planted, in late layers, not where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from affectlens.engine import Readout
from affectlens.errors import FormatError
from affectlens.studies import Sources
from affectlens.studies.layers import CLAIMS, STUDY, half_risen
from planted import findings, outcome, toy_bench, verdicts


@pytest.mark.parametrize("template", [True, False])
def test_planted_context_is_read_in_late_layers(template: bool) -> None:
    found = verdicts("layers", toy_bench(template=template))
    # The toy's first two layers carry little of a word: with 12 concepts that one claim is beyond some seeds.
    assert {id for id, verdict in found.items() if verdict != "holds"} <= {"negation_word"} and set(found) == set(CLAIMS)


@pytest.mark.parametrize("seed", [0, 2])
def test_nothing_holds_where_nothing_is_planted(seed: int) -> None:
    assert "holds" not in verdicts("layers", toy_bench(seed, effect=0.0)).values()


def test_negation_and_names_are_understood_from_the_planted_layer_on() -> None:
    curves = {kind: part["curves"] for kind, part in outcome("layers", toy_bench()).data["kinds"].items()}
    for value, low, high in (curves["negation"]["word"], curves["binding"]["reference"]):
        assert all(a < 0.1 or b < 0 for a, b in zip(value[:3], low[:3], strict=True)) and all(end > 0 for end in low[3:])
        assert all(a <= b <= c for a, b, c in zip(low, value, high, strict=True))
    # Nothing is known yet of whom the end of the story will name.
    assert all(low < 0 < high for _, low, high in zip(*curves["binding"]["in between"], strict=True))


def test_the_difference_agrees_with_an_independent_computation() -> None:
    bench, row, differences = toy_bench(), toy_bench().vectors.row(), {"word": [], "ending": [], "reply": []}
    everywhere = Readout(bench.vectors.layers, pool="none")
    for record in bench.texts("contrasts"):
        if record["kind"] != "early word" or record["changed"][0].isdigit():
            continue
        scores = []
        for text in (record["first"], record["second"]):
            (result,) = bench.engine.run([bench.ask(text, everywhere)])
            residuals = result.readings[0].values[row].astype(float)
            residuals /= np.linalg.norm(residuals, axis=1, keepdims=True)
            up, down = (bench.vectors.at()[bench.vectors.index(record[which])] for which in ("rises", "falls"))
            scores.append((residuals @ (up - down) / 2, result.layout.tokens))
        n = len(record["ending"].replace(".", " .").split())
        # the user's words end before "\nassistant:", three tokens; the changed word stands before the ending
        for name, at in (("reply", slice(-1, None)), ("ending", slice(-3 - n, -3)), ("word", slice(-4 - n, -3 - n))):
            differences[name].append(scores[0][0][at].mean() - scores[1][0][at].mean())
    found = outcome("layers", bench)
    values = {finding.id: finding.estimate.value for finding in found.findings}
    assert values["reply"] == pytest.approx(np.mean(differences["reply"]), abs=1e-5)
    assert values["carried"] == pytest.approx(np.mean(differences["ending"]), abs=1e-5)
    raw = {key: np.array(column) for key, column in found.raw["differences"].items()}
    words = (raw["kind"] == "words") & (raw["place"] == "word") & (raw["layer"] == bench.vectors.layer)
    np.testing.assert_allclose(raw["cosine"][words], differences["word"], atol=1e-5)


def test_what_negations_do_to_every_probe_is_not_understanding(tmp_path) -> None:
    """A text that says the same twice, once with a "not" at its beginning, differs by that word alone."""
    bench, rows = toy_bench(), []
    for record in bench.texts("contrasts"):
        if record["kind"] == "negation":
            rows.append(
                {**record, "negated": f"{record['affirmed'].split()[0]} not the {record['affirmed'].split(maxsplit=1)[1]}"}
            )
    (tmp_path / "contrasts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = findings("layers", replace(bench, sources=Sources(texts=tmp_path)))
    assert found["negation"].verdict != "holds" and found["carried"].verdict == "untestable"


def test_half_of_the_peak() -> None:
    curves = np.random.default_rng(0).normal(size=(20, 9)).cumsum(axis=1)
    expected = [next((i for i, value in enumerate(curve) if value >= curve.max() / 2), 0) for curve in curves]
    assert half_risen(curves).tolist() == expected


def test_missing_conditions_are_said(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("layers", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    assert STUDY.requests(replace(bench, engine=None)) == ()
    rows = [record for record in bench.texts("contrasts") if record["kind"] == "audience"]
    (tmp_path / "contrasts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    others = replace(bench, sources=Sources(texts=tmp_path))
    assert {f.verdict for f in outcome("layers", others).findings} == {"untestable"} and STUDY.requests(others) == ()


@pytest.mark.parametrize("change", [{"word": "absent"}, {"kind": "early word", "first": "a b", "second": "a c"}])
def test_a_record_that_does_not_fit_its_text_is_named(tmp_path, change) -> None:
    record = {"id": "odd", "kind": "negation", "concept": "sad", "affirmed": "I am sad", "negated": "I am not sad", "word": "sad"}
    early = {"changed": ["b", "d"], "ending": "b", "rises": "sad", "falls": "calm"}
    (tmp_path / "contrasts.jsonl").write_text(json.dumps({**record, **early, **change}), encoding="utf-8")
    with pytest.raises(FormatError, match="odd"):
        outcome("layers", replace(toy_bench(), sources=Sources(texts=tmp_path)))


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(outcome("layers", toy_bench()).data, allow_nan=False))
    assert {figure.id for figure in STUDY.draw(data)} == {"maps", "curves"} == {claim.figure for claim in CLAIMS.values()}
