"""The routes that want the model: replies, streamed or whole, scores, and rules that are tried.

Each holds a place at the model, has a thread while the place is at work, and is over as soon as its caller hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from affectlens.errors import AffectlensError, Busy
from affectlens.server import shapes
from affectlens.server.calls import Call, Choice
from affectlens.server.outlet import EventStream, Outlet, gone
from affectlens.server.problems import Hung, NotThere, error_of, meaning
from affectlens.server.schemas import Asking, ChatRequest, CompletionRequest, ScoreRequest, TryRequest
from affectlens.server.service import CLOSING, Service
from affectlens.sharing import Cancelled, Place

LOG = logging.getLogger("affectlens.server")

KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "completion", "/v1/score": "score"}
"""What the endpoints are called in metrics."""

Answer = TypeVar("Answer")


class Answering:
    """Answers calls over HTTP.

    Args:
        service: What makes the answers.
        workers: Their threads: at least as many as replies are ever at work.
    """

    def __init__(self, service: Service, workers: ThreadPoolExecutor) -> None:
        self._service, self._settings, self._workers = service, service.settings, workers

    async def ask(self, request: Request, body: Asking) -> Response:
        """A reply in OpenAI's shape."""
        service = self._service
        if body.model != service.model:
            said = f"the model {body.model!r} is not served here: ask for {service.model!r}"
            raise NotThere(said, "model_not_found", "model")
        headers = {name: value for name in ("traceparent", "tracestate") if (value := request.headers.get(name))}
        # Not in the threads of those who look at the store: it may have stopped answering them.
        loop, checked = asyncio.get_running_loop(), partial(service.call, body, key=request.state.key, headers=headers)
        call = await loop.run_in_executor(self._workers, checked)
        replies = await loop.run_in_executor(self._workers, self._replies, call)
        if not body.stream:
            return await self._whole(request, call, replies)
        return await self._streamed(request, call, replies, bool(body.stream_options and body.stream_options.include_usage))

    def _replies(self, call: Call) -> list[shapes.Reply]:
        words = self._service.engine.vocabulary if call.sampling.logprobs is not None else ()
        return [shapes.Reply(call, each, vocabulary=words, facts=self._service.facts) for each in call.choices]

    # ── whole ──

    async def _whole(self, request: Request, call: Call, replies: list[shapes.Reply]) -> Response:
        def run(place: Place, choice: Choice, reply: shapes.Reply) -> None:
            for event in self._service.reply(call, choice, place):
                reply.keep(event)

        async def work(place: Place) -> None:
            loop = asyncio.get_running_loop()
            runs = [loop.run_in_executor(self._workers, run, place, *each) for each in zip(call.choices, replies, strict=True)]
            try:
                await asyncio.gather(*runs)
            except BaseException:
                place.cancel()  # the others need not go on
                await asyncio.gather(*runs, return_exceptions=True)
                raise

        await self.at_work(request, len(call.choices), work)
        return Response(shapes.plain(shapes.whole(call, replies)), media_type="application/json")

    async def at_work(self, request: Request, size: int, work: Callable[[Place], Awaitable[Answer]]) -> Answer:
        """Do something in a place of so many replies, for as long as the caller is there.

        Raises:
            Busy: There is no room.
            Hung: The caller has left; what ran was cancelled.
        """
        with self._service.open(size) as place:
            leaving = asyncio.ensure_future(gone(request.receive))
            working: asyncio.Future[Answer] | None = None
            try:
                await self._admitted(place, leaving)
                working = asyncio.ensure_future(work(place))
                await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    raise Hung
                return await working
            finally:
                place.cancel()
                leaving.cancel()
                if working is not None:
                    await asyncio.gather(working, return_exceptions=True)

    async def _admitted(self, place: Place, leaving: asyncio.Future[None]) -> None:
        """Wait until a place has come to the front of the queue."""
        ready = asyncio.wrap_future(place.ready)
        patience = max(0.0, place.left - CLOSING)  # the rest of its time is for a reply that has begun
        await asyncio.wait({ready, leaving}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            raise Hung
        if not ready.done():
            ready.cancel()
            raise Busy(f"no room was found within {self._settings.time_limit:g} seconds: try again later", 30.0)
        if ready.cancelled():
            raise Cancelled

    # ── streamed ──

    async def _streamed(self, request: Request, call: Call, replies: list[shapes.Reply], usage: bool) -> Response:
        kind, place = KINDS[request.url.path], self._service.open(len(call.choices))

        def left(why: str) -> None:
            if why == "slow":
                LOG.warning("%s is cut off: its reader was behind for %g s", call.id, self._settings.stall)
            if any(reply.ended is None for reply in replies):  # others have ended, and are counted
                self._service.metrics.ended(kind, "cancelled")
            place.cancel()
            outlet.close()

        outlet = Outlet[bytes | Exception | None](buffer=self._settings.buffer, stall=self._settings.stall, slow=place.cancel)
        leaving = asyncio.ensure_future(gone(request.receive))
        try:
            await self._admitted(place, leaving)
            opened = threading.Event()
            pairs = zip(call.choices, replies, strict=True)
            runs = [self._workers.submit(self._run, call, place, outlet, opened, *each, usage) for each in pairs]

            def said(_: Future[None]) -> None:
                if all(each.done() for each in runs):  # what is left to be sent needs no place, however slowly it is read
                    place.cancel()

            for each in runs:
                each.add_done_callback(said)
            # Until the first token is there an error still has a status of its own.
            taking = asyncio.ensure_future(outlet.take())
            await asyncio.wait({taking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                taking.cancel()
                raise Hung
            first = taking.result() or [Cancelled()]
            if failed := _first_error(first):
                raise failed
        except BaseException:
            place.cancel()
            outlet.close()
            raise
        finally:
            leaving.cancel()
        return EventStream(self._pieces(call, replies, place, outlet, first, usage), stall=self._settings.stall, left=left)

    def _run(
        self,
        call: Call,
        place: Place,
        outlet: Outlet[bytes | Exception | None],
        opened: threading.Event,
        choice: Choice,
        reply: shapes.Reply,
        usage: bool,
    ) -> None:
        """Generate a reply in a thread; None says that it is whole, an error that there is no more of it.

        The first choice opens the stream: the others wait with what they have until it has.
        """
        try:
            for event in self._service.reply(call, choice, place):
                if choice.index:
                    opened.wait()
                for chunk in reply.chunks(event):
                    outlet.put(shapes.sent({**chunk, "usage": None} if usage else chunk))
                opened.set()
            outlet.put(None)
        except Exception as error:
            with contextlib.suppress(Cancelled):  # nobody reads any more
                outlet.put(error)
        finally:
            opened.set()

    async def _pieces(
        self,
        call: Call,
        replies: list[shapes.Reply],
        place: Place,
        outlet: Outlet[bytes | Exception | None],
        first: list[bytes | Exception | None],
        usage: bool,
    ) -> AsyncIterator[bytes]:
        """What is sent: what waits goes out together, and at the end the usage and ``[DONE]``."""
        items: list[bytes | Exception | None] | None = first
        going = len(replies)
        try:
            while items is not None:
                out = b"".join(item for item in items if isinstance(item, bytes))
                if failed := _first_error(items):
                    yield out + self._failed(failed, call.kind) + shapes.DONE
                    return
                going -= items.count(None)
                if not going:
                    yield out + (shapes.sent(shapes.usage_chunk(call, replies)) if usage else b"") + shapes.DONE
                    return
                if out:
                    yield out
                items = await outlet.take()
            raise TimeoutError("the reader was behind for too long")
        finally:
            place.cancel()
            outlet.close()

    def _failed(self, error: Exception, kind: str) -> bytes:
        """What a stream says of an error that came too late for a status."""
        if isinstance(error, AffectlensError):
            found = meaning(error)
            said, outcome, kind_of, code, param = str(error), found.outcome, found.type, found.code, found.param
        elif isinstance(error, Cancelled):
            said, outcome, kind_of, code, param = "the server ended this reply", "cancelled", "server_error", None, None
        else:
            LOG.error("a stream failed", exc_info=error)
            said, outcome, kind_of, code, param = "the server failed: its log has the reason", "error", "server_error", None, None
        self._service.metrics.ended(kind, outcome)
        return shapes.sent(error_of(said, kind=kind_of, code=code, param=param))


def _first_error(items: list[bytes | Exception | None]) -> Exception | None:
    return next((item for item in items if isinstance(item, Exception)), None)


def answer_on(app: FastAPI, service: Service, workers: ThreadPoolExecutor) -> None:
    """Add the routes that want the model."""
    answering = Answering(service, workers)
    reply: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The reply; with `stream` it comes as server-sent events.",
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}},
        }
    }

    @app.post("/v1/chat/completions", tags=["replies"], responses=reply, response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a chat, as OpenAI's endpoint does, with emotions dialled, read and watched."""
        return await answering.ask(request, body)

    @app.post("/v1/completions", tags=["replies"], responses=reply, response_class=JSONResponse)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, as OpenAI's legacy endpoint does."""
        return await answering.ask(request, body)

    @app.post("/v1/score", tags=["readings"])
    async def score(request: Request, body: ScoreRequest) -> dict[str, Any]:
        """Read a text or a conversation: every token with its scores in z, and what the armed rules say."""
        loop = asyncio.get_running_loop()

        async def work(place: Place) -> dict[str, Any]:
            return await loop.run_in_executor(workers, lambda: service.score(body, place, key=request.state.key))

        return await answering.at_work(request, 1, work)

    @app.post("/v1/rules/try", tags=["rules"])
    async def try_rule(request: Request, body: TryRequest) -> dict[str, Any]:
        """What a rule would have done: on the neutral dialogues, where every alarm is false, and on the latest replies here."""
        loop = asyncio.get_running_loop()

        async def work(place: Place) -> dict[str, Any]:
            return await loop.run_in_executor(workers, lambda: service.armed.attempt(body.text, place))

        return await answering.at_work(request, 1, work)

    @app.get("/v1/models", tags=["replies"])
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{id:path}", tags=["replies"])
    async def model(id: str) -> dict[str, Any]:
        """One model."""
        if id != service.model:
            raise NotThere(f"the model {id[:200]!r} is not served here: ask for {service.model!r}", "model_not_found")
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": int(service.created.timestamp()), "owned_by": "affectlens"}
