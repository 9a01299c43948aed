"""Figures of the quantity ladders, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The ladders, the control ladders, the trends beside those of random directions, and trends over layers."""
    from affectlens.figures import layer_curves, to_figure

    layer = data["layer"]
    real = [ladder for ladder in data["ladders"] if not ladder["control"]]
    controls = [ladder for ladder in data["ladders"] if ladder["control"]]
    caption = (
        "Red should rise and blue should fall from the left to the right. Thin: one emotion (hover for it); thick: their mean. "
        "Readings minus their mean over the ladder, in standard deviations of the probe over all messages; values evenly spaced."
    )
    drawn = [to_figure("ladders", f"Readings on quantity ladders at layer {layer}", caption, _panels(real))]
    if controls:
        text = "The same probes where the number does not matter: no trend is expected. Axes as in the ladders above."
        drawn.append(to_figure("controls", "Control ladders", text, _panels(controls, like=real)))
    caption = (
        "Spearman's rho of each declared pair, signed: to the right is as declared. Grey bars hold 95 % of random directions on "
        "the same ladder: with so few steps, trends by chance are large. Control ladders at the bottom."
    )
    drawn.append(to_figure("pairs", f"Trends beside those of random directions at layer {layer}", caption, _dots(real, controls)))
    curves = layer_curves(data["layers"], data["curves"], y="mean signed Spearman rho", chance=0.0, mark=layer)
    return [*drawn, to_figure("layers", "Trends over layers", "Bootstrap intervals over ladders. Exploratory.", curves)]


def _panels(ladders: Sequence[Mapping[str, Any]], like: Sequence[Mapping[str, Any]] = ()) -> go.Figure:
    """One panel a ladder, four in a row, all with the vertical axis that these ladders and those ``like`` them need."""
    from affectlens.figures import BLUE, GREY, RED, panels

    across = min(4, len(ladders))
    down = -(-len(ladders) // across)
    titles = [ladder["id"].replace("-", " ") for ladder in ladders]
    room: dict[str, Any] = {"horizontal_spacing": 0.03, "vertical_spacing": 0.36 / down if down > 1 else 0.0}
    grid = panels(titles, rows=down, columns=across, height=110 + 190 * down, shared_yaxes=True, **room)
    reach = 1.08 * max(abs(v) for ladder in (*ladders, *like) for probe in ladder["probes"] for v in probe["z"])
    for number, ladder in enumerate(ladders):
        where = {"row": number // across + 1, "col": number % across + 1}
        values = [str(value) for value in ladder["values"]]
        for rises, colour, dash, symbol in ((True, RED, "solid", "circle"), (False, BLUE, "dash", "diamond")):
            probes = [probe for probe in ladder["probes"] if probe["rises"] is rises]
            thin = [(probe["name"], probe["z"], "lines", 1.0, 0.45) for probe in probes]
            whole = (", ".join(probe["name"] for probe in probes), np.mean([probe["z"] for probe in probes] or [[]], axis=0))
            for name, line, mode, width, opacity in [*thin, (*whole, "lines+markers", 2.4, 1.0)] if probes else []:
                grid.add_scatter(
                    x=list(range(len(values))),
                    y=np.round(line, 4),
                    mode=mode,
                    marker={"size": 5, "symbol": symbol},
                    line={"color": colour, "width": width, "dash": dash},
                    opacity=opacity,
                    name=f"should {'rise' if rises else 'fall'}",
                    legendgroup=str(rises),
                    showlegend=number == 0 and width > 2,
                    text=values,
                    hovertemplate=f"<b>{name}</b><br>%{{text}}: %{{y:+.2f}} z<extra></extra>",
                    **where,
                )
        ends = [0, len(values) // 2, len(values) - 1]
        grid.update_xaxes(tickvals=ends, ticktext=[values[i] for i in ends], tickangle=0, **where)
    grid.update_yaxes(range=[-reach, reach], zerolinecolor=GREY, zerolinewidth=1)
    return grid.update_yaxes(title_text="change (z)", col=1)


def _dots(real: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, RED, blank

    def mean(ladder: Mapping[str, Any]) -> float:
        return float(np.mean([probe["rho"] for probe in ladder["probes"]]))

    rows = [*sorted(controls, key=mean), *sorted(real, key=mean)]
    labels = [ladder["id"].replace("-", " ") for ladder in rows]
    figure = blank(x="Spearman rho, signed as declared", height=110 + 25 * len(rows))
    figure.add_bar(
        base=[-ladder["band"] for ladder in rows],
        x=[2 * ladder["band"] for ladder in rows],
        y=list(range(len(rows))),
        orientation="h",
        width=0.7,
        marker={"color": GREY, "opacity": 0.25, "line": {"width": 0}},
        name="95 % of random directions",
        hovertemplate="random directions: ±%{customdata:.2f}<extra></extra>",
        customdata=[ladder["band"] for ladder in rows],
    )
    for rises, colour, symbol in ((True, RED, "circle"), (False, BLUE, "diamond")):
        dots = [(probe, y) for y, ladder in enumerate(rows) for probe in ladder["probes"] if probe["rises"] is rises]
        figure.add_scatter(
            x=[probe["rho"] for probe, _ in dots],
            y=[y for _, y in dots],
            mode="markers",
            marker={"size": 8, "color": colour, "symbol": symbol, "opacity": 0.85},
            name=f"should {'rise' if rises else 'fall'}",
            text=[probe["name"] for probe, _ in dots],
            hovertemplate="<b>%{text}</b><br>%{x:+.2f}<extra></extra>",
        )
    if controls:
        figure.add_hline(y=len(controls) - 0.5, line={"color": GREY, "width": 1, "dash": "dot"})
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=labels, showgrid=False, zeroline=False, range=[-0.6, len(rows) - 0.4]
    )
    figure.update_xaxes(range=[-1.06, 1.06], zeroline=True, zerolinecolor=GREY)
    return figure
