"""Datasets as people keep them: read shard by shard, checked before any work, written back with more columns.

JSONL, CSV, TSV, parquet, a folder of such files, a folder that ``datasets`` saved, or a data set of the Hugging Face Hub. A
dataset is *planned* first: one pass over it checks every row, so that a broken line is found in the first minute and not after
ten hours, and cuts the rows into shards. A shard lies in one file and says where it begins there, so any shard can be read by
any worker, and reading one after the other reads the file once. Memory holds one shard, whatever the size of the dataset.

What a dataset had stays as it was. Rows of text formats are copied to the byte, and the new columns are written behind them;
tables keep their types and their metadata.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from affectlens.corpus import csv_rows
from affectlens.errors import FormatError, MissingExtra
from affectlens.runs import atomic_write, content_id, sha256_file

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, BYTES = 1000, 2**22
"""A shard ends at so many rows, or at so many bytes of text: what a killed run loses at most."""

Kind = Literal["jsonl", "csv", "tsv", "parquet", "arrow"]
KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TABLES = ("parquet", "arrow")
_BATCH = 256
_READS = "give a JSONL, CSV, TSV or parquet file, a folder of one kind of them, a folder that datasets saved, or org/name[:split]"

Record = Mapping[str, Any]
Column = tuple[Sequence[Any], "pa.DataType"]
"""Plain values, one a row, and their type where they are written to a table."""


@dataclass(frozen=True)
class Shard:
    """Rows next to each other in one file.

    Args:
        number: From 0.
        file: Number of the file.
        start: Where it begins there: a byte in text formats, a row in tables.
        rows: How many rows.
        row: Number of the first one in the dataset, from 0.
        line: Its line (or row) in the file, from 1: for messages.
    """

    number: int
    file: int
    start: int
    rows: int
    row: int
    line: int


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a shard.

    Args:
        records: The rows as plain data.
        places: Where each stands, for messages.
        own: The rows as they were: their text, or a table.
        dataset: Where they come from.
    """

    records: Sequence[Record]
    places: Sequence[str]
    own: Any
    dataset: Dataset

    def write(self, file: Path, keep: np.ndarray, columns: Mapping[str, Column]) -> None:
        """Write the rows that are kept, with more columns, atomically.

        Args:
            file: Where to.
            keep: Which rows, boolean ``(rows,)``.
            columns: Name to values, one for each row, and their type.
        """
        if self.dataset.kind in TABLES:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = self.own
            for name, (values, type) in columns.items():
                table = table.append_column(pa.field(name, type), pa.array(values, type))
            with atomic_write(file) as temporary:
                pq.write_table(table.filter(pa.array(keep)), temporary, compression="zstd")
            return
        rows = np.flatnonzero(keep).tolist()
        with (
            atomic_write(file) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text,
        ):
            if self.dataset.kind == "jsonl":
                for i in rows:
                    added = json.dumps({name: values[i] for name, (values, _) in columns.items()}, ensure_ascii=False)
                    before = self.own[i].strip()[:-1].rstrip()
                    text.write(f"{before}{'' if before == '{' else ', '}{added[1:]}\n")
                return
            separator = _SEPARATORS[self.dataset.kind]
            text.write(separator.join([self.dataset.header, *_flat_names(columns)]) + "\n")
            for i in rows:
                cells = [cell for values, type in columns.values() for cell in _flat(values[i], type)]
                text.write(separator.join([self.own[i].rstrip("\r\n"), *cells]) + "\n")


