"""Tables, plain data and figures of :mod:`affectlens.studies.reply`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.studies import Bench, Figure, Table
from affectlens.studies.reply.measured import FEW, SAMPLES, SIX, Measured, Read, mean_reply

WORDS = {"statement": "end of the statement", "last": "user's last token", "reply": "reply position", "said": "what is said"}
"""What the places are called."""
PAIRS = (
    # reading, other reading, published value of the plain correlation (that of a reply in context)
    ("statement", "reply", "0.11"),
    ("last", "reply", None),
    ("statement", "last", None),
    ("reply", "said", "0.87"),
    ("statement", "said", "0.59"),
    ("last", "said", None),
)


def correlations(every: Measured, plain: Measured | None) -> Table:
    def cell(measured: Measured | None, one: str, other: str) -> str:
        if measured is None or len(measured.pair(one, other)[0]) < FEW:
            return "–"
        estimate = measured.r(one, other)
        return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"

    rows = []
    for one, other, published in PAIRS:
        inside = "context" if other == "said" else other
        alone = cell(every, one, "alone") if other == "said" else "–"
        rows.append((WORDS[one], WORDS[other], cell(plain, one, inside), published or "–", cell(every, one, inside), alone))
    n = every.places["reply"].shape[1]
    caption = (
        "Correlations over messages and probes with intervals over messages. Plain: nothing is removed, the paper's six probes. "
        f"Centred: each probe's mean over messages is removed, {n} probes. Replies are read in their context, as published, and "
        "alone, where nothing that the stream carries over can help."
    )
    head = ("reading", "other reading", "plain", "published (plain)", "centred", "centred, reply alone")
    return Table("correlations", "User, reply position and reply", caption, head, tuple(rows))


def messages(bench: Bench, records: list[dict[str, Any]], found: Read) -> Table:
    def top(scores: np.ndarray) -> list[str]:
        """The three highest of each message, each probe's mean over messages removed."""
        moved = _centred(scores)
        best = np.argsort(-moved, axis=1)[:, :3]
        return [
            ", ".join(bench.vectors.names[i] for i in row) if np.isfinite(line).all() else "–"
            for row, line in zip(best, moved, strict=True)
        ]

    tops = (top(scores) for scores in (found.places["statement"], found.places["reply"], mean_reply(found.alone)))
    columns = zip(records, *tops, found.texts, strict=True)
    rows = tuple((r["text"], r["user"], u, r["reply"], a, s, next(filter(None, texts), "–")) for r, u, a, s, texts in columns)
    caption = (
        "What the user feels and a good reply conveys (our judgement), the three highest centred readings of all emotions at the "
        f"end of the statement, at the reply position and over {SAMPLES} replies read alone, and one of the replies."
    )
    head = ("message", "felt", "statement", "good reply", "reply position", "what is said", "one reply")
    return Table("messages", f"Each message at layer {bench.vectors.layer}", caption, head, rows)


def data(
    bench: Bench, found: Read, names: tuple[str, ...], felt: np.ndarray, due: np.ndarray, every: Measured, six: tuple[str, ...]
) -> dict[str, Any]:
    rows = np.arange(len(felt))
    shown = list(six) if len(six) == len(SIX) else list(names[: len(SIX)])
    few = Measured(bench, found, shown, centred=True)
    tables = {place: few.tables[key] for place, key in (("statement", "statement"), ("reply", "reply"), ("said", "alone"))}
    enough = bool(every.answered.sum() >= FEW)
    # How far the two emotions of a message read above what each reads on average, at every place.
    levels: dict[str, list[list[float | None]]] = {"user": [], "reply": []}
    places = ["statement", "last", "reply", *(["said"] if enough else [])]
    for place in places:
        table = every.tables["alone" if place == "said" else place]
        has = np.isfinite(table).all(axis=1)
        table = _centred(table)
        both = np.column_stack([table[rows, own][has] for own in (felt, due)])
        for side, mean in zip(levels, every.means(both), strict=True):
            levels[side].append(_round((mean.value, mean.low, mean.high)))
    rise = found.places["reply"] - found.places["statement"]
    return {
        "layer": bench.vectors.layer,
        "names": shown,
        "points": {place: [_round(line) for line in _centred(table)] for place, table in tables.items()},
        "places": places,
        "levels": levels,
        "probes": _per_probe(every, names) if enough else [],
        "rise": {"names": list(bench.vectors.names), "values": _round(rise.mean(axis=0))},
    }


