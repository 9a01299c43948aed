"""transformers in this process: every decoder-only model, on CPU, CUDA or MPS.

Reading sorts texts by length and packs them into batches of a token budget without padding where the model's attention allows
it, ends each forward pass after the deepest layer needed, and pools and projects on the device. Generation runs left-padded
batches through the model's own cache. Every request of a batch has its own steering, readouts and seed.

What the model can do is not assumed but tried on load (:mod:`affectlens.engines.checks`): packing, padding and left padding are
used only if they give what a text gives alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
    Session,
    batched,
    check_request,
    refuse_too_long,
)
from affectlens.engines import prefix
from affectlens.engines.changes import Plan
from affectlens.engines.residual import Pass, Recorder, Stop, Taps, find_blocks, running
from affectlens.engines.rows import Layouts, Row, tokens_of, words_of
from affectlens.errors import EngineError, FormatError, ModelSupportError
from affectlens.layout import Layout, Where
from affectlens.models import fingerprint, locate, template_hash

WINDOW, WINDOW_ELSEWHERE = 256, 1024
"""Requests that are looked at together for sorting by length, on a CPU and on an accelerator, whose batches are larger: what
bounds memory on an endless stream of requests, and what workers are given at a time."""

GENERATE_ROWS, GENERATE_TOKENS = 32, 65536
"""Most sequences generated together, and most tokens that their caches may come to hold."""

TREE = 2
"""How many times the token budget a tree may hold: its tokens attend to few others, and what begins alike is cut less often."""

SHARING_PAYS, SHARING_PAYS_ELSEWHERE = 32, 1024
"""Tokens that sharing one beginning must save, on a CPU (measured) and on an accelerator (where one more attention call takes as
long as very many tokens: an estimate)."""


class HFEngine(Engine):
    """An engine around a ``transformers`` model and its tokenizer.

    Args:
        model: A loaded causal language model.
        tokenizer: Its fast tokenizer.
        id: What to call it.
        revision: Of the weights.
        token_budget: Tokens in one forward pass when reading (default: 2,048 on CPU, 16,384 elsewhere).
        compile: Run blocks through ``torch.compile`` when reading; generation is as without.

    Raises:
        ModelSupportError: A self-check failed, or the blocks cannot be compiled; the message says which.

    Example:
        >>> engine = HFEngine.load("smollm2-135m")                        # doctest: +SKIP
        >>> engine.generate(["Once upon a time"])                         # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        id: str,
        revision: str | None = None,
        token_budget: int | None = None,
        compile: bool = False,
    ) -> None:
        from affectlens.engines.checks import examine

        if not getattr(tokenizer, "is_fast", False):
            raise ModelSupportError(f"{id} has no fast tokenizer, so token positions are unknown: convert it to tokenizer.json")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.blocks = find_blocks(model)
        self.device: torch.device = next(model.parameters()).device
        self.token_budget = token_budget or (2048 if self.device.type == "cpu" else 16384)
        self.window = WINDOW if self.device.type == "cpu" else WINDOW_ELSEWHERE
        self.info = self._describe(id, revision)
        # The careful way until the checks have shown that the fast ways give the same.
        self.pack_limit = 0
        self.share_limit = 0
        self.can_fork = False
        self.sharing_pays = SHARING_PAYS if self.device.type == "cpu" else SHARING_PAYS_ELSEWHERE
        self.can_pad = False
        self.can_pad_left = False
        self.can_join = False
        self.generate_rows = GENERATE_ROWS
        self.compiled: list[Callable[..., Any]] = []
        self.layouts = Layouts(tokenizer, id)
        self.continuation = self.layouts.continuation
        checks, reply_token = examine(self, compile=compile)
        self.info = replace(self.info, checks=tuple(checks), reply_token=reply_token)

    @classmethod
    def load(
        cls, name: str, *, device: str = "auto", dtype: str = "auto", token_budget: int | None = None, compile: bool = False
    ) -> HFEngine:
        """Load a model by name, folder, GGUF file or Hub id.

        Args:
            name: See :func:`affectlens.open_engine`.
            device: ``auto`` takes CUDA, then MPS, then CPU.
            dtype: ``auto`` takes the checkpoint's own on an accelerator; on CPU bfloat16 where the processor multiplies it
                natively (AMX, AVX512-BF16), else float32.
            token_budget: Tokens in one forward pass when reading.
            compile: Run blocks through ``torch.compile`` when reading: faster, after some seconds at the start
                (``docs/benchmarks.md``). It needs a C++ compiler there, and rounds otherwise than without.

        Raises:
            ModelSupportError: Not a decoder-only model, a self-check failed, or the blocks cannot be compiled.
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
        how: dict[str, Any] = {"token_budget": token_budget, "compile": compile}
        return cls(model.to(device), tokenizer, id=source.id, revision=source.revision, **how)

    @classmethod
    def around(cls, model: Any, *, tokenizer: Any, token_budget: int | None = None, compile: bool = False) -> HFEngine:
        """An engine around a model that is loaded already, on the device where it is; it is put into ``eval`` mode.

        Args:
            model: A causal language model of ``transformers``.
            tokenizer: Its fast tokenizer.
            token_budget: Tokens in one forward pass when reading.
            compile: As for :meth:`load`.

        Raises:
            ModelSupportError: No ``transformers`` model, no fast tokenizer, a self-check failed, or blocks cannot be compiled.
        """
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "parameters"):
            raise ModelSupportError(f"{type(model).__name__} is no transformers model: give one, or the name of one")
        name = config.name_or_path or type(model).__name__
        return cls(model, tokenizer, id=name, token_budget=token_budget, compile=compile)

    def _describe(self, id: str, revision: str | None) -> ModelInfo:
        config = self.model.config.get_text_config(decoder=True)
        return ModelInfo(
            id=id,
            family=config.model_type,
            n_layers=len(self.blocks),
            width=config.hidden_size,
            context=int(getattr(config, "max_position_embeddings", None) or 2**20),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.device),
            fingerprint=fingerprint(self.model.get_decoder().named_parameters()),
            revision=revision,
            template=template_hash(self.tokenizer),
            n_parameters=sum(p.numel() for p in self.model.parameters()),
        )

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for window in batched(requests, self.window):
            for request in window:
                check_request(request, self.info)
            layouts = self.layouts.of_all(window)
            for layout, request in zip(layouts, window, strict=True):
                longest = max((len(self.continuation(choice)) for choice in request.choices), default=0)
                refuse_too_long(len(layout) + longest, request, self.info)
            yield from self._run_window(window, layouts)

    def _run_window(self, window: list[Request], layouts: list[Layout]) -> Iterator[Result]:
        from affectlens.engines.decode import decode

        jobs = list(enumerate(zip(window, layouts, strict=True)))
        masks: dict[int, dict[Where, np.ndarray]] = {id(layout): {} for layout in layouts}
        results: dict[int, Result] = {}
        readings: dict[int, tuple[Reading, ...]] = {}
        logprobs = {job: np.zeros(len(request.choices)) for job, (request, _) in jobs}
        rows = [Row(job, q, lay, masks=masks[id(lay)]) for job, (q, lay) in jobs if not q.sampling]
        for batch, tree in self._batches([part for row in rows for part in self.layouts.with_choices(row)]):
            self._read(batch, tree, readings, logprobs)
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

    def session(self) -> Session:
        from affectlens.engines.batching import BatchSession

        return BatchSession(self) if self.can_join else super().session()

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
    def indifferent(self) -> bool:
        """Whether a row's matrix products have the same bits whatever rows it is run with."""
        from affectlens.engines.batching import indifferent

        return indifferent(self)

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        size = self.model.get_output_embeddings().weight.shape[0]
        return words_of(self.tokenizer, size)

    def layout(self, request: Request) -> Layout:
        """Tokenize a request: see :meth:`affectlens.engines.rows.Layouts.of`."""
        return self.layouts.of(request)

    # ── reading ──

    def _batches(self, rows: list[Row]) -> Iterator[tuple[list[Row], prefix.Tree | None]]:
        """Rows that run together, and how they lie in one long row; None for rows that are padded to one length.

        First those that begin alike, then the others, longest first: as many as fit the token budget, padding counted; equal
        lengths only if padding changes results.
        """
        how: dict[str, Any] = {"pays": self.sharing_pays, "trunks": self.can_fork}
        alike = prefix.sharing([row for row in rows if len(row) <= self.share_limit], **how)
        for batch in prefix.batches(alike, budget=TREE * self.token_budget):
            yield batch, prefix.lay_out(batch, **how, device=self.device)
        shared = {id(row) for row in alike}
        batch, tokens = [], 0
        for row in sorted((row for row in rows if id(row) not in shared), key=len, reverse=True):
            packed = len(row) <= self.pack_limit
            fits = tokens + len(row) <= self.token_budget
            if batch and not packed:
                fits = (len(batch) + 1) * len(batch[0]) <= self.token_budget
                fits &= self.can_pad or len(row) == len(batch[0])
            if batch and (not fits or packed != (len(batch[0]) <= self.pack_limit)):
                yield batch, self._packed(batch)
                batch, tokens = [], 0
            batch.append(row)
            tokens += len(row)
        if batch:
            yield batch, self._packed(batch)

    def _packed(self, batch: list[Row]) -> prefix.Tree | None:
        return prefix.side_by_side(batch) if len(batch) > 1 and len(batch[0]) <= self.pack_limit else None

    def _read(
        self,
        batch: list[Row],
        tree: prefix.Tree | None,
        readings: dict[int, tuple[Reading, ...]],
        logprobs: dict[int, np.ndarray],
    ) -> None:
        """Run a batch; put what was read under the job's number and add up the log-probabilities of its choices.

        A choice of several tokens is spread over two rows, perhaps in two batches: its parts meet in ``logprobs``.
        """
        stop_after = None
        if not any(row.wanted for row in batch):
            stop_after = max((layer for row in batch for readout in row.request.readouts for layer in readout.layers), default=-1)
            if tree and tree.trunk and stop_after < tree.layer:
                tree = tree.trunk  # it ends before anything is done
        # For each row the place of each of its tokens in the flattened batch, and which tokens are steered in its name.
        places = tree.index if tree else [n * len(batch[0]) + np.arange(len(row)) for n, row in enumerate(batch)]
        owned = tree.owned if tree else [np.ones(len(row), dtype=bool) for row in batch]
        own = [(row, place) for row, place in zip(batch, places, strict=True) if row.is_request]
        recorders, owners = self._recorders([(row.request, row.layout, place) for row, place in own])
        plan = Plan([row.request.steering for row in batch], lambda layer: self.device)
        steered = {i: tokens_of(row, places[i], owned[i]) for i, row in enumerate(batch) if row.request.steering.layers}
        wanted = [
            (int(place[at]), token, row.job, c) for row, place in zip(batch, places, strict=True) for at, token, c in row.wanted
        ]
        now = Pass(*plan.over(steered, stop_after), recorders, stop_after, tree.fork(self.device) if tree else None)
        keep, which = np.unique([flat for flat, *_ in wanted], return_inverse=True)
        logits = self._forward(batch, tree, now, keep=keep.astype(np.int64))
        if wanted:
            rows = torch.as_tensor(which, device=self.device)
            tokens = torch.tensor([token for _, token, *_ in wanted], device=self.device)
            found = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
            for (*_, job, c), value in zip(wanted, found, strict=True):
                logprobs[job][c] += value
        taken: dict[tuple[int, int], Reading] = {}
        for recorder, members in zip(recorders, owners, strict=True):
            for (n, r, positions), (values, norms) in zip(members, recorder.results(), strict=True):
                taken[n, r] = Reading(values, norms, positions)
        for n, (row, _) in enumerate(own):
            readings[row.job] = tuple(taken[n, r] for r in range(len(row.request.readouts)))

    def _recorders(
        self, items: Sequence[tuple[Request, Layout, np.ndarray]]
    ) -> tuple[list[Recorder], list[list[tuple[int, int, np.ndarray]]]]:
        """One recorder for each distinct readout of a batch, and the (item, readout number, positions) it serves."""
        by_readout: dict[int, tuple[Any, list[np.ndarray], list[tuple[int, int, np.ndarray]]]] = {}
        for n, (request, layout, place) in enumerate(items):
            for r, readout in enumerate(request.readouts):
                positions = np.flatnonzero(readout.where.mask(layout))
                _, rows, members = by_readout.setdefault(id(readout), (readout, [], []))
                rows.append(place[positions])
                members.append((n, r, positions))
        recorders = [Recorder(readout, rows, self.device) for readout, rows, _ in by_readout.values()]
        return recorders, [members for _, _, members in by_readout.values()]

    def _forward(self, batch: list[Row], tree: prefix.Tree | None, now: Pass, *, keep: np.ndarray) -> torch.Tensor:
        """One pass over a tree or a right-padded batch; returns the logits of the flattened places ``keep``.

        Padding on the right needs no mask: in a causal model later tokens change nothing before them.
        """
        inputs: dict[str, Any] = {"use_cache": False}
        if tree:
            begun = tree.trunk or tree
            ids = torch.as_tensor(begun.ids)[None].to(self.device)
            inputs["position_ids"] = torch.as_tensor(begun.positions)[None].to(self.device)
        else:
            ids = torch.zeros((len(batch), len(batch[0])), dtype=torch.long)
            for n, row in enumerate(batch):
                ids[n, : len(row)] = torch.tensor(row.layout.ids)
            ids = ids.to(self.device)
        flat = torch.as_tensor(keep, device=self.device)
        rows, columns = (flat * 0, flat) if tree else (flat // ids.shape[1], flat % ids.shape[1])
        if self.model._supports_logits_to_keep():
            inputs["logits_to_keep"], columns = torch.unique(columns, return_inverse=True)
        config = self.model.config.get_text_config(decoder=True)
        logits = torch.empty(0)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if tree:
                    stack.enter_context(prefix.reading(tree, config))
                if now.fork:
                    stack.enter_context(now.fork.applied(self.blocks))
                stack.enter_context(running(self.blocks, self.compiled))
                stack.enter_context(Taps(self.blocks, now.layers)).current = now
                logits = self.model(input_ids=ids, **inputs).logits[rows, columns].float()
        except Stop:
            pass
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
