"""Is a corpus fit for finding directions with? Every check is a row: what was found, what is allowed, and which texts to mend.

Vectors are differences between means, so whatever goes along with a concept in the texts ends up in its vector: its topic, its
narrator, the share of direct speech, a pet phrase of the writer. The checks look for that, and for texts that say what they
should show. They run on the bundled corpus and, as far as its records have the fields, on one of yours.

Source: what replications of the published study went wrong with (method 23.3, points 10 to 12), and our own (docs/lab-log.md).
"""

from __future__ import annotations

from pathlib import Path

from affectlens.audit.bundled import bundled_file
from affectlens.audit.checks import Check, Record, read_file
from affectlens.audit.stories import check_stories
from affectlens.concepts import ConceptSet
from affectlens.corpus import FILES, STORIES, bundled, files_of
from affectlens.errors import FormatError

__all__ = ["Check", "audit"]


def audit(path: str | Path | None = None, concepts: ConceptSet | None = None) -> list[Check]:
    """Check the bundled corpus, or stories of your own.

    Args:
        path: A JSONL or parquet file of stories or a folder of them; the bundled corpus by default. A folder laid out like the
            bundled one (two or more files named like its own) is checked as such.
        concepts: What stories of your own are about; the 171 emotions by default.

    Returns:
        The checks, in order.

    Raises:
        FormatError: There is nothing at ``path``.

    Example:
        >>> import json, tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = file.write_text(json.dumps({"concept": "calm", "text": "She was calm. " * 40}))
        >>> [check.what for check in audit(file) if not check.passed]
        ['counts', 'named', 'variety', 'rhythm']
    """
    if path is None or sum((Path(path) / f"{name}.jsonl").is_file() for name in FILES) > 1:
        folder = bundled("stories").parent if path is None else Path(path)
        return [check for name in FILES for check in _bundled_file(folder / f"{name}.jsonl")]
    checks: list[Check] = []
    read: list[Record] = []
    for file in files_of(Path(path)):
        found, broken = read_file(file)
        read += found
        checks += broken
    if not read:
        if checks:
            return checks
        raise FormatError(f"{path} holds no texts: each JSONL line or parquet row needs text and concept")
    known = [{**r, "concept": r.get("concept") or r.get("emotion")} for r in read]
    return [*checks, *check_stories(Path(path).name, known, concepts or ConceptSet.load("emotions"), own=True)]


def _bundled_file(file: Path) -> list[Check]:
    if not file.is_file():
        return [Check(file.name, "file", "missing", "present", (f"{file} does not exist: put it back",))]
    found, broken = read_file(file)
    if broken:
        return broken
    if not found:
        return [Check(file.name, "readable", "no records", "one JSON object a line", (f"{file} is empty: put it back",))]
    for concepts, name in STORIES.items():
        if name == file.stem:
            return check_stories(file.name, found, ConceptSet.load(concepts), own=False)
    return bundled_file(file, found, ConceptSet.load("emotions"))
