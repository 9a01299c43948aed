"""Steering on the device: a batch's arithmetic is worked out once (:class:`Plan`), and laid over the tokens of each forward pass.

Requests of one batch steer each in their own way, at some of their own tokens. What they have in common is one operation on the
flattened tokens of the pass: the same vectors, the same pinned coordinates, the same gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from affectlens.layout import Where
from affectlens.scope import Gate, Scope
from affectlens.steering import Steering


@dataclass
class Tokens:
    """The tokens of one request in one forward pass.

    Args:
        rows: Where they stand among the flattened tokens of the pass, ``(T,)``.
        numbers: Their numbers in the reply, negative in the prompt, ``(T,)``.
        masks: For each selector of the request's steering which of them it selects, ``(T,)``.
    """

    rows: np.ndarray
    numbers: np.ndarray
    masks: Mapping[Where, np.ndarray]

    def shares(self, scope: Scope) -> np.ndarray:
        return scope.shares(self.masks[scope.where], self.numbers)


def by_rows(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``x @ matrix``, where each row of ``x`` gets the same bits whatever other rows there are.

    A product of two matrices is divided according to their sizes, and its sums are rounded accordingly. What is done to a token
    and read of it should not depend on who else is served. On a CPU it may also depend on where in memory a row and its result
    begin (with torch's MKL on AMD's), so each row is copied and multiplied alone.
    """
    if x.device.type != "cpu":
        return torch.bmm(x[:, None], matrix.expand(len(x), *matrix.shape))[:, 0]
    product = x.new_empty(len(x), matrix.shape[1])
    for i, row in enumerate(x):
        product[i] = row.clone() @ matrix
    return product


class Sensor:
    """A gate on the device."""

    def __init__(self, gate: Gate, device: torch.device) -> None:
        self.gate = gate
        self.direction = torch.as_tensor(gate.direction, dtype=torch.float32, device=device)
        self.centre = None if gate.centre is None else torch.as_tensor(gate.centre, dtype=torch.float32, device=device)

    def opened(self, flat: torch.Tensor) -> torch.Tensor:
        """At which of the residuals ``(tokens, D)`` the gate is open."""
        x = flat.float() if self.centre is None else flat.float() - self.centre
        score = (
            by_rows(x, self.direction[:, None])[:, 0] / x.norm(dim=1).clamp(min=1e-30) - self.gate.mean
        ) / self.gate.deviation
        is_open = torch.ones_like(score, dtype=torch.bool)
        if self.gate.above is not None:
            is_open &= score > self.gate.above
        if self.gate.below is not None:
            is_open &= score < self.gate.below
        return is_open


Opened = Mapping[Gate, torch.Tensor]


@dataclass
class Push:
    """Add ``share * table[which]`` to the flattened token ``rows`` where the gate is open; a row occurs once."""

    rows: torch.Tensor
    table: torch.Tensor
    which: torch.Tensor | None
    share: torch.Tensor | None
    gate: Gate | None

    def apply(self, flat: torch.Tensor, opened: Opened) -> None:
        if len(self.rows) == len(flat) and self.which is self.share is self.gate is None:
            flat.add_(self.table)  # the same to every token: added in float32 here, too, and rounded once
            return
        step = self.table if self.which is None else self.table[self.which]
        if self.share is not None:
            step = step * self.share
        before = flat[self.rows]
        after = (before.float() + step).to(flat.dtype)
        if self.gate is not None:
            after = torch.where(opened[self.gate].to(flat.device)[self.rows, None], after, before)
        flat[self.rows] = after


@dataclass
class Pin:
    """Move coordinates of the flattened token ``rows``: see :class:`affectlens.steering.Pin`.

    Where all coordinates are moved at all of these tokens, ``dual`` sets them together. Where which of them are moved differs
    from token to token, :func:`settle` does.

    Args:
        rows: The tokens, ``(T,)``.
        basis: ``(n, D)``.
        dual: ``(D, n)``, or None.
        target: ``(n,)``.
        amount: What to move by, ``(n,)`` or ``(T, n)``.
        limit: Which coordinates are only moved down.
        gates: Of each coordinate.
    """

    rows: torch.Tensor
    basis: torch.Tensor
    dual: torch.Tensor | None
    target: torch.Tensor
    amount: torch.Tensor
    limit: tuple[bool, ...]
    gates: tuple[Gate | None, ...]

    def apply(self, flat: torch.Tensor, opened: Opened) -> None:
        before = flat[self.rows]
        x = before.float()
        coordinates = by_rows(x, self.basis.T)
        amount = self.amount
        if any(self.gates):
            always = torch.ones(len(self.rows), dtype=torch.bool, device=flat.device)
            is_open = [always if gate is None else opened[gate].to(flat.device)[self.rows] for gate in self.gates]
            amount = amount * torch.stack(is_open, dim=1)
        if self.dual is not None:
            step = by_rows((self.target - coordinates) * amount, self.dual.T)
        else:
            step = by_rows(settle(coordinates, self.basis, self.target, amount.expand_as(coordinates), self.limit), self.basis)
        flat[self.rows] = (x + step).to(flat.dtype)


