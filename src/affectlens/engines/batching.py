"""Requests that come and go and share forward passes all the same (continuous batching).

The caches of transformers hold a batch whose rows are equally long: whoever joins would have to be padded, and everything copied.
Here each row has a slot in which its own tokens stand from the beginning, whatever the others have (:class:`Slots`). To join is
to copy the newcomer's keys and values into a free slot; to leave is to hand the slot on. The model is told by the attention mask
which of a slot's places count, and the position of its one new token.

**Company changes nothing** but rounding. Where a matrix product gives a row the same bits whatever other rows there are (which is
tried, :func:`indifferent`), it changes no bit: then prompts are run one by one, and attention looks at whole blocks of places, so
that a row's sums are cut into the same pieces alone and in company. bfloat16 on a processor with AMX is such a case.

This holds where what layers keep are keys and values, of all tokens or of a window, which is tried on load
(:mod:`affectlens.engines.checks`). Recurrent states and compressed caches are something else: there each request is a batch of
its own (:class:`affectlens.engine.Session`).
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from affectlens.engine import Reading, Request, Result, Sampling, Session, check_request, refuse_too_long
from affectlens.engines.changes import by_rows
from affectlens.engines.decode import (
    Course,
    Part,
    Prompts,
    Reply,
    alike,
    draw,
    end_tokens,
    logprobs_of,
    may_grow,
    partials,
    reading_of,
    unpooled,
)
from affectlens.engines.hf import GENERATE_TOKENS
from affectlens.engines.residual import Pass, Recorder, Stop, Taps
from affectlens.engines.rows import Row
from affectlens.errors import AffectlensError, EngineError
from affectlens.layout import Layout

if TYPE_CHECKING:
    from affectlens.engines.hf import HFEngine

BETWEEN = 4
"""Of a pass's token budget a fourth may be spent on newcomers between two tokens of those that are there, and as much on requests
that only read: what one token of a stream may have to wait for."""

LEAST = 128
"""A pass over fewer tokens takes about as long as one over so many."""

BLOCK = 16
"""Places that the kernels of attention take together: vectors of a processor have as many float32 values at most."""

TRIED = 2**16
"""Numbers of each matrix product by which it is told whether they depend on other rows: on some processors one in 7,000 does."""

Came = list[tuple[int, Result | AffectlensError]]


# ── the cache ──


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, ``(slots, heads, places, D)``, of which a pass sees those in use.

    Places outside a layer's window are kept as well, because each row's window ends elsewhere: the mask leaves them out.
    """

    is_sliding = False

    def __init__(self, slots: Slots, window: int | None) -> None:
        super().__init__()
        self.slots, self.window = slots, window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: there is room before a pass begins."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots
        assert self.keys is not None and self.values is not None
        self.keys[slots.numbers, :, slots.places] = key_states[:, :, 0]
        self.values[slots.numbers, :, slots.places] = value_states[:, :, 0]
        n, width = len(slots.lengths), slots.width
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return -1

    def take(self, keys: torch.Tensor, values: torch.Tensor, *, slot: int) -> None:
        """Keep the keys and values ``(heads, T, D)`` of a newcomer."""
        self.keys = self._with_room(self.keys, keys, slot)
        self.values = self._with_room(self.values, values, slot)
        self.keys[slot, :, : keys.shape[1]] = keys
        self.values[slot, :, : values.shape[1]] = values

    def _with_room(self, held: torch.Tensor | None, new: torch.Tensor, slot: int) -> torch.Tensor:
        """``held`` with a slot and places for the newcomer, and some slots more."""
        slots, places = (0, 0) if held is None else (held.shape[0], held.shape[2])
        if held is not None and slot < slots and self.slots.room <= places:
            return held
        grown = new.new_zeros(max(slots, 2 * slot, 1), new.shape[0], max(places, self.slots.room), new.shape[2])
        if held is not None:
            grown[:slots, :, :places] = held
        return grown


