"""The lasting study's probe: multinomial logistic regression on pooled residuals, read in topics it was not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse penalties to choose from, the strongest penalty first."""


@dataclass(frozen=True)
class Probe:
    """Standardised features in the space of the texts it was fitted on, and one weight vector for each class.

    Args:
        mean, scale: Of each feature, ``(D,)``.
        axes: Orthonormal, ``(D, k)``: the space of the fitted texts, in which a penalised fit lies anyway.
        weights: ``(classes, k)``, summing to zero over classes.
        bias: ``(classes,)``.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def standard(self, residuals: np.ndarray) -> np.ndarray:
        """Standardised features, ``(n, D)``."""
        return np.asarray((residuals - self.mean) / self.scale)

    def logits(self, residuals: np.ndarray) -> np.ndarray:
        """Log-odds of each class against the mean of all, ``(n, classes)``."""
        return np.asarray(self.standard(residuals) @ self.axes @ self.weights.T + self.bias)


def fit(residuals: np.ndarray, labels: np.ndarray, *, strength: float, n: int) -> Probe:
    """Fit a probe.

    Args:
        residuals: ``(texts, D)``.
        labels: Class of each text, as a number below ``n``; a class without texts gets the lowest logit of all.
        strength: Inverse of the L2 penalty.
        n: Number of classes.

    Example:
        >>> x = np.array([[0.0, 1.0], [0.1, 1.0], [2.0, 0.0], [2.1, 0.0]])
        >>> fit(x, np.array([0, 0, 1, 1]), strength=1.0, n=2).logits(x).argmax(axis=1)
        array([0, 0, 1, 1])
    """
    from sklearn.linear_model import LogisticRegression

    x = residuals.astype(np.float64)
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-12)
    features = (x - mean) / scale
    if len(features) < features.shape[1]:
        sizes, vectors = np.linalg.eigh(features @ features.T)
        kept = sizes > 1e-9 * sizes[-1]
        axes = features.T @ (vectors[:, kept] / np.sqrt(sizes[kept]))
    else:
        axes = np.eye(features.shape[1])
    made = LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(features @ axes, labels)
    weights, bias = made.coef_, made.intercept_
    if len(made.classes_) == 2:  # scikit-learn keeps one row for two classes
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    every = np.zeros((n, weights.shape[1])), np.full(n, bias.min() - 1e3)
    every[0][made.classes_], every[1][made.classes_] = weights, bias
    return Probe(mean, scale, axes, *every)


def folds(topics: np.ndarray, *, n: int, seed: int) -> np.ndarray:
    """Fold of each text: whole topics are dealt out at random.

    Example:
        >>> first, second, third = folds(np.array(["drums", "a lift", "drums"]), n=2, seed=0)
        >>> bool(first == third != second)
        True
    """
    names, number = np.unique(topics, return_inverse=True)
    dealt = np.arange(len(names)) % n
    return np.asarray(np.random.default_rng([seed, 13]).permutation(dealt)[number])


def choose(residuals: np.ndarray, labels: np.ndarray, topics: np.ndarray, *, n: int, seed: int) -> float:
    """The strength that reads a quarter of the topics best when it is fitted on the others; of equals the strongest penalty."""
    test = folds(topics, n=4, seed=seed) == 0
    hits = [
        float(
            (fit(residuals[~test], labels[~test], strength=c, n=n).logits(residuals[test]).argmax(axis=1) == labels[test]).mean()
        )
        for c in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(hits))]
