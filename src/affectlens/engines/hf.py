"""transformers in this process: every decoder-only model, on CPU, CUDA or MPS.

Reading sorts texts by length and packs them into batches of a token budget without padding where the model's attention allows
it, ends each forward pass after the deepest layer needed, and pools and projects on the device. Generation runs left-padded
batches through the model's own cache. Every request of a batch has its own steering, readouts and seed.

What the model can do is not assumed but tried on load (:mod:`affectlens.engines.checks`): packing, padding and left padding are
used only if they give what a text gives alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from affectlens.engine import (
    Engine,
    ModelInfo,
    Reading,
    Request,
    Result,
    batched,
    check_request,
    refuse_too_long,
)
from affectlens.engines.changes import Plan, Tokens
from affectlens.engines.residual import Pass, Recorder, Stop, Taps, find_blocks
from affectlens.errors import EngineError, FormatError, ModelSupportError
from affectlens.layout import Chat, Layout, Where, mark_chat, place_chat, place_turns, transcript
from affectlens.models import locate

WINDOW = 1024
"""Requests that are looked at together for sorting by length: what bounds memory on an endless stream of requests."""

GENERATE_ROWS, GENERATE_TOKENS = 32, 65536
"""Most sequences generated together, and most tokens that their caches may come to hold."""

PACKED = "affectlens_packed"
"""Name under which :func:`packed_attention` is known to transformers; it is set on a model only while it reads a packed batch."""

_SEGMENTS: ContextVar[list[int] | None] = ContextVar("affectlens_segments", default=None)


def packed_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention that keeps texts packed in one row apart by looping over them: faster than a block-diagonal mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    segments = _SEGMENTS.get()
    kwargs["is_causal"] = True
    parts = zip(query.split(segments, 2), key.split(segments, 2), value.split(segments, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], dim=1), None


@dataclass
class Row:
    """One sequence to run: a request's tokens, or those with a choice behind them.

    Args:
        job: The request's number in its window.
        request: What is asked.
        layout: Tokens, roles and offsets; grows while generating.
        wanted: ``(position, token, choice)``: log-probability of ``token`` after ``position`` counts towards ``choice``.
        given: The layout of the request itself; shorter than ``layout`` in a row that carries a choice.
    """

    job: int
    request: Request
    layout: Layout
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    given: Layout | None = None

    @property
    def is_request(self) -> bool:
        """Whether this row is the request itself, from which its readouts are taken."""
        return self.given is None

    def __len__(self) -> int:
        return len(self.layout)


class HFEngine(Engine):
    """An engine around a ``transformers`` model and its tokenizer.

    Args:
        model: A loaded causal language model.
        tokenizer: Its fast tokenizer.
        id: What to call it.
        revision: Of the weights.
        token_budget: Tokens in one forward pass when reading (default: 2,048 on CPU, 16,384 elsewhere).

    Raises:
        ModelSupportError: A self-check failed; the message says which.

    Example:
        >>> engine = HFEngine.load("smollm2-135m")                        # doctest: +SKIP
        >>> engine.generate(["Once upon a time"])                         # doctest: +SKIP
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, id: str, revision: str | None = None, token_budget: int | None = None
    ) -> None:
        from affectlens.engines.checks import examine

        if not getattr(tokenizer, "is_fast", False):
            raise ModelSupportError(f"{id} has no fast tokenizer, so token positions are unknown: convert it to tokenizer.json")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.blocks = find_blocks(model)
        self.device: torch.device = next(model.parameters()).device
        self.token_budget = token_budget or (2048 if self.device.type == "cpu" else 16384)
        self.info = self._describe(id, revision)
        # The careful way until the checks have shown that the fast ways give the same.
        self.pack_limit = 0
        self.can_pad = False
        self.can_pad_left = False
        self.generate_rows = GENERATE_ROWS
        checks, reply_token = examine(self)
        self.info = replace(self.info, checks=tuple(checks), reply_token=reply_token)

    @classmethod
    def load(cls, name: str, *, device: str = "auto", dtype: str = "auto", token_budget: int | None = None) -> HFEngine:
        """Load a model by name, folder, GGUF file or Hub id.

        Args:
            name: See :func:`affectlens.open_engine`.
            device: ``auto`` takes CUDA, then MPS, then CPU.
            dtype: ``auto`` takes the checkpoint's own on an accelerator; on CPU bfloat16 where the processor multiplies it
                natively (AMX, AVX512-BF16), else float32.
            token_budget: Tokens in one forward pass when reading.

        Raises:
            ModelSupportError: Not a decoder-only model, or a self-check failed.
            FormatError: The weights are broken or incomplete.
            UnknownName: There is no such model.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        source = locate(name, log=lambda line: print(line, file=sys.stderr))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
            reason = str(error).strip().splitlines()[0]
            raise EngineError(f"device {device!r} cannot be used here ({reason}): use cpu or auto") from None
        kwargs = dict(source.load_kwargs)
        try:
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
            loader = _auto_class(config, source.id)
            model, problems = loader.from_pretrained(
                source.location,
                dtype=_dtype(dtype, device),
                output_loading_info=True,
                trust_remote_code=False,
                **({} if device == "cpu" else {"device_map": device}),  # straight there, not by way of the host's memory
                **kwargs,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
        except ModelSupportError:
            raise
        except ImportError as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelSupportError(
                f"{source.id} needs a package that is not here ({reason}): install it and try again"
            ) from error
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{source.id} does not fit the memory of {device}: use --dtype bfloat16, or --device cpu"
            ) from error
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FormatError(f"{source.id} cannot be loaded ({reason}): check the name and the files") from error
        if missing := sorted(problems["missing_keys"]):
            raise FormatError(
                f"{source.id} lacks {len(missing)} weights ({missing[0]}, …), which would be random: get the whole checkpoint"
            )
        return cls(model.to(device), tokenizer, id=source.id, revision=source.revision, token_budget=token_budget)

    @classmethod
    def around(cls, model: Any, *, tokenizer: Any, token_budget: int | None = None) -> HFEngine:
        """An engine around a model that is loaded already, on the device where it is; it is put into ``eval`` mode.

        Args:
            model: A causal language model of ``transformers``.
            tokenizer: Its fast tokenizer.
            token_budget: Tokens in one forward pass when reading.

        Raises:
            ModelSupportError: No ``transformers`` model, no fast tokenizer, or a self-check failed.
        """
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "parameters"):
            raise ModelSupportError(f"{type(model).__name__} is no transformers model: give one, or the name of one")
        return cls(model, tokenizer, id=config.name_or_path or type(model).__name__, token_budget=token_budget)

    def _describe(self, id: str, revision: str | None) -> ModelInfo:
        config = self.model.config.get_text_config(decoder=True)
        template = self.tokenizer.chat_template
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.get_decoder().named_parameters()):
            sample = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16).float()
            digest.update(name.encode() + sample.numpy().tobytes())
        return ModelInfo(
            id=id,
            family=config.model_type,
            n_layers=len(self.blocks),
            width=config.hidden_size,
            context=int(getattr(config, "max_position_embeddings", None) or 2**20),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.device),
            fingerprint=digest.hexdigest()[:16],
            revision=revision,
            template=hashlib.sha256(str(template).encode()).hexdigest()[:16] if template else None,
            n_parameters=sum(p.numel() for p in self.model.parameters()),
        )

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for window in batched(requests, WINDOW):
            for request in window:
                check_request(request, self.info)
            layouts = [self.layout(request) for request in window]
            for layout, request in zip(layouts, window, strict=True):
                longest = max((len(self._encode(choice, special=False)[0]) for choice in request.choices), default=0)
                refuse_too_long(len(layout) + longest, request, self.info)
            yield from self._run_window(window, layouts)

    def _run_window(self, window: list[Request], layouts: list[Layout]) -> Iterator[Result]:
        from affectlens.engines.decode import decode

        jobs = list(enumerate(zip(window, layouts, strict=True)))
        results: dict[int, Result] = {}
        readings: dict[int, tuple[Reading, ...]] = {}
        logprobs = {job: np.zeros(len(request.choices)) for job, (request, _) in jobs}
        for batch in self._batches([row for job, (q, lay) in jobs if not q.sampling for row in self._rows(job, q, lay)]):
            self._read(batch, readings, logprobs)
        for job, taken in readings.items():
            results[job] = Result("", layouts[job], taken, tuple(logprobs[job].tolist()))
        plain = [Row(job, q, lay) for job, (q, lay) in jobs if q.sampling and not q.stream]
        for batch in self._generation_batches(plain):
            results |= {row.job: result for row, result in decode(self, batch)}
        for job, (request, layout) in jobs:
            if request.sampling and request.stream:
                yield from (result for _, result in decode(self, [Row(job, request, layout)]))
            else:
                yield results.pop(job)

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        # The model's own forward pass with the last block's output replaced: right for every family's norm, scale and soft cap.
        hidden = torch.as_tensor(residuals, dtype=self.model.dtype, device=self.device)[None]

        def replace_output(module: Any, args: Any, output: Any) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.blocks[-1].register_forward_hook(replace_output)
        try:
            with torch.inference_mode():
                ids = torch.zeros((1, len(residuals)), dtype=torch.long, device=self.device)
                return self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
        finally:
            handle.remove()

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        size = self.model.get_output_embeddings().weight.shape[0]
        known = min(size, len(self.tokenizer))
        return self.tokenizer.batch_decode([[i] for i in range(known)]) + [""] * (size - known)

    # ── from a request to tokens ──

    def layout(self, request: Request) -> Layout:
        """Tokenize a request: the rendered template or plain text, then the prefill, each with offsets and roles.

        Raises:
            EngineError: A chat without a template, a template without a reply position, or an empty prompt.
        """
        n_reply = None
        if isinstance(request.prompt, str) or request.transcript:
            text, spans = (request.prompt, None) if isinstance(request.prompt, str) else transcript(request.prompt)
            ids, offsets = self._encode(text, special=True)
            own, turns = place_turns([("text", 0, len(text))] if spans is None else spans, offsets)
            own = ["text"] * len(ids) if spans is None else own  # a token without text of its own belongs to a plain text, too
            roles = [
                "special" if a == b and i in self.tokenizer.all_special_ids else role
                for i, (a, b), role in zip(ids, offsets, own, strict=True)
            ]
            while len(ids) > 1 and roles[-1] == "special":  # an end-of-sequence token would stand between prompt and reply
                ids, offsets, roles = ids[:-1], offsets[:-1], roles[:-1]
        else:
            text = self._render(request.prompt, request)
            ids, offsets = self._encode(text, special=False)
            marked = self._render(mark_chat(request.prompt), request)
            roles, turns = place_chat(text, request.prompt, offsets, marked=marked)
            if ids and ids[0] == self.tokenizer.bos_token_id and roles[0] == "template":
                roles[0] = "special"  # the attention sink, whether the tokenizer or the template put it there
        if not isinstance(request.prompt, str):
            n_reply = _start_of_reply(request.prompt, roles)
        n_prompt = len(ids) if n_reply is None else n_reply
        if request.prefill:
            more, places = self._encode(request.prefill, special=False)
            ids += more
            offsets += [(len(text) + a, len(text) + b) for a, b in places]
            roles += ["assistant"] * len(more)
            text += request.prefill
        if not any(role != "special" for role in roles):
            raise EngineError("the prompt is empty: give at least one token of text")
        tokens = tuple(text[a:b] for a, b in offsets)
        return Layout(text, tokens, tuple(ids), tuple(offsets), tuple(roles), n_prompt, turns)

    def _encode(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]

    def _render(self, chat: Chat, request: Request) -> str:
        if not self.tokenizer.chat_template:
            raise EngineError(f"{self.info.id} has no chat template: give a plain text, or a chat model")
        turns = [{"role": role, "content": content} for role, content in chat]
        answered = chat[-1][0] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
            bare = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        except Exception as error:  # jinja raises what the template's author liked
            raise EngineError(f"the chat template refuses these turns ({error}): use roles that it supports") from None
        if answered and (request.sampling or request.prefill or request.choices):
            raise EngineError("the chat ends with the assistant's turn: end it with a user turn, and give a beginning as prefill")
        if not answered and text == bare:
            raise EngineError(
                "the chat template has no reply position (no generation prompt): give a plain text transcript instead"
            )
        return text

    def _rows(self, job: int, request: Request, layout: Layout) -> list[Row]:
        """The request's own row, and one more for each choice of several tokens."""
        base = Row(job, request, layout)
        rows = [base]
        for c, choice in enumerate(request.choices):
            ids, _ = self._encode(choice, special=False)
            if not ids:
                raise EngineError("a choice is empty: every choice needs at least one token")
            last = len(layout) - 1
            base.wanted.append((last, ids[0], c))
            if len(ids) > 1:
                longer = grown(layout, ids[:-1], self.tokenizer.batch_decode([[i] for i in ids[:-1]]))
                rows.append(Row(job, request, longer, [(last + k, ids[k], c) for k in range(1, len(ids))], layout))
        return rows

    # ── reading ──

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Longest first; as many as fit the token budget, padding counted; equal lengths only if padding changes results."""
        batch: list[Row] = []
        tokens = 0
        for row in sorted(rows, key=len, reverse=True):
            packed = len(row) <= self.pack_limit
            fits = tokens + len(row) <= self.token_budget
            if batch and not packed:
                fits = (len(batch) + 1) * len(batch[0]) <= self.token_budget
                fits &= self.can_pad or len(row) == len(batch[0])
            if batch and (not fits or packed != (len(batch[0]) <= self.pack_limit)):
                yield batch
                batch, tokens = [], 0
            batch.append(row)
            tokens += len(row)
        if batch:
            yield batch

    def _read(self, batch: list[Row], readings: dict[int, tuple[Reading, ...]], logprobs: dict[int, np.ndarray]) -> None:
        """Run a batch; put what was read under the job's number and add up the log-probabilities of its choices.

        A choice of several tokens is spread over two rows, perhaps in two batches: its parts meet in ``logprobs``.
        """
        packed = len(batch) > 1 and len(batch[0]) <= self.pack_limit
        lengths = [len(row) for row in batch]
        starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(batch)) * lengths[0]
        own = [(row, int(start)) for row, start in zip(batch, starts, strict=True) if row.is_request]
        recorders, owners = self._recorders([(row.request, row.layout, start) for row, start in own])
        plan = Plan([row.request.steering for row in batch], lambda layer: self.device)
        tokens = {i: tokens_of(row, int(starts[i])) for i, row in enumerate(batch) if row.request.steering.layers}
        wanted = [
            (int(start) + at, token, row.job, c) for row, start in zip(batch, starts, strict=True) for at, token, c in row.wanted
        ]
        stop_after = None
        if not wanted:
            stop_after = max((layer for recorder in recorders for layer in recorder.readout.layers), default=-1)
        now = Pass(*plan.over(tokens, stop_after), recorders, stop_after)
        logits = self._forward(batch, now, packed=packed, keep=[flat for flat, *_ in wanted])
        for (_, token, job, c), row_logits in zip(wanted, logits, strict=True):
            logprobs[job][c] += float(row_logits.log_softmax(-1)[token])
        taken: dict[tuple[int, int], Reading] = {}
        for recorder, members in zip(recorders, owners, strict=True):
            for (n, r, positions), (values, norms) in zip(members, recorder.results(), strict=True):
                taken[n, r] = Reading(values, norms, positions)
        for n, (row, _) in enumerate(own):
            readings[row.job] = tuple(taken[n, r] for r in range(len(row.request.readouts)))

    def _recorders(
        self, items: Sequence[tuple[Request, Layout, int]]
    ) -> tuple[list[Recorder], list[list[tuple[int, int, np.ndarray]]]]:
        """One recorder for each distinct readout of a batch, and the (item, readout number, positions) it serves."""
        by_readout: dict[int, tuple[Any, list[np.ndarray], list[tuple[int, int, np.ndarray]]]] = {}
        for n, (request, layout, start) in enumerate(items):
            for r, readout in enumerate(request.readouts):
                positions = np.flatnonzero(readout.where.mask(layout))
                _, rows, members = by_readout.setdefault(id(readout), (readout, [], []))
                rows.append(start + positions)
                members.append((n, r, positions))
        recorders = [Recorder(readout, rows, self.device) for readout, rows, _ in by_readout.values()]
        return recorders, [members for _, _, members in by_readout.values()]

    def _forward(self, batch: list[Row], now: Pass, *, packed: bool, keep: Sequence[int]) -> torch.Tensor | list[Any]:
        """One pass over a packed or right-padded batch; returns the logits of the flattened positions ``keep``.

        Padding on the right needs no mask: in a causal model later tokens change nothing before them.
        """
        lengths = [len(row) for row in batch]
        inputs: dict[str, Any] = {"use_cache": False}
        if packed:
            ids = torch.tensor([i for row in batch for i in row.layout.ids], device=self.device)[None]
            inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        else:
            ids = torch.zeros((len(batch), lengths[0]), dtype=torch.long)
            for n, row in enumerate(batch):
                ids[n, : len(row)] = torch.tensor(row.layout.ids)
            ids = ids.to(self.device)
        flat = torch.tensor(keep, dtype=torch.long, device=self.device)
        rows, columns = flat // ids.shape[1], flat % ids.shape[1]
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"], columns = torch.unique(columns, return_inverse=True)
        segments = _SEGMENTS.set(lengths if packed else None)
        config = self.model.config.get_text_config(decoder=True)
        attention = config._attn_implementation
        logits: torch.Tensor | list[Any] = []
        try:
            if packed:
                config._attn_implementation = PACKED
            with torch.inference_mode(), Taps(self.blocks, now.layers) as taps:
                taps.current = now
                logits = self.model(input_ids=ids, **inputs).logits[rows, columns].float()
        except Stop:
            pass
        finally:
            _SEGMENTS.reset(segments)
            if packed:
                config._attn_implementation = attention
        now.confirm()
        return logits

    # ── generating ──

    def _generation_batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        batch: list[Row] = []
        for row in sorted(rows, key=len, reverse=True):
            room = max((r.request.sampling.max_tokens for r in (*batch, row) if r.request.sampling), default=0)
            full = len(batch) == self.generate_rows or (len(batch) + 1) * (len((*batch, row)[0]) + room) > GENERATE_TOKENS
            if batch and (full or not (self.can_pad_left or len(row) == len(batch[0]))):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _start_of_reply(chat: Chat, roles: Sequence[str]) -> int | None:
    """First token of the last turn's words when the assistant has already spoken it; None when the reply is still to come."""
    if chat[-1][0] != "assistant":
        return None
    end = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=len(roles))
    start = end
    while start and roles[start - 1] == "assistant":
        start -= 1
    return start


