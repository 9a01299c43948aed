"""What a tally shows: figures, tables and checks of the report on a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from affectlens.conversations import STRETCH
from affectlens.curation.regulation import (
    CALM,
    COMPOSURE,
    COURSE,
    FEW,
    GRID,
    LEAST,
    LEVELS,
    NAME,
    PEAK,
    WITHIN,
    Tally,
    curve,
)
from affectlens.curation.selection import effective
from affectlens.figures import GREY, PALETTE, SEQUENTIAL, blank, to_figure
from affectlens.stats import Estimate, wilson
from affectlens.studies import Figure, Table

MANY = 1000
"""With fewer documents the cells of valence and arousal are drawn twice as wide."""
_USUAL = {"font": {"size": 11, "color": GREY}, "showarrow": False}


def checks(tally: Tally, what: str, *, filtered: str | None) -> list[dict[str, Any]]:
    """What became of the rows: for every one that was not read whole and as it is, a line."""
    facts, n = tally.facts, tally.facts["rows"]
    found = []

    def check(name: str, count: int, detail: str, status: str = "") -> None:
        found.append(
            {"name": name, "status": status or ("warn" if count else "ok"), "value": f"{count:,} of {n:,}", "detail": detail}
        )

    read = n - facts["empty"] - facts["unread"]
    check(f"{what} read", read, f"{facts['tokens']:,} tokens, in {facts['windows']:,} windows", "ok" if 2 * read >= n else "warn")
    detail = "longer than a window: read in several, whole; no word sees what stood in the windows before its own"
    check("cut into windows", facts["cut"], detail, "ok")
    check("without words", facts["empty"], "null, empty or white space: kept without scores", "ok")
    if what != "texts":
        check("without a word of an assistant", facts["unspoken"], "turns have scores, the conversation has none")
    for reason, count in tally.left_out.items():
        check("not read", count, reason)
    if filtered is not None:
        check("kept", facts["kept"], f"{n - facts['kept']:,} dropped, by the filter: {filtered}", "ok")
    return found


def tables(tally: Tally, what: str, *, filtered: str | None) -> list[Table]:
    """Families, levels, the highest documents, and what filter and weights leave."""
    made = []
    if shares := tally.shares():
        rows = tuple(
            (name, e.value, _ends(e), f"{null.low:.1f} to {null.high:.1f}", null.p, q, e.n) for name, e, null, q in shares
        )
        caption = (
            f"Share of the {what} in which the mean score of the family is the highest; chance: names of emotions exchanged "
            "between families of the same sizes; q: p corrected for the number of families."
        )
        head = ("family", "%", "95 % interval", "chance (95 %)", "p", "q", "n")
        made.append(Table(f"{NAME}-families", "Families that prevail", caption, head, rows))
    rows_of_means = tuple((name, e.value, _ends(e, 3), deviation, e.n) for name, e, deviation in tally.means())
    if rows_of_means:
        caption = (
            "Mean over documents with its interval, in standard deviations of ordinary text (z), where 0 is usual; valence "
            "and arousal in z for each unit of human rating."
        )
        made.append(
            Table(f"{NAME}-levels", "Levels", caption, ("measure", "mean", "95 % interval", "deviation", "n"), rows_of_means)
        )
    best = [(name, *found) for name, found in zip(tally.measures.families, tally.highest, strict=True) if found]
    if best:
        rows_of_best = tuple((name, round(score, 2), row, words) for name, score, row, words in best)
        caption = "For each family the document with the highest mean score, by its row in the dataset, counted from 0."
        made.append(Table(f"{NAME}-highest", "Highest documents", caption, ("family", "score", "row", "begins"), rows_of_best))
    kept: list[tuple[Any, ...]] = []
    if filtered is not None:
        e = wilson(tally.facts["kept"], tally.facts["rows"])
        kept.append(("kept by the filter", f"{100 * e.value:.1f} %", f"{100 * e.low:.1f} to {100 * e.high:.1f}", e.n))
    n, total, squares = tally.weights.tolist()
    if n:
        share = 100 * effective(total, squares) / n
        kept.append(("effective share under the weights (Kish)", f"{share:.1f} %", "–", int(n)))
        kept.append(("mean weight, to divide by", f"{total / n:.4g}", "–", int(n)))
    if kept:
        caption = "What the filter and the weights leave; the interval is that of the rate in other data of the kind."
        made.append(Table(f"{NAME}-selection", "Selection", caption, ("", "value", "95 % interval", "n"), tuple(kept)))
    return made


def _ends(e: Estimate, decimals: int = 1) -> str:
    return f"{e.low:.{decimals}f} to {e.high:.{decimals}f}"


def figures(tally: Tally) -> list[Figure]:
    """Whatever there is enough data for."""
    drawn = [_families(tally), _plane(tally), _course(tally), _peak(tally), _replies(tally)]
    return [figure for figure in drawn if figure is not None]


def _families(tally: Tally) -> Figure | None:
    shares = tally.shares()[::-1]
    if not shares:
        return None
    names = [name for name, _, _, _ in shares]
    figure = blank(x="documents, %", height=120 + 30 * len(names))
    figure.add_bar(
        y=names, x=[null.high - null.low for _, _, null, _ in shares], base=[null.low for _, _, null, _ in shares],
        orientation="h", name="95 % under chance", marker={"color": GREY, "opacity": 0.25}, width=0.84, hoverinfo="skip",
    )  # fmt: skip
    figure.add_bar(
        y=names, x=[e.value for _, e, _, _ in shares], orientation="h", name="documents", marker={"color": PALETTE[0]}, width=0.4,
        error_x={
            "type": "data", "symmetric": False, "array": [e.high - e.value for _, e, _, _ in shares],
            "arrayminus": [e.value - e.low for _, e, _, _ in shares], "thickness": 1.4, "width": 3, "color": GREY,
        },
        customdata=[f"{e}<br>{null}" for _, e, null, _ in shares], hovertemplate="%{y}<br>%{customdata}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(barmode="overlay", yaxis_ticklabelstandoff=6)
    figure.update_yaxes(showgrid=False, zeroline=False, ticks="").update_xaxes(showgrid=True, rangemode="tozero")
    n = int(tally.family.sum())
    caption = (
        f"Share of {n:,} documents in which each family of emotions has the highest mean score, with 95 % intervals (Wilson). "
        "Grey: what 95 % of exchanges of names between families of the same sizes give."
    )
    return to_figure(f"{NAME}-families", "Families that prevail", caption, figure)


def _plane(tally: Tally) -> Figure | None:
    counts = tally.plane
    n = int(counts.sum())
    if n < FEW:
        return None
    edges = GRID
    if n < MANY:  # cells twice as wide, each of four; the outermost rows and columns stay
        inner = counts[1:-1].reshape(-1, 2, counts.shape[1]).sum(axis=1)
        counts = np.vstack([counts[:1], inner, counts[-1:]])
        inner = counts[:, 1:-1].reshape(len(counts), -1, 2).sum(axis=2)
        counts, edges = np.hstack([counts[:, :1], inner, counts[:, -1:]]), GRID[::2]
    step = float(edges[1] - edges[0])
    places = np.concatenate([[edges[0] - step / 2], (edges[:-1] + edges[1:]) / 2, [edges[-1] + step / 2]])
    rows, columns = np.flatnonzero(counts.any(axis=1)), np.flatnonzero(counts.any(axis=0))
    ends = {"y": (places[rows[0]], places[rows[-1]]), "x": (places[columns[0]], places[columns[-1]])}
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    shown = np.where(counts[window] > 0, counts[window], np.nan)
    figure = blank(x="valence", y="arousal", height=420)
    bar = {"title": {"text": "documents", "side": "top"}, "thickness": 9, "outlinewidth": 0, "len": 1, "x": 1.01}
    bar["dtick"] = -(-int(counts.max()) // 5)
    x, y = places[columns[0] : columns[-1] + 1].round(3), places[rows[0] : rows[-1] + 1].round(3)
    figure.add_heatmap(
        z=shown, x=x, y=y, coloraxis="coloraxis",
        hovertemplate="valence %{x:.2f}, arousal %{y:.2f}<br>%{z} documents<extra></extra>", hoverongaps=False,
    )  # fmt: skip
    scale = [(0.0, "#cfdeef"), *SEQUENTIAL[1:]]
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": 0, "cmax": int(counts.max()), "colorbar": bar})
    for axis, update in (("x", figure.update_xaxes), ("y", figure.update_yaxes)):
        low, high = min(ends[axis][0], 0.0), max(ends[axis][1], 0.0)
        update(range=[low - 3 * step, high + 3 * step], zeroline=False, showgrid=True)
    usual = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_hline(y=0, line=usual).add_vline(x=0, line=usual)
    caption = (
        f"{n:,} documents by the valence and arousal of their mean scores (z for each unit of human rating, least squares over "
        "the rated words). Dotted: the usual level of the baseline; what lies beyond 4 is counted at the edge."
    )
    return to_figure(f"{NAME}-plane", "Valence and arousal", caption, figure)


def _course(tally: Tally) -> Figure | None:
    most = int(tally.course[:, :, 0].max())
    if most < FEW:
        return None
    figure = blank(x="part of the document, %", y="z", height=360)
    at = (np.arange(COURSE) + 0.5) * 100 / COURSE
    for number, name in enumerate(("distress", "composure", "arousal")):
        if tally.course[0, number, 0] >= FEW:
            _line(figure, at, tally.course[:, number], name, number)
    caption = (
        f"Mean over up to {most:,} documents of {2 * COURSE} tokens or more, in {COURSE} parts of equal length; bands: 95 % "
        "interval over documents. 0 is the usual level."
    )
    return to_figure(f"{NAME}-course", "From the first word to the last", caption, figure)


def _peak(tally: Tally) -> Figure | None:
    n = int(tally.returns.sum())
    if n < FEW:
        return None
    sums = np.column_stack([np.full(len(tally.around), float(n)), tally.around])
    at = np.arange(-WITHIN, WITHIN + 1)
    figure = blank(x="tokens from the peak", y="distress, z", height=360)
    _line(figure, at, sums, "as it is", 0)
    mean, _, _ = curve(sums)
    figure.add_scatter(
        x=at, y=mean[::-1].round(4), mode="lines", name="read backwards", line={"color": GREY, "width": 1.6, "dash": "dash"},
        hovertemplate="%{x} tokens<br>backwards %{y:.2f}<extra></extra>",
    )  # fmt: skip
    for level, text in ((CALM, "calm"), (PEAK, "peak")):
        figure.add_hline(y=level, line={"color": GREY, "width": 1, "dash": "dot"})
        figure.add_annotation(**_USUAL, text=text, xref="paper", x=1, xanchor="right", y=level, yanchor="bottom", yshift=1)
    after, before = int(tally.returns[1].sum()), int(tally.returns[:, 1].sum())
    caption = (
        f"Mean distress over {STRETCH} tokens around the highest stretch of {n:,} documents with {WITHIN} tokens on both "
        f"sides; band: 95 % interval. {100 * after / n:.0f} % are calm again within {WITHIN} tokens, {100 * before / n:.0f} % "
        f"were within {WITHIN} tokens before. The curve that is read backwards shows what comes down merely because it was a "
        "peak."
    )
    return to_figure(f"{NAME}-peak", "Around the peak of distress", caption, figure)


def _replies(tally: Tally) -> Figure | None:
    sums = tally.levels
    known = sums[:, 0, 0] >= LEAST
    if sums[:, 0, 0].sum() < FEW or known.sum() < 2:
        return None
    step = LEVELS[1] - LEVELS[0]
    at = np.concatenate([[LEVELS[0] - step / 2], (LEVELS[:-1] + LEVELS[1:]) / 2, [LEVELS[-1] + step / 2]])
    figure = blank(x="distress of the user's turn, z", y="the reply to it, z", height=360)
    for number, name in enumerate(("distress", "composure")):
        mean, low, high = curve(sums[known, number])
        bars = {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "thickness": 1.2, "width": 3}
        figure.add_scatter(
            x=at[known] + (number - 0.5) * step / 8, y=mean, mode="lines+markers", name=f"{name} of the reply",
            line={"color": PALETTE[number], "width": 2, "dash": ("solid", "dash")[number]},
            marker={"symbol": ("circle", "square")[number], "size": 8}, error_y=bars,
            customdata=sums[known, number, 0].astype(int),
            hovertemplate="%{y:.2f}<br>n = %{customdata}<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=PEAK, line={"color": GREY, "width": 1, "dash": "dot"})
    figure.add_annotation(**_USUAL, text="distressed", x=PEAK, xanchor="left", xshift=3, yref="paper", y=0, yanchor="bottom")
    caption = (
        f"Mean distress and composure ({COMPOSURE}) of {int(sums[:, 0, 0].sum()):,} replies, by the distress of the user's "
        "turn before; bars: 95 % interval over turns, which overlooks that turns of one dialogue are alike. z of each speaker "
        "against that speaker."
    )
    return to_figure(f"{NAME}-replies", "What distress is met with", caption, figure)


def _line(figure: go.Figure, at: np.ndarray, sums: np.ndarray, name: str, number: int) -> None:
    mean, low, high = curve(sums)
    colour = PALETTE[number]
    figure.add_scatter(
        x=[*at, *at[::-1]], y=[*high.round(4), *low[::-1].round(4)], mode="lines", fill="toself", fillcolor=colour, opacity=0.18,
        line={"width": 0}, hoverinfo="skip", showlegend=False, name=f"{name}, interval",
    )  # fmt: skip
    figure.add_scatter(
        x=at, y=mean.round(4), mode="lines", name=name,
        line={"color": colour, "width": 2, "dash": ("solid", "dash", "dot")[number]},
        hovertemplate=f"%{{x}}<br>{name} %{{y:.2f}}<extra></extra>",
    )  # fmt: skip
