"""The store on SQLite and on a real PostgreSQL: nothing acknowledged is lost, and nothing is kept that must not be."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text as sql

from affectlens.engine import Layout, Sampling, Steering, Term, Where
from affectlens.errors import FormatError, RuleError, StoreError, UnknownName
from affectlens.server import tables, writer
from affectlens.server.database import Database
from affectlens.server.records import Record, asked, decode, encode, hashed, micros
from affectlens.server.store import Page, Store, Summary
from stored import NAMES, NOON, Cluster, fired, made, same

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    own = Cluster()
    yield own
    own.remove()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'traces.db'}"
    address: str = request.getfixturevalue("cluster").database()
    return address


def fill(store: Store, records: list[Record]) -> None:
    for future in [store.put(record) for record in records]:
        future.result(30)


def everything(page: Callable[..., Page[Any]], **query: Any) -> list[Any]:
    """All pages, joined."""
    found, after = [], None
    while True:
        got = page(after=after, **query)
        found += got.items
        if got.next is None:
            return found
        after = got.next


# ── what goes in comes out ──


def full(n: int) -> Record:
    """A record with everything that a record can have."""
    rng = np.random.default_rng(n)
    plain = made(n, alerts=(fired("panic: desperate > 3 for 2 tokens"), fired("calm < -2", 11)), key="team", company=4)
    shape = plain.trace.scores.shape
    tables = {name: rng.normal(size=shape).astype(np.float32) for name in ("visible", "gap", "steered")}
    tables["visible"][3:9] = np.nan
    other = rng.normal(size=(shape[0], 2)).astype(np.float32)
    trace = replace(plain.trace, **tables, other=other, other_names=("angry", "loving"), steering="+0.05 calm @ layer 3")
    direction = np.eye(8, dtype=np.float32)[:2]
    steering = Steering((Term("calm", 0.05, (3,), (3, 4), direction, np.ones(2, np.float32), where=Where("response")),))
    request = asked((("system", "Be kind."), ("user", "größe 𝄞 \ud800 \0?")), sampling=Sampling(stop=("END",)), steering=steering,
                    baseline={"names": list(NAMES), "spreads": {"assistant": {"mean": [0.1] * 6}}})  # fmt: skip
    return replace(plain, trace=trace, request=request)


def test_a_record_comes_back_to_the_bit(url: str) -> None:
    records = [full(1), made(2), made(3, reply=""), made(4, prompt="", reply=""), full(5)]
    with Store(url) as store:
        fill(store, records)
        assert all(same(store.get(record.id) or made(99), record) for record in records)
        assert [record.id for record in store.records()] == [record.id for record in records]
        assert store.get("chatcmpl-nothing") is None
        status = store.status()
        assert (status.written, status.lost, status.failures, status.waiting, status.error) == (5, 0, 0, 0, "")
    with Store(url) as store:  # and after it was opened again
        assert all(same(each, record) for each, record in zip(store.records(), records, strict=True))
        assert store.count() == 5


_SCORE = st.floats(width=32, allow_infinity=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    words=st.text(max_size=30),
    rows=st.lists(st.lists(_SCORE, min_size=3, max_size=3), max_size=6),
    kind=st.sampled_from(["full", "hash", "none"]),
)
def test_any_text_and_any_number_survives_the_bytes(words: str, rows: list[list[float]], kind: Any) -> None:
    scores = np.array(rows, np.float32).reshape(len(rows), 3)
    layout = Layout(words, (words,) * len(rows), (7,) * len(rows), ((0, 1),) * len(rows), ("text",) * len(rows), 0)
    plain = made(1, names=("a", "b", "c"))
    record = replace(plain, text=words, trace=replace(plain.trace, layout=layout, scores=scores))
    packed = encode(record, text=kind, secret=b"secret")
    row = {"body": packed.body, "scores": packed.scores, "created": micros(record.created)}
    back = decode({**row, **{n: getattr(record, n) for n in ("id", "kind", "key", "finish", "company")}}, packed.parts)
    assert np.array_equal(back.trace.scores.view(np.uint32), scores.view(np.uint32)) or np.isnan(scores).any()
    assert same(back, packed.record) and (kind != "full" or same(back, record))


def test_what_is_no_plain_data_is_refused_at_once(url: str) -> None:
    with Store(url) as store:
        with pytest.raises(FormatError, match="cannot be kept"):
            store.put(replace(made(1), usage={"prompt_tokens": object()}))  # type: ignore[dict-item]
        with pytest.raises(FormatError, match="nan"):
            store.put(replace(made(1), timing={"total": float("nan")}))
        fill(store, [made(2)])


def test_times_keep_their_microseconds(url: str) -> None:
    moments = [NOON + timedelta(microseconds=m) for m in (0, 1, 999_999)] + [datetime(1970, 1, 1, tzinfo=UTC)]
    with Store(url) as store:
        fill(store, [made(i, created=moment) for i, moment in enumerate(moments)])
        assert sorted(record.created for record in store.records()) == sorted(moments)


def test_one_record_is_kept_once_and_another_of_its_name_is_refused(url: str) -> None:
    with Store(url) as store:
        first, other = made(1), replace(made(2), id=made(1).id)
        futures = [store.put(record) for record in (first, first, other, made(3))]
        assert [future.exception(30) is None for future in futures] == [True, True, False, True]
        with pytest.raises(StoreError, match=r"chatcmpl-000001 is not kept \(another record has this id\)"):
            futures[2].result()
        store.put(first).result(30)
        assert store.count() == 2 and same(store.get(first.id) or other, first)
        assert store.status().lost == 1 and store.healthy()
        assert not futures[0].cancel()


# ── finding ──


def test_searching_is_filtering(url: str) -> None:
    """Every question against the same question asked of plain lists; pages together are the whole."""
    rng = random.Random(3)
    rules = ("panic: desperate > 2", "calm < -2")
    records = [
        made(i, created=NOON + timedelta(seconds=rng.randrange(40)), alerts=tuple(fired(r) for r in rules if rng.random() < 0.3))
        for i in range(90)
    ]
    order = {record.id: i for i, record in enumerate(records)}
    with Store(url) as store:
        fill(store, records)
        for _ in range(60):
            query: dict[str, Any] = {
                "words": rng.choice(["", "", "STORM", "the sea", "house by", "nobody%", "calm_"]),
                "emotion": rng.choice([None, *NAMES]),
                "above": rng.choice([None, 1.0, 1.9, 2.5]),
                "alert": rng.choice([None, None, True, False, "panic", "calm < -2", "unknown"]),
                "since": rng.choice([None, NOON + timedelta(seconds=11)]),
                "until": rng.choice([None, NOON + timedelta(seconds=33)]),
            }
            asks = {key: value for key, value in query.items() if value is not None and value != ""}
            wanted = [record for record in records if _fits(record, **asks)]
            wanted.sort(key=lambda record: (record.created, order[record.id]), reverse=True)
            found = everything(store.search, limit=rng.choice([1, 7, 50]), **query)
            assert [each.id for each in found] == [record.id for record in wanted], query
        assert len(everything(store.search)) == 90


def _fits(record: Record, **query: Any) -> bool:
    text, extremes = record.trace.layout.text.casefold(), record.extremes()
    checks = {
        "words": lambda v: v.casefold() in text,
        "emotion": lambda v: "above" not in query or extremes[v][0] > query["above"],
        "above": lambda _: True,
        "alert": lambda v: (
            bool(record.trace.alerts) == v if isinstance(v, bool) else v in [alert.rule for alert in record.trace.alerts]
        ),
        "since": lambda v: record.created >= v,
        "until": lambda v: record.created < v,
    }
    return all(checks[key](value) for key, value in query.items())


def test_a_summary_says_what_a_list_needs(url: str) -> None:
    record = full(1)
    with Store(url) as store:
        fill(store, [record])
        (found,) = store.search().items
        assert isinstance(found, Summary)
        assert (found.id, found.kind, found.key, found.model, found.finish) == (record.id, "chat", "team", "made-up", "stop")
        assert (found.tokens, found.prompt_tokens, found.company, found.alerts) == (12, 6, 4, 2)
        assert found.steering == {"calm": 0.05} and found.title == "größe 𝄞 ? �?".replace("𝄞 ?", "𝄞 ?")
        own = record.trace.scores[record.trace.of("assistant")]
        np.testing.assert_allclose([found.peaks[name] for name in NAMES], own.max(axis=0))
        np.testing.assert_allclose([found.means[name] for name in NAMES], own.mean(axis=0), rtol=1e-5, atol=1e-7)
        assert [name for name, _ in found.top(2)] == [NAMES[i] for i in np.argsort(-own.mean(axis=0))[:2]]


def test_unknown_emotions_and_cursors_are_refused(url: str) -> None:
    with Store(url) as store:
        assert store.search(emotion="anything").items == () and store.strongest("anything") == []
        fill(store, [made(1)])
        with pytest.raises(UnknownName, match="did you mean desperate"):
            store.search(emotion="desparate")
        for cursor in ("", "x", "1", "1-2-3", "-1-2", "9" * 30 + "-1", "1; drop table x"):
            with pytest.raises(StoreError, match="no place to go on from"):
                store.search(after=cursor)


def test_the_strongest_passages(url: str) -> None:
    records = [made(i) for i in range(20)]
    with Store(url) as store:
        fill(store, records)
        found = store.strongest("afraid", limit=3, words=4)
        peaks = sorted(((record.extremes()["afraid"][0], record.id) for record in records), reverse=True)
        assert [(each.score, each.trace) for each in found] == peaks[:3]
        record = next(record for record in records if record.id == found[0].trace)
        assert record.trace.scores[found[0].token, NAMES.index("afraid")] == np.float32(found[0].score)
        assert found[0].words.split()[-1] == record.trace.layout.tokens[found[0].token].strip()
        assert 1 <= len(found[0].words.split()) <= 4


# ── texts that are not kept ──


@pytest.mark.parametrize("text", ["full", "hash", "none"])
def test_words_that_are_not_kept_are_nowhere(url: str, text: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    secret = "xylophonist"
    alert = replace(fired("desperate > 3"), words=f"{secret} said", speaker="Zebedee")
    layout = replace(made(1).trace.layout, roles=("template", "user", "Zebedee", *["assistant"] * 15))
    for record in [made(1, prompt=f"my {secret} is", reply=f"a {secret} indeed", alerts=(alert,))]:
        layout = record.trace.layout
        named = replace(layout, roles=tuple("Zebedee" if role == "user" else role for role in layout.roles))
        term = Term("calm", 1.0, (0,), (0,), np.eye(1, 4, dtype="f"), np.ones(1, "f"), where=Where(text=secret))
        told = asked(
            (("user", f"my {secret} is"),), sampling=Sampling(stop=(secret,)), prefill=f"{secret}!", steering=Steering((term,))
        )
        record = replace(
            record, trace=replace(record.trace, layout=named, steering=str(Steering((term,)))), request={**told, "extra": secret}
        )
    with Store(url, text=text) as store:
        fill(store, [record, made(2)])
        back = store.get(record.id)
        assert back is not None
        np.testing.assert_array_equal(back.trace.scores, record.trace.scores)
        assert len(back.trace) == len(record.trace) and back.trace.turns.tolist() == record.trace.turns.tolist()
        found = store.search(words=f"my {secret} is").items
        assert [each.id for each in found] == ([] if text == "none" else [record.id])
        (alerted,) = store.alerts().items
        assert alerted.alert.scores == alert.scores and (secret in alerted.alert.words) == (text == "full")
        raw = _raw(url, tmp_path, request)
    kept = text == "full"
    for word in (secret, "Zebedee"):
        assert any(word.encode() in blob for blob in raw) == kept, word
    ids = json.dumps(list(record.trace.layout.ids), separators=(",", ":")).encode()
    assert any(ids in blob for blob in raw) == kept


def _raw(url: str, folder: Path, request: pytest.FixtureRequest) -> list[bytes]:
    """Every byte of the database's files, and every column of every table, unpacked where it is packed."""
    blobs = []
    database = Database(url)
    with database.reading() as connection:
        for table in tables.METADATA.sorted_tables:
            for row in connection.execute(sql(f"select * from {table.name}")):
                for value in row:
                    data = value if isinstance(value, bytes) else str(value).encode()
                    with contextlib.suppress(zlib.error):
                        data = zlib.decompress(data)
                    blobs.append(data)
    if url.startswith("sqlite"):
        # While it is open: the log has not been moved into the database yet.
        blobs += [path.read_bytes() for path in folder.iterdir()]
        assert {path.name for path in folder.iterdir()} >= {"traces.db", "traces.db-wal"}
    else:
        own: Cluster = request.getfixturevalue("cluster")
        own.sql("checkpoint")
        oid = own.sql("select oid from pg_database where datname = current_database()", url.rpartition("/")[2])
        blobs += [path.read_bytes() for path in (Path(own.data) / "base" / oid).iterdir()]
    database.close()
    return blobs


