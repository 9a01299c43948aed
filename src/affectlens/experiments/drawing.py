"""Figures of an experiment, from the plain data of its outcome alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.experiments.acts import ENOUGH
from affectlens.experiments.published import ACT
from affectlens.studies import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ACROSS = 3
"""Panels in a row."""


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """All figures that there is data for.

    Args:
        data: ``analyse(…).data``.
    """
    from affectlens.figures import to_figure

    sweeps, level = data["sweeps"], data["level"]
    what = " or ".join(f"“{name.replace('_', ' ')}”" for name in data["acts"])
    drawn = []

    def add(id: str, title: str, caption: str, figure: go.Figure) -> None:
        drawn.append(to_figure(id, title, caption, figure))

    if sweeps[ACT]:
        caption = (
            f"Change of the rate of {what} from the lowest strength to the highest, with 95 % intervals. Grey dots: the same "
            "change of each random direction of equal norm; grey bars: where 95 % of further ones would lie (Student's t)."
        )
        add("changes", "Emotions against random directions", caption, _changes(sweeps[ACT], "percentage points"))
    for each in sweeps[ACT]:
        caption = (
            f"Rate of {what} among all episodes, level {level}; band: Wilson's 95 % interval. Open circles: among coherent "
            "episodes alone. Grey: random directions of equal norm, and (dashed) a vector of shuffled stories, at the ends only. "
            "Below: coherent replies and refusals. "
        )
        caption += "Diamonds: published for a closed model, in other scenarios. " if each["published"] else ""
        add(f"dose-{each['name']}", f"{each['name'].capitalize()}: {each['label']}", caption, _dose(data, each))
    if sweeps[ACT]:
        caption = f"Shares of episodes, level {level}. Strong colours are acts; strength 0 is the baseline of all sweeps."
        add("outcomes", "What episodes came to", caption, _outcomes(data))
    scales = [name for name in sweeps if name != ACT and sweeps[name]]
    for name in scales:
        caption = "Mean score with its 95 % interval (Student's t). Grey: random directions of equal norm, at the ends only."
        add(f"scale-{name}", f"Score of {name} by strength", caption, _scale(data, name))
    if len(scales) > 1:
        caption = (
            f"Means of {scales[0]} and {scales[1]} at every strength, from the lowest (small mark) to the highest (large); "
            "the cross is the baseline with its 95 % intervals, grey dots are random directions at their ends."
        )
        add("tradeoff", f"{scales[0].capitalize()} against {scales[1]}", caption, _tradeoff(data, scales[0], scales[1]))
    if any(c["before"] or c["during"] for c in data["readings"]["compared"]):
        caption = (
            f"Within arms and cases, in {data['unit']}, with 95 % intervals over episodes. Never between arms: a steered model's "
            f"stream holds the push. {data['readings']['acts']} acts, {data['readings']['others']} coherent episodes without."
        )
        add("readings", "Emotions before and during the act", caption, _readings(data))
    if sweeps[ACT] and any(n and value for value, *_, n in data["visible"]):
        caption = (
            "Capitals, exclamation marks and interjections for each 100 words of acts; Student's 95 % interval where there are "
            f"{ENOUGH} acts or more."
        )
        add("visible", "How loud acts are", caption, _visible(data))
    if any(data["course"].values()):
        caption = (
            f"Mean reading of the model's own words in each reply, in {data['unit']}, with 95 % intervals over episodes; every "
            "arm's own mean is taken away."
        )
        add("course", "Emotions from reply to reply", caption, _course(data))
    if len(data["variants"]["names"]) > 1 and sweeps[ACT]:
        add("variants", "Rates by variant", "Percent of acts by strength; intervals are in the table.", _variants(data))
    if len(data["levels"]) > 1:
        caption = (
            "Without steering, with Wilson's 95 % intervals. An interval that touches 0 or 100 % is at the floor or ceiling."
        )
        add("levels", "Baselines by level of elicitation", caption, _levels(data["levels"]))
    return drawn


def _band(figure: go.Figure, x: Sequence[float], each: Sequence[Sequence[float]], colour: str, **where: Any) -> None:
    """The interval of a curve as a band, where it is known."""
    from affectlens.figures import band

    known = [(at, low, high) for at, (_, low, high) in zip(x, each, strict=True) if _finite(low) and _finite(high)]
    band(figure, [at for at, *_ in known], [low for _, low, _ in known], [high for *_, high in known], colour, **where)


def _controls(figure: go.Figure, data: Mapping[str, Any], key: Any, *, legend: bool = True, **where: Any) -> None:
    """Random and shuffled directions, from one end over the baseline to the other."""
    from affectlens.figures import GREY

    arms = data["arms"]
    for kind, name, dash, symbol in (
        ("random", "random directions", "solid", "circle"),
        ("shuffled", "shuffled stories", "dash", "x"),
    ):
        for number, direction in enumerate(dict.fromkeys(arm["name"] for arm in arms if arm["kind"] == kind)):
            own = [arm for arm in arms if arm["kind"] == "baseline" or (arm["kind"] == kind and arm["name"] == direction)]
            own.sort(key=lambda arm: arm["strength"])
            figure.add_scatter(
                x=[arm["strength"] for arm in own],
                y=[key(arm)[0] for arm in own],
                mode="lines+markers",
                line={"color": GREY, "width": 1.2 if kind == "random" else 1.8, "dash": dash},
                marker={
                    "size": [0 if arm["kind"] == "baseline" else 5 if kind == "random" else 7 for arm in own],
                    "symbol": symbol,
                },
                opacity=0.6 if kind == "random" else 0.9,
                name=name,
                legendgroup=kind,
                legendrank=1004,
                showlegend=legend and number == 0,
                hovertemplate=f"{direction} %{{x:+g}}: %{{y:.3g}}<extra></extra>",
                **where,
            )


def _dose(data: Mapping[str, Any], sweep: Mapping[str, Any]) -> go.Figure:
    """Rates above, coherence and refusals below."""
    from affectlens.figures import GREY, PALETTE, panels

    grid = panels(["", ""], rows=2, columns=1, height=470, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.07)
    own, x, colour = [data["arms"][i] for i in sweep["arms"]], sweep["strengths"], PALETTE[0]
    top: dict[str, Any] = {"row": 1, "col": 1}
    below: dict[str, Any] = {"row": 2, "col": 1}
    _controls(grid, data, lambda arm: arm["acts"], **top)
    _band(grid, x, [arm["acts"] for arm in own], colour, **top)
    if sweep["label"] != "cannot be tested here":
        line = {"color": colour, "width": 1.2, "dash": "dot"}
        ends = {"x": [x[0], x[-1]], "y": np.clip(sweep["line"], 0, 1)}
        grid.add_scatter(**ends, mode="lines", line=line, name="fitted line", legendrank=1003, hoverinfo="skip", **top)
    open_circle = {"symbol": "circle-open", "size": 8, "color": colour}
    hover = "%{x:+g}: %{y:.1%} of coherent episodes<extra></extra>"
    alone = [arm["among"][0] for arm in own]
    shown: dict[str, Any] = {"mode": "markers", "marker": open_circle, "name": "among coherent", "legendrank": 1002}
    grid.add_scatter(x=x, y=alone, hovertemplate=hover, **shown, **top)
    grid.add_scatter(
        x=x,
        y=[arm["acts"][0] for arm in own],
        mode="lines+markers",
        line={"color": colour, "width": 2.4},
        marker={"size": 7},
        name=sweep["name"],
        legendrank=1001,
        customdata=[[100 * arm["acts"][1], 100 * arm["acts"][2], arm["n"]] for arm in own],
        hovertemplate="%{x:+g}: %{y:.1%} [%{customdata[0]:.0f}, %{customdata[1]:.0f}], n %{customdata[2]}<extra></extra>",
        **top,
    )
    if sweep["published"]:
        marker = {"symbol": "diamond-open", "size": 11, "color": PALETTE[1], "line": {"width": 2}}
        points = {"x": [s for s, _ in sweep["published"]], "y": [v for _, v in sweep["published"]]}
        hover = "published for a closed model, %{x:+g}: %{y:.0%}<extra></extra>"
        shown = {"mode": "markers", "marker": marker, "name": "closed model (paper)", "legendrank": 1005}
        grid.add_scatter(**points, hovertemplate=hover, **shown, **top)
    for key, own_colour, dash in (("coherent", PALETTE[2], "solid"), ("refused", PALETTE[3], "dash")):
        _band(grid, x, [arm[key] for arm in own], own_colour, **below)
        line = {"color": own_colour, "width": 2, "dash": dash}
        shown = {"mode": "lines+markers", "line": line, "marker": {"size": 5}, "name": key, "legendrank": 1006}
        hover = f"{key} %{{x:+g}}: %{{y:.1%}}<extra></extra>"
        grid.add_scatter(x=x, y=[arm[key][0] for arm in own], hovertemplate=hover, **shown, **below)
    grid.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], zeroline=False)
    grid.update_yaxes(title_text="rate", **top).update_yaxes(title_text="share", tickvals=[0, 0.5, 1], **below)
    _strengths(grid, x).update_xaxes(title_text="strength (multiples of the mean residual norm)", **below)
    grid.add_vline(x=0, line={"color": GREY, "width": 1, "dash": "dot"})
    return grid.update_layout(meta={"wide": False})


def _changes(sweeps: Sequence[Mapping[str, Any]], unit: str) -> go.Figure:
    """A row for each emotion: its change, and where random directions lie."""
    from affectlens.figures import GREY, PALETTE, blank

    rows = sorted(sweeps, key=lambda each: _or(each["ends"][0], 0.0))
    figure = blank(x=f"change from the lowest strength to the highest, {unit}", height=120 + 34 * len(rows))
    known = [(y, each) for y, each in enumerate(rows) if _finite(each["band"][0])]
    figure.add_bar(
        base=[each["band"][0] for _, each in known],
        x=[each["band"][1] - each["band"][0] for _, each in known],
        y=[y for y, _ in known],
        orientation="h",
        width=0.62,
        marker={"color": GREY, "opacity": 0.25, "line": {"width": 0}},
        name="95 % of random directions",
        hoverinfo="skip",
    )
    for kind, name, marker in (
        ("random", "random directions", {"color": GREY, "size": 6}),
        ("shuffled", "shuffled stories", {"color": GREY, "size": 8, "symbol": "x"}),
    ):
        # Directions that changed equally much would hide each other: they stand a little above or below.
        dots = [(v, y + 0.07 * (i % 5 - 2)) for y, each in enumerate(rows) for i, v in enumerate(each[kind]) if _finite(v)]
        if dots:
            points = {"x": [value for value, _ in dots], "y": [y for _, y in dots]}
            hover = f"{name}: %{{x:+.3g}}<extra></extra>"
            figure.add_scatter(**points, mode="markers", marker=marker, name=name, hovertemplate=hover)
    figure.add_scatter(
        x=[each["ends"][0] for each in rows],
        y=list(range(len(rows))),
        mode="markers",
        marker={"color": PALETTE[0], "size": 10},
        error_x=_spread([each["ends"] for each in rows], PALETTE[0]),
        name="emotion",
        text=[f"{each['name']}: {each['label']}" for each in rows],
        hovertemplate="<b>%{text}</b><br>%{x:+.3g}<extra></extra>",
    )
    names = [each["name"] for each in rows]
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=names, showgrid=False, zeroline=False, range=[-0.6, len(rows) - 0.4]
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    return figure.update_layout(meta={"wide": True})


def _outcomes(data: Mapping[str, Any]) -> go.Figure:
    """Stacked bars of all outcomes by strength, a panel for each emotion."""
    from affectlens.figures import GREY, PALETTE

    sweeps = data["sweeps"][ACT]
    grid, places = _panels([each["name"] for each in sweeps], height=250)
    came = [name for name in data["outcomes"] if any(arm["outcomes"][name] for arm in data["arms"])]
    acts = [name for name in came if name in data["acts"]]
    others = [name for name in came if name not in acts and name != "incoherent"]
    quiet = ("#9fb8d6", "#c9b8d8", "#bcd6c6", "#d9cfae", "#b8cfd8", "#dcc3c9")
    colours = {name: (PALETTE[1], PALETTE[6], PALETTE[4], PALETTE[8])[i % 4] for i, name in enumerate(acts)}
    colours |= {name: quiet[i % len(quiet)] for i, name in enumerate(others)} | {"incoherent": GREY}
    patterns = {name: ("", "/", "x", ".")[i % 4] for i, name in enumerate(acts)}
    for number, (each, where) in enumerate(zip(sweeps, places, strict=True)):
        labels = _labels(each["strengths"])
        grid.update_xaxes(tickvals=_labels(_shown(each["strengths"], panels=len(places))), **where)
        for name in (*acts, *others, *(n for n in came if n == "incoherent")):
            grid.add_bar(
                x=labels,
                y=[data["arms"][i]["outcomes"][name] for i in each["arms"]],
                name=name.replace("_", " "),
                marker={
                    "color": colours[name],
                    "line": {"width": 0},
                    "pattern": {"shape": patterns.get(name, ""), "solidity": 0.25},
                },
                legendgroup=name,
                showlegend=number == 0,
                hovertemplate=f"{name.replace('_', ' ')} at %{{x}}: %{{y:.1%}}<extra></extra>",
                **where,
            )
    grid.update_layout(barmode="stack", bargap=0.12).update_xaxes(type="category", tickangle=0, tickfont={"size": 10})
    grid.update_yaxes(tickformat=".0%", range=[0, 1]).update_yaxes(title_text="share", col=1)
    return grid


def _scale(data: Mapping[str, Any], name: str) -> go.Figure:
    """A panel for each emotion with the mean score by strength."""
    from affectlens.figures import PALETTE

    sweeps = data["sweeps"][name]
    grid, places = _panels([each["name"] for each in sweeps], height=260)
    for number, (each, where) in enumerate(zip(sweeps, places, strict=True)):
        own = [data["arms"][i]["scores"][name] for i in each["arms"]]
        _controls(grid, data, lambda arm: arm["scores"][name], legend=number == 0, **where)
        _band(grid, each["strengths"], own, PALETTE[0], **where)
        grid.add_scatter(
            x=each["strengths"],
            y=[value for value, _, _ in own],
            mode="lines+markers",
            line={"color": PALETTE[0], "width": 2.4},
            name="emotion",
            showlegend=number == 0,
            hovertemplate=f"{each['name']} %{{x:+g}}: %{{y:.3g}}<extra></extra>",
            **where,
        )
        _strengths(grid, each["strengths"], panels=len(places), **where)
    ends = [end for arm in data["arms"] for end in arm["scores"][name] if _finite(end)]
    room = 0.05 * (max(ends) - min(ends) or 1.0)
    grid.update_yaxes(range=[min(ends) - room, max(ends) + room], zeroline=False)
    return grid.update_yaxes(title_text=f"score of {name}", col=1)


def _tradeoff(data: Mapping[str, Any], across: str, up: str) -> go.Figure:
    """Both scores at every strength, a path for each emotion."""
    from affectlens.figures import GREY, PALETTE, blank

    figure = blank(x=f"score of {across}", y=f"score of {up}", height=520, wide=True)
    arms = data["arms"]
    random = [arm for arm in arms if arm["kind"] == "random"]
    if random:
        points = {"x": [arm["scores"][across][0] for arm in random], "y": [arm["scores"][up][0] for arm in random]}
        texts = [f"{arm['name']} {arm['strength']:+g}" for arm in random]
        marker = {"color": GREY, "size": 7, "opacity": 0.7}
        hover = "%{text}: %{x:.3g}, %{y:.3g}<extra></extra>"
        figure.add_scatter(**points, mode="markers", marker=marker, name="random directions", text=texts, hovertemplate=hover)
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    symbols = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagon")
    for number, each in enumerate(data["sweeps"][across]):
        own, colour = [arms[i] for i in each["arms"]], PALETTE[number % len(PALETTE)]
        figure.add_scatter(
            x=[arm["scores"][across][0] for arm in own],
            y=[arm["scores"][up][0] for arm in own],
            mode="lines+markers",
            line={"color": colour, "width": 1.8, "dash": dashes[number % 5]},
            marker={"size": np.linspace(5, 13, len(own)).round(1), "symbol": symbols[number % 8], "opacity": 1},
            name=each["name"],
            text=[f"{each['name']} {s:+g}" for s in each["strengths"]],
            hovertemplate="%{text}: %{x:.3g}, %{y:.3g}<extra></extra>",
        )
    base = next(arm["scores"] for arm in arms if arm["kind"] == "baseline")
    figure.add_scatter(
        x=[base[across][0]],
        y=[base[up][0]],
        error_x=_spread([base[across]], GREY),
        error_y=_spread([base[up]], GREY),
        mode="markers",
        marker={"color": GREY, "symbol": "cross", "size": 11},
        name="baseline",
        hovertemplate="baseline: %{x:.3g}, %{y:.3g}<extra></extra>",
    )
    return figure.update_xaxes(showgrid=True, zeroline=False).update_yaxes(zeroline=False)


def _readings(data: Mapping[str, Any]) -> go.Figure:
    """A row for each watched emotion: before the act against without it, during the act against before it."""
    from affectlens.figures import GREY, PALETTE, blank

    rows = sorted(data["readings"]["compared"], key=lambda c: _or((c["before"] or [math.nan])[0], -math.inf))
    figure = blank(x=f"difference, {data['unit']}", height=130 + 30 * len(rows))
    series = (
        ("before", "before the act − without it", PALETTE[0], "circle", 0.14),
        ("during", "during it − before it", PALETTE[1], "diamond", -0.14),
    )
    for key, name, colour, symbol, shift in series:
        own = [(y + shift, c[key], c["name"]) for y, c in enumerate(rows) if c[key]]
        if own:
            figure.add_scatter(
                x=[c[0] for _, c, _ in own],
                y=[y for y, _, _ in own],
                error_x=_spread([c for _, c, _ in own], colour),
                mode="markers",
                marker={"color": colour, "size": 9, "symbol": symbol},
                name=name,
                text=[label for *_, label in own],
                hovertemplate="<b>%{text}</b> %{x:+.3g}<extra></extra>",
            )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    names = [c["name"] for c in rows]
    return figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=names, showgrid=False, zeroline=False, range=[-0.6, len(rows) - 0.4]
    )


def _visible(data: Mapping[str, Any]) -> go.Figure:
    """A panel for each emotion: loudness of acts by strength."""
    from affectlens.figures import GREY, PALETTE

    sweeps = data["sweeps"][ACT]
    grid, places = _panels([each["name"] for each in sweeps], height=240)
    loud = zip(data["arms"], data["visible"], strict=True)
    random = [(arm["strength"], line) for arm, line in loud if arm["kind"] == "random" and line[3]]
    for number, (each, where) in enumerate(zip(sweeps, places, strict=True)):
        grid.add_scatter(
            x=[strength for strength, _ in random],
            y=[line[0] for _, line in random],
            mode="markers",
            marker={"color": GREY, "size": 6},
            name="random directions",
            legendgroup="random",
            showlegend=number == 0 and bool(random),
            hovertemplate="random direction, %{x:+g}: %{y:.2f}<extra></extra>",
            **where,
        )
        own = [(s, data["visible"][i]) for s, i in zip(each["strengths"], each["arms"], strict=True) if data["visible"][i][3]]
        # The interval of few acts is as wide as the page and says nothing.
        known = [line[:3] if line[3] >= ENOUGH else [line[0], None, None] for _, line in own]
        grid.add_scatter(
            x=[s for s, _ in own],
            y=[line[0] for _, line in own],
            error_y=_spread(known, PALETTE[0]),
            mode="lines+markers",
            line={"color": PALETTE[0], "width": 2},
            name="emotion",
            legendgroup="emotion",
            showlegend=number == 0,
            text=[f"{line[3]} acts" for _, line in own],
            hovertemplate=f"{each['name']} %{{x:+g}}: %{{y:.2f}}, %{{text}}<extra></extra>",
            **where,
        )
        _strengths(grid, each["strengths"], panels=len(places), **where).update_xaxes(range=_room(each["strengths"]), **where)
    return grid.update_yaxes(rangemode="tozero").update_yaxes(title_text="per 100 words", col=1)


def _course(data: Mapping[str, Any]) -> go.Figure:
    """A panel for each emotion: readings from reply to reply, of episodes with the act and without."""
    from affectlens.figures import PALETTE

    names = [name for name, kinds in data["course"].items() if kinds]
    grid, places = _panels(names, height=240)
    for number, (name, where) in enumerate(zip(names, places, strict=True)):
        for kind, colour, dash in (("with the act", PALETTE[1], "solid"), ("without it", PALETTE[0], "dash")):
            own = data["course"][name].get(kind, [])
            if not own:
                continue
            x = [int(reply) + 1 for reply, *_ in own]
            _band(grid, x, [line[1:] for line in own], colour, **where)
            line = {"color": colour, "width": 2, "dash": dash}
            shown = {"name": kind, "legendgroup": kind, "showlegend": number == 0, "line": line, "mode": "lines+markers"}
            hover = f"{name}, reply %{{x}}, {kind}: %{{y:+.3g}}<extra></extra>"
            grid.add_scatter(x=x, y=[middle for _, middle, _, _ in own], hovertemplate=hover, **shown, **where)
    grid.update_xaxes(dtick=1)
    for where in places[-_ACROSS:]:  # the lowest of each column
        grid.update_xaxes(title_text="reply", **where)
    return grid.update_yaxes(title_text=data["unit"], col=1)


def _variants(data: Mapping[str, Any]) -> go.Figure:
    """A panel for each emotion: rates of every variant by strength, the baseline in the middle."""
    from affectlens.figures import SEQUENTIAL

    sweeps, names = data["sweeps"][ACT], data["variants"]["names"]
    grid, places = _panels([each["name"] for each in sweeps], height=100 + 24 * len(names))
    names = [f"{name} (control)" if name in data["variants"]["controls"] else name for name in names]
    for each, where in zip(sweeps, places, strict=True):
        rates = [[line[i] for i in each["arms"]] for line in data["variants"]["rates"]]
        grid.add_heatmap(
            z=rates,
            x=_labels(each["strengths"]),
            y=names,
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            text=[["" if rate is None else f"{100 * rate:.0f}" for rate in line] for line in rates],
            texttemplate="%{text}",
            textfont={"size": 10},
            hovertemplate=f"%{{y}}, {each['name']} %{{x}}: %{{z:.0%}}<extra></extra>",
            **where,
        )
        grid.update_xaxes(tickvals=_labels(_shown(each["strengths"], panels=len(places))), **where)
    bar = {"title": {"text": "rate", "side": "top"}, "thickness": 9, "outlinewidth": 0, "x": 1.01, "tickformat": ".0%"}
    grid.update_layout(coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": bar})
    grid.update_xaxes(type="category", showline=False, ticks="", tickangle=0, tickfont={"size": 10})
    return grid.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False, ticks="")


def _levels(levels: Sequence[Mapping[str, Any]]) -> go.Figure:
    """A row for each level: rates, coherence and refusals without steering."""
    from affectlens.figures import PALETTE, blank

    figure = blank(x="share of episodes without steering", height=130 + 42 * len(levels))
    series = (
        ("acts", PALETTE[0], "circle", -0.16),
        ("coherent", PALETTE[2], "square", 0.0),
        ("refused", PALETTE[3], "diamond", 0.16),
    )
    for key, colour, symbol, shift in series:
        figure.add_scatter(
            x=[each[key][0] for each in levels],
            y=[y + shift for y in range(len(levels))],
            error_x=_spread([each[key] for each in levels], colour),
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": symbol},
            name=key,
            text=[each["level"] for each in levels],
            hovertemplate=f"%{{text}}, {key}: %{{x:.1%}}<extra></extra>",
        )
    ticks = {"tickvals": list(range(len(levels))), "ticktext": [each["level"] for each in levels]}
    figure.update_yaxes(**ticks, showgrid=False, zeroline=False, range=[len(levels) - 0.4, -0.6])
    return figure.update_xaxes(tickformat=".0%", range=[-0.02, 1.02], showgrid=True)


def _panels(titles: Sequence[str], *, height: int) -> tuple[go.Figure, list[dict[str, int]]]:
    """A grid with one panel for each title, and where each is."""
    from affectlens.figures import panels

    across = min(_ACROSS, len(titles))
    down = -(-len(titles) // across)
    room = {"vertical_spacing": 64 / (40 + height * down) if down > 1 else 0.0, "horizontal_spacing": 0.05}
    grid = panels(titles, rows=down, columns=across, height=40 + height * down, shared_yaxes=True, **room)
    return grid, [{"row": i // across + 1, "col": i % across + 1} for i in range(len(titles))]


def _strengths(figure: go.Figure, strengths: Sequence[float], *, panels: int = 1, **where: Any) -> go.Figure:
    """Ticks at the strengths themselves."""
    shown = _shown(strengths, panels=panels)
    return figure.update_xaxes(tickvals=shown, ticktext=_labels(shown), tickangle=0, **where)


def _shown(strengths: Sequence[float], *, panels: int) -> list[float]:
    """Which of the strengths are named: at most nine; in one of several panels, which are narrow on a phone, the lowest, the
    highest, and the baseline or else the middle one."""
    if panels == 1:
        return list(strengths[:: -(-len(strengths) // 9)])
    inner = 0.0 if 0.0 in strengths else strengths[len(strengths) // 2]
    return sorted({strengths[0], inner, strengths[-1]})


def _labels(strengths: Sequence[float]) -> list[str]:
    return [f"{s:+g}".replace("-", "−") if s else "0" for s in strengths]


def _room(strengths: Sequence[float]) -> list[float]:
    """The whole range, also where some strengths have no act."""
    edge = 0.06 * (strengths[-1] - strengths[0])
    return [strengths[0] - edge, strengths[-1] + edge]


def _spread(each: Sequence[Sequence[float]], colour: str | None) -> dict[str, Any]:
    """Intervals as error bars; those that are not known are left out."""
    ends = {
        "array": [_or(high, value) - value if _finite(value) else 0.0 for value, _, high in each],
        "arrayminus": [value - _or(low, value) if _finite(value) else 0.0 for value, low, _ in each],
    }
    own = {"color": colour} if colour else {}
    return {"type": "data", "symmetric": False, "thickness": 1.4, "width": 3, **ends, **own}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _or(value: float | None, other: float) -> float:
    return other if value is None or not math.isfinite(value) else value
