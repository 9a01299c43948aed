"""Compiled blocks: they run when texts are read and at no other time, and nothing else is given to who asked for them.

That what they read is the same is the contract's to say, which runs on an engine with compiled blocks, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import families
from affectlens.engine import Readout, Request, Sampling, Where
from affectlens.engines import checks
from affectlens.engines.hf import HFEngine
from affectlens.errors import ModelSupportError

pytestmark = pytest.mark.skipif(not families.COMPILES, reason="needs a C++ compiler")

EVERYTHING = Readout(tuple(range(families.LAYERS)), Where(), "none")
TEXTS = ["The calm sea lay in the morning light.", "She slammed the door.", "Rain."]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engine(**how: Any) -> HFEngine:
    return HFEngine.around(families.build("llama"), tokenizer=families.tiny_tokenizer(), **how)


def counted(calls: list[int]) -> Callable[[Any], list[Callable[..., Any]]]:
    """Stands in for the compiler: the block's own forward pass, counted."""

    def count(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return forward(*args, **kwargs)

        return run

    return lambda blocks: [count(block.forward) for block in blocks]


def test_one_graph_serves_all_blocks_and_every_length() -> None:
    torch._dynamo.reset()
    one = engine(compile=True)
    for _ in one.read(TEXTS * 3, EVERYTHING):
        pass
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= before <= 6  # one alone, one padded, one in a row, some of them again when lengths are no longer constant
    for _ in one.read([text * n for n in (2, 5) for text in TEXTS], EVERYTHING):
        pass
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_blocks_are_compiled_for_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]
    monkeypatch.setattr(checks, "compiled", counted(calls))
    one = engine(compile=True)
    calls[0] = 0
    next(iter(one.read(TEXTS[:1], EVERYTHING)))
    assert calls[0] == families.LAYERS
    next(one.run([Request(TEXTS[0], sampling=Sampling(max_tokens=2, temperature=0))]))
    assert calls[0] == families.LAYERS
    assert not any("forward" in vars(block) for block in one.blocks)


def test_the_model_has_its_own_forward_passes_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(compile=True)

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    one.compiled = [fails] * families.LAYERS
    with pytest.raises(MemoryError):
        next(iter(one.read(TEXTS[:1], EVERYTHING)))
    assert not any("forward" in vars(block) for block in one.blocks)


def test_a_forward_pass_that_somebody_has_put_there_is_put_there_again() -> None:
    model = families.build("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own
    one = HFEngine.around(model, tokenizer=families.tiny_tokenizer(), compile=True)
    next(iter(one.read(TEXTS[:1], EVERYTHING)))
    assert vars(model.model.layers[1])["forward"] is own


def test_weights_that_change_later_are_read_as_they_are() -> None:
    one, two = engine(compile=True), engine()
    with torch.no_grad():
        for each in (one, two):
            each.blocks[2].mlp.down_proj.weight.mul_(3)
    for got, want in zip(one.read(TEXTS, EVERYTHING), two.read(TEXTS, EVERYTHING), strict=True):
        np.testing.assert_allclose(got.values, want.values, rtol=1e-3, atol=1e-4)


def test_blocks_that_cannot_be_compiled_whole_are_refused() -> None:
    model = families.build("llama")
    block = model.model.layers[1]
    own = type(block).forward

    def breaks(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return own(block, hidden, *args, **kwargs)

    block.forward = breaks
    with pytest.raises(ModelSupportError, match=r"cannot be compiled here \(.+\): leave out compile"):
        HFEngine.around(model, tokenizer=families.tiny_tokenizer(), compile=True)
    HFEngine.around(model, tokenizer=families.tiny_tokenizer())


def test_blocks_that_give_something_else_when_compiled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(blocks: Any) -> list[Callable[..., Any]]:
        return [lambda hidden, *_, forward=block.forward, **kwargs: forward(hidden * 1.1, **kwargs) for block in blocks]

    monkeypatch.setattr(checks, "compiled", wrong)
    with pytest.raises(ModelSupportError, match="give something else when compiled"):
        engine(compile=True)


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic, fullgraph: model)
    with pytest.raises(ModelSupportError, match="is too old to compile blocks"):
        engine(compile=True)