def test_hashes_need_the_store_and_are_equal_within_it(tmp_path: Path) -> None:
    prompts = ("yes", "yes", "no")
    hashes = []
    for name in ("a.db", "b.db"):
        with Store(str(tmp_path / name), text="hash") as store:
            fill(store, [made(i, prompt=prompt) for i, prompt in enumerate(prompts)])
            hashes.append([record.request["prompt"][0][1] for record in store.records()])
    assert hashes[0][0] == hashes[0][1] != hashes[0][2]
    assert hashes[0][0] != hashes[1][0] and hashes[0][0] != hashed("yes", b"")
    with Store(str(tmp_path / "a.db"), text="hash") as store:  # its key is kept with it
        assert len(store.search(words="yes").items) == 2
        assert store.search(words="ye").items == ()


# ── nothing that was acknowledged is lost ──

WRITE = """
import sys
from affectlens.server.store import Store
from stored import made
store, start = Store(sys.argv[1]), int(sys.argv[2])
waiting = []
for n in range(start, start + 4000):
    waiting.append((n, store.put(made(n))))
    if len(waiting) > 8:
        n, future = waiting.pop(0)
        future.result()
        print(n, flush=True)
store.close()
"""


def _process(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment, **options
    )


def test_what_was_acknowledged_survives_a_kill(url: str, tmp_path: Path) -> None:
    rng = random.Random(11)
    acknowledged: list[int] = []
    for turn in range(5):
        process = _process(WRITE, url, str(10_000 * turn))
        assert process.stdout is not None
        for line in itertools.islice(process.stdout, rng.randrange(5, 60)):
            acknowledged.append(int(line))
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
    with Store(url) as store:
        there = {record.id: record for record in store.records()}
        assert len(acknowledged) > 25 and {made(n).id for n in acknowledged} <= set(there)
        assert all(same(there[made(n).id], made(n)) for n in acknowledged[::7])
        # Whole records or none: everything that belongs to one was written with it.
        assert len(store.search(emotion="calm", limit=5000).items) == len(there)
        assert {each.id for each in store.search(words="the", limit=5000).items} <= set(there)
    if url.startswith("sqlite"):
        with sqlite3.connect(tmp_path / "traces.db") as plain:
            assert plain.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert plain.execute("pragma foreign_key_check").fetchall() == []


