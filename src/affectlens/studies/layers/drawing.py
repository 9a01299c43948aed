"""Figures of the layers, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

ENDING = ("ending begins", "ending middle", "ending ends")
PLACES = {
    "words": ("word", *ENDING, "reply"),
    "numbers": ("word", *ENDING, "reply"),
    "negation": ("word", "what follows", "reply"),
    "binding": ("emotion words", "in between", "reference", "reply"),
}
"""Where each kind of contrast is read, in the order of the text."""
TITLES = {"words": "an early word", "numbers": "an early number", "negation": "negation", "binding": "reference back"}


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The maps of places and layers, and the curves over layers."""
    from affectlens.figures import to_figure

    maps = (
        "Mean difference in the declared direction, by place in the text (from left to right) and layer (from the bottom up), in "
        "standard deviations of the probe over all tokens of these messages at that layer. Red is as declared; the line is the "
        "vectors' layer. In between the feelings and the reference only chance can differ. Words may exceed the scale."
    )
    curves = (
        "The same with bootstrap intervals. Above: at the word itself. Below, on axes of their own: at what follows (the end of "
        "the ending, the rest of the message, the reference to a person) and at the reply position. Grey: the vectors' layer."
    )
    return [
        to_figure("maps", "Where in the text, and at which layer", maps, _maps(data)),
        to_figure("curves", "From the word to what follows", curves, _curves(data)),
    ]


def _titles(data: Mapping[str, Any]) -> list[str]:
    return [f"{TITLES[kind]} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{data['kinds'][kind]['n']})" for kind in data["kinds"]]


def _maps(data: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import DIVERGING, GREY, panels

    kinds = data["kinds"]
    widths = [len(PLACES[kind]) for kind in kinds]
    room: dict[str, Any] = {"shared_yaxes": True, "column_widths": widths, "horizontal_spacing": 0.02}
    grid = panels(_titles(data), columns=len(kinds), height=490, **room)
    tables = {kind: np.array([kinds[kind]["curves"][place][0] for place in PLACES[kind]]).T for kind in kinds}
    # The word itself would leave no colour for what follows it.
    limit = max(round(float(np.quantile(np.concatenate([np.abs(t[:, 1:]).ravel() for t in tables.values()]), 0.98)), 2), 0.01)
    for number, (kind, table) in enumerate(tables.items(), 1):
        places = ["ending" if place == ENDING[0] else place.removeprefix("ending ") for place in PLACES[kind]]
        hover = "%{x}, layer %{y}<br>%{z:+.2f} z<extra></extra>"
        grid.add_heatmap(z=table, x=places, y=data["layers"], coloraxis="coloraxis", hovertemplate=hover, row=1, col=number)
        grid.add_hline(y=data["layer"], line={"color": GREY, "width": 1}, row=1, col=number)
    bar = {"title": {"text": "z", "side": "top"}, "thickness": 9, "outlinewidth": 0, "len": 1, "x": 1.01}
    grid.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})
    grid.update_xaxes(showline=False, ticks="", type="category", tickangle=-45)
    return grid.update_yaxes(showgrid=False, zeroline=False).update_yaxes(title_text="layer", col=1)


def _curves(data: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import GREY, PALETTE, panels

    kinds, layers = data["kinds"], data["layers"]
    room: dict[str, Any] = {"horizontal_spacing": 0.05, "vertical_spacing": 0.09, "shared_xaxes": True}
    grid = panels(_titles(data), rows=2, columns=len(kinds), height=520, **room)
    for number, (kind, own) in enumerate(kinds.items(), 1):
        places = PLACES[kind]
        lines = (
            (1, "the word", places[0], "solid"),
            (2, "what follows", places[-2], "dash"),
            (2, "the reply position", "reply", "dot"),
        )
        for (row, label, place, dash), colour in zip(lines, PALETTE, strict=False):
            value, low, high = own["curves"][place]
            where = {"row": row, "col": number}
            grid.add_scatter(
                x=[*layers, *reversed(layers)],
                y=[*high, *reversed(low)],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=colour,
                opacity=0.18,
                hoverinfo="skip",
                legendgroup=label,
                showlegend=False,
                **where,
            )
            grid.add_scatter(
                x=layers,
                y=value,
                mode="lines",
                line={"color": colour, "width": 2, "dash": dash},
                name=label,
                legendgroup=label,
                showlegend=number == 1,
                hovertemplate=f"<b>{place}</b><br>layer %{{x}}: %{{y:+.2f}} z<extra></extra>",
                **where,
            )
        for row in (1, 2):
            grid.add_vline(x=data["layer"], line={"color": GREY, "width": 1}, row=row, col=number)
    return grid.update_xaxes(title_text="layer", row=2).update_yaxes(title_text="difference (z)", col=1)
