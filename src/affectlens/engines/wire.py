"""Requests and results as bytes, for engines in other processes: data only, in one format, checked when it is read.

    8 bytes        length of the JSON, little-endian
    JSON           {"affectlens": "wire", "format": 1, "value": …, "objects": […], "arrays": [[dtype, shape], …]}
    safetensors    for each dtype one flat tensor: its arrays, one behind the other

Each object and each array is written once, however often it occurs, and comes back as one: engines batch what is the same object,
and how something is batched decides how it is rounded. Large arrays that many requests share can be taken out and kept elsewhere
by their hash (``apart``).

What is read is built from the type hints of what is asked for (``unpack(data, Request)``). No name in the bytes chooses a class,
every value must be of its field's type, and everything in the bytes must be used: nothing that is read can run anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from affectlens import errors
from affectlens.errors import AffectlensError, EngineError, FormatError
from affectlens.layout import Layout, Turn

FORMAT = 1
LARGE = 2**16
"""Bytes from which on an array is worth being kept apart."""

DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Failure:
    """An error that the user can fix, on its way to another process: the name of its class and what it says."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: AffectlensError) -> Failure:
        return cls(type(error).__name__, str(error))

    @property
    def error(self) -> AffectlensError:
        """The error again; one of a class that is not known here is an EngineError."""
        known = getattr(errors, self.kind, None)
        if not (isinstance(known, type) and issubclass(known, AffectlensError)):
            known = EngineError
        # Its own __init__ would make another message of this one.
        return known.__new__(known, self.message)


@dataclass(frozen=True)
class _Columns:
    """A layout by columns: rows of small numbers would take longer to write and read than some models to run."""

    text: str
    tokens: tuple[str, ...] | None
    ids: np.ndarray
    offsets: np.ndarray
    roles: tuple[tuple[str, int], ...]
    n_prompt: int
    turns: tuple[Turn, ...]

    @classmethod
    def of(cls, layout: Layout) -> _Columns:
        own = layout.tokens != tuple(layout.text[a:b] for a, b in layout.offsets)
        return cls(
            layout.text,
            layout.tokens if own else None,
            np.array(layout.ids, dtype=np.int64),
            np.array(layout.offsets, dtype=np.int64).reshape(-1, 2),
            tuple((role, len(list(same))) for role, same in itertools.groupby(layout.roles)),
            layout.n_prompt,
            layout.turns,
        )

    @property
    def layout(self) -> Layout:
        n = len(self.ids) if self.ids.ndim == 1 else -1
        lengths = {n, sum(many for _, many in self.roles), n if self.tokens is None else len(self.tokens)}
        if {str(self.ids.dtype), str(self.offsets.dtype)} != {"int64"} or self.offsets.shape != (n, 2):
            raise ValueError("a layout has no numbers of tokens")
        if lengths != {n} or any(many < 1 for _, many in self.roles):
            raise ValueError("a layout has columns of different lengths")
        offsets = tuple((a, b) for a, b in self.offsets.tolist())
        roles = tuple(itertools.chain.from_iterable(itertools.repeat(role, many) for role, many in self.roles))
        tokens = tuple(self.text[a:b] for a, b in offsets) if self.tokens is None else self.tokens
        return Layout(self.text, tokens, tuple(self.ids.tolist()), offsets, roles, self.n_prompt, self.turns)


class _Wrong(Exception):
    """What is written is not what is asked for."""


# ── writing ──


def pack(value: Any, *, apart: dict[str, np.ndarray] | None = None) -> bytes:
    """Write a value: requests, results, arrays, dataclasses of them, tuples of these, or plain JSON data.

    Args:
        value: What to write.
        apart: Where to put large arrays, by their hash, instead of into the bytes; None writes everything.

    Raises:
        EngineError: Something in it is no such data.

    Example:
        >>> from affectlens.engine import Request
        >>> unpack(pack(Request("the calm sea")), Request)
        Request(prompt='the calm sea', ...)
    """
    from safetensors.numpy import save

    writer = _Writer(apart)
    plain = {"affectlens": "wire", "format": FORMAT, "value": writer.plain(value), "objects": writer.objects}
    head = json.dumps({**plain, "arrays": [[str(a.dtype), a.shape] for a in writer.arrays]}, separators=(",", ":")).encode()
    flat: dict[str, list[np.ndarray]] = {}
    for array in writer.arrays:
        flat.setdefault(str(array.dtype), []).append(array.ravel())
    body = save({dtype: np.concatenate(arrays) for dtype, arrays in flat.items()}) if flat else b""
    return len(head).to_bytes(8, "little") + head + body


