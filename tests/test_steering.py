"""Steering as data: arithmetic, what is refused, how it prints, how it travels; and the selectors and solvers on their own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from affectlens.engine import Gate, Layout, Readout, Request, Sampling, Schedule, Steering, Term, Where
from affectlens.engines.changes import settle
from affectlens.errors import AffectlensError, EngineError, FormatError, MismatchError
from affectlens.scope import Scope
from affectlens.steering import Pin

WIDTH, LAYERS = 16, (0, 1, 2, 4)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=(*shape, WIDTH))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def term(name: str = "calm", seed: int = 0, strength: float = 1.0, layer: int = 2) -> Steering:
    rng = np.random.default_rng(seed)
    norms = rng.uniform(1, 9, len(LAYERS)).astype(np.float32)
    return Steering((Term(name, strength, (layer,), LAYERS, unit(rng, len(LAYERS)), norms),))


def gate(seed: int = 1, layer: int = 1, **limits: Any) -> Gate:
    rng = np.random.default_rng(seed)
    return Gate("desperate", layer, unit(rng), unit(rng), 0.01, 0.03, **(limits or {"above": 2.0}))


def one_line(error: pytest.ExceptionInfo[AffectlensError]) -> None:
    assert len(str(error.value).splitlines()) == 1


def anything(rng: np.random.Generator) -> Steering:
    """A steering drawn from everything there is."""
    total = Steering()
    for k in range(rng.integers(1, 5)):
        made = float(rng.choice([-0.5, 1e-9, 0.1, 1 / 3])) * term("éxcité 'x'" if k == 1 else f"d{k}", int(rng.integers(99)))
        layers = sorted(rng.choice(LAYERS, rng.integers(1, 4), replace=False))
        made = made.on(*layers, divide=str(rng.choice(["even", "each"])))  # type: ignore[arg-type]
        mode = rng.choice(["add", "ablate", "clamp", "cap", "floor"])
        made = made.ablate() if mode == "ablate" else made if mode == "add" else getattr(made, mode)(rng.normal())
        made = made.at(
            [Where(), Where("response", after=2, first=9), Where(role="user", turn=-1), Where(text='the "A" option', last=3)][
                rng.integers(4)
            ]
        )
        if rng.random() < 0.5:
            made = made.when(
                gate(int(rng.integers(99)), 0, **[{"above": 2.0}, {"below": -1 / 3}, {"above": -1.0, "below": 1}][k % 3])
            )
        if rng.random() < 0.5:
            made = made.ramp(3) if rng.random() < 0.5 else made.decay(7)
        total = total + made
    return total


# ── as data ──


@pytest.mark.parametrize("seed", range(40))
def test_json_gives_back_the_same_bits(seed: int) -> None:
    steering = anything(np.random.default_rng(seed))
    text = steering.to_json()
    again = Steering.from_json(text)
    assert again == steering and hash(again) == hash(steering) and str(again) == str(steering) and again.to_json() == text
    assert Request("A", steering=again).key() == Request("A", steering=steering).key()
    for one, other in zip(steering.terms, again.terms, strict=True):
        np.testing.assert_array_equal(one.directions, other.directions)
        np.testing.assert_array_equal(one.norms, other.norms)
        assert other.directions.dtype == np.float32
        for layer in LAYERS:  # layers that it does not act on are there as well
            assert Steering((other,)).on(layer) == Steering((one,)).on(layer)
        for a, b in itertools.zip_longest(*((t.gate and (t.gate.direction, t.gate.centre)) or () for t in (one, other))):
            np.testing.assert_array_equal(a, b)
    assert "\n" not in text and str(steering) in str(steering).splitlines()


def test_arrays_stand_in_the_json_once() -> None:
    calm = term()
    alone, mix = json.loads(calm.to_json()), json.loads((calm + calm.on(1).ablate() + calm.on(0, 1).cap(0.2)).to_json())
    assert alone["arrays"] == mix["arrays"] and len(mix["arrays"]) == 2 and len(mix["terms"]) == 3


def test_numbers_that_come_out_of_arrays_are_numbers() -> None:
    calm = term()
    odd = (np.float32(0.5) * calm).on(*np.array([0, 1])).clamp(np.float64(0.25))  # type: ignore[arg-type]
    assert Steering.from_json(odd.to_json()) == odd == calm.on(0, 1).clamp(0.25)
    assert Request("A", steering=odd).key() == Request("A", steering=calm.on(0, 1).clamp(0.25)).key()


def changed(change: Callable[[Any], Any]) -> str:
    data = json.loads((0.1 * term()).at(Where(turn=1)).when(gate()).ramp(3).to_json())
    result = change(data)
    return json.dumps(data if result is None else result)


def set_in_term(**fields: Any) -> Callable[[Any], None]:
    return lambda data: data["terms"][0].update(fields)


def damage(data: Any) -> None:
    entry = next(iter(data["arrays"].values()))
    entry["float32"] = ("B" if entry["float32"][0] == "A" else "A") + entry["float32"][1:]


HOSTILE: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "no json": lambda: "{'a': 1}",
    "a list": lambda: "[]",
    "a number": lambda: "3",
    "too deep": lambda: "[" * 100_000,
    "another thing": lambda: changed(lambda d: d.update(affectlens="vectors")),
    "another format": lambda: changed(lambda d: d.update(format=2)),
    "no terms": lambda: changed(lambda d: {k: v for k, v in d.items() if k != "terms"}),
    "terms that are none": lambda: changed(lambda d: d.update(terms=[1])),
    "a damaged array": lambda: changed(damage),
    "an array that is not there": lambda: changed(lambda d: d.update(arrays={})),
    "an array that is no array": lambda: changed(lambda d: d["arrays"].update({k: [] for k in d["arrays"]})),
    "no base64": lambda: changed(lambda d: [e.update(float32="???") for e in d["arrays"].values()] and None),
    "an unknown field": lambda: changed(set_in_term(colour="red")),
    "an unknown mode": lambda: changed(set_in_term(mode="boost")),
    "an unknown rule": lambda: changed(set_in_term(divide="odd")),
    "a strength in words": lambda: changed(set_in_term(strength="much")),
    "a true strength": lambda: changed(set_in_term(strength=True)),
    "an endless strength": lambda: changed(set_in_term(strength=float("inf"))),
    "a huge strength": lambda: changed(lambda d: d).replace('"strength": 0.1', f'"strength": 1{"0" * 400}'),
    "layers without directions": lambda: changed(set_in_term(layers=[3])),
    "no layers": lambda: changed(set_in_term(layers=[])),
    "half layers": lambda: changed(set_in_term(layers=[0.5])),
    "too many layers": lambda: changed(set_in_term(available=[0, 1, 2, 4, 5])),
    "a name that is no name": lambda: changed(set_in_term(name=3)),
    "a gate above": lambda: changed(lambda d: d["terms"][0]["gate"].update(layer=4)),
    "a gate without a limit": lambda: changed(lambda d: d["terms"][0]["gate"].pop("above") and None),
    "a schedule over nothing": lambda: changed(lambda d: d["terms"][0]["schedule"].update(tokens=0)),
    "a part that is none": lambda: changed(lambda d: d["terms"][0]["where"].update(part="middle")),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_steering_is_refused_in_one_line(what: str) -> None:
    assert Steering.from_json(changed(lambda d: None)).terms
    with pytest.raises(FormatError, match="this is no steering") as error:
        Steering.from_json(HOSTILE[what]())
    one_line(error)
    assert len(str(error.value)) < 250


def test_it_says_what_it_does() -> None:
    calm, sad = term("calm"), term("sad", 1)
    assert str(Steering()) == "no steering"
    assert str(0.1 * calm.on(0, 1, 2)) == "+0.1 calm @ layers 0 to 2"
    assert str(calm.on(0, 2, 4, divide="each")) == "+1 calm @ layers 0, 2, 4 each"
    assert str(calm.cap(0.2) - 0.5 * sad.ablate()) == "+0.2 cap calm @ layer 2 -0.5 ablate sad @ layer 2"
    where = Where("response", after=5, first=20)
    text = str((0.1 * calm).at(where).when(gate()).decay(50))
    assert text == "+0.1 calm @ layer 2 (response, after 5, first 20; while desperate z > 2 @ layer 1; decay over 50)"
    plain = replace(gate(), mean=0.0, deviation=1.0, above=0.1, below=0.5)
    assert str(calm.floor(-1).when(plain)) == "-1 floor calm @ layer 2 (while desperate > 0.1 < 0.5 @ layer 1)"
    assert str(Where(role="user", turn=-1, text="keys", last=2)) == "all, role user, turn -1, text 'keys', last 2"


def test_what_differs_is_not_equal() -> None:
    calm = 0.1 * term()
    variants = [
        calm, calm.on(1), calm.on(0, 1), calm.on(0, 1, divide="each"), calm.ablate(), calm.clamp(0.1), calm.cap(0.1),
        calm.floor(0.1), calm.at(Where(turn=0)), calm.at(Where(first=1)), calm.ramp(2), calm.ramp(3), calm.decay(2),
        calm.when(gate()), calm.when(gate(2)), calm.when(gate(above=1.0)), calm.when(gate(below=2.0)), calm.when(gate(layer=0)),
        calm.when(replace(gate(), mean=0.0)), calm.when(replace(gate(), centre=None)), term(seed=1), term("sad"),
    ]  # fmt: skip
    assert len(set(variants)) == len({str(s.content()) for s in variants}) == len(variants)
    assert len({Request("A", steering=s).key() for s in variants}) == len(variants)
    assert len({s.to_json() for s in variants}) == len(variants)


def test_the_order_of_operations_does_not_matter() -> None:
    calm, where = term(), Where("response", first=3)
    operations: list[Callable[[Steering], Steering]] = [
        lambda s: s.on(1, 2), lambda s: s.at(where), lambda s: s.when(gate()), lambda s: s.decay(9), lambda s: 0.3 * s
    ]  # fmt: skip
    results = set()
    for order in itertools.permutations(operations):
        steering = calm
        for operation in order:
            steering = operation(steering)
        results.add(steering)
    assert len(results) == 1


def test_hashes_of_requests_made_before_there_were_turns_and_windows_stay() -> None:
    """Runs on disk are found by this hash; it was taken before the fields were added."""
    readout = Readout((0,), Where("prompt", role="user", last=1))
    assert Request("A", readouts=(readout,), sampling=Sampling(3)).key() == "139c5d51321a0d8739fb7eff"
    other = replace(readout, where=replace(readout.where, turn=0))
    assert Request("A", readouts=(other,), sampling=Sampling(3)).key() != "139c5d51321a0d8739fb7eff"


# ── what is refused ──

REFUSED: dict[str, tuple[type[AffectlensError], str, Callable[[], Any]]] = {
    "a clamp times two": (EngineError, "give the value to clamp", lambda: 2 * term().clamp(0.1)),
    "a cap times two": (EngineError, "give the value to cap", lambda: 2 * term().cap(0.1)),
    "no layers": (EngineError, "at least one layer", lambda: term().on()),
    "a layer without a direction": (MismatchError, "no direction at layer 3: choose among 0, 1, 2, 4", lambda: term().on(3)),
    "an unknown rule": (EngineError, "use even or each", lambda: term().on(1, divide="odd")),  # type: ignore[arg-type]
    "an endless value": (EngineError, "use a finite number", lambda: term().clamp(float("inf"))),
    "a gate above": (EngineError, "read it there or lower", lambda: term().when(gate(layer=4))),
    "a gate above a layer that comes later": (
        EngineError,
        "read at layer 1, after layer 0",
        lambda: term().when(gate()).on(0, 1),
    ),
    "a gate without limits": (EngineError, "needs above or below", lambda: gate(above=None)),
    "a gate that is never open": (EngineError, "never open", lambda: gate(above=1.0, below=1.0)),
    "a gate without spread": (EngineError, "deviation above 0", lambda: replace(gate(), deviation=0.0)),
    "a gate of two directions": (EngineError, "one direction", lambda: replace(gate(), direction=np.zeros((2, WIDTH)))),
    "a schedule over nothing": (EngineError, "use 1 or more", lambda: term().ramp(0)),
    "an unknown schedule": (EngineError, "use ramp or decay", lambda: Schedule("pulse", 3)),  # type: ignore[arg-type]
    "an unknown mode": (EngineError, "use add, ablate", lambda: replace(term().terms[0], mode="boost")),
    "too few norms": (EngineError, "a direction and a norm", lambda: replace(term().terms[0], norms=np.ones(2))),
    "two clamps of one": (EngineError, "cannot be held at two values", lambda: term().clamp(0.1) + term().clamp(0.2)),
    "a clamp above a cap": (EngineError, "cannot be held at two values", lambda: term().cap(0.1) + term().clamp(0.2)),
    "a floor above a cap": (EngineError, "cannot be held at two values", lambda: term().floor(0.3) + term().cap(0.2)),
    "an ablation and a clamp": (EngineError, "cannot be held at two values", lambda: term().ablate() + term().clamp(0.2)),
    "a gated clamp of a clamped one": (
        EngineError,
        "cannot be held at two values",
        lambda: term().clamp(0.1) + term().clamp(0.2).when(gate()),
    ),
    "a window of nothing": (EngineError, "first and last from 1", lambda: Where("response", first=0)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_at_once(what: str) -> None:
    kind, says, make = REFUSED[what]
    with pytest.raises(kind, match=says) as error:
        make()
    one_line(error)


def test_what_holds_one_direction_at_values_that_agree_is_not_refused() -> None:
    calm = term()
    assert calm.clamp(0.1) + calm.clamp(0.1) and calm.floor(0.1) + calm.cap(0.2) and calm.clamp(0.1) + calm.cap(0.2)
    assert calm.clamp(0.1).at(Where("prompt")) + calm.clamp(0.2).at(Where("response"))
    assert calm.clamp(0.1).when(gate(above=1.0)) + calm.clamp(0.2).when(gate(below=1.0))
    assert calm.clamp(0.1) + calm.on(1).clamp(0.2) and calm.ablate() + calm.cap(0.2)


# ── selectors ──


def layout(n_prompt: int, n: int, turns: tuple[tuple[str, int, int], ...] = ()) -> Layout:
    roles = ["text"] * n_prompt + ["assistant"] * (n - n_prompt)
    for role, start, end in turns:
        roles[start:end] = [role] * (end - start)
    return Layout("x" * n, ("x",) * n, tuple(range(n)), tuple((i, i + 1) for i in range(n)), tuple(roles), n_prompt, turns)


def test_what_is_selected_ahead_is_selected_in_the_end() -> None:
    """For every selector that can speak of tokens to come: known beforehand is what the finished text says."""
    turns = (("system", 0, 2), ("user", 2, 5), ("assistant", 6, 8), ("user", 8, 10))
    selectors = [
        Where(part, role, turn, after=after, first=first)  # type: ignore[arg-type]
        for part in ("all", "prompt", "response")
        for role in (None, "user", "assistant")
        for turn in (None, 0, 1, 4, -1, -2, 7)
        for after in (0, 1, 3, 11)
        for first in (None, 1, 2, 12)
    ]
    for given, where in itertools.product((11, 13), selectors):  # without a prefill, and with one of two tokens
        ahead = where.ahead(layout(11, given, turns))
        whole = where.mask(layout(11, given + 6, turns))[given:]
        np.testing.assert_array_equal([k in ahead for k in range(6)], whole, err_msg=f"{where} {given}")


def test_a_layout_that_does_not_know_its_turns_says_so() -> None:
    with pytest.raises(EngineError, match="run it again") as error:
        Where(turn=0).mask(layout(3, 5))
    one_line(error)


# ── the solvers ──


@pytest.mark.parametrize("seed", range(60))
def test_all_coordinates_meet_their_goals_and_both_solvers_agree(seed: int) -> None:
    """Random mixtures of held, limited, partly moved and free coordinates, up to strongly correlated directions."""
    rng = np.random.default_rng(seed)
    n, tokens = int(rng.integers(1, 7)), 25
    shared = rng.uniform(0, 1.5)
    basis = unit(rng, n) + shared * unit(rng)
    basis = (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)
    limit = rng.random(n) < rng.choice([0, 0.5, 1])
    target = rng.normal(size=n).astype(np.float32)
    amount = np.where(limit | (rng.random(n) < 0.6), 1, rng.random(n)).astype(np.float32)
    shares = np.where(rng.random((tokens, n)) < 0.3, 0, rng.choice([1, 1, 0.5], (tokens, n))).astype(np.float32)
    h = (3 * rng.normal(size=(tokens, WIDTH))).astype(np.float32)
    pin = Pin((Scope(),) * n, basis, target, amount, limit)
    reference = np.stack([pin.settle(x, share) for x, share in zip(h, shares, strict=True)])
    tensors = [torch.as_tensor(x) for x in (h @ basis.T, basis, target, amount * shares)]
    fast = h + (settle(*tensors, tuple(limit.tolist())) @ torch.as_tensor(basis)).numpy()
    c, after, moved = h @ basis.T, fast @ basis.T, amount * shares
    goal = c + moved * (target - c)
    for t, k in itertools.product(range(tokens), range(n)):
        if moved[t, k] and limit[k]:
            assert after[t, k] < max(goal[t, k], target[k]) + 1e-3
        elif moved[t, k]:
            assert after[t, k] == pytest.approx(goal[t, k], abs=1e-3)
    np.testing.assert_allclose(fast, reference, atol=2e-3)
    untouched = ~((moved > 0) & (~limit | (c > target))).any(axis=1)
    np.testing.assert_array_equal(fast[untouched], h[untouched])
    # The step lies in the span of the coordinates that are moved.
    for t in range(tokens):
        held = basis[moved[t] > 0]
        step = fast[t] - h[t]
        np.testing.assert_allclose(step - np.linalg.pinv(held) @ held @ step if len(held) else step, 0, atol=1e-3)


def test_directions_that_are_one_do_no_harm() -> None:
    d = unit(np.random.default_rng(0))
    pin = Pin((Scope(),) * 3, np.stack([d, d, d]), np.full(3, 0.5, "f"), np.ones(3, "f"), np.array([False, False, True]))
    h = unit(np.random.default_rng(1), 4)
    ones = torch.ones(4, 3)
    basis = torch.as_tensor(pin.basis)
    weights = settle(torch.as_tensor(h) @ basis.T, basis, torch.as_tensor(pin.target), ones, (False, False, True))
    np.testing.assert_allclose((h + (weights @ basis).numpy()) @ d, 0.5, atol=1e-5)
    np.testing.assert_allclose([pin.settle(x, np.ones(3)) @ d for x in h], 0.5, atol=1e-5)
