"""What a check is, how records are read, and the check of their fields."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from affectlens.concepts import ConceptSet
from affectlens.corpus import records
from affectlens.errors import FormatError

Record = Mapping[str, Any]

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
REPLIES = ("express", "react", "deny", "admit", "neutral", "glad")
"""Fields that hold a list of replies."""
_BROKEN = re.compile("\ufffd|Ã[\x80-\xbf©¨¤¶¼]|â€|[\ud800-\udfff]|[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        file: Which file.
        what: What was looked at.
        found: What was found, in figures.
        allowed: What is allowed.
        faults: One line for each text or group that is not; none means the check passes.
    """

    file: str
    what: str
    found: str
    allowed: str
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.faults


def read_file(file: Path) -> tuple[list[Record], list[Check]]:
    """The records, or the check that failed because there are none."""
    try:
        read: list[Record] = list(records(file))
    except FormatError as error:
        return [], [Check(file.name, "readable", "no", "UTF-8, one JSON object a line", (str(error),))]
    broken = tuple(
        f"{name_of(r, i)}: {found.group()!r} is no text: save the file as UTF-8 again"
        for i, r in enumerate(read)
        if (found := _BROKEN.search(text_of(r)))
    )
    return read, [Check(file.name, "readable", f"{len(broken)} texts with broken characters", "none", broken)] if broken else []


@dataclass(frozen=True)
class Layout:
    """What a record holds: texts that must not be empty, concepts of the set, and values from a list."""

    texts: tuple[str, ...] = ("text",)
    concepts: tuple[str, ...] = ()
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def check_fields(file: str, read: Sequence[Record], layout: Layout, concepts: ConceptSet) -> Iterator[Check]:
    faults: list[str] = []
    for i, record in enumerate(read):
        name = name_of(record, i)
        if not is_filled(record.get("id")):
            faults.append(f"{name}: no id: give it one")
        faults += [f"{name}: {key} is missing or empty: write it" for key in layout.texts if not is_filled(record.get(key))]
        for key in layout.concepts:
            if not is_filled(record.get(key)) or record[key] not in concepts:
                faults.append(f"{name}: {key} {record.get(key)!r} is not among the {len(concepts)} concepts: correct it")
        for key, choices in layout.choices.items():
            if record.get(key) not in choices:
                faults.append(f"{name}: {key} is {record.get(key)!r}: make it one of {', '.join(map(str, choices))}")
    ids = Counter(r["id"] for r in read if is_filled(r.get("id")))
    faults += [f"id {id!r} is used {n} times: make ids unique" for id, n in ids.items() if n > 1]
    yield Check(file, "fields", f"{len(read)} records", "every field there and valid, ids unique", tuple(faults))


def is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def name_of(record: Record, i: int) -> str:
    return str(record.get("id") or f"record {i + 1}")


def listed(record: Record, key: str) -> list[Any]:
    items = record.get(key)
    return items if isinstance(items, list) else []


def text_of(record: Record) -> str:
    """Everything of a record that a model would read."""
    parts = [record.get(key) for key in ("scenario", "unsaid", "asked", "text", "first", "second", "affirmed", "negated")]
    parts += [reply for kind in REPLIES for reply in listed(record, kind)]
    turns = [turn[1] for turn in listed(record, "turns") if isinstance(turn, list) and len(turn) == 2]
    return "\n".join(part for part in (*parts, *turns) if isinstance(part, str))
