"""What the server does not let happen: strangers, floods, stalls, leaks; and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from affectlens.engine import Request, Sampling, open_engine
from affectlens.engines.toy import ToyEngine
from affectlens.errors import AffectlensError, Busy, EngineError, FormatError
from affectlens.server.app import refuse_open
from affectlens.server.keys import Key, Keyring, digest, new_key, read_keys
from affectlens.server.outlet import listen
from affectlens.server.settings import Settings
from affectlens.server.store import Status
from affectlens.sharing import Cancelled, ModelFailed, SharedEngine, TimedOut, in_a_thread
from served import HI, Running, Slow, serving, toy_vectors

LONG = {"model": "toy", "messages": HI, "max_tokens": 400, "seed": 3}
JSON = "Host: localhost\r\nContent-Type: application/json\r\n"
STEP = 0.01
"""Seconds of a token of the slow toy."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("limits"), max_tokens=40, max_body=100_000, body_time=1.0) as running:
        yield running


def raw(server: Running, data: bytes, *, seconds: float = 10.0) -> tuple[int, bytes]:
    """Send bytes as they are; the status and all that comes back."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=seconds) as connection:
        connection.sendall(data)
        came = b""
        while piece := connection.recv(65536):
            came += piece
            head, _, rest = came.partition(b"\r\n\r\n")
            if (length := re.search(rb"content-length: (\d+)", head.lower())) and len(rest) >= int(length[1]):
                break
    return int(came.split(b" ")[1]) if came else 0, came


def begin(server: Running, body: dict[str, Any], *, receive: int | None = None) -> socket.socket:
    """A request whose answer is not read yet."""
    where = urlsplit(server.url)
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.connect((where.hostname, where.port))
    connection.settimeout(20)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


# ── who may ask ──


def test_only_loopback_goes_without_keys() -> None:
    refuse_open(Settings(host="::1"), ())
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(AffectlensError, match="--api-keys"):
            refuse_open(Settings(host=host), ())
        refuse_open(Settings(host=host), (Key("a", digest("x")),))


def test_another_name_for_this_machine_is_refused(server: Running) -> None:
    """A page elsewhere can make its own name point here (DNS rebinding), and would then be of the same origin."""
    port = urlsplit(server.url).port
    for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("[::1]:80", 200), ("LOCALHOST", 200),
                         ("evil.example", 421), ("evil.example:8000", 421), ("127.0.0.1.evil.example", 421), ("[::1", 400),
                         ("a:b", 400)):  # fmt: skip
        assert raw(server, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())[0] == status, host


def test_pages_elsewhere_are_refused(server: Running) -> None:
    body = {"model": "toy", "messages": HI, "max_tokens": 2}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example", "http://[", "file://"):
        answer = server.post("/v1/chat/completions", body, headers={"Origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error", origin
        assert server.client.delete("/v1/rules/1", headers={"Origin": origin}).status_code == 403
    assert server.post("/v1/chat/completions", body, headers={"Origin": server.url}).status_code == 200
    # What a form can send without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = server.client.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": kind})
        assert answer.status_code == 415, kind
    answer = server.client.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


def test_headers_of_every_answer(server: Running) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/v1/emotions/none", "/metrics", "/openapi.json"):
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-request-id"].startswith("req-")
        assert "server" not in headers and "access-control-allow-origin" not in headers


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key("alice", file)
    other = new_key("ci", file, rate=30)
    assert file.stat().st_mode & 0o777 == 0o600 and key not in file.read_text() and digest(key) in file.read_text()
    keys = read_keys(file)
    assert [(each.name, each.rate) for each in keys] == [("alice", None), ("ci", 30)]
    ring = Keyring(keys)
    assert ring.find(key) == keys[0] and ring.find(other) == keys[1] and ring.find(key + "x") is None and ring.find("") is None
    with pytest.raises(FormatError, match="already"):
        new_key("alice", file)
    with pytest.raises(FormatError, match="no name"):
        new_key("a b", file)
    for text, said in (("", "no keys"), ("alice", "line 1"), (f"a {'0' * 63}", "line 1"), (f"a {'0' * 64} 0", "no request"),
                       (f"a {'0' * 64}\na {'1' * 64}", "line 2"), (f"a {'0' * 64}\nb {'0' * 64}", "line 2"),
                       ("\udcff", "cannot be read")):  # fmt: skip
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(FormatError, match=said) as error:
            read_keys(file)
        assert "0" * 60 not in str(error.value), "what may be a key is not repeated"


def test_a_rate_comes_back_evenly() -> None:
    now = [0.0]
    ring = Keyring([Key("a", digest("a"), 6)], clock=lambda: now[0])
    key = ring.find("a")
    assert key is not None
    assert [ring.spend(key) for _ in range(6)] == [0.0] * 6 and ring.spend(key) == pytest.approx(10)
    now[0] = 9
    assert ring.spend(key) == pytest.approx(1)
    now[0] = 10
    assert ring.spend(key) == 0 and ring.spend(key) == pytest.approx(10)
    now[0] = 1e6
    assert sum(ring.spend(key) == 0 for _ in range(50)) == 6


# ── what may be sent ──


def test_bodies_that_are_too_large(server: Running) -> None:
    big = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "x" * 200_000}]})
    answer = server.client.post("/v1/chat/completions", content=big, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    # Refused by what it says of itself, before it is sent; and while it is read, where it says nothing.
    head = "POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in ("20000000", "9" * 400, "-1", "1e3"):
        assert raw(server, f"{head}Content-Length: {length}\r\n\r\n".encode())[0] in (400, 413)
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    more = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    assert raw(server, chunked + 3 * more + b"0\r\n\r\n")[0] == 413, "it is heard out"
    assert raw(server, chunked + 60 * more)[0] == 413, "but not without end"
    assert server.client.get("/health").status_code == 200


def test_bodies_that_do_not_come(server: Running) -> None:
    before = time.monotonic()
    status, _ = raw(server, f"POST /v1/score HTTP/1.1\r\n{JSON}Content-Length: 50\r\n\r\n{{".encode())
    assert status == 408 and 0.5 < time.monotonic() - before < 5


def said(content: str, more: str = "") -> bytes:
    """A chat whose message is a piece of JSON, with more fields behind it."""
    return f'{{"model": "toy", "max_tokens": 1, "messages": [{{"role": "user", "content": {content}}}]{more}}}'.encode()


HOSTILE = [
    b"", b"{", b"[]", b"null", b'"text"', b"1", b"{}", b"\xff\xfe", b"[" * 90_000, b'{"a":' * 15_000, b'{"model": 1e999}',
    b'{"n": NaN}', b'{"model": "toy", "messages": {"0": 1}}',
    b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    said('"\\ud800"'), said('"\\u0000"'), said('""'), said("{}"), said('"x"', ', "seed": ' + "9" * 5000),
    said('"x"', ', "\\ud800": 1'), said('"x"', ', "rules": ["' + "(" * 999 + '"]'),
    said('"x"', ', "emotion_bias": {"\\ud800": 0.1}'), said('"x"', ', "metadata": {"a": {"b": 1}}'),
    said('"x"', ', "model": "other"'), said('"x"}' + ', {"role": "user", "content": "x"}' * 2500),
]  # fmt: skip
ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rules", "/v1/rules/try", "/v1/rules/1/mute"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_hostile_bodies(server: Running, path: str) -> None:
    for body in HOSTILE:
        answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (path, body[:80], answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"} and len(answer.content) < 5000
    assert server.idle() and server.client.get("/ready").json()["ready"]


def test_malformed_bodies_by_the_thousand(server: Running) -> None:
    """Valid requests with something changed, cut or put in at random; seeded. ``AFFECTLENS_FUZZ`` says how many."""
    rng = random.Random(0)
    base = json.dumps(
        {"model": "toy", "messages": HI, "max_tokens": 2, "emotion_bias": {"calm": 0.1}, "stop": ["a"],
         "readings": {"emotions": ["calm"], "every": 2}, "rules": ["calm > 3 for 2 tokens"], "n": 1, "temperature": 0.5}
    )  # fmt: skip
    pieces = [
        "null",
        "[]",
        "{}",
        "-1",
        "1e400",
        '"\\ud83d"',
        "\\u0000",
        "true",
        '"all"',
        ":",
        ",",
        "}",
        "]",
        '"',
        "😀",
        " ",
        "9" * 400,
    ]
    statuses = set()
    for _ in range(int(os.environ.get("AFFECTLENS_FUZZ", "300"))):
        text = base
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(text)), rng.choice([0, 0, 1, 2, 8])
            text = text[:at] + rng.choice(pieces) + text[at + length :]
        answer = server.client.post("/v1/chat/completions", content=text.encode(), headers={"Content-Type": "application/json"})
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (text, answer.text)
    assert statuses >= {200, 400} and server.idle()


def test_what_is_no_http(server: Running) -> None:
    for data in (
        b"\x16\x03\x01\x00\xa5\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n",
        b"GET /" + b"a" * 100_000,
        b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ):
        raw(server, data + b"\r\n\r\n")
    assert raw(server, b"GET /v1/models HTTP/1.1\r\n\r\n")[0] == 400
    key = "Sec-WebSocket-Key: aGVsbG8gd29ybGQhISE=\r\nSec-WebSocket-Version: 13\r\n"
    upgrade = f"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n".encode()
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=5) as connection:
        connection.sendall(upgrade)
        assert b"101" not in connection.recv(100).split(b"\r\n")[0]
    assert server.client.get("/health").status_code == 200


def test_schemathesis_finds_no_server_error(server: Running, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("schemathesis")
    if not command.exists():
        assert os.environ.get("AFFECTLENS_CI") != "1", "schemathesis is missing: pip install 'affectlens[dev]'"
        pytest.skip("schemathesis is not installed")
    made = subprocess.run(
        [command, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "8", "--workers", "1",
         "--exclude-path", "/v1/events", "--seed", "1", "--request-timeout", "30", "--no-color",
         "--phases", "examples,coverage,fuzzing"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-1000:]
    assert server.idle() and server.client.get("/ready").json()["ready"]


# ── who leaves, who stalls, who comes too late ──


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("slow"), engine=Slow(STEP), concurrency=2, queue=1) as running:
        yield running


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_place_at_once(slow: Running, stream: bool) -> None:
    connections = [begin(slow, {**LONG, "stream": stream, "seed": seed}) for seed in range(2)]
    while slow.service.engine.depth != (0, 2):
        time.sleep(0.005)
    if stream:
        assert b"200 OK" in connections[0].recv(4096)
    time.sleep(5 * STEP)
    waiting = begin(slow, {**LONG, "max_tokens": 1})
    while slow.service.engine.depth != (1, 2):
        time.sleep(0.005)
    left = time.monotonic()
    connections[0].close()
    while slow.service.engine.depth != (0, 2):
        assert time.monotonic() - left < 2, "the place of who left is taken by who waited"
        time.sleep(0.002)
    assert b"200 OK" in waiting.recv(4096)
    connections[1].close()
    waiting.close()
    assert slow.idle(2), "400 tokens would have taken four seconds"
    while slow.service._streams:
        assert time.monotonic() - left < 10, "its thread ends as well"
        time.sleep(0.01)


def test_who_hangs_up_while_waiting(slow: Running) -> None:
    busy = [begin(slow, {**LONG, "seed": seed}) for seed in range(2)]
    while slow.service.engine.depth != (0, 2):
        time.sleep(0.005)
    waiting = begin(slow, LONG)
    while slow.service.engine.depth != (1, 2):
        time.sleep(0.005)
    waiting.close()
    end = time.monotonic() + 2
    while slow.service.engine.depth != (0, 2) and time.monotonic() < end:
        time.sleep(0.005)
    assert slow.service.engine.depth == (0, 2)
    for each in busy:
        each.close()
    assert slow.idle(2)


def test_a_full_queue_says_when_to_come_again(slow: Running) -> None:
    busy = [begin(slow, {**LONG, "seed": seed}) for seed in range(3)]
    while slow.service.engine.depth != (1, 2):
        time.sleep(0.005)
    for stream in (True, False):
        answer = slow.post("/v1/chat/completions", {**LONG, "stream": stream})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert slow.client.get("/health").status_code == 200, "who only looks is let in"
    assert 'affectlens_requests_total{kind="chat",outcome="busy"}' in slow.client.get("/metrics").text
    for each in busy:
        each.close()
    assert slow.idle(2)
    error = slow.post("/v1/chat/completions", {**LONG, "n": 3}).json()["error"]
    assert error["param"] == "n" and "more than the 2" in error["message"]


def test_the_loop_is_never_blocked(slow: Running) -> None:
    busy = [begin(slow, {**LONG, "stream": True, "readings": {"emotions": "all"}, "seed": seed}) for seed in range(2)]
    took = []
    for _ in range(30):
        before = time.monotonic()
        assert slow.client.get("/health").status_code == 200
        took.append(time.monotonic() - before)
    for each in busy:
        each.close()
    # Two may be held up by something else on the machine: a loop that computes holds up all.
    assert sorted(took)[-3] < 0.5 and slow.idle(2)


@pytest.mark.parametrize("stream", [True, False])
def test_the_time_limit_ends_a_reply_with_what_it_has(tmp_path: Path, stream: bool) -> None:
    with serving(tmp_path, engine=Slow(STEP), time_limit=0.3, concurrency=1) as server:
        before = time.monotonic()
        if stream:
            with server.client.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
                lines = [line for line in answer.iter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            last = json.loads(lines[-2][6:])
            reason, ours = last["choices"][0]["finish_reason"], last["affectlens"]
        else:
            made = server.post("/v1/chat/completions", LONG).json()
            reason, ours = made["choices"][0]["finish_reason"], made["affectlens"]
            assert 0 < made["usage"]["completion_tokens"] < 60
        assert time.monotonic() - before < 3 and reason == "length" and ours["finish"] == "timeout" and ours["summary"]["top"]
        assert server.client.get(f"/v1/traces/{ours['trace']}").json()["finish"] == "timeout"


def test_waiting_has_an_end_too(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=1, time_limit=0.3) as server:
        with server.service.engine.place():
            answer = server.post("/v1/chat/completions", {**LONG, "max_tokens": 1})
        assert answer.status_code == 429 and "no room was found" in answer.json()["error"]["message"]
        assert server.idle() and server.post("/v1/chat/completions", {**LONG, "max_tokens": 1}).status_code == 200


def test_a_slow_reader_is_cut_off_and_holds_nobody_up(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=20, stall=0.5, buffer=16) as server:
        # More than the buffers of both kernels hold; one reply of the toy is too short for that.
        body = {**LONG, "stream": True, "readings": {"emotions": "all", "prompt": True}, "n": 16}
        stuck = begin(server, body, receive=4096)
        before = time.monotonic()
        assert server.chat(max_tokens=10)["usage"]["completion_tokens"] == 10
        assert time.monotonic() - before < 5
        assert server.idle(20), "its place is free"
        end = time.monotonic() + 20
        while 'outcome="cancelled"} 1.0' not in server.client.get("/metrics").text and time.monotonic() < end:
            time.sleep(0.05)
        assert 'affectlens_requests_total{kind="chat",outcome="cancelled"} 1.0' in server.client.get("/metrics").text
        stuck.settimeout(20)
        came = b""
        try:
            while piece := stuck.recv(65536):
                came += piece
        except OSError:
            pass
        assert b"[DONE]" not in came, "it was cut off"


def test_what_was_said_needs_no_place_however_slowly_it_is_read(tmp_path: Path) -> None:
    with serving(tmp_path, concurrency=2) as server:
        body = {**LONG, "max_tokens": 600, "stream": True, "logprobs": True, "top_logprobs": 20, "readings": {"emotions": "all"}}
        stuck = [begin(server, {**body, "seed": seed}, receive=4096) for seed in (2, 5)]
        until_both = time.monotonic() + 10
        while server.service.engine.depth != (0, 2) and time.monotonic() < until_both:
            time.sleep(0.005)
        assert server.idle(20), "a reader has 30 seconds before it is cut off"
        ended = [server.service.store.search().items[i].tokens for i in range(2)]
        assert all(n > 300 for n in ended), "they were generated to their end and are kept"
        for each in stuck:
            each.close()
        time.sleep(0.1)
        assert 'affectlens_requests_total{kind="chat",outcome="cancelled"} 0.0' in server.client.get("/metrics").text


def test_a_reader_who_is_slow_but_reads_gets_all(tmp_path: Path) -> None:
    with serving(tmp_path, stall=5, buffer=16) as server:
        connection = begin(server, {**LONG, "max_tokens": 300, "stream": True, "readings": {"emotions": "all"}}, receive=4096)
        came = b""
        while b"[DONE]" not in came:
            piece = connection.recv(4096)
            assert piece
            came += piece
            time.sleep(0.0005)
        assert came.count(b'"finish_reason":"length"') == 1 and server.idle()
        connection.close()


def test_followers_are_limited_and_do_not_hold_up(tmp_path: Path) -> None:
    with serving(tmp_path, listeners=1, heartbeat=0.1, stall=0.3, buffer=8) as server:
        with server.client.stream("GET", "/v1/events") as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": affectlens"
            with httpx.Client(base_url=server.url) as other:
                again = other.get("/v1/events")
                assert again.status_code == 429 and again.headers["retry-after"]
            assert [line for line, _ in zip((line for line in lines if line), range(2), strict=False)] == [": heartbeat"] * 2
        end = time.monotonic() + 5
        while len(server.server.config.app.state.events) and time.monotonic() < end:  # type: ignore[union-attr]
            time.sleep(0.02)
        assert len(server.server.config.app.state.events) == 0  # type: ignore[union-attr]


# ── what goes wrong inside ──


class Failing(ToyEngine):
    """The toy, which fails at the fifth token of a reply whose seed is 13."""

    def _pick(self, logits: Any, sampling: Sampling, rng: Any) -> int:
        if sampling.seed == 13:
            self.count = getattr(self, "count", 0) + 1
            if self.count % 5 == 0:
                raise RuntimeError("out of memory, secret detail")
        return super()._pick(logits, sampling, rng)


def test_a_model_that_fails_is_said_and_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path, engine=Failing()) as server:
        answer = server.post("/v1/chat/completions", {**LONG, "seed": 13})
        assert answer.status_code == 500 and "secret" not in answer.text and "RuntimeError" in answer.text
        with server.client.stream("POST", "/v1/chat/completions", json={**LONG, "seed": 13, "stream": True}) as stream:
            assert stream.status_code == 200
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["type"] == "server_error"
        assert server.chat()["usage"]["completion_tokens"] == 20 and server.idle()
        assert server.client.get("/ready").json()["ready"]


def test_a_store_that_does_not_answer_costs_no_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, commit=0.2) as server:
        kept: list[Any] = []
        put = server.service.store.put
        monkeypatch.setattr(server.service.store, "put", lambda record: kept.append(record) or Future())
        before = time.monotonic()
        assert server.chat()["usage"]["completion_tokens"] == 20
        assert 0.2 <= time.monotonic() - before < 5 and len(kept) == 1
        monkeypatch.setattr(server.service.store, "put", put)
        monkeypatch.setattr(server.service.store, "healthy", lambda: False)
        answer = server.client.get("/ready")
        assert answer.status_code == 503 and not answer.json()["store"]


def test_a_store_that_hangs_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, commit=30) as server:
        store, hang = server.service.store, threading.Event()
        monkeypatch.setattr(store, "put", lambda record: Future())
        monkeypatch.setattr(store, "status", lambda: Status(waiting=1, lag=31.0))
        monkeypatch.setattr(store, "rules", lambda: hang.wait(30) and [])
        server.service.armed._read = -float("inf")
        looking = [threading.Thread(target=lambda: server.client.get("/v1/rules")) for _ in range(45)]
        for thread in looking:  # more than there are threads for those who look
            thread.start()
        before = time.monotonic()
        assert server.chat()["usage"]["completion_tokens"] == 20 and time.monotonic() - before < 10
        assert not store.healthy()
        hang.set()
        for thread in looking:
            thread.join(30)


def test_a_fault_of_ours_has_openais_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:

        def broken(*_: Any, **__: Any) -> None:
            raise KeyError("secret")

        monkeypatch.setattr(server.service, "call", broken)
        answer = server.post("/v1/chat/completions", {"model": "toy", "messages": HI})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text
        assert answer.headers["content-security-policy"] and 'outcome="error"} 1.0' in server.client.get("/metrics").text


# ── the end ──


def test_draining_ends_streams_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path, engine=Slow(STEP)) as server:
        lines: list[str] = []

        def read(body: dict[str, Any]) -> None:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read, args=({**LONG, "stream": True},))
        reader.start()
        while server.service.engine.depth != (0, 1) or not lines:
            time.sleep(0.01)
        with ThreadPoolExecutor(2) as pool:
            plain = pool.submit(server.post, "/v1/chat/completions", {**LONG, "seed": 4})
            while server.service.engine.depth != (0, 2):
                time.sleep(0.005)
            drained = pool.submit(server.service.drain, 0.2)
            while not server.service.draining:
                time.sleep(0.005)
            answer = httpx.post(f"{server.url}/v1/chat/completions", json={**LONG, "max_tokens": 1})
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert httpx.get(f"{server.url}/ready").status_code == 503
            assert drained.result(10) is True
            made = plain.result(10).json()
        reader.join(10)
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2][6:])
        assert last["choices"][0]["finish_reason"] == "length" and last["affectlens"]["finish"] == "shutdown"
        assert made["affectlens"]["finish"] == "shutdown" and made["choices"][0]["message"]["content"]
        assert server.service.store.get(last["affectlens"]["trace"]) is not None


def test_no_thread_is_left(tmp_path: Path) -> None:
    def ours() -> set[threading.Thread]:
        return {
            thread for thread in threading.enumerate() if "affectlens" in thread.name or thread.name in ("store", "test server")
        }

    before = ours()
    with serving(tmp_path) as server:
        server.chat()
        stuck = begin(server, {**LONG, "stream": True})
        assert ours() > before
    stuck.close()
    assert ours() == before


def serve(tmp_path: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """``affectlens serve`` in a process of its own."""
    if not (tmp_path / "vectors").exists():
        toy_vectors().save(tmp_path / "vectors")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "vectors" / "calibration.json").rename(tmp_path / "elsewhere" / "calibration.json")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "affectlens.cli", "serve", "vectors", "--port", "0", "--calibration", "elsewhere", *options]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if match := re.search(r"at (http://\S+)/v1", line):
            return process, match[1]
    raise AssertionError(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_replies_end(tmp_path: Path, number: signal.Signals) -> None:
    process, url = serve(tmp_path)
    try:
        assert httpx.get(f"{url}/v1/emotions").json()["data"][0]["safe"] == [-0.15, 0.15]
        lines: list[str] = []

        def read() -> None:
            body = {"model": "toy", "messages": HI, "max_tokens": 900, "seed": 3, "stream": True, "temperature": 1.5}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        end = time.monotonic() + 60
        while len(lines) < 5 and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(number)
        reader.join(60)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(60) == 0
        trace = json.loads(lines[-2][6:])["affectlens"]["trace"]
    finally:
        process.kill()
        process.wait()
    from affectlens.server.store import Store

    with Store(str(tmp_path / "traces.db")) as store:
        assert store.get(trace) is not None


def test_what_is_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    process, url = serve(tmp_path)
    try:
        made = [
            httpx.post(f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 5, "seed": seed}).json() for seed in range(3)
        ]
        begun = httpx.Client(timeout=30)
        with begun.stream("POST", f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 1500, "stream": True}) as answer:
            next(answer.iter_lines())
            process.kill()
        begun.close()
    except httpx.RemoteProtocolError:
        pass
    finally:
        process.kill()
        process.wait()
    from affectlens.server.store import Store

    with Store(str(tmp_path / "traces.db")) as store:
        assert {each["id"] for each in made} <= {row.id for row in store.search().items}


def test_the_command_refuses_what_cannot_work(tmp_path: Path) -> None:
    toy_vectors().save(tmp_path / "vectors")

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "affectlens.cli", "serve", *options]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert made.returncode == 1 and "Traceback" not in made.stderr, made.stderr
        return made.stderr.splitlines()[-1]

    assert "--api-keys" in said("vectors", "--host", "0.0.0.0")
    (tmp_path / "keys").write_text("")
    assert "no keys" in said("vectors", "--api-keys", "keys")
    assert "^" in said("vectors", "--rules", "desparate >")
    assert "no vectors" in said("nowhere")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in said("vectors", "--port", str(taken.getsockname()[1]))
    assert "did you mean calm?" in said("vectors", "--watch", "clam")
    assert not shutil.rmtree(tmp_path / "vectors")


# ── the shared engine ──


def test_a_shared_engine_is_an_engine() -> None:
    plain, shared = ToyEngine(), SharedEngine(ToyEngine(), live=3, queue=50)
    prompts = [f"the {word}" for word in ("sea", "door", "hand", "light", "street", "table", "morning")]
    assert shared.generate(prompts, sampling=Sampling(max_tokens=9)) == plain.generate(prompts, sampling=Sampling(max_tokens=9))
    np.testing.assert_array_equal(shared.unembed(np.eye(3, 64, dtype="f")), plain.unembed(np.eye(3, 64, dtype="f")))
    assert list(shared.vocabulary) == list(plain.vocabulary) and shared.texts("neutral") == plain.texts("neutral")
    with pytest.raises(EngineError, match="the prompt is empty"):
        list(shared.run([Request("", sampling=Sampling())]))
    with ThreadPoolExecutor(10) as pool:
        said = list(pool.map(lambda i: shared.generate(prompts, sampling=Sampling(max_tokens=9, seed=i)), range(10)))
    assert said == [plain.generate(prompts, sampling=Sampling(max_tokens=9, seed=i)) for i in range(10)]
    assert shared.depth == (0, 0)
    shared.close()
    assert not shared.alive


COUNT_THREADS = """
import os, threading, time, torch
from affectlens.sharing import in_a_thread

