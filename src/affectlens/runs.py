"""Run directories: work that can be killed at any moment and goes on where it stopped.

    runs/NAME/run.json             what decides the content, the resume command, provenance
    runs/NAME/run.lock             held by the living process; the kernel frees it when that process dies
    runs/NAME/STAGE/inputs.json    what the stage was made from
    runs/NAME/STAGE/00000.parquet  shards, each written atomically, so one that exists is complete
    runs/NAME/STAGE/done.json      written last: the summary and the size of every file

>>> import tempfile
>>> out = tempfile.mkdtemp()
>>> with Run.open(out, what={"model": "toy"}, command=f"affectlens study toy --out {out}") as run:
...     stage = run.stage("stories", {"per concept": 5})
...     for i in stage.pending(3, ".json"):
...         write_json(stage.shard_path(i, ".json"), [i])
...     stage.finish({"stories": 3})
...     stage.pending(3, ".json"), stage.done
([], True)
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from affectlens.errors import AffectlensError, FormatError

logger = logging.getLogger(__name__)

FORMAT = 1
_TEMPORARY = ".tmp-"
_PACKAGES = (
    "affectlens", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface-hub",
    "gguf", "numpy", "scipy", "scikit-learn", "pyarrow", "vllm", "ray",
)  # fmt: skip
# What goes wrong with a place, not with the program: worth one line instead of a traceback.
_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.ENOTSUP,
}  # fmt: skip


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it is either all there or not there, whenever the process or the machine stops.

    Args:
        path: the file to write; missing folders are made, an existing file is replaced, a link is followed.

    Yields:
        A temporary path in the same folder with the same suffix (some writers insist on one), for any library
        to write to. It becomes `path` when the block ends, and is removed if the block raises.

    Raises AffectlensError: the place cannot be written (no permission, disk full, something in the way).

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("all of it")
    >>> target.read_text()
    'all of it'
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{target.name[-200:]}")
    with _one_line(target):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # fails here, before the work, when the place cannot be written
    try:
        with _one_line(target, only=temporary):
            yield temporary
        with _one_line(target):
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)  # the new name itself must survive a power cut too
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write plain data as JSON, atomically, with an indent. Keys keep their order: in a figure it has a meaning.

    Args:
        path: the file to write.
        obj: dicts with text or whole-number keys, lists, tuples, text, numbers, booleans, None; and
            dataclasses (as dicts), numpy numbers and arrays (as lists) and paths (as text).

    Raises:
        ValueError: a number is nan or infinite, which JSON cannot say; names where it is.
        TypeError: something is none of the above.
        AffectlensError: the place cannot be written.
    """
    text = json.dumps(_plain(obj), indent=1, ensure_ascii=False)
    with atomic_write(path) as temporary:
        # Half a surrogate pair (an odd file name) has no UTF-8; its backslash form is what JSON has for it.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: str | os.PathLike[str], *, fix: str = "restore it from a copy or delete it") -> Any:
    """Read a JSON file.

    Args:
        path: the file to read.
        fix: what the user can do about a broken one; ends the message.

    Raises:
        FormatError: missing, unreadable or not JSON, in one line.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(file, {"layers": (1, 2)})
    >>> read_json(file)
    {'layers': [1, 2]}
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}; {fix}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON ({str(error).splitlines()[0]}); {fix}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits; raises OSError if it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_id(obj: Any) -> str:
    """A short name for plain data that changes when the data change: 16 hexadecimal digits of a SHA-256.

    Args and errors as for `write_json`. The order of dict keys does not matter, tuples equal lists, and a
    dataclass equals the dict of its fields.

    >>> content_id({"layers": (1, 2), "seed": 0}) == content_id({"seed": 0, "layers": [1, 2]})
    True
    """
    text = json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Stage:
    """One step of a run: a folder of shards that is done, half done or not begun. Made by `Run.stage`.

    Attributes:
        path: its folder.
        id: content id of its inputs; put it into the inputs of the stages that build on this one.
    """

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        self.path, self.id = path, content_id(inputs)
        record = path / "inputs.json"
        if not record.exists() and path.exists() and any(path.iterdir()):
            raise AffectlensError(f"{path} holds files that no run made: move them, or choose another --out")
        fix = f"delete the folder {path} and run again"
        if not record.exists() or _fields(record, {"id", "inputs"}, fix=fix)["id"] != self.id:
            if (count := _empty(path, keep="inputs.json")) > 0:
                logger.warning("%s: the inputs changed, so %d old files are discarded", path, count)
            write_json(record, {"id": self.id, "inputs": inputs})

    @property
    def done(self) -> bool:
        """Whether `finish` was reached with these inputs and every file is still there, in full size."""
        return self._finished() is not None

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` was given; raises AffectlensError when the stage is not done."""
        if (finished := self._finished()) is None:
            raise AffectlensError(f"{self.path} is not finished: run the same command again to go on")
        return dict(finished["summary"])

    def shard_path(self, i: int, suffix: str) -> Path:
        """Where shard i belongs, "00003.parquet" for (3, ".parquet"); write it with `atomic_write`."""
        return self.path / f"{i:05d}{suffix}"

    def pending(self, n: int, suffix: str) -> list[int]:
        """Which of n shards are still to be written; what decides the division belongs in the inputs."""
        return [i for i in range(n) if not self.shard_path(i, suffix).exists()]

    def shards(self, n: int, suffix: str) -> list[Path]:
        """The n shards in order; raises FormatError when one is missing."""
        if missing := self.pending(n, suffix):
            raise FormatError(f"{self.shard_path(missing[0], suffix)} is missing: run the same command again")
        return [self.shard_path(i, suffix) for i in range(n)]

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the stage as done, with a summary of plain data for the report."""
        files = {file.name: file.stat().st_size for file in self._files()}
        write_json(self.path / "done.json", {"id": self.id, "summary": summary, "files": files})

    def _files(self) -> list[Path]:
        ours = ("inputs.json", "done.json")
        files = (file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))
        return [file for file in files if file.name not in ours]

    def _finished(self) -> dict[str, Any] | None:
        marker = self.path / "done.json"
        if not marker.exists():
            return None
        finished = _fields(marker, {"id", "summary", "files"}, fix="delete it and run again")
        sizes = {file.name: file.stat().st_size for file in self._files()}
        complete = all(sizes.get(name) == size for name, size in finished["files"].items())
        return finished if finished["id"] == self.id and complete else None


class Run:
    """A run directory that is open for this process alone. Use it in a ``with`` block, or call `close`.

    Attributes:
        path: the directory.
        what: the settings that decide the content.
        command: the command that goes on with this run.
    """

    def __init__(self, path: Path, what: dict[str, Any], command: str, lock: int) -> None:
        self.path, self.what, self.command, self._lock = path, what, command, lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, what: dict[str, Any], command: str, fresh: bool = False) -> Run:
        """Create a run directory, or go on with an existing one.

        Args:
            path: the directory; made if missing. A new run wants an empty one.
            what: the settings that decide the content (model, fingerprint, concept-set hash, options), plain
                data. Leave out what does not (batch size, number of workers).
            command: the command line that resumes the run.
            fresh: discard the stages of an existing run and its settings; other files stay.

        Raises:
            AffectlensError: in use by another process, made with other settings (lists them), not a run
                directory, or not writable.
            FormatError: its run.json is broken or from a newer affectlens.

        That existing output counts as done is from datatrove. Example: the top of this module.
        """
        path, record = Path(path), Path(path) / "run.json"
        wanted = _plain(what)
        with _one_line(path):
            path.mkdir(parents=True, exist_ok=True)
            names = {child.name for child in path.iterdir() if not child.name.startswith(".")}
        if "run.json" not in names and names - {"run.lock"}:
            raise AffectlensError(f"{path} is neither empty nor a run directory: choose another --out")
        lock = _lock(path)
        try:
            for leftover in [*path.glob(f"{_TEMPORARY}*"), *path.glob(f"*/{_TEMPORARY}*")]:
                leftover.unlink(missing_ok=True)
            state = {"format": FORMAT, "created": _now(), "what": wanted, "sessions": []}
            if record.exists() and not fresh:
                state = _recorded(record)
                _compare(path, state["what"], wanted)
            elif record.exists():
                if "run.lock" not in names:
                    _recorded(record)  # only its content can say that it is ours: never empty a stranger's
                for inputs in path.glob("*/inputs.json"):
                    _empty(inputs.parent)
            # Other package versions may have made other shards: keep every environment that took part.
            now: dict[str, Any] = {"command": command, "provenance": provenance()}
            if not state["sessions"] or {k: state["sessions"][-1].get(k) for k in now} != now:
                state["sessions"].append({"since": _now(), **now})
                version = now["provenance"]["packages"].get("affectlens")
                write_json(record, state | {"command": command, "affectlens": version})
        except BaseException:
            os.close(lock)
            raise
        return cls(path, wanted, command, lock)

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        """Enter a step of the run.

        Args:
            name: lower-case letters, digits and hyphens; the name of its folder.
            inputs: everything that decides what its files contain, plain data: options, the division into
                shards, the `Stage.id` of the stages it builds on. When it changes, the old files of this
                stage are discarded, which the log says.

        Raises:
            AffectlensError: the folder holds files that no run made.
            FormatError: its inputs.json is broken.
        """
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(f"a stage name has lower-case letters, digits and hyphens, unlike {name!r}")
        return Stage(self.path / name, inputs)

    def close(self) -> None:
        """Give the directory free for other processes."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Progress:
    """A progress bar on stderr with the time left; one line per step when stderr is not a terminal.

    >>> with Progress() as progress:
    ...     progress.start(2, "stories")
    ...     progress.advance(2)
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._label, self._count = "", 0

    def start(self, total: int, label: str) -> None:
        """Begin a step of `total` units (stories, shards), ending the one before."""
        self.finish()
        self._label, self._total, self._count, self._began = label, total, 0, time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console  # here, so that `--help` does not pay for it
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            text = TextColumn("{task.description}")
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def advance(self, n: int = 1) -> None:
        """Count n more units."""
        self._count += n
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def finish(self) -> None:
        """End the step, finished or not; without one, do nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._label:
            seconds = time.monotonic() - self._began
            print(f"{self._label}: {self._count} of {self._total} in {seconds:.1f} s", file=sys.stderr)
            self._label = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()


