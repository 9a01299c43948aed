"""Sparse autoencoders in SAELens format: every kind by hand, every refusal, and SAELens itself where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from affectlens.errors import FormatError, MismatchError, UnknownName
from affectlens.sparse import SparseAutoencoder, as_vectors, feature_gain
from planted import toy_bench

KINDS = ("standard", "topk", "jumprelu", "gated")
WIDTH, FEATURES = 8, 20


def coder(architecture: str = "standard", **changes: Any) -> SparseAutoencoder:
    rng = np.random.default_rng(KINDS.index(architecture))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    own = {
        "standard": {},
        "topk": {"k": 3},
        "jumprelu": {"threshold": np.abs(draw(FEATURES))},
        "gated": {"gate_bias": draw(FEATURES), "gate_scale": 0.3 * draw(FEATURES)},
    }[architecture]
    weights = {"encoder": draw(WIDTH, FEATURES), "encoder_bias": 0.3 * draw(FEATURES), "decoder": draw(FEATURES, WIDTH)}
    return SparseAutoencoder(2, **weights, decoder_bias=draw(WIDTH), architecture=architecture, **{**own, **changes})


def residuals(n: int = 30) -> np.ndarray:
    return np.random.default_rng(9).normal(2, 3, size=(n, WIDTH)).astype(np.float32)


def by_hand(sae: SparseAutoencoder, x: np.ndarray) -> np.ndarray:
    """One token and one feature at a time, in the words of the papers."""
    out = np.zeros((len(x), len(sae)))
    for t, row in enumerate(x.astype(np.float64)):
        onto = (row - sae.decoder_bias) @ sae.encoder
        for f in range(len(sae)):
            a = onto[f] + sae.encoder_bias[f]
            if sae.architecture == "gated":
                a = onto[f] * np.exp(sae.gate_scale[f]) + sae.encoder_bias[f] if onto[f] + sae.gate_bias[f] > 0 else 0
            if sae.architecture == "jumprelu" and a <= sae.threshold[f]:
                a = 0
            out[t, f] = max(a, 0)
        if sae.k:
            out[t, np.argsort(out[t])[: -sae.k]] = 0
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_by_hand(kind: str) -> None:
    sae, x = coder(kind), residuals()
    fired = sae.encode(x)
    assert fired.dtype == np.float32 and 0 < (fired > 0).mean() < 0.9
    np.testing.assert_allclose(fired, by_hand(sae, x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.reconstruct(x), fired @ sae.decoder + sae.decoder_bias, rtol=1e-5)


def test_topk_fires_at_most_k_and_nothing_negative() -> None:
    sae = replace(coder("topk"), encoder_bias=np.full(FEATURES, -14, np.float32))
    fired = sae.encode(residuals())
    assert (fired >= 0).all() and ((fired > 0).sum(1) <= 3).all() and ((fired > 0).sum(1) < 3).any()
    assert ((replace(coder("topk"), k=FEATURES).encode(residuals()) > 0).sum(1) > 3).all()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_what_is_normalised_is_undone(normalize: str) -> None:
    """A complete dictionary gives back what it was given, whatever was done to it in between."""
    eye = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]).astype(np.float32)
    sae = SparseAutoencoder(0, eye.T, np.zeros(2 * WIDTH, "f"), eye, np.zeros(WIDTH, "f"), normalize=normalize)
    x = residuals()
    np.testing.assert_allclose(sae.reconstruct(x), x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sae.encode(5 * x), sae.encode(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    sae = coder(kind, about={"model_name": "tiny"})
    back = SparseAutoencoder.load(sae.save(tmp_path / "sae"))
    for name, value in vars(sae).items():
        if name != "about":
            np.testing.assert_array_equal(getattr(back, name), value)
    assert back.about == {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"}
    assert sorted(file.name for file in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the configuration, as another version writes it; None leaves a key out."""
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.5.hook_resid_post", 5),
        ("blocks.5.hook_resid_pre", 4),
        ("model.layers.7", 7),
        ("transformer.h.3", 3),
    ],
)
def test_hooks_become_layers(hook: str, layer: int, tmp_path: Path) -> None:
    folder = coder().save(tmp_path)
    rewrite(folder, metadata={"hook_name": hook})
    assert SparseAutoencoder.load(folder).layer == layer
    rewrite(folder, metadata=None, hook_point=hook)  # as SAELens wrote it before version 6
    assert SparseAutoencoder.load(folder).layer == layer


def test_older_top_k(tmp_path: Path) -> None:
    folder = coder("topk").save(tmp_path)
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_name": "blocks.2.hook_resid_post"}
    rewrite(folder, architecture="standard", k=None, metadata=None, **old)
    np.testing.assert_array_equal(SparseAutoencoder.load(folder).encode(residuals()), coder("topk").encode(residuals()))


