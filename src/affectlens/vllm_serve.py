"""Emotion dials, readings and whole requests for ``vllm serve``: an ASGI middleware that vLLM loads by its name.

    AFFECTLENS_VECTORS=runs/first/vectors VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL --no-async-scheduling \\
        --worker-cls affectlens.engines.vllm_worker.Worker --logits-processors affectlens.engines.vllm_draw:Draw \\
        --middleware affectlens.vllm_serve.Emotions

``open_engine("vllm/http://HOST:PORT")`` then is the model of this server, and needs no vectors there
(:mod:`affectlens.engines.vllm_host`).

Requests to ``/v1/chat/completions`` and ``/v1/completions`` may then carry ``emotion_bias`` and ``readings`` in ``vllm_xargs``
(or beside the other fields), with the meaning and the errors of our own server. What was read stands under ``affectlens`` in the
answer, or in an event of its own before the end of a stream. Rules, comparison, alerts, the store and the dashboard are those of
``affectlens serve --engine vllm``.

The middleware packs an order for vLLM's workers, puts its name and the salt of the cache into the request, and hands it on: the
rest is vLLM. Who may ask is vLLM's to say (``--api-key``): nothing of a request is read before vLLM has let it in.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.routing import Route

from affectlens.engine import Layout, Reading, Readout, Result, Where
from affectlens.engines.decode import nothing
from affectlens.engines.vllm_host import Host, Message, Receive, Send
from affectlens.engines.vllm_orders import NAME, Findings, Mail, Noted, Order, Seen, selectors
from affectlens.engines.vllm_remote import PREFIX
from affectlens.engines.vllm_rows import salt
from affectlens.errors import AffectlensError, EngineError

PATHS = ("/v1/chat/completions", "/v1/completions")
OURS = ("emotion_bias", "readings")
VARIABLE = "AFFECTLENS_VECTORS"
ADMITTED = f"{PREFIX}admitted"


@dataclass
class _Asked:
    """What one request wants of us.

    Args:
        key: Of its order.
        panel: What dials and readings are.
        bias: What was asked for and what is used of it, as plain data.
        names: The emotions whose scores are wanted; empty for none.
        every: How many tokens lie between two scores, plus one.
        own_ids: Whether the caller wants vLLM's token ids as well.
    """

    key: str
    panel: Panel
    bias: dict[str, dict[str, float]]
    names: tuple[str, ...]
    every: int
    own_ids: bool


class Panel:
    """What the dials and readings of a server are: vectors, what their scores are stated against, and how far they may steer.

    Args:
        name: Of the folder.

    Raises:
        EngineError: There is no baseline beside them.
    """

    def __init__(self, name: str) -> None:
        from affectlens.baseline import Baseline
        from affectlens.exchange import load_vectors
        from affectlens.server.dials import Dials
        from affectlens.traces import Probe
        from affectlens.vectors import vectors_folder

        self.vectors = load_vectors(name)
        file = vectors_folder(name) / f"baseline-{self.vectors.layer}.json"
        if not file.exists():
            raise EngineError(f"{file} is not there, so scores have no unit: run affectlens baseline {name}")
        self.baseline = Baseline.load(file)
        self.probe = Probe(self.vectors)
        self.baseline.check(self.probe)
        self.dials = Dials(self.vectors)


class Emotions:
    """The middleware.

    Args:
        app: vLLM's own application.

    Raises:
        AffectlensError: The vectors that the environment names cannot be used.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        name = os.environ.get(VARIABLE)
        self._panel = Panel(name) if name else None
        self._host = Host()
        self._mail = Mail()
        self._found: dict[str, list[Seen]] = {}
        self._lock = asyncio.Lock()
        self._routed = False

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._routed:
            # Among vLLM's own routes, so behind its own door.
            ours = [Route(ADMITTED, _Empty(), methods=["POST"]), Route(f"{PREFIX}{{what}}", self._host, methods=["POST"])]
            scope["app"].router.routes[:0] = ours
            self._routed = True
        path = scope.get("path", "").removeprefix(scope.get("root_path", "")).rstrip("/")
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self.app(scope, receive, send)
        elif await self._admitted(scope, send):
            await self._reply(scope, receive, send)

    async def _admitted(self, scope: MutableMapping[str, Any], send: Send) -> bool:
        """Whether vLLM lets this caller in; if not, its answer is sent."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        probe = {**scope, "path": ADMITTED, "raw_path": ADMITTED.encode()}
        await self.app(probe, _again(b"", _hung_up), keep)
        if answer[0]["status"] == 204:
            return True
        for message in answer:
            await send(message)
        return False

    async def _reply(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        raw = await _body(receive)
        try:
            body = json.loads(raw)
            ours = _ours(body)
        except (ValueError, AttributeError, TypeError):
            await self.app(scope, _again(raw, receive), send)  # vLLM says what is wrong with it
            return
        if not ours:
            await self.app(scope, _again(raw, receive), send)
            return
        client = scope["app"].state.engine_client
        try:
            asked = await self._take_on(body, ours, client)
        except AffectlensError as error:
            await _refuse(send, error)
            return
        try:
            answer = _Answer(self, asked, client, send, stream=bool(body.get("stream")))
            await self.app(scope, _again(json.dumps(body).encode(), receive), answer.send)
        finally:
            self._found.pop(asked.key, None)
            await client.collective_rpc("affectlens_forget", args=([asked.key],))

    async def _take_on(self, body: dict[str, Any], ours: dict[str, Any], client: Any) -> _Asked:
        """Check what is asked for, tell the workers, and make it a request that vLLM understands.

        Raises:
            WrongField: Something in it is wrong.
            ModelSupportError: The model cannot be read or steered here.
        """
        from pydantic import ValidationError

        from affectlens.server.calls import WrongField, field
        from affectlens.server.schemas import Ours, Readings, place_of
        from affectlens.server.service import Service

        if (panel := self._panel) is None:
            raise EngineError(f"this server has no vectors: set {VARIABLE} to their folder and start it again")
        try:
            given = Ours.model_validate(ours)
        except ValidationError as error:
            found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            message, param = place_of(found, ours)
            raise WrongField(EngineError(message), param or "vllm_xargs") from None
        prompts = body.get("prompt")
        texts = isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int)
        if (body.get("n") or 1) != 1 or texts or body.get("use_beam_search"):
            problem = EngineError("dials and readings are of one reply here: ask for one, or use affectlens serve --engine vllm")
            raise WrongField(problem, "n")
        panel.vectors.check(await self._host.info(client))
        with field("emotion_bias"):
            bias = panel.dials.bias(given.emotion_bias)
            steering = panel.dials.steering(bias)
        readings = Readings() if given.readings is True else given.readings or None
        names: tuple[str, ...] = ()
        with field("readings"):
            if readings is not None:
                if readings.prompt or readings.visible:
                    raise EngineError("vllm serve reads replies only: leave prompt and visible out, or use affectlens serve")
                wanted = readings.emotions
                names = (
                    Service.shown(panel.vectors) if wanted is None else panel.vectors.names if wanted == "all" else tuple(wanted)
                )
                for name in names:
                    panel.vectors.index(name)
        key = self._mail.key(uuid.uuid4().hex)
        noted = []
        for readout in panel.probe.readouts if readings is not None else ():
            each = Readout(readout.layers, Where(), "none", readout.onto)
            noted.append(Noted(each, np.zeros(0, dtype=bool), grows=True))
        ahead = tuple((0, 2**62) for _ in selectors(steering))
        sink = (await self._host.tokenizer(client)).bos_token_id
        order = Order(key, -1, steering, ahead=ahead, noted=tuple(noted), sink=sink)
        self._found[key] = []
        await client.collective_rpc("affectlens_expect", args=self._mail.pack([order]))
        xargs = {name: value for name, value in (body.get("vllm_xargs") or {}).items() if name not in OURS}
        body["vllm_xargs"] = {**xargs, NAME: key}
        own_ids = bool(body.get("return_token_ids"))
        if readings is not None:
            body["return_token_ids"] = True
        if (salted := salt(order)) is not None:
            body["cache_salt"] = f"{body.get('cache_salt') or ''} {salted}"
        return _Asked(key, panel, bias.as_dict(), names, readings.every if readings else 1, own_ids)

    async def report(self, asked: _Asked, ids: Sequence[int], client: Any) -> dict[str, Any]:
        """What affectlens says of a reply of these tokens."""
        from affectlens.traces import trace_of

        said: dict[str, Any] = {"steering": asked.bias}
        if not asked.names:
            return said
        panel = asked.panel
        async with self._lock:
            answers = await client.collective_rpc("affectlens_take", args=(self._mail.owner,))
            for one in Findings.unpack(*answers[0]).seen:
                if one.key in self._found:
                    self._found[one.key].append(one)
        layout = _layout(await self._host.tokenizer(client), ids)
        readings = []
        for number, readout in enumerate(panel.probe.readouts):
            readings.append(_reading(readout, [one for one in self._found[asked.key] if one.number == number], len(layout)))
        trace = trace_of(Result("", layout, tuple(readings)), panel.probe, id=asked.key, format="")
        scores = panel.baseline.standardise(trace).scores
        columns = {name: panel.vectors.index(name) for name in asked.names}
        rows = [
            {
                "token": i,
                "text": layout.tokens[i],
                "role": "assistant",
                "scores": {name: round(float(scores[i, column]), 3) for name, column in columns.items()},
            }
            for i in range(0, len(layout), asked.every)
            if np.isfinite(scores[i]).all()
        ]
        return {**said, "layer": panel.vectors.layer, "unit": "z", "emotions": list(asked.names), "tokens": rows}


class _Answer:
    """An answer of vLLM's on its way out, to which ours is added."""

    def __init__(self, middleware: Emotions, asked: _Asked, client: Any, send: Send, *, stream: bool) -> None:
        self._middleware, self._asked, self._client, self._send = middleware, asked, client, send
        self._stream = stream
        self._start: Message = {}
        self._body = b""
        self._ids: list[int] = []
        self._head: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if self._stream and message["status"] == 200:
                await self._send(message)
        elif self._stream and self._start["status"] == 200:
            await self._chunk(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._whole()

    async def _whole(self) -> None:
        body = self._body
        if self._start["status"] == 200:
            data = json.loads(body)
            choice = data["choices"][0]
            ids = choice.get("token_ids") or []
            data["affectlens"] = await self._middleware.report(self._asked, ids, self._client)
            self._tidy(data)
            body = json.dumps(data).encode()
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    async def _chunk(self, message: Message) -> None:
        """Hand events on as they come; before the last one comes ours."""
        self._body += message.get("body", b"")
        *events, self._body = self._body.split(b"\n\n")
        out = b""
        for event in events:
            if event == b"data: [DONE]":
                ours = await self._middleware.report(self._asked, self._ids, self._client)
                out += b"data: " + json.dumps({**self._head, "choices": [], "affectlens": ours}).encode() + b"\n\n"
            elif event.startswith(b"data: {"):
                data = json.loads(event[6:])
                if not self._head:
                    self._head = {key: data[key] for key in ("id", "object", "created", "model") if key in data}
                for choice in data.get("choices", ()):
                    self._ids += choice.get("token_ids") or []
                self._tidy(data)
                event = b"data: " + json.dumps(data).encode()
            out += event + b"\n\n"
        if not message.get("more_body"):
            out += self._body
        await self._send({**message, "body": out})

    def _tidy(self, data: dict[str, Any]) -> None:
        """Take out what only we had asked for."""
        if not self._asked.own_ids:
            data.pop("prompt_token_ids", None)
            for choice in data.get("choices", ()):
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)


