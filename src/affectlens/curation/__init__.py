"""Curation: emotion scores for every document of a dataset, what they say of it, and which documents to keep.

    OUT/data/00000.jsonl       the rows of a shard as they were, with a column ``affect``: what training reads
    OUT/scored/00000.json      written after it: how many rows, its hash, what adds up
    OUT/report.html            what the dataset is like (:mod:`affectlens.curation.regulation`)
    OUT/run.json               settings; another model, dataset, filter … is refused here

A shard is a pure function of its rows (:func:`score_shard`), and tallies add up, so shards can be read by any number of workers.
A run can be killed at any moment: what has its file in ``scored`` is done, everything else is made again, byte for byte the same.

**Scores** are z against a baseline, each token in its context, all tokens but the first of each text that is put to the model.
The document's own words are its text, or in a conversation the assistant's. ``mean`` is over them; ``peak`` is the highest mean
of 15 of them in a row, since single tokens fluctuate strongly (of fewer than 15 words, their mean). Scores are rounded to
thousandths.

**Long documents** are cut, never truncated: a text of more bytes than twice the model's context (at most :data:`LONGEST`) is read
in windows that end with a sentence, a conversation in windows of whole turns. Where a window still does not fit it is halved. A
token sees nothing of the windows before its own. ``windows`` says how many there were.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.baseline import Baseline, neutral_dialogues, vectors_id
from affectlens.concepts import ConceptSet
from affectlens.conversations import STRETCH, TOO_LONG, Conversation, Run, conversation, joined, request, smoothed, tried
from affectlens.corpus import cut
from affectlens.curation.regulation import Measures, Tally
from affectlens.curation.selection import Filter, Sieve, Weights
from affectlens.dataset import ROWS, TABLES, Column, Dataset, Part, Record, Shard
from affectlens.engine import Engine, Layout, Request, Result, in_order
from affectlens.errors import EngineError, FormatError
from affectlens.rules import OWN
from affectlens.runs import Progress, content_id, provenance, read_json, sha256_file, write_json
from affectlens.runs import Run as Directory
from affectlens.traces import Probe, trace_of
from affectlens.vectors import ConceptVectors

if TYPE_CHECKING:
    import pyarrow as pa

    from affectlens.report import Report

LONGEST = 2**13
"""Bytes of a window at most, whatever the context: some 1,900 tokens of English."""
TOGETHER = 2**18
"""Bytes that are read together: what of token scores is held at a time."""
TOP = 3
"""Emotions that are named in a row."""
SHOWN = 160
"""Characters of a document that the report quotes."""

TEXTS = ("text", "content")
DIALOGUES = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
"""Columns that hold documents by custom: texts, conversations, and a user's words beside an assistant's."""


@dataclass(frozen=True)
class Scoring:
    """What to score, and what to write.

    Args:
        text: The column with texts; None to find out by custom.
        messages: The column with conversations, or two columns as ``prompt,response``.
        emotions: Whose scores are written; empty for all. All are read in any case.
        filter: What documents to keep (:mod:`affectlens.curation.selection`); None keeps all.
        weights: A column ``weight`` with ``exp`` of this combination of scores, as ``calm=0.5,hostile=-1``; None for none.
        column: Name of the column with scores.
    """

    text: str | None = None
    messages: str | None = None
    emotions: tuple[str, ...] = ()
    filter: str | None = None
    weights: str | None = None
    column: str = "affect"


@dataclass(frozen=True)
class Scored:
    """What came of scoring a dataset.

    Args:
        data: The folder with the rows and their scores, or the file.
        rows: How many rows the dataset has.
        kept: How many of them were written.
        report: What the dataset is like.
        page: The report as a page.
    """

    data: Path
    rows: int
    kept: int
    report: Report
    page: Path


WEIGHT = "weight"


# ── which column ──


@dataclass(frozen=True)
class Source:
    """Where documents stand in a row: one column with texts, one with conversations, or two that make an exchange.

    Args:
        columns: The column or columns.
        dialogue: Whether they hold what several people say.
    """

    columns: tuple[str, ...]
    dialogue: bool

    @classmethod
    def of(cls, columns: Sequence[str], scoring: Scoring, where: str) -> Source:
        """The columns that are named, or those that hold documents by custom.

        Args:
            columns: Those that the dataset has.
            scoring: May name them.
            where: Names the dataset in an error.

        Raises:
            FormatError: None, or several; says which columns there are.

        Example:
            >>> Source.of(["id", "prompt", "response"], Scoring(), "a.jsonl")
            Source(columns=('prompt', 'response'), dialogue=True)
        """
        there = f"its columns are {', '.join(columns)}"
        if scoring.text and scoring.messages:
            raise FormatError("a document is a text or a conversation: give --text or --messages, not both")
        if named := scoring.text or scoring.messages:
            wanted = (named,) if scoring.text or named in columns else tuple(name.strip() for name in named.split(","))
            if missing := [name for name in wanted if name not in columns]:
                raise FormatError(f"{where} has no column {missing[0]!r}: {there}")
            if len(wanted) > 2:
                raise FormatError(
                    f"{named!r} names {len(wanted)} columns: give one with conversations, or two as prompt,response"
                )
            return cls(wanted, not scoring.text)
        found = [cls((name,), name in DIALOGUES) for name in (*TEXTS, *DIALOGUES) if name in columns]
        found += [cls(pair, True) for pair in PAIRS if set(pair) <= set(columns)]
        if len(found) > 1:
            which = " and ".join(" with ".join(each.columns) for each in found)
            raise FormatError(f"{where} may mean {which}: name one with --text or --messages ({there})")
        if not found:
            raise FormatError(f"{where} has no column that is a text by custom: name one with --text or --messages ({there})")
        return found[0]

    def document(self, record: Record, place: str) -> Document:
        """The document of a row; without turns where the row has no words.

        Raises:
            FormatError: What stands there is no text or conversation; names the row.
        """
        values = [record.get(name) for name in self.columns]
        if self.dialogue and len(values) == 1:
            if values[0] is None:
                return Document(place, ())
            try:
                return Document(place, joined(conversation({"messages": values[0]}).turns))
            except FormatError as error:
                raise FormatError(f"{place}, column {self.columns[0]!r} {error}") from None
        for name, value in zip(self.columns, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise FormatError(f"{place}, column {name!r} holds {_kind(value)}: name a column of texts with --text")
        roles = ("user", "assistant") if self.dialogue else ("text",)
        said = ((role, _whole(value).strip()) for role, value in zip(roles, values, strict=True) if isinstance(value, str))
        return Document(place, tuple((role, words) for role, words in said if words))


def _kind(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _whole(text: str) -> str:
    """Half characters (lone surrogates) as question marks: no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode()


