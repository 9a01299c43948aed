"""Two crossed labels, in every scene one of each: reading one while the other is held out, and where their effects lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats

SIGNAL = 0.1
"""Deflection vectors of which less of the squared length is signal have no place in space that could be measured."""


def effects(own: np.ndarray, other: np.ndarray, n: int) -> np.ndarray:
    """The linear map from scenes to the effect of each value of one label, with those of the other label taken away.

    Least squares for ``scene = mean + effect of own + effect of other``; effects sum to zero.

    Args:
        own, other: The two labels of each scene, as numbers below ``n``.
        n: How many values the labels have.

    Returns:
        ``(n, scenes)``: its product with the scenes ``(scenes, D)`` is the effects.

    Example:
        >>> felt, shown = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 2, 0, 2, 0, 1])
        >>> size = np.array([1.0, 2.0, 6.0]), np.array([50.0, 10.0, 0.0])
        >>> (effects(felt, shown, 3) @ (size[0][felt] + size[1][shown])).round(6).tolist()
        [-2.0, -1.0, 3.0]
    """
    cells = np.concatenate([np.eye(n)[own], np.eye(n)[other]], axis=1)
    solved = np.linalg.pinv(cells)[:n]
    return np.asarray(solved - solved.mean(axis=0))


class Decoder:
    """One of two crossed labels read in scenes whose other label was left out of the fit."""

    def __init__(self, own: np.ndarray, other: np.ndarray, n: int) -> None:
        self.own, self.other, self.n = own, other, n
        self.chance = 1 / (n - 1)
        values, self._fold = np.unique(other, return_inverse=True)
        maps = np.zeros((len(values), n, len(own)))
        for fold, value in enumerate(values):
            train = other != value
            maps[fold][:, train] = effects(own[train], other[train], n)
        self._maps = maps.reshape(-1, len(own)).astype(np.float32)
        same = other[:, None] == other
        self._centre = (np.eye(len(own)) - same / same.sum(axis=1, keepdims=True)).astype(np.float32)

    def scores(self, points: np.ndarray) -> np.ndarray:
        """Cosine of each scene with the probes fitted without its group, ``(scenes, n)``."""
        probes = (self._maps @ points).reshape(-1, self.n, points.shape[1])
        probes /= np.maximum(np.linalg.norm(probes, axis=-1, keepdims=True), 1e-12)
        moved = self._centre @ points
        return self._candidates((probes[self._fold] @ moved[:, :, None])[..., 0] / norms(moved))

    def given(self, residuals: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Cosine of each scene with unit directions that were fitted elsewhere."""
        moved = self._centre.astype(np.float64) @ residuals
        return self._candidates(moved @ directions.T / norms(moved))

    def _candidates(self, scores: np.ndarray) -> np.ndarray:
        """The other label is known: it is put behind all candidates."""
        scores[np.arange(len(scores)), self.other] = -2.0
        return scores

    def hits(self, scores: np.ndarray, k: int = 1) -> np.ndarray:
        return stats.top_k_hits(scores, self.own, k=k)

    def auroc(self, scores: np.ndarray) -> float:
        """Mean over the values of the own label, each among the scenes for which it is a candidate."""
        each = [
            stats.auroc(scores[rows, value], self.own[rows] == value) for value in range(self.n) for rows in [self.other != value]
        ]
        return float(np.nanmean(each))

    def exchange(self, rng: np.random.Generator) -> np.ndarray:
        """Scenes exchanged within each value of the other label."""
        order = np.empty(len(self.own), dtype=np.intp)
        order[np.argsort(self.other, kind="stable")] = np.lexsort((rng.random(len(order)), self.other))
        return order


