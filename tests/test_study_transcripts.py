"""Transcripts: a ranking finds what is planted, not what is not; a user's conversations are ranked with and without labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from affectlens.studies import Bench, Sources
from affectlens.studies.transcripts import STUDY, placements
from planted import toy_bench

HEADLINE = ("ranking", "lists", "speaker")


@pytest.fixture(scope="module")
def planted():
    return STUDY.run(toy_bench())


def write(bench: Bench, folder: Path, *, labels: bool, n: int = 24) -> Path:
    lines = []
    for record in bench.texts("speakers")[:n]:
        messages = [{"role": "user" if side == "person" else "assistant", "content": words} for side, words in record["turns"]]
        label = {"emotion": record["assistant"]} if labels else {}
        lines.append(json.dumps({"id": record["id"], "messages": messages, **label}))
    lines.append(json.dumps({"id": "long", "messages": [{"role": "user", "content": "sea " * 3000}, messages[1]]}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def test_planted_emotions_rank_their_conversations_first(planted) -> None:
    found = {finding.id: finding for finding in planted.findings}
    assert {id: found[id].verdict for id in HEADLINE} == dict.fromkeys(HEADLINE, "holds")
    assert "conversations as chat template" in found["ranking"].note
    # The toy plants single words and nothing around them, so averaging has nothing to gain from.
    assert found["averaging"].verdict == "fails" and "vary" in found["averaging"].note


def test_nothing_holds_where_nothing_is_planted() -> None:
    assert "holds" not in {finding.verdict for finding in STUDY.run(toy_bench(1, effect=0.0)).findings}


def test_without_a_template_it_is_a_plain_transcript() -> None:
    bench = replace(toy_bench(template=False), draws=100)
    found = {finding.id: finding for finding in STUDY.run(bench).findings}
    assert found["ranking"].verdict == "holds" and "as plain transcript" in found["ranking"].note
    assert all(asked.transcript for asked in STUDY.requests(bench))


def test_areas_agree_with_scikit_learn(planted) -> None:
    raw = planted.raw["means"]
    table = {row[0]: row for row in planted.tables[1].rows}
    areas = []
    for name in sorted(set(raw["assistant"])):
        own = np.array(raw["assistant"]) == name
        areas.append(roc_auc_score(own, raw[f"score {name}"]))
        assert table[name][2] == pytest.approx(areas[-1])
    assert planted.findings[0].estimate.value == pytest.approx(np.mean(areas))


def test_the_mean_of_placements_is_the_area_ties_included() -> None:
    rng = np.random.default_rng(0)
    scores, own = rng.integers(0, 4, (30, 3)).astype(float), rng.integers(0, 3, 30)
    placed = placements(scores, own)
    for c in range(3):
        assert placed[own == c].mean() == pytest.approx(roc_auc_score(own == c, scores[:, c]))


def test_the_list_is_sorted_and_says_where(planted) -> None:
    rows = [row for row in planted.tables[0].rows if row[0] == "desperate"]
    raw = planted.raw["means"]
    best = np.argsort(raw["score desperate"])[::-1][:5]
    assert [row[2] for row in rows] == [raw["id"][i] for i in best]
    text = next(r for r in toy_bench().texts("speakers") if r["id"] == rows[0][2])
    spoken = [" ".join(words.split()) for side, words in text["turns"] if side == "assistant"]
    assert any(rows[0][6] in words for words in spoken)


def test_a_users_conversations(tmp_path: Path) -> None:
    bench = replace(toy_bench(), draws=100, folder=tmp_path)
    mine = replace(bench, sources=Sources(conversations=write(bench, tmp_path, labels=True)))
    assert STUDY.requests(mine) == ()
    found = {finding.id: finding for finding in STUDY.run(mine).findings}
    assert found["ranking"].verdict == "holds" and "1 left out: too long for the model's context" in found["ranking"].note
    assert found["speaker"].verdict == "untestable" and "person's" in found["speaker"].note
    assert {trace["id"] for trace in json.loads((tmp_path / "traces.json").read_text())["traces"]} - {"long"}


def test_without_labels_there_are_lists_and_no_verdicts(tmp_path: Path) -> None:
    bench = toy_bench()
    done = STUDY.run(replace(bench, sources=Sources(conversations=write(bench, tmp_path, labels=False, n=8))))
    assert {finding.verdict for finding in done.findings} == {"untestable"}
    assert "0 of 8 conversations are labelled" in done.findings[0].note
    assert len(done.tables[0].rows) == 60 and {figure.id for figure in STUDY.draw(done.data)} == {"trace"}


def test_without_a_model_or_with_nothing_that_fits_it_says_so(tmp_path: Path) -> None:
    bench = toy_bench()
    assert "no model" in STUDY.run(replace(bench, engine=None)).findings[0].note
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    nothing = STUDY.run(replace(bench, sources=Sources(conversations=tmp_path / "a.jsonl")))
    assert "1 left out: without a word of an assistant" in nothing.findings[0].note


def test_figures_are_drawn_from_plain_data(planted) -> None:
    data = json.loads(json.dumps(planted.data, allow_nan=False))
    assert {figure.id for figure in STUDY.draw(data)} == {finding.figure for finding in planted.findings}
