"""Figures of the preferences, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

LABELLED = 8
"""So many emotions are named in a figure, half of them at either end; hovering names each."""
NARROW = 400
"""Pixels that a figure of one column has for its points."""


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Ratings by category, correlations of all probes, valence, steering, correlations over layers, and strengths."""
    from affectlens.figures import layer_curves, to_figure

    layers = f"layers {data['middle'][0]} to {data['middle'][-1]}"
    probes = data["probes"]
    drawn = [
        to_figure(
            "elo",
            "Ratings of the activities",
            "Elo from all ordered pairs; bars: with other opponents (bootstrap). Grey diamonds: the paper's mean of the "
            "category, whose activities are others. Hover for the activity.",
            _ratings(data["activities"], data["published"]),
        ),
        to_figure(
            "probes",
            f"Correlation of each probe with the preferences, {layers}",
            f"Pearson's r over {len(data['activities'])} activities, {len(probes['names'])} emotions in order; bars: bootstrap "
            "over activities. Grey: 95 % of what exchanged ratings give one probe.",
            _probes(probes),
        ),
    ]
    if any(pleasure is not None for pleasure in probes["pleasure"]):
        text = "Pleasure of the word as people rate it, against its probe's correlation with the preferences."
        drawn.append(to_figure("valence", "Pleasant emotions and preferences", text, _valence(probes)))
    if data.get("steering"):
        text = (
            "Change of the mean Elo of the half of the activities that is steered at its own tokens, against the correlation of "
            "the direction's reading with the ratings before. Published: r = 0.85, blissful +212, hostile -303."
        )
        drawn.append(to_figure("steering", "Steered preferences", text, _steering(data["steering"], data.get("held_out") or [])))
    curves = {name: (values, None, None) for name, values in data["curves"].items()}
    text = f"Exploratory. The findings use the mean reading of {layers}."
    figure = layer_curves(data["layers"], curves, y="r with the preferences", chance=0.0)
    drawn.append(to_figure("layers", "Correlation over layers", text, figure))
    doses = [arm for arm in data.get("steering", []) if arm["kind"] == "emotion"]
    if len({arm["strength"] for arm in doses}) > 1:
        text = "The emotions at either end. Exploratory. At strength 0 nothing changes."
        drawn.append(to_figure("strength", "Change of Elo and strength", text, _doses(doses)))
    return drawn


