"""Run code that a model wrote, on a machine that is to be as it was afterwards.

A program runs as **one process with one thread**, started from nothing: an empty environment, no site-packages, a folder of its
own that is the only place it can write to, the interpreter's files and the system's libraries as the only ones it can read. It
cannot make processes or threads, sockets, links or folders, nor send signals to any process but itself; memory, computing time,
time on the wall, output, size and number of files are bounded, and whatever is left of it is killed. Limits that hold for one
process hold for the whole run that way, without control groups. How far the bound of files reaches is in ``docs/sandbox.md``.

Files and system calls are guarded by what the machine gives, tried in this order:

=================== ============================================= ===============================================
means               files and processes                           needs
=================== ============================================= ===============================================
namespaces          own mounts, processes, network, IPC; own user root (``CAP_SYS_ADMIN``)
user namespaces     the same, in a namespace of users             user namespaces that anyone may make
landlock            Landlock's rules; own user where root can     Linux 6.2; the program can see *that* files exist
=================== ============================================= ===============================================

In all three a filter of system calls (seccomp) allows only what a program needs that computes and writes files. The first use in
a process tries to break out by what should be impossible (read, write, call, signal, fork); means that fail this are not used,
and where none is left nothing is run. The result depends on the files and the command alone, as far as the program does: names
and order of files and the hash seed are fixed, and so are paths in what comes back. Time is not.

Source: method 16. What it has to stand is in ``tests/test_sandbox.py``.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from affectlens.errors import AffectlensError
from affectlens.experiments import Exec, Ran, confinement

MEANS: Mapping[str, str] = {
    "namespaces": "own mount, process, network, IPC and host-name namespaces under a user of its own",
    "user namespaces": "own user, mount, process, network, IPC and host-name namespaces",
    "landlock": "Landlock's rules for files (that files exist can be seen, their content cannot)",
}
"""What guards files and processes, the strictest first."""

GRACE = 60.0
"""Seconds more than the program's own that setting up and reading may take on a busy machine."""

# Owns nothing anywhere; below 65,536 so that containers with a small range of users have it too.
_USER = 64_731
# What root needs to work for another user: CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID by number.
_RIGHTS = sum(1 << number for number in (0, 1, 3, 5, 6, 7))
_STANDARD = str(Path(os.__file__).resolve().parent)
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/scratch", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
_PROBE = """
import json, os, socket, sys
secret, source, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
tries = {
    "read a file of ours": lambda: open(secret).read(),
    "read our source": lambda: open(source).read(),
    "write beside it": lambda: open(secret + ".new", "w").close(),
    "read our environment": lambda: open(f"/proc/{parent}/environ", "rb").read(),
    "open a socket": lambda: socket.socket(),
    "signal us": lambda: os.kill(parent, 0),
    "fork": lambda: os.fork() or os._exit(0),
}
broken = []
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    broken.append(name)
open("inside", "w").close()
print(json.dumps([broken, sorted(os.environ)]))
"""


def run(exec: Exec) -> Ran:
    """Run a program in the sandbox.

    Args:
        exec: Files, command, time and memory. The command is ``python``, with what follows it.

    Returns:
        How it ended, what it said, and the text files that were there afterwards (at most 100, of at most 100,000 bytes each;
        links are not followed). ``files`` is the outcome of a program that wrote more than 16 MB or 500 files, ``output`` of one
        that said more than 1 MB.

    Raises:
        AffectlensError: The command or a file's name cannot be used, or this machine has no means to confine a program: then
        nothing was run.

    Source: method 16.

    Example:
        >>> ran = run(Exec({"hello.py": "print(sum(range(5)))"}, ("python", "hello.py")))
        >>> ran.outcome, ran.code, ran.stdout
        ('exited', 0, '10\\n')
    """
    return _confined(exec, _means())


def available() -> str:
    """Which isolation a program gets on this machine, in words. It has been tried, not only looked up.

    Raises:
        AffectlensError: There is none, and nothing can be run; names what failed.
    """
    return (
        f"{MEANS[_means()]}; a filter of system calls (no network, no further process or thread, no signals to others); "
        "empty environment, one writable folder; bounds on memory, time, output and files"
    )


@functools.cache
def _means() -> str:
    """The first means that work here and keep a program in that tries to get out."""
    if sys.platform != "linux":
        raise AffectlensError(f"code of a model can only be run on Linux, this is {sys.platform}: leave out --allow-exec")
    problems = []
    for means in MEANS:
        if means == "namespaces" and os.geteuid() != 0:
            problems.append("namespaces: not root")
            continue
        if not (problem := _tried(means)):
            return means
        problems.append(f"{means}: {problem}")
    raise AffectlensError(
        f"no means to confine the code of a model ({'; '.join(problems)}): "
        "run on Linux 6.2 or later, or where user namespaces are allowed"
    )


