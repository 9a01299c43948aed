"""A ``vllm serve`` somewhere as an engine: ``open_engine("vllm/http://127.0.0.1:8000")``.

The server runs our worker and our middleware (``docs/scale.md``); requests go there as data, windows of them at a time, and
results come back as they are made. What a request does there is what it does with vLLM in process.

    POST /v1/affectlens/run         takes requests; gives each result as soon as it is there
    POST /v1/affectlens/WHAT        one of :data:`affectlens.engines.asking.CALLS`; gives one answer

Answers come in a row, each with its length before it in 8 bytes, little-endian. A length of 0 is the end; without it something is
missing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.engine import Engine, Request, Result, batched, check_request
from affectlens.engines import wire
from affectlens.engines.asking import CALLS, answer
from affectlens.errors import Busy, EngineError, MismatchError
from affectlens.layout import Layout

if TYPE_CHECKING:
    import httpx

PREFIX = "/v1/affectlens/"
"""Of the paths that :mod:`affectlens.vllm_serve` answers for this engine."""

TOGETHER = 256
"""Residuals that are sent to be unembedded at a time."""


class RemoteEngine(Engine):
    """An engine around the model of a ``vllm serve``.

    Args:
        url: Where the server is, ``http://127.0.0.1:8000``.
        api_key: If it wants one; by default what ``VLLM_API_KEY`` holds.
        device, dtype: ``auto``: the server has chosen. Any other is refused if it is not what the server has.

    Raises:
        EngineError: There is no server, it wants a key, or it has not loaded what is needed.
        MismatchError: It has another version of affectlens, or runs in another dtype.

    Example:
        >>> engine = RemoteEngine("http://127.0.0.1:8000")                  # doctest: +SKIP
        >>> engine.generate(["Once upon a time"])                           # doctest: +SKIP
    """

    def __init__(self, url: str, *, api_key: str | None = None, device: str = "auto", dtype: str = "auto") -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY") if api_key is None else api_key
        headers = {"Content-Type": "application/octet-stream", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            # A server closes what was idle for some seconds, perhaps just when it is asked again.
            limits = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
            timeout = httpx.Timeout(None, connect=30.0)
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
            loaded = self._asked("loaded", None)
        except httpx.InvalidURL as error:
            raise EngineError(f"{url!r} is no address ({error}): write vllm/http://HOST:PORT") from None
        if loaded.version != (own := version("affectlens")):
            raise MismatchError(f"the server has affectlens {loaded.version}, this process {own}: install the same on both sides")
        self.info = loaded.info
        for name, wanted in (("device", device), ("dtype", dtype)):
            if wanted not in ("auto", has := getattr(self.info, name)):
                raise MismatchError(f"the server has chosen {name} {has}, not {wanted}: use auto, or start it otherwise")

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for window in batched(requests, self.window):
            for request in window:
                check_request(request, self.info)
            results = len(window)
            with contextlib.closing(self._answers("run", wire.pack(tuple(window)), Result)) as answers:
                for result in answers:
                    results -= result.done
                    yield result
            if results:
                raise EngineError(f"the server at {self.url} has left out {results} results: see its log")

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        parts = [residuals[i : i + TOGETHER] for i in range(0, len(residuals), TOGETHER)] or [residuals]
        return np.concatenate([self._asked("unembed", np.asarray(part, dtype=np.float32)) for part in parts])

    def layout(self, request: Request) -> Layout:
        layout: Layout = self._asked("layout", request)
        return layout

    @cached_property
    def vocabulary(self) -> Sequence[str]:
        words: tuple[str, ...] = self._asked("vocabulary", None)
        return words

    def close(self) -> None:
        """Hang up; the server runs on."""
        self._client.close()

    # ── over HTTP ──

    def _asked(self, what: str, value: Any) -> Any:
        (found,) = self._answers(what, wire.pack(value), CALLS[what].gives)
        return found

    def _answers(self, what: str, question: bytes, kind: Any) -> Generator[Any, None, None]:
        """What the server answers, as it comes.

        Raises:
            AffectlensError: What it says is wrong; or there is no such server, or it ended.
        """
        import httpx

        try:
            with self._client.stream("POST", PREFIX + what, content=question) as response:
                if response.status_code == 429:
                    raise Busy(self._refused(response))
                if response.status_code != 200:
                    raise EngineError(self._refused(response))
                for part in _parts(response.iter_bytes()):
                    if not part:
                        return
                    value, failure = wire.unpack(part, answer(kind))
                    if failure is not None:
                        raise failure.error
                    yield value
        except httpx.TransportError as error:
            raise EngineError(f"no vllm serve answers at {self.url} ({error}): start it, or check the address") from None
        raise EngineError(f"the server at {self.url} ended in the middle of an answer: see its log, and ask again")

    def _refused(self, response: httpx.Response) -> str:
        """What to say of an answer that is none."""
        if response.status_code == 401:
            return f"the server at {self.url} wants a key: give api_key=, or set VLLM_API_KEY"
        try:
            said = str(json.loads(response.read())["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return (
                f"{self.url} is no vllm serve with affectlens in it (status {response.status_code}): "
                "start it with --middleware affectlens.vllm_serve.Emotions"
            )
        return f"the server at {self.url} says: {said}"


def _parts(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Answers out of a stream, each of which has its length before it."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= 8 and len(buffer) >= 8 + (size := int.from_bytes(buffer[:8], "little")):
            yield bytes(buffer[8 : 8 + size])
            del buffer[: 8 + size]
