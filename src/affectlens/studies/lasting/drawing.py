"""The figures of the lasting study, drawn from its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from affectlens.figures import GREY, PALETTE, SEQUENTIAL, THEME, blank, heat_map, layer_curves, to_figure
from affectlens.studies import Figure

TITLES = {
    "open": "shown",
    "hidden": "hidden",
    "neutral": "matter of fact",
    "story": "story",
    "others": "about others",
    "all": "all",
}


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Accuracy by condition, transfer, ordinary text, layers, and confusions."""
    layer, titles = data["layer"], [TITLES[id] for id in data["conditions"]]
    transfer = heat_map(data["transfer"], titles, limit=(0.0, max(map(max, data["transfer"]))), unit="accuracy", height=400)
    transfer.update_yaxes(title_text="fitted on").update_xaxes(title_text="read in")
    transfer.update_traces(texttemplate="%{z:.2f}")
    # Five bands would cover each other: the condition that the finding is about keeps its own.
    curves = {TITLES[id]: curve if id == "neutral" else (curve[0], None, None) for id, curve in data["curves"].items()}
    along = layer_curves(data["layers"], curves, y="accuracy", chance=data["chance"], mark=layer)
    accuracy = (
        "Share of scenes whose emotion the probe names, with Wilson intervals; all in topics that were left out. Hollow: the "
        "same words without the preamble that tells the feeling. Diamonds: the published model. Dashed: chance."
    )
    confusion = "Share of the scenes of an emotion (row) that the probe gives to each emotion (column); held-out topics."
    pairs = (
        "Probes fitted on one condition and read in another, in topics that were left out; conditions centred on their own means."
    )
    sizes = (
        "Share of texts to which the probe answers with less than this size. Size is for each unit of how much a text differs "
        "from its kind, with 1 the mean of the held-out scenes."
    )
    nearest = (
        "Nearest class mean, a cheaper probe than the one of the other figures; Wilson intervals for talk of a matter of fact."
    )
    return [
        to_figure("conditions", f"What the speaker feels, at layer {layer}", accuracy, _conditions(data)),
        to_figure("transfer", f"From condition to condition at layer {layer}", pairs, transfer),
        to_figure("ordinary", f"Answers to ordinary text at layer {layer}", sizes, _sizes(data["sizes"])),
        to_figure("layers", "What the speaker feels, over layers", nearest, along),
        to_figure("confusion", f"Confusions at layer {layer}", confusion, _confusions(data)),
    ]


def _conditions(data: Mapping[str, Any]) -> Any:
    figure, titles = blank(y="accuracy", height=400), [TITLES[id] for id in data["conditions"]]
    places = np.arange(len(titles))
    for kind, (name, colour, symbol, shift) in enumerate(
        (("with preamble", PALETTE[0], "circle", -0.12), ("words alone", PALETTE[1], "circle-open", 0.12))
    ):
        value, low, high = np.array([row[kind] for row in data["conditions"].values()]).T
        figure.add_scatter(
            x=places + shift,
            y=value,
            error_y={"array": high - value, "arrayminus": value - low, "thickness": 1.5, "width": 0},
            mode="markers",
            name=name,
            text=titles,
            marker={"color": colour, "size": 10, "symbol": symbol, "line": {"width": 2, "color": colour}},
            hovertemplate=f"%{{text}}, {name}<br>%{{y:.3f}}<extra></extra>",
        )
    figure.add_scatter(
        x=places,
        y=[row[2] for row in data["conditions"].values()],
        mode="markers",
        name="published",
        text=titles,
        marker={"color": GREY, "size": 10, "symbol": "diamond-open", "line": {"width": 1.5}},
        hovertemplate="%{text}, published<br>%{y:.3f}<extra></extra>",
    )
    figure.add_hline(y=data["chance"], line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_xaxes(tickvals=places, ticktext=titles, range=[-0.5, len(titles) - 0.5], ticks="")
    return figure.update_yaxes(range=[0, 1.03], zeroline=False)


def _sizes(sizes: Mapping[str, Any]) -> Any:
    figure = blank(x="size of the answer (held-out scenes: mean 1)", y="share of texts", height=400)
    for number, (kind, quantiles) in enumerate(sizes.items()):
        figure.add_scatter(
            x=quantiles,
            y=np.linspace(0, 1, len(quantiles)),
            mode="lines",
            name=kind,
            line={"color": PALETTE[number], "width": 2, "dash": ("solid", "dash", "dot")[number]},
            hovertemplate=f"{kind}<br>%{{y:.0%}} below %{{x:.2f}}<extra></extra>",
        )
    return figure.update_xaxes(rangemode="tozero").update_yaxes(range=[0, 1.02])


def _confusions(data: Mapping[str, Any]) -> Any:
    from plotly.subplots import make_subplots

    names, titles = data["names"], [TITLES[id] for id in data["confusion"]]
    shared = {"shared_xaxes": "all", "shared_yaxes": "all", "horizontal_spacing": 0.02, "vertical_spacing": 0.06}
    figure = make_subplots(2, 3, subplot_titles=titles, **shared)
    for number, matrix in enumerate(data["confusion"].values()):
        figure.add_heatmap(
            z=matrix,
            x=names,
            y=names,
            coloraxis="coloraxis",
            row=number // 3 + 1,
            col=number % 3 + 1,
            hovertemplate=f"{titles[number]}<br>%{{y}} read as %{{x}}: %{{z:.2f}}<extra></extra>",
        )
    figure.update_layout(template=THEME, height=780, meta={"wide": True})
    bar = {"title": {"text": "share", "side": "top"}, "thickness": 9, "outlinewidth": 0, "len": 1, "x": 1.01}
    figure.update_layout(
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": np.max(list(data["confusion"].values())), "colorbar": bar},
        margin_t=40,
    )
    bare = {"showline": False, "zeroline": False, "showgrid": False, "ticks": "", "type": "category"}
    figure.update_xaxes(**bare, tickangle=-90).update_yaxes(**bare, autorange="reversed")
    return figure