def settle(
    coordinates: torch.Tensor, basis: torch.Tensor, target: torch.Tensor, amount: torch.Tensor, limit: Sequence[bool]
) -> torch.Tensor:
    """How far to go along each direction so that the coordinates that are moved meet their goals together: weights ``(T, n)``.

    The Gram matrix is reduced one coordinate at a time (Gauss and Jordan): what is left on the right-hand side of a coordinate
    that was not taken in yet is how far it still is from its goal, given those that were. So limits that are exceeded can be
    taken in one by one, the worst first, for all tokens at once and without asking the device for an answer in between. A
    coordinate that the ones before it determine is left out.

    Args:
        coordinates: ``(T, n)``.
        basis: ``(n, D)``.
        target: ``(n,)``.
        amount: ``(T, n)``; 0 leaves a coordinate free.
        limit: Which coordinates are only moved down, ``n`` of them.
    """
    n = len(basis)
    limited = torch.tensor(limit, device=basis.device)
    token = torch.arange(len(coordinates), device=basis.device)
    goal = coordinates + amount * (target - coordinates)
    goal = torch.where(limited, torch.maximum(goal, target), goal)
    table = torch.cat([(basis @ basis.T).expand(len(coordinates), n, n), (goal - coordinates)[:, :, None]], dim=2)
    held = torch.zeros_like(amount, dtype=torch.bool)
    active = amount != 0
    # Coordinates with a goal come first, in their order; then, once for each limit, the one that is exceeded most.
    for number in sorted(range(n), key=lambda i: limit[i]):
        if limit[number]:
            least, chosen = torch.where(limited & active & ~held, table[:, :, n], torch.inf).min(dim=1)
            taken = least < 0
        else:
            chosen = torch.full_like(token, number)
            taken = active[:, number]
        row = table[token, chosen]
        pivot = row[token, chosen][:, None]
        taken = taken & (pivot[:, 0] > 1e-5)
        row = row / pivot.clamp(min=1e-5)
        column = table[token, :, chosen]
        reduced = table - column[:, :, None] * row[:, None, :]
        reduced[token, chosen] = row
        table = torch.where(taken[:, None, None], reduced, table)
        held[token, chosen] |= taken
    return torch.where(held, table[:, :, n], 0.0)


Work = tuple[dict[int, list[Push | Pin]], dict[int, list[Sensor]]]
"""What to change and which gates to read at each layer of a pass."""


