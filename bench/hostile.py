"""Requests that nobody should send, as bytes, and a server that gets them: a section of ``bench/reliability.py``."""

from __future__ import annotations

import contextlib
import copy
import gzip
import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

from callers import Asked, Caller
from host import say
from running import Check, Memory, Section, Server, Setting

PATIENCE = 10.0
"""Seconds after which an answer is late."""

JSON = b"Content-Type: application/json"

WHOLE: dict[str, Any] = {
    "model": "toy",
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the old door"}],
    "max_tokens": 2,
    "seed": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "n": 1,
    "stop": ["a", "b"],
    "stream": False,
    "user": "x",
    "metadata": {"a": "b"},
    "emotion_bias": {"calm": 0.1, "desperate": -0.1},
    "readings": {"emotions": ["calm"], "every": 2, "prompt": True},
    "rules": ["calm > 3 for 2 tokens", {"when": "sad > 2", "actions": [{"do": "steer", "add": {"calm": 0.05}}]}],
    "compare": False,
}
VALID: dict[str, tuple[float, dict[str, Any]]] = {
    "/v1/chat/completions": (6.0, WHOLE),
    "/v1/completions": (3.0, {"model": "toy", "prompt": ["the sea", "the door"], "max_tokens": 2, "logprobs": 2, "echo": False}),
    "/v1/score": (1.0, {"messages": [{"role": "user", "content": "the calm sea"}], "emotions": ["calm"]}),
    "/v1/rules": (0.5, {"text": "fuzz: calm > 90", "actions": [{"do": "stop", "message": "x"}], "armed": False}),
    "/v1/rules/1/mute": (0.5, {"minutes": 5}),
    "/v1/rules/try": (0.1, {"text": "mean(calm, 5) > 2 until < 1 cooldown 10 tokens"}),
    "/v1/alerts/1/acknowledge": (0.5, {"note": "seen"}),
}
"""How often each path is asked, and a body that it takes."""

GET = ("/v1/traces", "/v1/alerts", "/v1/emotions/calm", "/v1/traces/x", "/v1/models/toy", "/v1/studies/x", "/v1/traces/export")
FIELDS = ("q", "emotion", "above", "alert", "since", "until", "limit", "after", "rule", "state", "format", "x")

