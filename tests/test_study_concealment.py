"""Concealed emotion: beside the story vectors where it is carried apart, among them where it is not, nowhere where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from affectlens.crossed import Decoder, Effects, coordinates, effects
from affectlens.studies import Sources, load_study
from affectlens.studies.concealment import CLAIMS, STUDY
from planted import findings, outcome, toy_bench, verdicts


@pytest.fixture
def crossed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes of five emotions, each felt behind each other one, with an effect of either and noise; felt, shown."""
    pairs = np.array([(a, b) for a in range(5) for b in range(5) if a != b])
    rng = np.random.default_rng(3)
    own, other = rng.normal(size=(2, 5, 40))
    return own[pairs[:, 0]] + 3 * other[pairs[:, 1]] + rng.normal(size=(len(pairs), 40)), pairs[:, 0], pairs[:, 1]


def test_what_is_carried_apart_is_read_and_lies_apart() -> None:
    assert set(verdicts("concealment", toy_bench()).values()) == {"holds"}


def test_what_is_carried_in_the_story_directions_does_not_lie_apart() -> None:
    found = findings("concealment", toy_bench(coupled=True))
    assert found["decoded"].verdict == "holds"
    assert not {"holds", "untestable"} & {found["orthogonal"].verdict, found["outside"].verdict}
    assert found["shown"].verdict == "fails"


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_holds_where_nothing_is_planted(seed: int) -> None:
    found = findings("concealment", toy_bench(seed, effect=0.0))
    assert "holds" not in {finding.verdict for finding in found.values()}
    assert found["orthogonal"].verdict == "untestable" and "noise" in found["orthogonal"].note


def test_effects_are_those_of_a_regression_on_both_labels(crossed) -> None:
    scenes, felt, shown = crossed
    cells = np.concatenate([np.ones((len(felt), 1)), np.eye(5)[felt][:, :4], np.eye(5)[shown][:, :4]], axis=1)
    fitted = np.linalg.lstsq(cells, scenes, rcond=None)[0][1:5]
    expected = np.concatenate([fitted, np.zeros((1, 40))])
    np.testing.assert_allclose(effects(felt, shown, 5) @ scenes, expected - expected.mean(axis=0), atol=1e-9)


def test_held_out_scores_agree_with_a_plain_loop(crossed) -> None:
    scenes, felt, shown = crossed
    decoder = Decoder(felt, shown, 5)
    scores = decoder.scores(coordinates(scenes))
    for value in range(5):
        test = shown == value
        probes = effects(felt[~test], shown[~test], 5) @ scenes[~test]
        moved = scenes[test] - scenes[test].mean(axis=0)
        cosine = moved @ probes.T / np.linalg.norm(moved, axis=1)[:, None] / np.linalg.norm(probes, axis=1)
        candidates = np.arange(5) != value
        np.testing.assert_allclose(scores[test][:, candidates], cosine[:, candidates], atol=1e-4)
        assert (scores[test][:, value] < -1).all()


def test_noise_is_known_from_the_fit() -> None:
    """Without any effect all of the length is noise; a cosine that noise has shrunk is put right."""
    pairs = np.array([(a, b) for a in range(8) for b in range(8) if a != b])
    signal, cosine = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        story = np.linalg.qr(rng.normal(size=(60, 8)))[0].T
        away = rng.normal(size=(8, 60)) / np.sqrt(60)
        own = (0.6 * story + 0.8 * away) - (0.6 * story + 0.8 * away).mean(axis=0)
        noise = rng.normal(size=(len(pairs), 60))
        none = Effects(noise, *pairs.T, story, story).place("felt")
        place = Effects(2 * own[pairs[:, 0]] + noise, *pairs.T, story, story).place("felt")
        signal.append(none.signal)
        cosine.append(place.own() - (own * story).sum(axis=1).mean() / np.sqrt(np.square(own).sum(axis=1).mean()))
        assert place.cosines.diagonal().mean() < place.own()
    assert abs(np.mean(signal)) < 0.03 and abs(np.mean(cosine)) < 0.03


def test_exchanging_roles_keeps_the_pairs(crossed) -> None:
    scenes, felt, shown = crossed
    space = Effects(scenes, felt, shown, np.eye(40)[:5], np.eye(40)[:5])
    order = space.exchange(np.random.default_rng(0))
    same = order == np.arange(len(order))
    assert 0 < same.sum() < len(order) and sorted(order) == list(range(len(order)))
    assert (felt[order][~same] == shown[~same]).all() and (shown[order][~same] == felt[~same]).all()


def test_scenes_are_asked_for_once_by_both_studies() -> None:
    bench = toy_bench()
    mine, theirs = (STUDY.requests(bench), load_study("lasting").requests(bench))
    assert {request.key() for request in mine} <= {request.key() for request in theirs}


def test_without_a_model_or_with_too_few_emotions_it_says_so(tmp_path) -> None:
    bench = toy_bench()
    bare = outcome("concealment", replace(bench, engine=None))
    assert {f.verdict for f in bare.findings} == {"untestable"} and "no model" in bare.findings[0].note
    rows = [record for record in bench.texts("concealment") if record["real"] in ("afraid", "angry", "calm")]
    (tmp_path / "concealment.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    few = outcome("concealment", replace(bench, sources=Sources(texts=tmp_path)))
    assert {f.verdict for f in few.findings} == {"untestable"} and "5 emotions are needed" in few.findings[0].note


def test_figures_are_drawn_from_plain_data() -> None:
    data = json.loads(json.dumps(outcome("concealment", toy_bench()).data, allow_nan=False))
    drawn = {figure.id for figure in STUDY.draw(data)}
    assert drawn == {"decoding", "outside", "cosines", "cosines_shown", "layers"}
    assert {claim.figure for claim in CLAIMS.values()} <= drawn
