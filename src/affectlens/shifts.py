"""How far a model's readings have moved since a start, and whether that is further than anything would have moved.

The same prompts are read at the start and later, at the reply position, along the same directions. What is counted:

* **z.** The mean over prompts of the centred cosine with a direction, later minus start, in standard deviations over the prompts
  at the start. The interval is Student's over the paired differences.
* **Random directions.** Tuning a model at all moves every reading. So random directions of the same norm, without the neutral
  components as the vectors are, are counted in the same way, each in its own standard deviation: isotropic ones, and random
  mixtures of the vectors, which lie where emotions lie and mean none of them. An emotion stands out when its interval excludes 0
  and its z lies beyond 95 % of both kinds. With fewer than :data:`MIXED` vectors a mixture resembles one of them: then only
  isotropic ones count.
* **Distance.** The root mean square of z over all emotions. Beside it stand what it would be if nothing had moved (the signs of
  the paired differences exchanged prompt by prompt), and what it is over random directions.
* **Drift.** Vectors are a ruler that training may bend. They are fitted anew on a few texts, and their cosine with the vectors is
  compared with what the same few texts gave at the start: that is the most they can give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy import stats as distributions

from affectlens.effects import random_directions
from affectlens.errors import FormatError
from affectlens.stats import Estimate
from affectlens.vectors import ConceptVectors, fit_means, group_means

FEW = 10
"""Fewer prompts than this have no spread to count in."""

MIXED = 10
"""From so many vectors on random mixtures of them are something else than they are."""

DIRECTIONS, FLIPS, DEALS = 1000, 1000, 200
"""Random directions of each kind, exchanges of signs, and deals of labels."""

WITHIN = 0.95
"""Share of what is random that a band holds."""


def check_prompts(n: int) -> None:
    """Refuse too few prompts.

    Raises:
        FormatError: They have no spread to count in.
    """
    if n < FEW:
        raise FormatError(f"{n} prompts: give {FEW} or more, since a shift is counted in their standard deviations")


@dataclass(frozen=True, eq=False)
class Shift:
    """How far readings have moved since the start.

    Args:
        names: The ``N`` emotions.
        z: Mean shift of each, in standard deviations over prompts at the start, ``(N,)``.
        margin: Half of the width of its 95 % interval over prompts, ``(N,)``.
        random: 95 % of random directions have a smaller absolute z.
        distance: Root mean square of z over all emotions; its interval is the jackknife's over prompts.
        still: 95 % of what the distance would be if no prompt had moved in any direction for more than chance.
        random_distance: Root mean square of z over random directions.
    """

    names: tuple[str, ...]
    z: np.ndarray
    margin: np.ndarray
    random: float
    distance: Estimate
    still: float
    random_distance: float

    def __getitem__(self, name: str) -> Estimate:
        """The shift of an emotion with its interval."""
        i = self.names.index(name)
        z, margin = float(self.z[i]), float(self.margin[i])
        return Estimate(z, z - margin, z + margin, self.distance.n)

    @property
    def beyond(self) -> np.ndarray:
        """Which emotions moved for certain, and further than random directions, ``(N,)`` booleans."""
        return np.abs(self.z) > np.maximum(self.margin, self.random)

    def rank(self, name: str) -> int:
        """Place of an emotion among all shifts, 1 being the largest upwards."""
        return int((self.z > self.z[self.names.index(name)]).sum()) + 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the names."""
        arrays = {key: [round(float(value), 5) for value in getattr(self, key)] for key in ("z", "margin")}
        rest = {key: getattr(self, key) for key in ("random", "still", "random_distance")}
        return {**arrays, **rest, "distance": self.distance.as_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], names: Sequence[str]) -> Shift:
        """What :meth:`as_dict` gave."""
        arrays = {key: np.array(fields[key], dtype=np.float64) for key in ("z", "margin")}
        return cls(tuple(names), **{**fields, **arrays, "distance": Estimate.from_dict(fields["distance"])})