VALUES: tuple[str, ...] = (
    *("null", "true", "false", "0", "-0", "-1", "1", "1.5", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-400", "0x10"),
    *("9" * 30, "9" * 5000, "1" + "0" * 400, "18446744073709551616", "-9223372036854775809", "1E3", ".5", "5.", "01"),
    *(
        '""',
        '" "',
        '"all"',
        '"calm"',
        '"calm > 3"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\u202e"',
    ),
    *('"😀"', '"é"', '"\\x"', "'x'", '"' + "x" * 5000 + '"', '"' + "(" * 900 + '"', "[]", "{}", "[[]]", '[{"a": []}]', "[null]"),
    *('{"a": {"b": {"c": 1}}}', '{"\\ud800": 1}', '{"": 1}', '{"calm": "x"}', '["calm", 1]', '[""]', "[" * 200 + "]" * 200),
)
"""What is put in place of a value; not all of it is JSON."""

PIECES = (*VALUES[:20], ":", ",", "}", "]", "{", "[", '"', "\\", "\n", "\x00", "\x7f", "/*", "//", "😀", " ", "\ufeff")


@dataclass(frozen=True)
class Attack:
    """Bytes that are sent to a server.

    Args:
        kind: Of the attack.
        data: What is sent.
        alone: Whether the connection is of no more use afterwards.
        answered: Whether an answer has to come; otherwise the caller hangs up once all is sent.
    """

    kind: str
    data: bytes
    alone: bool = False
    answered: bool = True


def attack(number: int, *, seed: int = 0) -> Attack:
    """The ``number``-th attack."""
    rng = random.Random(f"{seed} {number}")
    kinds, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    (kind,) = rng.choices(kinds, weights)
    made = KINDS[kind][1](rng)
    return Attack(kind, *made) if isinstance(made, tuple) else Attack(kind, made)


Made = bytes | tuple[bytes, bool] | tuple[bytes, bool, bool]


def _request(path: str, body: bytes, *headers: bytes, method: str = "POST", length: int | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", *(headers or (JSON,))]
    lines.append(f"Content-Length: {len(body) if length is None else length}".encode())
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _path(rng: random.Random) -> str:
    return rng.choices(list(VALID), [weight for weight, _ in VALID.values()])[0]


def _valid(rng: random.Random, path: str) -> dict[str, Any]:
    whole = copy.deepcopy(VALID[path][1])
    kept = {
        key: value for key, value in whole.items() if key in ("model", "messages", "max_tokens", "prompt") or rng.random() < 0.4
    }
    return kept or whole


def _text(rng: random.Random, path: str) -> str:
    return json.dumps(_valid(rng, path))


# ── kinds ──


def _mutated(rng: random.Random) -> Made:
    """A valid text with something changed, taken out or put in."""
    text = _text(rng, path := _path(rng))
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.choice([0, 0, 1, 2, 8])
        text = text[:at] + rng.choice(PIECES) + text[at + length :]
    return _request(path, text.encode("utf-8", "surrogatepass"))


def _truncated(rng: random.Random) -> Made:
    text = _text(rng, path := _path(rng))
    return _request(path, text[: rng.randrange(len(text))].encode())


def _typed(rng: random.Random) -> Made:
    """A valid object in which one value is another."""
    body = _valid(rng, path := _path(rng))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(body)
    node, key = rng.choice(places)
    node[key] = "\x1a"
    return _request(path, json.dumps(body).replace('"\\u001a"', rng.choice(VALUES)).encode("utf-8", "surrogatepass"))


def _keyed(rng: random.Random) -> Made:
    """Fields that nobody knows, fields that come twice, very many of them."""
    text = _text(rng, path := _path(rng))
    names = [
        "modle",
        "__proto__",
        "",
        "x" * 3000,
        "\\ud800",
        "model",
        "messages",
        "constructor",
        "affectlens",
        "functions",
        "tools",
    ]
    extra = ", ".join(
        f'"{rng.choice(names)}{rng.choice(["", "", i])}": {rng.choice(VALUES)}' for i in range(rng.choice([1, 1, 3, 300]))
    )
    return _request(path, (text[:-1] + ", " + extra + "}").encode("utf-8", "surrogatepass"))


def _nested(rng: random.Random) -> Made:
    depth = rng.choice([10, 100, 900, 1100, 5000, 60_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    nest = opened * depth + "1" + closed * rng.choice([0, depth])
    path = _path(rng)
    if rng.random() < 0.5:
        body = json.dumps({**_valid(rng, path), rng.choice(["metadata", "messages", "rules", "stop", "x"]): "\x1a"})
        nest = body.replace('"\\u001a"', nest)
    return _request(path, nest.encode())


def _encoded(rng: random.Random) -> Made:
    """Other encodings than UTF-8, said or not."""
    text = _text(rng, path := _path(rng)).replace("e", rng.choice(["é", "e", "\u2028"]))
    data = text.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig", "utf-8"]))
    headers = [rng.choice([JSON, JSON + b"; charset=utf-16", JSON + b"; charset=latin-1", JSON + b'; charset="'])]
    twist = rng.randrange(4)
    if twist == 0:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88", b"\x00"]) + data[at:]
    elif twist == 1:
        data, headers = gzip.compress(data), [*headers, b"Content-Encoding: " + rng.choice([b"gzip", b"br", b"zstd"])]
    elif twist == 2:
        data = rng.randbytes(rng.randint(1, 2000))
    return _request(path, data, *headers)


def _declared(rng: random.Random) -> Made:
    """A right body that is said to be something else."""
    kinds = [b"text/plain", b"", b"multipart/form-data; boundary=x", b"application/x-www-form-urlencoded", b"application/xml",
             b"json", b"application/json, text/plain", b"application/jsonp", b"\xff\xfe", b"application/json\x00",
             b"a" * 4000]  # fmt: skip
    path = _path(rng)
    return _request(path, _text(rng, path).encode(), b"Content-Type: " + rng.choice(kinds)), True


def _chunked(rng: random.Random) -> Made:
    """Chunks: right ones, wrong sizes, cut off."""
    data = _text(rng, path := _path(rng)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n".encode() + JSON + b"\r\n\r\n"
    cut = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 4)))
    parts = [data[a:b] for a, b in zip([0, *cut], [*cut, len(data)], strict=True) if b > a]
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    twist = rng.randrange(6)
    if twist == 0:
        return head + b"".join(chunks) + b"0\r\n\r\n", False
    if twist == 1:
        return head + b"".join(chunks) + b"0\r\nX-Trailer: " + rng.choice([b"x", b"\x00", b"y" * 3000]) + b"\r\n\r\n", True
    if twist == 2:
        size = rng.choice([b"zz", b"-5", b"0x5", b"F" * 30, b"5;" + b"x" * 2000, b" 5", b"\xff", b"5\n"])
        return head + size + b"\r\nhello\r\n0\r\n\r\n", True
    whole = head + b"".join(chunks)
    return whole[: rng.randrange(len(head), len(whole) + 1)], True, False


def _cut(rng: random.Random) -> Made:
    """A request that never becomes whole: its caller hangs up, in the head or in the body."""
    whole = _request(path := _path(rng), _text(rng, path).encode(), length=rng.choice([None, 10_000, 2**22]))
    return whole[: rng.randrange(1, len(whole))], True, False


def _large(rng: random.Random) -> Made:
    """Bodies above the limit, by what they say or by what comes."""
    if rng.random() < 0.9:
        return _request(_path(rng), b"", length=rng.choice([2**26 + 1, 2**31, 2**63, 10**25])), True
    return _request(_path(rng), b'{"model": "' + b"x" * (2**22 + 10)), True


def _headers(rng: random.Random) -> Made:
    """Junk in the head."""
    # A line that ends: where it has to be a chunk and is none, a server would rightly wait for its end.
    path, data = _path(rng), b'{"model": "toy"}\r\n'
    length = b"Content-Length: %d" % len(data)
    junk = rng.choice(
        [
            [b"X-Junk: " + rng.randbytes(30).replace(b"\n", b"").replace(b"\r", b"")],
            [b"X: " + b"y" * rng.choice([1000, 30_000, 100_000])],
            [b"X-%d: y" % i for i in range(rng.choice([90, 200, 3000]))],
            [length],
            [b"Content-Length: 5"],
            [b"Content-Length: -1"],
            [b"Content-Length: " + b"9" * 3000],
            [b"Transfer-Encoding: chunked"],
            [b"Transfer-Encoding: gzip, chunked"],
            [b"Host: other"],
            [b"no colon here"],
            [b": no name"],
            [b"Folded: a\r\n b"],
            [b"Expect: 100-continue"],
            [b"Expect: nothing"],
            [
                b"Upgrade: websocket",
                b"Connection: Upgrade",
                b"Sec-WebSocket-Key: aGVsbG8gd29ybGQhISE=",
                b"Sec-WebSocket-Version: 13",
            ],
            [b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABkAAQAAP__"],
            [b"Origin: http://elsewhere.example"],
            [b"Origin: http://["],
            [b"Authorization: Bearer " + rng.randbytes(20).hex().encode()],
            [b"Authorization: Basic \xff\xff"],
            [b"traceparent: " + rng.choice([b"00-zz", b"x" * 2000, b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"])],
            [b"Cookie: " + b"a=b; " * 2000],
            [b"Accept: " + b"text/*;q=0.1," * 500],
        ]
    )
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: localhost", JSON, length, *junk]
    return b"\r\n".join(lines) + b"\r\n\r\n" + data, True


def _line(rng: random.Random) -> Made:
    """Request lines: methods, paths and versions that are none, and no HTTP at all."""
    first = rng.choice(
        [
            b"BREW /v1/models HTTP/1.1",
            b"PUT /v1/chat/completions HTTP/1.1",
            b"TRACE / HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"CONNECT localhost:80 HTTP/1.1",
            b"GET http://localhost/v1/models HTTP/1.1",
            b"GET //etc/passwd HTTP/1.1",
            b"GET /dashboard/..%2f..%2fapp.py HTTP/1.1",
            b"GET /../../etc/passwd HTTP/1.1",
            b"GET /%00%ff%zz HTTP/1.1",
            b"GET /\xff\xfe HTTP/1.1",
            b"GET /" + b"a" * rng.choice([3000, 70_000]) + b" HTTP/1.1",
            b"GET / HTTP/9.9",
            b"GET / HTTP/1.0",
            b"GET /",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"PRI * HTTP/2.0",
            b"\x00" * 50,
            rng.randbytes(80).replace(b"\n", b""),
        ]
    )
    return first + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n", True, first.split(b" ")[-1] in (b"HTTP/1.1", b"HTTP/1.0")


def _query(rng: random.Random) -> Made:
    """Paths and queries of what is only looked at."""
    words = (
        "-1",
        "0",
        "1",
        "51",
        "9" * 40,
        "NaN",
        "inf",
        "1e400",
        "",
        "\x00",
        "\ud800",
        "calm",
        "clam",
        "all",
        "open",
        "true",
        "jsonl",
    )
    words += (
        "2026-07-01",
        "0000-00-00",
        "9999-12-31T23:59:59.999999+14:00",
        "1-1",
        "9" * 18 + "-1",
        "'; drop table records; --",
        "%",
        "x" * 5000,
    )
    asks = "&".join(f"{rng.choice(FIELDS)}={quote(rng.choice(words), errors='surrogatepass')}" for _ in range(rng.randint(1, 5)))
    path = rng.choice(GET) + (quote(rng.choice(words), safe="", errors="surrogatepass") if rng.random() < 0.2 else "")
    return _request(f"{path}?{asks}", b"", b"X: y", method=rng.choice(["GET", "GET", "GET", "DELETE", "HEAD"])), True


KINDS: dict[str, tuple[float, Callable[[random.Random], Made]]] = {
    "valid text, mutated": (30, _mutated),
    "JSON, cut short": (8, _truncated),
    "value of another kind": (20, _typed),
    "unknown and double fields": (6, _keyed),
    "deep nesting": (4, _nested),
    "wrong encoding": (6, _encoded),
    "wrong content type": (3, _declared),
    "chunked": (5, _chunked),
    "request never whole": (4, _cut),
    "too large": (1, _large),
    "junk in the head": (6, _headers),
    "wrong request line": (3, _line),
    "hostile query": (4, _query),
}
"""How often each kind comes, of a hundred, and what makes it."""


# ── the section ──


def fuzz(setting: Setting) -> Section:
    """100,000 malformed and hostile requests (``bench/hostile.py``) over kept-alive connections from four threads.

    Met when: no status is 5xx; no connection ends without the answer that has to come; every answer begins within ten seconds;
    a refusal by the application has OpenAI's shape; memory grows by at most 0.1 KB a request after the first half, by the
    upper end of the interval; the server is ready afterwards, nothing is at work, and a request has the answer it had before.
    """
    number = setting.of(100_000, 600)
    counted: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    lock, numbers = threading.Lock(), iter(range(number))
    # A reply that nobody bounded may be as long as the context, and take as long as it takes.
    with Server(setting.place("fuzz"), "--max-tokens", "64", vectors=setting.toy) as server:

        def work() -> None:
            nonlocal slowest
            attacker = _Attacker(server)
            while True:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return attacker.leave()
                case = attack(i)
                status, problem = attacker.throw(case)
                took = attacker.waited
                with lock:
                    counted[case.kind, status] += 1
                    slowest = max(slowest, took)
                    if problem or status.startswith("5") or took > PATIENCE:
                        wrong.append(f"{i} ({case.kind}): {status} after {took:.1f} s; {problem}")

        usual = Asked(
            0,
            "/v1/chat/completions",
            {"model": "toy", "messages": [{"role": "user", "content": "the sea"}], "max_tokens": 8, "seed": 5},
        )
        with Caller(server) as caller:
            before = caller.ask(usual)
        # What is read once for all rules that are tried, and kept, is no matter of these requests.
        first = _Attacker(server)
        assert first.throw(Attack("none", _request("/v1/rules/try", b'{"text": "calm > 3"}'))) == ("200", "")
        first.leave()
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
        Check(f"answers that do not come, begin after {PATIENCE:g} s or have another shape", "0", late, not wrong),
        Check("memory that a request leaves behind", *setting.at_most(0.1, slope, " KB")),
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
        self.waited = 0.0
        """Seconds until the latest answer began."""

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
        began = time.monotonic()
        try:
            connection = self._connection = self._connection or socket.create_connection(self._address, timeout=PATIENCE)
            with contextlib.suppress(OSError):  # it may be answered, and closed, before all is sent
                connection.sendall(case.data)
            if not case.answered:
                self.waited = 0.0
                self.leave()
                return "none", ""
            answer = http.client.HTTPResponse(connection, method=case.data.partition(b" ")[0].decode("latin-1"))
            answer.begin()
            self.waited = time.monotonic() - began
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.waited = time.monotonic() - began
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
