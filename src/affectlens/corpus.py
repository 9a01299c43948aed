"""Collections of texts: the ones that come with affectlens, and files of your own.

The bundled files are listed in :data:`FILES` and explained, field by field, in ``data/corpus/README.md``. All of it is free under
CC BY 4.0. ``affectlens corpus check`` (:mod:`affectlens.audit`) verifies them, or a corpus of yours.

:func:`stream` reads any corpus, one text after the other, so it may be larger than memory; :func:`cut` makes passages of texts.
"""

from __future__ import annotations

import csv
import importlib.resources
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from affectlens.activations import Text
from affectlens.errors import FormatError, MissingExtra, UnknownName

FILES: dict[str, str] = {
    "stories": "12 stories for each of the 171 emotions, which none of them names",
    "neutral": "matter-of-fact dialogues between a person and an assistant",
    "neutral_heldout": "more of them on other topics, on which nothing is fitted: to try rules with",
    "speakers": "dialogues of two speakers, each with an emotion of their own",
    "concealment": "short scenes in which an emotion is hidden, felt openly, or kept apart from what is spoken of",
    "scenarios": "messages of users that imply an emotion",
    "ladders": "messages with a number that makes things better or worse, and controls in which it does not matter",
    "activities": "things a model may be asked to do, in eight categories",
    "openings": "questions and beginnings of stories whose next word can be the name of a feeling",
    "reactions": "replies that show an emotion, that answer somebody who has it, and neutral ones",
    "scripts": "short scenes in which somebody is asked how they are, with replies that deny it, admit it, or sound glad",
    "contrasts": "messages that tell what a reading follows: user or reply, the negated, the bound or the changed word",
    "profile": "hard and neutral prompts for comparing checkpoints",
    "manner": "24 texts for each of eight manners of dealing with others",
    "blind": "what a reader who saw only the text and twelve words took the emotion of 342 stories for",
}
"""The bundled files: name and content."""

STORIES = {"emotions": "stories", "manner": "manner"}
"""Bundled concept sets and the bundled file with their stories."""

QUICK = 4
"""The first look reads so many stories of each emotion: one by each brief, each person in each tense."""


def bundled(name: str) -> Path:
    """Where a bundled file lies.

    Raises:
        UnknownName: There is no such file.

    Example:
        >>> bundled("stories").name
        'stories.jsonl'
    """
    if name not in FILES:
        raise UnknownName("bundled corpus file", name, tuple(FILES))
    return Path(str(importlib.resources.files("affectlens") / "data" / "corpus" / f"{name}.jsonl"))


def load(name: str) -> list[dict[str, Any]]:
    """The records of a bundled file as plain data.

    Raises:
        UnknownName: There is no such file.

    Example:
        >>> sorted(load("scenarios")[0])
        ['concept', 'held_out', 'id', 'text']
    """
    return list(records(bundled(name)))


def first_look(name: str) -> list[dict[str, Any]]:
    """What a first look (``--quick``) reads of a bundled file.

    Dialogues are shortened, not left out: each emotion has but two of them on either side, and the study of speakers needs both.

    Raises:
        UnknownName: There is no such file.

    Example:
        >>> len(first_look("speakers")) == len(load("speakers"))
        True
    """
    found = load(name)
    if name == "speakers":
        return [{**record, "turns": record["turns"][:6]} for record in found]
    return found[:: {"neutral": 4, "manner": 3}.get(name, 1)]


def read_texts(path: Path, *, labelled: bool) -> list[Text]:
    """Read texts from a JSONL or parquet file, or from every such file of a folder, in the order of the names.

    Args:
        path: File or folder.
        labelled: Whether each record must name its concept.

    Raises:
        FormatError: Nothing there, nothing in it, or a record without its fields; names file and line.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = file.write_text('{"text": "It rained.", "concept": "calm"}')
        >>> read_texts(file, labelled=True)[0].concept
        'calm'
    """
    path = Path(path)
    texts = [text for file in files_of(path) for text in _read_file(file, path, labelled)]
    if not texts:
        raise FormatError(f"{path} holds no texts: each JSONL line or parquet row needs text{' and concept' if labelled else ''}")
    if len({text.id for text in texts}) < len(texts):
        texts = [replace(text, id=f"c{n:06d}") for n, text in enumerate(texts)]
    return texts


