"""The strongest passages of a corpus for every direction, read as a stream: memory does not grow with the corpus.

Texts are cut into passages, and each passage is read once. Kept of it are the mean score of every concept, in shards that are
written atomically, and, if it is among the best for a concept so far, its text with a score for each token. A histogram of all
token scores gives percentiles of the corpus. All of this is saved after every shard, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.corpus import Document, cut
from affectlens.engine import Engine, Reading, Request, Where, batched, plain_data
from affectlens.errors import FormatError
from affectlens.runs import atomic_write, content_id
from affectlens.vectors import ConceptVectors

SHARD = 512
"""Passages in one shard: what a killed run loses at most."""

BATCH = 64
"""Passages whose token scores are held together."""

BEST = 7
"""Passages that are kept for each concept."""

SHORT = 8
"""A passage of fewer tokens is not ranked: the mean over a few tokens is high, or low, by chance."""

WIDTH = 0.001
"""Of a bin of the histogram: percentiles are exact to this."""

WORDS = Where(after=1)
"""What is read: all but a passage's first token, which is an attention sink."""

_BINS = round(2 / WIDTH)
_COLUMNS = ("number", "document", "passage", "sort", "labels", "tokens", "text")
"""Of a shard, before one for each concept, of which "kind" is one."""


@dataclass(frozen=True, eq=False)
class Hit:
    """A passage among the best for a concept.

    Args:
        score: Mean over its tokens.
        document: Id of the document.
        passage: Its number in the document.
        text: Of the passage.
        spans: Where in the text each token stands that was read, ``(T, 2)``.
        scores: Of these tokens on the concept, ``(T,)``.
    """

    score: float
    document: str
    passage: int
    text: str
    spans: np.ndarray
    scores: np.ndarray

    def marked(self, threshold: float, *, most: int | None = None) -> str:
        """The text with ⟦ ⟧ around what scores above a threshold.

        Args:
            threshold: Usually a percentile of the corpus.
            most: Show only the stretch of so many tokens with the highest mean.

        Example:
            >>> spans = np.array([[4, 9], [10, 12], [13, 18]])
            >>> Hit(0.2, "a", 0, "The storm is awful.", spans, np.array([0.3, 0.25, 0.05])).marked(0.2)
            'The ⟦storm is⟧ awful.'
        """
        above = np.zeros(len(self.text) + 1, dtype=bool)
        for (start, end), score in zip(self.spans, self.scores, strict=True):
            above[start:end] |= score > threshold
        # Tokens come without the space before them: between two that are marked it is marked, at the ends it is not.
        last = None
        for i, character in enumerate(self.text):
            if character.isspace():
                above[i] = False
            elif above[i]:
                if last is not None and self.text[last + 1 : i].isspace():
                    above[last + 1 : i] = True
                last = i
        first, until = 0, len(self.text)
        if most is not None and len(self.scores) > most:
            sums = np.cumsum([0.0, *self.scores])
            at = int((sums[most:] - sums[:-most]).argmax())
            first, until = (int(self.spans[at, 0]) if at else 0), int(self.spans[at + most - 1, 1])
        runs = itertools.groupby(range(first, until), key=lambda i: bool(above[i]))
        parts = [(mark, self.text[(own := list(places))[0] : own[-1] + 1]) for mark, places in runs]
        shown = "".join(f"⟦{part}⟧" if mark else part for mark, part in parts)
        return "… " * (first > 0) + shown.strip() + " …" * (until < len(self.text))

    def tokens(self) -> tuple[list[str], list[float | None]]:
        """The text in pieces, one for each token, and their scores; None where nothing was read. Together they are the text."""
        pieces: list[str] = []
        scores: list[float | None] = []
        end = 0
        for (start, stop), score in zip(self.spans.tolist(), self.scores.tolist(), strict=True):
            if not pieces and start > 0:  # the first token was not read
                pieces, scores, end = [self.text[:start]], [None], start
            if stop > end:  # several tokens may share one character: the first of them stands for it
                pieces.append(self.text[end:stop])
                scores.append(score)
                end = stop
        if end < len(self.text):
            return [*pieces, self.text[end:]], [*scores, None]
        return pieces, scores


@dataclass(frozen=True, eq=False)
class Scored:
    """A document with labels: its texts, and the mean score of its tokens on each concept, ``(N,)``."""

    number: int
    id: str
    kind: str
    labels: tuple[str, ...]
    text: str
    tokens: int
    scores: np.ndarray