def test_activations_that_count_unit_rows(tmp_path: Path) -> None:
    folder = coder("topk").save(tmp_path)
    rewrite(folder, rescale_acts_by_decoder_norm=True)
    back = SparseAutoencoder.load(folder)
    np.testing.assert_allclose(back.lengths, 1, rtol=1e-5)
    sae = replace(coder("topk"), k=None)
    fired = sae.encode(residuals()) * sae.lengths
    np.testing.assert_allclose(replace(back, k=None).encode(residuals()), fired, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "transcoder"}, "architecture 'transcoder': standard, topk, jumprelu, gated can be read"),
        ({"normalize_activations": "expected_average_only_in"}, "before its scaling"),
        ({"normalize_activations": "covariance_whitening"}, "before its scaling"),
        ({"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "not the output of a block"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "not the output of a block"),
        ({"metadata": {}}, "is of None, which is not the output"),
        ({"architecture": "jumprelu"}, "has no threshold"),
        ({"architecture": "gated"}, "has no b_gate"),
        ({"architecture": "topk"}, "how many features fire (k is None)"),
        ({"architecture": "topk", "k": 99}, "k is 99"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = coder().save(tmp_path)
    rewrite(folder, **changes)
    with pytest.raises(FormatError) as caught:
        SparseAutoencoder.load(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files(tmp_path: Path) -> None:
    folder = coder().save(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-5], b"", b"\x80\x04pickle"):
        weights.write_bytes(content)
        with pytest.raises(FormatError, match="broken or missing"):
            SparseAutoencoder.load(folder)
    good = {"W_enc": np.ones((4, 6), "f"), "W_dec": np.ones((6, 4), "f"), "b_enc": np.ones(6, "f"), "b_dec": np.ones(4, "f")}
    for change in ({"b_enc": np.ones(5, "f")}, {"W_dec": np.ones((4, 6), "f")}, {"W_enc": np.ones(6, "f")}):
        save_file(good | change, weights)
        with pytest.raises(FormatError, match="do not fit"):
            SparseAutoencoder.load(folder)
    save_file(good | {"b_dec": np.full(4, np.nan, "f")}, weights)
    with pytest.raises(FormatError, match="not finite"):
        SparseAutoencoder.load(folder)
    weights.unlink()
    with pytest.raises(FormatError, match="broken or missing"):
        SparseAutoencoder.load(folder)
    with pytest.raises(FormatError, match=r"no cfg\.json"):
        SparseAutoencoder.load(tmp_path)


# ----------------------------------------------------------------------------------- SAELens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("centred", [True, False])
def test_saelens_reads_what_we_write_and_does_the_same(kind: str, normalize: str, centred: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip(
        "sae_lens", reason="SAELens is not installed: pip install sae-lens, in an environment of its own"
    )
    import torch

    sae = coder(kind, normalize=normalize, centred=centred)
    theirs = sae_lens.SAE.load_from_disk(sae.save(tmp_path / "ours"))
    with torch.no_grad():
        fired = theirs.encode(torch.tensor(residuals()))
        back = theirs(torch.tensor(residuals()))
    np.testing.assert_allclose(sae.encode(residuals()), fired.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae.reconstruct(residuals()), back.numpy(), rtol=1e-4, atol=1e-3)
    theirs.save_model(tmp_path / "theirs")
    np.testing.assert_array_equal(SparseAutoencoder.load(tmp_path / "theirs").encode(residuals()), sae.encode(residuals()))


# ---------------------------------------------------------------------------------- steering


def toy_coder(layer: int = 4) -> SparseAutoencoder:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(10, 64)).astype(np.float32)
    return SparseAutoencoder(layer, np.ascontiguousarray(rows.T), np.zeros(10, "f"), rows, np.zeros(64, "f"))


def test_a_gain_adds_so_many_typical_activations() -> None:
    vectors, sae = toy_bench().vectors, toy_coder()
    steering = feature_gain(sae, vectors, 7, gain=-1.5, activation=0.8)
    ((push,), _) = steering.at_layer(4)
    np.testing.assert_allclose(push.vector, -1.5 * 0.8 * sae.decoder[7], rtol=1e-5, atol=1e-6)
    assert steering.layers == (4,) and steering.terms[0].name == "feature 7"


def test_features_as_vectors(tmp_path: Path) -> None:
    bench, sae = toy_bench(), toy_coder()
    texts = bench.activations.layer(4)
    own = as_vectors(sae, bench.vectors, [7, 2], texts=texts)
    np.testing.assert_allclose(own.at(4), sae.directions[[7, 2]], rtol=1e-6)
    np.testing.assert_allclose(own.norms[0], sae.lengths[[7, 2]], rtol=1e-6)
    own.check(bench.engine.info)
    back = type(own).load(own.save(tmp_path / "parts"))
    assert back.names == ("feature 7", "feature 2") and back.layer == 4
    reading = next(bench.engine.read(["the calm sea"], back.readout(pool="mean")))
    assert np.isfinite(back.scores(reading, kind="z")).all()
    with pytest.raises(MismatchError, match="without the baseline"):
        as_vectors(sae, bench.vectors, [7]).scores(reading, kind="z")


def test_what_has_no_features() -> None:
    vectors, sae = toy_bench().vectors, toy_coder()
    with pytest.raises(UnknownName, match="unknown feature '10'"):
        as_vectors(sae, vectors, [10])
    with pytest.raises(MismatchError, match="8 wide and the vectors are 64 wide"):
        as_vectors(coder(), vectors, [1])
    with pytest.raises(MismatchError, match="no vectors at layer 9"):
        as_vectors(toy_coder(9), vectors, [1])
    with pytest.raises(FormatError, match="feature 3 has a decoder row of zeros"):
        as_vectors(replace(sae, decoder=sae.decoder * (np.arange(10) != 3)[:, None]), vectors, [1, 3])
