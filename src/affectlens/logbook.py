"""What is kept of a training: the residuals it began with and has now, what was read on the way, and the alarms.

    OUTPUT_DIR/affectlens/start.safetensors   residuals of the prompts, and of drift texts, at the step that shifts count from
    OUTPUT_DIR/affectlens/last.safetensors    residuals of the prompts at the latest reading
    OUTPUT_DIR/affectlens/readings.jsonl      shifts of all emotions at each reading, drift, alarms, cost

Two trainings from the same start can be compared with each other (:func:`compared`): what tuning does at all is in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.corpus import records
from affectlens.errors import FormatError, MismatchError
from affectlens.runs import atomic_write
from affectlens.shifts import Drift, Shift, Start
from affectlens.vectors import ConceptVectors

FOLDER = "affectlens"
"""Where it lies in the trainer's output directory."""

_START, _LAST, _READINGS = "start.safetensors", "last.safetensors", "readings.jsonl"


@dataclass(frozen=True)
class Alarm:
    """A rule has fired.

    Args:
        rule: Its name.
        text: The rule as it was written.
        step, epoch: When.
        scores: The latest value of each score that the rule names.
    """

    rule: str
    text: str
    step: int
    epoch: float
    scores: dict[str, float]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was read at one step.

    Args:
        step, epoch: When.
        shift: Of all emotions.
        drift: Of the vectors, where it was looked at.
        alarms: That were raised.
        took: Seconds that the reading took, without drift.
        seconds: What the callback has taken so far.
        elapsed: Seconds since training began, the callback's included.
    """

    step: int
    epoch: float
    shift: Shift
    drift: Drift | None
    alarms: tuple[Alarm, ...]
    took: float
    seconds: float
    elapsed: float

    @property
    def share(self) -> float:
        """Of the time so far that was the callback's."""
        return self.seconds / max(self.elapsed, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the names of the emotions."""
        parts = {"shift": self.shift.as_dict(), "drift": self.drift and self.drift.as_dict()}
        return {**vars(self), **parts, "alarms": [asdict(alarm) for alarm in self.alarms]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], names: Sequence[str]) -> Measured:
        """What :meth:`as_dict` gave."""
        shift = Shift.from_dict(fields["shift"], names)
        drift = fields["drift"] and Drift.from_dict(fields["drift"])
        return cls(**{**fields, "shift": shift, "drift": drift, "alarms": tuple(Alarm(**each) for each in fields["alarms"])})


class Logbook:
    """The folder of one training.

    Args:
        folder: ``OUTPUT_DIR/affectlens``.
        read: Content id of what is read of the prompts, and how: a training that goes on must read the same.
        drift: Content id of the drift texts.
    """

    def __init__(self, folder: str | Path, *, read: str, drift: str) -> None:
        self.folder, self.known = Path(folder), {"read": read, "drift": drift}

    @property
    def begun(self) -> bool:
        """Whether there is a start."""
        return (self.folder / _START).exists()

    def begin(self, found: Mapping[str, np.ndarray], step: int) -> None:
        """Keep the residuals of a start; what an earlier training has left is overwritten."""
        self.write(())
        _save(self.folder / _START, found, {**self.known, "step": str(step)})

    def go_on(self, step: int, names: Sequence[str]) -> tuple[dict[str, np.ndarray], int, list[Measured]]:
        """What a training that goes on at a step left before it: residuals of its start, the step of that, and readings.

        Raises:
            MismatchError: Something else was read.
            FormatError: A file is broken.
        """
        found, meta = _load(self.folder / _START)
        if self.known.items() - meta.items():
            raise MismatchError(
                f"{self.folder / _START} was read with other vectors, prompts, template or drift texts: use the same again, or "
                f"delete it to count shifts from step {step} on"
            )
        file = self.folder / _READINGS
        try:
            kept = [Measured.from_dict(each, names) for each in records(file)] if file.exists() else []
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{file} is broken ({error}): delete it, and readings begin anew") from None
        return found, int(meta["step"]), [each for each in kept if each.step <= step]

    def write(self, readings: Sequence[Measured], residuals: np.ndarray | None = None) -> None:
        """Keep all readings, and the residuals of the latest."""
        with atomic_write(self.folder / _READINGS) as temporary:
            temporary.write_text("".join(json.dumps(each.as_dict()) + "\n" for each in readings), encoding="utf-8")
        if residuals is not None:
            _save(self.folder / _LAST, {"prompts": residuals}, {**self.known, "step": str(readings[-1].step)})


def compared(vectors: ConceptVectors, training: str | Path, control: str | Path) -> Shift:
    """How far a training has moved a model's readings beyond where another one from the same start has moved them.

    Args:
        vectors: What both were watched with.
        training, control: Their output directories.

    Raises:
        MismatchError: They did not begin alike, or were read differently.
        FormatError: There is no finished reading, or it is broken.

    Example:
        >>> compared(vectors, "out/tuned", "out/control")["nostalgic"]          # doctest: +SKIP
        Estimate(value=4.1, low=3.7, high=4.5, n=30, level=0.95, unit='')
    """
    (one, meta), (two, other) = (_load(Path(each) / FOLDER / _START) for each in (training, control))
    if meta.get("read") != other.get("read") or not np.allclose(one["prompts"], two["prompts"], rtol=1e-3, atol=1e-3):
        raise MismatchError(f"{training} and {control} do not begin alike: train the same model, watched with the same prompts")
    now, then = (_load(Path(each) / FOLDER / _LAST)[0]["prompts"] for each in (training, control))
    return Start(vectors, one["prompts"]).shift(now, since=then)


def _save(file: Path, tensors: Mapping[str, np.ndarray], meta: dict[str, str]) -> None:
    from safetensors.numpy import save

    with atomic_write(file) as temporary:
        temporary.write_bytes(save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, meta))


def _load(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as found:
            return {key: found.get_tensor(key) for key in found.keys()}, found.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file} is missing or broken ({error}): train with EmotionCallback again") from None