@dataclass(frozen=True, eq=False)
class Start:
    """What was read at the start, from which shifts are counted.

    Args:
        vectors: What is read; all of their concepts, at their layer.
        residuals: Of each prompt at the start, ``(P, D)``.
        seed: Of random directions and exchanged signs.

    Raises:
        FormatError: Too few prompts, or all of them read the same.

    Example:
        >>> start = Start(vectors, before)                     # doctest: +SKIP
        >>> start.shift(after)["calm"]                         # doctest: +SKIP
        Estimate(value=1.3, low=1.1, high=1.5, n=30, level=0.95, unit='')
    """

    vectors: ConceptVectors
    residuals: np.ndarray
    seed: int = 0

    def __post_init__(self) -> None:
        check_prompts(len(self.residuals))
        if len(same := np.flatnonzero(self._spread <= 1e-9)):
            name = self.vectors.names[int(same[0])]
            raise FormatError(f"the prompts all read the same for {name!r}: give prompts that differ")

    def shift(self, residuals: np.ndarray, *, since: np.ndarray | None = None) -> Shift:
        """How far the same prompts have moved.

        Args:
            residuals: Of each prompt now, ``(P, D)``.
            since: What they are compared with (default: the start); what is counted in stays the spread at the start.
        """
        moved = self._units(residuals) - (self._start if since is None else self._units(since))
        each = moved @ self._directions.T / self._spread
        n, z = len(each), each.mean(axis=0)
        quantile = float(distributions.t.ppf((1 + WITHIN) / 2, n - 1))
        apart = np.abs(moved.mean(axis=0) @ self._random[0]) / self._random[1]
        kinds = np.split(apart, len(apart) // DIRECTIONS)
        distance = _jackknife(float(_rms(z)), _rms((n * z - each) / (n - 1)), np.zeros(n, dtype=np.intp))
        signs = np.random.default_rng([self.seed, 31]).choice([-1.0, 1.0], size=(FLIPS, n))
        return Shift(
            names=self.vectors.names,
            z=z,
            margin=quantile * each.std(axis=0, ddof=1) / np.sqrt(n),
            random=max(float(np.quantile(kind, WITHIN)) for kind in kinds),
            distance=replace(distance, low=max(0.0, distance.low)),
            still=float(np.quantile(_rms(signs @ each / n), WITHIN)),
            random_distance=max(float(_rms(kind)) for kind in kinds),
        )

    def _units(self, residuals: np.ndarray) -> np.ndarray:
        """What cosines are products of: residuals without the centre, scaled to length 1."""
        moved = np.asarray(residuals, dtype=np.float64) - self.vectors.centre[self.vectors.row()]
        return np.asarray(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-30))

    @cached_property
    def _directions(self) -> np.ndarray:
        return self.vectors.at().astype(np.float64)

    @cached_property
    def _start(self) -> np.ndarray:
        return self._units(self.residuals)

    @cached_property
    def _spread(self) -> np.ndarray:
        return np.asarray((self._start @ self._directions.T).std(axis=0, ddof=1))

    @cached_property
    def _random(self) -> tuple[np.ndarray, np.ndarray]:
        """Random directions ``(D, k)`` and the spread of the prompts along each, ``(k,)``."""
        basis = self.vectors.neutral[self.vectors.row()].astype(np.float64)
        drawn = random_directions(DIRECTIONS, self._directions.shape[1], seed=self.seed)
        kinds = [drawn - drawn @ basis.T @ basis]
        if len(self.vectors) >= MIXED:
            rng = np.random.default_rng([self.seed, 32])
            kinds.append(rng.normal(size=(DIRECTIONS, len(self.vectors))) @ self._directions)
        found = np.concatenate(kinds)
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)
        return found.T, np.maximum((self._start @ found.T).std(axis=0, ddof=1), 1e-30)