def compute():
    torch.ones(512, 512) @ torch.ones(512, 512)
    torch.ones(2**20).exp_()
    return threading.current_thread()

count = lambda: len(os.listdir("/proc/self/task"))
before = count()
there = in_a_thread(compute)
end = time.monotonic() + 30
while (between := count()) > before and time.monotonic() < end:
    time.sleep(0.01)
compute()
print(before, between, count(), there.is_alive())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads of Linux")
def test_what_loads_a_model_leaves_no_helpers_behind() -> None:
    """Threads of OpenMP that stay would slow the one that generates."""
    pytest.importorskip("torch")
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, env=environ, check=True)
    before, between, after, alive = done.stdout.split()
    assert before == between and int(after) > int(before) and alive == "False"


def test_errors_and_ctrl_c_while_a_model_is_loaded() -> None:
    def broken() -> None:
        raise EngineError("no such model")

    with pytest.raises(EngineError, match="no such model"):
        in_a_thread(broken)
    ended = threading.Event()

    def long() -> None:
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as a terminal does
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        in_a_thread(long)
    assert ended.is_set()


def test_places_are_taken_in_order() -> None:
    shared = SharedEngine(open_engine("toy"), live=4, queue=4)
    first = shared.place(3)
    second, third = shared.place(2), shared.place(1)
    assert first.ready.done() and not second.ready.done() and not third.ready.done(), "a small one does not overtake"
    assert shared.depth == (3, 3)
    with pytest.raises(Busy, match="3 requests are waiting") as error:
        shared.place(2)
    assert 1 <= error.value.after <= 60
    with pytest.raises(EngineError, match="more than the 4 "):
        shared.place(5)
    first.cancel()
    assert second.ready.done() and third.ready.done() and shared.depth == (0, 3)
    second.cancel()
    second.cancel()
    third.cancel()
    assert shared.depth == (0, 0)
    with pytest.raises(Cancelled):
        list(third.run([Request("the sea")]))
    shared.close()