def _centred(table: np.ndarray) -> np.ndarray:
    """Each column without its mean over the rows that have values."""
    has = np.isfinite(table).all(axis=1)
    return table - table[has].mean(axis=0) if has.any() else table


def _per_probe(every: Measured, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each probe the correlations with what is said, from the reply position and from the statement, over messages."""
    before, at, said = (
        table[every.answered] for table in (every.places["statement"], every.places["reply"], every.tables["alone"])
    )

    def each(rows: np.ndarray) -> np.ndarray:
        x = np.concatenate([at[rows], before[rows]], axis=1)
        y = np.concatenate([said[rows]] * 2, axis=1)
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        return np.asarray((x * y).sum(axis=0) / np.maximum(np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0)), 1e-30))

    each_r = stats.bootstrap_each(each, len(at), **every.options)
    return [
        {"name": name, "reply": _round((r.value, r.low, r.high)), "statement": _round((s.value, s.low, s.high))}
        for name, r, s in zip(names, each_r[: len(names)], each_r[len(names) :], strict=True)
    ]


def raw(bench: Bench, records: list[dict[str, Any]], found: Read) -> dict[str, dict[str, Any]]:
    ids, names, m = [record["id"] for record in records], bench.vectors.names, len(records)
    places = ("statement", "last", "reply")
    stacked = np.concatenate([found.places[place] for place in places])
    several = [id for id in ids for _ in range(SAMPLES)]
    replies = {"id": several, "sample": list(range(SAMPLES)) * m, "text": [text for texts in found.texts for text in texts]}
    wide = {"context": found.context.reshape(m * SAMPLES, -1), "alone": found.alone.reshape(m * SAMPLES, -1)}
    return {
        "positions": {
            "id": ids * len(places),
            "place": [place for place in places for _ in ids],
            "user": [record["user"] for record in records] * len(places),
            "reply": [record["reply"] for record in records] * len(places),
            **{name: stacked[:, i] for i, name in enumerate(names)},
        },
        "replies": {
            **replies,
            **{f"{name}, {how}": scores[:, i] for how, scores in wide.items() for i, name in enumerate(names)},
        },
    }


def _round(values: Any) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """The figures of an outcome's data, those left out for which there was too little to measure."""
    from affectlens.figures import to_figure

    layer = data["layer"]
    drawn = [
        to_figure(
            "readings",
            f"From the user's words to the reply, layer {layer}",
            "Centred cosine (each probe's mean over messages removed) of the emotion that the user feels and of the one that a "
            "good reply conveys: mean over messages with 95 % interval. What is said is read alone.",
            _draw_readings(data),
        ),
        to_figure(
            "positions",
            "Statement against reply position",
            "One point for each message and probe, centred cosine. On the line both positions read alike.",
            _draw_points(data, ("statement",), "reply", 420),
        ),
    ]
    if data["probes"]:
        drawn.append(
            to_figure(
                "said",
                "What predicts the reply",
                "The mean reading over the replies, read alone, against the reading at the reply position (left) and at the end "
                "of the statement (right): one point for each message and probe, centred cosine.",
                _draw_points(data, ("reply", "statement"), "said", 420),
            )
        )
        drawn.append(
            to_figure(
                "probes",
                "Each emotion apart",
                "Correlation over messages with what is said, read alone, from the reply position and from the statement; bars: "
                "95 % interval over messages for the reply position.",
                _draw_probes(data["probes"]),
            )
        )
    if "loving" in data["rise"]["names"]:
        drawn.append(
            to_figure(
                "rise",
                "What rises at the reply position",
                "Mean change of the plain cosine from the end of the statement to the reply position: one tick for each emotion.",
                _draw_rise(data["rise"]),
            )
        )
    return drawn


def _draw_readings(data: Mapping[str, Any]) -> Any:
    from affectlens.figures import GREY, PALETTE, blank

    figure = blank(y="centred cosine", height=340)
    labels = ["<br>of the".join(WORDS[place].split(" of the")) for place in data["places"]]
    for number, (side, name) in enumerate((("user", "the user's emotion"), ("reply", "emotion of a good reply"))):
        value, low, high = (np.array(column, dtype=float) for column in zip(*data["levels"][side], strict=True))
        figure.add_scatter(
            x=np.arange(len(labels)) + 0.06 * (2 * number - 1),
            y=value,
            error_y={"type": "data", "array": high - value, "arrayminus": value - low, "thickness": 1.5, "width": 4},
            mode="lines+markers",
            name=name,
            marker={"color": PALETTE[number], "symbol": ("circle", "square")[number], "size": 9},
            line={"color": PALETTE[number], "dash": ("solid", "dash")[number], "width": 1.5},
            hovertemplate=f"{name}<br>%{{y:.4f}}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, range=[-0.4, len(labels) - 0.6])
    return figure


def _draw_points(data: Mapping[str, Any], across: Sequence[str], up: str, height: int) -> Any:
    """Panels side by side, each with a point for every message and probe."""
    from affectlens.figures import GREY, PALETTE, blank

    figure = blank(height=height, wide=len(across) > 1)
    gap, n = 0.1, len(across)
    width = (1 - gap * (n - 1)) / n
    symbols = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
    for panel, place in enumerate(across):
        axis = "" if panel == 0 else str(panel + 1)
        for number, name in enumerate(data["names"]):
            figure.add_scatter(
                x=[line[number] for line in data["points"][place]],
                y=[line[number] for line in data["points"][up]],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=panel == 0,
                marker={"color": PALETTE[number], "symbol": symbols[number], "size": 7, "opacity": 0.8},
                xaxis=f"x{axis}",
                yaxis=f"y{axis}",
                hovertemplate=f"{name}<br>%{{x:.3f}}, %{{y:.3f}}<extra></extra>",
            )
        start = panel * (width + gap)
        template = {"domain": [start, start + width], "anchor": f"y{axis}", "title": {"text": WORDS[place]}, "zeroline": True}
        figure.layout[f"xaxis{axis}"] = template
        figure.layout[f"yaxis{axis}"] = {
            "anchor": f"x{axis}",
            "title": {"text": WORDS[up] if panel == 0 else ""},
            **({"matches": "y"} if panel else {}),
        }
    if up != "said":
        every = [value for place in (*across, up) for line in data["points"][place] for value in line if value is not None]
        ends = [min(every), max(every)]
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line={"color": GREY, "width": 1, "dash": "dot"}, hoverinfo="skip", showlegend=False
        )
    return figure


def _draw_probes(probes: Sequence[Mapping[str, Any]]) -> Any:
    from affectlens.figures import GREY, PALETTE, blank

    probes = sorted(probes, key=lambda probe: probe["reply"][0] or 0)
    names = [probe["name"] for probe in probes]
    figure = blank(x="correlation with what is said", height=120 + 17 * len(names))
    value, low, high = (np.array(column, dtype=float) for column in zip(*(probe["reply"] for probe in probes), strict=True))
    figure.add_scatter(
        x=[probe["statement"][0] for probe in probes],
        y=names,
        mode="markers",
        name="from the statement",
        marker={"color": PALETTE[1], "symbol": "square-open", "size": 8, "line": {"width": 1.5}},
        hovertemplate="%{y}, from the statement %{x:.2f}<extra></extra>",
    )
    figure.add_scatter(
        x=value,
        y=names,
        error_x={"type": "data", "array": high - value, "arrayminus": value - low, "thickness": 1.2, "width": 0},
        mode="markers",
        name="from the reply position",
        marker={"color": PALETTE[0], "symbol": "circle", "size": 8},
        hovertemplate="%{y}, from the reply position %{x:.2f}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    figure.update_yaxes(type="category", dtick=1, zeroline=False, range=[-0.7, len(names) - 0.3])
    return figure


def _draw_rise(rise: Mapping[str, Any]) -> Any:
    from affectlens.figures import GREY, PALETTE, blank

    figure = blank(x="change of the plain cosine", height=200)
    own = rise["names"].index("loving")
    for names, values, colour, size in (
        (rise["names"], rise["values"], GREY, 16),
        (["loving"], [rise["values"][own]], PALETTE[1], 30),
    ):
        figure.add_scatter(
            x=values,
            y=[0] * len(values),
            mode="markers",
            text=names,
            marker={"symbol": "line-ns", "size": size, "line": {"color": colour, "width": 1.5 if colour == GREY else 3}},
            hovertemplate="%{text} %{x:.4f}<extra></extra>",
            showlegend=False,
        )
    figure.add_annotation(
        x=rise["values"][own], y=0, yshift=28, text="loving", showarrow=False, font={"color": PALETTE[1], "size": 13}
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1, "dash": "dot"})
    figure.update_yaxes(visible=False, range=[-1, 1])
    return figure
