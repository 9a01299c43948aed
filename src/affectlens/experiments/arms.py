"""The arms of a sweep: what is done to the model in each of them, controls included.

A sweep asks what a concept does at several strengths, which says little by itself: any push of that length might do the same.
So beside every sweep stand random directions of equal norm, and vectors that come out when the stories' emotions are dealt at
random. Both run where an effect would be largest, at the lowest and at the highest strength of all sweeps. Two arms check the
instrument: in one nothing is steered, in the other something is, by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from affectlens.activations import Activations
from affectlens.effects import along, random_directions
from affectlens.engine import Steering, Where
from affectlens.errors import FormatError
from affectlens.vectors import ConceptVectors, fit_means, group_means

Kind = Literal["baseline", "zero", "concept", "random", "shuffled"]

PLACES = {"all": Where(), "reply": Where(part="response")}
"""Where arms steer: at every token, as published, or in the reply alone."""


MOST = 101
"""Strengths in one sweep."""


@dataclass(frozen=True)
class Arm:
    """What is done to the model in one arm.

    Args:
        id: ``baseline``, ``zero``, ``desperate+0.05``, ``random-3+0.1``, ``shuffled-desperate+0.1``.
        kind: What it is there for.
        name: Of the direction; empty for the baseline.
        strength: In multiples of the mean residual norm at the layer that is steered.
        steering: Ready for a request.
    """

    id: str
    kind: Kind
    name: str
    strength: float
    steering: Steering


BASELINE = Arm("baseline", "baseline", "", 0.0, Steering())


@dataclass(frozen=True)
class Sweep:
    """A concept at several strengths, in rising order; 0 among them is the baseline.

    Raises:
        FormatError: No strength but 0, or one that is no finite number.

    Example:
        >>> Sweep.parse("desperate=-0.1:0.1:5")
        Sweep(name='desperate', strengths=(-0.1, -0.05, 0.0, 0.05, 0.1))
        >>> Sweep.parse("calm=0.05,-0.05")
        Sweep(name='calm', strengths=(-0.05, 0.05))
    """

    name: str
    strengths: tuple[float, ...]

    def __post_init__(self) -> None:
        given = np.array(self.strengths, dtype=np.float64)
        if not np.isfinite(given).all():
            raise FormatError(f"a strength of {self.name!r} is not finite: give numbers like -0.1 or 0.05")
        # No trace of how a strength was computed, in ids and content hashes: 0.05, not 0.05000000000000001.
        kept = sorted({float(f"{strength:.6g}") + 0.0 for strength in given.tolist()})
        if not any(kept):
            raise FormatError(
                f"the sweep of {self.name!r} has no strength but 0, which is the baseline: give some, like -0.1,0.1"
            )
        object.__setattr__(self, "strengths", tuple(kept))

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """``NAME=LOW:HIGH:COUNT`` (evenly spaced) or ``NAME=STRENGTH,STRENGTH,…``.

        Raises:
            FormatError: Not of this form.
        """
        name, equals, given = text.rpartition("=")
        fix = "write NAME=LOW:HIGH:COUNT or NAME=STRENGTH,STRENGTH, for example desperate=-0.1:0.1:9 or calm=-0.05,0.05"
        if not equals or not name.strip():
            raise FormatError(f"{text!r} is no sweep: {fix}")
        try:
            if ":" in given:
                low, high, count = given.split(":")
                ends = float(low), float(high)
                known = 2 <= int(count) <= MOST and all(map(math.isfinite, ends))
                strengths = np.linspace(*ends, int(count)).tolist() if known else []
            else:
                strengths = [float(part) for part in given.split(",")]
        except ValueError:
            strengths = []
        if not strengths:
            raise FormatError(f"{text!r} is no sweep: {fix}")
        return cls(name.strip(), tuple(strengths))


def arms(
    vectors: ConceptVectors,
    sweeps: Sequence[Sweep],
    *,
    where: Where = Where(),
    random: int = 5,
    shuffled: int = 1,
    seed: int = 0,
    activations: Activations | None = None,
) -> tuple[Arm, ...]:
    """The arms of some sweeps: baseline, strength 0, every strength, random directions, vectors of shuffled stories.

    Args:
        vectors: Steer at their calibrated layer, else at their own.
        sweeps: A concept each.
        where: At which tokens.
        random: How many random directions of equal norm.
        shuffled: How many vectors of stories whose emotions were dealt at random, of the swept concepts in turn.
        seed: Of the random directions and of the deals.
        activations: Of the stories; without them there are no shuffled arms.

    Returns:
        The baseline first, then strength 0; the baseline alone without a sweep.

    Raises:
        FormatError: Two sweeps of one concept.
        UnknownName: There is no such concept.
        MismatchError: The vectors have no unit of strength.

    Example:
        >>> [arm.id for arm in arms(vectors, [Sweep.parse("calm=-0.1,0,0.1")], random=1)]                   # doctest: +SKIP
        ['baseline', 'zero', 'calm-0.1', 'calm+0.1', 'random-1-0.1', 'random-1+0.1']
    """
    names = [sweep.name for sweep in sweeps]
    if not names:
        return (BASELINE,)
    if twice := [name for name in names if names.count(name) > 1]:
        raise FormatError(f"{twice[0]!r} is swept twice: give all its strengths in one sweep")
    found = [BASELINE, Arm("zero", "zero", names[0], 0.0, (0.0 * vectors[names[0]]).at(where))]
    for sweep in sweeps:
        found += [
            _arm("concept", sweep.name, strength, strength * vectors[sweep.name].at(where))
            for strength in sweep.strengths
            if strength
        ]
    layer, width = vectors.steering_layer, vectors.directions.shape[-1]
    norm = float(vectors.residual_norms[vectors.row(layer)])
    controls: list[tuple[Kind, str, np.ndarray]] = [
        ("random", f"random-{i}", direction) for i, direction in enumerate(random_directions(random, width, seed=seed), start=1)
    ]
    if activations is not None and layer in activations.layers:
        controls += [
            ("shuffled", name, direction)
            for name, direction in _shuffled(activations, vectors, names, layer=layer, n=shuffled, seed=seed)
        ]
    every = [strength for sweep in sweeps for strength in sweep.strengths]
    ends = [strength for strength in dict.fromkeys((min(every), max(every))) if strength]
    for kind, name, direction in controls:
        for strength in ends:
            steering = along(direction, layer=layer, norm=norm, strength=strength, name=name).at(where)
            found.append(_arm(kind, name, strength, steering))
    return tuple(found)


def _arm(kind: Kind, name: str, strength: float, steering: Steering) -> Arm:
    return Arm(f"{name}{strength:+g}", kind, name, strength, steering)


def _shuffled(
    activations: Activations, vectors: ConceptVectors, names: Sequence[str], *, layer: int, n: int, seed: int
) -> list[tuple[str, np.ndarray]]:
    """Vectors fitted as those of the concepts are (method 4), on stories whose emotions were dealt at random: a deal each."""
    known = [name for name in names if name in activations.names]
    residuals = activations.layer(layer) if n and known else np.zeros(0)
    found = []
    for i in range(n if known else 0):
        deal = np.random.default_rng([seed, 23, i]).permutation(activations.concepts)
        means = group_means(residuals, deal, activations.names)
        fitted = fit_means(means, vectors.neutral[vectors.row(layer)].astype(np.float64)).directions
        name, round = known[i % len(known)], i // len(known)
        found.append((f"shuffled-{name}" + f"-{round + 1}" * bool(round), fitted[activations.names.index(name)]))
    return found
