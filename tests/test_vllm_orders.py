"""What the vLLM engine does without vLLM: orders that travel, salts, pooling in parts, and the tables of replayed steps."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from affectlens.engine import Gate, Layout, Reading, Readout, Request, Sampling, Steering, Term, Where, open_engine
from affectlens.engines import vllm_draw, vllm_rows
from affectlens.engines.changes import Plan, Tokens
from affectlens.engines.decode import Part
from affectlens.engines.rows import Row
from affectlens.engines.vllm_orders import Findings, Inbox, Mail, Order, Seen, owner_of
from affectlens.engines.vllm_tables import SLOTS, Tables, additions, refuse_stale
from affectlens.engines.vllm_worker import REPLAY, replays, require
from affectlens.errors import EngineError, MissingExtra, ModelSupportError

WIDTH, LAYERS = 8, 3
RNG = np.random.default_rng(4)
DIRECTIONS = RNG.normal(size=(2, LAYERS, WIDTH)).astype(np.float32)


def push(which: int = 0, strength: float = 1.0, **changes: Any) -> Steering:
    term = Term(f"d{which}", strength, (1,), (0, 1, 2), DIRECTIONS[which], np.ones(LAYERS, np.float32))
    return Steering((replace(term, **changes),))


def layout(n: int = 6, n_prompt: int = 4) -> Layout:
    text = "abcdefghij"[:n]
    roles = ("user",) * n_prompt + ("assistant",) * (n - n_prompt)
    return Layout(
        text, tuple(text), tuple(range(n)), tuple((i, i + 1) for i in range(n)), roles, n_prompt, (("user", 0, n_prompt),)
    )


def order(steering: Steering, key: str = "1.0", **given: Any) -> Order:
    request = Request("abcd", steering=steering, **given)
    return vllm_rows.order_of(key, Row(1, request, layout()))


def test_orders_travel() -> None:
    onto = RNG.normal(size=(2, 3, WIDTH)).astype(np.float32)
    steering = push(where=Where("response", after=1)) + push(1, 0.3, gate=Gate("g", 0, DIRECTIONS[0, 0], above=0.1))
    readouts = (Readout((0, 2), Where("prompt"), "last", onto), Readout((-1, 1), Where(), "mean"))
    sent = [
        order(steering, readouts=readouts, sampling=Sampling(max_tokens=3)),
        Order("unembed 2", 3, residuals=RNG.normal(size=(3, WIDTH)).astype(np.float32)),
        Order("3.1", 2, wanted=((4, 7), (5, 8))),
        order(Steering(), "4.0", readouts=readouts),
    ]
    mail, inbox = Mail(keep=2), Inbox()
    for _ in range(3):  # what was sent once is not sent again, and what was forgotten is
        owner, *packed = mail.pack(sent)
        assert owner == mail.owner == owner_of(mail.key("1.0"))
        came = inbox.unpack(*packed)
        for one, other in zip(sent, came, strict=True):
            assert (one.key, one.n_prompt, one.wanted, one.ahead) == (other.key, other.n_prompt, other.wanted, other.ahead)
            assert one.steering == other.steering
            for a, b in zip(one.masks, other.masks, strict=True):
                np.testing.assert_array_equal(a, b)
            for mine, yours in zip(one.noted, other.noted, strict=True):
                assert (mine.readout.layers, mine.readout.pool, mine.grows) == (
                    yours.readout.layers,
                    yours.readout.pool,
                    yours.grows,
                )
                np.testing.assert_array_equal(mine.mask, yours.mask)
                assert (mine.readout.onto is None) == (yours.readout.onto is None)
                if mine.readout.onto is not None and yours.readout.onto is not None:
                    np.testing.assert_array_equal(mine.readout.onto, yours.readout.onto)
            assert (one.residuals is None) == (other.residuals is None)
        assert came[0].noted[0].readout.onto is came[3].noted[0].readout.onto, "equal directions are one object"


def test_known_things_are_sent_once() -> None:
    big = order(push())
    mail = Mail()
    first, again = mail.pack([big]), mail.pack([replace(big, key="2.0")])
    assert "float32" in first[1] and "float32" not in again[1]


def test_findings_travel() -> None:
    found = Findings(
        [Seen("1.0", 0, np.arange(2), RNG.normal(size=(1, 2, 3)).astype(np.float32), np.ones((1, 2), np.float32))],
        [("2.1", 0, -1.5)],
        [("unembed 3", RNG.normal(size=(2, 8)).astype(np.float32)[:, :5])],
    )
    came = Findings.unpack(*found.pack())
    assert came.likely == found.likely and came.logits[0][0] == "unembed 3"
    np.testing.assert_array_equal(came.seen[0].values, found.seen[0].values)
    np.testing.assert_array_equal(came.logits[0][1], found.logits[0][1])
    assert Findings.unpack(*Findings().pack()) == Findings()


def test_salts_keep_apart_what_is_steered_differently() -> None:
    assert vllm_rows.salt(order(Steering())) is None and vllm_rows.salt(order(push(strength=0.0))) is None
    everywhere = vllm_rows.salt(order(push()))
    assert everywhere and everywhere == vllm_rows.salt(order(push(), "9.0"))
    shorter = vllm_rows.order_of("2.0", Row(2, Request("ab", steering=push()), layout(2, 2)))
    assert vllm_rows.salt(shorter) == everywhere, "what is steered everywhere shares its beginning with other prompts"
    wheres = [Where("prompt"), Where("response"), Where("prompt", last=1), Where(text="ab"), Where(after=1)]
    salts = {vllm_rows.salt(order(push(where=where))) for where in wheres}
    assert len(salts) == len(wheres) and None not in salts and everywhere not in salts
    last = push(where=Where("prompt", last=1))
    longer = vllm_rows.order_of("3.0", Row(3, Request("abcde", steering=last), layout(6, 5)))
    assert vllm_rows.salt(longer) != vllm_rows.salt(order(last)), "the same tokens are steered in one of them"
    assert vllm_rows.salt(order(push().ramp(3))) != vllm_rows.salt(order(push().ramp(4)))
    assert vllm_rows.salt(order(push(strength=0.5))) != everywhere != vllm_rows.salt(order(push(1)))


@pytest.mark.parametrize("pool", ["none", "mean", "last", "norm"])
@pytest.mark.parametrize("directions", [False, True])
def test_parts_of_a_prompt_add_up(pool: Any, directions: bool) -> None:
    """A prompt that comes in parts reads as in one go."""
    if pool == "norm" and directions:
        pytest.skip("norms have no directions")
    x = RNG.normal(size=(1, 9, WIDTH)).astype(np.float32)
    onto = RNG.normal(size=(1, 3, WIDTH)).astype(np.float32) if directions else None
    readout = Readout((1,), Where(), pool, onto)

    def seen(begin: int, end: int) -> Part:
        part = x[:, begin:end]
        norms = np.linalg.norm(part, axis=-1)
        project = (lambda y: y) if onto is None else (lambda y: np.einsum("l...d,lkd->l...k", y, onto))
        values = {
            "none": (project(part), norms),
            "mean": (part.mean(1), np.linalg.norm(part.mean(1), axis=-1)),
            "last": (project(part[:, -1]), norms[:, -1]),
            "norm": (norms.mean(1), norms.mean(1)),
        }[pool]
        return Part(np.arange(begin, end), *values)

    whole = vllm_rows._joined(readout, [seen(0, 9)], WIDTH)
    parts = vllm_rows._joined(readout, [seen(0, 2), seen(2, 3), seen(3, 9)], WIDTH)
    assert isinstance(whole, Reading)
    np.testing.assert_array_equal(whole.positions, parts.positions)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-5)
    np.testing.assert_allclose(parts.norms, whole.norms, atol=1e-5)
    assert np.isnan(vllm_rows._joined(readout, [], WIDTH).values).all()


# ── the tables of replayed steps ──


def tables(rows: int = 8) -> Tables:
    return Tables(LAYERS, width=WIDTH, tokens=12, rows=rows, dtype=torch.float32, device=torch.device("cpu"))


def test_tables_add_what_a_plan_adds() -> None:
    """Several requests, each with its own vectors, selectors and schedules; the two parts of a stream add up to it."""
    steerings = [push(), push(1, -0.5, where=Where("prompt")) + push(0, 0.2), Steering(), push(0, 0.4).ramp(3)]
    plan = Plan(steerings, lambda layer: torch.device("cpu"))
    places = [np.arange(0, 3), np.arange(3, 6), np.arange(6, 8), np.arange(8, 10)]
    tokens = {
        i: Tokens(rows, np.arange(len(rows)) - 1, {w: w.mask(layout(len(rows), 1)) for w in {t.where for t in s.terms}})
        for i, (rows, s) in enumerate(zip(places, steerings, strict=True))
    }
    changes, _ = plan.over(tokens)
    stream, rest = torch.randn(11, WIDTH), torch.randn(11, WIDTH)
    fixed = tables()
    for _ in range(2):  # and once more: what was written before is gone
        fixed.write(changes, {}, [1])
        for layer in range(-1, LAYERS):
            whole = stream + rest
            for change in changes.get(layer, ()):
                change.apply(whole, {})
            out = fixed.visit(layer, stream, rest)
            torch.testing.assert_close(out + rest, whole)
            torch.testing.assert_close(fixed.stream(layer, 11), whole)
            untouched = torch.equal(out, stream)
            assert untouched == (layer != 1)
        assert torch.equal(fixed.visit(1, stream, rest)[6:8], stream[6:8]), "who is not steered keeps the bits"
    fixed.write({}, {}, [])
    assert torch.equal(fixed.visit(1, stream, None), stream)


def test_tables_replace_a_stream() -> None:
    fixed, stream, rest = tables(), torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    wanted = torch.randn(2, WIDTH)
    fixed.write({}, {1: wanted[0], 3: wanted[1]}, [])
    out = fixed.visit(LAYERS - 1, stream, rest) + rest
    torch.testing.assert_close(out[[1, 3]], wanted)
    assert torch.equal(out[[0, 2, 4]], (stream + rest)[[0, 2, 4]])


def test_tables_have_an_end_and_say_so() -> None:
    changes, _ = Plan([push(), push(1)], lambda layer: torch.device("cpu")).over(
        {i: Tokens(np.array([i]), np.array([0]), {Where(): np.array([True])}) for i in range(2)}
    )
    with pytest.raises(EngineError, match="more than 1 vectors"):
        tables(rows=1).write(changes, {}, [])
    with pytest.raises(EngineError, match="never fired"):
        refuse_stale(np.array([1.0, np.nan]), 3)


def test_what_graphs_cannot_do_is_refused_by_name() -> None:
    additions(push() + push(1).ramp(3) + push(where=Where("prompt")))
    gated = push().when(Gate("g", 0, DIRECTIONS[0, 0], above=0.1))
    for steering, said in ((push().ablate(), "is ablate"), (push().cap(0.1), "is cap"), (gated, "is gated")):
        with pytest.raises(EngineError, match=said) as error:
            additions(steering)
        assert "hf/" in str(error.value) and len(str(error.value).splitlines()) == 1
    many = Steering()
    for n in range(SLOTS + 1):
        many = many + push(where=Where(after=n))
    with pytest.raises(EngineError, match="room for"):
        additions(many)


# ── what is refused at the start ──


def test_another_vllm_is_refused_and_the_tested_versions_are_named() -> None:
    class Runner:
        """Of a version that has renamed what is needed."""

    with pytest.raises(ModelSupportError, match=r"_model_forward.*0\.32\.0"):
        require(Runner())


class Lax:
    """Has everything that it is asked for, and what it is told."""

    def __init__(self, **given: Any) -> None:
        self.__dict__ |= given

    def __getattr__(self, name: str) -> Any:
        return Lax()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"scheduler_config": Lax(async_scheduling=True)}, "--no-async-scheduling"),
        ({"parallel_config": Lax(pipeline_parallel_size=2)}, "tensor parallelism"),
    ],
)
def test_ways_of_running_that_nobody_tried_are_refused(given: dict[str, Any], said: str) -> None:
    tried = {
        "speculative_config": None,
        "scheduler_config": Lax(async_scheduling=False),
        "parallel_config": Lax(pipeline_parallel_size=1),
    }
    require(Lax(vllm_config=Lax(**tried)))
    with pytest.raises(ModelSupportError, match=said):
        require(Lax(vllm_config=Lax(**{**tried, **given})))


def test_tables_are_used_where_steps_are_replayed() -> None:
    for told, mode, expected in ((None, "NONE", False), (None, "FULL", True), (False, "FULL", False), (True, "NONE", True)):
        options = None if told is None else {REPLAY: told}
        config = Lax(additional_config=options, compilation_config=Lax(cudagraph_mode=Lax(name=mode)))
        assert replays(config) is expected


@pytest.mark.parametrize(
    "how", ["1", [1.0], [0.0, 1.0, 0, 1], [1.0, 0.0, 0, 1], [float("nan"), 1.0, 0, 1], ["a", "b", "c", "d"], 3]
)
def test_what_could_end_vllm_is_refused_before_it_gets_there(how: Any) -> None:
    vllm_draw.check(vllm_draw.said(Sampling(seed=2**63)))
    with pytest.raises(ValueError, match="not for requests from outside"):
        vllm_draw.check(how)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"affectlens\[vllm\]"):
        open_engine("vllm/smollm2-135m")
