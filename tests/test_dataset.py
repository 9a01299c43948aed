"""Datasets in shards: every format read alike, nothing lost on the way back, everything broken found before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from affectlens.dataset import Column, Dataset, Record
from affectlens.errors import FormatError

ROWS = [{"id": i, "text": f"Row {i}, with a comma and a “quote”.", "n": i / 7, "tags": ["a", "b"][: i % 3]} for i in range(23)]


def look(record: Record, place: str) -> int:
    return len(str(record["text"]))


def jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"made": "here"}), path, row_group_size=10)
    return path


def csv(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    lines = [f'{row["id"]},"{row["text"]}\nsecond line, ""said""",{row["n"]}' for row in rows]
    path.write_text("\n".join(["id,text,n", *lines]) + "\n", encoding="utf-8")
    return path


def tsv(path: Path) -> Path:
    lines = [f'{row["id"]}\t{row["text"]} "\t{row["n"]}' for row in ROWS]
    path.write_text("\r\n".join(["id\ttext\tn", *lines]), encoding="utf-8")
    return path


def saved(path: Path) -> Path:
    """What ``datasets`` writes with ``save_to_disk``."""
    path.mkdir()
    table = pa.Table.from_pylist(ROWS)
    for i, part in enumerate((table.slice(0, 9), table.slice(9))):
        with pa.OSFile(str(path / f"data-{i}.arrow"), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=4)
    files = [{"filename": f"data-{i}.arrow"} for i in range(2)]
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {"a.jsonl": jsonl, "a.parquet": parquet, "a.csv": csv, "a.tsv": tsv, "saved": saved}


def added(n: int) -> dict[str, Column]:
    kind = pa.struct([("tokens", pa.int32()), ("top", pa.list_(pa.string())), ("mean", pa.struct([("at ease", pa.float32())]))])
    cells = [{"tokens": i, "top": ["calm", "sad"], "mean": {"at ease": i / 2} if i % 2 else None} for i in range(n)]
    return {"affect": (cells, kind)}


@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_the_rows_in_order_and_any_can_be_read_alone(name: str, tmp_path: Path) -> None:
    data = Dataset(FORMATS[name](tmp_path / name))
    shards = data.plan(look, columns=["text"] if data.kind in ("parquet", "arrow") else (), rows=4)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert [shard.row for shard in shards] == np.cumsum([0, *(shard.rows for shard in shards)])[:-1].tolist()
    in_order = [record for shard in shards for record in data.read(shard).records]
    assert [int(record["id"]) for record in in_order] == list(range(23))
    assert all(record["text"].startswith(f"Row {i}, with") for i, record in enumerate(in_order))
    for shard in reversed(shards):
        again = Dataset(tmp_path / name).read(shard)
        assert list(again.records) == in_order[shard.row : shard.row + shard.rows]
        assert data.read(shard).places == again.places


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_lost_on_the_way_back(name: str, tmp_path: Path) -> None:
    data = Dataset(FORMATS[name](tmp_path / name))
    shards, files = data.plan(look, rows=6), []
    for shard in shards:
        part = data.read(shard)
        keep = np.array([int(record["id"]) != 7 for record in part.records])
        files.append(tmp_path / f"{shard.number:05d}{data.suffix}")
        part.write(files[-1], keep, added(shard.rows))
    whole = tmp_path / f"whole{data.suffix}"
    data.join(files, whole)
    written = Dataset(whole)
    assert written.columns[: len(data.columns)] == data.columns
    (shard,) = written.plan(look)
    rows = written.read(shard)
    assert [int(record["id"]) for record in rows.records] == [i for i in range(23) if i != 7]
    if data.kind in ("parquet", "arrow"):
        table = pq.read_table(whole)
        assert table.drop_columns("affect").to_pylist() == [row for row in ROWS if row["id"] != 7]
        assert table["affect"][1].as_py() == {"tokens": 1, "top": ["calm", "sad"], "mean": {"at ease": 0.5}}
        assert name != "a.parquet" or table.schema.metadata[b"made"] == b"here"
    elif data.kind == "jsonl":
        own = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert all(line[:-1] in "".join(rows.own) for i, line in enumerate(own) if i != 7), "the bytes of a row stay"
        assert rows.records[1]["affect"]["mean"] == {"at ease": 0.5}
    else:
        assert written.columns[-3:] == ("affect.tokens", "affect.top", "affect.mean.at ease")
        assert rows.records[1]["affect.top"] == "calm; sad" and rows.records[1]["affect.mean.at ease"] == "0.5"
        assert rows.records[1]["n"] == str(1 / 7)


