"""Whether a server holds: ``affectlens serve`` in a process of its own, under load, through faults, against those who mean it harm.

    python bench/reliability.py                          every section; about an hour on two cores
    python bench/reliability.py --only load-toy kill     these
    python bench/reliability.py --quick                  a short form of all but load-demo: does everything still work?

Each section is a function of its name; its docstring says what is done and, under "Met when", what was fixed before it was first
run. Nothing is left out of what is counted. Results are kept in ``bench/results/reliability.json``, section by section;
``bench/table.py`` writes them into ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import itertools
import json
import os
import random
import resource
import select
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from affectlens.calibration import Bounds, Calibration  # noqa: E402
from affectlens.engine import open_engine  # noqa: E402
from affectlens.engines.toy import ToyEngine  # noqa: E402
from affectlens.runs import provenance, read_json, write_json  # noqa: E402
from affectlens.server.records import Record  # noqa: E402
from affectlens.server.store import Store  # noqa: E402
from affectlens.stats import Estimate, bootstrap  # noqa: E402
from affectlens.vectors import ConceptVectors  # noqa: E402
from extraction import machine, say  # noqa: E402
from hostile import KINDS, attack  # noqa: E402
from running import (  # noqa: E402
    CHAT,
    Answer,
    Asked,
    Caller,
    Memory,
    Server,
    begin,
    crowd,
    median,
    mixed,
    percentiles,
    unending,
    until,
)

RESULT = HERE / "results" / "reliability.json"
COMMIT, STALL = 5.0, 30.0
"""The server's own: how long the end of a reply waits for the store, and how long a reader may take nothing."""

TOY_STRENGTH = 0.15


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
        quick: The short form.
        toy: Folder of the toy's vectors.
        demo: Folder of the demo model's vectors.
        address: A server that runs already, for sections of the short form that need no options of their own.
    """

    folder: Path
    quick: bool
    toy: Path
    demo: Path

    def of(self, whole: Any, short: Any) -> Any:
        """The one or the other, by how thorough this is."""
        return short if self.quick else whole

    def place(self, name: str) -> Path:
        """An empty folder."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def toy_vectors(folder: Path) -> Path:
    """Vectors of the toy that are what was planted, with a safe range by hand: nothing needs to be fitted for this."""
    engine = ToyEngine()
    truth, info = engine.truth, engine.info
    layers, n = info.n_layers, len(truth.names)
    from affectlens.engine import Readout, Where

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


# ── load ──


def load_toy(setting: Setting) -> Section:
    """64 callers, 2,000 requests that differ in everything, on the toy; then each of them again, alone.

    Steering, sampling, n, comparisons, streams and plain answers, rules that stop and steer, readings, log-probabilities. 32
    replies at once, 16 may wait: those who come too late come again after Retry-After. Afterwards one caller asks everything
    again, one request at a time.

    Met when: every request has a whole answer in its own shape (no lost, no cut, no mixed-up piece); every answer is equal, and
    every stored trace equal to the bit, to that of the same request alone, as far as the engine says that company changes no
    bit; every reply is in the store; memory grows by less than 2 KB a request after the first half (the record of a
    reply alone would be 10), by the upper end of the interval; nothing is left at work; the server ends cleanly.
    """
    requests, longest = setting.of(2000, 60), setting.of(24, 8)
    return _load(setting, "toy", setting.toy, requests=requests, again=requests, longest=longest, growth=2.0)


def load_demo(setting: Setting) -> Section:
    """The same on the demo model, with replies of at most 8 tokens; 200 of the requests, drawn by a seed, are asked again alone.

    Met when: as on the toy, with 20 KB a request, since the scores of 171 emotions alone are that much.
    """
    requests = setting.of(2000, 24)
    return _load(setting, "smollm2-135m", setting.demo, requests=requests, again=setting.of(200, 8), longest=8, growth=20.0)