# ── documents and windows ──


@dataclass(frozen=True)
class Document:
    """What is read of a row: where it stands, and its turns; a text is one turn of ``text``. Without turns it has no words."""

    place: str
    turns: tuple[tuple[str, str], ...]

    @property
    def size(self) -> int:
        """Bytes of its words."""
        return sum(len(words.encode()) for _, words in self.turns)


Window = tuple[tuple[int, str, str], ...]
"""What is put to the model at a time: the number, role and words of each turn, or part of a turn."""


def windows(turns: Window, size: int) -> list[Window]:
    """Cut what was said into windows: between turns, and only what is too long for one between its sentences.

    Args:
        turns: In order.
        size: Bytes of words in a window at most.

    Example:
        >>> windows(((0, "user", "Is it far?"), (1, "assistant", "It is. Not very.")), 11)
        [((0, 'user', 'Is it far?'),), ((1, 'assistant', 'It is.'),), ((1, 'assistant', 'Not very.'),)]
    """
    lengths = np.array([len(words.encode()) for _, _, words in turns])
    if lengths.sum() <= size:
        return [turns]
    if len(turns) == 1:
        number, role, words = turns[0]
        return [((number, role, piece),) for piece in cut(words, size)]
    ends = np.cumsum(lengths)[:-1]
    middle = 1 + int(np.abs(ends - lengths.sum() / 2).argmin())
    return [*windows(turns[:middle], size), *windows(turns[middle:], size)]


