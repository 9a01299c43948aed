"""The sandbox stands what a program can try, with every means that this machine gives, and runs nothing where it has none."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from affectlens.errors import AffectlensError
from affectlens.experiments import Exec, Ran, confinement, sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@functools.cache
def missing(name: str) -> str:
    """Why this machine does not have some means; nothing when it has them."""
    return "needs root" if name == "namespaces" and os.geteuid() != 0 else sandbox._tried(name)


@pytest.fixture(params=sandbox.MEANS)
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of confining a program in turn, where this machine has it."""
    name: str = request.param
    if problem := missing(name):
        pytest.skip(problem)
    monkeypatch.setattr(sandbox, "_means", lambda: name)
    return name


def python(code: str, *args: str, seconds: float = 20.0, memory_mb: int = 256, **files: str) -> Ran:
    """Run a program; twenty seconds, so that a busy machine is no failure."""
    named = {name.replace("_py", ".py"): text for name, text in files.items()}
    return sandbox.run(Exec({"main.py": code, **named}, ("python", "main.py", *args), seconds=seconds, memory_mb=memory_mb))


# What each of a list of attempts comes to: the name of the error, or "done".
ATTEMPTS = """
import json
def report(attempts):
    came = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            came[name] = "done"
        except Exception as error:
            came[name] = type(error).__name__
    print(json.dumps(came))
"""


def attempts(code: str, *args: str) -> dict[str, str]:
    ran = python(ATTEMPTS + code, *args)
    assert ran.passed, ran
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def processes_with(mark: str) -> list[str]:
    """Command lines of living processes that contain ``mark``."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line:
            lines.append(line)
    return lines


def test_an_honest_program_runs(means: str) -> None:
    code = "import inner.more, json\nprint(json.dumps(inner.more.x), 1 / 2)\nopen('out.txt', 'w').write('ä')\nraise SystemExit(3)"
    exec = Exec({"main.py": code, "inner/more.py": "x = [1]"}, ("python", "main.py"))
    ran = sandbox.run(exec)
    assert (ran.outcome, ran.code, ran.stdout, ran.stderr) == ("exited", 3, "[1] 0.5\n", "")
    assert not ran.passed
    assert ran.files == {"inner/more.py": "x = [1]", "main.py": code, "out.txt": "ä"}
    assert sandbox.run(exec) == ran


def test_paths_hash_seed_and_errors_are_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys\nprint(sys.path[0], os.getcwd(), os.environ['HOME'], hash('a'), list({'x', 'y', 'z'}))\n"
        "open(os.path.expanduser('~/where'), 'w').write(os.path.abspath('main.py'))\n1 / 0"
    )
    said = set()
    for name in sandbox.MEANS:
        if missing(name):
            continue
        monkeypatch.setattr(sandbox, "_means", lambda name=name: name)
        ran = python(code)
        said |= {(ran.stdout, ran.stderr, ran.files["where"])}
    assert len(said) <= 1
    for stdout, stderr, where in said:
        assert stdout.startswith("/scratch /scratch /scratch ")
        assert 'File "/scratch/main.py", line 4' in stderr
        assert where == "/scratch/main.py"


def test_no_packages_no_input_no_environment(means: str) -> None:
    code = "import os, sys\nprint([p for p in sys.path if 'packages' in p], [sys.stdin.read()], sorted(os.environ))\nimport numpy"
    ran = python(code)
    assert ran.stdout == "[] [''] ['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED']\n"
    assert "No module named 'numpy'" in ran.stderr


def test_the_limits_are_in_force(means: str) -> None:
    code = """
