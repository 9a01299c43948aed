"""vLLM in this process: continuous batching, shared caches, several accelerators; each request steered and read in its own way.

vLLM's scheduler runs whatever is there together, a long prompt in parts. What is done to the residual stream is done by taps in
its workers (:mod:`affectlens.engines.vllm_worker`), told by orders of plain data. Tokens are drawn by vLLM, from the seed of each
request; what is a reply, where it stops and what its readings are is worked out here as for models of ``transformers``.

vLLM keeps the keys and values of prompts and reuses them. A steered request must not get plain ones, nor leave its own to
others: its cache is salted with what it is steered by. A request that reads its prompt has it computed.

vLLM is a package of its own, with its own pins: see ``docs/scale.md``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from affectlens.engine import (
    Engine,
    Logprob,
    ModelInfo,
    Reading,
    Readout,
    Request,
    Result,
    Session,
    batched,
    check_request,
    refuse_too_long,
)
from affectlens.engines import vllm_draw
from affectlens.engines.decode import Part, Reply, candidates, may_grow, nothing, partials, reading_of, unpooled
from affectlens.engines.rows import Layouts, Row, words_of
from affectlens.engines.vllm_orders import NAME, Findings, Mail, Noted, Order, selectors
from affectlens.engines.vllm_tables import additions
from affectlens.engines.vllm_worker import TESTED
from affectlens.errors import AffectlensError, EngineError, FormatError, MissingExtra, ModelSupportError
from affectlens.layout import Layout, Where
from affectlens.models import ModelSource, fingerprint, locate, template_hash
from affectlens.steering import Steering

WINDOW = 1024
"""Requests that are handed to vLLM's scheduler together: what bounds memory on an endless stream of requests."""

CACHE = 2 * 2**30
"""Bytes for keys and values on a CPU, where vLLM's own default is half of the machine's memory."""

TOGETHER = 256
"""Residuals that are unembedded in one pass."""


# ── one request ──


@dataclass
class _Seat:
    """One row of vLLM's batch.

    Args:
        key: Its id.
        job: What it belongs to.
        row: Its tokens.
        order: What the worker has been told.
        reply: What was said so far; None where nothing is generated.
        parts: What each readout saw.
        heard: Tokens that vLLM has drawn.
    """

    key: str
    job: _Job
    row: Row
    order: Order
    reply: Reply | None = None
    parts: dict[int, list[Part]] = field(default_factory=dict)
    heard: int = 0

    def readings(self, width: int, _: int, layout: Layout, first: int = 0) -> tuple[Reading, ...]:
        """Readings of the row from token ``first`` on; ``width`` is that of the residual."""
        out = []
        for r, (readout, noted) in enumerate(zip(self.row.request.readouts, self.order.noted, strict=True)):
            parts = self.parts.get(r, [])
            if _settled(readout, self.row):
                out.append(_joined(readout, [] if first else parts, width))
            else:
                out.append(reading_of(readout, layout, parts, first=first, width=width))
            assert noted.grows == (not _settled(readout, self.row))
        return tuple(out)


@dataclass
class _Job:
    """A request and what has come of it.

    Args:
        number: Its ticket.
        request: What is asked.
        layout: Its tokens.
        logprobs: Of its choices, as far as they are known.
        seats: Rows that still run.
        out: Results that nobody has taken yet.
        over: Whether the last one is among them.
    """

    number: int
    request: Request
    layout: Layout
    logprobs: np.ndarray
    seats: list[_Seat] = field(default_factory=list)
    readings: tuple[Reading, ...] = ()
    out: deque[Result | AffectlensError] = field(default_factory=deque)
    over: bool = False


def _settled(readout: Readout, row: Row) -> bool:
    """Whether it is known before anything is generated which tokens count: then the worker pools them."""
    return row.request.sampling is None or not may_grow(readout.where)


