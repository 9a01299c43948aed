"""Figures of the profile and of what training changed, from plain data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

ENDS = 12
"""So many emotions are shown at either end."""
LABELLED = 36
"""So many of the farthest points are named."""


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The profile of one checkpoint, and when there are two what changed between them."""
    one = [_contrast(data), _categories(data)]
    return [*_changes(data), *one] if "shift" in data else one


def _contrast(data: Mapping[str, Any]) -> Figure:
    from affectlens.figures import GREY, PALETTE, blank, to_figure

    value, low, high = (np.array(part) for part in data["contrast"])
    rows = _ends(value)
    names = [data["names"][i] for i in rows]
    figure = blank(x="plain cosine", height=110 + 21 * len(rows))
    for key, colour, symbol in (("neutral", GREY, "circle-open"), ("hard", PALETTE[1], "circle")):
        figure.add_scatter(
            x=np.array(data[key])[rows],
            y=names,
            mode="markers",
            name=f"{key} prompts",
            marker={"color": colour, "symbol": symbol, "size": 9},
            customdata=np.column_stack([value, low, high])[rows].round(4),
            hovertemplate=f"<b>%{{y}}</b><br>{key} %{{x:.4f}}<br>hard minus neutral %{{customdata[0]:.4f}} "
            "[%{customdata[1]:.4f}, %{customdata[2]:.4f}]<extra></extra>",
        )
    _names_at_the_left(figure)
    caption = (
        f"Mean plain cosine at the reply position, layer {data['layer']}, of the emotions that differ most between hard and "
        "neutral prompts: those that read higher on hard ones above, lower below. Hovering shows the interval of the difference. "
        "Where a point lies is mostly an offset that every prompt shares."
    )
    return to_figure("contrast", "Profile on hard and on neutral prompts", caption, figure)


def _categories(data: Mapping[str, Any]) -> Figure:
    from affectlens.figures import heat_map, to_figure

    names = [name.partition(": ")[2] for name in data["categories"]]
    kinds = [name.partition(": ")[0] for name in data["categories"]]
    matrix = heat_map(
        data["matrix"],
        names,
        kinds,
        columns=data["columns"],
        unit="cosine",
        height=150 + 34 * len(names),
    )
    caption = (
        "Mean plain cosine of each category of prompts minus the mean over categories. Hard categories above, neutral below."
    )
    return to_figure("categories", f"Categories of prompts at layer {data['layer']}", caption, matrix)


def _changes(data: Mapping[str, Any]) -> list[Figure]:
    from affectlens.figures import layer_curves, to_figure

    layer = data["layer"]
    shift, rest = np.array(data["shift"][0]), np.array(data["neutral_shift"])
    before, after = np.array(data["before"]["hard"]), np.array(data["hard"])
    curves = {name: (parts[0], *(parts[1:] or (None, None))) for name, parts in data["curves"].items()}
    along = layer_curves(data["layers"], curves, y="mean absolute shift, cosine", mark=layer)
    kept = []
    if data["cosines"] is not None:
        cosines, noise = np.array(data["cosines"]), np.array(data["noise"])
        titles = ("mean cosine with refits on resampled stories", "cosine of the vectors before and after")
        drift = _against(data, noise, cosines, titles, cosines - noise)
        caption = "Below the line, a vector moved further by training than by another sample of stories. Same stories for both."
        kept = [to_figure("vectors", f"How far the vectors moved, layer {layer}", caption, drift)]
    return [
        to_figure("shifts", f"What training shifted, layer {layer}", *_shifts(data)),
        to_figure(
            "profiles",
            f"Profile before and after, hard prompts, layer {layer}",
            "Mean plain cosine along the same directions. Above the line: higher after training.",
            _against(data, before, after, ("before", "after"), after - before),
        ),
        to_figure(
            "alike",
            "Shift on hard and on neutral prompts",
            "Plain cosine after minus before. On the line, training moved an emotion alike on both kinds of prompts.",
            _against(data, shift, rest, ("shift on hard prompts", "shift on neutral prompts"), shift),
        ),
        *_ratings(data),
        to_figure(
            "layers",
            "Size of the shifts over layers",
            "Mean over emotions of the absolute shift on hard prompts, with intervals over prompts; dashed: the same along "
            "directions without meaning.",
            along,
        ),
        *kept,
    ]


