"""Studies: one file for each published finding or family of findings.

A :class:`Study` says before it sees data what it measures, against which null, and by which rule it will call the outcome
``holds``, ``weak``, ``fails`` or ``untestable``. It returns an :class:`Outcome`: findings, tables and plain data from which it
draws its own figures. A study imports this module and the nouns, never another study and never a backend.

What a study wants to read from the model it says as data (:meth:`Study.requests`), so that studies which read the same text share
one forward pass and a killed run resumes; what it read it gets back from :meth:`Bench.read`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from affectlens import corpus
from affectlens.engine import Readout, Request, Result, Sampling, Where
from affectlens.errors import EngineError, UnknownName
from affectlens.stats import Estimate, Null

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.concepts import ConceptSet
    from affectlens.engine import Engine
    from affectlens.readings import Readings
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
        figure: Id of the study's figure that shows it.
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
    figure: str = ""

    @property
    def detectable(self) -> float | None:
        """The smallest distance from chance that this n would have shown in four of five repetitions.

        It is half the band of the null plus 0.84 standard errors of the estimate: what an absence of evidence is worth.
        """
        if self.estimate is None or self.null is None:
            return None
        # 1.96 standard errors on either side of the estimate; power of 80 % needs 0.84 of them beyond the band.
        reach = (self.null.high - self.null.low) / 2 + 0.84 * (self.estimate.high - self.estimate.low) / 3.92
        return reach if math.isfinite(reach) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None, as JSON has no word for them."""
        numbers = {"estimate": self.estimate and self.estimate.as_dict(), "null": self.null and self.null.as_dict()}
        return {**asdict(self), **numbers}


ALPHA = 0.05
"""The p value that every verdict rule asks for."""


@dataclass(frozen=True)
class Claim:
    """What a study will test, declared before it sees data: a finding without its numbers.

    Args:
        study, id, text, rule, published, figure: As in :class:`Finding`.
    """

    study: str
    id: str
    text: str
    rule: str
    published: str | None = None
    figure: str = ""

    def tested(self, estimate: Estimate, null: Null, clear: bool, note: str) -> Finding:
        """The finding: ``holds`` when p <= ALPHA and ``clear`` (the rule's other half), ``weak`` for p alone, else ``fails``."""
        verdict: Verdict = "fails"
        if null.p <= ALPHA:
            verdict = "holds" if clear else "weak"
        return Finding(self.study, self.id, self.text, estimate, null, self.published, verdict, self.rule, note, self.figure)

    def untestable(self, reason: str) -> Finding:
        """The finding when a condition is missing."""
        return Finding(self.study, self.id, self.text, None, None, self.published, "untestable", self.rule, reason)


def untestable(claims: Iterable[Claim], reason: str) -> Outcome:
    """The outcome of a study that cannot run: every claim with the same reason, a whole sentence."""
    return Outcome(tuple(claim.untestable(reason) for claim in claims), (), {"reason": reason})


