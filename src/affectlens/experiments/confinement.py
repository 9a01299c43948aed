"""The far side of the sandbox: takes its own rights away, one after the other, and then runs one program.

It is a program itself, started by :mod:`affectlens.experiments.sandbox` with an empty environment: one JSON object comes in on
stdin (see :func:`main`), one goes out on stdout. It imports the standard library only, and nothing of ours, so that it starts in
a few milliseconds and a fork of it holds nothing that is worth reading. Three processes are at work:

* the first enters namespaces of its own and waits;
* the second is their process 1: it builds the file system, watches time, output and files, and reads the files in the end. When
  it ends, the kernel ends everything else in there;
* the third gives up user, capabilities, limits and system calls, in that order, and becomes the program.

Any step that fails ends the run before the program is started. Linux only; x86-64 and AArch64.
"""

# ruff: noqa: PTH102, PTH103, PTH112, PTH114, PTH115, PTH118, PTH120, PTH123, PTH208, PTH211
# Importing pathlib would take as long as all the rest, and descriptors are what matters here.
from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

OUTPUT = 1_000_000
"""Bytes of stdout and stderr together after which a program is ended."""

FILES, ENTRIES = 16_000_000, 500
"""Bytes, and number of files, in its folder after which it is ended."""

LOOK = 0.1
"""Seconds between two looks at it, at most."""

DESCRIPTORS = 64
KEPT = 20_000
"""Characters of each stream that are handed on."""

TEXT, TEXTS = 100_000, 100
"""Bytes of a text file, and number of them, that are handed on."""

