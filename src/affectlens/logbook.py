"""What is kept of a training: the residuals it began with and has now, what was read on the way, and the alarms.

    OUTPUT_DIR/affectlens/start.safetensors        residuals of the prompts, and of drift texts, where shifts count from
    OUTPUT_DIR/affectlens/step-000100.safetensors  residuals of the prompts at a reading
    OUTPUT_DIR/affectlens/readings.jsonl           shifts of all emotions at each reading, drift, alarms, cost

Tuning moves readings whatever a model is tuned to. A :class:`Control` is another training from the same start, on texts without
what is looked for: what a training does beyond it is due to the texts.
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
from affectlens.shifts import Drift, Shift

FOLDER = "affectlens"
"""Where it lies in the trainer's output directory."""

_START, _READINGS = "start.safetensors", "readings.jsonl"


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
        control: The step of the control beyond which the shift is counted; None where it is counted from the start.
        alarms: That were raised.
        took: Seconds that the reading took, without drift.
        seconds: What the callback has taken so far.
        elapsed: Seconds since training began, the callback's included.
    """

    step: int
    epoch: float
    shift: Shift
    drift: Drift | None
    control: int | None
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
        """Keep the residuals of a start; what an earlier training has left is removed."""
        self._forget(after=-1)
        self._write(())
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
        self._forget(after=step)
        return found, int(meta["step"]), [each for each in kept if each.step <= step]

    def keep(self, readings: Sequence[Measured], residuals: np.ndarray) -> None:
        """Keep all readings, and the residuals of the latest."""
        step = readings[-1].step
        _save(self.folder / f"step-{step:06d}.safetensors", {"prompts": residuals}, {**self.known, "step": str(step)})
        self._write(readings)

    def _write(self, readings: Sequence[Measured]) -> None:
        with atomic_write(self.folder / _READINGS) as temporary:
            temporary.write_text("".join(json.dumps(each.as_dict()) + "\n" for each in readings), encoding="utf-8")

    def _forget(self, *, after: int) -> None:
        for step, file in _steps(self.folder).items():
            if step > after:
                file.unlink()


class Control:
    """What another training from the same start has done to the same readings.

    Args:
        output_dir: Where its trainer wrote to.

    Raises:
        FormatError: No reading was kept there, or one is broken.

    Example:
        >>> control = Control("out/plain")                                        # doctest: +SKIP
        >>> control.nearest(100)[0]                                               # doctest: +SKIP
        96
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.read = _load(self.folder / _START)[1].get("read")
        self._at = residuals_of(output_dir)
        self.start = next(iter(self._at.values()))
        if len(self._at) < 2:
            raise FormatError(f"{self.folder} holds no reading: train the control with EmotionCallback to its end first")

    def check(self, start: np.ndarray, *, read: str) -> None:
        """Refuse to be compared with a training that did not begin alike.

        Args:
            start: Residuals of its prompts at its start.
            read: Content id of what it reads, and how.

        Raises:
            MismatchError: It began, or is read, differently.
        """
        if self.read != read or not np.allclose(start, self.start, rtol=1e-3, atol=1e-3 * float(np.abs(self.start).max())):
            raise MismatchError(
                f"the control in {self.folder} did not begin alike: train it from the same model, with the same vectors and "
                "prompts"
            )

    def nearest(self, step: int) -> tuple[int, np.ndarray]:
        """The reading nearest to a step, the start included: its step and its residuals ``(P, D)``."""
        near = min(self._at, key=lambda at: (abs(at - step), at))
        return near, self._at[near]


def residuals_of(output_dir: str | Path) -> dict[int, np.ndarray]:
    """The residuals of all readings of a training, by their steps, ``(P, D)`` each; first those of its start.

    Raises:
        FormatError: There are none, or a file is broken.
    """
    folder = Path(output_dir) / FOLDER
    found, meta = _load(folder / _START)
    return {int(meta["step"]): found["prompts"]} | {step: _load(file)[0]["prompts"] for step, file in _steps(folder).items()}


def _steps(folder: Path) -> dict[int, Path]:
    return {int(file.stem.removeprefix("step-")): file for file in sorted(folder.glob("step-*.safetensors"))}


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
