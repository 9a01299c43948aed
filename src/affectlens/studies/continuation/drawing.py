"""Figures of the continuations, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The matrix, the means by kind of opening, dose curves, words of related emotions, tone of replies."""
    from affectlens.figures import heat_map, to_figure

    at = f"layer {data['layer']}, strength {data['strength']:.3g}"
    matrix = heat_map(data["matrix"], data["names"], columns=data["names"], unit="nats", height=460)
    text = f"Row: the emotion steered towards; column: the word. Change of log-probability behind held-out openings; {at}."
    drawn = [to_figure("matrix", "Words under steering", text, matrix)]
    text = f"Bars hold 95 % (bootstrap over emotions; grey: central 95 % of random directions and words); {at}."
    drawn.append(to_figure("means", "Own word and other words, by kind of opening", text, _means(data["means"])))
    text = "Shaded: up to the strength of the tests, which is inside the safe range. The last strength is the published one, 0.5."
    drawn.append(to_figure("dose", f"Dose curves at layer {data['layer']}", text, _dose(data)))
    text = "A point is a pair of emotions: how alike their vectors are, and what the one does to the word of the other."
    drawn.append(to_figure("related", "Words of related emotions", text, _related(data["related"])))
    if data["told"]:
        tone = heat_map(data["told"], data["names"], columns=data["names"], unit="centred cosine", height=460)
        text = f"Row: the emotion steered towards; column: what its replies read, without steering, minus plain replies; {at}."
        drawn.append(to_figure("told", "Tone of replies to open questions", text, tone))
    return drawn


def _means(means: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, RED, blank

    figure = blank(y="change of log-probability (nats)", height=360)
    kinds = list(means)
    for name, colour in (("own word", RED), ("other words", BLUE), ("random directions", GREY)):
        each = [means[kind][name] for kind in kinds]
        figure.add_bar(
            x=kinds,
            y=[value for value, _, _ in each],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - value for value, _, high in each],
                "arrayminus": [value - low for value, low, _ in each],
                "thickness": 1.2,
            },
            marker={"color": colour},
            name=name,
        )
    return figure.update_layout(barmode="group")


def _dose(data: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, PALETTE, RED, panels

    titles = [title for title in data["dose"] if title != "strengths"]
    grid = panels([f"{title} steered" for title in titles], columns=len(titles), height=380, shared_yaxes=True)
    colours = {"own word": RED, "other words": BLUE, "random directions": GREY, "shuffled stories": PALETTE[4]}
    x = [0.0, *data["dose"]["strengths"]]
    for column, title in enumerate(titles, 1):
        for name, values in data["dose"][title].items():
            line = {"color": colours[name], "width": 2}
            shown = {"legendgroup": name, "showlegend": column == 1}
            grid.add_scatter(x=x, y=[0.0, *values], name=name, mode="lines+markers", line=line, **shown, row=1, col=column)
    grid.add_vrect(x0=0, x1=data["strength"], fillcolor=GREY, opacity=0.12, line_width=0)
    grid.update_xaxes(title_text="strength")
    return grid.update_yaxes(title_text="change (nats)", col=1)


def _related(pairs: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import PALETTE, blank

    figure = blank(x="cosine between the two vectors", y="change, minus the word's mean (nats)", height=380)
    marker = {"size": 6, "color": PALETTE[0], "opacity": 0.6}
    figure.add_scatter(x=pairs["cosine"], y=pairs["change"], mode="markers", marker=marker, showlegend=False)
    return figure