class _Writer:
    def __init__(self, apart: dict[str, np.ndarray] | None) -> None:
        self.objects: list[Any] = []
        self.arrays: list[np.ndarray] = []
        self._apart = apart
        self._known: dict[int, dict[str, Any]] = {}
        self._kept: list[Any] = []  # what is known by its id must live as long as that is used

    def plain(self, value: Any) -> Any:
        """The value as JSON data; objects and arrays stand in their lists."""
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, tuple | list):
            return [self.plain(item) for item in value]
        if isinstance(value, np.generic):
            # Numbers of 64 bits are Python's own. What is done with narrower floats is rounded to them: they stay what they are.
            return self.plain(np.array(value)) if value.dtype in (np.float16, np.float32) else value.item()
        if isinstance(value, dict):
            return {str(key): self.plain(item) for key, item in value.items()}
        if not (isinstance(value, np.ndarray) or (dataclasses.is_dataclass(value) and not isinstance(value, type))):
            raise EngineError(f"a {type(value).__name__} cannot be sent to another process: use text, numbers and arrays")
        if id(value) not in self._known:
            self._known[id(value)] = self._array(value) if isinstance(value, np.ndarray) else self._object(value)
            self._kept.append(value)
        return self._known[id(value)]

    def _object(self, value: Any) -> dict[str, Any]:
        given: Any = _Columns.of(value) if isinstance(value, Layout) else value
        kind: Any = type(given)
        unset = _defaults(kind)
        fields = {name: item for name in _hints(kind) if not _same(item := getattr(given, name), unset.get(name, ...))}
        self.objects.append({name: self.plain(item) for name, item in fields.items()})
        return {"@": len(self.objects) - 1}

    def _array(self, value: np.ndarray) -> dict[str, Any]:
        if str(value.dtype) not in DTYPES:
            raise EngineError(f"an array of {value.dtype} cannot be sent to another process: use numbers")
        array = np.asarray(value, order="C")
        if self._apart is not None and array.nbytes >= LARGE:
            key = array_key(array)
            self._apart[key] = array
            return {"#": key}
        self.arrays.append(array)
        return {"#": len(self.arrays) - 1}


def array_key(array: np.ndarray) -> str:
    """Content hash of an array with its dtype and shape."""
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _same(value: Any, default: Any) -> bool:
    """Whether a field need not be written: 1, 1.0 and True are not the same, nor are 0.0 and -0.0."""
    return value is default or (
        isinstance(value, str | int | float | tuple)
        and type(value) is type(default)
        and value == default
        and repr(value) == repr(default)
    )


# ── reading ──


def unpack(data: bytes, kind: Any, *, apart: Mapping[str, np.ndarray] | None = None) -> Any:
    """Read what :func:`pack` wrote.

    Args:
        data: The bytes.
        kind: What it must be, as a type hint: ``Request``, ``tuple[Request, ...]``, ``np.ndarray``, ``Any`` for plain JSON data.
        apart: The arrays that were kept apart, by their hash.

    Raises:
        FormatError: The bytes are broken, of another version, or something else.
        AffectlensError: They describe something that cannot be (a readout without layers, say).
    """
    try:
        return _Reader(bytes(data), apart or {}).read(kind)
    except _Wrong as wrong:
        reason = str(wrong)
    except RecursionError:
        reason = "it is nested too deeply"
    raise FormatError(f"what came from another process is broken ({reason}): install the same affectlens everywhere")


