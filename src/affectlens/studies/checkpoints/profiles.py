"""What is claimed, what is read, and the profile of one checkpoint alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.engine import Result
from affectlens.stats import Null
from affectlens.studies import ALPHA, Bench, Claim, Finding, Outcome, Table
from affectlens.vectors import centred_cosine

NAME = "checkpoints"
FEW = 10
MOST = 0.5
"""Vectors keep their meaning if the lower end of the share that find themselves again is at least this."""

_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_BELOW = f"holds: p <= {ALPHA} and the interval below 0; weak: p <= {ALPHA} only; fails: otherwise"
_BEYOND = (
    f"holds: p <= {ALPHA} and the lower end of the interval above the null's band; weak: p <= {ALPHA} only; fails: otherwise"
)
_SELVES = f"holds: p <= {ALPHA} and the lower end of the interval at least {MOST:.0%}; weak: p <= {ALPHA} only; fails: otherwise"
_FAR = f"holds: p <= {ALPHA} and the upper end of the interval below the null's band; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "categories", "Each category of hard prompts has a profile of its own", _ABOVE, figure="categories"),
        Claim(NAME, "hard", "On hard prompts the profile after training resembles that before", _ABOVE, "0.67", "profiles"),
        Claim(NAME, "neutral", "On neutral prompts the profile after training resembles that before", _ABOVE, "0.83", "profiles"),
        Claim(NAME, "same_shift", "Training shifts the profile alike on hard and on neutral prompts", _ABOVE, "0.90", "alike"),
        Claim(NAME, "largest", "Training moves an emotion further than directions without meaning", _BEYOND, figure="shifts"),
        Claim(NAME, "published", "Emotions shift in the direction in which the paper's model shifted", _ABOVE, figure="shifts"),
        Claim(NAME, "pleasure", "The more pleasant an emotion, the further down it shifts", _BELOW, "-0.23", "ratings"),
        Claim(NAME, "arousal", "The more aroused an emotion, the further down it shifts", _BELOW, "-0.39", "ratings"),
        Claim(NAME, "growth", "Shifts grow with every layer up to two thirds of the depth", _ABOVE, "monotonically", "layers"),
        Claim(NAME, "preserved", "Vectors of before are nearest to those of the same emotion after", _SELVES, figure="vectors"),
        Claim(NAME, "drift", "Training moved the vectors further than other stories would", _FAR, figure="vectors"),
    )
}


def transcript_for(bench: Bench) -> bool:
    """Whether prompts are put as a plain transcript: the same format for both checkpoints."""
    return bench.plain or bool(bench.base and bench.engine and bench.base.engine.info.template != bench.engine.info.template)


@dataclass(frozen=True)
class Reading:
    """Residuals at the reply position ``(P, L, D)``, and the token ids of each prompt."""

    residuals: np.ndarray
    ids: list[tuple[int, ...]]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Reading:
        read = [(result.readings[0].values.astype(np.float64), result.layout.ids) for result in results]
        return cls(np.stack([values for values, _ in read]), [ids for _, ids in read])

    @cached_property
    def units(self) -> np.ndarray:
        """Residuals scaled to length 1: the mean of their products with a direction is the mean cosine."""
        return np.asarray(self.residuals / np.maximum(np.linalg.norm(self.residuals, axis=2, keepdims=True), 1e-30))


@dataclass(frozen=True)
class Prompts:
    """What one checkpoint reads in the prompts, and how they are grouped."""

    bench: Bench
    records: list[dict[str, Any]]
    later: Reading

    @cached_property
    def hard(self) -> np.ndarray:
        return np.array([record["kind"] == "hard" for record in self.records])

    @cached_property
    def categories(self) -> np.ndarray:
        """Kind and category of each prompt: what is resampled within."""
        return np.array([f"{record['kind']}: {record['category']}" for record in self.records])

    @property
    def options(self) -> dict[str, Any]:
        return {"draws": self.bench.draws, "seed": self.bench.seed}

    def cosines(self, reading: Reading, *, centred: bool = False) -> np.ndarray:
        """Cosines ``(P, N)`` at the vectors' layer: plain, or centred on the later checkpoint's stories."""
        vectors, row = self.bench.vectors, self.bench.vectors.row()
        centre = vectors.centre[row].astype(np.float64) if centred else np.zeros(vectors.directions.shape[-1])
        return centred_cosine(reading.residuals[:, row], vectors.at().astype(np.float64), centre)

    @cached_property
    def after(self) -> np.ndarray:
        return self.cosines(self.later)

    @cached_property
    def where(self) -> str:
        plain = "plain transcript" if transcript_for(self.bench) else "chat template"
        return f"layer {self.bench.vectors.layer}, {plain}"

    @cached_property
    def random(self) -> np.ndarray:
        """Readings of random changes of the residual ``(draws, N)``: mixtures of the differences between prompts."""
        rng = np.random.default_rng([self.bench.seed, 3])
        return np.asarray(rng.normal(size=(self.bench.draws, len(self.after))) @ (self.after - self.after.mean(axis=0)))

    def null(self, observed: float, other: np.ndarray, words: np.ndarray, side: stats.Side, kind: str) -> Null:
        """Correlation of random changes, read at these words, with ``other``."""
        x = self.random[:, words] - self.random[:, words].mean(axis=1, keepdims=True)
        y = other - other.mean()
        rows = iter(x @ y / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y), 1e-30))
        return stats.permutation_null(float, observed, permute=lambda _: next(rows), draws=len(x), side=side, kind=kind)


@dataclass(frozen=True)
class Pair(Prompts):
    """The same prompts read by the earlier checkpoint as well, along the later one's directions."""

    earlier: Reading

    @cached_property
    def before(self) -> np.ndarray:
        return self.cosines(self.earlier)

    @cached_property
    def change(self) -> np.ndarray:
        """Paired differences ``(P, N)``, later minus earlier."""
        return self.after - self.before

    @cached_property
    def by_layer(self) -> np.ndarray:
        """Paired differences of hard prompts at every layer, ``(P, L, N)``."""
        moved = (self.later.units - self.earlier.units)[self.hard]
        return np.stack([moved[:, i] @ at.T.astype(np.float64) for i, at in enumerate(self.bench.vectors.directions)], axis=1)

    @cached_property
    def moved(self) -> np.ndarray:
        """Mean change of the unit residual by kind, hard and neutral, ``(2, L, D)``: its products with directions are shifts."""
        change = self.later.units - self.earlier.units
        return np.stack([change[kind].mean(axis=0) for kind in (self.hard, ~self.hard)])


