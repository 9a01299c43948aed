"""Generation with transformers: one left-padded batch, token by token, each request with its own steering, readouts and seed.

The model's own ``generate`` prepares inputs, positions and cache, which differ between families; the loop over tokens is ours
(its ``custom_generate``), so that a token can be steered, recorded, drawn from its request's seed and handed out as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from affectlens.engine import Logprob, Reading, Readout, Result, Sampling
from affectlens.engines.changes import Plan, Tokens, Work
from affectlens.engines.residual import Pass, Recorder, Stop, Tape, Taps
from affectlens.engines.rows import Row, grown, tokens_of
from affectlens.errors import ModelSupportError
from affectlens.layout import Layout, Where

if TYPE_CHECKING:
    from affectlens.engines.hf import HFEngine

LIKELY = 256
"""So many of the likeliest tokens hold ``top_p`` together, as a rule."""

TOGETHER = 256
"""Tokens whose residuals wait to be projected together, so that the directions are not read from memory for each of them."""


def _forward_steps(
    model: Any, input_ids: torch.Tensor, generation_config: Any = None, **model_kwargs: Any
) -> Generator[torch.Tensor, torch.Tensor, None]:
    """Yield the logits of the next token ``(B, V)``; take the tokens chosen, run them, and so on."""
    for name in ("logits_processor", "stopping_criteria", "synced_gpus"):
        model_kwargs.pop(name, None)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        tokens = yield outputs.logits[:, -1].float()
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        if inputs["input_ids"].shape[1] != 1:
            raise ModelSupportError(
                f"{type(model).__name__} generates without a cache: affectlens reads it but cannot generate with it"
            )
        outputs = model(**inputs, return_dict=True)


@dataclass
class Reply:
    """One request while it is being answered."""

    row: Row
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str = ""
    fed: int = 0
    told: int = 0
    shown: int = 0
    decoded: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        # Counter-based and one number for each token: the draw does not depend on the batch or the device.
        self.random = np.random.Generator(np.random.Philox(self.sampling.seed))
        self.layout = self.row.layout
        self.read_on = any(may_grow(readout.where) for readout in self.row.request.readouts)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def owes(self) -> bool:
        """Whether its newest token must run through the model once more, for a readout of the reply."""
        return self.read_on and self.fed < len(self.ids)

    def grow(self) -> Layout:
        """The layout with all tokens so far, grown from what it was when it was last asked for."""
        known = len(self.layout) - len(self.row.layout)
        self.layout = grown(self.layout, self.ids[known:], self.pieces[known:])
        return self.layout

    def take(self, token: int, tokenizer: Any, ends: frozenset[int], logprob: Logprob | None) -> None:
        """Append a token; finish at an end token, a stop string or the limit."""
        if token in ends:
            self.finish = "stop"
            return
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        self.pieces.append(self._piece(tokenizer))
        for stop in self.sampling.stop:
            if (at := self.text.find(stop)) >= 0:
                self._cut(at)
                self.finish = "stop"
                return
        if len(self.ids) == self.sampling.max_tokens:
            self.finish = "length"

    def release(self) -> str:
        """Text that may be shown now and was not yet: what may be the beginning of a stop string waits."""
        text = self.text
        held = (
            0
            if self.finish
            else max((n for s in self.sampling.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        )
        new, self.shown = text[self.shown : len(text) - held], max(self.shown, len(text) - held)
        return new

    def _piece(self, tokenizer: Any) -> str:
        """Text that the newest token adds. An unfinished character waits for the token that completes it."""
        start, read = self.decoded
        before = tokenizer.decode(self.ids[start:read], skip_special_tokens=True)
        now = tokenizer.decode(self.ids[start:], skip_special_tokens=True)
        if now.endswith("\ufffd") and len(self.ids) < self.sampling.max_tokens:
            return ""
        self.decoded = (read, len(self.ids))
        return now[len(before) :]

    def _cut(self, at: int) -> None:
        self.layout = self.row.layout
        for i, piece in enumerate(self.pieces):
            self.pieces[i] = piece[: max(0, at)]
            at -= len(piece)
        while self.pieces and not self.pieces[-1]:  # a token of which nothing is left is no part of the reply
            self.pieces.pop()
            self.ids.pop()
        del self.logprobs[len(self.ids) :]


def decode(engine: HFEngine, batch: list[Row]) -> Iterator[tuple[Row, Result]]:
    """Generate for a batch of rows; yields partial results of requests that stream, and every final one at the end."""
    from transformers import GenerationConfig

    replies = [Reply(row, row.request.sampling or Sampling()) for row in batch]
    width = max(len(row) for row in batch)
    pad = next(t for t in (engine.tokenizer.pad_token_id, engine.tokenizer.eos_token_id, 0) if t is not None)
    ids = torch.full((len(batch), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(batch):
        ids[n, width - len(row) :] = torch.tensor(row.layout.ids)
        mask[n, width - len(row) :] = 1
    ends = end_tokens(engine)
    course = Course(engine, batch)
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,  # checkpoints saved in training often say False, and without a cache a single token has no past
        max_new_tokens=max(r.sampling.max_tokens for r in replies) + 1,
        pad_token_id=pad,
        eos_token_id=None,
    )
    steps = engine.model.generate(
        ids.to(engine.device), attention_mask=mask.to(engine.device), generation_config=config, custom_generate=_forward_steps
    )

    starts = [n * width + width - len(row) for n, row in enumerate(batch)]
    record = _Record(engine, batch, starts)

    with Taps(engine.blocks, course.plan.layers | record.layers) as taps:

        def forward(now: Pass, tokens: torch.Tensor | None) -> torch.Tensor | None:
            # Between passes the hooks do nothing: whoever takes a partial result may use the model before asking for the next.
            taps.current = now
            try:
                with torch.inference_mode():
                    logits = next(steps) if tokens is None else steps.send(tokens)
            except Stop:
                logits = None
            finally:
                taps.current = None
            now.confirm()
            return logits

        logits = forward(Pass(*course.prompt(starts), record.prompts.recorders), None)
        record.take_prompts()
        while logits is not None:
            streaming = {n: reply for n, reply in enumerate(replies) if not reply.finish and reply.row.request.stream}
            tokens = draw(logits, replies)
            likely = logprobs_of(logits, replies, tokens)
            for n, (reply, token) in enumerate(zip(replies, tokens, strict=True)):
                if not reply.finish:
                    reply.take(token, engine.tokenizer, ends, likely.get(n))
            owing = {n: reply for n, reply in streaming.items() if reply.owes}
            yield from partials({n: reply for n, reply in streaming.items() if n not in owing}, record.readings)
            feeding = [reply.owes or not reply.finish for reply in replies]
            if not any(feeding):
                break
            tapes = record.tapes(feeding)
            # Once nobody goes on, the last tokens are run for their readings alone, no further than those need.
            last = None if any(not reply.finish for reply in replies) else max(layer for t in tapes for layer in t.readout.layers)
            now = Pass(*course.step(replies, feeding), tapes, last)
            logits = forward(now, torch.tensor(tokens, device=engine.device))
            for tape in tapes:
                tape.advance()
            for reply, feeds in zip(replies, feeding, strict=True):
                reply.fed += feeds
            yield from partials(owing, record.readings)
    steps.close()
    record.finish()
    for n, reply in enumerate(replies):
        layout = reply.grow()
        yield reply.row, Result(reply.text, layout, record.readings(n, layout), (), reply.finish, logprobs=tuple(reply.logprobs))


def end_tokens(engine: HFEngine) -> frozenset[int]:
    ends = engine.model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return frozenset([*ends, engine.tokenizer.eos_token_id])


# ── drawing tokens ──


def draw(logits: torch.Tensor, replies: list[Reply]) -> list[int]:
    """One token for each row: the likeliest at temperature 0, else by inverting the cumulative distribution at the row's own
    random number, so that a row's token does not depend on its neighbours."""
    tokens = logits.argmax(-1)
    groups: dict[tuple[float, float, int], list[int]] = {}
    for n, reply in enumerate(replies):
        s = reply.sampling
        if s.temperature > 0 and s.top_k != 1 and not reply.finish:
            groups.setdefault((s.temperature, s.top_p, s.top_k), []).append(n)
    for (temperature, top_p, top_k), rows in groups.items():
        uniform = torch.tensor([replies[n].random.random() for n in rows], dtype=torch.float32)
        tokens[rows] = sample(logits[rows] / temperature, top_p, top_k, uniform.to(logits.device)[:, None])
    return tokens.tolist()


