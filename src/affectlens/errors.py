"""Every error that affectlens raises on purpose.

    AffectlensError            something the user can fix; the command line prints its one line and exits with 1
    ├── ModelSupportError      this model cannot be read or steered here (encoder-only, no residual stream, failed self-check)
    ├── MismatchError          two things that do not belong together (vectors of another model, wrong width, wrong layer)
    ├── MissingExtra           an optional package is needed; names the pip command
    ├── EngineError            a request cannot be run (prompt too long, hook that never fired, no reply position)
    ├── FormatError            a file is broken, empty or of another format
    ├── RuleError              a rule of the monitor cannot be understood; shows where
    ├── StoreError             the store of traces cannot be opened, read or written, or has no room
    ├── UnknownName            a name that does not exist; names the nearest ones
    └── Busy                   a server has no room for a request now; says when it might

Each has a page in ``docs/errors/``. A message is one line that ends by saying what to do; under that of a rule stands the rule,
with the place marked.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AffectlensError(Exception):
    """Base of all errors that a user can fix."""


class ModelSupportError(AffectlensError):
    """The model cannot be read or steered here."""


class MismatchError(AffectlensError):
    """Two artifacts do not belong together."""


class EngineError(AffectlensError):
    """A request cannot be run as asked."""


class FormatError(AffectlensError):
    """A file is broken, empty or of another format."""


class RuleError(AffectlensError):
    """A rule cannot be understood, or names what does not exist.

    Args:
        problem: What is wrong and what to do, in one line.
        rule: The whole rule.
        start, end: The characters of it that are wrong, counted from 0.
    """

    def __init__(self, problem: str, rule: str, start: int, end: int) -> None:
        # What stands before a line break would push the mark out of place.
        line = "".join(" " if character.isspace() else character for character in rule)
        marks = " " * start + "^" * max(1, end - start)
        super().__init__(f"{problem}, column {start + 1}\n  {line}\n  {marks}")
        self.problem, self.rule, self.start, self.end = problem, rule, start, end


class StoreError(AffectlensError):
    """The store of traces cannot be opened, read or written, or has no room."""


class MissingExtra(AffectlensError):
    """An optional package is missing."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: run pip install 'affectlens[{extra}]'")


class UnknownName(AffectlensError):
    """A name that does not exist; the message names the nearest ones."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {name!r}: {nearest(name, known)}")


class Busy(AffectlensError):
    """A server has no room for a request now.

    Args:
        message: What is full, and when to come again.
        after: In how many seconds there might be room.
    """

    def __init__(self, message: str, after: float = 1.0) -> None:
        super().__init__(message)
        self.after = after


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message says of the names that there are.

    Example:
        >>> nearest("clam", ["calm", "sad"])
        'did you mean calm?'
    """
    known = list(known)
    if not known:
        return "there is none"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"known are {', '.join(known[:8])}" + (f" and {len(known) - 8} more" if len(known) > 8 else "")
