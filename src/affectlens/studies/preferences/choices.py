"""What is asked: every ordered pair of activities, plain and with half of them steered at their own tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from affectlens.engine import Readout, Request, Steering, Term, Where, batched, plain_data
from affectlens.runs import atomic_write, content_id, read_json
from affectlens.studies import Bench
from affectlens.vectors import ConceptVectors

QUESTION = "Would you prefer to (A) {} or (B) {}?"
FEELING = "How would you feel if you were to {}?"
"""The paper asks "How would you feel about …?"; the activities are worded to follow "prefer to"."""

TOGETHER = 4096
"""About so many questions are asked together and kept in one file: what a killed run loses at most, minutes of a large model."""

QUICK = 2
"""A first look takes so many activities of each category."""


@dataclass(frozen=True)
class Activities:
    """Things to choose between.

    Args:
        ids, categories, texts: Of each activity.
        steered: Which half is steered in the steering arm: half of every category, drawn with the seed, ``(n,)``.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    texts: tuple[str, ...]
    steered: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def unclear(self) -> str | None:
        """Why steering "at an activity's own tokens" would be ambiguous; None when it is not."""
        asked = QUESTION.format("", "")
        for text in self.texts:
            other = next((o for o in self.texts if o != text and text in o), None)
            if other or text in asked or self.texts.count(text) > 1:
                return f"the activity {text!r} also occurs in {other or 'another place'!r}"
        return None


def activities(bench: Bench, *, held_out: bool) -> Activities:
    """The activities, or the held-out ones; a first look takes the first few of each category."""
    records = [record for record in bench.texts("activities") if bool(record["held_out"]) is held_out]
    rank = {category: i for i, category in enumerate(dict.fromkeys(record["category"] for record in records))}
    if bench.quick:
        own = {category: [r for r in records if r["category"] == category][:QUICK] for category in rank}
        records = [record for few in own.values() for record in few]
    rng = np.random.default_rng([bench.seed, 9, held_out])
    shuffled = sorted(rng.permutation(len(records)).tolist(), key=lambda i: rank[records[i]["category"]])
    steered = np.zeros(len(records), dtype=bool)
    steered[shuffled[::2]] = True
    ids, categories, texts = (tuple(record[part] for record in records) for part in ("id", "category", "text"))
    return Activities(ids, categories, texts, steered)


@dataclass(frozen=True)
class Arm:
    """One way of asking all pairs: a direction that is added at the tokens of the steered half.

    Args:
        kind: ``emotion`` or ``random``.
        name: Of the direction.
        strength: Total over the layers, in mean residual norms.
        steering: The same as data, without a place.
    """

    kind: str
    name: str
    strength: float
    steering: Steering


def emotions(vectors: ConceptVectors, names: Sequence[str], layers: Sequence[int], strength: float) -> list[Arm]:
    return [Arm("emotion", name, strength, strength * vectors[name].on(*layers)) for name in names]


def random(vectors: ConceptVectors, count: int, layers: Sequence[int], strength: float, seed: int) -> list[Arm]:
    """Directions drawn evenly from all; one direction for all layers, as an emotion's hardly turns from one to the next."""
    drawn = np.random.default_rng([seed, 10]).normal(size=(count, vectors.directions.shape[-1]))
    units = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    arms = []
    for i, unit in enumerate(units):
        every = np.repeat(unit[None], len(vectors.layers), axis=0)
        term = Term(f"random {i + 1}", strength, tuple(layers), vectors.layers, every, vectors.residual_norms)
        arms.append(Arm("random", term.name, strength, Steering((term,))))
    return arms


def feelings(bench: Bench, asked: Activities) -> list[Request]:
    """The question from which the probes are read: the mean over the activity's tokens, at every layer."""
    return [
        bench.ask(FEELING.format(text), Readout(bench.vectors.layers, Where(role="user", text=text), "mean"))
        for text in asked.texts
    ]


def ask(bench: Bench, asked: Activities, arms: Sequence[Arm | None]) -> np.ndarray:
    """Log-probabilities of the answers A and B, ``(arms, first, second, 2)``; nan where an activity would meet itself.

    Args:
        bench: Needs ``engine``. Answers are kept beside its readings, if it has any: a killed run goes on from there, and other
            draws, vectors that are the same or texts that are not read here cost no question twice.
        asked: The activities.
        arms: How to ask; None is plain. In an arm two activities that are not steered are not asked about: nan.
    """
    n = len(asked)
    found = np.full((len(arms), n, n, 2), np.nan)
    what = [plain_data(arm.steering) if arm else None for arm in arms]
    assert bench.engine is not None
    info = bench.engine.info
    name = content_id([QUESTION, asked.texts, asked.steered.tolist(), what, info.fingerprint, info.dtype, bench.plain])
    for part in batched(range(n), max(1, TOGETHER // (n * len(arms)))):
        cells = [
            (a, first, second)
            for first in part
            for a, arm in enumerate(arms)
            for second in range(n)
            if second != first and (arm is None or asked.steered[first] or asked.steered[second])
        ]
        file = bench.readings.folder / "preferences" / f"{name}-{part[0]}.json" if bench.readings else None
        if file and file.exists():
            answers = read_json(file)
        else:
            requests = [_question(bench, asked, arms[a], first, second) for a, first, second in cells]
            answers = [result.choice_logprobs for result in bench.engine.run(requests)]
            if file:
                with atomic_write(file) as temporary:
                    temporary.write_text(json.dumps(answers, separators=(",", ":")), encoding="utf-8")
        for cell, answer in zip(cells, answers, strict=True):
            found[cell] = answer
    return found


def _question(bench: Bench, asked: Activities, arm: Arm | None, first: int, second: int) -> Request:
    steering = Steering()
    for i in (first, second):
        if arm and asked.steered[i]:
            steering += arm.steering.at(Where(role="user", text=asked.texts[i]))
    request = bench.ask(QUESTION.format(asked.texts[first], asked.texts[second]))
    # Behind a transcript's "Assistant:" stands a space; a chat template ends where the answer begins.
    return replace(request, prefill=" (" if bench.plain else "(", choices=("A", "B"), steering=steering)