def grown(layout: Layout, ids: Sequence[int], pieces: Sequence[str]) -> Layout:
    """The layout with generated tokens behind it."""
    text, tokens, offsets = layout.text, list(layout.tokens), list(layout.offsets)
    for piece in pieces:
        offsets.append((len(text), len(text) + len(piece)))
        tokens.append(piece)
        text += piece
    roles = (*layout.roles, *("assistant",) * len(ids))
    return Layout(text, tuple(tokens), (*layout.ids, *ids), tuple(offsets), roles, layout.n_prompt, layout.turns)


def tokens_of(row: Row, start: int) -> Tokens:
    """The tokens of a row that is read, from the flattened row ``start`` on."""
    masks = {where: _steered(row, where) for where in {term.where for term in row.request.steering.terms}}
    index = np.arange(len(row))
    return Tokens(start + index, index - row.layout.n_prompt, masks)


def _steered(row: Row, where: Where) -> np.ndarray:
    """The tokens to steer in a row; those of a choice count as if they were being generated."""
    if row.given is None:
        return where.mask(row.layout)
    ahead = where.ahead(row.given)
    return np.concatenate([where.mask(row.given), [k in ahead for k in range(len(row) - len(row.given))]]).astype(bool)


def _dtype(dtype: str, device: str) -> Any:
    if dtype == "auto":
        if device == "cpu":
            native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            return torch.bfloat16 if native else torch.float32
        return "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise EngineError(f"dtype is {dtype!r}: use auto, float32, bfloat16 or float16")
    return known[dtype]


def _auto_class(config: Any, id: str) -> Any:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if getattr(config, "is_encoder_decoder", False):
        raise ModelSupportError(f"{id} is an encoder-decoder ({config.model_type}): affectlens reads decoder-only models")
    architectures = getattr(config, "architectures", None) or []
    if architectures and all("MaskedLM" in a or "Classification" in a or "PreTraining" in a for a in architectures):
        raise ModelSupportError(f"{id} is encoder-only ({architectures[0]}): affectlens reads decoder-only language models")
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ModelSupportError(f"{id} ({config.model_type}) generates no text: affectlens reads decoder-only language models")
