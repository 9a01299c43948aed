"""Tables and figures of the geometry, from its plain data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens.studies import Figure, Table

NO_FAMILY = "no family"
"""Stands for the published family of a concept that has none."""


def place(layer: int) -> str:
    """What a layer is called in tables and legends."""
    return f"layer {layer}" if layer >= 0 else "token embeddings"


def members(data: Mapping[str, Any]) -> Table:
    """Clusters of the headline k beside the published family that each of them shares most members with."""
    own, cosines, rows = np.array(data["own"]), np.array(data["cosines"]), []
    published = dict(zip(data["names"], data["clusters"], strict=True))
    for number in range(1, own.max() + 1):
        inside = np.flatnonzero(own == number)
        central = inside[np.argsort(-cosines[np.ix_(inside, inside)].sum(axis=0), kind="stable")]
        names = [data["names"][i] for i in central]
        families = [published[name] for name in names if published[name] != NO_FAMILY]
        closest = max(sorted(set(families)), key=families.count, default="")
        theirs = [name for name in sorted(published) if closest and published[name] == closest]
        shared = f"{families.count(closest)} of {len(theirs)}" if closest else ""
        missing = ", ".join(name for name in theirs if name not in names)
        rows.append((number, len(names), ", ".join(names), closest, shared, missing))
    head = ("cluster", "n", "members, most central first", "closest published family", "shared", "its other members")
    caption = "From pleasant to unpleasant along PC1. Two clusters may have the same closest family."
    return Table("clusters", f"k-means with k = {own.max()} at layer {data['layer']}", caption, head, tuple(rows))


def baseline(data: Mapping[str, Any]) -> Table:
    """What the mean token embeddings have of the geometry, beside the layer."""
    agreement, both = data["agreement"], [data["layers"].index(layer) for layer in (data["layer"], -1)]
    where, rows = [place(data["layer"]), place(-1)], []
    for label, ends in data["curves"].items():
        rows.append((f"|r| of {label}", *(end[i] for i in both for end in ends)))
    if "rand" in agreement:
        i, k = agreement["k"].index(agreement["headline"]), agreement["headline"]
        rows.append((f"adjusted Rand index, k = {k}", *(end[i] for at in where for end in agreement["rand"][at])))
        rows.append(("cosine within families minus between", *(end for at in where for end in agreement["cohesion"][at])))
    for component in ("PC1", "PC2"):
        rows.append((f"% of {component}", *(end for i in both for end in (data["shares"][component][i], None, None))))
    for measure, ends in zip(("correlation", "cosine"), data["beside embedding"], strict=True):
        rows.append((f"likeness to the layer, {measure}", 1.0, None, None, *ends))
    head = ("measure", where[0], "low", "high", where[1], "low (embeddings)", "high (embeddings)")
    caption = "Means of token embeddings over the same stories; 95 % intervals over words, of the Rand index by jackknife."
    return Table("baseline", "What the token embeddings have already", caption, head, tuple(rows))


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Every figure, in the order of the report."""
    return [*_planes(data), *_clusters(data), *_ratings(data), *_layers(data)]


def _planes(data: Mapping[str, Any]) -> list[Figure]:
    """The first two components, and UMAP where it was made."""
    from affectlens.figures import circumplex, to_figure

    layer, k = data["layer"], max(data["own"])

    def plane(x: Sequence[float], y: Sequence[float], own: Sequence[str], titles: tuple[str, str], order: Sequence[int]) -> Any:
        names, groups = [data["names"][i] for i in order], [own[i] for i in order]
        return circumplex(
            names, [x[i] for i in order], [y[i] for i in order], groups if len(set(own)) > 1 else None, titles=titles
        )

    families = _families(data)
    order = sorted(range(len(data["names"])), key=lambda i: families.index(data["clusters"][i]))
    caption = "Each point is a concept" + (", coloured by its published family." if len(families) > 1 else ".")
    if not data["umap"]:
        caption += " With pip install 'affectlens[umap]', a UMAP of the clusters would stand beside it."
    titles = ("PC1, towards pleasant", "PC2, towards aroused") if data["curves"] else ("PC1", "PC2")
    figure = plane(data["x"], data["y"], data["clusters"], titles, order)
    made = [to_figure("circumplex", f"The first two components at layer {layer}", caption, figure)]
    if data["umap"]:
        x, y = zip(*data["umap"], strict=True)
        order = sorted(order, key=lambda i: data["own"][i])
        figure = plane(x, y, [f"cluster {number}" for number in data["own"]], ("UMAP 1", "UMAP 2"), order)
        caption = (
            f"Neighbours stay together; axes and large distances mean nothing. Colours: k-means with k = {k}, see the table."
        )
        made.append(to_figure("umap", f"UMAP of the vectors at layer {layer}", caption, figure))
    return made