def provenance() -> dict[str, Any]:
    """What this process runs on: Python, platform, processors, packages, and our git commit if any.

    >>> sorted(provenance())
    ['commit', 'cpus', 'packages', 'platform', 'python']
    """
    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    commit = None
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():  # else the enclosing repository would be the user's, not ours
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)
            commit = answer.stdout.strip()
    system = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    return {**system, "packages": packages, "commit": commit}


def _recorded(record: Path) -> dict[str, Any]:
    """The state in an existing run.json, if it is one of ours."""
    fix = "restore it from a copy, use another --out, or --fresh to start again"
    state = _fields(record, {"format", "what", "sessions"}, fix=fix)
    if state["format"] != FORMAT:
        raise FormatError(f"{record} has format {state['format']!r}, not {FORMAT}: upgrade, or {fix}")
    return state


def _fields(record: Path, names: set[str], *, fix: str) -> dict[str, Any]:
    fields = read_json(record, fix=fix)
    if not isinstance(fields, dict) or not names <= fields.keys():
        raise FormatError(f"{record} is not the record of a run; {fix}")
    return fields


def _compare(path: Path, was: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix shards that were made with other settings."""
    old, new = _flat(was), _flat(wanted)
    changed = [k for k in sorted(old | new) if k not in old or k not in new or old[k] != new[k]]
    if changed:
        listed = ", ".join(f"{k} (was {_short(old, k)}, now {_short(new, k)})" for k in changed)
        raise AffectlensError(f"{path} was made with other settings: {listed}; use another --out, or --fresh")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = [_flat(v, f"{name}.{k}" if name else k) for k, v in value.items()]
    return {k: v for part in parts for k, v in part.items()}


def _short(settings: dict[str, Any], name: str) -> str:
    text = json.dumps(settings[name], ensure_ascii=False) if name in settings else "not set"
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(path: Path) -> int:
    """Lock a directory until the descriptor is closed or the process dies, however it dies."""
    with _one_line(path):
        lock = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode() or "unknown"
            os.close(lock)
            message = f"{path} is in use by process {holder}: wait for it, stop it, or use another --out"
            raise AffectlensError(message) from None
        except BaseException:
            os.close(lock)
            raise
    return lock


def _empty(path: Path, keep: str = "") -> int:
    """Remove what is in a stage folder, the marker that calls it done first and what makes it a stage last; return how much."""
    path.mkdir(exist_ok=True)
    children = sorted(
        (c for c in path.iterdir() if c.name != keep), key=lambda c: (c.name == "inputs.json", c.name != "done.json")
    )
    for child in children:
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    return len(children)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder; there the rename alone has to do.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_line(path: Path, only: Path | None = None) -> Iterator[None]:
    """Turn what is wrong with a place into one line; with `only`, not errors that name another file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PLACE or (only and error.filename not in (None, str(only), only)):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space and run again" if full else "choose another place"
        raise AffectlensError(f"cannot write {path}: {error.strerror}; {hint}") from error


def _plain(value: Any, where: str = "") -> Any:
    """Data as JSON knows them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where or 'the value'} is {value}, which JSON cannot say: use None")
        return float(value)
    if isinstance(value, dict):
        if odd := [k for k in value if not isinstance(k, (str, int))]:
            raise TypeError(f"{where or 'the dict'} has the key {odd[0]!r}: use text or whole numbers")
        return {str(k): _plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if hasattr(value, "tolist"):  # numpy numbers and arrays, without importing numpy
        return _plain(value.tolist(), where)
    raise TypeError(f"{where or 'the value'} is a {type(value).__name__}, which JSON cannot say")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
