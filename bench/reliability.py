"""Whether a server holds: ``affectlens serve`` in a process of its own, under load, through faults, under attack.

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
import inspect
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from affectlens.calibration import Bounds, Calibration  # noqa: E402
from affectlens.engine import Readout, Where, open_engine  # noqa: E402
from affectlens.engines.toy import ToyEngine  # noqa: E402
from affectlens.runs import provenance, read_json, write_json  # noqa: E402
from affectlens.server.records import Record  # noqa: E402
from affectlens.server.store import Store  # noqa: E402
from affectlens.stats import Estimate, bootstrap  # noqa: E402
from affectlens.vectors import ConceptVectors  # noqa: E402
from extraction import machine, say  # noqa: E402
from hostile import KINDS, Attack, attack  # noqa: E402
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

PATIENCE = 10.0
"""Seconds after which an answer to a hostile request is late."""

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
        demo: Folder of the demo model's vectors; None without load-demo.
    """

    folder: Path
    quick: bool
    toy: Path
    demo: Path | None

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
    assert setting.demo is not None, "asked for with --demo"
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
        f"Time to the first token of {len(first)} streams: median {p50:.2f} s, 95th percentile {p95:.2f} s, waiting included; "
        f"whole answers {whole[0]:.2f} s and {whole[1]:.2f} s.",
        f"{tokens / seconds:,.0f} tokens a second in {seconds:,.0f} s; a reply had the company of {company - 1:g} others (median).",
        f"{busy} times a caller was told to come again (429), and did.",
        f"Resident memory {memory.samples[0][1]:.0f} MB at the start, {memory.samples[-1][1]:.0f} MB at the end.",
    )
    caption = (
        f"{model}: {len(asked):,} requests of 64 callers ({streams:,} streams, {sum(each.replies for each in asked):,} replies of "
        f"at most {longest} tokens), {len(pairs):,} of them asked again alone."
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
        "memory": memory.few(),
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
    names = _names(setting)
    requests = (mixed(i, model="toy", names=names, longest=40, strength=TOY_STRENGTH) for i in itertools.count())
    rng = random.Random(2)
    options = ["--concurrency", "16", "--queue", "16"]
    if not setting.quick:
        Server(folder, *options, vectors=setting.toy).stop()  # measures the baseline, which later starts find
    server = Server(folder, *options, vectors=setting.toy)
    first, starts = server.seconds, list[float]()
    acknowledged: dict[str, str] = {}
    unfinished, unsound = list[int](), list[str]()
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

        def signalled(number: signal.Signals) -> Callable[[Server], None]:
            def send(_: Server) -> None:
                for pid in _family(cluster):
                    os.kill(pid, number)

            return send

        faults += [
            Fault("PostgreSQL killed", cluster.database(), lambda _: cluster.stop(), lambda _: cluster.start()),
            Fault("PostgreSQL does not answer", cluster.database(), signalled(signal.SIGSTOP), signalled(signal.SIGCONT)),
        ]
        return _outages(setting, folder, faults)
    finally:
        cluster.remove()


def _family(cluster: Any) -> list[int]:
    """The processes of a PostgreSQL: the one that was started, and those that it started."""
    main = int((Path(cluster.data) / "postmaster.pid").read_text().split()[0])
    return [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]


def _outages(setting: Setting, folder: Path, faults: Sequence[Fault]) -> Section:
    checks, also, figures = list[Check](), list[str](), dict[str, Any]()
    before, during = setting.of((10.0, 10.0), (1.5, 2.0))
    for number, fault in enumerate(faults):
        requests = (mixed(i, model="toy", names=_names(setting), longest=12, strength=TOY_STRENGTH) for i in itertools.count())
        own = folder / f"server{number}"
        with Server(own, "--concurrency", "16", vectors=setting.toy, store=fault.store) as server:
            answers: list[Answer] = []
            with unending(server, requests, callers=8, kept=answers):
                time.sleep(before)
                broken = time.monotonic()
                fault.do(server)
                noticed = until(lambda server=server: _not_ready(server), 30.0, every=0.1)
                told = {name: server.metrics()[f"affectlens_store_{name}"] for name in ("up", "waiting_records")}
                time.sleep(max(0.0, broken + during - time.monotonic()))
                mended = time.monotonic()
                fault.undo(server)
                back = until(lambda server=server: server.ready()[0] == 200 and not _waiting(server), 60.0, every=0.1)
                time.sleep(setting.of(2.0, 0.2))
            server.idle()
            lost, waiting = server.counted("affectlens_store_lost_total"), _waiting(server)
            acknowledged = {reply.trace: reply.text for each in answers for reply in each.replies if reply.finish is not None}
            missing, other = _not_kept(fault.store, acknowledged)
        failed = [problem for each in answers for problem in each.problems]
        well = [each.total for each in answers if each.began + each.total < broken]
        ill = [each.total for each in answers if broken <= each.began < mended]
        ends = [each.began + each.total for each in answers]
        rates = [sum(a <= end < b for end in ends) / (b - a) for a, b in ((broken - before, broken), (broken, mended))]
        slowest, took = max(well, default=0.0) + COMMIT, max(ill, default=0.0)
        seen = "never" if noticed is None else f"after {noticed:.1f} s, {told['waiting_records']:.0f} records waiting"
        outcome = {
            "requests that failed": ("0", f"{len(failed)} of {len(answers)}", not failed),
            "/ready and /metrics say so": (
                "within 10 s",
                seen,
                noticed is not None and noticed <= 10 and (told["up"] == 0 or told["waiting_records"] > 0),
            ),
            f"the slowest of {len(ill)} replies meanwhile": (f"{slowest:.1f} s at most", f"{took:.1f} s", 0 < took <= slowest),
            "replies a second meanwhile": (f"half of {rates[0]:.1f} at least", f"{rates[1]:.1f}", rates[1] >= rates[0] / 2),
            "acknowledged replies missing or altered afterwards": (
                "0",
                f"{len(missing) + len(other)} of {len(acknowledged):,}",
                not (missing or other or lost or waiting),
            ),
        }
        checks += [Check(f"{fault.name}: {what}", *found) for what, found in outcome.items()]
        also.append(f"{fault.name}: what waited was written {'never' if back is None else f'{back:.1f} s after it was back'}.")
        figures[fault.name] = {"noticed": noticed, "told": told, "back": back, "well": well, "ill": ill, "rates": rates}
        figures[fault.name] |= {"failed": failed[:20], "missing": missing, "other": other, "lost": lost, "answers": len(answers)}
    return Section(f"8 callers; the store is away for {during:g} s.", tuple(checks), tuple(also), figures)


def _not_ready(server: Server) -> bool:
    status, parts = server.ready()
    return status == 503 and not parts["store"]


def _waiting(server: Server) -> float:
    return server.counted("affectlens_store_waiting_records")


# ── a webhook that hangs ──


class _Target:
    """Where webhooks go: one that answers at once, or takes everything and never answers."""

    def __init__(self, *, hangs: bool) -> None:
        self.took = 0
        over = self._over = threading.Event()
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                target.took += 1
                if hangs:
                    over.wait()
                    return
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/alarms"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> _Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


def webhook(setting: Setting) -> Section:
    """Two servers with ten rules each that fire in every reply: the alarms of one go to a target that takes them and never
    answers, those of the other to one that answers at once. The same request goes to both, in turns, 200 times.

    Met when: a reply takes at most 5 % longer where the target hangs, by the upper end of the interval of the median ratio; every
    alarm that was not delivered is counted (waiting, given up, dropped); the server with the hanging target ends within 20 seconds
    of SIGTERM.
    """
    pairs = setting.of(200, 12)
    names = _names(setting)
    folder = setting.place("webhook")
    with contextlib.ExitStack() as stack:
        servers, targets = list[Server](), list[_Target]()
        for kind in ("hangs", "answers"):
            target = stack.enter_context(_Target(hangs=kind == "hangs"))
            rules = folder / f"{kind}.toml"
            actions = f'[{{ do = "webhook", url = "{target.url}", secret = "ALARM_KEY" }}]'
            when = [f"rule {i}: {names[i % len(names)]} > -{50 + i}" for i in range(10)]
            rules.write_text("".join(f'[[rules]]\nwhen = "{each}"\nactions = {actions}\n' for each in when))
            server = Server(folder / kind, "--rules", str(rules), vectors=setting.toy, environment={"ALARM_KEY": "x"})
            servers.append(stack.enter_context(server))
            targets.append(target)
        callers = [stack.enter_context(Caller(server)) for server in servers]
        rng = random.Random(3)
        times: list[tuple[float, float]] = []
        failed = 0
        for i in range(-3, pairs):
            took = {}
            for which in rng.sample([0, 1], 2):
                answer = callers[which].ask(_stream(f"case {i}", i, tokens=24))
                took[which] = answer.total
                failed += bool(answer.problems)
            if i >= 0:  # the first ones warm up
                times.append((took[0], took[1]))
        fired = [round(server.counted("affectlens_alerts_total")) for server in servers]
        until(lambda: targets[1].took >= fired[1], 30)
        counts = [{key: n for key, n in server.metrics().items() if key.startswith("affectlens_webhook")} for server in servers]
        ended = servers[0].stop()
    ratio = _ratio(times)
    undelivered = [sum(each.values()) for each in counts]
    checks = (
        Check("time of a reply where the target hangs, over that where it answers", *_at_most(1.05, ratio)),
        Check("replies that failed", "0", f"{failed}", not failed),
        Check(
            "alarms that are counted as not delivered",
            f"all {fired[0]:,} where the target hangs, none elsewhere",
            f"{undelivered[0]:,.0f}, and {undelivered[1]:,.0f} elsewhere",
            undelivered == [fired[0], 0] and fired[0] > 0 and targets[1].took == fired[1],
        ),
        Check("it ends in spite of the hanging target", "within 20 s", f"after {ended:.1f} s", ended <= 20),
    )
    figures = {
        "times": times,
        "fired": fired,
        "counts": counts,
        "delivered": targets[1].took,
        "ended": ended,
        "ratio": asdict(ratio),
    }
    return Section(f"{pairs} requests to both servers, {fired[0]:,} alarms each.", checks, (), figures)


def _stream(words: str, seed: int, *, tokens: int, **more: Any) -> Asked:
    messages = [{"role": "user", "content": words}]
    return Asked(seed, CHAT, {"model": "toy", "messages": messages, "max_tokens": tokens, "seed": seed, "stream": True, **more})


def _ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """The median of the first over the second of pairs."""
    ratios = [a / b for a, b in pairs]
    return bootstrap(lambda index: median([ratios[i] for i in index]), len(ratios))


def _at_most(limit: float, found: Estimate) -> tuple[str, str, bool]:
    """What is wanted of an estimate, what it is, and whether its whole interval is so."""
    return f"≤ {limit:g} at the interval's end", str(found), found.high <= limit


# ── malformed and hostile requests ──


def fuzz(setting: Setting) -> Section:
    """100,000 malformed and hostile requests (``bench/hostile.py``) over kept-alive connections from four threads.

    Met when: no status is 5xx; no connection ends without the answer that has to come; every answer comes within ten seconds;
    a refusal by the application has OpenAI's shape; memory grows by less than 0.1 KB a request after the first half, by the
    upper end of the interval; the server is ready afterwards, nothing is at work, and a request has the answer it had before.
    """
    number = setting.of(100_000, 1000)
    counted: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    lock, numbers = threading.Lock(), iter(range(number))
    with Server(setting.place("fuzz"), vectors=setting.toy) as server:

        def work() -> None:
            nonlocal slowest
            attacker = _Attacker(server)
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return attacker.leave()
                case, began = attack(i), time.monotonic()
                status, problem = attacker.throw(case)
                took = time.monotonic() - began
                with lock:
                    counted[case.kind, status] += 1
                    slowest = max(slowest, took)
                    if problem or status.startswith("5") or took > PATIENCE:
                        wrong.append(f"{i} ({case.kind}): {status} after {took:.1f} s; {problem}")

        usual = Asked(0, CHAT, {"model": "toy", "messages": [{"role": "user", "content": "the sea"}], "max_tokens": 8, "seed": 5})
        with Caller(server) as caller:
            before = caller.ask(usual)
        with Memory(server, lambda: sum(counted.values())) as memory:
            began = time.monotonic()
            workers = [threading.Thread(target=work) for _ in range(4)]
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.join()
            seconds = time.monotonic() - began
        idle, ready = server.idle(), server.ready()[0] == 200
        with Caller(server) as caller:
            after = caller.ask(usual)
    for each in wrong[:20]:
        say(f"  {each}")
    statuses = Counter[str]()
    for (_, status), n in counted.items():
        statuses[status] += n
    failures = sum(n for status, n in statuses.items() if status.startswith("5"))
    well = ready and idle and not after.problems and before.facts == after.facts
    late = f"{len(wrong)}; the slowest answer took {slowest:.1f} s"
    slope = memory.slope()
    checks = (
        Check("answers with 5xx", "0", f"{failures} of {number:,}", failures == 0),
        Check(f"answers that do not come, come after {PATIENCE:g} s or have another shape", "0", late, not wrong),
        Check("memory that a request leaves behind", "< 0.1 KB at the interval's end", f"{slope}", slope.high < 0.1),
        Check("ready, idle, and the usual answer afterwards", "yes", "yes" if well else "no", well),
    )
    known = sorted(statuses)
    table = [f"| kind | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    table += [f"| {kind} | {' | '.join(f'{counted[kind, status]:,}' for status in known)} |" for kind in KINDS]
    also = ("\n".join(['Answers by status; "none" where the caller hung up or spoke no HTTP.', "", *table]),)
    figures = {"statuses": dict(statuses), "counted": [[*key, n] for key, n in sorted(counted.items())], "wrong": wrong[:100]}
    figures |= {"slope_kb": asdict(slope), "slowest": slowest, "memory": memory.few()}
    return Section(f"{number:,} requests in {seconds:,.0f} s.", checks, also, figures)


class _Attacker:
    """One connection, and another when the server has closed it."""

    def __init__(self, server: Server) -> None:
        self._address = server.address
        self._connection: socket.socket | None = None

    def throw(self, case: Attack) -> tuple[str, str]:
        """Send an attack: the status that is answered, ``none`` without one, and what is wrong with it."""
        kept = self._connection is not None
        status, problem = self._once(case)
        if kept and status == "none" and problem:  # what was kept may have been closed meanwhile: that is no answer to this
            status, problem = self._once(case)
        return status, problem

    def leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _once(self, case: Attack) -> tuple[str, str]:
        try:
            connection = self._connection = self._connection or socket.create_connection(self._address, timeout=PATIENCE)
            with contextlib.suppress(OSError):  # it may be answered, and closed, before all is sent
                connection.sendall(case.data)
            if not case.answered:
                self.leave()
                return "none", ""
            answer = http.client.HTTPResponse(connection, method=case.data.partition(b" ")[0].decode("latin-1"))
            answer.begin()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.leave()
            return "none", f"{type(error).__name__}: {error}"
        if case.alone or answer.will_close:
            self.leave()
        ours = answer.status >= 400 and answer.headers.get("X-Request-Id") and not case.data.startswith(b"HEAD ")
        return str(answer.status), "" if not ours or _openais(body) else f"another shape: {body[:200]!r}"


def _openais(body: bytes) -> bool:
    """Whether this is an error as OpenAI's clients know it."""
    try:
        error = json.loads(body)["error"]
        return set(error) == {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        return False


# ── slow readers ──


def slow_readers(setting: Setting) -> Section:
    """8 places, 4 ordinary callers, and 8 callers of long streams: in one half of a round these read as fast as they can, in the
    other half 4 of them take a byte a second and 4 stop reading. Both halves have the same requests; their order is drawn.

    Met when: the ordinary callers' time to the first token and to the end is at most 10 % longer beside slow readers, by the upper
    end of the interval of the median ratio of pairs; every slow reader's connection is over within twice the stated time (30 s
    of taking nothing) and ten seconds; memory after the last round is at most 10 MB above that after the second.
    """
    stall, rounds, each, tokens = setting.of((STALL, 6, 40, 300), (1.5, 1, 10, 150))
    first, whole = list[tuple[float, float]](), list[tuple[float, float]]()
    gone, memory, failed = list[float | None](), list[float](), list[str]()
    rng = random.Random(4)
    options = ["--concurrency", "8", "--queue", "64"]
    with Server(setting.place("slow"), *options, vectors=setting.toy, stall=stall if setting.quick else None) as server:
        for turn in range(rounds):
            big: dict[str, Any] = {"temperature": 1.5, "logprobs": True, "top_logprobs": 20, "readings": {"emotions": "all"}}
            longs = [_stream(f"long {i}", i, tokens=tokens, **big) for i in range(8 * turn, 8 * turn + 8)]
            shorts = [_stream(f"short {i}", i, tokens=16) for i in range(each * turn, each * turn + each)]
            took: dict[str, list[Answer]] = {}
            for half in rng.sample(["fast", "slow"], 2):
                if half == "fast":
                    beside = threading.Thread(target=crowd, args=(server, longs), kwargs={"callers": 8})
                    beside.start()
                    took[half] = crowd(server, shorts, callers=4)
                    beside.join()
                else:
                    with _Slow(server, longs) as slow:
                        took[half] = crowd(server, shorts, callers=4)
                        gone += slow.over(2 * stall + 10)
                if not server.idle():
                    failed.append("places are still taken")
            failed += [problem for half in took.values() for answer in half for problem in answer.problems]
            pairs = list(zip(took["slow"], took["fast"], strict=True))
            first += [(a.first, b.first) for a, b in pairs if a.first is not None and b.first is not None]
            whole += [(a.total, b.total) for a, b in pairs]
            memory.append(server.memory)
    harm = _ratio(first), _ratio(whole)
    known = [seconds for seconds in gone if seconds is not None]
    late = f"{len(gone) - len(known)} of {len(gone)}; the last after {max(known, default=float('nan')):.0f} s"
    grown = memory[-1] - memory[min(1, len(memory) - 1)]
    checks = (
        Check("others' time to the first token, beside slow readers over beside fast ones", *_at_most(1.1, harm[0])),
        Check("others' time to the end", *_at_most(1.1, harm[1])),
        Check("others' requests that failed", "0", f"{len(failed)}", not failed),
        Check(f"slow readers still connected {2 * stall + 10:g} s after their request", "0", late, len(known) == len(gone)),
        Check("memory after the last round above that after the second", "≤ 10 MB", f"{grown:.1f} MB", grown <= 10),
    )
    figures = {"first": first, "whole": whole, "gone": gone, "memory": memory, "failed": failed[:20], "stall": stall}
    figures |= {"ratio_first": asdict(harm[0]), "ratio_whole": asdict(harm[1])}
    return Section(f"{rounds} rounds, {len(whole)} pairs of requests, {len(gone)} slow readers.", checks, (), figures)


class _Slow:
    """Readers of long streams: one half takes a byte a second, the other half stops at once."""

    def __init__(self, server: Server, requests: Sequence[Asked]) -> None:
        self._began = time.monotonic()
        self._connections = [begin(server, each, receive=4096) for each in requests]
        self._port = server.address[1]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sip, daemon=True)

    def __enter__(self) -> _Slow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for each in self._connections:
            each.close()

    def _sip(self) -> None:
        while not self._over.wait(1.0):
            for each in self._connections[::2]:
                with contextlib.suppress(OSError):
                    each.recv(1, socket.MSG_DONTWAIT)

    def over(self, seconds: float) -> list[float | None]:
        """After how many seconds the server had no connection to each any more; None where it still has."""
        ports = [each.getsockname()[1] for each in self._connections]
        ended: dict[int, float] = {}

        def all_over() -> bool:
            up = _connected(self._port)
            for port in ports:
                if port not in up:
                    ended.setdefault(port, time.monotonic() - self._began)
            return len(ended) == len(ports)

        until(all_over, seconds - (time.monotonic() - self._began), every=0.1)
        return [ended.get(port) for port in ports]


def _connected(port: int) -> set[int]:
    """The other ends' ports of the connections that a port of this machine has."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(line[2].split(":")[1], 16) for line in lines if line[3] == "01" and int(line[1].split(":")[1], 16) == port}


# ── who hangs up ──


def hang_up(setting: Setting) -> Section:
    """Callers hang up: in the middle of a stream, before its first token, in the middle of a plain answer, while they wait in the
    queue; by closing, and by a reset. Thirteen times each, beside others.

    Met when: each one's place is free within two seconds, and the median within a quarter of one.
    """
    freed: dict[str, list[float | None]] = {}
    kinds = ("in a stream", "before the first token", "in a plain answer", "in the queue")
    with Server(setting.place("hang-up"), "--concurrency", "2", "--queue", "4", vectors=setting.toy) as server:

        def depth(live: int, waiting: int) -> Callable[[], bool]:
            def found() -> bool:
                parts = server.ready()[1]
                return (parts["live"], parts["waiting"]) == (live, waiting)

            return found

        for i, kind, way in itertools.product(range(setting.of(13, 1)), kinds, ("closed", "reset")):
            queued = int(kind == "in the queue")
            others = [begin(server, _stream("other", 1000 + i + k, tokens=1500, temperature=1.5)) for k in range(1 + queued)]
            until(depth(1 + queued, 0), 30, every=0.005)
            leaver = begin(server, _stream("long", i, tokens=1500, temperature=1.5, stream=kind != "in a plain answer"))
            if kind == "in a stream":
                leaver.settimeout(30)
                while b"data: " not in leaver.recv(65536):
                    pass
            until(depth(2, queued), 30, every=0.005)
            if kind == "in a plain answer":
                time.sleep(0.2)
            if way == "reset":
                leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaver.close()
            freed.setdefault(f"{kind}, {way}", []).append(until(depth(1 + queued, 0), 10, every=0.002))
            for each in others:
                each.close()
            server.idle()
    every = [each for own in freed.values() for each in own]
    known = [each for each in every if each is not None]
    slow = max(known, default=float("nan"))
    last = f"{len(known)} of {len(every)}, the last after {slow:.2f} s"
    checks = (
        Check("places that are free again", "all, within 2 s", last, len(known) == len(every) and slow <= 2),
        Check("median time until then", "≤ 0.25 s", f"{median(known):.2f} s", median(known) <= 0.25),
    )
    return Section(f"{len(every)} callers hung up.", checks, (), {"freed": freed})


# ── running them ──

SECTIONS: dict[str, Callable[[Setting], Section]] = {
    "load-toy": load_toy,
    "kill": kill,
    "disk": disk,
    "database": database,
    "webhook": webhook,
    "fuzz": fuzz,
    "slow-readers": slow_readers,
    "hang-up": hang_up,
    "load-demo": load_demo,
}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Run a section."""
    say(f"{name} …")
    began = time.monotonic()
    found = SECTIONS[name](setting)
    for check in found.checks:
        verdict = {True: "met", False: "MISSED", None: "–"}[check.met]
        say(f"  {verdict:7} {check.what}: {check.found} (wanted: {check.wanted})")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": inspect.cleandoc(SECTIONS[name].__doc__ or ""),
        "seconds": time.monotonic() - began,
        "load_average": os.getloadavg()[2],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": machine(),
        "provenance": provenance(),
        **asdict(found),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections; the results of others are kept")
    parser.add_argument("--quick", action="store_true", help="a short form; results are written only where --out says so")
    parser.add_argument("--demo", type=Path, help="folder of the demo model's vectors, which load-demo needs")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder that is removed")
    parser.add_argument("--out", type=Path, help=f"where the results go; by default {RESULT.relative_to(HERE.parent)}")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    out = args.out or (None if args.quick else RESULT)
    chosen = args.only or [name for name in SECTIONS if name != "load-demo" or args.demo]
    if "load-demo" in chosen and not args.demo:
        say("load-demo needs the demo model's vectors: --demo FOLDER")
        return 2
    missed = 0
    with contextlib.ExitStack() as stack:
        folder = (args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reliability-")))).resolve()
        setting = Setting(folder, args.quick, toy_vectors(folder / "vectors"), args.demo and args.demo.resolve())
        results: dict[str, Any] = read_json(out) if out is not None and out.exists() else {"sections": {}}
        for name in chosen:
            found = results["sections"][name] = measure(name, setting)
            missed += sum(check["met"] is False for check in found["checks"])
            if out is not None:
                write_json(out, results)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
