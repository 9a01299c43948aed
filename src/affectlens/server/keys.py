"""API keys: a file with their hashes, a check that takes the same time whatever is presented, and a rate for each key.

The file has one key a line: a name, the SHA-256 of the key in hexadecimal, and perhaps how many requests a minute it may make::

    # team keys
    alice   9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    nightly 60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752 120

The key itself is in no file. It is 256 random bits, so a plain hash keeps it; ``affectlens keys new`` makes one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from affectlens.errors import FormatError
from affectlens.runs import atomic_write

PREFIX = "al-"
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<digest>[0-9a-fA-F]{64})(?:\s+(?P<rate>\d{1,9}))?")
_FIX = "write one key a line: NAME SHA256 [REQUESTS-A-MINUTE], or run affectlens keys new NAME"


@dataclass(frozen=True)
class Key:
    """Who may ask: a name, the SHA-256 of the key, and requests a minute (None for as many as they like)."""

    name: str
    digest: str
    rate: int | None = None


def read_keys(file: str | Path) -> tuple[Key, ...]:
    """Read a file of keys.

    Raises:
        FormatError: It cannot be read, has no keys, a line that is none, or a name or a key twice; names the line.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "keys"
        >>> _ = file.write_text("alice " + digest("al-secret") + " 60\\n")
        >>> [(key.name, key.rate) for key in read_keys(file)]
        [('alice', 60)]
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read ({error}): {_FIX}") from None
    keys: list[Key] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _LINE.fullmatch(words)
        if match is None:  # the line itself stays out of the message: it may hold a key by mistake
            raise FormatError(f"{file}, line {number} is no key: {_FIX}")
        key = Key(match["name"], match["digest"].lower(), int(match["rate"]) if match["rate"] else None)
        if key.rate == 0:
            raise FormatError(f"{file}, line {number} allows no request at all: take the line away, or give it a rate above 0")
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise FormatError(f"{file}, line {number} has the name or the key of an earlier line: each needs its own")
        keys.append(key)
    if not keys:
        raise FormatError(f"{file} holds no keys: {_FIX}")
    return tuple(keys)


def new_key(name: str, file: str | Path, *, rate: int | None = None) -> str:
    """Make a key, and put its hash into a file that only its owner can read.

    Args:
        name: Whose it is; it is said in traces and metrics.
        file: To add it to; made where there is none.
        rate: Requests a minute.

    Returns:
        The key, which is kept nowhere.

    Raises:
        FormatError: The name is taken or is none, or the file is broken.

    Example:
        >>> import tempfile
        >>> key = new_key("alice", Path(tempfile.mkdtemp()) / "keys")
        >>> key.startswith("al-"), len(key)
        (True, 46)
    """
    path = Path(file)
    known = read_keys(path) if path.exists() and path.read_bytes().strip() else ()
    if any(key.name == name for key in known):
        raise FormatError(f"{file} has a key of {name!r} already: take its line away, or choose another name")
    made = PREFIX + secrets.token_urlsafe(32)
    line = " ".join([name, digest(made), *([str(rate)] if rate else [])])
    if not _LINE.fullmatch(line):
        raise FormatError(f"{name!r} is no name for a key: use letters, digits and . _ @ -, 64 at most")
    old = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    with atomic_write(path) as temporary:
        temporary.write_text(old + "\n" * bool(old and not old.endswith("\n")) + line + "\n", encoding="utf-8")
        temporary.chmod(0o600)
    return made


def digest(key: str) -> str:
    """What stands for a key in the file."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keyring:
    """Knows keys, and how often each was used in the last minute. Safe to use from several threads.

    Args:
        keys: All of them.
        clock: Seconds; for tests.
    """

    def __init__(self, keys: Sequence[Key], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = tuple(keys)
        self._clock, self._lock = clock, threading.Lock()
        self._buckets = {key.name: (float(key.rate or 0), clock()) for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """Whose key this is. All keys are compared, each in constant time, so that how long it takes says nothing."""
        own, found = digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(own, key.digest):
                found = key
        return found

    def spend(self, key: Key) -> float:
        """Count a request: 0 when it may go on, else after how many seconds it might.

        A key may use its whole minute at once; what it has used comes back evenly.

        Example:
            >>> times = iter([0.0, 0.0, 0.0, 30.0]); ring = Keyring([Key("a", "", 2)], clock=lambda: next(times))
            >>> [ring.spend(Key("a", "", 2)) for _ in range(3)]
            [0.0, 0.0, 0.0]
        """
        if key.rate is None:
            return 0.0
        with self._lock:
            left, since = self._buckets[key.name]
            now = self._clock()
            left = min(float(key.rate), left + (now - since) * key.rate / 60)
            allowed = left >= 1
            self._buckets[key.name] = (left - allowed, now)
            return 0.0 if allowed else (1 - left) * 60 / key.rate