def test_several_processes_write_at_once(url: str) -> None:
    processes = [_process(WRITE.replace("4000", "60"), url, str(1000 * n)) for n in range(2)]
    with Store(url) as store, ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: store.put(made(5000 + n)).result(60), range(60)))
        for process in processes:
            assert process.wait(120) == 0
        assert store.count() == 180
        names = [each.id for each in everything(store.search, limit=25)]
        assert len(set(names)) == 180 and len(everything(store.search, emotion="sad", limit=25)) == 180


def test_readers_wait_for_no_writer(url: str) -> None:
    with Store(url) as store:
        fill(store, [made(i) for i in range(20)])
        other = Database(url)
        with other.transaction() as connection:  # a long transaction of somebody else, over what is read
            connection.execute(sql("update affectlens_records set title = 'changed'"))
            start = time.monotonic()
            assert len(store.search(emotion="calm").items) == 20
            assert store.search().items[0].title == "how is the sea"
            assert time.monotonic() - start < 2
        other.close()


# ── the database is gone, and back ──


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_postgresql_stops_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    own = Cluster()
    try:
        with Store(own.database()) as store:
            fill(store, [made(0)])
            own.stop()
            futures = [store.put(made(n)) for n in range(1, 30)]
            wait_for(lambda: store.status().failures > 0)
            assert not store.healthy() and store.status().waiting == 29 and store.status().error
            assert not any(future.done() for future in futures)
            with pytest.raises(StoreError, match="cannot be read"):
                store.search()
            with pytest.raises(StoreError, match=r"cannot be written|did not answer"):
                store.mute("panic", NOON)
            assert 0 < store.status().lag < 60
            own.start()
            for future in futures:
                future.result(30)
            assert store.healthy() and store.status().error == "" and store.status().waiting == 0
            assert [record.id for record in store.records()] == [made(n).id for n in range(30)]
            with store._database.reading() as connection:
                order = list(connection.scalars(sql("select id from affectlens_records order by seq")))
            assert order == [made(n).id for n in range(30)], "written in the order in which they came"
    finally:
        own.remove()
    assert "records wait in memory" in caplog.text and "can be written again" in caplog.text