import resource
print([resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in ("AS", "FSIZE", "NOFILE", "NPROC", "CORE", "CPU")])
resource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12))
"""
    ran = python(code, memory_mb=100, seconds=7)
    wanted = [100 * 2**20, confinement.FILES + 4096, confinement.DESCRIPTORS, 1, 0, 9]
    assert ran.stdout == f"{[(most, most) for most in wanted]}\n"
    assert "Error" in ran.stderr


def test_a_run_that_was_stopped_meanwhile_is_not_out_of_time(means: str) -> None:
    """All of us may be stopped, by a user or by a busy machine: only time counts in which somebody looked."""
    mark = f"stopped-{os.getpid()}-{time.monotonic_ns()}"
    code = (
        "from affectlens.experiments import Exec, sandbox\n"
        f"exec = Exec({{'m.py': 'import time; time.sleep(0.6)'}}, ('python', 'm.py', '{mark}'), seconds=1.5)\n"
        f"print(sandbox._confined(exec, {means!r}).outcome)"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not any("-s -S -B" in line for line in processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    whole = [pid for pid in children(ours.pid) if pid != ours.pid]
    assert len(whole) == 3
    for pid in whole:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2)
    for pid in whole:
        os.kill(pid, signal.SIGCONT)
    assert ours.communicate(timeout=30)[0] == "exited\n"


def test_a_run_that_was_lost_is_tried_again_in_a_folder_of_its_own(means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    really, folders = subprocess.run, []

    def lost_at_first(*args: Any, **options: Any) -> Any:
        folders.append(json.loads(options["input"])["folder"])
        done = really(*args, **options)
        if len(folders) == 1:
            raise subprocess.TimeoutExpired("python", 1)
        return done

    monkeypatch.setattr(subprocess, "run", lost_at_first)
    assert python("print(open('main.py').read())").passed
    assert len({*folders}) == 2 and not any(map(os.path.exists, folders))


def test_the_limit_of_computing_is_told_from_other_ends() -> None:
    """Where nobody looks for long, the kernel ends it with a signal like any other."""
    outcomes = []
    for code, allowed in (("while True: pass", 0.5), ("import os; os.kill(os.getpid(), 9)", 60.0)):
        (read, write), (error, told) = os.pipe(), os.pipe()
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (1, 1))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=told, preexec_fn=limit)
        os.close(write)
        os.close(told)

        def asleep(pid: int = process.pid) -> bool:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return False

        outcomes.append(confinement._watch(process.pid, (read, error), seconds=allowed, full=asleep)[:2])
        process.returncode = 0  # it has been waited for
        os.close(read)
        os.close(error)
    assert outcomes == [("time", -signal.SIGKILL), ("signal", -signal.SIGKILL)]


# The rights that root may lack in a container, and its only number there.
WEAK = {
    "without rights": "[libc.prctl(24, right, 0, 0, 0) for right in (0, 6, 7)]",
    "without other users": (
        "uid, gid = os.getuid(), os.getgid(); libc.unshare(0x10000000); "
        "[open('/proc/self/' + name, 'w').write(text) for name, text in "
        "(('setgroups', 'deny'), ('uid_map', f'0 {uid} 1'), ('gid_map', f'0 {gid} 1'))]"
    ),
}


@pytest.mark.parametrize("how", WEAK)
def test_root_that_can_become_nobody_else_has_a_sandbox_all_the_same(how: str) -> None:
    if problem := missing("landlock") or ("needs root" if os.geteuid() != 0 else missing("user namespaces")):
        pytest.skip(problem)
    code = (
        "from affectlens.experiments import Exec, sandbox\n"
        "exec = Exec({'inner/m.py': 'print(1)'}, ('python', 'inner/m.py'))\n"
        "print(sandbox._user('landlock', '.'), sandbox._confined(exec, 'landlock').stdout, sandbox._tried('landlock'))"
    )
    first = f"import ctypes, os, sys; libc = ctypes.CDLL(None); {WEAK[how]}; os.execv(sys.executable, [*sys.argv[1:], {code!r}])"
    done = subprocess.run([sys.executable, "-c", first, sys.executable, "-c"], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["None", "1"], done.stderr


def test_what_is_begun_when_the_parent_has_ended_ends_too() -> None:
    code = (
        "import os, select\n"
        "from affectlens.experiments import confinement\n"
        "parent, poll = os.pidfd_open(os.getpid()), select.poll()\n"
        "if os.fork() == 0:\n"
        "    poll.register(parent, select.POLLIN)\n"
        "    os.write(1, b'lives, ')\n"
        "    poll.poll()\n"
        "    confinement._die_with_parent(parent)\n"
        "    os.write(1, b'and lives')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"lives, "


def children(pid: int) -> list[int]:
    """A process and all that it started, the later ones last."""
    found = [pid]
    for one in found:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == one:
                found.append(int(stat.parent.name))
    return found


# ---------------------------------------------------------------------------------------------------------------- ten attacks


def test_attack_1_fork_bomb(means: str) -> None:
    ran = python("import os\nwhile True:\n    os.fork()")
    assert ran.outcome == "exited" and ran.code == 1
    assert "PermissionError" in ran.stderr
    came = attempts(
        """
