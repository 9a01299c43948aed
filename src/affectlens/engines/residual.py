"""The residual stream of a ``transformers`` model: finding it, changing it, recording it.

Three facts (measured over every decoder family, see docs/decisions.md) carry this file. The residual stream is what the blocks in
``model.get_decoder()``'s ``ModuleList`` of length ``num_hidden_layers`` return, as a tensor or as the first entry of a tuple. It
must be hooked: ``output_hidden_states`` shows the last layer after the final norm and does not show what a hook added. And an
exception raised in a hook stops a forward pass early in every family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from affectlens.engine import Readout
from affectlens.engines.changes import Pin, Plan, Push, Sensor, Tokens
from affectlens.errors import EngineError, MismatchError, ModelSupportError
from affectlens.layout import Where
from affectlens.scope import Gate
from affectlens.steering import Steering


def find_blocks(model: Any) -> nn.ModuleList:
    """The decoder's blocks, whose outputs are the residual stream.

    Raises:
        ModelSupportError: There is no list of ``num_hidden_layers`` blocks in the decoder.
    """
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # A multimodal wrapper's decoder is found by get_decoder(); without one the model itself is searched.
    for root in (decoder, model):
        if root is None:
            continue
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return module
    raise ModelSupportError(
        f"no list of {n_layers} blocks in {type(model).__name__}: affectlens reads decoder-only language models"
    )


class Stop(Exception):
    """Raised in a hook to end a forward pass once the deepest layer needed is done."""


class Recorder:
    """Records one readout for several requests in one forward pass, pooled and projected on the device.

    Args:
        readout: What to record.
        rows: For each request the flattened token rows it selects; may be empty.
        device: Where the model runs.
    """

    def __init__(self, readout: Readout, rows: Sequence[np.ndarray], device: torch.device) -> None:
        self.readout = readout
        self.counts = [len(r) for r in rows]
        self.rows = torch.as_tensor(np.concatenate(rows), dtype=torch.long, device=device)
        self.segment = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(self.counts)).to(device)
        # An empty selection divides 0 by 0: NaN says that nothing was read.
        self.sizes = torch.tensor(self.counts, dtype=torch.float32, device=device)
        self.onto = None if readout.onto is None else torch.as_tensor(readout.onto, dtype=torch.float32).to(device)
        self.values: dict[int, torch.Tensor] = {}
        self.norms: dict[int, torch.Tensor] = {}

    def see(self, layer: int, flat: torch.Tensor) -> None:
        """Take what is wanted from the residuals ``(tokens, D)`` of a layer."""
        x = flat.index_select(0, self.rows).float()
        pool = self.readout.pool
        if pool == "norm":
            self.values[layer] = self.norms[layer] = self._mean(x.norm(dim=1, keepdim=True))[:, 0]
            return
        if pool == "mean":
            x = self._mean(x)
        elif pool == "last":
            ends = torch.cumsum(self.sizes, 0).long() - 1
            x = torch.where(
                self.sizes[:, None] > 0, x[ends.clamp(min=0)] if len(x) else x.new_zeros(len(ends), x.shape[1]), torch.nan
            )
        self.norms[layer] = x.norm(dim=1)
        self.values[layer] = x if self.onto is None else self.project(x, self.onto[self.readout.layers.index(layer)])

    def project(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """Dot products of residuals ``(n, D)`` with directions ``(k, D)``."""
        return x @ onto.T

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(self.counts), x.shape[1], device=x.device).index_add_(0, self.segment, x)
        return sums / self.sizes[:, None]

    def results(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each request ``(values, norms)`` with the layers first, moved off the device in one go."""
        layers = self.readout.layers
        values = torch.stack([self.values[layer] for layer in layers]).cpu().numpy()
        norms = torch.stack([self.norms[layer] for layer in layers]).cpu().numpy()
        if self.readout.pool != "none":
            return [(values[:, i], norms[:, i]) for i in range(len(self.counts))]
        ends = np.cumsum(self.counts)[:-1]
        return list(zip(np.split(values, ends, axis=1), np.split(norms, ends, axis=1), strict=True))


