"""Reactions and deflection under steering: what is planted is found, what is absent or not the emotion's own is not."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affectlens.corpus import load
from affectlens.engine import Steering, Where
from affectlens.likeness import Labelled
from affectlens.probes import (
    FORMATS,
    POOLED,
    DeflectionVectors,
    SpeakerVectors,
    dialogue_requests,
    labelled_sides,
    scene_requests,
    scenes,
    two_sided,
)
from affectlens.replies import GENERATED, Replies, Script, against_random, kinds_exchanged, own_against_others
from affectlens.studies import Bench, Outcome, Sources, load_study
from affectlens.studies.deflection import CLAIMS as DEFLECTION
from affectlens.studies.deflection import NEEDS_VECTORS
from affectlens.studies.reaction import CLAIMS as REACTION
from affectlens.vectors import fit_means
from planted import toy_bench, with_calibration

STUDIES = {"reaction": REACTION, "deflection": DEFLECTION}
TEXTS = {"reaction": "reactions", "deflection": "scripts"}


def calibrated(strength: float = 0.15, layer: int = 4, seed: int = 0, **options: Any) -> Bench:
    return with_calibration(toy_bench(seed, **options), strength=strength, layer=layer)


@lru_cache(maxsize=16)
def outcome(study: str, seed: int = 0, **options: Any) -> Outcome:
    return load_study(study).run(calibrated(seed=seed, **options))


def verdicts(found: Outcome) -> dict[str, str]:
    return {finding.id: finding.verdict for finding in found.findings}


def with_texts(bench: Bench, name: str, records: list[dict[str, Any]], folder: Path) -> Bench:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return replace(bench, sources=Sources(texts=folder))


# ── the studies ──


@pytest.mark.parametrize("study", STUDIES)
def test_what_is_planted_is_found(study: str) -> None:
    assert verdicts(outcome(study)) == dict.fromkeys(STUDIES[study], "holds")


@pytest.mark.parametrize("study", STUDIES)
def test_nothing_holds_where_nothing_is_planted(study: str) -> None:
    assert "holds" not in verdicts(outcome(study, effect=0.0)).values()


def test_where_nothing_is_hidden_deflection_is_untestable_and_shown_all_the_same() -> None:
    found = outcome("deflection", seed=1, effect=0.0)
    noise = {finding.id for finding in found.findings if "cannot be told from noise" in finding.note}
    assert noise == set(NEEDS_VECTORS) and "+ deflection" in found.data["replies"] and found.data["noise"]


def test_replies_of_another_emotion_are_not_taken_for_its_own(tmp_path: Path) -> None:
    """The same replies under each other's names: whatever is said of the very emotion must not hold."""
    for study, ids in (("reaction", ("express_own", "react_own")), ("deflection", ("own",))):
        bench = calibrated()
        records = bench.texts(TEXTS[study])
        turned = records[3:] + records[:3]
        mixed = [{**record, "concept": other["concept"]} for record, other in zip(records, turned, strict=True)]
        found = verdicts(load_study(study).run(with_texts(bench, TEXTS[study], mixed, tmp_path)))
        assert "holds" not in {found[id] for id in ids}, study


def test_a_model_that_takes_the_other_for_itself_does_not_answer() -> None:
    """Self and other in one direction: other-speaker vectors show the emotion as present-speaker vectors do."""
    found = verdicts(outcome("reaction", coupled=True))
    assert found["express"] == "holds" and "holds" not in {found[id] for id in ("react", "answer", "apart", "react_own")}


@pytest.mark.parametrize("study", STUDIES)
def test_missing_conditions_are_said(study: str, tmp_path: Path) -> None:
    run, bench = load_study(study).run, calibrated()
    assert "no model" in run(replace(bench, engine=None)).findings[0].note
    assert "not calibrated" in run(replace(bench, vectors=replace(bench.vectors, calibration=None))).findings[0].note
    assert "no strength is safe" in run(calibrated(strength=0.0)).findings[0].note
    few = run(with_texts(bench, TEXTS[study], bench.texts(TEXTS[study])[:2], tmp_path))
    assert "2 emotions have" in few.findings[0].note and set(verdicts(few).values()) == {"untestable"}
    assert load_study(study).requests(replace(bench, vectors=replace(bench.vectors, calibration=None))) == ()
    assert load_study(study).draw(few.data) == []


