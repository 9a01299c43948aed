"""The model of a ``vllm serve`` for callers elsewhere: :class:`Host` answers :mod:`affectlens.engines.vllm_remote`.

What is sent is data, read by the types of what is asked for and checked by the engine before any of it reaches a worker.
Directions to steer along and to read are such data, too; nothing that is sent can run anything.

Each caller gets a :class:`Guest`: the engine that runs vLLM in process, in a thread of its own, over a :class:`Bridge` to the
server's asynchronous engine. So a request does there what it does in process, among the requests of everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, MutableMapping, Sequence
from typing import Any

from affectlens.engine import Engine, ModelInfo, Request
from affectlens.engines import wire
from affectlens.engines.asking import CALLS
from affectlens.engines.vllm import VLLMEngine
from affectlens.engines.vllm_checkpoint import tokenizer_of
from affectlens.engines.wire import Failure
from affectlens.errors import AffectlensError, EngineError, ModelSupportError
from affectlens.models import ModelSource, locate

LOG = logging.getLogger("affectlens.vllm")

MOST = 2**30
"""Bytes of questions that are held at a time, those of all callers together."""

AT_ONCE = 64
"""Callers at a time."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gone(Exception):
    """The caller has hung up."""


# ── the server's engine, as one that is stepped ──


class Bridge:
    """As much of vLLM's ``LLMEngine`` as :class:`VLLMEngine` uses, over the asynchronous engine of a server.

    Args:
        client: vLLM's engine client.
        loop: That serves; the bridge is used in another thread.
    """

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.vllm_config, self.model_config = client.vllm_config, client.model_config
        self._client, self._loop = client, loop
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add_request(self, key: str, prompt: Any, params: Any) -> None:
        async def begin() -> None:
            self._tasks[key] = asyncio.create_task(self._follow(key, prompt, params))

        self._wait(begin())

    def step(self) -> list[Any]:
        """Whatever has come since this was last called; waits for something."""
        outputs = [self._outputs.get()]
        while not self._outputs.empty():
            outputs.append(self._outputs.get())
        for output in outputs:
            if isinstance(output, Exception):
                raise output
        return outputs

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return list(self._wait(self._client.collective_rpc(method, args=args)))

    def abort_request(self, keys: Sequence[str]) -> None:
        async def end() -> None:
            tasks = [task for key in keys if (task := self._tasks.pop(key, None)) is not None]
            for task in tasks:
                task.cancel()  # vLLM ends a request that nobody follows
            await asyncio.gather(*tasks, return_exceptions=True)

        self._wait(end())

    def hang_up(self) -> None:
        """The next step is the last: nobody waits for what comes of it."""
        self._outputs.put(Gone())

    async def _follow(self, key: str, prompt: Any, params: Any) -> None:
        finished = False
        try:
            async for output in self._client.generate(prompt, params, key):
                finished = output.finished
                self._outputs.put(output)
        except Exception as error:  # vLLM has many
            self._outputs.put(EngineError(f"vLLM did not run this ({_reason(error)}): see what its log says"))
            return
        if not finished:
            self._outputs.put(EngineError("vLLM ended a request that was not done: see what its log says"))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class Guest(VLLMEngine):
    """The server's model for one caller, who has a thread to himself."""

    def close(self) -> None:
        """Let go of what the workers keep for it; vLLM runs on."""
        self._rpc("affectlens_leave", self._mail.owner)


# ── what is asked ──


def answers(engine: Engine, what: str, question: bytes) -> Iterator[bytes]:
    """What an engine says, as pairs of a value and a failure: one for each result of a run, one for any other question."""
    try:
        if what == "run":
            with contextlib.closing(engine.run(wire.unpack(question, tuple[Request, ...]))) as results:  # type: ignore[type-var]
                for result in results:
                    yield wire.pack((result, None))
        else:
            call = CALLS[what]
            yield wire.pack((call.ask(engine, wire.unpack(question, call.takes)), None))
    except AffectlensError as error:
        yield wire.pack((None, Failure.of(error)))