class Tape:
    """Records one readout token by token while replies are generated.

    The residuals wait on the device, in the model's own dtype, until there are enough of them to be projected together: one pass
    over one token of each row would spend its time on reading the directions.

    Args:
        readout: What to record; not pooled.
        rows: The rows of the batch that are recorded.
        batch: How many rows the batch has.
        device: Where the model runs.
        together: How many passes are projected together.
    """

    def __init__(self, readout: Readout, rows: Sequence[int], batch: int, *, device: torch.device, together: int) -> None:
        self.readout = readout
        self.together = together
        self.places = {layer: place for place, layer in enumerate(dict.fromkeys(readout.layers))}
        self.rows = None if list(rows) == list(range(batch)) else torch.as_tensor(rows, dtype=torch.long, device=device)
        self.onto = None if readout.onto is None else torch.as_tensor(readout.onto, dtype=torch.float32).to(device)
        self.waiting: torch.Tensor | None = None  # (L, together, rows, D)
        self.number = 0
        self.taken: list[tuple[np.ndarray, np.ndarray]] = []

    def see(self, layer: int, flat: torch.Tensor) -> None:
        """Take the residuals ``(B, D)`` of one token of each row."""
        x = flat if self.rows is None else flat.index_select(0, self.rows)
        if self.waiting is None:
            self.waiting = x.new_empty(len(self.places), self.together, *x.shape)
        # A copy: the block may have returned a tensor that is still written to.
        self.waiting[self.places[layer], self.number].copy_(x)

    def advance(self) -> None:
        """The pass is done."""
        self.number += 1
        if self.number == self.together:
            self.project()

    def project(self) -> None:
        """Take what waits off the device: before the last readings are asked for."""
        if self.waiting is None or not self.number:
            return
        width = self.waiting.shape[-1] if self.onto is None else self.onto.shape[1]
        shape = len(self.readout.layers), self.number, self.waiting.shape[2]
        norms = torch.empty(shape, device=self.waiting.device)
        values = torch.empty(*shape, width, device=self.waiting.device)
        # Layer by layer: what one of them needs fits a processor's cache.
        for i, layer in enumerate(self.readout.layers):
            x = self.waiting[self.places[layer], : self.number].float()
            norms[i] = x.norm(dim=-1)
            values[i] = x if self.onto is None else x @ self.onto[i].T
        self.taken.append((values.cpu().numpy(), norms.cpu().numpy()))
        self.number = 0

    def since(self, first: int, row: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Pass numbers, values and norms (layers first) of one of the rows, in parts; none ends before the pass ``first``."""
        for part in range(first // self.together, len(self.taken)):
            values, norms = self.taken[part]
            yield part * self.together + np.arange(norms.shape[1]), values[:, :, row], norms[:, :, row]


@dataclass
class Fork:
    """Rows that only steering tells apart run as one up to ``layer``; behind it each token goes on as often as it is needed.

    Args:
        layer: The first layer at which anything is done to a token.
        source: For each token behind it the token before it that it comes from.
        n: How many there are before it.
        passed: Called when the pass gets there.
    """

    layer: int
    source: torch.Tensor
    n: int
    passed: Callable[[], Any]

    @contextmanager
    def applied(self, blocks: nn.ModuleList) -> Iterator[None]:
        """Blocks behind the fork get what the model made for each token (its rotary angles, say) for the tokens there."""

        def spread(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                axes = [axis for axis in range(min(2, value.dim())) if value.shape[axis] == self.n]
                return value.index_select(axes[-1], self.source) if axes else value
            if isinstance(value, tuple | list):
                return type(value)(spread(inner) for inner in value)
            return value

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # The stream itself, which comes first, has been spread out already.
            stream, args = args[:1], args[1:]
            kept = {name: value if name == "hidden_states" else spread(value) for name, value in kwargs.items()}
            return (*stream, *(spread(value) for value in args)), kept

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks[self.layer + 1 :]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Pass:
    """What to do in one forward pass. ``stop_after`` ends it there; every layer named must fire exactly once."""

    changes: Mapping[int, Sequence[Push | Pin]] = field(default_factory=dict)
    sensors: Mapping[int, Sequence[Sensor]] = field(default_factory=dict)
    recorders: Sequence[Recorder | Tape] = ()
    stop_after: int | None = None
    fork: Fork | None = None
    fired: set[int] = field(default_factory=set)
    opened: dict[Gate, torch.Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> set[int]:
        layers = {*self.changes, *self.sensors, *(layer for r in self.recorders for layer in r.readout.layers)}
        layers |= {self.fork.layer} if self.fork else set()
        last = self.stop_after
        return layers if last is None else {layer for layer in layers if layer < last} | {last}

    def visit(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Steer and record the residual ``(B, T, D)`` of one layer; returns it, changed or not."""
        if layer in self.fired:
            raise ModelSupportError(f"block {layer} ran twice in one pass: affectlens reads models that run each block once")
        self.fired.add(layer)
        if self.fork and layer == self.fork.layer:
            hidden = hidden.index_select(1, self.fork.source)
            self.fork.passed()
        hidden = self.steer(layer, hidden)
        if recorders := [recorder for recorder in self.recorders if layer in recorder.readout.layers]:
            flat = self._spread(layer, hidden.reshape(-1, hidden.shape[-1]))
            for recorder in recorders:
                recorder.see(layer, flat)
        return hidden

    def _spread(self, layer: int, flat: torch.Tensor) -> torch.Tensor:
        """What was found at each token of a layer, for each token behind the fork: everybody counts these."""
        return flat.index_select(0, self.fork.source) if self.fork and layer < self.fork.layer else flat

    def steer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Read the gates of a layer, then change its residual ``(B, T, D)``."""
        if hidden.dim() != 3:
            raise ModelSupportError(
                f"the blocks of this model pass on {hidden.dim() - 2} axes of residual streams instead of one stream: "
                "affectlens reads models with a single residual stream"
            )
        for sensor in self.sensors.get(layer, ()):
            self.opened[sensor.gate] = self._spread(layer, sensor.opened(hidden.reshape(-1, hidden.shape[-1])))
        if layer in self.changes:
            hidden = hidden.clone()  # the block may have returned a tensor that it still uses
            flat = hidden.view(-1, hidden.shape[-1])
            for change in self.changes[layer]:
                change.apply(flat, self.opened)
        return hidden

    def confirm(self) -> None:
        """Refuse to report anything when a hook did not fire."""
        if missing := self.layers - self.fired:
            raise EngineError(
                f"the hook at layer {min(missing)} never fired: this model is not run block by block here; "
                "run affectlens doctor on it"
            )


class Taps:
    """Hooks on some layers for as long as the ``with`` block lasts; :attr:`current` says what they do now, if anything."""

    def __init__(self, blocks: nn.ModuleList, layers: set[int]) -> None:
        self.blocks = blocks
        self.layers = layers
        self.current: Pass | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for layer in sorted(self.layers):
            if layer < 0:
                self._handles.append(self.blocks[0].register_forward_pre_hook(self._before_first, with_kwargs=True))
            else:
                self._handles.append(self.blocks[layer].register_forward_hook(self._after(layer)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.current is None:
            return
        self.current.visit(-1, args[0] if args else kwargs["hidden_states"])
        if self.current.stop_after == -1:
            raise Stop

    def _after(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.current is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            changed = self.current.visit(layer, hidden)
            if self.current.stop_after == layer:
                raise Stop
            if changed is hidden:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


GRAPHS = 32
"""Most compiled graphs of one model: blocks that differ, each for texts alone, padded, and in one row."""


def compiled(blocks: nn.ModuleList) -> list[Callable[..., Any]]:
    """The forward passes of the blocks, compiled when they first run: one graph for all blocks that are alike.

    What a block does is compiled whole or not at all; hooks stay outside, so that steering and recording are as without.

    Raises:
        ModelSupportError: This version of torch cannot keep the graphs of one model apart from those of others.
    """
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise ModelSupportError(f"torch {torch.__version__} is too old to compile blocks: use 2.13, or leave out compile")

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # A region of its own: families share a wrapper's code in transformers, and graphs are counted by code.
    apart: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": GRAPHS}
    ahead = torch.compile(run, dynamic=True, fullgraph=True, **apart)
    return [partial(ahead, block.forward) for block in blocks]


@contextmanager
def running(blocks: nn.ModuleList, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks run these in place of their own forward passes for as long as the ``with`` block lasts, if there are any."""
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=False):
            block.forward = forward
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is not None:
                block.forward = before
            else:
                vars(block).pop("forward", None)


