"""Readings: one forward pass for what several studies ask, kept on disk, resumed, and never of another request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from affectlens import readings as readings_module
from affectlens.engine import Readout, Request, Result, Sampling, Where
from affectlens.engines.toy import ToyEngine
from affectlens.errors import FormatError
from affectlens.readings import Readings

MEAN, LAST = Readout((2, 4)), Readout((4,), Where(last=1), "last")


class Counting(ToyEngine):
    """A toy that counts what it ran and can be made to die."""

    def __init__(self, dies_after: int = 10**9) -> None:
        super().__init__()
        self.ran: list[Request] = []
        self.dies_after = dies_after

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            if len(self.ran) >= self.dies_after:
                raise KeyboardInterrupt
            self.ran.append(request)
            yield from super().run([request])


def texts(n: int, *readouts: Readout) -> list[Request]:
    return [Request(f"{word} the calm sea", readouts=readouts) for word in [f"word{i}" for i in range(n)]]


def same(a: Result, b: Result) -> None:
    assert (a.text, a.layout, a.finish, a.choice_logprobs) == (b.text, b.layout, b.finish, b.choice_logprobs)
    for x, y in zip(a.readings, b.readings, strict=True):
        for part in ("values", "norms", "positions"):
            np.testing.assert_array_equal(getattr(x, part), getattr(y, part))


@pytest.mark.parametrize(
    "request_",
    [
        Request("the calm sea", readouts=(MEAN, LAST)),
        Request((("user", "Hello"),), readouts=(LAST,), sampling=Sampling(max_tokens=5, seed=3)),
        Request((("Anna", "Hello"),), transcript=True, readouts=(Readout((1,), Where(role="Anna"), "none"),)),
        Request("the calm sea", choices=(" calm", " sad sea")),
        Request("the sea", readouts=(replace(MEAN, where=Where(role="nobody")),)),
    ],
)
def test_what_is_read_back_is_what_the_engine_gave(request_: Request, tmp_path: Path) -> None:
    kept = Readings(ToyEngine(), tmp_path)
    same(next(kept.read([request_])), next(ToyEngine().run([request_])))
    same(next(Readings(ToyEngine(), tmp_path).read([request_])), next(ToyEngine().run([request_])))


def test_two_studies_share_one_pass(tmp_path: Path) -> None:
    engine = Counting()
    kept = Readings(engine, tmp_path)
    kept.gather([*texts(5, MEAN), *texts(5, LAST), *texts(5, Readout((2, 4)))])
    assert len(engine.ran) == 5 and all(len(request.readouts) == 2 for request in engine.ran)
    for request, result in zip(texts(5, LAST, MEAN), kept.read(texts(5, LAST, MEAN)), strict=True):
        same(result, next(ToyEngine().run([request])))
    assert len(engine.ran) == 5


def test_a_readout_that_is_new_is_read_alone(tmp_path: Path) -> None:
    engine = Counting()
    Readings(engine, tmp_path).gather(texts(3, MEAN))
    kept = Readings(engine, tmp_path)
    kept.gather(texts(3, MEAN, LAST))
    assert [request.readouts for request in engine.ran[3:]] == [(LAST,)] * 3
    assert not kept.missing(texts(3, LAST, MEAN))


def test_what_differs_in_anything_but_readouts_is_another_request(tmp_path: Path) -> None:
    kept = Readings(ToyEngine(), tmp_path)
    chat = Request((("user", "Hello"),), readouts=(LAST,))
    kept.gather([chat])
    others = [replace(chat, transcript=True), replace(chat, prefill="I"), replace(chat, sampling=Sampling(seed=1))]
    assert len(kept.missing(others)) == 3
    assert not kept.missing([replace(chat, stream=True)])


def test_a_killed_run_goes_on_and_ends_in_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings_module, "SHARD", 4)
    asked = [*texts(10, MEAN), Request("the sea", sampling=Sampling(max_tokens=4), readouts=(LAST,))]
    whole = tmp_path / "whole"
    Readings(ToyEngine(), whole).gather(asked)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        Readings(Counting(dies_after=6), broken).gather(asked)
    engine = Counting()
    done: list[int] = []
    Readings(engine, broken).gather(asked, done.append)
    assert len(engine.ran) == sum(done) == 7  # four were kept
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {p.name: p.read_bytes() for p in broken.iterdir()}


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    Readings(ToyEngine(), tmp_path).gather(texts(2, MEAN))
    [shard] = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(FormatError, match="delete it and run again"):
        Readings(ToyEngine(), tmp_path)