import ctypes, os, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "refused")
report({
    "fork": os.fork, "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
    "program": lambda: subprocess.run([sys.executable, "-c", ""]), "thread": threading.Thread(target=print).start,
    "clone": lambda: call(220 if os.uname().machine == "aarch64" else 56, 17, 0, 0, 0, 0), "clone3": lambda: call(435, 0, 0),
})
"""
    )
    assert came.pop("thread") == "RuntimeError"
    assert set(came.values()) == {"PermissionError"}


def test_attack_2_memory(means: str) -> None:
    ran = python("kept = []\nwhile True:\n    kept.append(bytearray(10_000_000))", memory_mb=200)
    assert (ran.outcome, ran.code) == ("memory", 1)
    ran = python("import mmap\nkept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 50_000_000))", memory_mb=200)
    assert not ran.passed
    used = python(
        "import resource\nkept = []\n"
        "try:\n    while True:\n        kept.append(bytearray(1_000_000))\nexcept MemoryError:\n    n = len(kept)\n"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        memory_mb=200,
    )
    blocks, peak = map(int, used.stdout.split())
    assert 100 < blocks < 200 and peak < 200 * 1024  # kilobytes
    assert "memfd" not in python("import os\nprint(os.memfd_create('memfd'))").stdout


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\nwhile True:\n    try:\n        time.sleep(100)\n    except BaseException: pass",
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os\nos.close(1); os.close(2)\nwhile True: pass",
    ],
)
def test_attack_3_endless_loop(means: str, code: str) -> None:
    start = time.monotonic()
    ran = python(code, seconds=0.5)
    assert (ran.outcome, ran.code) == ("time", -signal.SIGKILL)
    assert 0.5 < time.monotonic() - start < 0.5 + sandbox.GRACE


def test_attack_4_writing_outside(means: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    ours = tmp_path / "ours"
    ours.write_text("kept")
    ours.chmod(0o666)
    came = attempts(
        """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def mount(source, flags):
    if libc.mount(source, b".", b"tmpfs", flags, None) < 0:
        raise OSError(ctypes.get_errno(), "refused")
ours = sys.argv[1]
folder = os.path.dirname(ours)
places = [ours, folder + "/new", "../escaped", "/escaped", "/tmp/escaped", "/var/tmp/escaped", "/dev/shm/escaped", "/etc/escaped",
          "/usr/lib/escaped", os.path.dirname(os.__file__) + "/escaped.py", "/proc/self/oom_score_adj"]
report({
    **{place: lambda place=place: open(place, "w").write("x") for place in places},
    "append": lambda: open(ours, "a").write("x"), "shorten": lambda: os.truncate(ours, 0), "remove": lambda: os.remove(ours),
    "shorten by opening": lambda: os.open(ours, os.O_RDONLY | os.O_TRUNC),
    "rename": lambda: os.rename(ours, ours + "2"), "move in": lambda: os.rename(ours, "mine"),
    "move out": lambda: os.rename("main.py", folder + "/m"),
    "folder": lambda: os.mkdir(folder + "/d"), "mode": lambda: os.chmod(ours, 0), "owner": lambda: os.chown(ours, 0, 0),
    "times": lambda: os.utime(ours, (0, 0)), "attribute": lambda: os.setxattr(ours, "user.x", b"1"),
    "mount": lambda: mount(b"none", 0), "bind": lambda: mount(folder.encode(), 4096),
})
""",
        str(ours),
    )
    assert "done" not in came.values(), came
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert ours.read_text() == "kept" and ours.stat().st_mode & 0o777 == 0o666 and ours.stat().st_mtime > 1e9
    for place in ("/escaped", "/tmp/escaped", "/var/tmp/escaped", "/dev/shm/escaped", "/etc/escaped", "/usr/lib/escaped"):
        assert not Path(place).exists()
    assert python("open('here', 'w').write('x')").files["here"] == "x"


def test_attack_5_network(means: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as near:
        near.bind("\0affectlens-test")
        near.listen()
        server.settimeout(0.1)
        near.settimeout(0.1)
        came = attempts(
            """
