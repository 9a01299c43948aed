"""Concept vectors: one unit direction for each concept at every layer, with everything needed to use them honestly.

``fit`` turns activations into vectors (method 4): mean over a concept's texts, minus the mean over concepts, without the top
neutral components, unit norm. The artifact keeps what was divided out or removed (raw norms, centre, neutral basis), the unit of
strength (mean residual norms) and where it all came from. It is two files: ``vectors.safetensors`` and ``config.json``. A third,
``calibration.json``, says where and how strongly to steer, once ``affectlens calibrate`` has found it out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.sparse import csc_array

from affectlens.activations import Activations
from affectlens.calibration import FILE as CALIBRATION
from affectlens.calibration import Calibration, read_calibration, write_calibration
from affectlens.engine import Engine, Gate, ModelInfo, Reading, Readout, Steering, Term, Where
from affectlens.errors import EngineError, FormatError, MismatchError, UnknownName
from affectlens.runs import atomic_write, read_json, sha256_file, write_json
from affectlens.stats import explained_components

FORMAT = 1
ScoreKind = Literal["centred", "cosine", "z"]
_ORPHANS = "from a file come without the norms and the centre of their model's residuals"


@dataclass(frozen=True)
class Fit:
    """Vectors at one layer: unit ``directions (N, D)``, their raw ``norms (N,)``, the ``centre (D,)``, all float64."""

    directions: np.ndarray
    norms: np.ndarray
    centre: np.ndarray


def fit_means(means: np.ndarray, basis: np.ndarray) -> Fit:
    """Concept means at one layer to unit directions (method 4).

    Args:
        means: Mean residual of each concept, ``(N, D)``.
        basis: Orthonormal neutral components to project out, ``(k, D)``; ``k`` may be 0.

    Returns:
        Directions, raw norms before scaling, and the mean over concepts.

    Example:
        >>> fit_means(np.array([[2.0, 1.0], [0.0, 1.0]]), np.zeros((0, 2))).directions
        array([[ 1.,  0.],
               [-1.,  0.]])
    """
    means = np.asarray(means, dtype=np.float64)
    centre = means.mean(0)
    contrasts = means - centre
    contrasts = contrasts - contrasts @ basis.T @ basis
    norms = np.linalg.norm(contrasts, axis=1)
    return Fit(contrasts / np.maximum(norms, 1e-30)[:, None], norms, centre)


def group_means(values: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Mean of the rows of each label, ``(len(names), D)``, summed in float64."""
    return np.stack([values[labels == name].mean(0, dtype=np.float64) for name in names])