RECORDS = (".jsonl", ".parquet")
READABLE = (*RECORDS, ".txt", ".tsv", ".csv")
"""What :func:`stream` reads in a folder."""

NAMES = "labels.txt"
"""Names of numbered labels, one a line; beside a file of texts it is no text."""


def files_of(path: Path, suffixes: tuple[str, ...] = RECORDS) -> list[Path]:
    """The file itself, or the files of a folder that end so (by default JSONL and parquet), sorted.

    Raises:
        FormatError: It does not exist.
    """
    if path.is_dir():
        found = (f for f in path.rglob("*") if f.suffix in suffixes and not f.name.startswith(".") and f.name != NAMES)
        return sorted(found)
    if not path.exists():
        raise FormatError(f"{path} does not exist: name a JSONL or parquet file, or a folder of them")
    return [path]


def _read_file(file: Path, root: Path, labelled: bool) -> Iterator[Text]:
    name = file.relative_to(root).as_posix() if root.is_dir() else file.name
    for number, record in enumerate(records(file), start=1):
        concept = record.get("concept") or record.get("emotion") or ""
        if not isinstance(record.get("text"), str) or not record["text"].strip():
            raise FormatError(f"{file}, record {number} has no text: every record needs a text field")
        if labelled and not (isinstance(concept, str) and concept):
            raise FormatError(f"{file}, record {number} names no concept: every story needs a concept (or emotion) field")
        if any("\ud800" <= character <= "\udfff" for character in record["text"]):
            raise FormatError(f"{file}, record {number} holds half a character (a lone surrogate): save the text as UTF-8 again")
        yield Text(str(record.get("id") or f"{name}:{number}"), record["text"], str(concept), str(record.get("topic") or ""))


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL or parquet file as they are, one after the other: it may be larger than memory.

    Raises:
        FormatError: Not readable, not UTF-8, or no JSON object on a line; names the line.
    """
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"{file} is no readable parquet file ({error}): write it again") from None
        return
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file}, line {number} is no JSON ({error}): one JSON object a line") from None
        if not isinstance(record, dict):
            raise FormatError(f"{file}, line {number} is no JSON object: one object a line, with a text field")
        yield record


def _lines(file: Path) -> Iterator[str]:
    try:
        # Only "\n" ends a line: JSON may hold other line separators. Windows editors put a mark in front.
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{file} cannot be read ({error}): save it as UTF-8") from None


# ── any corpus ──


@dataclass(frozen=True)
class Document:
    """One text of a corpus. ``labels`` say what its author or its readers found in it; most corpora have none.

    ``kind`` tells sorts of text apart that a comparison should not mix.
    """

    id: str
    text: str
    labels: tuple[str, ...] = ()
    kind: str = ""


TEXT, TURNS = ("text", "content"), ("turns", "messages", "conversation", "conversations")
LABELS = ("labels", "label", "concept", "emotion")
COLUMNS = ("text", "labels", "id")
"""Columns of a table without a header."""

BLOCK = 2**17
"""Characters of a plain text that are read at a time."""


def stream(source: str | Path) -> Iterator[Document]:
    """Read a corpus, one text after the other, in the order of its files.

    Args:
        source: A file, a folder of files, or a data set of the Hugging Face Hub as ``org/name`` or ``org/name:split`` (default:
            ``train``; needs the package ``datasets``). A JSONL or parquet record has a ``text`` (or ``content``), or turns
            (``turns``, ``messages``, ``conversation``, ``conversations``: a speaker and words each), and perhaps ``labels``
            (or ``label``, ``concept``, ``emotion``): one or a list. A ``.tsv`` or ``.csv`` table has a header with a ``text``
            column, or no header and the columns text, labels (separated by commas), id. Labels that are numbers count the
            lines of ``labels.txt`` beside the file, from 0. A ``.txt`` file is plain text. Empty texts are left out.

    Raises:
        FormatError: Nothing there, nothing in it, or a record without a text; names file and record.
        MissingExtra: A data set is named and ``datasets`` is not installed.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "labels.txt").write_text("joy\\nanger")
        >>> _ = (folder / "dev.tsv").write_text("So good!\\t0\\tc1\\nNo. Go away.\\t1\\tc2\\n")
        >>> [(document.text, document.labels) for document in stream(folder)]
        [('So good!', ('joy',)), ('No. Go away.', ('anger',))]
    """
    path = Path(source)
    if path.exists():
        documents: Iterator[Document] = (text for file in files_of(path, READABLE) for text in _documents(file, path))
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", str(source)) and path.suffix not in READABLE:
        documents = _dataset(str(source))
    else:
        raise FormatError(f"{source} does not exist: name a file, a folder, or a data set as org/name or org/name:split")
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise FormatError(f"{source} holds no texts: give {', '.join(READABLE)} files with something in them")


def identity(source: str | Path) -> list[Any]:
    """What tells a corpus from another one or from itself before a change: names, sizes and times, as files may be large.

    Raises:
        FormatError: A file in it cannot be looked at.
    """
    path = Path(source)
    if not path.exists():
        return [str(source)]
    try:
        states = [(str(file), file.stat()) for file in files_of(path, READABLE)]
    except OSError as error:
        raise FormatError(f"{source} cannot be read ({error}): check its files") from None
    return [str(source), [[name, state.st_size, state.st_mtime_ns] for name, state in states]]


def read_labels(file: str | Path) -> dict[str, tuple[str, ...]]:
    """What the labels of a corpus mean: a TOML file with a table ``[labels]``, label to concept or concepts.

    Raises:
        FormatError: The file is no TOML, or has no such table.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "labels.toml"
        >>> _ = file.write_text('[labels]\\nanger = ["angry", "furious"]\\nneutral = []')
        >>> read_labels(file)
        {'anger': ('angry', 'furious'), 'neutral': ()}
    """
    fix = 'write [labels], and under it lines like anger = ["angry"]'
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8")).get("labels")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(f"{file} is no TOML that can be read ({error}): {fix}") from None
    if not isinstance(table, dict) or not table:
        raise FormatError(f"{file} has no table of labels: {fix}")
    meaning = {}
    for label, value in table.items():
        concepts = [value] if isinstance(value, str) else value
        if not isinstance(concepts, list) or not all(isinstance(name, str) for name in concepts):
            raise FormatError(f"{file}: {label} is neither a concept nor a list of concepts: {fix}")
        meaning[label] = tuple(concepts)
    return meaning


def _documents(file: Path, root: Path) -> Iterator[Document]:
    name = file.relative_to(root).as_posix() if root.is_dir() else file.name
    if file.suffix == ".txt":
        yield from _blocks(file, name)
        return
    numbered = file.with_name(NAMES)
    names = {str(i): line.strip() for i, line in enumerate(_lines(numbered))} if numbered.exists() else {}
    rows = _rows(file) if file.suffix in (".tsv", ".csv") else records(file)
    for number, record in enumerate(rows, start=1):
        yield from document_of(record, f"{name}:{number}", names)


def document_of(record: Mapping[str, Any], where: str, names: Mapping[str, str] = {}, kind: str = "") -> Iterator[Document]:
    """The document that a record holds; none when its text is empty.

    Args:
        record: Its fields as :func:`stream` knows them.
        where: Stands in for a missing id, and names the record in an error.
        names: Label to its name, where labels are numbers.
        kind: Of the document.

    Raises:
        FormatError: The record has no text.
    """
    text = next((record[key] for key in TEXT if isinstance(record.get(key), str)), None)
    if text is None:
        turns = next((record[key] for key in TURNS if isinstance(record.get(key), list)), None)
        if turns is None:
            raise FormatError(f"{where} has no text: every record needs a text field, or messages")
        text = "\n\n".join(map(_turn, turns))
    found = next((record[key] for key in LABELS if record.get(key) not in (None, "", [])), ())
    labels = (str(label) for label in (found if isinstance(found, list | tuple) else [found]))
    if text.strip():
        id, own = _whole(str(record.get("id") or where)), dict.fromkeys(_whole(names.get(label, label)) for label in labels)
        yield Document(id, _whole(text), tuple(own), kind)


def _whole(text: str) -> str:
    """Half characters (lone surrogates) as question marks: no file could hold them."""
    return text.encode("utf-8", "replace").decode()


def _turn(turn: Any) -> str:
    if isinstance(turn, Mapping):
        turn = [turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))]
    who, words = turn if isinstance(turn, list | tuple) and len(turn) == 2 else ("", turn)
    return f"{who}: {words}" if who else str(words)


def csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Rows of CSV lines. The standard library's limit of 128 kB a field is lifted, for a text may be longer."""
    csv.field_size_limit(2**31 - 1)
    return csv.reader(lines, strict=True)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    lines = _lines(file)
    # Tab-separated files quote nothing: a quotation mark in them is part of the text.
    rows = (line.rstrip("\r\n").split("\t") for line in lines) if file.suffix == ".tsv" else csv_rows(lines)
    header: list[str] | None = None
    try:
        for row in rows:
            if header is None:
                header = row if "text" in row else list(COLUMNS)
                if header is row:
                    continue
            record: dict[str, Any] = dict(zip(header, row, strict=False))
            for key in LABELS:
                if key in record:
                    record[key] = [label.strip() for label in record[key].split(",") if label.strip()]
            if row:
                yield record
    except csv.Error as error:
        raise FormatError(f"{file} is no table that can be read ({error}): write it as JSONL") from None


