"""Make a stored reply again, with the same model, seed and steering, and compare it to the bit.

What is compared: the text, why it ended, every token, every score, the alarms. The first difference is said. Before that it is
checked that the reply can be the same at all: the weights must be (else it is refused); another precision, device or version of
a package is said, since it can change the last bits.

The engine is used as the server uses it, through a session: the sums of :meth:`Engine.run` are added in another order. A reply
that was alone in its forward passes comes out the same. One that had company (:attr:`Record.company`) may differ by
rounding, since sums over a batch are added in another order: then scores differ by about a millionth, and where two tokens were
almost equally likely, the words may part there. Replay says how many shared its passes.
"""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from affectlens.baseline import Baseline, vectors_id
from affectlens.engine import Engine, ModelInfo, Request, Result
from affectlens.errors import AffectlensError, FormatError, MismatchError
from affectlens.monitor import Monitor
from affectlens.server.records import Asked, Record
from affectlens.traces import Trace
from affectlens.vectors import ConceptVectors

PACKAGES = ("affectlens", "torch", "transformers", "numpy")
"""What computes."""

ROUNDING = 1e-3
"""Scores in z that differ by less than this have been rounded differently."""

CUT = ("timeout", "shutdown")
"""Ends that came from outside: the reply is made again up to there."""

_TABLES = ("scores", "steered", "visible", "gap", "other")

Verdict = Literal["same", "rounding", "different"]


@dataclass(frozen=True)
class Replay:
    """How a reply came out the second time.

    Args:
        id: Of the record.
        verdict: ``same`` to the bit; ``rounding``, the same words with scores that differ in their last digits;
            ``different``.
        difference: The first difference; empty when there is none.
        company: How many requests shared its forward passes then.
        changes: What is not as it was then, and may be the reason.
        tokens, scores: How many were compared.
    """

    id: str
    verdict: Verdict
    difference: str
    company: int
    changes: tuple[str, ...]
    tokens: int
    scores: int

    def __str__(self) -> str:
        said = f"{self.id}: {self.tokens} tokens and {self.scores:,} scores, "
        if self.verdict == "same":
            said += "the same to the bit"
        else:
            said += f"{'the same but for rounding' if self.verdict == 'rounding' else 'different'}: {self.difference}"
        if self.verdict != "same" and self.company > 1:
            said += (
                f"\n  it shared its forward passes with up to {self.company - 1} others then, which changes how sums are rounded"
            )
        return said + "".join(f"\n  {change}" for change in self.changes)


