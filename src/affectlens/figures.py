"""Figures that look like one hand drew them: the template, the palette, and the three plots that many studies share.

A study draws with plotly (or with the plots below) and turns the result into plain data with :func:`to_figure`. Figures
carry no background and no font colour: the report's page sets both, in light and in dark mode, so colours chosen here must
be readable on white and on near-black. Meaning never rests on colour alone: curves differ in dash, clusters in symbol.
"""

from __future__ import annotations

import base64
import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike

from affectlens.studies import Figure

PALETTE = ("#4477aa", "#d5672a", "#2f9e77", "#a05195", "#c29a1c", "#3fa7c4", "#d45087", "#7a8b2f", "#8d6e5c", "#7f8896")
"""Ten colours, all readable on white and on near-black; neighbours differ in lightness as well as in hue."""

GREY = "#8a9099"
"""For chance levels, marks and everything that is not data."""

NEUTRAL = "#fbfbfa"
"""The "nothing here" end or middle of a colour scale. The page replaces it by its own background in dark mode."""

RED, BLUE = "#c8402f", "#3166b0"
DIVERGING = ((0.0, BLUE), (0.5, NEUTRAL), (1.0, RED))
"""Down is blue, zero vanishes into the page, up is red: the same reading as the coloured tokens."""

SEQUENTIAL = ((0.0, NEUTRAL), (0.5, "#6f9fce"), (1.0, "#1f4f94"))

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "hexagon", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_AXIS = {"ticks": "outside", "ticklen": 4, "automargin": True, "title": {"standoff": 8}}
THEME = go.layout.Template(
    layout={
        "font": {"family": "-apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif", "size": 12},
        "colorway": PALETTE,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": {**_AXIS, "showgrid": False, "showline": True, "zeroline": False},
        "yaxis": {**_AXIS, "showgrid": True, "showline": False, "zeroline": True},
    }
)


def blank(title: str = "", *, x: str = "", y: str = "", height: int = 380, wide: bool = False) -> go.Figure:
    """An empty figure in our style, to add traces to.

    Args:
        title: Shown above the plot outside of a report; in a report the caption has it.
        x, y: Axis titles, with the unit.
        height: Height in pixels; the width follows the page.
        wide: Take both columns of the report.

    Returns:
        A plotly figure with the template of this module.

    Example:
        >>> figure = blank("Dose and response", x="strength", y="rate of blackmail", height=300)
        >>> figure.layout.xaxis.title.text, figure.layout.height
        ('strength', 300)
    """
    figure = go.Figure(layout={"template": THEME, "height": height, "meta": {"wide": wide}})
    figure.update_xaxes(title_text=_text(x)).update_yaxes(title_text=_text(y))
    if title:
        figure.update_layout(title_text=_text(title), margin_t=48)
    return figure


def panels(titles: Sequence[str], *, rows: int = 1, columns: int, height: int, **spacing: Any) -> go.Figure:
    """Small multiples in our style: an empty wide figure with a grid of titled panels, filled row by row.

    Titles of panels stand inside the plot's own area, so that the legend above them keeps clear of them on a phone too.

    Args:
        titles: One for each panel; with more rows than titles fill, the rest have none. A long title takes two lines.
        rows, columns: Of the grid.
        height: Height in pixels.
        spacing: For ``plotly.subplots.make_subplots``: ``shared_yaxes``, ``horizontal_spacing``, ``column_widths``, …

    Returns:
        A figure to add traces to with ``row`` and ``col``.

    Example:
        >>> figure = panels(["fever", "the pupils who passed"], columns=2, height=300)
        >>> [title.text for title in figure.layout.annotations]
        ['fever', 'the pupils who<br>passed']
    """
    from plotly.subplots import make_subplots

    folded = ["<br>".join(textwrap.wrap(_text(title), 16)) for title in titles]
    figure = make_subplots(rows, columns, subplot_titles=folded, **spacing)
    share = 1 - 36 / height
    for axis in figure.select_yaxes():
        axis.domain = [share * end for end in axis.domain]
    for title in figure.layout.annotations:
        title.update(y=share * title.y, font_size=12)
    layout = blank(height=height, wide=True).layout
    return figure.update_layout(template=layout.template, height=height, meta=layout.meta)


