"""Records for the tests of what the server keeps, and a PostgreSQL of our own to keep them in."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affectlens.actions import policy
from affectlens.engine import Layout, Sampling
from affectlens.server.records import Record, asked
from affectlens.traces import Alert, Trace

NAMES = ("calm", "desperate", "happy", "afraid", "proud", "sad")
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "nobody",
    "in",
    "the",
    "old",
    "house",
    "by",
    "the",
    "harbour",
    "said",
    "a",
    "word",
    "about",
    "the",
    "storm",
]


def made(
    n: int,
    *,
    names: tuple[str, ...] = NAMES,
    tokens: int = 12,
    prompt: str = "how is the sea",
    reply: str | None = None,
    created: datetime | None = None,
    alerts: tuple[Alert, ...] = (),
    **more: Any,
) -> Record:
    """The ``n``-th record: made up, but of the shape that the server's have; the same ``n`` gives the same record."""
    rng = np.random.default_rng([n, 5])
    own = [str(word) for word in rng.choice(WORDS, tokens)] if reply is None else reply.split()
    asks = prompt.split()
    pieces = ["user: ", *(f"{word} " for word in asks), "assistant: ", *(f"{word} " for word in own)]
    roles = ["template", *["user"] * len(asks), "template", *["assistant"] * len(own)]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    offsets = tuple(zip([0, *ends[:-1]], ends, strict=True))
    n_prompt = len(asks) + 2
    turns = (("user", 1, n_prompt - 1),)
    ids = tuple(int(i) for i in rng.integers(2, 50000, len(pieces)))
    layout = Layout("".join(pieces), tuple(pieces), ids, offsets, tuple(roles), n_prompt, turns)
    scores = rng.normal(size=(len(pieces), len(names))).astype(np.float32)
    scores[[i for i, role in enumerate(roles) if role == "template"]] = np.nan
    id = f"chatcmpl-{n:06d}"
    policies = [policy(rule) for rule in dict.fromkeys(alert.text for alert in alerts)]
    plain = Record(
        id=id,
        created=created or NOON + timedelta(seconds=n),
        kind="chat",
        key="",
        model={"id": "made-up", "fingerprint": "0123456789abcdef", "dtype": "float32", "device": "cpu", "versions": {}},
        request=asked((("user", prompt),), sampling=Sampling(max_tokens=tokens, seed=n), policies=policies),
        text=" ".join(own),
        finish="stop",
        usage={"prompt_tokens": n_prompt, "completion_tokens": len(own)},
        timing={"queued": 0.01, "first_token": 0.05, "total": 0.5},
        trace=Trace(id, layout, "chat template", names, 4, scores, unit="z", alerts=alerts),
    )
    return replace(plain, **more)


def fired(rule: str, token: int = 10) -> Alert:
    """An alert as the monitor raises it; the rule's text is its name unless it has one in front."""
    name = rule.partition(":")[0] if ":" in rule else rule
    return Alert(name, rule, token, 1, "assistant", "the sea was calm", {"desperate": 3.25}, token, "", (1.0, 0.5, 2.0), "x")


def same(one: Record, other: Record) -> bool:
    """Whether two records are equal to the bit."""
    tables = ("scores", "visible", "gap", "other", "steered")
    for name in tables:
        a, b = getattr(one.trace, name), getattr(other.trace, name)
        if (a is None) != (b is None):
            return False
        if a is not None and (a.dtype != b.dtype or a.shape != b.shape or not np.array_equal(a, b, equal_nan=True)):
            return False
    facts = ("id", "layout", "format", "names", "layer", "unit", "other_names", "steering", "alerts")
    fields = ("id", "created", "kind", "key", "model", "request", "text", "finish", "usage", "timing", "company")
    return all(getattr(one.trace, f) == getattr(other.trace, f) for f in facts) and all(
        getattr(one, f) == getattr(other, f) for f in fields
    )


def missing(what: str) -> None:
    """Something of Debian is not there: in CI that is a failure, elsewhere a reason to skip."""
    reason = f"{what} is not installed: apt-get install -y --no-install-recommends {what}"
    if os.environ.get("AFFECTLENS_CI") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Cluster:
    """A PostgreSQL of our own in a temporary folder; root starts it as nobody, since it refuses to run as root.

    Args:
        fsync: Whether it waits for the disk, as it does by itself. Tests of ours need not.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        self._fsync = fsync
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        if not found:
            missing("postgresql")
        self._bin = found[-1].parent
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._server: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", self.data, "-U", "affectlens", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        self.start()

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [self._bin / program, *arguments], capture_output=True, text=True, cwd="/", check=False, **self._user
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        settings = [
            "fsync=off",
            "unix_socket_directories=",
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            "max_connections=80",
        ]
        options = [word for setting in settings for word in ("-c", setting)]
        log = (self.folder / "log").open("ab")
        self._server = subprocess.Popen(
            [self._bin / "postgres", "-D", self.data, *options], cwd="/", stdout=log, stderr=log, **self._user
        )
        for _ in range(300):
            done = subprocess.run([self._bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False)
            if done.returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """At once, as a power cut would."""
        if self._server is not None:
            self._server.send_signal(3)
            self._server.wait(30)
            self._server = None

    def sql(self, text: str, database: str = "postgres") -> str:
        where = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "affectlens", "-d", database)
        return self._run("psql", *where, "-At", "-v", "ON_ERROR_STOP=1", "-c", text).strip()

    def database(self) -> str:
        """The address of a new, empty database."""
        name = f"db{int(self.sql('select count(*) from pg_database'))}"
        self.sql(f"create database {name}")
        return f"postgresql://affectlens@127.0.0.1:{self.port}/{name}"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
