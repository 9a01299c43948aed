"""vLLM beside transformers, its caches, its tables, and our server in front of it; run in the environment that has it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import vllm_cases as cases
from affectlens.engine import Readout, Request, Result, Sampling, Steering, Where, open_engine
from affectlens.engines.hf import HFEngine
from affectlens.errors import EngineError, ModelSupportError
from vllm_here import DEMO, STEP, opened

GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Any:
    return opened()


@pytest.fixture(scope="module")
def hf() -> HFEngine:
    return HFEngine.load(DEMO, dtype="float32", device="cpu")


def close(a: np.ndarray, b: np.ndarray, limit: float = 1e-3) -> None:
    assert a.shape == b.shape
    size = np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-9)
    assert np.abs((a - b) / size).max() < limit


# ── beside transformers ──


def test_it_is_the_same_model(engine: Any, hf: HFEngine) -> None:
    """So vectors of the one are vectors of the other."""
    for name in ("id", "family", "n_layers", "width", "fingerprint", "template", "n_parameters", "reply_token"):
        assert getattr(engine.info, name) == getattr(hf.info, name), name
    assert list(engine.vocabulary) == list(hf.vocabulary)
    for request in cases.requests(engine)[:3]:
        assert engine.layout(request) == hf.layout(request)


def test_everything_is_as_with_transformers(engine: Any, hf: HFEngine) -> None:
    """Steered in every mode, read at every token, prompts in parts: to a thousandth, and the same greedy tokens."""
    made = cases.requests(engine)
    assert max(len(engine.layout(request)) for request in made) > STEP
    for one, other in zip(engine.run(made), hf.run(made), strict=True):
        n = next((i for i, (a, b) in enumerate(zip(one.layout.ids, other.layout.ids, strict=False)) if a != b), len(one.layout))
        assert n == len(one.layout) == len(other.layout)
        np.testing.assert_allclose(one.choice_logprobs, other.choice_logprobs, atol=5e-3)
        for a, b in zip(one.readings, other.readings, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            close(a.values, b.values)


def test_residuals_are_unembedded_as_with_transformers(engine: Any, hf: HFEngine) -> None:
    x = np.random.default_rng(0).normal(size=(300, engine.info.width)).astype(np.float32) * 20
    np.testing.assert_allclose(engine.unembed(x), hf.unembed(x), atol=2e-2)


# ── the caches ──


class Cached:
    """How many tokens of each request came out of vLLM's cache."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: dict[str, int] = {}
        step = engine.vllm.step

        def watched() -> Any:
            outputs = step()
            for output in outputs:
                self.tokens[output.request_id] = max(self.tokens.get(output.request_id, 0), output.num_cached_tokens or 0)
            return outputs

        monkeypatch.setattr(engine.vllm, "step", watched)

    def take(self) -> int:
        found, self.tokens = max(self.tokens.values(), default=0), {}
        return found


def test_plain_steered_plain_leaves_plain_replies_as_they_were(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what they have in common lies in the cache, and is taken from there by those that may."""
    cached = Cached(engine, monkeypatch)
    story = "Once there was a lighthouse keeper who counted the ships that passed by his window every evening. " * 16
    plain = Request((("user", story + "What did he do?"),), sampling=replace(GREEDY, logprobs=1))
    push = cases.steering(engine, 0, 0.4)
    only_reply = cases.steering(engine, 0, 0.4, where=Where("response"))

    def run(steering: Steering) -> tuple[Result, int]:
        (result,) = engine.run([replace(plain, steering=steering)])
        return result, cached.take()

    first, before = run(Steering())
    again, taken = run(Steering())
    steered, at_first = run(push)
    twice, later = run(push)
    other, of_others = run(cases.steering(engine, 0, -0.4))
    reply, of_reply = run(only_reply)
    last, after = run(Steering())
    assert before == at_first == of_others == of_reply == 0, "nobody gets what was made under another steering"
    assert min(taken, later, after) > 100, "and everybody gets what was made under the same"
    assert first.text == again.text == last.text
    for result in (again, last):  # what is left to compute is divided differently, which rounds differently
        for one, expected in zip(result.logprobs, first.logprobs, strict=True):
            assert one.value == pytest.approx(expected.value, abs=1e-4)
    assert steered.layout == twice.layout and steered.text != first.text and other.text != first.text
    assert reply.layout.ids[: reply.layout.n_prompt + 1] == first.layout.ids[: first.layout.n_prompt + 1]


def test_a_reply_that_was_steered_is_not_in_the_next_turn(engine: Any) -> None:
    """A chat goes on: its earlier reply was generated steered, and is read plain now."""
    chat = (("user", "Tell me about the sea. " * 30),)
    sampling = Sampling(max_tokens=60, temperature=0)
    push = cases.steering(engine, 0, 0.15, where=Where("response"))
    (said,) = engine.run([Request(chat, sampling=sampling, steering=push)])
    readout = (Readout((10,), Where("prompt", last=1), "last"),)
    more = (*chat, ("assistant", said.text), ("user", "Go on."))
    sampled = Request(more, sampling=GREEDY)
    (now,) = engine.run([sampled])
    engine.vllm.reset_prefix_cache()
    (fresh,) = engine.run([sampled])
    assert now.text == fresh.text
    (read,) = engine.run([replace(sampled, sampling=None, readouts=readout)])
    assert np.isfinite(read.readings[0].values).all()


def test_what_is_read_is_computed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached prompt would have nothing to read."""
    cached = Cached(engine, monkeypatch)
    request = Request(cases.LONG * 4, readouts=(Readout((3,), Where(), "mean"),), choices=(" and the sea",))
    one, other = (next(engine.run([request])) for _ in range(2))
    assert cached.take() == 0 or np.isfinite(other.choice_logprobs).all()
    np.testing.assert_array_equal(one.readings[0].positions, other.readings[0].positions)
    close(one.readings[0].values, other.readings[0].values, 1e-5)
    np.testing.assert_allclose(one.choice_logprobs, other.choice_logprobs, atol=1e-3)


# ── refusals ──


def test_a_second_engine_in_this_process_is_refused(engine: Any) -> None:
    with pytest.raises(EngineError, match="one vLLM"):
        open_engine("vllm/smollm2-135m")


def test_gguf_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ModelSupportError, match="GGUF"):
        open_engine(f"vllm/{path}")


