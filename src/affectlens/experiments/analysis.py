"""What the episodes of a sweep show: rates, trends against random directions, shapes, scales, readings, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from affectlens.experiments import Experiment
from affectlens.studies import Outcome

Episodes = Mapping[str, Sequence[Any]]
"""Columns by name, all equally long: ``pyarrow.parquet.read_table("RUN/episodes.parquet").to_pydict()``, or a pandas frame."""


def analyse(episodes: Episodes, experiment: Experiment, *, seed: int = 0, draws: int = 2000, unit: str = "z") -> Outcome:
    """Findings, tables and the data of the figures.

    Args:
        episodes: One row for each case and arm; the columns of ``RUN/episodes.parquet``. Every level's baseline, and all arms at
            the one level that was swept.
        experiment: What was run: names, acts, refusals, scales, levels.
        seed: Of the resamples.
        draws: Resamples behind intervals.
        unit: Of the readings ``before.E`` and ``during.E``: ``z`` or ``centred cosine``.

    Returns:
        Outcome whose findings have the experiment's name as their study. What could not be tested is ``untestable`` and says why.

    Raises:
        FormatError: A column is missing, columns differ in length, or an episode stands twice in an arm.
    """
    raise NotImplementedError
