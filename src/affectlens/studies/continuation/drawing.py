"""Figures of the continuations, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The matrix, the means by kind of opening, dose curves, words of related emotions, tone of replies."""
    from affectlens.figures import dose_curves, grouped_bars, heat_map, to_figure

    at = f"layer {data['layer']}, strength {data['strength']:.3g}"
    matrix = heat_map(data["matrix"], data["names"], columns=data["names"], unit="nats", height=460)
    text = f"Row: the emotion steered towards; column: the word. Change of log-probability behind held-out openings; {at}."
    drawn = [to_figure("matrix", "Words under steering", text, matrix)]
    text = f"Bars hold 95 % (bootstrap over emotions; grey: central 95 % of random directions and words); {at}."
    series = {name: [each[name] for each in data["means"].values()] for name in ("own word", "other words", "random directions")}
    bars = grouped_bars(list(data["means"]), series, y="change of log-probability (nats)")
    drawn.append(to_figure("means", "Own word and other words, by kind of opening", text, bars))
    text = "Shaded: up to the strength of the tests, which is inside the safe range. The last strength is the published one, 0.5."
    curves = {f"{title} steered": each for title, each in data["dose"].items() if title != "strengths"}
    doses = {"strengths": data["dose"]["strengths"], "curves": curves}
    drawn.append(
        to_figure("dose", f"Dose curves at layer {data['layer']}", text, dose_curves(doses, data["strength"], y="change (nats)"))
    )
    text = "A point is a pair of emotions: how alike their vectors are, and what the one does to the word of the other."
    drawn.append(to_figure("related", "Words of related emotions", text, _related(data["related"])))
    if data["told"]:
        tone = heat_map(data["told"], data["names"], columns=data["names"], unit="centred cosine", height=460)
        text = f"Row: the emotion steered towards; column: what its replies read, without steering, minus plain replies; {at}."
        drawn.append(to_figure("told", "Tone of replies to open questions", text, tone))
    return drawn


def _related(pairs: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import PALETTE, blank

    figure = blank(x="cosine between the two vectors", y="change, minus the word's mean (nats)", height=380)
    marker = {"size": 6, "color": PALETTE[0], "opacity": 0.6}
    figure.add_scatter(x=pairs["cosine"], y=pairs["change"], mode="markers", marker=marker, showlegend=False)
    return figure