def _load(setting: Setting, model: str, vectors: Path, *, requests: int, again: int, longest: int, growth: float) -> Section:
    loaded = ConceptVectors.load(vectors)
    exact = open_engine(model).session().exact
    names, strength = loaded.names, TOY_STRENGTH if loaded.calibration else 0.05
    asked = [mixed(i, model=model, names=names, longest=longest, strength=strength) for i in range(requests)]
    options = ["--concurrency", "32", "--queue", "16", *([] if loaded.calibration else ["--allow-unsafe"])]
    sample = sorted(random.Random(1).sample(range(requests), again))
    with Server(setting.place(f"load-{model}"), *options, vectors=vectors) as server:
        done: list[Answer] = []
        with Memory(server, lambda: len(done)) as memory:
            began = time.monotonic()
            together = crowd(server, asked, callers=64, answered=done.append)
            seconds = time.monotonic() - began
            alone = crowd(server, [asked[i] for i in sample], callers=1, answered=done.append)
        idle, lost = server.idle(), server.counted("affectlens_store_lost_total")
        with Store(server.store, new=False) as store:
            kept = store.count()
            traces = {each.id: each for each in store.records()}
        server.stop()
    broken = [f"{each.asked.number}: {problem}" for each in [*together, *alone] if each.problems for problem in each.problems]
    pairs = list(zip([together[i] for i in sample], alone, strict=True))
    unlike = [one.asked.number for one, other in pairs if one.facts != other.facts]
    bits = [
        one.asked.number
        for one, other in pairs
        if not all(_same(traces.get(a.trace), traces.get(b.trace)) for a, b in zip(one.replies, other.replies, strict=True))
    ]
    for number in unlike[:5]:
        say(f"unlike: {json.dumps(asked[number].body)}")
    absent = [reply.trace for each in [*together, *alone] for reply in each.replies if reply.trace not in traces]
    expected = sum(each.replies for each in asked) + sum(asked[i].replies for i in sample)
    slope = memory.slope()
    crowded = [traces[reply.trace] for each in together for reply in each.replies if reply.trace in traces]
    first = [each.first for each in together if each.first is not None]
    tokens = sum(record.usage["completion_tokens"] for record in crowded)
    p50, p95 = percentiles(first, 50, 95)
    whole = percentiles([each.total for each in together], 50, 95)
    busy = sum(each.busy for each in together)
    company = median([record.company for record in crowded])
    streams = sum(bool(each.body.get("stream")) for each in asked)
    checks = (
        Check("answers that are lost, cut or mixed up", "0", f"{len(broken)} of {len(together) + len(alone)}", not broken),
        Check(
            "answers unlike that of the same request alone",
            "0, as far as company changes no bit",
            f"{len(unlike)} of {len(pairs)}" if exact else f"{len(unlike)} of {len(pairs)}; the engine promises nothing here",
            not unlike if exact else None,
        ),
        Check("stored traces unlike those alone in any bit", "0", f"{len(bits)} of {len(pairs)}", not bits if exact else None),
        Check(
            "replies that are not in the store", "0", f"{len(absent)} of {expected}", not absent and kept == expected and not lost
        ),
        Check("memory that a request leaves behind", f"< {growth:g} KB at the interval's end", f"{slope}", slope.high < growth),
        Check("nothing at work or waiting at the end; clean exit", "yes", "yes" if idle else "no", idle),
    )
    also = (
        f"Time to the first token of {len(first)} streams: median {p50:.2f} s, 95th percentile {p95:.2f} s, waiting included; whole "
        f"answers {whole[0]:.2f} s and {whole[1]:.2f} s.",
        f"{tokens / seconds:,.0f} tokens a second in {seconds:,.0f} s; a reply shared its passes with {company - 1:g} others (median).",
        f"{busy} times a caller was told to come again (429), and did.",
        f"Resident memory {memory.samples[0][1]:.0f} MB at the start, {memory.samples[-1][1]:.0f} MB at the end.",
    )
    caption = (
        f"{model}: {len(asked):,} requests of 64 callers ({streams:,} streams; {sum(each.replies for each in asked):,} replies of at "
        f"most {longest} tokens), {len(pairs):,} of them asked again alone."
    )
    figures = {
        "exact": exact,
        "requests": len(asked),
        "again": len(pairs),
        "broken": broken[:50],
        "unlike": unlike,
        "bits": bits,
        "absent": absent[:50],
        "slope_kb": asdict(slope),
        "memory": memory.samples[:: max(1, len(memory.samples) // 400)],
        "first": [p50, p95],
        "whole": whole,
        "tokens_per_second": tokens / seconds,
        "busy": busy,
        "company": company,
    }
    return Section(caption, checks, also, figures)


def _same(one: Record | None, other: Record | None) -> bool:
    """Whether two records are equal to the bit in all that is the reply's own."""
    if one is None or other is None:
        return False
    for name in ("scores", "visible", "gap", "other", "steered"):
        a, b = getattr(one.trace, name), getattr(other.trace, name)
        if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or a.tobytes() != b.tobytes())):
            return False
    alerts = [[replace(alert, conversation="") for alert in each.trace.alerts] for each in (one, other)]
    own = [(each.text, each.finish, each.usage, each.request, each.trace.layout, each.trace.steering) for each in (one, other)]
    return own[0] == own[1] and alerts[0] == alerts[1]


