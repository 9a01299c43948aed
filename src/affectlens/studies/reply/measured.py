"""What is read of messages and their replies, and how alike two such readings are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.engine import Layout, Request, Sampling, Where
from affectlens.stats import Estimate, Null
from affectlens.studies import Bench

SIX = ("afraid", "angry", "sad", "calm", "happy", "loving")
"""The paper's probes of this experiment."""
SAMPLES, TOKENS, TEMPERATURE = 8, 20, 0.7
SAYS_NOTHING = "What would you say?"
FEW = 8
"""Fewer messages are not tested."""

_END = re.compile(r"[.!?…][\"'”’)]*(?=\s)")


def statement(message: str) -> str | None:
    """The message up to the end of the last sentence before its last one; None when it has one sentence only.

    Example:
        >>> statement("They sold it over our heads! Forty years. Who would blame me?")
        'They sold it over our heads! Forty years.'
    """
    ends = list(_END.finditer(message.strip()))
    return message.strip()[: ends[-1].end()] if ends else None


def likeness(x: np.ndarray, y: np.ndarray, *, centred: bool = True) -> float:
    """Correlation of two tables ``(messages, probes)`` over all their cells.

    Args:
        x, y: The tables.
        centred: Remove each probe's mean over the messages, not only the mean over all cells.

    Returns:
        The correlation; nan when a table is constant.

    Example:
        >>> x = np.array([[0.0, 9.0], [1.0, 8.0], [2.0, 7.0]])
        >>> round(likeness(x, x[::-1]), 3), round(likeness(x, x[::-1], centred=False), 3)
        (-1.0, 0.897)
    """
    a, b = unit(x, centred), unit(y, centred)
    return float((a * b).mean())


def unit(table: np.ndarray, centred: bool = True) -> np.ndarray:
    """The table without its means, its cells scaled to a variance of 1."""
    moved = table - table.mean(axis=0 if centred else None, keepdims=True)
    scale = np.sqrt((moved**2).mean())
    return np.asarray(moved / scale if scale > 0 else np.full_like(moved, np.nan))


@dataclass(frozen=True)
class Read:
    """Cosines of all concepts: at each place ``(messages, concepts)``, with the token before it where that counts; of replies
    ``(messages, samples, concepts)``, nan where nothing was said."""

    places: Mapping[str, np.ndarray]
    context: np.ndarray
    alone: np.ndarray
    texts: list[list[str]]


def records_of(bench: Bench) -> list[dict[str, Any]]:
    """The messages that can be tested."""
    return [
        record
        for record in bench.texts("contrasts")
        if record["kind"] == "audience"
        and record["user"] in bench.vectors
        and record["reply"] in bench.vectors
        and statement(record["text"])
    ]


def questions(bench: Bench) -> list[Request]:
    """Every message, answered ``SAMPLES`` times; the prompt, which reads the same every time, is read with the first."""
    prompt = bench.vectors.readout(where=Where(part="prompt"), pool="none")
    response = bench.vectors.readout(where=Where(part="response"), pool="mean")
    return [
        bench.ask(
            record["text"],
            *((response,) if k else (prompt, response)),
            sampling=Sampling(max_tokens=TOKENS, temperature=TEMPERATURE, seed=SAMPLES * i + k),
        )
        for i, record in enumerate(records_of(bench))
        for k in range(SAMPLES)
    ]


def _places(layout: Layout, text: str) -> dict[str, int]:
    """Positions in the layout, each with the token before it."""
    said = statement(text)
    assert said is not None
    end = layout.text.index(said) + len(said)
    stated = max(i for i, (a, b) in enumerate(layout.offsets) if a < end and b > a)
    last = max(i for i, role in enumerate(layout.roles[: layout.n_prompt]) if role == "user")
    reply = layout.n_prompt - 1
    return {"statement": stated, "before statement": stated - 1, "last": last, "reply": reply, "before reply": reply - 1}


