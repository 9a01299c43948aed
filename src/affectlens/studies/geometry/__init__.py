"""Is the space of the vectors the one psychologists know: valence first, arousal second, families of feelings together?

Declared before any data is seen:

* **Readout.** The unit directions at each layer. Not raw contrasts: those of concepts with few or noisy stories are longer and
  would weigh more. The table of components repeats the main numbers for raw ones, since the paper does not say.
* **Components.** PCA over concepts (centred over concepts). Signs are arbitrary, so every correlation is oriented to be positive
  and tested two-sided. The headline layer is the vectors' own (chosen by separation or two thirds of the depth), never by
  ratings; looking over all layers, or at PC3 beside PC2 for arousal, has findings of its own, whose nulls look as hard.
* **Order and clusters.** The matrix of cosines is ordered by average linkage on cosine distance. k-means is done for several k
  (the paper tried several and shows 10); the headline k is the number of published families, whatever agrees best with them,
  and the best of all k is a finding of its own, whose null looks as hard. Silhouettes have no null: they are for looking at.
* **Null.** Correlations, opposites: human ratings exchanged between words. Clusters: cluster names exchanged between words.
  Shares of variance: labels exchanged between stories (within topics) and refitted; an anisotropic residual stream alone gives
  a large first component, which no null without stories would show. Layers: words exchanged within each layer's matrix.
* **Layers.** Likeness of two layers is the correlation of their cosines over pairs of different words. The cosine of the whole
  matrices, which the paper gives, stands beside it: it is higher, because their diagonals always agree.
* **Intervals.** Correlations: over words (bootstrap), because the claim is about words and 45 of them are a sample; noise of the
  stories is inside it, as scatter of the words around the line. Refits on resampled stories are told in the note only: they add
  that noise a second time and lie too low. Shares of variance have intervals from those refits, reflected around the value,
  which takes that bias out; without stories they come from resampled words, and the note says so. Rand index: jackknife.
* **Control.** The embedding (layer -1), fitted on the same stories: the authors expect much of the geometry there already. A
  table sets its correlations, clusters and likeness beside the layer's.
* **Conditions.** Ten concepts; ten rated words for correlations (with fewer, resamples of the words have too few different ones
  to bound anything, and a chance correlation of 0.63 would be ordinary); three words of either sign for opposites.

Source: method 10 (paper, Figs 5 to 9, 57, Table 12), 22 (rows 12 to 14). Ratings: Russell and Mehrabian 1977.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import Concept
from affectlens.engine import Request
from affectlens.errors import MissingExtra
from affectlens.space import (
    cohesion_with_null,
    kmeans,
    likeness,
    likeness_with_null,
    principal_components,
    rand_indices,
    silhouette,
    tree,
    umap_plane,
)
from affectlens.stats import Estimate, Null
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, Verdict, untestable
from affectlens.studies.geometry.drawing import NO_FAMILY, baseline, figures, members, place
from affectlens.vectors import fit_means, group_means

NAME = "geometry"
FEW, PLEASANT = 10, 0.2
"""Fewer concepts or rated words than this are not tested; words rated above it are pleasant, below minus it unpleasant."""
CORRELATION, ARI, SIMILARITY, COSINE = 0.3, 0.3, 0.7, 0.8
"""What must be reached by the lower end of a correlation, by the ARI, by the lower end of layers' correlation and cosine."""
REFITS, MATRICES, COMPONENTS = 200, 14, 5
"""At most so many refits on resampled or relabelled stories; layers whose similarities are compared (the paper's 14)."""
KS, USUAL = (4, 6, 8, 10, 12, 15, 20), 10
"""Numbers of clusters, as far as there are two concepts for each; the one where there are no families to count (the paper's)."""

