"""Figures of the calibration, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Effect over layers at equal cost, what it costs, dose curves, safe ranges."""
    from affectlens.figures import layer_curves, to_figure

    layers, chosen = data["layers"], data["layer"]
    times = f"{data['bounds']['perplexity']:g} times"

    def curves(**named: str) -> dict[str, Any]:
        return {text: (data[key], None, None) for key, text in named.items()}

    effect = layer_curves(
        layers,
        curves(chose="half that chose the layer", stated="other half", own="own word", others="other words", random="random"),
        y="change in log-probability (nats)",
        mark=chosen,
        chance=0.0,
    )
    text = (
        f"Each layer at the strength at which neutral text reaches {times} its perplexity. The halves: own word minus other "
        "words. Random: every word under random directions of equal length."
    )
    drawn = [to_figure("layers", "Effect of steering over layers, at equal cost", text, effect)]
    cost = layer_curves(
        layers,
        curves(strength="strength that costs as much", repetition="repetition in replies", distinct="distinct pairs of words"),
        y="strength; change of a share",
        mark=chosen,
    )
    text = "Strength as a multiple of the mean residual norm. Replies at this strength minus replies without steering."
    drawn.append(to_figure("cost", "What equal cost means at each layer", text, cost))
    text = (
        "Mean over emotions, openings that did not choose the layer. Shaded: strengths up to the median of the safe ranges. "
        f"Perplexity of neutral text as a factor, its bound {times}."
    )
    drawn.append(to_figure("dose", f"Dose curves at layer {chosen}", text, _dose(data)))
    text = "Every strength between the ends keeps the bounds; tried step by step. Grey line: no steering."
    return [*drawn, to_figure("safe", f"Safe ranges at layer {chosen}", text, _ranges(data))]


def _dose(data: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, PALETTE, RED, panels

    grid = panels(["words", "neutral text"], columns=2, height=380)
    half = len(data["signed"]) // 2

    def whole(values: Any, at_zero: float) -> list[float]:
        return [*values[:half], at_zero, *values[half:]]

    x = whole(data["signed"], 0.0)
    colours = {"own word": RED, "other words": BLUE, "random directions": GREY, "shuffled stories": PALETTE[4]}
    for name, values in data["dose"].items():
        grid.add_scatter(x=x, y=whole(values, 0.0), name=name, mode="lines+markers", line={"color": colours[name]}, row=1, col=1)
    each = np.array(list(data["perplexity"].values()))
    for name, values in data["perplexity"].items():
        thin = {"color": GREY, "width": 1}
        grid.add_scatter(
            x=x, y=whole(values, 1.0), name=name, mode="lines", line=thin, opacity=0.5, showlegend=False, row=1, col=2
        )
    middle = np.round(np.median(each, axis=0), 4).tolist()
    grid.add_scatter(x=x, y=whole(middle, 1.0), name="median", mode="lines", line={"color": RED, "width": 2.4}, row=1, col=2)
    grid.add_hline(y=data["bounds"]["perplexity"], line={"color": GREY, "dash": "dash", "width": 1}, row=1, col=2)
    grid.add_vrect(x0=0, x1=data["common"], fillcolor=GREY, opacity=0.12, line_width=0)
    grid.update_xaxes(title_text="strength")
    grid.update_yaxes(title_text="change (nats)", row=1, col=1)
    return grid.update_yaxes(title_text="factor of the perplexity", row=1, col=2)


def _ranges(data: Mapping[str, Any], shown: int = 40) -> go.Figure:
    from affectlens.figures import GREY, PALETTE, blank

    ordered = sorted(data["safe"].items(), key=lambda item: item[1][1])
    ordered = [ordered[i] for i in np.unique(np.linspace(0, len(ordered) - 1, min(shown, len(ordered))).round().astype(int))]
    figure = blank(x="strength", height=110 + 22 * len(ordered))
    figure.add_bar(
        base=[low for _, (low, _) in ordered],
        x=[high - low for _, (low, high) in ordered],
        y=[name for name, _ in ordered],
        orientation="h",
        marker={"color": PALETTE[0]},
        showlegend=False,
        customdata=[list(ends) for _, ends in ordered],
        hovertemplate="<b>%{y}</b><br>%{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    return figure
