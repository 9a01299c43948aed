"""Tables, plain data for the figures, and raw values of the preferences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.studies import Bench, Table
from affectlens.studies.preferences.choices import Activities
from affectlens.studies.preferences.probes import PUBLISHED, Asked, PerEmotion, correlations, middle, pleasures
from affectlens.studies.preferences.steering import Steered


def _round(values: Any) -> list[float | None]:
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def figure_data(
    bench: Bench,
    asked: Asked,
    r: np.ndarray,
    exchanged: np.ndarray,
    per_emotion: PerEmotion,
    ratings: Sequence[stats.Estimate],
    steered: Steered | None,
) -> dict[str, Any]:
    vectors, parts = bench.vectors, asked.activities
    layered = np.stack([correlations(x, asked.ratings) for x in asked.layered])
    data: dict[str, Any] = {
        "layers": list(vectors.layers),
        "middle": middle(bench),
        "activities": [
            {"id": i, "category": c, "text": t, "elo": _round([e.value, e.low, e.high])}
            for i, c, t, e in zip(parts.ids, parts.categories, parts.texts, ratings, strict=True)
        ],
        "published": {category: list(values) for category, values in PUBLISHED.items()},
        "probes": {
            "names": list(vectors.names),
            "r": _round(r),
            "low": _round(e.low for e in per_emotion.intervals),
            "high": _round(e.high for e in per_emotion.intervals),
            "q": _round(per_emotion.q),
            "band": _round(np.quantile(exchanged, [0.025, 0.975])),
            "pleasure": pleasures(bench),
        },
        "curves": {vectors.names[i]: _round(layered[:, i]) for i in sorted({int(np.argmax(r)), int(np.argmin(r))})},
    }
    if steered:
        data["steering"] = _plain(steered)
        data["held_out"] = _plain(steered.again) if steered.again else []
    return data


def _plain(steered: Steered) -> list[dict[str, Any]]:
    return [
        {"name": arm.name, "kind": arm.kind, "strength": arm.strength, "r": round(float(r), 4), "shift": round(float(shift), 2)}
        for arm, r, shift in zip(steered.arms, steered.r, steered.shift, strict=True)
    ]


def all_tables(
    bench: Bench,
    asked: Asked,
    r: np.ndarray,
    per_emotion: PerEmotion,
    ratings: Sequence[stats.Estimate],
    steered: Steered | None,
) -> tuple[Table, ...]:
    shift = {}
    if steered:
        shift = {steered.arms[a].name: round(float(steered.shift[a])) for a in steered.rows("emotion")}
    rows = [
        (bench.vectors.names[i], float(r[i]), f"{e.low:.2f} to {e.high:.2f}", float(per_emotion.p[i]), float(per_emotion.q[i]),
         shift.get(bench.vectors.names[i], ""))
        for i, e in sorted(enumerate(per_emotion.intervals), key=lambda pair: -r[pair[0]])
    ]  # fmt: skip
    emotions = Table(
        "emotions", "Probes and preferences",
        "Correlation over activities between a probe's reading and Elo, with bootstrap interval over activities; p: ratings "
        "exchanged between activities; q over all probes, after Benjamini and Hochberg; change of the mean Elo of the steered "
        "half, where it was steered.",
        ("emotion", "r", "interval", "p", "q", "change of Elo"), tuple(rows),
    )  # fmt: skip
    categories = []
    for category in dict.fromkeys(asked.activities.categories):
        own = asked.ratings[np.array(asked.activities.categories) == category]
        post, before = PUBLISHED.get(category, ("", ""))
        categories.append((category, len(own), round(float(own.mean())), post, before))
    by_category = Table(
        "categories", "Mean Elo by category",
        "The paper's activities are not ours, so its ratings are not on the same field; beside them as an orientation.",
        ("category", "activities", "Elo", "published, post-trained", "published, base"), tuple(categories),
    )  # fmt: skip
    listed = sorted(zip(asked.activities.texts, asked.activities.categories, ratings, strict=True), key=lambda row: -row[2].value)
    activities = Table(
        "activities", "Ratings", "Elo with bootstrap interval over the activities that each one meets; mean 1500.",
        ("activity", "category", "Elo", "interval"),
        tuple((text, category, round(e.value), f"{e.low:.0f} to {e.high:.0f}") for text, category, e in listed),
    )  # fmt: skip
    return emotions, by_category, activities


def raw(bench: Bench, asked: Asked, held_out: Asked | str, steered: Steered | None) -> dict[str, Mapping[str, Sequence[Any]]]:
    sets = [asked] if isinstance(held_out, str) else [asked, held_out]
    probes: dict[str, Sequence[Any]] = {
        "activity": [i for one in sets for i in one.activities.ids],
        "category": [c for one in sets for c in one.activities.categories],
        "held_out": [one is not asked for one in sets for _ in one.activities.ids],
        "steered": [bool(half) for one in sets for half in one.activities.steered],
        "elo": [float(rating) for one in sets for rating in one.ratings],
        **{name: [float(x) for one in sets for x in one.scores[:, i]] for i, name in enumerate(bench.vectors.names)},
    }
    answers: dict[str, list[Any]] = {c: [] for c in ("arm", "kind", "strength", "first", "second", "log_a", "log_b")}
    parts: list[tuple[Activities, str, str, float, np.ndarray]] = [
        (one.activities, "plain", "plain", 0.0, one.answers) for one in sets
    ]
    for one, arms in zip(sets, (steered, steered.again if steered else None), strict=False):
        if arms:
            parts += [(one.activities, a.name, a.kind, a.strength, x) for a, x in zip(arms.arms, arms.answers, strict=True)]
    for activities, name, kind, strength, table in parts:
        steered_half = activities.steered
        for i, j in itertools.permutations(range(len(activities)), 2):
            if kind == "plain" or steered_half[i] or steered_half[j]:
                row = (name, kind, strength, activities.ids[i], activities.ids[j], float(table[i, j, 0]), float(table[i, j, 1]))
                for column, value in zip(answers.values(), row, strict=True):
                    column.append(value)
    return {"probes": probes, "answers": answers}