class Search:
    """What was found in a corpus.

    Attributes:
        names: The ``N`` concepts.
        best: For each concept its best passages, the best first; equal texts count once.
        counts: Histogram of all token scores, ``(N, bins)``.
        passages, documents, labelled, tokens: How many were read; ``labelled`` are documents with labels.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], key: str) -> None:
        self.folder, self.names, self._key = folder, names, key
        self.counts = np.zeros((len(names), _BINS), dtype=np.int64)
        self.best: list[list[Hit]] = [[] for _ in names]
        self.passages = self.documents = self.labelled = self.tokens = 0
        self._load()

    def percentile(self, share: float) -> np.ndarray:
        """The score that a share of all tokens does not exceed, for each concept, ``(N,)``; exact to :data:`WIDTH`."""
        reached = np.cumsum(self.counts, axis=1)
        wanted = share * reached[:, -1]
        place = (reached < wanted[:, None]).sum(axis=1).clip(max=_BINS - 1)
        rows = np.arange(len(self.names))
        inside = (wanted - (reached - self.counts)[rows, place]) / np.maximum(self.counts[rows, place], 1)
        return np.asarray(-1 + WIDTH * (place + inside))

    def with_labels(self) -> Iterator[Scored]:
        """The documents that have labels, one after the other; those of which no token was read are left out."""
        rows = (row for path in sorted(self.folder.glob("passages-*.parquet")) for row in _labelled(path))
        for number, group in itertools.groupby(rows, key=lambda row: row[0]["number"]):
            members = list(group)
            first, n = members[0][0], sum(row["tokens"] for row, _ in members)
            if n:
                mean = sum(row["tokens"] * own.astype(np.float64) for row, own in members if row["tokens"]) / n
                text = "\n".join(row["text"] for row, _ in members)
                yield Scored(number, first["document"], first["sort"], tuple(first["labels"]), text, n, np.asarray(mean))

    # ── while it is read ──

    def add(self, passages: list[_Passage], read: Iterable[tuple[list[_Passage], _Scores]]) -> None:
        """Take a shard into account and keep both on disk."""
        means, lengths = [], []
        for part, scores in read:
            means.append(scores.means)
            lengths.append(scores.lengths)
            bins = np.clip(((scores.tokens + 1) / WIDTH).astype(np.int64), 0, _BINS - 1)
            flat = (bins + np.arange(len(self.names)) * _BINS).ravel()
            self.counts += np.bincount(flat, minlength=self.counts.size).reshape(self.counts.shape)
            self.tokens += len(scores.tokens)
            self._rank(part, scores)
        path = self.folder / f"passages-{self.passages:09d}.parquet"
        _write(path, self.names, passages, np.concatenate(lengths), np.concatenate(means))
        starts = [each.document for each in passages if each.passage == 0]
        self.passages += len(passages)
        self.documents += len(starts)
        self.labelled += sum(bool(document.labels) for document in starts)
        self._save()  # last: it says that the shard is whole

    def _rank(self, passages: list[_Passage], scores: _Scores) -> None:
        lowest = np.array([own[-1].score if len(own) == BEST else -np.inf for own in self.best])
        rows = np.flatnonzero(scores.lengths >= SHORT)
        better = scores.means[rows] > lowest
        for concept in np.flatnonzero(better.any(axis=0)):
            own = self.best[concept]
            candidates = rows[better[:, concept]]
            for row in candidates[np.argsort(-scores.means[candidates, concept], kind="stable")]:
                score, passage = float(scores.means[row, concept]), passages[row]
                if len(own) == BEST and score <= own[-1].score:
                    break
                if any(passage.text == hit.text for hit in own):
                    continue
                tokens = scores.tokens[scores.starts[row] :][: scores.lengths[row], concept]
                hit = Hit(score, passage.document.id, passage.passage, passage.text, scores.spans[row], tokens.copy())
                own.append(hit)
                own.sort(key=lambda hit: -hit.score)
                del own[BEST:]

    # ── files ──

    def _save(self) -> None:
        from safetensors.numpy import save

        hits = [hit for own in self.best for hit in own]
        none = (np.zeros((0, 2), np.int32), np.zeros(0, np.float32))
        arrays = {
            "counts": self.counts,
            "spans": np.concatenate([none[0], *(hit.spans for hit in hits)]),
            "scores": np.concatenate([none[1], *(hit.scores for hit in hits)]),
        }
        found = {
            "key": self._key,
            "numbers": [self.passages, self.documents, self.labelled, self.tokens],
            "best": [[[hit.score, hit.document, hit.passage, hit.text, len(hit.scores)] for hit in own] for own in self.best],
        }
        with atomic_write(self.folder / "search.safetensors") as temporary:
            temporary.write_bytes(save(arrays, {"search": json.dumps(found)}))

    def _load(self) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / "search.safetensors"
        if path.exists():
            try:
                with safe_open(path, framework="numpy") as file:
                    found = json.loads(file.metadata()["search"])
                    arrays = {name: file.get_tensor(name) for name in ("counts", "spans", "scores")}
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{path} is broken ({error}): delete it and run again") from None
            if found["key"] == self._key:
                self.counts = arrays["counts"]
                self.passages, self.documents, self.labelled, self.tokens = found["numbers"]
                ends = np.cumsum([0, *(hit[-1] for own in found["best"] for hit in own)])
                places = (slice(a, b) for a, b in itertools.pairwise(ends.tolist()))
                self.best = [
                    [
                        Hit(score, document, passage, text, arrays["spans"][at := next(places)], arrays["scores"][at])
                        for score, document, passage, text, _ in own
                    ]
                    for own in found["best"]
                ]
        if not self.passages:  # of another corpus or other vectors, or nothing that was finished
            for old in [path, *self.folder.glob("passages-*.parquet")]:
                old.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Passage:
    number: int
    document: Document
    passage: int
    text: str


@dataclass(frozen=True, eq=False)
class _Scores:
    """Of some passages: scores of all their tokens ``(ΣT, N)``; for each where they begin, how many they are, mean, spans."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    means: np.ndarray
    spans: list[np.ndarray]