def test_closing_an_iterator_cancels_its_request() -> None:
    engine = Slow(STEP)
    shared = SharedEngine(engine, live=2)
    with shared.place() as place:
        stream = place.stream(Request("the sea", sampling=Sampling(max_tokens=500)))
        next(stream)
        stream.close()
        before = time.monotonic()
        assert len(place.generate(["the door"], sampling=Sampling(max_tokens=1))) == 1
        assert time.monotonic() - before < 1
    shared.close()


def test_a_place_lasts_until_its_deadline() -> None:
    shared = SharedEngine(Slow(0.05), live=1, queue=2, deadline=0.2)
    with pytest.raises(TimedOut, match=r"0\.2 seconds"):
        shared.generate(["the sea"], sampling=Sampling(max_tokens=100))
    assert shared.depth == (0, 0)
    with shared.place(deadline=5):
        waiting = shared.place()
        with pytest.raises(Busy, match="no room"):
            waiting.wait()
        assert shared.depth == (0, 1)
    shared.close()


def test_giving_up_a_place_wakes_who_waits_for_it() -> None:
    shared = SharedEngine(Slow(0.02), live=1, queue=1)
    running, waiting = shared.place(), shared.place()
    ended: list[str] = []

    def work(place: Any, name: str) -> None:
        try:
            place.wait()
            place.generate(["the sea"], sampling=Sampling(max_tokens=500))
        except Cancelled:
            ended.append(name)

    threads = [threading.Thread(target=work, args=each) for each in ((running, "running"), (waiting, "waiting"))]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    waiting.cancel()
    threads[1].join(2)
    running.cancel()
    threads[0].join(2)
    assert ended == ["waiting", "running"] and shared.depth == (0, 0)
    shared.close()


