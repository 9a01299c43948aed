"""A server is killed, its store goes away, a webhook hangs: sections of ``bench/reliability.py``."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from affectlens.server.store import Store
from callers import Answer, Caller, mixed, stream, unending
from running import TOY_STRENGTH, Check, Section, Server, Setting, ratio, until

COMMIT = 5.0
"""Seconds that the end of a reply waits for the store: the server's own."""

# ── kill -9 ──


def kill(setting: Setting) -> Section:
    """Ten times: 16 callers, and kill -9 in the middle; the server begins again on the same store.

    Acknowledged is what a caller saw whole: a plain answer, or the last chunk of a choice.

    Met when: whatever was acknowledged is in the store, with its text; SQLite finds its file sound; replies were in
    the making at every kill; the server listens again within twice the time of its first start and a second.
    """
    rounds = setting.of(10, 1)
    folder = setting.place("kill")
    names = setting.names
    requests = (mixed(i, model="toy", names=names, longest=40, strength=TOY_STRENGTH) for i in itertools.count())
    rng = random.Random(2)
    options = ["--concurrency", "16", "--queue", "16"]
    if not setting.short:
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
            setting.judged(max(starts) <= limit),
        ),
        Check("it answers again", "yes", answered.problems[0] if answered.problems else "yes", not answered.problems),
    )
    figures = {"first": first, "starts": starts, "acknowledged": len(acknowledged), "unfinished": unfinished, "missing": missing}
    return Section(
        f"{rounds} kills, {len(acknowledged):,} acknowledged replies.",
        checks,
        ("The process is killed, the machine is not: that a commit outlives a power cut rests on SQLite's synchronous=FULL.",),
        figures,
    )


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
        if not setting.short and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
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
    if setting.short or not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
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
        requests = (mixed(i, model="toy", names=setting.names, longest=12, strength=TOY_STRENGTH) for i in itertools.count())
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
        ill = [each.total for each in answers if each.began < mended and each.began + each.total >= broken]
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
            f"the slowest of {len(ill)} replies meanwhile": (
                f"{slowest:.1f} s at most",
                f"{took:.1f} s",
                setting.judged(0 < took <= slowest),
            ),
            "replies a second meanwhile": (
                f"half of {rates[0]:.1f} at least",
                f"{rates[1]:.1f}",
                setting.judged(rates[1] >= rates[0] / 2),
            ),
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


class _Hanging:
    """Where webhooks go: it takes everything and never answers."""

    def __init__(self) -> None:
        over = self._over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                over.wait()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/alarms"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> _Hanging:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


def webhook(setting: Setting) -> Section:
    """Two servers with the same ten rules, which fire in every reply: those of one tell a webhook that takes everything and
    never answers, those of the other tell nobody. The same request goes to both, in turns, 200 times.

    Met when: a reply takes at most 5 % longer where the webhook hangs, by the upper end of the interval of the median ratio;
    every alarm is counted as not delivered (waiting, given up, dropped); the server whose webhook hangs ends within 20 seconds
    of SIGTERM.
    """
    pairs = setting.of(200, 6)
    names = setting.names
    folder = setting.place("webhook")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(_Hanging()).url
        servers = list[Server]()
        for kind, actions in (("hangs", f'[{{ do = "webhook", url = "{url}", secret = "ALARM_KEY" }}]'), ("none", "[]")):
            rules = folder / f"{kind}.toml"
            when = [f"r{i}: {names[i % len(names)]} > -{50 + i}" for i in range(10)]
            rules.write_text("".join(f'[[rules]]\nwhen = "{each}"\nactions = {actions}\n' for each in when))
            server = Server(folder / kind, "--rules", str(rules), vectors=setting.toy, environment={"ALARM_KEY": "x"})
            servers.append(stack.enter_context(server))
        callers = [stack.enter_context(Caller(server)) for server in servers]
        rng = random.Random(3)
        times: list[tuple[float, float]] = []
        failed = 0
        for i in range(-3, pairs):
            took = {}
            for which in rng.sample([0, 1], 2):
                answer = callers[which].ask(stream(f"case {i}", i, tokens=24))
                took[which] = answer.total
                failed += bool(answer.problems)
            if i >= 0:  # the first ones warm up
                times.append((took[0], took[1]))
        fired = [round(server.counted("affectlens_alerts_total")) for server in servers]
        counts = {key: n for key, n in servers[0].metrics().items() if key.startswith("affectlens_webhook")}
        ended = servers[0].stop()
    slower, undelivered = ratio(times), sum(counts.values())
    checks = (
        Check("time of a reply where the webhook hangs, over that without one", *setting.at_most(1.05, slower)),
        Check("replies that failed", "0", f"{failed}", not failed),
        Check(
            "alarms that are counted as not delivered",
            f"all {fired[0]:,}",
            f"{undelivered:,.0f}",
            undelivered == fired[0] == fired[1] > 0,
        ),
        Check("it ends in spite of the webhook", "within 20 s", f"after {ended:.1f} s", ended <= 20),
    )
    figures = {"times": times, "fired": fired, "counts": counts, "ended": ended, "ratio": asdict(slower)}
    told = {
        key.removeprefix("affectlens_webhook_").removesuffix("_total").removesuffix("_alarms"): n for key, n in counts.items()
    }
    also = (f"Of the alarms {', '.join(f'{n:,.0f} {what}' for what, n in told.items())}.",)
    return Section(f"{pairs} requests to both servers, {fired[0]:,} alarms each.", checks, also, figures)
