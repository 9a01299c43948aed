"""Generation with transformers: one left-padded batch, token by token, each request with its own steering, readouts and seed.

The model's own ``generate`` prepares inputs, positions and cache, which differ between families; the loop over tokens is ours
(its ``custom_generate``), so that a token can be steered, recorded, drawn from its request's seed and handed out as it comes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from affectlens.engine import Reading, Readout, Result, Sampling
from affectlens.engines.changes import Plan, Tokens, Work
from affectlens.engines.hf import Row, grown, tokens_of
from affectlens.engines.residual import Pass, Recorder, Taps
from affectlens.errors import ModelSupportError
from affectlens.layout import Layout, Where

if TYPE_CHECKING:
    from affectlens.engines.hf import HFEngine


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
    finish: str = ""
    fed: int = 0
    told: int = 0
    shown: int = 0
    seen: list[list[tuple[int, np.ndarray, np.ndarray]]] = field(default_factory=list)
    decoded: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        # Counter-based and one number for each token: the draw does not depend on the batch or the device.
        self.random = np.random.Generator(np.random.Philox(self.sampling.seed))
        self.seen = [[] for _ in self.row.request.readouts]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def owes(self) -> bool:
        """Whether its newest token must run through the model once more, for a readout of the reply."""
        return self.fed < len(self.ids) and any(_may_grow(r.where) for r in self.row.request.readouts)

    def take(self, token: int, engine: HFEngine, ends: frozenset[int]) -> None:
        """Append a token; finish at an end token, a stop string or the limit."""
        if token in ends:
            self.finish = "stop"
            return
        self.ids.append(token)
        self.pieces.append(self._piece(engine))
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

    def _piece(self, engine: HFEngine) -> str:
        """Text that the newest token adds. An unfinished character waits for the token that completes it."""
        start, read = self.decoded
        before = engine.tokenizer.decode(self.ids[start:read], skip_special_tokens=True)
        now = engine.tokenizer.decode(self.ids[start:], skip_special_tokens=True)
        if now.endswith("\ufffd") and len(self.ids) < self.sampling.max_tokens:
            return ""
        self.decoded = (read, len(self.ids))
        return now[len(before) :]

    def _cut(self, at: int) -> None:
        for i, piece in enumerate(self.pieces):
            self.pieces[i] = piece[: max(0, at)]
            at -= len(piece)
        while self.pieces and not self.pieces[-1]:  # a token of which nothing is left is no part of the reply
            self.pieces.pop()
            self.ids.pop()


def decode(engine: HFEngine, batch: list[Row]) -> Iterator[tuple[Row, Result]]:
    """Generate for a batch of rows; yields partial results of requests that stream, and every final one at the end."""
    from transformers import GenerationConfig

    replies = [Reply(row, row.request.sampling or Sampling()) for row in batch]
    captures = _captures(batch)
    width = max(len(row) for row in batch)
    pad = next(t for t in (engine.tokenizer.pad_token_id, engine.tokenizer.eos_token_id, 0) if t is not None)
    ids = torch.full((len(batch), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, row in enumerate(batch):
        ids[n, width - len(row) :] = torch.tensor(row.layout.ids)
        mask[n, width - len(row) :] = 1
    ends = _end_tokens(engine)
    course = _Course(engine, batch)
    layers = course.plan.layers | {layer for row in batch for readout in row.request.readouts for layer in readout.layers}
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

    def forward(now: Pass, tokens: torch.Tensor | None) -> torch.Tensor:
        # Hooks live for one pass only: whoever takes a partial result may use the model before asking for the next.
        with torch.inference_mode(), Taps(engine.blocks, layers) as taps:
            taps.current = now
            logits = next(steps) if tokens is None else steps.send(tokens)
        now.confirm()
        return logits

    starts = [n * width + width - len(row) for n, row in enumerate(batch)]
    prompt = Pass(*course.prompt(starts), _prompt_recorders(engine, batch, captures, starts))
    logits = forward(prompt, None)
    _store(prompt, replies, [np.flatnonzero(_candidates(row, w)) for row in batch for w in row.request.readouts])
    while True:
        streaming = [reply for reply in replies if not reply.finish and reply.row.request.stream]
        tokens = draw(logits, replies)
        for reply, token in zip(replies, tokens, strict=True):
            if not reply.finish:
                reply.take(token, engine, ends)
        owing = [reply for reply in streaming if reply.owes]
        yield from _partials([reply for reply in streaming if not reply.owes], engine)
        feeding = [reply.owes or not reply.finish for reply in replies]
        if not any(feeding):
            break
        recorders, owners = _reply_recorders(engine, replies, captures, feeding)
        logits = forward(Pass(*course.step(replies, feeding), recorders), torch.tensor(tokens, device=engine.device))
        _store_step(replies, recorders, owners)
        for reply, feeds in zip(replies, feeding, strict=True):
            reply.fed += feeds
        yield from _partials(owing, engine)
    steps.close()
    for reply in replies:
        layout = grown(reply.row.layout, reply.ids, reply.pieces)
        yield reply.row, Result(reply.text, layout, _readings(reply, layout, engine), (), reply.finish)


def _end_tokens(engine: HFEngine) -> frozenset[int]:
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
        tokens[rows] = _sample(logits[rows] / temperature, top_p, top_k, uniform.to(logits.device)[:, None])
    return tokens.tolist()


def _sample(logits: torch.Tensor, top_p: float, top_k: int, uniform: torch.Tensor) -> torch.Tensor:
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    weights = logits.softmax(-1)
    if top_p < 1:
        ordered, order = weights.sort(descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        weights = torch.zeros_like(weights).scatter_(1, order, ordered)
    cumulative = weights.cumsum(-1)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    # Rounding can point past the last token of non-zero weight.
    last = (weights > 0).long().mul(torch.arange(weights.shape[1], device=weights.device)).argmax(-1)
    return torch.minimum(token, last)


# ── steering and recording ──


def _may_grow(where: Where) -> bool:
    return where.part != "prompt" and where.role in (None, "assistant")


def _captures(batch: list[Row]) -> dict[int, Readout]:
    """For each readout of the batch the same without pooling: which tokens count is known only at the end.

    What is averaged is projected after averaging, because the norm of the mean is wanted too.
    """
    return {
        id(r): Readout(r.layers, Where(), "none", r.onto if r.pool in ("none", "last") else None)
        for row in batch
        for r in row.request.readouts
    }


def _candidates(row: Row, readout: Readout) -> np.ndarray:
    return replace(readout.where, text=None, after=0, first=None, last=None).mask(row.layout)


def _prompt_recorders(engine: HFEngine, batch: list[Row], captures: dict[int, Readout], starts: list[int]) -> list[Recorder]:
    recorders = []
    for n, row in enumerate(batch):
        for readout in row.request.readouts:
            rows = starts[n] + np.flatnonzero(_candidates(row, readout))
            recorders.append(Recorder(captures[id(readout)], [rows], engine.device))
    return recorders


def _store(done: Pass, replies: list[Reply], positions: list[np.ndarray]) -> None:
    done.confirm()
    recorders = iter(zip(done.recorders, positions, strict=True))
    for reply in replies:
        for seen in reply.seen:
            recorder, where = next(recorders)
            values, norms = recorder.results()[0]
            seen.extend((int(p), values[:, i], norms[:, i]) for i, p in enumerate(where))


class _Course:
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


def _reply_recorders(
    engine: HFEngine, replies: list[Reply], captures: dict[int, Readout], feeding: list[bool]
) -> tuple[list[Recorder], list[list[tuple[int, int]]]]:
    owners: dict[int, list[tuple[int, int]]] = {}
    for n, reply in enumerate(replies):
        for r, readout in enumerate(reply.row.request.readouts):
            if feeding[n] and _may_grow(readout.where):
                owners.setdefault(id(readout), []).append((n, r))
    recorders = [Recorder(captures[key], [np.array([n]) for n, _ in own], engine.device) for key, own in owners.items()]
    return recorders, list(owners.values())


def _store_step(replies: list[Reply], recorders: list[Recorder], owners: list[list[tuple[int, int]]]) -> None:
    """Keep what was read of the newest tokens."""
    for recorder, own in zip(recorders, owners, strict=True):
        for (n, r), (values, norms) in zip(own, recorder.results(), strict=True):
            position = len(replies[n].row.layout) + replies[n].fed
            replies[n].seen[r].append((position, values[:, 0], norms[:, 0]))


def _partials(replies: list[Reply], engine: HFEngine) -> Iterator[tuple[Row, Result]]:
    """A partial result for each reply that has a new token or text that was held back."""
    for reply in replies:
        text = reply.release()
        if text or len(reply.ids) > reply.told:
            layout = grown(reply.row.layout, reply.ids, reply.pieces)
            newest = len(layout) - (len(reply.ids) > reply.told)
            reply.told = len(reply.ids)
            yield reply.row, Result(text, layout, _readings(reply, layout, engine, newest), (), reply.finish, done=False)


def _readings(reply: Reply, layout: Layout, engine: HFEngine, first: int = 0) -> tuple[Reading, ...]:
    """What was recorded from token ``first`` on, selected and pooled."""
    pairs = zip(reply.row.request.readouts, reply.seen, strict=True)
    return tuple(_reduce(r, [entry for entry in seen if entry[0] >= first], layout, engine.info.width) for r, seen in pairs)


def _reduce(readout: Readout, seen: list[tuple[int, np.ndarray, np.ndarray]], layout: Layout, width: int) -> Reading:
    """Select and pool what was recorded, now that the whole text is known."""
    by_position = {p: (values, norms) for p, values, norms in seen}
    chosen = [int(p) for p in np.flatnonzero(readout.where.mask(layout)) if int(p) in by_position]
    positions = np.array(chosen, dtype=np.int64)
    if not chosen:
        n_layers = len(readout.layers)
        width = width if readout.onto is None else readout.onto.shape[1]
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "none": ((n_layers, 0, width), (n_layers, 0)),
            "norm": ((n_layers,), (n_layers,)),
        }
        of_values, of_norms = shapes.get(readout.pool, ((n_layers, width), (n_layers,)))
        return Reading(np.full(of_values, np.nan, np.float32), np.full(of_norms, np.nan, np.float32), positions)
    values = np.stack([by_position[p][0] for p in chosen], axis=1)
    norms = np.stack([by_position[p][1] for p in chosen], axis=1)
    if readout.pool == "none":
        return Reading(values, norms, positions)
    if readout.pool == "last":
        return Reading(values[:, -1], norms[:, -1], positions)
    if readout.pool == "norm":
        return Reading(norms.mean(1), norms.mean(1), positions)
    mean = values.mean(1, dtype=np.float32)
    projected = mean if readout.onto is None else np.einsum("ld,lnd->ln", mean, readout.onto)
    return Reading(projected.astype(np.float32), np.linalg.norm(mean, axis=-1), positions)