# ── a load ──


def mixed(engine: Any, n: int) -> list[Request]:
    """Short greedy requests: plain and steered each in its own way, with readings and without."""
    layer = engine.info.n_layers // 2
    onto = cases.directions(engine)[:, [layer]].transpose(1, 0, 2)
    words = ["the sea", "a door", "my keys", "the rain", "an old ship", "a lamp", "the wind"]
    steerings = [*cases.additions(engine)[:5], *cases.others(engine)]
    return [
        Request(
            f"I thought of {words[i % len(words)]} and",
            sampling=Sampling(max_tokens=4, temperature=0),
            steering=steerings[i % len(steerings)],
            readouts=(Readout((layer,), Where("response"), "none", onto),) if i % 2 else (),
        )
        for i in range(n)
    ]


def test_500_requests_that_come_and_go_give_what_each_gives_alone(engine: Any) -> None:
    distinct = mixed(engine, 63)
    alone = [next(engine.run([request])) for request in distinct]
    rng = random.Random(1)
    wanted = [rng.randrange(len(distinct)) for _ in range(500)]
    session, tickets, results = engine.session(), {}, {}
    waiting = list(wanted)
    while waiting or session.live:
        for _ in range(min(rng.randrange(4), len(waiting)) if session.live < 32 else 0):
            which = waiting.pop()
            tickets[session.submit(distinct[which])] = which
        for ticket, result in session.step():
            results[ticket] = result
    session.close()
    assert len(results) == 500
    different = 0
    for ticket, result in results.items():
        expected = alone[tickets[ticket]]
        if result.layout.ids != expected.layout.ids:
            different += 1
            continue
        for a, b in zip(result.readings, expected.readings, strict=True):
            close(a.values, b.values)
    assert different == 0


# ── tables of replayed steps ──


@pytest.fixture(scope="module")
def replaying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, HFEngine]]:
    """An engine whose taps work over fixed tables only, as they must in a CUDA graph, and transformers beside it."""
    folder = tmp_path_factory.mktemp("model")
    yield opened("replayed llama", folder), HFEngine.load(str(folder / "llama"), dtype="float32", device="cpu")


def test_fixed_tables_do_the_same(replaying: tuple[Any, HFEngine]) -> None:
    engine, hf = replaying
    made = cases.requests(engine, everything=False)
    for one, other in zip(engine.run(made), hf.run(made), strict=True):
        assert one.layout == other.layout
        np.testing.assert_allclose(one.choice_logprobs, other.choice_logprobs, atol=1e-4)
        for a, b in zip(one.readings, other.readings, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            close(a.values, b.values, 1e-4)
    x = np.random.default_rng(0).normal(size=(40, engine.info.width)).astype(np.float32)
    np.testing.assert_allclose(engine.unembed(x), hf.unembed(x), atol=1e-4)


def test_what_tables_cannot_do_is_refused_before_anything_runs(replaying: tuple[Any, HFEngine]) -> None:
    engine, _ = replaying
    for steering in cases.others(engine):
        with pytest.raises(EngineError, match="CUDA graphs can only add") as error:
            list(engine.run([Request("A", steering=steering)]))
        assert len(str(error.value).splitlines()) == 1 and "hf/" in str(error.value)
