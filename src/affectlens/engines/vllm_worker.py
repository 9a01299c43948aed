"""What runs inside vLLM's workers: a tap behind every block, and what it does for which request. In and out go data, never code.

A tap is a registered operator in the forward pass of each decoder block, put there when the model is loaded and before it is
compiled: hooks never fire in a compiled model, an operator does. It takes the residual stream as the block hands it on (most of
vLLM's blocks return it in two parts, whose sum it is), and gives it back, steered where that is wanted and else bit for bit.

Which request owns which token of a step is vLLM's own knowledge (``input_batch`` and ``query_start_loc`` of its model runner).
What is to be done for a request comes before it as an :class:`Order`; the request names it in its ``extra_args``. The arithmetic
is that of the engine in process: :class:`affectlens.engines.changes.Plan` and :class:`affectlens.engines.residual.Pass`.

vLLM finds the worker by its name, ``affectlens.engines.vllm_worker.Worker``, which exists where vLLM is installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from affectlens.engine import Readout
from affectlens.engines.changes import Plan, Tokens
from affectlens.engines.residual import Pass, Recorder
from affectlens.engines.vllm_orders import NAME, Findings, Inbox, Order, Seen, owner_of
from affectlens.engines.vllm_tables import Tables, refuse_stale
from affectlens.errors import ModelSupportError

TESTED = ("0.32.0",)
"""Versions of vLLM that the contract suite has run on."""

REPLAY = "affectlens_replay"
"""In ``additional_config``: whether taps work over the tables of replayed steps, whether or not any are replayed."""

# ── the tap ──


def _tap(stream: torch.Tensor, rest: torch.Tensor | None, layer: int) -> torch.Tensor:
    """The part of the stream that a block hands on, steered; ``rest`` is the other part, if there are two."""
    return stream.clone() if _roster is None else _roster.visit(layer, stream, rest)


def _shape(stream: torch.Tensor, rest: torch.Tensor | None, layer: int) -> torch.Tensor:
    return torch.empty_like(stream)


@functools.cache
def operator() -> tuple[Callable[..., torch.Tensor], torch.library.Library]:
    """The operator of the taps, registered; it is there as long as its library is."""
    library = torch.library.Library("affectlens", "FRAGMENT")
    library.define("tap(Tensor stream, Tensor? rest, int layer) -> Tensor")
    library.impl("tap", _tap, "CompositeExplicitAutograd")
    torch.library.register_fake("affectlens::tap", _shape, lib=library)
    return torch.ops.affectlens.tap, library


def tap_blocks(model: Any, n_layers: int) -> None:
    """Put a tap behind every decoder block, and one before the first.

    Raises:
        ModelSupportError: There is no list of so many blocks, or it cannot be seen where the stream enters.
    """
    root = model.get_language_model() if hasattr(model, "get_language_model") else model
    lists = (m for m in root.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers)
    if (blocks := next(lists, None)) is None:
        raise ModelSupportError(f"no list of {n_layers} blocks in vLLM's {type(model).__name__}: open the model with hf/")
    for number, block in enumerate(blocks):
        names = list(inspect.signature(block.forward).parameters)
        if "hidden_states" not in names:
            raise ModelSupportError(
                f"vLLM's {type(block).__name__} takes no hidden_states, so its stream cannot be found: open the model with hf/"
            )
        enters = names.index("hidden_states") if number == 0 else None
        block.forward = _tapped(block.forward, number, enters=enters, fused="residual" in names)


def _tapped(inner: Callable[..., Any], number: int, *, enters: int | None, fused: bool) -> Callable[..., Any]:
    operate, _ = operator()

    def tap(stream: torch.Tensor, rest: torch.Tensor | None, layer: int) -> torch.Tensor:
        if stream.ndim == 3:  # blocks of transformers, where vLLM has none of its own: a batch of one stands before the tokens
            return operate(stream[0], None if rest is None else rest[0], layer)[None]
        return operate(stream, rest, layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if enters is not None:
            if "hidden_states" in kwargs:
                kwargs["hidden_states"] = tap(kwargs["hidden_states"], None, -1)
            else:
                entering = tap(args[enters], None, -1)
                args = (*args[:enters], entering, *args[enters + 1 :])
        out = inner(*args, **kwargs)
        if isinstance(out, tuple):
            return (tap(out[0], out[1] if fused else None, number), *out[1:])
        return tap(out, None, number)

    return forward


# ── who is there ──


@dataclass
class _Live:
    """An order whose request has been scheduled.

    Args:
        order: What is to be done.
        owner: Who gave it.
        request: vLLM's own id of it.
        seen: How many of its tokens have been recorded: those that run again after a preemption are not recorded again.
        leaving: Whether its owner is done with it.
    """

    order: Order
    owner: str
    request: str = ""
    seen: int = 0
    leaving: bool = False

    @functools.cached_property
    def horizon(self) -> int:
        """From this number of a reply's token on nothing about the steering changes because of its number."""
        return max((term.schedule.tokens for term in self.order.steering.terms if term.schedule), default=0)

    def settle(self, prompt: Sequence[int]) -> None:
        """vLLM has made tokens of a prompt that nobody had counted."""
        order = self.order
        if order.n_prompt < 0:
            steered = np.array([i > 0 or token != order.sink for i, token in enumerate(prompt)], dtype=bool)
            unread = np.zeros(len(prompt), dtype=bool)
            noted = tuple(replace(each, mask=unread) for each in order.noted)
            self.order = replace(order, n_prompt=len(prompt), masks=tuple(steered for _ in order.wheres), noted=noted)

    def tokens(self, rows: np.ndarray, positions: np.ndarray) -> Tokens:
        """Its tokens in a step, with what each selector says of them."""
        order = self.order
        masks = {}
        for where, mask, (start, stop) in zip(order.wheres, order.masks, order.ahead, strict=True):
            number = positions - len(mask)
            ahead = (number >= start) & (number < stop)
            masks[where] = np.where(number < 0, mask[np.minimum(positions, len(mask) - 1)], ahead)
        return Tokens(rows, positions - order.n_prompt, masks)


