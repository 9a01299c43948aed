"""User and assistant: told apart where the reply differs from the user's feeling, not where it mirrors it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from affectlens.engines.toy import ToyEngine
from affectlens.studies import Bench, Outcome, Sources
from affectlens.studies.reply import STUDY, _loving
from affectlens.studies.reply.measured import Measured, Read, _places, likeness, statement
from planted import toy_bench

HEADLINE = ("user", "reply", "instead", "apart", "predicts", "better")


@lru_cache
def planted() -> Outcome:
    return STUDY.run(toy_bench(1))


def test_the_reply_position_is_told_from_the_users_words() -> None:
    found = {finding.id: finding for finding in planted().findings}
    values = {finding.id: finding.estimate.value for finding in planted().findings if finding.estimate}
    assert {id: found[id].verdict for id in HEADLINE} == dict.fromkeys(HEADLINE, "holds")
    assert values["apart"] < 0.3 < values["predicts"]
    assert found["loving"].verdict == "untestable" and "fewer than 20" in found["loving"].note


def test_nothing_holds_where_nothing_is_planted() -> None:
    found = STUDY.run(toy_bench(0, effect=0.0))
    assert "holds" not in {finding.verdict for finding in found.findings}
    # What the stream carries over is predicted in context all the same, which is why replies are read alone.
    inside = next(row for row in found.tables[0].rows if row[:2] == ("reply position", "what is said"))
    assert float(inside[4].split()[0]) > 0.5 > float(inside[5].split()[0])


def test_a_position_that_mirrors_the_user_is_not_told_apart(tmp_path: Path) -> None:
    bench = toy_bench(1)
    engine = bench.engine
    assert isinstance(engine, ToyEngine)
    records = []
    for i, record in enumerate(r for r in bench.texts("contrasts") if r["kind"] == "audience"):
        user = record["user"]
        asked = f"{engine.write(user, f'topic {i}', seed=i, words=30)} {' '.join(engine.concepts[user])}?".replace(".", ",")
        records.append({**record, "text": f"{engine.write(user, f'topic {i}', seed=i + 50, words=27)} {asked}"})
    (tmp_path / "contrasts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = {f.id: f for f in STUDY.run(replace(bench, sources=Sources(texts=tmp_path))).findings}
    assert found["user"].verdict == "holds"
    assert {found[id].verdict for id in ("reply", "instead", "apart", "apart_plain")} <= {"fails", "weak"}
    assert "coupled" in found["apart"].note


def test_correlations_agree_with_plain_loops() -> None:
    raw, bench = planted().raw, toy_bench(1)
    names = {record[side] for record in bench.texts("contrasts") if record["kind"] == "audience" for side in ("user", "reply")}
    places, replies = raw["positions"], raw["replies"]
    x: list[float] = []
    y: list[float] = []
    z: list[float] = []
    for name in sorted(names):
        at = {p: [v for v, q in zip(places[name], places["place"], strict=True) if q == p] for p in ("statement", "reply")}
        said = [
            np.mean([v for v, i in zip(replies[f"{name}, alone"], replies["id"], strict=True) if i == id and np.isfinite(v)])
            for id in dict.fromkeys(replies["id"])
        ]
        for column, values in ((x, at["statement"]), (y, at["reply"]), (z, said)):
            column += [value - np.mean(values) for value in values]
    found = {finding.id: finding.estimate.value for finding in planted().findings if finding.estimate}
    assert found["apart"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["predicts"] == pytest.approx(np.corrcoef(y, z)[0, 1])
    assert found["better"] == pytest.approx(np.corrcoef(y, z)[0, 1] - np.corrcoef(x, z)[0, 1])


@pytest.mark.parametrize("template", [True, False])
def test_each_place_is_the_token_it_is_called(template: bool) -> None:
    engine = ToyEngine(seed=1, template=template)
    bench = replace(toy_bench(1), engine=engine)
    record = next(r for r in bench.texts("contrasts") if r["kind"] == "audience")
    layout = next(engine.run(STUDY.requests(bench)[:1])).layout
    places = _places(layout, record["text"])
    end = layout.offsets[places["statement"]][1]
    assert layout.text[:end].endswith(str(statement(record["text"]))) and layout.tokens[places["last"]] == "?"
    assert layout.tokens[places["reply"]] == ":" and layout.tokens[places["before reply"]].strip().lower() == "assistant"


def test_the_statement_ends_before_the_last_sentence() -> None:
    assert statement('He said "Go!" Then I left. What now?') == 'He said "Go!" Then I left.'
    assert statement("What now?") is None


def test_readings_as_alike_as_the_bound_are_not_below_it() -> None:
    bench = toy_bench(1)
    rng, p = np.random.default_rng(5), []
    for _ in range(200):
        user, noise = rng.normal(size=(2, 24, 12))
        places = {"statement": user, "reply": 0.5 * user + np.sqrt(0.75) * noise}
        nothing = np.zeros((24, 2, 12))
        measured = Measured(bench, Read(places, nothing, nothing, []), bench.vectors.names, centred=True)
        p.append(measured.as_alike_as(0.5, likeness(user, places["reply"])).p)
    assert np.mean(np.array(p) <= 0.05) <= 0.1


def test_loving_has_to_rise_more_than_other_emotions() -> None:
    bench = toy_bench(1)
    names = (*bench.vectors.names, *(f"x{i}" for i in range(18)))
    wide = replace(bench, vectors=replace(bench.vectors, names=names))
    rng = np.random.default_rng(0)
    before, own = rng.normal(size=(24, 30)), names.index("loving")

    def verdict(rise: np.ndarray) -> tuple[str, str]:
        nothing = np.zeros((24, 1, 30))
        finding = _loving(wide, Read({"statement": before, "reply": before + rise}, nothing, nothing, []), "")
        return finding.verdict, finding.note

    assert verdict(np.where(np.arange(30) == own, 1.0, 0.1) + np.zeros((24, 1)))[0] == "holds"
    everywhere, note = verdict(np.linspace(0.5, 1.5, 30) + np.zeros((24, 1)))
    assert everywhere == "fails" and "rises in 24 of 24 messages; 29 of 29 other" in note


class _Silent(ToyEngine):
    """Says nothing, or always the same."""

    words: tuple[int, ...] = (1,)

    def _pick(self, logits: np.ndarray, sampling: object, rng: np.random.Generator) -> int:
        return self.words[0]


class _Parrot(_Silent):
    words = (300,)


def _with(engine: ToyEngine) -> Bench:
    return replace(toy_bench(1), engine=engine)


def test_what_cannot_be_tested_says_why(tmp_path: Path) -> None:
    bench = toy_bench(1)
    bare = STUDY.run(replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    few = [record for record in bench.texts("contrasts") if record["kind"] == "audience"][:5]
    (tmp_path / "contrasts.jsonl").write_text("\n".join(map(json.dumps, few)), encoding="utf-8")
    short = STUDY.run(replace(bench, sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in short.findings} == {"untestable"} and "5 messages" in short.findings[0].note
    assert STUDY.draw(short.data) == []
    for engine, reason in ((_Silent(seed=1), "0 messages were answered"), (_Parrot(seed=1), "nothing to predict")):
        outcome = STUDY.run(_with(engine))
        found = {f.id: f for f in outcome.findings}
        assert {found[id].verdict for id in ("predicts", "predicts_plain", "better")} == {"untestable"}
        assert reason in found["predicts"].note and found["apart"].verdict == "holds"
        json.dumps(outcome.as_dict(), allow_nan=False)
        assert STUDY.draw(outcome.data)


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(planted().data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"readings", "positions", "said", "probes", "rise"}
    assert {finding.figure for finding in planted().findings if finding.figure} <= drawn
