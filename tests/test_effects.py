"""What steering does to words, to neutral text and to replies: each measure agrees with a plain computation."""

from __future__ import annotations

import numpy as np
import pytest

from affectlens.corpus import load
from affectlens.effects import (
    PREFILL,
    Opening,
    along,
    distinct,
    neutral_pieces,
    random_directions,
    repetition,
    shuffled_directions,
    specific,
    text_losses,
    word_logprobs,
)
from affectlens.engine import Request, Sampling, Steering, Where
from affectlens.engines.toy import ToyEngine
from planted import toy_bench

ENGINE = ToyEngine()
OPENINGS = [Opening.of(record) for record in load("openings")]


def test_bundled_openings_end_where_a_feeling_can_stand() -> None:
    kinds = {opening.kind for opening in OPENINGS}
    assert kinds == {"self", "other", "story", "event"}
    assert all(bool(opening.prefill) == (opening.kind != "event") for opening in OPENINGS)
    for kind in kinds:
        halves = [opening.held_out for opening in OPENINGS if opening.kind == kind]
        assert sum(halves) * 2 == len(halves)


@pytest.mark.parametrize("plain", [False, True])
def test_a_prefill_is_the_assistants_and_alone_is_steered(plain: bool) -> None:
    """``PREFILL`` takes the given words, and neither the question nor what the model goes on with."""
    for opening in (OPENINGS[0], next(o for o in OPENINGS if o.kind == "story")):
        layout = ENGINE.layout(opening.request(plain=plain))
        steered = "".join(layout.tokens[i] for i in np.flatnonzero(PREFILL.mask(layout)))
        assert steered.strip() == opening.prefill.strip()
    assert not PREFILL.ahead(layout)


def test_words_are_scored_as_the_engine_scores_them() -> None:
    words, steering = ("calm", "at ease"), along(ENGINE.truth["calm"][2], layer=2, norm=8.0, strength=0.3)
    found = word_logprobs(ENGINE.run, OPENINGS[:3], [Steering(), steering], words=words)
    assert found.shape == (2, 3, 2)
    for i, opening in enumerate(OPENINGS[:3]):
        choices = ENGINE.choose([(("user", opening.text),)], [" calm", " at ease"], prefill=opening.prefill, steering=steering)
        np.testing.assert_allclose(found[1, i], choices[0])
    assert (found[1, :, 0] > found[0, :, 0]).all()  # planted


def test_losses_are_those_of_the_texts_tokens_one_by_one() -> None:
    pieces = neutral_pieces([ENGINE.write(None, f"topic {i}", seed=i) for i in range(6)], 2)
    assert len(pieces) == 2
    steering = along(np.ones(64), layer=1, norm=6.0, strength=0.2)
    for s, losses in zip((Steering(), steering), text_losses(ENGINE.run, pieces, [Steering(), steering]), strict=True):
        for (given, rest), loss in zip(pieces, losses, strict=True):
            words, total, sofar = [f" {word}" for word in rest.split()], 0.0, given
            # Full stops are tokens of their own: the sum over words is the sum over tokens.
            for word in words:
                (result,) = ENGINE.run([Request(sofar, choices=(word,), steering=s)])
                total, sofar = total - result.choice_logprobs[0], sofar + word
            tokens = len(ENGINE.layout(Request(given + rest))) - len(ENGINE.layout(Request(given)))
            assert loss == pytest.approx(total / tokens, rel=1e-4)


def test_neutral_pieces_pass_over_short_texts() -> None:
    assert neutral_pieces(["too short"], 3) == []
    long = ["w " * 100 + str(i) for i in range(10)]
    assert len(neutral_pieces([*long, "short"], 4)) == 4


def test_repetition_and_distinct_words() -> None:
    assert distinct("a b a b", 1) == 0.5 and np.isnan(distinct("one")) and repetition("one two three") == 0
    fresh = " ".join(map(str, range(40)))
    assert distinct(fresh) == 1 and repetition(fresh) == 0
    assert repetition("so it goes on " * 10) > 0.8


def test_specific_is_the_own_word_minus_the_mean_of_the_others() -> None:
    changes = np.random.default_rng(0).normal(size=(4, 4))
    expected = [changes[i, i] - np.delete(changes[i], i).mean() for i in range(4)]
    np.testing.assert_allclose(specific(changes, np.arange(4)), expected)


def test_control_directions_are_unit_and_of_no_concept() -> None:
    random = random_directions(5, 64, seed=1)
    np.testing.assert_allclose(np.linalg.norm(random, axis=1), 1)
    assert np.array_equal(random, random_directions(5, 64, seed=1)) and not np.array_equal(
        random, random_directions(5, 64, seed=2)
    )
    bench = toy_bench()
    assert shuffled_directions(None, bench.vectors, layer=4, n=3, seed=0) is None
    shuffled = shuffled_directions(bench.activations, bench.vectors, layer=4, n=12, seed=0)
    assert shuffled is not None
    np.testing.assert_allclose(np.linalg.norm(shuffled, axis=1), 1, atol=1e-6)
    real = bench.vectors.at(4).astype(float)
    neutral = bench.vectors.neutral[bench.vectors.row(4)]
    assert np.abs(shuffled @ neutral.T).max() < 1e-5  # as the real ones
    assert np.abs(shuffled @ real.T).max() < 0.9 * np.abs(real @ real.T).max()


def test_steering_along_a_direction_equals_that_of_a_vector() -> None:
    vectors = toy_bench().vectors
    made = along(vectors.at()[0], layer=vectors.layer, norm=float(vectors.residual_norms[vectors.row()]), strength=0.2)
    sampling = Sampling(8, temperature=0)
    ours, theirs = (ENGINE.generate(["the sea"], sampling=sampling, steering=s) for s in (made, 0.2 * vectors[vectors.names[0]]))
    assert ours == theirs
    assert made.at(Where(last=1)).terms[0].where == Where(last=1)
