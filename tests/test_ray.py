"""Ray: the same results as in this process, whatever the number of workers and whenever they are killed.

Real workers of a real Ray on this machine. The contract of every engine is checked on it as well (``tests/contract``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import affectlens as al
from affectlens import activations, discovery
from affectlens.activations import Text, collect
from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.concepts import ConceptSet
from affectlens.discovery import Recipe, discover
from affectlens.engine import Engine, Gate, Readout, Request, Result, Sampling, Steering, Term, Where, in_order, open_engine
from affectlens.engines import ray as module
from affectlens.engines import ray_pool, ray_worker
from affectlens.engines.asking import Loaded
from affectlens.engines.ray import AHEAD, LOSSES, RayEngine
from affectlens.engines.toy import TOPICS, ToyEngine
from affectlens.errors import AffectlensError, EngineError, MissingExtra
from affectlens.readings import Readings
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from planted import toy_bench

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed", allow_module_level=True)
ray = ray_pool.library(alone=True)

TOY = ToyEngine()
NAMES = ("angry", "calm", "sad", "proud")
CHAT = (("user", "I lost my keys."),)


@pytest.fixture(scope="module")
def toys() -> Iterator[RayEngine]:
    """The toy on two workers, which are given four requests at a time."""
    with RayEngine("toy", replicas=2) as engine:
        engine.window = 4
        yield engine


def pids(engine: RayEngine) -> list[int]:
    """The processes of its workers, once all have their model; asked when they have nothing to do."""
    while True:
        found = []
        for member in engine._pool.up():
            try:
                found.append(ray.get(member.actor.__ray_call__.remote(lambda self: os.getpid())))
            except ray.exceptions.RayActorError as error:  # it was killed while it had nothing to do: nobody has noticed
                engine._pool.replace(member, error)
        if len(found) == engine.replicas:
            return found
        time.sleep(0.02)


def kill(engine: RayEngine, which: int = 0) -> None:
    os.kill(pids(engine)[which], signal.SIGKILL)


def killing(engine: RayEngine, times: int, after: Callable[[int], float]) -> threading.Thread:
    """Kill so many of its workers while it works: one of those that are there, after so many seconds."""
    targets = pids(engine)

    def work() -> None:
        for i in range(times):
            time.sleep(after(i))
            with contextlib.suppress(ProcessLookupError):
                os.kill(targets[i % len(targets)], signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def same(found: Sequence[Result], expected: Sequence[Result]) -> None:
    """To the bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.text, a.layout, a.choice_logprobs, a.finish, a.done, a.logprobs) == (
            b.text, b.layout, b.choice_logprobs, b.finish, b.done, b.logprobs,
        )  # fmt: skip
        assert len(a.readings) == len(b.readings)
        for x, y in zip(a.readings, b.readings, strict=True):
            for part in ("values", "norms", "positions"):
                mine, theirs = getattr(x, part), getattr(y, part)
                assert mine.dtype == theirs.dtype
                np.testing.assert_array_equal(mine, theirs)


def steering(strength: float = 0.3) -> Steering:
    layers = tuple(range(TOY.info.n_layers))
    norms = np.full(len(layers), 9.6, np.float32)
    return Steering((Term("calm", strength, (2,), layers, TOY.truth["calm"].astype(np.float32), norms),))


def mixed(n: int = 40) -> list[Request]:
    """Requests that read, choose, generate and stream, steered and gated in various ways."""
    onto = TOY.truth["sad"][None, 3:4].astype(np.float32)
    gate = Gate("sad", 2, TOY.truth["sad"][2].astype(np.float32), above=0.0)
    kinds: list[dict[str, Any]] = [
        {"readouts": (Readout((0, 4)), Readout((3,), Where(last=2), "none", onto), Readout((2,), pool="norm"))},
        {"sampling": Sampling(max_tokens=4, seed=3, logprobs=2), "steering": steering(), "readouts": (Readout((4,)),)},
        {"prompt": CHAT, "choices": ("A", " the sea"), "prefill": " I", "steering": steering().when(gate)},
        {"sampling": Sampling(max_tokens=3, temperature=0), "stream": True, "readouts": (Readout((1,), Where("response")),)},
        {"prompt": (("Anna", "Hello."), ("Bert", "No.")), "transcript": True, "readouts": (Readout((1,), Where(role="Bert")),)},
    ]  # fmt: skip
    words = [f"{i} {' '.join(TOPICS[i % len(TOPICS)].split()[: 3 + i % 5])}" for i in range(n)]
    return [Request(**{"prompt": words[i], **kinds[i % len(kinds)]}) for i in range(n)]


