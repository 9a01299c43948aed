"""The workers of :mod:`affectlens.engines.ray`: the cluster they are on, what each is given, and a new one for each that dies."""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from affectlens.engines import wire
from affectlens.engines.asking import Loaded
from affectlens.engines.wire import Failure
from affectlens.errors import EngineError, MismatchError, MissingExtra

LOG = logging.getLogger("affectlens.ray")

LOSSES = 3
"""How often the same work may be lost with the worker that does it, or workers in one place may die in a row while they load,
until it is given up."""

PATIENCE = 60.0
"""Seconds without any worker after which the log says what is waited for."""


@dataclass(eq=False)
class Member:
    """A worker as the process that asks sees it.

    Args:
        actor: What Ray calls it by.
        loading: The reference of what it loads; None once it has its model.
        deaths: How many before it, in its place, died in a row while they loaded.
        running: References that are ready when it has finished what it was given.
    """

    actor: Any
    loading: Any
    deaths: int = 0
    running: list[Any] = field(default_factory=list)


class Pool:
    """The workers: who has loaded, who has least to do, and a new one in place of each that dies.

    Args:
        ray: The library.
        start: Starts one: the actor, and the reference of its :class:`Loaded`.
        size: How many.
        name: Of the model, for errors.
    """

    def __init__(self, ray: Any, start: Callable[[], tuple[Any, Any]], *, size: int, name: str) -> None:
        self._ray, self._start, self._name = ray, start, name
        self._lock = threading.RLock()
        self._loaded: Loaded | None = None
        self._closed = False
        lost = ray.exceptions
        self.lost = (
            lost.RayActorError,
            lost.WorkerCrashedError,
            lost.NodeDiedError,
            lost.ObjectLostError,
            lost.OutOfMemoryError,
        )
        self._members = [Member(*start()) for _ in range(size)]

    @property
    def loaded(self) -> Loaded:
        """What the workers loaded; waits for the first."""
        self.up()
        assert self._loaded is not None
        return self._loaded

    def check_open(self) -> None:
        """Refuse to go on once it is closed: Ray, if it has ended, would start again by itself."""
        if self._closed:
            raise EngineError(f"the engine of {self._name} is closed: open it again")

    def up(self) -> list[Member]:
        """The workers that have loaded; waits until there is one.

        Raises:
            AffectlensError: The model cannot be loaded, or workers die of it.
        """
        while True:
            with self._lock:
                self.check_open()
                for member in [member for member in self._members if member.loading is not None]:
                    self._admit(member)
                if up := [member for member in self._members if member.loading is None]:
                    return up
                loading = [member.loading for member in self._members]
            if not self._ray.wait(loading, num_returns=1, timeout=PATIENCE)[0]:
                free = {what: n for what, n in self._ray.available_resources().items() if what in ("CPU", "GPU")}
                LOG.warning("no worker has loaded %s yet; Ray has room for %s", self._name, free or "nothing more")

    def begin(self, task: Callable[[Any], Any]) -> tuple[Member, Any]:
        """Give a task to the worker that has least to do.

        Args:
            task: Begins it, given the actor, and returns the stream of what comes of it.

        Returns:
            The worker, and what ``task`` returned.
        """
        while True:
            self.up()
            with self._lock:
                for member in list(self._members):
                    self._look_after(member)
                if up := [member for member in self._members if member.loading is None]:
                    chosen = min(up, key=lambda member: len(member.running))
                    stream = task(chosen.actor)
                    chosen.running.append(stream.completed())
                    return chosen, stream

    def replace(self, member: Member, error: Exception) -> None:
        """A new worker in place of one that died; whoever notices first gets it.

        Raises:
            EngineError: As many as :data:`LOSSES` have died there while they loaded.
        """
        with self._lock:
            if member not in self._members or self._closed:
                return
            self._kill(member)
            deaths = 0 if member.loading is None else member.deaths + 1
            if deaths == LOSSES:
                raise EngineError(
                    f"{LOSSES} workers in a row died while they loaded {self._name} ({reason(error)}): see that it fits the "
                    "memory of a worker and that affectlens is installed on every machine"
                ) from error
            LOG.warning("a worker with %s died; another one takes its place", self._name)
            self._members.remove(member)
            self._members.append(Member(*self._start(), deaths=deaths))

    def tell(self, word: Callable[[], Any]) -> None:
        """Send a word to a worker that may be gone. Nothing is sent once it is closed: Ray would start again by itself."""
        if not self._closed:
            with contextlib.suppress(Exception):
                word()

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            for member in self._members:
                self._kill(member)
            self._members = []

    def _look_after(self, member: Member) -> None:
        """Forget what a worker has finished. One that died at it would seem to have nothing to do, and get all the work."""
        if member.running:
            ready, member.running = self._ray.wait(member.running, num_returns=len(member.running), timeout=0)
            try:
                self._ray.get(ready)
            except self.lost as error:
                self.replace(member, error)
            except Exception:  # a fault, which whoever reads the stream is told
                pass

    def _admit(self, member: Member) -> None:
        """Let a worker in that has loaded the same model as the others."""
        if not self._ray.wait([member.loading], timeout=0)[0]:
            return
        try:
            loaded, failure = wire.unpack(self._ray.get(member.loading), tuple[Loaded | None, Failure | None])
        except self.lost as error:
            self.replace(member, error)
            return
        if failure:
            raise failure.error
        first = self._loaded or loaded
        if loaded.version != (own := version("affectlens")):
            raise MismatchError(f"a worker has affectlens {loaded.version}, this process {own}: install the same everywhere")
        if loaded.info != first.info:
            odd = [name for name, value in vars(first.info).items() if name != "checks" and getattr(loaded.info, name) != value]
            was, now = (getattr(each.info, odd[0]) for each in (first, loaded))
            raise MismatchError(
                f"workers have loaded different models (their {odd[0]} is {was} and {now}): give every machine the same files, "
                "and name dtype and device"
            )
        self._loaded, member.loading = first, None

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(Exception):  # it is gone already, or Ray is
            self._ray.kill(member.actor, no_restart=True)


