"""``affectlens serve`` in a process of its own, what it takes up, and what sections of ``bench/reliability.py`` find."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from scipy.stats import linregress, t

from affectlens.calibration import Bounds, Calibration
from affectlens.engine import Readout, Where
from affectlens.engines.toy import ToyEngine
from affectlens.stats import Estimate, bootstrap
from affectlens.vectors import ConceptVectors

START = 300.0
"""Seconds after which a server that does not listen is taken for broken."""

TOY_STRENGTH = 0.15
"""The toy's safe range."""

_IMPATIENT = """
from functools import partial
from affectlens.server import settings
settings.Settings = partial(settings.Settings, stall={stall})
from affectlens.cli import main
main()
"""


class Server:
    """A server that runs until the block ends: by SIGTERM then, and its exit must be clean.

    Args:
        folder: What it writes; a server that begins again in the same folder finds its store there.
        vectors: Of which model.
        options: Of ``affectlens serve``.
        environment: Variables beside those of this process.
        stall: Seconds that a slow reader has, where they are not to be the server's own: there is no option for it.
        store: Its store; by default in the folder.

    Raises:
        RuntimeError: It does not start, or fails at its end.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        vectors: Path,
        environment: Mapping[str, str] | None = None,
        stall: float | None = None,
        store: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = store or str(folder / "traces.db")
        self.log = folder / "server.log"
        how = ["-m", "affectlens.cli"] if stall is None else ["-c", _IMPATIENT.format(stall=stall)]
        command = [sys.executable, *how, "serve", str(vectors), "--port", "0", "--store", self.store, *options]
        began = time.monotonic()
        with self.log.open("ab") as log:
            start = log.tell()
            env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        while not (match := re.search(rb"(\S+) at (http://\S+)/v1", said := self.log.read_bytes()[start:])):
            if self._process.poll() is not None or time.monotonic() - began > START:
                self.kill()
                raise RuntimeError(f"the server did not start: {said.decode(errors='replace')[-3000:]}")
            time.sleep(0.02)
        self.seconds = time.monotonic() - began
        """From its command to its first answer."""
        self.model, self.url = Path(match[1].decode()).name, match[2].decode()
        where = urlsplit(self.url)
        self.address = (str(where.hostname), int(where.port or 80))
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.stop()
        except RuntimeError:
            if kind is None:
                raise

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> float:
        """Seconds from SIGTERM to its end."""
        began = time.monotonic()
        if self.running:
            self._process.terminate()
        try:
            code = self._process.wait(120)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError("the server did not end within two minutes of SIGTERM") from None
        if code not in (0, -9):
            raise RuntimeError(f"the server ended with {code}: {self.log.read_text(errors='replace')[-3000:]}")
        return time.monotonic() - began

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def ready(self) -> tuple[int, dict[str, Any]]:
        status, body = self.get("/ready")
        return status, json.loads(body)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, by name and labels as they stand there."""
        lines = [line for line in self.get("/metrics")[1].decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def counted(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(value for key, value in self.metrics().items() if key.partition("{")[0] == name)

    def idle(self, seconds: float = 60.0) -> bool:
        """Whether nobody waits or has a place any more, before so long."""
        return until(lambda: (found := self.ready()[1])["live"] == found["waiting"] == 0, seconds) is not None

    @property
    def memory(self) -> float:
        """Resident, in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def until(true: Callable[[], object], seconds: float, *, every: float = 0.02) -> float | None:
    """Seconds until something is true; None when it is not within so many."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            return None
        time.sleep(every)
    return time.monotonic() - began


class Memory:
    """Resident memory of a server while something is done to it, against how much of that is done.

    Args:
        server: Whose.
        done: How many requests have been answered.
        every: Seconds between two looks.
    """

    def __init__(self, server: Server, done: Callable[[], int], *, every: float = 0.25) -> None:
        self.samples: list[tuple[int, float]] = []
        self._server, self._done, self._every = server, done, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._every):
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                self.samples.append((self._done(), self._server.memory))

    def few(self) -> list[tuple[int, float]]:
        """Some hundred of the samples, for the record."""
        return self.samples[:: max(1, len(self.samples) // 400)]

    def slope(self, *, after: float = 0.5, parts: int = 20) -> Estimate:
        """KB that each request leaves behind, by a line through the means of equal parts of what came after the warm-up.

        Neighbouring looks are alike: the interval is that of a line through the means of a few long parts.

        Args:
            after: The share of the requests that counts as warm-up.
            parts: How many parts.
        """
        done, used = np.array(self.samples).T
        begin, end = after * done[-1], done[-1]
        edges = np.linspace(begin, end, parts + 1)
        inside = [(done >= low) & (done <= high) for low, high in itertools.pairwise(edges)]
        points = [(done[part].mean(), 1024 * used[part].mean()) for part in inside if part.any()]
        if len(points) < 4 or points[0][0] == points[-1][0]:
            return Estimate(float("nan"), float("nan"), float("nan"), len(points), unit="KB")
        line = linregress(*np.array(points).T)
        wide = float(t.ppf(0.975, len(points) - 2) * line.stderr)
        return Estimate(float(line.slope), float(line.slope - wide), float(line.slope + wide), len(points), unit="KB")


# ── figures ──


def percentiles(values: Sequence[float], *percent: float) -> list[float]:
    """Percentiles; nan of nothing."""
    return [float(np.percentile(values, each)) if len(values) else float("nan") for each in percent]


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The median of the first over the second of pairs."""
    ratios = [a / b for a, b in pairs]
    return bootstrap(lambda index: median([ratios[i] for i in index]), len(ratios))


# ── what a section finds ──


@dataclass(frozen=True)
class Check:
    """One thing that was wanted, and what was found. ``met`` is None where the conditions of the question did not hold."""

    what: str
    wanted: str
    found: str
    met: bool | None


@dataclass(frozen=True)
class Section:
    """What a section found.

    Args:
        caption: What was done, in figures.
        checks: Its criteria.
        also: What else was measured, as it is printed.
        figures: Every number behind it.
    """

    caption: str
    checks: tuple[Check, ...]
    also: tuple[str, ...]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure.

    Args:
        folder: For everything that is written.
        short: The short form.
        toy: Folder of the toy's vectors.
        demo: Folder of the demo model's vectors; None without load-demo.
    """

    folder: Path
    short: bool
    toy: Path
    demo: Path | None

    def of(self, whole: Any, short: Any) -> Any:
        """The one or the other, by how thorough this is."""
        return short if self.short else whole

    def judged(self, met: bool) -> bool | None:
        """A verdict that needs many repetitions; none in the short form."""
        return None if self.short else met

    def at_most(self, limit: float, found: Estimate, unit: str = "") -> tuple[str, str, bool | None]:
        """What is wanted of an estimate, what it is, and whether its whole interval is so."""
        return f"≤ {limit:g}{unit} at the interval's end", str(found), self.judged(found.high <= limit)

    def place(self, name: str) -> Path:
        """An empty folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    @property
    def names(self) -> tuple[str, ...]:
        """The toy's emotions."""
        return ConceptVectors.load(self.toy).names


def toy_vectors(folder: Path) -> Path:
    """Vectors of the toy that are what was planted, with a safe range by hand: nothing needs to be fitted for this."""
    engine = ToyEngine()
    truth, info = engine.truth, engine.info
    layers, n = info.n_layers, len(truth.names)
    words = [
        "the old door by the sea was open and nobody said a word",
        "she took the book and went to the station before the hour",
    ]
    norms = np.mean([each.values for each in engine.read(words, Readout(tuple(range(layers)), Where(after=1), "norm"))], axis=0)
    vectors = ConceptVectors(
        names=truth.names,
        layers=tuple(range(layers)),
        layer=4,
        directions=truth.directions,
        norms=np.ones((layers, n), np.float32),
        centre=truth.directions.mean(axis=1),
        residual_norms=norms.astype(np.float32),
        neutral=tuple(np.zeros((0, info.width), np.float32) for _ in range(layers)),
        baseline=np.tile(np.array([0.0, 0.1], np.float32), (layers, n, 1)),
        stability=np.ones((layers, n), np.float32),
        counts=np.ones(n, np.int64),
        model=asdict(info),
        method={"source": "planted"},
    )
    safe = dict.fromkeys(truth.names, (-TOY_STRENGTH, TOY_STRENGTH))
    calibration = Calibration(3, 4, safe, truth.names, Bounds(), info.fingerprint)
    return replace(vectors, calibration=calibration).save(folder)