_R = f"holds: p <= {ALPHA} and the lower end of the interval is at least {CORRELATION}; weak: p <= {ALPHA} only; fails: otherwise"
_SHARE = f"holds: half to twice the published share and p <= {ALPHA}; weak: one of both; fails: neither"
_SIGN = f"holds: p <= {ALPHA} and the interval on the claimed side of 0; weak: p <= {ALPHA} only; fails: otherwise"
_RAND = f"holds: p <= {ALPHA} and the index is at least {ARI}; weak: p <= {ALPHA} only; fails: otherwise"
_LIKE = "holds: p <= {} and the lower end is at least {}; weak: p <= {} only; fails: otherwise"
_CORRELATED, _COSINE = _LIKE.format(ALPHA, SIMILARITY, ALPHA), _LIKE.format(ALPHA, COSINE, ALPHA)
_GRADES: tuple[Verdict, ...] = ("fails", "weak", "holds")
_Permute = Callable[[np.random.Generator], Any]
CLAIMS = {
    id: Claim(NAME, id, text, rule, published, figure)
    for id, text, rule, published, figure in (
        ("valence", "The first component is valence", _R, "r = 0.81", "pleasure"),
        ("arousal", "The second component is arousal", _R, "r = 0.66", "arousal"),
        ("arousal_component", "The second or the third component is arousal", _R, None, "along"),
        ("valence_best_layer", "At some layer the first component is valence", _R, None, "along"),
        ("arousal_best_layer", "At some layer the second or the third component is arousal", _R, None, "along"),
        ("beyond_embedding", "The first component is closer to valence than that of the token embeddings", _SIGN, None, "along"),
        ("pc1_share", "The first component explains about a quarter of the variance", _SHARE, "26 %", "shares"),
        ("pc2_share", "The second component explains about a seventh of the variance", _SHARE, "15 %", "shares"),
        (
            "opposites",
            "Vectors of pleasant and of unpleasant words point away from each other",
            _SIGN,
            "negative cosines",
            "similarity",
        ),
        ("clusters", "Clustering the vectors finds the published families", _RAND, None, "families"),
        ("clusters_best_k", "With some number of clusters it finds the published families", _RAND, None, "families"),
        (
            "cohesion",
            "Vectors of one published family are more alike than those of different families",
            _SIGN,
            None,
            "similarity",
        ),
        ("layers", "The geometry is the same from a third of the depth on", _CORRELATED, None, "layers"),
        ("layers_cosine", "The same by cosine of the whole matrices", _COSINE, "0.8 to 1.0 (colour scale)", "layers-cosine"),
        ("embedding", "The geometry is that of the token embeddings", _CORRELATED, "expected, no value", "layers"),
    )
}


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

    def oriented(self, coordinates: np.ndarray) -> np.ndarray:
        """The first component towards pleasant, the others towards aroused; without ratings, the largest coordinate positive."""
        if len(self.rated) >= FEW:
            which = np.minimum(np.arange(coordinates.shape[1]), 1)
            signs = (_standard(self.ratings)[:, which] * _standard(coordinates[self.rated])).sum(axis=0)
        else:
            signs = np.take_along_axis(coordinates, np.abs(coordinates).argmax(axis=0)[None], axis=0)[0]
        return np.asarray(coordinates * np.where(signs < 0, -1, 1))


def _standard(values: np.ndarray) -> np.ndarray:
    values = values - values.mean(axis=0)
    return np.asarray(values / np.maximum(values.std(axis=0), 1e-30))


