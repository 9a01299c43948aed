"""Emotion dials: what a caller may add to the residual stream, and what becomes of a mixture that goes too far.

Strengths are multiples of the mean residual norm at the layer where vectors steer; they act at every token, as they do in the
calibration. A mixture uses up shares of the safe range that are added, since directions of emotions agree (method 5,
:meth:`affectlens.calibration.Calibration.share`): one whose parts are each safe but not all together is made smaller as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from affectlens.engine import Steering
from affectlens.errors import EngineError
from affectlens.vectors import ConceptVectors


@dataclass(frozen=True)
class Bias:
    """What was asked for, and what is used of it: emotion to strength."""

    asked: Mapping[str, float]
    used: Mapping[str, float]

    @property
    def clamped(self) -> dict[str, float]:
        """What was made smaller, and to what."""
        return {name: self.used[name] for name, strength in self.asked.items() if self.used[name] != strength}

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {"asked": dict(self.asked), "used": dict(self.used), "clamped": self.clamped}


class Dials:
    """What may be dialled with vectors.

    Args:
        vectors: With their calibration, if they have one.
        allow_unsafe: Whether strengths may leave the safe range.

    Example:
        >>> dials = Dials(vectors)                                   # doctest: +SKIP
        >>> dials.bias({"calm": 9.0}).clamped                        # doctest: +SKIP
        {'calm': 0.12}
    """

    def __init__(self, vectors: ConceptVectors, *, allow_unsafe: bool = False) -> None:
        self.vectors, self.allow_unsafe = vectors, allow_unsafe

    def safe(self, name: str) -> tuple[float, float] | None:
        """The calibrated safe range of an emotion; None where it was not measured."""
        found = self.vectors.calibration
        return None if found is None else found.safe.get(name)

    def bias(self, asked: Mapping[str, float]) -> Bias:
        """A mixture within the safe range.

        Args:
            asked: Emotion to strength.

        Raises:
            UnknownName: There is no such emotion; names the nearest ones.
            EngineError: Nobody has measured what is safe, or a direction has no unit.
        """
        for name in asked:
            self.vectors.index(name)
        if not any(asked.values()) or self.allow_unsafe:
            return Bias(dict(asked), dict(asked))
        found = self.vectors.calibration
        if found is None:
            raise EngineError(
                "how strongly these vectors may steer was never measured: run affectlens calibrate, or start the server with "
                "--allow-unsafe"
            )
        used = {}
        for name, strength in asked.items():
            low, high = found.safe[name]
            used[name] = min(max(strength, low), high)
        if (share := found.share(used)) > 1:
            used = {name: strength / share for name, strength in used.items()}
        return Bias(dict(asked), used)

    def check(self, mixture: Mapping[str, float], *, where: str) -> None:
        """Refuse a mixture of a rule that comes from outside and leaves the safe range.

        Raises:
            UnknownName: There is no such emotion.
            EngineError: It is too strong; says what would do.
        """
        bias = self.bias(mixture)
        if bias.clamped:
            said = ", ".join(f"{name} = {strength:.3g}" for name, strength in bias.used.items())
            raise EngineError(f"{where} steers outside the safe range: add {{ {said} }} at most")

    def steering(self, bias: Bias) -> Steering:
        """The mixture as steering; it carries the directions of the layers that it acts on, and no others."""
        mixture = Steering()
        for name, strength in bias.used.items():
            if strength:
                mixture = mixture + strength * self.vectors[name]
        return Steering(tuple(_bare(term) for term in mixture.terms))


def _bare(term: Any) -> Any:
    rows = [term.row(layer) for layer in term.layers]
    return replace(term, available=term.layers, directions=term.directions[rows], norms=term.norms[rows])
