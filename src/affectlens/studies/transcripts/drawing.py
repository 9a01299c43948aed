"""Figures of the transcripts, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from affectlens.conversations import STRETCH, smoothed
from affectlens.studies import Figure


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Scores by family, AUROC against the length of the stretch, and one conversation; those that there are data for."""
    makers = {"families": _families, "averaging": _averaging, "trace": _trace}
    return [make(data[name], data["layer"]) for name, make in makers.items() if name in data]


def _families(found: Mapping[str, Any], layer: int) -> Figure:
    from affectlens.figures import heat_map, to_figure

    limit = round(float(np.quantile(np.abs(found["matrix"]), 0.98)), 3)
    caption = (
        f"Mean score of the conversations by the {found['what']} of the assistant's emotion (row) and of the probe (column), "
        "in standard deviations of each probe over the conversations. Read on the assistant's words."
    )
    drawn = heat_map(found["matrix"], found["names"], limit=limit, unit="SD")
    drawn.update_xaxes(tickangle=-90)  # names of families are long: aslant they would run into the colour bar
    return to_figure("families", f"What the assistant's words read, layer {layer}", caption, drawn)


def _averaging(found: Mapping[str, Any], layer: int) -> Figure:
    from affectlens.figures import GREY, PALETTE, blank, to_figure

    value, low, high = np.array(found["auroc"]).T
    drawn = blank(x="tokens averaged", y="AUROC, mean over emotions", height=360)
    drawn.add_scatter(
        x=[str(width) for width in found["widths"]],
        y=value,
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.5},
        mode="lines+markers",
        line={"color": PALETTE[0], "width": 2},
        hovertemplate="strongest %{x} tokens<br>AUROC %{y:.3f}<extra></extra>",
        showlegend=False,
    )
    drawn.add_hline(y=0.5, line={"color": GREY, "width": 1, "dash": "dash"})
    chance = {"text": "chance", "font": {"size": 11, "color": GREY}, "showarrow": False}
    drawn.add_annotation(**chance, xref="paper", x=1, xanchor="right", y=0.5, yanchor="bottom")
    drawn.update_xaxes(type="category").update_yaxes(zeroline=False)
    caption = (
        "How well the strongest stretch of the assistant's tokens tells its emotion, by the length of the stretch; bootstrap "
        f"over conversations, layer {layer}. The claim compares {STRETCH} with 1; the other lengths are exploratory."
    )
    return to_figure("averaging", "Stretches against single tokens", caption, drawn)


def _trace(found: Mapping[str, Any], layer: int) -> Figure:
    from affectlens.figures import GREY, PALETTE, blank, to_figure

    lines = {name: np.array([np.nan if v is None else v / 1000 for v in own]) for name, own in found["lines"].items()}
    drawn = blank(x="token of the conversation", y=f"centred cosine, layer {layer}", height=380, wide=True)
    start, roles = 0, []
    for role, n in found["turns"]:
        if role == "assistant":
            drawn.add_vrect(x0=start, x1=start + n, fillcolor=GREY, opacity=0.13, line_width=0, layer="below")
        roles.append((role, start, start + n))
        start += n
    for number, (name, scores) in enumerate(lines.items()):
        colour = PALETTE[number]
        if number == 0:
            drawn.add_scatter(
                x=list(range(len(scores))),
                y=scores,
                mode="markers",
                marker={"size": 4, "color": colour, "opacity": 0.4},
                name=f"{name}, each token",
                hovertemplate=f"token %{{x}}<br>{name} %{{y:.3f}}<extra></extra>",
            )
        line: list[float] = []
        for _, begin, end in roles:  # a gap between turns: no average reaches over two speakers
            line += [*(float(v) for v in _around(scores[begin:end])), float("nan")]
        x = [at for _, begin, end in roles for at in (*range(begin, end), end - 0.5)]
        whose = next((f" (the {role}'s)" for role, label in found["labels"].items() if label == name), "")
        drawn.add_scatter(
            x=x,
            y=line,
            mode="lines",
            line={"color": colour, "width": 2.2, "dash": "solid" if number == 0 else "dash"},
            name=f"{name}{whose}, {STRETCH} tokens",
            hovertemplate=f"token %{{x}}<br>{name} %{{y:.3f}}<extra></extra>",
        )
    caption = (
        f"Conversation {found['id']}, which {found['probe']} ranks first. Points are single tokens, lines means over "
        f"{STRETCH} tokens of one turn around each; the assistant's turns are shaded."
    )
    return to_figure("trace", "One conversation, token by token", caption, drawn)


def _around(scores: np.ndarray) -> np.ndarray:
    """Mean over the stretch around each token of a turn; at the ends the stretch is moved, not cut."""
    means = smoothed(np.where(np.isnan(scores), np.nanmean(scores), scores)) if not np.isnan(scores).all() else scores[:1]
    before = (len(scores) - len(means)) // 2
    return np.pad(means, (before, len(scores) - len(means) - before), mode="edge")
