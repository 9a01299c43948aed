"""Targets of speed as data, each held against the stored results, with the profile's explanation where one is missed.

Limits were set before anything was measured against them. What is measured comes from ``bench/results``, and so does every number
of an explanation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gpu_tables as gpu
from speed_tables import (
    MONITORING_TARGETS,
    Reading,
    Result,
    monitoring_costs,
    pairs_times,
    percent,
    serving_costs,
    serving_rate,
    table,
)

Results = dict[str, Result]


@dataclass(frozen=True)
class Found:
    """What was measured against a target.

    Args:
        value: In the target's unit (shares as numbers between 0 and 1).
        where: At which of several places the target holds (a batch size, a card); nothing where there is only one.
        shown: How the table says it, where that is not the value alone.
        open: The value's interval holds the limit: it could lie on either side.
    """

    value: float
    where: str = ""
    shown: str = ""
    open: bool = False


@dataclass(frozen=True)
class Target:
    """One thing that is wanted.

    Args:
        benchmark: Whose result it is held against.
        what: In words.
        sign: ``≥``, ``≤`` or ``<``.
        limit: What it may be at least or at most.
        unit: ``×`` or ``%``.
        found: What was measured, once for each place; nothing where the result does not tell.
        why: The explanation of a miss, from all results.
    """

    benchmark: str
    what: str
    sign: str
    limit: float
    unit: str
    found: Callable[[Result], list[Found]]
    why: Callable[[Results, Found], str]

    def met(self, found: Found) -> bool:
        return {"≥": found.value >= self.limit, "≤": found.value <= self.limit, "<": found.value < self.limit}[self.sign]

    def said(self, value: float) -> str:
        factor, unit = (100, "%") if self.unit == "%" else (1, "×")
        # As many digits as tell it from the limit: 59.96 is not 60.
        digits = next((n for n in range(3, 9) if f"{factor * value:.{n}g}" != f"{factor * self.limit:.{n}g}"), 3)
        return f"{factor * value:.{digits}g} {unit}"


# ── what was measured ──


def _reading(of: Callable[[Reading], float | None]) -> Callable[[Result], list[Found]]:
    def found(result: Result) -> list[Found]:
        reading = Reading.of(result)
        value = None if reading.ours is None else of(reading)
        return [] if value is None else [Found(value)]

    return found


def _share_of_bound(reading: Reading) -> float | None:
    return reading.speed[str(reading.ours), "one"] / reading.bound["one"]


def _memory(reading: Reading) -> float | None:
    pair = [reading.memory.get((str(key), "one")) for key in (reading.ours, reading.loop)]
    return pair[0] / pair[1] if pair[0] is not None and pair[1] else None


def _generation(result: Result) -> list[Found]:
    """The faster of our ways whose outputs are equal to those of one at a time, in float32."""
    equal = [key for key in ("run", "session") if result["ways"][key]["exact"] == result["compared in float32"]]
    if not equal or not result["rounds"]:
        return []
    seconds = {key: statistics.median(entry[key] for entry in result["rounds"]) for key in ("one", *equal)}
    best = min(equal, key=lambda key: seconds[key])
    return [Found(seconds["one"] / seconds[best])]


def _monitoring(way: str, limit: float) -> Callable[[Result], list[Found]]:
    def found(result: Result) -> list[Found]:
        costs = {batch: cost for (_, batch), cost in monitoring_costs(result, way).items()}
        return [
            Found(cost.value, f"batch {batch}", percent(cost), cost.low <= limit <= cost.high) for batch, cost in costs.items()
        ]

    return found


def _serving(result: Result) -> list[Found]:
    loop, ours = (serving_rate(result, way, SERVING_CALLERS) for way in ("loop", "everything"))
    return [Found(ours / loop)] if loop and ours else []


def _passes(result: Result) -> list[Found]:
    return [
        Found(cost.value, f"{n} at a time", percent(cost), cost.low <= PASSES_COST <= cost.high)
        for n, cost in serving_costs(result).items()
    ]


def _gpu(of: Callable[[Any], float | None]) -> Callable[[Result], list[Found]]:
    def found(result: Result) -> list[Found]:
        each = [(f"{name} on {card}", of(model)) for card, name, model in gpu.models(result)]
        return [Found(value, where) for where, value in each if value is not None]

    return found


# ── why one is missed ──


def _why_reading(results: Results, _: Found) -> str:
    said, result, profile = [], results["extraction"], results.get("profile_reading")
    if profile and profile["machine"]["processor"] == result["machine"]["processor"]:
        fastest = max(profile["ways"].values(), key=lambda way: way["tokens a second"])
        parts = {key: share for key, (_, share) in fastest["parts"].items()}
        fast = fastest["multiplying_tflops"] / profile["peak_tflops"]
        others = [f"{fastest['parts'][key][0]} {share:.0%}" for key, share in parts.items() if key not in ("projections", "mlp")]
        said.append(
            f"matrix products are {parts['projections'] + parts['mlp']:.0%} of the time and run at {fast:.0%} of the peak; "
            f"the rest: {', '.join(others)}"
        )
    else:
        said.append("there is no profile of that machine")
    reading = Reading.of(result)
    limits = [
        f"{reading.bound['one'] / reading.speed[key, 'one']:.2f} × over {name}"
        for name, key in (("the ordinary loop", reading.loop), ("the best of all others", reading.best_peer))
        if key is not None and (key, "one") in reading.speed
    ]
    said.append(f"at the bound itself it would be {' and '.join(limits)}")
    return "; ".join(said)


def _why_memory(results: Results, _: Found) -> str:
    reading = Reading.of(results["extraction"])
    ours, loop = (reading.memory[str(key), "one"] for key in (reading.ours, reading.loop))
    said = f"{ours:,.0f} MB against {loop:,.0f} MB above the model"
    profile = results.get("profile_reading")
    if not profile or profile["machine"]["processor"] != results["extraction"]["machine"]["processor"]:
        return said
    tensors = max(profile["ways"].values(), key=lambda way: way["tokens a second"])["tensors_mb"]
    return f"{said}; tensors take {tensors:,.0f} MB of it at most, the rest is the allocator's and Python's"


def _why_generation(results: Results, _: Found) -> str:
    steps = {int(n): seconds for n, seconds in results["generation"]["step"].items()}
    most = max(steps)
    return (
        f"a step of the model takes {1000 * steps[1]:.0f} ms over one row and {1000 * steps[most]:.0f} ms over {most}: "
        f"batching alone can gain {most * steps[1] / steps[most]:.1f} × at most"
    )


def _why_cost(_: Results, found: Found) -> str:
    return "the interval holds the limit" if found.open else "the interval lies above the limit"


def _why_pairs(results: Results, _: Found) -> str:
    ways = results["preferences"]["ways"]
    first, ours = (way["operations"] / 1e9 for way in (next(iter(ways.values())), ways["affectlens"]))
    return f"a pair takes {ours:.2f} GFLOP instead of {first:.2f}"


def _why_serving(results: Results, _: Found) -> str:
    rates = {
        way: serving_rate(results["serving"], way, SERVING_CALLERS) or 0.0 for way in ("affectlens", "steered", "everything")
    }
    said = ", ".join(f"{way} {rate:.0f} tokens/s" for way, rate in rates.items())
    return f"{said}: the words of a steered reply are read once more by the untouched model"


def _why_gpu(why: Callable[[Any], str]) -> Callable[[Results, Found], str]:
    def found_why(results: Results, found: Found) -> str:
        return next(why(model) for card, name, model in gpu.models(results["gpu"]) if found.where == f"{name} on {card}")

    return found_why


# ── the targets ──

SERVING_CALLERS, PASSES_COST = 8, 0.08

TARGETS: tuple[Target, ...] = (
    Target(
        "extraction",
        "reading one layer, against the ordinary transformers loop",
        "≥",
        6.0,
        "×",
        _reading(lambda reading: reading.times(reading.loop)),
        _why_reading,
    ),
    Target(
        "extraction",
        "reading one layer, against the best of all others",
        "≥",
        2.5,
        "×",
        _reading(lambda reading: reading.times(reading.best_peer)),
        _why_reading,
    ),
    Target(
        "extraction", "reading one layer, of the matrix-multiply bound", "≥", 0.60, "%", _reading(_share_of_bound), _why_reading
    ),
    Target("extraction", "memory of reading, of the ordinary loop's", "≤", 0.05, "%", _reading(_memory), _why_memory),
    Target(
        "profile_reading",
        "tokens and layouts, of the time of reading",
        "<",
        0.03,
        "%",
        lambda result: [Found(max(way["layouts over plain"] for way in result["ways"].values()))],
        lambda results, _: "made before the model runs, text by text in Python",
    ),
    Target(
        "generation",
        "generation at equal outputs, against `model.generate` one at a time",
        "≥",
        5.0,
        "×",
        _generation,
        _why_generation,
    ),
    *(
        Target("monitoring", f"{what}, over plain generation", "≤", limit, "%", _monitoring(way, limit), _why_cost)
        for way, (what, limit) in MONITORING_TARGETS.items()
    ),
    Target(
        "preferences",
        "pairs of activities, against one forward pass a pair",
        "≥",
        4.0,
        "×",
        lambda result: [Found(pairs_times(result))],
        _why_pairs,
    ),
    Target(
        "serving",
        f"{SERVING_CALLERS} callers who steer and read everything, against a loop",
        "≥",
        3.0,
        "×",
        _serving,
        _why_serving,
    ),
    Target(
        "serving", "readings of all emotions and mixed steering, of a token's time", "≤", PASSES_COST, "%", _passes, _why_cost
    ),
    Target(
        "gpu", "reading one layer on a GPU, of its bf16 peak", "≥", 0.55, "%", _gpu(gpu.reading_share), _why_gpu(gpu.why_reading)
    ),
    Target(
        "gpu",
        "steering and all emotions at one layer on a GPU, batch 32, over plain generation",
        "≤",
        0.05,
        "%",
        _gpu(lambda model: gpu.cost(model, "both", gpu.JUDGED)),
        _why_gpu(gpu.why_cost),
    ),
    Target(
        "gpu",
        "the same inside a CUDA graph",
        "≤",
        0.05,
        "%",
        _gpu(lambda model: gpu.cost(model, "graph-both", gpu.JUDGED)),
        _why_gpu(lambda model: gpu.why_cost(model, "graph-")),
    ),
)


@dataclass(frozen=True)
class Judged:
    """A target held against what was measured; ``met`` is None where nothing was, ``open`` that its interval holds the limit."""

    benchmark: str
    what: str
    wanted: str
    measured: str
    value: float | None
    met: bool | None
    open: bool
    why: str


def judge(results: Results) -> Iterator[Judged]:
    """Every target, once for each place where it was measured."""
    for target in TARGETS:
        result = results.get(target.benchmark)
        wanted = f"{target.sign} {target.said(target.limit)}"
        founds = target.found(result) if result else []
        if not founds:
            said = "not measured yet" if result is None else "not to be told: an output is missing, wrong or unequal"
            yield Judged(target.benchmark, target.what, wanted, said, None, None, False, "")
        for found in founds:
            met = target.met(found)
            place = f"{target.what}, {found.where}" if found.where else target.what
            why = "" if met else target.why(results, found)
            said = found.shown or target.said(found.value)
            yield Judged(target.benchmark, place, wanted, said, found.value, met, found.open, why)


def targets(results: Results) -> str:
    """How many are met, and the table of all."""
    judged = list(judge(results))
    verdict = {True: "met", False: "**missed**", None: "–"}
    counts = []
    for met in verdict:
        own = [each for each in judged if each.met is met]
        still = sum(each.open for each in own)
        said = "not measured" if met is None else verdict[met]
        counts.append(f"{len(own)} {said}{f' ({still} of them open)' if still else ''}")
    rows, known = list[list[str]](), set[str]()
    for each in judged:
        why = "as above" if each.why in known else each.why
        known |= {each.why} - {""}
        date = results.get(each.benchmark, {}).get("date", "–")[:10]  # each card of gpu.py has its own
        said = verdict[each.met] + " (open)" * each.open
        rows.append([each.what, each.wanted, each.measured, said, why, date])
    return "\n".join(
        [f"{', '.join(counts)}.", "", *table(["target", "wanted", "measured", "", "why it is missed", "measured on"], rows)]
    )


def as_data(results: Results) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(each) for each in judge(results)]