def _tried(means: str) -> str:
    """What is wrong with these means here; nothing when a program cannot get out."""
    with tempfile.TemporaryDirectory(prefix="affectlens-") as folder:
        Path(folder).chmod(0o755)  # so that it is the sandbox that keeps others out
        secret = Path(folder, "secret")
        secret.write_text(secrets.token_hex())
        secret.chmod(0o644)
        command = ("python", "probe.py", str(secret), __file__, str(os.getpid()))
        try:
            ran = _confined(Exec({"probe.py": _PROBE}, command), means)
        except AffectlensError as error:
            return str(error)
        if not ran.passed:
            return (
                f"a program does not run in it ({ran.outcome}, {(ran.stderr.strip().splitlines() or ['no message'])[-1][:120]})"
            )
        broken, environment = json.loads(ran.stdout)
        broken += ["leave our environment behind"] * (not set(environment) <= {*_ENVIRONMENT, "LC_CTYPE"})
        broken += ["leave a file beside ours"] * (len(list(Path(folder).iterdir())) != 1)
        broken += ["write no file of its own"] * ("inside" not in ran.files)
        return f"a program in it could {', '.join(broken)}" if broken else ""


def _confined(exec: Exec, means: str) -> Ran:
    _check(exec)
    seconds = exec.seconds + GRACE
    for _ in range(2):  # a run that was stopped and went on has lost one
        # Each in a folder of its own: the first may have left files in it.
        with tempfile.TemporaryDirectory(prefix="affectlens-", ignore_cleanup_errors=True) as folder:
            said = _spoken(_specified(exec, means, os.path.realpath(folder)), seconds)
        if said is None:
            continue
        if "failed" in said:
            raise AffectlensError(said["failed"])
        return Ran(said["outcome"], said["code"], said["stdout"], said["stderr"], said["files"])
    raise AffectlensError(f"the sandbox did not answer within {seconds:.0f} seconds: is the machine overloaded? run again")


def _specified(exec: Exec, means: str, folder: str) -> dict[str, Any]:
    """What the far side is told."""
    readable, hidden = _places()
    return {
        "means": means,
        "folder": folder,
        "user": _user(means, folder),
        "readable": readable,
        "hidden": hidden,
        "files": dict(sorted(exec.files.items())),
        # Without site-packages and caches. Not -I, which ignores the fixed hash seed: the environment is ours anyway.
        "command": [os.path.realpath(sys.executable), "-s", "-S", "-B", "-X", "utf8", *exec.command[1:]],
        "environment": _ENVIRONMENT,
        "seconds": exec.seconds,
        "memory": exec.memory_mb * 2**20,
    }


def _spoken(spec: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """What the far side answers; None when it takes too long. Then, and when we are interrupted, it is killed with all that it
    started."""
    command = [sys.executable, "-I", "-S", "-B", confinement.__file__]
    text = json.dumps(spec).encode()
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, env={}, timeout=seconds, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if not done.stdout:
        problem = done.stderr.decode(errors="replace").strip().splitlines()
        return {"failed": f"the sandbox itself ended with {done.returncode}: {(problem or ['no message'])[-1][:200]}"}
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _check(exec: Exec) -> None:
    if exec.command[:1] != ("python",):
        raise AffectlensError(f"the sandbox cannot run {' '.join(exec.command[:1])!r}: begin the command with 'python'")
    if any("\0" in part for part in exec.command):
        raise AffectlensError("an argument of the command has a zero byte: leave it out")
    if not (exec.seconds > 0 and exec.memory_mb >= 32):
        raise AffectlensError(f"{exec.seconds} seconds and {exec.memory_mb} MB are too little: use more than 0 and at least 32")
    for name in exec.files:
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name != "/".join(parts)
            or name[0] == "/"
            or {"..", "."} & {*parts}
            or not name.isprintable()
            or len(name) > 200
        ):
            raise AffectlensError(f"{name!r} is no name for a file in the sandbox: use a relative path without '..'")
    if len(exec.files) > confinement.TEXTS or sum(map(len, exec.files.values())) > 1_000_000:
        raise AffectlensError(
            f"too many or too long files for the sandbox: use at most {confinement.TEXTS} and a million characters"
        )


@functools.cache
def _places() -> tuple[list[str], list[str]]:
    """What of the machine may be read (interpreter and libraries), and which folders in there may not (installed packages)."""
    interpreter, prefix = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    wanted = [interpreter, _STANDARD, sysconfig.get_config_var("DESTSHARED") or _STANDARD, f"{prefix}/lib", f"{prefix}/lib64"]
    wanted += ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    there = sorted({path for path in wanted if Path(path).exists()}, key=lambda path: (len(path), path))
    readable: list[str] = []
    for path in there:
        if not any(path.startswith(f"{outer}/") for outer in readable):
            readable.append(path)
    packages = (*site.getsitepackages(), *site.getsitepackages([prefix]), "/usr/lib/python3/dist-packages")
    return readable, sorted({os.path.realpath(path) for path in packages if Path(path).is_dir()})


def _user(means: str, folder: str) -> int | None:
    """Whom the program runs as: a user of its own; under Landlock only where root can choose one that reaches what it needs."""
    if means != "landlock":
        return _USER
    if os.geteuid() != 0:
        return None
    reached = (os.path.realpath(sys.executable), f"{_STANDARD}/os.py", f"{folder}/file")
    open_to_all = all(parent.stat().st_mode & 0o001 for path in reached for parent in Path(path).parents if str(parent) != folder)
    return _USER if open_to_all and _others(folder) else None


def _others(folder: str) -> bool:
    """Whether root can give ``folder`` to another user and act as one: not in a container without these rights or numbers."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    rights = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    if rights & _RIGHTS != _RIGHTS:
        return False
    try:
        os.chown(folder, _USER, _USER)
    except OSError:
        return False
    return True