def _blocks(file: Path, name: str) -> Iterator[Document]:
    """A plain text, which may be one line of any length, in blocks that end with a line where there are lines."""
    try:
        with file.open(encoding="utf-8-sig") as text:
            number = 0
            while block := text.read(BLOCK):
                number += 1
                block += text.readline(BLOCK)
                if block.strip():
                    yield Document(f"{name}:{number}", block)
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{file} cannot be read ({error}): save it as UTF-8") from None


def _dataset(source: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets") from None
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        # What the labels of a data set are called stands in its features, under a list or not.
        kinds = {key: getattr(feature, "feature", feature) for key, feature in (rows.features or {}).items()}
        called = next((kinds[key].names for key in LABELS if hasattr(kinds.get(key), "names")), ())
        names = {str(i): label for i, label in enumerate(called)}
        for number, record in enumerate(rows, start=1):
            yield from document_of(record, f"{source}, record {number}", names)
    except (OSError, ValueError) as error:  # no such data set, configuration or split; no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"{source} is neither here nor a data set that can be loaded ({reason}): check the name") from None


PASSAGE = 1000
"""Bytes of UTF-8 in a passage at most: about 230 tokens of English, and never more than 1,000 tokens of anything."""

_SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s+|\n+|[。！？]")
_SPACE = re.compile(r"\s+")


def cut(text: str, size: int = PASSAGE) -> Iterator[str]:
    """Cut a text into passages of about equal length, at the ends of sentences where there are any, else between words.

    Args:
        text: Of any length; half characters (lone surrogates) become question marks.
        size: Most bytes of UTF-8 in a passage.

    Example:
        >>> list(cut("It rained. We stayed in. Nobody minded much.", 30))
        ['It rained. We stayed in.', 'Nobody minded much.']
    """
    data = text.strip().encode("utf-8", "replace")
    start = 0
    while (left := len(data) - start) > 0:
        window = data[start : start + size].decode("utf-8", "ignore")
        if left > size:
            # Dividing what is left evenly leaves no crumb at the end, which would be a passage of two words.
            aim = len(window) / size * left / -(-left // size)
            for mark in (_SENTENCE, _SPACE):
                if ends := [end for match in mark.finditer(window) if (end := match.end()) >= aim / 2]:
                    break
            window = window[: min(ends, key=lambda end: abs(end - aim)) if ends else max(1, round(aim))]
        start += len(window.encode())
        if window.strip():
            yield window.strip()
