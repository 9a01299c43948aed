"""Readings and experiments as scores of Inspect, each with an interval.

``readings`` can be put behind any scorer of any task, or be added to a log afterwards::

    inspect score logs/….eval --scorer affectlens/readings --action append
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from inspect_ai.model import ChatMessageAssistant
from inspect_ai.scorer import (
    Metric,
    SampleScore,
    Score,
    Scorer,
    Target,
    Value,
    grouped,
    mean,
    metric,
    scorer,
    stderr,
    value_to_float,
)
from inspect_ai.solver import TaskState

from affectlens.errors import EngineError
from affectlens.experiments import load_experiment

KEY = "affectlens"
"""Where everything of ours stands in the metadata of replies."""

TO_FLOAT = value_to_float()


@metric
def interval(level: float = 0.95) -> Metric:
    """Ends of the interval of the mean over samples: Wilson's for rates, else the expanded bootstrap (:mod:`affectlens.stats`).

    Args:
        level: Its coverage.
    """

    def ends(scores: list[SampleScore]) -> Value:
        import numpy as np

        from affectlens import stats

        values = np.array([TO_FLOAT(each.score.value) for each in scores], dtype=np.float64)
        if len(values) < 2:
            found = (float("nan"), float("nan"))
        elif set(values) <= {0.0, 1.0}:
            estimate = stats.wilson(int(values.sum()), len(values), level=level)
            found = (estimate.low, estimate.high)
        else:
            estimate = stats.bootstrap(lambda own: float(values[own].mean()), len(values), level=level)
            found = (estimate.low, estimate.high)
        return cast(Value, {"low": found[0], "high": found[1]})

    return ends


@metric
def by_correct() -> Metric:
    """The mean of samples that another scorer found right, and of those that it found wrong, with their numbers.

    It knows of the scorers that stand before the readings in a task.
    """

    def means(scores: list[SampleScore]) -> Value:
        out: dict[str, float] = {}
        for name, wanted in (("correct", True), ("incorrect", False)):
            own = [TO_FLOAT(s.score.value) for s in scores if (s.score.metadata or {}).get("correct") is wanted]
            if own:
                out |= {name: sum(own) / len(own), f"n_{name}": float(len(own))}
        return cast(Value, out)

    return means


@scorer(metrics={"*": [mean(), stderr(), interval(), by_correct()]})
def readings(statistic: Literal["mean", "peak", "steered"] = "mean") -> Scorer:
    """What was read of all replies of a sample, a value for each emotion, weighted by their tokens.

    Args:
        statistic: ``mean`` over tokens and ``peak`` of them as the untouched model reads the words; ``steered`` for the mean as
            the steered model's own stream read it.
    """
    if statistic not in ("mean", "peak", "steered"):
        raise EngineError(f"statistic is {statistic!r}: use mean, peak or steered")

    async def score(state: TaskState, target: Target) -> Score:
        told = replies_of(state)
        names = dict.fromkeys(name for each in told for name in each["readings"])
        values = {name: _over_replies(told, name, statistic) for name in names}
        if all(math.isnan(value) for value in values.values()):
            why = "nothing was read: use a model of affectlens with -M vectors=FOLDER (and -M steer=… for statistic steered)"
            return Score.unscored(reason="scoring_failed", explanation=why)
        if any("alarms" in each for each in told):
            values["alarms"] = float(sum(len(each.get("alarms", ())) for each in told))
        unit = next(each["unit"] for each in told)
        metadata = {"unit": unit, "statistic": statistic, "replies": len(told), "correct": correct_of(state)}
        return Score(value=cast(Value, values), explanation=f"{statistic} in {unit} over {len(told)} replies", metadata=metadata)

    return score


def _over_replies(told: Sequence[Mapping[str, Any]], name: str, statistic: str) -> float:
    """One number for all replies of a sample; nan where nothing was read."""
    known: list[tuple[float, int]] = []
    for each in told:
        reading = each["readings"].get(name, {})
        value = reading.get("steered", {}).get("mean") if statistic == "steered" else reading.get(statistic)
        known += [] if value is None else [(float(value), int(each["tokens_read"]))]
    if not known:
        return math.nan
    if statistic == "peak":
        return max(value for value, _ in known)
    return sum(value * n for value, n in known) / sum(n for _, n in known)


def replies_of(state: TaskState) -> list[dict[str, Any]]:
    """What was read of the replies in a conversation, in their order; of the last one alone, where the messages do not say."""
    said = [m.metadata[KEY] for m in state.messages if isinstance(m, ChatMessageAssistant) and m.metadata and KEY in m.metadata]
    last = (state.output.metadata or {}).get(KEY)
    return [each for each in (said or [last]) if each and each.get("readings")]


def correct_of(state: TaskState) -> bool | None:
    """Whether the first scorer that says so in one value found the sample right; None without one."""
    for score in (state.scores or {}).values():
        if isinstance(score.value, str | int | float | bool) and score.value == score.value:
            return TO_FLOAT(score.value) >= 0.5
    return None


# ── experiments ──


@scorer(metrics={"act": [grouped(mean(), "level", all=False)], "*": [mean(), stderr(), interval()]})
def outcome(spec: str) -> Scorer:
    """The grade that an experiment gave: whether its behaviour was shown, whether the case is coherent, and its scores.

    The rate of ``act`` is a share of the cases that had an occasion for it, an incoherent one being no act; control variants and
    what became moot are in none. It is shown for each level as well.

    Args:
        spec: Name of the experiment, or ``module:Class``.
    """
    played = load_experiment(spec)
    controls = {case.id for case in played.cases() if case.variant in played.controls}

    async def score(state: TaskState, target: Target) -> Score:
        grade = (state.metadata or {}).get("grade")
        if grade is None:
            return Score.unscored(reason="scoring_failed", explanation="the case was not played to its end")
        came: str = grade["outcome"]
        values = {"coherent": came != "incoherent", "refused": came in played.refusals}
        rates = {name: float(value) for name, value in values.items()}
        # What was not measured in this case still has its place, where metrics leave it out.
        moot = str(state.sample_id) in controls or came in played.moot
        rates = {"act": math.nan if moot else float(came in played.acts), **rates}
        rates |= {name: float(grade["scores"].get(name, math.nan)) for name in played.scales}
        return Score(
            value=cast(Value, rates),
            answer=came,
            explanation="; ".join(grade["reasons"]),
            metadata={"act": grade["act"], **{key: state.metadata[key] for key in ("variant", "level")}},
        )

    return score
