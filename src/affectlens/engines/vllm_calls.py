"""What a ``vllm serve`` is asked by :mod:`affectlens.engines.vllm_remote`, and answers by :mod:`affectlens.engines.vllm_host`.

    POST /v1/affectlens/run         takes requests; gives each result as soon as it is there
    POST /v1/affectlens/WHAT        one of :data:`CALLS`; gives one value

What goes there and back is data of :mod:`affectlens.engines.wire`. An answer is a row of parts, each with its length before it in
8 bytes, little-endian: pairs of a value and a failure. A part of length 0 is the end; without it something is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import GenericAlias, NoneType
from typing import Any

import numpy as np

from affectlens.engine import Engine, ModelInfo, Request
from affectlens.engines.wire import Failure
from affectlens.layout import Layout

PREFIX = "/v1/affectlens/"


@dataclass(frozen=True)
class Loaded:
    """What a server has.

    Args:
        info: Of its model.
        version: Of affectlens there.
    """

    info: ModelInfo
    version: str


@dataclass(frozen=True)
class Call:
    """A question: how an engine is asked, and the types of what it takes and gives."""

    ask: Callable[[Engine, Any], Any]
    takes: Any
    gives: Any


CALLS = {
    "loaded": Call(lambda engine, _: Loaded(engine.info, version("affectlens")), NoneType, Loaded),
    "layout": Call(lambda engine, request: engine.layout(request), Request, Layout),
    "unembed": Call(lambda engine, residuals: engine.unembed(residuals), np.ndarray, np.ndarray),
    "vocabulary": Call(lambda engine, _: tuple(engine.vocabulary), NoneType, tuple[str, ...]),
}


def pair(kind: Any) -> Any:
    """The type of a part of an answer."""
    return GenericAlias(tuple, (kind | None, Failure | None))
