"""The space that vectors of concepts span: its components, its tree, its clusters, and how alike two such spaces are.

Plain linear algebra on directions ``(N, D)`` or on matrices of cosines ``(N, N)``; what the concepts mean is for others to say.
"""

from __future__ import annotations

import numpy as np

from affectlens import stats
from affectlens.errors import MissingExtra
from affectlens.stats import Estimate, Null

SEEDS, STARTS = 5, 10
"""How often k-means is done, and from how many starts each time: the best of all counts, the others show how firm it is."""


def principal_components(vectors: np.ndarray, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """PCA over concepts.

    Args:
        vectors: ``(N, D)``; centred here over the concepts.
        k: How many components.

    Returns:
        Coordinates of the concepts ``(N, k)`` and each component's share of the variance ``(k,)``. Signs are arbitrary.

    Example:
        >>> principal_components(np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 2)[1]
        array([0.8, 0.2])
    """
    from scipy.linalg import eigh

    centred = np.asarray(vectors, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    products = centred @ centred.T  # concepts are fewer than dimensions
    variances, axes = eigh(products, subset_by_index=(len(centred) - min(k, len(centred)), len(centred) - 1))
    variances = np.maximum(variances[::-1], 0)
    return axes[:, ::-1] * np.sqrt(variances), variances / max(float(np.trace(products)), 1e-30)


def tree(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hierarchical clustering: average linkage on cosine distance, leaves turned so that neighbours are as alike as they can be.

    Args:
        cosines: Between every two concepts, ``(N, N)``, N >= 2.

    Returns:
        The order of the concepts ``(N,)``, and for each of the N - 1 joints a bracket of four points ``(N - 1, 4, 2)``: the
        place along that order, and the cosine distance at which the two branches join.

    Example:
        >>> order, joints = tree(np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.1], [0.9, 0.1, 1.0]]))
        >>> order, joints[:, 1, 1].round(2)
        (array([1, 2, 0]), array([0.1 , 0.95]))
    """
    from scipy.cluster.hierarchy import average, dendrogram, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    distances = 1 - (cosines + cosines.T) / 2
    distances = squareform(np.maximum(distances, 0) * (1 - np.eye(len(cosines))))
    drawn = dendrogram(optimal_leaf_ordering(average(distances), distances), no_plot=True)
    places = (np.array(drawn["icoord"]) - 5) / 10  # scipy puts leaves at 5, 15, 25, …
    return np.array(drawn["leaves"]), np.stack([places, np.array(drawn["dcoord"])], axis=-1)


def kmeans(vectors: np.ndarray, k: int, *, seed: int = 0) -> np.ndarray:
    """k-means, done several times.

    Args:
        vectors: ``(N, D)``, N >= k.
        k: How many clusters.
        seed: Of the starts.

    Returns:
        The cluster of each concept in each of ``SEEDS`` runs, ``(SEEDS, N)``, the run with the smallest squared distances first.

    Example:
        >>> found = kmeans(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), 2)
        >>> bool(found[0, 0] == found[0, 1] != found[0, 2] == found[0, 3])
        True
    """
    from sklearn.cluster import KMeans

    # In coordinates along all components every distance is the same, and there are fewer of them.
    coordinates = principal_components(vectors, len(vectors))[0]
    runs = [KMeans(k, n_init=STARTS, random_state=seed + i).fit(coordinates) for i in range(SEEDS)]
    return np.stack([run.labels_ for run in sorted(runs, key=lambda run: float(run.inertia_))])


def rand_indices(partitions: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of several partitions with one grouping: fast enough to search among them under every exchange.

    Args:
        partitions: Cluster of each concept as a number, ``(K, N)``.
        groups: Group of each as a number, ``(N,)``.

    Returns:
        ``(K,)``; see :func:`affectlens.stats.adjusted_rand_with_null` for the index itself.

    Example:
        >>> rand_indices(np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), np.array([5, 5, 2, 2]))
        array([ 1. , -0.5])
    """
    n, width = len(groups), int(groups.max()) + 1
    squares = np.array([(np.bincount(own * width + groups) ** 2).sum() for own in partitions])
    own, theirs = np.array([(np.bincount(own) ** 2).sum() for own in partitions]), (np.bincount(groups) ** 2).sum()
    together, first, second = (squares - n) / 2, (own - n) / 2, (theirs - n) / 2
    expected = first * second / (n * (n - 1) / 2)
    return np.asarray((together - expected) / ((first + second) / 2 - expected))


