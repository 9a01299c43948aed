"""What an engine in another process is asked, beside running requests: by :mod:`affectlens.engines.ray` of its workers, and by
:mod:`affectlens.engines.vllm_remote` of a ``vllm serve``.

Questions and answers are data of :mod:`affectlens.engines.wire`; an answer is a value and a failure, one of which is None.
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


@dataclass(frozen=True)
class Loaded:
    """What there is to know about an engine in another process.

    Args:
        info: Of its model.
        window: Requests that it looks at together.
        version: Of affectlens there.
    """

    info: ModelInfo
    window: int
    version: str

    @classmethod
    def of(cls, engine: Engine) -> Loaded:
        return cls(engine.info, engine.window, version("affectlens"))


@dataclass(frozen=True)
class Call:
    """A question: how an engine is asked, and the types of what it takes and gives."""

    ask: Callable[[Engine, Any], Any]
    takes: Any
    gives: Any

    @property
    def answer(self) -> Any:
        """The type of an answer."""
        return answer(self.gives)


def answer(kind: Any) -> Any:
    """The type of an answer that is of a kind, or a failure."""
    return GenericAlias(tuple, (kind | None, Failure | None))


CALLS = {
    "loaded": Call(lambda engine, _: Loaded.of(engine), NoneType, Loaded),
    "layout": Call(lambda engine, request: engine.layout(request), Request, Layout),
    "unembed": Call(lambda engine, residuals: engine.unembed(residuals), np.ndarray, np.ndarray),
    "vocabulary": Call(lambda engine, _: tuple(engine.vocabulary), NoneType, tuple[str, ...]),
    "texts": Call(lambda engine, name: engine.texts(name), str, Any),
}
