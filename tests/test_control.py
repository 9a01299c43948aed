"""Steering in other programs' formats. Where the other program is installed, what it adds is compared with what we add.

``make test`` installs the other libraries (``tests/peers.txt``); elsewhere these tests are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import families
from affectlens.control import (
    BLOCKS,
    additions,
    as_steering,
    export_gguf,
    export_lm_eval,
    export_safetensors,
    read_control,
    read_gguf,
    read_safetensors,
)
from affectlens.engine import Steering, Where
from affectlens.engines.residual import find_blocks, steer
from affectlens.errors import AffectlensError, EngineError, FormatError, MismatchError
from affectlens.vectors import ConceptVectors

IDS = torch.tensor([[1, 40, 41, 90, 17, 200, 63]])
"""A beginning-of-sequence token and some more: all of these programs steer it, too."""


def vectors(seed: int = 0, family: str = "llama") -> ConceptVectors:
    """Random vectors for the tiny models, whose mean residual norms differ between layers."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(families.LAYERS, 3, families.WIDTH))
    model = {
        "id": f"tiny/{family}",
        "family": family,
        "n_layers": families.LAYERS,
        "width": families.WIDTH,
        "fingerprint": "ab12",
    }
    size = (families.LAYERS, 3)
    return ConceptVectors(
        names=("angry", "calm", "sad"),
        layers=tuple(range(families.LAYERS)),
        layer=2,
        directions=(directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32),
        norms=np.ones(size, np.float32),
        centre=np.zeros((families.LAYERS, families.WIDTH), np.float32),
        residual_norms=np.array([3, 5, 8, 13], np.float32),
        neutral=(np.zeros((0, families.WIDTH), np.float32),) * families.LAYERS,
        baseline=np.ones((*size, 2), np.float32),
        stability=np.ones(size, np.float32),
        counts=np.ones(3, np.int64),
        model=model,
    )


def mixture(family: str = "llama") -> Steering:
    """Two concepts at different layers, so that an error in layer, unit or division shows."""
    v = vectors(family=family)
    return 0.6 * v["calm"].on(1, 2) - 0.4 * v["sad"].on(2) + 0.5 * v["angry"].on(3)


@contextmanager
def outputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """What every block gives, in order, as the next one sees it: the last hook to be called sees what the others did."""
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    blocks = list(find_blocks(model))
    handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks[1:]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def ours(model: Any, steering: Steering) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with steer(model, steering), outputs(model) as seen:
        return model(IDS).logits, seen


def assert_same(theirs: tuple[torch.Tensor, list[torch.Tensor]], model: Any, steering: Steering) -> None:
    """Logits and every block's output agree, and the steering was not idle."""
    logits, seen = ours(model, steering)
    plain = model(IDS).logits.detach()
    assert (logits - plain).abs().max() > 0.1
    torch.testing.assert_close(theirs[0], logits, rtol=1e-5, atol=1e-5)
    assert len(theirs[1]) == len(seen) == families.LAYERS - 1
    for mine, other in zip(seen, theirs[1], strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- repeng


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> Any:
    # repeng 0.4.0 names np.float_ in an annotation, which NumPy 2 has no more; nothing else in it minds.
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    return pytest.importorskip("repeng", reason="repeng is not installed (tests/peers.txt)")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repeng_adds_what_we_add(family: str, repeng: Any, tmp_path: Path) -> None:
    mix, model = mixture(family), families.build(family)
    path = export_gguf(mix, tmp_path / "mix.gguf", model=vectors(family=family).model)
    control = repeng.ControlVector.import_gguf(path)
    assert control.model_type == family and sorted(control.directions) == [1, 2, 3]

    wrapped = repeng.ControlModel(families.build(family), [1, 2, 3])
    wrapped.set_control(control, 1.0)
    seen: list[torch.Tensor] = []
    blocks = repeng.control.model_layer_list(wrapped)
    for block in list(blocks)[1:]:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
            with_kwargs=True,
        )
    with torch.no_grad():
        logits = wrapped(IDS).logits
    assert_same((logits, seen), model, mix)


