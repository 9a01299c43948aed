"""The transformers engine gives on an accelerator what it gives on the processor: ``pytest tests/gpu`` where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import families
from affectlens.engine import Gate, Readout, Request, Sampling, Steering, Term
from affectlens.engines.hf import HFEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TEXTS = ["The harbour was quiet at nine.", "Two boxes stood by the door, and nobody came to take them away."]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3_moe", "falcon_h1"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HFEngine, HFEngine]:
    folder: Path = families.save(request.param, tmp_path_factory.mktemp(request.param))
    cpu, cuda = (HFEngine.load(str(folder), device=device, dtype="float32") for device in ("cpu", "cuda"))
    return cpu, cuda


def push(engine: HFEngine, strength: float) -> Steering:
    direction = np.random.default_rng(0).normal(size=(1, engine.info.width)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    return Steering((Term("push", strength, (1,), (1,), direction, np.ones(1, np.float32)),))


def test_same_fingerprint(pair: tuple[HFEngine, HFEngine]) -> None:
    assert pair[0].info.fingerprint == pair[1].info.fingerprint


def everything(engine: HFEngine) -> Steering:
    """Limits, a clamp, a gate and schedules at once, on directions that are not orthogonal."""
    x = np.random.default_rng(1).normal(size=(4, engine.info.width)).astype(np.float32)
    x = (x + x[0]) / np.linalg.norm(x + x[0], axis=1, keepdims=True)
    terms = [Steering((Term(f"d{k}", 1.0, (1,), (1,), x[k : k + 1], np.ones(1, np.float32)),)) for k in range(4)]
    gated = (2.0 * terms[3]).when(Gate("d1", 0, x[1], above=0.0)).decay(4)
    return terms[0].cap(0.1) + terms[1].floor(0.2) + terms[2].clamp(-0.5).ramp(3) + gated


@pytest.mark.parametrize("make", [lambda e: push(e, 0.0), lambda e: push(e, 3.0), everything], ids=["0", "3", "everything"])
def test_readings_and_replies_agree(pair: tuple[HFEngine, HFEngine], make: Callable[[HFEngine], Steering]) -> None:
    readout = Readout(tuple(range(-1, pair[0].info.n_layers)), pool="none")
    sampling = Sampling(max_tokens=6, temperature=0)
    results = [list(e.run(Request(t, sampling=sampling, readouts=(readout,), steering=make(e)) for t in TEXTS)) for e in pair]
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert on_cpu.layout.ids == on_cuda.layout.ids
        np.testing.assert_allclose(on_cuda.readings[0].values, on_cpu.readings[0].values, rtol=1e-3, atol=1e-3)
