"""Our server in a thread of the test, with the demo model on vLLM behind it and a few random directions as vectors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.engine import Engine
from affectlens.monitor import Monitor
from affectlens.server.app import create_app
from affectlens.server.metrics import Metrics
from affectlens.server.outlet import listen
from affectlens.server.service import Service
from affectlens.server.settings import Settings
from affectlens.server.store import Store
from affectlens.sharing import SharedEngine
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors

NAMES = ("calm", "desperate", "happy")


def vectors_of(engine: Engine) -> ConceptVectors:
    """Random directions at every layer, which are as good as any to be steered along and read."""
    rng = np.random.default_rng(2)
    n, layers, width = len(NAMES), engine.info.n_layers, engine.info.width
    directions = rng.normal(size=(layers, n, width))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return ConceptVectors(
        names=NAMES,
        layers=tuple(range(layers)),
        layer=engine.info.default_layer,
        directions=directions.astype(np.float32),
        norms=np.ones((layers, n), np.float32),
        centre=np.zeros((layers, width), np.float32),
        residual_norms=np.linspace(60, 600, layers, dtype=np.float32),
        neutral=tuple(np.zeros((0, width), np.float32) for _ in range(layers)),
        baseline=np.tile(np.array([0.0, 1.0], np.float32), (layers, n, 1)),
        stability=np.ones((layers, n), np.float32),
        counts=np.full(n, 20),
        model=asdict(engine.info),
    )


@contextlib.contextmanager
def serving_demo(folder: Path, engine: Engine) -> Iterator[tuple[str, ConceptVectors]]:
    """The address of a server, until the block ends."""
    vectors = vectors_of(engine)
    baseline = Baseline.measure(engine, neutral_dialogues(engine)[:12], probe=Probe(vectors), source="neutral dialogues")
    settings = Settings(port=0, drain=1.0, allow_unsafe=True, queue=500)
    shared = SharedEngine(engine, live=settings.concurrency, queue=settings.queue, deadline=settings.time_limit)
    monitor = Monitor(vectors, baseline)
    metrics: Any = Metrics(NAMES, rules=[], depth=lambda: shared.depth)
    service = Service(shared, monitor, Store(str(folder / "traces.db")), settings=settings, source="", metrics=metrics)
    listening = listen("127.0.0.1", 0, stall=settings.stall)
    config = uvicorn.Config(create_app(service), log_level="warning", ws="none", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="test server")
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive(), "the server did not start"
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", vectors
    finally:
        server.should_exit = True
        thread.join(60)
