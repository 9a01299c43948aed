"""The report of an experiment and the page of its transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affectlens.experiments import Experiment
from affectlens.report import Report


def write_report(
    folder: str | Path,
    *,
    experiment: Experiment,
    model: Mapping[str, Any],
    vectors: Mapping[str, Any],
    judge: str = "",
    title: str = "",
    command: str = "",
    checks: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    unit: str = "z",
) -> Report:
    """Write ``report.html``, ``report.md``, ``report.json`` and ``transcripts.html`` of a run.

    Args:
        folder: Of the run; ``episodes.parquet`` is read from it, and ``tokens.parquet`` if it is there: without it the
            transcripts have no colours.
        experiment: What was run.
        model: Facts of the model, ``id`` among them (``asdict(engine.info)`` less ``checks``).
        vectors: Facts of the vectors: concepts, layer, where steering was added, …
        judge: Its id; empty when no judge was asked.
        title: Heading; the experiment's title and the model's id when empty.
        command: What was typed, and goes on with the run.
        checks: Instrument checks, as in :class:`affectlens.report.Report`: strength 0 bit-identical, level chosen, sandbox, ….
        seed: Of the run, and of the resamples behind intervals.
        unit: Of the readings: ``z`` or ``centred cosine``.

    Returns:
        The report, already saved.

    Raises:
        FormatError: There are no episodes, or the file is broken.
    """
    raise NotImplementedError
