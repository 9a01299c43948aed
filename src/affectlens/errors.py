"""Every error that affectlens raises on purpose.

    AffectlensError            something the user can fix; the command line prints its one line and exits with 1
    ├── ModelSupportError      this model cannot be read or steered here (encoder-only, no residual stream, failed self-check)
    ├── MismatchError          two things that do not belong together (vectors of another model, wrong width, wrong layer)
    ├── MissingExtra           an optional package is needed; names the pip command
    ├── EngineError            a request cannot be run (prompt too long, hook that never fired, no reply position)
    ├── FormatError            a file is broken, empty or of another format
    └── UnknownName            a name that does not exist; names the nearest ones

Each has a page in ``docs/errors/``. A message is one line that ends by saying what to do.
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


class MissingExtra(AffectlensError):
    """An optional package is missing."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}: run pip install 'affectlens[{extra}]'")


class UnknownName(AffectlensError):
    """A name that does not exist; the message names the nearest ones."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known[:8])}"
        if not near and len(known) > 8:
            hint += f" and {len(known) - 8} more"
        super().__init__(f"unknown {what} {name!r}: {hint}")