# ── the same as in this process ──


def test_everything_is_as_in_this_process(toys: RayEngine) -> None:
    asked = mixed()
    same(list(toys.run(asked)), list(TOY.run(asked)))
    assert toys.info == TOY.info and list(toys.vocabulary) == list(TOY.vocabulary)
    assert dict(toys.info.checks)["workers"].startswith("2 on Ray")
    assert toys.texts("stories") == TOY.texts("stories") and toys.texts("nothing of the kind") is None
    for request in asked[:5]:
        assert toys.layout(request) == TOY.layout(request)
    residuals = TOY.truth["sad"]
    np.testing.assert_array_equal(toys.unembed(residuals), TOY.unembed(residuals))


def test_the_work_is_spread(toys: RayEngine) -> None:
    """Both workers have their part."""
    pids(toys)
    busy = set()
    begin = toys._pool.begin

    def watched(task: Callable[[Any], Any]) -> Any:
        member, begun = begin(task)
        busy.add(member)
        return member, begun

    toys._pool.begin = watched  # type: ignore[method-assign]
    try:
        list(toys.run(Request(f"the calm sea {i}", readouts=(Readout((4,)),)) for i in range(40)))
    finally:
        del toys._pool.begin  # type: ignore[method-assign]
    assert len(busy) == 2


def test_an_endless_stream_is_read_as_it_is_wanted(toys: RayEngine) -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Request(f"sea {drawn}", readouts=(Readout((0,)),))

    found = list(itertools.islice(toys.run(endless()), 30))
    assert drawn <= 30 + (AHEAD * 2 + 1) * toys.window
    same(found, list(TOY.run(Request(f"sea {i + 1}", readouts=(Readout((0,)),)) for i in range(30))))


def test_runs_in_threads_and_within_each_other(toys: RayEngine) -> None:
    asked = mixed(20)
    expected = list(TOY.run(asked))
    for found in in_order(lambda _: list(toys.run(asked)), range(6), at_once=toys.at_once):
        same(found, expected)
    first, second = toys.run(asked), toys.run(asked)
    pairs = [(next(first), next(second)) for _ in expected]  # neither waits for the other to be finished
    same([a for a, _ in pairs], expected)
    same([b for _, b in pairs], expected)


def test_shared_directions_travel_once(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    onto = np.random.default_rng(0).normal(size=(2, 300, 64)).astype(np.float32)
    put, sent = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: sent.append(value) or put(value))
    data: list[int] = []
    pack = module.wire.pack
    monkeypatch.setattr(module.wire, "pack", lambda *a, **k: (made := pack(*a, **k), data.append(len(made)))[0])
    asked = [Request(f"the calm sea {i}", readouts=(Readout((1, 4), onto=onto.copy()),)) for i in range(40)]
    same(list(toys.run(asked)), list(TOY.run(asked)))
    same(list(toys.run(asked[:8])), list(TOY.run(asked[:8])))
    assert len(sent) == 1 and max(data) < onto.nbytes / 10