import socket, sys, urllib.request
port = int(sys.argv[1])
def speak(family, address):
    with socket.socket(family) as s:
        s.connect(address)
report({
    "tcp": lambda: speak(socket.AF_INET, ("127.0.0.1", port)), "tcp6": lambda: speak(socket.AF_INET6, ("::1", port)),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port)),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1), "near": lambda: speak(socket.AF_UNIX, "\\0affectlens-test"),
    "pair": socket.socketpair, "kernel": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "page": lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1),
})
""",
            str(server.getsockname()[1]),
        )
        assert set(came.values()) <= {"PermissionError", "URLError"}
        for listening in (server, near):
            with pytest.raises(TimeoutError):
                listening.accept()


def test_attack_6_signals_to_the_parent(means: str) -> None:
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number)) for number in (signal.SIGUSR1, signal.SIGIO)
    }
    try:
        tried = attempts(
            """
import fcntl, os, resource, signal, sys
parent, usr = int(sys.argv[1]), signal.SIGUSR1
def own(target):
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, target)
report({
    "us": lambda: os.kill(parent, usr), "parent": lambda: os.kill(os.getppid(), usr), "all": lambda: os.kill(-1, usr),
    "group": lambda: os.killpg(0, usr), "first": lambda: os.kill(1, usr), "exists": lambda: os.kill(parent, 0),
    "handle": lambda: signal.pidfd_send_signal(os.pidfd_open(parent), usr), "by file": lambda: own(parent),
    "limit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1, 1)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19), "place": lambda: os.sched_setaffinity(parent, {0}),
})
""",
            str(os.getpid()),
        )
        assert "done" not in tried.values(), tried
        assert not came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    ran = python("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")  # to itself it may
    assert (ran.outcome, ran.code) == ("signal", -signal.SIGTERM)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_attack_7_huge_output(means: str, stream: str) -> None:
    start = time.monotonic()
    ran = python(f"import sys\nwhile True:\n    sys.{stream}.write('x' * 100_000)", seconds=30)
    assert (ran.outcome, ran.code) == ("output", -signal.SIGKILL)
    assert getattr(ran, stream) == "x" * confinement.KEPT
    assert time.monotonic() - start < 15
    assert python("print('x' * 2_000_000)").outcome == "output"


@pytest.mark.parametrize(
    "code",
    [
        "i = 0\nwhile True:\n    open(f'f{i}', 'w').write('x'); i += 1",
        "f = open('large', 'wb')\nwhile True:\n    f.write(bytes(1_000_000)); f.flush()",
        "import os\nfor i in range(40):\n    with open(f'f{i}', 'wb') as f: f.truncate(10_000_000)\nwhile True: pass",
    ],
)
def test_attack_7_huge_files(means: str, code: str) -> None:
    ran = python(code)
    assert ran.outcome == "files"
    assert not ran.passed
    assert sum(map(len, ran.files.values())) < 1_000_000


def test_attack_8_symlinks(means: str, tmp_path: Path) -> None:
    came = attempts(
        """
import os, sys
report({
    "link": lambda: os.symlink("/etc/passwd", "passwd"), "folder": lambda: os.symlink("/", "all"),
    "hard": lambda: os.link("main.py", "second"), "hard outside": lambda: os.link("/etc/passwd", "second"),
    "pipe": lambda: os.mkfifo("pipe"), "device": lambda: os.mknod("device"),
})
"""
    )
    assert set(came.values()) == {"PermissionError"}


def test_links_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    """Even if a program had made them: what it leaves behind is read by us, who may read more than it."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (scratch := tmp_path / "scratch").mkdir()
    (scratch / "real").mkdir()
    (scratch / "real" / "file").write_text("text")
    (scratch / "link").symlink_to(secret)
    (scratch / "up").symlink_to(tmp_path)
    os.mkfifo(scratch / "pipe")
    (scratch / "large").write_text("x" * (confinement.TEXT + 1))
    (scratch / "binary").write_bytes(b"\xff\xfe")
    assert confinement._texts(str(scratch)) == {"real/file": "text"}


