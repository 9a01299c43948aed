"""Runs that are killed, corrupted, shared and resumed: what is on disk must stay whole and ours alone."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import affectlens.runs
from affectlens.errors import AffectlensError, FormatError
from affectlens.runs import (
    Progress,
    Run,
    atomic_write,
    content_id,
    provenance,
    read_json,
    sha256_file,
    write_json,
)

SOURCE = str(Path(affectlens.runs.__file__).parents[1])
WHAT = {"model": {"id": "toy", "layers": [1, 2]}, "seed": 0}


def open_run(path: Path, **options: object) -> Run:
    settings = {"what": WHAT, "command": "affectlens study toy", **options}
    return Run.open(path, **settings)  # type: ignore[arg-type]


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python process; it says "ready" when it is where the test wants it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_line(error: pytest.ExceptionInfo[AffectlensError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ── single files ──


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.npy"
    for value in (1.0, 2.0):
        with atomic_write(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == ".npy"
            np.save(temporary, value)
    assert np.load(target) == 2.0 and names(target.parent) == ["a.npy"]


def test_atomic_write_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_atomic_write_syncs_the_file_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_json(tmp_path / "a.json", 1)
    assert events == ["file", "rename", "folder"]


def test_a_process_killed_while_writing_leaves_no_half_file(tmp_path: Path) -> None:
    code = """
import sys, time
from affectlens.runs import Run, atomic_write
run = Run.open(sys.argv[1], what={}, command="x")
stage = run.stage("stories", {})
with atomic_write(stage.shard_path(0, ".txt")) as t: t.write_text("whole")
with atomic_write(stage.shard_path(1, ".txt")) as t:
    t.write_text("half"); print("ready", flush=True); time.sleep(60)
"""
    process = child(code, tmp_path / "run")
    stories = tmp_path / "run" / "stories"
    kill(process)
    assert len(list(stories.glob(".tmp-*"))) == 1 and not (stories / "00001.txt").exists()
    with Run.open(tmp_path / "run", what={}, command="x") as run:
        stage = run.stage("stories", {})
        assert stage.pending(3, ".txt") == [1, 2] and not stage.done
        assert names(stories) == ["00000.txt", "inputs.json"]  # the leftover is gone
        with pytest.raises(FormatError, match=r"00001.txt is missing: run the same command again"):
            stage.shards(3, ".txt")


def test_many_kills_at_random_moments_never_show_a_broken_file(tmp_path: Path) -> None:
    code = """
import sys
from affectlens.runs import write_json
print("ready", flush=True)
i = 0
while True:
    i += 1
    write_json(sys.argv[1], {"i": i, "rest": list(range(2000))})
