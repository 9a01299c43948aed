"""The HTTP interface: what answers, what stands before it, what becomes of errors. ``docs/serve.md`` has the whole contract.

    app = create_app(service, keys=keys, runs=Path("runs"))
    run(app)

The asyncio loop parses, waits and sends; whatever computes or reads the store does so in a thread. A reply has a thread of its
own while it has a place at the model; calls that wait for one have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from affectlens.concepts import ConceptSet
from affectlens.errors import AffectlensError, Busy, UnknownName
from affectlens.server import dashboard
from affectlens.server.answering import KINDS, answer_on
from affectlens.server.browsing import browse_on
from affectlens.server.calls import WrongField
from affectlens.server.catalog import Catalog
from affectlens.server.guard import Guard
from affectlens.server.keys import Key, Keyring
from affectlens.server.outlet import Events, listen
from affectlens.server.problems import SAID, SHAPE, Hung, failure, meaning
from affectlens.server.schemas import place_of
from affectlens.server.service import CLOSING, Service
from affectlens.server.settings import Settings
from affectlens.sharing import Cancelled

IDLE = 75
"""Seconds that a connection is kept without a request: more than proxies keep theirs, or it would be closed while it is used."""


def create_app(
    service: Service,
    *,
    keys: tuple[Key, ...] = (),
    runs: Path | None = None,
    concepts: ConceptSet | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: What answers; it is closed when the application ends.
        keys: Who may ask; none for everybody.
        runs: A folder of runs whose studies are shown.
        concepts: The set that the vectors are of; the bundled emotions by default.

    Raises:
        AffectlensError: It would listen to other machines without asking for a key.

    Example:
        >>> app = create_app(service)                         # doctest: +SKIP
    """
    settings = service.settings
    refuse_open(settings, keys)
    events = Events(buffer=settings.buffer, stall=settings.stall, heartbeat=settings.heartbeat, most=settings.listeners)
    service.listener, service.listening = events.tell, lambda: len(events) > 0
    workers = ThreadPoolExecutor(2 * settings.concurrency + 4, thread_name_prefix="affectlens reply")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        events.close()
        await run_in_threadpool(service.close)
        workers.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(
        title="affectlens",
        summary="Emotion dials and live readings behind an OpenAI-compatible API.",
        version="1",
        lifespan=lifespan,
        dependencies=[Depends(_known)],
        docs_url=None,
        redoc_url=None,
        responses={status: {"description": said} for status, said in SAID.items()},
        strict_content_type=False,  # the guard has looked at it already
    )
    app.state.service, app.state.events = service, events
    broken = _errors(app, service)
    answer_on(app, service, workers)
    browse_on(app, service, Catalog(service, concepts=concepts or ConceptSet.load("emotions"), runs=runs))
    _watched(app, service, events)
    app.include_router(dashboard.router())
    _documented(app)
    app.add_middleware(Guard, settings=settings, keys=Keyring(keys), broken=broken)
    return app