def to_figure(id: str, title: str, caption: str, fig: go.Figure) -> Figure:
    """A plotly figure as plain data for the report: lists instead of arrays, six significant digits, no NaN.

    Args:
        id: Short identifier, unique in the study.
        title: What the figure shows, a few words; printed above it.
        caption: What a reader needs to read it: units, intervals, n.
        fig: Any plotly figure. It is not changed; its own title and template are replaced by the report's.

    Returns:
        The figure as the report stores it.

    Example:
        >>> figure = to_figure("line", "A line", "Two points.", blank().add_scatter(x=np.arange(2), y=[1, math.nan]))
        >>> figure.plotly["data"][0]["x"], figure.plotly["data"][0]["y"]
        ([0, 1], [1, None])
    """
    data = _plain(fig.to_plotly_json())
    layout = {**data["layout"], "template": _plain(THEME.to_plotly_json())}
    if layout.pop("title", None):  # the page prints the title, so the room for it goes too
        layout.get("margin", {}).pop("t", None)
    return Figure(id, title, caption, {"data": data["data"], "layout": layout})


def circumplex(
    names: Sequence[str],
    x: ArrayLike,
    y: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    show: Sequence[str] = (),
    titles: tuple[str, str] = ("valence", "arousal"),
    height: int = 640,
) -> go.Figure:
    """Concepts in the plane, coloured by cluster. Labels are placed so that none covers another; hovering names every point.

    Args:
        names: The ``N`` concepts.
        x, y: Coordinates, ``(N,)``.
        clusters: Cluster of each concept, in the order in which clusters should appear in the legend; None for one colour.
        show: Names to label, most important first; empty tries all. A label that finds no free place is left to the hover.
        titles: Axis titles.
        height: Height in pixels.

    Returns:
        A wide figure with two sets of labels, for desktops and for phones; the report's page shows the one that fits.

    Raises:
        ValueError: Lengths differ, or a coordinate is not finite.

    Example:
        >>> figure = circumplex(["calm", "afraid"], [0.5, -0.5], [-0.5, 0.5], ["peace", "fear"])
        >>> [trace.name for trace in figure.data]
        ['peace', 'fear', 'labels', 'labels, narrow']
    """
    points = np.column_stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    clusters = list(clusters) if clusters is not None else ["concepts"] * len(names)
    if not len(names) == len(points) == len(clusters) or not np.isfinite(points).all():
        raise ValueError(f"{len(names)} names, {len(points)} points, {len(clusters)} clusters: must be as many, and finite")
    figure = blank(x=titles[0], y=titles[1], height=height, wide=True)
    wanted = [name for name in show if name in set(names)] if show else list(names)
    for number, cluster in enumerate(dict.fromkeys(clusters)):
        colour = PALETTE[number % len(PALETTE)]
        faint = f"rgba({','.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))},0.5)"
        # the legend shows the colour of a cluster's first point: let it be a full one
        rows = sorted((i for i, own in enumerate(clusters) if own == cluster), key=lambda i: names[i] not in wanted)
        figure.add_scatter(
            x=points[rows, 0].round(4),
            y=points[rows, 1].round(4),
            mode="markers",
            name=_text(cluster),
            marker={
                "color": [colour if names[i] in wanted else faint for i in rows],
                "symbol": _SYMBOLS[number % len(_SYMBOLS)],
                "size": [10 if names[i] in wanted else 7 for i in rows],
                "line": {"width": 0},
            },
            text=[_text(names[i]) for i in rows],
            hovertemplate=f"<b>%{{text}}</b><br>{_text(cluster)}<br>%{{x:.3f}}, %{{y:.3f}}<extra></extra>",
            showlegend=len(set(clusters)) > 1,
        )
    order = {name: i for i, name in enumerate(names)}
    for label, width in (("labels", 1000), ("labels, narrow", 300)):
        name_points(figure, points, names, show=[order[name] for name in wanted], width=width)
        figure.data[-1].update(name=label, meta=label, visible=label == "labels")
    figure.update_layout(legend_itemsizing="constant")
    figure.update_xaxes(zeroline=True).update_yaxes(showgrid=False)
    return figure


