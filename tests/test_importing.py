"""Vectors from somebody's files, for a model at hand: the layer convention decides, and is never guessed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.numpy import save_file

from affectlens.activations import Text
from affectlens.engine import Readout, Where
from affectlens.engines.toy import ToyEngine
from affectlens.errors import AffectlensError, FormatError, MismatchError
from affectlens.exchange import CONVENTIONS, import_vectors
from affectlens.vectors import ConceptVectors

LAYERS, WIDTH = 6, 64


@lru_cache
def engine() -> ToyEngine:
    return ToyEngine()


def texts() -> list[Text]:
    return [Text(f"n{i}", engine().write(None, f"topic {i}", seed=i, words=70)) for i in range(6)]


def load(path: Path, convention: str = "block", **options: object) -> ConceptVectors:
    return import_vectors(path, engine(), convention=convention, texts=texts(), **options)  # type: ignore[arg-type]


def numbered(*numbers: int) -> dict[str, np.ndarray]:
    """Two concepts at these numbers; the first coordinate says which number a vector had."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number in numbers:
        for name in ("calm", "sad"):
            arrays[f"layer_{number}__{name}"] = rng.normal(size=WIDTH)
            arrays[f"layer_{number}__{name}"][0] = 1000 * (number + 1)
    return arrays


def number_of(vectors: ConceptVectors, layer: int) -> int:
    """Which number in the file the vectors of a layer had."""
    row = vectors.row(layer)
    return round(float(vectors.directions[row, 0, 0] * vectors.norms[row, 0]) / 1000) - 1


@pytest.mark.parametrize(("convention", "shift"), [("block", 0), ("block-from-1", 1), ("hidden-states", 1)])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_convention_decides(convention: str, shift: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"their vectors.{kind}"
    arrays = numbered(2, 3, 5)
    np.savez(path, **arrays) if kind == "npz" else save_file(arrays, path)
    vectors = load(path, convention)
    assert vectors.layers == tuple(n - shift for n in (2, 3, 5)) and vectors.names == ("calm", "sad")
    assert [number_of(vectors, n - shift) for n in (2, 3, 5)] == [2, 3, 5]
    assert vectors.method["convention"] == f"{convention}: {CONVENTIONS[convention]}"
    assert vectors.layer == (4 if shift else 3) and vectors.method["left out"] == "nothing"
    given = arrays["layer_3__sad"]
    np.testing.assert_allclose(vectors.at(3 - shift)[1], given / np.linalg.norm(given), rtol=1e-5, atol=1e-6)  # as they are


def test_what_is_no_layer_is_left_out_and_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **numbered(*range(LAYERS + 1)))
    vectors = load(tmp_path / "v.npz", "hidden-states")
    assert vectors.layers == (0, 1, 2, 3, 4) and number_of(vectors, 0) == 1
    assert vectors.method["left out"] == "0 (the embedding), 6 (what stands after the final norm)"
    vectors = load(tmp_path / "v.npz", "block-from-1")
    assert vectors.layers == (0, 1, 2, 3, 4, 5) and number_of(vectors, 5) == 6
    with pytest.raises(MismatchError, match="has a layer 6, which a model of 6 blocks does not have by this convention"):
        load(tmp_path / "v.npz")
    np.savez(tmp_path / "ends.npz", **numbered(0, LAYERS))
    with pytest.raises(FormatError, match="holds no layer of the residual stream"):
        load(tmp_path / "ends.npz", "hidden-states")


@pytest.mark.parametrize(("convention", "rows", "layers"), [("block", 6, 6), ("block-from-1", 6, 6), ("hidden-states", 7, 5)])
def test_a_row_for_each_layer(convention: str, rows: int, layers: int, tmp_path: Path) -> None:
    stacked = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    torch_file = {"calm": torch.tensor(stacked).bfloat16()}  # NumPy has none, people do
    from safetensors.torch import save_file as save_torch

    save_torch(torch_file, tmp_path / "v.safetensors")
    vectors = load(tmp_path / "v.safetensors", convention)
    assert vectors.layers == tuple(range(layers))
    row = torch_file["calm"].float().numpy()[1 if convention == "hidden-states" else 0]
    np.testing.assert_allclose(vectors.at(0)[0] * vectors.norms[0, 0], row, rtol=1e-5)
    save_torch({"calm": torch_file["calm"][1:].clone()}, tmp_path / "v.safetensors")
    with pytest.raises(MismatchError, match=rf"has {rows - 1} rows, and by this convention {rows} are wanted"):
        load(tmp_path / "v.safetensors", convention)


