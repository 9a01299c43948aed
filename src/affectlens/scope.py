"""At which tokens something acts on the residual stream, while what is read there, and how much of it: :class:`Scope`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from affectlens.errors import EngineError
from affectlens.layout import Where


def array_hash(*arrays: np.ndarray) -> str:
    """Content hash of float32 arrays, the same on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Schedule:
    """How much of a term acts at each token of the reply, counted from 0; a prefill is the beginning of the reply.

    Args:
        kind: ``ramp`` rises from ``1 / tokens`` at the first token to all of it at token ``tokens - 1``, and leaves the prompt
            alone. ``decay`` falls from all of it at the first token to nothing at token ``tokens``, and acts fully in the prompt.
        tokens: How many tokens that takes.

    Example:
        >>> Schedule("ramp", 4).shares(np.arange(-1, 5)).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        >>> Schedule("decay", 4).shares(np.arange(-1, 5)).tolist()
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    kind: Literal["ramp", "decay"]
    tokens: int

    def __post_init__(self) -> None:
        if self.kind not in ("ramp", "decay"):
            raise EngineError(f"the schedule is {self.kind!r}: use ramp or decay")
        if self.tokens < 1:
            raise EngineError(f"a {self.kind} over {self.tokens} tokens takes no time: use 1 or more")

    def __str__(self) -> str:
        return f"{self.kind} over {self.tokens}"

    def shares(self, numbers: np.ndarray) -> np.ndarray:
        """The share at tokens with these numbers in the reply, float32; tokens of the prompt have negative numbers."""
        done = (numbers + 1) / self.tokens if self.kind == "ramp" else 1 - numbers / self.tokens
        return np.clip(done, 0, 1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Gate:
    """Lets a term act only at tokens where a reading is above or below a value. Made by ``vectors.gate``.

    The reading is the cosine of the token's residual, minus ``centre``, with the direction, in ``deviation`` from ``mean``. It is
    taken at every token anew, in the same forward pass, before anything is done at the gate's layer: what other terms did at
    lower layers and at earlier tokens is in it. It switches sharply: at a token that reads exactly the limit, rounding decides.

    Args:
        name: What the direction stands for.
        layer: Where it is read: not above any layer that the term acts on.
        direction: Unit direction, ``(D,)`` float32.
        centre: Subtracted from the residual before the cosine is taken, ``(D,)``; None for nothing.
        mean: Of the reading over the baseline; 0 together with ``deviation=1`` reads plain cosines.
        deviation: Standard deviation over the baseline.
        above: Open only where the reading is above this.
        below: Open only where the reading is below this.
    """

    name: str
    layer: int
    direction: np.ndarray
    centre: np.ndarray | None = None
    mean: float = 0.0
    deviation: float = 1.0
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        numbers = [n for n in (self.mean, self.deviation, self.above, self.below) if n is not None]
        if (self.above is None and self.below is None) or not np.isfinite(numbers).all() or self.deviation <= 0:
            raise EngineError(f"the gate on {self.name!r} needs above or below, finite numbers, and a deviation above 0")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise EngineError(f"the gate on {self.name!r} is never open: above={self.above} must be less than below={self.below}")
        if self.direction.ndim != 1 or (self.centre is not None and self.centre.shape != self.direction.shape):
            raise EngineError(f"the gate on {self.name!r} needs one direction (D,), and a centre as wide or none")

    def __str__(self) -> str:
        unit = "" if (self.mean, self.deviation) == (0, 1) else " z"
        low, high = (f" {sign} {n:g}" if n is not None else "" for sign, n in ((">", self.above), ("<", self.below)))
        return f"while {self.name}{unit}{low}{high} @ layer {self.layer}"

    @cached_property
    def _hash(self) -> str:
        return array_hash(self.direction, *(() if self.centre is None else (self.centre,)))

    def content(self) -> tuple[Any, ...]:
        numbers = tuple(None if n is None else float(n) for n in (self.mean, self.deviation, self.above, self.below))
        return (self.name, int(self.layer), self._hash, *numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gate) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())

    def score(self, residuals: np.ndarray) -> np.ndarray:
        """The reading at each of ``residuals (T, D)``."""
        moved = residuals.astype(np.float32) - (0 if self.centre is None else self.centre)
        cosine = moved @ self.direction / np.maximum(np.linalg.norm(moved, axis=-1), 1e-30)
        return (cosine - np.float32(self.mean)) / np.float32(self.deviation)

    def opens(self, residuals: np.ndarray) -> np.ndarray:
        """At which of ``residuals (T, D)`` it is open."""
        score = self.score(residuals)
        return (score > (-np.inf if self.above is None else self.above)) & (
            score < (np.inf if self.below is None else self.below)
        )


@dataclass(frozen=True)
class Scope:
    """At which tokens something acts, while which gate is open, and how much of it."""

    where: Where = Where()
    gate: Gate | None = None
    schedule: Schedule | None = None

    def shares(self, mask: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The share that acts at each token if the gate is open, float32.

        Args:
            mask: Which tokens ``where`` selects, ``(T,)``.
            numbers: Their numbers in the reply, negative in the prompt.
        """
        return mask.astype(np.float32) if self.schedule is None else mask * self.schedule.shares(numbers)
