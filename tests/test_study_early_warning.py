"""Early warning: a reply is foretold where it can be and not where it cannot; outcomes are told by what tells them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from affectlens.conversations import conversation
from affectlens.engines.toy import ToyEngine
from affectlens.readings import Readings
from affectlens.studies import Bench, Finding, Outcome, Sources, load_study
from affectlens.studies.early_warning import CLAIMS, STUDY, TOLD, _exchanged, _told
from affectlens.studies.early_warning.measured import LEFT, STEPS, _behind, foretold, likeness, read_outcomes, regressed, shares
from planted import toy_bench


def by_id(outcome: Outcome) -> dict[str, Finding]:
    return {finding.id: finding for finding in outcome.findings}


def verdicts(outcome: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in outcome.findings}


@lru_cache
def planted() -> Outcome:
    return STUDY.run(toy_bench())


def dense(bench: Bench, folder: Path, *, first: int, last: int) -> Bench:
    """Messages of cue words alone, so that replies follow them: so many of one emotion, then so many of another."""
    engine = bench.engine
    assert isinstance(engine, ToyEngine)
    rng, names = np.random.default_rng(0), list(engine.concepts)
    records = []
    for i in range(8 * len(names)):
        kinds = names[i % len(names)], names[(i + 1 + i // len(names)) % len(names)]
        words = [rng.choice(engine.concepts[kind]) for kind, n in zip(kinds, (first, last), strict=True) for _ in range(n)]
        records.append({"id": str(i), "concept": kinds[0], "text": " ".join(words), "held_out": False})
    (folder / "scenarios.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return replace(bench, sources=Sources(texts=folder))


def test_replies_and_outcomes_that_can_be_foretold_are(tmp_path: Path) -> None:
    """The toy's replies follow the latest words of a message more than all of them."""
    found = by_id(STUDY.run(dense(toy_bench(), tmp_path, first=90, last=40)))
    expected = dict.fromkeys(CLAIMS, "holds") | {"outcome_before": "untestable"}
    assert {id: finding.verdict for id, finding in found.items()} == expected
    assert "nothing before the reply" in found["outcome_before"].note


def test_where_the_reply_begins_reads_no_more_than_the_words_it_answers(tmp_path: Path) -> None:
    found = by_id(STUDY.run(dense(toy_bench(), tmp_path, first=18, last=0)))
    assert found["prompt"].verdict == "holds" and found["beyond"].verdict != "holds"
    assert found["beyond"].estimate is not None and found["beyond"].estimate.high < 0.1


def test_nothing_holds_where_nothing_is_planted() -> None:
    found = STUDY.run(toy_bench(1, effect=0.0))
    assert "holds" not in verdicts(found).values()
    # What the stream carries on foretells itself all the same, and a whole contains its part.
    steps = {row[0]: dict(zip(found.tables[0].columns, row, strict=True)) for row in found.tables[0].rows}
    assert steps[32]["whole reply, in context"] > 0.8 and steps[8]["rest, in context"] > steps[8]["rest, alone"] + 0.2


class _Deaf(ToyEngine):
    """Answers whatever comes to its mind: the reply has nothing to do with the message, and no word with the one before."""

    def _pick(self, logits: np.ndarray, sampling: object, rng: np.random.Generator) -> int:
        return int(self._cues[rng.integers(len(self._cues))])

    @property
    def _cues(self) -> list[int]:
        return [self._ids[" " + cue] for own in self.concepts.values() for cue in own]


class _Silent(ToyEngine):
    def _pick(self, logits: np.ndarray, sampling: object, rng: np.random.Generator) -> int:
        return 1


class _Parrot(ToyEngine):
    def _pick(self, logits: np.ndarray, sampling: object, rng: np.random.Generator) -> int:
        return 300


def test_replies_that_have_nothing_to_do_with_the_message_are_not_foretold() -> None:
    found = verdicts(STUDY.run(replace(toy_bench(), engine=_Deaf(seed=0))))
    assert not {found[id] for id in ("prompt", "beyond", "first", "gain")} & {"holds"}
    assert found["outcome"] == "holds", "conversations were not generated"


def test_what_is_foretold_begins_behind_what_it_is_foretold_from() -> None:
    bench = toy_bench()
    (result,) = bench.engine.run([STUDY.requests(bench)[0]])
    tokens = result.readings[-1].positions
    assert len(tokens) >= 40
    for step in STEPS:
        rest = _behind(result, tokens, step)
        assert result.text.endswith(rest) and rest == "".join(result.layout.tokens[i] for i in tokens[step:]).strip()
    assert not _behind(result, tokens, len(tokens) - LEFT + 1) and _behind(result, tokens, len(tokens) - LEFT)


def test_correlations_agree_with_plain_loops() -> None:
    raw, found, names = planted().raw["replies"], by_id(planted()), toy_bench().vectors.names
    each = []
    for name in names:
        at, said = (np.array(raw[f"{name}, {what}"]) for what in ("reply position", "whole, alone"))
        each.append(np.corrcoef(at[np.isfinite(said)], said[np.isfinite(said)])[0, 1])
    assert found["prompt"].estimate is not None and found["prompt"].estimate.value == pytest.approx(np.mean(each))


def test_weights_are_fitted_on_other_messages() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 60, 5))
    exact = foretold([one, two], one + 3 * two, seed=0)
    assert likeness(exact, one + 3 * two) > 0.99
    # Weights that fit noise do not make anything foretold.
    chance = [likeness(foretold([one, two], y, seed=0), y) for y in rng.normal(size=(20, 60, 5))]
    assert -0.1 < np.mean(chance) < 0.03
    event = rng.integers(0, 2, 80)
    assert roc_auc_score(event, regressed(rng.normal(size=(80, 30)) + event[:, None], event, seed=0)[:, 0]) > 0.95
    by_chance = [
        roc_auc_score(own, regressed(rng.normal(size=(80, 30)), own, seed=0)[:, 0])
        for own in (rng.permutation(np.arange(80) % 2) for _ in range(10))
    ]
    assert 0.3 < np.mean(by_chance) < 0.55, "out of nothing a little too low, never too high"


