"""Readers who are slow or leave: for ``bench/reliability.py``."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from affectlens.stats import Estimate
from callers import Answer, Asked, begin, crowd, stream
from running import Check, Section, Server, Setting, median, ratio, until

STALL = 30.0
"""Seconds that a reader may take nothing: the server's own."""

# ── slow readers ──


def slow_readers(setting: Setting) -> Section:
    """8 places, 4 ordinary callers, and 8 callers of long streams: in one half of a round these read as fast as they can, in the
    other half 4 of them take a byte a second and 4 stop reading. Both halves have the same requests; their order is drawn.

    The long streams fill all places, so that a slow reader who held his would be felt.

    Met when: the ordinary callers' mean time to the first token, and their time until all is answered, is at most 10 % longer
    beside slow readers, by the upper end of the interval of the median ratio over rounds; every slow reader's connection is over
    within twice the stated time (30 s of taking nothing) and ten seconds; memory after the last round is at most 10 MB above that
    after the second.
    """
    stall, rounds, places, each, tokens = setting.of((STALL, 8, 8, 40, 600), (1.5, 1, 2, 6, 450))
    first, whole = list[tuple[float, float]](), list[tuple[float, float]]()
    gone, memory, failed = list[float | None](), list[float](), list[str]()
    rng = random.Random(4)

    def timed(server: Server, requests: Sequence[Asked]) -> tuple[list[Answer], float]:
        until(lambda: server.ready()[1]["live"] == places, 10)
        began = time.monotonic()
        return crowd(server, requests, callers=4), time.monotonic() - began

    def waited(answers: Sequence[Answer]) -> float:
        return statistics.fmean(answer.first or answer.total for answer in answers)

    options = ["--concurrency", str(places), "--queue", "64"]
    with Server(setting.place("slow"), *options, vectors=setting.toy, stall=stall if setting.short else None) as server:
        for turn in range(rounds):
            big: dict[str, Any] = {"top_k": 5, "logprobs": True, "top_logprobs": 20, "readings": {"emotions": "all"}}
            longs = [stream(f"long {i}", i, tokens=tokens, **big) for i in range(places * turn, places * turn + places)]
            shorts = [stream(f"short {i}", i, tokens=16) for i in range(each * turn, each * turn + each)]
            took: dict[str, list[Answer]] = {}
            seconds: dict[str, float] = {}
            for half in rng.sample(["fast", "slow"], 2):
                if half == "fast":
                    beside = threading.Thread(target=crowd, args=(server, longs), kwargs={"callers": places})
                    beside.start()
                    took[half], seconds[half] = timed(server, shorts)
                    beside.join()
                else:
                    with _Slow(server, longs) as slow:
                        took[half], seconds[half] = timed(server, shorts)
                        gone += slow.over(2 * stall + 10)
                if not server.idle():
                    failed.append("places are still taken")
            failed += [problem for half in took.values() for answer in half for problem in answer.problems]
            first.append((waited(took["slow"]), waited(took["fast"])))
            whole.append((seconds["slow"], seconds["fast"]))
            memory.append(server.memory)
    harm = [ratio(pairs) if len(pairs) > 1 else Estimate(*3 * [pairs[0][0] / pairs[0][1]], n=1) for pairs in (first, whole)]
    known = [seconds for seconds in gone if seconds is not None]
    late = f"{len(gone) - len(known)} of {len(gone)}; the last after {max(known, default=float('nan')):.0f} s"
    grown = memory[-1] - memory[min(1, len(memory) - 1)]
    checks = (
        Check("others' mean time to the first token, beside slow readers over beside fast ones", *setting.at_most(1.1, harm[0])),
        Check("others' time until all is answered", *setting.at_most(1.1, harm[1])),
        Check("others' requests that failed", "0", f"{len(failed)}", not failed),
        Check(f"slow readers still connected {2 * stall + 10:g} s after their request", "0", late, len(known) == len(gone)),
        Check(
            "memory after the last round above that after the second", "≤ 10 MB", f"{grown:.1f} MB", setting.judged(grown <= 10)
        ),
    )
    figures = {"first": first, "whole": whole, "gone": gone, "memory": memory, "failed": failed[:20], "stall": stall}
    figures |= {"ratio_first": asdict(harm[0]), "ratio_whole": asdict(harm[1])}
    return Section(f"{rounds} rounds of {each} requests beside either, {len(gone)} slow readers.", checks, (), figures)


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
            others = [begin(server, stream("other", 1000 + i + k, tokens=1500, top_k=5)) for k in range(1 + queued)]
            until(depth(1 + queued, 0), 30, every=0.005)
            leaver = begin(server, stream("long", i, tokens=1500, top_k=5, stream=kind != "in a plain answer"))
            if kind == "in a stream":
                leaver.settimeout(30)
                while b"data: " not in leaver.recv(65536):
                    pass
            if until(depth(2, queued), 30, every=0.005) is None:
                raise RuntimeError("a caller who was to hang up never had a place")
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
        Check("median time until then", "≤ 0.25 s", f"{median(known):.2f} s", setting.judged(median(known) <= 0.25)),
    )
    return Section(f"{len(every)} callers hung up.", checks, (), {"freed": freed})