def _noted(readout: Readout, row: Row) -> Noted:
    if not _settled(readout, row):
        return Noted(unpooled(readout), candidates(row, readout), grows=True)
    # The norm of a mean is wanted too, and a prompt may come in parts: a mean is projected when it is whole.
    onto = readout.onto if readout.pool in ("none", "last") else None
    return Noted(Readout(readout.layers, Where(), readout.pool, onto), readout.where.mask(row.layout), grows=False)


def _joined(readout: Readout, parts: Sequence[Part], width: int) -> Reading:
    """A readout out of what was pooled in each part of a prompt."""
    if not parts:
        return nothing(readout, width)
    positions = np.concatenate([part.positions for part in parts])
    if readout.pool == "none":
        values, norms = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("values", "norms"))
        return Reading(values, norms, positions)
    if readout.pool == "last":
        return Reading(parts[-1].values, parts[-1].norms, positions)
    counts = np.array([len(part.positions) for part in parts], dtype=np.float64)
    mean = parts[0].values
    if len(parts) > 1:
        stacked = np.stack([part.values for part in parts]).astype(np.float64)
        mean = np.tensordot(counts / counts.sum(), stacked, axes=1).astype(np.float32)
    if readout.pool == "norm":
        return Reading(mean, mean, positions)
    values = mean if readout.onto is None else np.einsum("ld,lnd->ln", mean, readout.onto).astype(np.float32)
    return Reading(values, np.linalg.norm(mean, axis=-1), positions)


def _order(key: str, row: Row) -> Order:
    steering = row.request.steering
    wheres = selectors(steering) if steering.layers else ()
    ahead = [where.ahead(row.layout) if row.is_request else range(0) for where in wheres]
    return Order(
        key,
        row.layout.n_prompt,
        steering if steering.layers else Steering(),
        tuple(row.steered(where) for where in wheres),
        tuple((each.start, each.stop) for each in ahead),
        tuple(_noted(readout, row) for readout in row.request.readouts) if row.is_request else (),
        tuple((position, token) for position, token, _ in row.wanted),
    )


def salt(order: Order) -> str | None:
    """What keeps the keys and values of a steered request apart from those of others; None for one that is not steered.

    Where all tokens are steered alike, the steering says it all, and requests that begin alike share their beginning. Else it
    depends on which tokens of this prompt are selected.
    """
    if order.residuals is not None:
        return f"once {order.key} {os.urandom(16).hex()}"
    if not order.steering.layers:
        return None
    digest = hashlib.sha256(repr(order.steering.content()).encode())
    if set(order.wheres) != {Where()} or any(term.schedule for term in order.steering.terms):
        digest.update(repr((order.n_prompt, order.ahead)).encode())
        for mask in order.masks:
            digest.update(repr(mask.shape).encode() + np.packbits(mask).tobytes())
    return digest.hexdigest()


# ── the engine ──


