"""What to do to the residual stream, as data: :class:`Steering`, a sum of :class:`Term`, with gates and schedules.

A term adds a direction, or pins the coordinate along it: ablate removes it, clamp holds it at a value, cap and floor hold it
below and above one. It acts at some tokens (:class:`~affectlens.layout.Where`), only while a reading along another direction is
above or below a value (:class:`Gate`), and with a share that changes over the reply (:class:`Schedule`). All units are stated:
strengths and held values are multiples of the mean residual norm at the layer, gates read cosines or z.

At one layer, gates are read first, from the stream as the block left it; then everything is added; then all coordinates that are
pinned at a token are set together, so that directions that are not orthogonal meet their values all the same.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from affectlens.errors import EngineError, FormatError, MismatchError
from affectlens.layout import Where
from affectlens.scope import Gate, Schedule, Scope, array_hash

Mode = Literal["add", "ablate", "clamp", "cap", "floor"]
Divide = Literal["even", "each"]
FORMAT = 1

_PARALLEL = 1 - 1e-5
"""Cosine from which on two directions are one: it cannot be held at two values."""


@dataclass(frozen=True, eq=False)
class Term:
    """One direction in a :class:`Steering`: data only.

    Args:
        name: What the direction stands for.
        strength: In multiples of the mean residual norm what is added (add), or the value that the coordinate is held at (clamp),
            at or below (cap), at or above (floor); the share that is removed (ablate).
        layers: The layers it acts on.
        available: The layers that ``directions`` and ``norms`` have rows for.
        directions: Unit directions, ``(len(available), width)``, float32.
        norms: Mean residual norm at each available layer, ``(len(available),)``.
        mode: ``add``, ``ablate``, ``clamp``, ``cap`` or ``floor``.
        where: At which tokens.
        gate: Only where this is open.
        schedule: How much of it over the reply.
        divide: How an addition's strength is divided among the layers: ``even`` gives each an equal part of the total,
            ``each`` gives all of it to each. What is removed or held is removed or held at each layer.

    Raises:
        EngineError: An unknown mode or rule, a strength that is not finite, a gate above a layer that it is for, or arrays that
            do not fit ``available``.
    """

    name: str
    strength: float
    layers: tuple[int, ...]
    available: tuple[int, ...]
    directions: np.ndarray
    norms: np.ndarray
    mode: Mode = "add"
    where: Where = Where()
    gate: Gate | None = None
    schedule: Schedule | None = None
    divide: Divide = "even"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise EngineError(f"the mode of {self.name!r} is {self.mode!r}: use {', '.join(get_args(Mode))}")
        if not np.isfinite(self.strength):
            raise EngineError(f"the strength of {self.name!r} is {self.strength}: use a finite number")
        if self.divide not in get_args(Divide):
            raise EngineError(f"the strength of {self.name!r} is divided {self.divide!r}: use even or each")
        if self.directions.ndim != 2 or not len(self.directions) == len(self.available) == len(self.norms):
            raise EngineError(f"{self.name!r} needs a direction and a norm for each of its {len(self.available)} layers")
        if self.gate is not None and self.layers and self.gate.layer > min(self.layers):
            raise EngineError(
                f"the gate on {self.gate.name!r} is read at layer {self.gate.layer}, after layer {min(self.layers)} is steered: "
                "read it there or lower with gate(layer=...), or choose the layers with on() first"
            )

    @property
    def scope(self) -> Scope:
        return Scope(self.where, self.gate, self.schedule)

    @property
    def idle(self) -> bool:
        """Whether it does nothing at all."""
        return self.strength == 0 and self.mode in ("add", "ablate")

    def row(self, layer: int) -> int:
        return self.available.index(layer)

    def content(self) -> tuple[Any, ...]:
        """What this term does, as hashable data: two terms with the same content steer identically."""
        rows = [self.row(layer) for layer in self.layers]
        digest = array_hash(self.directions[rows], self.norms[rows])
        gate = None if self.gate is None else self.gate.content()
        layers = tuple(int(layer) for layer in self.layers)
        return (self.name, float(self.strength), layers, self.mode, self.where, digest, gate, self.schedule, self.divide)

    def __str__(self) -> str:
        layers = _span(self.layers) + (" each" if self.divide == "each" and len(self.layers) > 1 else "")
        limits = [str(self.where)] if self.where != Where() else []
        limits += [str(limit) for limit in (self.gate, self.schedule) if limit is not None]
        sign = "" if self.mode == "add" else f" {self.mode}"
        return f"{self.strength:+g}{sign} {self.name} @ layer{'s' * (len(self.layers) > 1)} {layers}" + (
            f" ({'; '.join(limits)})" if limits else ""
        )


@dataclass(frozen=True)
class Push:
    """At one layer, at the tokens of ``scope``: ``h += share * vector``."""

    scope: Scope
    vector: np.ndarray


@dataclass(frozen=True)
class Pin:
    """At one layer: coordinates that are moved to their targets, all those that act at a token together.

    With ``c = basis @ h``, coordinate ``i`` moves to ``c + a * (target - c)``, where ``a`` is ``amount`` times the share of its
    scope; where ``limit`` is set, only if it is above the target. The residual changes by the shortest step that does this.

    Args:
        scopes: At which tokens each coordinate is moved, ``n`` of them.
        basis: Unit directions, ``(n, D)`` float32; that of a floor is turned round, which makes it a cap.
        target: ``(n,)`` float32.
        amount: ``(n,)`` float32.
        limit: ``(n,)`` bool.
    """

    scopes: tuple[Scope, ...]
    basis: np.ndarray
    target: np.ndarray
    amount: np.ndarray
    limit: np.ndarray

    @property
    def dual(self) -> np.ndarray:
        """Pseudo-inverse of ``basis``, ``(D, n)``: what moves one coordinate and no other, where all of them are moved."""
        return np.linalg.pinv(self.basis.astype(np.float64), rcond=1e-6).astype(np.float32)

    def settle(self, residual: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """The residual ``(D,)`` of one token, moved. The reference for what backends do to many tokens at once.

        Limits are taken in one by one, the one that is exceeded most first, and only if it is still exceeded with those before.
        A coordinate that those before it determine is left out.
        """
        basis, amount = self.basis.astype(np.float64), self.amount * shares
        c = basis @ residual
        goal = c + amount * (self.target - c)
        goal = np.where(self.limit, np.maximum(goal, self.target), goal)
        free = [i for i in range(len(c)) if amount[i] and self.limit[i]]
        waiting = [i for i in range(len(c)) if amount[i] and not self.limit[i]]
        held: list[int] = []
        while True:
            for i in waiting:
                own = basis[i] - np.linalg.lstsq(basis[held].T, basis[i])[0] @ basis[held]
                held += [i] * bool(own @ own > 1e-5)
            step = np.linalg.lstsq(basis[held], (goal - c)[held])[0]
            over = {i: excess for i in free if (excess := float(c[i] + basis[i] @ step - goal[i])) > 1e-9 * abs(c).max()}
            if not over:
                return np.asarray(residual + step, dtype=residual.dtype)
            waiting = [max(over, key=over.__getitem__)]
            free.remove(waiting[0])


@dataclass(frozen=True, eq=False)
class Steering:
    """What to do to the residual stream: a sum of :class:`Term`, as data. Made from vectors, combined with ``+ - *``.

    Raises:
        EngineError: One direction is to be held at two values at the same tokens.

    Example:
        >>> calm = Steering((Term("calm", 1.0, (0,), (0,), np.eye(2, dtype="f")[:1], np.ones(1, "f")),))
        >>> print(0.05 * calm.at(Where("response")).decay(50) + calm.cap(0.3))
        +0.05 calm @ layer 0 (response; decay over 50) +0.3 cap calm @ layer 0
        >>> Steering.from_json((0.05 * calm).to_json()) == 0.05 * calm
        True
    """

    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        held = [term for term in self.terms if term.mode != "add" and not term.idle]
        for i, term in enumerate(held):
            for other in held[:i]:
                _refuse_conflict(other, term)

    def __add__(self, other: Steering) -> Steering:
        return Steering(self.terms + other.terms)

    def __sub__(self, other: Steering) -> Steering:
        return self + (-1.0) * other

    def __mul__(self, factor: float) -> Steering:
        for term in self.terms:
            if term.mode in ("clamp", "cap", "floor"):
                raise EngineError(f"a {term.mode} holds a value and cannot be multiplied: give the value to {term.mode}(value)")
        return self._each(lambda term: {"strength": term.strength * float(factor)})

    __rmul__ = __mul__

    def __neg__(self) -> Steering:
        return -1.0 * self

    def _each(self, changes: Callable[[Term], dict[str, Any]]) -> Steering:
        return Steering(tuple(replace(term, **changes(term)) for term in self.terms))

    # ── where, when, how ──

    def at(self, where: Where) -> Steering:
        """The same steering at these tokens only."""
        return self._each(lambda term: {"where": where})

    def on(self, *layers: int, divide: Divide = "even") -> Steering:
        """The same steering on these layers.

        Args:
            layers: One or more.
            divide: How the strength of an addition is divided: ``even``: it is the total, and each layer gets an equal part;
                ``each``: every layer gets all of it, as in libraries that add one coefficient everywhere.

        Raises:
            MismatchError: There is no direction at a layer.
        """
        if not layers:
            raise EngineError("on() needs at least one layer")
        for term in self.terms:
            for layer in layers:
                if layer not in term.available:
                    raise MismatchError(f"{term.name!r} has no direction at layer {layer}: choose among {_span(term.available)}")
        chosen = tuple(sorted({int(layer) for layer in layers}))
        return self._each(lambda term: {"layers": chosen, "divide": divide})

    def ablate(self) -> Steering:
        """Remove the component along each direction (times the term's strength) instead of adding."""
        return self._each(lambda term: {"mode": "ablate"})

    def clamp(self, value: float) -> Steering:
        """Hold the component along each direction at ``value`` times the mean residual norm."""
        return self._each(lambda term: {"mode": "clamp", "strength": float(value)})

    def cap(self, value: float) -> Steering:
        """Hold the component along each direction at or below ``value`` times the mean residual norm: lower ones stay."""
        return self._each(lambda term: {"mode": "cap", "strength": float(value)})

    def floor(self, value: float) -> Steering:
        """Hold the component along each direction at or above ``value`` times the mean residual norm: higher ones stay."""
        return self._each(lambda term: {"mode": "floor", "strength": float(value)})

    def when(self, gate: Gate) -> Steering:
        """The same steering only at tokens where the gate is open.

        Example:
            >>> calmer = (0.1 * vectors["calm"]).when(vectors.gate("desperate", above=2))     # doctest: +SKIP
        """
        return self._each(lambda term: {"gate": gate})

    def ramp(self, tokens: int) -> Steering:
        """The same steering, rising over the first tokens of the reply; the prompt is left alone (see :class:`Schedule`)."""
        return self._each(lambda term: {"schedule": Schedule("ramp", tokens)})

    def decay(self, tokens: int) -> Steering:
        """The same steering, gone after so many tokens of the reply; full in the prompt (see :class:`Schedule`)."""
        return self._each(lambda term: {"schedule": Schedule("decay", tokens)})

    # ── the arithmetic ──

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers at which anything is done."""
        return tuple(sorted({layer for term in self.terms if not term.idle for layer in term.layers}))

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates that anything depends on, each once."""
        return tuple(dict.fromkeys(term.gate for term in self.terms if term.gate is not None and not term.idle))

    def at_layer(self, layer: int) -> tuple[list[Push], Pin | None]:
        """The arithmetic at one layer: additions first, then what is ablated or held.

        Terms of strength 0 leave no trace, which is what makes strength 0 bit-identical to no steering.
        """
        pushes: dict[Scope, np.ndarray] = {}
        pinned: list[tuple[Scope, np.ndarray, float, float, bool]] = []
        for term in self.terms:
            if term.idle or layer not in term.layers:
                continue
            direction = term.directions[term.row(layer)].astype(np.float32)
            norm = float(term.norms[term.row(layer)])
            if term.mode == "add":
                parts = len(term.layers) if term.divide == "even" else 1
                step = direction * np.float32(term.strength * norm / parts)
                pushes[term.scope] = pushes.get(term.scope, np.zeros_like(direction)) + step
            elif term.mode == "ablate":
                pinned.append((term.scope, direction, 0.0, term.strength, False))
            else:
                sign = -1 if term.mode == "floor" else 1
                pinned.append((term.scope, sign * direction, sign * term.strength * norm, 1.0, term.mode != "clamp"))
        pin = None
        if pinned:
            scopes, basis, target, amount, limit = zip(*pinned, strict=True)
            pin = Pin(scopes, np.stack(basis), np.array(target, "f"), np.array(amount, "f"), np.array(limit, dtype=bool))
        return [Push(scope, vector) for scope, vector in pushes.items()], pin

    # ── as data ──

    def content(self) -> tuple[Any, ...]:
        return tuple(term.content() for term in self.terms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steering) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.content())

    def __str__(self) -> str:
        return " ".join(map(str, self.terms)) or "no steering"

    def to_json(self) -> str:
        """The steering as one line of JSON that needs nothing else: arrays stand beside the terms, by their hash, once each.

        :meth:`from_json` gives back the same bits at every layer, the unused ones too, and the same text again.
        """
        arrays: dict[str, Any] = {}

        def name(array: np.ndarray) -> str:
            data = np.ascontiguousarray(array, dtype="<f4")
            arrays[key := array_hash(data)] = {"shape": data.shape, "float32": base64.b64encode(data.tobytes()).decode()}
            return key

        def plain(value: Any) -> dict[str, Any]:
            """A gate or a term: the fields that are set."""
            given = {f.name: getattr(value, f.name) for f in fields(value)}
            for key, item in given.items():
                if isinstance(item, np.ndarray):
                    given[key] = name(item)
                elif isinstance(item, Gate):
                    given[key] = plain(item)
                elif isinstance(item, Where | Schedule):
                    given[key] = {k: v for k, v in asdict(item).items() if v is not None}
                elif isinstance(item, tuple):
                    given[key] = [int(n) for n in item]
                elif item is not None and _FIELDS[key] is float:
                    given[key] = float(item)
            return {key: item for key, item in given.items() if item is not None}

        terms = [plain(term) for term in self.terms]
        data = {"affectlens": "steering", "format": FORMAT, "terms": terms, "arrays": arrays}
        return json.dumps(data, ensure_ascii=False, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Steering:
        """What :meth:`to_json` wrote.

        Raises:
            FormatError: Not a steering, of another format, or changed on the way.
        """
        try:
            data = json.loads(text)
            if data["affectlens"] != "steering":
                raise ValueError(f"it is a {data['affectlens']}")
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']}, this version reads {FORMAT}")
            arrays = {key: _array(key, value) for key, value in data["arrays"].items()}
            return cls(tuple(_read(Term, term, arrays) for term in data["terms"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, EngineError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise FormatError(f"this is no steering ({reason}): write it again with to_json()") from None


_FIELDS: dict[str, Any] = {
    "name": str, "strength": float, "layers": tuple, "available": tuple, "directions": np.ndarray, "norms": np.ndarray,
    "mode": str, "where": Where, "gate": Gate, "schedule": Schedule, "divide": str, "layer": int, "direction": np.ndarray,
    "centre": np.ndarray, "mean": float, "deviation": float, "above": float, "below": float, "part": str, "role": str,
    "turn": int, "text": str, "after": int, "first": int, "last": int, "kind": str, "tokens": int,
}  # fmt: skip
"""Of what kind each field of a term, a gate, a selector and a schedule is."""


def _read(kind: type, data: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """One object of a kind, with every field checked."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"a {kind.__name__.lower()} has no {unknown[0]!r}")
    values: dict[str, Any] = {}
    for key, value in data.items():
        wanted = _FIELDS[key]
        if wanted is np.ndarray:
            values[key] = arrays[value]
        elif wanted in (Where, Gate, Schedule):
            values[key] = _read(wanted, value, arrays)
        elif wanted is tuple:
            values[key] = tuple(value)
        else:
            values[key] = float(value) if wanted is float and type(value) is int else value
        items = values[key] if wanted is tuple else [values[key]]
        if not all(type(item) is (int if wanted is tuple else wanted) for item in items):
            raise ValueError(f"{key} is {str(value)[:40]!r}")
        if wanted is float and not np.isfinite(values[key]):
            raise ValueError(f"{key} is {value}")
    made = kind(**values)
    if isinstance(made, Term) and not (made.layers and set(made.layers) <= set(made.available)):
        raise ValueError(f"{made.name!r} acts on layers without a direction")
    return made


def _array(key: str, data: Mapping[str, Any]) -> np.ndarray:
    raw = base64.b64decode(data["float32"], validate=True)
    array = np.frombuffer(raw, dtype="<f4").reshape(data["shape"]).astype(np.float32)
    if array_hash(array) != key or not np.isfinite(array).all():
        raise ValueError("the numbers are not those that were written")
    return array


def _refuse_conflict(one: Term, other: Term) -> None:
    """Refuse two terms that hold one direction at two values at the same tokens."""
    at_once = one.where == other.where and (one.gate == other.gate or one.gate is None or other.gate is None)
    if not at_once or one.directions.shape[1] != other.directions.shape[1]:
        return
    for layer in set(one.layers) & set(other.layers) & set(one.available) & set(other.available):
        cosine = float(one.directions[one.row(layer)] @ other.directions[other.row(layer)])
        if cosine < _PARALLEL:
            continue
        values = [(term.mode, 0.0 if term.mode == "ablate" else term.strength) for term in (one, other)]
        # The greatest value that is held from below must not exceed the least that is held from above.
        low = max((value for mode, value in values if mode != "cap"), default=-np.inf)
        high = min((value for mode, value in values if mode != "floor"), default=np.inf)
        partly = any(term.mode == "ablate" and term.strength != 1 for term in (one, other))
        if low > high or (partly and (one.mode, one.strength) != (other.mode, other.strength)):
            raise EngineError(
                f"{one.name!r} cannot be held at two values (layer {layer}: {one}; {other}): give them other tokens or gates"
            )


def _span(layers: Sequence[int]) -> str:
    """``2 to 4`` for layers that follow each other, else all of them."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))