class Dataset:
    """A dataset that can be read by shards.

    Attributes:
        name: As it was given.
        kind: Its format.
        files: Its files, in order.
        columns: Names of its columns; of JSONL, those of the first row.
        header: The first line of a CSV or TSV file as it is; else empty.

    Args:
        source: A file, a folder, or ``org/name`` or ``org/name:split`` of the Hub (default: ``train``).

    Raises:
        FormatError: Nothing there, of several formats, or not readable; says what is read.
        MissingExtra: A data set of the Hub is named and ``datasets`` is not installed.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = file.write_text('{"text": "It rained."}\\n{"text": "It snowed."}\\n')
        >>> data = Dataset(file)
        >>> (shard,) = data.plan(lambda record, place: len(record["text"]))
        >>> shard.rows, data.read(shard).records[1]
        (2, {'text': 'It snowed.'})
    """

    def __init__(self, source: str | Path) -> None:
        self.name = str(source)
        self.files, self.kind = _files(self.name)
        self.columns: tuple[str, ...] = ()
        self.header = ""
        self._schema: Any = None
        self._cursor: _Cursor | None = None
        for file in self.files:
            self._look(file)
        if not self.columns:
            raise FormatError(f"{self.name} holds no rows: {_READS}")

    @property
    def suffix(self) -> str:
        """How files that are written end: tables are written as parquet."""
        return ".parquet" if self.kind in TABLES else f".{self.kind}"

    @property
    def id(self) -> str:
        """Content hash of all files, in order; what they are called does not count."""
        return content_id([self.kind, [sha256_file(file) for file in self.files]])

    def plan(self, look: Callable[[Record, str], int], *, columns: Sequence[str] = (), rows: int = ROWS) -> list[Shard]:
        """Check every row and cut the dataset into shards.

        Args:
            look: Checks a row, told where it stands, and returns how many bytes it is to read; may raise FormatError.
            columns: What it needs to see, where not all columns have to be read; default: all.
            rows: Rows of a shard at most.

        Raises:
            FormatError: A row is broken; names file and line.
        """
        shards: list[Shard] = []
        total = 0
        for number, file in enumerate(self.files):
            held = size = first_line = start = 0
            for record, line, begins in self._rows(file, columns):
                if held and (held == rows or size > BYTES):
                    shards.append(Shard(len(shards), number, start, held, total - held, first_line))
                    held = size = 0
                if not held:
                    first_line, start = line, begins
                size += look(record, self._place(file, line))
                held += 1
                total += 1
            if held:
                shards.append(Shard(len(shards), number, start, held, total - held, first_line))
        return shards

    def read(self, shard: Shard, *, columns: Sequence[str] = ()) -> Part:
        """The rows of a shard. Reading shards in their order reads each file once.

        Args:
            shard: One of the plan.
            columns: Which columns of a table to give as plain data; default: all.
        """
        file = self.files[shard.file]
        if self._cursor is None or (self._cursor.file, self._cursor.position) != (file, shard.start):
            self._cursor = _Cursor(self, file, shard.start, shard.line)
        return self._cursor.take(shard.rows, columns)

    def join(self, parts: Sequence[Path], file: Path) -> None:
        """Make one file of the files of shards, in order, atomically."""
        if self.kind in TABLES:
            import pyarrow.parquet as pq

            with atomic_write(file) as temporary:
                schema = pq.read_schema(parts[0])
                with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                    for part in parts:
                        writer.write_table(pq.read_table(part).cast(schema))
            return
        with atomic_write(file) as temporary, temporary.open("wb") as whole:
            for number, part in enumerate(parts):
                with part.open("rb") as lines:
                    if number and self.header:
                        lines.readline()
                    while block := lines.read(2**20):
                        whole.write(block)

    def _place(self, file: Path, line: int) -> str:
        return f"{file}, {'row' if self.kind in TABLES else 'line'} {line}"

    # ── what there is ──

    def _look(self, file: Path) -> None:
        """Take the columns of a file; those of several files must be the same."""
        if self.kind in TABLES:
            schema = _schema(file, self.kind)
            columns = list(schema.names)
        elif self.kind == "jsonl":
            if self.columns:
                return
            columns = next((list(record) for _, record, _, _ in _json_rows(file, 0, 1)), [])
        else:
            header, columns = _header(file, self.kind)
            if not self.columns:
                self.header = header
        if double := [name for name in columns if columns.count(name) > 1]:
            raise FormatError(f"{file} names the column {double[0]!r} twice: rename one of them")
        if not self.columns:
            self.columns, self._schema = tuple(columns), schema if self.kind in TABLES else None
        elif tuple(columns) != self.columns:
            odd = sorted(set(columns) ^ set(self.columns)) or ["their order"]
            raise FormatError(f"{file} has other columns than {self.files[0].name} ({', '.join(odd)}): give files of one kind")
        elif self.kind in TABLES and not schema.equals(self._schema):
            odd = [name for name in columns if schema.field(name).type != self._schema.field(name).type]
            what = f"column {odd[0]!r} of another type" if odd else "another schema"
            raise FormatError(f"{file} has {what} than {self.files[0].name}: write them alike")

    def _rows(self, file: Path, columns: Sequence[str]) -> Iterator[tuple[Record, int, int]]:
        """All rows of a file with their line and where they begin: a byte in text formats, a row in tables."""
        if self.kind in TABLES:
            line = 0
            for batch in _batches(file, self.kind, 0, columns or None):
                for record in batch.to_pylist():
                    yield record, line + 1, line
                    line += 1
            return
        begins = self._first(file)
        for _, record, line, end in self._text_rows(file, begins, 1 if self.kind == "jsonl" else 2):
            yield record, line, begins
            begins = end

    def _first(self, file: Path) -> int:
        """Where the first row of a text file begins."""
        if self.kind == "jsonl":
            return 0
        with file.open("rb") as lines:
            return len(lines.readline())

    def _text_rows(self, file: Path, start: int, line: int) -> Iterator[tuple[str, Record, int, int]]:
        if self.kind == "jsonl":
            return _json_rows(file, start, line)
        return _table_rows(file, start, line, self.columns, self.kind)