class Host:
    """An ASGI endpoint that answers questions about the model of a server, and runs requests with it."""

    def __init__(self) -> None:
        self._held = self._callers = 0
        self._opening: asyncio.Task[tuple[ModelSource, Any, ModelInfo]] | None = None

    async def info(self, client: Any) -> ModelInfo:
        """What there is to know about the model, which is tried when this is first asked.

        Raises:
            ModelSupportError: vLLM's workers are others, or a check failed.
        """
        return (await self._opened(client))[2]

    async def tokenizer(self, client: Any) -> Any:
        """The model's tokenizer."""
        return (await self._opened(client))[1]

    async def _opened(self, client: Any) -> tuple[ModelSource, Any, ModelInfo]:
        if self._opening is None:
            loop = asyncio.get_running_loop()
            self._opening = loop.create_task(asyncio.to_thread(_try, Bridge(client, loop)))
        return await asyncio.shield(self._opening)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        what, client = scope["path"].rpartition("/")[2], scope["app"].state.engine_client
        if what != "run" and what not in CALLS:
            return await _refuse(send, 404, f"there is no {what!r}: install the same affectlens on both sides")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "the length of the body is not stated: send a Content-Length")
        size = int(length)
        if size > MOST:
            return await _refuse(send, 413, f"{size} bytes are more than the {MOST} that are taken: ask for less at once")
        if self._held + size > MOST or self._callers == AT_ONCE:
            return await _refuse(send, 429, "too many ask at once: try again in a moment")
        self._held, self._callers = self._held + size, self._callers + 1
        try:
            question = bytearray()
            while True:
                more = await receive()
                if more["type"] != "http.request":
                    return None
                question += more.get("body", b"")
                if not more.get("more_body"):
                    break
            try:
                source, tokenizer, info = await self._opened(client)
            except AffectlensError as error:
                return await _refuse(send, 503, str(error))
            bridge = Bridge(client, asyncio.get_running_loop())
            await _stream(bridge, lambda: Guest(bridge, tokenizer, source, info=info), what, bytes(question), receive, send)
        finally:
            self._held, self._callers = self._held - size, self._callers - 1


def _try(bridge: Bridge) -> tuple[ModelSource, Any, ModelInfo]:
    """Open the model that a server has."""
    config = bridge.model_config
    try:
        bridge.collective_rpc("affectlens_take", ("nobody",))
    except Exception:  # what vLLM raises for a method that its workers do not have differs
        raise ModelSupportError(
            "vLLM's workers cannot steer: start it with --worker-cls affectlens.engines.vllm_worker.Worker"
        ) from None
    if "affectlens.engines.vllm_draw:Draw" not in (config.logits_processors or ()):
        raise ModelSupportError(
            "vLLM does not draw by seeds: start it with --logits-processors affectlens.engines.vllm_draw:Draw"
        )
    hub = "" if config.revision is None else f"@{config.revision}"
    source = locate(f"{config.model}{hub}")
    tokenizer = tokenizer_of(source)
    with contextlib.closing(Guest(bridge, tokenizer, source)) as guest:
        return source, tokenizer, guest.info


async def _stream(bridge: Bridge, guest: Callable[[], Guest], what: str, question: bytes, receive: Receive, send: Send) -> None:
    """Work in a thread, and send each answer with its length before it as soon as it is there; an empty one is the end."""
    loop = asyncio.get_running_loop()
    out: asyncio.Queue[bytes | None] = asyncio.Queue()

    def work() -> None:
        said = True
        try:
            with contextlib.closing(guest()) as engine:
                for answer in answers(engine, what, question):
                    loop.call_soon_threadsafe(out.put_nowait, answer)
        except Gone:
            pass
        except Exception:
            LOG.exception("a caller was not answered")
            said = False
        loop.call_soon_threadsafe(out.put_nowait, b"" if said else None)

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        bridge.hang_up()

    threading.Thread(target=work, name="affectlens caller", daemon=True).start()
    listening = asyncio.create_task(listen())
    try:
        headers = [(b"content-type", b"application/octet-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while answer := await out.get():
            await send({"type": "http.response.body", "body": len(answer).to_bytes(8, "little") + answer, "more_body": True})
        # Whoever gets no end knows that something is missing.
        await send({"type": "http.response.body", "body": bytes(8) if answer is not None else b""})
    finally:
        listening.cancel()
        bridge.hang_up()


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _reason(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
