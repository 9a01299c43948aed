"""The engines that the contract is checked on, each opened once: the toy, the toy on workers, eight tiny families, one
with compiled blocks, the demo.

In an environment that has vLLM (`make test` makes one of its own) it is checked on that instead, and on nothing else: other
engines are checked where the package's own pins hold.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest

import families
import vllm_here
from affectlens.engine import Engine, Gate, Readout, Request, Result, Steering, Term, Where, open_engine

# Plain, grouped-query, sliding windows in a multimodal wrapper, learned positions, ALiBi with tuples, experts, hybrid, parallel.
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "bloom", "mixtral", "falcon_h1", "gpt_neox")
COMPILED = "llama, compiled"
COMPILES = pytest.mark.skipif(not families.COMPILES, reason="needs a C++ compiler")
DEMO = "smollm2-135m"
VLLM = importlib.util.find_spec("vllm") is not None
ENGINES = (
    (*(f"vllm {name}" for name in vllm_here.FAMILIES), "vllm serve")
    if VLLM
    else ("toy", "ray", *FAMILIES, pytest.param(COMPILED, marks=COMPILES), pytest.param(DEMO, marks=pytest.mark.real))
)

TEXTS = ("the calm sea", "She slammed the door and shouted at everyone.", (("user", "I lost my keys."),))


@dataclass
class Subject:
    """An engine under test with what the tests need to know about it.

    Args:
        name: Of the engine.
        engine: The engine.
        tolerance: Largest relative difference of two residuals that should be equal but for rounding.
    """

    name: str
    engine: Engine
    tolerance: float

    @property
    def tiny(self) -> bool:
        """A random model that speaks bytes: of its texts few come back as the same tokens."""
        return self.name in (*FAMILIES, COMPILED) or self.name.startswith("vllm")

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer, the embedding included."""
        return tuple(range(-1, self.engine.info.n_layers))

    @property
    def middle(self) -> int:
        return self.engine.info.n_layers // 2

    @cached_property
    def everything(self) -> Readout:
        """Every token at every layer."""
        return Readout(self.layers, Where(), "none")

    @cached_property
    def norms(self) -> np.ndarray:
        """Mean residual norm at layers 0 to L - 1."""
        readout = Readout(self.layers[1:], pool="norm")
        return np.mean([reading.values for reading in self.engine.read(TEXTS, readout)], axis=0).astype(np.float32)

    @cached_property
    def directions(self) -> np.ndarray:
        """Three unit directions at every layer ``(3, L, D)`` that are clearly not orthogonal."""
        info = self.engine.info
        x = np.random.default_rng(5).normal(size=(3, info.n_layers, info.width))
        x[1:] += 0.5 * x[0]
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def steering(self, which: int, strength: float, *layers: int, where: Where = Where()) -> Steering:
        """``strength`` times a mean residual norm along one of the directions."""
        available = self.layers[1:]
        term = Term(f"d{which}", strength, layers or (self.middle,), available, self.directions[which], self.norms, where=where)
        return Steering((term,))

    def gate(self, which: int, layer: int, *, above: float | None = None, below: float | None = None) -> Gate:
        """Open where the cosine with one of the directions is above or below a value (default: above 0)."""
        above = 0.0 if above is below is None else above
        return Gate(f"d{which}", layer, self.directions[which, layer], above=above, below=below)

    def run(self, *requests: Request) -> list[Result]:
        return list(self.engine.run(requests))

    def alone(self, requests: Sequence[Request]) -> list[Result]:
        """Each request in a run of its own."""
        return [self.run(request)[0] for request in requests]

    def values(self, request: Request) -> np.ndarray:
        """The first reading of a request."""
        return self.run(request)[0].readings[0].values

    def apart(self, a: np.ndarray, b: np.ndarray) -> float:
        """Largest difference of two residuals, relative to the second."""
        assert a.shape == b.shape, (a.shape, b.shape)
        nothing = np.isnan(b)
        np.testing.assert_array_equal(np.isnan(a), nothing)
        if nothing.all():
            return 0.0
        # The embedding of a padding token is zero, and random models do generate it.
        size = np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
        return float(np.nanmax(np.linalg.norm(a - b, axis=-1) / size))

    def assert_same(self, a: Result, b: Result) -> None:
        """Two results are equal: words and layout exactly, numbers up to rounding."""
        assert (a.text, a.layout, a.finish) == (b.text, b.layout, b.finish)
        assert len(a.readings) == len(b.readings)
        for x, y in zip(a.readings, b.readings, strict=True):
            np.testing.assert_array_equal(x.positions, y.positions)
            assert self.apart(x.values, y.values) < self.tolerance
            np.testing.assert_allclose(x.norms, y.norms, rtol=self.tolerance)
        np.testing.assert_allclose(a.choice_logprobs, b.choice_logprobs, atol=20 * self.tolerance)


@pytest.fixture(scope="session", params=ENGINES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each engine in turn; pytest runs all tests of one before it opens the next."""
    name: str = request.param
    if name == "toy":
        from affectlens.engines.toy import ToyEngine

        yield Subject(name, ToyEngine(), 1e-5)
        return
    if name == "ray":
        if importlib.util.find_spec("ray") is None:  # not imported by the test: who imports it first says where it listens
            pytest.skip("Ray is not installed")
        with open_engine("toy", replicas=2) as engine:
            yield Subject(name, engine, 1e-5)
        return
    if name == "vllm serve":
        import served_vllm

        folder = tmp_path_factory.mktemp("served")
        model = families.save("llama", folder / "llama", **vllm_here.FAMILIES["llama"])
        command, url = served_vllm.vllm_serve(str(model), "--max-num-batched-tokens", "48", "--max-num-seqs", "48")
        with served_vllm.running(command, folder / "log", url=url), open_engine(f"vllm/{url}") as engine:
            yield Subject(name, engine, 1e-4)
        return
    if name.startswith("vllm"):
        family = name.partition(" ")[2]

        yield Subject(name, vllm_here.opened(family, tmp_path_factory.mktemp("model"), step=48), 1e-4)
        return
    import torch

    from affectlens.engines.hf import HFEngine

    # Threads that wait for each other, or for whatever else runs, take longer than these models.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if name == DEMO:
        yield Subject(name, HFEngine.load(DEMO, dtype="float32", device="cpu"), 2e-4)
    else:
        family = name.partition(",")[0]
        folder = families.save(family, tmp_path_factory.mktemp("model") / family)
        yield Subject(name, HFEngine.load(str(folder), dtype="float32", device="cpu", compile=name == COMPILED), 1e-4)
    torch.set_num_threads(threads)


@pytest.fixture
def hf(subject: Subject) -> Any:
    """The engine when it is one of transformers: the test looks at how that engine does it. Other engines skip."""
    if subject.name in ("toy", "ray") or subject.name.startswith("vllm"):
        pytest.skip("only for transformers")
    return subject.engine