class VLLMEngine(Engine):
    """An engine around vLLM.

    Args:
        vllm: Its ``LLMEngine``, with our worker.
        tokenizer: The model's fast tokenizer.
        source: Where the model comes from.

    Raises:
        ModelSupportError: A self-check failed, or this vLLM lacks what is needed.

    Example:
        >>> engine = VLLMEngine.load("smollm2-135m")                        # doctest: +SKIP
        >>> engine.generate(["Once upon a time"])                           # doctest: +SKIP
    """

    _living: ClassVar[weakref.ref[VLLMEngine] | None] = None

    def __init__(self, vllm: Any, tokenizer: Any, source: ModelSource) -> None:
        self.vllm, self.tokenizer = vllm, tokenizer
        self.layouts = Layouts(tokenizer, source.id)
        self.info = _describe(vllm, tokenizer, source)
        self._ends = _end_tokens(source, tokenizer)
        self.replays = bool(vllm.vllm_config.additional_config["affectlens_replay"])
        self._mail = Mail()
        self._numbers = itertools.count()
        self._seats: dict[str, _Seat] = {}
        self._logits: dict[str, list[np.ndarray]] = {}
        checks, reply_token = _examine(self)
        self.info = replace(self.info, checks=tuple(checks), reply_token=reply_token)
        VLLMEngine._living = weakref.ref(self)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        compiled: bool | None = None,
        replay: bool | None = None,
        context: int | None = None,
        cache: int | None = None,
        tensor_parallel: int = 1,
        step: int | None = None,
    ) -> VLLMEngine:
        """Load a model by name, folder or Hub id.

        Args:
            name: See :func:`affectlens.open_engine`; GGUF files are refused.
            device: ``auto``; vLLM is built for one kind of device, and takes that.
            dtype: ``auto`` takes the checkpoint's own.
            compiled: Whether the model is compiled, which takes a minute at the start; None compiles on accelerators only.
            replay: Whether steps are replayed as CUDA graphs: faster with few tokens, and steering can then only add. None: where
                the model is compiled for an accelerator. On a CPU nothing is replayed, and True takes the tables all the same.
            context: Most tokens of a request; None for as many as the model has, 8,192 at most on a CPU.
            cache: Bytes for keys and values; None for 2 GiB on a CPU and for what vLLM takes elsewhere.
            tensor_parallel: Over how many accelerators each layer is divided.
            step: Most tokens of one step; longer prompts come in parts. None for what vLLM takes.

        Raises:
            EngineError: Another one is open in this process.
            MissingExtra: vLLM is not installed.
            ModelSupportError: vLLM or affectlens cannot run this model, or this vLLM is another than those that were tested.
            FormatError: The weights are broken or incomplete.
            UnknownName: There is no such model.
        """
        # These say how vLLM runs here, not what it computes. It reads them when it is imported.
        for variable, value in (
            ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
            ("VLLM_USE_V2_MODEL_RUNNER", "0"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_LOGGING_LEVEL", "ERROR"),
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ):
            os.environ.setdefault(variable, value)
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "vllm", "vllm") from None
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        source = locate(name.removeprefix("vllm/"), log=lambda line: print(line, file=sys.stderr))
        if source.kind == "gguf":
            raise ModelSupportError(f"{source.id} is a GGUF file, which vLLM does not read here: open it with hf/")
        if cls._living is not None and (other := cls._living()) is not None:
            raise EngineError(f"one vLLM model at a time runs in a process, and {other.info.id} does: close() it first")
        on_cpu = bool(current_platform.is_cpu())
        if device not in ("auto", "cpu" if on_cpu else "cuda"):
            raise EngineError(f"this vLLM is built for {'cpu' if on_cpu else 'cuda'}, not for {device!r}: use auto")
        compiled = not on_cpu if compiled is None else compiled
        replay = compiled and not on_cpu if replay is None else replay
        config = _text_config(source)
        most = int(getattr(config, "max_position_embeddings", None) or 2**20)
        options: dict[str, Any] = {"kv_cache_memory_bytes": cache or CACHE} if on_cpu or cache else {}
        if step is not None:
            options |= {"max_num_batched_tokens": step, "max_num_seqs": min(step, 256)}
        if not (replay or on_cpu):
            options["compilation_config"] = {"cudagraph_mode": "NONE"}
        try:
            arguments = EngineArgs(
                model=source.location,
                revision=source.revision if source.kind == "hub" else None,
                trust_remote_code=False,
                load_format="safetensors",
                dtype=dtype,
                max_model_len=min(most, context or (8192 if on_cpu else most)),
                enforce_eager=not compiled,
                enable_prefix_caching=True,
                tensor_parallel_size=tensor_parallel,
                worker_cls="affectlens.engines.vllm_worker.Worker",
                logits_processors=["affectlens.engines.vllm_draw:Draw"],
                max_logprobs=-1,
                generation_config="vllm",
                async_scheduling=False,
                disable_log_stats=True,
                # A graph that was compiled without our taps must not be taken from vLLM's cache.
                additional_config={"affectlens": "taps 1", "affectlens_replay": replay},
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
            engine = LLMEngine.from_engine_args(arguments)
        except AffectlensError:
            raise
        except (AttributeError, TypeError) as error:
            version = getattr(vllm, "__version__", "?")
            raise ModelSupportError(
                f"vLLM {version} lacks what is needed here ({error}): install a version that was tested ({', '.join(TESTED)})"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelSupportError(f"vLLM cannot run {source.id} ({reason}): open it with hf/, or change the options") from error
        return cls(engine, tokenizer, source)

    def close(self) -> None:
        """End vLLM; the engine is of no use afterwards."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.vllm.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        VLLMEngine._living = None

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for window in batched(requests, WINDOW):
            jobs = self._begin(window)
            try:
                for job in jobs:
                    while job.out or not job.over:
                        while job.out:
                            result = job.out.popleft()
                            if isinstance(result, AffectlensError):
                                raise result
                            yield result
                        if not job.over:
                            self._advance()
            finally:
                self._drop(jobs)

    def session(self) -> Session:
        return VLLMSession(self)

    def layout(self, request: Request) -> Layout:
        """Tokenize a request: see :meth:`affectlens.engines.rows.Layouts.of`."""
        return self.layouts.of(request)

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        # The model's own forward pass with the stream behind the last block replaced: right for every family's norm and cap.
        parts = []
        for begin in range(0, len(residuals), TOGETHER):
            part = np.ascontiguousarray(residuals[begin : begin + TOGETHER], dtype=np.float32)
            key = f"unembed {next(self._numbers)}"
            order = Order(key, len(part), residuals=part)
            self._logits[key] = []
            self._rpc("affectlens_expect", *self._mail.pack([order]))
            self._add(order, [0] * len(part), max_tokens=1)
            while sum(map(len, self._logits[key])) < len(part):
                self._advance()
            self._forget([key])
            parts += self._logits.pop(key)
        return np.concatenate(parts) if parts else np.empty((0, len(self.vocabulary)), dtype=np.float32)

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        return words_of(self.tokenizer, self.vllm.model_config.hf_text_config.vocab_size)

    # ── from a request to vLLM's rows ──

    def _begin(self, requests: Sequence[Request]) -> list[_Job]:
        """Hand requests to vLLM, all or none of them."""
        for request in requests:
            check_request(request, self.info)
            if self.replays:
                additions(request.steering)
        jobs = []
        for request, layout in zip(requests, self.layouts.of_all(requests), strict=True):
            longest = max((len(self.layouts.continuation(choice)) for choice in request.choices), default=0)
            refuse_too_long(len(layout) + longest, request, self.info)
            job = _Job(next(self._numbers), request, layout, np.zeros(len(request.choices)))
            row = Row(job.number, request, layout)
            rows = [row] if request.sampling else self.layouts.with_choices(row)
            for n, each in enumerate(rows):
                key = f"{job.number}.{n}"
                reply = Reply(each, request.sampling) if request.sampling else None
                job.seats.append(_Seat(key, job, each, _order(key, each), reply))
            jobs.append(job)
        seats = [seat for job in jobs for seat in job.seats]
        self._rpc("affectlens_expect", *self._mail.pack([seat.order for seat in seats]))
        for seat in seats:
            self._seats[seat.key] = seat
            self._add(seat.order, seat.row.layout.ids, **self._sampling(seat))
        return jobs

    def _sampling(self, seat: _Seat) -> dict[str, Any]:
        s = seat.row.request.sampling
        if s is None:
            # Readings need no token, but vLLM draws one all the same.
            return {"max_tokens": 1}
        assert seat.reply is not None
        return {
            # What was said last is read while the token behind it is drawn.
            "max_tokens": s.max_tokens + seat.reply.read_on,
            "draw": vllm_draw.said(s),
            "logprobs": s.logprobs,
            "stop_token_ids": sorted(self._ends),
        }

    def _add(self, order: Order, ids: Sequence[int], *, draw: list[float] | None = None, **sampling: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        reads = any(noted.mask.any() for noted in order.noted) or order.residuals is not None
        reads |= any(position < len(ids) - 1 for position, _ in order.wanted)
        params = SamplingParams(
            temperature=0.0,
            **sampling,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_reading_prefix_cache=True if reads else None,
            extra_args={NAME: order.key, **({} if draw is None else {vllm_draw.NAME: draw})},
        )
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if (salted := salt(order)) is not None:
            prompt["cache_salt"] = salted
        self.vllm.add_request(order.key, prompt, params)

    def _rpc(self, method: str, *args: Any) -> Any:
        """What the first worker answers: all of them do the same."""
        return self.vllm.collective_rpc(method, args=args)[0]

    # ── what comes back ──

    def _advance(self) -> None:
        """One step of vLLM over whatever is there."""
        outputs = self.vllm.step()
        self._collect()
        for output in outputs:
            seat = self._seats.get(output.request_id)
            if seat is None:
                continue
            if seat.reply is None:
                if output.finished:
                    self._read(seat)
                continue
            said = output.outputs[0]
            likely = said.logprobs or itertools.repeat(None)
            for token, known in zip(said.token_ids, likely, strict=False):
                self._heard(seat, int(token), known)
            if output.finished and seat.key in self._seats:
                seat.reply.finish = seat.reply.finish or "length"
                self._end(seat)

    def _collect(self) -> None:
        findings = Findings.unpack(*self._rpc("affectlens_take"))
        if lost := [key for key in findings.lost if key in self._seats]:
            raise EngineError(f"vLLM ran request {lost[0]} without its order: report this, with the version of vLLM")
        for one in findings.seen:
            if one.key in self._seats:
                parts = self._seats[one.key].parts.setdefault(one.number, [])
                parts.append(Part(one.positions, one.values, one.norms))
        for key, number, value in findings.likely:
            if key in self._seats:
                seat = self._seats[key]
                seat.job.logprobs[seat.row.wanted[number][2]] += value
        for key, logits in findings.logits:
            self._logits[key].append(logits)

    def _read(self, seat: _Seat) -> None:
        """A row of which nothing is generated has run."""
        job = seat.job
        if seat.row.is_request:
            job.readings = seat.readings(self.info.width, 0, job.layout)
        self._leave(seat)
        if not job.seats:
            job.out.append(Result("", job.layout, job.readings, tuple(job.logprobs.tolist())))
            job.over = True

    def _heard(self, seat: _Seat, token: int, known: Mapping[int, Any] | None) -> None:
        """A token was drawn; those before it have run, and been read."""
        reply = seat.reply
        if reply is None or seat.key not in self._seats:
            return
        reply.fed, seat.heard = seat.heard, seat.heard + 1
        self._tell(seat)
        if not reply.finish:
            reply.take(token, self.tokenizer, self._ends, None if known is None else _logprob(token, known, reply))
            self._tell(seat)
        if reply.finish and not reply.owes:
            self._end(seat)

    def _tell(self, seat: _Seat) -> None:
        """Hand out what is new, if it is to be and has been read."""
        reply = seat.reply
        if reply is not None and seat.row.request.stream and not reply.owes:
            width = self.info.width
            readings = lambda n, layout, first: seat.readings(width, n, layout, first)  # noqa: E731
            seat.job.out += [result for _, result in partials({0: reply}, readings)]

    def _end(self, seat: _Seat) -> None:
        reply, job = seat.reply, seat.job
        assert reply is not None
        layout = reply.grow()
        readings = seat.readings(self.info.width, 0, layout)
        job.out.append(Result(reply.text, layout, readings, (), reply.finish, logprobs=tuple(reply.logprobs)))
        job.over = True
        self._leave(seat)

    def _leave(self, *seats: _Seat) -> None:
        for seat in seats:
            del self._seats[seat.key]
            seat.job.seats.remove(seat)
        self._forget([seat.key for seat in seats])

    def _forget(self, keys: list[str]) -> None:
        """vLLM ends what still runs of these; the worker keeps their orders until it has."""
        self.vllm.abort_request(keys)
        self._rpc("affectlens_forget", keys)

    def _drop(self, jobs: Iterable[_Job]) -> None:
        """Let jobs go, finished or not."""
        if seats := [seat for job in jobs for seat in job.seats]:
            self._leave(*seats)


class VLLMSession(Session):
    """A session whose requests share vLLM's steps, each with its own steering, readouts and seed."""

    shares = True
    exact = False  # matrix products are divided according to how many rows there are

    def __init__(self, engine: VLLMEngine) -> None:
        self._vllm = engine
        self._jobs: dict[int, _Job] = {}

    @property
    def live(self) -> int:
        return len(self._jobs)

    def submit(self, request: Request) -> int:
        (job,) = self._vllm._begin([request])
        self._jobs[job.number] = job
        return job.number

    def step(self) -> list[tuple[int, Result | AffectlensError]]:
        if any(not job.over for job in self._jobs.values()):
            self._vllm._advance()
        out: list[tuple[int, Result | AffectlensError]] = []
        for ticket, job in list(self._jobs.items()):
            out += [(ticket, result) for result in job.out]
            job.out.clear()
            if job.over:
                del self._jobs[ticket]
        return out

    def cancel(self, ticket: int) -> None:
        if (job := self._jobs.pop(ticket, None)) is not None:
            self._vllm._drop([job])

    def close(self) -> None:
        self._vllm._drop(self._jobs.values())
        self._jobs.clear()


def _logprob(token: int, known: Mapping[int, Any], reply: Reply) -> Logprob:
    """vLLM's log-probabilities of one place: the token's own, and so many of the likeliest."""
    best = sorted(known.items(), key=lambda item: item[1].rank)[: reply.sampling.logprobs or 0]
    return Logprob(token, known[token].logprob, tuple((int(i), each.logprob) for i, each in best))


# ── what was loaded ──


def _text_config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{source.id} cannot be loaded ({str(error).splitlines()[0]}): check the name and the files") from error
    return config.get_text_config(decoder=True)


def _describe(vllm: Any, tokenizer: Any, source: ModelSource) -> ModelInfo:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelSupportError(
            f"{source.id} has no fast tokenizer, so token positions are unknown: convert it to tokenizer.json"
        )
    config = vllm.model_config.hf_text_config
    print_of_weights, n_parameters = _weights(source)
    return ModelInfo(
        id=source.id,
        family=config.model_type,
        n_layers=config.num_hidden_layers,
        width=config.hidden_size,
        context=vllm.model_config.max_model_len - 1,  # one place is kept for the token behind the last one, which vLLM draws
        dtype=str(vllm.model_config.dtype).removeprefix("torch."),
        device=str(vllm.vllm_config.device_config.device),
        fingerprint=print_of_weights,
        revision=source.revision,
        template=template_hash(tokenizer),
        n_parameters=n_parameters,
    )


def _weights(source: ModelSource) -> tuple[str, int]:
    """The fingerprint of a checkpoint and its number of parameters, as the model of ``transformers`` has them.

    vLLM puts weights together that belong together, so its own parameters have other names. They are read from the files, under
    the names of a model without memory; where a family's files name them differently, from a model that is loaded for it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    decoder = model.get_decoder()
    n_parameters = sum(p.numel() for p in model.parameters())
    within = next(name for name, module in model.named_modules() if module is decoder)
    files = _files(source)
    names = {name: f"{within}.{name}" if within else name for name, _ in decoder.named_parameters()}
    if all(key in files for key in names.values()):
        return fingerprint((name, _beginning(files[key], key)) for name, key in names.items()), n_parameters
    whole = AutoModelForCausalLM.from_pretrained(
        source.location, dtype=torch.bfloat16, trust_remote_code=False, **source.load_kwargs
    )
    return fingerprint(whole.get_decoder().named_parameters()), n_parameters


def _files(source: ModelSource) -> dict[str, Path]:
    """In which file of a checkpoint each tensor stands."""
    from safetensors import safe_open

    folder = Path(source.location)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=["*.safetensors", "*.json"]))
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _beginning(path: Path, name: str) -> Any:
    """At least the first 64 numbers of a tensor in a file, flat."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        rows = -(-64 // max(1, int(np.prod(shape[1:]))))
        return (part[: min(rows, shape[0])] if shape else file.get_tensor(name)).flatten()


def _end_tokens(source: ModelSource, tokenizer: Any) -> frozenset[int]:
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(source.location, **source.tokenizer_kwargs).eos_token_id
    except OSError:  # there is no file of its own
        ends = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **source.tokenizer_kwargs).eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)


