"""How fast is the store, and how large: writing replies as they come, and finding some among many.

    python bench/store.py                          # SQLite and, where it is installed, PostgreSQL; some minutes, 2 GB of disk
    python bench/store.py --short                  # a handful of each

Records are made up: 171 emotions, replies of 40 tokens (20,000 of them), or of 300 tokens (200 of them, for their size and for
the time of a commit). Scores are normal noise, which compresses worse than real ones do. Written: one at a time, each waited for
(what a single caller sees), and from 32 threads (what a full server does). Read: the median and the 95th percentile of 200
questions of each kind, a page of 50 each. Writes ``bench/results/store.json``.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.concepts import ConceptSet
from affectlens.server.records import encode
from affectlens.server.store import Store
from host import RESULTS, begun, keep
from speed_tables import store as drawn
from stored import NOON, Cluster, fired, made

NAMES = ConceptSet.load("emotions").names
SHORT, LONG = 40, 300
CALLERS = 32


@dataclass(frozen=True)
class Size:
    """How much is written and asked.

    Args:
        records: Short ones that are there when questions are asked.
        commits: Long ones that are waited for one by one, and those that many callers put at once.
        questions: Of each kind.
    """

    records: int = 20_000
    commits: tuple[int, int] = (100, 320)
    questions: int = 200


def measure(short: bool = False) -> dict[str, Any]:
    """Write and ask, in every database that is installed."""
    return measured(Size(60, (3, 8), 2) if short else Size())


def measured(size: Size) -> dict[str, Any]:
    found = {**begun("store"), "records": size.records, "emotions": len(NAMES), "tokens": SHORT}
    with tempfile.TemporaryDirectory() as folder:
        found["sqlite"] = database(f"sqlite:///{folder}/traces.db", size, lambda: size_of(Path(folder)))
    if any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        cluster = Cluster(fsync=True)
        try:
            address = cluster.database()
            name = address.rpartition("/")[2]
            found["postgresql"] = database(address, size, lambda: int(cluster.sql(f"select pg_database_size('{name}')")))
        finally:
            cluster.remove()
    return found


def database(url: str, size: Size, used: Callable[[], int]) -> dict[str, Any]:
    """One database: writing, size, reading; ``used`` tells its bytes on disk."""
    with Store(url) as store:
        written = writing(store, size)
        start, before = time.perf_counter(), used()
        futures = []
        for n in range(size.records):
            futures.append(store.put(short(n)))
            if len(futures) > 256:
                futures.pop(0).result()
        for future in futures:
            future.result()
        filled = time.perf_counter() - start
        store._database.give_back()  # what autovacuum does within a minute; SQLite has nothing to do
        took = {name: quantiles(question, size.questions) for name, question in questions(store, size.records)}
    packed = encode(made(1, names=NAMES, tokens=LONG))
    return {
        "commit, ms": written,
        "records a second, filling": round(size.records / filled, 1),
        "bytes a record on disk": round((used() - before) / size.records),
        "bytes of the scores of a long record": {"float32": 4 * len(NAMES) * (LONG + 6), "kept": len(packed.scores)},
        "reading, ms": took,
    }


def short(n: int) -> Any:
    """Record ``n``: one in ten has an alert; the times are an hour apart in steps of a minute."""
    alerts = (fired("panic: desperate > 3"),) if n % 10 == 0 else ()
    return made(n, names=NAMES, tokens=SHORT, alerts=alerts, created=NOON + timedelta(minutes=n), prompt=f"question {n} of them")


def writing(store: Store, size: Size) -> dict[str, Any]:
    """Milliseconds from ``put`` to the commit of replies of 300 tokens: alone, and with others."""

    def put(n: int) -> float:
        record = made(n, names=NAMES, tokens=LONG)
        start = time.perf_counter()
        store.put(record).result()
        return 1000 * (time.perf_counter() - start)

    alone = [put(1_000_000 + n) for n in range(size.commits[0])]
    start = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        together = list(pool.map(put, range(2_000_000, 2_000_000 + size.commits[1])))
    rate = size.commits[1] / (time.perf_counter() - start)
    return {"alone": summary(alone), f"{CALLERS} callers": summary(together), "records a second": round(rate, 1)}


def questions(store: Store, records: int) -> Iterator[tuple[str, Callable[[random.Random], Any]]]:
    """Kinds of questions, each with a fresh one for every call."""

    def name(rng: random.Random) -> str:
        return rng.choice(NAMES)

    yield "the newest", lambda _: store.search()
    yield "a page in the middle", lambda rng: store.search(after=f"{_micros(rng.randrange(records))}-{rng.randrange(records)}")
    yield "emotion above 2.5 (one in four)", lambda rng: store.search(emotion=name(rng), above=2.5)
    yield "emotion above 4.2 (a handful in 20,000)", lambda rng: store.search(emotion=name(rng), above=4.2)
    yield "emotion above 9 (none: all are looked through)", lambda rng: store.search(emotion=name(rng), above=9.0)
    yield "words that many have", lambda _: store.search(words="harbour")
    yield "words that one has", lambda rng: store.search(words=f"question {rng.randrange(records)} of them")
    yield "words that none has", lambda _: store.search(words="no such words")
    yield "a rule's alarms", lambda _: store.search(alert="panic")
    yield (
        "emotion, words, alarm and time",
        lambda rng: store.search(
            emotion=name(rng), above=2.0, words="storm", alert=True, since=NOON + timedelta(minutes=rng.randrange(records))
        ),
    )
    yield "inbox of alerts", lambda _: store.alerts(state="open")
    yield "strongest passages", lambda rng: store.strongest(name(rng))
    yield "one record", lambda rng: store.get(f"chatcmpl-{rng.randrange(records):06d}")


def _micros(n: int) -> int:
    from affectlens.server.records import micros

    return micros(NOON + timedelta(minutes=n))


def quantiles(question: Callable[[random.Random], Any], count: int) -> dict[str, float]:
    rng, took = random.Random(7), []
    for _ in range(count):
        start = time.perf_counter()
        question(rng)
        took.append(1000 * (time.perf_counter() - start))
        if sum(took) > 30_000:
            break
    return summary(took)


def summary(took: list[float]) -> dict[str, float]:
    return {"median": round(float(np.median(took)), 2), "p95": round(float(np.quantile(took, 0.95)), 2), "n": len(took)}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a handful of records and questions, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "store.json")
    args = parser.parse_args(argv)
    found = measure(args.short)
    keep(found, None if args.short else args.out)
    print(drawn(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
