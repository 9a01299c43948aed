"""Studies: one file for each published finding or family of findings.

A :class:`Study` says before it sees data what it measures, against which null, and by which rule it will call the outcome
``holds``, ``weak``, ``fails`` or ``untestable``. It returns an :class:`Outcome`: findings, tables and plain data from which it
draws its own figures. A study imports this module and the nouns, never another study and never a backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from affectlens.errors import UnknownName
from affectlens.stats import Estimate, Null

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.concepts import ConceptSet
    from affectlens.engine import Engine
    from affectlens.vectors import ConceptVectors

Verdict = Literal["holds", "weak", "fails", "untestable"]


@dataclass(frozen=True)
class Finding:
    """One claim, tested on one model.

    Args:
        study: Name of the study.
        id: Short identifier, unique in the study.
        claim: What the paper (or common sense, for a check of ours) says.
        estimate: What was measured, with its interval and n; None when untestable.
        null: What chance or the control gives, with the p-value.
        published: The published value as text, or None when the paper gives none.
        verdict: By ``rule``, which was fixed before the data was seen.
        rule: The rule in words.
        note: One plain sentence for the reader: where, under which condition, what limits it.
    """

    study: str
    id: str
    claim: str
    estimate: Estimate | None
    null: Null | None
    published: str | None
    verdict: Verdict
    rule: str
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None, as JSON has no word for them."""
        numbers = {"estimate": self.estimate and self.estimate.as_dict(), "null": self.null and self.null.as_dict()}
        return {**asdict(self), **numbers}


@dataclass(frozen=True)
class Table:
    """A table for the report: ``rows`` hold strings or numbers, one for each of ``columns``."""

    id: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A figure for the report: ``plotly`` is a figure as plain JSON data (``fig.to_plotly_json()`` made serialisable)."""

    id: str
    title: str
    caption: str
    plotly: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a study found. ``data`` is plain JSON: enough to draw every figure again without the model."""

    findings: tuple[Finding, ...]
    tables: tuple[Table, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_dict` makes an equal outcome."""
        findings = [finding.as_dict() for finding in self.findings]
        return {"findings": findings, "tables": [asdict(table) for table in self.tables], "data": self.data}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Outcome:
        """The outcome that :meth:`as_dict` was made from."""
        findings = [
            Finding(
                **{
                    **finding,
                    "estimate": finding["estimate"] and Estimate.from_dict(finding["estimate"]),
                    "null": finding["null"] and Null.from_dict(finding["null"]),
                }
            )
            for finding in plain["findings"]
        ]
        tables = [Table(**{**t, "columns": tuple(t["columns"]), "rows": tuple(map(tuple, t["rows"]))}) for t in plain["tables"]]
        return cls(tuple(findings), tuple(tables), plain["data"])


@dataclass(frozen=True)
class Bench:
    """What studies work on: vectors always; the rest when it is at hand."""

    vectors: ConceptVectors
    concepts: ConceptSet
    activations: Activations | None = None
    neutral: Activations | None = None
    engine: Engine | None = None
    draws: int = 1000
    seed: int = 0


class Study(Protocol):
    """The shape of a study module's ``STUDY`` object."""

    name: str
    title: str
    question: str
    version: int

    def run(self, bench: Bench) -> Outcome:
        """Measure. Must return a finding with the verdict ``untestable`` and a reason when a condition is missing."""
        ...

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the figures from an outcome's data."""
        ...


STUDIES: tuple[str, ...] = ("separation", "geometry", "lens")
"""Names of all studies, in the order of the report. Each is the module of that name with a ``STUDY`` object."""


def load_study(name: str) -> Study:
    """Return the study of this name.

    Raises:
        UnknownName: There is no such study; the message names the nearest ones.

    Example:
        >>> load_study("geometry").name
        'geometry'
    """
    if name not in STUDIES:
        raise UnknownName("study", name, STUDIES)
    return importlib.import_module(f"affectlens.studies.{name}").STUDY
