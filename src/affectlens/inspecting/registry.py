"""What Inspect finds when it looks for extensions: the entry point ``affectlens`` of group ``inspect_ai``.

It is imported at every start of Inspect, whatever is evaluated: nothing that loads a model is imported here.
"""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ModelAPI, modelapi

from affectlens.inspecting.playing import TASKS, experiment
from affectlens.inspecting.scoring import by_correct, interval, outcome, readings

__all__ = ["TASKS", "affectlens", "by_correct", "experiment", "interval", "outcome", "readings"]


@modelapi(name="affectlens")
def affectlens() -> Any:
    """The provider; loaded when a model of it is first asked for."""
    from affectlens.inspecting.provider import AffectlensAPI

    found: type[ModelAPI] = AffectlensAPI
    return found