def test_control_vectors(tmp_path: Path) -> None:
    """llama.cpp's generator names what it measured after block L direction.(L + 1); repeng names it direction.L."""
    writer = GGUFWriter(tmp_path / "happy.gguf", "controlvector")
    vectors = {n: np.random.default_rng(n).normal(size=WIDTH).astype(np.float32) for n in (2, 3)}
    for n, vector in vectors.items():
        writer.add_tensor(f"direction.{n}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    applied, measured = load(tmp_path / "happy.gguf"), load(tmp_path / "happy.gguf", "block-from-1", name="joy")
    assert (applied.names, applied.layers) == (("happy",), (2, 3)) and (measured.names, measured.layers) == (("joy",), (1, 2))
    np.testing.assert_allclose(measured.at(1)[0], applied.at(2)[0])


def test_what_is_measured(tmp_path: Path) -> None:
    """Norms, centre and baseline are those of the model in the neutral texts, from the given token on."""
    np.savez(tmp_path / "v.npz", **numbered(2, 4))
    vectors = load(tmp_path / "v.npz", first_token=20)
    readouts = (Readout((2, 4), Where(after=19)), Readout((2, 4), Where(after=19), "norm"))
    read = [[next(engine().read([t.text], readout)) for readout in readouts] for t in texts()]
    means = np.stack([mean.values for mean, _ in read])
    tokens = np.array([len(mean.positions) for mean, _ in read])
    np.testing.assert_allclose(vectors.centre, means.mean(0), rtol=1e-4, atol=1e-5)
    unit = (np.stack([norm.values for _, norm in read]) * tokens[:, None]).sum(0) / tokens.sum()
    np.testing.assert_allclose(vectors.residual_norms, unit, rtol=1e-4)
    scores = np.array([vectors.scores(r, layer=4, kind="z") for r in engine().read(
        [t.text for t in texts()], vectors.readout(4, where=Where(after=19), pool="mean"))])  # fmt: skip
    np.testing.assert_allclose(scores.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(scores.std(0), 1, rtol=1e-3)
    vectors.check(engine().info)
    pushed = (0.1 * vectors["sad"]).at_layer(vectors.layer)[0][0].vector
    np.testing.assert_allclose(np.linalg.norm(pushed), 0.1 * unit[vectors.row()], rtol=1e-4)


def test_means_become_contrasts_only_when_asked(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **numbered(3))
    as_given, contrast = load(tmp_path / "v.npz"), load(tmp_path / "v.npz", contrast=True)
    assert as_given.similarity(3)[0, 1] > 0.99
    np.testing.assert_allclose(contrast.similarity(3)[0, 1], -1, atol=1e-5)
    only = {key: array for key, array in numbered(3).items() if "sad" in key}
    np.savez(tmp_path / "one.npz", **only)
    with pytest.raises(FormatError, match="one concept, so there is no mean"):
        load(tmp_path / "one.npz", contrast=True)


def hostile() -> dict[str, tuple[dict[str, np.ndarray], type[AffectlensError], str]]:
    good = numbered(3)
    calm = good["layer_3__calm"]
    return {
        "another width": ({"layer_3__calm": np.ones(8)}, MismatchError, "is 8 wide but toy is 64 wide"),
        "two widths": (good | {"layer_3__sad": np.ones(8)}, FormatError, "different widths"),
        "a concept lacks a layer": (good | {"layer_4__calm": calm}, FormatError, "has no 'sad' at layer 4"),
        "not finite": (good | {"layer_3__sad": calm * np.nan}, FormatError, "not finite"),
        "zero": (good | {"layer_3__sad": calm * 0}, FormatError, "no direction of 'sad' at layer 3"),
        "integers": ({"layer_3__calm": np.ones(WIDTH, np.int64)}, FormatError, "of int64: give floats"),
        "no layer": ({"calm": calm}, FormatError, r"'calm' of shape \(64,\): give layer_N__NAME"),
        "three axes": ({"all": np.ones((6, 2, WIDTH))}, FormatError, "give layer_N__NAME"),
        "nothing": ({}, FormatError, "nothing at all"),
        "no such layer": ({"layer_7__calm": calm}, MismatchError, "a layer 7"),
    }


@pytest.mark.parametrize("case", sorted(hostile()))
def test_files_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    arrays, error, says = hostile()[case]
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(error, match=says) as caught:
        load(tmp_path / "v.npz")
    assert "\n" not in str(caught.value)


def test_no_guessing_and_no_strange_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **numbered(3))
    with pytest.raises(FormatError, match="say what layer N is, one of block, block-from-1, hidden-states"):
        load(tmp_path / "v.npz", "llama")
    (tmp_path / "v.safetensors").write_bytes(b"\x80\x04pickle")
    for name in ("v.safetensors", "missing.safetensors", "v.bin", "missing.gguf", "missing.npz"):
        with pytest.raises(FormatError):
            load(tmp_path / name)