FULL_DISK = """
import json, resource, sys, time
from pathlib import Path
from affectlens.server.store import Store
from stored import made
store = Store(sys.argv[1])
store.put(made(0)).result(30)
size = max(path.stat().st_size for path in Path(sys.argv[1]).parent.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60_000, resource.RLIM_INFINITY))
futures = [store.put(made(n, tokens=300)) for n in range(1, 60)]
end = time.monotonic() + 20
while store.status().failures < 3 and time.monotonic() < end:
    time.sleep(0.05)
full = store.status()
said = {"healthy": store.healthy(), "error": full.error, "waiting": full.waiting, "reads": len(store.search().items)}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for future in futures:
    future.result(30)
with store._database.reading() as connection:
    order = connection.exec_driver_sql("select id from affectlens_records order by seq").scalars().all()
after = store.status()
said |= {"order": order == [made(n).id for n in range(60)], "then": store.healthy(), "lost": after.lost, "left": after.waiting}
store.close()
print(json.dumps(said))
"""


def test_the_disk_is_full_and_has_room_again(tmp_path: Path) -> None:
    process = _process(FULL_DISK, str(tmp_path / "traces.db"))
    said = json.loads(process.communicate(timeout=120)[0])
    assert process.returncode == 0
    assert said["healthy"] is False and said["waiting"] > 0 and said["reads"] >= 1
    assert "full" in said["error"] or "I/O" in said["error"]
    assert (said["order"], said["then"], said["lost"], said["left"]) == (True, True, 0, 0)
    with sqlite3.connect(tmp_path / "traces.db") as plain:
        assert plain.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_a_file_that_was_moved_is_missed(tmp_path: Path) -> None:
    with Store(str(tmp_path / "traces.db")) as store:
        fill(store, [made(1)])
        (tmp_path / "traces.db").rename(tmp_path / "away.db")
        future = store.put(made(2))
        wait_for(lambda: store.status().failures > 0)
        assert "moved, removed or replaced" in store.status().error and not store.healthy()
        (tmp_path / "away.db").rename(tmp_path / "traces.db")
        future.result(30)
        assert store.count() == 2 and store.healthy()


