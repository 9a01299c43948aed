"""Every limit and switch of ``affectlens serve``, as plain data.

The defaults are those of one process on one machine for one team: it answers on loopback only, takes prompts of any length that
fits the model's context, and ends what takes too long.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from affectlens.errors import FormatError


@dataclass(frozen=True)
class Settings:
    """What a server allows. Times are in seconds, sizes in bytes.

    Args:
        host, port: Where it listens. A host that is not loopback needs API keys.
        concurrency: How many replies are generated at once, and share forward passes.
        queue: How many more replies may wait; who comes then is told to come again (429).
        time_limit: After so long a reply ends with what it has (``length``).
        max_tokens: The most tokens of a reply, and the default of a chat where the context has room for them.
        max_choices: The most replies to one call (``n`` times the prompts).
        max_body: The largest body of a request.
        body_time: How long a body may take to arrive.
        buffer: How many events may wait for a slow reader before its time runs.
        stall: How long a reader may be behind, or take nothing at all, before it is cut off.
        drain: How long replies may go on after SIGTERM before they are ended.
        heartbeat: How often an idle event stream says that it is there.
        listeners: How many may follow ``/v1/events`` at once.
        commit: How long the end of a reply waits for a store that does not answer.
        watched: Emotions that are read where a call names none; empty for twelve that the paper shows.
        allow_unsafe: Whether strengths may leave the calibrated range.

    Raises:
        FormatError: A number that allows nothing, or a host that is no address.

    Example:
        >>> Settings(concurrency=8).loopback, Settings(host="0.0.0.0").loopback
        (True, False)
    """

    host: str = "127.0.0.1"
    port: int = 8000
    concurrency: int = 32
    queue: int = 64
    time_limit: float = 300.0
    max_tokens: int = 4096
    max_choices: int = 16
    max_body: int = 4 * 2**20
    body_time: float = 30.0
    buffer: int = 512
    stall: float = 30.0
    drain: float = 20.0
    heartbeat: float = 15.0
    listeners: int = 100
    commit: float = 5.0
    watched: tuple[str, ...] = ()
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_tokens", "max_choices", "max_body", "buffer", "listeners"):
            if getattr(self, name) < 1:
                raise FormatError(f"{name} is {getattr(self, name)}: use 1 or more")
        for name in ("time_limit", "body_time", "stall", "heartbeat"):
            if not getattr(self, name) > 0:
                raise FormatError(f"{name} is {getattr(self, name)} seconds: use more than 0")
        for name in ("queue", "drain", "commit"):
            if not getattr(self, name) >= 0:
                raise FormatError(f"{name} is {getattr(self, name)}: use 0 or more")
        if not 0 <= self.port < 2**16:
            raise FormatError(f"port {self.port} does not exist: use one below 65536")
        if not self.host:
            raise FormatError("the host is empty: use 127.0.0.1, or an address of this machine together with --api-keys")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
