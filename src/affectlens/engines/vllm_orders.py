"""What vLLM's workers are told and what they answer, as plain data: JSON, and arrays as safetensors.

An :class:`Order` says what is to be done for one row of vLLM's batch. It goes to every worker before the row does, and the row
names it. :class:`Findings` come back after each step. A server has several who give orders (each has a :class:`Mail`), and nobody
sees the findings of another.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from affectlens.engine import Readout, Steering
from affectlens.layout import Where
from affectlens.scope import array_hash

NAME = "affectlens"
"""Of the entry in a request's ``extra_args`` that names its order."""


@dataclass(frozen=True)
class Noted:
    """What a readout wants of a row.

    Args:
        readout: Layers, directions, and how the worker pools; ``where`` is in the mask already.
        mask: Which of the given tokens may count, ``(T,)``.
        grows: Whether generated tokens may count.
    """

    readout: Readout
    mask: np.ndarray
    grows: bool


@dataclass(frozen=True)
class Order:
    """What is to be done for one row of vLLM's batch, from its first token to its last.

    Args:
        key: What the request calls it: see :meth:`Mail.key`.
        n_prompt: Tokens before the reply; -1 for all those that vLLM makes of the prompt: then all are steered and none is read.
        sink: With -1 the id of a beginning-of-sequence token, which is left alone.
        steering: What is done to the stream.
        masks: For each selector of the steering which of the given tokens it selects.
        ahead: And which of those that are generated, as first number and end.
        noted: What is recorded.
        wanted: ``(position, token)``: log-probability of ``token`` behind ``position``.
        residuals: What the stream behind the last block is to be in place of what it is, ``(T, D)``; logits are recorded.
    """

    key: str
    n_prompt: int
    steering: Steering = Steering()
    masks: tuple[np.ndarray, ...] = ()
    ahead: tuple[tuple[int, int], ...] = ()
    noted: tuple[Noted, ...] = ()
    wanted: tuple[tuple[int, int], ...] = ()
    residuals: np.ndarray | None = None
    sink: int | None = None

    @property
    def wheres(self) -> tuple[Where, ...]:
        """The selectors that ``masks`` and ``ahead`` are of."""
        return selectors(self.steering)


def owner_of(key: str) -> str:
    """Whose order a key names."""
    return key.partition(" ")[0]


def selectors(steering: Steering) -> tuple[Where, ...]:
    """The distinct selectors of a steering, in the order of its terms."""
    return tuple(dict.fromkeys(term.where for term in steering.terms))


class Mail:
    """Packs orders for the worker. Steerings and directions that it has got already are not sent again.

    Args:
        keep: How many of them the worker keeps.
    """

    def __init__(self, keep: int = 256) -> None:
        self.owner = uuid.uuid4().hex
        """Who gives these orders, and gets what was found for them."""
        self._keep = keep
        self._sent: dict[str, None] = {}
        self._hashes: dict[int, tuple[Any, str]] = {}

    def key(self, name: str) -> str:
        """The key of an order, which nobody else can guess."""
        return f"{self.owner} {name}"

    def pack(self, orders: Sequence[Order]) -> tuple[str, str, bytes]:
        """The owner; JSON, and arrays as safetensors."""
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {}
        steerings: dict[str, str] = {}
        onto: list[str] = []
        rows = []

        def known(thing: Any, data: Callable[[], str]) -> str:
            if id(thing) not in self._hashes:
                if len(self._hashes) >= 4 * self._keep:
                    self._hashes.clear()
                self._hashes[id(thing)] = thing, data()  # holding it keeps its id from another
            return self._hashes[id(thing)][1]

        def fresh(key: str) -> bool:
            new = key not in self._sent
            self._sent.pop(key, None)
            self._sent[key] = None
            return new

        for order in orders:
            row: dict[str, Any] = {name: getattr(order, name) for name in ("key", "n_prompt", "wanted", "ahead", "sink")}
            if order.steering.layers:
                text = functools.cache(order.steering.to_json)
                row["steering"] = known(order.steering, lambda text=text: f"steering {_digest(text())}")  # type: ignore[misc]
                if fresh(row["steering"]):
                    steerings[row["steering"]] = text()
                arrays |= {f"{order.key} mask {n}": mask for n, mask in enumerate(order.masks)}
                row["masks"] = len(order.masks)
            row["noted"] = []
            for n, noted in enumerate(order.noted):
                own: dict[str, Any] = {"layers": noted.readout.layers, "pool": noted.readout.pool, "grows": noted.grows}
                if (directions := noted.readout.onto) is not None:
                    own["onto"] = known(directions, lambda d=directions: f"onto {array_hash(d)}")  # type: ignore[misc]
                    if fresh(own["onto"]):
                        onto.append(own["onto"])
                        arrays[own["onto"]] = np.ascontiguousarray(directions, dtype=np.float32)
                arrays[f"{order.key} noted {n}"] = noted.mask
                row["noted"].append(own)
            if order.residuals is not None:
                arrays[f"{order.key} residuals"] = np.ascontiguousarray(order.residuals, dtype=np.float32)
            rows.append(row)
        forget = list(self._sent)[: max(0, len(self._sent) - self._keep)]
        for key in forget:
            del self._sent[key]
        head = json.dumps({"rows": rows, "steerings": steerings, "onto": onto, "forget": forget})
        return self.owner, head, save(arrays)


