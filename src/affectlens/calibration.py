"""Where and how strongly to steer, and where to read: what calibration found, kept beside the vectors it was found with.

:class:`Calibration` is plain data. ``calibration.json`` lies in the vectors' folder and names the vectors' hash, so that it is
never used with others. What measures it is the study ``calibration``; ``affectlens calibrate`` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from affectlens.errors import FormatError, UnknownName
from affectlens.runs import read_json, write_json

FILE, FORMAT, KIND = "calibration.json", 1, "affectlens-calibration"
_FIX = "delete it or run affectlens calibrate again"


@dataclass(frozen=True)
class Bounds:
    """What steering may cost: a strength is safe while all three are kept, against the same texts and replies without steering.

    Args:
        perplexity: Largest factor of the perplexity of neutral text.
        repetition: Largest rise of the share of repeated sequences of four words in replies.
        distinct: Largest fall of the share of different pairs of words in replies.
    """

    perplexity: float = 1.2
    repetition: float = 0.15
    distinct: float = 0.15

    def __post_init__(self) -> None:
        if not (self.perplexity > 1 and 0 < self.repetition <= 1 and 0 < self.distinct <= 1):
            raise FormatError(
                f"bounds {self.perplexity:g}, {self.repetition:g}, {self.distinct:g} allow nothing or everything: "
                "use a perplexity above 1, and shares above 0"
            )

    def __str__(self) -> str:
        return (
            f"perplexity of neutral text at most {self.perplexity:g} times, repetition in replies at most "
            f"{self.repetition:g} more, distinct pairs of words at most {self.distinct:g} fewer"
        )


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Args:
        layer: Where to steer.
        reading_layer: Where to read; chosen separately, by how well held-out stories are told apart there.
        safe: For each concept the lowest and the highest strength whose side effects keep the bounds, every token steered.
        measured: The concepts whose own range was measured; the others have the narrowest of these.
        bounds: What was allowed.
        fingerprint: Of the model.
        note: How it was measured, in one sentence.

    Example:
        >>> found = Calibration(4, 3, {"calm": (-0.1, 0.2)}, ("calm",), Bounds(), "f00d", "by hand")
        >>> found.strength("calm"), found.share({"calm": 0.1}), found.share({"calm": -0.2})
        (0.2, 0.5, 2.0)
    """

    layer: int
    reading_layer: int
    safe: Mapping[str, tuple[float, float]]
    measured: tuple[str, ...]
    bounds: Bounds
    fingerprint: str
    note: str = ""

    def strength(self, name: str) -> float:
        """The strength to use where none is given: the largest safe one.

        Raises:
            UnknownName: The concept was not calibrated.
        """
        return self._range(name)[1]

    def share(self, mixture: Mapping[str, float]) -> float:
        """How much of the safe range a mixture uses up: shares of its parts are added, because their directions may agree.

        Args:
            mixture: Concept to strength.

        Returns:
            At most 1 inside the safe range; infinite where no strength is safe.
        """
        total = 0.0
        for name, strength in mixture.items():
            low, high = self._range(name)
            limit = high if strength > 0 else -low
            total += 0.0 if strength == 0 else abs(strength) / limit if limit > 0 else math.inf
        return total

    def _range(self, name: str) -> tuple[float, float]:
        if name not in self.safe:
            raise UnknownName("calibrated concept", name, self.safe)
        return self.safe[name]

    def select(self, names: Sequence[str]) -> Calibration:
        """The same for these concepts only."""
        kept = {name: self._range(name) for name in names}
        return replace(self, safe=kept, measured=tuple(name for name in self.measured if name in kept))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_dict` makes an equal calibration."""
        ranges = {name: list(ends) for name, ends in self.safe.items()}
        return {**asdict(self), "safe": ranges, "measured": list(self.measured)}

    @classmethod
    def from_dict(cls, plain: Any) -> Calibration:
        """The calibration that :meth:`as_dict` was made from.

        Raises:
            FormatError: A part is missing or of a wrong kind.
        """
        try:
            given = {own.name: plain[own.name] for own in fields(cls)}
            safe = {str(name): (float(low), float(high)) for name, (low, high) in given["safe"].items()}
            if not all(math.isfinite(high - low) and low <= 0 <= high for low, high in safe.values()):
                raise ValueError("a range that does not hold 0")
            layers = {key: given[key] for key in ("layer", "reading_layer")}
            if not all(isinstance(layer, int) for layer in layers.values()):
                raise ValueError("a layer that is no number")
            bounds = Bounds(**{key: float(value) for key, value in given["bounds"].items()})
            return cls(
                **layers,
                safe=safe,
                measured=tuple(map(str, given["measured"])),
                bounds=bounds,
                fingerprint=str(given["fingerprint"]),
                note=str(given["note"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"the calibration is broken ({error!r}): run affectlens calibrate again") from None


def write_calibration(calibration: Calibration, folder: Path, *, vectors: str) -> Path:
    """Write ``calibration.json`` into the folder of vectors.

    Args:
        calibration: What was found.
        folder: Where the vectors are.
        vectors: SHA-256 of ``vectors.safetensors``: the calibration is used with these only.
    """
    path = Path(folder) / FILE
    write_json(path, {"format": FORMAT, "kind": KIND, "sha256": vectors, **calibration.as_dict()})
    return path


def read_calibration(folder: Path, *, vectors: str) -> Calibration:
    """Read ``calibration.json``.

    Args:
        folder: Where the vectors are.
        vectors: SHA-256 of their file.

    Raises:
        FormatError: It is broken, of another format, or was made with other vectors; names the file and what to do.
    """
    path = Path(folder) / FILE
    plain = read_json(path, fix=_FIX)
    if not isinstance(plain, dict) or plain.get("kind") != KIND or plain.get("format") != FORMAT:
        raise FormatError(f"{path} is no calibration that this affectlens knows: {_FIX}")
    if plain.get("sha256") != vectors:
        raise FormatError(f"{path} was made with other vectors than those beside it: {_FIX}")
    try:
        return Calibration.from_dict(plain)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
