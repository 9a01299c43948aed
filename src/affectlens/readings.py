"""What a model answered to requests, kept on disk: asked once, shared by every study, resumed where a killed run stopped.

Requests are data, so two studies that ask about the same prompt can share its forward pass: :meth:`Readings.gather` merges the
readouts of equal prompts, runs what is not there yet and writes it in shards. :meth:`Readings.read` then gives each study the
results of its own requests. Prompts with the same sampling and seed are generated once, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import Engine, Layout, Reading, Readout, Request, Result, batched, in_order, plain_data
from affectlens.errors import FormatError
from affectlens.runs import atomic_write, content_id

SHARD = 128
"""Requests in one shard: what a killed run loses at most."""

FEW_GENERATED = 32
"""The same where replies are generated, which takes far longer."""


class Readings:
    """Results of requests to one engine, kept in a folder.

    Args:
        engine: The model.
        folder: Where the shards lie. It must hold results of this model only: make it a stage whose inputs name the model.
        run: What runs a shard's requests, in place of the engine's own ``run``.

    Raises:
        FormatError: A shard is broken.

    Example:
        >>> import tempfile, affectlens as al
        >>> readings = Readings(al.open_engine("toy"), Path(tempfile.mkdtemp()))
        >>> asked = [al.Request("the calm sea", readouts=(al.Readout((4,)),))]
        >>> readings.gather(asked)
        >>> next(readings.read(asked)).readings[0].values.shape
        (1, 64)
    """

    def __init__(
        self, engine: Engine, folder: Path, *, run: Callable[[Sequence[Request]], Iterable[Result]] | None = None
    ) -> None:
        self.engine, self.folder = engine, Path(folder)
        self._run, self._at_once = (run, 1) if run else (engine.run, engine.at_once)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keys: dict[int, tuple[Readout, str]] = {}
        self._where: dict[tuple[str, str], tuple[Path, int, int]] = {}
        self._open: tuple[Path, Any, list[Any]] | None = None
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path, _open(path)[1]["results"])

    def gather(self, requests: Iterable[Request], advance: Callable[[int], None] = lambda n: None) -> None:
        """Run what is not there yet; requests about the same prompt share one forward pass.

        Args:
            requests: Of any number of studies.
            advance: Told how many distinct prompts were run.
        """
        merged = self.missing(requests)
        # Generation is slow and gets smaller shards; of each kind, equal plans give equal shards.
        for group, size in (
            ([r for r in merged if r.sampling is None], SHARD),
            ([r for r in merged if r.sampling is not None], FEW_GENERATED),
        ):
            chunks = list(batched(group, size))
            for kept, chunk in zip(in_order(self._kept, chunks, at_once=self._at_once), chunks, strict=True):
                self._index(*kept)
                advance(len(chunk))

    def _kept(self, chunk: Sequence[Request]) -> tuple[Path, list[dict[str, Any]]]:
        return self._write(chunk, list(self._run(chunk)))

    def missing(self, requests: Iterable[Request]) -> list[Request]:
        """The requests still to be run, those about the same prompt merged into one."""
        wanted: dict[str, tuple[Request, dict[str, Readout]]] = {}
        shared: dict[str, Readout] = {}  # engines batch readouts that are the same object
        for request in requests:
            base = _base(request)
            for readout in request.readouts or (None,):
                key = self._key(readout)
                if (base, key) not in self._where:
                    _, readouts = wanted.setdefault(base, (request, {}))
                    if readout is not None:
                        readouts[key] = shared.setdefault(key, readout)
        return [replace(request, readouts=tuple(readouts.values())) for request, readouts in wanted.values()]

    def read(self, requests: Iterable[Request]) -> Iterator[Result]:
        """The result of each request, in order; what :meth:`gather` was not asked for is run now, and kept."""
        for window in batched(requests, SHARD):
            if self.missing(window):
                self.gather(window)
            for request in window:
                yield self._result(request)

    def _result(self, request: Request) -> Result:
        base = _base(request)
        path, number, _ = self._where[base, self._key(request.readouts[0] if request.readouts else None)]
        plain = self._shard(path)[2][number]
        layout = Layout(
            text=plain["text"],
            tokens=tuple(plain["tokens"]),
            ids=tuple(plain["ids"]),
            offsets=tuple((start, end) for start, end in plain["offsets"]),
            roles=tuple(plain["roles"]),
            n_prompt=plain["n_prompt"],
            turns=tuple((role, start, end) for role, start, end in plain.get("turns", ())),
        )
        readings = []
        for readout in request.readouts:
            path, number, r = self._where[base, self._key(readout)]
            tensors = self._shard(path)[1]
            readings.append(Reading(*(tensors.get_tensor(f"{number}.{r}.{part}") for part in ("values", "norms", "positions"))))
        return Result(plain["reply"], layout, tuple(readings), tuple(plain["choices"]), plain["finish"])

    def _shard(self, path: Path) -> tuple[Path, Any, list[Any]]:
        """The shard, opened; neighbours are asked one after the other, so one is kept open."""
        if self._open is None or self._open[0] != path:
            tensors, plain = _open(path)
            self._open = (path, tensors, plain["results"])
        return self._open

    def _index(self, path: Path, results: Sequence[Mapping[str, Any]]) -> None:
        for number, result in enumerate(results):
            for r, key in enumerate(result["readouts"] or [""]):
                self._where[result["base"], key] = (path, number, r)
            self._where.setdefault((result["base"], ""), (path, number, 0))

    def _write(self, requests: Sequence[Request], results: Sequence[Result]) -> tuple[Path, list[dict[str, Any]]]:
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        plain: list[dict[str, Any]] = []
        for number, (request, result) in enumerate(zip(requests, results, strict=True)):
            for r, reading in enumerate(result.readings):
                for part in ("values", "norms", "positions"):
                    arrays[f"{number}.{r}.{part}"] = np.ascontiguousarray(getattr(reading, part))
            plain.append(
                {
                    "base": _base(request),
                    "readouts": [self._key(readout) for readout in request.readouts],
                    "reply": result.text,
                    "choices": result.choice_logprobs,
                    "finish": result.finish,
                    # Not asdict, which copies token by token.
                    **{field.name: getattr(result.layout, field.name) for field in fields(Layout)},
                }
            )
        name = content_id([(entry["base"], entry["readouts"]) for entry in plain])
        arrays["empty"] = np.zeros(0, np.float32)  # safetensors wants one tensor at least
        path = self.folder / f"{name}.safetensors"
        with atomic_write(path) as temporary:
            temporary.write_bytes(save(arrays, {"results": json.dumps({"results": plain})}))
        return path, plain

    def _key(self, readout: Readout | None) -> str:
        if readout is None:
            return ""
        if id(readout) not in self._keys:  # hashing 171 directions takes time; the readout is kept so that its id stays its own
            self._keys[id(readout)] = (readout, _hash(plain_data(readout)))
        return self._keys[id(readout)][1]


def _base(request: Request) -> str:
    """What is run, whatever is recorded of it."""
    return _hash(plain_data(replace(request, readouts=(), stream=False)))


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:24]


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(path, framework="numpy")
        return tensors, json.loads(tensors.metadata()["results"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is broken ({error}): delete it and run again") from None