def test_repengs_file_becomes_our_steering(repeng: Any, tmp_path: Path) -> None:
    """Their vectors, unit or not, with their coefficient, and a steering of ours that does the same."""
    random = np.random.default_rng(3)
    directions = {layer: random.normal(size=families.WIDTH).astype(np.float32) for layer in (1, 3)}
    theirs = repeng.ControlVector("llama", directions)
    theirs.export_gguf(tmp_path / "theirs.gguf")
    read = read_gguf(tmp_path / "theirs.gguf")
    assert list(read) == [1, 3]
    for layer, direction in directions.items():
        np.testing.assert_array_equal(read[layer], direction)

    wrapped = repeng.ControlModel(families.build("llama"), [1, 3])
    wrapped.set_control(theirs, -0.7)
    with torch.no_grad():
        logits = wrapped(IDS).logits
    mine, _ = ours(families.build("llama"), -0.7 * as_steering(read, vectors()))
    torch.testing.assert_close(mine, logits, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- steering-vectors


@pytest.fixture
def steering_vectors() -> Any:
    return pytest.importorskip("steering_vectors", reason="steering-vectors is not installed (tests/peers.txt)")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steering_vectors_adds_what_we_add(family: str, steering_vectors: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, v = families.build(family), vectors(family=family)
    mix = mixture(family) + 0.3 * v["angry"].on(0)
    path = export_safetensors(mix, tmp_path / "mix.safetensors", model=v.model)
    theirs = steering_vectors.SteeringVector({int(name.split(".")[1]): vector for name, vector in load_file(path).items()})
    with torch.no_grad(), theirs.apply(model), outputs(model) as seen:
        logits = model(IDS).logits
    assert_same((logits, seen), model, mix)


def test_steering_vectors_become_our_steering(steering_vectors: Any) -> None:
    random = np.random.default_rng(4)
    activations = {layer: torch.tensor(random.normal(size=families.WIDTH), dtype=torch.float32) for layer in (0, 2)}
    theirs, model = steering_vectors.SteeringVector(activations), families.build("llama")
    with torch.no_grad(), theirs.apply(model, multiplier=1.5), outputs(model) as seen:
        logits = model(IDS).logits
    mine = 1.5 * as_steering({n: a.numpy() for n, a in theirs.layer_activations.items()}, vectors())
    assert_same((logits, seen), model, mine)


# ----------------------------------------------------------------------- lm-evaluation-harness


def lm_eval_logits(family: str, path: Path, tmp_path: Path) -> torch.Tensor:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (tests/peers.txt)")
    from lm_eval.models.hf_steered import SteeredModel

    families.save(family, tmp_path / family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SteeredModel(pretrained=str(tmp_path / family), steer_path=str(path), device="cpu", dtype="float32")
    with torch.no_grad():
        return theirs._model_call(IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_harness_adds_what_we_add(family: str, tmp_path: Path) -> None:
    mix = mixture(family)
    path = export_lm_eval(mix, tmp_path / "mix.pt", model=vectors(family=family).model)
    logits = lm_eval_logits(family, path, tmp_path)
    torch.testing.assert_close(logits, ours(families.build(family), mix)[0], rtol=1e-5, atol=1e-5)


def test_the_harness_clamps_what_we_clamp(tmp_path: Path) -> None:
    v = vectors()
    mix = v["calm"].on(1).clamp(0.7) + v["sad"].on(2).ablate() + 0.5 * v["angry"].on(3)
    path = export_lm_eval(mix, tmp_path / "mix.pt", model=v.model)
    logits = lm_eval_logits("llama", path, tmp_path)
    model = families.build("llama")
    torch.testing.assert_close(logits, ours(model, mix)[0], rtol=1e-4, atol=1e-4)
    assert (logits - model(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(families.TEXT))
def test_the_harness_finds_the_blocks_of_every_family(family: str) -> None:
    """The names of modules that the export writes, looked up as the harness looks them up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = families.build(family)
    try:
        blocks = find_blocks(model)
    except AffectlensError:
        pytest.skip("no residual stream")
    named = dict(model.base_model.named_modules())
    for layer, block in enumerate(blocks):
        assert named[f"{BLOCKS.get(family, 'layers')}.{layer}"] is block


def test_the_harness_file_is_data_and_always_the_same(tmp_path: Path) -> None:
    one = export_lm_eval(mixture(), tmp_path / "one.pt", model=vectors().model)
    two = export_lm_eval(mixture(), tmp_path / "two.pt", model=vectors().model, blocks="language_model.layers")
    again = export_lm_eval(mixture(), tmp_path / "again.pt", model=vectors().model)
    assert one.read_bytes() == again.read_bytes()
    content = torch.load(one, weights_only=True)
    assert list(content) == ["layers.1", "layers.2", "layers.3"]
    assert {type(value) for entry in content.values() for value in entry.values()} == {torch.Tensor, float, str, type(None)}
    assert next(iter(torch.load(two, weights_only=True))) == "language_model.layers.1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v["calm"] * 0.5 + v["sad"].clamp(1.0), "does one thing at a layer, and 'sad' is the second at layer 2"),
        (lambda v: v["calm"].ablate() + v["sad"].ablate(), "'sad' is the second"),
        (lambda v: 0.5 * v["calm"].ablate(), "cannot ablate 0.5 of 'calm'"),
        (lambda v: v["calm"].at(Where("response")), "adds at every position"),
        (lambda v: v["calm"].clamp(1.0).at(Where("response")), "adds at every position"),
        (lambda v: 0 * v["calm"], "adds nothing"),
    ],
)
def test_what_the_harness_cannot_do(change: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        export_lm_eval(change(vectors()), tmp_path / "x.pt", model=vectors().model)
    assert says in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_file_of_the_harness_is_never_read(tmp_path: Path) -> None:
    path = export_lm_eval(mixture(), tmp_path / "ours.pt", model=vectors().model)
    with pytest.raises(FormatError, match=r"name a file that ends with \.gguf, \.safetensors"):
        read_control(path)


# --------------------------------------------------------------------------------- all of them


def test_additions_and_back() -> None:
    v = vectors()
    added = additions(mixture(), model=v.model)
    np.testing.assert_allclose(added[1], 0.6 * 5 / 2 * v.directions[1, 1], rtol=1e-6)
    np.testing.assert_allclose(added[2], 0.6 * 8 / 2 * v.directions[2, 1] - 0.4 * 8 * v.directions[2, 2], rtol=1e-5, atol=1e-6)
    again = additions(as_steering(added, v, name="mix"), model=v.model)
    assert list(again) == list(added)
    for layer, vector in added.items():
        np.testing.assert_allclose(again[layer], vector, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(additions(2 * as_steering(added, v), model=v.model)[3], 2 * added[3], rtol=1e-6, atol=1e-6)


def test_every_format_reads_what_it_wrote(tmp_path: Path) -> None:
    v = vectors()
    for export, file in ((export_gguf, "a.gguf"), (export_safetensors, "a.safetensors")):
        read = read_control(export(mixture(), tmp_path / file, model=v.model))
        assert list(read) == [1, 2, 3]
        for layer, vector in additions(mixture(), model=v.model).items():
            np.testing.assert_array_equal(read[layer], vector)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.safetensors"]
    with pytest.raises(FormatError, match=r"name a file that ends with \.gguf"):
        read_control("a.bin")


def test_what_cannot_become_a_steering() -> None:
    v = vectors()
    for added, error, says in [
        ({9: np.ones(families.WIDTH)}, MismatchError, "no vectors at layer 9"),
        ({1: np.ones(5)}, MismatchError, "shape \\(5,\\) at layer 1"),
        ({1: np.full(families.WIDTH, np.inf)}, FormatError, "not finite"),
        ({1: np.zeros(families.WIDTH)}, FormatError, "adds nothing"),
        ({}, FormatError, "adds nothing"),
    ]:
        with pytest.raises(error, match=says):
            as_steering(added, v)


def test_read_safetensors_refuses_other_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for tensors, says in [
        ({"calm": np.ones(4, np.float32)}, "use affectlens import"),
        ({"direction.01": np.ones(4, np.float32)}, "no vector direction.L"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "no vector direction.L"),
        ({"direction.1": np.ones(4, np.int32)}, "no vector direction.L"),
        ({"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)}, "different widths"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, "not finite"),
        ({}, "no directions"),
    ]:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match=says):
            read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    for name in ("cut.safetensors", "missing.safetensors"):
        with pytest.raises(FormatError, match="no whole safetensors file"):
            read_safetensors(tmp_path / name)