class _Cursor:
    """A place in a file, from which rows are taken one shard after the other."""

    def __init__(self, dataset: Dataset, file: Path, start: int, line: int) -> None:
        self.dataset, self.file, self.position, self._line = dataset, file, start, line
        if dataset.kind in TABLES:
            self._batches = _batches(file, dataset.kind, start, None)
            self._rest: list[Any] = []
        else:
            self._text = dataset._text_rows(file, start, line)

    def take(self, rows: int, columns: Sequence[str]) -> Part:
        if self.dataset.kind in TABLES:
            import pyarrow as pa

            while sum(map(len, self._rest)) < rows:
                self._rest.append(next(self._batches))
            whole = pa.Table.from_batches(self._rest)
            table, rest = whole.slice(0, rows), whole.slice(rows)
            self._rest = rest.to_batches() if len(rest) else []
            places = [self.dataset._place(self.file, self.position + i + 1) for i in range(rows)]
            self.position += rows
            return Part((table.select(list(columns)) if columns else table).to_pylist(), places, table, self.dataset)
        taken = [next(self._text) for _ in range(rows)]
        self.position = taken[-1][3]
        places = [self.dataset._place(self.file, line) for _, _, line, _ in taken]
        return Part([record for _, record, _, _ in taken], places, [raw for raw, _, _, _ in taken], self.dataset)


# ── where a dataset lies ──