class Slots:
    """A cache for passes over one new token of each row, whose rows come and go.

    Args:
        windows: For each layer how many tokens it looks back on, or None for all.
        device: Where masks and positions are wanted.
        dtype: Of masks, where attention adds them; None where it asks which places count.
    """

    def __init__(self, windows: Sequence[int | None], *, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.lengths: list[int] = []
        self.room = self.width = 0
        self.layers = [_Layer(self, window) for window in windows]
        self.windows = {layer.window for layer in self.layers}
        self.cache = Cache(layers=[*self.layers])
        self.numbers = self.places = torch.empty(0, dtype=torch.long)

    def join(self, cache: Any, row: int, *, length: int, more: int) -> None:
        """Take a row of another cache into the next slot.

        Args:
            cache: Of the pass over the newcomers' prompts, padded on the right.
            row: Its number there.
            length: How many tokens it has.
            more: How many it may come to have behind them.
        """
        self.room = max(self.room, in_blocks(length + more + 1))
        for layer, other in zip(self.layers, cache.layers, strict=True):
            layer.take(other.keys[row, :, :length], other.values[row, :, :length], slot=len(self.lengths))
        self.lengths.append(length)

    def leave(self, slot: int) -> None:
        """Free a slot: what the last one holds moves into it."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if slot != last:
            self.lengths[slot] = length
            for layer in self.layers:
                assert layer.keys is not None and layer.values is not None
                layer.keys[slot, :, :length] = layer.keys[last, :, :length]
                layer.values[slot, :, :length] = layer.values[last, :, :length]
        if not self.lengths:  # nothing is kept that a long request once needed
            self.room = 0
            for layer in self.layers:
                layer.keys = layer.values = None

    def begin(self) -> dict[str, Any]:
        """Prepare a pass over one token of each row; what the model has to be given besides the tokens."""
        lengths = torch.tensor(self.lengths)
        # One place more than is needed: without anything to leave out attention would be worked out in another way.
        self.width = in_blocks(int(lengths.max()) + 2)
        self.numbers = torch.arange(len(lengths), device=self.device)
        self.places = lengths.to(self.device)
        self.lengths = [length + 1 for length in self.lengths]
        back = lengths[:, None] - torch.arange(self.width)
        masks = {window: (back >= 0) & (back < (window or self.width)) for window in self.windows}
        mask: Any = masks.get(None)
        if self.windows == {None}:
            mask = mask.long().to(self.device)
        else:
            made = {window: self._drawn_up(kept) for window, kept in masks.items()}
            kinds = {"sliding_attention" if window else "full_attention": each for window, each in made.items()}
            mask = kinds if len(kinds) > 1 else next(iter(kinds.values()))
        return {"attention_mask": mask, "position_ids": self.places[:, None]}

    def _drawn_up(self, kept: torch.Tensor) -> torch.Tensor:
        """A mask as the model would have made it, ``(B, 1, 1, places)``: one by which it does not ask about windows any more."""
        mask = kept[:, None, None].to(self.device)
        if self.dtype is None:
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)


def in_blocks(n: int, size: int = BLOCK) -> int:
    """So many places in whole blocks."""
    return -(-n // size) * size


def windows_of(engine: HFEngine) -> list[int | None] | None:
    """For each layer with a cache how many tokens it looks back on; None if what is kept is not just keys and values."""
    layers = DynamicCache(config=engine.model.config.get_text_config(decoder=True)).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    return windows if len({*windows} - {None}) < 2 else None


class _OneByOne(Recorder):
    """Records as others do, each row with the bits that it has alone."""

    def project(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        return by_rows(x, onto.T)


# ── the session ──


@dataclass
class _Seat:
    """A request that is being answered.

    Args:
        ticket: Its own.
        reply: What was said so far.
        prompt: What each readout saw of the prompt.
        said: What it saw of the reply, a token each.
    """

    ticket: int
    reply: Reply
    prompt: dict[int, Part]
    said: dict[int, list[Part]] = field(default_factory=dict)

    def readings(self, width: int, _: int, layout: Layout, first: int = 0) -> tuple[Reading, ...]:
        """Readings of a row from token ``first`` on; ``width`` is that of the residual."""
        start = len(self.reply.row.layout)
        out = []
        for r, readout in enumerate(self.reply.row.request.readouts):
            parts = [self.prompt[r]] if r in self.prompt and first < start else []
            parts += self.said.get(r, [])[max(first - start, 0) :]
            out.append(reading_of(readout, layout, parts, first=first, width=width))
        return tuple(out)


class BatchSession(Session):
    """A session whose requests share forward passes, each with its own steering, readouts and seed.

    Args:
        engine: Whose model's caches keep all keys and values.
    """

    shares = True

    def __init__(self, engine: HFEngine) -> None:
        self._hf = engine
        self._tickets = itertools.count()
        self._reads: deque[tuple[int, Request, Layout]] = deque()
        self._waiting: deque[tuple[int, Row]] = deque()
        self._seats: list[_Seat] = []
        adds = engine.model.config.get_text_config(decoder=True)._attn_implementation == "eager"
        windows = windows_of(engine)
        assert windows is not None, "tried on load"
        self._slots = Slots(windows, device=engine.device, dtype=engine.model.dtype if adds else None)
        self._takes_positions = "position_ids" in inspect.signature(engine.model.forward).parameters
        self._ends = end_tokens(engine)
        self.exact = engine.indifferent
        self._changed = True
        self._course = Course(engine, [])
        self._recorders: list[tuple[Recorder, list[tuple[int, int]]]] = []

    @property
    def live(self) -> int:
        return len(self._reads) + len(self._waiting) + len(self._seats)

    def submit(self, request: Request) -> int:
        hf = self._hf
        check_request(request, hf.info)
        layout = hf.layout(request)
        longest = max((len(hf.continuation(choice)) for choice in request.choices), default=0)
        refuse_too_long(len(layout) + longest, request, hf.info)
        ticket = next(self._tickets)
        if request.sampling is None:
            self._reads.append((ticket, request, layout))
        else:
            self._waiting.append((ticket, Row(ticket, request, layout)))
        return ticket

    def cancel(self, ticket: int) -> None:
        self._reads = deque(entry for entry in self._reads if entry[0] != ticket)
        self._waiting = deque(entry for entry in self._waiting if entry[0] != ticket)
        self._leave([seat.ticket for seat in self._seats if seat.ticket == ticket])

    def close(self) -> None:
        self._reads.clear()
        self._waiting.clear()
        self._leave([seat.ticket for seat in self._seats])

    def step(self) -> Came:
        out, newcomers = self._read(), self._newcomers()
        try:
            for group in newcomers:
                self._join(group, out)
            if self._seats:
                self._advance(out)
        except (AffectlensError, torch.OutOfMemoryError) as error:
            # A pass is everybody's: what its caches hold cannot be trusted any more.
            full = EngineError("the device's memory is full: serve fewer at once")
            ended = {ticket for ticket, result in out if not isinstance(result, Result) or result.done}
            joining = [ticket for group in newcomers for ticket, _ in group]
            concerned = dict.fromkeys([*joining, *(seat.ticket for seat in self._seats)])
            known = error if isinstance(error, AffectlensError) else full
            out += [(ticket, known) for ticket in concerned if ticket not in ended]
            self._leave([seat.ticket for seat in self._seats])
        return out

    # ── requests that only read ──

    def _read(self) -> Came:
        """Run some of the requests that only read; a long one is not divided.

        Together they are faster, but what lies beside a text in a packed row changes its rounding.
        """
        taken: list[tuple[int, Request, Layout]] = []
        room = self._hf.token_budget // (BETWEEN if self._seats else 1)
        while self._reads and (not taken or len(self._reads[0][2]) <= room):
            taken.append(self._reads.popleft())
            room -= len(taken[-1][2])
        if not taken:
            return []
        if not self.exact:
            try:
                results = list(self._hf.run([request for _, request, _ in taken]))
                return [(ticket, result) for (ticket, *_), result in zip(taken, results, strict=True)]
            except AffectlensError:
                pass  # one of them is the reason: each on its own finds out which
        out: Came = []
        for ticket, request, _ in taken:
            try:
                out.append((ticket, next(self._hf.run([request]))))
            except AffectlensError as error:
                out.append((ticket, error))
        return out

    # ── newcomers ──

    def _newcomers(self) -> list[list[tuple[int, Row]]]:
        """Who may join now, in the order in which they came, and whose prompts run together: as many as there is room for.

        Equal prompts in a row, steered and read equally, are run once.
        """
        hf, groups, seats = self._hf, list[list[tuple[int, Row]]](), len(self._seats)
        room = hf.token_budget // BETWEEN
        longest = max((_longest(seat.reply.row) for seat in self._seats), default=0)
        while self._waiting and seats < hf.generate_rows:
            row = self._waiting[0][1]
            longest = max(longest, _longest(row))
            if groups and _same_prompt(groups[-1][-1][1], row) and (seats + 1) * longest <= GENERATE_TOKENS:
                groups[-1].append(self._waiting.popleft())
                seats += 1
                continue
            group = [] if self.exact or not groups else groups[-1]
            widest = in_blocks(max(len(other) for _, other in (*group, self._waiting[0])))
            joins = bool(group) and hf.can_pad
            n = len(_distinct([other for _, other in group])[0])
            cost = max(LEAST, widest * (n + 1)) - (max(LEAST, widest * n) if joins else 0)
            if (seats and (seats + 1) * longest > GENERATE_TOKENS) or (groups and cost > room):
                break
            if not joins:
                groups.append([])
            groups[-1].append(self._waiting.popleft())
            room -= cost
            seats += 1
        return groups

    def _join(self, newcomers: Sequence[tuple[int, Row]], out: Came) -> None:
        hf = self._hf
        replies = [Reply(row, row.request.sampling or Sampling()) for _, row in newcomers]
        rows, row_of = _distinct([row for _, row in newcomers])
        width = in_blocks(max(map(len, rows)))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row.layout.ids)
        starts = [n * width for n in range(len(rows))]
        prompts = Prompts(rows, starts, hf.device)
        now = Pass(*Course(hf, rows).prompt(starts), prompts.recorders)
        cache = Cache(layers=[DynamicLayer() for _ in self._slots.layers])
        ends = torch.tensor([len(row) - 1 for row in rows], device=hf.device)
        inputs: dict[str, Any] = {}
        if hf.model._supports_logits_to_keep():
            inputs["logits_to_keep"], ends = torch.unique(ends, return_inverse=True)
        # Padding on the right needs no mask: in a causal model later tokens change nothing before them.
        with torch.inference_mode(), Taps(hf.blocks, now.layers) as taps:
            taps.current = now
            logits = hf.model(input_ids=ids.to(hf.device), past_key_values=cache, use_cache=True, **inputs).logits
        now.confirm()
        seen = prompts.take()
        for n, (ticket, row), reply in zip(row_of, newcomers, replies, strict=True):
            self._slots.join(cache, n, length=len(row), more=reply.sampling.max_tokens + 1)
            own = {r: seen[n, r] for r in range(len(row.request.readouts)) if (n, r) in seen}
            self._seats.append(_Seat(ticket, reply, own))
        self._changed = True
        each = torch.tensor(row_of, device=hf.device)
        self._draw(self._seats[-len(replies) :], logits[each, ends[each]].float(), out)

    # ── a token further ──

    def _advance(self, out: Came) -> None:
        """One pass over the newest token of each; then the next one of each is drawn."""
        hf, seats = self._hf, list(self._seats)
        replies = [seat.reply for seat in seats]
        if self._changed:
            self._settle([reply.row for reply in replies])
        recorders = [recorder for recorder, _ in self._recorders]
        # Once nobody goes on, the last tokens are run for their readings alone, no further than those need.
        over = all(reply.finish for reply in replies)
        last = max(layer for recorder in recorders for layer in recorder.readout.layers) if over else None
        now = Pass(*self._course.step(replies, [True] * len(replies)), recorders, last)
        newest = torch.tensor([[reply.ids[-1]] for reply in replies], device=hf.device)
        inputs = self._slots.begin()
        if not self._takes_positions:
            del inputs["position_ids"]
        logits = torch.empty(0)
        try:
            with torch.inference_mode(), Taps(hf.blocks, now.layers) as taps:
                taps.current = now
                logits = hf.model(input_ids=newest, past_key_values=self._slots.cache, use_cache=True, **inputs).logits[:, -1]
        except Stop:
            pass
        now.confirm()
        for recorder, own in self._recorders:
            for (n, r), (values, norms) in zip(own, recorder.results(), strict=True):
                place = np.array([len(replies[n].row) + replies[n].fed])
                seats[n].said.setdefault(r, []).append(Part(place, values, norms))
        for reply in replies:
            reply.fed += 1
        self._tell(seats, out)
        if not over:
            row_of = {seat.ticket: n for n, seat in enumerate(seats)}
            self._draw(self._seats, logits[[row_of[seat.ticket] for seat in self._seats]].float(), out)

    def _settle(self, rows: list[Row]) -> None:
        """Work out what is done for these rows at every token, until somebody comes or goes."""
        self._changed = False
        self._course = Course(self._hf, rows)
        self._recorders = [
            (_OneByOne(unpooled(readout), [np.array([n]) for n, _ in own], self._hf.device), own)
            for readout, own in alike(rows)
            if may_grow(readout.where)
        ]

    def _draw(self, seats: Sequence[_Seat], logits: torch.Tensor, out: Came) -> None:
        replies = [seat.reply for seat in seats]
        tokens = draw(logits, replies)
        likely = logprobs_of(logits, replies, tokens)
        for n, (reply, token) in enumerate(zip(replies, tokens, strict=True)):
            reply.take(token, self._hf.tokenizer, self._ends, likely.get(n))
        self._tell(seats, out)

    def _tell(self, seats: Sequence[_Seat], out: Came) -> None:
        """Hand out what is new of those whose newest token has been read, if it is to be, and let those go that have ended."""
        width, ended = self._hf.info.width, []
        for seat in (seat for seat in seats if not seat.reply.owes):
            reply = seat.reply
            if reply.row.request.stream:
                out += [(seat.ticket, result) for _, result in partials({0: reply}, partial(seat.readings, width))]
            if reply.finish:
                layout = reply.grow()
                readings = seat.readings(width, 0, layout)
                out.append((seat.ticket, Result(reply.text, layout, readings, (), reply.finish, logprobs=tuple(reply.logprobs))))
                ended.append(seat.ticket)
        self._leave(ended)

    def _leave(self, tickets: Sequence[int]) -> None:
        for ticket in tickets:
            n = next(n for n, seat in enumerate(self._seats) if seat.ticket == ticket)
            self._slots.leave(n)
            self._seats[n] = self._seats[-1]
            self._seats.pop()
            self._changed = True


def _same_prompt(one: Row, two: Row) -> bool:
    """Whether a pass over two prompts would do and record the same."""

    def readouts(row: Row) -> list[tuple[Any, ...]]:
        return [(each.layers, each.where, each.pool, id(each.onto)) for each in row.request.readouts]

    alike = one.layout.ids == two.layout.ids and one.layout.roles == two.layout.roles and one.layout.turns == two.layout.turns
    return (
        alike
        and one.layout.n_prompt == two.layout.n_prompt
        and readouts(one) == readouts(two)
        and (one.request.steering == two.request.steering)
    )


def _distinct(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The rows without those that have the prompt of the row before, and for each row the number of its own among them."""
    found: list[Row] = []
    numbers = []
    for row in rows:
        if not (found and _same_prompt(found[-1], row)):
            found.append(row)
        numbers.append(len(found) - 1)
    return found, numbers


def _longest(row: Row) -> int:
    assert row.request.sampling is not None
    return len(row) + row.request.sampling.max_tokens


def indifferent(engine: HFEngine) -> bool:
    """Whether the model's matrix products give a row the same bits alone and among as many as may be generated together."""
    rows = max(2, engine.generate_rows)
    weights = [*engine.blocks[-1].parameters(), engine.model.get_output_embeddings().weight]
    distinct = {(tuple(w.shape), w.dtype): w for w in weights if w.dim() == 2}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for weight in distinct.values():
            least = -(-TRIED // weight.shape[0])  # rows that have as many numbers
            x = torch.randn(in_blocks(least, rows), weight.shape[1], generator=generator).to(weight.device, weight.dtype)
            among = torch.cat([torch.nn.functional.linear(part, weight) for part in x.split(rows)])
            for m in (1, 2, 3, 5, 8, 13, 16, 21):
                n = min(len(x), in_blocks(least, m))
                if not torch.equal(torch.cat([torch.nn.functional.linear(part, weight) for part in x[:n].split(m)]), among[:n]):
                    return False
    return True