@pytest.mark.parametrize("study", STUDIES)
def test_figures_tables_and_raw_values_are_plain_data(study: str) -> None:
    found = outcome(study)
    data = json.loads(json.dumps(found.data, allow_nan=False))
    assert data == found.data
    drawn = {figure.id for figure in load_study(study).draw(data)}
    assert {claim.figure for claim in STUDIES[study].values()} - {""} <= drawn and "dose" in drawn
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    for columns in found.raw.values():
        assert len({len(column) for column in columns.values()}) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_a_first_look_leaves_the_rest_out_and_says_so(study: str) -> None:
    whole, found = outcome(study), load_study(study).run(replace(calibrated(), quick=True))
    left_out = {finding.id for finding in found.findings if "Left out of a first look" in finding.note}
    assert [f.id for f in found.findings] == [f.id for f in whole.findings] and left_out
    assert not left_out & {"express", "react", "answer", "apart", "denial", "positive", "admit"}
    assert {f.verdict for f in found.findings if f.id not in left_out} == {"holds"}
    drawn = {figure.id for figure in load_study(study).draw(json.loads(json.dumps(found.data, allow_nan=False)))}
    assert drawn == {"replies", "emotions"}


def test_effects_grow_with_strength_and_every_reply_is_kept() -> None:
    found = outcome("deflection")
    curves = found.data["dose"]["curves"]["deny"]["+ deflection"]
    assert len(curves) == len(found.data["dose"]["strengths"]) == 3 and curves == sorted(curves)
    records = calibrated().texts("scripts")
    replies = sum(len(record[kind]) for record in records for kind in ("deny", "admit", "neutral", "glad"))
    assert len(found.raw["replies"]["reply"]) == replies == len(found.raw["unsaid"]["reply"])


@pytest.mark.parametrize(("study", "neighbour"), [("reaction", "speakers"), ("deflection", "concealment")])
def test_what_the_vectors_rest_on_is_read_once(study: str, neighbour: str) -> None:
    bench = calibrated()
    mine, theirs = ({request.key() for request in load_study(name).requests(bench)} for name in (study, neighbour))
    assert mine and mine <= theirs


# ── the vectors ──


def test_vectors_are_what_the_toy_was_given() -> None:
    bench = calibrated()
    vectors, truth, engine = bench.vectors, bench.engine.truth, bench.engine
    dialogues = two_sided(bench.texts("speakers"), vectors.names)
    requests = dialogue_requests(dialogues, vectors.layers, FORMATS["Human and Assistant"])
    speakers = SpeakerVectors(dialogues, bench.read(requests), vectors, layer=4)
    names = truth.names
    planted = {"present": truth.directions[0], "other": truth.directions[0] @ engine._carried.T @ engine._other}
    for kind, directions in planted.items():
        contrasts = directions - directions.mean(axis=0)
        contrasts /= np.linalg.norm(contrasts, axis=1, keepdims=True)
        cosines = speakers.directions(kind, names) @ contrasts.T
        assert (cosines.argmax(axis=1) == np.arange(len(names))).all() and np.diag(cosines).min() > 0.5
        assert speakers.there(kind, draws=100, seed=0)
    hidden = [scene for scene in scenes(bench.texts("concealment"), vectors.names) if scene["condition"] == "hidden"]
    felt = DeflectionVectors(hidden, bench.read(scene_requests(hidden, vectors.layers, told=True)), vectors, layer=4)
    told = truth.directions[0] @ engine._carried.T @ engine._untold
    told = np.stack([told[names.index(name)] for name in felt.names])
    told = told - told.mean(axis=0)
    told /= np.linalg.norm(told, axis=1, keepdims=True)
    assert np.diag(felt.directions("felt", felt.names) @ told.T).min() > 0.5
    assert felt.noise(draws=100, seed=0) == ""


def test_other_speaker_vectors_hold_nothing_of_what_their_own_speakers_felt() -> None:
    """Two labels with an effect each and no noise: the fit gives back either, the plain mean does not."""
    rng = np.random.default_rng(0)
    feels = np.array([(a, b) for a in range(6) for b in rng.permutation(6)[:3] if a != b])
    own, other = rng.normal(size=(2, 6, 20))
    values = np.stack([own[feels[:, side]] + 0.3 * other[feels[:, 1 - side]] for side in (0, 1)], axis=1)
    kinds = labelled_sides(values, feels, np.zeros((0, 20)))
    assert all(isinstance(kinds[kind], Labelled) for kind in POOLED)
    np.testing.assert_array_equal(kinds["present"].rows, kinds["other"].rows)
    speakers = SpeakerVectors.__new__(SpeakerVectors)
    speakers.names, speakers._kinds, speakers._basis = tuple("abcdef"), kinds, np.zeros((0, 20))
    for kind, effect in (("present", own), ("other", other)):
        wanted = effect - effect.mean(axis=0)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        fitted, plain = speakers.directions(kind, tuple("abcdef")), fit_means(kinds[kind].means(6), np.zeros((0, 20))).directions
        np.testing.assert_allclose((fitted * wanted).sum(axis=1), 1, atol=1e-2)  # each side's mean is taken away before
        assert kind == "present" or (plain * wanted).sum(axis=1).mean() < 0.8