def _ours(body: dict[str, Any]) -> dict[str, Any]:
    """What of a request is ours; a value may be JSON in a string, since vLLM's own arguments hold no objects."""
    found = {}
    for place in (body, body.get("vllm_xargs") or {}):
        for name in OURS:
            if name in place and place[name] is not None:
                value = place[name]
                found[name] = json.loads(value) if isinstance(value, str) else value
    for name in OURS:
        body.pop(name, None)
    return found


def _layout(tokenizer: Any, ids: Sequence[int]) -> Layout:
    """A reply as a layout of its own."""
    text, tokens, offsets = "", list[str](), list[tuple[int, int]]()
    for i in range(len(ids)):
        whole = tokenizer.decode(list(ids[: i + 1]), skip_special_tokens=True)
        whole = text if whole.endswith("\ufffd") else whole
        tokens.append(whole[len(text) :])
        offsets.append((len(text), len(whole)))
        text = whole
    return Layout(text, tuple(tokens), tuple(ids), tuple(offsets), ("assistant",) * len(ids), 0)


def _reading(readout: Readout, seen: Sequence[Seen], n: int) -> Reading:
    """What was seen of a reply of ``n`` tokens, counted from its first one."""
    if not seen:
        return nothing(readout, 0)
    positions = np.concatenate([one.positions for one in seen])
    positions = positions - positions[0]
    keep = positions < n
    values = np.concatenate([one.values for one in seen], axis=1)[:, keep]
    return Reading(values, np.concatenate([one.norms for one in seen], axis=1)[:, keep], positions[keep])


async def _body(receive: Receive) -> bytes:
    raw = bytearray()
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(raw)


def _again(raw: bytes, rest: Receive) -> Receive:
    """A body that was read, for whoever comes next; then what comes after it."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": raw, "more_body": False}
        return await rest()

    return receive


async def _hung_up() -> Message:
    return {"type": "http.disconnect"}


class _Empty:
    """What answers that somebody may ask."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Send, error: AffectlensError) -> None:
    from affectlens.server.problems import error_of, meaning

    found = meaning(error)
    body = json.dumps(error_of(str(error), kind=found.type, code=found.code, param=found.param)).encode()
    headers: list[tuple[bytes, bytes]] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": found.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
