"""Is the space of the vectors the one psychologists know: valence first, arousal second, families of feelings together?

Declared before any data is seen:

* **Readout.** The unit directions at each layer. Not raw contrasts: those of concepts with few or noisy stories are longer and
  would weigh more. The table of components repeats the main numbers for raw ones, since the paper does not say.
* **Components.** PCA over concepts (centred over concepts). Signs are arbitrary, so every correlation is oriented to be positive
  and tested two-sided. The headline layer is the vectors' own (chosen by separation or two thirds of the depth), never by
  ratings; looking over all layers, or at PC3 beside PC2 for arousal, has findings of its own, whose nulls look as hard.
* **Null.** Correlations, opposites: human ratings exchanged between words. Clusters: cluster names exchanged between words.
  Shares of variance: labels exchanged between stories (within topics) and refitted; an anisotropic residual stream alone gives
  a large first component, which no null without stories would show. Layers: words exchanged within each layer's matrix.
* **Intervals.** Correlations: over words (bootstrap), because the claim is about words and 45 of them are a sample; noise of the
  stories is inside it, as scatter of the words around the line. Refits on resampled stories are told in the note only: they add
  that noise a second time and lie too low. Shares of variance have intervals from those refits, reflected around the value,
  which takes that bias out; without stories they come from resampled words, and the note says so.
* **Control.** The embedding (layer -1), fitted on the same stories: the authors expect much of the geometry there already.
* **Conditions.** Ten concepts; ten rated words for correlations; three words of either sign for opposites.

Source: method 10 (paper, Figs 5 to 9, 57, Table 12), 22 (rows 12 to 14). Ratings: Russell and Mehrabian 1977.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.linalg import eigh

from affectlens import stats
from affectlens.concepts import Concept
from affectlens.engine import Request
from affectlens.stats import Estimate, Null
from affectlens.studies import Bench, Figure, Finding, Outcome, Table, Verdict
from affectlens.vectors import fit_means, group_means

NAME = "geometry"
ALPHA = 0.05
FEW, PLEASANT = 10, 0.2
"""Fewer concepts or rated words than this are not tested; words rated above it are pleasant, below minus it unpleasant."""
CORRELATION, ARI, SIMILARITY = 0.3, 0.3, 0.7
"""What the lower end of the interval of a correlation, the value of the ARI, the lower end of layers' similarity must reach."""
REFITS, MATRICES = 200, 14
"""At most so many refits on resampled or relabelled stories; so many layers whose similarities are compared (the paper's 14)."""