# ── what is measured ──


def test_changes_agree_with_a_plain_computation() -> None:
    engine = calibrated().engine
    two = {"own": ("wept tears sobbed", "funeral mourned"), "plain": ("the door window", "of to")}
    scripts = [Script("a", "sad", "Anna: street\n\nBoris:", two), Script("b", "calm", (("user", "the chair"),), two)]
    replies = Replies(engine.run, scripts, ("sad", "calm"), layer=3, norm=9.6, strength=0.2)
    directions = np.stack([engine.truth["sad"][3], engine.truth["calm"][3]])
    crossed = replies.crossed(directions, share=-0.5)
    np.testing.assert_allclose(replies.own_of(crossed), replies.own(directions, share=-0.5))
    steering = replies.steering(directions[1], share=-0.5)
    request = scripts[0].request(steering=steering)
    assert request.choices == (" wept tears sobbed", " funeral mourned", " the door window", " of to")
    before, after = (next(engine.run([replace(request, steering=s)])).choice_logprobs for s in (Steering(), steering))
    expected = (np.array(after) - before).reshape(2, 2) / [[3, 2], [3, 2]]
    np.testing.assert_allclose(crossed[1, 0], expected, atol=1e-6)
    assert scripts[1].request().choices[0] == "wept tears sobbed"
    np.testing.assert_allclose(replies.by_emotion(crossed)[1, 0], expected.mean(axis=1), atol=1e-6)


def test_only_what_is_generated_is_steered() -> None:
    engine = calibrated().engine
    script = Script("a", "sad", "Anna: street\n\nBoris:", {"own": ("wept",)})
    replies = Replies(engine.run, [script], ("sad",), layer=3, norm=9.6, strength=0.2)
    request = script.request(steering=replies.steering(engine.truth["sad"][3], where=GENERATED))
    layout = engine.layout(request)
    steered = sum(term.where.mask(layout).astype(int) for term in request.steering.terms)
    assert np.flatnonzero(steered).tolist() == [len(layout) - 1] and Where("response") in GENERATED


def test_the_tests_tell_an_effect_from_none() -> None:
    """Where labels mean nothing p is even; where they do it is small."""
    rng, n = np.random.default_rng(1), 9
    tests = {
        "random": lambda shift: against_random(rng.normal(size=n) + shift, rng.normal(size=(24, n)), draws=99, seed=0),
        "others": lambda shift: own_against_others(rng.normal(size=(n, n)) + shift * np.eye(n), draws=99, seed=0),
        "kinds": lambda shift: kinds_exchanged(rng.normal(size=n) + shift, rng.normal(size=n), draws=99, seed=0),
    }
    for name, test in tests.items():
        small = np.mean([test(0.0)[1].p <= 0.05 for _ in range(100)])
        assert small <= 0.13, name
        assert np.mean([test(2.0)[1].p <= 0.05 for _ in range(20)]) > 0.9, name


def test_own_against_others_is_the_mean_of_the_diagonal_minus_the_rest() -> None:
    table = np.random.default_rng(0).normal(size=(7, 7))
    off = table[~np.eye(7, dtype=bool)].mean()
    assert own_against_others(table, draws=20, seed=0)[0].value == pytest.approx(np.diag(table).mean() - off)


# ── the texts ──


@pytest.mark.parametrize("name", TEXTS.values())
def test_bundled_texts_are_what_the_studies_need(name: str) -> None:
    kinds = {"reactions": ("express", "react", "neutral"), "scripts": ("deny", "admit", "neutral", "glad")}[name]
    records = load(name)
    each = {kind: [len(text.split()) for record in records for text in record[kind]] for kind in kinds}
    lengths = [np.mean(each[kind]) for kind in kinds]
    assert max(lengths) / min(lengths) < 1.25  # a word of a long reply is easier to foretell
    assert len({text for record in records for kind in kinds for text in record[kind]}) == sum(map(len, each.values()))