# ── one checkpoint ──


def alone(prompts: Prompts) -> Outcome:
    """The profile of the one checkpoint: what each category of prompts has of its own."""
    vectors, hard = prompts.bench.vectors, prompts.hard
    names = [str(name) for name in np.unique(prompts.categories)]  # sorted: the hard ones first
    means = np.stack([prompts.after[prompts.categories == name].mean(axis=0) for name in names])
    means -= means.mean(axis=0)
    both = stats.bootstrap_each(
        lambda rows: prompts.after[rows[hard]].mean(axis=0) - prompts.after[rows[~hard]].mean(axis=0),
        prompts.categories,
        **prompts.options,
    )
    shown = [name for name in SHOWCASE if name in vectors] or list(vectors.names[: len(SHOWCASE)])
    data = {
        "layer": vectors.layer,
        "names": list(vectors.names),
        "clusters": [_cluster(prompts.bench, name) for name in vectors.names],
        "hard": rounded(prompts.after[hard].mean(axis=0)),
        "neutral": rounded(prompts.after[~hard].mean(axis=0)),
        "contrast": [rounded(e.value for e in both), rounded(e.low for e in both), rounded(e.high for e in both)],
        "categories": names,
        "columns": shown,
        "matrix": [rounded(line[[vectors.index(name) for name in shown]]) for line in means],
    }
    rows = []
    for category, line in zip(names, means, strict=True):
        order = np.argsort(-line)
        high, low = (", ".join(f"{vectors.names[i]} {line[i]:+.3f}" for i in end) for end in (order[:4], order[::-1][:4]))
        kind, _, rest = category.partition(": ")
        rows.append((rest, kind, int((prompts.categories == category).sum()), high, low))
    caption = "Plain cosine of a category minus the mean over categories: what reads highest and lowest there."
    head = ("category", "kind", "prompts", "highest", "lowest")
    table = Table("categories", f"Profile of each category of prompts, {prompts.where}", caption, head, tuple(rows))
    raw: dict[str, dict[str, Any]] = {"after": columns(prompts, prompts.after)}
    return Outcome((_categories(prompts),), (table,), data, raw)


def _categories(prompts: Prompts) -> Finding:
    """Do two halves of the hard prompts agree on what each category has of its own?"""
    claim, scores = CLAIMS["categories"], prompts.after[prompts.hard]
    names, code = np.unique(prompts.categories[prompts.hard], return_inverse=True)
    half = np.empty(len(code), dtype=np.intp)
    for c in range(len(names)):  # every second prompt of each category
        half[code == c] = np.arange((code == c).sum()) % 2
    if np.bincount(code).min() < 4 or len(names) < 2:
        return claim.untestable("Two categories of hard prompts with four prompts each are needed to compare halves.")

    def agreement(scores: np.ndarray, codes: np.ndarray) -> float:
        sides = []
        for side in (0, 1):
            means = np.stack([scores[(codes == c) & (half == side)].mean(axis=0) for c in range(len(names))])
            sides.append((means - means.mean(axis=0)).ravel())
        return float(np.corrcoef(sides[0], sides[1])[0, 1])

    def exchanged(rng: np.random.Generator) -> np.ndarray:
        codes = code.copy()
        for side in (0, 1):
            codes[half == side] = rng.permutation(codes[half == side])
        return codes

    estimate = stats.bootstrap(lambda rows: agreement(scores[rows], code), 2 * code + half, **prompts.options)
    null = stats.permutation_null(
        lambda codes: agreement(scores, codes),
        estimate.value,
        permute=exchanged,
        side="greater",
        kind="categories exchanged between prompts",
        **prompts.options,
    )
    whole = np.corrcoef(scores.mean(axis=0), prompts.after[~prompts.hard].mean(axis=0))[0, 1]
    note = (
        f"What {len(names)} categories of {len(code)} hard prompts have of their own, correlated between halves of the prompts; "
        f"{prompts.where}. The whole profiles of hard and of neutral prompts correlate at {whole:.2f}."
    )
    return claim.tested(estimate, null, estimate.low > 0, note)


def _cluster(bench: Bench, name: str) -> str:
    return (bench.concepts[name].cluster if name in bench.concepts else None) or "other"


def columns(prompts: Prompts, scores: np.ndarray) -> dict[str, Any]:
    # "kind" is an emotion, too: the columns of labels have names that no concept has
    labels = {f"prompt {key}": [record[key] for record in prompts.records] for key in ("id", "kind", "category")}
    return {**labels, **{name: scores[:, i] for i, name in enumerate(prompts.bench.vectors.names)}}


def rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 5) for value in values]