def _oriented(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x if float(_standard(x) @ _standard(y)) >= 0 else -x


class Geometry:
    """Components, tree, clusters, opposites, likeness of layers; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Geometry of the vectors"
    question = "Do valence and arousal span the space of the vectors, and do families of feelings lie together?"
    version = 2
    uses: tuple[str, ...] = ()

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing: the stories were read when the vectors were made."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``vectors`` and ``concepts``, no model; ``activations`` (and ``neutral``) add refits, nulls and the
                embedding. Vectors from :func:`affectlens.exchange.read_vectors` will do.

        Returns:
            Findings; tables of components, clusters and the embedding; the data of the figures; as raw values the coordinates at
            every layer, the cosines and the clusters.
        """
        if len(bench.vectors) < FEW:
            reason = f"{len(bench.vectors)} concepts are too few for a geometry: {FEW} are needed."
            return untestable(CLAIMS.values(), reason)
        space, texts = _Space.of(bench), bench.activations
        by_layer = {layer: bench.vectors.at(layer).astype(np.float64) for layer in bench.vectors.layers}
        if texts is not None and len(space.stories) and -1 in texts.layers:
            means = group_means(texts.layer(-1), texts.concepts, bench.vectors.names)
            by_layer = {-1: fit_means(means, space.basis(-1)).directions, **by_layer}
        pca = {layer: principal_components(vectors, COMPONENTS) for layer, vectors in by_layer.items()}
        refits = _refit(space)
        found, curves = _correlations(space, pca, refits)
        found += [*_shares(space, pca, refits), _opposites(space)]
        runs = _partitions(space, by_layer)
        families, agreement = _families(space, by_layer, runs)
        layers, alike = _likeness(space, by_layer)
        data = _data(space, by_layer, pca, runs) | {"curves": curves, "agreement": agreement, **alike}
        tables = [_components(space, pca), members(data)]
        if -1 in by_layer:
            tables.append(baseline(data))
        return Outcome((*found, *families, *layers), tuple(tables), data, _raw(space, pca, runs))

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the plane, the tree, clusters, ratings against components, components over layers and the likeness of layers."""
        return figures(data) if "names" in data else []


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
        return [claim.untestable(reason) for claim in list(CLAIMS.values())[:6]], {}
    default, blocks = space.bench.vectors.layer, [layer for layer in pca if layer >= 0]
    pleasure = space.ratings[:, 0]

    def coordinate(layer: int, component: int, rating: int) -> np.ndarray:
        return _oriented(pca[layer][0][space.rated, component], space.ratings[:, rating])

    def pearson(layer: int, component: int, rating: int) -> tuple[Estimate, Null]:
        return stats.correlation_with_null(coordinate(layer, component, rating), space.ratings[:, rating], **space.options())

    found = []
    of = f"{(pleasure > PLEASANT).sum()} of them pleasant, {(pleasure < -PLEASANT).sum()} unpleasant"
    for rating, (id, what) in enumerate((("valence", "pleasure"), ("arousal", "arousal"))):
        estimate, null = pearson(default, rating, rating)
        note = f"Layer {default}, correlation with human {what} over {len(space.rated)} words ({of}), interval over words"
        if refits:
            again = refits["stories"][rating]
            note += f"; refits on resampled stories give {again.low:.2f} to {again.high:.2f}"
        found.append(CLAIMS[id].tested(estimate, null, estimate.low >= CORRELATION, f"{note}."))
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
        found.append(CLAIMS[id].tested(estimate, null, estimate.low >= CORRELATION, note))
    if -1 in pca:
        pair = np.stack([_standard(coordinate(layer, 0, 0)) for layer in (default, -1)])

        def gain(rows: np.ndarray, swap: np.ndarray) -> float:
            here, there = np.where(swap, pair[::-1, rows], pair[:, rows])
            return float(np.corrcoef(here, pleasure[rows])[0, 1] - np.corrcoef(there, pleasure[rows])[0, 1])

        rows, keep = np.arange(len(pleasure)), np.zeros(len(pleasure), dtype=bool)
        estimate = stats.bootstrap(lambda index: gain(index, keep), len(pleasure), **space.options())
        kind = "layer and embedding exchanged for each word"
        null = space.null(lambda swap: gain(rows, swap), estimate.value, lambda rng: rng.random(len(rows)) < 0.5, kind=kind)
        note = f"r at layer {default} minus r = {space.r(pca[-1][0], 0)[0]:.2f} of the mean token embeddings, over words."
        found.append(CLAIMS["beyond_embedding"].tested(estimate, null, estimate.low > 0, note))
    else:
        found.append(CLAIMS["beyond_embedding"].untestable(_NO_EMBEDDING))
    curves = {}
    for label, component, rating in (("PC1 and pleasure", 0, 0), ("PC2 and arousal", 1, 1), ("PC3 and arousal", 2, 1)):
        along = [pearson(layer, component, rating)[0] for layer in pca]
        curves[label] = [_round(getattr(e, end) for e in along) for end in ("value", "low", "high")]
    return found, curves


_NO_EMBEDDING = "Needs activations of all concepts with the embedding, layer -1."


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
        passed = (published / 2 <= estimate.value <= published * 2) + (null is not None and null.p <= ALPHA)
        claim, note = CLAIMS[id], f"Layer {layer}; {where}."
        finding = Finding(NAME, id, claim.text, estimate, null, claim.published, _GRADES[passed], claim.rule, note, claim.figure)
        found.append(finding)
    return found


def _opposites(space: _Space) -> Finding:
    pleasure = space.ratings[:, 0] if len(space.rated) else np.zeros(0)
    pleasant, unpleasant = pleasure > PLEASANT, pleasure < -PLEASANT
    if min(pleasant.sum(), unpleasant.sum()) < 3:
        reason = f"{pleasant.sum()} words are rated pleasant and {unpleasant.sum()} unpleasant: three of each are needed."
        return CLAIMS["opposites"].untestable(reason)
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
    return CLAIMS["opposites"].tested(estimate, null, estimate.high < 0, f"{note}within a sign it is {cosines[same].mean():.2f}.")


def _partitions(space: _Space, by_layer: Mapping[int, np.ndarray]) -> dict[int, dict[int, np.ndarray]]:
    """Runs of k-means over all concepts for every k, at the default layer and of the embedding."""
    own, n = len(set(space.clusters) - {""}), len(space.clusters)
    ks = sorted({k for k in {*KS, own} if 2 <= k <= n // 2})
    layers = [layer for layer in (space.bench.vectors.layer, -1) if layer in by_layer]
    return {layer: {k: kmeans(by_layer[layer], k, seed=space.bench.seed) for k in ks} for layer in layers}


def _headline(space: _Space, ks: Sequence[int]) -> int:
    """The number of published families, else the nearest to the paper's ten."""
    own = len(set(space.clusters) - {""})
    return own if own in ks else min(ks, key=lambda k: abs(k - USUAL))


def _families(
    space: _Space, by_layer: Mapping[int, np.ndarray], runs: Mapping[int, Mapping[int, np.ndarray]]
) -> tuple[list[Finding], dict[str, Any]]:
    """Agreement of k-means with the published clusters, cosines within against between them; the curves over k."""
    layer, default = space.bench.vectors.layer, runs[space.bench.vectors.layer]
    ks = list(default)
    similarity = {at: by_layer[at] @ by_layer[at].T for at in runs}
    curves: dict[str, Any] = {
        "k": ks,
        "headline": _headline(space, ks),
        "silhouette": {
            place(at): _round(silhouette(similarity[at], made[0]) for made in own.values()) for at, own in runs.items()
        },
    }
    rows = np.flatnonzero(space.clusters != "")
    clusters = np.unique(space.clusters[rows], return_inverse=True)[1]
    k = int(clusters.max(initial=-1)) + 1
    if len(rows) < max(FEW, 2 * k) or k < 2 or np.bincount(clusters).max() < 2:
        reason = f"{len(rows)} concepts in {k} clusters are too few: {FEW} concepts, two clusters and two in each are needed."
        return [CLAIMS[id].untestable(reason) for id in ("clusters", "clusters_best_k", "cohesion")], curves
    pairs = {
        at: [stats.adjusted_rand_with_null(own[j][0][rows], clusters, **space.options()) for j in ks] for at, own in runs.items()
    }
    for at, made in pairs.items():
        curves.setdefault("rand", {})[place(at)] = [_round(getattr(e, end) for e, _ in made) for end in ("value", "low", "high")]
    curves["null"] = [_round(getattr(null, end) for _, null in pairs[layer]) for end in ("value", "low", "high")]
    curves["families"] = round(silhouette(similarity[layer][np.ix_(rows, rows)], clusters), 4)
    (estimate, null), words = pairs[layer][ks.index(k)], f"{len(rows)} words, layer {layer}"
    others = [stats.adjusted_rand_with_null(labels[rows], clusters, draws=1)[0].value for labels in default[k]]
    note = (
        f"Adjusted Rand index of k-means (k = {k}, the number of families) with the published clusters, {words}; five seeds give "
    )
    note += f"{min(others):.2f} to {max(others):.2f}"
    note += f"; clusters of the token embeddings reach {pairs[-1][ks.index(k)][0].value:.2f}." if -1 in pairs else "."
    found = [CLAIMS["clusters"].tested(estimate, null, estimate.value >= ARI, note)]

    each_k = np.stack([default[j][0][rows] for j in ks])
    how = {"side": "greater", "kind": f"clusters exchanged between words, best of {len(ks)}", **space.options()}
    best, null = stats.selection_adjusted_null(
        lambda own: rand_indices(each_k, own), rand_indices(each_k, clusters), permute=_exchange(clusters), **how
    )
    estimate, note = pairs[layer][best][0], f"k = {ks[best]}, the best of {', '.join(map(str, ks))}; {words}; "
    note += "the value is optimistic, p is corrected."
    found.append(CLAIMS["clusters_best_k"].tested(estimate, null, estimate.value >= ARI, note))

    each = {at: cohesion_with_null(similarity[at][np.ix_(rows, rows)], clusters, **space.options()) for at in runs}
    curves["cohesion"] = {place(at): _round((e.value, e.low, e.high)) for at, (e, _) in each.items()}
    estimate, null = each[layer]
    note = f"Mean cosine within clusters minus between them, {words}."
    return [*found, CLAIMS["cohesion"].tested(estimate, null, estimate.low > 0, note)], curves


def _likeness(space: _Space, by_layer: Mapping[int, np.ndarray]) -> tuple[list[Finding], dict[str, Any]]:
    """Representational similarity of layers (Fig 9), in both measures, and of the default layer with the embedding."""
    every = sorted(by_layer)
    layers = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, min(MATRICES, len(every))).round().astype(int))]
    cosines = np.stack([by_layer[layer] @ by_layer[layer].T for layer in layers])
    late = [i for i, layer in enumerate(layers) if layer >= space.bench.vectors.layers[-1] / 3]
    correlations, whole = likeness(cosines)
    data = {"matrix": layers, "likeness": [_round(row) for row in correlations], "whole": [_round(row) for row in whole]}
    if len(late) < 2:
        reason = "Needs vectors at two layers or more beyond a third of the depth."
        found = [CLAIMS[id].untestable(reason) for id in ("layers", "layers_cosine")]
    else:
        (r, r_null), (cosine, cosine_null) = likeness_with_null(cosines[late], **space.options(REFITS))
        where = f"between the matrices of cosines of layers {', '.join(str(layers[i]) for i in late)}; interval over words"
        note = f"Mean correlation {where}. Neighbouring layers share most of their stream, so this says little about one layer."
        found = [CLAIMS["layers"].tested(r, r_null, r.low >= SIMILARITY, note)]
        note = f"Mean cosine {where}; with diagonals, which always agree."
        found.append(CLAIMS["layers_cosine"].tested(cosine, cosine_null, cosine.low >= COSINE, note))
    if -1 not in by_layer:
        return [*found, CLAIMS["embedding"].untestable(_NO_EMBEDDING)], data
    default = space.bench.vectors.layer
    pair = np.stack([by_layer[layer] @ by_layer[layer].T for layer in (default, -1)])
    (r, r_null), (cosine, _) = likeness_with_null(pair, **space.options(REFITS))
    data["beside embedding"] = [_round((e.value, e.low, e.high)) for e in (r, cosine)]
    note = (
        f"Correlation between the matrices of cosines of layer {default} and of the mean token embeddings (cosine of the whole "
    )
    note += f"matrices {cosine.value:.2f}); interval over words. The authors expect much of the geometry there."
    return [*found, CLAIMS["embedding"].tested(r, r_null, r.low >= SIMILARITY, note)], data


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