@dataclass(frozen=True, eq=False)
class Read:
    """A window that was put to the model: its document's number, its result, and why there is none; without words, neither."""

    document: int
    window: Window = ()
    result: Result | None = None
    reason: str = ""


def read(run: Run, documents: Iterable[Document], probe: Probe, *, context: int) -> Iterator[Read]:
    """Read documents window by window, in order; a document without words is one empty window.

    Args:
        run: What runs requests: ``engine.run``.
        documents: A stream. Windows of :data:`TOGETHER` bytes are read together; no more is held, however long a document is.
        probe: What to read.
        context: Tokens that the model takes.
    """
    size = min(2 * context, LONGEST)
    every = (
        (number, window)
        for number, document in enumerate(documents)
        for window in windows(tuple((n, role, words) for n, (role, words) in enumerate(document.turns)), size)
    )
    for group in _together(every):
        answers = tried(run, [_request(window, probe) for _, window in group if window])
        for number, window in group:
            if not window:
                yield Read(number)
                continue
            result, _, reason = next(answers)
            if result:
                yield Read(number, window, result)
            else:
                yield from _halved(run, number, window, probe, reason)


def _together(every: Iterable[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
    group: list[tuple[int, Window]] = []
    size = 0
    for number, window in every:
        own = _bytes(window)
        if group and size + own > TOGETHER:
            yield group
            group, size = [], 0
        group.append((number, window))
        size += own
    if group:
        yield group


def _bytes(window: Window) -> int:
    return sum(len(words.encode()) for _, _, words in window)


def _request(window: Window, probe: Probe) -> Request:
    turns = tuple((role, words) for _, role, words in window)
    if turns[0][0] == "text" and len(turns) == 1:
        return Request(turns[0][1], readouts=probe.readouts)
    return request(Conversation("", turns), *probe.readouts, template=probe.template)


def _halved(run: Run, number: int, window: Window, probe: Probe, reason: str) -> Iterator[Read]:
    """A window that the model could not take, in halves that it can."""
    halves = windows(window, max(1, _bytes(window) // 2)) if reason == TOO_LONG else []
    if len(halves) < 2:
        yield Read(number, window, None, reason)
        return
    for half in halves:
        ((result, _, why),) = tried(run, [_request(half, probe)])
        yield from [Read(number, half, result)] if result else _halved(run, number, half, probe, why)


class _Reading:
    """The scores of one document, gathered window by window; of tokens no more is kept than a line for each."""

    def __init__(self, probe: Probe, baseline: Baseline, measures: Measures, sieve: Sieve | None) -> None:
        self._probe, self._baseline, self._measures, self._sieve = probe, baseline, measures, sieve
        n = len(probe.vectors)
        self.turns: dict[int, tuple[str, int, np.ndarray]] = {}
        self.tokens = self.windows = 0
        self._tail = np.zeros((0, n), np.float64)
        self.peak = np.full(n, -np.inf)
        self._series: list[np.ndarray] = []

    def add(self, window: Window, result: Result) -> None:
        trace = self._baseline.standardise(trace_of(result, self._probe, id="", format=""))
        self.windows += 1
        known = np.isfinite(trace.scores).all(axis=1)
        for (number, role, _), (start, end) in zip(window, _places(result.layout, len(window)), strict=True):
            own = start + np.flatnonzero(known[start:end])
            own = own[[result.layout.roles[i] == role for i in own]]
            if not len(own):
                continue
            scores = trace.scores[own].astype(np.float64)
            _, n, sums = self.turns.get(number, (role, 0, np.zeros(scores.shape[1])))
            self.turns[number] = (role, n + len(scores), sums + scores.sum(axis=0))
            if self._sieve is not None and self._sieve.steps:
                for row in scores:
                    self._sieve.step(role, row)
            if role in OWN:
                self._own(scores)

    def _own(self, scores: np.ndarray) -> None:
        self.tokens += len(scores)
        self._series.append(self._measures(scores)[:, [0, 1, 3]])
        recent = np.concatenate([self._tail, scores])
        if len(recent) >= STRETCH:
            self.peak = np.maximum(self.peak, smoothed(recent).max(axis=0))
        self._tail = recent[len(recent) - min(len(recent), STRETCH - 1) :]

    def mean(self, *roles: str) -> np.ndarray | None:
        """Mean score over the words of some roles, ``(N,)``; None where there are none."""
        own = [(n, sums) for role, n, sums in self.turns.values() if role in roles]
        return sum(sums for _, sums in own) / sum(n for n, _ in own) if own else None  # type: ignore[return-value]

    @property
    def series(self) -> np.ndarray:
        return np.concatenate(self._series) if self._series else np.zeros((0, 3))


def _places(layout: Layout, n: int) -> list[tuple[int, int]]:
    """First token and end of each turn of a window."""
    if len(layout.turns) != n:
        raise EngineError(f"the model's text has {len(layout.turns)} turns where {n} were given: it cannot be told who says what")
    return [(start, end) for _, start, end in layout.turns]


# ── one shard ──


@dataclass(frozen=True, eq=False)
class Scorer:
    """Everything that decides what a shard's scores are, bound to vectors and baseline: data, which workers can be given.

    Args:
        scoring: What to score, and what to write.
        source: Where documents stand in a row.
        probe: What to read.
        baseline: What z is stated against.
        measures: What is measured for the report.
    """

    scoring: Scoring
    source: Source
    probe: Probe
    baseline: Baseline
    measures: Measures
    filter: Filter | None = field(init=False)
    weights: Weights | None = field(init=False)

    def __post_init__(self) -> None:
        names, axes = self.probe.vectors.names, self.measures.axes
        chosen = Filter.parse(self.scoring.filter) if self.scoring.filter is not None else None
        weights = Weights.parse(self.scoring.weights) if self.scoring.weights is not None else None
        for name in self.scoring.emotions:
            self.probe.vectors.index(name)
        if chosen:
            speakers = [name for name in self.baseline.speakers if name != "text"] if self.source.dialogue else ["text"]
            chosen.check(names, speakers, axes=axes)
        if weights:
            weights.check(names, axes=axes)
        object.__setattr__(self, "filter", chosen)
        object.__setattr__(self, "weights", weights)
        self.baseline.check(self.probe)

    @property
    def emotions(self) -> tuple[str, ...]:
        """Whose scores are written."""
        return self.scoring.emotions or self.probe.vectors.names

    @property
    def type(self) -> pa.DataType:
        """The type of the column with scores."""
        import pyarrow as pa

        each = pa.struct([(name, pa.float32()) for name in self.emotions])
        axes = [(name, pa.float32()) for name in ("valence", "arousal")] if self.measures.axes else []
        fields = [("tokens", pa.int32()), ("windows", pa.int32()), ("top", pa.list_(pa.string())), *axes]
        fields += [("mean", each), ("peak", each)]
        if self.source.dialogue:
            turn = pa.struct([("role", pa.string()), ("tokens", pa.int32()), *axes, ("mean", each)])
            fields.append(("turns", pa.list_(turn)))
        return pa.struct(fields)

    def columns(self) -> tuple[str, ...]:
        """The columns that are added."""
        return (self.scoring.column, *([WEIGHT] if self.weights else ()))


def score_shard(engine: Engine, part: Part, scorer: Scorer, *, row: int = 0) -> tuple[dict[str, Column], np.ndarray, Tally]:
    """Score the rows of a shard: the same rows give the same scores, whoever reads them and whatever was read before.

    Args:
        engine: The model.
        part: The rows.
        scorer: How.
        row: Number of the first row in the dataset.

    Returns:
        The columns to add, which rows to keep (boolean, one each), and what adds up.
    """
    import pyarrow as pa

    tally = Tally(scorer.measures)
    cells: list[dict[str, Any]] = []
    weights: list[float | None] = []
    keep = np.ones(len(part.records), dtype=bool)
    documents = [scorer.source.document(*each) for each in zip(part.records, part.places, strict=True)]
    seen = read(engine.run, documents, scorer.probe, context=engine.info.context)
    for i, windows_of_it in itertools.groupby(seen, key=lambda each: each.document):
        document, reason = documents[i], ""
        sieve = scorer.filter.sieve(scorer.probe.vectors.names) if scorer.filter else None
        reading = _Reading(scorer.probe, scorer.baseline, scorer.measures, sieve)
        for each in windows_of_it:
            reason = reason or each.reason
            if each.result:
                reading.add(each.window, each.result)
        value = _values(reading, scorer)
        cells.append(_cell(document, reading, scorer))
        if scorer.weights:
            weights.append(scorer.weights.of(value, document.place))
        if sieve is not None:
            keep[i] = sieve.keeps(value)
        _count(tally, document, reading, reason, row=row + i)
        tally.facts["kept"] += bool(keep[i])
        if weights and weights[-1] is not None:
            tally.weights += [1, weights[-1], weights[-1] ** 2]
    columns: dict[str, Column] = {scorer.scoring.column: (cells, scorer.type)}
    if scorer.weights:
        columns[WEIGHT] = (weights, pa.float64())
    return columns, keep, tally


def _values(reading: _Reading, scorer: Scorer) -> Callable[[str], float | None]:
    """Numbers of a document by name, for filters and weights: what is written, to the last digit."""
    names = scorer.probe.vectors.names

    def value(name: str) -> float | None:
        speaker, dot, concept = name.partition(".")
        roles, concept = ((speaker,), concept) if dot and name not in names else (OWN, name)
        mean = reading.mean(*roles)
        if mean is None:
            return None
        if concept in names:
            return round(float(mean[names.index(concept)]), 3)
        if concept == "tokens":
            return reading.tokens
        return round(float(scorer.measures(mean)[2 + ("valence", "arousal").index(concept)]), 3)

    return value


def _cell(document: Document, reading: _Reading, scorer: Scorer) -> dict[str, Any]:
    """What is written of a document."""
    mean = reading.mean(*OWN)
    peak = mean if mean is None or np.isinf(reading.peak).any() else reading.peak
    names = scorer.probe.vectors.names
    columns = [names.index(name) for name in scorer.emotions]

    def scores(values: np.ndarray | None) -> dict[str, float] | None:
        return None if values is None else {names[i]: round(float(values[i]), 3) for i in columns}

    def axes(values: np.ndarray | None) -> dict[str, float | None]:
        if not scorer.measures.axes:
            return {}
        two = [None, None] if values is None else [round(float(v), 3) for v in scorer.measures(values)[2:]]
        return {"valence": two[0], "arousal": two[1]}

    top = [] if mean is None else _top(mean, columns, names)
    cell: dict[str, Any] = {"tokens": reading.tokens, "windows": reading.windows, "top": top, **axes(mean)}
    cell |= {"mean": scores(mean), "peak": scores(peak)}
    if scorer.source.dialogue:
        cell["turns"] = []
        for number, (role, _) in enumerate(document.turns):
            known = reading.turns.get(number)
            n, own = (known[1], known[2] / known[1]) if known else (0, None)
            cell["turns"].append({"role": role, "tokens": n, **axes(own), "mean": scores(own)})
    return cell


def _top(mean: np.ndarray, columns: Sequence[int], names: Sequence[str]) -> list[str]:
    order = sorted(columns, key=lambda i: -mean[i])
    return [names[i] for i in order[:TOP]]


def _count(tally: Tally, document: Document, reading: _Reading, reason: str, *, row: int) -> None:
    facts, mean = tally.facts, reading.mean(*OWN)
    facts["rows"] += 1
    facts["empty"] += not document.turns
    facts["windows"] += reading.windows
    facts["cut"] += reading.windows > 1
    facts["tokens"] += sum(n for _, n, _ in reading.turns.values())
    if reason:
        tally.left_out[reason] = tally.left_out.get(reason, 0) + 1
        facts["unread"] += 1
    elif document.turns and mean is None:
        facts["unspoken"] += 1
    words = " ".join(next((words for role, words in document.turns if role in OWN), "")[: 2 * SHOWN].split())[:SHOWN]
    turns = [(role, sums / n) for _, (role, n, sums) in sorted(reading.turns.items())]
    nothing = np.full(len(tally.measures.names), np.nan)
    tally.document(row, words, nothing if mean is None else mean, reading.series, turns if len(document.turns) > 1 else [])


# ── a dataset ──


def score_corpus(
    engine: Engine,
    dataset: str | Path,
    *,
    vectors: ConceptVectors,
    out: str | Path,
    baseline: Baseline | None = None,
    scoring: Scoring = Scoring(),
    concepts: ConceptSet | None = None,
    rows: int = ROWS,
    command: str = "",
    fresh: bool = False,
) -> Scored:
    """Add emotion scores to a dataset, and report on it. Goes on where it stopped.

    Args:
        engine: The model of the vectors.
        dataset: What :class:`affectlens.dataset.Dataset` reads.
        vectors: Emotions, at their layer.
        out: A folder, or a file of the dataset's format: then the folder is beside it, ``FILE.run``.
        baseline: What z is stated against; None reads the neutral dialogues.
        scoring: What to score, and what to write.
        concepts: Families and ratings of the emotions; default: the bundled set.
        rows: Rows of a shard at most: what a killed run loses.
        command: The command line that goes on with this run.
        fresh: Discard what the folder holds.

    Raises:
        FormatError: The dataset cannot be read, a row is broken, or it is not clear what a document is.
        RuleError: The filter cannot be understood.
        AffectlensError: The folder was made with other settings, or holds something else.

    Example:
        >>> import affectlens as al
        >>> scored = al.score_corpus(engine, "chats.jsonl", vectors=vectors, out="scored")         # doctest: +SKIP
        >>> scored.report.print()                                                                   # doctest: +SKIP
    """
    data = Dataset(dataset)
    folder, file = _targets(Path(out), data)
    source = Source.of(data.columns, scoring, data.name)
    probe = Probe(vectors, template=engine.info.template is not None)
    if baseline is None:
        baseline = Baseline.measure(engine, neutral_dialogues(engine), probe=probe, source="neutral dialogues")
    measures = Measures.of(vectors.names, concepts or ConceptSet.load("emotions"))
    scorer = Scorer(scoring, source, probe, baseline, measures)
    if taken := [name for name in scorer.columns() if name in data.columns]:
        fix = "name another one with --column" if taken[0] == scoring.column else "rename it"
        raise FormatError(f"{data.name} has a column {taken[0]!r} already: {fix}")
    shards = data.plan(_looked(scorer), columns=() if data.kind not in TABLES else source.columns, rows=rows)
    what = {
        "dataset": data.id,
        "model": engine.info.fingerprint,
        "dtype": engine.info.dtype,
        "vectors": vectors_id(vectors),
        "layer": vectors.layer,
        "baseline": content_id(vars(baseline)),
        "families and ratings": measures.id,
        **{name: value for name, value in vars(scoring).items() if name not in ("text", "messages")},
        "columns": source.columns,
        "rows of a shard": rows,
    }
    with Directory.open(folder, what=what, command=command, fresh=fresh) as run:
        tally, written = _shards(engine, data, shards, scorer, run)
        if file is not None:
            _joined(data, written, file, run)
        report = _report(engine, data, scorer, tally, run)
        page = report.save(run.path)
    return Scored(file or folder / "data", tally.facts["rows"], tally.facts["kept"], report, page)


def _targets(out: Path, data: Dataset) -> tuple[Path, Path | None]:
    """The folder of the run, and the file that is wanted instead of a folder."""
    file = out if out.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".json") else None
    if file is not None and file.suffix not in (data.suffix, ".ndjson" if data.kind == "jsonl" else data.suffix):
        raise FormatError(f"{out}: a dataset of {data.kind} is written as {data.suffix}: give another --out, or a folder")
    folder = out.with_name(f"{out.name}.run") if file is not None else out
    sources = [each.resolve() for each in data.files]
    if any(out.resolve() == each or folder.resolve() in each.parents for each in sources):
        raise FormatError(f"{out} is what is to be read: choose another --out")
    if Path(data.name).is_dir() and Path(data.name).resolve() in (out.resolve(), *out.resolve().parents):
        raise FormatError(f"{out} lies in the dataset and would be read as a part of it: choose another --out")
    if file is not None and file.exists() and not (folder / "run.json").exists():
        raise FormatError(f"{file} exists already: choose another --out, or delete it")
    return folder, file


def _looked(scorer: Scorer) -> Callable[[Record, str], int]:
    """Checks a row before anything is read."""
    added = scorer.columns()

    def look(record: Record, place: str) -> int:
        if taken := [name for name in added if name in record]:
            fix = "name another one with --column" if taken[0] == scorer.scoring.column else "rename it"
            raise FormatError(f"{place} has a column {taken[0]!r} already: {fix}")
        return scorer.source.document(record, place).size

    return look


def _shards(engine: Engine, data: Dataset, shards: Sequence[Shard], scorer: Scorer, run: Directory) -> tuple[Tally, list[Path]]:
    """Make the shards that are missing; what all of them add up to, and the files that hold rows."""
    stage = run.stage("scored", {"shards": len(shards)})
    folder = run.path / "data"
    folder.mkdir(exist_ok=True)
    missing = set(stage.pending(len(shards), ".json"))
    for old in folder.iterdir():  # of a shard that was not finished, or of a run that was discarded
        if old.is_dir():
            continue
        if not old.stem.isdigit() or int(old.stem) in missing or int(old.stem) >= len(shards):
            old.unlink()
    # One reader for all: a dataset is read from front to end.
    parts = ((shard, data.read(shard, columns=scorer.source.columns)) for shard in shards if shard.number in missing)

    def make(each: tuple[Shard, Part]) -> None:
        shard, part = each
        columns, keep, tally = score_shard(engine, part, scorer, row=shard.row)
        file = folder / stage.shard_path(shard.number, data.suffix).name
        kept = int(keep.sum())
        if kept or not shard.number:  # the first one says what the columns are, also where nothing is kept
            part.write(file, keep, columns)
        there = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)} if file.exists() else {}
        record = {"rows": shard.rows, "kept": kept, "written": there, "tally": tally.as_dict()}
        write_json(stage.shard_path(shard.number, ".json"), record)

    with Progress() as progress:
        progress.start(len(missing), "shards")
        for _ in in_order(make, parts, at_once=engine.at_once):
            progress.advance()
    total = Tally(scorer.measures)
    written = []
    for path in stage.shards(len(shards), ".json"):
        record = read_json(path, fix="delete it and run again")
        try:
            total.add(Tally.from_dict(record["tally"], scorer.measures))
            if there := record["written"]:
                written.append(folder / there["file"])
                if not written[-1].exists() or written[-1].stat().st_size != there["bytes"]:
                    raise FormatError(f"{written[-1]} is not what was written: delete {path} and run again")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FormatError(f"{path} is broken ({error}): delete it and run again") from None
    if not stage.done:
        stage.finish({"rows": total.facts["rows"], "kept": total.facts["kept"]})
    return total, written


def _joined(data: Dataset, parts: Sequence[Path], file: Path, run: Directory) -> None:
    """One file of all shards; not written again where it is there as it was written."""
    record = run.path / "file.json"
    if record.exists() and file.exists():
        known = read_json(record, fix="delete it and run again")
        if known == {"file": file.name, "bytes": file.stat().st_size}:
            return
    data.join(parts, file)
    write_json(record, {"file": file.name, "bytes": file.stat().st_size})


def _report(engine: Engine, data: Dataset, scorer: Scorer, tally: Tally, run: Directory) -> Report:
    from affectlens.curation.drawing import checks, figures, tables
    from affectlens.report import Report

    vectors, name = scorer.probe.vectors, Path(data.name).name or data.name
    what = "conversations" if scorer.source.dialogue else "texts"
    return Report(
        f"Emotions in {name}",
        model={key: getattr(engine.info, key) for key in ("id", "family", "n_parameters", "n_layers", "dtype", "device")},
        vectors={"concepts": len(vectors), "layer": vectors.layer, "scores": scorer.baseline.note},
        checks=checks(tally, what, filtered=scorer.scoring.filter),
        findings=tally.findings(),
        tables=tables(tally, what, filtered=scorer.scoring.filter),
        figures=figures(tally),
        provenance={**provenance(), "command": run.command},
        resume=run.command,
    )