def versions() -> dict[str, str]:
    """The versions of what computes: part of :attr:`Record.model`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_data(info: ModelInfo) -> dict[str, Any]:
    """A model as plain data for :attr:`Record.model`."""
    fields = {name: value for name, value in vars(info).items() if name != "checks"}
    return {**fields, "versions": versions()}


def check(record: Record, info: ModelInfo, vectors: ConceptVectors) -> tuple[str, ...]:
    """What is not as it was when the record was made.

    Returns:
        A line for each thing that may change the last bits.

    Raises:
        MismatchError: Other weights or other vectors: nothing would be the same.
    """
    was = record.model
    if was.get("fingerprint") != info.fingerprint:
        raise MismatchError(
            f"{record.id} is a reply of {was.get('id')} with the fingerprint {was.get('fingerprint')}, and {info.id} has "
            f"{info.fingerprint}: give the same model with --model"
        )
    kept = record.request.get("vectors", {}).get("id")
    if kept and kept != vectors_id(vectors):
        raise MismatchError(
            f"{record.id} was read with other vectors ({kept}, these are {vectors_id(vectors)}): give them with --vectors"
        )
    changes = [
        f"{name} was {was.get(name)}, is {now}" for name in ("dtype", "device") if was.get(name) != (now := getattr(info, name))
    ]
    known = was.get("versions", {})
    changes += [f"{name} was {known[name]}, is {now}" for name, now in versions().items() if known.get(name, now) != now]
    return tuple(changes)


def replay(record: Record, engine: Engine, vectors: ConceptVectors, *, baseline: Baseline | None = None) -> Replay:
    """Make a reply again and compare.

    Args:
        record: What was kept.
        engine: The same model.
        vectors: The same vectors, at their layer.
        baseline: What scores are stated against; None takes the one that is kept with the record, or else measures it again.

    Raises:
        MismatchError: Another model, or other vectors.
        FormatError: Its words were not kept.
    """
    asked = Asked.of(record.request)
    if (layer := record.trace.layer) != vectors.layer:
        vectors = vectors.with_layer(layer)
    changes = check(record, engine.info, vectors)
    if baseline is None and record.request.get("baseline"):
        baseline = Baseline.of(record.request["baseline"], f"the baseline of {record.id}")
    monitor = Monitor(vectors, baseline, rules=asked.policies, gap=record.trace.visible is not None)
    engine = _Served(engine)
    if asked.sampling is None:
        text, finish, trace = "", "read", monitor.score(engine, asked.prompt, id=record.trace.id)
    else:
        given: dict[str, Any] = {"steering": asked.steering} if asked.steering.terms else {}
        if cut := record.finish in CUT:
            given["sampling"] = replace(asked.sampling, max_tokens=max(1, record.usage["completion_tokens"]))
        given = {"sampling": asked.sampling, "prefill": asked.prefill, "id": record.trace.id, **given}
        stream = monitor.stream(engine, asked.prompt, **given)
        for _ in stream:
            pass
        assert stream.trace is not None
        text, finish, trace = stream.text, record.finish if cut else stream.finish, stream.trace
    words = next(_words(record, text, finish, trace), "")
    numbers, excess = ("", 0.0) if words else _numbers(record.trace, trace)
    verdict: Verdict = "same"
    if words or numbers:
        verdict = "rounding" if not words and excess <= ROUNDING else "different"
    scores = sum(table.size for name in _TABLES if (table := getattr(record.trace, name)) is not None)
    return Replay(record.id, verdict, words or numbers, record.company, changes, len(record.trace), scores)


class _Served(Engine):
    """An engine as a server uses it: all goes through one session, in which a reply goes on while its words are read again."""

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self._engine, self._session = engine, engine.session()
        self._came: dict[int, deque[Result | AffectlensError]] = {}

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        tickets = [self._session.submit(request) for request in requests]
        self._came |= {ticket: deque() for ticket in tickets}
        try:
            for ticket in tickets:
                done = False
                while not done:
                    result = self._next(ticket)
                    done = result.done
                    yield result
        finally:
            for ticket in tickets:
                self._session.cancel(ticket)
                del self._came[ticket]

    def _next(self, ticket: int) -> Result:
        while not self._came[ticket]:
            for other, result in self._session.step():
                self._came[other].append(result)
        result = self._came[ticket].popleft()
        if isinstance(result, AffectlensError):
            raise result
        return result

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        return self._engine.unembed(residuals)

    @property
    def vocabulary(self) -> Sequence[str]:
        return self._engine.vocabulary

    def texts(self, name: str) -> list[dict[str, Any]] | None:
        return self._engine.texts(name)


def _words(record: Record, text: str, finish: str, trace: Trace) -> Iterator[str]:
    """Differences in what was said, the first one first."""
    then, now = record.trace.layout, trace.layout
    for i, (was, is_) in enumerate(zip(then.ids, now.ids, strict=False)):
        if was != is_:
            yield f"token {i} was {then.tokens[i]!r}, is {now.tokens[i]!r}"
            break
    if len(then) != len(now):
        yield f"it had {len(then)} tokens, has {len(now)}"
    if record.text != text:
        at = next(
            (i for i, (a, b) in enumerate(zip(record.text, text, strict=False)) if a != b), min(len(record.text), len(text))
        )
        yield f"the text was {_around(record.text, at)}, is {_around(text, at)} (from character {at})"
    if record.finish != finish:
        yield f"it ended by {record.finish!r}, ends by {finish!r}"
    if then != now:
        part = next(
            name
            for name in ("text", "tokens", "offsets", "roles", "n_prompt", "turns")
            if getattr(then, name) != getattr(now, name)
        )
        yield f"its {part} differ"
    for i, (before, after) in enumerate(zip(record.trace.alerts, trace.alerts, strict=False)):
        if (before.rule, before.token) != (after.rule, after.token):
            yield f"alarm {i + 1} was {before.rule!r} at token {before.token}, is {after.rule!r} at token {after.token}"
            return
    if (was := len(record.trace.alerts)) != (is_now := len(trace.alerts)):
        yield f"it raised {was} alarms, raises {is_now}"


def _around(text: str, at: int) -> str:
    return repr(text[at : at + 24] + ("…" if len(text) > at + 24 else "")) if at < len(text) else "the end"


def _numbers(then: Trace, now: Trace) -> tuple[str, float]:
    """The first score that differs, how many do, and by how much at most."""
    if then.names != now.names:
        return "it was read for other concepts", np.inf
    for name in _TABLES:
        was, is_ = getattr(then, name), getattr(now, name)
        if was is None and is_ is None:
            continue
        if was is None or is_ is None or was.shape != is_.shape:
            return f"its {name} scores were {'read' if is_ is None else 'not read'} then", np.inf
        differs = (was != is_) & ~(np.isnan(was) & np.isnan(is_))
        if not differs.any():
            continue
        token, column = (int(i) for i in np.argwhere(differs)[0])
        names = then.other_names if name == "other" else then.names
        gaps = np.abs(was[differs].astype(np.float64) - is_[differs])
        excess = float(gaps.max()) if np.isfinite(gaps).all() else np.inf
        what = "" if name == "scores" else f" ({name})"
        return (
            f"{names[column]}{what} at token {token} was {was[token, column]!s}, is {is_[token, column]!s}; "
            f"{int(differs.sum()):,} of {differs.size:,} scores differ, by {excess:.2g} at most"
        ), excess
    return "", 0.0


def find(source: str, id: str) -> Record:
    """A record by its id.

    Args:
        source: The address of a store, or a file that was exported as JSONL.
        id: Of the record.

    Raises:
        FormatError: It is not there.
        StoreError: There is no such store.
    """
    from affectlens.server.export import read_jsonl

    if source.endswith((".jsonl", ".json")):
        record = next((each for each in read_jsonl(source) if each.id == id), None)
    else:
        from affectlens.server.store import Store

        with Store(source, new=False) as store:
            record = store.get(id)
    if record is None:
        raise FormatError(f"{source} has no reply {id!r}: its id is what a client gets as id, and what the dashboard shows")
    return record