def test_what_finds_no_room_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(str(tmp_path / "traces.db")) as store:
        fill(store, [made(0)])
        monkeypatch.setattr(writer, "MEMORY", 5 * encode(made(1)).size)
        (tmp_path / "traces.db").rename(tmp_path / "away.db")
        futures = [store.put(made(n)) for n in range(1, 12)]
        lost = [future for future in futures if future.done()]
        assert 5 <= len(lost) <= 7 and store.status().lost == len(lost) and store.status().waiting == 11 - len(lost)
        with pytest.raises(StoreError, match="records wait for the database already"):
            lost[0].result()
        assert caplog.text.count("is not kept") == len(lost)
        (tmp_path / "away.db").rename(tmp_path / "traces.db")
        for future in futures:
            if future not in lost:
                future.result(30)
        assert store.count() == 12 - len(lost)


def test_closing_writes_what_waits_or_says_that_it_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(tmp_path / "traces.db"))
    futures = [store.put(made(n)) for n in range(100)]
    store.close()
    assert all(future.exception(0) is None for future in futures)
    with pytest.raises(StoreError, match="is closed"):
        store.put(made(101))
    with pytest.raises(StoreError, match="is closed"):
        store.mute("x", None)
    assert not store.healthy()
    store = Store(str(tmp_path / "traces.db"))
    assert store.count() == 100
    (tmp_path / "traces.db").rename(tmp_path / "away.db")
    future = store.put(made(200))
    store.close(timeout=0.5)
    assert isinstance(future.exception(0), StoreError) and store.status().lost == 1
    assert "1 records are lost" in caplog.text or "1 record" in caplog.text


