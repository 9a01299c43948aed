"""The figures of the concealment study, drawn from its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens.figures import GREY, PALETTE, blank, heat_map, layer_curves, to_figure
from affectlens.studies import Figure


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """Decoding, length outside the story space, cosines with story vectors, and layers."""
    names, layer = data["names"], data["layer"]
    limit = round(max(abs(value) for matrix in data["cosines"].values() for line in matrix for value in line), 2)
    felt, shown = (heat_map(data["cosines"][label], names, limit=limit) for label in ("felt", "shown"))
    curves = {"top 1": data["curve"]}
    along = layer_curves(data["layers"], curves, y="emotion felt reads highest", chance=data["chance"], mark=layer)
    rates = (
        "Share of hidden scenes in which the emotion reads highest of its candidates, with Wilson intervals; the dashed "
        "line is chance. Felt: among emotions that are not shown; shown: among emotions that are not felt."
    )
    left = (
        "Length of each probe that is left when the space of the story vectors is taken out, not corrected for noise; at the "
        "right of all together, corrected (no mark: nothing but noise). The dashed line is what is left of noise in the scenes."
    )
    cosines = "Rows: {} of each emotion; columns: story vectors. Not corrected for noise; both figures have the same colours."
    return [
        to_figure("decoding", f"What is read in hidden scenes at layer {layer}", rates, _decoding_figure(data["decoding"])),
        to_figure("outside", f"Length outside the story space at layer {layer}", left, _outside_figure(data)),
        to_figure("cosines", "Deflection and story vectors", cosines.format("deflection vectors"), felt),
        to_figure("cosines_shown", "Shown and story vectors", cosines.format("vectors of what is shown"), shown),
        to_figure("layers", "Decoding what is felt, over layers", "Held-out scenes; Wilson intervals.", along),
    ]


def _decoding_figure(rows: Sequence[Sequence[Any]]) -> Any:
    probes = list(dict.fromkeys(title for title, *_ in rows))
    figure = blank(x="read highest (share of scenes)", height=130 + 40 * len(probes))
    for label, colour, symbol in (("felt", PALETTE[0], "circle"), ("shown", PALETTE[1], "square")):
        own = [row for row in rows if row[1] == label]
        value, low, high = (np.array([row[k] for row in own]) for k in (2, 3, 4))
        figure.add_scatter(
            x=value,
            y=[title for title, *_ in own],
            error_x={"array": high - value, "arrayminus": value - low, "thickness": 1.5, "width": 0},
            mode="markers",
            name=f"emotion {label}",
            marker={"color": colour, "size": 9, "symbol": symbol},
            hovertemplate=f"%{{y}}: emotion {label}<br>%{{x:.3f}}<extra></extra>",
        )
    figure.add_vline(x=rows[0][5], line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=probes[::-1], zeroline=False)
    return figure.update_xaxes(range=[0, 1.02])


def _outside_figure(data: Mapping[str, Any]) -> Any:
    figure, names = blank(y="share of length left", height=380), [*data["names"], "all, corrected"]
    for label, title, colour, symbol in (
        ("felt", "deflection vectors", PALETTE[0], "circle"),
        ("shown", "shown vectors", PALETTE[1], "square"),
    ):
        sizes = [7] * len(data["names"]) + [12]
        marker = {"color": colour, "size": sizes, "symbol": symbol}
        hover = f"{title}, %{{x}}<br>%{{y:.3f}}<extra></extra>"
        figure.add_scatter(x=names, y=data["outside"][label], mode="markers", name=title, marker=marker, hovertemplate=hover)
    figure.add_hline(y=data["noise"], line={"color": GREY, "width": 1, "dash": "dash"})
    return figure.update_xaxes(type="category").update_yaxes(range=[0, 1.03], zeroline=False)