_roster: Roster | None = None
"""Of the one model of this process."""


class Roster:
    """Which orders there are, which of their tokens are in the step that runs, and what was found.

    Args:
        runner: vLLM's model runner, with its model loaded.

    Raises:
        ModelSupportError: It lacks what is needed here, or its model has no residual stream.
    """

    def __init__(self, runner: Any) -> None:
        global _roster
        require(runner)
        self.runner = runner
        self.n_layers = int(runner.model_config.hf_text_config.num_hidden_layers)
        tap_blocks(runner.model, self.n_layers)
        self.orders: dict[str, _Live] = {}
        self._mail: dict[str, tuple[Inbox, Findings]] = {}
        self._pass: Pass | None = None
        self._layers: set[int] = set()
        self._replaced: dict[int, torch.Tensor] = {}
        self._recording: list[Recorder] = []
        self._fixed = False
        self._members: list[list[tuple[_Live, int, np.ndarray]]] = []
        self._here: list[tuple[_Live, np.ndarray, np.ndarray]] = []
        self._plan: tuple[tuple[str, ...], Plan] = ((), Plan([], lambda layer: runner.device))
        self._key: tuple[Any, ...] | None = None
        self._work: Any = ({}, {})
        self.tables = self._tables() if replays(runner.vllm_config) else None
        inner = runner._model_forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            try:
                out = inner(*args, **kwargs)
                self.end(out[0] if isinstance(out, tuple) else out)
            finally:
                self._pass = None
            return out

        runner._model_forward = forward
        _roster = self

    def _tables(self) -> Tables:
        """Fixed places for steps that are replayed, as large as the largest of them."""
        runner = self.runner
        config, scheduler = runner.vllm_config.compilation_config, runner.vllm_config.scheduler_config
        return Tables(
            self.n_layers,
            width=int(runner.model_config.hf_text_config.hidden_size),
            tokens=int(getattr(config, "max_cudagraph_capture_size", None) or 512),
            rows=max(256, int(scheduler.max_num_seqs)),
            dtype=runner.model_config.dtype,
            device=runner.device,
        )

    # ── by name, from outside ──

    def expect(self, owner: str, head: str, data: bytes) -> None:
        """Take orders for requests that will come."""
        inbox, _ = self._mail.setdefault(owner, (Inbox(), Findings()))
        self.orders |= {order.key: _Live(order, owner) for order in inbox.unpack(head, data)}

    def take(self, owner: str) -> tuple[str, bytes]:
        """What was found for somebody since this was last called."""
        if owner not in self._mail:
            return Findings().pack()
        inbox, findings = self._mail[owner]
        self._mail[owner] = inbox, Findings()
        return findings.pack()

    def forget(self, keys: Iterable[str]) -> None:
        """These requests have ended, or will not come. One that vLLM still knows keeps its order until it does not."""
        for key in keys:
            if key in self.orders:
                self.orders[key].leaving = True

    def leave(self, owner: str) -> None:
        """Somebody gives no orders any more, and takes nothing."""
        self._mail.pop(owner, None)
        self.forget([key for key, live in self.orders.items() if live.owner == owner])

    def _found(self, owner: str) -> Findings:
        """Where to put what is found for somebody; what nobody will take is not kept."""
        return self._mail[owner][1] if owner in self._mail else Findings()

    # ── one step ──

    def begin(self) -> None:
        """vLLM has put a step together: work out what the taps do in it."""
        runner, batch = self.runner, self.runner.input_batch
        gone = [name for name, live in self.orders.items() if live.leaving and live.request not in runner.requests]
        for name in gone:
            del self.orders[name]
        self._here = []
        starts = runner.query_start_loc.np
        for n, request in enumerate(batch.req_ids):
            extra = runner.requests[request].sampling_params.extra_args
            key = extra.get(NAME) if extra else None
            if not isinstance(key, str):
                continue
            live = self.orders.get(key)
            if live is None:
                self._found(owner_of(key)).lost.append(key)
                continue
            live.request = request
            live.settle(runner.requests[request].prompt_token_ids)
            rows = np.arange(starts[n], starts[n + 1])
            self._here.append((live, rows, int(batch.num_computed_tokens_cpu[n]) + np.arange(len(rows))))
        self._replaced = {}
        recorders = self._recording = self._recorders()
        changes, sensors = self._changes()
        last = self.n_layers - 1
        for live, rows, positions in self._here:
            if live.order.residuals is not None:
                part = torch.as_tensor(live.order.residuals[positions], device=runner.device)
                self._replaced |= dict(zip(rows.tolist(), part, strict=True))
        now = Pass(changes, sensors, recorders)
        self._layers = now.layers | ({last} if self._replaced else set())
        self._pass = now if self._layers else None
        self._fixed = self.tables is not None and int(starts[len(batch.req_ids)]) <= self.tables.tokens
        if self._fixed:
            assert self.tables is not None
            watched = {layer for recorder in recorders for layer in recorder.readout.layers}
            self.tables.write(changes, self._replaced, sorted(watched))

    def _changes(self) -> Any:
        steered = [each for each in self._here if each[0].order.steering.layers]
        if not steered:
            return {}, {}
        who = tuple(live.order.key for live, *_ in steered)
        if who != self._plan[0]:
            device = self.runner.device
            self._plan = who, Plan([live.order.steering for live, *_ in steered], lambda layer: device)
            self._key = None
        tokens = {i: live.tokens(rows, positions) for i, (live, rows, positions) in enumerate(steered)}
        key: tuple[Any, ...] | None = None
        if all(len(rows) == 1 for _, rows, _ in steered):
            key = tuple(
                (int(each.rows[0]), *(bool(mask[0]) for mask in each.masks.values()), min(int(each.numbers[0]), live.horizon))
                for (live, *_), each in zip(steered, tokens.values(), strict=True)
            )
        if key is None or key != self._key:
            self._key, self._work = key, self._plan[1].over(tokens)
        return self._work

    def _recorders(self) -> list[Recorder]:
        """One for each distinct readout of the step."""
        found: dict[tuple[Any, ...], tuple[Readout, list[np.ndarray], list[tuple[_Live, int, np.ndarray]]]] = {}
        for live, rows, positions in self._here:
            for n, noted in enumerate(live.order.noted):
                known = positions < len(noted.mask)
                counts = np.where(known, noted.mask[np.minimum(positions, len(noted.mask) - 1)], noted.grows)
                counts &= positions >= live.seen
                if counts.any():
                    readout = noted.readout
                    key = readout.layers, readout.pool, id(readout.onto)
                    _, places, members = found.setdefault(key, (readout, [], []))
                    places.append(rows[counts])
                    members.append((live, n, positions[counts]))
        self._members = [members for _, _, members in found.values()]
        return [Recorder(readout, places, self.runner.device) for readout, places, _ in found.values()]

    def visit(self, layer: int, stream: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        """What a tap does."""
        now = self._pass
        if self.tables is not None and len(stream) <= self.tables.tokens:
            return self.tables.visit(layer, stream, rest)
        if now is None or layer not in self._layers:
            return stream.clone()
        whole = stream.float() if rest is None else stream.float() + rest.float()
        after = now.visit(layer, whole[None])[0]
        if self._replaced and layer == self.n_layers - 1:
            after = after.clone()
            after[torch.tensor(list(self._replaced), device=after.device)] = torch.stack(list(self._replaced.values()))
        if after.data_ptr() == whole.data_ptr():
            return stream.clone()
        # What is added to the first part is added to the sum; where nothing was added, this is 0, and no bit changes.
        return after.to(stream.dtype) if rest is None else (stream.float() + (after - whole)).to(stream.dtype)

    def end(self, hidden: torch.Tensor) -> None:
        """The step is done: keep what was recorded; ``hidden`` is what the unembedding gets."""
        now = self._pass
        if now is not None:
            if self._fixed:
                assert self.tables is not None
                for recorder in self._recording:
                    for layer in recorder.readout.layers:
                        recorder.see(layer, self.tables.stream(layer, len(hidden)))
            else:
                now.confirm()
            for recorder, members in zip(self._recording, self._members, strict=True):
                for (live, n, positions), (values, norms) in zip(members, recorder.results(), strict=True):
                    if self._fixed:
                        refuse_stale(norms, recorder.readout.layers[0])
                    self._found(live.owner).seen.append(Seen(live.order.key, n, positions, values, norms))
        for live, _, positions in self._here:
            live.seen = max(live.seen, int(positions[-1]) + 1)
        self._look_up(hidden)

    def _look_up(self, hidden: torch.Tensor) -> None:
        """Log-probabilities and logits that are wanted."""
        wanted = [
            (live, n, int(rows[position - positions[0]]), token)
            for live, rows, positions in self._here
            for n, (position, token) in enumerate(live.order.wanted)
            if positions[0] <= position <= positions[-1]
        ]
        if wanted:
            logits = self._logits(hidden, [row for _, _, row, _ in wanted])
            if logits is not None:
                tokens = torch.tensor([token for *_, token in wanted], device=logits.device)
                found = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
                for (live, n, *_), value in zip(wanted, found.tolist(), strict=True):
                    self._found(live.owner).likely.append((live.order.key, n, value))
        for live, rows, _ in self._here:
            if live.order.residuals is not None and (logits := self._logits(hidden, rows.tolist())) is not None:
                self._found(live.owner).logits.append((live.order.key, logits.cpu().numpy()))

    def _logits(self, hidden: torch.Tensor, rows: list[int]) -> torch.Tensor | None:
        """None in the workers of a tensor-parallel model that do not gather them."""
        logits = self.runner.model.compute_logits(hidden[torch.tensor(rows, device=hidden.device)])
        return None if logits is None else logits.float()


# ── what vLLM loads ──


def require(runner: Any) -> None:
    """Refuse a vLLM whose model runner lacks what is used of it.

    Raises:
        ModelSupportError: Names what is missing and the versions that were tested.
    """
    needed = ("_model_forward", "input_batch", "query_start_loc", "requests", "model", "model_config", "vllm_config", "device")
    missing = [name for name in needed if not hasattr(runner, name)]
    if not missing:
        missing = [name for name in ("req_ids", "num_computed_tokens_cpu") if not hasattr(runner.input_batch, name)]
        missing += [] if hasattr(runner.query_start_loc, "np") else ["query_start_loc.np"]
    if missing:
        raise ModelSupportError(
            f"vLLM's {type(runner).__name__} has no {missing[0]}: install a version that was tested ({', '.join(TESTED)}), "
            "and start it with VLLM_USE_V2_MODEL_RUNNER=0"
        )
    config = runner.vllm_config
    if config.speculative_config is not None:
        raise ModelSupportError("affectlens cannot steer what is drafted: start vLLM without speculative decoding")
    if config.scheduler_config.async_scheduling:
        raise ModelSupportError("affectlens was not tested with asynchronous scheduling: start vLLM with --no-async-scheduling")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ModelSupportError("affectlens needs every layer in one worker: divide the model by tensor parallelism alone")


def replays(config: Any) -> bool:
    """Whether vLLM replays steps as CUDA graphs, or is told to do as if (``additional_config``), as the tests do on a CPU."""
    told = (config.additional_config or {}).get(REPLAY)
    return config.compilation_config.cudagraph_mode.name != "NONE" if told is None else bool(told)


@functools.cache
def worker_class() -> type:
    """vLLM's own worker for this platform, with a roster."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Own
    else:
        from vllm.v1.worker.gpu_worker import Worker as Own

    class Worker(Own):
        def load_model(self, *args: Any, **kwargs: Any) -> None:
            # A graph that was compiled without our taps must not be taken from vLLM's cache.
            self.vllm_config.additional_config = {**(self.vllm_config.additional_config or {}), NAME: "taps 1"}
            super().load_model(*args, **kwargs)
            self.affectlens = Roster(self.model_runner)

        def affectlens_expect(self, owner: str, head: str, data: bytes) -> None:
            self.affectlens.expect(owner, head, data)

        def affectlens_take(self, owner: str) -> tuple[str, bytes]:
            return self.affectlens.take(owner)

        def affectlens_forget(self, keys: list[str]) -> None:
            self.affectlens.forget(keys)

        def affectlens_leave(self, owner: str) -> None:
            self.affectlens.leave(owner)

    return Worker


def __getattr__(name: str) -> Any:
    if name == "Worker":
        return worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
