"""Shared beginnings: what is computed once is what is the same, and nothing else; the numbers are those of each text alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import families
from affectlens.engine import Gate, Readout, Request, Steering, Term, Where
from affectlens.engines import prefix
from affectlens.engines.hf import HFEngine
from affectlens.engines.rows import Row
from affectlens.errors import EngineError

FIRST = "Would you rather have (A) a calm and sunny day or (B) "
ENDS = ("a boat", "a boat with a sail", "no rain", "two boxes", "a walk by the sea")
BLOCKS = families.LAYERS


@pytest.fixture(scope="module")
def engine() -> Iterator[HFEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield HFEngine(families.build("llama"), families.tiny_tokenizer(), id="llama")
    torch.set_num_threads(threads)


@functools.cache
def direction(width: int, which: int) -> np.ndarray:
    """The same array whenever it is asked for: terms that differ in nothing but it would never be mistaken for each other."""
    directions = np.random.default_rng(which).normal(size=(BLOCKS, width)).astype(np.float32)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


NORMS = np.ones(BLOCKS, np.float32)


def push(engine: HFEngine, *layers: int, which: int = 0, text: str | None = None) -> Steering:
    every = tuple(range(BLOCKS))
    term = Term(f"d{which}", 0.5, layers or (2,), every, direction(engine.info.width, which), NORMS, where=Where(text=text))
    return Steering((term,))


def computed(engine: HFEngine, requests: list[Request]) -> list[int]:
    """How many tokens run through each block for these requests."""
    seen = [0] * BLOCKS

    def count(i: int):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[i] += hidden.shape[0] * hidden.shape[1]

        return hook

    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(engine.blocks)]
    try:
        list(engine.run(requests))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def length(engine: HFEngine, text: str) -> int:
    return len(engine.layout(Request(text)))


def behind(engine: HFEngine, end: str) -> int:
    """Tokens of a question behind the first option."""
    return length(engine, FIRST + end) - length(engine, FIRST)


def questions(engine: HFEngine, steering: Steering = Steering(), ends: tuple[str, ...] = ENDS) -> list[Request]:
    return [Request(FIRST + end, steering=steering, choices=("A",)) for end in ends]


def test_a_shared_beginning_is_computed_once(engine: HFEngine) -> None:
    # "a boat" is shared by two at most, and saves less than a call costs: it is computed for each.
    expected = length(engine, FIRST) + sum(behind(engine, end) for end in ENDS)
    assert computed(engine, questions(engine)) == [expected] * BLOCKS
    whole = sum(length(engine, FIRST + end) for end in ENDS)
    engine.share_limit, before = 0, engine.share_limit
    try:
        assert computed(engine, questions(engine)) == [whole] * BLOCKS
    finally:
        engine.share_limit = before


def test_steering_behind_the_beginning_leaves_it_shared(engine: HFEngine) -> None:
    """Five questions, two steerings of their ends: the beginning runs once, the ends once up to the first steered block."""
    requests = [r for which in (0, 1) for r in questions(engine, push(engine, 2, which=which, text="a"))]
    spans = [Steering(tuple(t.__class__(**{**vars(t), "where": Where(text=end)}) for t in r.steering.terms)) for r, end in
             zip(requests, ENDS * 2, strict=True)]  # fmt: skip
    requests = [Request(r.prompt, steering=s, choices=r.choices) for r, s in zip(requests, spans, strict=True)]
    begin, ends = length(engine, FIRST), sum(behind(engine, end) for end in ENDS)
    below, above = begin + ends, begin + 2 * ends
    assert computed(engine, requests) == [below, below, below, above]


def test_steering_within_the_beginning_separates_from_there_on(engine: HFEngine) -> None:
    plain, steered = questions(engine), questions(engine, push(engine, 1, text="sunny"))
    begin, ends = length(engine, FIRST), sum(behind(engine, end) for end in ENDS)
    before = length(engine, FIRST[: FIRST.index("sunny")].rstrip(" ")) + 1  # bytes: the space belongs to what is shared
    assert computed(engine, [*plain, *steered]) == [begin + ends] * 2 + [2 * (begin + ends) - before] * 2


def test_equal_steering_is_shared_whoever_made_it(engine: HFEngine) -> None:
    one, directions = push(engine, 1, text="sunny"), push(engine, 1, text="sunny").terms[0]
    idle = Steering((one.terms[0], Term(**{**vars(one.terms[0]), "where": Where(text="nowhere to be found")})))
    begin, ends = length(engine, FIRST), sum(behind(engine, end) for end in ENDS)
    requests = [
        Request(FIRST + end, steering=s, choices=("A",)) for end, s in zip(ENDS, (one, idle, one, idle, one), strict=True)
    ]
    assert computed(engine, requests)[-1] == begin + ends
    assert directions.content() == one.terms[0].content()


def test_a_word_in_common_is_not_worth_sharing(engine: HFEngine) -> None:
    """Many long texts that begin with the same word stay apart, each attended on its own."""
    texts = [f"The {'abcdefghijklmnopqrstuvwxyz'[i]} {'the sea was calm ' * 4}" for i in range(20)]
    rows = [Row(i, Request(text), engine.layout(Request(text))) for i, text in enumerate(texts)]
    assert prefix.sharing(rows, pays=engine.sharing_pays, trunks=True) == []
    assert computed(engine, [Request(text, choices=("A",)) for text in texts])[0] == sum(map(len, rows))


def test_branches_of_very_different_length_are_attended_apart(engine: HFEngine) -> None:
    ends = ["a", "b", "c", "a boat with a sail " * 5, "a boat with no sail " * 5, "two sails " * 9]
    requests = [Request(FIRST + end, readouts=(Readout((3,), pool="last"),)) for end in ends]
    rows = [Row(i, request, engine.layout(request)) for i, request in enumerate(requests)]
    tree = prefix.lay_out(rows, pays=32, trunks=False, device=engine.device)
    assert sorted(len(branch.own) for branch in tree.branches) == [3, 3]
    for request, got in zip(requests, engine.run(requests), strict=True):
        alone = next(engine.run([request])).readings[0].values
        np.testing.assert_allclose(got.readings[0].values, alone, atol=1e-4)


def test_the_same_text_many_times_is_one_text(engine: HFEngine) -> None:
    requests = [Request(FIRST + ENDS[0], choices=("A",)) for _ in range(9)]
    assert computed(engine, requests) == [length(engine, FIRST + ENDS[0])] * BLOCKS
    scores = {r.choice_logprobs for r in engine.run(requests)}
    assert len(scores) == 1


def test_texts_that_are_beginnings_of_each_other(engine: HFEngine) -> None:
    """Every text is a beginning of the next, hundreds deep: each reads as alone."""
    text = ("the calm sea and a boat, " * 40)[:250]
    requests = [Request(text[:n], readouts=(Readout((1,), pool="last"),)) for n in range(5, 250)]
    engine.token_budget, before = 4096, engine.token_budget
    try:
        together = [r.readings[0].values for r in engine.run(requests)]
    finally:
        engine.token_budget = before
    assert computed(engine, requests)[0] < sum(range(5, 250)) / 5
    for n in (0, 17, 85, 244):
        alone = next(engine.run([requests[n]])).readings[0].values
        np.testing.assert_allclose(together[n], alone, atol=1e-4)


def test_reading_stops_below_what_is_not_needed(engine: HFEngine) -> None:
    requests = [Request(r.prompt, steering=push(engine, 2, which=w), readouts=(Readout((0,), pool="last"),))
                for w in (0, 1, 2) for r in questions(engine)]  # fmt: skip
    begin, ends = length(engine, FIRST), sum(behind(engine, end) for end in ENDS)
    assert computed(engine, requests) == [begin + ends, 0, 0, 0]


def test_a_gate_below_the_first_steered_block_is_read_once_for_all(engine: HFEngine) -> None:
    """Gates do not keep lower blocks from being shared, and each row gets its own."""
    gates = [Gate("d", 0, push(engine).terms[0].directions[0], **limit) for limit in ({"above": 0.0}, {"below": 0.0})]
    requests = [r for gate in gates for r in questions(engine, push(engine, 2).when(gate))] + questions(engine)
    begin, ends = length(engine, FIRST), sum(behind(engine, end) for end in ENDS)
    assert computed(engine, requests) == [begin + ends] * 3 + [3 * (begin + ends)]
    for request, got in zip(requests, engine.run(requests), strict=True):
        np.testing.assert_allclose(got.choice_logprobs, next(engine.run([request])).choice_logprobs, atol=1e-4)


def test_rows_whose_reply_begins_elsewhere_share_what_a_schedule_does_equally(engine: HFEngine) -> None:
    """A ramp leaves prompts alone and is complete after some tokens: in between two rows of equal tokens differ."""
    text, steering = FIRST + ENDS[1], push(engine, 1).ramp(3)
    requests = [Request(text[:n], prefill=text[n:], steering=steering, choices=("A",)) for n in (20, 24)]
    rows = [Row(i, request, engine.layout(request)) for i, request in enumerate(requests)]
    one, other = prefix.keys(rows)
    begin = rows[0].layout.n_prompt
    assert prefix.alike(one, other) == begin and prefix.alike(prefix.bare(one), prefix.bare(other)) == len(one)
    assert (one[begin : begin + 6] != other[begin : begin + 6]).all()
    assert (one[begin + 6 :] == other[begin + 6 :]).all()


def test_equal_terms_are_counted_at_each_token(engine: HFEngine) -> None:
    """Twice at one word and once at another is not twice at both, whatever came before it."""

    def row(*spans: str) -> Row:
        terms = tuple(replace(push(engine).terms[0], where=Where(text=span)) for span in spans)
        request = Request("a boat, the sea", steering=Steering(terms))
        return Row(0, request, engine.layout(request))

    both, twice, once = prefix.keys([row("boat", "boat, the sea"), row("boat, the sea", "boat, the sea"), row("boat, the sea")])
    at = np.flatnonzero(both != twice)
    assert (both[at] == once[at]).all() and len(at) > 0
    assert (both[both != once] == twice[both != once]).all()


@pytest.mark.parametrize("seed", range(6))
def test_random_rows_and_steerings_give_what_each_gives_alone(engine: HFEngine, seed: int) -> None:
    """Property test: any mixture of beginnings, spans, layers, modes, gates and schedules, in any order."""
    rng = np.random.default_rng(seed)
    words = ["a", "calm", "boat", "the", "sea", "(A)", "no"]

    def text(start: str) -> str:
        return f"{start} {' '.join(rng.choice(words, rng.integers(1, 12)))}"

    starts = [text("Once upon a time there was a boat."), text("Two boxes stood by the door.")]
    starts += [text(starts[0]), text(starts[1])]
    requests = []
    for _ in range(24):
        steering = Steering()
        for _ in range(rng.integers(0, 3)):
            span = None if rng.random() < 0.3 else str(rng.choice(words))
            one = push(engine, *sorted(rng.choice(BLOCKS, 2, replace=False).tolist()), which=int(rng.integers(3)), text=span)
            kind = rng.random()
            one = one.ablate() if kind < 0.2 else one.clamp(0.5) if kind < 0.3 else one.cap(0.5) if kind < 0.4 else one
            if rng.random() < 0.5:
                layer = int(rng.integers(min(one.layers) + 1))
                limit = {str(rng.choice(["above", "below"])): float(rng.normal(0, 0.05))}
                one = one.when(Gate("d", layer, direction(engine.info.width, 7)[layer], **limit))
            if rng.random() < 0.3:
                one = one.ramp(4) if rng.random() < 0.5 else one.decay(4)
            with contextlib.suppress(EngineError):  # one direction at two values
                steering += one
        choices = ("A", " no") if rng.random() < 0.5 else ()
        layers = tuple(sorted(rng.choice(range(-1, BLOCKS), 2, replace=False).tolist()))
        readout = Readout(layers, Where(after=int(rng.integers(3))), str(rng.choice(["none", "mean", "last", "norm"])))
        readouts = (readout,) if rng.random() < 0.8 or not choices else ()
        whole = text(str(rng.choice(starts)))
        cut = int(rng.integers(len(whole) // 2, len(whole))) if rng.random() < 0.5 else len(whole)  # where the reply begins
        requests.append(Request(whole[:cut], prefill=whole[cut:], steering=steering, choices=choices, readouts=readouts))
    engine.sharing_pays, before = int(rng.integers(1, 40)), engine.sharing_pays
    try:
        together = list(engine.run(requests))
    finally:
        engine.sharing_pays = before
    for request, got in zip(requests, together, strict=True):
        alone = next(engine.run([request]))
        np.testing.assert_allclose(got.choice_logprobs, alone.choice_logprobs, atol=1e-4)
        for a, b in zip(got.readings, alone.readings, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_allclose(a.values, b.values, atol=1e-4)


def test_runs_cover_every_token_of_every_row_once() -> None:
    rng = np.random.default_rng(0)
    for pays in (1, 3, 10):
        rows = sorted((rng.integers(0, 3, rng.integers(1, 9)) for _ in range(30)), key=list)
        found = prefix.runs(rows, pays=pays)
        for i, row in enumerate(rows):
            mine = [run for run in found if run.first <= i < run.last]
            covered = [t for run in mine for t in range(run.start, run.end)]
            assert covered == list(range(len(row)))
            for run, before in zip(mine[1:], mine, strict=False):
                assert found[run.parent] == before
            for run in mine:
                tokens = {tuple(rows[k][run.start : run.end]) for k in range(run.first, run.last)}
                assert len(tokens) == 1