@contextmanager
def steer(model: Any, steering: Steering) -> Iterator[Any]:
    """Steer a ``transformers`` model of your own inside a ``with`` block; the hooks are always removed.

    Every token that runs through the model is steered, or only the prompt (a forward pass over several tokens, or over an empty
    cache) when the steering says ``Where("prompt")``, or only the reply (passes over one token and a cache) or a window of it
    when it says ``Where("response", after=..., first=...)``. All modes and gates work as in an engine. Schedules count the
    passes over one token since the last prompt, so all rows of a batch are at the same token of their replies.

    Args:
        model: A causal language model, already loaded.
        steering: What to do.

    Raises:
        EngineError: The steering selects by role, turn, text or count in the prompt: a bare model cannot know these.
        MismatchError: The directions are of another width.
        ModelSupportError: No residual stream was found.

    Example:
        >>> with steer(hf_model, 0.05 * vectors["calm"]):          # doctest: +SKIP
        ...     hf_model.generate(**inputs)
    """
    blocks = find_blocks(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    widths = [(term.name, term.directions.shape[-1]) for term in steering.terms]
    for name, own in [*widths, *((gate.name, len(gate.direction)) for gate in steering.gates)]:
        if own != width:
            raise MismatchError(f"{name!r} is {own} wide but the model is {width}: use its own vectors")
    for layers in [*(term.layers for term in steering.terms), *((gate.layer,) for gate in steering.gates)]:
        if not 0 <= min(layers) <= max(layers) < len(blocks):
            raise EngineError(f"the model has layers 0 to {len(blocks) - 1} to steer: not {layers}")
    for where in {term.where for term in steering.terms}:
        window = replace(where, after=0, first=None) if where.part == "response" else where
        if window != Where(where.part):
            raise EngineError(
                f"Where({where}) needs a layout: use an affectlens engine, or only Where(part=...) and a window of the response"
            )
    plan = Plan([steering], lambda layer: next(blocks[layer].parameters()).device)
    state = _Course(plan, steering)
    hooked = sorted(plan.layers)

    def after(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if layer == hooked[0]:
                state.begin(*hidden.shape[:2])
            changed = state.now.steer(layer, hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    handles = []
    try:
        if hooked:
            decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
            handles.append(decoder.register_forward_pre_hook(state.look, with_kwargs=True))
        for layer in hooked:
            handles.append(blocks[layer].register_forward_hook(after(layer)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Course:
    """Where a bare model is in its text: what :func:`steer` can know of it from the passes it sees."""

    def __init__(self, plan: Plan, steering: Steering) -> None:
        self.plan = plan
        self.wheres = {term.where for term in steering.terms}
        # From this number on nothing about a token of the reply changes any more.
        bounds = [term.schedule.tokens for term in steering.terms if term.schedule]
        bounds += [where.after + (where.first or 0) for where in self.wheres]
        self.horizon = max(bounds, default=0)
        self.number = -1
        self.continues = True
        self.key: tuple[int, int] | None = None
        self.now = Pass()

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
        self.continues = length is None or int(length()) > 0

    def begin(self, batch: int, length: int) -> None:
        """A forward pass over ``(batch, length)`` tokens has come to the first layer that matters."""
        self.number = self.number + 1 if length == 1 and self.continues else -1
        key = (batch * length, min(self.number, self.horizon))
        if key == self.key:
            return
        self.key = key
        n = batch * length
        masks = {where: np.full(n, self._selects(where)) for where in self.wheres}
        self.now = Pass(*self.plan.over({0: Tokens(np.arange(n), np.full(n, self.number), masks)}))

    def _selects(self, where: Where) -> bool:
        if where.part == "response":
            return self.number >= where.after and (where.first is None or self.number < where.after + where.first)
        return where.part == "all" or self.number < 0