# Number of each system call on x86-64 and on AArch64, which lacks some old ones. Tried against the kernel's headers in the tests.
_NUMBERS: Mapping[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "socket": (41, 198), "socketpair": (53, 199), "clone": (56, 220), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "exit": (60, 93), "kill": (62, 129), "uname": (63, 160), "fcntl": (72, 25), "flock": (73, 32),
    "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None),
    "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None), "readlink": (89, None),
    "chmod": (90, None), "fchmod": (91, 52), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "ptrace": (101, 117), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "setpgid": (109, 154), "getppid": (110, 173), "getpgrp": (111, None), "setsid": (112, 157), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156), "sigaltstack": (131, 132),
    "mknod": (133, None), "statfs": (137, 43), "fstatfs": (138, 44), "pivot_root": (155, 41), "prctl": (157, 167),
    "arch_prctl": (158, None), "setrlimit": (160, 164), "mount": (165, 40), "umount2": (166, 39), "gettid": (186, 178),
    "setxattr": (188, 5), "tkill": (200, 130), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, None), "epoll_ctl": (233, 21), "tgkill": (234, 131), "openat": (257, 56), "mkdirat": (258, 34),
    "mknodat": (259, 33), "fchownat": (260, 54), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78), "fchmodat": (268, 53), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "unshare": (272, 97), "set_robust_list": (273, 99), "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "prlimit64": (302, 261), "setns": (308, 268), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291), "rseq": (334, 293), "clone3": (435, 435),
    "close_range": (436, 436), "faccessat2": (439, 439), "mount_setattr": (442, 442), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
}  # fmt: skip
# What a program asks for that wants to do what it must not. It is told "not permitted"; what is in neither list does not exist
# here.
_REFUSED = (
    "socket", "socketpair", "clone", "clone3", "fork", "vfork", "truncate", "mkdir", "mkdirat", "link", "linkat", "symlink",
    "symlinkat", "chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "ptrace", "setpgid", "setsid", "mknod",
    "mknodat", "pivot_root", "prctl", "setrlimit", "mount", "umount2", "setxattr", "unshare", "setns", "mount_setattr",
    "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
)  # fmt: skip
# Allowed for one value of an argument only: (which argument, which values); None stands for the number of the process itself.
_NARROWED: Mapping[str, tuple[int, tuple[int | None, ...]]] = {
    "kill": (0, (None,)),
    "tkill": (0, (None,)),
    "tgkill": (0, (None,)),
    "prlimit64": (2, (0,)),  # reads a limit, sets none
    "fcntl": (1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # no F_SETOWN, by which a file sends signals
    "ioctl": (
        1,
        (0x5401, 0x5413, 0x5421, 0x5450, 0x5451),
    ),  # is it a terminal, how large, blocking, close on exec: nothing typed into one
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""mount, cgroup, host name, IPC, processes, network"""
_NEW_USER = 0x10000000
_LANDLOCK_READ, _LANDLOCK_LIST = 1 | 4 | 8, 8  # execute, read a file, list a folder
_LANDLOCK_WRITE = 2 | 4 | 8 | 32 | 256 | 8192 | 16384  # write, read, list, remove and make a file, rename, shorten
_LANDLOCK_OF_FILES = 1 | 2 | 4 | 16384


class Failed(Exception):
    """A protection could not be had: nothing is run."""


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _number(name: str) -> int | None:
    machine = platform.machine()
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise Failed(f"system calls of {machine} are not known here")
    return _NUMBERS[name][_ARCHITECTURES[machine][0]]


def _checked(what: str, result: int) -> int:
    if result < 0:
        raise Failed(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _system(name: str, *args: Any) -> int:
    return _checked(name, _libc().syscall(ctypes.c_long(_number(name) or 0), *args))


def _prctl(what: str, *args: int) -> None:
    _checked(what, _libc().prctl(*(ctypes.c_ulong(value) for value in (*args, 0, 0, 0, 0)[:5])))


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    given = [None if text is None else text.encode() for text in (source, target, kind, options)]
    done = _libc().mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3])
    _checked(f"mount {target}", done)


def _protect(target: str, *, flags: int, deep: bool = True) -> None:
    """Make a mount, and those below it, read-only and more: flags as for ``mount_setattr``."""
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    _system("mount_setattr", ctypes.c_int(-100), target.encode(), ctypes.c_uint(0x8000 * deep), attributes, ctypes.c_size_t(32))


def _die_with_parent(parent: int) -> None:
    """Be killed when the parent ends; where it has ended already, nobody would be told, so end at once.

    Args:
        parent: A descriptor that shows when it is gone: that of the process, or a pipe that it reads. Its number shows nothing
            in namespaces of our own.
    """
    _prctl("PR_SET_PDEATHSIG", 1, signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):
        os._exit(1)


def enter_namespaces(user: int, *, own: bool) -> None:
    """Leave mounts, processes, network, IPC, host name and control groups of the machine behind.

    Args:
        user: Number that the user has in there.
        own: In a namespace of users, in which this one is the only one; takes no rights to make.
    """
    outside, group = os.geteuid(), os.getegid()
    _checked("unshare", _libc().unshare(ctypes.c_int(_NAMESPACES | (_NEW_USER if own else 0))))
    if own:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {outside} 1"), ("gid_map", f"{user} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


def build_root(root: str, readable: Sequence[str], hidden: Sequence[str], user: int) -> str:
    """Make a file system of what may be read and an empty folder, and enter it; returns the folder.

    Args:
        root: An empty folder to build it at.
        readable: Files and folders of the machine that are in it, under their own names.
        hidden: Folders below them that are empty in it.
        user: Whose the empty folder is.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m,nr_inodes=2000")
    os.umask(0o022)
    for path in (*readable, "/dev/null", "/dev/urandom"):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o644))
        _mount(path, target, None, _MS_BIND | _MS_REC)
        _protect(target, flags=1 | 2 | (0 if path.startswith("/dev/") else 4))
    for path in hidden:
        if os.path.isdir(root + path):
            _mount("tmpfs", root + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=4k")
    scratch = "/scratch"
    os.mkdir(root + scratch)
    room = f"uid={user},gid={user},mode=700,size={2 * FILES},nr_inodes={2 * ENTRIES}"
    _mount("tmpfs", root + scratch, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, room)
    os.chdir(root)
    _system("pivot_root", b".", b".")
    _checked("umount", _libc().umount2(b".", 2))  # the old root lies on top of the new one; lazily, since we are in it
    os.chdir("/")
    _protect("/", flags=1, deep=False)
    return scratch


def _landlock() -> int:
    """Version of Landlock that this kernel has, 0 for none."""
    return max(
        0,
        int(_libc().syscall(ctypes.c_long(_number("landlock_create_ruleset") or 0), None, ctypes.c_size_t(0), ctypes.c_uint(1))),
    )


def _granted(path: str, hidden: Sequence[str]) -> Iterator[tuple[str, int]]:
    """What to grant so that ``path`` may be read but for what is hidden below it.

    Landlock follows a link when it is granted: what lies at its end is granted where it lies, or not at all.
    """
    if path in hidden or os.path.islink(path):
        return
    if not any(inner.startswith(path.rstrip("/") + "/") for inner in hidden):
        yield path, _LANDLOCK_READ
        return
    yield path, _LANDLOCK_LIST
    for name in os.listdir(path):
        yield from _granted(os.path.join(path, name), hidden)


def restrict_files(scratch: str, readable: Sequence[str], hidden: Sequence[str]) -> None:
    """Open nothing from now on but what may be read, and files in ``scratch``: Landlock 3 at least, which knows shortening."""
    version = _landlock()
    if version < 3:
        raise Failed(f"Landlock 3 is needed, this kernel has {version or 'none'}")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    # From version 4 on also TCP, from 6 on also abstract sockets and signals: nothing of it is granted.
    attributes = struct.pack("=QQQ", everything, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = _system("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    grants = [grant for path in sorted({*map(os.path.realpath, readable)}) for grant in _granted(path, hidden)]
    for path, access in (*grants, ("/dev/null", 2 | 4), ("/dev/urandom", 4), (scratch, _LANDLOCK_WRITE)):
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # not there: then there is nothing to grant
        access &= everything if stat.S_ISDIR(os.fstat(beneath).st_mode) else _LANDLOCK_OF_FILES
        _system("landlock_add_rule", ctypes.c_int(rules), ctypes.c_int(1), struct.pack("=Qi", access, beneath), ctypes.c_uint(0))
        os.close(beneath)
    _system("landlock_restrict_self", ctypes.c_int(rules), ctypes.c_uint(0))
    os.close(rules)


def _filter() -> bytes:
    """The program of the kernel's filter: what may be called; all else does not exist or is not permitted."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (equal, 1, 0, _ARCHITECTURES[platform.machine()][1]),
        (give, 0, 0, kill),  # called by the numbers of another architecture
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, absent),  # the same calls once more, with 32-bit pointers
    ]
    for name in _NUMBERS:
        number = _number(name)
        if number is None:
            continue
        if name not in _NARROWED:
            code += [(equal, 0, 1, number), (give, 0, 0, refuse if name in _REFUSED else allow)]
            continue
        argument, values = _NARROWED[name]
        inner: list[tuple[int, int, int, int]] = []
        if name == "prlimit64":  # a pointer: its upper half counts as well
            inner += [(load, 0, 0, 16 + 8 * argument + 4), (equal, 1, 0, 0), (give, 0, 0, refuse)]
        inner.append((load, 0, 0, 16 + 8 * argument))
        for value in values:
            inner += [(equal, 0, 1, os.getpid() if value is None else value), (give, 0, 0, allow)]
        inner.append((give, 0, 0, refuse))
        code += [(equal, 0, len(inner), number), *inner]
    code.append((give, 0, 0, absent))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def restrict_calls() -> None:
    """No network, no processes, no signals to others, no mounts: only calls for computing and for writing files."""
    program = ctypes.create_string_buffer(_filter())
    length = (len(program) - 1) // 8
    pointer = struct.pack("@HP", length, ctypes.addressof(program))  # struct sock_fprog, padded as the compiler does
    buffer = ctypes.create_string_buffer(pointer)
    _prctl("seccomp", 22, 2, ctypes.addressof(buffer))


def drop_rights(user: int | None) -> None:
    """Become ``user`` (None: stay), without groups and without any capability, for good."""
    with contextlib.suppress(Failed):
        for capability in range(64):
            _prctl("PR_CAPBSET_DROP", 24, capability)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _checked("capset", _libc().capset(header, none))
    _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)


def _limit(spec: Mapping[str, Any]) -> None:
    seconds = int(spec["seconds"]) + 2  # of computing, if nobody looks; the clock on the wall is watched from outside
    for which, most in (
        (resource.RLIMIT_AS, int(spec["memory"])),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILES + 4096),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, 1),
    ):
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))


def _become(spec: Mapping[str, Any], scratch: str, streams: tuple[int, int, int], parent: int) -> None:
    """The third process: gives up everything and becomes the program."""
    os.setsid()
    for target, source in enumerate(streams):
        os.dup2(source, target)
    if spec["means"] == "landlock":
        _prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
        restrict_files(scratch, spec["readable"], spec["hidden"])
    drop_rights(None if spec["means"] == "user namespaces" else spec["user"])
    _die_with_parent(parent)  # only now: to become another user forgets it
    os.chdir(scratch)
    _limit(spec)
    restrict_calls()
    os.execve(spec["command"][0], spec["command"], {**spec["environment"], "HOME": scratch})


def _texts(folder: str) -> dict[str, str]:
    """The text files below a folder: regular ones only, links never followed, each and all together bounded."""
    found: dict[str, str] = {}
    todo = [(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), "")]
    while todo:
        descriptor, prefix = todo.pop()
        try:
            for name in sorted(os.listdir(descriptor)):
                kind = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
                if stat.S_ISDIR(kind) and len(todo) < ENTRIES:
                    with contextlib.suppress(OSError):
                        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
                        todo.append((inner, f"{prefix}{name}/"))
                elif stat.S_ISREG(kind) and len(found) < TEXTS:
                    with contextlib.suppress(OSError, UnicodeDecodeError):
                        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
                        with open(file, "rb") as content:
                            data = content.read(TEXT + 1) if stat.S_ISREG(os.fstat(file).st_mode) else b"\xff"
                        if len(data) <= TEXT:
                            found[prefix + name] = data.decode("utf-8")
        finally:
            os.close(descriptor)
    return dict(sorted(found.items()))


def _overfull(folder: str) -> bool:
    size = number = 0
    todo = [folder]
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                number += 1
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    size += entry.stat(follow_symlinks=False).st_size
                if number > ENTRIES or size > FILES:
                    return True
    return False


def _watch(process: int, streams: Sequence[int], *, seconds: float, full: Callable[[], bool]) -> tuple[str, int, list[bytes]]:
    """Read what a process says until it ends or has to be ended: outcome, exit status (negative for a signal), what it said.

    Time in which nobody could look, since all of us were stopped or the machine was busy, counts as one look.
    """
    said: dict[int, bytearray] = {stream: bytearray() for stream in streams}
    reason, handle = "", os.pidfd_open(process)
    poll = select.poll()
    for descriptor in (handle, *streams):
        poll.register(descriptor, select.POLLIN)
    is_open, ended = set(streams), False
    passed, last = 0.0, time.monotonic()
    while not ended or is_open:
        for descriptor, _ in poll.poll(20):
            if descriptor == handle:
                ended = True
                poll.unregister(handle)
            elif data := os.read(descriptor, 65536):
                if sum(map(len, said.values())) <= OUTPUT:  # what comes while it is being ended is thrown away
                    said[descriptor] += data
            else:
                poll.unregister(descriptor)
                is_open.discard(descriptor)
        now = time.monotonic()
        passed, last = passed + min(now - last, LOOK), now
        if not reason and not ended:
            if sum(map(len, said.values())) > OUTPUT:
                reason = "output"
            elif passed > seconds:
                reason = "time"
            elif full():
                reason = "files"
            if reason:
                os.kill(process, signal.SIGKILL)
    os.close(handle)
    _, status, used = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if not reason:
        spent = used.ru_utime + used.ru_stime > seconds  # the kernel says no more than "killed" at the limit of computing
        reason = "exited" if code >= 0 else "time" if spent and -code == signal.SIGKILL else "signal"
        if sum(map(len, said.values())) > OUTPUT:
            reason = "output"
        elif full():
            reason = "files"
    return reason, code, [bytes(said[stream]) for stream in streams]


def _supervise(spec: Mapping[str, Any], parent: int) -> dict[str, Any]:
    """The second process."""
    _die_with_parent(parent)
    nothing = os.open("/dev/null", os.O_RDONLY)
    scratch: str = spec["folder"]
    if spec["means"] != "landlock":
        scratch = build_root(scratch, spec["readable"], spec["hidden"], spec["user"])
    own = spec["user"] if os.geteuid() == 0 and spec["user"] is not None else -1
    if spec["means"] == "landlock":
        os.chown(scratch, own, own)
    for name, text in spec["files"].items():
        folder = scratch
        for part in name.split("/")[:-1]:
            folder = f"{folder}/{part}"
            if not os.path.isdir(folder):
                os.mkdir(folder, 0o700)
                os.chown(folder, own, own)
        with open(f"{scratch}/{name}", "x", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
        os.chown(f"{scratch}/{name}", own, own)
    said, told, status = os.pipe(), os.pipe(), os.pipe()
    myself = os.pidfd_open(os.getpid())
    process = os.fork()
    if process == 0:
        try:
            _become(spec, scratch, (nothing, said[1], told[1]), myself)
        except BaseException as error:
            os.write(status[1], (str(error) or type(error).__name__).encode()[:500])
        finally:
            os._exit(127)
    for descriptor in (said[1], told[1], status[1], nothing):
        os.close(descriptor)
    with open(status[0], "rb") as file:
        if problem := file.read().decode():
            raise Failed(problem)
    outcome, code, texts = _watch(process, (said[0], told[0]), seconds=spec["seconds"], full=lambda: _overfull(scratch))
    # Under Landlock the folder has a name of its own in every run, which must not show in what comes back.
    stdout, stderr = (text.decode("utf-8", "replace").replace(scratch, "/scratch")[:KEPT] for text in texts)
    files = {name: text.replace(scratch, "/scratch") for name, text in _texts(scratch).items()}
    end = texts[1][-400:].decode("utf-8", "replace")
    if outcome == "exited" and code != 0 and "MemoryError" in end.rstrip().rpartition("\n")[2]:
        outcome = "memory"
    return {"outcome": outcome, "code": code, "stdout": stdout, "stderr": stderr, "files": files}


def main() -> None:
    """Read what is to be run from stdin, run it, write to stdout what came of it, or ``{"failed": why}`` when nothing was run.

    The JSON object on stdin: ``means`` (namespaces, user namespaces, landlock), ``folder`` (an empty one), ``user`` (number, or
    null to stay who one is), ``readable``, ``hidden`` (paths), ``files`` (text by path), ``command``, ``environment``,
    ``seconds``, ``memory`` (bytes).
    """
    spec = json.load(sys.stdin.buffer)
    try:
        _die_with_parent(sys.stdout.fileno())
        if spec["means"] != "landlock":
            enter_namespaces(spec["user"], own=spec["means"] == "user namespaces")
        myself = os.pidfd_open(os.getpid())
        child = os.fork()
    except (Failed, OSError) as error:
        print(json.dumps({"failed": str(error)}))
        return
    if child:
        os.waitpid(child, 0)
        return
    try:
        result = _supervise(spec, myself)
    except (Failed, OSError) as error:
        result = {"failed": str(error)}
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