def test_attack_9_leftover_processes(means: str) -> None:
    mark = f"leftover-{os.getpid()}-{time.monotonic_ns()}"
    code = """
import os, signal, sys, time
for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)
for attempt in (os.fork, os.setsid, lambda: os.setpgid(0, 0), lambda: os.posix_spawn(sys.executable, [sys.executable], {})):
    try: attempt()
    except OSError as error: print(type(error).__name__)
time.sleep(float(sys.argv[1]))
"""
    ran = python(code, "0", mark)
    assert (ran.outcome, ran.stdout.split()) == ("exited", ["PermissionError"] * 4)
    assert python(code, "100", mark, seconds=0.5).outcome == "time"
    assert processes_with(mark) == []


def test_attack_9_nothing_is_left_when_we_are_killed(means: str) -> None:
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    code = (
        "from affectlens.experiments import Exec, sandbox\n"
        f"sandbox._confined(Exec({{'main.py': 'while True: pass'}}, ('python', 'main.py', '{mark}'), seconds=60), {means!r})"
    )
    ours = subprocess.Popen([sys.executable, "-c", code])
    try:
        until = time.monotonic() + 30
        while not any("-s -S -B" in line for line in processes_with(mark)) and time.monotonic() < until:
            time.sleep(0.05)
        assert any("-s -S -B" in line for line in processes_with(mark))
    finally:
        ours.kill()
        ours.wait()
    until = time.monotonic() + 10
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_with(mark) == []