def silhouette(cosines: np.ndarray, labels: np.ndarray) -> float:
    """Mean over concepts of how much nearer (in cosine distance) their own cluster is than the next one: 1 is best, 0 is none.

    Args:
        cosines: Between every two concepts, ``(N, N)``.
        labels: Cluster of each, ``(N,)``; two clusters at least.

    Example:
        >>> round(silhouette(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0.5, 1]]), np.array([0, 0, 1, 1])), 2)
        0.75
    """
    from sklearn.metrics import silhouette_score

    distances = np.maximum(1 - cosines, 0) * (1 - np.eye(len(cosines)))
    return float(silhouette_score(distances, labels, metric="precomputed"))


RATED = 6
"""Fewer concepts with human ratings than this do not fix the two axes of :func:`rating_axes`."""


def rating_axes(ratings: np.ndarray) -> np.ndarray | None:
    """How to read valence and arousal from the scores of rated concepts: the plane of ratings that fits the scores best.

    The scores ``s`` of concepts are fitted by ``constant + valence * pleasure + arousal * arousal``, in least squares. So neither
    axis takes what the other explains, and what all concepts share is neither.

    Args:
        ratings: Pleasure and arousal of each concept, ``(R, 2)``.

    Returns:
        Weights ``(2, R)``: times the scores they give valence and arousal, in the scores' unit for each unit of rating. None
        where fewer than :data:`RATED` concepts are rated, or ratings lie on a line.

    Example:
        >>> ratings = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1.0]])
        >>> rating_axes(ratings) @ (0.3 + 2 * ratings[:, 0] - ratings[:, 1])
        array([ 2., -1.])
    """
    design = np.column_stack([np.ones(len(ratings)), ratings])
    if len(ratings) < RATED or np.linalg.matrix_rank(design) < 3:
        return None
    return np.asarray(np.linalg.pinv(design)[1:])