def logprobs_of(logits: torch.Tensor, replies: list[Reply], tokens: list[int]) -> dict[int, Logprob]:
    """How likely the drawn token of each row is, for the rows that want to know."""
    wanted = {n: k for n, reply in enumerate(replies) if not reply.finish and (k := reply.sampling.logprobs) is not None}
    if not wanted:
        return {}
    rows = list(wanted)
    known = logits[rows].log_softmax(-1)
    own = known[torch.arange(len(rows)), torch.tensor([tokens[n] for n in rows], device=known.device)].tolist()
    best = known.topk(min(max(wanted.values()), known.shape[-1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        n: Logprob(tokens[n], own[i], tuple(zip(ids[i][: wanted[n]], values[i][: wanted[n]], strict=True)))
        for i, n in enumerate(rows)
    }


def sample(logits: torch.Tensor, top_p: float, top_k: int, uniform: torch.Tensor) -> torch.Tensor:
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return _at(logits.softmax(-1), top_p, uniform)


def _at(weights: torch.Tensor, top_p: float, uniform: torch.Tensor, *, first: int = LIKELY) -> torch.Tensor:
    """The token at which the cumulative distribution reaches a share, among the likeliest that hold ``top_p`` together.

    As a rule few tokens hold so much, and to find them takes a twentieth of the time that sorting a whole vocabulary takes.
    """
    size = weights.shape[1]
    if top_p >= 1:
        return _reached(weights, uniform)
    best, ids = weights.topk(min(first, size))
    kept = (best.cumsum(-1) - best < top_p).sum(-1, keepdim=True)
    least = best.gather(1, kept - 1)
    # Of equally likely tokens the first are kept, so all of them have to be there.
    wide = ((best[:, -1:] == least) & (least > 0))[:, 0]
    if first < size and wide.any():
        token = torch.empty_like(ids[:, 0])
        token[wide] = _at(weights[wide], top_p, uniform[wide], first=size)
        if not wide.all():
            token[~wide] = _at(weights[~wide], top_p, uniform[~wide], first=first)
        return token
    ids, order = ids.sort(-1)
    own = best.gather(1, order)
    above, level = own > least, own == least
    level &= level.cumsum(-1) <= kept - above.sum(-1, keepdim=True)
    return ids.gather(1, _reached(own * (above | level), uniform)[:, None])[:, 0]


def _reached(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the cumulative sum of each row passes its share of the whole."""
    cumulative = weights.cumsum(-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=weights.shape[1] - 1)
    # Rounding can point past the last one of non-zero weight.
    if (weights.gather(1, place) == 0).any():
        last = (weights > 0).long().mul(torch.arange(weights.shape[1], device=weights.device)).argmax(-1)
        place = torch.minimum(place, last[:, None])
    return place[:, 0]


# ── steering and recording ──


def may_grow(where: Where) -> bool:
    return where.part != "prompt" and where.role in (None, "assistant")


def candidates(row: Row, readout: Readout) -> np.ndarray:
    return replace(readout.where, text=None, after=0, first=None, last=None).mask(row.layout)


class Course:
    """The steering of a batch over its prompts and then token by token.

    What is done changes only when a row begins or ceases to be steered, and while a schedule runs: in between the same tensors
    serve every token.
    """

    def __init__(self, engine: HFEngine, batch: list[Row]) -> None:
        self.batch = batch
        self.plan = Plan([row.request.steering for row in batch], lambda layer: engine.device)
        self.steered = [n for n, row in enumerate(batch) if row.request.steering.layers]
        # For each row its selectors, with the numbers of the tokens ahead that they select.
        self.ahead = {
            n: {where: where.ahead(batch[n].layout) for where in {t.where for t in batch[n].request.steering.terms}}
            for n in self.steered
        }
        self.horizon = {
            n: max((t.schedule.tokens for t in batch[n].request.steering.terms if t.schedule), default=0) for n in self.steered
        }
        self.key: tuple[Any, ...] = ()
        self.now: Work = ({}, {})

    def prompt(self, starts: list[int]) -> Work:
        """What to do in the pass over the prompts, whose first tokens stand at ``starts``."""
        index = {n: np.arange(len(self.batch[n])) for n in self.steered}
        return self.plan.over({n: tokens_of(self.batch[n], starts[n] + index[n], index[n]) for n in self.steered})

    def step(self, replies: list[Reply], feeding: list[bool]) -> Work:
        """What to do in the pass over each feeding row's newest token."""
        fed = [n for n in self.steered if feeding[n]]
        hits = {n: {where: replies[n].fed in ahead for where, ahead in self.ahead[n].items()} for n in fed}
        numbers = {n: len(self.batch[n]) - self.batch[n].layout.n_prompt + replies[n].fed for n in fed}
        key = tuple((n, *hits[n].values(), min(numbers[n], self.horizon[n])) for n in fed)
        if key != self.key:
            self.key = key
            tokens = {
                n: Tokens(np.array([n]), np.array([numbers[n]]), {where: np.array([hit]) for where, hit in hits[n].items()})
                for n in fed
                if any(hits[n].values())
            }
            self.now = self.plan.over(tokens)
        return self.now


@dataclass(frozen=True)
class Part:
    """What a readout saw at some of a row's tokens, unpooled: positions ``(T,)``, values ``(L, T, k)``, norms ``(L, T)``."""

    positions: np.ndarray
    values: np.ndarray
    norms: np.ndarray

    def of(self, keep: np.ndarray) -> Part:
        """Some of it; most often all is wanted, and then nothing is copied."""
        return self if keep.all() else Part(self.positions[keep], self.values[:, keep], self.norms[:, keep])


def unpooled(readout: Readout) -> Readout:
    """What to record until it is known which tokens count: what is averaged is projected after averaging, because the norm of
    the mean is wanted too."""
    return Readout(readout.layers, Where(), "none", readout.onto if readout.pool in ("none", "last") else None)


def alike(rows: Sequence[Row]) -> list[tuple[Readout, list[tuple[int, int]]]]:
    """The distinct readouts of some rows, each with the (row, readout number) that want it; requests usually share one object."""
    shared: dict[tuple[Any, ...], tuple[Readout, list[tuple[int, int]]]] = {}
    for n, row in enumerate(rows):
        for r, readout in enumerate(row.request.readouts):
            key = readout.layers, readout.where, readout.pool, id(readout.onto)
            shared.setdefault(key, (readout, []))[1].append((n, r))
    return list(shared.values())


class Prompts:
    """What the readouts of some rows see of their prompts, all that may count: ``recorders`` belong into the pass over them.

    Args:
        rows: In a batch of their own.
        starts: Where each row's first token stands in the flattened pass.
        device: Where the model runs.
    """

    def __init__(self, rows: Sequence[Row], starts: Sequence[int], device: torch.device) -> None:
        self.recorders: list[Recorder] = []
        self._places: list[list[tuple[int, int, np.ndarray]]] = []
        for readout, own in alike(rows):
            places = [(n, r, np.flatnonzero(candidates(rows[n], readout))) for n, r in own]
            if any(len(positions) for *_, positions in places):
                flat = [starts[n] + positions for n, _, positions in places]
                self.recorders.append(Recorder(unpooled(readout), flat, device))
                self._places.append(places)

    def take(self) -> dict[tuple[int, int], Part]:
        """What the pass has shown, off the device, for each row and number of a readout."""
        return {
            (n, r): Part(positions, values, norms)
            for recorder, places in zip(self.recorders, self._places, strict=True)
            for (n, r, positions), (values, norms) in zip(places, recorder.results(), strict=True)
        }


class _Record:
    """What the readouts of a batch see: of the prompts in one pass, of the replies token by token.

    Which tokens count is known only at the end, so all that may count are kept, unpooled.
    """

    def __init__(self, engine: HFEngine, batch: list[Row], starts: list[int]) -> None:
        self.batch, self.width = batch, engine.info.width
        self.prompts = Prompts(batch, starts, engine.device)
        self._prompts: dict[tuple[int, int], Part] = {}
        self._tapes: dict[tuple[int, int], tuple[Tape, int]] = {}
        # A stream shows every token as it comes.
        together = 1 if any(row.request.stream for row in batch) else max(1, TOGETHER // len(batch))
        for readout, own in alike(batch):
            if may_grow(readout.where):
                tape = Tape(unpooled(readout), [n for n, _ in own], len(batch), device=engine.device, together=together)
                self._tapes |= {key: (tape, column) for column, key in enumerate(own)}

    @property
    def layers(self) -> set[int]:
        return {layer for row in self.batch for readout in row.request.readouts for layer in readout.layers}

    def take_prompts(self) -> None:
        """Keep what the pass over the prompts has shown."""
        self._prompts = self.prompts.take()

    def tapes(self, feeding: list[bool]) -> list[Tape]:
        """Those that record the newest token of any of these rows."""
        return list({id(tape): tape for (n, _), (tape, _) in self._tapes.items() if feeding[n]}.values())

    def finish(self) -> None:
        """Keep what still waits: the batch is done."""
        for tape, _ in self._tapes.values():
            tape.project()

    def readings(self, n: int, layout: Layout, first: int = 0) -> tuple[Reading, ...]:
        """What was recorded of a row from token ``first`` on, selected and pooled, now that its text up to here is known."""
        return tuple(self._reading(n, r, layout, first) for r in range(len(self.batch[n].request.readouts)))

    def _reading(self, n: int, r: int, layout: Layout, first: int) -> Reading:
        start = len(self.batch[n].layout)
        parts = [self._prompts[n, r]] if (n, r) in self._prompts and first < start else []
        if (n, r) in self._tapes:
            tape, column = self._tapes[n, r]
            parts += [Part(start + passes, *seen) for passes, *seen in tape.since(max(first - start, 0), column)]
        return reading_of(self.batch[n].request.readouts[r], layout, parts, first=first, width=self.width)


def reading_of(readout: Readout, layout: Layout, parts: Sequence[Part], *, first: int, width: int) -> Reading:
    """A readout from token ``first`` on, selected and pooled, out of all that was kept; ``width`` is that of the residual."""
    # One place more for what a reply that was cut has left behind.
    wanted = np.append(readout.where.mask(layout), False)
    wanted[:first] = False
    kept = [part.of(keep) for part in parts if (keep := wanted[np.minimum(part.positions, len(layout))]).any()]
    if not kept:
        return nothing(readout, width)
    positions, values, norms = (
        np.concatenate([getattr(part, name) for part in kept], axis=axis)
        for name, axis in (("positions", 0), ("values", 1), ("norms", 1))
    )
    return pooled(readout, positions, values, norms)


def nothing(readout: Readout, width: int) -> Reading:
    """The reading of a selector that selects no token."""
    n_layers, width = len(readout.layers), width if readout.onto is None else readout.onto.shape[1]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "none": ((n_layers, 0, width), (n_layers, 0)),
        "norm": ((n_layers,), (n_layers,)),
    }
    of_values, of_norms = shapes.get(readout.pool, ((n_layers, width), (n_layers,)))
    values, norms = (np.full(shape, np.nan, np.float32) for shape in (of_values, of_norms))
    return Reading(values, norms, np.empty(0, dtype=np.int64))


def pooled(readout: Readout, positions: np.ndarray, values: np.ndarray, norms: np.ndarray) -> Reading:
    if readout.pool == "none":
        return Reading(values, norms, positions)
    if readout.pool == "last":
        return Reading(values[:, -1], norms[:, -1], positions)
    if readout.pool == "norm":
        return Reading(norms.mean(1), norms.mean(1), positions)
    mean = values.mean(1, dtype=np.float32)
    projected = mean if readout.onto is None else np.einsum("ld,lnd->ln", mean, readout.onto)
    return Reading(projected.astype(np.float32), np.linalg.norm(mean, axis=-1), positions)


Readings = Callable[[int, Layout, int], tuple[Reading, ...]]
"""Readings of row ``n`` in a layout, from a token on."""


def partials(replies: Mapping[int, Reply], readings: Readings) -> Iterator[tuple[Row, Result]]:
    """A partial result for each reply that has a new token or text that was held back."""
    for n, reply in replies.items():
        text = reply.release()
        if text or len(reply.ids) > reply.told:
            layout = reply.grow()
            newest = len(layout) - (len(reply.ids) > reply.told)
            likely = tuple(reply.logprobs[reply.told :])
            reply.told = len(reply.ids)
            seen = readings(n, layout, newest)
            yield reply.row, Result(text, layout, seen, (), reply.finish, done=False, logprobs=likely)