# ── retention ──


def test_old_records_go(url: str) -> None:
    now = datetime.now(UTC)
    old = [made(n, created=now - timedelta(days=8, seconds=n), alerts=(fired("calm > 1"),)) for n in range(30)]
    new = [made(100 + n, created=now - timedelta(days=6, seconds=n)) for n in range(10)]
    with Store(url) as store:
        fill(store, old + new)
        assert store.prune() == 0 and store.count() == 40
    with Store(url, max_age=timedelta(days=7)) as store:
        wait_for(lambda: store.count() == 10)  # by itself, when it is opened
        assert store.status().pruned == 30
        assert {each.id for each in everything(store.search)} == {record.id for record in new}
        assert len(everything(store.search, emotion="calm")) == 10 and store.alerts().items == ()
        assert store.get(old[0].id) is None and all(same(store.get(r.id) or old[0], r) for r in new)
        with store._database.reading() as connection:
            rows = [connection.scalar(sql(f"select count(*) from {t.name}")) for t in (tables.PEAKS, tables.WORDS, tables.PARTS)]
        assert rows == [10 * len(NAMES), 10, 3], "what belonged to them is gone, what others share is not"


def test_too_much_goes_and_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "traces.db"
    with Store(str(path)) as store:
        fill(store, [made(n, tokens=400, prompt=f"number{n}x is it", names=tuple(f"c{i}" for i in range(30))) for n in range(80)])
    before = path.stat().st_size
    assert before > 3 * 2**20 and b"number3x" in path.read_bytes()
    with Store(str(path), max_bytes=2**20) as store:
        store.prune()
        left = [record.id for record in store.records()]
        assert 5 < len(left) < 40 and left == [made(n).id for n in range(80 - len(left), 80)], "the oldest go first"
        assert all(len(everything(store.search, emotion=f"c{i}")) == len(left) for i in (0, 29))
        files = [each.read_bytes() for each in tmp_path.iterdir()]
        assert path.stat().st_size <= 1.1 * 2**20 < before
        assert not any(b"number3x" in data for data in files), "nothing of what was deleted is left in the file"
        assert any(b"number79x" in data for data in files)
        assert store.healthy()


def test_the_writer_keeps_within_the_limit_by_itself(url: str) -> None:
    with Store(url, max_bytes=2**20) as store:
        for start in range(0, 240, 40):
            fill(store, [made(start + n, tokens=150, names=tuple(f"c{i}" for i in range(30))) for n in range(40)])
        wait_for(lambda: store.status().pruned > 100)
        wait_for(lambda: _used(store) <= 2**20)
        assert {record.id for record in store.records()} == {made(n).id for n in range(240 - store.count(), 240)}


def _used(store: Store) -> int:
    with store._database.reading() as connection:
        return store._database.used(connection)


