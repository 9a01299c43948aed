"""The contract of steering: what a term does at a layer, at which tokens, while which gate is open, and how much of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from affectlens.engine import Chat, Gate, Readout, Request, Result, Sampling, Steering, Where

HELLO: Chat = (("user", "Hello there"),)
TALK: Chat = (("system", "Be brief."), ("user", "I lost my keys."), ("assistant", "Oh no."), ("user", "Help me!"))
LONG = "She slammed the door and shouted at everyone."
GREEDY = Sampling(max_tokens=5, temperature=0)

Subject = Any  # conftest.Subject; importing a conftest would load it twice


def read(subject: Subject, steering: Steering = Steering(), prompt: str | Chat = LONG, **kwargs: Any) -> Result:
    """The request, with every token read at every layer."""
    return subject.run(Request(prompt, steering=steering, readouts=(subject.everything,), **kwargs))[0]


def at(subject: Subject, result: Result, layer: int | None = None) -> np.ndarray:
    """Residuals ``(T, D)`` of a result at a layer, by default the middle one."""
    return result.readings[0].values[1 + (subject.middle if layer is None else layer)]


def words(result: Result, where: Where) -> str:
    return "".join(np.array(result.layout.tokens, dtype=object)[where.mask(result.layout)]).strip()


def between(values: np.ndarray) -> float:
    """A value with half of the others below it and half above, and none of them near."""
    ordered = np.sort(values)
    return float(ordered[len(values) // 2 - 1 : len(values) // 2 + 1].mean())


# ── turns and windows ──


def test_turns_are_counted_from_both_ends(subject: Subject) -> None:
    plain, filled = read(subject, prompt=TALK), read(subject, prompt=TALK, prefill="Sure")
    for number, (_, content) in enumerate(TALK):
        assert words(plain, Where(turn=number)) == content == words(plain, Where("prompt", turn=number - 4))
    # The reply is the last turn, before it has words too.
    assert words(plain, Where(turn=-1)) == words(plain, Where(turn=4)) == ""
    assert words(filled, Where(turn=-1)) == words(filled, Where(turn=4)) == words(filled, Where("response", turn=0)) == "Sure"
    assert words(plain, Where(turn=-2)) == words(filled, Where(turn=-2)) == "Help me!"
    # A role before it: the turns of this role are counted.
    assert words(filled, Where(role="user", turn=-1)) == "Help me!"
    assert words(filled, Where(role="user", turn=0)) == "I lost my keys."
    assert words(filled, Where(role="assistant", turn=0)) == words(filled, Where("prompt", role="assistant", turn=-1)) == "Oh no."
    assert words(filled, Where(role="assistant", turn=-1)) == "Sure"
    assert words(filled, Where(role="user", turn=2)) == words(filled, Where(turn=-6)) == ""
    assert words(filled, Where(role="user", turn=1, text="me")) == "me"


def test_turns_of_plain_texts_transcripts_and_finished_chats(subject: Subject) -> None:
    plain = read(subject, prompt="the calm sea", prefill=" was blue")
    assert words(plain, Where(turn=0)) == "the calm sea" and words(plain, Where(turn=-1)) == "was blue"
    told = read(subject, prompt=TALK, transcript=True)
    assert words(told, Where(turn=1)) == "I lost my keys." and words(told, Where(role="user", turn=-1)) == "Help me!"
    done = read(subject, prompt=(*HELLO, ("assistant", "Good day!")))
    assert words(done, Where(turn=-1)) == words(done, Where(turn=1)) == words(done, Where("response")) == "Good day!"
    assert words(done, Where("prompt", turn=-1)) == "Hello there"
    # A turn without words is a turn, and two turns of one role are two.
    twice = read(subject, prompt=(("user", "One."), ("user", ""), ("user", "Three.")), transcript=True)
    assert [words(twice, Where(turn=n)) for n in range(3)] == ["One.", "", "Three."]


def test_a_generated_reply_is_the_last_turn(subject: Subject) -> None:
    for prompt in (TALK, "the calm sea"):
        result = read(subject, prompt=prompt, sampling=GREEDY)
        mask = Where(turn=-1).mask(result.layout)
        np.testing.assert_array_equal(mask, Where("response").mask(result.layout))
        window = Where("response", after=1, first=2).mask(result.layout)
        np.testing.assert_array_equal(np.flatnonzero(window), np.flatnonzero(mask)[1:3])


def test_a_window_of_the_reply_is_steered_and_nothing_else(subject: Subject) -> None:
    given, where = " was blue and cold and wide", Where("response", after=1, first=2)
    vector = 0.5 * subject.norms[subject.middle] * subject.directions[0, subject.middle]
    for prompt in (HELLO, "the calm sea"):
        plain = read(subject, prompt=prompt, prefill=given)
        steered = read(subject, subject.steering(0, 0.5, where=where), prompt, prefill=given)
        moved = (at(subject, steered) - at(subject, plain)) @ vector / (vector @ vector)
        window = np.isin(plain.readings[0].positions, plain.layout.n_prompt + np.array([1, 2]))
        np.testing.assert_allclose(moved, window, atol=1e-3)
    # And while the reply is generated: its first tokens are drawn before anything is steered.
    for after in (0, 1):
        steering = subject.steering(0, 0.5, where=Where("response", after=after, first=1))
        plain, steered = (read(subject, s, HELLO, sampling=GREEDY) for s in (Steering(), steering))
        first = plain.readings[0].positions.tolist().index(plain.layout.n_prompt)
        moved = (at(subject, steered) - at(subject, plain))[first : first + after + 1] @ vector / (vector @ vector)
        np.testing.assert_allclose(moved, [0.0] * after + [1.0], atol=1e-3)


# ── additions over layers ──


def test_each_layer_may_get_all_of_it(subject: Subject) -> None:
    low, high = 0, subject.middle
    both = read(subject, subject.steering(0, 0.3).on(low, high, divide="each"))
    first = read(subject, subject.steering(0, 0.3).on(low))
    np.testing.assert_array_equal(at(subject, both, low), at(subject, first, low))
    added = 0.3 * subject.norms[high] * subject.directions[0, high]
    assert subject.apart(at(subject, both), at(subject, first) + added) < subject.tolerance


# ── holding coordinates ──


def coordinates(subject: Subject, result: Result) -> np.ndarray:
    """Coordinates along the three directions at the middle layer, in mean residual norms, ``(T, 3)``."""
    return at(subject, result) @ subject.directions[:, subject.middle].T / subject.norms[subject.middle]


def holding(subject: Subject, *modes: str | None, values: tuple[float, ...]) -> Steering:
    """A steering that holds some of the directions: for each a mode, or None."""
    total = Steering()
    for which, (mode, value) in enumerate(zip(modes, values, strict=True)):
        if mode is not None:
            term = subject.steering(which, 1.0)
            total = total + (term.ablate() if mode == "ablate" else getattr(term, mode)(value))
    return total


MODES = (None, "ablate", "clamp", "cap", "floor")


def test_clamps_ablations_caps_and_floors_hold_together_to_a_thousandth(subject: Subject) -> None:
    """Any mixture of three directions that are far from orthogonal, at every token, read and generated."""
    d = subject.directions[:, subject.middle]
    assert min(abs(d[0] @ d[1]), abs(d[0] @ d[2])) > 0.2
    plain = coordinates(subject, read(subject, prompt=TALK))
    rng = np.random.default_rng(3)
    mixtures = list(itertools.product(MODES, repeat=3))[1:]
    if subject.name not in ("toy", "ray"):
        mixtures = [mixtures[i] for i in rng.choice(len(mixtures), 24, replace=False)]
    requests, asked = [], []
    for number, modes in enumerate(mixtures):
        # Values in the middle of what is there, so that limits are exceeded at some tokens and not at others.
        values = tuple(float(np.quantile(plain[:, k], rng.uniform(0.2, 0.8))) for k in range(3))
        asked.append((modes, values))
        sampling = GREEDY if number % 4 == 0 else None
        steering = holding(subject, *modes, values=values)
        requests.append(Request(TALK, steering=steering, readouts=(subject.everything,), sampling=sampling))
    for (modes, values), result in zip(asked, subject.run(*requests), strict=True):
        found = coordinates(subject, result)
        for k, mode in enumerate(modes):
            if mode in ("ablate", "clamp"):
                np.testing.assert_allclose(found[:, k], 0 if mode == "ablate" else values[k], atol=1e-3)
            elif mode == "cap":
                assert found[:, k].max() < values[k] + 1e-3
            elif mode == "floor":
                assert found[:, k].min() > values[k] - 1e-3


@pytest.mark.parametrize(("mode", "sign"), [("cap", 1), ("floor", -1)])
def test_a_limit_acts_only_where_it_is_exceeded(subject: Subject, mode: str, sign: int) -> None:
    plain = read(subject)
    before = coordinates(subject, plain)
    value = between(before[:, 0])
    result = read(subject, holding(subject, mode, None, None, values=(value, 0, 0)))
    exceeded = sign * before[:, 0] > sign * value
    assert exceeded.any() and not exceeded.all()
    np.testing.assert_array_equal(at(subject, result)[~exceeded], at(subject, plain)[~exceeded])
    after = coordinates(subject, result)
    np.testing.assert_allclose(after[exceeded, 0], value, atol=1e-3)
    # The shortest step: it goes along the direction.
    steps = at(subject, result)[exceeded] - at(subject, plain)[exceeded]
    along = np.outer(steps @ subject.directions[0, subject.middle], subject.directions[0, subject.middle])
    np.testing.assert_allclose(steps, along, atol=1e-3 * subject.norms[subject.middle])


def test_two_limits_are_met_by_one_step_where_one_is_enough(subject: Subject) -> None:
    """Capping the direction that is exceeded most may bring the other one below its cap: then that one is not held up."""
    before = coordinates(subject, read(subject))
    values = (float(before[:, 0].min()) - 0.5, float(before[:, 1].max()) - 1e-3, 0.0)
    after = coordinates(subject, read(subject, holding(subject, "cap", "cap", None, values=values)))
    one = coordinates(subject, read(subject, holding(subject, "cap", None, None, values=values)))
    np.testing.assert_allclose(after, one, atol=1e-3)
    np.testing.assert_allclose(after[:, 0], values[0], atol=1e-3)
    assert after[:, 1].max() < values[1]


def test_terms_at_different_tokens_are_held_together_where_they_meet(subject: Subject) -> None:
    steering = subject.steering(0, 1.0).clamp(0.3) + subject.steering(1, 1.0).at(Where(role="user")).clamp(-0.2)
    steering = steering + subject.steering(2, 1.0).at(Where(role="user", turn=-1)).ablate()
    result = read(subject, steering, TALK)
    plain = read(subject, subject.steering(0, 1.0).clamp(0.3), TALK)
    found, alone = coordinates(subject, result), coordinates(subject, plain)
    np.testing.assert_allclose(found[:, 0], 0.3, atol=1e-3)
    positions = result.readings[0].positions
    user, last = (Where(role="user", turn=t).mask(result.layout)[positions] for t in (None, -1))
    np.testing.assert_allclose(found[user, 1], -0.2, atol=1e-3)
    np.testing.assert_allclose(found[last, 2], 0, atol=1e-3)
    np.testing.assert_allclose(found[~user], alone[~user], atol=1e-3)


def test_a_share_of_a_clamp_moves_by_this_share(subject: Subject) -> None:
    before = coordinates(subject, read(subject, prompt=HELLO, prefill="one two three four"))
    steering = subject.steering(0, 1.0).clamp(0.5).ramp(4)
    result = read(subject, steering, HELLO, prefill="one two three four")
    shares = np.clip((result.readings[0].positions - result.layout.n_prompt + 1) / 4, 0, 1)
    after = coordinates(subject, result)
    np.testing.assert_allclose(after[:, 0], before[:, 0] + shares * (0.5 - before[:, 0]), atol=2e-3)


# ── gates ──


def score(subject: Subject, result: Result, which: int, layer: int) -> np.ndarray:
    """The cosine of every token with one of the directions at a layer."""
    x = at(subject, result, layer)
    return x @ subject.directions[which, layer] / np.maximum(np.linalg.norm(x, axis=1), 1e-30)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_a_gate_switches_from_token_to_token(subject: Subject, lower: bool, below: bool) -> None:
    layer = 0 if lower else subject.middle
    plain = read(subject)
    scores = score(subject, plain, 1, layer)
    value = between(scores)
    gate = subject.gate(1, layer, below=value) if below else subject.gate(1, layer, above=value)
    result = read(subject, subject.steering(0, 0.4).when(gate))
    is_open = scores < value if below else scores > value
    assert (np.diff(is_open.astype(int)) != 0).any() and 0 < is_open.sum() < len(is_open)
    moved = at(subject, result) - at(subject, plain)
    vector = 0.4 * subject.norms[subject.middle] * subject.directions[0, subject.middle]
    rounding = 1e-6 * np.linalg.norm(at(subject, plain), axis=1).max()
    np.testing.assert_allclose(moved[is_open], np.tile(vector, (is_open.sum(), 1)), atol=rounding)
    np.testing.assert_array_equal(moved[~is_open], 0)


def test_a_gate_is_read_before_its_layer_is_steered_and_after_lower_ones(subject: Subject) -> None:
    layer = subject.middle
    plain = read(subject)
    scores = score(subject, plain, 1, layer)
    value = between(scores)
    is_open = scores > value
    # A strong push along the gate's own direction, at its own layer: if it were read afterwards it would be open everywhere.
    push = subject.steering(1, 2.0)
    gated = read(subject, push + subject.steering(0, 0.4).when(subject.gate(1, layer, above=value)))
    moved = (at(subject, gated) - at(subject, read(subject, push))) @ subject.directions[0, layer] / subject.norms[layer]
    np.testing.assert_allclose(moved, 0.4 * is_open, atol=1e-3)
    # The same push one layer down is in the stream when the gate is read.
    term = subject.steering(1, 3.0, 0).terms[0]
    low = Steering((replace(term, directions=np.broadcast_to(term.directions[layer], term.directions.shape)),))
    shifted = read(subject, low)
    expected = score(subject, shifted, 1, layer) > value
    assert expected.sum() > is_open.sum()
    gated = read(subject, low + subject.steering(0, 0.4).when(subject.gate(1, layer, above=value)))
    moved = (at(subject, gated) - at(subject, shifted)) @ subject.directions[0, layer] / subject.norms[layer]
    np.testing.assert_allclose(moved, 0.4 * expected, atol=1e-3)


def test_a_gate_counts_from_its_centre_and_baseline(subject: Subject) -> None:
    layer = subject.middle
    plain = read(subject, prompt=TALK)
    x = at(subject, plain).astype(np.float64)
    centre = x.mean(0)
    cosines = (x - centre) @ subject.directions[1, layer] / np.linalg.norm(x - centre, axis=1)
    mean, deviation = float(cosines.mean()), float(cosines.std())
    z = (cosines - mean) / deviation
    gate = Gate("d1", layer, subject.directions[1, layer], centre.astype(np.float32), mean, deviation, above=-0.5, below=0.8)
    result = read(subject, subject.steering(0, 0.4).when(gate), TALK)
    moved = (at(subject, result) - at(subject, plain)) @ subject.directions[0, layer] / subject.norms[layer]
    clear = np.minimum(abs(z + 0.5), abs(z - 0.8)) > 1e-3
    np.testing.assert_allclose(moved[clear], 0.4 * ((z > -0.5) & (z < 0.8))[clear], atol=1e-3)


def test_opposite_gates_make_up_the_whole(subject: Subject) -> None:
    for make in (lambda s: s, lambda s: s.clamp(0.2), lambda s: s.ablate(), lambda s: s.cap(0.0)):
        whole: Steering = make(subject.steering(0, 0.4 if make(subject.steering(0, 1.0)).terms[0].mode == "add" else 1.0))
        parts = whole.when(subject.gate(1, 0, above=0.01)) + whole.when(subject.gate(1, 0, below=0.01))
        both = read(subject, parts, TALK)
        assert subject.apart(at(subject, both), at(subject, read(subject, whole, TALK))) < subject.tolerance


def test_a_closed_gate_changes_no_bit(subject: Subject) -> None:
    never = subject.gate(1, 0, above=1.5)
    steering = (subject.steering(0, 0.4) + subject.steering(1, 1.0).clamp(0.3) + subject.steering(2, 1.0).cap(0.0)).when(never)
    request = Request(TALK, readouts=(subject.everything,))
    for sampling in (None, GREEDY):
        plain, closed = subject.alone([replace(request, sampling=sampling, steering=s) for s in (Steering(), steering)])
        assert plain.text == closed.text
        np.testing.assert_array_equal(plain.readings[0].values, closed.readings[0].values)


def test_gated_requests_do_not_see_each_other(subject: Subject) -> None:
    """Packed, padded and generated together, each with a gate of its own, some with the same direction."""
    scores = np.sort(score(subject, read(subject), 1, 0))
    values = (scores[1:] + scores[:-1]) / 2  # between what is read: at a limit rounding decides
    prompts = (LONG, "the calm sea", TALK, HELLO, "A")
    requests = [
        Request(
            prompt,
            steering=subject.steering(k % 3, 0.4).when(subject.gate(1 + k % 2, 0, above=float(values[k % len(values)]))),
            readouts=(subject.everything,),
            sampling=GREEDY if k % 2 else None,
        )
        for k, prompt in enumerate(prompts * 2)
    ]
    for together, alone in zip(subject.run(*requests), subject.alone(requests), strict=True):
        subject.assert_same(together, alone)


# ── beginnings that are shared ──


def alike(subject: Subject) -> tuple[list[Request], list[Request]]:
    """Texts that begin alike, behind gates and schedules that do not: all of them steered from the middle on, and others."""
    middle, option, own = subject.middle, Where(role="user", text="the calm sea"), Where(role="user", last=3)
    chats: list[Chat] = [
        (("system", "You answer every question with one letter."), ("user", f"Is it (A) the calm sea or (B) {end}"))
        for end in ("a boat", "a boat with a sail", "rain")
    ]
    plain = read(subject, prompt=chats[1])
    low, high = (between(score(subject, plain, 1, layer)) for layer in (0, middle))
    above, below = subject.gate(1, 0, above=low), subject.gate(1, 0, below=low)
    here, push, other = subject.gate(1, middle, above=high), subject.steering(0, 0.4), subject.steering(2, 0.3)
    held = (subject.steering(0, 1.0) + subject.steering(1, 1.0)).clamp(0.3)
    above_middle = [
        Steering(),
        push.when(above),
        push.when(below),  # the same tokens, at which the other one is open
        push.when(here),
        push.at(option).when(above) + other.at(own),
        other.at(own) + push.at(option).when(below) + push.at(own).when(here),
        held.when(above),
        held.at(own).when(below) + push,
        subject.steering(1, 1.0).cap(0.0).when(here) + push.at(option),
        push.at(option) + push,  # equal terms, together at some tokens and alone at others
        push + push,
        push.ramp(3),
        push.decay(3),
        push.when(above).decay(3) + other.at(Where("response", after=1)),
        0.0 * push.when(above) + push,
    ]
    first = subject.steering(2, 0.3, 0)
    anywhere = [
        first.at(own) + push.when(here),
        first.at(option) + push.when(above),
        first.when(above) + push.when(here),
        first.ramp(2).when(below) + held.when(here),
    ]

    def asked(steerings: list[Steering]) -> list[Request]:
        return [
            Request(chat, prefill=given, steering=steering, readouts=(subject.everything,), choices=choices)
            for steering in steerings
            for chat, given, choices in zip(chats, ("(", "(A) calm", "("), (("A", " no way"), (), ("A", "B")), strict=True)
        ]

    # Equal tokens, of which the reply begins at another one each: the shares of a schedule differ.
    words = re.findall(" [a-zA-Z]+", " calm sea was blue and cold and wide and I had no boat")
    begun = [
        Request("the" + "".join(words[:n]), prefill="".join(words[n:]), steering=s, readouts=(subject.everything,))
        for s in (push.ramp(4), push.decay(4), push.at(Where("response")).when(above), push.at(Where("prompt")).decay(2))
        for n in (2, 3, 4, 9)
    ]
    return [*asked(above_middle), *begun], asked(anywhere)


def test_what_begins_alike_is_steered_as_alone(subject: Subject) -> None:
    """Steered, gated and untouched together: gates below the layer where the first thing is done, at it and above it."""
    upper, lower = alike(subject)
    requests = [*upper, *lower]
    wanted = subject.alone(requests)
    for order in (range(len(upper)), range(len(requests))[::-1]):
        for n, together in zip(order, subject.run(*(requests[n] for n in order)), strict=True):
            subject.assert_same(together, wanted[n])


# ── schedules ──


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (lambda s: s.ramp(4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (lambda s: s.decay(4), [1, 1, 0.75, 0.5, 0.25, 0]),
        (lambda s: s.ramp(1), [0, 1, 1, 1, 1, 1]),
        (lambda s: s.at(Where("response")).decay(2), [0, 1, 0.5, 0, 0, 0]),
    ],
)
def test_a_schedule_counts_the_tokens_of_the_reply(
    subject: Subject, make: Callable[[Steering], Steering], shares: list[float]
) -> None:
    given = "one two three four five six seven"
    d, norm = subject.directions[0, subject.middle], subject.norms[subject.middle]
    for prompt in (HELLO, "the calm sea"):
        plain = read(subject, prompt=prompt, prefill=given)
        steered = read(subject, make(subject.steering(0, 0.4)), prompt, prefill=given)
        moved = (at(subject, steered) - at(subject, plain)) @ d / norm
        number = np.clip(plain.readings[0].positions - plain.layout.n_prompt, -1, 4)
        np.testing.assert_allclose(moved, 0.4 * np.array(shares)[number + 1], atol=2e-3)


def test_the_first_generated_token_has_the_first_share(subject: Subject) -> None:
    d, norm = subject.directions[0, subject.middle], subject.norms[subject.middle]
    reply = Readout((subject.middle,), Where("response", first=1), "none")
    for prompt in (HELLO, "the calm sea"):
        request = Request(prompt, sampling=GREEDY, readouts=(reply,))
        steering = subject.steering(0, 0.4, where=Where("response"))
        plain, ramp, decay = subject.run(request, *(replace(request, steering=s) for s in (steering.ramp(4), steering.decay(4))))
        assert plain.layout.ids[plain.layout.n_prompt] == ramp.layout.ids[ramp.layout.n_prompt]
        for result, share in ((ramp, 0.25), (decay, 1.0)):
            moved = (result.readings[0].values[0, 0] - plain.readings[0].values[0, 0]) @ d
            assert moved == pytest.approx(0.4 * share * norm, rel=2e-3)


# ── as data, and what it costs ──


def test_a_steering_that_travelled_as_json_does_the_same(subject: Subject) -> None:
    steering = (
        subject.steering(0, 0.3, 0, subject.middle).at(Where("response", after=1, first=3)).decay(3)
        + subject.steering(1, 1.0).cap(0.1).when(subject.gate(2, 0, above=0.01))
        + subject.steering(2, 1.0).at(Where(role="user", turn=-1)).clamp(-0.1)
    )
    again = Steering.from_json(steering.to_json())
    assert again == steering and hash(again) == hash(steering) and again.to_json() == steering.to_json()
    request = Request(TALK, readouts=(subject.everything,), sampling=GREEDY, steering=steering)
    one, other = subject.alone([request, replace(request, steering=again)])
    assert one.text == other.text and request.key() == replace(request, steering=again).key()
    np.testing.assert_array_equal(one.readings[0].values, other.readings[0].values)


def test_tensors_are_made_once_and_not_for_every_token(subject: Subject, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from affectlens.engines.changes import Plan

    made: list[int] = []
    over = Plan.over
    monkeypatch.setattr(Plan, "over", lambda self, *args: made.append(1) or over(self, *args))
    long = Sampling(max_tokens=8, temperature=1.0, top_k=0, seed=1)
    for steering, passes in (
        (Steering(), 1),
        (subject.steering(0, 0.1), 2),
        (subject.steering(0, 0.1).when(subject.gate(1, 0)), 2),
        (subject.steering(0, 0.1).decay(3), 5),
    ):
        made.clear()
        result = subject.run(Request("the calm sea", sampling=long, steering=steering))[0]
        assert len(made) <= passes, (steering, result.text)