def heat_map(
    matrix: ArrayLike,
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    columns: Sequence[str] | None = None,
    limit: float | tuple[float, float] | None = None,
    unit: str = "cosine",
    height: int = 560,
) -> go.Figure:
    """A matrix in colour. Up to 40 labels are written out; beyond that the groups are, and hovering names each cell.

    Args:
        matrix: Values, ``(rows, columns)``; stored with three decimals so that 171 x 171 stay light. NaN is left empty.
        labels: Names of the rows, first at the top; also of the columns, unless ``columns`` names those.
        groups: Group of each row, equal ones next to each other; drawn as thin lines with the group's name at the left.
        columns: Names of the columns of a matrix that is not square.
        limit: A number: diverging colours from minus to plus it. A pair: one-directional colours from low to high.
            None: diverging, up to the 99th percentile of the absolute values off the diagonal.
        unit: What a value is, for the colour bar and the hover.
        height: Height in pixels.

    Raises:
        ValueError: Labels or groups do not fit the matrix.

    Example:
        >>> heat_map([[1, -0.2], [-0.2, 1]], ["calm", "afraid"]).layout.coloraxis.cmax
        0.2
    """
    values = np.asarray(matrix, dtype=np.float64).round(3)
    across = list(columns if columns is not None else labels)
    if values.shape != (len(labels), len(across)) or (groups is not None and len(groups) != len(labels)):
        raise ValueError(f"shape {values.shape} does not fit {len(labels)} labels, {len(across)} columns or the groups")
    if limit is None:
        off = values if columns is not None else values[~np.eye(len(values), dtype=bool)]
        limit = round(float(np.nanquantile(np.abs(off), 0.99)), 3) if np.isfinite(off).any() else 0.0
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    figure = blank(height=height)
    rows, names = [_text(name) for name in labels], [_text(name) for name in across]
    hover = f"%{{y}}, %{{x}}<br>{_text(unit)} %{{z:.3f}}<extra></extra>"
    figure.add_heatmap(z=values, x=names, y=rows, coloraxis="coloraxis", hovertemplate=hover, hoverongaps=False)
    bar = {"title": {"text": _text(unit), "side": "top"}, "thickness": 9, "outlinewidth": 0, "len": 1, "x": 1.01}
    scale = SEQUENTIAL if isinstance(limit, tuple) else DIVERGING
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": low, "cmax": high or 1.0, "colorbar": bar})
    bare = {"showline": False, "zeroline": False, "showgrid": False, "ticks": "", "type": "category", "title_text": ""}
    figure.update_xaxes(**bare, showticklabels=len(names) <= 40, constrain="domain")
    figure.update_yaxes(**bare, showticklabels=len(rows) <= 40, autorange="reversed", constrain="domain")
    if columns is None:
        figure.update_yaxes(scaleanchor="x")
    if groups is not None:
        starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
        ends = [*starts[1:], len(groups)]
        line = {"color": GREY, "width": 0.6}
        for edge in starts[1:]:
            figure.add_hline(y=edge - 0.5, line=line)
            if columns is None:
                figure.add_vline(x=edge - 0.5, line=line)
        if len(rows) > 40:
            centres = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
            figure.update_yaxes(showticklabels=True, tickvals=centres, ticktext=[_text(groups[i]) for i in starts])
    return figure