@dataclass(frozen=True)
class Place:
    """Where the effects of one label lie: their cosines with story vectors, squared lengths, and how much of those is noise.

    ``noise`` and ``outer_noise`` are of the whole squared length and of the part outside the story space.
    """

    cosines: np.ndarray
    lengths: np.ndarray
    outer: np.ndarray
    noise: float
    outer_noise: float

    @property
    def signal(self) -> float:
        """Share of the squared length that is not noise."""
        return 1 - self.noise / float(self.lengths.mean())

    def own(self, rows: Any = slice(None)) -> float:
        """Mean cosine with the story vectors of the same emotions, corrected for noise."""
        return float(self.cosines.diagonal()[rows].mean() / np.sqrt(max(self.signal, SIGNAL)))

    def left(self, rows: Any = slice(None)) -> float:
        """Share of the length that lies outside the story space, corrected for noise."""
        whole = float(self.lengths[rows].mean())
        outside = float(self.outer[rows].mean()) - self.outer_noise
        return float(np.sqrt(np.clip(outside / max(whole - self.noise, SIGNAL * whole), 0, 1)))


class Effects:
    """Hidden scenes at one layer as what geometry needs of them, whatever the width of the model."""

    def __init__(self, scenes: np.ndarray, felt: np.ndarray, shown: np.ndarray, story: np.ndarray, space: np.ndarray) -> None:
        n = len(story)
        self._points, self._onto, self._in = coordinates(scenes).astype(np.float64), scenes @ story.T, scenes @ space.T
        self.maps = {"felt": effects(felt, shown, n), "shown": effects(shown, felt, n)}
        left, sizes, _ = np.linalg.svd(np.concatenate([np.eye(n)[felt], np.eye(n)[shown]], axis=1), full_matrices=False)
        self._fit = left[:, sizes > 1e-9 * sizes[0]].T
        self._partner = _partners(felt, shown)

    def place(self, label: str, order: Any = slice(None)) -> Place:
        """Where the effects of ``felt`` or ``shown`` lie when scenes are put in this order."""
        solved, points, inside = self.maps[label], self._points[order], self._in[order]
        lengths = (np.square(solved @ points)).sum(axis=1)
        outer = lengths - np.square(solved @ inside).sum(axis=1)
        rest, rest_in = (np.square(part).sum() - np.square(self._fit @ part).sum() for part in (points, inside))
        noise = np.square(solved).sum(axis=1).mean() / (len(points) - len(self._fit))
        cosines = solved @ self._onto[order] / np.sqrt(np.maximum(lengths, 1e-30))[:, None]
        return Place(cosines, lengths, outer, float(noise * rest), float(noise * (rest - rest_in)))

    def exchange(self, rng: np.random.Generator) -> np.ndarray:
        """Exchange what is felt and what is shown in a random half of the pairs of scenes that differ in just that."""
        every = np.arange(len(self._partner))
        flip = (rng.random(len(every)) < 0.5)[np.minimum(every, self._partner)]
        return np.where(flip, self._partner, every)


def _partners(felt: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """For each scene the one in which felt and shown are exchanged; itself where there is none."""
    places: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(zip(felt.tolist(), shown.tolist(), strict=True)):
        places.setdefault(pair, []).append(i)
    partner = np.arange(len(felt))
    for (a, b), rows in places.items():
        both = list(zip(rows, places.get((b, a), []), strict=False))
        partner[[i for i, _ in both]] = [j for _, j in both]
    return partner


def coordinates(scenes: np.ndarray) -> np.ndarray:
    """The same angles and lengths in as many coordinates as there are scenes."""
    moved = scenes - scenes.mean(axis=0)
    sizes, vectors = np.linalg.eigh(moved @ moved.T)
    return np.asarray(vectors * np.sqrt(np.maximum(sizes, 0)), dtype=np.float32)


def without(residuals: np.ndarray, basis: np.ndarray) -> np.ndarray:
    residuals, basis = residuals.astype(np.float64), basis.astype(np.float64)
    return residuals - residuals @ basis.T @ basis


def norms(rows: np.ndarray) -> np.ndarray:
    return np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
