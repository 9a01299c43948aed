"""Tables of ``bench/gpu.py`` as Markdown, and the figures that they and ``bench/targets.py`` take from its result."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from speed_tables import packages, spread, table, when

JUDGED = 32
"""The batch size at which the cost of steering and monitoring has a target."""

LIKE = {"plain": "generate", "static": "generate", "graph": "static"}
"""Ways whose replies should have the same tokens as those of others, but for the rounding of other kernels."""


def models(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Card, name and figures of every model that was measured."""
    for card, own in result["cards"].items():
        for name, model in own["models"].items():
            yield card, name, model


def reading_share(model: dict[str, Any]) -> float | None:
    """The share of the bound at which affectlens reads."""
    reading = model.get("reading")
    return reading and reading["tokens"] / statistics.median(reading["ways"]["ours"]["seconds"]) / reading["bound"]


def cost(model: dict[str, Any], way: str, batch: int) -> float | None:
    """The time of a way over that of the plain one of its kind, minus one."""
    ways = model.get("generation", {}).get("ways", {})
    plain = "graph" if way.startswith("graph") else "plain"
    times = [ways.get(key, {"seconds": {}})["seconds"].get(str(batch)) for key in (way, plain)]
    return statistics.median(times[0]) / statistics.median(times[1]) - 1 if times[0] and times[1] else None


def why_reading(model: dict[str, Any]) -> str:
    """Where the rest of the time goes."""
    reading = model["reading"]
    seconds = statistics.median(reading["ways"]["ours"]["seconds"])
    return f"tokens and layouts of the texts alone take {reading['layouts'] / seconds:.0%} of the time"


def why_cost(model: dict[str, Any], kind: str = "") -> str:
    """What steering and monitoring cost alone, in the engine or (``graph-``) inside a graph."""
    shares = {"steering": cost(model, f"{kind}steer", JUDGED), "monitoring": cost(model, f"{kind}read", JUDGED)}
    return ", ".join(f"{what} alone {share:+.1%}" for what, share in shares.items() if share is not None)


def tables(result: dict[str, Any]) -> str:
    """The tables of every card and model, as Markdown."""
    parts = []
    for card, own in result["cards"].items():
        parts.append(f"**{card}**, {own['memory_gb']:.0f} GB. {when(own)} Random weights in {own['dtype']}. {packages(own)}.")
        parts += [_of_model(name, model) for name, model in own["models"].items()]
    return "\n\n".join(parts)


def _of_model(name: str, model: dict[str, Any]) -> str:
    lines = [
        f"{name} ({model['parameters'] / 1e9:.1f} billion parameters, {model['shape']['layers']} layers): matrix-multiply peak "
        f"{model['peak_tflops']:.0f} TFLOP/s."
    ]
    if reading := model.get("reading"):
        loop = statistics.median(reading["ways"]["loop"]["seconds"])
        lines += [
            "",
            f"Reading layer {model['shape']['layer']} of {reading['texts']} texts ({reading['tokens']:,} tokens); the bound is "
            f"{reading['bound']:,.0f} tokens/s; means alike to a cosine of {reading['cosine']:.4f}.",
            "",
        ]
        rows = []
        for way in reading["ways"].values():
            speeds = [reading["tokens"] / seconds for seconds in way["seconds"]]
            times, share = loop / statistics.median(way["seconds"]), statistics.median(speeds) / reading["bound"]
            rows.append([way["label"], spread(speeds), f"{times:.2f}", f"{share:.0%}", _gb(way["memory_gb"])])
        lines += table(["way", "tokens/s (range)", "× loop", "% of bound", "GB above the model"], rows)
    if generation := model.get("generation"):
        batches = list(generation["ways"]["plain"]["seconds"])
        heads = [head for batch in batches for head in (f"batch {batch}: tokens/s", "time over plain", "GB above the model")]
        cut = f" {generation['cut'].capitalize()}." if "cut" in generation else ""
        lines += [
            "",
            f"{generation['tokens']} new tokens behind {generation['prompt']}, greedy; steering and emotions at layer "
            f"{generation['layer']}.{cut}",
            "",
        ]
        rows = []
        for key, way in generation["ways"].items():
            cells = [way["label"]]
            for batch in batches:
                if not (times := way["seconds"].get(batch)):
                    cells += [f"failed: {way['problems'].get(batch, 'not run')[:60]}", "–", "–"]
                    continue
                over = cost(model, key, int(batch)) if key not in ("generate", "static", "plain", "graph") else None
                rate = int(batch) * generation["tokens"] / statistics.median(times)
                cells += [f"{rate:,.0f}", "" if over is None else f"{over:+.1%}", _gb(way["memory_gb"][batch])]
            shares = ", ".join(f"{share:.0%}" for share in way["same"].values())
            cells.append(f"`{LIKE[key]}`: {shares}" if shares else "–")
            rows.append(cells)
        lines += table(["way", *heads, "same tokens as"], rows)
    return "\n".join(lines)


def _gb(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