def _examine(engine: VLLMEngine) -> tuple[list[tuple[str, str]], str | None]:
    """Try the model: does every tap fire, does steering arrive and leave nothing behind, and is the stream the model's own?

    Raises:
        ModelSupportError: One of these does not hold.
    """
    from affectlens.engines.checks import TEXTS, TOLERANCE, apart, causal, sane, steered

    info = engine.info
    limit = TOLERANCE.get(info.dtype, 0.1)
    everything = Readout(tuple(range(-1, info.n_layers)), Where(), "none")
    blocks = Readout(tuple(range(info.n_layers)), Where(), "none")
    requests = [Request(text, readouts=(blocks,)) for text in TEXTS]

    def read(*which: Request) -> list[tuple[Layout, Reading]]:
        return [(result.layout, result.readings[0]) for result in engine.run(which)]

    checks = [("residual stream", f"{info.n_layers} blocks, width {info.width}")]
    try:
        read(Request(TEXTS[2], readouts=(everything,)))
        alone = [read(request)[0] for request in requests]
    except EngineError as error:
        raise ModelSupportError(
            f"a tap does not fire in {info.id} under vLLM ({str(error).partition(':')[0]}): open it with hf/"
        ) from None
    checks.append(("taps", f"each of {info.n_layers} blocks fired once a step"))
    checks.append(("residual norm", sane(alone, info.id)))
    checks.append(("causal", causal(engine, blocks, alone, limit)))
    checks.append(("steering", steered(engine, requests[0], alone[0], limit)))
    after = read(requests[0])[0][1]
    if not np.array_equal(after.values, alone[0][1].values):
        raise ModelSupportError(f"steering leaves something behind in {info.id} under vLLM: open it with hf/")
    checks.append(("plain, steered, plain", "the same bits before and after"))
    together = max(apart(got.values, want.values) for (_, got), (_, want) in zip(read(*requests), alone, strict=True))
    if not together <= limit:
        raise ModelSupportError(f"texts that run together read differently in {info.id} ({together:.1e}): open it with hf/")
    checks.append(("together = alone", f"largest relative difference {together:.1e}"))
    checks.append(("stream = what is unembedded", _unembedded(engine, limit)))
    reply_token = None
    if engine.tokenizer.chat_template:
        try:
            layout = engine.layout(Request((("user", "Hello."),)))
            reply_token = layout.tokens[layout.n_prompt - 1]
            checks.append(("chat template", f"reply position is {reply_token!r}"))
        except EngineError as error:
            checks.append(("chat template", f"unusable: {error}"))
    else:
        checks.append(("chat template", "none: chats are refused, plain texts work"))
    return checks, reply_token


def _unembedded(engine: VLLMEngine, limit: float) -> str:
    """The last stream, unembedded, gives the model's own log-probabilities: the two parts of a block's output add up to it."""
    from affectlens.engines.checks import TEXTS

    info = engine.info
    last = Readout((info.n_layers - 1,), Where(last=1), "last")
    word = " the"
    (result,) = engine.run([Request(TEXTS[1], readouts=(last,), choices=(word,))])
    logits = engine.unembed(result.readings[0].values)[0].astype(np.float64)
    token = engine.layouts.continuation(word)[0]
    got = logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    if len(engine.layouts.continuation(word)) > 1:
        return f"not tried: {word!r} is several tokens"
    if not abs(got - result.choice_logprobs[0]) <= 20 * limit:
        raise ModelSupportError(
            f"what is read in {info.id} under vLLM is not what it unembeds (log-probability {got:.3f} against "
            f"{result.choice_logprobs[0]:.3f}): open it with hf/"
        )
    return f"log-probabilities differ by {abs(got - result.choice_logprobs[0]):.1e}"


def fingerprint_of(name: str) -> str:
    """The fingerprint of a model by name: what vectors of it are checked against."""
    return _weights(locate(name))[0]