# ── the cluster ──


QUIET = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # that a worker died would go to stdout, between results
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of work that nobody waits for any more
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Settings of Ray that it takes from the environment, where they are not set already."""

SILENT: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
"""The same where it is begun."""

ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's name for whether it may listen to other machines; read when it is imported, and by nobody later."""


def library(*, alone: bool) -> Any:
    """Ray, imported quietly; one that is for this machine ``alone`` will listen on its own address only.

    Raises:
        MissingExtra: It is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    before = os.environ.get(ALONE)
    if alone and before is None:
        os.environ[ALONE] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtra("ray", "ray") from None
    finally:
        if before is None:
            os.environ.pop(ALONE, None)
    return ray


class Cluster:
    """The Ray that this process is in. What an engine started or joined is left when the last engine that uses it is closed.

    Attributes:
        ray: The library.
        alone: Whether it was started here, for this machine alone.
    """

    _entered: ClassVar[Cluster | None] = None
    _entering: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, ray: Any, address: str | None, *, folder: Path | None = None) -> None:
        self.ray, self.alone = ray, folder is not None
        self._address, self._folder = address, folder
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def enter(cls, user: Any, address: str | None) -> Cluster:
        """Join the cluster at an address, or start Ray on this machine alone; one that this process is in already is used.

        Raises:
            MissingExtra: Ray is not installed.
            EngineError: There is no such cluster, or this process is in another one.
        """
        if address is not None and address.startswith("ray://"):
            raise EngineError(
                f"{address!r} is Ray Client, which cannot stream results: run this on a machine of the cluster, with address auto"
            )
        ray = library(alone=address is None)
        with cls._entering:
            here = cls._entered
            if here is None or not ray.is_initialized():
                if ray.is_initialized():
                    return cls(ray, None)  # it belongs to who began it
                here = cls._entered = _joined(ray, address) if address is not None else _started(ray)
            elif address not in (None, here._address):
                was = "has started a Ray of its own" if here.alone else f"is on the cluster at {here._address!r}"
                raise EngineError(f"this process {was}: close the engine that uses it, or leave address out")
            here._users.add(user)
            return here

    def leave(self, user: Any) -> None:
        """An engine does not need it any more."""
        with Cluster._entering:
            self._users.discard(user)
            if Cluster._entered is self and not self._users:
                self.end()

    def end(self) -> None:
        """Leave it, and take away what Ray wrote about it if it was started here: a third of a megabyte each time."""
        if Cluster._entered is self:
            Cluster._entered = None
            self.ray.shutdown()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)


def _joined(ray: Any, address: str) -> Cluster:
    try:
        ray.init(address=address, **SILENT)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"no Ray cluster answers at {address!r} ({_first_line(error)}): see that it runs (ray start --head) and that this "
            "machine belongs to it, or leave address out"
        ) from None
    return Cluster(ray, address)


def _started(ray: Any) -> Cluster:
    if ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback is False:
        raise EngineError(
            "Ray was imported before this engine was opened, and would listen on the network: open the engine before anything "
            f"imports ray, set {ALONE}=0, or begin a Ray of your own with ray.init()"
        )
    for attempt in (1, 2):  # Ray gives up after half a minute, which is short where much else runs
        try:
            # One logical core: workers are placed by hand, and Ray would keep an idle process for each core.
            context = ray.init(address="local", num_cpus=1, include_dashboard=False, **SILENT)
            break
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if attempt == 2:
                raise EngineError(
                    f"Ray cannot be started here ({_first_line(error)}): try again when less runs, or leave replicas out"
                ) from error
    cluster = Cluster(ray, None, folder=Path(context.address_info["session_dir"]))
    atexit.register(cluster.end)
    return cluster


def device_of(name: str, options: Mapping[str, Any]) -> str:
    return "cpu" if name == "toy" else str(options.get("device", "auto"))


@dataclass(frozen=True)
class Room:
    """What each worker is given: cores and GPUs that Ray counts, and threads."""

    cpus: int
    gpus: int
    threads: int

    @classmethod
    def find(cls, ray: Any, replicas: int, *, alone: bool, device: str, parts: int) -> Room:
        """Divide what there is among the workers.

        Args:
            ray: The library, in a cluster.
            replicas: How many workers.
            alone: Whether Ray was started for this machine alone.
            device: What was asked for: auto, cpu or cuda.
            parts: How many GPUs a model is divided over, where there are any.

        Raises:
            EngineError: There is not enough for each.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device.startswith(("auto", "cuda")) else 0
        if device.startswith("cuda:"):
            raise EngineError(f"device is {device!r}, but Ray gives each worker a GPU of its own: use cuda")
        if gpus and gpus < replicas * parts:
            wants = f"{replicas} workers" + f" with {parts} each" * (parts > 1)
            raise EngineError(f"Ray has {gpus} GPUs for {wants}: use {max(1, gpus // parts)} replicas, or cpu as the device")
        each = parts if gpus else 0
        if alone:
            # Threads as this process would have, so that a worker alone rounds as it does.
            there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            cores = int(os.environ.get("OMP_NUM_THREADS") or there)
            return cls(0, each, max(1, cores // replicas))
        cores_of = [int(node.get("CPU", 0)) for node in nodes]
        share = max(1, sum(cores_of) // replicas)
        threads = next((n for n in range(share, 0, -1) if sum(cores // n for cores in cores_of) >= replicas), 0)
        if not threads:
            raise EngineError(f"the cluster has {sum(cores_of)} cores for {replicas} workers: use fewer replicas")
        return cls(threads, each, threads)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: Exception) -> str:
    """The last line of what Ray says, which names the cause, without what it says about causes in general."""
    lines = [line.strip() for line in str(error).partition(" Some common causes")[0].splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)