def test_postgresql_uses_its_room_again(cluster: Cluster) -> None:
    address = cluster.database()
    name = address.rpartition("/")[2]
    sizes = []
    with Store(address, max_bytes=2**20) as store:
        for start in range(0, 600, 100):
            fill(store, [made(start + n, tokens=150, names=tuple(f"c{i}" for i in range(30))) for n in range(100)])
            store.prune()
            sizes.append(int(cluster.sql(f"select pg_database_size('{name}')")))
    assert sizes[-1] < 1.25 * sizes[1], sizes


def test_limits_that_keep_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in ({"max_age": timedelta(0)}, {"max_bytes": 10}, {"text": "some"}):
        with pytest.raises(StoreError, match=r"use full|would keep nothing"):
            Store(str(tmp_path / "traces.db"), **wrong)  # type: ignore[arg-type]


# ── alerts and rules ──


def test_alerts_are_listed_and_acknowledged(url: str) -> None:
    rules = ("panic: desperate > 3 for 2 tokens", "calm < -2")
    records = [made(n, alerts=tuple(fired(rules[i % 2], 9 + i) for i in range(n % 3))) for n in range(30)]
    with Store(url) as store:
        fill(store, records)
        found = everything(store.alerts, limit=7)
        assert [each.alert for each in found] == [a for record in reversed(records) for a in reversed(record.trace.alerts)]
        assert ({each.state for each in found} == {"open"} and found[0].trace == records[29 - 29 % 3 - 1].id) or found[0].trace
        panics = everything(store.alerts, rule="panic", limit=4)
        assert len(panics) == 20 and {each.alert.rule for each in panics} == {"panic"}
        seen = store.acknowledge(panics[3].id, "looked at: a false alarm")
        assert (seen.state, seen.note, seen.alert) == ("acknowledged", "looked at: a false alarm", panics[3].alert)
        assert seen.changed is not None and abs((datetime.now(UTC) - seen.changed).total_seconds()) < 60
        assert store.alerts(state="acknowledged").items == (seen,)
        assert len(everything(store.alerts, state="open")) == 29
        assert store.acknowledge(seen.id, "again").note == "again"
        with pytest.raises(UnknownName, match="unknown alert '999'"):
            store.acknowledge(999, "")
        created = {record.id: record.created for record in records}
        assert all(each.created == created[each.trace] for each in found)


def test_rules_are_kept_and_muted(url: str) -> None:
    steer = {"do": "steer", "add": {"calm": 0.05}}
    with Store(url) as store:
        first = store.save_rule("panic: desperate > 3 for 20 tokens", [steer])
        second = store.save_rule("calm < -2", armed=False)
        again = store.save_rule("panic: desperate > 4", armed=False)
        assert again.id == first.id and (again.text, again.actions, again.armed) == ("panic: desperate > 4", (), False)
        assert [rule.name for rule in store.rules()] == ["panic", "calm < -2"]
        assert first.policy.actions[0].add == (("calm", 0.05),)  # type: ignore[union-attr]
        with pytest.raises(RuleError):
            store.save_rule("desperate 3")
        with pytest.raises(FormatError, match="no action"):
            store.save_rule("desperate > 3", [{"do": "shout"}])
        assert store.delete_rule(second.id) and not store.delete_rule(second.id)
        soon = datetime.now(UTC) + timedelta(minutes=5)
        store.mute("panic", soon)
        store.mute("past", datetime.now(UTC) - timedelta(seconds=1))
        store.mute("a rule of a file", soon)
        store.mute("panic", soon + timedelta(minutes=1))
        store.mute("a rule of a file", None)
    with Store(url) as store:
        assert store.mutes() == {"panic": soon + timedelta(minutes=1)}
        assert [rule.name for rule in store.rules()] == ["panic"]


# ── opening ──