"""
    target = tmp_path / "a.json"
    for wait in (0.02, 0.05, 0.11):
        process = child(code, target)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(wait)
        kill(process)
        if target.exists():
            assert len(read_json(target)["rest"]) == 2000


def test_symbolic_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "disk" / "real.json") == 1

    (tmp_path / "run").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2").mkdir()
    with open_run(tmp_path / "run") as run:
        write_json(run.stage("a", {}).shard_path(0, ".json"), 0)
    assert (tmp_path / "disk2" / "a" / "00000.json").exists()

    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for call in (lambda: write_json(tmp_path / "loop" / "a.json", 1), lambda: open_run(tmp_path / "loop")):
        with pytest.raises(AffectlensError) as error:
            call()
        assert one_line(error).startswith("cannot write")


def test_places_that_cannot_be_written_say_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in (
        lambda: write_json(tmp_path / "file" / "a.json", 1),
        lambda: write_json(tmp_path, 1),
        lambda: write_json(tmp_path / ("x" * 300), 1),
        lambda: open_run(tmp_path / "file"),
    ):
        with pytest.raises(AffectlensError, match="choose another place") as error:
            call()
        assert one_line(error).startswith("cannot write")
    assert names(tmp_path) == ["file"]


def test_a_read_only_directory_is_refused_in_one_line() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # permissions do not bind root
        try:
            for call in (lambda: open_run(Path(folder)), lambda: write_json(Path(folder, "a.json"), 1)):
                with pytest.raises(AffectlensError, match="Permission denied; choose another place") as error:
                    call()
                one_line(error)
        finally:
            os.seteuid(user)
            Path(folder).chmod(0o755)


def test_a_full_disk_is_one_line_but_other_errors_of_the_block_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(AffectlensError, match="free some space"), atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        Path("/no/such/input").read_text()
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/another/file")
    assert names(tmp_path) == []


# ── JSON and ids ──


@dataclass(frozen=True)
class Options:
    layer: int
    names: tuple[str, ...] = ("calm",)


def test_json_round_trip_of_what_a_report_holds(tmp_path: Path) -> None:
    obj = {
        "b": np.float32(0.5), "a": (np.int64(3), np.bool_(True)), "options": Options(2), 7: np.eye(2),
        "path": Path("x/y"), "text": "né 😀", "none": None,
    }  # fmt: skip
    write_json(tmp_path / "a.json", obj)
    back = read_json(tmp_path / "a.json")
    assert back["b"] == 0.5 and back["a"] == [3, True] and back["7"] == [[1.0, 0.0], [0.0, 1.0]]
    assert back["options"] == {"layer": 2, "names": ["calm"]} and back["path"] == "x/y"
    assert back["text"] == "né 😀" and back["none"] is None
    assert list(back) == ["b", "a", "options", "7", "path", "text", "none"]  # what is drawn from a file keeps its order
    write_json(tmp_path / "b.json", {"name": "odd \udcff name"})
    assert read_json(tmp_path / "b.json") == {"name": "odd \udcff name"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan"), np.array([1.0, math.nan])])
def test_numbers_that_json_cannot_say_are_refused_with_their_place(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match=r"geometry\.r.*JSON cannot say"):
        write_json(tmp_path / "a.json", {"geometry": {"r": bad}})
    with pytest.raises(ValueError, match=r"geometry\.r"):
        content_id({"geometry": {"r": bad}})
    assert names(tmp_path) == []


@pytest.mark.parametrize("bad", [{"a": {1, 2}}, {"a": b"x"}, {"a": Options}, {"a": {None: 1}}])
def test_things_that_json_cannot_say_are_refused_with_their_place(bad: object) -> None:
    with pytest.raises(TypeError, match=r"^a "):
        content_id(bad)


@pytest.mark.parametrize("broken", [b"", b"{", b'{"a": 1,}', b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_json_is_one_line_with_the_fix(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "a.json").write_bytes(broken)
    with pytest.raises(FormatError, match=r"a\.json is not valid JSON .*; delete it") as error:
        read_json(tmp_path / "a.json", fix="delete it")
    one_line(error)


def test_missing_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file") as error:
        read_json(tmp_path / "a.json")
    one_line(error)


def test_content_id_sees_every_difference_and_nothing_else() -> None:
    base = {"layer": 3, "names": ["calm", "sad"], "scale": 0.05}
    for same in (dict(reversed(base.items())), {**base, "scale": np.float64(0.05)}):
        assert content_id(same) == content_id(base)
    changes = ({"layer": 4}, {"names": ["sad", "calm"]}, {"scale": 0.050000001}, {"x": None})
    assert len({content_id(o) for o in [base, *({**base, **change} for change in changes)]}) == 5
    assert content_id(Options(3)) == content_id({"layer": 3, "names": ["calm"]})
    assert content_id({}) == "44136fa355b3678a"  # frozen: a change would discard every run in the world


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ── runs ──


def test_a_run_records_what_it_is_and_where_it_was_made(tmp_path: Path) -> None:
    with open_run(tmp_path / "deep" / "run") as run:
        state = read_json(run.path / "run.json")
    assert state["format"] == 1 and state["what"] == WHAT and state["command"] == "affectlens study toy"
    assert state["created"].endswith("+00:00") and "affectlens" in state
    assert state["sessions"][0]["provenance"] == provenance()
    assert provenance()["packages"]["numpy"] == np.__version__
    with open_run(tmp_path / "deep" / "run", command="affectlens study toy --workers 2"):
        again = read_json(run.path / "run.json")
    assert again["created"] == state["created"] and len(again["sessions"]) == 2
    assert again["command"].endswith("--workers 2")
    open_run(tmp_path / "deep" / "run", command="affectlens study toy --workers 2").close()
    assert read_json(run.path / "run.json") == again  # nothing new to say


def test_provenance_needs_no_git_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from affectlens.runs import provenance; p = provenance();"
        "print('ready' if p['commit'] is None and not {'torch', 'rich', 'numpy'} & set(sys.modules) else p)"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE, "PATH": ""}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"ready\n"


def test_other_settings_are_refused_with_exactly_the_differences(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(AffectlensError) as error:
        open_run(tmp_path, what={"model": {"id": "toy", "layers": [1, 3]}, "topics": "x" * 100})
    assert one_line(error) == (
        f"{tmp_path} was made with other settings: model.layers (was [1, 2], now [1, 3]), "
        f'seed (was 0, now not set), topics (was not set, now "{"x" * 56}...); use another --out, or --fresh'
    )
    assert (tmp_path / "run.json").read_bytes() == before
    # The refused call holds no lock, and tuples or numpy numbers are no difference.
    open_run(tmp_path, what={"seed": np.int64(0), "model": {"layers": (1, 2), "id": "toy"}}).close()


def test_fresh_discards_the_stages_and_nothing_else(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        write_json(run.stage("stories", {}).shard_path(0, ".json"), 0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with open_run(tmp_path, what={"seed": 1}, fresh=True) as run:
        assert run.stage("stories", {}).pending(1, ".json") == [0]
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    assert read_json(tmp_path / "run.json")["what"] == {"seed": 1}


def test_folders_of_strangers_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(AffectlensError, match="neither empty nor a run directory"):
            open_run(tmp_path, fresh=fresh)
    assert names(tmp_path) == ["thesis.tex"]
    # Another tool's run.json, beside a folder that looks like a stage.
    (tmp_path / "run.json").write_text('{"name": "another tool"}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "inputs.json").write_text("{}")
    for fresh in (False, True):
        (tmp_path / "run.lock").unlink(missing_ok=True)
        with pytest.raises(FormatError, match="not the record of a run"):
            open_run(tmp_path, fresh=fresh)
    assert (tmp_path / "data" / "inputs.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ('{"format": 1, "wh', "is not valid JSON"),
        ("[]", "is not the record of a run"),
        ('{"format": 1}', "is not the record of a run"),
        ('{"format": 2, "what": {}, "sessions": []}', "has format 2, not 1: upgrade"),
    ],
)
def test_a_broken_run_json_is_one_line_and_fresh_mends_it(tmp_path: Path, content: str, message: str) -> None:
    open_run(tmp_path).close()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(FormatError, match=message) as error:
        open_run(tmp_path)
    assert "--fresh" in one_line(error) and "--out" in one_line(error)
    assert (tmp_path / "run.json").read_text() == content
    open_run(tmp_path, fresh=True).close()
    open_run(tmp_path).close()


HOLD = """
import sys, time
from affectlens.runs import Run
run = Run.open(sys.argv[1], what={}, command="x")
print("ready", flush=True); time.sleep(60)
"""


def test_the_lock_refuses_a_second_process_and_is_free_after_sigkill(tmp_path: Path) -> None:
    process = child(HOLD, tmp_path)
    for fresh in (False, True):
        with pytest.raises(AffectlensError, match=f"in use by process {process.pid}: wait") as error:
            Run.open(tmp_path, what={}, command="x", fresh=fresh)
        one_line(error)
    kill(process)
    ours = f"process {os.getpid()}:"
    with Run.open(tmp_path, what={}, command="x"), pytest.raises(AffectlensError, match=ours):
        Run.open(tmp_path, what={}, command="x")
    Run.open(tmp_path, what={}, command="x").close()


def test_a_process_that_is_started_by_the_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = Run.open(tmp_path, what={}, command="x")
    worker = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        run.close()
        run.close()  # twice does no harm
        Run.open(tmp_path, what={}, command="x").close()
    finally:
        worker.kill()
        worker.wait()


# ── stages ──


def test_a_pipeline_resumes_where_it_stopped(tmp_path: Path) -> None:
    made: list[str] = []

    def pipeline(stop_after: int) -> None:
        with open_run(tmp_path) as run:
            stories = run.stage("stories", {"each": 4})
            activations = run.stage("activations", {"stories": stories.id})
            for stage in (stories, activations):
                for i in stage.pending(3, ".json"):
                    if len(made) == stop_after:
                        raise KeyboardInterrupt
                    write_json(stage.shard_path(i, ".json"), i)
                    made.append(f"{stage.path.name}{i}")
                if not stage.done:
                    stage.finish({"sum": sum(read_json(p) for p in stage.shards(3, ".json"))})
            assert stories.summary == activations.summary == {"sum": 3}

    for stop in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            pipeline(stop)
    pipeline(99)
    pipeline(99)
    assert made == ["stories0", "stories1", "stories2", "activations0", "activations1", "activations2"]


def test_changed_inputs_discard_that_stage_only_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_run(tmp_path) as run:
        for name in ("stories", "vectors"):
            stage = run.stage(name, {"k": 1})
            write_json(stage.shard_path(0, ".json"), 0)
            stage.finish({})
        with caplog.at_level(logging.WARNING):
            assert run.stage("stories", {"k": 1}).done and not caplog.records
            changed = run.stage("stories", {"k": 2})
        assert "stories: the inputs changed, so 2 old files are discarded" in caplog.text
        assert not changed.done and changed.pending(1, ".json") == [0]
        assert run.stage("vectors", {"k": 1}).done
        with pytest.raises(AffectlensError, match="is not finished: run the same command again"):
            _ = changed.summary


def test_discarding_that_is_killed_halfway_does_not_call_the_stage_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path) as run:
        stage = run.stage("stories", {"k": 1})
        for i in range(2):
            write_json(stage.shard_path(i, ".json"), i)
        stage.finish({})
        unlink, count = Path.unlink, iter(range(9))

        def dies(self: Path, missing_ok: bool = False) -> None:
            if next(count) == 1:
                raise KeyboardInterrupt
            unlink(self, missing_ok=missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dies)
            run.stage("stories", {"k": 2})
        assert not (stage.path / "done.json").exists()  # the marker went first
        assert not run.stage("stories", {"k": 1}).done
        assert run.stage("stories", {"k": 2}).pending(2, ".json") == [0, 1]


def test_done_notices_missing_and_shortened_files(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        stage = run.stage("stories", {})
        for i in range(2):
            write_json(stage.shard_path(i, ".json"), [i])
        stage.finish({"n": np.int64(2)})
        assert stage.done and stage.summary == {"n": 2}
        stage.shard_path(0, ".json").write_text("")
        assert not stage.done
        stage.shard_path(0, ".json").unlink()
        assert not stage.done and stage.pending(2, ".json") == [0]
        write_json(stage.shard_path(0, ".json"), [0])
        assert run.stage("stories", {}).done


def test_broken_stage_records_are_one_line(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        stage = run.stage("stories", {})
        stage.finish({})
        for content in ("{", "[]", "{}"):
            (stage.path / "done.json").write_text(content)
            with pytest.raises(FormatError, match=r"done\.json .*delete it and run again") as error:
                _ = stage.done
            one_line(error)
        for content in ("{", "[]"):
            (stage.path / "inputs.json").write_text(content)
            with pytest.raises(FormatError, match=r"inputs\.json .*delete the folder .* and run") as error:
                run.stage("stories", {})
            one_line(error)


def test_a_stage_never_takes_over_a_folder_that_no_run_made(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        (tmp_path / "stories").mkdir()
        (tmp_path / "stories" / "mine.txt").write_text("keep")
        with pytest.raises(AffectlensError, match="holds files that no run made"):
            run.stage("stories", {})
        assert (tmp_path / "stories" / "mine.txt").read_text() == "keep"
        for name in ("", "../up", "a/b", "Stories", ".hidden"):
            with pytest.raises(ValueError, match="a stage name has"):
                run.stage(name, {})


# ── progress ──


def test_progress_without_a_terminal_is_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.start(3, "stories")
        for _ in range(3):
            progress.advance()
        progress.start(10, "activations")
        progress.advance(4)
    progress.finish()
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.rsplit(" in ", 1)[0] for line in err.splitlines()]
    assert lines == ["stories: 3 of 3", "activations: 4 of 10"]


def test_progress_on_a_terminal_draws_a_bar_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress()
    progress.start(2, "stories")
    progress.advance(1)
    progress.finish()
    assert "stories" in terminal.getvalue() and "1/2" in terminal.getvalue()
    assert "stories: 1 of 2 in" in terminal.getvalue().splitlines()[-1]


def test_records_are_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": {"é": [1]}})
    assert (tmp_path / "a.json").read_text() == '{\n "b": 1,\n "a": {\n  "é": [\n   1\n  ]\n }\n}\n'
    assert json.loads((tmp_path / "a.json").read_text())["b"] == 1