def _files(source: str) -> tuple[list[Path], Kind]:
    path = Path(source)
    if path.is_file():
        if path.suffix not in KINDS:
            raise FormatError(f"{path} is of no format that is read here: {_READS}")
        return [path], KINDS[path.suffix]
    if path.is_dir():
        return _folder(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", source) and path.suffix not in KINDS:
        return _hub(source), "arrow"
    raise FormatError(f"{source} does not exist: {_READS}")


def _folder(path: Path) -> tuple[list[Path], Kind]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").exists())
        raise FormatError(f"{path} holds the splits {', '.join(splits)}: name one of them, for example {path / splits[0]}")
    if (path / "state.json").exists():
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            files = [path / each["filename"] for each in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path / 'state.json'} is broken ({error}): save the dataset again") from None
        if state.get("_indices_files") or not all(file.is_file() and file.parent == path for file in files):
            raise FormatError(f"{path} is not the whole of a saved dataset: save it again with save_to_disk")
        return files, "arrow"
    found = sorted(f for f in path.rglob("*") if f.suffix in KINDS and f.is_file() and not f.name.startswith("."))
    kinds = sorted({KINDS[file.suffix] for file in found})
    if len(kinds) > 1:
        raise FormatError(f"{path} holds {' and '.join(kinds)} files: name a folder with one kind of them, or a file")
    if not found:
        raise FormatError(f"{path} holds no dataset: {_READS}")
    return found, kinds[0]


def _hub(source: str) -> list[Path]:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets") from None
    name, _, split = source.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:  # no such data set, configuration or split; no network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"{source} is neither here nor a data set that can be loaded ({reason}): check the name") from None
    return [Path(each["filename"]) for each in data.cache_files]


# ── tables ──


def _schema(file: Path, kind: Kind) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            return pq.read_schema(file)
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_stream(source).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{file} is no readable {kind} file ({error}): write it again") from None


def _batches(file: Path, kind: Kind, start: int, columns: Sequence[str] | None) -> Iterator[Any]:
    """Record batches of a file from a row on; what lies before is passed over without being decoded, as far as that goes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            with pq.ParquetFile(file) as table:
                groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
                first = 0
                while first < len(groups) and start >= groups[first]:
                    start -= groups[first]
                    first += 1
                wanted = list(columns) if columns else None
                batches = table.iter_batches(_BATCH, row_groups=list(range(first, len(groups))), columns=wanted)
                yield from _from(batches, start)
            return
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
            whole = (batch.select(list(columns)) if columns else batch for batch in stream)
            small = (batch.slice(at, _BATCH) for batch in _from(whole, start) for at in range(0, len(batch), _BATCH))
            yield from small
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError(f"{file} is no readable {kind} file ({error}): write it again") from None


def _from(batches: Iterator[Any], start: int) -> Iterator[Any]:
    for batch in batches:
        if start < len(batch):
            yield batch.slice(start) if start else batch
        start = max(0, start - len(batch))


# ── text formats ──

_SEPARATORS = {"csv": ",", "tsv": "\t"}


def _lines(file: Path, start: int, line: int) -> Iterator[tuple[str, int, int]]:
    """Lines from a byte on, each with its number and the byte behind it. Only a line feed ends a line."""
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            for raw in stream:
                start += len(raw)
                try:
                    text = raw.decode("utf-8-sig" if start == len(raw) else "utf-8")
                except UnicodeDecodeError as error:
                    raise FormatError(f"{file}, line {line} is not UTF-8 ({error.reason}): save the file as UTF-8") from None
                yield text, line, start
                line += 1
    except OSError as error:
        raise FormatError(f"{file} cannot be read ({error}): check the file") from None


def _json_rows(file: Path, start: int, line: int) -> Iterator[tuple[str, Record, int, int]]:
    for text, number, end in _lines(file, start, line):
        if not text.strip():
            continue
        try:
            record = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{file}, line {number} is no JSON ({error}): one JSON object a line") from None
        if not isinstance(record, dict):
            raise FormatError(f"{file}, line {number} is no JSON object: one object a line")
        yield text, record, number, end


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a name that comes twice would silently lose a value."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is named twice")
    return record


def _header(file: Path, kind: Kind) -> tuple[str, list[str]]:
    text = next((text for text, _, _ in _lines(file, 0, 1)), "").rstrip("\r\n")
    try:
        return text, (text.split("\t") if kind == "tsv" else next(csv_rows([text]), []))
    except csv.Error as error:
        raise FormatError(f"{file}, line 1 is no header ({error}): name the columns in one line") from None


def _table_rows(file: Path, start: int, line: int, columns: Sequence[str], kind: Kind) -> Iterator[tuple[str, Record, int, int]]:
    """Rows of a CSV file, whose fields may hold line breaks, or of a TSV file, which quotes nothing."""
    taken: list[tuple[str, int, int]] = []

    def fed() -> Iterator[str]:
        for each in _lines(file, start, line):
            taken.append(each)
            yield each[0]

    rows = csv_rows(fed()) if kind == "csv" else (text.rstrip("\r\n").split("\t") for text in fed())
    try:
        for row in rows:
            raw, number, end = "".join(text for text, _, _ in taken), taken[0][1], taken[-1][2]
            taken.clear()
            if not raw.strip("\r\n"):
                continue
            if len(row) != len(columns):
                raise FormatError(f"{file}, line {number} has {len(row)} fields, the header names {len(columns)}: mend the line")
            yield raw, dict(zip(columns, row, strict=True)), number, end
    except csv.Error as error:
        at = taken[0][1] if taken else line
        raise FormatError(f"{file}, line {at} is no CSV ({error}): quote the field, or write JSONL") from None


def _flat_names(columns: Mapping[str, Column]) -> Iterator[str]:
    def walk(name: str, type: Any) -> Iterator[str]:
        if hasattr(type, "num_fields") and type.num_fields and not hasattr(type, "value_type"):
            for i in range(type.num_fields):
                yield from walk(f"{name}.{type.field(i).name}", type.field(i).type)
        else:
            yield name

    for name, (_, type) in columns.items():
        yield from walk(name, type)


def _flat(value: Any, type: Any) -> Iterator[str]:
    """A value in cells of text: an object in one for each of its fields, a list in one."""
    if hasattr(type, "num_fields") and type.num_fields and not hasattr(type, "value_type"):
        for i in range(type.num_fields):
            yield from _flat(None if value is None else value[type.field(i).name], type.field(i).type)
    elif isinstance(value, list):
        yield "; ".join(map(str, value))
    else:
        yield "" if value is None else str(value)