def test_every_earlier_revision_is_brought_up(url: str) -> None:
    """What an earlier version wrote is there afterwards; the tables are those that the code names, to the letter."""
    revisions = ["0001", "0002"]
    for number, revision in enumerate(revisions):
        address = url if number == 0 else url.replace("traces.db", f"{revision}.db")
        if number and not url.startswith("sqlite"):
            address = f"{url}"
            _drop(address)
        early = Database.__new__(Database)
        _open_at(early, address, revision)
        packed = encode(made(7, alerts=(fired("panic: desperate > 3"),)))
        with early.transaction() as connection:
            own = writer.Writer.__new__(writer.Writer)
            own._database, own._concepts = early, {}
            own._insert(connection, [writer._Waiting(packed)], {})
        early.close()
        with Store(address) as store:
            assert same(store.get(made(7).id) or made(8), made(7, alerts=(fired("panic: desperate > 3"),)))
            fill(store, [made(8)])
            assert store.save_rule("calm > 1").name == "calm > 1" and len(store.search(emotion="sad").items) == 2
            with store._database._writer.connect() as connection:
                context = MigrationContext.configure(connection, opts={"version_table": tables.REVISION, "compare_type": True})
                changes = list(compare_metadata(context, tables.METADATA))
                assert changes == [] and context.get_current_revision() == revisions[-1]


def _open_at(database: Database, address: str, revision: str) -> None:
    from affectlens.server.database import _url

    database.url, database._file = _url(address), None
    database.sqlite = database.url.get_backend_name() == "sqlite"
    database._writer, database._readers = database._connect(writer=True), database._connect(writer=False)
    with database.transaction() as connection:
        tables.migrate(connection, to=revision)


def _drop(address: str) -> None:
    database = Database(address)
    with database.transaction() as connection:
        tables.METADATA.drop_all(connection)
        connection.execute(sql(f"drop table {tables.REVISION}"))
    database.close()


def test_the_revisions_are_all_tested() -> None:
    files = {path.stem for path in (tables.MIGRATIONS / "versions").glob("*.py")}
    assert files == {"r0001", "r0002"}, "add the new revision to test_every_earlier_revision_is_brought_up"


def test_a_later_version_is_not_touched(url: str) -> None:
    with Store(url) as store:
        fill(store, [made(1)])
    database = Database(url)
    with database.transaction() as connection:
        connection.execute(sql(f"update {tables.REVISION} set version_num = '9999'"))
    database.close()
    with pytest.raises(StoreError, match="revision 9999, which a later affectlens wrote: upgrade"):
        Store(url)


def test_many_open_an_empty_store_at_once(url: str) -> None:
    barrier = threading.Barrier(4)

    def use(n: int) -> None:
        barrier.wait()
        with Store(url) as store:
            store.put(made(n)).result(30)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    with Store(url) as store:
        assert store.count() == 4


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "text.db").write_text("this is no database, but a text that is long enough to be one " * 20)
    for address, said in {
        f"sqlite:///{tmp_path}/no/such/folder.db": "cannot be opened",
        str(tmp_path / "text.db"): "file is not a database",
        "sqlite://": "cannot be kept",
        ":memory:": "cannot be kept",
        "mysql://localhost/x": "sqlite:///FILE",
        "http://[": "no address|cannot be kept",
        f"postgresql://me:hunter2@127.0.0.1:{cluster.port}/nothing": "does not exist",
        "postgresql://me:hunter2@127.0.0.1:9/x": "cannot be opened",
    }.items():
        with pytest.raises(StoreError, match=said) as raised:
            Store(address)
        assert "\n" not in str(raised.value) and "hunter2" not in str(raised.value)


def test_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    with Store(str(tmp_path / "traces.db")) as store:
        fill(store, [made(1)])
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == dict.fromkeys(
            ("traces.db", "traces.db-wal", "traces.db-shm"), "0o600"
        )


def test_texts_are_in_no_message(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A record that the database refuses is named, not quoted."""
    caplog.set_level(logging.DEBUG)
    with Store(url) as store:
        first = made(1, prompt="hush hush")
        fill(store, [first])
        with pytest.raises(StoreError) as raised:
            store.put(replace(made(2, prompt="hush hush hush"), id=first.id)).result(30)
    assert "hush" not in caplog.text + str(raised.value)
