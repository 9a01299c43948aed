"""The report of a run: what was checked, which published findings hold for this model, figures, tables, coloured stories.

A :class:`Report` is plain data. It is written as ``report.json`` (everything), ``report.html`` (one file that needs no
network and is forbidden to use it) and ``report.md`` (for a pull request or a model card), and printed to a terminal.

Stories and model names come from outside. In the page they are text and never markup: the template escapes by default, data
travel as inert JSON, and a content security policy allows exactly the two scripts that are ours, by hash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from affectlens import pages
from affectlens.errors import FormatError
from affectlens.runs import atomic_write, read_json, write_json
from affectlens.stats import Estimate, Null, benjamini_hochberg
from affectlens.studies import ALPHA, STUDIES, Figure, Finding, Table, Verdict, load_study

if TYPE_CHECKING:
    from rich.console import Console

FORMAT, KIND = 1, "affectlens-report"
STATUSES = ("ok", "warn", "fail")
VERDICTS: tuple[str, ...] = get_args(Verdict)
DISCLAIMER = (
    "Every reading in this report is a functional representation: a direction in the model's activations that behaves as "
    "the concept would lead one to expect. Nothing here claims that a model feels anything."
)
_GLYPHS = {"holds": "●", "weak": "◐", "fails": "○", "untestable": "–", "ok": "✓", "warn": "!", "fail": "✕"}
_COLOURS = {"holds": "green", "ok": "green", "weak": "yellow", "warn": "yellow", "fails": "red", "fail": "red",
            "untestable": "dim"}  # fmt: skip
_NUMBERS = ("published", "here", "chance", "p", "n")
# The order in which a reader wants the facts, wherever they come from.
_ORDER = ("id", "revision", "family", "n_parameters", "n_layers", "width", "dtype", "device", "concepts", "layer", "method",
          "source", "kept", "dropped", "date", "command", "commit", "platform", "python", "seeds", "packages")  # fmt: skip
_PARTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "checks": {"name": str, "status": str, "value": object, "detail": str},
    "findings": {"study": str, "id": str, "claim": str, "verdict": str, "rule": str},
    "tables": {"id": str, "title": str, "caption": str, "columns": Sequence, "rows": Sequence},
    "figures": {"id": str, "title": str, "caption": str, "plotly": Mapping},
    "stories": {"concept": str, "topic": str, "layer": int, "scale": (int, float, type(None)), "tokens": Sequence,
                "scores": Mapping},
}  # fmt: skip
_FIX = "write it again with `affectlens study`"


@dataclass(frozen=True)
class Report:
    """Everything that a run has to say, as plain data.

    Whatever is given (tuples, numpy numbers, NaN, half a surrogate pair in a token) is made plain on construction, so that
    ``Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report``.

    Args:
        title: Heading of the report.
        model: Facts about the model: id, family, n_layers, width, dtype, device, fingerprint, n_parameters, …
        vectors: Facts about the vectors: number of concepts, layer, stories, method, …
        checks: Instrument checks: ``{"name", "status": "ok" | "warn" | "fail", "value", "detail"}``.
        findings: What the studies found, those of one study next to each other.
        tables, figures: In the order in which they appear.
        stories: ``{"concept", "topic", "layer", "scale", "tokens": [text], "scores": {probe: [number per token]}}``;
            ``scale`` is the 99th percentile of the absolute scores over the story's probes; it and any score may be None.
        provenance: Packages, platform, command, seeds, date, git commit.
        resume: The command that goes on with this run.

    Raises:
        FormatError: A part lacks a field or has a wrong one; names the part and the field.

    Example:
        >>> report = Report("Emotions in toy", model={"id": "toy"}, checks=[
        ...     {"name": "steering at 0", "status": "ok", "value": 0.0, "detail": "bit-identical"}])
        >>> report.summary
        'No finding was tested on toy. The one instrument check passes.'
        >>> Report.from_dict(report.as_dict()) == report
        True
    """

    title: str
    model: Mapping[str, Any]
    vectors: Mapping[str, Any] = field(default_factory=dict)
    checks: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    stories: Sequence[Mapping[str, Any]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    resume: str = ""

    def __post_init__(self) -> None:
        parts = {own.name: _plain(getattr(self, own.name)) for own in fields(self)}
        for name, kind in (("title", str), ("resume", str), ("model", dict), ("vectors", dict), ("provenance", dict)):
            if not isinstance(parts[name], kind):
                raise FormatError(f"{name} must be {'text' if kind is str else 'an object'}")
        makers = {"checks": _check, "findings": _finding, "tables": _table, "figures": _figure, "stories": _story}
        parts |= {name: _each(parts[name], name, make) for name, make in makers.items()}
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings have each verdict; verdicts without a finding are left out."""
        verdicts = [finding.verdict for finding in self.findings]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts}

    @property
    def summary(self) -> str:
        """One or two sentences: how many findings hold, and whether the instrument can be trusted."""
        counts, n = self.counts, len(self.findings)
        name = str(self.model.get("id", "this model"))
        first = f"No finding was tested on {name}."
        if n:
            holds = counts.pop("holds", 0)
            ways = {"weak": ("is weak", "are weak"), "fails": ("fails", "fail"), "untestable": ("could not be tested",) * 2}
            rest = [f"{count} {ways[verdict][count > 1]}" for verdict, count in counts.items()]
            hold = "holds" if 1 in (holds, n) else "hold"
            first = f"{holds or 'None'} of {n} finding{'s' * (n > 1)} {hold} on {name}{'; ' * bool(rest)}{_listed(rest)}."
        bad = [check["name"] for check in self.checks if check["status"] == "fail"]
        warned = sum(check["status"] == "warn" for check in self.checks)
        if not self.checks:
            return f"{first} The instrument was not checked."
        if bad:
            return f"{first} Read with care: the instrument fails the check of {_listed(bad)}."
        total = len(self.checks)
        if warned:
            return f"{first} {warned} of {total} instrument checks ask{'s' * (warned == 1)} for attention; none fails."
        return f"{first} {f'All {total} instrument checks pass' if total > 1 else 'The one instrument check passes'}."

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON data, with the format's name and version; NaN is None."""
        return {"kind": KIND, "format": FORMAT, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """The report that :meth:`as_dict` wrote.

        Raises:
            FormatError: Not a report, of a newer format, or a part is missing or of a wrong kind; names which.

        Example:
            >>> Report.from_dict({"kind": "affectlens-report", "format": 1, "title": "T"})
            Traceback (most recent call last):
            affectlens.errors.FormatError: the report lacks 'model'
        """
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise FormatError("this is not an affectlens report")
        if data.get("format") != FORMAT:
            raise FormatError(f"the report has format {data.get('format')}, this affectlens knows {FORMAT}")
        given = {name: value for name, value in data.items() if name not in ("kind", "format")}
        known = [own.name for own in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise FormatError(f"the report has an unknown part {unknown[0]!r}")
        if missing := [name for name in ("title", "model") if name not in given]:
            raise FormatError(f"the report lacks {missing[0]!r}")
        return cls(**given)

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``report.html`` and ``report.md``, each atomically.

        Returns:
            The path of the page.

        Raises:
            AffectlensError: The folder cannot be written.

        Example:
            >>> import tempfile
            >>> Report("T", model={"id": "toy"}).save(tempfile.mkdtemp()).name
            'report.html'
        """
        folder = Path(folder)
        write_json(folder / "report.json", self.as_dict())
        for name, text in (("report.md", self.markdown()), ("report.html", self.html())):
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report from its folder or its JSON file.

        Raises:
            FormatError: Missing, broken or not a report, in one line that names the file.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        data = read_json(path, fix=_FIX)
        try:
            return cls.from_dict(data)
        except FormatError as error:
            raise FormatError(f"{path}: {error}; {_FIX}") from error

    @property
    def corrected(self) -> str:
        """How many findings stand when p is corrected for the number of findings in the report; empty without findings."""
        tested = [finding.null.p for finding in self.findings if finding.null and not math.isnan(finding.null.p)]
        if not tested:
            return ""
        kept = int((benjamini_hochberg(tested) <= ALPHA).sum())
        return (
            f"{kept} of {len(tested)} tested findings keep q ≤ {ALPHA} when p is corrected for their number (Benjamini-Hochberg)."
        )

    def html(self, other: Report | None = None) -> str:
        """The report as one page: no network, light and dark, for screens, phones and paper.

        Args:
            other: A second report, whose findings get columns of their own beside these.
        """
        from plotly.offline import get_plotlyjs

        numbers = {figure.id: number for number, figure in enumerate(self.figures, 1)}
        return pages.render(
            "report.html.j2",
            filters={"cell": _cell, "ordered": _ordered},
            report=self,
            other=other,
            names=_names(self, other) if other is not None else (),
            plotly=get_plotlyjs() if self.figures else "",
            findings=[
                {
                    "finding": mine,
                    **_shown(mine),
                    "strip": _strip(mine),
                    "figure": numbers.get(f"{mine.study}-{mine.figure}"),
                    "power": _power(_reach(mine)),
                    "other": theirs and {**_shown(theirs), "verdict": theirs.verdict},
                }
                for mine, theirs in _beside(self, other)
            ],
            titles={name: _title(name) for name in {finding.study for finding in self.findings}},
            sections=_sections(self),
            disclaimer=DISCLAIMER,
        )

    def markdown(self, other: Report | None = None) -> str:
        """The report as Markdown: summary, checks, findings, the first rows of each table, captions, provenance.

        Args:
            other: A second report, whose findings get columns of their own beside these.
        """
        lines = [f"# {_md(self.title)}", "", _md(self.summary), "", f"> {DISCLAIMER}", ""]
        lines += [f"**Model:** {_md(_facts(self.model))}  ", f"**Vectors:** {_md(_facts(self.vectors))}", ""]
        if self.checks:
            rows = [[check["status"], check["name"], _cell(check["value"]), check["detail"]] for check in self.checks]
            lines += ["## Instrument checks", "", *_md_table(("status", "check", "value", "detail"), rows), ""]
        if self.findings:
            rows = []
            for finding, theirs in _beside(self, other):
                own = _shown(finding)
                claim = f"{finding.claim} ({finding.note})" if finding.note else finding.claim
                rows.append([f"**{finding.verdict}**", claim, *(own[key] for key in _NUMBERS), _reach(finding) or "–"])
                if other is not None:
                    rows[-1] += [f"**{theirs.verdict}**", _shown(theirs)["here"], _shown(theirs)["p"]] if theirs else ["–"] * 3
            head = ["verdict", "finding", "published", "here [interval]", "chance [95 %]", "p", "n", "detectable"]
            if other is not None:
                head += [f"{_names(self, other)[1]}: {what}" for what in ("verdict", "here [interval]", "p")]
            lines += ["## Findings", "", *_md_table(head, rows, safe=(0, len(_NUMBERS) + 3)), "", self.corrected, ""]
            lines += [_power("the detectable size"), ""] if any(map(_reach, self.findings)) else []
        for table in self.tables:
            rows, more = _formatted(table)[:20], len(table.rows) - 20
            lines += [f"## {_md(table.title)}", "", _md(table.caption), "", *_md_table(table.columns, rows), ""]
            lines += [f"{more} more rows are in report.json.", ""] if more > 0 else []
        if self.figures:
            lines += ["## Figures", "", "Drawn in report.html:", ""]
            lines += [f"* **{_md(figure.title)}.** {_md(figure.caption)}" for figure in self.figures] + [""]
        facts = [f"* {_md(key)}: {_md(_cell(value))}" for key, value in _ordered(self.provenance)]
        lines += ["## Provenance", "", *facts, ""]
        if self.resume:
            lines += ["Go on with this run:", "", *(f"    {line}" for line in self.resume.splitlines()), ""]
        return "\n".join(lines)

    def print(self, console: Console | None = None, *, other: Report | None = None) -> None:
        """Print the report to a terminal: checks, findings with coloured verdicts, and the first rows of each table.

        Args:
            console: Where to print; standard output when None.
            other: A second report to compare with: only findings are printed then, with columns for either.

        Example:
            >>> Report("Emotions in toy", model={"id": "toy"}).print()
            Emotions in toy
            No finding was tested on toy. The instrument was not checked.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        console = console or Console()
        if not console.is_terminal:  # a file or a pipe has no width of its own, and 80 columns would break every cell
            console.width = max(console.width, 150)

        def text(value: Any, style: str = "") -> Text:
            # Text takes nothing as markup; what is left to remove are escape sequences that would drive the terminal.
            return Text("".join(c if c.isprintable() else " " for c in str(value)), style)

        def grid(title: str, columns: Iterable[tuple[str, bool]]) -> Grid:
            made = Grid(box=box.SIMPLE_HEAD, title=text(title, "bold"), title_justify="left", padding=(0, 1), pad_edge=False)
            for name, right in columns:
                made.add_column(text(name), justify="right" if right else "left", overflow="fold")
            return made

        def verdict(finding: Finding) -> Text:
            return text(f"{_GLYPHS[finding.verdict]} {finding.verdict}", _COLOURS[finding.verdict])

        console.print(text(self.title, "bold"))
        console.print(text(self.summary))
        if other is not None:
            console.print(text(f"beside {other.title}", "bold"))
            console.print(text(other.summary))
            heads = [(name, False) for name in _names(self, other)]
            made = grid("Findings", [("study", False), ("finding", False), ("published", True), *heads])
            for mine, theirs in _beside(self, other):
                cells = []
                for one in (mine, theirs):
                    cells.append(verdict(one).append(f"  {_shown(one)['here']}", "default") if one else text("–"))
                made.add_row(text(mine.study), text(mine.claim), text(mine.published or "–"), *cells)
            console.print(made)
            return
        if self.checks:
            made = grid("Instrument checks", [("", False), ("check", False), ("value", True), ("detail", False)])
            for check in self.checks:
                status = text(f"{_GLYPHS[check['status']]} {check['status']}", _COLOURS[check["status"]])
                made.add_row(status, text(check["name"]), text(_cell(check["value"])), text(check["detail"], "dim"))
            console.print(made)
        if self.findings:
            made = grid("Findings", [("verdict", False), ("finding", False), *((key, True) for key in _NUMBERS)])
            for finding in self.findings:
                own = _shown(finding)
                claim = text(finding.claim)
                # What an absence is worth; of the others the page says it.
                power = _power(_reach(finding)) if finding.verdict == "fails" else ""
                aside = f"{finding.note} {power}".strip()
                if aside:
                    claim.append("\n").append_text(text(aside, "dim"))
                made.add_row(verdict(finding), claim, *(text(own[key]) for key in _NUMBERS))
            console.print(made)
            console.print(text(self.corrected))
        for table in self.tables:
            made = grid(table.title, zip(table.columns, _numeric(table), strict=True))
            for row in _formatted(table)[:8]:
                made.add_row(*map(text, row))
            if len(table.rows) > 8:
                made.caption = text(f"{len(table.rows) - 8} more rows in report.json", "dim")
            console.print(made)


def _plain(value: Any) -> Any:
    """JSON data, whatever came in; numpy numbers and arrays lose their type, numbers that JSON has not become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (Finding, Table, Figure)):
        return _plain(asdict(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value).encode("utf-8", "replace").decode()  # a token may be half of a surrogate pair


def _each(parts: Any, what: str, make: Any) -> tuple[Any, ...]:
    """Check and make each part of a kind; an error says which one it was."""
    if not isinstance(parts, list):
        raise FormatError(f"{what} must be a list")
    made = []
    for number, part in enumerate(parts, 1):
        try:
            if not isinstance(part, dict):
                raise TypeError("must be an object")
            for name, kind in _PARTS[what].items():
                if name not in part:
                    raise TypeError(f"lacks {name!r}")
                if not isinstance(part[name], kind) or (kind is Sequence and isinstance(part[name], str)):
                    raise TypeError(f"{name!r} is of a wrong kind")
            made.append(make(part))
        except (TypeError, ValueError) as error:
            raise FormatError(f"number {number} of {what}: {error}") from error
    return tuple(made)


def _check(part: dict[str, Any]) -> dict[str, Any]:
    if part["status"] not in STATUSES:
        raise ValueError(f"status {part['status']!r} is none of {', '.join(STATUSES)}")
    return part


def _finding(part: dict[str, Any]) -> Finding:
    if part["verdict"] not in VERDICTS:
        raise ValueError(f"verdict {part['verdict']!r} is none of {', '.join(VERDICTS)}")
    estimate, null = part.get("estimate"), part.get("null")
    part = {"published": None, **part, "estimate": estimate and Estimate.from_dict(estimate)}
    finding = Finding(**part | {"null": null and Null.from_dict(null)})
    _shown(finding)  # a text where a number should be is found here, not when the report is drawn
    return finding


def _table(part: dict[str, Any]) -> Table:
    rows = tuple(map(tuple, part["rows"]))
    if any(len(row) != len(part["columns"]) for row in rows):
        raise ValueError(f"a row does not have one value for each of the {len(part['columns'])} columns")
    return Table(**part | {"columns": tuple(map(str, part["columns"])), "rows": rows})


def _figure(part: dict[str, Any]) -> Figure:
    if not isinstance(part["plotly"].get("data"), list) or not isinstance(part["plotly"].get("layout"), dict):
        raise ValueError("'plotly' must have a list 'data' and an object 'layout'")
    return Figure(**part)


def _story(part: dict[str, Any]) -> dict[str, Any]:
    for probe, scores in part["scores"].items():
        if not isinstance(scores, list) or len(scores) != len(part["tokens"]):
            raise ValueError(f"the scores of {probe!r} are not one for each of the {len(part['tokens'])} tokens")
    return part


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _minus(text: str) -> str:
    """The typographic minus in front of numbers, and no line break before a per cent sign."""
    return re.sub(r"(?<![\w.)])-(?=[\d.])", "−", text).replace(" %", "\u00a0%")


def _cell(value: Any) -> str:
    """Any plain value as a short text."""
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        return _facts(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        # A year or a seed is no quantity: only long numbers get their thousands apart.
        return _minus(f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value))
    return _minus(f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}") if isinstance(value, float) else str(value)


def _ordered(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Facts in reading order: the known ones, then the others by name."""
    rank = {name: number for number, name in enumerate(_ORDER)}
    names = sorted(facts, key=lambda name: (rank.get(name, len(rank)), name))
    return [(name.removeprefix("n_").replace("_", " "), facts[name]) for name in names]


def _facts(facts: Mapping[str, Any]) -> str:
    return " · ".join(f"{name} {_cell(value)}" for name, value in _ordered(facts))


def _shown(finding: Finding) -> dict[str, str]:
    """The numbers of a finding as texts."""
    shown = dict.fromkeys(("here", "chance", "kind", "p", "n"), "–") | {"published": finding.published or "–"}
    if (estimate := finding.estimate) is not None:
        # The estimate prints itself with as many digits as its interval supports; n and the level have their own place.
        text, _, inside = str(estimate).rpartition(" (")
        level = "" if estimate.level == 0.95 else f" ({inside.partition(',')[0]})"
        shown |= {"here": "–" if math.isnan(estimate.value) else text + level, "n": f"{estimate.n:,}".replace(",", "\u202f")}
    if (null := finding.null) is not None:
        shown["chance"] = str(null).removeprefix("null ").partition(", p = ")[0]
        shown["kind"] = f"{null.kind}, {null.draws} draws"
        shown["p"] = "–" if math.isnan(null.p) else "< 0.001" if null.p < 0.001 else f"{null.p:.2g}"
    return {key: _minus(text) for key, text in shown.items()}


def _strip(finding: Finding) -> dict[str, float] | None:
    """Places, in percent of the width, for the small picture of interval, chance band and published value."""
    estimate, null = finding.estimate, finding.null
    if estimate is None:
        return None
    marks = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    if null is not None:
        marks |= {"null_low": null.low, "null_high": null.high}
    # Only a bare number in the same unit can stand beside ours; "6 of 12" cannot.
    bare = re.fullmatch(r"(?:[a-zρ]+ ?= ?)?([-−]?\d*\.?\d+) ?(%?)", finding.published or "", re.IGNORECASE)
    if bare and bare[2] == estimate.unit.strip():
        marks["published"] = float(bare[1].replace("−", "-"))
    if len(marks) == 3 or not all(map(math.isfinite, marks.values())):
        return None  # an interval with nothing beside it shows nothing
    low, high = min(marks.values()), max(marks.values())
    return {name: round(6 + 88 * (mark - low) / (high - low), 1) for name, mark in marks.items()} if high > low else None


def _beside(report: Report, other: Report | None) -> list[tuple[Finding, Finding | None]]:
    """Each finding with the same one of another report; findings that only the other has come last, as untested here."""
    theirs = {(finding.study, finding.id): finding for finding in other.findings} if other is not None else {}
    pairs = [(mine, theirs.pop((mine.study, mine.id), None)) for mine in report.findings]
    missing = [
        (replace(finding, estimate=None, null=None, verdict="untestable", note="Not in this report.", figure=""), finding)
        for finding in theirs.values()
    ]
    return pairs + sorted(missing, key=lambda pair: pair[0].study)


def _names(report: Report, other: Report) -> tuple[str, str]:
    """What to call two reports beside each other."""
    first, second = (str(one.model.get("id") or one.title) for one in (report, other))
    return (first, second) if first != second else (f"{first}, first run", f"{second}, second run")


def _reach(finding: Finding) -> str:
    """The distance from chance that this n could have shown, as a text; empty where there is no null."""
    if finding.estimate is None or finding.detectable is None:
        return ""
    return f"{_cell(float(f'{finding.detectable:.2g}'))} {finding.estimate.unit}".rstrip()


def _power(distance: str) -> str:
    """What a distance is that could have been shown, as a sentence; empty without one."""
    return f"With this n, a distance of {distance} from chance would have shown in four of five repetitions." if distance else ""


def _title(study: str) -> str:
    return load_study(study).title if study in STUDIES else study.replace("_", " ")


def _sections(report: Report) -> list[dict[str, Any]]:
    """Figures and tables of each study together, in the order of the report; the part of their ids before a hyphen names it."""
    sections: dict[str, dict[str, Any]] = {}

    def section(id: str) -> dict[str, Any]:
        name = id.partition("-")[0]
        known = name in STUDIES
        head = {"name": name, "title": _title(name), "question": load_study(name).question} if known else {}
        return sections.setdefault(name if known else "", {"figures": [], "tables": [], **head})

    for number, figure in enumerate(report.figures, 1):
        section(figure.id)["figures"].append((number, figure))
    for number, table in enumerate(report.tables, 1):
        section(table.id)["tables"].append((number, table, _numeric(table), _formatted(table)))
    for each in sections.values():
        each["wide"] = _wide([figure for _, figure in each["figures"]])
    return list(sections.values())


def _wide(figures: Sequence[Figure]) -> list[bool]:
    """Which figures take both columns: those that ask for it, and one that would stand alone in its row."""
    asked = [bool((figure.plotly.get("layout", {}).get("meta") or {}).get("wide")) for figure in figures]
    wide, column = list(asked), 0
    for number, own in enumerate(asked):
        column = 0 if own else 1 - column
        if column == 1 and (number + 1 == len(asked) or asked[number + 1]):
            wide[number], column = True, 0
    return wide


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers only."""
    return [
        all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in column)
        for column in (zip(*table.rows, strict=True) if table.rows else [[""]] * len(table.columns))
    ]


def _formatted(table: Table) -> list[list[str]]:
    """The rows as texts, the floats of a column with equally many decimals: at most three, and no more than one of them needs."""
    formats = []
    for column in zip(*table.rows, strict=True):
        values = [value for value in column if isinstance(value, float) and math.isfinite(value)]
        largest = max(map(abs, values), default=1)
        decimals = 0 if largest >= 1000 else 1 if largest >= 100 else 3
        needed = [len(f"{value:.{decimals}f}".rstrip("0").partition(".")[2]) for value in values]
        formats.append(max(needed, default=0) if largest >= 0.01 else None)  # None: too small for fixed decimals

    def text(value: Any, decimals: int | None) -> str:
        fixed = isinstance(value, float) and decimals is not None
        return _minus(f"{round(value, decimals) + 0.0:,.{decimals}f}") if fixed else _cell(value)

    return [list(map(text, row, formats)) for row in table.rows]


def _md(text: str) -> str:
    """Untrusted text in Markdown: no markup of ours or of HTML, and on one line."""
    return re.sub(r"([\\`*_\[\]|<>#~])", r"\\\1", " ".join(str(text).split()))


def _md_table(columns: Sequence[str], rows: Iterable[Sequence[str]], safe: Sequence[int] = ()) -> list[str]:
    body = ["| " + " | ".join(cell if i in safe else _md(cell) for i, cell in enumerate(row)) + " |" for row in rows]
    return ["| " + " | ".join(map(_md, columns)) + " |", "|" + "---|" * len(columns), *body]
