"""How alike the vectors of two kinds of labels are, when each rests on a few texts that carry several labels at once.

The cosine of two mean vectors is pulled towards 0 by noise, and towards or away from each other by texts that stand behind both.
Here inner products are taken between *different* texts only, that share the label in question and no other one, and are compared
with those of texts that share none: what is left is the label's. Divided by the same within each kind, it is a cosine without
the noise (attenuation, C. Spearman, The American Journal of Psychology 15, 1904).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from affectlens.stats import Null, permutation_null
from affectlens.vectors import group_means


@dataclass(frozen=True, eq=False)
class Labelled:
    """Residuals with one of their labels.

    Args:
        rows: Centred residuals, ``(r, D)``; a text can have several rows.
        labels: Label of each row as a number, ``(r,)``.
        texts: Number of the text that each row comes from, ``(r,)``.
    """

    rows: np.ndarray
    labels: np.ndarray
    texts: np.ndarray

    def means(self, n: int) -> np.ndarray:
        """Mean row of each of ``n`` labels, ``(n, D)``."""
        return group_means(self.rows, self.labels, range(n))  # type: ignore[arg-type]

    def __add__(self, other: Labelled) -> Labelled:
        """The rows of both."""
        return Labelled(*(np.concatenate([getattr(self, p), getattr(other, p)]) for p in ("rows", "labels", "texts")))


@dataclass(frozen=True, eq=False)
class Likeness:
    """How alike the vectors of two kinds are.

    Args:
        products: Mean inner product of different texts for each two labels ``(N, N)``, minus that of texts that share no label;
            NaN where no two texts are fit.
        cosines: The same divided by the lengths of the mean vectors, noise included.
        plain: Cosine of the two mean vectors of each label as they are, ``(N,)``: with the noise, also that of texts behind both.
    """

    products: np.ndarray
    cosines: np.ndarray
    plain: np.ndarray

    @property
    def same(self) -> np.ndarray:
        """Products of the same label, ``(N,)``."""
        return np.asarray(np.diag(self.products))


def shared_labels(labels: np.ndarray) -> np.ndarray:
    """How many labels each two texts share, ``(n, n)``; ``labels`` is ``(n, k)``, whatever the place of a label in a row.

    Example:
        >>> shared_labels(np.array([[0, 1], [1, 2], [1, 0]]))
        array([[2, 1, 2],
               [1, 2, 1],
               [2, 1, 2]])
    """
    return np.asarray((labels[:, None, :, None] == labels[None, :, None, :]).sum(axis=(2, 3)))


def likeness(p: Labelled, q: Labelled, shared: np.ndarray, n: int) -> Likeness:
    """Compare two kinds of ``n`` labels.

    Args:
        p, q: The kinds; they may come from the same texts.
        shared: How many labels two texts share, of all they carry, ``(texts, texts)``.
        n: How many labels there are.

    Example:
        >>> rows = Labelled(np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]), np.array([0, 0, 1, 1]), np.arange(4))
        >>> likeness(rows, rows, shared_labels(rows.labels[:, None]), 2).products
        array([[2., 0.],
               [0., 2.]])
    """
    one, two = (np.eye(n)[kind.labels] for kind in (p, q))
    inner, fit = _products(p, q, shared)
    pairs = one.T @ fit @ two
    products = one.T @ (inner * fit) @ two / np.where(pairs, pairs, np.nan)
    return _likeness(products, p.means(n), q.means(n))


def regrouped(p: Labelled, q: Labelled, shared: np.ndarray, observed: float, *, scale: float = 1.0, **options: Any) -> Null:
    """Null of the mean product of the same label when labels are exchanged between texts.

    For a kind with itself, or with the same texts read in another way: the two sets of vectors share their noise, so that
    exchanging labels between the sets would be too kind.

    Args:
        p, q: The kinds, row by row of the same texts with the same labels.
        shared: As for :func:`likeness`.
        observed: The mean of :attr:`Likeness.same`, divided by ``scale``.
        scale: What the products are divided by.
        options: ``draws`` and ``seed``.
    """
    inner, fit = _products(p, q, shared)
    same = p.labels[:, None] == q.labels
    strangers = fit & ~same
    one, two = np.nonzero(fit & same)
    weights = 1 / np.bincount(p.labels[one], minlength=int(p.labels.max()) + 1)[p.labels[one]]

    def mean(order: np.ndarray) -> float:
        """Over pairs that share no label in truth: what others have in common is no noise."""
        known = weights * strangers[order[one], order[two]]
        return float(known @ inner[order[one], order[two]] / max(known.sum(), 1e-30) / scale)

    return permutation_null(
        mean,
        observed,
        permute=lambda rng: rng.permutation(len(inner)),
        side="greater",
        kind="emotions exchanged between dialogues",
        **options,
    )


def likeness_of_vectors(vectors: np.ndarray, q: Labelled) -> Likeness:
    """Compare vectors of all labels, ``(N, D)``, that come from other texts altogether with a kind."""
    means = q.means(len(vectors))
    products = vectors @ means.T
    products = products - products[~np.eye(len(products), dtype=bool)].mean()
    return _likeness(products, vectors, means)


def corrected(cross: np.ndarray, one: np.ndarray, two: np.ndarray) -> float:
    """Noise-corrected cosine: mean product of two kinds over the root of the mean product within each.

    Args:
        cross, one, two: :attr:`Likeness.same` between the kinds, and of each with itself.

    Returns:
        The cosine, which sampling can push beyond 1; NaN when dialogues of a label are no more alike than others.

    Example:
        >>> round(corrected(np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.array([4.0, 4.0])), 3)
        0.707
    """
    a, b = np.nanmean(one), np.nanmean(two)
    return float(np.nanmean(cross) / np.sqrt(a * b)) if a > 0 and b > 0 else float("nan")


def match_auroc(cosines: np.ndarray) -> np.ndarray:
    """For each entry the share of its row and of its column that it beats, averaged: the AUROC of its being the match.

    Args:
        cosines: ``(N, N)``; NaN entries do not compete.

    Example:
        >>> np.diag(match_auroc(np.array([[0.9, 0.1, 0.0], [0.2, 0.3, 0.4], [0.1, 0.0, 0.8]])))
        array([1.  , 0.75, 1.  ])
    """
    parts = []
    for table in (cosines, cosines.T):
        known = np.isfinite(table)
        ranks = rankdata(np.where(known, table, -np.inf), axis=1) - (~known).sum(axis=1, keepdims=True)
        parts.append(np.where(known, (ranks - 1) / np.maximum(known.sum(axis=1, keepdims=True) - 1, 1), np.nan))
    return np.asarray((parts[0] + parts[1].T) / 2)


def weighted_rating(cosines: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Mean rating of the columns weighted by each row's cosines, negative ones with their sign, over the sum of their sizes.

    Args:
        cosines: ``(rows, columns)``; NaN weighs nothing.
        ratings: One for each column; their mean is subtracted.

    Example:
        >>> weighted_rating(np.array([[0.5, -0.5], [0.0, 0.2]]), np.array([1.0, -1.0]))
        array([ 1., -1.])
    """
    weights = np.nan_to_num(cosines)
    return np.asarray(weights @ (ratings - ratings.mean()) / np.maximum(np.abs(weights).sum(axis=1), 1e-30))


def correlate(one: np.ndarray, two: np.ndarray) -> float:
    """Pearson correlation over the entries above the diagonal that both square matrices have."""
    x, y = (table[np.triu_indices(len(table), 1)] for table in (one, two))
    known = np.isfinite(x) & np.isfinite(y)
    return float(np.corrcoef(x[known], y[known])[0, 1])


def _products(p: Labelled, q: Labelled, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of rows, minus those of texts that share no label; and which of them are fit to be used."""
    same = p.labels[:, None] == q.labels
    fit = (shared[np.ix_(p.texts, q.texts)] == same) & (p.texts[:, None] != q.texts)
    inner, strangers = p.rows @ q.rows.T, fit & ~same
    return inner - (inner[strangers].mean() if strangers.any() else 0.0), fit


def _likeness(products: np.ndarray, one: np.ndarray, two: np.ndarray) -> Likeness:
    one, two = one - one.mean(axis=0), two - two.mean(axis=0)
    lengths = np.maximum(np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1)), 1e-30)
    return Likeness(products, products / lengths, (one * two).sum(axis=1) / np.diag(lengths))
