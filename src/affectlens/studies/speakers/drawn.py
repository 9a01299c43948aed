"""The figures of the study of speakers, from its plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from affectlens.studies import ALPHA, Figure


def draw(data: Mapping[str, Any]) -> list[Figure]:
    from affectlens.figures import heat_map, layer_curves, to_figure

    layer, curves = data["layer"], dict(data["curves"])
    kinds = "A/H: words of the Assistant, emotion of the Human; 1/2: words of Person 1, emotion of Person 2."
    drawn = [
        to_figure(
            "agreement", "How alike vectors of one emotion are",
            "Noise-corrected cosines with 95 % intervals over emotions; grey bands: emotions exchanged; open circles: the plain "
            "cosine, which noise pulls towards 0; diamonds: published.",
            _bars(data["bars"]),
        ),
        to_figure(
            "cosines", f"Kinds of vectors at layer {layer}",
            f"Mean cosine of the same emotion. {kinds} Left: plain, as published; cells of the same dialogues in two formats "
            "share their noise. Right: noise-corrected; empty where a kind is not reliable in itself.",
            _matrices(data),
        ),
        to_figure(
            "layers", "Finding the same emotion among all, over layers",
            "AUROC by cosine between vectors of one kind and of another (0.5: chance); 95 % intervals over emotions.",
            layer_curves(curves.pop("layers"), curves, y="AUROC", chance=0.5, mark=layer),
        ),
        to_figure(
            "structure", "Structure matrices compared",
            f"Correlation between the matrices of cosines of all emotions, not corrected for noise. {kinds}",
            _numbers(heat_map(data["structure"], ["A/A", "H/H", "A/H", "H/A", "story"], limit=1.0, unit="r", height=420)),
        ),
    ]  # fmt: skip
    if data["answers"]:
        drawn.append(_answer_figure(data["answers"]))
    if data["rated"]:
        drawn.append(_regulation_figure(data["rated"]))
    if data["scenarios"]:
        drawn.append(_scenario_figure(data["scenarios"]))
    return drawn


def _bars(bars: Mapping[str, Any]) -> Any:
    from affectlens.figures import GREY, PALETTE, blank

    names = list(bars)
    figure = blank(x="cosine between vectors of the same emotion (last row: share)", height=90 + 44 * len(names), wide=True)
    for i, name in enumerate(names):
        if (band := bars[name]["null"]) is not None:
            figure.add_shape(
                type="rect", x0=band[0], x1=band[1], y0=i - 0.3, y1=i + 0.3, fillcolor=GREY, opacity=0.3, line_width=0
            )
    values = [bars[name]["value"] for name in names]
    figure.add_scatter(
        x=[value[0] for value in values],
        y=names,
        error_x={
            "type": "data", "symmetric": False, "array": [value[2] - value[0] for value in values],
            "arrayminus": [value[0] - value[1] for value in values], "thickness": 1.6, "width": 5,
        },
        mode="markers", name="noise-corrected", marker={"size": 9, "color": PALETTE[0]},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    for part, name, symbol in (("plain", "plain cosine", "circle-open"), ("paper", "published", "diamond")):
        shown = [label for label in names if bars[label][part] is not None]
        figure.add_scatter(
            x=[bars[label][part] for label in shown], y=shown, mode="markers", name=name,
            marker={"size": 9, "symbol": symbol, "color": PALETTE[0] if part == "plain" else PALETTE[1], "line": {"width": 1.6}},
            hovertemplate=f"%{{y}}<br>{name} %{{x:.2f}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, type="category")
    return figure.update_xaxes(zeroline=True, showgrid=True)


def _numbers(figure: Any) -> Any:
    """The heat map with its values written in the cells."""
    return figure.update_traces(texttemplate="%{z:.2f}", textfont={"size": 11})


def _matrices(data: Mapping[str, Any]) -> Any:
    from plotly.subplots import make_subplots

    from affectlens.figures import blank, heat_map

    kinds = data["kinds"]
    pair = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, subplot_titles=("plain", "noise-corrected"))
    figure = blank(height=460, wide=True)
    for column, part in enumerate(("plain", "corrected"), 1):
        table = np.array([[np.nan if value is None else value for value in row] for row in data[part]])
        np.fill_diagonal(table, np.nan)
        one = _numbers(heat_map(table, kinds, limit=1.0))
        pair.add_trace(one.data[0], row=1, col=column)
        for edge in (3.5, 7.5):
            line = {"color": "#8a9099", "width": 0.8}
            pair.add_hline(y=edge, line=line, row=1, col=column)
            pair.add_vline(x=edge, line=line, row=1, col=column)
    pair.update_layout(template=figure.layout.template, height=figure.layout.height, meta=figure.layout.meta)
    pair.update_layout(coloraxis=one.layout.coloraxis, margin={"t": 30})
    bare = {"showline": False, "zeroline": False, "showgrid": False, "ticks": "", "type": "category", "constrain": "domain"}
    pair.update_xaxes(**bare)
    return pair.update_yaxes(**bare, autorange="reversed")


def _answer_figure(data: Mapping[str, Any]) -> Figure:
    from affectlens.figures import heat_map, to_figure

    table = np.array([[np.nan if value is None else value for value in row] for row in data["strength"]])
    stands = [["●" if value is not None and value <= ALPHA else "" for value in row] for row in data["q"]]
    figure = heat_map(table, data["families"], columns=data["families"], unit="strength", height=520)
    figure.update_traces(text=stands, texttemplate="%{text}").update_layout(meta={"wide": True})
    figure.update_yaxes(title_text="the listener feels").update_xaxes(title_text="the speaker's state resembles", tickangle=-30)
    caption = (
        "How far a listener's emotion (row) moves the speaker's words along the present-speaker vectors of a family (column), in "
        f"units of their own strength, rows and columns centred. Dots: q <= {ALPHA} over all cells, exploratory."
    )
    return to_figure("answers", "What answers the listener's emotion", caption, figure)


def _regulation_figure(data: Mapping[str, Any]) -> Figure:
    from affectlens.figures import circumplex, to_figure

    titles = ("arousal of the listener's emotion (human rating)", "arousal of what answers it (weighted, relative)")
    figure = circumplex(data["names"], data["own"], data["met"], titles=titles, height=520)
    value, low, high = data["r"]
    caption = (
        f"Each rated emotion of the listener, and the mean arousal of the present-speaker emotions weighted by cosine: r = "
        f"{value:.2f} [{low:.2f}, {high:.2f}], published -0.47."
    )
    return to_figure("regulation", "Is arousal met with calm?", caption, figure)


def _scenario_figure(data: Mapping[str, Any]) -> Figure:
    from affectlens.figures import GREY, PALETTE, blank, to_figure

    order = sorted((data["names"].index(name) for name in data["shown"]), key=lambda i: -data["r2"][0][i])
    names = [data["names"][i] for i in order]
    value, low, high = (np.array(part)[order] for part in data["r2"])
    figure = blank(x="R² over messages", height=100 + 17 * len(names), wide=True)
    figure.add_scatter(
        x=value, y=names, mode="markers", name="own present-speaker vector", marker={"size": 8, "color": PALETTE[0]},
        error_x={
            "type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.2, "width": 3,
        },
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=np.array(data["chance"])[order], y=names, mode="markers", name="mean over all emotions' vectors",
        marker={"size": 9, "symbol": "line-ns", "line": {"width": 2, "color": GREY}},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", dtick=1).update_xaxes(rangemode="tozero")
    caption = "Shared variance of the two readings, for the emotions that have messages; 95 % intervals over messages."
    return to_figure("scenarios", "Story and present-speaker readings of messages", caption, figure)
