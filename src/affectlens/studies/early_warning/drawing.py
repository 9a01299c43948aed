"""Figures of early warning, from their plain data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Correlation and AUROC against the number of tokens, those that there are data for."""
    from affectlens.figures import to_figure

    drawn = []
    if "correlation" in data:
        found = data["correlation"]
        few, most = min(found["n"]), max(found["n"])
        caption = (
            "Correlation over messages, mean over concepts, of what was foretold and what was read. Thick: the rest of the reply "
            "behind so many tokens, read alone, with 95 % interval. Dotted: read in context, where the stream carries on what it "
            "held; the whole reply contains the tokens that it is foretold from. Dashed: the same rest foretold from the user's "
            f"words. {most} replies" + (f", {few} of them long enough for the last step." if few < most else ".")
        )
        title = f"How early a reply is foretold, layer {data['layer']}"
        drawn.append(to_figure("correlation", title, caption, _correlation(found)))
    if "outcome" in data:
        caption = (
            f"AUROC for {data['outcome']['what']} in {data['outcome']['n']} conversations, with 95 % interval, after so many "
            "tokens of the reply; 0 is the reply position."
        )
        if data["intended"]:
            caption += " Dotted: the emotion that a message implies, by its probe along the model's own reply (exploratory)."
        title = f"How early an outcome is told, layer {data['layer']}"
        drawn.append(to_figure("outcome", title, caption, _outcome(data["outcome"], data["intended"])))
    return drawn


def _correlation(found: Mapping[str, Any]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, PALETTE, RED, blank

    figure = blank(x="tokens of the reply that have been read", y="correlation, mean over concepts", height=400)
    x = [str(step) for step in found["steps"]]
    _curve(figure, x, found["rest"], "rest, read alone", BLUE)
    for name, colour, dash in (
        ("rest, in context", PALETTE[5], "dot"),
        ("whole reply, in context", GREY, "dashdot"),
        ("user's words, read", RED, "dash"),
        ("user's words as text", PALETTE[4], "longdash"),
    ):
        if name in found:
            figure.add_scatter(x=x, y=found[name], name=name, mode="lines", line={"color": colour, "width": 1.6, "dash": dash})
    return figure.update_xaxes(type="category")


def _outcome(found: Mapping[str, Any], intended: Sequence[Sequence[float]]) -> go.Figure:
    from affectlens.figures import BLUE, GREY, PALETTE, RED, blank

    figure = blank(x="tokens of the reply that have been read", y="AUROC", height=400)
    x = [str(step) for step in found["steps"]]
    _curve(figure, x, found["auroc"], found["what"], BLUE)
    for (name, value), (colour, dash) in zip(found["before"].items(), ((RED, "dash"), (PALETTE[4], "longdash")), strict=False):
        line = {"color": colour, "width": 1.6, "dash": dash}
        figure.add_scatter(x=x, y=[value] * len(x), name=name, mode="lines", line=line)
    if intended:
        y = [value for _, value in intended]
        line = {"color": PALETTE[2], "width": 1.6, "dash": "dot"}
        figure.add_scatter(x=[str(step) for step, _ in intended], y=y, name="implied by the message", mode="lines", line=line)
    figure.add_hline(y=0.5, line={"color": GREY, "width": 1})
    return figure.update_xaxes(type="category").update_yaxes(zeroline=False)


def _curve(figure: go.Figure, x: Sequence[str], ends: Sequence[Sequence[Any]], name: str, colour: str) -> None:
    spread = [(0.0, 0.0) if None in each else (each[2] - each[0], each[0] - each[1]) for each in ends]
    figure.add_scatter(
        x=x,
        y=[value for value, _, _ in ends],
        error_y={"type": "data", "symmetric": False, "array": [up for up, _ in spread], "arrayminus": [d for _, d in spread]},
        mode="lines+markers",
        line={"color": colour, "width": 2.4},
        name=name,
    )