def _families(data: Mapping[str, Any]) -> list[str]:
    """Published families from pleasant to unpleasant along the first component."""
    own = np.array(data["clusters"])
    return sorted(set(data["clusters"]), key=lambda family: -float(np.array(data["x"])[own == family].mean()))


def _clusters(data: Mapping[str, Any]) -> list[Figure]:
    """The tree over the cosines; agreement with the published families and silhouettes against k."""
    from affectlens.figures import layer_curves, to_figure, tree_map

    agreement, families = data["agreement"], _families(data)
    ks, k = agreement["k"], agreement["headline"]
    groups = data["clusters"] if len(families) > 1 else None
    caption = "Ordered by average linkage on cosine distance; above, the tree" + (
        " and the published families." if groups else "."
    )
    cosines = tree_map(data["cosines"], data["names"], data["tree"], groups, legend=families)
    made = [to_figure("similarity", f"Cosines between vectors at layer {data['layer']}", caption, cosines)]
    if "rand" in agreement:
        caption = "Adjusted Rand index of k-means with the published families; 95 % intervals over words (jackknife)."
        curves = agreement["rand"] | {"families exchanged": agreement["null"]}
        figure = layer_curves(ks, curves, y="adjusted Rand index", x="k", mark=k)
        made.append(to_figure("families", "Clusters and published families", caption, figure))
    caption = "Mean silhouette by cosine distance, to look at, without a null: 1 is a perfect cluster, 0 is none."
    if "families" in agreement:
        caption += f" The published families themselves have {agreement['families']:.2f}.".replace("-", "\u2212")
    silhouettes = {at: (values, None, None) for at, values in agreement["silhouette"].items()}
    figure = layer_curves(ks, silhouettes, y="silhouette", x="k", mark=k)
    return [*made, to_figure("silhouette", "How distinct the clusters are", caption, figure)]


def _ratings(data: Mapping[str, Any]) -> list[Figure]:
    """Components against human ratings, at the layer and over layers."""
    from affectlens.figures import PALETTE, blank, layer_curves, to_figure

    if not data["curves"]:
        return []
    made, rated, layer = [], data["rated"], data["layer"]
    text, hover = [row[0] for row in rated], "%{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>"
    for j, (what, component) in enumerate((("pleasure", "PC1"), ("arousal", "PC2"))):
        dots, marker = blank(x=f"human {what} rating", y=component), {"color": PALETTE[j], "size": 8}
        x, y = [row[1 + j] for row in rated], [row[3 + j] for row in rated]
        dots.add_scatter(x=x, y=y, text=text, mode="markers", marker=marker, hovertemplate=hover)
        made.append(to_figure(what, f"{component} and human {what}", f"{len(rated)} rated words, layer {layer}.", dots))
    along = layer_curves(data["layers"], data["curves"], y="|r| with human ratings", mark=layer)
    caption = f"95 % intervals over words.{_embedding(data['layers'])}"
    return [*made, to_figure("along", "Components and ratings over layers", caption, along)]


def _layers(data: Mapping[str, Any]) -> list[Figure]:
    """Shares of variance over layers, and how alike layers are, in both measures."""
    from affectlens.figures import heat_map, layer_curves, to_figure

    curves = {component: (share, None, None) for component, share in data["shares"].items()}
    shares = layer_curves(data["layers"], curves, y="% of the variance over concepts", mark=data["layer"])
    made = [to_figure("shares", "Variance of the first components over layers", "Without intervals.", shares)]
    # One scale for both, as narrow as the paper's where that shows everything.
    low = np.floor(10 * min(np.min(data["likeness"]), np.min(data["whole"]), 0.8)) / 10
    for id, key, unit, what in (
        ("layers", "likeness", "correlation", "over pairs of different words"),
        ("layers-cosine", "whole", "cosine", "of the whole matrices, as in the paper"),
    ):
        caption = f"The {unit} of two layers' matrices of cosines, {what}.{_embedding(data['matrix'])}"
        figure = heat_map(data[key], [str(layer) for layer in data["matrix"]], limit=(float(low), 1.0), unit=unit)
        figure.update_xaxes(title_text="layer").update_yaxes(title_text="layer")
        made.append(to_figure(id, f"Likeness of layers, {unit}", caption, figure))
    return made


def _embedding(layers: Sequence[int]) -> str:
    return " Layer -1 is the mean token embedding." if -1 in layers else ""
