"""vLLM in this process: continuous batching, shared caches, several accelerators; each request steered and read in its own way.

vLLM's scheduler runs whatever is there together, a long prompt in parts. What is done to the residual stream is done by taps in
its workers (:mod:`affectlens.engines.vllm_worker`), told by orders of plain data. Tokens are drawn by vLLM, from the seed of each
request; what is a reply, where it stops and what its readings are is worked out here as for models of ``transformers``.

vLLM keeps the keys and values of prompts and reuses them. A steered request must not get plain ones, nor leave its own to
others: its cache is salted with what it is steered by. A request that reads its prompt has it computed.

vLLM is a package of its own, with its own pins: see ``docs/scale.md``.
"""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from affectlens.engine import (
    Engine,
    Logprob,
    ModelInfo,
    Reading,
    Request,
    Result,
    Session,
    batched,
    check_request,
    refuse_too_long,
)
from affectlens.engines import vllm_draw
from affectlens.engines.decode import Part, Reply, partials
from affectlens.engines.rows import Layouts, Row, words_of
from affectlens.engines.vllm_checkpoint import describe, end_tokens, text_config, tokenizer_of
from affectlens.engines.vllm_checks import examine
from affectlens.engines.vllm_orders import NAME, Findings, Mail, Order
from affectlens.engines.vllm_rows import Job, Seat, order_of, salt
from affectlens.engines.vllm_tables import additions
from affectlens.engines.vllm_worker import REPLAY, TESTED, replays
from affectlens.errors import AffectlensError, EngineError, MissingExtra, ModelSupportError
from affectlens.layout import Layout
from affectlens.models import ModelSource, locate

CACHE = 2 * 2**30
"""Bytes for keys and values on a CPU, where vLLM's own default is half of the machine's memory."""

TOGETHER = 256
"""Residuals that are unembedded in one pass."""


# ── the engine ──


class VLLMEngine(Engine):
    """An engine around vLLM.

    Args:
        vllm: Its ``LLMEngine``, with our worker.
        tokenizer: The model's fast tokenizer.
        source: Where the model comes from.
        info: What was found when this model was tried before; None to try it.

    Raises:
        ModelSupportError: A self-check failed, or this vLLM lacks what is needed.

    Example:
        >>> engine = VLLMEngine.load("smollm2-135m")                        # doctest: +SKIP
        >>> engine.generate(["Once upon a time"])                           # doctest: +SKIP
    """

    window = 1024  # vLLM's scheduler decides what runs together; this bounds what it holds of an endless stream of requests

    _living: ClassVar[weakref.ref[VLLMEngine] | None] = None

    def __init__(self, vllm: Any, tokenizer: Any, source: ModelSource, *, info: ModelInfo | None = None) -> None:
        self.vllm, self.tokenizer = vllm, tokenizer
        self.layouts = Layouts(tokenizer, source.id)
        self._ends = end_tokens(source, tokenizer)
        self.replays = replays(vllm.vllm_config)
        self._mail = Mail()
        self._numbers = itertools.count()
        self._seats: dict[str, Seat] = {}
        self._logits: dict[str, list[np.ndarray]] = {}
        self.info = info or describe(vllm, tokenizer, source)
        if info is None:
            checks, reply_token = examine(self)
            self.info = replace(self.info, checks=tuple(checks), reply_token=reply_token)

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
        config = text_config(source)
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
                additional_config={REPLAY: replay},
                **options,
            )
            engine = cls(LLMEngine.from_engine_args(arguments), tokenizer_of(source), source)
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
        cls._living = weakref.ref(engine)
        return engine

    def close(self) -> None:
        """End vLLM; the engine is of no use afterwards."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.vllm.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        VLLMEngine._living = None

    # ── the seam ──

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for window in batched(requests, self.window):
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
            key = self._mail.key(f"unembed {next(self._numbers)}")
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

    def _begin(self, requests: Sequence[Request]) -> list[Job]:
        """Hand requests to vLLM, all or none of them."""
        for request in requests:
            check_request(request, self.info)
            if self.replays:
                additions(request.steering)
        jobs = []
        for request, layout in zip(requests, self.layouts.of_all(requests), strict=True):
            longest = max((len(self.layouts.continuation(choice)) for choice in request.choices), default=0)
            refuse_too_long(len(layout) + longest, request, self.info)
            job = Job(next(self._numbers), layout, np.zeros(len(request.choices)))
            row = Row(job.number, request, layout)
            rows = [row] if request.sampling else self.layouts.with_choices(row)
            for n, each in enumerate(rows):
                key = self._mail.key(f"{job.number}.{n}")
                reply = Reply(each, request.sampling) if request.sampling else None
                job.seats.append(Seat(key, job, each, order_of(key, each), reply))
            jobs.append(job)
        seats = [seat for job in jobs for seat in job.seats]
        self._rpc("affectlens_expect", *self._mail.pack([seat.order for seat in seats]))
        for seat in seats:
            self._seats[seat.key] = seat
            self._add(seat.order, seat.row.layout.ids, **self._sampling(seat))
        return jobs

    def _sampling(self, seat: Seat) -> dict[str, Any]:
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
        findings = Findings.unpack(*self._rpc("affectlens_take", self._mail.owner))
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

    def _read(self, seat: Seat) -> None:
        """A row of which nothing is generated has run."""
        job = seat.job
        if seat.row.is_request:
            job.readings = seat.readings(self.info.width, job.layout)
        self._leave(seat)
        if not job.seats:
            job.out.append(Result("", job.layout, job.readings, tuple(job.logprobs.tolist())))
            job.over = True

    def _heard(self, seat: Seat, token: int, known: Mapping[int, Any] | None) -> None:
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

    def _tell(self, seat: Seat) -> None:
        """Hand out what is new, if it is to be and has been read."""
        reply = seat.reply
        if reply is not None and seat.row.request.stream and not reply.owes:

            def readings(_: int, layout: Layout, first: int) -> tuple[Reading, ...]:
                return seat.readings(self.info.width, layout, first)

            seat.job.out += [result for _, result in partials({0: reply}, readings)]

    def _end(self, seat: Seat) -> None:
        reply, job = seat.reply, seat.job
        assert reply is not None
        layout = reply.grow()
        readings = seat.readings(self.info.width, layout)
        job.out.append(Result(reply.text, layout, readings, (), reply.finish, logprobs=tuple(reply.logprobs)))
        job.over = True
        self._leave(seat)

    def _leave(self, *seats: Seat) -> None:
        for seat in seats:
            del self._seats[seat.key]
            seat.job.seats.remove(seat)
        self._forget([seat.key for seat in seats])

    def _forget(self, keys: list[str]) -> None:
        """vLLM ends what still runs of these; the worker keeps their orders until it has."""
        self.vllm.abort_request(keys)
        self._rpc("affectlens_forget", keys)

    def _drop(self, jobs: Iterable[Job]) -> None:
        """Let jobs go, finished or not."""
        if seats := [seat for job in jobs for seat in job.seats]:
            self._leave(*seats)


class VLLMSession(Session):
    """A session whose requests share vLLM's steps, each with its own steering, readouts and seed."""

    shares = True
    exact = False  # matrix products are divided according to how many rows there are

    def __init__(self, engine: VLLMEngine) -> None:
        self._vllm = engine
        self._jobs: dict[int, Job] = {}

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