def tree_map(
    matrix: ArrayLike,
    labels: Sequence[str],
    joints: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    legend: Sequence[str] = (),
    unit: str = "cosine",
    height: int = 860,
) -> go.Figure:
    """A heat map whose rows are the leaves of a tree, with the tree above and a strip of each leaf's group between them.

    Args:
        matrix, labels, unit: As for :func:`heat_map`, in the order of the leaves.
        joints: Each joint of the tree as a bracket of four points (place along the leaves, distance), ``(N - 1, 4, 2)``.
        groups: Group of each leaf; None for no strip.
        legend: The groups in the order of the legend and of the colours; default: as they come.
        height: Height in pixels.

    Example:
        >>> joints = [[[0, 0], [0, 0.2], [1, 0.2], [1, 0]]]
        >>> figure = tree_map([[1, 0.8], [0.8, 1]], ["calm", "serene"], joints, ["peace", "peace"])
        >>> [trace.name for trace in figure.data]
        [None, 'tree', 'groups', 'peace']
    """
    figure = heat_map(matrix, labels, unit=unit, height=height)
    figure.update_layout(meta={"wide": True}, coloraxis_colorbar={"len": 0.8, "y": 0, "yanchor": "bottom"})
    figure.update_yaxes(domain=[0, 0.8], scaleanchor=None)
    points = np.asarray(joints, dtype=np.float64).round(4)
    gaps = np.full((len(points), 1, 2), np.nan)  # a bracket is not joined to the next one
    x, y = np.concatenate([points, gaps], axis=1).reshape(-1, 2).T
    line = {"color": GREY, "width": 1}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="tree", showlegend=False, hoverinfo="skip", xaxis="x2", yaxis="y2")
    hidden = {"showgrid": False, "zeroline": False, "showline": False, "showticklabels": False, "ticks": "", "fixedrange": True}
    figure.update_layout(
        xaxis2={**hidden, "anchor": "y2", "range": [-0.5, len(labels) - 0.5]},
        yaxis2={**hidden, "anchor": "x2", "domain": [0.84, 1.0], "range": [0, 1.03 * float(np.nanmax(y))]},
    )
    if groups is not None:
        order = [*dict.fromkeys([*legend, *groups])]
        colours = [PALETTE[i % len(PALETTE)] for i in range(len(order))]
        steps = [(edge / len(order), colour) for i, colour in enumerate(colours) for edge in (i, i + 1)]
        figure.add_heatmap(
            z=[[order.index(group) for group in groups]],
            x=[_text(name) for name in labels],
            y=["group"],
            text=[[_text(group) for group in groups]],
            hovertemplate="%{x}<br>%{text}<extra></extra>",
            name="groups",
            zmin=-0.5,
            zmax=len(order) - 0.5,
            colorscale=steps,
            showscale=False,
            yaxis="y3",
        )
        figure.update_layout(yaxis3={**hidden, "anchor": "x", "domain": [0.81, 0.83], "type": "category"})
        for group, colour in zip(order, colours, strict=True):
            marker = {"color": colour, "symbol": "square", "size": 10}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=_text(group), xaxis="x2", yaxis="y2")
    return figure