def read(bench: Bench, records: list[dict[str, Any]]) -> Read:
    """What is read of messages and replies, and then of the replies alone."""
    results, vectors = list(bench.read(questions(bench))), bench.vectors
    places: dict[str, list[np.ndarray]] = {}
    for record, result in zip(records, results[::SAMPLES], strict=True):
        reading = result.readings[0]
        scores = dict(zip(reading.positions.tolist(), vectors.scores(reading, kind="cosine"), strict=True))
        for place, position in _places(result.layout, record["text"]).items():
            places.setdefault(place, []).append(scores[position])
    nothing = np.full(len(vectors), np.nan)
    texts = [result.text.strip() for result in results]
    context = [vectors.scores(r.readings[-1], kind="cosine") if t else nothing for r, t in zip(results, texts, strict=True)]
    readout = vectors.readout(where=Where(role="assistant"), pool="mean")
    chats = [
        Request((("user", SAYS_NOTHING), ("assistant", text)), readouts=(readout,), transcript=bench.plain)
        for text in texts
        if text
    ]
    answers = bench.read(chats)
    alone = [vectors.scores(next(answers).readings[0], kind="cosine") if text else nothing for text in texts]
    shape = (len(records), SAMPLES, len(vectors))
    return Read(
        {place: np.stack(rows) for place, rows in places.items()},
        np.stack(context).reshape(shape),
        np.stack(alone).reshape(shape),
        [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)],
    )


class Measured:
    """Tables of one instrument: some probes, centred or plain, over the messages whose numbers are given."""

    def __init__(self, bench: Bench, read: Read, probes: Sequence[str], *, centred: bool) -> None:
        self.centred = centred
        self.options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
        self.columns = columns = [bench.vectors.index(name) for name in probes]
        self.places = {place: scores[:, columns] for place, scores in read.places.items()}
        context, alone = (mean_reply(replies[..., columns]) for replies in (read.context, read.alone))
        self.answered = np.isfinite(alone).all(axis=1)
        self.tables = {**self.places, "context": context, "alone": alone}

    def pair(self, one: str, other: str) -> tuple[np.ndarray, np.ndarray]:
        """Two tables over the messages that both have."""
        both = np.isfinite(self.tables[one]).all(axis=1) & np.isfinite(self.tables[other]).all(axis=1)
        return self.tables[one][both], self.tables[other][both]

    def means(self, values: np.ndarray) -> list[Estimate]:
        """The mean of each column of values ``(messages, columns)``."""
        return stats.bootstrap_each(lambda rows: values[rows].mean(axis=0), len(values), **self.options)

    def r(self, one: str, other: str) -> Estimate:
        x, y = self.pair(one, other)
        return stats.bootstrap(lambda rows: likeness(x[rows], y[rows], centred=self.centred), len(x), **self.options)

    def neighbours(self) -> float:
        """How alike a token and the one before it read, at the statement and at the reply position together."""
        each = [likeness(*self.pair(place, f"before {place}"), centred=self.centred) for place in ("statement", "reply")]
        return float(np.sqrt(max(each[0], 0.0) * max(each[1], 0.0)))

    def as_alike_as(self, bound: float, observed: float) -> Null:
        """The correlation of readings at the reply position that go with those at the statement to ``bound``, and otherwise vary
        as the real ones do, over messages drawn anew."""
        x, y = (unit(table, self.centred) for table in self.pair("statement", "reply"))
        rest = unit(y - observed * x, self.centred)

        def alike(drawn: np.ndarray) -> float:
            # What the two positions do not share is drawn on its own: drawn together, r would vary too little.
            first = x[drawn[0]]
            return likeness(first, bound * first + np.sqrt(1 - bound**2) * rest[drawn[1]], centred=self.centred)

        return stats.permutation_null(
            alike,
            observed,
            permute=lambda rng: rng.integers(0, len(x), (2, len(x))),
            side="less",
            kind=f"as alike as {bound:.2f}, messages resampled",
            **self.options,
        )

    def exchanged(self, one: str, other: str, observed: float) -> tuple[Null, Null]:
        """What is left of a correlation when replies are exchanged between messages, and when they are between probes."""
        x, y = self.pair(one, other)
        how: dict[str, Any] = {"side": "greater", **self.options}
        messages = stats.permutation_null(
            lambda rows: likeness(x, y[rows], centred=self.centred),
            observed,
            permute=lambda rng: rng.permutation(len(x)),
            kind="replies exchanged between messages",
            **how,
        )
        probes = stats.permutation_null(
            lambda columns: likeness(x, y[:, columns], centred=self.centred),
            observed,
            permute=lambda rng: rng.permutation(x.shape[1]),
            kind="probes of the replies exchanged",
            **how,
        )
        return messages, probes


def mean_reply(replies: np.ndarray) -> np.ndarray:
    """Mean over the samples that said something; nan where none did."""
    said = np.isfinite(replies)
    total = np.where(said, replies, 0).sum(axis=1)
    return np.divide(total, said.sum(axis=1), out=np.full_like(total, np.nan), where=said.any(axis=1))
