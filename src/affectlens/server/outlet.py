"""From the threads of replies to the sockets of those who read them: nothing blocks, and nobody waits for a slow reader.

A thread puts what it has into an :class:`Outlet` and goes on. Pieces wait there for the asyncio loop, a bounded number of them: a
reader that stays behind for longer than it may, or whose socket takes nothing for that long, is cut off and its place is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from affectlens.errors import Busy
from affectlens.sharing import Cancelled

LOG = logging.getLogger("affectlens.server")

SENDING = 2**17
"""Bytes that the kernel keeps for a reader; by itself it would take megabytes before anybody noticed that nothing is read."""

AT_ONCE = 2**15
"""Bytes that are sent at once: who takes so many in the time of a stall is slow and not stuck."""

Item = TypeVar("Item")


class Outlet(Generic[Item]):
    """What threads put in and the loop takes out; made in the loop.

    Args:
        buffer: How many items may wait before the reader is behind.
        stall: Seconds that it may be behind.
        slow: Called once, from the thread that notices, when it was behind for too long.
    """

    def __init__(self, *, buffer: int, stall: float, slow: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._buffer, self._stall, self._slow = buffer, stall, slow
        self._behind: float | None = None
        self._closed = False

    def put(self, item: Item) -> None:
        """Put something in, from any thread; never waits.

        Raises:
            Cancelled: Nobody reads any more.
        """
        with self._lock:
            if self._closed:
                raise Cancelled
            waking = not self._items
            self._items.append(item)
            now = time.monotonic()
            self._behind = None if len(self._items) <= self._buffer else self._behind or now
            cut = self._behind is not None and now - self._behind > self._stall
        if cut:
            self.close()
            self._slow()
            raise Cancelled
        if waking:
            self._wake()

    async def take(self) -> list[Item] | None:
        """Everything that waits, at least one item; None when it was closed."""
        while True:
            await self._came.wait()
            self._came.clear()
            with self._lock:
                if self._closed:
                    return None
                items, self._items = list(self._items), deque()
            if items:
                return items

    def close(self) -> None:
        """Let go of what waits; from any thread."""
        with self._lock:
            self._closed = True
            self._items.clear()
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever read
            self._loop.call_soon_threadsafe(self._came.set)


class EventStream(Response):
    """Server-sent events, piece by piece, to a reader who may leave or stall.

    Args:
        pieces: What is sent.
        stall: Seconds that one piece may take.
        left: Called when there is nobody any more to send to, whatever the reason: ``left`` or ``slow``; not at a regular end.
    """

    def __init__(self, pieces: AsyncIterator[bytes], *, stall: float, left: Callable[[str], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._stall, self._left = pieces, stall, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
            else:
                self._left("left")
        except TimeoutError:
            self._left("slow")
        except BaseException:
            self._left("left")
            raise
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._pieces) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                for start in range(0, len(piece), AT_ONCE):
                    async with asyncio.timeout(self._stall):
                        body = piece[start : start + AT_ONCE]
                        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Wait until the caller has hung up; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Events:
    """``/v1/events``: what happens on the server, told to everyone who follows.

    Args:
        buffer, stall: For each follower, see :class:`Outlet`.
        heartbeat: Seconds after which silence is broken by a comment.
        most: How many may follow at once.
    """

    def __init__(self, *, buffer: int, stall: float, heartbeat: float, most: int) -> None:
        self._buffer, self._stall, self._heartbeat, self._most = buffer, stall, heartbeat, most
        self._lock = threading.Lock()
        self._outlets: set[Outlet[bytes]] = set()

    def __len__(self) -> int:
        return len(self._outlets)

    def tell(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell all followers; from any thread."""
        with self._lock:
            outlets = list(self._outlets)
        if not outlets:
            return
        piece = f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
        for outlet in outlets:
            with contextlib.suppress(Cancelled):
                outlet.put(piece)

    def follow(self) -> EventStream:
        """A response that goes on until its reader leaves or :meth:`close` is called.

        Raises:
            Busy: Too many follow already.
        """
        with self._lock:
            if len(self._outlets) >= self._most:
                raise Busy(f"{self._most} follow the events already: try again later", 30.0)
            outlet = Outlet[bytes](buffer=self._buffer, stall=self._stall, slow=lambda: None)
            self._outlets.add(outlet)

        async def pieces() -> AsyncIterator[bytes]:
            yield b": affectlens\n\n"
            while True:
                try:
                    async with asyncio.timeout(self._heartbeat):
                        items = await outlet.take()
                except TimeoutError:
                    yield b": heartbeat\n\n"
                    continue
                if items is None:
                    return
                yield b"".join(items)

        def left(_: str) -> None:
            self._forget(outlet)

        return _Following(pieces(), stall=self._stall, left=left)

    def close(self) -> None:
        """End all streams."""
        with self._lock:
            outlets, self._outlets = self._outlets, set()
        for outlet in outlets:
            outlet.close()

    def _forget(self, outlet: Outlet[bytes]) -> None:
        with self._lock:
            self._outlets.discard(outlet)
        outlet.close()


class _Following(EventStream):
    """An event stream that has no regular end: whoever reads it has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left("left")


def listen(host: str, port: int, *, stall: float) -> socket.socket:
    """A socket that listens; its connections hold little for readers who do not read, and are dropped when one takes nothing.

    Args:
        host, port: Where.
        stall: Seconds after which the kernel gives up on a reader.

    Raises:
        OSError: The address is in use, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio turns off the waiting for acknowledgements (Nagle) for this protocol only.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDING)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # what was sent already is out of our hands: only the kernel can give up on it
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stall))
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made
