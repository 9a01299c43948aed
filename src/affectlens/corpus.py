"""Collections of texts: the ones that come with affectlens, and JSONL or parquet files of your own.

The bundled files are listed in :data:`FILES` and explained, field by field, in ``data/corpus/README.md``. All of it is free under
CC BY 4.0. ``affectlens corpus check`` (:mod:`affectlens.audit`) verifies them, or a corpus of yours.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from affectlens.activations import Text
from affectlens.errors import FormatError, UnknownName

FILES: dict[str, str] = {
    "stories": "12 stories for each of the 171 emotions, which none of them names",
    "neutral": "matter-of-fact dialogues between a person and an assistant",
    "speakers": "dialogues of two speakers, each with an emotion of their own",
    "concealment": "short scenes in which an emotion is hidden, felt openly, or kept apart from what is spoken of",
    "scenarios": "messages of users that imply an emotion",
    "ladders": "messages with a number that makes things better or worse, and controls in which it does not matter",
    "activities": "things a model may be asked to do, in eight categories",
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


def files_of(path: Path) -> list[Path]:
    """The file itself, or the JSONL and parquet files of a folder, sorted.

    Raises:
        FormatError: It does not exist.
    """
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".parquet") and not f.name.startswith("."))
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
    """The records of a JSONL or parquet file as they are.

    Raises:
        FormatError: Not readable, not UTF-8, or no JSON object on a line; names the line.
    """
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(file).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise FormatError(f"{file} is no readable parquet file ({error}): write it again") from None
        return
    try:
        # Not splitlines(): JSON may hold unescaped line separators. Windows editors put a mark in front.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"{file} cannot be read ({error}): save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file}, line {number} is no JSON ({error}): one JSON object a line") from None
        if not isinstance(record, dict):
            raise FormatError(f"{file}, line {number} is no JSON object: one object a line, with a text field")
        yield record
