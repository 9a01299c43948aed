"""A real server in a thread of the test, on a free port, with the toy behind it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.engine import Engine
from affectlens.engines.toy import ToyEngine
from affectlens.monitor import Monitor
from affectlens.server.app import create_app
from affectlens.server.keys import Key
from affectlens.server.metrics import Metrics
from affectlens.server.outlet import listen
from affectlens.server.service import Service
from affectlens.server.settings import Settings
from affectlens.server.store import Store
from affectlens.sharing import SharedEngine
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from planted import toy_bench, with_calibration

HI = [{"role": "user", "content": "the old door"}]


@cache
def toy_vectors() -> ConceptVectors:
    """Vectors of the toy, with a safe range of 0.15 in either direction."""
    return with_calibration(toy_bench(0)).vectors


@cache
def toy_baseline() -> Baseline:
    engine = ToyEngine()
    return Baseline.measure(engine, neutral_dialogues(engine), probe=Probe(toy_vectors()), source="neutral dialogues")


class Slow(ToyEngine):
    """The toy, which takes its time for each token."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def _forward(self, ids: Any, *rest: Any) -> Any:
        if len(ids) == 1:
            time.sleep(self.seconds)
        return super()._forward(ids, *rest)


@dataclass
class Running:
    """A server that runs: where it is, and what it is made of."""

    url: str
    service: Service
    server: uvicorn.Server
    client: httpx.Client

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, **body: Any) -> dict[str, Any]:
        """A plain answer."""
        answer = self.post("/v1/chat/completions", {"model": "toy", "messages": HI, "max_tokens": 20, "seed": 3, **body})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nobody has a place any more, before so long."""
        end = time.monotonic() + seconds
        while (depth := self.service.engine.depth) != (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        return depth == (0, 0)


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    engine: Engine | None = None,
    rules: Any = (),
    keys: tuple[Key, ...] = (),
    runs: Path | None = None,
    vectors: ConceptVectors | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve the toy until the block ends."""
    folder.mkdir(exist_ok=True)
    chosen = Settings(port=0, **{"drain": 1.0, **settings})
    shared = SharedEngine(engine or ToyEngine(), live=chosen.concurrency, queue=chosen.queue, deadline=chosen.time_limit)
    monitor = Monitor(vectors or toy_vectors(), toy_baseline(), rules=rules)
    store = Store(str(folder / "traces.db"))
    metrics = Metrics(["calm", "desperate"], rules=[each.rule.name for each in monitor.policies], depth=lambda: shared.depth)
    service = Service(shared, monitor, store, settings=chosen, source="runs/first", metrics=metrics)
    app = create_app(service, keys=keys, runs=runs)
    listening = listen("127.0.0.1", 0, stall=chosen.stall)
    config = uvicorn.Config(app, log_level="warning", ws="none", server_header=False, timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="test server")
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive(), "the server did not start"
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        headers = {}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
            yield Running(url, service, server, client)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"


def uncalibrated() -> ConceptVectors:
    return replace(toy_vectors(), calibration=None)
