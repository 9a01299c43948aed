"""The wire: whatever a request or a result may hold comes back to the bit, and nothing else is read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectlens import errors
from affectlens.engine import (
    Gate,
    Layout,
    Logprob,
    ModelInfo,
    Reading,
    Readout,
    Request,
    Result,
    Sampling,
    Schedule,
    Steering,
    Term,
    Where,
)
from affectlens.engines import wire
from affectlens.engines.toy import ToyEngine
from affectlens.engines.wire import Failure, pack, unpack
from affectlens.errors import AffectlensError, EngineError, FormatError

WIDTH = 4
texts = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)  # half characters as well
words = st.text(st.characters(codec=None, exclude_categories=()), min_size=1, max_size=8)
floats = st.floats(allow_nan=True)
whole = st.integers(-(2**53), 2**53)
small = st.integers(0, 50)


def arrays(*shape: int, dtype: str = "float32") -> st.SearchStrategy[np.ndarray]:
    """Arrays of any bits, laid out in any way: as they are, backwards, or a part of something larger."""
    n = int(np.prod(shape))

    def made(drawn: tuple[bytes, int]) -> np.ndarray:
        array = np.frombuffer(drawn[0], dtype=dtype).reshape(shape)
        if drawn[1] == 1:
            return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
        return np.asfortranarray(array) if drawn[1] == 2 else array.copy()

    size = n * np.dtype(dtype).itemsize
    return st.tuples(st.binary(min_size=size, max_size=size), st.integers(0, 2)).map(made)


def units(*shape: int) -> st.SearchStrategy[np.ndarray]:
    """Finite directions."""
    return st.integers(0, 2**31).map(lambda seed: np.random.default_rng(seed).normal(size=shape).astype(np.float32))


wheres = st.builds(
    Where,
    part=st.sampled_from(["all", "prompt", "response"]),
    role=st.none() | texts,
    turn=st.none() | st.integers(-3, 3),
    text=st.none() | words,
    after=small,
    first=st.none() | st.integers(1, 9),
    last=st.none() | st.integers(1, 9),
)
finite = st.floats(-100, 100)
gates = st.builds(
    Gate, name=texts, layer=st.integers(0, 1), direction=units(WIDTH), centre=st.none() | units(WIDTH), mean=finite,
    deviation=st.floats(0.1, 9), above=st.floats(-1, 0), below=st.none() | st.floats(0.5, 9),
)  # fmt: skip
strengths = st.one_of(st.integers(-3, 3), finite, st.floats(-3, 3, width=32).map(np.float32), finite.map(np.float64))
terms = st.builds(
    Term, name=texts, strength=strengths, layers=st.sampled_from([(1,), (1, 2), (np.int64(2),)]), available=st.just((1, 2)),
    directions=units(2, WIDTH), norms=units(2), mode=st.just("add"), where=wheres, gate=st.none() | gates,
    schedule=st.none() | st.builds(Schedule, st.sampled_from(["ramp", "decay"]), st.integers(1, 99)),
    divide=st.sampled_from(["even", "each"]),
)  # fmt: skip
readouts = st.one_of(
    st.builds(
        Readout,
        layers=st.just((0, 2)),
        where=wheres,
        pool=st.sampled_from(["none", "mean", "last"]),
        onto=st.one_of(st.none(), arrays(2, 3, WIDTH), arrays(2, 1, WIDTH, dtype="float64"), arrays(2, 0, WIDTH)),
    ),
    st.builds(Readout, layers=st.just((-1,)), pool=st.just("norm")),
)
samplings = st.builds(
    Sampling, max_tokens=st.integers(1, 99), temperature=st.integers(0, 2) | st.floats(0, 2), top_p=st.floats(0.01, 1),
    top_k=small, seed=st.integers(0, 2**63), stop=st.lists(words, max_size=2).map(tuple), logprobs=st.none() | small,
)  # fmt: skip
turns = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)
requests = st.builds(
    Request, prompt=texts | turns, prefill=texts, sampling=st.none() | samplings,
    steering=st.lists(terms, max_size=2).map(lambda some: Steering(tuple(some))),
    readouts=st.lists(readouts, max_size=2).map(tuple), choices=st.lists(texts, max_size=2).map(tuple), stream=st.booleans(),
    transcript=st.booleans(),
)  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pieces = draw(st.lists(texts, max_size=6))
    own = draw(st.booleans())  # tokens that are not what the offsets cut out of the text
    ends = np.cumsum([0, *map(len, pieces)]).tolist()
    n = len(pieces)
    return Layout(
        "".join(pieces),
        tuple(f"<{piece}>" for piece in pieces) if own else tuple(pieces),
        tuple(draw(st.lists(st.integers(0, 2**40), min_size=n, max_size=n))),
        tuple(itertools.pairwise(ends)),
        tuple(draw(st.lists(st.sampled_from(["user", "assistant", "template", "special"]), min_size=n, max_size=n))),
        draw(small),
        tuple(draw(st.lists(st.tuples(texts, small, small), max_size=2))),
    )


readings = st.builds(
    Reading, values=arrays(2, 3) | arrays(2, 0, 3) | arrays(2), norms=arrays(2) | arrays(2, 0), positions=arrays(3, dtype="int64")
)
likely = st.builds(Logprob, token=small, value=floats, top=st.lists(st.tuples(small, floats), max_size=2).map(tuple))
results = st.builds(
    Result, text=texts, layout=layouts(), readings=st.lists(readings, max_size=2).map(tuple),
    choice_logprobs=st.lists(floats, max_size=2).map(tuple), finish=st.sampled_from(["stop", "length", "read"]),
    done=st.booleans(), logprobs=st.lists(likely, max_size=2).map(tuple),
)  # fmt: skip
infos = st.builds(
    ModelInfo, id=texts, family=texts, n_layers=small, width=small, context=whole, dtype=texts, device=texts, fingerprint=texts,
    revision=st.none() | texts, template=st.none() | texts, n_parameters=whole, reply_token=st.none() | texts,
    checks=st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
)  # fmt: skip


def same(a: Any, b: Any) -> None:
    """Of the same types to the bit, field by field; numbers of numpy as wide as Python's may have become Python's."""
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.ascontiguousarray(a).tobytes() == b.tobytes()
    elif is_dataclass(a):
        assert type(a) is type(b)
        for each in fields(a):
            same(getattr(a, each.name), getattr(b, each.name))
    elif isinstance(a, tuple):
        assert isinstance(b, tuple) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.float32):
        assert type(b) is np.float32 and a.tobytes() == b.tobytes()
    else:
        a = a.item() if isinstance(a, np.generic) else a
        assert type(a) is type(b) and repr(a) == repr(b)  # 0.0 and -0.0 are equal, and not the same


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=3).map(tuple))
def test_requests_come_back(asked: tuple[Request, ...]) -> None:
    apart: dict[str, np.ndarray] = {}
    for back in (
        unpack(pack(asked), tuple[Request, ...]),
        unpack(pack(asked, apart=apart), tuple[Request, ...], apart=apart),
    ):
        same(asked, back)
        assert [request.key() for request in back] == [request.key() for request in asked]


@settings(max_examples=60, deadline=None)
@given(st.lists(results, max_size=3).map(tuple), st.none() | st.builds(Failure, texts, texts))
def test_results_come_back(found: tuple[Result, ...], failure: Failure | None) -> None:
    back = unpack(pack((found, failure)), tuple[tuple[Result, ...], Failure | None])
    same((found, failure), back)


@settings(max_examples=20, deadline=None)
@given(infos)
def test_what_is_known_of_a_model_comes_back(info: ModelInfo) -> None:
    same(info, unpack(pack(info), ModelInfo))


def test_every_field_of_a_request_and_a_result_is_tried() -> None:
    """A field that is added is drawn here, or this fails; what can stand in it is in the type hints alone."""
    drawn = {
        Request: 8, Sampling: 7, Readout: 4, Where: 7, Term: 11, Gate: 8, Schedule: 2, Steering: 1,
        Result: 7, Layout: 7, Reading: 3, Logprob: 3, ModelInfo: 13,
    }  # fmt: skip
    assert {kind: len(fields(kind)) for kind in drawn} == drawn


def test_what_is_one_object_comes_back_as_one() -> None:
    """Engines batch by the object, so two equal readouts must stay two, and one must stay one."""
    onto = np.ones((1, 2, WIDTH), np.float32)
    one, other = Readout((0,), onto=onto), Readout((0,), onto=onto)
    back = unpack(pack(tuple(Request("a", readouts=(r,)) for r in (one, other, one))), tuple[Request, ...])
    first, second, third = (request.readouts[0] for request in back)
    assert first is third and first is not second and first.onto is second.onto


def test_large_arrays_are_kept_apart_once() -> None:
    onto = np.random.default_rng(0).normal(size=(1, 64, 512)).astype(np.float32)
    asked = tuple(Request(f"text {i}", readouts=(Readout((0,), onto=onto.copy()),)) for i in range(50))
    apart: dict[str, np.ndarray] = {}
    data = pack(asked, apart=apart)
    assert len(apart) == 1 and len(data) < 20_000 < onto.nbytes
    same(asked, unpack(data, tuple[Request, ...], apart=apart))
    with pytest.raises(FormatError, match="kept apart is not here"):
        unpack(data, tuple[Request, ...])
    assert len({wire.array_key(a) for a in (onto, onto.T, onto.astype(np.float64), onto[..., :-1])}) == 4
    assert wire.array_key(onto) == wire.array_key(np.asfortranarray(onto))


def test_an_array_that_is_kept_keeps_no_other() -> None:
    some = unpack(pack(tuple(np.ones(1000, np.float32) for _ in range(3))), tuple[np.ndarray, ...])
    assert all(each.base is None or each.base.nbytes <= 4000 for each in some) and some[0].flags.writeable


def test_results_of_the_toy_are_small() -> None:
    """What leaves a worker is what was asked for, and some thirty bytes a token."""
    (result,) = ToyEngine().run([Request("the calm sea " * 100, readouts=(Readout((4,)),))])
    assert len(pack((result,))) < 64 * 4 + 40 * len(result.layout) + 1500


# ── errors ──


@pytest.mark.parametrize(
    "name", [c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, AffectlensError)]
)
def test_errors_come_out_as_they_went_in(name: str) -> None:
    kind = getattr(errors, name)
    arguments = {
        "RuleError": ("no signal", "a > b", 0, 1), "MissingExtra": ("ray", "ray"), "UnknownName": ("concept", "clam", ["calm"]),
        "Busy": ("full: come later", 2.0),
    }.get(name, ("it is wrong: mend it",))  # fmt: skip
    error = kind(*arguments)
    back = unpack(pack(Failure.of(error)), Failure).error
    assert type(back) is kind and str(back) == str(error)


def test_an_error_of_no_known_class_is_an_engine_error() -> None:
    for kind in ("NoSuchError", "nearest", "difflib", "__name__", "Iterable"):
        error = Failure(kind, "what: do").error
        assert type(error) is EngineError and str(error) == "what: do"


# ── what is refused ──


def test_what_is_no_data_cannot_be_sent() -> None:
    for odd in (object(), {1, 2}, b"bytes", Request, lambda: 0, np.array([object()]), np.array(["text"])):
        with pytest.raises(EngineError, match="cannot be sent"):
            pack((odd,))


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def made(head: Any, body: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + body


GOOD = pack((Request("a", readouts=(Readout((0,), onto=np.ones((1, 2, 3), np.float32)),)),))


def changed(**changes: Any) -> bytes:
    head, body = parts_of(GOOD)
    return made({**head, **changes}, body)


def with_object(number: int, **changes: Any) -> bytes:
    head, body = parts_of(GOOD)
    head["objects"][number] = {**head["objects"][number], **changes}
    return made(head, body)


HOSTILE = {
    "nothing": b"",
    "too short": GOOD[:5],
    "cut in the head": GOOD[:40],
    "cut in the arrays": GOOD[:-3],
    "longer": GOOD + b"x",
    "endless length": b"\xff" * 8 + GOOD[8:],
    "no JSON": made(b"{nonsense"),
    "not UTF-8": made(b'"\xff"'),
    "no object": made([1, 2]),
    "a pickle": made(b"\x80\x04\x95"),
    "other head": made({"affectlens": "wire"}),
    "another format": changed(format=2),
    "another thing": changed(affectlens="steering"),
    "objects that are none": changed(objects={}),
    "arrays that are none": changed(arrays={}),
    "array without shape": changed(arrays=[["float32", None]]),
    "array of objects": changed(arrays=[["object", [1]]]),
    "larger array": changed(arrays=[["float32", [1, 2, 4]]]),
    "smaller array": changed(arrays=[["float32", [1, 2, 2]]]),
    "shape below nothing": changed(arrays=[["float32", [-1, 6]]]),
    "endless shape": changed(arrays=[["float32", [1, 2, 3]], ["float32", [0, 10**30]]]),
    "truth as a length": changed(arrays=[["float32", [True, 2, 3]]]),
    "a number": changed(value=3),
    "a text": changed(value="Request"),
    "an object that is not there": changed(value=[{"@": 99}]),
    "an object below": changed(value=[{"@": -1}]),
    "an object by truth": changed(value=[{"@": True}]),
    "an object and more": changed(value=[{"@": 1, "more": 1}]),
    "an object of another class": changed(value=[{"@": 0}]),
    "an object not used": changed(value=[]),
    "unknown field": with_object(-1, evil=1),
    "text for a truth": with_object(-1, stream="yes"),
    "number for a text": with_object(-1, prefill=5),
    "text for a list": with_object(-1, choices="ab"),
    "list of numbers": with_object(-1, choices=[1]),
    "broken chat": with_object(-1, prompt=[["user"]]),
    "itself inside": with_object(-1, steering={"@": 1}),
    "fraction for a layer": with_object(0, layers=[0.5]),
    "truth for a layer": with_object(0, layers=[True]),
    "another pool": with_object(0, pool="max"),
    "no layers": with_object(0, layers=[]),
    "an array that is not there": with_object(0, onto={"#": 7}),
    "an array by an unknown hash": with_object(0, onto={"#": "0" * 32}),
    "nested without end": made(b"[" * 100_000 + b"]" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused_in_one_line(what: str) -> None:
    with pytest.raises(AffectlensError) as error:
        unpack(HOSTILE[what], tuple[Request, ...])
    assert len(str(error.value).splitlines()) == 1


def test_hostile_columns_are_refused() -> None:
    layout = Layout("ab", ("a", "b"), (1, 2), ((0, 1), (1, 2)), ("user", "user"), 2)
    head, body = parts_of(pack(layout))
    for changes in (
        {"roles": [["user", 10**15]]}, {"roles": [["user", -1], ["user", 3]]}, {"roles": []}, {"tokens": ["a"]},
        {"ids": {"#": 1}, "offsets": {"#": 0}}, {"ids": {"#": 1}}, {"n_prompt": "2"}, {"text": None},
    ):  # fmt: skip
        with pytest.raises(FormatError):
            unpack(made({**head, "objects": [{**head["objects"][0], **changes}]}, body), Layout)


def test_a_number_is_no_array_of_them() -> None:
    """Narrow floats travel as arrays without axes; nothing else may stand where a number should."""
    from safetensors.numpy import save

    head, body = parts_of(pack(Sampling(temperature=np.float32(0.5))))  # type: ignore[arg-type]
    assert unpack(made(head, body), Sampling).temperature == np.float32(0.5)
    for dtype, shape, other in (
        ("float32", [1], body),
        ("int32", [], save({"int32": np.ones(1, np.int32)})),
        ("bool", [], save({"bool": np.ones(1, bool)})),
    ):
        with pytest.raises(FormatError, match="is no float"):
            unpack(made({**head, "arrays": [[dtype, shape]]}, other), Sampling)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever bytes are changed: an error that the user can fix, or a request."""
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    try:
        (request,) = unpack(bytes(damaged), tuple[Request, ...])
        assert isinstance(request, Request)
    except AffectlensError as error:
        assert len(str(error).splitlines()) == 1


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, float("inf"), float("nan"), "", "x", "\ud800", 10**6, [], {}, [1], [[]], {"x": 1},
    {"@": 0}, {"@": 1}, {"#": 0}, {"#": 1},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON data below its top."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_the_head_is_refused_or_harmless(data: st.DataObject) -> None:
    """Well-formed JSON with anything in any place: an error in one line, or what was asked for."""
    layout = Layout("ab", ("<a>", "b"), (1, 2), ((0, 1), (1, 2)), ("user", "user"), 2)
    answer = Result(
        "b", layout, (Reading(np.ones((1, 4), np.float32), np.ones(1, np.float32), np.arange(1)),), logprobs=(Logprob(1, 0.5),)
    )
    half: Any = np.float32(0.5)
    readout = Readout((0,), onto=np.ones((1, 2, 3), np.float32))
    asked = Request("a", readouts=(readout,), sampling=Sampling(temperature=half))
    value, kind = data.draw(st.sampled_from([((asked,), tuple[Request, ...]), ((answer,), tuple[Result, ...])]))
    head, body = parts_of(pack(value))
    *above, last = data.draw(st.sampled_from(list(places(head))))
    inside = head
    for key in above:
        inside = inside[key]
    inside[last] = data.draw(st.sampled_from(ODD))
    try:
        (back,) = unpack(made(head, body), kind)
        assert type(back) is type(value[0])
    except AffectlensError as error:
        assert len(str(error).splitlines()) <= 1


def test_replaced_requests_stay_what_they_are() -> None:
    """The default steering is one object for all: requests without any need not carry it."""
    asked = replace(Request("a"), sampling=Sampling(temperature=0))
    assert b"steering" not in pack(asked) and unpack(pack(asked), Request) == asked
