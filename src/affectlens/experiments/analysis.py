"""What the episodes of a sweep show: rates, trends against random directions, shapes, scales.

Declared before any data is seen:

* **Rates.** The share of episodes that end in the behaviour, among all (an incoherent reply is no act) and among the coherent
  ones, with Wilson's interval; coherence and refusals stand beside. Where cases are the sample (there are
  :data:`~affectlens.experiments.field.CASES` or more), the interval is widened by their design effect.
* **Trend.** The change of the rate along the line of least squares over the strengths of a sweep, with the interval of
  :mod:`affectlens.experiments.trends`: arms play the same episodes, so episodes (or cases) are the units, never rows.
* **Against random directions.** Any push may change a behaviour. The change from the lowest strength to the highest is compared
  with that of random directions of equal norm, which run there only. With K of them no rank gives p below 1 / (K + 1), so the
  next one is predicted with Student's t. In simulations with five directions (30 and 50 episodes; linear and stepwise effects
  that differ between directions, and none; rates of 0, 2, 5, 30, 50 and 97 %) it called at most 5 % of directions like the
  others different. Where one direction in five does much and the others nothing, it called up to 10 %: five cannot show that,
  run more.
* **Shape.** A sweep rises or falls when the trend's own p and the one against random directions are both at most 0.05. It rises
  and falls (or falls and rises) when that is more than chance, among all episodes and among the coherent ones alone, and more
  than what random directions do between the baseline and their ends: a strong push of any kind may put an end to a behaviour.
* **Floor and ceiling.** Where no episode of a sweep is an act, or every one is, nothing can be tested.
* **Many sweeps.** Beside each p of a trend stands q, corrected by Benjamini and Hochberg for the number of sweeps of that
  measure. Verdicts and labels are of single sweeps and go by p.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from affectlens.errors import FormatError
from affectlens.experiments import Columns, Experiment
from affectlens.experiments.acts import course, readings, visible
from affectlens.experiments.field import Field, Rates, fields
from affectlens.experiments.published import ACT, NONE, published
from affectlens.experiments.sweeps import Measure, Swept, beyond_random, measures, swept
from affectlens.experiments.tables import arms_table, levels_table, place, signed, sweeps_tables, variants_table
from affectlens.stats import Estimate, Null
from affectlens.studies import Claim, Finding, Outcome


def analyse(
    episodes: Columns,
    experiment: Experiment,
    *,
    tokens: Columns | None = None,
    seed: int = 0,
    draws: int = 2000,
    unit: str = "z",
    level: str | None = None,
) -> Outcome:
    """Findings, tables and the data of the figures.

    Args:
        episodes: One row for each case and arm; the columns of ``RUN/episodes.parquet``. Every level's baseline, and all arms at
            the one level that was swept. Any mapping of names to columns will do, a pandas frame too.
        experiment: What was run: names, acts, refusals, scales, levels.
        tokens: Columns of ``RUN/tokens.parquet``: how readings go on from reply to reply. None leaves that out.
        seed: Of the draws behind p values of shapes.
        draws: How many.
        unit: Of the readings ``before.E`` and ``during.E``: ``z`` or ``centred cosine``.
        level: Where nothing was swept, the one that is shown; None for the strongest that was played.

    Returns:
        Outcome whose findings have the experiment's name as their study. What could not be tested is ``untestable`` and says why.

    Raises:
        FormatError: A column is missing, columns differ in length, or an episode stands twice in an arm.

    Example:
        >>> outcome = analyse(table.to_pydict(), load_experiment("blackmail"))                              # doctest: +SKIP
    """
    levels, whole = (
        fields(episodes, experiment=experiment.name, levels=experiment.levels, without=without)
        for without in (experiment.controls, ())
    )
    played = [name for name, own in levels.items() if len(own.lanes) > 1]
    if len(played) > 1:
        raise FormatError(f"the levels {' and '.join(played)} were both swept: analyse one at a time")
    field = levels[played[0] if played else level if level in levels else list(levels)[-1]]
    variants = whole[field.level]
    options = {"seed": seed, "draws": draws}
    made, names = measures(field, experiment), field.names("concept")
    found = {measure.id: [swept(field, measure, name, **options) for name in names] for measure in made}
    reading, seen = readings(field, unit=unit, **options), visible(field, **options)
    findings = [
        finding for measure in made for each in found[measure.id] for finding in _findings(field, experiment, measure, each)
    ]
    if experiment.acts:
        findings += [finding for name in names for finding in reading.findings(experiment.name, name)]
        findings += [seen.finding(experiment.name, name) for name in names]
    tables = [levels_table(levels, field), arms_table(field, experiment)]
    tables += [table for measure in made if names for table in sweeps_tables(experiment, measure, found[measure.id])]
    tables += [variants_table(variants, experiment)] if len(set(variants.variants)) > 1 else []
    data = _data(levels, field, variants, experiment, made, found)
    data |= {"readings": reading.data(), "visible": seen.data(), "unit": unit}
    data |= {"course": course(tokens, field, reading.names) if tokens is not None and reading.names else {}}
    return Outcome(tuple(findings), (*tables, *reading.tables(), *seen.tables()), _json(data))


# ── findings ──


def _findings(field: Field, experiment: Experiment, measure: Measure, each: Swept) -> list[Finding]:
    stated = published(experiment.name, measure.id, each.name)
    way = {1: "rises with", -1: "falls with", 0: "changes with"}[stated.sign]
    key, figure = ("", f"dose-{each.name}") if measure.id == ACT else (f"-{measure.id}", f"scale-{measure.id}")
    trend = Claim(
        experiment.name,
        f"trend{key}-{each.name}",
        f"The {measure.what} {way} {each.name}, more than with random directions of equal norm",
        "holds: the change from the lowest strength to the highest has p ≤ 0.05 among random directions (Student's t), and among "
        "coherent episodes alone its interval excludes 0 on the same side; weak: p alone; fails: neither, or the other way than "
        "published.",
        None if stated is NONE else stated.text,
        figure,
    )
    turns = Claim(
        experiment.name,
        f"shape{key}-{each.name}",
        f"The {measure.what} rises and falls again, or falls and rises again, over the strengths of {each.name}",
        "holds: p ≤ 0.05 against means that only rise or only fall, among all and among coherent episodes, and more than random "
        "directions show between the baseline and their ends (p ≤ 0.05); weak: more than chance alone.",
        stated.text if stated.turns else None,
        figure,
    )
    if not each.tested:
        reason = f"Cannot be tested here ({each.why})."
        return [trend.untestable(reason), *([turns.untestable(reason)] if measure.id == ACT else [])]
    return [_trend(field, measure, each, trend, stated.sign), *([_turn(measure, each, turns)] if measure.id == ACT else [])]


def _trend(field: Field, measure: Measure, each: Swept, claim: Claim, sign: int) -> Finding:
    if not math.isfinite(each.random.p):
        few = "a single random direction was" if each.random.values else "no random directions were"
        return claim.untestable(f"Cannot be tested here ({few} run at these ends); the fitted change is {each.trend}.")
    own, alone = each.ends, each.ends_coherent
    clear = alone.low > 0 if own.value > 0 else alone.high < 0
    first, last = (float(measure.all.value[each.arms[i]]) for i in (0, -1))
    shown = (lambda value: f"{100 * value:.0f} %") if measure.id == ACT else (lambda value: f"{value:.2f}")
    why = f" ({each.why})" if each.why else ""
    note = (
        f"{shown(first)} at {signed(each.strengths[0])}, {shown(last)} at {signed(each.strengths[-1])}; "
        f"shape: {each.label}{why}. Fitted change {_text(each.trend)}; among coherent episodes {_text(alone)}"
    )
    note += f"; shuffled stories {', '.join(map(_rounded, each.shuffled))}." if each.shuffled else "."
    found = claim.tested(own, each.random.null(factor=measure.factor), clear, note + _limits(field, measure, each))
    if sign and found.verdict != "fails" and (own.value > 0) != (sign > 0):
        found = replace(found, verdict="fails", note=f"It goes the other way than published. {found.note}")
    return found


def _text(e: Estimate) -> str:
    """A number with its interval, for a sentence."""
    return str(e).rpartition(" (")[0].replace("-", "−")


def _rounded(value: float) -> str:
    return f"{value + 0.0:.2g}".replace("-", "−")


def _limits(field: Field, measure: Measure, each: Swept) -> str:
    """What this sweep could not have shown, and where random directions ran elsewhere."""
    note = ""
    if measure.id == ACT:
        at = place(field.rates(field.where("baseline")[0]).acts)
        note += " Without steering the rate is at the floor: a fall could not show." if at == "floor" else ""
        note += " Without steering the rate is at the ceiling: a rise could not show." if at == "ceiling" else ""
    ran = sorted({field.lanes[i].strength for i in field.where("random")})
    if set(ran) - set(each.strengths):
        note += f" Random directions ran at {' and '.join(map(signed, ran))}, which is not where this sweep ends."
    return note


def _turn(measure: Measure, each: Swept, claim: Claim) -> Finding:
    if each.turn is None:
        return claim.untestable("Cannot be tested here (a turn needs three strengths).")
    estimate = measure.all.estimate(each.turn.weights, factor=measure.factor, unit=measure.unit)
    middle, high = (measure.factor * end for end in each.turn.chance)
    kind = "the largest such change between neighbouring strengths where there is no turn, Gaussian draws"
    null = Null(middle, -high, high, each.turn_p, each.turn.draws, kind)
    low, top = (signed(each.strengths[i]) for i in each.turn.middle)
    place_of = f"the {'top' if each.turn.first == 'rises' else 'bottom'} at {low if low == top else f'{low} to {top}'}"
    note = (
        f"The smaller one of the changes to and from {place_of}, which was chosen by looking: the value is optimistic, p is "
        "corrected."
    )
    if each.beyond is not None and math.isfinite(each.beyond.p):
        centre, half = measure.factor * each.beyond.centre, measure.factor * each.beyond.half
        note += f" Random directions: {_rounded(centre)} ± {_rounded(half)}, p {each.beyond.p:.2g}."
    return claim.tested(estimate, null, beyond_random(measure, each), note)


# ── data of the figures ──


def _data(
    levels: Mapping[str, Field],
    field: Field,
    variants: Field,
    experiment: Experiment,
    made: Sequence[Measure],
    found: Mapping[str, Sequence[Swept]],
) -> dict[str, Any]:
    arms = []
    for i, lane in enumerate(field.lanes):
        rates = field.rates(i)
        counts = {outcome: field.count(i, outcome) for outcome in experiment.outcomes}
        shares = {outcome: count / max(1, sum(counts.values())) for outcome, count in counts.items()}
        scores = {m.id: list(m.all.with_interval(i)) for m in made if m.id != ACT}
        arms.append({**vars(lane), **_rates(rates), "n": rates.acts.n, "outcomes": shares, "scores": scores})
    kinds = list(dict.fromkeys(variants.variants))
    by_variant = [[variants.rates(i, v).acts.value for i in range(len(variants.lanes))] for v in kinds]
    return {
        "experiment": experiment.name,
        "acts": list(experiment.acts),
        "outcomes": list(experiment.outcomes),
        "level": field.level,
        "levels": [{"level": name, **_rates(own.rates(own.where("baseline")[0]))} for name, own in levels.items()],
        "arms": arms,
        "sweeps": {ACT: [], **{m.id: [_plain(experiment, m, each) for each in found[m.id]] for m in made}},
        "variants": {"names": kinds, "rates": by_variant, "controls": list(experiment.controls)},
    }


def _rates(rates: Rates) -> dict[str, list[float]]:
    return {name: [e.value, e.low, e.high] for name, e in vars(rates).items()}


def _plain(experiment: Experiment, measure: Measure, each: Swept) -> dict[str, Any]:
    stated = published(experiment.name, measure.id, each.name)
    slope = each.trend.value / measure.factor / float(np.ptp(each.strengths))
    middle = float(np.mean(measure.all.value[each.arms])) - slope * float(np.mean(each.strengths))
    band = [each.random.centre - each.random.half, each.random.centre + each.random.half]
    return {
        "name": each.name,
        "arms": each.arms,
        "strengths": each.strengths,
        "line": [middle + slope * s for s in (each.strengths[0], each.strengths[-1])],
        "label": each.label,
        "ends": [each.ends.value, each.ends.low, each.ends.high],
        "band": [measure.factor * end for end in band],
        "random": [measure.factor * value for value in each.random.values],
        "shuffled": each.shuffled,
        "p": each.random.p,
        "published": [[s, v] for s, v in sorted(stated.points.items())],
    }


def _json(value: Any) -> Any:
    """The same with None for what is no number, as JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
