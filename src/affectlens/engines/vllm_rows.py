"""A request on its way through vLLM: which rows it has there, what the worker is told of each, and what came of it so far."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from affectlens.engine import Reading, Readout, Result
from affectlens.engines.decode import Part, Reply, candidates, may_grow, nothing, reading_of, unpooled
from affectlens.engines.rows import Row
from affectlens.engines.vllm_orders import Noted, Order, selectors
from affectlens.errors import AffectlensError
from affectlens.layout import Layout, Where
from affectlens.steering import Steering


@dataclass
class Seat:
    """One row of vLLM's batch.

    Args:
        key: Its id.
        job: What it belongs to.
        row: Its tokens.
        order: What the worker has been told.
        reply: What was said so far; None where nothing is generated.
        parts: What each readout saw.
        heard: Tokens that vLLM has drawn.
    """

    key: str
    job: Job
    row: Row
    order: Order
    reply: Reply | None = None
    parts: dict[int, list[Part]] = field(default_factory=dict)
    heard: int = 0

    def readings(self, width: int, layout: Layout, first: int = 0) -> tuple[Reading, ...]:
        """Readings of the row from token ``first`` on; ``width`` is that of the residual."""
        out = []
        for r, readout in enumerate(self.row.request.readouts):
            parts = self.parts.get(r, [])
            if _settled(readout, self.row):
                out.append(_joined(readout, [] if first else parts, width))
            else:
                out.append(reading_of(readout, layout, parts, first=first, width=width))
        return tuple(out)


@dataclass
class Job:
    """A request and what has come of it.

    Args:
        number: Its ticket.
        layout: Its tokens.
        logprobs: Of its choices, as far as they are known.
        seats: Rows that still run.
        out: Results that nobody has taken yet.
        over: Whether the last one is among them.
    """

    number: int
    layout: Layout
    logprobs: np.ndarray
    seats: list[Seat] = field(default_factory=list)
    readings: tuple[Reading, ...] = ()
    out: deque[Result | AffectlensError] = field(default_factory=deque)
    over: bool = False


def _settled(readout: Readout, row: Row) -> bool:
    """Whether it is known before anything is generated which tokens count: then the worker pools them."""
    return row.request.sampling is None or not may_grow(readout.where)


def _noted(readout: Readout, row: Row) -> Noted:
    if not _settled(readout, row):
        return Noted(unpooled(readout), candidates(row, readout), grows=True)
    # The norm of a mean is wanted too, and a prompt may come in parts: a mean is projected when it is whole.
    onto = readout.onto if readout.pool in ("none", "last") else None
    return Noted(Readout(readout.layers, Where(), readout.pool, onto), readout.where.mask(row.layout), grows=False)


def _joined(readout: Readout, parts: Sequence[Part], width: int) -> Reading:
    """A readout out of what was pooled in each part of a prompt."""
    if not parts:
        return nothing(readout, width)
    positions = np.concatenate([part.positions for part in parts])
    if readout.pool == "none":
        values, norms = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("values", "norms"))
        return Reading(values, norms, positions)
    if readout.pool == "last":
        return Reading(parts[-1].values, parts[-1].norms, positions)
    counts = np.array([len(part.positions) for part in parts], dtype=np.float64)
    mean = parts[0].values
    if len(parts) > 1:
        stacked = np.stack([part.values for part in parts]).astype(np.float64)
        mean = np.tensordot(counts / counts.sum(), stacked, axes=1).astype(np.float32)
    if readout.pool == "norm":
        return Reading(mean, mean, positions)
    values = mean if readout.onto is None else np.einsum("ld,lnd->ln", mean, readout.onto).astype(np.float32)
    return Reading(values, np.linalg.norm(mean, axis=-1), positions)


def order_of(key: str, row: Row) -> Order:
    steering = row.request.steering
    wheres = selectors(steering) if steering.layers else ()
    ahead = [where.ahead(row.layout) if row.is_request else range(0) for where in wheres]
    return Order(
        key,
        row.layout.n_prompt,
        steering if steering.layers else Steering(),
        tuple(row.steered(where) for where in wheres),
        tuple((each.start, each.stop) for each in ahead),
        tuple(_noted(readout, row) for readout in row.request.readouts) if row.is_request else (),
        tuple((position, token) for position, token, _ in row.wanted),
    )


def salt(order: Order) -> str | None:
    """What keeps the keys and values of a steered request apart from those of others; None for one that is not steered.

    Where all tokens are steered alike, the steering says it all, and requests that begin alike share their beginning. Else it
    depends on which tokens of this prompt are selected.
    """
    if order.residuals is not None:
        return f"once {order.key} {os.urandom(16).hex()}"
    if not order.steering.layers:
        return None
    digest = hashlib.sha256(repr(order.steering.content()).encode())
    if set(order.wheres) != {Where()} or any(term.schedule for term in order.steering.terms):
        digest.update(repr((order.n_prompt, order.ahead)).encode())
        for mask in order.masks:
            digest.update(repr(mask.shape).encode() + np.packbits(mask).tobytes())
    return digest.hexdigest()