def test_only_what_is_asked_for_comes_back(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    unpack = module.wire.unpack
    monkeypatch.setattr(module.wire, "unpack", lambda data, *a, **k: (came.append(len(data)), unpack(data, *a, **k))[1])
    text = "the calm sea " * 60
    list(toys.run(Request(text, readouts=(Readout((4,)),)) for _ in range(4)))
    everything = sum(came)
    assert everything < 4 * (180 * 40 + 64 * 4) + 2000, "a mean and the tokens, not the residuals of 180 tokens"


# ── errors ──


def outcome(engine: Engine, asked: Sequence[Request]) -> tuple[list[Result], Exception | None]:
    found: list[Result] = []
    try:
        for result in engine.run(asked):
            found.append(result)
    except AffectlensError as error:
        return found, error
    return found, None


@pytest.mark.parametrize(
    "bad",
    [
        Request("A", readouts=(Readout((99,)),)),
        Request("the sea " * 5000),
        Request(""),
        Request("A", choices=("",)),
        Request("A", sampling=Sampling(), choices=("B",)),
        Request("A", readouts=(Readout((0,), onto=np.ones((1, 2, 3), np.float32)),)),
    ],
)
def test_errors_are_the_same_and_come_behind_what_was_asked_before(toys: RayEngine, bad: Request) -> None:
    good = [Request(f"the sea {i}", readouts=(Readout((0,)),)) for i in range(40)]
    found, error = outcome(toys, [*good[:20], bad, *good[20:]])
    expected, here = outcome(TOY, [*good[:20], bad, *good[20:]])
    assert here is not None and type(error) is type(here) and str(error) == str(here)
    same(found, expected[: len(found)])
    assert 20 - toys.window <= len(found) <= 20
    same(list(toys.run(good)), list(TOY.run(good)))


def test_what_the_source_of_requests_raises_comes_behind_them_too(toys: RayEngine) -> None:
    def broken() -> Iterator[Request]:
        for i in range(10):
            yield Request(f"the sea {i}")
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for result in toys.run(broken()):
            found.append(result)
    assert len(found) == 8


def test_a_model_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(AffectlensError) as here:
        open_engine("toy", tone={"clam": 1.0})
    with pytest.raises(AffectlensError) as there:
        open_engine("toy", tone={"clam": 1.0}, replicas=2)
    assert type(there.value) is type(here.value) and str(there.value) == str(here.value)


def test_what_cannot_be_is_refused_in_one_line(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="use 1 or more"):
        open_engine("toy", replicas=0)
    with pytest.raises(EngineError, match="save it to a folder"):
        open_engine(object(), replicas=2)
    with pytest.raises(EngineError, match="leave address out"):
        open_engine("toy", address="10.0.0.1:6379")
    with pytest.raises(EngineError, match="cannot stream results: run this on a machine of the cluster"):
        open_engine("toy", address="ray://10.0.0.1:10001")
    assert type(open_engine("toy", replicas=1)) is ToyEngine
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'affectlens\[ray\]'"):
        open_engine("toy", replicas=2)


@pytest.mark.parametrize(
    ("nodes", "replicas", "device", "expected"),
    [
        ([{"CPU": 16.0}] * 4, 8, "cpu", (8, 0, 8)),
        ([{"CPU": 5.0}] * 2, 3, "cpu", (2, 0, 2)),
        ([{"CPU": 96.0, "GPU": 8.0}] * 2, 16, "auto", (12, 1, 12)),
        ([{"CPU": 96.0, "GPU": 8.0}] * 2, 16, "cpu", (12, 0, 12)),
        ([{"CPU": 96.0, "GPU": 8.0}] * 2, 4, "auto 4", (48, 4, 48)),
        ([{"CPU": 4.0}], 5, "cpu", "has 4 cores for 5 workers"),
        ([{"CPU": 96.0, "GPU": 8.0}], 9, "auto", "8 GPUs for 9 workers: use 8 replicas"),
        ([{"CPU": 96.0, "GPU": 8.0}], 3, "auto 4", "8 GPUs for 3 workers with 4 each: use 2 replicas"),
        ([{"CPU": 96.0, "GPU": 8.0}], 2, "cuda:1", "use cuda"),
    ],
)
def test_a_cluster_is_divided_among_the_workers(nodes: Any, replicas: int, device: str, expected: Any) -> None:
    device, _, parts = device.partition(" ")

    class Cluster:
        def nodes(self) -> list[dict[str, Any]]:
            return [*({"Alive": True, "Resources": node} for node in nodes), {"Alive": False, "Resources": {"CPU": 64.0}}]

    def room() -> tuple[int, int, int]:
        found = ray_pool.Room.find(Cluster(), replicas, alone=False, device=device, parts=int(parts or 1))
        return found.cpus, found.gpus, found.threads

    if isinstance(expected, str):
        with pytest.raises(EngineError, match=expected):
            room()
    else:
        assert room() == expected


# ── workers that die ──


def test_a_run_survives_workers_that_are_killed_at_random(toys: RayEngine) -> None:
    """Every result once, in order, to the bit; and the next run has two workers again."""
    asked = mixed(30)
    expected = list(TOY.run(asked))
    rng = random.Random(5)
    for _ in range(2):
        killer = killing(toys, 2, lambda _: rng.uniform(0.0, 0.25))
        found = []
        for part in range(8):  # as long as anybody is being killed
            found.append(list(toys.run(asked)))
            if not killer.is_alive() and part:
                break
        killer.join()
        for each in found:
            same(each, expected)
    same(list(toys.run(asked)), expected)
    assert len(toys._pool._members) == 2


def test_a_stream_goes_on_where_it_was(toys: RayEngine) -> None:
    """What a worker had given is not given again by the one that does it again."""
    request = Request("the calm sea", sampling=Sampling(max_tokens=30, seed=1), readouts=(Readout((4,), Where("response")),))
    expected = list(TOY.stream(request))
    for at in (1, len(expected) // 2):
        stream, found = toys.stream(request), []
        for result in stream:
            found.append(result)
            if len(found) == at:
                for pid in pids_now(toys):
                    os.kill(pid, signal.SIGKILL)
        same(found, expected)


def pids_now(engine: RayEngine) -> list[int]:
    """The processes of its workers, while they work: found among this machine's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::") and b"Worker" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    ours = {os.getpid(), *_descendants(os.getpid())}
    return [pid for pid in found if pid in ours]


def _descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def test_what_nobody_waits_for_any_more_is_stopped(toys: RayEngine) -> None:
    """A stream that is closed, and what waits behind it, must not hold up what comes next."""
    long = Request("the calm sea", sampling=Sampling(max_tokens=1500, temperature=1.5, seed=4), stream=True)
    pids(toys)
    began = time.monotonic()
    whole = len(list(toys.run([long])))
    lasted = time.monotonic() - began
    stream = toys.run([long] * 4 * toys.window * AHEAD)
    next(stream)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    pids(toys)  # each worker answers
    assert whole > 300 and time.monotonic() - began < lasted


def test_a_session_survives(toys: RayEngine) -> None:
    asked = [replace(request, stream=request.sampling is not None) for request in mixed(10)]
    expected = [list(TOY.run([request])) for request in asked]
    session = toys.session()
    names = {session.submit(request): n for n, request in enumerate(asked)}
    found: dict[int, list[Result]] = {}
    steps = 0
    while session.live:
        for ticket, result in session.step():
            assert not isinstance(result, Exception), result
            found.setdefault(names[ticket], []).append(result)
        steps += 1
        if steps in (1, 3):
            kill(toys, steps % 2)
    for n, results in enumerate(expected):
        same(found[n], results)
    session.close()


def test_work_that_kills_its_workers_is_given_up(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has begun on as many workers as may be lost with it."""
    begin, deaths = toys._pool.begin, []

    def deadly(task: Callable[[Any], Any]) -> Any:
        member, stream = begin(task)

        def dying() -> Iterator[Any]:
            yield next(stream)
            deaths.append(1)
            ray.kill(member.actor)
            time.sleep(0.5)  # what came before it died is not what is tried
            raise ray.exceptions.ActorDiedError

        return member, dying()

    monkeypatch.setattr(toys._pool, "begin", deadly)
    with pytest.raises(
        EngineError, match=rf"^{LOSSES} workers died while they did the same 1 requests .*: give the workers more"
    ):
        list(toys.run([Request("the calm sea")]))
    with pytest.raises(EngineError, match=rf"{LOSSES} workers died while they did the same work \(unembed\)"):
        toys.unembed(TOY.truth["sad"])
    assert len(deaths) == 2 * LOSSES
    monkeypatch.undo()
    same(list(toys.run([Request("the calm sea")])), list(TOY.run([Request("the calm sea")])))


def test_workers_that_were_dead_before_are_not_blamed_on_the_work(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once, as when a machine is lost: what is given to two dead ones next has not killed them."""
    monkeypatch.setattr(module, "LOSSES", 2)
    session = toys.session()
    for work in ("run", "call", "session"):
        for pid in pids(toys):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        if work == "run":
            same(list(toys.run(mixed(4))), list(TOY.run(mixed(4))))
        elif work == "call":
            np.testing.assert_array_equal(toys.unembed(TOY.truth["sad"]), TOY.unembed(TOY.truth["sad"]))
        else:
            session.submit(Request("the calm sea"))
            found = []
            while session.live:
                found += session.step()
            same([result for _, result in found], list(TOY.run([Request("the calm sea")])))
            session.close()


class Fake:
    """As much of Ray as a pool needs: each worker is a number, which is ready with its model, or dead."""

    exceptions = ray.exceptions

    def __init__(self, dead: int) -> None:
        self.dead, self.begun, self.killed = dead, 0, list[int]()

    def start(self) -> tuple[int, int]:
        self.begun += 1
        return self.begun, self.begun

    def wait(self, refs: list[int], num_returns: int = 1, timeout: float = 0) -> tuple[list[int], list[int]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: int) -> bytes:
        if ref <= self.dead:
            raise ray.exceptions.ActorDiedError
        return module.wire.pack((Loaded(TOY.info, 4, ray_pool.version("affectlens")), None))

    def kill(self, actor: int, *, no_restart: bool) -> None:
        self.killed.append(actor)


def test_a_machine_may_be_lost_while_its_workers_load() -> None:
    """Many that die once each are no sign that the model cannot be loaded; one place where all die is."""
    machine = Fake(dead=8)
    pool = ray_pool.Pool(machine, machine.start, size=8, name="toy")
    while len(pool.up()) < 8:
        pass
    assert sorted(machine.killed) == list(range(1, 9)) and machine.begun == 16
    pool.close()
    assert sorted(machine.killed) == list(range(1, 17))
    hopeless = Fake(dead=99)
    pool = ray_pool.Pool(hopeless, hopeless.start, size=1, name="toy")
    for _ in range(2):  # and whoever asks again is told the same
        with pytest.raises(EngineError, match=f"^{LOSSES} workers in a row died while they loaded toy .*: see that"):
            while True:
                pool.up()
    assert hopeless.begun == LOSSES


def test_workers_that_die_while_they_load_are_given_up(toys: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker.Worker, "load", lambda self, spec, threads: os._exit(1))
    with pytest.raises(EngineError, match=f"{LOSSES} workers in a row died while they loaded toy"):
        RayEngine("toy", replicas=1)


def test_a_session_leaves_nothing_in_the_workers(toys: RayEngine) -> None:
    session = toys.session()
    for request in mixed(6):
        session.submit(request)
    while session.live:
        session.step()
    session.close()
    for member in toys._pool.up():
        assert ray.get(member.actor.__ray_call__.remote(lambda self: (len(self._sessions), len(self._tickets)))) == (0, 0)


def test_workers_with_different_models_are_refused(toys: RayEngine) -> None:
    """A machine of the cluster may have other files, or another processor, for which another dtype is best."""
    own = ray_pool.version("affectlens")
    answers = {
        "their dtype is float32 and bfloat16": Loaded(replace(TOY.info, dtype="bfloat16"), 256, own),
        "affectlens 0.0.1": Loaded(TOY.info, 256, "0.0.1"),
    }
    member = toys._pool.up()[0]
    for message, loaded in answers.items():
        member.loading = ray.put(module.wire.pack((loaded, None)))
        with pytest.raises(AffectlensError, match=message) as error:
            toys._pool.up()
        assert len(str(error.value).splitlines()) == 1
        member.loading = None
    assert list(toys.run([Request("A")]))


# ── what is made with it ──


def stories(path: Path, n: int = 12) -> Path:
    rows = [
        {"text": TOY.write(name, f"{TOPICS[i % 8].split()[0]} {i}", seed=i, words=70), "concept": name, "topic": f"topic {i}"}
        for i in range(n)
        for name in NAMES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run.json", "run.lock")
    }


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_vectors_are_those_of_one_process(replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers killed on the way: the same files to the byte, so the same vectors."""
    monkeypatch.setattr(activations, "SHARD", 5)
    concepts = ConceptSet.load("emotions").select(NAMES)
    source = stories(tmp_path / "stories.jsonl")
    neutral = tmp_path / "neutral.jsonl"
    neutral.write_text("".join(json.dumps({"text": TOY.write(None, t.split()[0], seed=i)}) + "\n" for i, t in enumerate(TOPICS)))
    recipe = Recipe(neutral=str(neutral), draws=5)
    whole = discover(TOY, concepts, out=tmp_path / "whole", stories=source, recipe=recipe)
    with RayEngine("toy", replicas=replicas) as engine:
        engine.window = 2
        killer = killing(engine, 1, lambda _: 0.05)
        spread = discover(engine, concepts, out=tmp_path / "spread", stories=source, recipe=recipe)
        killer.join()
        kill(engine)  # the second: between two runs
        again = discover(engine, concepts, out=tmp_path / "again", stories=source, recipe=recipe)
    for vectors in (spread, again):
        for part in ("directions", "norms", "centre", "residual_norms"):
            np.testing.assert_allclose(getattr(vectors, part), getattr(whole, part), rtol=1e-6, atol=1e-6)
    assert contents(tmp_path / "spread") == contents(tmp_path / "whole") == contents(tmp_path / "again")


def test_vectors_of_transformers_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import families

    monkeypatch.setattr(activations, "SHARD", 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = families.save("llama", tmp_path / "llama")
    texts = [Text(f"{n}{i}", TOY.write(n, "sea", seed=i)[: 120 + 9 * (i % 9)], n) for i in range(12) for n in NAMES]
    try:
        alone = open_engine(str(folder), dtype="float32", device="cpu")
        whole = collect(alone, texts, tmp_path / "whole", first_token=20)
        generated = alone.generate(["the sea"] * 40, sampling=Sampling(max_tokens=4))
    finally:
        torch.set_num_threads(threads)
    with open_engine(str(folder), dtype="float32", device="cpu", replicas=2) as engine:
        assert engine.info == alone.info
        killer = killing(engine, 2, lambda _: 0.1)
        spread = collect(engine, texts, tmp_path / "spread", first_token=20)
        killer.join()
        assert engine.generate(["the sea"] * 40, sampling=Sampling(max_tokens=4)) == generated
        asked = [Request("the sea", sampling=Sampling(max_tokens=4, seed=i), stream=True) for i in range(3)]
        same(list(engine.run(asked)), list(alone.run(asked)))
    mine, theirs = (ConceptVectors.fit(found, None, info=alone.info, draws=2) for found in (spread, whole))
    for part in ("directions", "norms", "centre", "residual_norms"):
        np.testing.assert_allclose(getattr(mine, part), getattr(theirs, part), rtol=1e-6, atol=1e-6)
    assert contents(tmp_path / "spread") == contents(tmp_path / "whole")


def test_readings_are_kept_as_by_one_process(toys: RayEngine, tmp_path: Path) -> None:
    asked = [request for request in mixed(300) if not request.stream]
    done: list[int] = []
    Readings(toys, tmp_path / "spread").gather(asked, done.append)
    Readings(TOY, tmp_path / "whole").gather(asked)
    assert contents(tmp_path / "spread") == contents(tmp_path / "whole") and len(done) > 2


def test_stories_are_written_by_all_workers(toys: RayEngine, tmp_path: Path) -> None:
    concepts = ConceptSet.load("emotions").select(NAMES)
    found = {}
    for name, engine in (("spread", toys), ("whole", TOY)):
        recipe = Recipe(per_concept=4)
        source = discovery.open_stories("model", concepts, engine, recipe)
        with discovery.open_run(tmp_path / name, engine, source, recipe) as run:
            found[name] = discovery.gather_stories(source, run.stage("stories", source.describe()))
    assert found["spread"] == found["whole"] and contents(tmp_path / "spread") == contents(tmp_path / "whole")


def test_a_parquet_dataset_is_scored_as_by_one_process_and_goes_on(toys: RayEngine, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = toy_bench(0).vectors
    baseline = Baseline.measure(TOY, neutral_dialogues(TOY), probe=Probe(vectors), source="neutral dialogues")
    names = list(TOY.concepts)
    rows = [{"id": i, "text": TOY.write(names[i % 12], f"topic {i % 40}", seed=i, words=12)} for i in range(120)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=50)

    def score(engine: Engine, out: str) -> None:
        al.score_corpus(engine, file, vectors=vectors, out=tmp_path / out, baseline=baseline, rows=10)

    score(TOY, "whole")
    killer = killing(toys, 1, lambda _: 0.1)
    score(toys, "spread")
    killer.join()
    data = {name: found for name, found in contents(tmp_path / "whole").items() if not name.startswith("report")}
    assert data == {name: found for name, found in contents(tmp_path / "spread").items() if not name.startswith("report")}
    for number in (3, 7, 8):  # as if killed before these shards were complete
        (tmp_path / "spread" / "scored" / f"{number:05d}.json").unlink()
    (tmp_path / "spread" / "scored" / "done.json").unlink()
    score(toys, "spread")
    assert data == {name: found for name, found in contents(tmp_path / "spread").items() if not name.startswith("report")}


# ── beginning and end ──

SCRIPT = """
import faulthandler, os, signal, affectlens as al
faulthandler.register(signal.SIGUSR1)  # tells where each thread is
engine = al.open_engine("toy", replicas=2)  # left open: it ends with the process
import ray
asked = [al.Request(f"sea {i}", readouts=(al.Readout((4,)),)) for i in range(600)]
pid = ray.get(engine._pool.up()[0].actor.__ray_call__.remote(lambda self: os.getpid()))
results = engine.run(asked)
first = next(results)
os.kill(pid, signal.SIGKILL)
host = ray.get_runtime_context().gcs_address.partition(":")[0]
print(1 + len(list(results)), engine.window, host, engine._cluster._folder, flush=True)
"""

WORKING = """
import itertools
from affectlens.engine import in_order
endless = in_order(lambda i: len(list(engine.run(asked))), itertools.count(), at_once=engine.at_once)
for n in endless:
    print(n, flush=True)
"""


def begun(*scripts: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", "".join(scripts)], stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def nothing_left(process: subprocess.Popen[str], *, but: tuple[bytes, ...] = ()) -> None:
    """Nor of what Ray starts, sooner or later; what is called as in ``but`` is given time that a test has not."""
    deadline = time.monotonic() + 30
    while (left := [name for name in _in_session(process.pid) if name not in but]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_it_is_quiet_listens_to_nobody_else_and_leaves_nothing_behind() -> None:
    process = begun(SCRIPT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    *found, folder = out.split()
    assert found == ["600", "256", "127.0.0.1"] and "session_" in folder and not Path(folder).exists()
    assert err in ("", "a worker with toy died; another one takes its place\n")
    nothing_left(process)


def interrupted(process: subprocess.Popen[str]) -> str:
    """What it says at its end. Pressed again after a while: where Python can raise nothing, in a destructor say, one is lost."""
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=40)[1]
    process.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=5)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"it does not end: {process.communicate()[1]}")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_who_stops_the_command_stops_the_workers(sign: signal.Signals) -> None:
    """Ctrl-C reaches every process of a terminal; what kills the command does not."""
    process = begun(SCRIPT, WORKING)
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[1:] == ["600\n"] * 3, process.stderr.read()
    if sign == signal.SIGINT:
        err = interrupted(process)
    else:
        process.send_signal(sign)
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert sign == signal.SIGKILL or (err.endswith("KeyboardInterrupt\n") and err.count("Traceback") == 1), err
    # Two of Ray's own look about once a minute whether it is still there.
    nothing_left(process, but=(b"ray::DashboardAgent", b"ray::RuntimeEnvAgent") if sign == signal.SIGKILL else ())


CLOSED = """
import numpy as np, affectlens as al
engine = al.open_engine("toy", replicas=2)
import ray
onto = np.ones((1, 600, 64), np.float32)
asked = [al.Request(f"sea {i}", readouts=(al.Readout((4,), onto=onto),)) for i in range(1000)]
run, session = engine.run(asked), engine.session()
session.submit(asked[0])
next(run)
engine.close()
for again in (lambda: list(run), lambda: list(engine.run(asked)), lambda: engine.unembed(onto[0]), session.step):
    try:
        again()
    except al.errors.EngineError as error:
        print(error)
session.cancel(0)
session.close()
run.close()
print(ray.is_initialized())
"""


def test_what_is_closed_does_not_begin_again() -> None:
    """Ray would start anew by itself where anything is asked of it."""
    process = begun(CLOSED)
    out, err = process.communicate(timeout=300)
    assert out == "the engine of toy is closed: open it again\n" * 4 + "False\n" and not err, out + err


IMPORTED = """
import ray, affectlens as al
ray.util.get_node_ip_address = lambda: "10.0.0.7"
try:
    al.open_engine("toy", replicas=2)
except al.errors.EngineError as error:
    print(error, ray.is_initialized())
"""


def test_it_never_listens_to_the_network_unasked() -> None:
    """Ray decides that when it is imported."""
    out, err = begun(IMPORTED).communicate(timeout=120)
    assert out.startswith("Ray was imported before this engine was opened") and out.endswith("ray.init() False\n"), out + err


CLUSTER = """
import ray, affectlens as al
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
asked = [al.Request(f"sea {i}", readouts=(al.Readout((4,)),)) for i in range(40)]
with al.open_engine("toy", replicas=2, address=cluster.address) as engine:
    engine.window = 2
    while len(engine._pool.up()) < 2:
        pass
    where = lambda self: ray.get_runtime_context().get_node_id()
    homes = {ray.get(member.actor.__ray_call__.remote(where)) for member in engine._pool.up()}
    run = engine.run(asked)
    found = [next(run).layout for _ in range(5)]
    cluster.remove_node(second, allow_graceful=False)
    found += [result.layout for result in run]
    print(len(homes), found == [result.layout for result in al.open_engine("toy").run(asked)], len(list(engine.run(asked))))
    try:
        al.open_engine("toy", address="10.0.0.7:1")
    except al.errors.EngineError as error:
        print(error)
print(ray.is_initialized())
cluster.shutdown()
"""


def test_a_cluster_may_lose_a_machine() -> None:
    """It has no room for another worker then; the one that is left does the work."""
    process = begun(CLUSTER)
    out, err = process.communicate(timeout=300)
    lines = out.splitlines()
    assert lines[0] == "2 True 40", out + err
    assert lines[1].startswith("this process is on the cluster at") and lines[2] == "False", out
    nothing_left(process)


def _in_session(leader: int) -> list[bytes]:
    """Names of the processes that were started by that of a session, however far down; without those that have ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(path.with_name("cmdline").read_bytes().partition(b"\0")[0].strip())
        except OSError:
            continue
    return found


def test_a_closed_engine_says_so() -> None:
    engine = RayEngine("toy", replicas=1)
    run = engine.run(Request(f"sea {i}") for i in range(1000))
    next(run)
    engine.close()
    with pytest.raises(EngineError, match="is closed: open it again"):
        list(run)
    with pytest.raises(EngineError, match="is closed: open it again"):
        list(engine.run([Request("A")]))
    engine.close()


# ── several pieces of work at a time ──


def test_work_in_threads_comes_in_order() -> None:
    assert list(in_order(lambda n: (time.sleep(0.01 * (n % 3)), n)[1], range(20), at_once=4)) == list(range(20))
    main = threading.get_ident()
    assert set(in_order(lambda _: threading.get_ident(), range(3), at_once=1)) == {main}
    assert main not in set(in_order(lambda _: threading.get_ident(), range(3), at_once=2))


def test_no_more_is_drawn_than_is_under_way() -> None:
    drawn: list[int] = []
    source = (drawn.append(i) or i for i in itertools.count())  # type: ignore[func-returns-value]
    found = in_order(lambda n: n, source, at_once=3)
    assert [next(found) for _ in range(5)] == list(range(5)) and len(drawn) <= 5 + 6
    found.close()  # type: ignore[attr-defined]


def test_an_error_in_a_thread_ends_the_work() -> None:
    begun: list[int] = []

    def work(n: int) -> int:
        begun.append(n)
        if n == 2:
            raise EngineError("the second: mend it")
        time.sleep(0.01)
        return n

    found = []
    with pytest.raises(EngineError, match="the second"):
        for n in in_order(work, range(1000), at_once=2):
            found.append(n)
    assert found == [0, 1] and len(begun) < 10


def test_what_the_items_raise_comes_behind_what_was_begun() -> None:
    def broken() -> Iterator[int]:
        yield from range(3)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for n in in_order(lambda n: (time.sleep(0.05), n)[1], broken(), at_once=4):
            found.append(n)
    assert found == [0, 1, 2]