_R = f"holds: p <= {ALPHA} and the lower end of the interval is at least {CORRELATION}; weak: p <= {ALPHA} only; fails: otherwise"
_SHARE = f"holds: half to twice the published share and p <= {ALPHA}; weak: one of both; fails: neither"
_SIGN = f"holds: p <= {ALPHA} and the interval on the claimed side of 0; weak: p <= {ALPHA} only; fails: otherwise"
_RAND = f"holds: p <= {ALPHA} and the index is at least {ARI}; weak: p <= {ALPHA} only; fails: otherwise"
_LIKE = f"holds: p <= {ALPHA} and the lower end is at least {SIMILARITY}; weak: p <= {ALPHA} only; fails: otherwise"
_Permute = Callable[[np.random.Generator], Any]
# id: claim, published value, rule
CLAIMS: dict[str, tuple[str, str | None, str]] = {
    "valence": ("The first component is valence", "r = 0.81", _R),
    "arousal": ("The second component is arousal", "r = 0.66", _R),
    "arousal_component": ("The second or the third component is arousal", None, _R),
    "valence_best_layer": ("At some layer the first component is valence", None, _R),
    "arousal_best_layer": ("At some layer the second or the third component is arousal", None, _R),
    "beyond_embedding": ("The first component is closer to valence than that of the token embeddings", None, _SIGN),
    "pc1_share": ("The first component explains about a quarter of the variance", "26 %", _SHARE),
    "pc2_share": ("The second component explains about a seventh of the variance", "15 %", _SHARE),
    "opposites": ("Vectors of pleasant and of unpleasant words point away from each other", "negative cosines", _SIGN),
    "clusters": ("Clustering the vectors finds the published families", None, _RAND),
    "cohesion": ("Vectors of one published family are more alike than those of different families", None, _SIGN),
    "layers": ("The geometry is the same from a third of the depth on", "0.8 to 1.0 (colour scale)", _LIKE),
}


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
    centred = np.asarray(vectors, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    products = centred @ centred.T  # concepts are fewer than dimensions
    variances, axes = eigh(products, subset_by_index=(len(centred) - min(k, len(centred)), len(centred) - 1))
    variances = np.maximum(variances[::-1], 0)
    return axes[:, ::-1] * np.sqrt(variances), variances / max(float(np.trace(products)), 1e-30)


@dataclass(frozen=True)
class _Space:
    """What is measured on, gathered once: indices of rated words, their ratings ``(R, 2)``, clusters ("" for none), and the rows
    of the activations whose concept has a vector (none unless every concept has some)."""

    bench: Bench
    rated: np.ndarray
    ratings: np.ndarray
    clusters: np.ndarray
    stories: np.ndarray

    @classmethod
    def of(cls, bench: Bench) -> _Space:
        names, texts = bench.vectors.names, bench.activations
        known = [bench.concepts[name] if name in bench.concepts else Concept(name, "") for name in names]
        ratings = np.array([(c.rating.pleasure, c.rating.arousal) if c.rating else (np.nan, np.nan) for c in known])
        rated = np.flatnonzero(np.isfinite(ratings).all(axis=1))
        stories = np.zeros(0, dtype=np.intp)
        if texts is not None and set(names) <= set(texts.names):
            stories = np.flatnonzero(np.isin(texts.concepts, names))
        return cls(bench, rated, ratings[rated], np.array([c.cluster or "" for c in known]), stories)

    def options(self, most: int = 2**31) -> dict[str, Any]:
        return {"draws": min(self.bench.draws, most), "seed": self.bench.seed}

    def null(self, statistic: Callable[[Any], float], observed: float, permute: _Permute, **how: Any) -> Null:
        return stats.permutation_null(statistic, observed, permute=permute, **{"side": "greater", **self.options(), **how})

    def basis(self, layer: int) -> np.ndarray:
        vectors, neutral = self.bench.vectors, self.bench.neutral
        share = float(vectors.method.get("share", 0.5))
        if layer >= 0:
            return vectors.neutral[vectors.row(layer)].astype(np.float64)
        if neutral is None or share <= 0 or layer not in neutral.layers:
            return np.zeros((0, vectors.directions.shape[-1]))
        return stats.explained_components(neutral.layer(layer), share)[0]

    def r(self, coordinates: np.ndarray, rating: int) -> np.ndarray:
        """Absolute correlation of each column of coordinates with a rating, over the rated words."""
        return np.abs(_standard(self.ratings[:, rating]) @ _standard(coordinates[self.rated])) / len(self.rated)


def _standard(values: np.ndarray) -> np.ndarray:
    values = values - values.mean(axis=0)
    return np.asarray(values / np.maximum(values.std(axis=0), 1e-30))


def _oriented(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x if float(_standard(x) @ _standard(y)) >= 0 else -x


def _finding(id: str, estimate: Estimate, null: Null | None, clear: bool, note: str) -> Finding:
    claim, published, rule = CLAIMS[id]
    verdict: Verdict = "fails"
    if null is not None and null.p <= ALPHA:
        verdict = "holds" if clear else "weak"
    elif clear and rule == _SHARE:
        verdict = "weak"
    return Finding(NAME, id, claim, estimate, null, published, verdict, rule, note)


def _untestable(id: str, reason: str) -> Finding:
    claim, published, rule = CLAIMS[id]
    return Finding(NAME, id, claim, None, None, published, "untestable", rule, reason)


class Geometry:
    """Components, clusters, opposites, likeness of layers; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Geometry of the vectors"
    question = "Do valence and arousal span the space of the vectors, and do families of feelings lie together?"
    version = 1
    uses: tuple[str, ...] = ()

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing: the stories were read when the vectors were made."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``vectors`` and ``concepts``; ``activations`` (and ``neutral``) add refits, nulls and the embedding.

        Returns:
            Findings, a table of components, and the data of seven figures.
        """
        if len(bench.vectors) < FEW:
            reason = f"{len(bench.vectors)} concepts are too few for a geometry: {FEW} are needed."
            return Outcome(tuple(_untestable(id, reason) for id in CLAIMS), (), {"reason": reason})
        space, texts = _Space.of(bench), bench.activations
        by_layer = {layer: bench.vectors.at(layer).astype(np.float64) for layer in bench.vectors.layers}
        if texts is not None and len(space.stories) and -1 in texts.layers:
            means = group_means(texts.layer(-1), texts.concepts, bench.vectors.names)
            by_layer = {-1: fit_means(means, space.basis(-1)).directions, **by_layer}
        pca = {layer: principal_components(vectors) for layer, vectors in by_layer.items()}
        refits = _refit(space)
        found, curves = _correlations(space, pca, refits)
        found += _shares(space, pca, refits)
        found += [_opposites(space), *_families(space)]
        layers, matrix, likeness = _likeness(space, by_layer)
        data = _data(space, pca) | {"curves": curves, "likeness": likeness, "matrix": [int(layer) for layer in matrix]}
        return Outcome((*found, layers), (_table(space, pca),), data)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the circumplex, similarities, ratings against components, components over layers and the likeness of layers."""
        return _figures(data) if "names" in data else []


def _refit(space: _Space) -> dict[str, Any]:
    """At the default layer: components of refits on resampled and on relabelled stories; empty without stories.

    Each is ``(draws, 4)``: correlations of PC1 with pleasure and PC2 with arousal (nan without ratings), shares of PC1 and PC2.
    """
    bench, activations = space.bench, space.bench.activations
    if activations is None or not len(space.stories):
        return {}
    names, layer = bench.vectors.names, bench.vectors.layer
    x = activations.layer(layer)[space.stories]
    x = (x - x.mean(axis=0, dtype=np.float64)).astype(np.float32)  # without the common offset float32 sums are exact enough
    labels = np.array([names.index(concept) for concept in activations.concepts[space.stories]])
    topics = np.unique(activations.topics[space.stories].astype(str), return_inverse=True)[1]
    basis, counts = space.basis(layer), np.bincount(labels)[:, None]
    rated = len(space.rated) >= FEW
    place = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[place], np.arange(len(names)))

    def measure(rows: np.ndarray) -> list[float]:
        """Rows stand in the places of the stories: those in the places of a concept's stories are averaged."""
        means = np.add.reduceat(x[rows[place]], starts, axis=0) / counts
        coordinates, share = principal_components(fit_means(means, basis).directions, 2)
        return [*(float(space.r(coordinates, j)[j]) if rated else np.nan for j in (0, 1)), *(100 * share).tolist()]

    if len(np.unique(topics * len(names) + labels)) == topics.max() + 1:
        topics = np.zeros_like(topics)  # each topic has one concept: nothing could be exchanged within it
    rng = np.random.default_rng([bench.seed, 2])
    relabelled = []
    for _ in range(space.options(REFITS)["draws"]):
        rows = np.empty_like(labels)
        rows[np.argsort(topics, kind="stable")] = np.lexsort((rng.random(len(labels)), topics))
        relabelled.append(measure(rows))
    kind = "labels exchanged between stories" + (" of a topic" if topics.any() else "") + ", refitted"
    resampled = stats.bootstrap_each(measure, labels, **space.options(REFITS))
    return {"stories": resampled, "relabelled": np.array(relabelled), "kind": kind}


def _correlations(space: _Space, pca: Mapping[int, Any], refits: Mapping[str, Any]) -> tuple[list[Finding], dict[str, Any]]:
    """Findings about ratings, and the curves of r over layers."""
    if len(space.rated) < FEW or np.ptp(space.ratings, axis=0).min(initial=1) == 0:
        reason = f"{len(space.rated)} of these concepts have human ratings that differ: {FEW} are needed."
        return [_untestable(id, reason) for id in list(CLAIMS)[:6]], {}
    default, blocks = space.bench.vectors.layer, [layer for layer in pca if layer >= 0]

    def coordinate(layer: int, component: int, rating: int) -> np.ndarray:
        return _oriented(pca[layer][0][space.rated, component], space.ratings[:, rating])

    def pearson(layer: int, component: int, rating: int) -> tuple[Estimate, Null]:
        return stats.correlation_with_null(coordinate(layer, component, rating), space.ratings[:, rating], **space.options())

    found = []
    for rating, (id, what) in enumerate((("valence", "pleasure"), ("arousal", "arousal"))):
        estimate, null = pearson(default, rating, rating)
        note = f"Layer {default}, correlation with human {what} over {len(space.rated)} words, interval over words"
        if refits:
            again = refits["stories"][rating]
            note += f"; refits on resampled stories give {again.low:.2f} to {again.high:.2f}"
        found.append(_finding(id, estimate, null, estimate.low >= CORRELATION, f"{note}."))
    searches: dict[str, tuple[int, list[tuple[int, int]]]] = {
        "arousal_component": (1, [(default, 1), (default, 2)]),
        "valence_best_layer": (0, [(layer, 0) for layer in blocks]),
        "arousal_best_layer": (1, [(layer, component) for layer in blocks for component in (1, 2)]),
    }
    for id, (rating, candidates) in searches.items():
        matrix = np.stack([_standard(coordinate(*candidate, rating)) for candidate in candidates]) / len(space.rated)
        y, kind = _standard(space.ratings[:, rating]), f"ratings exchanged, best of {len(candidates)}"
        how = {"permute": _exchange(y), "kind": kind, **space.options()}
        best, null = stats.selection_adjusted_null(matrix.__matmul__, matrix @ y, **how)
        layer, component = candidates[best]
        estimate, _ = pearson(layer, component, rating)
        note = f"PC{component + 1} at layer {layer}, the best of {len(candidates)}; the value is optimistic, p is corrected."
        found.append(_finding(id, estimate, null, estimate.low >= CORRELATION, note))
    if -1 in pca:
        pair = np.stack([_standard(coordinate(layer, 0, 0)) for layer in (default, -1)])
        pleasure = space.ratings[:, 0]

        def gain(rows: np.ndarray, swap: np.ndarray) -> float:
            here, there = np.where(swap, pair[::-1, rows], pair[:, rows])
            return float(np.corrcoef(here, pleasure[rows])[0, 1] - np.corrcoef(there, pleasure[rows])[0, 1])

        rows, keep = np.arange(len(pleasure)), np.zeros(len(pleasure), dtype=bool)
        estimate = stats.bootstrap(lambda index: gain(index, keep), len(pleasure), **space.options())
        kind = "layer and embedding exchanged for each word"
        null = space.null(lambda swap: gain(rows, swap), estimate.value, lambda rng: rng.random(len(rows)) < 0.5, kind=kind)
        note = f"r at layer {default} minus r = {space.r(pca[-1][0], 0)[0]:.2f} of the mean token embeddings, over words."
        found.append(_finding("beyond_embedding", estimate, null, estimate.low > 0, note))
    else:
        found.append(_untestable("beyond_embedding", "Needs activations of all concepts with the embedding, layer -1."))
    curves = {}
    for label, component, rating in (("PC1 and pleasure", 0, 0), ("PC2 and arousal", 1, 1), ("PC3 and arousal", 2, 1)):
        along = [pearson(layer, component, rating)[0] for layer in pca]
        curves[label] = [_round(getattr(e, end) for e in along) for end in ("value", "low", "high")]
    return found, curves


def _exchange(values: np.ndarray) -> _Permute:
    return lambda rng: rng.permutation(values)


def _recorded(values: np.ndarray) -> _Permute:
    """Arrangements that were measured beforehand, one after the other."""
    rest = iter(values)
    return lambda rng: next(rest)


def _shares(space: _Space, pca: Mapping[int, Any], refits: Mapping[str, Any]) -> list[Finding]:
    found, layer = [], space.bench.vectors.layer
    value = 100 * pca[layer][1]
    if refits:
        raw, where = refits["stories"][2:], "interval from refits on resampled stories"
    else:
        vectors, options = space.bench.vectors.at(layer), space.options(REFITS)
        raw = stats.bootstrap_each(lambda rows: 100 * principal_components(vectors[rows], 2)[1], len(vectors), **options)
        where = "interval over words and no null, since there are no stories to refit on: at most weak"
    for j, (id, published) in enumerate((("pc1_share", 26.0), ("pc2_share", 15.0))):
        # Resampling adds noise once more and shifts the share; reflecting its distribution around the value undoes the shift.
        ends = [max(0.0, 2 * raw[j].value - end) for end in (raw[j].high, raw[j].low)]
        estimate = replace(raw[j], value=float(value[j]), low=min(ends[0], value[j]), high=max(ends[1], value[j]), unit="%")
        null = None
        if refits:
            drawn = refits["relabelled"][:, 2 + j]
            null = space.null(float, estimate.value, _recorded(drawn), draws=len(drawn), kind=refits["kind"])
        near = published / 2 <= estimate.value <= published * 2
        found.append(_finding(id, estimate, null, near, f"Layer {layer}; {where}."))
    return found


def _opposites(space: _Space) -> Finding:
    pleasure = space.ratings[:, 0] if len(space.rated) else np.zeros(0)
    pleasant, unpleasant = pleasure > PLEASANT, pleasure < -PLEASANT
    if min(pleasant.sum(), unpleasant.sum()) < 3:
        return _untestable("opposites", "Fewer than three words are rated pleasant or unpleasant.")
    rows = space.rated[pleasant | unpleasant]
    cosines = space.bench.vectors.similarity()[np.ix_(rows, rows)]
    sign = pleasant[pleasant | unpleasant]

    def across(rows: np.ndarray, sign: np.ndarray) -> float:
        return float(cosines[np.ix_(rows[sign], rows[~sign])].mean())

    every = np.arange(len(rows))
    estimate = stats.bootstrap(lambda index: across(index, sign), sign, **space.options())
    how = {"side": "less", "kind": "signs exchanged between words"}
    null = space.null(lambda sign: across(every, sign), estimate.value, _exchange(sign), **how)
    same = (sign[:, None] == sign) & ~np.eye(len(sign), dtype=bool)
    note = f"Mean cosine of {sign.sum()} pleasant with {(~sign).sum()} unpleasant words at layer {space.bench.vectors.layer}; "
    return _finding("opposites", estimate, null, estimate.high < 0, f"{note}within a sign it is {cosines[same].mean():.2f}.")


def _families(space: _Space) -> list[Finding]:
    """Agreement of k-means with the published clusters, and cosines within against between them."""
    from sklearn.cluster import KMeans

    rows = np.flatnonzero(space.clusters != "")
    clusters = np.unique(space.clusters[rows], return_inverse=True)[1]
    k = int(clusters.max(initial=-1)) + 1
    if len(rows) < max(FEW, 2 * k) or k < 2 or np.bincount(clusters).max() < 2:
        reason = f"{len(rows)} concepts in {k} clusters are too few: {FEW} concepts, two clusters and two in each are needed."
        return [_untestable(id, reason) for id in ("clusters", "cohesion")]
    layer, seed = space.bench.vectors.layer, space.bench.seed
    directions = space.bench.vectors.at().astype(np.float64)[rows]
    tries = [KMeans(k, n_init=10, random_state=seed + i).fit(directions) for i in range(5)]
    best = min(tries, key=lambda made: made.inertia_)
    estimate, null = stats.adjusted_rand_with_null(best.labels_, clusters, **space.options())
    others = [stats.adjusted_rand_with_null(made.labels_, clusters, draws=1)[0].value for made in tries]
    note = f"Adjusted Rand index of k-means (k = {k}, best of 50 starts) with published clusters at layer {layer}; five seeds "
    found = [_finding("clusters", estimate, null, estimate.value >= ARI, f"{note}give {min(others):.2f} to {max(others):.2f}.")]
    cosines = directions @ directions.T

    def difference(index: np.ndarray, own: np.ndarray) -> float:
        same, other = own[:, None] == own, index[:, None] != index  # a word that was drawn twice is not a pair with itself
        values = cosines[np.ix_(index, index)]
        return float(values[same & other].mean() - values[~same].mean())

    every = np.arange(len(rows))
    estimate = stats.bootstrap(lambda index: difference(index, clusters[index]), clusters, **space.options())
    how = "clusters exchanged between words"
    null = space.null(lambda own: difference(every, own), estimate.value, _exchange(clusters), kind=how)
    note = f"Mean cosine within clusters minus between them, {len(rows)} words, layer {layer}."
    return [*found, _finding("cohesion", estimate, null, estimate.low > 0, note)]


def _likeness(space: _Space, by_layer: Mapping[int, np.ndarray]) -> tuple[Finding, np.ndarray, list[list[float]]]:
    """Correlation between the similarity matrices of layers (representational similarity, Fig 9)."""
    layers = np.unique(np.linspace(min(by_layer), max(by_layer), min(MATRICES, len(by_layer))).round().astype(int))
    layers = np.array([layer for layer in layers if layer in by_layer])
    cosines = np.stack([by_layer[layer] @ by_layer[layer].T for layer in layers])
    late = np.flatnonzero(layers >= space.bench.vectors.layers[-1] / 3)
    upper = np.triu_indices(len(cosines[0]), 1)

    def alike(matrices: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Correlations between the upper triangles, pairs of a word with itself left out; each layer has its own rows."""
        pairs = rows[0, upper[0]] != rows[0, upper[1]]
        first, second = (rows[:, side[pairs]] for side in upper)
        return np.corrcoef(matrices[np.arange(len(matrices))[:, None], first, second])

    def mean_off(correlations: np.ndarray) -> float:
        return float(correlations[np.triu_indices(len(correlations), 1)].mean())

    n, matrix = len(cosines[0]), alike(cosines, np.tile(np.arange(len(cosines[0])), (len(layers), 1)))
    table = [_round(row) for row in matrix]
    if len(late) < 2:
        return _untestable("layers", "Needs vectors at two layers or more beyond a third of the depth."), layers, table
    chosen = cosines[late]
    estimate = stats.bootstrap(lambda rows: mean_off(alike(chosen, np.tile(rows, (len(late), 1)))), n, **space.options(REFITS))
    each = np.tile(np.arange(n), (len(late), 1))
    how = space.options(REFITS) | {"kind": "words exchanged within each layer"}
    null = space.null(lambda rows: mean_off(alike(chosen, rows)), estimate.value, lambda rng: rng.permuted(each, axis=1), **how)
    note = f"Mean correlation between the cosine matrices of layers {', '.join(map(str, layers[late]))}; interval over words"
    if layers[0] == -1:
        note += f"; with the token embeddings' matrix theirs correlate {matrix[0, late].mean():.2f}"
    note += ". Neighbouring layers share most of their stream, so this says little about one layer."
    return _finding("layers", estimate, null, estimate.low >= SIMILARITY, note), layers, table


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


def _data(space: _Space, pca: Mapping[int, Any]) -> dict[str, Any]:
    """Everything that the figures need, oriented by the ratings where there are any."""
    from scipy.cluster.hierarchy import average, leaves_list

    vectors = space.bench.vectors
    plane = pca[vectors.layer][0][:, :2].copy()
    if len(space.rated) >= FEW:
        for j in (0, 1):
            plane[:, j] *= np.sign(_standard(plane[space.rated, j]) @ _standard(space.ratings[:, j])) or 1.0
    # Clusters from unpleasant to pleasant along the first axis; inside a cluster, what is alike stands together.
    groups = sorted(set(space.clusters.tolist()), key=lambda cluster: float(plane[space.clusters == cluster, 0].mean()))
    order: list[int] = []
    for group in groups:
        own = np.flatnonzero(space.clusters == group)
        order += own[leaves_list(average(vectors.at()[own])) if len(own) > 2 else slice(None)].tolist()
    return {
        "layer": vectors.layer,
        "names": [vectors.names[i] for i in order],
        "clusters": [str(space.clusters[i]) or "no cluster" for i in order],
        "x": _round(plane[order, 0]),
        "y": _round(plane[order, 1]),
        "cosines": [_round(row) for row in vectors.similarity()[np.ix_(order, order)]],
        "rated": [[vectors.names[i], *_round(space.ratings[j]), *_round(plane[i])] for j, i in enumerate(space.rated)],
        "layers": list(pca),
        "shares": {f"PC{i + 1}": _round(100 * share[i] for _, share in pca.values()) for i in range(3)},
    }


def _table(space: _Space, pca: Mapping[int, Any]) -> Table:
    vectors = space.bench.vectors
    raw = vectors.at().astype(np.float64) * vectors.norms[vectors.row()][:, None]
    (unit, share), (long, long_share) = pca[vectors.layer], principal_components(raw)
    blank: list[None] = [None] * unit.shape[1]
    rated = len(space.rated) >= FEW
    columns = [
        100 * share, *(space.r(unit, j) if rated else blank for j in (0, 1)),
        100 * long_share, *(space.r(long, j) if rated else blank for j in (0, 1)),
    ]  # fmt: skip
    rows = [(f"PC{i + 1}", *(None if c[i] is None else round(float(c[i]), 4) for c in columns)) for i in range(unit.shape[1])]
    head = ("component", "%", "|r| pleasure", "|r| arousal", "% (raw)", "|r| pleasure (raw)", "|r| arousal (raw)")
    caption = "Share of variance and absolute correlation with human ratings; raw: contrasts that were not scaled to unit length."
    return Table("components", f"Components at layer {vectors.layer}", caption, head, tuple(rows))


def _figures(data: Mapping[str, Any]) -> list[Figure]:
    from affectlens.figures import PALETTE, blank, circumplex, heat_map, layer_curves, to_figure

    names, layer, rated = data["names"], data["layer"], data["rated"]
    groups = data["clusters"] if len(set(data["clusters"])) > 1 else None
    titles = ("PC1, towards pleasant", "PC2, towards aroused") if data["curves"] else ("PC1", "PC2")
    plane, cosines = circumplex(names, data["x"], data["y"], groups, titles=titles), heat_map(data["cosines"], names, groups)
    made = [
        to_figure("circumplex", f"The first two components at layer {layer}", "Each point is a concept.", plane),
        to_figure("similarity", f"Cosines between vectors at layer {layer}", "Clusters from unpleasant to pleasant.", cosines),
    ]
    if data["curves"]:
        text, hover = [row[0] for row in rated], "%{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>"
        for j, (what, component) in enumerate((("pleasure", "PC1"), ("arousal", "PC2"))):
            dots, marker = blank(x=f"human {what} rating", y=component), {"color": PALETTE[j], "size": 8}
            x, y = [row[1 + j] for row in rated], [row[3 + j] for row in rated]
            dots.add_scatter(x=x, y=y, text=text, mode="markers", marker=marker, hovertemplate=hover)
            made.append(to_figure(what, f"{component} and human {what}", f"{len(rated)} rated words, layer {layer}.", dots))
        along = layer_curves(data["layers"], data["curves"], y="|r| with human ratings", mark=layer)
        caption = "95 % intervals over words. Layer -1 is the mean token embedding."
        made.append(to_figure("along", "Components and ratings over layers", caption, along))
    curves = {component: (share, None, None) for component, share in data["shares"].items()}
    shares = layer_curves(data["layers"], curves, y="% of the variance over concepts", mark=layer)
    made.append(to_figure("shares", "Variance of the first components over layers", "Without intervals.", shares))
    likeness = heat_map(data["likeness"], [f"layer {i}" for i in data["matrix"]], limit=(0.0, 1.0), unit="correlation")
    caption = "Correlation between the matrices of cosines of two layers; layer -1 is the mean token embedding."
    return [*made, to_figure("layers", "Likeness of layers", caption, likeness)]


STUDY = Geometry()
