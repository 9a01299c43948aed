"""Self and other: told apart where the toy keeps them apart, coupled where it does not, nothing where nothing is planted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from affectlens.concepts import Rating
from affectlens.engine import Request, Where, transcript
from affectlens.likeness import Labelled, corrected, likeness, shared_labels, weighted_rating
from affectlens.studies import Finding, Outcome, Sources
from affectlens.studies.speakers import CLAIMS, STUDY
from affectlens.studies.speakers.answers import Answers
from planted import outcome, toy_bench

PLANTED = ("present", "present_found", "other_found", "apart", "leak", "names", "names_apart", "story", "structure", "scenarios")


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    options = {"planted": {}, "coupled": {"coupled": True}, "nothing": {"effect": 0.0}}
    return {name: outcome("speakers", toy_bench(**kept)) for name, kept in options.items()}


def by_id(result: Outcome) -> dict[str, Finding]:
    return {finding.id: finding for finding in result.findings}


def test_planted_speakers_are_told_apart(found: dict[str, Outcome]) -> None:
    findings = by_id(found["planted"])
    assert set(findings) == set(CLAIMS)
    assert {id: findings[id].verdict for id in PLANTED} == dict.fromkeys(PLANTED, "holds")
    assert findings["pattern"].verdict == "fails"  # the copies are orthogonal: no emotion answers another one
    assert "Warning" not in findings["apart"].note + findings["leak"].note


def test_a_model_that_couples_self_and_other_is_warned_of(found: dict[str, Outcome]) -> None:
    findings = by_id(found["coupled"])
    for id in ("apart", "names_apart"):
        assert findings[id].verdict != "holds" and "couples self and other" in findings[id].note
    assert findings["leak"].verdict != "holds" and "Warning" in findings["leak"].note


def test_nothing_holds_where_nothing_is_planted(found: dict[str, Outcome]) -> None:
    assert "holds" not in {finding.verdict for finding in found["nothing"].findings}


def test_the_corrected_cosine_agrees_with_plain_loops(found: dict[str, Outcome]) -> None:
    """Cosine of two noisy copies of the same vectors, from pairs of dialogues in plain loops and from what is true."""
    rng = np.random.default_rng(0)
    feels = np.array([(a, b) for a in range(12) for b in rng.permutation(12)[:6] if a != b])
    true = rng.normal(size=(2, 12, 30))
    true[1] = 0.6 * true[0] + 0.8 * true[1]
    kinds = [
        Labelled(true[side][feels[:, side]] + 2 * rng.normal(size=(len(feels), 30)), feels[:, side], np.arange(len(feels)))
        for side in (0, 1)
    ]
    shared = shared_labels(feels)
    pairs = [[likeness(p, q, shared, 12) for q in kinds] for p in kinds]
    wanted = {}
    for s, t in ((0, 0), (0, 1), (1, 1)):
        same, strange = [[] for _ in range(12)], []
        for i in range(len(feels)):
            for j in range(len(feels)):
                common = sum(x == y for x in feels[i] for y in feels[j])
                product = float(kinds[s].rows[i] @ kinds[t].rows[j])
                if i != j and common == 0:
                    strange.append(product)
                elif i != j and common == 1 and feels[i, s] == feels[j, t]:
                    same[feels[i, s]].append(product)
        wanted[s, t] = np.array([np.mean(x) if x else np.nan for x in same]) - np.mean(strange)
        np.testing.assert_allclose(pairs[s][t].same, wanted[s, t])
    value = corrected(pairs[0][1].same, pairs[0][0].same, pairs[1][1].same)
    assert value == pytest.approx(0.6, abs=0.12)
    assert abs(pairs[0][1].plain.mean()) < value - 0.1  # what noise does to the cosine that is not corrected


def test_vectors_are_those_of_the_recipe(found: dict[str, Outcome]) -> None:
    """The raw table against a reading made by hand."""
    bench = toy_bench()
    record, asked = bench.texts("speakers")[-1], STUDY.requests(bench)
    chat = tuple(("assistant" if side == "assistant" else "user", words) for side, words in record["turns"])
    assert asked[len(bench.texts("speakers")) - 1].prompt == chat
    text, _ = transcript(chat)
    (result,) = bench.engine.run([Request(text)])
    spoken = Where(role="assistant").mask(next(bench.engine.run([Request(chat, transcript=True)])).layout)
    words = "".join(token for token, chosen in zip(result.layout.tokens, spoken, strict=True) if chosen)
    assert words.split() == " ".join(words for side, words in record["turns"] if side == "assistant").split()


def test_arousal_is_regulated_where_calm_answers_it() -> None:
    bench = toy_bench()
    names, rng = tuple(bench.vectors.names), np.random.default_rng(1)
    arousal = np.linspace(-1, 1, len(names))
    concepts = replace(
        bench.concepts,
        concepts=tuple(
            replace(bench.concepts[name], rating=Rating(float(rng.uniform(-1, 1)), float(level), 0.0))
            for name, level in zip(names, arousal, strict=True)
        ),
    )
    rows = Labelled(rng.normal(size=(4, 3)), np.zeros(4, int), np.arange(4))
    answers = Answers(replace(bench, concepts=concepts), names, rows, rows, np.zeros((2, 2)), 1.0, "made up")
    noise = 0.2 * rng.normal(size=(len(names), len(names)))
    finding, data = answers.regulation(CLAIMS["regulation"], noise - np.outer(arousal, arousal))
    assert finding.verdict == "holds" and finding.estimate.value < -0.8 and data is not None
    assert answers.regulation(CLAIMS["regulation"], noise + np.outer(arousal, arousal))[0].verdict == "fails"
    few = replace(answers, bench=bench).regulation(CLAIMS["regulation"], noise)[0]
    assert few.verdict == "untestable" and "rating" in few.note
    np.testing.assert_allclose(weighted_rating(np.array([[1.0, -1.0, np.nan]]), np.array([2.0, 0.0, 1.0])), [1.0])


def test_without_a_model_or_with_too_few_emotions_it_says_so(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("speakers", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    few = [r for r in bench.texts("speakers") if {r["person"], r["assistant"]} <= {"calm", "sad", "angry"}]
    (tmp_path / "speakers.jsonl").write_text("\n".join(json.dumps(row) for row in few), encoding="utf-8")
    short = outcome("speakers", replace(bench, sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in short.findings} == {"untestable"} and "3 emotions" in short.findings[0].note


def test_figures_are_drawn_from_plain_data(found: dict[str, Outcome]) -> None:
    for result in found.values():
        drawn = {figure.id for figure in STUDY.draw(json.loads(json.dumps(result.data, allow_nan=False)))}
        assert drawn >= {"agreement", "cosines", "layers", "structure", "answers", "scenarios"}
    assert {claim.figure for claim in CLAIMS.values()} == {*drawn, "regulation"}