FIRST_LOOK = "Left out of a first look: run without --quick."
"""The reason of what is untestable because ``Bench.quick`` spares the time."""


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
    """What a study found.

    Args:
        findings: In the order of the report.
        tables: For the report.
        data: Plain JSON: enough to draw every figure again without the model.
        raw: Every raw value, as tables of columns by name (``{"scores": {"text": […], "happy": […]}}``): the run keeps each as
            ``study-NAME/TABLE.parquet``. It is not part of :meth:`as_dict`.
    """

    findings: tuple[Finding, ...]
    tables: tuple[Table, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict, compare=False)

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
class Sources:
    """What the user brings instead of, or beside, the bundled texts.

    Args:
        texts: Folder with files named as the bundled ones (``scenarios.jsonl``, …); each replaces the bundled one.
        corpus: Text corpus to search for the strongest passages: a folder, a JSONL or parquet file, or a ``datasets`` name.
        labels: TOML file that maps the corpus's labels to concepts.
        conversations: Conversations to rank, and to tell outcomes of: a folder, or a JSONL or parquet file.
    """

    texts: Path | None = None
    corpus: str | None = None
    labels: Path | None = None
    conversations: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An earlier checkpoint of the same architecture, with vectors fitted on it from the same texts."""

    engine: Engine
    vectors: ConceptVectors
    readings: Readings | None = None

    def read(self, requests: Iterable[Request]) -> Iterator[Result]:
        """As :meth:`Bench.read`, of this checkpoint."""
        return (self.readings.read if self.readings else self.engine.run)(requests)


@dataclass(frozen=True)
class Bench:
    """What studies work on: vectors always; the rest when it is at hand.

    Args:
        vectors, concepts: Of the model under study.
        activations: Pooled residuals of the stories the vectors were fitted on.
        neutral: Of the neutral texts.
        engine: The model; None when there are only vectors.
        draws: Resamples and permutations behind intervals and nulls.
        seed: Of everything drawn at random.
        sources: Texts that the user brings.
        readings: What was read already, shared by all studies; None asks the engine.
        base: An earlier checkpoint to compare with.
        folder: Where a study may keep files of its own while it works, so that it resumes.
        quick: A first look: of the largest bundled files only a part is read.
    """

    vectors: ConceptVectors
    concepts: ConceptSet
    activations: Activations | None = None
    neutral: Activations | None = None
    engine: Engine | None = None
    draws: int = 1000
    seed: int = 0
    sources: Sources = Sources()
    readings: Readings | None = None
    base: Checkpoint | None = None
    folder: Path | None = None
    quick: bool = False

    def texts(self, name: str) -> list[dict[str, Any]]:
        """Records of a file of texts: the user's, else the engine's own (the toy knows no English), else the bundled one.

        Raises:
            UnknownName: There is no such file.
            FormatError: The user's file is broken.
        """
        if self.sources.texts and (file := self.sources.texts / f"{name}.jsonl").exists():
            return list(corpus.records(file))
        own = self.engine.texts(name) if self.engine else None
        if own is not None:
            return own
        return corpus.first_look(name) if self.quick else corpus.load(name)

    @property
    def plain(self) -> bool:
        """Whether messages are put as a plain transcript, because the model has no chat template."""
        return self.engine is not None and self.engine.info.template is None

    @property
    def format(self) -> str:
        """How messages are put to the model, in words for a note."""
        return "plain transcript (the model has no chat template)" if self.plain else "chat template"

    def ask(self, message: str, *readouts: Readout, sampling: Sampling | None = None) -> Request:
        """A request with a user's message and the model's reply to come; :data:`REPLY` is its reply position."""
        return Request((("user", message),), readouts=readouts, sampling=sampling, transcript=self.plain)

    def read(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results of requests, in order: from what was read already, else from the engine.

        Raises:
            EngineError: There is no engine, or it cannot run a request.
        """
        if self.readings:
            return self.readings.read(requests)
        if self.engine is None:
            raise EngineError("there is no model: only studies of the vectors themselves can run")
        return self.engine.run(requests)


REPLY = Where(part="prompt", last=1)
"""The reply position: the last token before the model answers (method 7)."""


class Study(Protocol):
    """The shape of a study module's ``STUDY`` object. ``version`` goes up when the same inputs would give another outcome."""

    name: str
    title: str
    question: str
    version: int
    uses: tuple[str, ...]
    """What its outcome depends on beside the vectors: fields of :class:`Sources`, ``base`` and ``calibration``."""

    def requests(self, bench: Bench) -> Sequence[Request]:
        """What :meth:`run` will ask of :meth:`Bench.read`: empty when nothing is read or a condition is missing."""
        ...

    def run(self, bench: Bench) -> Outcome:
        """Measure. Must return a finding with the verdict ``untestable`` and a reason when a condition is missing."""
        ...

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the figures from an outcome's data."""
        ...


STUDIES: tuple[str, ...] = (
    "separation",
    "geometry",
    "lens",
    "passages",
    "scenarios",
    "dose",
    "reply",
    "layers",
    "speakers",
    "concealment",
    "lasting",
    "transcripts",
    "preferences",
    "early_warning",
    "checkpoints",
    "calibration",
    "continuation",
    "description",
    "reaction",
    "deflection",
)
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
