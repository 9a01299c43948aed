"""The contract of :class:`affectlens.engine.Engine`, checked on every backend.

A backend that passes can be put under everything above the seam. Each test states one sentence of the contract; what they need to
know about an engine is in ``conftest.Subject``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from affectlens.engine import Chat, Engine, Gate, Readout, Request, Result, Sampling, Steering, Where, open_engine, transcript
from affectlens.errors import AffectlensError, EngineError, MismatchError

HELLO: Chat = (("user", "Hello there"),)
TALK: Chat = (("system", "Be brief."), ("user", "I lost my keys."), ("assistant", "Oh no."), ("user", "Help me!"))
PROMPTS = ("the calm sea", "A", "She slammed the door and shouted at everyone.", HELLO, TALK)
GREEDY = Sampling(max_tokens=4, temperature=0)
SAMPLED = Sampling(max_tokens=4, seed=3)

Subject = Any  # conftest.Subject; importing a conftest would load it twice


def response(result: Result) -> list[int]:
    """The ids of the reply, a prefill included."""
    return list(result.layout.ids[result.layout.n_prompt :])


def selected(subject: Subject, prompt: str | Chat, where: Where, **kwargs: Any) -> str:
    """The text of the tokens that ``where`` selects, as one string; the engine's reading must agree with the layout."""
    result = subject.run(Request(prompt, readouts=(Readout((0,), where, "none"),), **kwargs))[0]
    positions = result.readings[0].positions
    np.testing.assert_array_equal(positions, np.flatnonzero(where.mask(result.layout)))
    assert result.readings[0].values.shape == (1, len(positions), subject.engine.info.width)
    return "".join(result.layout.tokens[i] for i in positions)


def replayed(subject: Subject, request: Request) -> Iterator[tuple[Result, Result]]:
    """Generate, then read what came out as a finished text; only texts that come back as the same tokens are comparable."""
    seeds = range(40)
    samplings = [Sampling(max_tokens=3, seed=seed) for seed in seeds]
    drafts = subject.run(*(replace(request, sampling=s, readouts=()) for s in samplings))
    usable = [s for s, d in zip(samplings, drafts, strict=True) if d.text and ids_of(subject, d.text) == response(d)]
    assert usable, "no text came back as the same tokens: use other seeds"
    for result in subject.run(*(replace(request, sampling=s) for s in usable[:2])):
        yield result, subject.run(replace(request, prefill=result.text))[0]


def one_line(error: pytest.ExceptionInfo[AffectlensError]) -> None:
    assert len(str(error.value).splitlines()) == 1


# ── alone or together ──


