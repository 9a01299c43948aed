"""Drawing tokens in vLLM from the seeds of requests, as the engine in process does: equal logits give equal tokens.

vLLM's own generators must be set back where a prompt is divided, which fails on a CPU (0.32.0). So tokens are chosen by a logits
processor, vLLM's official interface for it: it is told which request has which row of the batch, and its choice is made the
likeliest token, which vLLM then takes. Log-probabilities are those from before.

vLLM finds the processor by its name, ``affectlens.engines.vllm_draw:Draw``, which exists where vLLM is installed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from affectlens.engine import Sampling
from affectlens.engines.decode import sample
from affectlens.errors import AffectlensError

NAME = "affectlens_draw"
"""Of the entry in a request's ``extra_args`` that says how its tokens are drawn."""


def said(sampling: Sampling | None) -> list[float] | None:
    """How a request's tokens are drawn, as plain data; None where the likeliest is taken."""
    if sampling is None or sampling.temperature == 0 or sampling.top_k == 1:
        return None
    return [sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed]


def check(how: Any) -> None:
    """Refuse what :func:`said` never says: in a server anybody may write this field, and what fails later ends vLLM.

    Raises:
        ValueError: As vLLM wants it.
    """
    try:
        temperature, top_p, top_k, seed = how
        Sampling(temperature=float(temperature), top_p=float(top_p), top_k=int(top_k), seed=int(seed))
        if isinstance(how, list) and math.isfinite(temperature) and temperature > 0 and seed < 2**128:
            return
    except (AffectlensError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{NAME} is not for requests from outside: leave it out")


@dataclass
class _Row:
    """One row of the batch: how it is drawn, and vLLM's own list of what was said so far."""

    how: tuple[float, float, int]
    random: np.random.Generator
    output: Sequence[int]
    uniform: list[float] = field(default_factory=list)

    def number(self) -> float:
        """The random number of its next token, which is the same however often it is asked for."""
        while len(self.uniform) <= len(self.output):
            self.uniform.append(self.random.random())
        return self.uniform[len(self.output)]


class Rows:
    """Which rows of the batch are drawn, and what is drawn.

    Example:
        >>> rows = Rows()
        >>> rows.add(1, [1.0, 1.0, 0, 7], [])
        >>> rows.choose(torch.zeros(2, 5))
        {1: 2}
    """

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    def add(self, row: int, how: Sequence[float] | None, output: Sequence[int]) -> None:
        """A request has taken a row."""
        self._rows.pop(row, None)
        if how is not None:
            temperature, top_p, top_k, seed = how
            random = np.random.Generator(np.random.Philox(int(seed)))
            self._rows[row] = _Row((float(temperature), float(top_p), int(top_k)), random, output)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def move(self, row: int, to: int, *, swap: bool) -> None:
        """A request has moved, or two have changed places."""
        one, other = self._rows.pop(row, None), self._rows.pop(to, None)
        if one is not None:
            self._rows[to] = one
        if swap and other is not None:
            self._rows[row] = other

    def choose(self, logits: torch.Tensor) -> dict[int, int]:
        """A token for each row that is drawn."""
        groups: dict[tuple[float, float, int], list[int]] = {}
        for row, each in self._rows.items():
            groups.setdefault(each.how, []).append(row)
        chosen: dict[int, int] = {}
        for (temperature, top_p, top_k), rows in groups.items():
            uniform = torch.tensor([self._rows[row].number() for row in rows], dtype=torch.float32)
            drawn = sample(logits[rows].float() / temperature, top_p, top_k, uniform.to(logits.device)[:, None])
            chosen |= dict(zip(rows, drawn.tolist(), strict=True))
        return chosen


@functools.cache
def processor_class() -> type:
    """The logits processor."""
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

    class Draw(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._rows = Rows()

        @classmethod
        def validate_params(cls, sampling_params: Any) -> None:
            if (how := (sampling_params.extra_args or {}).get(NAME)) is not None:
                check(how)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            if batch_update is None:
                return
            for row in batch_update.removed:
                self._rows.remove(row)
            for row, params, _, output in batch_update.added:
                self._rows.add(row, (params.extra_args or {}).get(NAME), output)
            for row, to, direction in batch_update.moved:
                self._rows.move(row, to, swap=direction == MoveDirectionality.SWAP)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            for row, token in self._rows.choose(logits).items():
                logits[row, token] = torch.inf
            return logits

    return Draw


def __getattr__(name: str) -> Any:
    if name == "Draw":
        return processor_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