def grouped_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[Sequence[float]]], *, y: str, height: int = 360
) -> go.Figure:
    """Bars with intervals, one of each series in every group; a series whose name begins with "random" is grey.

    Args:
        groups: Their names, along the axis.
        series: Name to (value, low, high) for each group.
        y: Axis title, with the unit.
        height: Height in pixels.

    Example:
        >>> figure = grouped_bars(["own", "others"], {"steered": [(1, 0.5, 1.5), (0, -0.2, 0.2)]}, y="nats")
        >>> [float(x) for x in figure.data[0].error_y.array]
        [0.5, 0.2]
    """
    figure = blank(y=y, height=height)
    colours = iter(PALETTE)
    for name, each in series.items():
        value, low, high = np.array(each, dtype=np.float64).T
        spread = {"type": "data", "symmetric": False, "array": (high - value).round(5), "arrayminus": (value - low).round(5)}
        colour = GREY if name.startswith("random") else next(colours)
        figure.add_bar(
            x=list(groups), y=value.round(5), name=_text(name), marker={"color": colour}, error_y={**spread, "thickness": 1.2},
            hovertemplate=f"%{{x}}<br>{_text(name)} %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    return figure.update_layout(barmode="group").update_xaxes(type="category")


def paired_points(names: Sequence[str], series: Mapping[str, Sequence[float]], *, x: str) -> go.Figure:
    """A row for each name with a point for each series, ordered by the first series, the largest on top.

    Args:
        names: Of the rows.
        series: Name to one value for each row.
        x: Axis title, with the unit.

    Example:
        >>> paired_points(["calm", "sad"], {"present": [0.1, 0.3], "other": [0.0, 0.1]}, x="nats").data[0].y
        ('sad', 'calm')
    """
    order = sorted(range(len(names)), key=lambda i: -next(iter(series.values()))[i])
    figure = blank(x=x, height=120 + 24 * len(names))
    for number, (name, values) in enumerate(series.items()):
        marker = {"color": PALETTE[number % len(PALETTE)], "size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]}
        rows = {"x": [values[i] for i in order], "y": [_text(names[i]) for i in order]}
        hover = f"%{{y}}, {_text(name)}: %{{x:.3f}}<extra></extra>"
        figure.add_scatter(**rows, mode="markers", name=_text(name), marker=marker, hovertemplate=hover)
    figure.update_yaxes(type="category", autorange="reversed", zeroline=False)
    return figure.update_xaxes(zeroline=True)


def dose_curves(doses: Mapping[str, Any], strength: float, *, y: str = "nats a word", height: int = 360) -> go.Figure:
    """A panel for each effect, a curve for each kind of vectors over strengths from 0, where nothing changes.

    Args:
        doses: ``strengths``, and ``curves``: title of a panel to name of a curve to one value for each strength. A curve whose
            name begins with "random" is grey.
        strength: What is tested; it is shaded up to here.
        y: Axis title, with the unit.
        height: Height in pixels.

    Example:
        >>> figure = dose_curves({"strengths": [0.1, 0.2], "curves": {"own word": {"steered": [1.0, 1.5]}}}, 0.1)
        >>> figure.data[0].x
        (0.0, 0.1, 0.2)
    """
    titles = list(doses["curves"])
    grid = panels(titles, columns=len(titles), height=height, shared_yaxes=True)
    for column, title in enumerate(titles, 1):
        colours = zip(PALETTE, _DASHES, strict=False)
        for name, values in doses["curves"][title].items():
            colour, dash = (GREY, "solid") if name.startswith("random") else next(colours)
            line = {"color": colour, "width": 2, "dash": dash}
            shown = {"legendgroup": name, "showlegend": column == 1, "name": _text(name), "mode": "lines+markers", "line": line}
            grid.add_scatter(x=[0.0, *doses["strengths"]], y=[0.0, *values], **shown, row=1, col=column)
    grid.add_vrect(x0=0, x1=strength, fillcolor=GREY, opacity=0.12, line_width=0)
    grid.update_xaxes(title_text="strength")
    return grid.update_yaxes(title_text=_text(y), col=1)


def band(figure: go.Figure, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, **options: Any) -> None:
    """Add the interval of a curve as a pale band.

    Args:
        figure: Is changed.
        x, low, high: Of the points, all known.
        colour: Of the curve.
        options: Of the trace: ``name``, or ``row`` and ``col``.

    Example:
        >>> figure = blank()
        >>> band(figure, [0, 1], [1, 2], [3, 4], "blue")
        >>> figure.data[0].y
        (3, 4, 2, 1)
    """
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        mode="lines",  # of fewer than 20 points plotly would draw each
        fill="toself",
        fillcolor=colour,
        opacity=0.18,
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        **options,
    )


def layer_curves(
    layers: Sequence[int],
    curves: Mapping[str, tuple[ArrayLike, ArrayLike | None, ArrayLike | None]],
    *,
    y: str = "",
    x: str = "layer",
    chance: float | None = None,
    mark: int | None = None,
    height: int = 360,
) -> go.Figure:
    """One curve for each name over layers (or another whole number), with its interval as a band.

    Args:
        layers: Layer numbers.
        curves: Name to (value, low, high), each one number for each layer; low and high None for no band.
        y: Axis title, with the unit.
        x: What is counted, where it is not the layer.
        chance: Level of the null, a dashed line.
        mark: The layer chosen, a vertical line.
        height: Height in pixels.

    Raises:
        ValueError: A curve does not have one value for each layer.

    Example:
        >>> figure = layer_curves([0, 1], {"top 1": ([0.1, 0.4], [0.0, 0.3], [0.2, 0.5])}, chance=0.006, mark=1)
        >>> [trace.name for trace in figure.data]
        ['top 1, interval', 'top 1']
    """
    figure = blank(x=x, y=y, height=height)
    for number, (name, curve) in enumerate(curves.items()):
        value, low, high = (None if part is None else np.asarray(part, dtype=np.float64) for part in curve)
        if any(part is not None and part.shape != (len(layers),) for part in (value, low, high)) or value is None:
            raise ValueError(f"curve {name!r} needs one value for each of the {len(layers)} layers")
        colour, text = PALETTE[number % len(PALETTE)], _text(name)
        if low is not None and high is not None:
            band(figure, layers, low.round(4).tolist(), high.round(4).tolist(), colour, name=f"{text}, interval")
        figure.add_scatter(
            x=list(layers),
            y=value.round(4),
            name=text,
            mode="lines",
            line={"color": colour, "width": 2, "dash": _DASHES[number % len(_DASHES)]},
            showlegend=len(curves) > 1,
            hovertemplate=f"{_text(x)} %{{x}}<br>{text} %{{y:.3f}}<extra></extra>",
        )
    note = {"font": {"size": 11, "color": GREY}, "showarrow": False}
    if chance is not None:
        figure.add_hline(y=chance, line={"color": GREY, "width": 1, "dash": "dash"})
        figure.add_annotation(**note, text="chance", xref="paper", x=1, xanchor="right", y=chance, yanchor="bottom", yshift=1)
    if mark is not None:
        figure.add_vline(x=mark, line={"color": GREY, "width": 1})
        figure.add_annotation(
            **note, text=f"{_text(x)} {mark}", x=mark, xanchor="left", xshift=3, yref="paper", y=1, yanchor="top"
        )
    return figure


_PLACES: dict[str, tuple[float, float]] = {
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, 1),
    "bottom center": (0, -1),
    "top right": (1, 1),
    "bottom right": (1, -1),
    "top left": (-1, 1),
    "bottom left": (-1, -1),
}