# ── kill -9 ──


def kill(setting: Setting) -> Section:
    """Ten times: 16 callers, and kill -9 in the middle; the server begins again on the same store.

    Acknowledged is what a caller saw whole: a plain answer, or the last chunk of a choice.

    Met when: whatever was acknowledged is in the store, with its text; SQLite finds its file sound; replies were in
    the making at every kill; the server listens again within twice the time of its first start and a second.
    """
    rounds = setting.of(10, 1)
    folder = setting.place("kill")
    requests = iter(mixed(i, model="toy", names=_names(setting), longest=40, strength=TOY_STRENGTH) for i in itertools.count())
    rng = random.Random(2)
    options = ["--concurrency", "16", "--queue", "16"]
    if not setting.quick:
        Server(folder, *options, vectors=setting.toy).stop()  # measures the baseline, which later starts find
    server = Server(folder, *options, vectors=setting.toy)
    first, starts = server.seconds, list[float]()
    acknowledged: dict[str, str] = {}
    unfinished, unsound, missing, other = list[int](), list[str](), list[str](), list[str]()
    for _ in range(rounds):
        answers: list[Answer] = []
        with unending(server, requests, callers=16, kept=answers):
            until(lambda answers=answers: len(answers) >= 20, 120)
            time.sleep(rng.uniform(0.2, 2.0))
            server.kill()
        unfinished.append(sum(bool(each.problems) and any(reply.text for reply in each.replies) for each in answers))
        acknowledged |= {reply.trace: reply.text for each in answers for reply in each.replies if reply.finish is not None}
        server = Server(folder, *options, vectors=setting.toy)
        starts.append(server.seconds)
        with contextlib.closing(sqlite3.connect(server.store)) as connection:
            said = [row[0] for row in connection.execute("PRAGMA integrity_check")]
            unsound += [each for each in said if each != "ok"] + list(map(str, connection.execute("PRAGMA foreign_key_check")))
    missing, other = _not_kept(server.store, acknowledged)
    answered = Caller(server).ask(next(requests))
    server.stop()
    limit = 2 * first + 1
    checks = (
        Check("acknowledged replies that are not in the store", "0", f"{len(missing)} of {len(acknowledged):,}", not missing),
        Check("acknowledged replies with another text there", "0", f"{len(other)}", not other),
        Check("the database is sound", f"{rounds} of {rounds} times", "it is" if not unsound else unsound[0], not unsound),
        Check("streams in the making at a kill", "> 0 each time", f"{min(unfinished)} to {max(unfinished)}", min(unfinished) > 0),
        Check(
            "it listens again",
            f"within {limit:.1f} s (twice its first start and a second)",
            f"after {min(starts):.1f} to {max(starts):.1f} s",
            max(starts) <= limit and not answered.problems,
        ),
    )
    figures = {"first": first, "starts": starts, "acknowledged": len(acknowledged), "unfinished": unfinished, "missing": missing}
    return Section(
        f"{rounds} kills, {len(acknowledged):,} acknowledged replies.",
        checks,
        ("The process is killed, the machine is not: that a commit outlives a power cut rests on SQLite's synchronous=FULL.",),
        figures,
    )


