"""Figures of an experiment, from the plain data of its outcome alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from affectlens.studies import Figure


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """All figures that there is data for.

    Args:
        data: ``analyse(...).data``.
    """
    raise NotImplementedError