def mixed(subject: Subject) -> list[Request]:
    """Reading, scoring and generating, plain and steered each in its own way, short and long: one of everything."""
    steer, middle = subject.steering, subject.middle
    steerings = [
        Steering(),
        steer(0, 0.4),
        steer(1, -0.3, 0, middle) + steer(2, 0.2, where=Where("prompt")),
        steer(2, 1.0).ablate(),
        (steer(0, 1.0) + steer(1, 1.0)).clamp(0.3),
        steer(1, 0.5, where=Where(last=2)),
        steer(0, 0.0),
        steer(0, 0.4, middle, where=Where("response", after=1, first=1)) + steer(1, 0.3).decay(3),
        steer(0, 0.4).when(subject.gate(1, 0, above=0.0)) - steer(2, 0.3).when(subject.gate(2, middle, below=0.0)),
        steer(0, 1.0).cap(0.05) + steer(1, 1.0).floor(0.02).ramp(3) + steer(2, 1.0).clamp(-0.1).at(Where(role="user", turn=-1)),
    ]
    requests = []
    for i, steering in enumerate(steerings):
        for j, prompt in list(enumerate(PROMPTS))[i % 2 :: 2]:
            kind = (i + j // 2) % 3
            requests.append(
                Request(
                    prompt,
                    prefill=" I" if j == 3 else "",
                    sampling=(None, GREEDY, replace(SAMPLED, seed=i))[kind],
                    steering=steering,
                    readouts=(subject.everything, Readout((middle,), Where(after=1), "mean"))[: 1 + j % 2],
                    choices=("A", " the sea", " no") if kind == 0 else (),
                )
            )
    return requests


def test_a_batch_gives_what_each_request_gives_alone_in_order(subject: Subject) -> None:
    requests = mixed(subject)
    for request, together, alone in zip(requests, subject.run(*requests), subject.alone(requests), strict=True):
        assert together.done and (together.finish == "read") == (request.sampling is None)
        subject.assert_same(together, alone)


def test_small_batches_give_the_same(subject: Subject, hf: Any) -> None:
    requests = mixed(subject)[::2]
    before = hf.token_budget
    whole = subject.run(*requests)
    try:
        hf.token_budget = 40
        parts = subject.run(*requests)
    finally:
        hf.token_budget = before
    for a, b in zip(parts, whole, strict=True):
        subject.assert_same(a, b)


def test_choices_of_one_request_may_fall_into_different_batches(subject: Subject) -> None:
    prompts = [f"{'the sea ' * (k % 7)}was calm" for k in range(14)]
    readouts = (Readout((0, subject.middle)),)
    requests = [Request(p, choices=(" and", " and the sea"), readouts=readouts) for p in prompts]
    if hasattr(subject.engine, "token_budget"):
        before, subject.engine.token_budget = subject.engine.token_budget, 100
    together = subject.run(*requests)
    if hasattr(subject.engine, "token_budget"):
        subject.engine.token_budget = before
    for request, result in zip(requests[:7], together, strict=False):
        subject.assert_same(result, subject.run(request)[0])


def beginning_alike(subject: Subject) -> list[Request]:
    """Questions with one system prompt and one first option, steered in what they share, behind it, everywhere, or not at all."""
    steer, middle = subject.steering, subject.middle
    option, own = Where(role="user", text="the calm sea"), Where(role="user", last=3)
    steerings = [
        Steering(),
        steer(0, 0.4, where=option),
        steer(0, 0.4, where=own),
        steer(0, 0.4, where=option) + steer(0, 0.4, where=own),
        steer(0, 0.4, where=own) + steer(1, 0.2, 0, middle, where=option),
        steer(1, -0.3, 0, middle),
        steer(2, 1.0).ablate().at(own) + steer(0, 0.2, where=option),
        (steer(0, 1.0) + steer(1, 1.0)).clamp(0.3).at(own),
        steer(0, 0.0),
    ]
    requests = []
    for i, steering in enumerate(steerings):
        for j, end in enumerate(("a boat", "a boat with a sail", "rain")):
            chat = (("system", "You answer every question with one letter."), ("user", f"Is it (A) the calm sea or (B) {end}"))
            readouts = (subject.everything, Readout((middle,), own, "mean"), Readout((-1, 0), Where("prompt", last=1), "last"))
            choices = ((), ("A", "B"), ("A", " no way"))[(i + j) % 3]
            reply = "(" if choices else ""
            requests.append(
                Request(chat, prefill=reply, steering=steering, readouts=readouts[: (i + 2 * j) % 4], choices=choices)
            )
    return requests


def test_what_begins_alike_gives_what_it_gives_alone(subject: Subject) -> None:
    requests = beginning_alike(subject)
    alone = subject.alone(requests)
    for together in (subject.run(*requests), subject.run(*requests[::-1])[::-1]):
        for one, other in zip(together, alone, strict=True):
            subject.assert_same(one, other)


def test_what_begins_alike_mixes_with_everything_else(subject: Subject, hf: Any) -> None:
    """In batches that are too small for all of it, and with shared beginnings, or only shared lower blocks, switched off."""
    alike, others = beginning_alike(subject)[::2], mixed(subject)[::3]
    requests = [*alike, *others]
    requests = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    wanted = subject.alone(requests)
    before = (hf.token_budget, hf.share_limit, hf.can_fork)
    try:
        for settings in (before, (150, *before[1:]), (*before[:2], False), (before[0], 0, False)):
            hf.token_budget, hf.share_limit, hf.can_fork = settings
            for one, other in zip(subject.run(*requests), wanted, strict=True):
                subject.assert_same(one, other)
    finally:
        hf.token_budget, hf.share_limit, hf.can_fork = before


def test_runs_are_deterministic(subject: Subject) -> None:
    requests = mixed(subject)[1::3]
    for a, b in zip(subject.run(*requests), subject.run(*requests), strict=True):
        assert (a.text, a.layout, a.choice_logprobs) == (b.text, b.layout, b.choice_logprobs)
        for x, y in zip(a.readings, b.readings, strict=True):
            np.testing.assert_array_equal(x.values, y.values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(subject: Subject, hf: Any, side: str) -> None:
    requests = [Request(p, sampling=s, readouts=(subject.everything,)) for p in PROMPTS for s in (None, GREEDY)]
    before, whole = hf.tokenizer.padding_side, subject.run(*requests)
    try:
        hf.tokenizer.padding_side = side
        for a, b in zip(subject.run(*requests), whole, strict=True):
            subject.assert_same(a, b)
    finally:
        hf.tokenizer.padding_side = before


def test_run_is_lazy(subject: Subject) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Request("A", readouts=(Readout((0,)),))

    assert len(list(itertools.islice(subject.engine.run(endless()), 3))) == 3
    assert drawn <= 4096
    assert subject.run() == []


# ── layouts ──


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_layout_describes_its_text(subject: Subject, prompt: str | Chat) -> None:
    result = subject.run(Request(prompt, sampling=SAMPLED, prefill=" I am"))[0]
    layout = result.layout
    assert len(layout.tokens) == len(layout.ids) == len(layout.offsets) == len(layout.roles) == len(layout)
    assert [layout.text[a:b] for a, b in layout.offsets] == list(layout.tokens)
    assert all(a <= b <= c <= d for (a, b), (c, d) in itertools.pairwise(layout.offsets))
    assert layout.text.endswith(" I am" + result.text)
    assert set(layout.roles[layout.n_prompt :]) == {"assistant"}
    if isinstance(prompt, str):
        assert set(layout.roles[: layout.n_prompt]) <= {"text", "special"}
        assert layout.text == prompt + " I am" + result.text
    else:
        assert layout.roles[layout.n_prompt - 1] == "template"
        assert set(layout.roles) - {"special"} == {"template", "assistant", *(role for role, _ in prompt)}


def test_parts_and_roles(subject: Subject) -> None:
    assert selected(subject, TALK, Where(role="system")).strip() == "Be brief."
    assert selected(subject, TALK, Where(role="user")).replace(" ", "") == "Ilostmykeys.Helpme!"
    assert selected(subject, TALK, Where(role="assistant"), prefill="Sure").replace(" ", "") == "Ohno.Sure"
    assert selected(subject, TALK, Where("prompt", role="assistant"), prefill="Sure").strip() == "Oh no."
    assert selected(subject, TALK, Where("response"), prefill="Sure") == "Sure"
    assert selected(subject, "the calm sea", Where("response")) == ""
    assert selected(subject, "the calm sea", Where(role="text")) == "the calm sea"
    assert selected(subject, "the calm sea", Where(role="user")) == ""


def test_a_beginning_of_sequence_token_is_never_selected(subject: Subject) -> None:
    """The first token of a plain text is its own; a large-norm sink before it would spoil every mean."""
    for prompt in ("the calm sea", HELLO):
        result = subject.run(Request(prompt, readouts=(subject.everything,)))[0]
        special = [i for i, role in enumerate(result.layout.roles) if role == "special"]
        assert not set(special) & set(result.readings[0].positions.tolist())
        assert len(result.readings[0].positions) == len(result.layout) - len(special)
    assert selected(subject, "the calm sea", Where()) == "the calm sea"


def test_text_after_and_last(subject: Subject) -> None:
    text = "one calm day, one calm sea"
    tokens = [t for t in subject.run(Request(text))[0].layout.tokens if t]
    assert selected(subject, text, Where(after=2)) == "".join(tokens[2:])
    assert selected(subject, text, Where(last=2)) == "".join(tokens[-2:])
    assert selected(subject, text, Where(after=1, last=1)) == tokens[-1]
    assert selected(subject, text, Where(after=len(tokens))) == ""
    assert selected(subject, text, Where(text="calm")).replace(" ", "") == "calmcalm"
    assert selected(subject, text, Where(text="calm", last=1)).strip() in ("calm", "m")
    assert selected(subject, text, Where(text="storm")) == ""
    assert selected(subject, TALK, Where(role="user", text="keys")).strip() == "keys"


def test_the_reply_position_is_the_last_template_token(subject: Subject) -> None:
    reply = Where("prompt", last=1)
    plain = subject.run(Request(HELLO, readouts=(Readout((0,), reply, "none"),)))[0]
    assert plain.readings[0].positions.tolist() == [plain.layout.n_prompt - 1] == [len(plain.layout) - 1]
    filled = subject.run(Request(HELLO, prefill="Sure", readouts=(Readout((0,), reply, "none"),)))[0]
    assert filled.readings[0].positions.tolist() == plain.readings[0].positions.tolist()
    assert subject.apart(filled.readings[0].values, plain.readings[0].values) < subject.tolerance


def test_a_finished_chat_has_its_reply_in_it(subject: Subject) -> None:
    before = subject.run(Request(HELLO))[0].layout
    done: Chat = (*HELLO, ("assistant", "Good day!"))
    after = subject.run(Request(done))[0].layout
    assert after.n_prompt == before.n_prompt
    assert after.ids[: after.n_prompt] == before.ids
    assert selected(subject, done, Where("response", role="assistant")).strip() == "Good day!"
    with pytest.raises(EngineError) as error:
        subject.run(Request(done, sampling=GREEDY))
    one_line(error)


@pytest.mark.parametrize(
    "chat",
    [
        (("user", "user"),),
        (("user", "a"),),
        (("user", "assistant"), ("assistant", "user"), ("user", "s")),
        (("system", "e"), ("user", "system"), ("assistant", "a"), ("user", "t")),
    ],
)
def test_messages_that_also_occur_in_the_template_are_found(subject: Subject, chat: Chat) -> None:
    layout = subject.run(Request(chat))[0].layout
    turns, starts = [], []
    for role, group in itertools.groupby(range(len(layout)), key=lambda i: layout.roles[i]):
        if role not in ("template", "special"):
            tokens = list(group)
            starts.append(layout.offsets[tokens[0]][0])
            turns.append((role, "".join(layout.tokens[i] for i in tokens).strip()))
    assert turns == list(chat)
    # Each message stands after its own header, and not in it.
    for (role, _), start in zip(chat, starts, strict=True):
        assert layout.text[:start].rstrip().removesuffix(":").endswith(role)


# ── readouts ──


def test_pools_are_reductions_of_every_token(subject: Subject) -> None:
    layers = (0, subject.middle, -1)
    for where in (Where(), Where(after=1), Where(last=2)):
        readouts = [Readout(layers, where, pool) for pool in ("none", "mean", "last", "norm")]
        for prompt in PROMPTS[2:]:
            every, mean, last, norm = subject.run(Request(prompt, readouts=tuple(readouts)))[0].readings
            assert all(r.values.dtype == r.norms.dtype == np.float32 for r in (every, mean, last, norm))
            norms = np.linalg.norm(every.values, axis=-1)
            np.testing.assert_allclose(every.norms, norms, rtol=1e-4)
            np.testing.assert_allclose(norm.values, norms.mean(1), rtol=1e-4)
            np.testing.assert_allclose(norm.norms, norm.values)
            assert subject.apart(mean.values, every.values.mean(1)) < subject.tolerance
            np.testing.assert_allclose(mean.norms, np.linalg.norm(mean.values, axis=-1), rtol=1e-4)
            assert subject.apart(last.values, every.values[:, -1]) < subject.tolerance
            np.testing.assert_allclose(last.norms, norms[:, -1], rtol=1e-4)
            for reading in (mean, last, norm):
                np.testing.assert_array_equal(reading.positions, every.positions)


def test_onto_gives_dot_products_and_norms_give_cosines(subject: Subject) -> None:
    layers = (0, subject.middle)
    onto = subject.directions[:, list(layers)].swapaxes(0, 1)
    for sampling in (None, GREEDY):
        for pool in ("none", "mean", "last"):
            readouts = (Readout(layers, pool=pool), Readout(layers, pool=pool, onto=onto))
            whole, dots = subject.run(Request(TALK, sampling=sampling, readouts=readouts))[0].readings
            expected = np.einsum("l...d,lkd->l...k", whole.values, onto)
            assert dots.values.dtype == np.float32
            np.testing.assert_allclose(dots.values, expected, atol=subject.tolerance * float(whole.norms.max()))
            np.testing.assert_allclose(dots.norms, np.linalg.norm(whole.values, axis=-1), rtol=1e-4)
            assert np.all(np.abs(dots.values / dots.norms[..., None]) <= 1)


def test_nothing_selected_reads_nan_or_no_tokens(subject: Subject) -> None:
    nothing = Where(text="there is no such text")
    onto = subject.directions[:, :1].swapaxes(0, 1)
    width = subject.engine.info.width
    readouts = [Readout((0,), nothing, pool) for pool in ("none", "mean", "last", "norm")]
    readouts.append(Readout((0,), nothing, "mean", onto))
    shapes = [(1, 0, width), (1, width), (1, width), (1,), (1, 3)]
    # Beside a request that does select something, and when a reply is generated.
    other = Request("the calm sea", readouts=(Readout((0,)),))
    for sampling in (None, GREEDY):
        result = subject.run(other, Request("A", sampling=sampling, readouts=tuple(readouts)), other)[1]
        for reading, shape in zip(result.readings, shapes, strict=True):
            assert reading.values.shape == shape
            assert np.isnan(reading.values).all()
            assert len(reading.positions) == 0


def test_layer_minus_one_is_the_embedding(subject: Subject) -> None:
    """It enters block 0: no steering reaches it, and no context."""
    readout = Readout((-1,), Where(), "none")
    plain = subject.values(Request("the calm sea", readouts=(readout,)))
    steered = subject.values(Request("the calm sea", readouts=(readout,), steering=subject.steering(0, 1.0, 0)))
    np.testing.assert_array_equal(plain, steered)
    other = subject.values(Request("she, calm sea", readouts=(readout,)))
    assert subject.apart(other[:, -1], plain[:, -1]) < subject.tolerance or subject.name.endswith("gpt2")  # learned positions
    deep = subject.values(Request("the calm sea", readouts=(Readout((-1, 0), Where(), "none"),)))
    assert subject.apart(deep[:1], plain) < subject.tolerance
    assert subject.apart(deep[1:], plain) > 0.01


def test_readings_are_the_models_hidden_states(subject: Subject, hf: Any) -> None:
    """An independent oracle; the last layer is left out because transformers shows it after the final norm."""
    import torch

    for prompt in PROMPTS:
        result = subject.run(Request(prompt, readouts=(subject.everything,)))[0]
        with torch.no_grad():
            states = hf.model(torch.tensor([result.layout.ids]), output_hidden_states=True).hidden_states
        for row, layer in enumerate(subject.layers[:-1]):
            expected = states[layer + 1][0, result.readings[0].positions].numpy()
            assert subject.apart(result.readings[0].values[row], expected) < subject.tolerance


# ── steering ──


def everywhere(subject: Subject, steering: Steering, prompt: str | Chat = "the calm sea") -> np.ndarray:
    return subject.values(Request(prompt, readouts=(subject.everything,), steering=steering))


def test_strength_zero_is_bit_identical_to_no_steering(subject: Subject) -> None:
    zeros = (subject.steering(0, 0.0), 0.0 * subject.steering(0, 1.0), subject.steering(0, 0.0).ablate())
    for sampling, steerings in ((None, zeros), (SAMPLED, zeros[:1])):
        request = Request(TALK, sampling=sampling, readouts=(subject.everything,))
        plain = subject.run(request)[0]
        for zero in steerings:
            assert zero.layers == () and zero.at_layer(subject.middle) == ([], None)
            steered = subject.run(replace(request, steering=zero))[0]
            assert plain.text == steered.text
            np.testing.assert_array_equal(plain.readings[0].values, steered.readings[0].values)


def test_steering_leaves_nothing_behind(subject: Subject) -> None:
    plain = Request(TALK, sampling=SAMPLED, readouts=(subject.everything,))
    first, steered, last = subject.alone([plain, replace(plain, steering=subject.steering(0, 0.8)), plain])
    assert first.text == last.text
    np.testing.assert_array_equal(first.readings[0].values, last.readings[0].values)
    assert not np.array_equal(first.readings[0].values[-1, :3], steered.readings[0].values[-1, :3])


@pytest.mark.parametrize("where", [Where(), Where(after=1), Where(role="user"), Where(text="keys"), Where(last=1)])
def test_a_reading_at_the_steered_layer_moves_by_what_was_added(subject: Subject, where: Where) -> None:
    layer, row = subject.middle, subject.middle + 1
    request = Request(TALK, readouts=(subject.everything,))
    plain = subject.run(request)[0]
    steered = everywhere(subject, subject.steering(1, 0.4, where=where), TALK)
    before = plain.readings[0].values
    mask = where.mask(plain.layout)[plain.readings[0].positions]
    vector = 0.4 * subject.norms[layer] * subject.directions[1, layer]
    moved = steered[row] - before[row]
    rounding = 1e-6 * np.linalg.norm(before[row], axis=-1).max()
    np.testing.assert_allclose(moved[mask], np.tile(vector, (mask.sum(), 1)), atol=rounding)
    np.testing.assert_array_equal(steered[row, ~mask], before[row, ~mask])
    np.testing.assert_array_equal(steered[:row], before[:row])
    # A residual stream: what is added at a layer is still there in the next one.
    assert ((steered[row + 1] - before[row + 1])[mask] @ subject.directions[1, layer]).min() > 0


def test_negative_strength_mirrors(subject: Subject) -> None:
    row = subject.middle + 1
    plain, up, down = (everywhere(subject, subject.steering(0, s))[row] for s in (0.0, 0.4, -0.4))
    np.testing.assert_allclose(up - plain, plain - down, atol=1e-6 * np.linalg.norm(plain, axis=-1).max())


def test_mixtures_add_up(subject: Subject) -> None:
    layer, row = subject.middle, subject.middle + 1
    mix = 0.3 * subject.steering(0, 1.0) - 0.2 * subject.steering(1, 1.0) + subject.steering(2, 0.5, where=Where(last=1))
    plain, steered = everywhere(subject, Steering())[row], everywhere(subject, mix)[row]
    d = subject.directions[:, layer] * subject.norms[layer]
    expected = plain + 0.3 * d[0] - 0.2 * d[1]
    expected[-1] += 0.5 * d[2]
    assert subject.apart(steered, expected) < 1e-5


def test_layers_share_the_total(subject: Subject) -> None:
    low, high = 0, subject.middle
    both = everywhere(subject, subject.steering(0, 0.6).on(low, high))
    first = everywhere(subject, subject.steering(0, 0.3).on(low))
    assert subject.apart(both[low + 1], first[low + 1]) < subject.tolerance
    added = 0.3 * subject.norms[high] * subject.directions[0, high]
    assert subject.apart(both[high + 1], first[high + 1] + added) < subject.tolerance


def test_ablation_leaves_no_component(subject: Subject) -> None:
    layer, row = subject.middle, subject.middle + 1
    d = subject.directions[:, layer]
    plain = everywhere(subject, Steering())[row]
    size = np.linalg.norm(plain, axis=-1).max()
    single = everywhere(subject, subject.steering(0, 1.0).ablate())[row]
    np.testing.assert_allclose(single @ d[0], 0, atol=1e-5 * size)
    assert subject.apart(single, plain - np.outer(plain @ d[0], d[0])) < 1e-5
    joint = everywhere(subject, (subject.steering(0, 1.0) + subject.steering(1, 1.0)).ablate())[row]
    np.testing.assert_allclose(joint @ d[:2].T, 0, atol=1e-5 * size)
    half = everywhere(subject, (0.5 * subject.steering(0, 1.0).ablate()))[row]
    np.testing.assert_allclose(half @ d[0], 0.5 * plain @ d[0], atol=1e-5 * size)


def test_clamp_holds_values_of_directions_that_are_not_orthogonal(subject: Subject) -> None:
    layer, row = subject.middle, subject.middle + 1
    d, norm = subject.directions[:, layer], subject.norms[layer]
    assert abs(d[0] @ d[1]) > 0.2
    held = subject.steering(0, 1.0).clamp(0.4) + subject.steering(1, 1.0).clamp(-0.1)
    for steering in (held, held + subject.steering(2, 0.5)):  # additions come first and are clamped too
        values = everywhere(subject, steering)[row]
        expected = np.tile([0.4 * norm, -0.1 * norm], (len(values), 1))
        np.testing.assert_allclose(values @ d[:2].T, expected, atol=1e-4 * float(norm))
    zero = everywhere(subject, subject.steering(0, 1.0).clamp(0.0))[row]
    np.testing.assert_allclose(zero @ d[0], 0, atol=1e-4 * float(norm))


def test_nothing_changes_before_the_steered_words(subject: Subject) -> None:
    text = "the calm sea and the storm"
    plain = subject.run(Request(text, readouts=(subject.everything,)))[0]
    where = Where(text="and")
    chosen = np.flatnonzero(where.mask(plain.layout)[plain.readings[0].positions])
    first, after = chosen[0], chosen[-1] + 1
    steered = everywhere(subject, subject.steering(0, 1.0, where=where), text)
    assert subject.apart(steered[:, :first], plain.readings[0].values[:, :first]) < 1e-5
    assert subject.apart(steered[:, first:], plain.readings[0].values[:, first:]) > 0.01
    # And the words after see it through the context, at deeper layers.
    assert subject.apart(steered[-1:, after], plain.readings[0].values[-1:, after]) > 1e-5


def test_steering_the_response_leaves_the_prompt_alone(subject: Subject) -> None:
    prompt_and_reply = (Readout(subject.layers, Where("prompt"), "none"), Readout((subject.middle,), Where("response"), "none"))
    request = Request(HELLO, sampling=GREEDY, readouts=prompt_and_reply)
    plain = subject.run(request)[0]
    steered = subject.run(replace(request, steering=subject.steering(0, 0.5, where=Where("response"))))[0]
    np.testing.assert_array_equal(plain.readings[0].values, steered.readings[0].values)
    d = subject.directions[0, subject.middle]
    # The first token is drawn before anything is steered; from then on the residual is another.
    assert response(plain)[0] == response(steered)[0]
    moved = (steered.readings[1].values[0, 0] - plain.readings[1].values[0, 0]) @ d
    assert moved == pytest.approx(0.5 * subject.norms[subject.middle], rel=1e-3)


def test_steering_reaches_generated_words(subject: Subject) -> None:
    """Strong enough steering changes what is said, wherever it applies."""
    for where in (Where(), Where("response"), Where("prompt")):
        steerings = [Steering(), *(subject.steering(k, 4.0, where=where) for k in range(3))]
        results = subject.run(*(Request(HELLO, sampling=GREEDY, steering=s) for s in steerings))
        assert len({tuple(response(result)) for result in results}) > 1


# ── generating ──


@pytest.mark.parametrize(
    "where",
    [
        None,
        Where(),
        Where("prompt"),
        Where("response"),
        Where("response", after=1),
        Where("response", first=1),
        Where("response", after=1, first=1),
        Where(after=2),
        Where(role="assistant"),
        Where(turn=-1),
        Where("prompt", turn=-1),
    ],
    ids=str,
)
def test_reading_while_generating_equals_reading_the_finished_text(subject: Subject, where: Where | None) -> None:
    """Left-padded with a cache, or all at once: also when steered, and for tokens that are steered only from some point on."""
    steering = subject.steering(0, 0.3, where=where) if where else Steering()
    pools = [Readout((0, subject.middle, -1), where or Where("response"), pool) for pool in ("none", "mean", "last", "norm")]
    for prompt in ("the calm sea", HELLO):
        request = Request(prompt, steering=steering, readouts=(subject.everything, *pools))
        for generated, read in replayed(subject, request):
            for name in ("ids", "text", "roles", "n_prompt"):
                assert getattr(generated.layout, name) == getattr(read.layout, name)
            for a, b in zip(generated.readings, read.readings, strict=True):
                np.testing.assert_array_equal(a.positions, b.positions)
                assert a.values.shape == b.values.shape
                if a.values.ndim > 1:
                    assert subject.apart(a.values, b.values) < 3 * subject.tolerance
                np.testing.assert_allclose(a.norms, b.norms, rtol=3 * subject.tolerance)


@pytest.mark.parametrize("kind", ["ramp", "decay", "gate", "limits"])
def test_steering_that_changes_along_the_reply_is_the_same_with_a_cache(subject: Subject, kind: str) -> None:
    """Every generated token gets its own share, once: the finished text, read in one go, says what that share is."""
    middle = subject.middle
    steering = {
        "ramp": subject.steering(0, 0.5).ramp(3),
        "decay": subject.steering(0, 0.5, 0, middle).decay(2),
        "gate": subject.steering(0, 0.5).when(subject.gate(1, 0, above=0.0)),
        "limits": subject.steering(0, 1.0).cap(0.0) + subject.steering(1, 1.0).floor(0.1) + subject.steering(2, 1.0).ablate(),
    }[kind]
    for prompt in ("the calm sea", HELLO):
        for generated, read in replayed(subject, Request(prompt, steering=steering, readouts=(subject.everything,))):
            assert generated.layout.ids == read.layout.ids
            assert subject.apart(generated.readings[0].values, read.readings[0].values) < 3 * subject.tolerance


def test_a_prefill_belongs_to_the_response(subject: Subject) -> None:
    for prompt in ("the calm sea", HELLO):
        plain = subject.run(Request(prompt))[0].layout
        result = subject.run(Request(prompt, prefill=" was blue", sampling=GREEDY))[0]
        assert result.layout.n_prompt == plain.n_prompt
        assert result.layout.ids[: plain.n_prompt] == plain.ids
        assert not result.text.startswith(" was blue")
        assert result.layout.text == plain.text + " was blue" + result.text
        # And the reply goes on from there.
        first = response(result)[len(ids_of(subject, " was blue")) :][:1]
        assert first in ([], [int(next_logits(subject, Request(prompt, prefill=" was blue")).argmax())])


def test_a_seed_belongs_to_its_request(subject: Subject) -> None:
    requests = [Request(PROMPTS[i % 4], sampling=Sampling(max_tokens=4, seed=i // 4)) for i in range(12)]
    together = [response(r) for r in subject.run(*requests)]
    assert [response(r) for r in subject.run(*reversed(requests))] == together[::-1]
    assert [response(r) for r in subject.alone(requests[:4])] == together[:4]
    assert len({tuple(ids) for ids in together[::4]}) > 1


def test_greedy_is_top_k_one(subject: Subject) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 9}, {"temperature": 1, "top_k": 1}, {"temperature": 1, "top_p": 1e-6}]
    variants = [replace(GREEDY, **change) for change in changes]
    replies = [response(r) for r in subject.run(*(Request(HELLO, sampling=s) for s in variants))]
    assert all(reply == replies[0] for reply in replies)


def test_top_k_draws_from_the_likeliest_tokens(subject: Subject) -> None:
    logits = next_logits(subject, Request(HELLO))
    likely = set(np.argsort(-logits)[:5].tolist())
    sampling = Sampling(max_tokens=1, temperature=3.0, top_k=3)
    drawn = [response(r) for r in subject.run(*(Request(HELLO, sampling=replace(sampling, seed=s)) for s in range(16)))]
    assert {i for ids in drawn for i in ids} <= likely
    assert len({tuple(ids) for ids in drawn}) > 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_models_distribution(subject: Subject, temperature: float) -> None:
    """The mean log-probability of many first tokens is minus the entropy, within five standard errors."""
    logits = next_logits(subject, Request("A")) / temperature
    logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    p = np.exp(logprobs)
    n = 200 if subject.engine.info.n_parameters < 1e7 else 48
    results = subject.run(*(Request("A", sampling=Sampling(1, temperature, seed=s)) for s in range(n)))
    drawn = [logprobs[ids[0]] for r in results if (ids := response(r))]  # an end token is no part of the reply
    spread = np.sqrt(p @ logprobs**2 - (p @ logprobs) ** 2)
    assert len(drawn) > 0.9 * n
    assert abs(np.mean(drawn) - p @ logprobs) < 5 * spread / np.sqrt(n)


def test_max_tokens_and_finish(subject: Subject) -> None:
    requests = [Request(p, sampling=Sampling(max_tokens=n, seed=n)) for n in (1, 3, 6) for p in PROMPTS]
    for request, result in zip(requests, subject.run(*requests), strict=True):
        assert result.finish in ("stop", "length")
        assert len(response(result)) <= request.sampling.max_tokens
        assert (len(response(result)) == request.sampling.max_tokens) or result.finish == "stop"
    assert subject.run(Request("A"))[0].finish == "read"


def long_text(subject: Subject, length: int) -> tuple[Request, str, str]:
    """A request whose reply has a run of ``length`` characters to stop at, the reply, and the run."""
    requests = [Request("the calm sea", sampling=Sampling(max_tokens=8, seed=s)) for s in range(40 if subject.tiny else 2)]
    for request, result in zip(requests, subject.run(*requests), strict=True):
        for start in range(2, len(result.text) - length):
            stop = result.text[start : start + length]
            # Random models speak bytes, not characters, and what is half a character changes with what follows.
            if "\ufffd" not in stop and result.finish == "length" and not stop.isspace():
                return request, result.text, stop
    raise AssertionError("no reply has enough text: use other seeds")


@pytest.mark.parametrize("length", [1, 3])
def test_stop_strings_cut(subject: Subject, length: int) -> None:
    request, full, stop = long_text(subject, length)
    for stops in ((stop,), ("never said", stop)):
        result = subject.run(replace(request, sampling=replace(request.sampling, stop=stops)))[0]
        assert result.text == full[: full.find(stop)]
        assert result.finish == "stop"
        assert result.layout.text == "the calm sea" + result.text
        assert max(end for _, end in result.layout.offsets) <= len(result.layout.text)
    unused = subject.run(replace(request, sampling=replace(request.sampling, stop=("never said",))))[0]
    assert unused.text == full


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_stream_adds_up_to_the_result(subject: Subject, length: int) -> None:
    request, full, stop = long_text(subject, max(length, 1))
    request = replace(
        request,
        sampling=replace(request.sampling, stop=(stop,) if length else ()),
        readouts=(Readout((subject.middle,), Where("response"), "none"),),
    )
    *partials, final = subject.engine.stream(request)
    assert [p.done for p in partials] == [False] * len(partials) and final.done
    assert "".join(p.text for p in partials) == final.text == (full[: full.find(stop)] if length else full)
    subject.assert_same(final, subject.run(request)[0])
    assert len(partials) >= len(response(final)) > 0
    if final.finish == "length":
        read = np.concatenate([p.readings[0].values for p in partials], axis=1)
        assert subject.apart(read, final.readings[0].values) < subject.tolerance
        positions = np.concatenate([p.readings[0].positions for p in partials])
        np.testing.assert_array_equal(positions, final.readings[0].positions)
    assert len(partials[0].layout) == final.layout.n_prompt + 1


@pytest.mark.parametrize("together", [1, 6])
def test_how_many_tokens_are_projected_together_does_not_matter(
    subject: Subject, hf: Any, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Also where some rows of a batch end earlier, or have readouts of their own, or none."""
    onto = subject.directions[:, [0, subject.middle]].transpose(1, 0, 2)
    shared = Readout((0, subject.middle), Where(), "none", onto), Readout((subject.middle,), Where("response", after=2), "mean")
    requests = [
        Request(prompt, sampling=Sampling(max_tokens=n, temperature=0), readouts=readouts)
        for prompt, n, readouts in (
            ("the calm sea", 8, shared),
            (HELLO, 3, shared),
            ("A", 7, ()),
            ("She slammed the door", 5, (Readout((-1, 0), Where("response"), "last"), shared[0])),
        )
    ]
    expected = subject.run(*requests)
    monkeypatch.setattr("affectlens.engines.decode.TOGETHER", together)
    for result, other in zip(subject.run(*requests), expected, strict=True):
        subject.assert_same(result, other)


def test_the_pass_over_the_last_tokens_ends_where_their_readings_do(subject: Subject, hf: Any) -> None:
    passes: list[int] = []
    handles = [block.register_forward_pre_hook(lambda *_, n=n: passes.append(n)) for n, block in enumerate(hf.blocks)]
    request = Request("the calm sea", sampling=Sampling(max_tokens=3, temperature=0), steering=subject.steering(0, 0.1, 0, 2))
    try:
        counts = []
        for readouts in ((), (Readout((1,), Where("response")),), (Readout((1,), Where("prompt")),)):
            passes.clear()
            generated = len(response(subject.run(replace(request, readouts=readouts))[0]))
            counts.append([passes.count(n) - generated for n in range(3)])
    finally:
        for handle in handles:
            handle.remove()
    assert counts[0] == counts[2] and np.subtract(counts[1], counts[0]).tolist() == [1, 1, 0]


def test_the_model_may_be_used_between_partial_results(subject: Subject) -> None:
    plain = Request(HELLO, sampling=GREEDY, readouts=(subject.everything,))
    steered = replace(plain, steering=subject.steering(0, 0.5))
    alone, streamed = subject.run(plain, steered)
    results = []
    for result in subject.engine.stream(steered):
        results.append(result)
        subject.assert_same(subject.run(plain)[0], alone)
    subject.assert_same(results[-1], streamed)


def test_streams_and_batches_mix(subject: Subject) -> None:
    plain = Request(HELLO, sampling=GREEDY)
    results = subject.run(plain, replace(plain, stream=True), Request("A"), plain)
    done = [r for r in results if r.done]
    assert [r.finish == "read" for r in done] == [False, False, True, False]
    assert done[0].text == done[1].text == done[3].text
    assert results[0].done and not results[1].done


# ── requests that come and go ──


def served(session: Any, arrivals: dict[int, list[Request]], cancel: dict[int, int] | None = None) -> dict[int, list[Result]]:
    """What came of requests that arrive before certain steps; ``cancel`` says before which steps a request is let go."""
    out: dict[int, list[Result]] = {}
    names: dict[int, int] = {}
    step = 0
    while session.live or any(at >= step for at in arrivals):
        for request in arrivals.get(step, []):
            names[session.submit(request)] = len(names)
        for ticket in [ticket for ticket, name in names.items() if (cancel or {}).get(step) == name]:
            session.cancel(ticket)
        for ticket, result in session.step():
            assert not isinstance(result, Exception), result
            out.setdefault(names[ticket], []).append(result)
        step += 1
    session.close()
    return out


def traffic(subject: Subject) -> list[Request]:
    """Requests that differ in everything: length, sampling, steering, what is recorded, whether they generate at all."""
    onto = subject.directions[:, [0, subject.middle]].transpose(1, 0, 2)
    two = (0, subject.middle)
    watched = (Readout(two, Where(after=1), "none", onto),)
    window = subject.steering(0, 0.6, 0, where=Where("response", after=1)).ramp(2)
    gated = subject.steering(1, 0.5).when(subject.gate(0, subject.middle, above=0.0))
    return [
        Request("the calm sea", sampling=Sampling(max_tokens=6, temperature=0), readouts=watched, stream=True),
        Request(HELLO, sampling=Sampling(max_tokens=3, seed=5), steering=subject.steering(0, 0.5), readouts=watched),
        Request("A", sampling=Sampling(max_tokens=8, seed=2, logprobs=2), steering=window, stream=True),
        Request(TALK, readouts=(subject.everything,)),
        Request("the calm sea", sampling=Sampling(max_tokens=5, temperature=0), readouts=watched, steering=gated, stream=True),
        Request(HELLO, prefill=" I", sampling=Sampling(max_tokens=7, seed=9), readouts=(Readout((-1, 0), Where("response")),)),
        Request(HELLO, prefill=" I", choices=("A", " the sea")),
        Request(TALK, sampling=Sampling(max_tokens=4, temperature=0), readouts=(Readout(two, pool="norm"),), stream=True),
    ]


def test_a_session_gives_what_each_request_gives_alone(subject: Subject) -> None:
    requests = traffic(subject)
    arrivals = {0: requests[:2], 1: requests[2:4], 2: requests[4:6], 5: [requests[6]], 30: [requests[7]]}
    found = served(subject.engine.session(), arrivals)
    assert sorted(found) == list(range(len(requests)))
    for n, request in enumerate(requests):
        *partials, final = found[n]
        expected = subject.run(request)
        subject.assert_same(final, expected[-1])
        assert len(partials) == len(expected) - 1
        for partial, other in zip(partials, expected, strict=False):
            subject.assert_same(partial, other)


def test_which_models_share_passes_between_requests_that_come_and_go(subject: Subject, hf: Any) -> None:
    """All whose caches hold keys and values; falcon_h1 has recurrent states as well."""
    from affectlens.engines.batching import BatchSession

    assert isinstance(hf.session(), BatchSession) == (subject.name != "falcon_h1")


def test_passes_are_shared(subject: Subject, hf: Any) -> None:
    if not hf.can_join:
        pytest.skip("each request is a batch of its own")
    session, passes = hf.session(), []
    handle = hf.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        requests = [Request(text, sampling=Sampling(max_tokens=6, seed=n)) for n, text in enumerate(("the calm sea", "A", "She"))]
        found = served(session, {0: requests[:1], 2: requests[1:]})
    finally:
        handle.remove()
    longest = max(len(response(results[-1])) for results in found.values())
    assert 0 < len(passes) <= 3 + 2 + longest, "a prompt each, two tokens before the others come, then one pass a token for all"


def test_a_request_that_is_let_go_leaves_the_others_alone(subject: Subject) -> None:
    requests = traffic(subject)
    found = served(subject.engine.session(), {0: [*requests[:3], requests[5]], 2: [requests[4]]}, cancel={1: 0, 3: 2})
    assert not any(result.done for n in (0, 2) for result in found.get(n, []))
    for n, request in ((1, requests[1]), (3, requests[5]), (4, requests[4])):
        subject.assert_same(found[n][-1], subject.run(request)[-1])
    subject.assert_same(subject.run(requests[3])[0], subject.run(requests[3])[0])


def test_a_request_that_cannot_run_ends_alone(subject: Subject) -> None:
    session = subject.engine.session()
    good = session.submit(replace(Request(HELLO, sampling=GREEDY), stream=True))
    bad: list[Any] = []
    for request in (Request("A", readouts=(Readout((999,)),)), Request("A " * (subject.engine.info.context + 1))):
        try:
            bad.append(session.submit(request))
        except EngineError as error:
            assert len(str(error).splitlines()) == 1
    results = []
    while session.live:
        results += session.step()
    assert all(isinstance(result, EngineError) for ticket, result in results if ticket in bad)
    final = next(result for ticket, result in results if ticket == good and not isinstance(result, Exception) and result.done)
    subject.assert_same(final, subject.run(Request(HELLO, sampling=GREEDY))[0])


def test_log_probabilities_are_the_models(subject: Subject) -> None:
    sampling = Sampling(max_tokens=4, seed=3, top_p=0.9, temperature=0.7, logprobs=3)
    *partials, final = subject.engine.stream(Request("the calm sea", sampling=sampling))
    reply = response(final)
    assert reply and [likely.token for likely in final.logprobs] == reply
    assert tuple(likely for partial in partials for likely in partial.logprobs) == final.logprobs
    first = next_logits(subject, Request("the calm sea"))
    known = first - first.max() - np.log(np.exp(first - first.max()).sum())
    assert final.logprobs[0].value == pytest.approx(known[reply[0]], abs=20 * subject.tolerance)
    ids, values = zip(*final.logprobs[0].top, strict=True)
    np.testing.assert_allclose(values, known[list(ids)], atol=20 * subject.tolerance)
    np.testing.assert_allclose(values, np.sort(known)[::-1][:3], atol=20 * subject.tolerance)
    (own,) = subject.run(Request("the calm sea", sampling=replace(sampling, logprobs=0)))
    assert own.layout == final.layout and all(likely.top == () for likely in own.logprobs)
    (without,) = subject.run(Request("the calm sea", sampling=replace(sampling, logprobs=None)))
    assert without.layout == final.layout and without.logprobs == ()


# ── choices, unembedding, vocabulary ──


def next_logits(subject: Subject, request: Request) -> np.ndarray:
    """Logits after a request, by way of its last residual."""
    last = Readout((subject.layers[-1],), Where(last=1), "last")
    return subject.engine.unembed(subject.values(replace(request, readouts=(last,))))[0].astype(np.float64)


def ids_of(subject: Subject, text: str) -> list[int]:
    return response(subject.run(Request("A", prefill=text))[0])


def test_choices_are_the_models_log_probabilities(subject: Subject) -> None:
    for request in (Request("the calm sea"), Request(HELLO, prefill=" I"), Request("A", steering=subject.steering(0, 0.5))):
        logits = next_logits(subject, request)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        choices = [t for t in ("A", "t", " the", ".", "7") if len(ids_of(subject, t)) == 1]
        assert len(choices) > 2
        scored = subject.run(replace(request, choices=tuple(choices)))[0].choice_logprobs
        np.testing.assert_allclose(scored, [logprobs[ids_of(subject, t)[0]] for t in choices], atol=20 * subject.tolerance)


def test_the_greedy_token_is_the_likeliest_choice(subject: Subject) -> None:
    for prompt in ("the calm sea", HELLO):
        first = response(subject.run(Request(prompt, sampling=replace(GREEDY, max_tokens=1)))[0])
        assert first in ([], [int(next_logits(subject, Request(prompt)).argmax())])


def test_a_choice_of_several_tokens_is_a_chain(subject: Subject) -> None:
    steer = subject.steering
    after = steer(0, 0.5, where=Where("response", after=1))
    for steering in (Steering(), steer(0, 0.5), after, steer(0, 0.5).ramp(3), steer(0, 0.5, where=Where("response", first=1))):
        base = Request(HELLO, steering=steering)
        first, second = " the", " sea"
        assert ids_of(subject, first + second) == ids_of(subject, first) + ids_of(subject, second)
        whole = subject.run(replace(base, choices=(first + second,)))[0].choice_logprobs[0]
        one = subject.run(replace(base, choices=(first,)))[0].choice_logprobs[0]
        two = subject.run(replace(base, prefill=first, choices=(second,)))[0].choice_logprobs[0]
        assert whole == pytest.approx(one + two, abs=40 * subject.tolerance)


def test_choose_gives_one_row_for_each_prompt(subject: Subject) -> None:
    table = subject.engine.choose(PROMPTS, ["A", " the sea"], prefill=" I")
    assert table.shape == (len(PROMPTS), 2)
    alone = subject.run(Request(PROMPTS[2], prefill=" I", choices=("A", " the sea")))[0].choice_logprobs
    np.testing.assert_allclose(table[2], alone, atol=20 * subject.tolerance)


def test_the_vocabulary_names_every_id(subject: Subject) -> None:
    vocabulary = subject.engine.vocabulary
    logits = next_logits(subject, Request("A"))
    assert len(vocabulary) == len(logits)
    for text in ("A", ".", "the"):
        assert [vocabulary[i] for i in ids_of(subject, text)] == [text] or len(ids_of(subject, text)) > 1
    assert vocabulary[ids_of(subject, "A")[0]] == "A"


def test_generate_gives_every_prompt_a_seed_of_its_own(subject: Subject) -> None:
    texts = subject.engine.generate(["A"] * 3, sampling=SAMPLED)
    alone = [subject.run(Request("A", sampling=replace(SAMPLED, seed=SAMPLED.seed + i)))[0].text for i in range(3)]
    assert texts == alone


def test_the_info_says_what_was_loaded(subject: Subject) -> None:
    info = subject.engine.info
    assert info.n_layers > 0 and info.width > 0 and info.context > 0 and info.n_parameters > 0
    assert info.fingerprint and info.dtype == "float32" and info.device == "cpu"
    assert 0 <= info.default_layer < info.n_layers
    assert info.template
    assert info.reply_token == subject.run(Request(HELLO))[0].layout.tokens[-1]


# ── refusals ──


def retermed(subject: Subject, **changes: Any) -> Steering:
    return Steering((replace(subject.steering(0, 1.0).terms[0], **changes),))


def wide(subject: Subject) -> np.ndarray:
    return np.ones((subject.engine.info.n_layers, 3, subject.engine.info.width + 1), dtype=np.float32)


REFUSED: dict[str, tuple[type[AffectlensError], Callable[[Subject], Request]]] = {
    "too long": (EngineError, lambda s: Request("A", sampling=Sampling(max_tokens=s.engine.info.context))),
    "layer to read": (EngineError, lambda s: Request("A", readouts=(Readout((s.engine.info.n_layers,)),))),
    "layer below": (EngineError, lambda s: Request("A", readouts=(Readout((-2,)),))),
    "layer without direction": (MismatchError, lambda s: Request("A", steering=s.steering(0, 1.0).on(s.engine.info.n_layers))),
    "embedding to steer": (EngineError, lambda s: Request("A", steering=retermed(s, layers=(-1,), available=s.layers[:-1]))),
    "layer to steer": (EngineError, lambda s: Request("A", steering=retermed(s, layers=(99,), available=(99,)))),
    "width to read": (MismatchError, lambda s: Request("A", readouts=(Readout((0,), onto=wide(s)[:1]),))),
    "width to steer": (MismatchError, lambda s: Request("A", steering=retermed(s, directions=wide(s)[:, 0]))),
    "layer of a gate": (EngineError, lambda s: Request("A", steering=s.steering(0, 1.0).when(replace(s.gate(0, 0), layer=-1)))),
    "width of a gate": (
        MismatchError,
        lambda s: Request("A", steering=s.steering(0, 1.0).when(Gate("d", 0, wide(s)[0, 0], above=0.0))),
    ),
    "endless strength": (EngineError, lambda s: Request("A", steering=s.steering(0, float("nan")))),
    "empty chat": (EngineError, lambda s: Request(())),
    "broken turn": (EngineError, lambda s: Request((("user",),))),  # type: ignore[arg-type]
    "transcript of a text": (EngineError, lambda s: Request("A", transcript=True)),
    "prefill of an answered transcript": (
        EngineError,
        lambda s: Request((*HELLO, ("assistant", "Hi")), prefill="A", transcript=True),
    ),
    "empty text": (EngineError, lambda s: Request("")),
    "empty choice": (EngineError, lambda s: Request("A", choices=("",))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_run_is_refused_and_harms_nothing(subject: Subject, what: str) -> None:
    kind, make = REFUSED[what]
    good = Request(HELLO, steering=subject.steering(0, 0.3), readouts=(subject.everything,))
    before = subject.run(good)[0]
    with pytest.raises(kind) as error:
        subject.run(good, make(subject), good)
    one_line(error)
    after = subject.run(good)[0]
    np.testing.assert_array_equal(after.readings[0].values, before.readings[0].values)


def test_a_model_without_a_template_refuses_chats(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    if subject.name == "toy":
        from affectlens.engines.toy import ToyEngine

        engine: Engine = ToyEngine(template=False)
    elif subject.name == "ray":
        engine = open_engine("toy", replicas=2, template=False)
    elif subject.name == "vllm serve":
        pytest.skip("the tokenizer of a server is out of reach")
    else:
        engine = subject.engine
        monkeypatch.setattr(subject.engine.tokenizer, "chat_template", None)
    with pytest.raises(EngineError, match="template") as error:
        list(engine.run([Request(HELLO)]))
    one_line(error)
    assert list(engine.run([Request("A")]))
    if engine is not subject.engine:
        engine.close()


def test_an_abandoned_run_leaves_nothing_behind(subject: Subject) -> None:
    """Whoever stops listening to a stream must not leave steering in the model."""
    plain = Request(HELLO, sampling=GREEDY, readouts=(subject.everything,))
    before = subject.run(plain)[0]
    stream = subject.engine.stream(replace(plain, steering=subject.steering(0, 2.0)))
    next(stream)
    if hasattr(stream, "close"):
        stream.close()
    after = subject.run(plain)[0]
    np.testing.assert_array_equal(after.readings[0].values, before.readings[0].values)


# ── transcripts ──


def test_a_transcript_has_roles_and_a_reply_position_without_a_template(subject: Subject) -> None:
    [result] = subject.run(Request(TALK, transcript=True, readouts=(Readout((0,), Where("prompt", last=1), "none"),)))
    layout = result.layout
    assert layout.text == "Be brief.\n\nHuman: I lost my keys.\n\nAssistant: Oh no.\n\nHuman: Help me!\n\nAssistant:"
    assert layout.n_prompt == len(layout) and result.readings[0].positions.tolist() == [len(layout) - 1]
    for role, words in (("user", "lost my keys"), ("assistant", "Oh no"), ("system", "Be brief")):
        found = selected(subject, TALK, Where(role=role), transcript=True)
        assert words in found and "Human" not in found and "Assistant" not in found


def test_a_transcript_reads_as_its_plain_text(subject: Subject) -> None:
    chat = (("Anna", "I lost my keys."), ("Boris", "Oh no."))
    everything = (subject.everything,)
    one, other = subject.run(
        Request(chat, transcript=True, readouts=everything), Request(transcript(chat)[0], readouts=everything)
    )
    assert (
        one.layout.ids == other.layout.ids and subject.apart(one.readings[0].values, other.readings[0].values) < subject.tolerance
    )
    assert "Oh no." in selected(subject, chat, Where(role="Boris"), transcript=True)


def test_a_transcript_that_ends_with_the_answer_has_its_reply_in_it(subject: Subject) -> None:
    chat = (("user", "I lost my keys."), ("assistant", "Oh no."))
    assert selected(subject, chat, Where("response"), transcript=True).strip() == "Oh no."
    [result] = subject.run(Request(chat[:1], transcript=True, sampling=GREEDY))
    assert result.text and set(result.layout.roles[result.layout.n_prompt :]) == {"assistant"}