def test_attack_10_secrets(means: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFFECTLENS_SECRET", "hunter2")
    tmp_path.chmod(0o755)
    (tmp_path / "key").write_text("hunter2")
    code = """
import glob, json, os, sys
found = []
paths = ["/proc/self/environ", "/proc/1/environ", f"/proc/{sys.argv[1]}/environ", *sys.argv[2:], "/etc/passwd", "/etc/shadow",
         *glob.glob("/proc/*/environ"), *glob.glob("/root/.*"), *glob.glob("/home/*/.*"), *glob.glob("/run/secrets/*")]
for path in paths:
    try:
        found.append([path, open(path, "rb").read()[:40].decode("latin-1")])
    except OSError:
        pass
print(json.dumps([found, dict(os.environ)]))
"""
    ours = [
        str(tmp_path / "key"),
        sandbox.__file__,
        __file__,
        str(Path.home() / ".bashrc"),
        f"/proc/{os.getpid()}/cmdline",
        f"/proc/{os.getpid()}/mem",
    ]
    ran = python(code, str(os.getpid()), *ours)
    found, environment = json.loads(ran.stdout)
    assert found == []
    assert environment == sandbox._ENVIRONMENT
    assert "hunter2" not in ran.stdout


def test_what_is_hidden_is_hidden_behind_links_too(means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /lib is a link to /usr/lib on most machines, where installed packages lie."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # so that it is the sandbox that keeps the program out
        (inner := Path(folder, "real", "packages")).mkdir(parents=True)
        Path(folder, "real", "open").write_text("open")
        (inner / "secret").write_text("secret")
        Path(folder, "link").symlink_to("real")
        Path(folder, "real", "again").symlink_to("packages")
        readable, hidden = sandbox._places()
        places = [*readable, f"{folder}/link", f"{folder}/real"], [*hidden, str(inner)]
        monkeypatch.setattr(sandbox, "_places", lambda: places)
        ways = [f"{folder}/{way}/secret" for way in ("real/packages", "link/packages", "real/again", "link/again")]
        came = attempts(
            "import sys\nreport({path: lambda path=path: open(path).read() for path in sys.argv[1:]})",
            *ways,
            f"{folder}/link/open",
        )
        assert came.pop(f"{folder}/link/open") == "done"
        assert {*came} == {*ways} and {*came.values()} <= {"PermissionError", "FileNotFoundError"}


# ------------------------------------------------------------------------------------------------------------------- refusing


def test_what_is_in_force_is_said_in_words() -> None:
    words = sandbox.available()
    assert words.startswith(sandbox.MEANS[sandbox._means()])
    assert "no network" in words


def test_without_means_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sandbox._means.cache_clear()
    monkeypatch.setattr(sandbox, "_tried", lambda means: "not permitted")
    with pytest.raises(AffectlensError, match=r"no means to confine.*landlock: not permitted\): run on Linux"):
        python("open('x', 'w')")
    with pytest.raises(AffectlensError, match="no means"):
        sandbox.available()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(AffectlensError, match="only be run on Linux, this is darwin"):
        python("")


@pytest.mark.parametrize(
    ("means", "step", "noticed"),
    [
        ("user namespaces", "    restrict_calls()\n", "open a socket, fork"),
        (
            "landlock",
            '        restrict_files(scratch, spec["readable"], spec["hidden"])\n',
            "read a file of ours, read our source",
        ),
        (
            "user namespaces",
            '        scratch = build_root(scratch, spec["readable"], spec["hidden"], spec["user"])\n',
            "read a file of ours, read our source, write beside it",
        ),
    ],
)
def test_a_missing_protection_is_noticed(
    means: str, step: str, noticed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each left out in turn: the attempts to break out that precede the first use find it, and the means are not used."""
    if problem := missing(means):
        pytest.skip(problem)
    source = Path(confinement.__file__).read_text()
    assert source.count(step) == 1
    (file := tmp_path / "confinement.py").write_text(source.replace(step, step[: len(step) - len(step.lstrip())] + "pass\n"))
    monkeypatch.setattr(confinement, "__file__", str(file))
    assert noticed in sandbox._tried(means)


def test_a_step_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        Path(confinement.__file__)
        .read_text()
        .replace("def drop_rights(user: int | None) -> None:\n", "def drop_rights(user):\n    raise Failed('no')\n", 1)
    )
    (file := tmp_path / "confinement.py").write_text(source)
    monkeypatch.setattr(confinement, "__file__", str(file))
    for name in sandbox.MEANS:
        with pytest.raises(AffectlensError):
            sandbox._confined(Exec({"main.py": "print(1)"}, ("python", "main.py")), name)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "", ".", "a//b", "x\n", "x\0", "y" * 201, "a/"])
def test_files_stay_in_the_folder(name: str) -> None:
    with pytest.raises(AffectlensError, match="is no name for a file"):
        sandbox.run(Exec({name: ""}, ("python", "-c", "")))


@pytest.mark.parametrize(
    ("exec", "says"),
    [
        (Exec({}, ()), "begin the command with 'python'"),
        (Exec({}, ("sh", "-c", "true")), "cannot run 'sh'"),
        (Exec({}, ("python", "-c", "\0")), "zero byte"),
        (Exec({}, ("python",), seconds=0), "too little"),
        (Exec({}, ("python",), memory_mb=1), "too little"),
        (Exec({f"f{i}": "" for i in range(101)}, ("python",)), "too many"),
        (Exec({"f": "x" * 1_000_001}, ("python",)), "too many or too long"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(exec: Exec, says: str) -> None:
    with pytest.raises(AffectlensError, match=says) as error:
        sandbox.run(exec)
    assert "\n" not in str(error.value)


def test_hostile_text_passes_through(means: str) -> None:
    ran = python("import sys\nsys.stdout.buffer.write(b'\\xff\\x00ok')\nsys.stderr.write('\\u2028')")
    assert (ran.stdout, ran.stderr) == ("\ufffd\0ok", "\u2028")
    assert python("syntax error here").code == 1
    ran = python("print(1)", half="\ud800")  # half a surrogate pair is no text: the file is there, and not handed back
    assert ran.passed and "half" not in ran.files


@pytest.mark.parametrize(
    ("column", "header"), [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (0, "asm/unistd_64.h"), (1, "asm-generic/unistd.h")]
)
def test_numbers_of_system_calls_are_those_of_the_kernel(column: int, header: str) -> None:
    file = Path("/usr/include", header)
    if not file.exists():
        pytest.skip("the kernel's headers are not installed")
    theirs = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", file.read_text())}
    theirs |= {"newfstatat": theirs.get("fstatat", theirs.get("newfstatat", -1)), "fadvise64": theirs["fadvise64"]}
    wrong = {
        name: numbers[column] for name, numbers in confinement._NUMBERS.items() if numbers[column] not in (None, theirs.get(name))
    }
    assert wrong == {}
    missing = [name for name, numbers in confinement._NUMBERS.items() if numbers[column] is None and name in theirs]
    assert missing == []