def test_what_json_can_hold_stays(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    odd = '{"text": "\\ud800 half", "big": 123456789012345678901234567890, "e": 1E5 , "sep": "a\u2028b"}'
    file.write_text(f"\ufeff{odd}\n\n  {{ }}  \r\n", encoding="utf-8")
    data = Dataset(file)
    (shard,) = data.plan(lambda record, place: 1)
    part = data.read(shard)
    assert part.places == [f"{file}, line 1", f"{file}, line 3"], "empty lines count as lines and are no rows"
    part.write(tmp_path / "out.jsonl", np.array([True, True]), {"x": ([1, None], pa.int32())})
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines[0] == odd[:-1] + ', "x": 1}' and json.loads(lines[1]) == {"x": None}


def test_shards_are_small_where_texts_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affectlens.dataset.BYTES", 100)
    shards = Dataset(jsonl(tmp_path / "a.jsonl")).plan(look)
    assert {shard.rows for shard in shards[:-1]} == {3}, "each ends with the row that exceeds the limit"


def test_the_content_is_what_counts(tmp_path: Path) -> None:
    one, other = Dataset(jsonl(tmp_path / "a.jsonl")), Dataset(jsonl(tmp_path / "b.jsonl"))
    assert one.id == other.id != Dataset(jsonl(tmp_path / "c.jsonl", ROWS[:-1])).id


def test_a_folder_is_one_dataset(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    parquet(tmp_path / "b.parquet", ROWS[10:])
    parquet(tmp_path / "sub" / "a.parquet", ROWS[:10])
    data = Dataset(tmp_path)
    shards = data.plan(look, rows=100)
    assert [(shard.file, shard.rows, shard.row) for shard in shards] == [(0, 13, 0), (1, 10, 13)]


BROKEN: dict[str, tuple[str, str, str]] = {
    "no JSON": ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
    "no object": ("a.jsonl", '{"text": "a"}\n["b"]\n', "line 2 is no JSON object"),
    "a name twice": ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2 is no JSON ('text' is named twice)"),
    "empty": ("a.jsonl", "\n\n", "holds no rows"),
    "two columns of a name": ("a.csv", "text,text\na,b\n", "names the column 'text' twice"),
    "a ragged row": ("a.csv", "text,n\na,1\nb\n", "line 3 has 1 fields, the header names 2"),
    "an open quote": ("a.csv", 'text,n\na,1\n"b,2\n', "line 3 is no CSV"),
    "another format": ("a.docx", "x", "of no format that is read here"),
    "no parquet": ("a.parquet", "x", "no readable parquet file"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_said_in_a_line(what: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[what]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(FormatError) as error:
        Dataset(tmp_path / name).plan(look)
    assert message in str(error.value) and "\n" not in str(error.value) and ":" in str(error.value)


def test_what_cannot_be_a_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(FormatError, match="line 2 is not UTF-8"):
        Dataset(tmp_path / "latin.jsonl").plan(look)
    with pytest.raises(FormatError, match="does not exist"):
        Dataset(tmp_path / "nothing.jsonl")
    (tmp_path / "mixed").mkdir()
    jsonl(tmp_path / "mixed" / "a.jsonl")
    parquet(tmp_path / "mixed" / "a.parquet")
    with pytest.raises(FormatError, match="jsonl and parquet files"):
        Dataset(tmp_path / "mixed")
    (tmp_path / "mixed" / "a.jsonl").unlink()
    parquet(tmp_path / "mixed" / "b.parquet", [{**row, "id": str(row["id"])} for row in ROWS])
    with pytest.raises(FormatError, match=r"column 'id' of another type than a\.parquet"):
        Dataset(tmp_path / "mixed")
    parquet(tmp_path / "mixed" / "b.parquet", [{"text": "a"}])
    with pytest.raises(FormatError, match=r"other columns than a\.parquet"):
        Dataset(tmp_path / "mixed")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "double.parquet")
    with pytest.raises(FormatError, match="names the column 'text' twice"):
        Dataset(tmp_path / "double.parquet")
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    saved(tmp_path / "dict" / "train")
    with pytest.raises(FormatError, match="holds the splits train: name one of them"):
        Dataset(tmp_path / "dict")
    (tmp_path / "dict" / "train" / "data-1.arrow").unlink()
    with pytest.raises(FormatError, match="not the whole of a saved dataset"):
        Dataset(tmp_path / "dict" / "train")


def test_what_datasets_saves_and_loads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(ROWS)
    made.select(range(3, 20)).save_to_disk(tmp_path / "d", num_shards=2)
    data = Dataset(tmp_path / "d")
    shards = data.plan(look, columns=["text"], rows=5)
    assert [record["id"] for shard in shards for record in data.read(shard).records] == list(range(3, 20))
    (tmp_path / "out").mkdir()
    for shard in shards:
        data.read(shard).write(tmp_path / "out" / f"{shard.number}.parquet", np.ones(shard.rows, bool), added(shard.rows))
    back = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert back.num_rows == 17 and back[0]["affect"]["top"] == ["calm", "sad"]