class _Reader:
    def __init__(self, data: bytes, apart: Mapping[str, np.ndarray]) -> None:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 + length:
            raise _Wrong("it ends too early")
        try:
            head = json.loads(data[8 : 8 + length])
        except ValueError:
            raise _Wrong("its head is no JSON") from None
        if not isinstance(head, dict) or set(head) != {"affectlens", "format", "value", "objects", "arrays"}:
            raise _Wrong("its head is of another kind")
        if (head["affectlens"], head["format"]) != ("wire", FORMAT):
            raise _Wrong(f"it is of format {head['format']!r}, not {FORMAT}")
        if not isinstance(head["objects"], list):
            raise _Wrong("its objects are no list")
        self._value, self._objects, self._apart = head["value"], head["objects"], apart
        self._arrays = list(_arrays(head["arrays"], data[8 + length :]))
        self._built: dict[int, tuple[Any, Any]] = {}
        self._used: set[int] = set()

    def read(self, kind: Any) -> Any:
        value = self._build(self._value, kind, len(self._objects))
        if len(self._built) != len(self._objects) or len(self._used) != len(self._arrays):
            raise _Wrong("not all of it is used")
        return value

    def _build(self, plain: Any, kind: Any, below: int) -> Any:
        """The value of a type hint; the objects in it have numbers ``below`` that of the object that they are in."""
        if kind is Any:
            return plain
        if kind is NoneType and plain is None:
            return None
        if kind in (str, bool, int, float):
            if kind is float and isinstance(plain, dict):
                number = self._array(plain)[()]  # rounded to fewer bits than Python's own
                if isinstance(number, np.float16 | np.float32):
                    return number
            # A whole number where a float may stand is left as it is: it was one.
            elif isinstance(plain, (int, float) if kind is float else kind) and (kind is bool) == isinstance(plain, bool):
                return plain
        elif kind is np.ndarray:
            return self._array(plain)
        elif dataclasses.is_dataclass(kind):
            return self._object(plain, kind, below)
        elif (origin := get_origin(kind)) is Literal:
            if isinstance(plain, str) and plain in get_args(kind):
                return plain
        elif origin is tuple and isinstance(plain, list):
            kinds = get_args(kind)
            each = [kinds[0]] * len(plain) if kinds[1:] == (...,) else kinds
            if len(each) == len(plain):
                return tuple(self._build(item, inner, below) for item, inner in zip(plain, each, strict=True))
        elif origin in (Union, UnionType):
            for inner in get_args(kind):
                try:
                    return self._build(plain, inner, below)
                except _Wrong as wrong:
                    # What is marked as an object or an array is meant as one: what is wrong with it is what is to be told.
                    if isinstance(plain, dict) and (inner is np.ndarray or dataclasses.is_dataclass(inner)):
                        raise wrong from None
        raise _Wrong(f"{str(plain)[:40]!r} is no {getattr(kind, '__name__', kind)}")

    def _object(self, plain: Any, kind: Any, below: int) -> Any:
        number = _number(plain, "@", below)
        if number not in self._built:
            what = _Columns if kind is Layout else kind
            fields, hints, defaults = self._objects[number], _hints(what), _defaults(what)
            if not isinstance(fields, dict) or not fields.keys() <= hints.keys() <= fields.keys() | defaults.keys():
                raise _Wrong(f"a {kind.__name__} has other fields")
            given = {name: self._build(item, hints[name], number) for name, item in fields.items()}
            try:
                built = what(**given)
                self._built[number] = kind, built.layout if isinstance(built, _Columns) else built
            except (TypeError, ValueError, IndexError, AttributeError) as error:  # of values that no caller has
                raise _Wrong(f"no {kind.__name__} can have these fields: {error}") from None
        made, value = self._built[number]
        if made is not kind:
            raise _Wrong(f"a {made.__name__} stands where a {kind.__name__} should")
        return value

    def _array(self, plain: Any) -> np.ndarray:
        if isinstance(plain, dict) and isinstance(key := plain.get("#"), str) and len(plain) == 1:
            if key not in self._apart:
                raise _Wrong("an array that was kept apart is not here")
            return self._apart[key]
        number = _number(plain, "#", len(self._arrays))
        self._used.add(number)
        return self._arrays[number]


def _number(plain: Any, mark: str, below: int) -> int:
    """The number of an object or an array that stands before ``below``."""
    if isinstance(plain, dict) and len(plain) == 1 and type(number := plain.get(mark)) is int and 0 <= number < below:
        return number
    raise _Wrong(f"{str(plain)[:40]!r} is no {'array' if mark == '#' else 'object'} that there is")


def _arrays(described: Any, body: bytes) -> Iterator[np.ndarray]:
    """The arrays, each with memory of its own: one that is kept must not keep all the others."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not isinstance(described, list):
        raise _Wrong("its arrays are no list")
    try:
        flat = load(body) if body else {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _Wrong(f"its arrays: {error}") from None
    at = dict.fromkeys(flat, 0)
    for each in described:
        if not isinstance(each, list) or len(each) != 2 or each[0] not in DTYPES or each[0] not in flat:
            raise _Wrong("an array is not described")
        dtype, shape = each
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise _Wrong("an array has no shape")
        size = 1
        for n in shape:
            size *= n
        start = at[dtype]
        if start + size > flat[dtype].size or str(flat[dtype].dtype) != dtype:
            raise _Wrong("an array ends too early")
        at[dtype] = start + size
        try:
            yield flat[dtype].reshape(-1)[start : start + size].reshape(shape).copy()
        except (ValueError, OverflowError):  # no entries, but more of them along one side than there can be
            raise _Wrong("an array has a shape that none can have") from None
    if any(at[dtype] != whole.size for dtype, whole in flat.items()):
        raise _Wrong("not all of its arrays are described")


@lru_cache(maxsize=64)
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@lru_cache(maxsize=64)
def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
