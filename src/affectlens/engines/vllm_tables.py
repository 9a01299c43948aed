"""What taps do where vLLM replays a step as a CUDA graph: additions and readings as numbers in fixed places.

No Python runs while a graph is replayed, so nothing can be decided there. A tap that was captured does the same arithmetic every
time, for every token: it adds rows of a table, each token its own rows with its own shares, and lays the stream down in a buffer.
What that comes to is written into the tables before the step and read from the buffers behind it. A token with shares of 0 keeps
its bits.

Only sums can be done this way. What looks at the stream before it acts (ablations, clamps, caps, floors, gates) is refused where
graphs are replayed, by name: see :func:`additions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from affectlens.engines.changes import Pin, Push
from affectlens.errors import EngineError
from affectlens.steering import Steering

SLOTS = 4
"""Additions that one token may get at one layer, each at selectors or with a schedule of its own."""


def additions(steering: Steering) -> None:
    """Refuse a steering that is more than additions.

    Raises:
        EngineError: Says which of it is, and where it can be done.
    """
    for term in steering.terms:
        if not term.idle and (term.mode != "add" or term.gate is not None):
            what = "is gated" if term.mode == "add" else f"is {term.mode}"
            raise EngineError(
                f"{term.name!r} {what}, and CUDA graphs can only add: open the engine with replay=False, or the model with hf/"
            )
    for layer in steering.layers:
        if (n := len(steering.at_layer(layer)[0])) > SLOTS:
            raise EngineError(
                f"{n} selectors or schedules act at layer {layer}, and CUDA graphs have room for {SLOTS}: "
                "open the engine with replay=False, or the model with hf/"
            )


class Tables:
    """The fixed places, and what a tap does with them.

    Args:
        n_layers: Blocks of the model.
        width: Of the stream.
        tokens: Most tokens of a step that is replayed.
        rows: Vectors that may be added in one step at one layer.
        dtype: What streams are laid down in.
        device: Of the model.
    """

    def __init__(self, n_layers: int, *, width: int, tokens: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens, self.rows = tokens, rows
        # Row 0 is that of tokens to which nothing is added.
        self.vectors = torch.zeros(n_layers, rows + 1, width, device=device)
        self.which = torch.zeros(n_layers, SLOTS, tokens, dtype=torch.long, device=device)
        self.shares = torch.zeros(n_layers, SLOTS, tokens, device=device)
        self.kept = torch.ones(n_layers, tokens, device=device)
        self.streams = torch.zeros(n_layers + 1, tokens, width, dtype=dtype, device=device)
        self._written: dict[int, int] = {}

    def visit(self, layer: int, stream: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        """What is captured: no shape and no branch depends on what is in the tables."""
        n = len(stream)
        whole = stream.float() if rest is None else stream.float() + rest.float()
        if layer < 0:
            self.streams[0, :n].copy_(whole)
            return stream.clone()
        shares, kept = self.shares[layer, :, :n], self.kept[layer, :n, None]
        step = (shares[:, :, None] * self.vectors[layer][self.which[layer, :, :n]]).sum(0)
        step = step - (1 - kept) * whole
        acts = (shares != 0).any(0)[:, None] | (kept == 0)
        self.streams[layer + 1, :n].copy_(torch.where(acts, whole + step, whole))
        return torch.where(acts, (stream.float() + step).to(stream.dtype), stream)

    def write(
        self, changes: Mapping[int, Sequence[Push | Pin]], replaced: Mapping[int, torch.Tensor], watched: Sequence[int]
    ) -> None:
        """Prepare a step.

        Args:
            changes: Additions at each layer.
            replaced: Rows of the step whose stream behind the last block is to be another.
            watched: Layers whose streams will be read.
        """
        for layer in self._written:
            self.shares[layer].zero_()
            self.kept[layer].fill_(1)
        self._written = {}
        for layer, pushes in changes.items():
            for slot, push in enumerate(pushes):
                assert isinstance(push, Push) and push.gate is None, "refused when it was asked for"
                begin = self._put(layer, push.table)
                self.which[layer, slot, push.rows] = begin + (0 if push.which is None else push.which)
                self.shares[layer, slot, push.rows] = 1.0 if push.share is None else push.share[:, 0]
        if replaced:
            last = len(self.vectors) - 1
            rows = torch.tensor(list(replaced), device=self.vectors.device)
            begin = self._put(last, torch.stack(list(replaced.values())))
            self.which[last, 0, rows] = begin + torch.arange(len(rows), device=rows.device)
            self.shares[last, 0, rows] = 1.0
            self.kept[last, rows] = 0.0
        for layer in watched:
            # Were the graph captured without our taps, this is what would be read.
            self.streams[layer + 1].fill_(torch.nan)

    def _put(self, layer: int, table: torch.Tensor) -> int:
        """The first row of some vectors."""
        begin = self._written.get(layer, 0) + 1
        if begin + len(table) > self.rows + 1:
            raise EngineError(f"more than {self.rows} vectors are added at layer {layer} in one step: serve fewer at once")
        self.vectors[layer, begin : begin + len(table)] = table
        self._written[layer] = begin + len(table) - 1
        return begin

    def stream(self, layer: int, rows: int) -> torch.Tensor:
        """What the step that is done has laid down of its first so many tokens, ``(rows, D)``."""
        return self.streams[layer + 1, :rows]


def refuse_stale(values: np.ndarray, layer: int) -> None:
    """Refuse what no tap has written."""
    if np.isnan(values).any():
        raise EngineError(
            f"the tap at layer {layer} never fired: this graph was captured without it; open the engine with replay=False"
        )