def test_areas_and_their_spread_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    own = rng.integers(0, 4, 60)
    scores = rng.normal(size=(60, 4)).round(1) + (own[:, None] == np.arange(4))
    positive = own[:, None] == np.arange(4)
    part = shares(scores, positive)
    area = np.mean([roc_auc_score(positive[:, c], scores[:, c]) for c in range(4)])
    assert part.sum() / 2 == pytest.approx(area)
    # To first order: resampled sums spread as the areas of resampled rows do.
    exact, fast = [], []
    for _ in range(300):
        rows = np.concatenate([rng.choice(np.flatnonzero(own == c), (own == c).sum()) for c in range(4)])
        exact.append(np.mean([roc_auc_score(positive[rows, c], scores[rows, c]) for c in range(4)]))
        fast.append(part[rows].sum() - area)
    assert np.corrcoef(exact, fast)[0, 1] > 0.97 and np.std(fast) == pytest.approx(np.std(exact), rel=0.1)
    null = _exchanged(toy_bench(), scores, positive, area)
    assert abs(null.value - 0.5) < 0.02 and null.p < 0.01


def conversations(bench: Bench, folder: Path, label: str) -> Bench:
    """Talks of cue words with an outcome: by the assistant's emotion, by the person's, by neither, or none at all."""
    engine = bench.engine
    assert isinstance(engine, ToyEngine)
    rng, lines, names = np.random.default_rng(3), [], list(engine.concepts)
    for i in range(96):
        feels = {side: str(rng.choice(names)) for side in ("person", "assistant")}
        turns = [[side, " ".join(rng.choice(engine.concepts[how], 12).tolist())] for side, how in feels.items()]
        outcome = {**{side: names.index(how) < 6 for side, how in feels.items()}, "chance": bool(rng.integers(2))}
        record = {"id": str(i), "turns": [["assistant", "the door"], *turns, ["person", "And then?"]]}
        lines.append({**record, **({"outcome": outcome[label]} if label in outcome else {})})
    (folder / f"{label}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return replace(bench, sources=Sources(conversations=folder / f"{label}.jsonl"))


def test_a_users_outcomes(tmp_path: Path) -> None:
    bench = toy_bench()

    def told(label: str) -> dict[str, Finding]:
        mine = conversations(bench, tmp_path, label)
        return {finding.id: finding for finding in _told(mine, read_outcomes(mine), "layer 4")[0]}

    late, early, never = told("assistant"), told("person"), told("chance")
    assert late["outcome"].verdict == "holds" and late["outcome_beyond"].verdict == "holds"
    assert late["outcome_before"].verdict == "fails"
    assert early["outcome_before"].verdict == "holds" and early["outcome_beyond"].verdict == "fails"
    assert "user's words as text" in early["outcome"].note and "96 conversations as plain transcript" in early["outcome"].note
    assert [finding.verdict for finding in never.values()] == ["fails", "fails", "untestable"]
    none = told("unlabelled")
    assert {none[id].verdict for id in TOLD} == {"untestable"} and "0 conversations are labelled" in none["outcome"].note


def test_an_outcome_is_true_or_false() -> None:
    turns = [["person", "Hi"], ["assistant", "Hello!"]]
    assert [conversation({"turns": turns, "outcome": given}).outcome for given in (True, False, "bad", None, 1)] == [
        True,
        False,
        None,
        None,
        None,
    ]


def test_dialogues_are_read_once_for_both_studies(tmp_path: Path) -> None:
    bench = toy_bench()
    readings = Readings(bench.engine, tmp_path)
    readings.gather(load_study("transcripts").requests(bench))
    waiting = readings.missing(STUDY.requests(bench))
    assert all(request.sampling for request in waiting) and len(waiting) == 96


def test_what_cannot_be_tested_says_why(tmp_path: Path) -> None:
    bench = toy_bench()
    assert "no model" in STUDY.run(replace(bench, engine=None)).findings[0].note
    for engine, reason in ((_Silent(seed=0), "0 replies have a rest"), (_Parrot(seed=0), "the same reply")):
        outcome = STUDY.run(replace(bench, engine=engine))
        found = by_id(outcome)
        assert found["prompt"].verdict == found["gain"].verdict == "untestable" and reason in found["first"].note
        assert found["outcome"].verdict == "holds"
        json.dumps(outcome.as_dict(), allow_nan=False)
        assert [figure.id for figure in STUDY.draw(outcome.data)] == ["outcome"]
    no_list = STUDY.run(replace(bench, activations=None))
    assert "as text" not in by_id(no_list)["beyond"].note and "as text" in by_id(planted())["beyond"].note
    assert STUDY.draw(json.loads(json.dumps(no_list.data)))


def test_a_first_look_answers_a_quarter() -> None:
    quick = replace(toy_bench(), quick=True)
    assert sum(request.sampling is not None for request in STUDY.requests(quick)) == 24
    outcome = STUDY.run(quick)
    assert by_id(outcome)["outcome"].verdict == "holds" and "Correlation over" in by_id(outcome)["first"].note
    assert [row[0] for row in outcome.tables[0].rows] == [0, 2, 8, 16]


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(planted().data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"correlation", "outcome"} == {finding.figure for finding in planted().findings if finding.figure}
    assert all(len(row) == len(table.columns) for table in planted().tables for row in table.rows)