async def _known(request: Request) -> None:
    """Refuse a parameter of a query that a route does not know: a search without the word that was misspelt finds too much."""
    if not request.url.path.startswith("/v1/"):
        return
    names = [each.alias for each in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in names:
            raise WrongField(UnknownName("parameter", name[:60], names), name[:60])


def refuse_open(settings: Settings, keys: tuple[Key, ...]) -> None:
    """Refuse to answer other machines without asking for a key.

    Raises:
        AffectlensError: There is none.

    Example:
        >>> refuse_open(Settings(), ())
    """
    if not settings.loopback and not keys:
        raise AffectlensError(
            f"{settings.host} can be reached from other machines: name a file of keys with --api-keys (affectlens keys new makes "
            "one), or listen on 127.0.0.1"
        )


# ── errors ──


def _errors(app: FastAPI, service: Service) -> Callable[[Request], None]:
    """What becomes of errors; returns what counts a request that failed by a fault of ours."""

    def counted(request: Request, outcome: str) -> None:
        if (kind := KINDS.get(request.url.path)) is not None and request.method == "POST":
            service.metrics.ended(kind, outcome)

    def broken(request: Request) -> None:
        counted(request, "error")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        counted(request, "refused")
        message, param = place_of(error.errors(), error.body)
        return failure(400, message, param=param)

    @app.exception_handler(UnicodeEncodeError)
    async def half(request: Request, _: UnicodeEncodeError) -> Response:
        counted(request, "refused")
        return failure(400, "the body holds half a character (a lone surrogate): send whole ones")

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        said = {404: "there is no such path: see /openapi.json", 405: "this path does not take this method: see /openapi.json"}
        message = said.get(error.status_code, str(error.detail))
        return failure(error.status_code, message, headers=dict(error.headers or {}))

    @app.exception_handler(AffectlensError)
    async def wrong(request: Request, error: AffectlensError) -> Response:
        found, status, headers = meaning(error), meaning(error).status, {}
        counted(request, found.outcome)
        if isinstance(error, Busy):
            headers["Retry-After"] = str(math.ceil(error.after))
            status = 503 if service.draining else 429
        return failure(status, str(error), kind=found.type, code=found.code, param=found.param, headers=headers)

    @app.exception_handler(Cancelled)
    @app.exception_handler(Hung)
    async def left(request: Request, _: Exception) -> Response:
        counted(request, "cancelled")
        said = "the server ended this call"
        return failure(503, said, kind="server_error", headers={"Retry-After": "5"})

    return broken


# ── the server itself ──


def _watched(app: FastAPI, service: Service, events: Events) -> None:
    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.get("/v1/events", tags=["events"], response_class=StreamingResponse, responses=stream)
    async def follow() -> Response:
        """What happens, as it happens: `reply`, `token`, `alert` and `done`, as server-sent events."""
        if service.draining:
            raise Busy("the server is shutting down: try again when it is back", 5.0)
        return events.follow()

    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """The process is up."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    def ready() -> Response:
        """Whether it answers and keeps, part by part; 503 when it does not."""
        parts = service.ready
        waiting, live = service.engine.depth
        data = {"ready": all(parts.values()), **parts, "waiting": waiting, "live": live}
        return JSONResponse(data, status_code=200 if data["ready"] else 503)

    @app.get("/metrics", tags=["server"], response_class=Response)
    def metrics(request: Request) -> Response:
        """For Prometheus."""
        body, kind = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": kind})


def _documented(app: FastAPI) -> None:
    """The OpenAPI document, with errors as they are."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Error" not in schemas:
            schemas["Error"] = SHAPE
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    for status in map(str, SAID):
                        if status in operation["responses"]:
                            shape = {"schema": {"$ref": "#/components/schemas/Error"}}
                            operation["responses"][status]["content"] = {"application/json": shape}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


# ── running it ──


def run(app: FastAPI, *, ready: Callable[[str], None] = lambda address: None) -> None:
    """Listen until SIGTERM or SIGINT, then let replies end.

    Args:
        app: The application; the settings of its service say where it listens.
        ready: Called with the address once it listens.

    Raises:
        AffectlensError: The address is in use, or none of this machine.
    """
    import uvicorn

    service: Service = app.state.service
    settings = service.settings

    class Server(uvicorn.Server):
        """Says when it listens, and begins to drain at the signal; what uvicorn does at the end comes after the last reply."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Its own way raises the signal again at the end, as if the process had been killed by it.
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if not self.should_exit:
                ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            if not service.draining:
                service.draining = True
                app.state.events.close()
                app.state.ending = asyncio.get_running_loop().run_in_executor(None, service.drain, settings.drain)

    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="on",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=math.ceil(settings.drain + 2 * CLOSING),
    )
    try:
        listening = listen(settings.host, settings.port, stall=settings.stall)
    except OSError as error:
        raise AffectlensError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): choose another --port or --host"
        ) from None
    host, port = listening.getsockname()[:2]
    asyncio.run(Server(config).serve(sockets=[listening]))
