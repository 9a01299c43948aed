"""Sparse autoencoders of a model in SAELens format, and steering by their features.

A sparse autoencoder writes a residual as a sum of few of many directions (Bricken and others, "Towards Monosemanticity", 2023):
the rows of its decoder, each times the activation of its feature. What a concept vector is composed of is asked in
:mod:`affectlens.features`. Features steer like concepts: :func:`as_vectors` makes vectors of them that every command takes.

The format (``cfg.json`` and ``sae_weights.safetensors``; SAELens 6 and, where it says the same in other words, before) is read
and written here: numbers and nothing else. SAELens itself is not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import Steering
from affectlens.errors import FormatError, MismatchError, UnknownName
from affectlens.runs import atomic_write, read_json, write_json
from affectlens.vectors import ConceptVectors, centred_cosine

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
_HOOKS = (
    (re.compile(r"blocks\.(\d+)\.hook_resid_post"), 0),
    (re.compile(r"blocks\.(\d+)\.hook_resid_pre"), -1),
    (re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)"), 0),
)


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder of one layer's residual stream: ``F`` features of width ``D``.

    Args:
        layer: The layer whose residuals it takes apart.
        encoder: ``(D, F)`` float32.
        encoder_bias: ``(F,)``; of the magnitudes, if gated.
        decoder: A row for each feature, ``(F, D)``.
        decoder_bias: ``(D,)``.
        architecture: ``standard`` (ReLU), ``topk``, ``jumprelu`` or ``gated``.
        k: How many features may fire at a token (topk).
        threshold: Above which a feature fires, ``(F,)`` (jumprelu).
        gate_bias: ``(F,)`` (gated).
        gate_scale: Logarithm of the magnitudes' scale, ``(F,)`` (gated).
        centred: Whether ``decoder_bias`` is subtracted from what is encoded.
        normalize: ``none``, ``layer_norm`` or ``constant_norm_rescale``: what is done to a residual first, and undone at the end.
        about: What else its file says: the model, the hook, the texts it was trained on.

    Example:
        >>> eye = np.eye(3, dtype=np.float32)
        >>> sae = SparseAutoencoder(0, eye, np.full(3, -1, "f"), eye, np.zeros(3, "f"))
        >>> sae.encode(np.array([[3.0, 0.5, -2.0]]))
        array([[2., 0., 0.]], dtype=float32)
    """

    layer: int
    encoder: np.ndarray
    encoder_bias: np.ndarray
    decoder: np.ndarray
    decoder_bias: np.ndarray
    architecture: str = "standard"
    k: int | None = None
    threshold: np.ndarray | None = None
    gate_bias: np.ndarray | None = None
    gate_scale: np.ndarray | None = None
    centred: bool = True
    normalize: str = "none"
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.decoder)

    @property
    def width(self) -> int:
        return self.decoder.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Norm of each decoder row ``(F,)``: how far one unit of activation moves the residual."""
        return np.linalg.norm(self.decoder, axis=1)

    @property
    def directions(self) -> np.ndarray:
        """Unit direction of each feature ``(F, D)``; a row of zeros stays what it is."""
        return self.decoder / np.maximum(self.lengths, 1e-30)[:, None]

    def encode(self, residuals: np.ndarray) -> np.ndarray:
        """Activation of every feature, ``(T, F)`` float32, never negative, at each of ``residuals (T, D)``."""
        return self._fire(self._enter(residuals)[0])

    def reconstruct(self, residuals: np.ndarray) -> np.ndarray:
        """What the features make of each of ``residuals (T, D)``."""
        moved, scale, shift = self._enter(residuals)
        return (self._fire(moved) @ self.decoder + self.decoder_bias) * scale + shift

    def _enter(self, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x = np.asarray(residuals, dtype=np.float32)
        scale, shift = np.ones((len(x), 1), np.float32), np.zeros((len(x), 1), np.float32)
        if self.normalize == "layer_norm":
            shift = x.mean(1, keepdims=True)
            scale = x.std(1, keepdims=True, ddof=1)
            x = (x - shift) / (scale + np.float32(1e-5))
        elif self.normalize == "constant_norm_rescale":
            scale = np.linalg.norm(x, axis=1, keepdims=True) / np.float32(self.width**0.5)
            x = x / scale
        return x, scale, shift

    def _fire(self, x: np.ndarray) -> np.ndarray:
        onto = (x - self.decoder_bias if self.centred else x) @ self.encoder
        if self.gate_bias is not None and self.gate_scale is not None:
            open_ = onto + self.gate_bias > 0
            return np.maximum(onto * np.exp(self.gate_scale) + self.encoder_bias, 0) * open_
        onto = onto + self.encoder_bias
        fired = np.maximum(onto, 0)
        if self.threshold is not None:
            fired *= onto > self.threshold
        if self.k is not None and self.k < len(self):
            rest = np.argpartition(onto, -self.k, axis=1)[:, : -self.k]
            np.put_along_axis(fired, rest, 0, axis=1)
        return fired

    def check(self, vectors: ConceptVectors) -> None:
        """Refuse vectors of another width, or without the autoencoder's layer.

        Raises:
            MismatchError: They do not belong together.
        """
        if self.width != (width := vectors.directions.shape[-1]):
            raise MismatchError(f"the autoencoder is {self.width} wide and the vectors are {width} wide: use one of their model")
        vectors.row(self.layer)

    # ── files ──

    @classmethod
    def load(cls, folder: str | Path) -> SparseAutoencoder:
        """Read an autoencoder from a folder with ``cfg.json`` and ``sae_weights.safetensors``.

        Raises:
            FormatError: A file is missing or broken, or the autoencoder is of a kind that is not read here, not of a block's
                output, or was saved before its training was finished.

        Example:
            >>> SparseAutoencoder.load("gemma-scope/layer_20").layer      # doctest: +SKIP
            20
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file  # NumPy has no bfloat16

        folder = Path(folder)
        if not (folder / "cfg.json").is_file():
            raise FormatError(f"{folder} holds no cfg.json: name a folder that SAELens wrote with save_model")
        config = read_json(folder / "cfg.json", fix="download it again")
        try:
            weights = {k: t.float().numpy() for k, t in load_file(folder / "sae_weights.safetensors").items()}
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{folder / 'sae_weights.safetensors'} is broken or missing ({error}): download it again") from None
        return cls._of(config, weights, folder)

    @classmethod
    def _of(cls, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], folder: Path) -> SparseAutoencoder:
        about = {**config, **(config.get("metadata") or {})}
        architecture, k = about.get("architecture", "standard"), about.get("k")
        if about.get("activation_fn_str", about.get("activation_fn")) == "topk":  # before SAELens 6
            architecture, k = "topk", (about.get("activation_fn_kwargs") or {}).get("k")
        if architecture not in ARCHITECTURES:
            raise FormatError(f"{folder} is of architecture {architecture!r}: {', '.join(ARCHITECTURES)} can be read")
        if (normalize := about.get("normalize_activations") or "none") not in ("none", "layer_norm", "constant_norm_rescale"):
            raise FormatError(
                f"{folder} was saved before its scaling ({normalize}) was folded into its weights: fold and save it with SAELens"
            )
        hook = str(about.get("hook_name") or about.get("hook_point"))
        layers = [int(match[1]) + shift for pattern, shift in _HOOKS if (match := pattern.fullmatch(hook))]
        if not layers or layers[0] < 0:
            raise FormatError(f"{folder} is of {hook}, which is not the output of a block: use an autoencoder of hook_resid_post")
        needed = {"W_enc", "W_dec", "b_dec"} | {"gated": {"b_gate", "b_mag", "r_mag"}}.get(architecture, {"b_enc"})
        needed |= {"threshold"} if architecture == "jumprelu" else set()
        if missing := needed - set(weights):
            raise FormatError(f"{folder / 'sae_weights.safetensors'} has no {min(missing)}: download it again")
        width, features = weights["W_enc"].shape if weights["W_enc"].ndim == 2 else (0, 0)
        shapes = {"W_enc": (width, features), "W_dec": (features, width), "b_dec": (width,)}
        if not features or any(weights[name].shape != shapes.get(name, (features,)) for name in needed):
            raise FormatError(f"{folder / 'sae_weights.safetensors'} holds weights that do not fit each other: download it again")
        if not all(np.isfinite(weights[name]).all() for name in needed):
            raise FormatError(f"{folder / 'sae_weights.safetensors'} holds numbers that are not finite: download it again")
        if architecture == "topk" and not (isinstance(k, int) and 0 < k <= features):
            raise FormatError(f"{folder / 'cfg.json'} does not say how many features fire (k is {k!r}): download it again")
        own = cls(
            layer=layers[0],
            encoder=weights["W_enc"],
            encoder_bias=weights["b_mag" if architecture == "gated" else "b_enc"],
            decoder=weights["W_dec"],
            decoder_bias=weights["b_dec"],
            architecture=architecture,
            k=k if architecture == "topk" else None,
            threshold=weights["threshold"] if architecture == "jumprelu" else None,
            gate_bias=weights["b_gate"] if architecture == "gated" else None,
            gate_scale=weights["r_mag"] if architecture == "gated" else None,
            centred=bool(about.get("apply_b_dec_to_input", True)),
            normalize=normalize,
            about={key: about[key] for key in ("model_name", "hook_name", "dataset_path", "context_size") if about.get(key)},
        )
        if not about.get("rescale_acts_by_decoder_norm"):
            return own
        # Activations count decoder rows of length 1: the same autoencoder with that written into its weights.
        lengths = np.maximum(own.lengths, 1e-30)
        return replace(
            own, encoder=own.encoder * lengths, encoder_bias=own.encoder_bias * lengths, decoder=own.decoder / lengths[:, None]
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` as SAELens 6 does, each atomically."""
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {"W_enc": self.encoder, "W_dec": self.decoder, "b_dec": self.decoder_bias, "threshold": self.threshold}
        weights |= (
            {"b_mag": self.encoder_bias, "b_gate": self.gate_bias, "r_mag": self.gate_scale}
            if self.architecture == "gated"
            else {"b_enc": self.encoder_bias}
        )
        present = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items() if array is not None}
        with atomic_write(folder / "sae_weights.safetensors") as temporary:
            temporary.write_bytes(save(present))
        config = {
            "architecture": self.architecture,
            "d_in": self.width,
            "d_sae": len(self),
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": self.normalize,
            "reshape_activations": "none",
            **({"k": self.k} if self.k else {}),
            "metadata": {
                **self.about,
                "hook_name": f"blocks.{self.layer}.hook_resid_post",
                "sae_lens_version": "6.54.12",  # whose format this is; without it SAELens takes it for an older one
            },
        }
        write_json(folder / "cfg.json", config)
        return folder


# ── steering ──


def feature_gain(sae: SparseAutoencoder, vectors: ConceptVectors, feature: int, *, gain: float, activation: float) -> Steering:
    """Steer a feature in units of its own activation: ``gain`` times a typical one is added at every token.

    The addition does not depend on whether the feature fires there; ``-1`` takes away what it adds where it fires as usual.

    Args:
        sae: The autoencoder.
        vectors: Vectors of the model, whose mean residual norms are the unit of strength.
        feature: Its row.
        gain: How many typical activations to add.
        activation: The typical one: ``firing.typical[feature]``.

    Raises:
        UnknownName: There is no such feature.
        MismatchError: The vectors are of another width, or lack the layer.

    Example:
        >>> print(feature_gain(sae, vectors, 812, gain=3, activation=firing.typical[812]))      # doctest: +SKIP
        +0.21 feature 812 @ layer 20
    """
    one = as_vectors(sae, vectors, [feature])
    unit = float(one.residual_norms[0])
    return gain * activation * float(one.norms[0, 0]) / unit * one[one.names[0]]


def as_vectors(
    sae: SparseAutoencoder, vectors: ConceptVectors, features: Sequence[int], *, texts: np.ndarray | None = None
) -> ConceptVectors:
    """Features as vectors, named ``feature 12``: what scores, steers and exports concepts does so with them.

    Args:
        sae: The autoencoder.
        vectors: Vectors of the same model: unit of strength and centre come from them.
        features: Rows of the decoder.
        texts: Mean residuals of texts at the layer, ``(n, D)``, for the baseline of z; without them there is none.

    Raises:
        UnknownName: There is no such feature.
        MismatchError: The vectors are of another width, or lack the layer.
        FormatError: A feature has no direction.

    Example:
        >>> as_vectors(sae, vectors, [812, 90])["feature 812"]      # doctest: +SKIP
        Steering(...)
    """
    sae.check(vectors)
    for feature in features:
        if not 0 <= feature < len(sae):
            raise UnknownName("feature", str(feature), (f"0 to {len(sae) - 1}",))
    rows, layer = list(features), vectors.row(sae.layer)
    lengths = sae.lengths[rows]
    if not (lengths > 0).all():
        raise FormatError(
            f"feature {rows[int(lengths.argmin())]} has a decoder row of zeros, so it has no direction: leave it out"
        )
    directions, centre = sae.directions[rows], vectors.centre[layer]
    baseline = np.full((len(rows), 2), np.nan)
    if texts is not None:
        scores = centred_cosine(texts, directions, centre)
        baseline = np.stack([scores.mean(0), scores.std(0)], axis=1)
    return replace(
        vectors,
        names=tuple(f"feature {feature}" for feature in rows),
        layers=(sae.layer,),
        layer=sae.layer,
        directions=directions[None].astype(np.float32),
        norms=lengths[None].astype(np.float32),
        centre=centre[None],
        residual_norms=vectors.residual_norms[[layer]],
        neutral=(np.zeros((0, sae.width), np.float32),),
        baseline=baseline[None].astype(np.float32),
        stability=np.full((1, len(rows)), np.nan, np.float32),
        counts=np.zeros(len(rows), dtype=np.int64),
        method={
            "source": f"decoder rows of a sparse autoencoder ({len(sae)} features)",
            **json.loads(json.dumps(dict(sae.about))),
        },
    )