def likeness(cosines: np.ndarray, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How alike the similarity matrices of several layers (or models) are, in two measures.

    The correlation over pairs of different concepts says whether the same pairs are alike. The cosine of the whole matrices,
    diagonal and both triangles, is what the paper shows: it is higher, since diagonals and a mean that is not 0 agree always.

    Args:
        cosines: ``(L, N, N)``.
        rows: For each matrix which concept stands in which place, ``(L, n)``: resamples (equal in all rows) and exchanges.
            Pairs of a concept with itself are left out.

    Returns:
        Correlations ``(L, L)`` and cosines ``(L, L)``.

    Example:
        >>> one = np.array([[1, 0.5, 0.0], [0.5, 1, -0.5], [0, -0.5, 1]])
        >>> correlations, cosines = likeness(np.stack([one, (one + 1) / 2]))
        >>> correlations[0, 1].round(3), cosines[0, 1].round(3)
        (np.float64(1.0), np.float64(0.803))
    """
    n = cosines.shape[1] if rows is None else rows.shape[1]
    rows = np.tile(np.arange(n), (len(cosines), 1)) if rows is None else rows
    one, other = np.triu_indices(n, 1)
    pairs = rows[0, one] != rows[0, other]
    values = cosines[np.arange(len(cosines))[:, None], rows[:, one[pairs]], rows[:, other[pairs]]]
    products = n + 2 * values @ values.T
    lengths = np.sqrt(np.diagonal(products))
    return np.atleast_2d(np.corrcoef(values)), products / np.outer(lengths, lengths)


def umap_plane(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Two dimensions that keep neighbours together (UMAP): 15 neighbours, minimal distance 0.1, cosine. Distances mean little.

    Args:
        vectors: ``(N, D)``, N >= 4.
        seed: Of the layout, which depends on it.

    Returns:
        ``(N, 2)``.

    Raises:
        MissingExtra: ``umap-learn`` is not installed.

    Example:
        >>> umap_plane(vectors.at())  # doctest: +SKIP
    """
    try:
        from umap import UMAP
    except ImportError:
        raise MissingExtra("umap-learn", "umap") from None
    layout = UMAP(n_neighbors=min(15, len(vectors) - 1), min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
    return np.asarray(layout.fit_transform(vectors), dtype=np.float64)


def likeness_with_null(cosines: np.ndarray, *, draws: int = 200, seed: int = 0) -> list[tuple[Estimate, Null]]:
    """The mean :func:`likeness` of several matrices with one another, by correlation and by cosine.

    Args:
        cosines: ``(L, N, N)``, L >= 2.
        draws, seed: Resamples of the concepts behind the intervals, and exchanges of them within each matrix behind the nulls.

    Returns:
        The estimate and its null, first of the correlation, then of the cosine.

    Example:
        >>> angles = np.random.default_rng(0).uniform(-3, 3, size=12)
        >>> one = np.cos(angles[:, None] - angles)
        >>> [(round(e.value, 2), null.p < 0.05) for e, null in likeness_with_null(np.stack([one, one]))]
        [(1.0, True), (1.0, True)]
    """
    n, above = cosines.shape[1], np.triu_indices(len(cosines), 1)
    every = np.tile(np.arange(n), (len(cosines), 1))

    def means(rows: np.ndarray) -> list[float]:
        return [float(measure[above].mean()) for measure in likeness(cosines, rows)]

    estimates = stats.bootstrap_each(lambda rows: means(np.tile(rows, (len(cosines), 1))), n, draws=draws, seed=seed)
    rng = np.random.default_rng([seed, 4])
    drawn = np.array([means(rng.permuted(every, axis=1)) for _ in range(draws)])
    kind = "words exchanged within each layer"

    def null(estimate: Estimate, values: np.ndarray) -> Null:
        rest = iter(values)
        return stats.permutation_null(float, estimate.value, permute=lambda _: next(rest), draws=draws, side="greater", kind=kind)

    return [(estimate, null(estimate, values)) for estimate, values in zip(estimates, drawn.T, strict=True)]


def cohesion_with_null(cosines: np.ndarray, groups: np.ndarray, *, draws: int = 1000, seed: int = 0) -> tuple[Estimate, Null]:
    """Mean cosine between concepts of one group minus that between concepts of different groups.

    Args:
        cosines: Between every two concepts, ``(N, N)``.
        groups: Group of each concept as a number, ``(N,)``; one group at least has two concepts.
        draws, seed: Resamples of concepts within groups behind the interval, and exchanges of groups behind the null.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.8, 0.6], [1.0, 0.1], [-1.0, 0.0], [-0.8, 0.6], [-1, 0.1]])
        >>> round(cohesion_with_null(x @ x.T, np.array([0, 0, 0, 1, 1, 1]))[0].value, 2)
        1.7
    """

    def difference(index: np.ndarray, own: np.ndarray) -> float:
        same, other = own[:, None] == own, index[:, None] != index  # a concept that was drawn twice is not a pair with itself
        if not (same & other).any():
            return float("nan")
        values = cosines[np.ix_(index, index)]
        return float(values[same & other].mean() - values[~same].mean())

    every = np.arange(len(groups))
    estimate = stats.bootstrap(lambda index: difference(index, groups[index]), groups, draws=draws, seed=seed)
    null = stats.permutation_null(
        lambda own: difference(every, own),
        estimate.value,
        permute=lambda rng: rng.permutation(groups),
        draws=draws,
        seed=seed,
        side="greater",
        kind="groups exchanged between words",
    )
    return estimate, null