def centred_cosine(residuals: np.ndarray, directions: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Cosine between ``residual - centre`` and each direction, ``(n, N)``."""
    moved = residuals.astype(np.float64) - centre
    return (moved @ directions.T) / np.maximum(np.linalg.norm(moved, axis=-1, keepdims=True), 1e-30)


@dataclass(frozen=True, eq=False)
class ConceptVectors:
    """Vectors of one model for one set of concepts.

    Args:
        names: The ``N`` concepts.
        layers: The ``L`` layers, usually all.
        layer: The layer used where none is named.
        directions: Unit vectors ``(L, N, D)``, float32.
        norms: Their length before scaling, ``(L, N)``.
        centre: Mean over concepts ``(L, D)``: what centred cosines subtract.
        residual_norms: Mean residual norm over ordinary tokens ``(L,)``: the unit of strength.
        neutral: For each layer the neutral components that were projected out, ``(k, D)``.
        baseline: Mean and standard deviation of the centred cosine over the texts the vectors were fitted on, ``(L, N, 2)``.
        stability: Mean cosine between the direction and its refits on resampled texts ``(L, N)``.
        counts: Texts of each concept ``(N,)``.
        model: What the vectors belong to (:class:`ModelInfo` as a dictionary).
        method: Settings and provenance.
        calibration: Where and how strongly to steer; None before it was found out.

    Example:
        >>> mix = 0.05 * vectors["calm"] - 0.05 * vectors["desperate"]      # doctest: +SKIP
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    layer: int
    directions: np.ndarray
    norms: np.ndarray
    centre: np.ndarray
    residual_norms: np.ndarray
    neutral: tuple[np.ndarray, ...]
    baseline: np.ndarray
    stability: np.ndarray
    counts: np.ndarray
    model: Mapping[str, Any]
    method: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    # ── fitting ──

    @classmethod
    def fit(
        cls,
        activations: Activations,
        neutral: Activations | None,
        *,
        info: ModelInfo,
        share: float = 0.5,
        draws: int = 40,
        seed: int = 0,
        method: Mapping[str, Any] | None = None,
    ) -> ConceptVectors:
        """Fit vectors at every layer (method 4).

        Args:
            activations: Pooled residuals of the concepts' texts.
            neutral: Pooled residuals of neutral texts; None projects nothing out.
            info: The model they come from.
            share: Share of the neutral variance whose components are projected out; 0 for none.
            draws: Bootstrap resamples of the texts behind ``stability``.
            seed: Of the bootstrap.
            method: Settings to keep with the vectors.

        Raises:
            FormatError: Fewer than two concepts, so there is nothing to contrast.
        """
        names = activations.names
        if len(names) < 2:
            raise FormatError(
                f"vectors contrast concepts, but the texts are all of {names[0]!r}: add texts of at least one other concept"
            )
        layers = tuple(layer for layer in activations.layers if layer >= 0)
        rows = np.array([activations.layers.index(layer) for layer in layers])
        moments = activations.moments(names)
        means = moments.means
        weights = _resamples(activations.concepts, names, draws, seed)
        fits, bases, baselines, stabilities = [], [], [], []
        for layer, row in zip(layers, rows, strict=True):
            basis = np.zeros((0, activations.width))
            if neutral is not None and share > 0:
                basis, _ = explained_components(neutral.layer(layer), share)
            fitted = fit_means(means[:, row], basis)
            resampled = np.zeros((draws * len(names), activations.width))
            sums = np.zeros((2, len(names)))
            for part, values in activations.layer_shards(layer):
                resampled += weights[:, part] @ values
                scores = centred_cosine(values, fitted.directions, fitted.centre)
                sums += [scores.sum(0), (scores**2).sum(0)]
            refits = np.stack([fit_means(m, basis).directions for m in np.split(resampled, draws)])
            stabilities.append(np.einsum("bnd,nd->bn", refits, fitted.directions).mean(0))
            mean, square = sums / len(activations)
            baselines.append(np.stack([mean, np.sqrt(np.maximum(square - mean**2, 0))], axis=1))
            fits.append(fitted)
            bases.append(basis.astype(np.float32))
        return cls(
            names=names,
            layers=layers,
            layer=info.default_layer,
            directions=np.stack([f.directions for f in fits]).astype(np.float32),
            norms=np.stack([f.norms for f in fits]).astype(np.float32),
            centre=np.stack([f.centre for f in fits]).astype(np.float32),
            residual_norms=activations.token_norms()[rows].astype(np.float32),
            neutral=tuple(bases),
            baseline=np.stack(baselines).astype(np.float32),
            stability=np.stack(stabilities).astype(np.float32),
            counts=moments.counts.astype(np.int64),
            model=_model_dict(info),
            method={"share": share, "draws": draws, "seed": seed, **(method or {})},
        )

    # ── looking things up ──

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def row(self, layer: int | None = None) -> int:
        """Index of a layer (default: :attr:`layer`) in the arrays.

        Raises:
            MismatchError: There are no vectors at this layer.
        """
        layer = self.layer if layer is None else layer
        if layer not in self.layers:
            raise MismatchError(f"no vectors at layer {layer}: choose among {self.layers[0]} to {self.layers[-1]}")
        return self.layers.index(layer)

    def index(self, name: str) -> int:
        """Index of a concept.

        Raises:
            UnknownName: There is no such concept; the message names the nearest ones.
        """
        if name not in self.names:
            raise UnknownName("concept", name, self.names)
        return self.names.index(name)

    def at(self, layer: int | None = None) -> np.ndarray:
        """Unit directions ``(N, D)`` at a layer."""
        return self.directions[self.row(layer)]

    def __getitem__(self, name: str) -> Steering:
        """Steering of strength 1 (one mean residual norm) along a concept at :attr:`steering_layer`: scale it before use.

        Raises:
            UnknownName: There is no such concept.
            MismatchError: The vectors were imported without residual norms.
        """
        if not np.isfinite(self.residual_norms).all():
            raise MismatchError(f"vectors {_ORPHANS}, so a strength has no unit: fit vectors with affectlens discover")
        return Steering(
            (
                Term(
                    name=name,
                    strength=1.0,
                    layers=(self.steering_layer,),
                    available=self.layers,
                    directions=self.directions[:, self.index(name)],
                    norms=self.residual_norms,
                ),
            )
        )

    def gate(
        self,
        name: str,
        *,
        above: float | None = None,
        below: float | None = None,
        layer: int | None = None,
        kind: ScoreKind = "z",
        baseline: tuple[float, float] | None = None,
    ) -> Gate:
        """A gate for :meth:`Steering.when`: open at tokens where a concept's score is above or below a value.

        The score is that of :meth:`scores`, of the token alone. Note what z is counted from: by default the texts that the
        vectors were fitted on, whose scores are of means over many tokens, while those of single tokens are spread more widely.
        The z of the monitor, which is counted from single tokens of one speaker, is
        :meth:`affectlens.baseline.Baseline.gate`.

        Args:
            name: The concept that is read.
            above: Open only above this score.
            below: Open only below this score; together with ``above`` in between.
            layer: Where it is read (default: :attr:`layer`, or :attr:`steering_layer` where that is lower); not above the lowest
                layer that is steered.
            kind: ``z``, ``centred`` or ``cosine``, see :meth:`scores`.
            baseline: Mean and standard deviation of the centred cosine that z is counted from.

        Raises:
            UnknownName: There is no such concept.
            EngineError: Neither ``above`` nor ``below`` is given, or a baseline for a kind that has none.
            MismatchError: The vectors were imported without the centre.

        Example:
            >>> mix = 0.1 * vectors["calm"]                                        # doctest: +SKIP
            >>> print(mix.when(vectors.gate("desperate", above=2)))                # doctest: +SKIP
            +0.1 calm @ layer 18 (while desperate z > 2 @ layer 18)
        """
        row, index = self.row(min(self.layer, self.steering_layer) if layer is None else layer), self.index(name)
        if baseline is not None and kind != "z":
            raise EngineError(f"a {kind} score has no baseline: use kind='z', or leave baseline out")
        if kind != "cosine" and not np.isfinite(self.centre[row]).all():
            raise MismatchError(f"vectors {_ORPHANS}, so they cannot be read {kind}: use cosine, or fit vectors of the model")
        if kind == "z" and baseline is None:
            baseline = (float(self.baseline[row, index, 0]), max(float(self.baseline[row, index, 1]), 1e-12))
        mean, deviation = baseline or (0.0, 1.0)
        centre = None if kind == "cosine" else self.centre[row]
        direction = self.directions[row, index]
        return Gate(name, self.layers[row], direction, centre, mean, deviation, above=above, below=below)

    @property
    def steering_layer(self) -> int:
        """Where steering acts: the calibrated layer, else :attr:`layer`."""
        return self.calibration.layer if self.calibration else self.layer

    def calibrated(self, name: str) -> Steering:
        """Steering along a concept at the largest strength whose side effects stay within the calibration's bounds.

        Raises:
            UnknownName: There is no such concept.
            MismatchError: The vectors were not calibrated.
        """
        if self.calibration is None:
            raise MismatchError(f"no strength of {name!r} is known to be safe: run affectlens calibrate, or scale it yourself")
        return self.calibration.strength(name) * self[name]

    def select(self, names: Sequence[str]) -> ConceptVectors:
        """The vectors of these concepts only; centre and basis stay those of the whole set."""
        rows = [self.index(name) for name in names]
        return replace(
            self,
            names=tuple(names),
            directions=self.directions[:, rows],
            norms=self.norms[:, rows],
            baseline=self.baseline[:, rows],
            stability=self.stability[:, rows],
            counts=self.counts[rows],
            calibration=self.calibration and self.calibration.select(names),
        )

    def with_layer(self, layer: int) -> ConceptVectors:
        """The same vectors with another layer to read and to steer at; a calibration, which chose its own, is left out."""
        self.row(layer)
        return replace(self, layer=layer, calibration=None)

    def with_calibration(self, calibration: Calibration) -> ConceptVectors:
        """The same vectors with what calibration found: they are read at its reading layer and steer at its layer.

        Raises:
            MismatchError: It belongs to another model, or there are no vectors at its layers.
        """
        if calibration.fingerprint != self.model.get("fingerprint"):
            raise MismatchError("the calibration belongs to another model: run affectlens calibrate with these vectors")
        self.row(calibration.layer), self.row(calibration.reading_layer)
        return replace(self, layer=calibration.reading_layer, calibration=calibration.select(self.names))

    def similarity(self, layer: int | None = None) -> np.ndarray:
        """Cosine between every two concepts at a layer, ``(N, N)`` float64."""
        directions = self.at(layer).astype(np.float64)
        return directions @ directions.T

    # ── reading ──

    def readout(
        self, layer: int | None = None, *, where: Where = Where(), pool: Literal["none", "mean", "last"] = "none"
    ) -> Readout:
        """A readout from which :meth:`scores` can compute; only dot products leave the worker."""
        row = self.row(layer)
        onto = np.concatenate([self.directions[row], self.centre[row][None]])
        return Readout((self.layers[row],), where, pool, onto[None])

    def scores(self, reading: Reading, *, layer: int | None = None, kind: ScoreKind = "centred") -> np.ndarray:
        """Scores from a reading made with :meth:`readout`: ``(N,)`` pooled or ``(T, N)`` per token.

        Args:
            reading: What the engine recorded.
            layer: The layer that was read (default: :attr:`layer`).
            kind: ``cosine`` with the residual; ``centred`` cosine with the residual minus the stored centre; ``z``: the
                centred cosine in standard deviations from its mean over the texts the vectors were fitted on.

        Raises:
            MismatchError: The vectors were imported without the centre, or without the baseline of z.
        """
        row = self.row(layer)
        dots = reading.values[0].astype(np.float64)
        norm = reading.norms[0].astype(np.float64)
        if kind == "cosine":
            return dots[..., :-1] / np.maximum(norm, 1e-30)[..., None]
        centre = self.centre[row].astype(np.float64)
        if not np.isfinite(centre).all():
            raise MismatchError(f"vectors {_ORPHANS}, so they cannot be read {kind}: use cosine, or fit vectors of the model")
        onto_centre = dots[..., -1]
        moved_norm = np.sqrt(np.maximum(norm**2 - 2 * onto_centre + centre @ centre, 1e-30))
        cosine = (dots[..., :-1] - self.directions[row].astype(np.float64) @ centre) / moved_norm[..., None]
        if kind == "centred":
            return cosine
        mean, deviation = self.baseline[row, :, 0], self.baseline[row, :, 1]
        if not np.isfinite(self.baseline[row]).all():
            raise MismatchError("these vectors come without the baseline that z is counted from: read them centred")
        return (cosine - mean) / np.maximum(deviation, 1e-12)

    def top_tokens(
        self, engine: Engine, names: Sequence[str], *, layer: int | None = None, k: int = 5
    ) -> dict[str, tuple[list[str], list[str]]]:
        """Logit lens (method 6): the tokens each direction promotes most and least, through the model's own norm and unembedding.

        Returns:
            For each name the ``k`` top and the ``k`` bottom tokens.
        """
        row = self.row(layer)
        directions = self.directions[row, [self.index(name) for name in names]] * self.residual_norms[row]
        order = np.argsort(engine.unembed(directions), axis=1)
        words = engine.vocabulary
        return {name: ([words[i] for i in order[n, ::-1][:k]], [words[i] for i in order[n, :k]]) for n, name in enumerate(names)}

    def check(self, info: ModelInfo, *, allow: Sequence[str] = ()) -> None:
        """Refuse to work on another model than the vectors were fitted on.

        Args:
            info: The model at hand.
            allow: Names of differences to accept: ``fingerprint`` (another checkpoint of the architecture), ``template``.

        Raises:
            MismatchError: The models differ; the message says in what and how to accept it.
        """
        for key in ("width", "n_layers", "fingerprint", "template"):
            mine, theirs = self.model.get(key), getattr(info, key)
            if mine != theirs and key not in allow:
                fix = "use vectors of this model" if key in ("width", "n_layers") else f"use its own or accept with --allow {key}"
                raise MismatchError(
                    f"these vectors belong to {self.model.get('id')} ({key} {mine}), not to {info.id} ({key} {theirs}): {fix}"
                )

    # ── files ──

    def save(self, folder: str | Path) -> Path:
        """Write ``vectors.safetensors``, ``config.json`` and the model card ``README.md``, each atomically.

        With a calibration ``calibration.json`` is written too; without one, an old one is removed.

        Equal vectors give equal bytes: nothing in the files depends on when or where they were written.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            "directions": self.directions,
            "norms": self.norms,
            "centre": self.centre,
            "residual_norms": self.residual_norms,
            "neutral": np.concatenate(self.neutral),
            "baseline": self.baseline,
            "stability": self.stability,
            "counts": self.counts,
        }
        # safetensors copies memory and ignores strides: what select() returns would be written in the wrong order.
        blob = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        tensors = folder / "vectors.safetensors"
        with atomic_write(tensors) as temporary:
            temporary.write_bytes(blob)
        write_json(
            folder / "config.json",
            {
                "format": FORMAT,
                "kind": "affectlens-vectors",
                "names": self.names,
                "layers": self.layers,
                "layer": self.layer,
                "layer_convention": "residual stream after block L, counted from 0",
                "strength_unit": "multiples of the mean residual norm at the layer",
                "neutral_counts": [len(basis) for basis in self.neutral],
                "model": dict(self.model),
                "method": dict(self.method),
                "sha256": sha256_file(tensors),
            },
        )
        if self.calibration is None:
            (folder / CALIBRATION).unlink(missing_ok=True)
        else:
            write_calibration(self.calibration, folder, vectors=sha256_file(tensors))
        # The card of what load() returns: JSON turns tuples into lists and sorts keys.
        written = read_json(folder / "config.json")
        card = replace(self, model=written["model"], method=written["method"]).card()
        with atomic_write(folder / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, calibrated: bool = True) -> ConceptVectors:
        """Read vectors from a folder (a run's folder works too).

        Args:
            folder: Where they are.
            calibrated: Use the calibration that lies beside them. The studies of a run do not, and keep the published layer.

        Raises:
            FormatError: A file is missing, broken, changed, or of another format.
        """
        folder = vectors_folder(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FormatError(f"no vectors in {folder}: make them with affectlens discover MODEL --out {folder}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise FormatError(f"{folder / 'config.json'} is broken ({error}): restore it or fit the vectors again") from None
        if not isinstance(config, dict) or config.get("kind") != "affectlens-vectors":
            raise FormatError(f"{folder} holds no affectlens vectors: name a folder written by affectlens discover")
        if config.get("format") != FORMAT:
            raise FormatError(f"{folder} has vector format {config.get('format')}, not {FORMAT}: update affectlens")
        vectors = cls._read(folder / "vectors.safetensors", config)
        if calibrated and (folder / CALIBRATION).exists():
            return vectors.with_calibration(read_calibration(folder, vectors=config["sha256"]))
        return vectors

    @classmethod
    def _read(cls, path: Path, config: Mapping[str, Any]) -> ConceptVectors:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is broken or missing ({error}): restore it or fit the vectors again") from None
        if sha256_file(path) != config.get("sha256"):
            raise FormatError(f"{path} was changed after it was written (sha256 differs): restore it or fit the vectors again")
        try:
            ends = np.cumsum(config["neutral_counts"])[:-1]
            vectors = cls(
                names=tuple(config["names"]),
                layers=tuple(config["layers"]),
                layer=config["layer"],
                neutral=tuple(np.split(tensors.pop("neutral"), ends)),
                model=dict(config["model"]),
                method=dict(config["method"]),
                **tensors,  # type: ignore[arg-type]
            )
            fits = vectors.directions.shape[:2] == (len(vectors.layers), len(vectors)) and vectors.layer in vectors.layers
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            # The hash guards the numbers; this guards which concept and which layer each of them belongs to.
            raise FormatError(f"{path.with_name('config.json')} does not fit {path.name}: restore both or fit the vectors again")
        return vectors

    def card(self) -> str:
        """The model card, generated from the data."""
        row = self.row()
        method = "\n".join(f"| {key} | {value} |" for key, value in sorted(self.method.items()))
        # The Hub refuses a card whose base model is not a Hub id: a folder, a file, the demo model.
        hub, _, _ = str(self.model.get("id")).partition("@")
        base = f"base_model: {hub}\n" if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", hub) else ""
        mix = " - ".join(f'0.05 * vectors["{name}"]' for name in self.names[:2])
        return f"""---
library_name: affectlens
{base}tags: [affectlens, steering, interpretability]
---

# Concept vectors of {self.model.get("id")}

{len(self)} unit directions at each of {len(self.layers)} layers, width {self.directions.shape[-1]},
fitted on {int(self.counts.sum())} texts ({int(self.counts.min())} to {int(self.counts.max())} a concept).
Layer L is the residual stream after block L, counted from 0;
strength is a multiple of the mean residual norm ({self.residual_norms[row]:.4g} at the default layer {self.layer}).

| at layer {self.layer} | |
|---|---|
| neutral components projected out | {len(self.neutral[row])} |
| stability (mean cosine of refits on resampled texts), median over concepts | {np.median(self.stability[row]):.3f} |
| lowest stability | {self.names[int(np.argmin(self.stability[row]))]} {self.stability[row].min():.3f} |

| setting | value |
|---|---|
{method}

```python
import affectlens as al
vectors = al.ConceptVectors.load("FOLDER")
mix = {mix}
```

The directions are functional representations; nothing here claims that a model feels anything.
"""


def vectors_folder(folder: str | Path) -> Path:
    """The folder that holds the files of vectors: a run's are in one of its own.

    Example:
        >>> vectors_folder("somewhere").name
        'somewhere'
    """
    folder = Path(folder)
    inside = folder / "vectors"
    return inside if not (folder / "config.json").exists() and (inside / "config.json").exists() else folder


def _model_dict(info: ModelInfo) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(info).items() if key not in ("checks", "device")}


def _resamples(labels: np.ndarray, names: Sequence[str], draws: int, seed: int) -> csc_array:
    """Weights ``(draws * N, n)``: each row averages a resample, with replacement, of one concept's texts."""
    generator = np.random.default_rng(seed)
    own = [np.flatnonzero(labels == name) for name in names]
    rows, columns, weights = [], [], []
    for draw in range(draws):
        for i, texts in enumerate(own):
            columns.append(generator.choice(texts, size=len(texts)))
            rows.append(np.full(len(texts), draw * len(names) + i))
            weights.append(np.full(len(texts), 1.0 / len(texts)))
    entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return csc_array(entries, shape=(draws * len(names), len(labels)))