def _ratings(activities: Sequence[Mapping[str, Any]], published: Mapping[str, Sequence[float]]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, blank

    categories = list(dict.fromkeys(activity["category"] for activity in activities))[::-1]
    figure = blank(x="Elo", height=120 + 52 * len(categories))
    for y, category in enumerate(categories):
        own = sorted((a for a in activities if a["category"] == category), key=lambda a: a["elo"][0])
        offsets = np.linspace(-0.3, 0.3, len(own)) if len(own) > 1 else np.zeros(1)
        value, low, high = (np.array([a["elo"][k] for a in own], dtype=float) for k in range(3))
        figure.add_scatter(
            x=value,
            y=y + offsets,
            error_x={"array": high - value, "arrayminus": value - low, "thickness": 1, "width": 0},
            mode="markers",
            marker={"size": 6, "color": BLUE},
            text=[a["text"] for a in own],
            hovertemplate="%{text}<br>%{x:.0f} Elo<extra></extra>",
            showlegend=False,
        )
    known = [(published[c][0], y) for y, c in enumerate(categories) if c in published]
    if known:
        figure.add_scatter(
            x=[x for x, _ in known],
            y=[y for _, y in known],
            mode="markers",
            marker={"size": 10, "symbol": "diamond-open", "color": GREY, "line": {"width": 2}},
            name="published mean of the category (post-trained)",
            hovertemplate="published mean %{x:.0f}<extra></extra>",
        )
    return figure.update_yaxes(tickvals=list(range(len(categories))), ticktext=categories, zeroline=False)


def _probes(probes: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, RED, blank

    r = np.array(probes["r"], dtype=float)
    order = np.argsort(r)
    low, high = (np.array([probes[end][i] for i in order], dtype=float) for end in ("low", "high"))
    figure = blank(y="r with the preferences", height=420, wide=True)
    figure.add_hrect(*probes["band"], fillcolor=GREY, opacity=0.2, line_width=0)
    figure.add_bar(
        x=list(range(len(r))),
        y=r[order],
        marker={"color": [RED if value > 0 else BLUE for value in r[order]], "line": {"width": 0}},
        error_y={"array": high - r[order], "arrayminus": r[order] - low, "thickness": 0.6, "width": 0},
        text=[probes["names"][i] for i in order],
        textposition="none",
        customdata=[probes["q"][i] for i in order],
        hovertemplate="<b>%{text}</b><br>r = %{y:+.2f}, q = %{customdata:.3f}<extra></extra>",
        showlegend=False,
    )
    ticks = np.unique(np.linspace(0, len(r) - 1, min(len(r), 25)).round().astype(int)).tolist()
    return figure.update_xaxes(tickvals=ticks, ticktext=[probes["names"][order[i]] for i in ticks], tickangle=-50)


def _valence(probes: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, blank, name_points

    rows = [i for i, pleasure in enumerate(probes["pleasure"]) if pleasure is not None]
    r = np.array([probes["r"][i] for i in rows], dtype=float)
    figure = blank(x="pleasure of the word (people)", y="r with the preferences")
    points = np.column_stack([[probes["pleasure"][i] for i in rows], r])
    names = [probes["names"][i] for i in rows]
    figure.add_scatter(
        x=points[:, 0],
        y=r,
        mode="markers",
        marker={"size": 8, "color": BLUE},
        customdata=names,
        hovertemplate="<b>%{customdata}</b><br>%{x:+.2f}, r = %{y:+.2f}<extra></extra>",
        showlegend=False,
    )
    name_points(figure, points, names, show=_ends(r), width=NARROW)
    return figure


def _ends(values: np.ndarray) -> list[int]:
    """The least and the greatest, the furthest first."""
    order = np.argsort(values).tolist()
    return [i for pair in zip(order, order[::-1], strict=True) for i in pair][:LABELLED]


def _steering(arms: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, RED, blank, name_points

    full = max(arm["strength"] for arm in arms)
    figure = blank(x="r of the direction with the preferences", y="change of Elo", height=460)
    emotions = [a for a in arms if a["kind"] == "emotion" and a["strength"] == full]
    random = [a for a in arms if a["kind"] == "random"]
    for name, kept, colour, symbol in (
        ("random directions", random, GREY, "x"),
        ("emotions", emotions, RED, "circle"),
        ("emotions, held-out activities", held_out, BLUE, "diamond-open"),
    ):
        if not kept:
            continue
        figure.add_scatter(
            x=[arm["r"] for arm in kept],
            y=[arm["shift"] for arm in kept],
            mode="markers",
            marker={"size": 8, "color": colour, "symbol": symbol},
            customdata=[arm["name"] for arm in kept],
            name=name,
            hovertemplate="<b>%{customdata}</b><br>r = %{x:+.2f}, %{y:+.0f} Elo<extra></extra>",
        )
    figure.update_layout(showlegend=len(figure.data) > 1)
    every = [*emotions, *random, *held_out]
    points = np.array([[arm["r"], arm["shift"]] for arm in every], dtype=float)
    show = _ends(points[: len(emotions), 1])
    name_points(figure, points, [arm["name"] for arm in every], show=show, width=NARROW)
    return figure


def _doses(arms: Sequence[Mapping[str, Any]]) -> go.Figure:
    from affectlens.figures import BLUE, RED, blank

    names = {arm["name"] for arm in arms if arm["strength"] != max(a["strength"] for a in arms)}
    figure = blank(x="strength (mean residual norms, in total)", y="change of Elo", height=320)
    for name in sorted(names, key=lambda name: -next(a["r"] for a in arms if a["name"] == name)):
        own = sorted((a for a in arms if a["name"] == name), key=lambda a: a["strength"])
        rises = own[0]["r"] > 0
        figure.add_scatter(
            x=[0.0, *(a["strength"] for a in own)],
            y=[0.0, *(a["shift"] for a in own)],
            mode="lines+markers",
            line={"color": RED if rises else BLUE, "dash": "solid" if rises else "dash"},
            marker={"symbol": "circle" if rises else "diamond"},
            name=name,
        )
    return figure