class Inbox:
    """Unpacks what one :class:`Mail` packed."""

    def __init__(self) -> None:
        self._things: dict[str, Any] = {}

    def unpack(self, head: str, data: bytes) -> list[Order]:
        from safetensors.numpy import load

        said, arrays = json.loads(head), load(data)
        self._things |= {key: Steering.from_json(text) for key, text in said["steerings"].items()}
        self._things |= {key: arrays[key] for key in said["onto"]}
        orders = []
        for row in said["rows"]:
            key = row["key"]
            noted = tuple(
                Noted(
                    Readout(tuple(own["layers"]), Where(), own["pool"], self._things[own["onto"]] if "onto" in own else None),
                    arrays[f"{key} noted {n}"],
                    own["grows"],
                )
                for n, own in enumerate(row["noted"])
            )
            orders.append(
                Order(
                    key,
                    row["n_prompt"],
                    self._things[row["steering"]] if "steering" in row else Steering(),
                    tuple(arrays[f"{key} mask {n}"] for n in range(row.get("masks", 0))),
                    tuple((start, stop) for start, stop in row["ahead"]),
                    noted,
                    tuple((position, token) for position, token in row["wanted"]),
                    arrays.get(f"{key} residuals"),
                    row["sink"],
                )
            )
        for key in said["forget"]:
            self._things.pop(key, None)
        return orders


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Seen:
    """What one readout of an order saw in one step: arrays as :class:`~affectlens.engines.residual.Recorder` gives them."""

    key: str
    number: int
    positions: np.ndarray
    values: np.ndarray
    norms: np.ndarray


@dataclass
class Findings:
    """What was found for one owner since it was last asked for.

    Args:
        seen: By readouts.
        likely: ``(key, number of what was wanted, log-probability)``.
        logits: Of an order with residuals, in the order of its tokens.
        lost: Keys of requests whose orders nobody gave.
    """

    seen: list[Seen] = field(default_factory=list)
    likely: list[tuple[str, int, float]] = field(default_factory=list)
    logits: list[tuple[str, np.ndarray]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def pack(self) -> tuple[str, bytes]:
        from safetensors.numpy import save

        if not (self.seen or self.likely or self.logits or self.lost):
            return "", b""
        arrays = {}
        for n, one in enumerate(self.seen):
            for name in ("positions", "values", "norms"):
                arrays[f"{n} {name}"] = np.ascontiguousarray(getattr(one, name))
        # vLLM pads vocabularies, so what it gives is a part of something wider.
        arrays |= {f"{n} logits": np.ascontiguousarray(logits) for n, (_, logits) in enumerate(self.logits)}
        seen = [(one.key, one.number) for one in self.seen]
        head = {"seen": seen, "likely": self.likely, "logits": [key for key, _ in self.logits], "lost": self.lost}
        return json.dumps(head), save(arrays)

    @classmethod
    def unpack(cls, head: str, data: bytes) -> Findings:
        from safetensors.numpy import load

        if not head:
            return cls()
        said, arrays = json.loads(head), load(data)
        seen = [
            Seen(key, number, *(arrays[f"{n} {name}"] for name in ("positions", "values", "norms")))
            for n, (key, number) in enumerate(said["seen"])
        ]
        likely = [(key, number, value) for key, number, value in said["likely"]]
        logits = [(key, arrays[f"{n} logits"]) for n, key in enumerate(said["logits"])]
        return cls(seen, likely, logits, said["lost"])