def _shifts(data: Mapping[str, Any]) -> tuple[str, go.Figure]:
    """The largest shifts up and down, with intervals, what neutral prompts and the paper's model did, and the control's band."""
    from affectlens.figures import GREY, PALETTE, blank

    value, low, high = (np.array(part) for part in data["shift"])
    rows = _ends(value)
    names = [data["names"][i] for i in rows]
    figure = blank(x="shift of the plain cosine, after minus before", height=130 + 21 * len(rows))
    if data["band"] is not None:
        figure.add_vrect(x0=-data["band"], x1=data["band"], fillcolor=GREY, opacity=0.15, line_width=0, layer="below")
    theirs = [data["published"][i] for i in rows]
    for name, x, marker in (
        ("published, another model", theirs, {"color": GREY, "symbol": "diamond-open", "size": 9}),
        ("neutral prompts", np.array(data["neutral_shift"])[rows], {"color": PALETTE[0], "symbol": "circle-open", "size": 8}),
    ):
        if any(point is not None for point in x):
            hover = f"<b>%{{y}}</b><br>{name} %{{x:.4f}}<extra></extra>"
            figure.add_scatter(x=x, y=names, mode="markers", name=name, marker=marker, hovertemplate=hover)
    figure.add_scatter(
        x=value[rows],
        y=names,
        mode="markers",
        name="hard prompts",
        marker={"color": PALETTE[1], "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (high - value)[rows],
            "arrayminus": (value - low)[rows],
            "width": 0,
        },
        hovertemplate="<b>%{y}</b><br>hard prompts %{x:.4f}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    _names_at_the_left(figure)
    band = " Grey band: where the largest of as many directions without meaning would stay (97.5th percentile)."
    caption = "The emotions that moved most, with intervals over prompts." + (band if data["band"] is not None else "")
    return caption, figure


def _ratings(data: Mapping[str, Any]) -> list[Figure]:
    """Rated words in the plane of pleasure and arousal, coloured by their shift."""
    from affectlens.figures import DIVERGING, circumplex, to_figure

    if len(data["rated"]) < 3:
        return []
    names = [name for name, _, _ in data["rated"]]
    shift = np.array([data["shift"][0][data["names"].index(name)] for name in names])
    order = sorted(range(len(names)), key=lambda i: -abs(shift[i]))
    x, y = ([data["rated"][i][axis] for i in range(len(names))] for axis in (1, 2))
    figure = circumplex(names, x, y, show=[names[i] for i in order], titles=("pleasure, human ratings", "arousal, human ratings"))
    limit = float(np.abs(shift).max()) or 1.0
    figure.data[0].marker.update(color=shift.round(5), coloraxis="coloraxis", size=13)
    figure.data[0].update(customdata=shift, hovertemplate="<b>%{text}</b><br>shift %{customdata:.4f}<extra></extra>")
    bar = {"title": {"text": "shift", "side": "top"}, "thickness": 9, "outlinewidth": 0, "len": 1, "x": 1.01}
    figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})
    caption = "Shift of the plain cosine on hard prompts. The paper's model moved down where arousal is high."
    return [to_figure("ratings", "Shifts by pleasure and arousal", caption, figure)]


def _against(data: Mapping[str, Any], x: np.ndarray, y: np.ndarray, titles: tuple[str, str], farthest: np.ndarray) -> go.Figure:
    """Emotions in a plane with the line of equal values; those for which ``farthest`` is largest are named."""
    from affectlens.figures import GREY, circumplex

    names, clusters = data["names"], np.array(data["clusters"])
    show = [names[i] for i in np.argsort(-np.abs(farthest), kind="stable")[:LABELLED]]
    order = np.argsort(clusters, kind="stable")
    figure = circumplex(
        [names[i] for i in order], x[order], y[order], clusters[order].tolist(), show=show, titles=titles, height=560
    )
    ends = [
        max(figure.layout.xaxis.range[0], figure.layout.yaxis.range[0]),
        min(figure.layout.xaxis.range[1], figure.layout.yaxis.range[1]),
    ]
    if ends[0] < ends[1]:
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1, "dash": "dash"}, hoverinfo="skip", showlegend=False
        )
    return figure


def _ends(values: np.ndarray) -> Sequence[int]:
    """Rows of the largest and the smallest values, from the bottom of a figure to its top."""
    order = np.argsort(values, kind="stable")
    return [int(i) for i in (order if len(order) <= 2 * ENDS else np.concatenate([order[:ENDS], order[-ENDS:]]))]


def _names_at_the_left(figure: go.Figure) -> None:
    figure.update_yaxes(type="category", showgrid=True, zeroline=False, automargin=True).update_layout(
        legend_traceorder="reversed"
    )
