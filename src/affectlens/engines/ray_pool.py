"""The workers of :mod:`affectlens.engines.ray`: the cluster they are on, what each is given, and a new one for each that dies."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from affectlens.engines import wire
from affectlens.engines.ray_worker import Loaded
from affectlens.engines.wire import Failure
from affectlens.errors import EngineError, MismatchError, MissingExtra

LOG = logging.getLogger("affectlens.ray")

LOSSES = 3
"""How often the same work may be lost with its worker, or workers may die in a row while they load, before it is given up."""

PATIENCE = 60.0
"""Seconds without any worker after which the log says what is waited for."""


@dataclass(eq=False)
class Member:
    """A worker as this process sees it: ``loading`` until it has its model, ``running`` what it has not finished."""

    actor: Any
    loading: Any
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
        self._died = 0
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

    def up(self) -> list[Member]:
        """The workers that have loaded; waits until there is one.

        Raises:
            AffectlensError: The model cannot be loaded, or workers die of it.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise EngineError(f"the engine of {self._name} is closed: open it again")
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
            task: Begins it, given the actor.

        Returns:
            The worker, and what ``task`` returned.
        """
        while True:
            self.up()
            with self._lock:
                up = [member for member in self._members if member.loading is None]
                for member in up:
                    if member.running:
                        _, member.running = self._ray.wait(member.running, num_returns=len(member.running), timeout=0)
                if up:
                    chosen = min(up, key=lambda member: len(member.running))
                    begun = task(chosen.actor)
                    chosen.running.append(begun.completed() if hasattr(begun, "completed") else begun)
                    return chosen, begun

    def replace(self, member: Member) -> None:
        """A new worker in place of one that died; whoever notices first gets it."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)
                self._kill(member)
                if not self._closed:
                    LOG.warning("a worker with %s died; another one takes its place", self._name)
                    self._members.append(Member(*self._start()))

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            for member in self._members:
                self._kill(member)
            self._members = []

    def _admit(self, member: Member) -> None:
        """Let a worker in that has loaded the same model as the others."""
        if not self._ray.wait([member.loading], timeout=0)[0]:
            return
        try:
            loaded, failure = wire.unpack(self._ray.get(member.loading), tuple[Loaded | None, Failure | None])
        except self.lost as error:
            self._died += 1
            if self._died >= LOSSES:
                raise EngineError(
                    f"{self._died} workers in a row died while they loaded {self._name} ({reason(error)}): "
                    "see that it fits the memory of a worker and that affectlens is installed on every machine"
                ) from error
            self.replace(member)
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
        self._loaded, self._died, member.loading = first, 0, None

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


def library(*, local: bool) -> Any:
    """Ray, imported quietly; one that is started here listens on this machine's own address only.

    Raises:
        MissingExtra: It is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    alone = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for it; read when it is imported, and by nobody later
    before = os.environ.get(alone)
    if local and before is None:
        os.environ[alone] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtra("ray", "ray") from None
    finally:
        if before is None:
            os.environ.pop(alone, None)
    return ray


def join(ray: Any, address: str | None, *, started: bool) -> bool:
    """Join a cluster, or start Ray on this machine alone, quietly; says whether it was started."""
    if ray.is_initialized():
        if address is not None and started:
            raise EngineError("this process has started a Ray of its own: close the engine that uses it, or leave address out")
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EngineError(
                f"no Ray cluster answers at {address!r} ({reason}): see that it runs (ray start --head), or leave address out"
            ) from None
        return False
    for attempt in (1, 2):  # Ray gives up after half a minute, which is short where much else runs
        try:
            # One logical core: workers are placed by hand, and Ray would keep an idle process for each core.
            ray.init(address="local", num_cpus=1, include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray raises plain ones
            ray.shutdown()
            if attempt == 2:
                reason = str(error).strip().splitlines()[0]
                raise EngineError(
                    f"Ray cannot be started here ({reason}): try again when less runs, or leave replicas out"
                ) from error
    return True


def device_of(name: str, options: Mapping[str, Any]) -> str:
    return "cpu" if name == "toy" else str(options.get("device", "auto"))


@dataclass(frozen=True)
class Room:
    """What each worker is given: cores and GPUs that Ray counts, and threads."""

    cpus: int
    gpus: int
    threads: int

    @classmethod
    def find(cls, ray: Any, replicas: int, *, local: bool, device: str) -> Room:
        """Divide what there is among the workers.

        Raises:
            EngineError: There is not enough for each.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes)) if device.startswith(("auto", "cuda")) else 0
        if device.startswith("cuda:"):
            raise EngineError(f"device is {device!r}, but Ray gives each worker a GPU of its own: use cuda")
        if gpus and gpus < replicas:
            raise EngineError(f"Ray has {gpus} GPUs for {replicas} workers: use {gpus} replicas, or cpu as the device")
        if local:
            # Threads as this process would have, so that a worker alone rounds as it does.
            there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            cores = int(os.environ.get("OMP_NUM_THREADS") or there)
            return cls(0, bool(gpus), max(1, cores // replicas))
        cores_of = [int(node.get("CPU", 0)) for node in nodes]
        share = max(1, sum(cores_of) // replicas)
        threads = next((n for n in range(share, 0, -1) if sum(cores // n for cores in cores_of) >= replicas), 0)
        if not threads:
            raise EngineError(f"the cluster has {sum(cores_of)} cores for {replicas} workers: use fewer replicas")
        return cls(threads, bool(gpus), threads)


def reason(error: Exception) -> str:
    """The last line of what Ray says, which names the cause."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