def _data(
    space: _Space, by_layer: Mapping[int, np.ndarray], pca: Mapping[int, Any], runs: Mapping[int, Mapping[int, np.ndarray]]
) -> dict[str, Any]:
    """Everything that the figures need, oriented by the ratings where there are any; concepts in the order of the tree."""
    vectors = space.bench.vectors
    plane, cosines = space.oriented(pca[vectors.layer][0][:, :2]), vectors.similarity()
    order, joints = tree(cosines)
    if plane[order[: len(order) // 2], 0].mean() < plane[order[len(order) // 2 :], 0].mean():  # pleasant ones first
        order, joints = order[::-1], np.stack([len(order) - 1 - joints[..., 0], joints[..., 1]], axis=-1)
    ks = runs[vectors.layer]
    own = ks[_headline(space, list(ks))][0]
    ranked = sorted(set(own.tolist()), key=lambda c: -plane[own == c, 0].mean())
    try:
        neighbours: list[list[float]] | None = [
            _round(row) for row in umap_plane(by_layer[vectors.layer], seed=space.bench.seed)[order]
        ]
    except MissingExtra:
        neighbours = None
    return {
        "layer": vectors.layer,
        "names": [vectors.names[i] for i in order],
        "clusters": [str(space.clusters[i]) or NO_FAMILY for i in order],
        "own": [1 + ranked.index(own[i]) for i in order],
        "x": _round(plane[order, 0]),
        "y": _round(plane[order, 1]),
        "umap": neighbours,
        "cosines": [_round(row) for row in cosines[np.ix_(order, order)]],
        "tree": [[_round(point) for point in joint] for joint in joints],
        "rated": [[vectors.names[i], *_round(space.ratings[j]), *_round(plane[i])] for j, i in enumerate(space.rated)],
        "layers": list(pca),
        "shares": {f"PC{i + 1}": _round(100 * share[i] for _, share in pca.values()) for i in range(3)},
    }


def _raw(space: _Space, pca: Mapping[int, Any], runs: Mapping[int, Mapping[int, np.ndarray]]) -> dict[str, dict[str, Any]]:
    names, n = space.bench.vectors.names, len(space.bench.vectors)
    coordinates = np.concatenate([space.oriented(each) for each, _ in pca.values()])
    default = runs[space.bench.vectors.layer]
    return {
        "components": {
            "layer": np.repeat(list(pca), n),
            "concept": names * len(pca),
            **{f"PC{i + 1}": coordinates[:, i] for i in range(COMPONENTS)},
        },
        "cosines": {"concept": names, **dict(zip(names, space.bench.vectors.similarity(), strict=True))},
        "clusters": {"concept": names, "published": space.clusters, **{f"k = {k}": made[0] for k, made in default.items()}},
    }


def _components(space: _Space, pca: Mapping[int, Any]) -> Table:
    vectors = space.bench.vectors
    raw = vectors.at().astype(np.float64) * vectors.norms[vectors.row()][:, None]
    (unit, share), (long, long_share) = pca[vectors.layer], principal_components(raw, COMPONENTS)
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


STUDY = Geometry()