def search(engine: Engine, vectors: ConceptVectors, documents: Iterable[Document], folder: Path, *, identity: Any) -> Search:
    """Read a corpus and find the strongest passages of every concept at the vectors' layer, by centred cosine.

    Args:
        engine: The model of the vectors.
        vectors: Their concepts are looked for.
        documents: The corpus; the same documents in the same order on every call with the same ``identity``.
        folder: Where shards lie; what it holds of this corpus, model and these vectors is not read again.
        identity: What tells this corpus from another one, plain data.

    Example:
        >>> from affectlens.corpus import stream
        >>> found = search(engine, vectors, stream("texts/"), Path("found"), identity="texts")     # doctest: +SKIP
        >>> found.best[vectors.index("desperate")][0].marked(0.1)                                    # doctest: +SKIP
    """
    readout = vectors.readout(where=WORDS, pool="none")
    info = engine.info
    key = content_id([info.fingerprint, info.dtype, vectors.names, plain_data(readout), identity])
    folder.mkdir(parents=True, exist_ok=True)
    found = Search(folder, vectors.names, key)
    every = (
        _Passage(number, document, passage, text)
        for number, document in enumerate(documents)
        for passage, text in enumerate(cut(document.text))
    )

    def read(passages: list[_Passage]) -> Iterator[tuple[list[_Passage], _Scores]]:
        results = engine.run(Request(passage.text, readouts=(readout,)) for passage in passages)
        for part in batched(zip(passages, results, strict=True), BATCH):
            readings = [result.readings[0] for _, result in part]
            whole = Reading(
                np.concatenate([reading.values for reading in readings], axis=1),
                np.concatenate([reading.norms for reading in readings], axis=1),
                np.concatenate([reading.positions for reading in readings]),
            )
            tokens = vectors.scores(whole).astype(np.float32)
            lengths = np.array([len(reading.positions) for reading in readings])
            starts = np.cumsum(lengths) - lengths
            nothing = np.full(len(vectors), np.nan)
            means = [tokens[a : a + n].mean(axis=0) if n else nothing for a, n in zip(starts, lengths, strict=True)]
            spans = [np.array(result.layout.offsets, np.int32).reshape(-1, 2)[result.readings[0].positions] for _, result in part]
            yield [passage for passage, _ in part], _Scores(tokens, starts, lengths, np.array(means, np.float32), spans)

    for shard in batched(itertools.islice(every, found.passages, None), SHARD):
        found.add(shard, read(shard))
    return found


def _write(path: Path, names: tuple[str, ...], passages: list[_Passage], lengths: np.ndarray, means: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (p.number, p.document.id, p.passage, p.document.kind, p.document.labels, n, p.text if p.document.labels else None)
        for p, n in zip(passages, lengths.tolist(), strict=True)
    ]
    kinds = (pa.int64(), pa.string(), pa.int64(), pa.string(), pa.list_(pa.string()), pa.int64(), pa.string())
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_arrays([*columns, *map(pa.array, means.T)], [*_COLUMNS, *names]), temporary)


def _labelled(path: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The rows with labels of a shard: what they are, and their scores."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.read().columns
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{path} is broken ({error}): delete its folder and run again") from None
    facts = [column.to_pylist() for column in columns[: len(_COLUMNS)]]
    scores = np.stack([column.to_numpy() for column in columns[len(_COLUMNS) :]], axis=1)
    for row, own in zip(zip(*facts, strict=True), scores, strict=True):
        record = dict(zip(_COLUMNS, row, strict=True))
        if record["labels"]:
            yield record, own
