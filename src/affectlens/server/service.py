"""One call, independent of HTTP: checked, generated, watched, kept.

    call = service.call(request, key="alice")            # refuses what cannot be done
    with service.open(len(call.choices)) as place:                    # Busy when the queue is full
        place.wait()
        for choice in call.choices:
            for event in service.reply(call, choice, place): ...

Every choice of a call is a reply of its own: it has its seed, its trace and its record. A reply ends with :class:`Ended` after
its record is in the store, or after it has become clear that the store does not answer; what then waits is written when it does.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from affectlens.actions import Policy
from affectlens.baseline import vectors_id
from affectlens.concepts import SHOWCASE
from affectlens.conversations import Conversation, joined
from affectlens.engine import Chat, Request, Sampling, Steering
from affectlens.errors import AffectlensError, EngineError
from affectlens.monitor import Monitor, Stream, Token
from affectlens.server.armed import Armed
from affectlens.server.calls import (
    Began,
    Call,
    Choice,
    Ended,
    Event,
    Metrics,
    Said,
    Telemetry,
    WrongField,
    alert_data,
    field,
)
from affectlens.server.dials import Dials
from affectlens.server.records import Record, asked
from affectlens.server.replay import model_data
from affectlens.server.schemas import Asking, ChatRequest, Readings, ScoreRequest
from affectlens.server.settings import Settings
from affectlens.server.store import Store
from affectlens.sharing import Cancelled, Place, SharedEngine
from affectlens.traces import Trace
from affectlens.vectors import ConceptVectors

LOG = logging.getLogger("affectlens.server")

CLOSING = 15.0
"""Seconds beyond its time limit in which a reply that was ended can still be read and kept."""

STANDING_OUT = 5
"""Emotions of a summary that stand out."""


class Service:
    """Answers calls with one model and its vectors.

    Args:
        engine: The model, shared.
        monitor: With a baseline, and the rules of the rules file.
        store: Keeps replies, alerts and rules.
        settings: Limits.
        source: Where the vectors are, as replay will look for them.
        metrics: Counts what happens.
        telemetry: Tells others of replies; None for nobody.

    Raises:
        UnknownName: A watched emotion does not exist.
    """

    def __init__(
        self,
        engine: SharedEngine,
        monitor: Monitor,
        store: Store,
        *,
        settings: Settings = Settings(),
        source: str = "",
        metrics: Metrics,
        telemetry: Telemetry | None = None,
    ) -> None:
        assert monitor.baseline is not None, "measure a baseline before serving"
        self.engine, self.store, self.settings = engine, store, settings
        self.metrics, self.telemetry = metrics, telemetry
        self.vectors = monitor.probe.vectors
        self.dials = Dials(self.vectors, allow_unsafe=settings.allow_unsafe)
        self.armed = Armed(monitor, store, self.dials)
        self.model = model_name(engine.info.id)
        self.created = datetime.now(UTC)
        for name in settings.watched:
            self.vectors.index(name)
        self.watched = settings.watched or self.shown(self.vectors)
        self.listener: Callable[[str, dict[str, Any]], None] = lambda event, data: None
        """Told of what happens, for ``/v1/events``: the name of an event and its data."""
        self.listening: Callable[[], bool] = lambda: False
        self._facts = model_data(engine.info)
        self._vectors_facts = {"path": source, "id": vectors_id(self.vectors), "layer": self.vectors.layer}
        self._baseline_facts = monitor.baseline.as_dict()
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self.draining = False

    @staticmethod
    def shown(vectors: ConceptVectors) -> tuple[str, ...]:
        """The emotions that are watched where nobody says which: those of the paper's figures, or the first twelve."""
        return tuple(name for name in SHOWCASE if name in vectors) or vectors.names[:12]

    @property
    def facts(self) -> dict[str, Any]:
        """What every answer says of the model and of readings."""
        model = {"model": self.model, "system_fingerprint": f"fp_{self.engine.info.fingerprint}"}
        return {**model, "layer": self.vectors.layer, "unit": "z"}

    # ── checking ──

    def call(self, request: Asking, *, key: str = "", headers: Mapping[str, str] | None = None) -> Call:
        """A call from a request of one of OpenAI's endpoints.

        Raises:
            WrongField: It names what does not exist, has a rule that is none, or wants more than the server allows.
        """
        chat = isinstance(request, ChatRequest)
        prompts: Sequence[str | Chat] = (
            [joined(tuple(message.turn for message in request.messages))] if chat else request.prompts  # type: ignore[attr-defined]
        )
        n = 2 if request.compare else request.n or 1
        if n * len(prompts) > (most := min(self.settings.max_choices, self.settings.concurrency)):
            raise WrongField(
                EngineError(f"{n * len(prompts)} replies to one call are more than the {most} allowed here: lower n"), "n"
            )
        limit: int | None = request.limit if chat else request.max_tokens or 16  # type: ignore[attr-defined]
        if limit is not None and limit > self.settings.max_tokens:
            most = self.settings.max_tokens
            problem = EngineError(f"max_tokens is {limit}, more than the {most} allowed here: lower it, or leave it out")
            raise WrongField(problem, "max_tokens")
        with field("readings"):
            readings, names = self._readings(request.readings)
        with field("emotion_bias"):
            bias = self.dials.bias(request.emotion_bias)
        with field("rules"):
            rules = [each if isinstance(each, str) else each.model_dump() for each in request.rules]
            policies = self.armed.policies(rules)
        monitor = self.armed.monitor
        id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        # OpenAI takes any 64 bits; without a seed each call draws its own, and says which.
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed % 2**63
        choices = tuple(
            Choice(
                index=(index := i * n + k),
                id=id if not index else f"{id}-{index}",
                prompt=prompt,
                seed=seed if request.compare else seed + k,
                steered=not (request.compare and k == 1),
            )
            for i, prompt in enumerate(prompts)
            for k in range(n)
        )
        sampling = Sampling(
            max_tokens=limit or 1,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            seed=seed,
            stop=request.stops,
            logprobs=_logprobs(request),
        )
        alone = readings is not None and readings.visible
        watching = monitor.joined(policies, gap=alone) if policies or alone else monitor
        return Call(
            id, datetime.now(UTC), "chat" if chat else "completion", key, headers or {}, choices, sampling, limit, bias, readings,
            names, watching, request.compare, not chat and bool(request.echo),  # type: ignore[attr-defined]
        )  # fmt: skip

    def _readings(self, given: Readings | bool) -> tuple[Readings | None, tuple[str, ...]]:
        readings = Readings() if given is True else given or None
        return readings, self.names(readings.emotions if readings else None)

    def names(self, emotions: Sequence[str] | str | None) -> tuple[str, ...]:
        """The emotions that a caller means: names, ``all``, or None for those that are watched.

        Raises:
            UnknownName: One does not exist.
        """
        if emotions is None:
            return self.watched
        if isinstance(emotions, str):
            return self.vectors.names
        for name in emotions:
            self.vectors.index(name)
        return tuple(dict.fromkeys(emotions))

    # ── answering ──

    def open(self, size: int = 1) -> Place:
        """A place for so many replies at once, or for something to read.

        Raises:
            Busy: Too many wait, or the server is shutting down.
        """
        return self.engine.place(size, deadline=self.settings.time_limit + CLOSING)

    def reply(self, call: Call, choice: Choice, place: Place) -> Iterator[Event]:
        """Generate a reply in a place that is at work; closing the iterator gives it up.

        Raises:
            EngineError: The request cannot be run, or the model failed.
            Cancelled: Its place was given up.
        """
        queued = place.began - place.since
        readings = call.readings
        steering = self.dials.steering(call.bias) if choice.steered else Steering()
        limit = call.limit or self._room(choice.prompt, place)
        sampling = replace(call.sampling, seed=choice.seed, max_tokens=limit)
        stream = call.monitor.stream(place, choice.prompt, sampling=sampling, steering=steering, id=choice.id)
        facts = {"trace": choice.id, "key": call.key}
        columns = {name: self.vectors.index(name) for name in call.names}
        watched = {name: self.vectors.index(name) for name in self.watched}
        first = None
        number = 0
        with self._following(facts, stream):
            prompt = _prompt_rows(stream.before, columns) if readings and readings.prompt else None
            used = call.bias.used if choice.steered else {}
            self.listener("reply", {**facts, "kind": call.kind, "model": self.model, "steering": dict(used)})
            yield Began(choice, prompt)
            for token in stream:
                first = time.monotonic() - place.since if first is None else first
                read = bool(np.isfinite(token.scores).any())
                due = readings is not None and (token.role == "monitor" or (read and number % readings.every == 0))
                number += read
                yield Said(choice, token, _row(token, columns) if due else None)
                self._tell_of(token, facts, watched)
                if place.left < CLOSING:
                    stream.end("timeout")
        assert stream.trace is not None, "a reply that has ended has a trace"
        prompt_tokens, generated = stream.usage
        record = Record(
            id=choice.id,
            created=call.created,
            kind=call.kind,
            key=call.key,
            model=self._facts,
            request=self._asked(choice.prompt, call.monitor.policies, sampling=sampling, steering=steering),
            text=stream.text,
            finish=stream.finish,
            usage={"prompt_tokens": prompt_tokens, "completion_tokens": generated},
            timing={"queued": queued, "first_token": first or 0.0, "total": time.monotonic() - place.since},
            trace=stream.trace,
            company=max(1, place.company),
        )
        self._keep(record, call.headers)
        ended = {"finish": record.finish, "tokens": generated, "alerts": len(record.trace.alerts)}
        self.listener("done", {**facts, **ended})
        yield Ended(choice, record, self._summary(record.trace, call.names))

    def score(self, request: ScoreRequest, place: Place, *, key: str = "") -> dict[str, Any]:
        """Every token of a text or a conversation in z, with the alerts of the rules that are armed; no action acts.

        Raises:
            WrongField: An emotion does not exist.
            EngineError: It does not fit the model.
        """
        with field("emotions"):
            names = self.vectors.names if request.emotions is None else self.names(request.emotions)
        id, created = f"score-{secrets.token_hex(12)}", datetime.now(UTC)
        if request.text is not None:
            what: str | Conversation = request.text
            prompt: str | Chat = request.text
        else:
            turns = tuple((each.role, each.content.strip()) for each in request.messages or () if each.content.strip())
            if not turns:
                raise EngineError("messages holds no words: give at least one turn with some")
            what, prompt = Conversation(id, turns), turns
        monitor = self.armed.monitor.joined((), gap=True) if request.visible else self.armed.monitor
        trace = monitor.score(place, what, id=id)
        record = Record(
            id=id,
            created=created,
            kind="score",
            key=key,
            model=self._facts,
            request=self._asked(prompt, monitor.policies),
            text="",
            finish="read",
            usage={"prompt_tokens": len(trace), "completion_tokens": 0},
            timing={"queued": place.began - place.since, "first_token": 0.0, "total": time.monotonic() - place.since},
            trace=trace,
            company=max(1, place.company),
        )
        self._keep(record)
        return trace.as_dict(names)

    def _room(self, prompt: str | Chat, place: Place) -> int:
        """How many tokens there is room for behind a prompt."""
        transcript = not isinstance(prompt, str) and place.info.template is None
        (result,) = place.run([Request(prompt, transcript=transcript)])
        # Where there is none, the engine refuses one token in its own words.
        return max(1, min(self.settings.max_tokens, place.info.context - len(result.layout)))

    def _asked(self, prompt: str | Chat, policies: Sequence[Policy], **options: Any) -> dict[str, Any]:
        return asked(prompt, policies=policies, vectors=self._vectors_facts, baseline=self._baseline_facts, **options)

    def _keep(self, record: Record, headers: Mapping[str, str] | None = None) -> None:
        """Put a record into the store and wait for the commit, though not for a store that does not answer."""
        try:
            future: Future[None] = self.store.put(record)
            status = self.store.status()
            if not status.error:  # nor is it waited for where others have waited in vain
                future.result(max(0.0, self.settings.commit - status.lag))
        except TimeoutError:
            LOG.warning("the store has not written %s within %g s: the reply ends without it", record.id, self.settings.commit)
        except AffectlensError as error:
            LOG.error("%s is not kept: %s", record.id, error)
        try:
            self.metrics.reply(record)
            if self.telemetry is not None:
                self.telemetry.reply(record, headers)
        except Exception:  # whoever counts must not cost a reply
            LOG.exception("%s could not be counted", record.id)

    def _summary(self, trace: Trace, names: Sequence[str]) -> dict[str, Any]:
        """Mean, peak and last score of the reply's words, their mean read alone and the gap, and the emotions that stand out."""
        own = trace.of("assistant")
        own[: trace.layout.n_prompt] = False
        rows = trace.scores[own]
        if not len(rows):
            return {"mean": {}, "peak": {}, "last": {}, "top": []}
        mean = rows.mean(axis=0)
        table = {"mean": mean, "peak": rows.max(axis=0), "last": rows[-1]}
        for key, kind in (("visible", trace.visible), ("gap", trace.gap)):
            # A reply's first word has no context when it is read alone, so it is not read.
            if kind is not None and len(read := kind[own & np.isfinite(kind).all(axis=1)]):
                table[key] = read.mean(axis=0)
        best = np.argsort(-mean, kind="stable")[:STANDING_OUT]
        return {
            **{key: {name: _number(row[trace.names.index(name)]) for name in names} for key, row in table.items()},
            "top": [[trace.names[i], _number(mean[i])] for i in best],
        }

    def _tell_of(self, token: Token, facts: Mapping[str, Any], watched: Mapping[str, int]) -> None:
        if not self.listening():
            return
        shown = self.store.text == "full"  # what is not to be kept is not to be shown to others either
        row = _row(token, watched)
        self.listener("token", {**facts, **row, "text": row["text"] if shown else ""})
        for alert in token.alerts:
            data = alert_data(alert)
            self.listener("alert", {**facts, **data, "words": data["words"] if shown else ""})

    # ── the end ──

    @property
    def ready(self) -> dict[str, bool]:
        """Whether calls can be answered and kept, part by part."""
        return {"model": self.engine.alive, "store": self.store.healthy(), "accepting": not self.draining}

    def drain(self, timeout: float) -> bool:
        """Take no more calls; let replies go on for ``timeout`` seconds, then end them where they are. Says whether all ended."""
        self.draining = True
        if self.engine.drain(timeout):
            return True
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            stream.end("shutdown")
        return self.engine.drain(CLOSING)

    def close(self) -> None:
        """End everything that is left, tell webhooks what there is to tell, and write what waits."""
        self.draining = True
        self.engine.close()
        self.armed.monitor.close()
        self.store.close()
        if self.telemetry is not None:
            self.telemetry.close()

    @contextlib.contextmanager
    def _following(self, facts: Mapping[str, str], stream: Stream) -> Iterator[None]:
        """Know of a reply for as long as it is generated, so that a shutdown can end it; tell of one that comes to nothing."""
        with self._lock:
            self._streams[facts["trace"]] = stream
        try:
            yield
        except BaseException as error:
            finish = "cancelled" if isinstance(error, Cancelled | GeneratorExit) else "error"
            self.listener("done", {**facts, "finish": finish, "tokens": stream.usage[1], "alerts": len(stream.alerts)})
            raise
        finally:
            stream.close()
            with self._lock:
                del self._streams[facts["trace"]]


def model_name(id: str) -> str:
    """What a model is called over HTTP: its id, or the name of its folder or file.

    Example:
        >>> model_name("Qwen/Qwen3-8B"), model_name("/models/mine/"), model_name("./mine.gguf")
        ('Qwen/Qwen3-8B', 'mine', 'mine.gguf')
    """
    path = id.rstrip("/")
    return path.rsplit("/", 1)[-1] if path.startswith(("/", ".", "~")) else path


def _row(token: Token, columns: Mapping[str, int]) -> dict[str, Any]:
    scores = {name: _number(token.scores[column]) for name, column in columns.items()}
    return {"token": token.position, "text": token.text, "role": token.role, "scores": scores}


def _prompt_rows(trace: Trace, columns: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
    layout = trace.layout
    return tuple(
        {
            "token": i,
            "text": layout.tokens[i],
            "role": layout.roles[i],
            "scores": {name: _number(trace.scores[i, column]) for name, column in columns.items()},
        }
        for i in range(layout.n_prompt)
    )


def _number(value: float) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None


def _logprobs(request: Asking) -> int | None:
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None
    return request.logprobs  # type: ignore[attr-defined]
