"""Pooled residuals of many labelled texts: collected once, kept on disk, read layer by layer.

A collection is a folder of shards. Each shard is written atomically and depends only on its own texts, so a killed run resumes
at the first missing shard and ends in identical files; memory holds one shard however large the corpus is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.engine import Engine, Readout, Request, Where, batched, in_order
from affectlens.errors import FormatError
from affectlens.runs import atomic_write, content_id, read_json, write_json

SHARD = 96
"""Texts in one shard: what a killed run loses at most."""

TOKEN_SHARD = 4
"""The same where every token is kept: some hundred times as many rows a text."""

BRANCH = 64
"""Shards that are added up in one place before they are merged with others."""


@dataclass(frozen=True)
class Text:
    """A text with its labels. ``concept`` is what it conveys ("" for neutral text), ``topic`` what it is about."""

    id: str
    text: str
    concept: str = ""
    topic: str = ""


@dataclass
class Moments:
    """Sums that add up over shards and machines: for each concept count and sum of residuals, in float64.

    Args:
        names: Concepts, in order.
        counts: ``(N,)`` texts of each.
        sums: ``(N, L, D)``.
    """

    names: tuple[str, ...]
    counts: np.ndarray
    sums: np.ndarray

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of texts together."""
        if self.names != other.names:
            raise FormatError("moments of different concepts do not add up: select the same concepts first")
        return Moments(self.names, self.counts + other.counts, self.sums + other.sums)

    @classmethod
    def together(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all parts, merged as a tree: of n parts as many as n has binary digits are held at a time.

        Raises:
            FormatError: There is no part, or they are of different concepts.

        Example:
            >>> one = Moments(("calm",), np.ones(1), np.ones((1, 2, 3)))
            >>> Moments.together(one for _ in range(1000)).counts.tolist()
            [1000.0]
        """
        tree: list[tuple[int, Moments]] = []
        for part in parts:
            size = 1
            while tree and tree[-1][0] == size:
                part, size = tree.pop()[1].merge(part), 2 * size
            tree.append((size, part))
        if not tree:
            raise FormatError("there are no moments to add up: collect activations first")
        whole = tree.pop()[1]
        while tree:
            whole = tree.pop()[1].merge(whole)
        return whole

    @property
    def means(self) -> np.ndarray:
        """Mean residual of each concept, ``(N, L, D)``; a concept without texts has none, which is refused."""
        if not self.counts.all():
            raise FormatError(f"there is no text of {self.names[int(self.counts.argmin())]!r}: leave it out or collect some")
        return self.sums / self.counts[:, None, None]


class Activations:
    """Pooled residuals ``(n, L, D)`` with a concept and a topic for each text.

    Args:
        folder: Where the shards lie.

    Raises:
        FormatError: The folder is not a complete collection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json")
        try:
            self.layers: tuple[int, ...] = tuple(index["layers"])
            self.width: int = index["width"]
            self.sizes: list[int] = index["sizes"]
            self.ids: list[str] = index["ids"]
            self.concepts = np.array(index["concepts"], dtype=object)
            self.topics = np.array(index["topics"], dtype=object)
            self.n_tokens = np.array(index["n_tokens"], dtype=np.int64)
        except KeyError as error:
            raise FormatError(f"{self.folder} is not a collection of activations (no {error}): collect it again") from None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts that occur, sorted."""
        return tuple(sorted(set(self.concepts.tolist())))

    def shards(self) -> Iterator[tuple[slice, Path]]:
        """Each shard's rows in the whole and its file."""
        start = 0
        for i, size in enumerate(self.sizes):
            yield slice(start, start + size), self.folder / f"{i:05d}.safetensors"
            start += size

    def layer_shards(self, layer: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows and residuals ``(rows, D)`` of one shard after the other at one layer; only this layer is read from disk."""
        for rows, path in self.shards():
            yield rows, _read(path, "values", self.layers.index(layer))

    def layer(self, layer: int) -> np.ndarray:
        """Residuals of every text at one layer, ``(n, D)`` float32."""
        return np.concatenate([values for _, values in self.layer_shards(layer)])

    def token_norms(self) -> np.ndarray:
        """Mean residual norm over ordinary tokens at each layer, ``(L,)``: the unit of strength.

        Weighted by tokens: every token of every text counts the same.
        """
        total = np.zeros(len(self.layers))
        for rows, path in self.shards():
            total += (_read(path, "norms").astype(np.float64) * self.n_tokens[rows, None]).sum(0)
        return total / self.n_tokens.sum()

    def moments(self, names: Sequence[str]) -> Moments:
        """Counts and float64 sums of each concept, one shard in memory at a time."""
        row_of = {name: i for i, name in enumerate(names)}

        def added_up(shards: Iterable[tuple[slice, Path]]) -> Moments:
            out = Moments(tuple(names), np.zeros(len(names)), np.zeros((len(names), len(self.layers), self.width)))
            for rows, path in shards:
                for value, concept in zip(_read(path, "values"), self.concepts[rows], strict=True):
                    if (i := row_of.get(concept)) is not None:
                        out.counts[i] += 1
                        out.sums[i] += value
            return out

        return Moments.together(map(added_up, batched(self.shards(), BRANCH)))


def _read(path: Path, name: str, layer: int | None = None) -> np.ndarray:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as shard:
            if layer is None or not shard.get_slice(name).get_shape()[0]:  # no rows: nothing that could be sliced
                values = shard.get_tensor(name)
                return values if layer is None else values[:, layer]
            return shard.get_slice(name)[:, layer, :]
    except (SafetensorError, FileNotFoundError) as error:
        raise FormatError(f"{path} is broken or missing ({error}): delete its folder and run again") from None


def collect(
    engine: Engine,
    texts: Iterable[Text],
    folder: Path,
    *,
    first_token: int = 50,
    per_token: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> Activations:
    """Read every text at every layer (and the embedding, layer -1) in one pass and keep the means.

    Args:
        engine: The model.
        texts: What to read, a stream if there are many: of each only its labels are kept. Texts shorter than ``first_token``
            tokens are left out and counted.
        folder: Where the shards go; shards of the same texts, model and options that are there are kept.
        first_token: Read from the text's own n-th token on, counted from 1 (the paper's 50; method 3).
        per_token: One row for each token instead of one mean for each text.
        advance: Told how many texts were finished.

    Returns:
        The collection, all shards on disk.

    Raises:
        FormatError: No text is long enough, or two have the same id.

    Example:
        >>> import tempfile, affectlens as al
        >>> texts = [Text("a", "word " * 60, "calm"), Text("b", "other " * 60, "sad")]
        >>> collect(al.open_engine("toy"), texts, Path(tempfile.mkdtemp())).layer(3).shape
        (2, 64)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = tuple(range(-1, engine.info.n_layers))
    where = Where(after=first_token - 1)
    readouts = (Readout(layers, where, "none" if per_token else "mean"), Readout(layers, where, "norm"))
    labels: dict[str, tuple[str, str]] = {}

    def shards() -> Iterator[tuple[int, list[Text]]]:
        for number, chunk in enumerate(batched(texts, TOKEN_SHARD if per_token else SHARD)):
            for text in chunk:
                if text.id in labels:
                    raise FormatError(f"two texts have the id {text.id!r}: give each its own, or their labels get mixed up")
                labels[text.id] = text.concept, text.topic
            yield number, chunk

    def shard(each: tuple[int, list[Text]]) -> tuple[int, dict[str, Any]]:
        number, chunk = each
        part = folder / f"part{number:05d}.json"
        asked = content_id(
            [engine.info.fingerprint, engine.info.dtype, first_token, per_token, [(text.id, text.text) for text in chunk]]
        )
        if not part.exists() or read_json(part)["texts"] != asked:
            _collect_shard(engine, chunk, readouts, part, asked)
        return len(chunk), read_json(part)

    parts = []
    for n, found in in_order(shard, shards(), at_once=engine.at_once):
        parts.append(found)
        advance(n)
    rows = [row for part in parts for row in part["rows"]]
    if not rows:
        raise FormatError(f"no text has {first_token} tokens: give longer texts or a lower first token")
    write_json(
        folder / "index.json",
        {
            "layers": layers,
            "width": engine.info.width,
            "sizes": [len(part["rows"]) for part in parts],
            "ids": [row["id"] for row in rows],
            "concepts": [labels[row["id"]][0] for row in rows],
            "topics": [labels[row["id"]][1] for row in rows],
            "n_tokens": [row["n_tokens"] for row in rows],
            "too_short": sum(part["too_short"] for part in parts),
        },
    )
    return Activations(folder)


def _collect_shard(engine: Engine, chunk: Sequence[Text], readouts: tuple[Readout, ...], part: Path, asked: str) -> None:
    from safetensors.numpy import save

    values, norms, rows = [], [], []
    too_short = 0
    for text, result in zip(chunk, engine.run(Request(t.text, readouts=readouts) for t in chunk), strict=True):
        mean, norm = result.readings
        n_tokens = len(mean.positions)
        if n_tokens == 0:
            too_short += 1
            continue
        per_token = mean.values.ndim == 3
        count = n_tokens if per_token else 1
        values.append(mean.values.transpose(1, 0, 2) if per_token else mean.values[None])
        norms.append(np.repeat(norm.values[None], count, axis=0))
        rows += [{"id": text.id, "n_tokens": 1 if per_token else n_tokens}] * count
    width, n_layers = engine.info.width, len(readouts[0].layers)
    blob = save(
        {
            # safetensors copies memory and ignores strides, and concatenating transposed arrays keeps them transposed.
            "values": np.ascontiguousarray(np.concatenate(values)) if values else np.zeros((0, n_layers, width), np.float32),
            "norms": np.concatenate(norms) if norms else np.zeros((0, n_layers), np.float32),
        }
    )
    with atomic_write(part.with_name(part.stem[4:] + ".safetensors")) as temporary:
        temporary.write_bytes(blob)
    # The part file comes last: it says that the shard beside it is whole and of these texts.
    write_json(part, {"texts": asked, "rows": rows, "too_short": too_short})
