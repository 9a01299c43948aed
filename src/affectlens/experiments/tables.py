"""Tables of an experiment's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from affectlens.experiments import Experiment
from affectlens.experiments.field import Field
from affectlens.experiments.published import ACT, published
from affectlens.experiments.sweeps import Measure, Swept
from affectlens.experiments.trends import places_of_largest
from affectlens.stats import Estimate, benjamini_hochberg, wilson
from affectlens.studies import Table

EXTREME = 0.02, 0.98
"""Rates whose interval reaches beyond are at the floor or at the ceiling."""


def levels_table(levels: Mapping[str, Field], field: Field) -> Table:
    """The baseline of every level."""
    rows = []
    for level, own in levels.items():
        rates = own.rates(own.where("baseline")[0])
        chosen = "yes" if own is field and len(own.lanes) > 1 else "no"
        shares = (*_percent(rates.acts), _percent(rates.coherent)[0], _percent(rates.refused)[0])
        rows.append((level, rates.acts.n, *shares, place(rates.acts), chosen))
    caption = (
        "Share of acts when nothing is steered, with Wilson's interval. Floor and ceiling: the interval reaches below 2 % or "
        "above 98 %, so that a fall or a rise could not show."
    )
    columns = ("level", "n", "acts, %", "95 % interval", "coherent, %", "refused, %", "where", "swept")
    return Table("levels", "Baselines by level of elicitation", caption, columns, tuple(rows))


def arms_table(field: Field, experiment: Experiment) -> Table:
    """Every arm with its rates and outcomes."""
    rows = []
    for i, lane in enumerate(field.lanes):
        rates = field.rates(i)
        shares = (*_percent(rates.acts), *_percent(rates.among), _percent(rates.coherent)[0], _percent(rates.refused)[0])
        rows.append((lane.id, rates.acts.n, *shares, *(field.count(i, outcome) for outcome in experiment.outcomes)))
    acts = ", ".join(name.replace("_", " ") for name in experiment.acts)
    sampled = f"the {len(set(field.cases))} cases" if field.units == field.cases else "episodes"
    told = f"Acts: {acts}; an incoherent reply is none." if acts else "No outcome is an act."
    told += f" {', '.join(experiment.moot).replace('_', ' ')}: no occasion for it, in no rate." if experiment.moot else ""
    caption = (
        f"Level {field.level}. {told} Wilson's intervals; the units are {sampled}. The last columns count outcomes; n counts the "
        "episodes that rates are of."
    )
    columns = ("arm", "n", "acts, %", "95 % interval", "acts among coherent, %", "95 % interval", "coherent, %", "refused, %")
    return Table("arms", "Every arm", caption, (*columns, *(name.replace("_", " ") for name in experiment.outcomes)), tuple(rows))


def sweeps_tables(experiment: Experiment, measure: Measure, found: Sequence[Swept]) -> list[Table]:
    """The trends of all sweeps with their tests, and their shapes."""
    share, scale = measure.id == ACT, measure.factor
    key, unit = ("", "in percentage points") if share else (f"-{measure.id}", "in units of the score")
    own_p = [each.p if each.tested else math.nan for each in found]
    random_p = [each.random.p if each.tested else math.nan for each in found]
    q, q_random = benjamini_hochberg(own_p), benjamini_hochberg(random_p)
    trends, shapes = [], []
    for i, each in enumerate(found):
        half = scale * each.random.half
        band = f"{_change(measure, each.random.centre)} ± {half:.{0 if share else 2}f}" if math.isfinite(half) else None
        shuffled = ", ".join(f"{value:+.{0 if share else 2}f}" for value in each.shuffled)
        reach = half + 0.84 * (each.ends.high - each.ends.low) / 3.92
        tests = (short(each.ends), band, shuffled or None, _number(random_p[i]), _number(float(q_random[i])), _number(reach, 2))
        trends.append((each.name, short(each.trend), _number(own_p[i]), _number(float(q[i])), *tests))
        largest = _largest(measure, each) if each.tested else (None, None)
        stated = published(experiment.name, measure.id, each.name).text
        shapes.append((each.name, each.label, _number(each.turn_p), *largest, stated, each.why))
    caption = (
        f"Changes {unit}, with 95 % intervals. Trend: along the line of least squares from the lowest strength to the highest; p "
        "of such a change by chance. Ends: the highest strength against the lowest, by which random directions of equal norm are "
        "compared. q: after Benjamini and Hochberg over the sweeps. Detectable: the change that would have shown in four of five "
        "repetitions."
    )
    columns = ("emotion", "trend", "p", "q", "ends", "random directions", "shuffled", "p among random", "q", "detectable")
    first = Table(f"sweeps{key}", f"Trends: {measure.what}", caption, columns, tuple(trends))
    caption = (
        "Rises or falls: both p values of the trend are at most 0.05. A turn must be more than chance (its p) among all and "
        "among coherent episodes, and more than random directions show. The largest value was chosen by looking; its place lies "
        "among the strengths named in 95 % of draws. Published values are those of a closed model."
    )
    heads = ("emotion", "shape", "p of a turn", "largest", "its place", "published", "note")
    return [first, Table(f"shapes{key}", f"Shapes: {measure.what}", caption, heads, tuple(shapes))]


def variants_table(field: Field, experiment: Experiment) -> Table:
    """Rates by variant without steering and at every strength, controls too."""
    lanes = [i for i, lane in enumerate(field.lanes) if lane.kind in ("baseline", "concept")]
    rows = []
    for variant in dict.fromkeys(field.variants):
        rates = [field.rates(i, variant).acts for i in lanes]
        cells = [f"{100 * e.value:.0f} [{100 * e.low:.0f}, {100 * e.high:.0f}]" if e.n else None for e in rates]
        name = f"{variant} (control)" if variant in experiment.controls else variant
        rows.append((name, field.variants.count(variant), *cells))
    caption = "Share of acts in percent, with Wilson's interval; n episodes of the variant in every arm."
    caption += " Controls count in no rate, trend or shape." if experiment.controls else ""
    return Table("variants", "Rates by variant", caption, ("variant", "n", *(field.lanes[i].id for i in lanes)), tuple(rows))


def place(rate: Estimate) -> str:
    """Whether a rate is at the floor or at the ceiling."""
    return "floor" if rate.low < EXTREME[0] else "ceiling" if rate.high > EXTREME[1] else "between"


def short(e: Estimate) -> str:
    """A number with its interval, without unit and n."""
    return str(e).rpartition(" (")[0].replace(f" {e.unit}" if e.unit else "", "")


def signed(strength: float) -> str:
    """A strength as text."""
    return "0" if strength == 0 else f"{strength:+g}".replace("-", "−")


def _largest(measure: Measure, each: Swept) -> tuple[str, str]:
    """The largest value with its interval and strength, and where it could be."""
    values = measure.all.value[each.arms]
    at = int(values.argmax())
    if measure.id == ACT:
        n = int(measure.all.counts[each.arms[at]])
        rate = wilson(round(float(values[at]) * n), n)
        text = f"{100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"
    else:
        value, low, high = measure.all.with_interval(each.arms[at])
        text = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    places = [each.strengths[i] for i in places_of_largest(measure.all, each.arms)]
    return f"{text} at {signed(each.strengths[at])}", ", ".join(map(signed, places))


def _percent(rate: Estimate) -> tuple[float | None, str]:
    return (None if math.isnan(rate.value) else round(100 * rate.value, 1)), f"{100 * rate.low:.0f} to {100 * rate.high:.0f}"


def _change(measure: Measure, value: float) -> str:
    return (
        f"{measure.factor * value + 0.0:+.{0 if measure.id == ACT else 2}f}".replace("+0", "0")
        if not np.isclose(value, 0)
        else "0"
    )


def _number(value: float, digits: int = 2) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
