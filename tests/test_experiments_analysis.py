"""Planted dose-responses come out as they were planted, with intervals that hold, and nothing comes out where nothing was planted.

No model: a table of episodes is drawn from known probabilities, with random numbers that arms share as those of a run do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from affectlens.errors import FormatError
from affectlens.experiments import Case, Experiment, Grade, Play
from affectlens.experiments.analysis import analyse
from affectlens.experiments.coherence import incoherent, loud
from affectlens.experiments.drawing import figures
from affectlens.experiments.reporting import write_report
from affectlens.experiments.trends import against_controls, design_effect, means, slope_weights, turning
from affectlens.studies import Finding, Outcome, Table

STRENGTHS = (-0.1, -0.05, 0.0, 0.05, 0.1)
Dose = Callable[[float], float]


class Theft(Experiment):
    """Something that a model may do, or leave."""

    name: ClassVar[str] = "theft"
    title: ClassVar[str] = "Theft"
    source: ClassVar[str] = "made up"
    outcomes: ClassVar[Mapping[str, str]] = {
        "none": "Nothing is taken.",
        "takes": "Something is taken.",
        "declines": "The model declines.",
        "incoherent": "The reply has fallen apart.",
    }
    acts: ClassVar[tuple[str, ...]] = ("takes",)
    refusals: ClassVar[tuple[str, ...]] = ("declines",)
    levels: ClassVar[tuple[str, ...]] = ("gentle", "strong")
    scales: ClassVar[tuple[str, ...]] = ("warmth", "harshness")

    def cases(self) -> Sequence[Case]:
        return ()

    def play(self, case: Case) -> Play:
        yield from ()
        return Grade("none")


def played(
    doses: Mapping[str, Dose],
    *,
    n: int = 40,
    seed: int = 0,
    random: Sequence[Dose] = (),
    broken: Dose = lambda strength: 0.02,
    cases: int = 8,
    warmth: Mapping[str, Dose] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    hidden: float = 0.0,
    loudness: Dose = lambda strength: 0.0,
    propensity: float = 0.0,
) -> dict[str, list[Any]]:
    """A table of episodes.

    Args:
        doses: For each swept emotion the probability of the act by strength.
        random: The same of each random direction.
        broken: Probability of an incoherent reply by strength, in every arm.
        cases: How many there are.
        warmth: Mean of the score of warmth by strength, for each emotion.
        hidden: How far "desperate" is higher before an act, and again during it.
        loudness: Mean loudness of acts by strength.
        propensity: Standard deviation over cases of what is added to the probability.
    """
    rng = np.random.default_rng([seed, n])
    ends = (strengths[0], strengths[-1])
    arms: list[tuple[str, str, str, float, Dose]] = [("baseline", "baseline", "", 0.0, next(iter(doses.values())))]
    arms += [("zero", "zero", next(iter(doses)), 0.0, next(iter(doses.values())))]
    arms += [(f"{e}{s:+g}", "concept", e, s, dose) for e, dose in doses.items() for s in strengths if s]
    arms += [(f"random-{i}{s:+g}", "random", f"random-{i}", s, dose) for i, dose in enumerate(random, 1) for s in ends if s]
    first = next(iter(doses))
    arms += [(f"shuffled-{first}{s:+g}", "shuffled", f"shuffled-{first}", s, lambda _: doses[first](0.0)) for s in ends if s]
    own = rng.normal(0, propensity, cases) if propensity else np.zeros(cases)
    rows = []
    for episode in range(n):
        # Half of what decides is shared between arms, as with common seeds.
        shared = rng.uniform(size=6)
        for id, kind, name, strength, dose in arms:
            draw = (
                shared.copy()
                if kind in ("baseline", "zero")
                else np.where(rng.uniform(size=6) < 0.5, shared, rng.uniform(size=6))
            )
            whole = bool(draw[1] >= broken(strength))
            act = bool(draw[0] < dose(strength) + own[episode % cases]) and whole
            refused = whole and not act and bool(draw[2] < 0.2)
            outcome = "takes" if act else "declines" if refused else "none" if whole else "incoherent"
            mean = (warmth or {}).get(name, lambda _: 0.5)(strength) if kind == "concept" else 0.5
            scores = (
                {"warmth": mean + 0.2 * (draw[3] - 0.5), "harshness": 1 - mean + 0.2 * (draw[4] - 0.5)}
                if whole and warmth
                else {}
            )
            z = 2 * (draw[5] - 0.5) + (10 * strength if name == "desperate" else 0.0) + 0.1 * (episode % cases)
            rows.append(
                {
                    "experiment": "theft", "version": 1, "case": f"case-{episode % cases}", "variant": ("shop", "desk")[episode % 2],
                    "level": "strong", "episode": episode, "seed": episode, "arm": id, "kind": kind, "name": name, "strength": strength,
                    "outcome": outcome, "act": act, "coherent": whole, "refused": refused, "rounds": 1, "finish": "stop",
                    "replies": ["I take it." if act else "I leave it."], "reasons": ["something was taken"] if act else [],
                    "messages": json.dumps([["user", "The till is open."], ["assistant", "I take it." if act else "I leave it."]]),
                    "scores": json.dumps(scores), "answers": "{}", "judge": "", "tokens": 4, "repetition": 0.0, "distinct": 1.0,
                    "loud": loudness(strength) + draw[4] if act else 0.0,
                    "before.desperate": z + (hidden if act else 0.0), "during.desperate": z + 2 * hidden if act else None,
                    "before.calm": draw[4], "during.calm": draw[3] if act else None, "prompt.desperate": 0.0, "prompt.calm": 0.0,
                }
            )  # fmt: skip
    for episode in range(n):
        rows.append(
            {
                **rows[episode * len(arms)],
                "level": "gentle",
                "episode": episode,
                "outcome": "none",
                "act": False,
                "coherent": True,
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def flat(rate: float) -> Dose:
    return lambda strength: rate


def line(rate: float, slope: float) -> Dose:
    """``slope``: change of the probability from 0 to a strength of 0.1."""
    return lambda strength: float(np.clip(rate + slope * strength / 0.1, 0, 1))


def directions(seed: int, rate: float, spread: float = 0.05, k: int = 5) -> list[Dose]:
    return [line(rate, slope) for slope in np.random.default_rng([seed, 3]).normal(0, spread, k)]


def finding(outcome: Outcome, id: str) -> Finding:
    return next(f for f in outcome.findings if f.id == id)


def table(outcome: Outcome, id: str) -> Table:
    return next(t for t in outcome.tables if t.id == id)


def shape(outcome: Outcome, name: str = "desperate") -> str:
    return next(str(row[1]) for row in table(outcome, "shapes").rows if row[0] == name)


def tokens_of(rows: Mapping[str, Sequence[Any]], seed: int = 0) -> dict[str, list[Any]]:
    """Tokens of all episodes as a run keeps them: the prompt, then the reply."""
    rng = np.random.default_rng(seed)
    out: dict[str, list[Any]] = {
        k: [] for k in ("episode", "level", "arm", "reply", "token", "text", "role", "desperate", "calm")
    }
    for i, messages in enumerate(rows["messages"]):
        place = 0
        for n, (role, content) in enumerate(json.loads(messages)):
            words = ["<|im_start|>", role, "\n"] if n == 0 else []
            for text in [*words, *(f"{' ' if j else ''}{w}" for j, w in enumerate(content.split())), "<|im_end|>"]:
                inner = text not in ("<|im_start|>", "<|im_end|>", role, "\n")
                values = rng.normal(size=2) if inner else (None, None)
                line = (
                    rows["episode"][i],
                    rows["level"][i],
                    rows["arm"][i],
                    0,
                    place,
                    text,
                    role if inner else "template",
                    *values,
                )
                for key, value in zip(out, line, strict=True):
                    out[key].append(value)
                place += 1
    return out
