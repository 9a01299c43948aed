"""Figures of the reactions, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from affectlens.studies import Figure


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Kinds of replies under kinds of vectors, single emotions, both crossings, and curves over strengths."""
    from affectlens.figures import dose_curves, grouped_bars, heat_map, paired_points, to_figure

    at, names = f"layer {data['layer']}, strength {data['strength']:.3g}", data["names"]
    text = (
        f"Change of the log-probability of replies under the vector of their own emotion, {at}. The first two groups are against "
        "neutral replies. Bars hold 95 % (bootstrap over emotions; grey: means over emotions of random directions)."
    )
    bars = {kind if kind.startswith("random") else f"{kind} vectors": each for kind, each in data["bars"].items()}
    drawn = [to_figure("replies", "Replies under steering", text, grouped_bars(data["contrasts"], bars, y="nats a word"))]
    text = f"To the right: replies that show the emotion gain more than replies that answer it; {at}."
    emotions = {f"{kind} vectors": values for kind, values in data["emotions"].items()}
    drawn.append(
        to_figure(
            "emotions",
            "Showing or answering, for each emotion",
            text,
            paired_points(names, emotions, x="show minus answer (nats a word)"),
        )
    )
    if not data["dose"]:
        return drawn
    for id, title, kind, what in (
        ("shown", "Whose vector makes which emotion show", "present", "showing"),
        ("answered", "Whose vector makes which emotion be answered", "other", "answering"),
    ):
        each = heat_map(data[id], names, columns=names, unit="nats a word", height=460)
        text = f"Row: the {kind}-speaker vector; column: replies {what} this emotion, minus its neutral ones; {at}."
        drawn.append(to_figure(id, title, text, each))
    curves = dose_curves(data["dose"], data["strength"])
    text = "Shaded: up to the strength of the tests."
    return [*drawn, to_figure("dose", f"Dose curves at layer {data['layer']}", text, curves)]