def name_points(figure: go.Figure, points: np.ndarray, names: Sequence[str], *, show: Sequence[int], width: int) -> None:
    """Write names beside some of the points of a figure, where they hide neither points nor each other, and fix its ranges.

    Args:
        figure: Has its height, and all the points drawn.
        points: All of them, ``(n, 2)``.
        names: Of each point.
        show: Numbers of the points to name, most important first. A name that finds no free place is left to the hover.
        width: Of the plot in pixels; where the page makes it wider, names stand further apart.

    Example:
        >>> points = np.array([[0.0, 0.0], [0.01, 0.0], [1.0, 1.0]])
        >>> figure = blank(height=380).add_scatter(x=points[:, 0], y=points[:, 1], mode="markers")
        >>> name_points(figure, points, ["here", "beside it", "there"], show=[2, 0], width=300)
        >>> figure.data[-1].text, figure.data[-1].textposition
        (('there', 'here'), ('middle left', 'top center'))
    """
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.06 * np.where(high > low, high - low, 1.0)
    low, high = low - margin, high + margin
    area = (width, figure.layout.height - 150)
    placed = _place(show, names, (points - low) / (high - low) * area, area)
    figure.add_scatter(
        x=points[list(placed), 0].round(4),
        y=points[list(placed), 1].round(4),
        mode="markers+text",  # an invisible marker keeps the name off the visible one
        marker={"size": 10, "opacity": 0},
        text=[_text(names[i]) for i in placed],
        textposition=list(placed.values()),
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.update_xaxes(range=[low[0], high[0]]).update_yaxes(range=[low[1], high[1]])


def _place(order: Sequence[int], names: Sequence[str], pixels: np.ndarray, area: tuple[float, float]) -> dict[int, str]:
    """Where each label goes: the place that hides the fewest points, among those inside the area that touch no label."""
    placed: dict[int, str] = {}
    boxes = np.empty((0, 4))
    for i in order:
        half = np.array([6.6 * len(names[i]) / 2 + 2, 8.0])
        best: tuple[int, str, np.ndarray] | None = None
        for place, side in _PLACES.items():
            centre = pixels[i] + np.array(side) * (half + 5)  # 5: the gap that plotly leaves around a marker
            box = np.concatenate([centre - half, centre + half])
            inside = (box[:2] >= 0).all() and (box[2:] <= area).all()
            touches = ((boxes[:, :2] < box[2:]) & (box[:2] < boxes[:, 2:])).all(axis=1).any()
            if inside and not touches:
                hidden = int(((pixels > box[:2] - 3) & (pixels < box[2:] + 3)).all(axis=1).sum())
                if best is None or hidden < best[0]:
                    best = (hidden, place, box)
        if best is not None and best[0] <= 3:
            placed[i] = best[1]
            boxes = np.vstack([boxes, best[2]])
    return placed


def _text(text: str) -> str:
    """Plotly reads its texts as a small HTML: a concept that is called "<b>" must stay that."""
    return html.escape(text, quote=False)


def _plain(value: Any) -> Any:
    """JSON data: arrays (also those that plotly packed into base64) as lists, floats with six digits, NaN as None."""
    if isinstance(value, Mapping):
        if "bdata" in value:
            packed = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            shape = [int(size) for size in str(value.get("shape", packed.size)).split(",")]
            return _plain(packed.reshape(shape))
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