def _names(setting: Setting) -> Sequence[str]:
    return ConceptVectors.load(setting.toy).names


def _not_kept(store: str, acknowledged: dict[str, str]) -> tuple[list[str], list[str]]:
    """Which replies a store lacks, and which it has with another text."""
    with Store(store, new=False) as opened:
        kept = {record.id: record.text for record in opened.records()}
    missing = [id for id in acknowledged if id not in kept]
    return missing, [id for id, text in acknowledged.items() if id in kept and kept[id] != text]


# ── the store is not there ──


@dataclass(frozen=True)
class Fault:
    """Something that happens to a store: what it is called, how it is done and undone, and where the store is."""

    name: str
    store: str
    do: Callable[[Server], None]
    undo: Callable[[Server], None]


def disk(setting: Setting) -> Section:
    """The disk of the store is full for ten seconds, with 8 callers: a small tmpfs, or a limit on the size of files.

    Met when: no reply fails; /ready says 503 and /metrics say so within ten seconds; the slowest reply while it is full takes at
    most the slowest before and the five seconds that its end may wait for the store; half as many replies a second come as before
    at least; afterwards nothing waits, and every reply is in the store with its text.
    """
    folder = setting.place("disk")
    with contextlib.ExitStack() as stack:
        where = folder / "small"
        where.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(where)]
        if not setting.quick and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            stack.callback(subprocess.run, ["umount", "-l", str(where)], check=False)
            filler = where / "filler"

            def fill(_: Server) -> None:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(b"\0" * 4096)

            fault = Fault("full tmpfs of 64 MB", str(where / "traces.db"), fill, lambda _: filler.unlink())
        else:
            path = folder / "traces.db"

            def limit(server: Server) -> None:
                largest = max(each.stat().st_size for each in folder.glob("traces.db*"))
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

            def lift(server: Server) -> None:
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

            fault = Fault("files that may not grow (RLIMIT_FSIZE)", str(path), limit, lift)
        return _outages(setting, folder, [fault])


def database(setting: Setting) -> Section:
    """The database goes and comes back, with 8 callers: PostgreSQL is killed and started again ten seconds later; it stops
    answering for ten seconds (SIGSTOP); the SQLite file is moved away and put back.

    Met when: as for a full disk.
    """
    folder = setting.place("database")
    moved = folder / "moved"

    def away(_: Server) -> None:
        moved.mkdir()
        for each in folder.glob("traces.db*"):
            each.rename(moved / each.name)

    def back(_: Server) -> None:
        for each in folder.glob("traces.db*"):
            each.unlink()
        for each in moved.iterdir():
            each.rename(folder / each.name)

    faults = [Fault("SQLite file moved away", str(folder / "traces.db"), away, back)]
    if setting.quick or not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return _outages(setting, folder, faults)
    from stored import Cluster

    cluster = Cluster()
    try:

        def signalled(name: str) -> Callable[[Server], None]:
            return lambda _: subprocess.run(["pkill", name, "-f", f"^(postgres|{cluster._bin}/postgres)"], check=True) and None

        faults += [
            Fault("PostgreSQL killed", cluster.database(), lambda _: cluster.stop(), lambda _: cluster.start()),
            Fault("PostgreSQL stopped answering", cluster.database(), cluster.freeze, cluster.thaw),
        ]
        return _outages(setting, folder, faults)
    finally:
        cluster.remove()