# ── the ruler itself ──


@dataclass(frozen=True)
class Drift:
    """Whether the vectors still are what they were, seen by fitting them anew on a few texts.

    Args:
        kept: Mean cosine of the vectors with those of the few texts now.
        most: The same at the start: what the few texts give where nothing has moved.
        change: The first minus the second, paired over texts.
        chance: 95 % of the mean cosine at the start when the texts' concepts are dealt at random.
    """

    kept: Estimate
    most: Estimate
    change: Estimate
    chance: float

    @property
    def verdict(self) -> Literal["moved", "kept", "untestable"]:
        """``moved`` when the cosine has fallen for certain; ``untestable`` when chance gives as much as the texts do."""
        if self.most.low <= self.chance:
            return "untestable"
        return "moved" if self.change.high < 0 else "kept"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {key: value.as_dict() if isinstance(value, Estimate) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Drift:
        """What :meth:`as_dict` gave."""
        kept, most, change = (Estimate.from_dict(fields[key]) for key in ("kept", "most", "change"))
        return cls(kept, most, change, fields["chance"])


def check_texts(concepts: Sequence[str]) -> None:
    """Refuse texts that no vectors can be fitted on.

    Args:
        concepts: Of each text.

    Raises:
        FormatError: Fewer than two concepts, or one with a single text.
    """
    counts = Counter(concepts)
    if len(counts) < 2 or min(counts.values()) < 2:
        raise FormatError(f"drift texts of {len(counts)} concepts: give two concepts or more, with two texts of each at least")


def drift_of(vectors: ConceptVectors, concepts: Sequence[str], start: np.ndarray, now: np.ndarray, *, seed: int = 0) -> Drift:
    """Fit vectors anew on a few texts and compare.

    Args:
        vectors: The vectors, which are compared at their layer.
        concepts: Of each text.
        start, now: Mean residual of each text, ``(n, D)``.
        seed: Of the deals.

    Raises:
        FormatError: Fewer than two concepts, or one with a single text.
    """
    check_texts(concepts)
    names, code = np.unique(np.array(concepts, dtype=str), return_inverse=True)
    own = vectors.at()[[vectors.index(name) for name in names]].astype(np.float64)
    basis = vectors.neutral[vectors.row()].astype(np.float64)

    def cosine(residuals: np.ndarray, code: np.ndarray) -> float:
        means = group_means(residuals, code, range(len(names)))  # type: ignore[arg-type]
        return float((fit_means(means, basis).directions * own).sum(axis=1).mean())

    rest = [np.arange(len(code)) != i for i in range(len(code))]
    whole = [cosine(residuals, code) for residuals in (now, start)]
    without = [np.array([cosine(residuals[rows], code[rows]) for rows in rest]) for residuals in (now, start)]
    rng = np.random.default_rng([seed, 33])
    dealt = [cosine(start, rng.permutation(code)) for _ in range(DEALS)]
    return Drift(
        kept=_jackknife(whole[0], without[0], code),
        most=_jackknife(whole[1], without[1], code),
        change=_jackknife(whole[0] - whole[1], without[0] - without[1], code),
        chance=float(np.quantile(dealt, WITHIN)),
    )


def _rms(values: np.ndarray) -> Any:
    return np.sqrt((values**2).mean(axis=-1))


def _jackknife(value: float, without: np.ndarray, code: np.ndarray) -> Estimate:
    """The 95 % interval of a value from what it is without each unit in turn, units being grouped by ``code``."""
    variance = 0.0
    for c in range(int(code.max()) + 1):
        own = without[code == c]
        variance += (len(own) - 1) / len(own) * float(((own - own.mean()) ** 2).sum())
    degrees = len(code) - int(code.max()) - 1
    half = float(distributions.t.ppf((1 + WITHIN) / 2, degrees)) * np.sqrt(variance)
    return Estimate(value, value - half, value + half, len(code))