def test_closing_ends_everything() -> None:
    shared = SharedEngine(Slow(0.02), live=1, queue=1)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            shared.generate(["the sea"], sampling=Sampling(max_tokens=500))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert not shared.drain(0.05)
    with pytest.raises(Busy, match="shutting down"):
        shared.place()
    shared.close()
    for thread in threads:
        thread.join(2)
    assert [type(error) for error in failed] == [Cancelled, Cancelled]


def test_a_failure_ends_what_was_at_work_and_nothing_else() -> None:
    shared = SharedEngine(Failing(), live=4)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(shared.generate, ["the sea"], sampling=Sampling(max_tokens=3))
        assert len(good.result(10)) == 1
        with pytest.raises(ModelFailed, match="RuntimeError"):
            shared.generate(["the sea"], sampling=Sampling(max_tokens=30, seed=13))
    assert shared.alive and len(shared.generate(["the sea"], sampling=Sampling(max_tokens=3))[0]) > 0
    shared.close()


def test_keep_alive_and_pipelines(server: Running) -> None:
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
    for seed in range(5):
        body = json.dumps({"model": "toy", "messages": HI, "max_tokens": 2, "seed": seed})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["usage"]["completion_tokens"] == 2
    connection.close()


def test_small_pieces_are_sent_at_once() -> None:
    with listen("127.0.0.1", 0, stall=1) as made:
        assert made.proto == socket.IPPROTO_TCP, "else asyncio leaves Nagle's algorithm on: 40 ms for each small piece"