class Plan:
    """The steering of a batch: worked out and put on the device once, then laid over the tokens of any forward pass.

    Args:
        steerings: One for each request of the batch.
        device: Where each layer runs.
    """

    def __init__(self, steerings: Sequence[Steering], device: Callable[[int], torch.device]) -> None:
        self.device = device
        self.sensors: dict[Gate, Sensor] = {}
        # For each layer the additions that are one operation: their vectors, and who adds which of them at which tokens.
        self.pushes: dict[int, list[tuple[Gate | None, torch.Tensor, list[tuple[int, Scope, int]]]]] = {}
        self.pins: dict[int, list[tuple[list[int], tuple[Scope, ...], Pin]]] = {}
        shared: dict[int, tuple[Steering, list[int]]] = {}  # requests usually share one Steering object
        for i, steering in enumerate(steerings):
            shared.setdefault(id(steering), (steering, []))[1].append(i)
        for steering, _ in shared.values():
            self.sensors |= {gate: Sensor(gate, device(gate.layer)) for gate in steering.gates if gate not in self.sensors}
        for layer in sorted({layer for steering, _ in shared.values() for layer in steering.layers}):
            self._plan(layer, list(shared.values()))

    @property
    def layers(self) -> set[int]:
        """Where anything is read or done."""
        return {*self.pushes, *self.pins, *(gate.layer for gate in self.sensors)}

    def _plan(self, layer: int, shared: Sequence[tuple[Steering, list[int]]]) -> None:
        device = self.device(layer)
        # The n-th addition of every request behind one gate is one operation, in which a token occurs once.
        together: dict[tuple[Gate | None, int], tuple[list[np.ndarray], list[tuple[int, Scope, int]]]] = {}
        for steering, members in shared:
            pushes, pin = steering.at_layer(layer)
            behind: dict[Gate | None, int] = {}
            for push in pushes:
                gate = push.scope.gate
                behind[gate] = behind.get(gate, -1) + 1
                vectors, whose = together.setdefault((gate, behind[gate]), ([], []))
                whose += [(i, push.scope, len(vectors)) for i in members]
                vectors.append(push.vector)
            if pin is not None:
                alike = len(set(pin.scopes)) == 1 and not pin.limit.any()
                basis, target, amount = (torch.as_tensor(a).to(device) for a in (pin.basis, pin.target, pin.amount))
                dual = torch.as_tensor(pin.dual).to(device) if alike else None
                gates = tuple(scope.gate for scope in pin.scopes)
                pinned = Pin(torch.empty(0), basis, dual, target, amount, tuple(pin.limit.tolist()), gates)
                self.pins.setdefault(layer, []).append((members, pin.scopes, pinned))
        for (gate, _), (vectors, whose) in together.items():
            table = torch.as_tensor(np.stack(vectors)).to(device)
            self.pushes.setdefault(layer, []).append((gate, table, whose))

    def over(self, tokens: Mapping[int, Tokens], last: int | None = None) -> Work:
        """What to change and which gates to read at each layer of a pass.

        Args:
            tokens: Of each request that has any in this pass.
            last: The layer after which the pass ends.
        """
        changes: dict[int, list[Push | Pin]] = {}
        gates: dict[Gate, None] = {}
        for layer in sorted({*self.pushes, *self.pins}):
            if last is not None and layer > last:
                break
            here: list[Push | Pin | None] = [self._push(layer, *push, tokens) for push in self.pushes.get(layer, ())]
            here += [self._pin(layer, *pin, tokens) for pin in self.pins.get(layer, ())]
            if done := [change for change in here if change is not None]:
                changes[layer] = done
                for change in done:
                    own = (change.gate,) if isinstance(change, Push) else change.gates
                    gates |= {gate: None for gate in own if gate is not None}
        sensors: dict[int, list[Sensor]] = {}
        for gate in gates:
            sensors.setdefault(gate.layer, []).append(self.sensors[gate])
        return changes, sensors

    def _push(
        self,
        layer: int,
        gate: Gate | None,
        table: torch.Tensor,
        whose: Sequence[tuple[int, Scope, int]],
        tokens: Mapping[int, Tokens],
    ) -> Push | None:
        rows, which, shares = [], [], []
        for i, scope, row in whose:
            if i in tokens:
                share = tokens[i].shares(scope)
                acts = np.flatnonzero(share)
                rows.append(tokens[i].rows[acts])
                shares.append(share[acts])
                which.append(np.full(len(acts), row))
        if not sum(map(len, rows)):
            return None
        index, share, numbers = (np.concatenate(parts) for parts in (rows, shares, which))
        device = self.device(layer)
        return Push(
            torch.as_tensor(index, dtype=torch.long, device=device),
            table,
            torch.as_tensor(numbers, device=device) if len(table) > 1 else None,
            None if (share == 1).all() else torch.as_tensor(share, device=device)[:, None],
            gate,
        )

    def _pin(
        self, layer: int, members: Sequence[int], scopes: Sequence[Scope], pin: Pin, tokens: Mapping[int, Tokens]
    ) -> Pin | None:
        rows, shares = [], []
        for i in members:
            if i in tokens:
                share = np.stack([tokens[i].shares(scope) for scope in scopes], axis=1)
                acts = np.flatnonzero(share.any(axis=1))
                rows.append(tokens[i].rows[acts])
                shares.append(share[acts])
        if not sum(map(len, rows)):
            return None
        index, share = np.concatenate(rows), np.concatenate(shares)
        device = self.device(layer)
        amount = pin.amount if (share == 1).all() else pin.amount * torch.as_tensor(share, device=device)
        return replace(pin, rows=torch.as_tensor(index, dtype=torch.long, device=device), amount=amount)
