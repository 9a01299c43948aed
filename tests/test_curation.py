"""Scoring a dataset on the toy: planted emotions come first, planted regulation is found, a killed run goes on to the byte."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import affectlens as al
from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.cli import main
from affectlens.concepts import ConceptSet
from affectlens.conversations import STRETCH
from affectlens.curation import LONGEST, TOGETHER, Document, Scored, Scorer, Scoring, Source, read, score_shard, windows
from affectlens.curation.regulation import CALM, FEW, PEAK, WITHIN, Measures, Tally
from affectlens.curation.selection import Filter, Weights
from affectlens.dataset import Dataset
from affectlens.engine import Request, Result
from affectlens.engines.toy import CONTEXT, ToyEngine
from affectlens.errors import AffectlensError, EngineError, FormatError, RuleError, UnknownName
from affectlens.traces import Probe, read_text
from affectlens.vectors import ConceptVectors
from planted import toy_bench

ENGINE = ToyEngine()
NAMES = tuple(ENGINE.concepts)


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


@pytest.fixture(scope="module")
def baseline(vectors: ConceptVectors) -> Baseline:
    return Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(vectors), source="neutral dialogues")


def written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, n: int, words: int = 12) -> Path:
    """Short texts, every third one without an emotion."""
    rows = (
        {"id": i, "text": ENGINE.write(NAMES[i % 12] if i % 3 else None, f"topic {i % 40}", seed=i, words=words)}
        for i in range(n)
    )
    return written(path, rows)


def dense(concept: str, n: int) -> str:
    cues = ENGINE.concepts[concept]
    return " ".join(cues[i % len(cues)] for i in range(n))


def plain(seed: int, n: int) -> str:
    """Words that convey nothing and are on no topic."""
    words = ["house", "table", "chair", "street", "paper", "water", "light", "door", "window", "morning", "evening", "hour"]
    return " ".join(np.random.default_rng(seed).choice(words, n).tolist())


def scored(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted((out / "data").glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]


def run(file: Path, vectors: ConceptVectors, baseline: Baseline, out: Path, **how: Any) -> Scored:
    rows, fresh, engine = how.pop("rows", 50), how.pop("fresh", False), how.pop("engine", ENGINE)
    return al.score_corpus(
        engine, file, vectors=vectors, out=out, baseline=baseline, scoring=Scoring(**how), rows=rows, fresh=fresh
    )


# ── scores ──


def test_the_planted_emotion_scores_highest(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"n": i, "text": f"{plain(i, 20)} {dense(c, 30) if c else plain(i, 30)}"} for i, c in enumerate([*NAMES, None, None])]
    found = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    back = scored(tmp_path / "out")
    assert [{key: row[key] for key in ("n", "text")} for row in back] == rows and found.rows == found.kept == 14
    for row, name in zip(back, NAMES, strict=False):
        assert name in row["affect"]["top"]
        others = [each["affect"]["mean"][name] for each in back if each is not row]
        assert row["affect"]["mean"][name] > max(others)
        assert row["affect"]["peak"][name] > row["affect"]["mean"][name] and len(row["affect"]["top"]) == 3


def test_scores_are_those_of_the_monitor(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    words = f"{plain(1, 40)} {dense('angry', 20)} {plain(2, 40)}"
    run(written(tmp_path / "a.jsonl", [{"text": words}]), vectors, baseline, tmp_path / "out")
    (row,) = scored(tmp_path / "out")
    trace = baseline.standardise(read_text(ENGINE.run, words, Probe(vectors)))
    own = trace.scores[trace.of("text")]
    assert row["affect"]["tokens"] == len(own) and row["affect"]["windows"] == 1
    np.testing.assert_allclose([row["affect"]["mean"][n] for n in vectors.names], own.mean(axis=0), atol=6e-4)
    stretches = np.stack([own[i : i + STRETCH].mean(axis=0) for i in range(len(own) - STRETCH + 1)]).max(axis=0)
    np.testing.assert_allclose([row["affect"]["peak"][n] for n in vectors.names], stretches, atol=6e-4)


def test_valence_and_arousal_are_those_planted(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"text": f"{plain(i, 10)} {dense(name, 40)}"} for i, name in enumerate(NAMES)]
    run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    place = {name: row["affect"] for name, row in zip(NAMES, scored(tmp_path / "out"), strict=True)}
    pleasant, unpleasant = ("happy", "loving", "proud", "calm"), ("desperate", "angry", "guilty", "sad", "afraid")
    assert min(place[n]["valence"] for n in pleasant) > max(place[n]["valence"] for n in unpleasant)
    assert min(place[n]["arousal"] for n in ("angry", "surprised")) > max(place[n]["arousal"] for n in ("calm", "sad"))


def test_chosen_emotions_are_written_in_order(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = texts(tmp_path / "a.jsonl", 6)
    run(file, vectors, baseline, tmp_path / "out", emotions=("sad", "calm"), column="mood")
    run(file, vectors, baseline, tmp_path / "all")
    for few, every in zip(scored(tmp_path / "out"), scored(tmp_path / "all"), strict=True):
        assert list(few["mood"]["mean"]) == ["sad", "calm"]
        assert few["mood"]["mean"].items() <= every["affect"]["mean"].items() and set(few["mood"]["top"]) == {"sad", "calm"}
    with pytest.raises(UnknownName, match="did you mean calm"):
        run(file, vectors, baseline, tmp_path / "no", emotions=("clam",))


def test_conversations_have_scores_by_turn(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    turns = [
        ("system", plain(0, 8)),
        ("user", dense("afraid", 30)),
        ("assistant", dense("calm", 30)),
        ("user", dense("happy", 30)),
    ]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": words} for role, words in turns]},
        {"messages": [{"role": "user", "content": dense("sad", 20)}]},
        {"messages": []},
        {"messages": None},
    ]
    found = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    whole, user, empty, null = (row["affect"] for row in scored(tmp_path / "out"))
    assert [turn["role"] for turn in whole["turns"]] == ["system", "user", "assistant", "user"]
    best = [turn["mean"] and max(turn["mean"], key=turn["mean"].get) for turn in whole["turns"]]
    assert best == [None, "afraid", "calm", "happy"], "the baseline knows no words of a system"
    assert whole["top"][0] == "calm" and whole["mean"] == whole["turns"][2]["mean"], "a dialogue's own words are the assistant's"
    assert user["mean"] is None and user["top"] == [] and user["turns"][0]["tokens"] > 10
    assert (
        empty
        == null
        == {"tokens": 0, "windows": 0, "top": [], "valence": None, "arousal": None, "mean": None, "peak": None, "turns": []}
    )
    values = {check["name"]: check["value"] for check in found.report.checks}
    assert values["without words"] == "2 of 4" and values["without a word of an assistant"] == "1 of 4"


def test_prompt_and_response_are_an_exchange(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"prompt": dense("afraid", 20), "response": dense("calm", 20)}]
    run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    rows = [{"q": rows[0]["prompt"], "a": rows[0]["response"]}]
    run(written(tmp_path / "b.jsonl", rows), vectors, baseline, tmp_path / "other", messages="q, a")
    (one,), (other,) = scored(tmp_path / "out"), scored(tmp_path / "other")
    assert [turn["role"] for turn in one["affect"]["turns"]] == ["user", "assistant"] and one["affect"] == other["affect"]


# ── long documents ──


def test_windows_hold_every_word_once() -> None:
    turns = tuple((i, "user" if i % 2 == 0 else "assistant", plain(i, 5 + 40 * (i == 3))) for i in range(7))
    for size in (20, 60, 200, 10_000):
        cut = windows(turns, size)
        assert " ".join(words for window in cut for _, _, words in window).split() == " ".join(w for _, _, w in turns).split()
        assert all(sum(len(w.encode()) for _, _, w in window) <= size for window in cut)
        assert [n for window in cut for n, _, _ in window] == sorted(n for window in cut for n, _, _ in window)
    assert windows(turns, 10_000) == [turns]


def test_a_long_document_is_cut_and_said_to_be(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    long = f"{plain(1, 3000)}. {dense('sad', 40)} {plain(2, 3000)}"
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": f"{plain(i, 900)} {dense(('afraid', 'calm')[i % 2], 20)}"}
        for i in range(4)
    ]
    found = run(written(tmp_path / "a.jsonl", [{"text": long}, {"text": "It rained."}]), vectors, baseline, tmp_path / "out")
    first, second = scored(tmp_path / "out")
    n = first["affect"]["windows"]
    assert n == math.ceil(len(long.encode()) / min(2 * CONTEXT, LONGEST)) and second["affect"]["windows"] == 1
    assert first["affect"]["tokens"] == len(long.split()) + 1 - n, "of each window one word is not read; a full stop is a token"
    assert max(first["affect"]["peak"], key=first["affect"]["peak"].get) == "sad" and first["affect"]["peak"]["sad"] > 1
    assert next(c for c in found.report.checks if c["name"] == "cut into windows")["value"] == "1 of 2"
    run(written(tmp_path / "b.jsonl", [{"messages": talk}]), vectors, baseline, tmp_path / "talk")
    (row,) = scored(tmp_path / "talk")
    assert row["affect"]["windows"] == 8, "a turn of this length is two windows"
    assert [turn["role"] for turn in row["affect"]["turns"]] == ["user", "assistant"] * 2
    assert all(turn["tokens"] > 900 for turn in row["affect"]["turns"])


def test_a_window_that_does_not_fit_is_halved(vectors: ConceptVectors) -> None:
    """Where a byte is a token twice a context of bytes does not fit; words of one letter come near to that."""
    letters = " ".join("a" for _ in range(3 * CONTEXT))
    small = Request("It rained.")
    whole = list(
        read(
            ENGINE.run,
            [Document("a", (("text", letters),)), Document("b", (("text", small.prompt),))],
            Probe(vectors),
            context=CONTEXT * 4,
        )
    )  # type: ignore[arg-type]
    assert {each.document for each in whole} == {0, 1} and all(each.result for each in whole)
    first = [each for each in whole if each.document == 0]
    assert len(first) > 1 and sum(len(words.split()) for each in first for _, _, words in each.window) == 3 * CONTEXT


def test_what_the_model_refuses_is_left_out_and_counted(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    class Refusing(ToyEngine):
        def run(self, requests: Iterable[Request]) -> Iterator[Result]:
            asked = list(requests)
            if any("forbidden" in str(each.prompt) for each in asked):
                raise EngineError("this cannot be read: leave it out")
            return super().run(asked)

    rows = [{"text": "It rained all day."}, {"text": "forbidden words"}, {"text": "It snowed all day."}]
    found = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out", engine=Refusing())
    assert [row["affect"]["mean"] is None for row in scored(tmp_path / "out")] == [False, True, False]
    check = next(check for check in found.report.checks if check["name"] == "not read")
    assert check["value"] == "1 of 3" and check["detail"].startswith("this cannot be read") and check["status"] == "warn"


# ── selection ──


def test_filters_mean_what_they_say() -> None:
    def keeps(text: str, tokens: list[tuple[str, float, float]], numbers: dict[str, float]) -> bool:
        sieve = Filter.parse(text).sieve(["angry", "calm"])
        for speaker, *scores in tokens:
            sieve.step(speaker, np.array(scores))
        return sieve.keeps(numbers.get)

    hot = [("text", 0.0, 0.0), ("text", 4.0, -1.0), ("text", 4.0, 0.0), ("text", 0.0, 0.0)]
    assert keeps("angry > 3 for 2 tokens", hot, {}) and not keeps("angry > 3 for 3 tokens", hot, {})
    assert not keeps("not (angry > 3 for 2 tokens)", hot, {}) and keeps("not (angry > 3 for 2 tokens)", [], {})
    assert keeps("not angry > 3 for 1 tokens", hot, {}), "for speaks of all before it: there is a token that is not angry"
    assert keeps("mean(angry, 4) >= 2", hot, {}) and not keeps("mean(angry, 5) >= 0", hot, {}), "there are no five tokens"
    assert keeps("angry > 3 and calm < 0 for 1 tokens", hot, {}) and not keeps("angry > 3 and calm < 0 for 2 tokens", hot, {})
    assert keeps("angry > 1", hot, {"angry": 2.0}) and not keeps("angry > 3", hot, {"angry": 2.0}), "alone it is the mean"
    assert keeps("angry > 1 or calm > 9", [], {"angry": 2.0}) and not keeps("angry > 1 and calm > 9", [], {"angry": 2.0})
    assert not keeps("calm > 9", [], {}) and not keeps("not calm > 9", [], {}), "what is unknown is not kept"
    assert keeps("tokens >= 4 and not (arousal > 1)", [], {"tokens": 4, "arousal": 0.5})
    assert keeps("user.angry > 1 for 2 tokens", [("user", 2.0, 0.0)] * 2, {}) and not keeps(
        "user.angry > 1 for 2 tokens", hot, {}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hostil > 3", "unknown emotion 'hostil'"),
        ("calm > 3 until < 1", "until and cooldown are for alarms"),
        ("gap(calm) > 1", "leave gap() out"),
        ("user.calm > 1", "documents are plain texts here"),
        ("tokens > 3 for 5 tokens", "tokens is a number of the whole document"),
        ("mean(valence, 5) > 3", "valence is a number of the whole document"),
        ("calm 3", "where > or < should stand"),
    ],
)
def test_filters_that_mean_nothing_here_are_refused(text: str, message: str) -> None:
    with pytest.raises(RuleError) as error:
        Filter.parse(text).check(["calm", "sad"], ["text"], axes=True)
    assert message in str(error.value) and "^" in str(error.value)


def test_filters_need_axes_and_speakers_that_are_there() -> None:
    with pytest.raises(RuleError, match="unknown emotion 'valence'"):
        Filter.parse("valence > 1").check(["calm"], ["text"], axes=False)
    with pytest.raises(RuleError, match="nobody is called 'usr'"):
        Filter.parse("usr.calm > 1").check(["calm"], ["user", "assistant"], axes=False)
    Filter.parse("user.calm > 1 and tokens > 3").check(["calm"], ["user", "assistant"], axes=False)


def test_a_filter_keeps_and_counts(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"n": i, "text": f"{plain(i, 30)} {dense('angry', 20) if i % 4 == 0 else plain(i + 99, 20)}"} for i in range(40)]
    rows.append({"n": 40, "text": ""})
    file = written(tmp_path / "a.jsonl", rows)
    found = run(file, vectors, baseline, tmp_path / "out", filter="not (angry > 1 for 5 tokens) and tokens > 0", rows=8)
    assert [row["n"] for row in scored(tmp_path / "out")] == [i for i in range(40) if i % 4]
    assert (found.rows, found.kept) == (41, 30)
    check = next(check for check in found.report.checks if check["name"] == "kept")
    assert check["value"] == "30 of 41" and "11 dropped" in check["detail"]
    other = run(file, vectors, baseline, tmp_path / "hot", filter="mean(angry, 5) > 1.5", rows=8)
    assert [row["n"] for row in scored(tmp_path / "hot")] == list(range(0, 40, 4)) and other.kept == 10
    none = run(file, vectors, baseline, tmp_path / "none.jsonl", filter="tokens > 1000", rows=8)
    assert none.kept == 0 and none.data.read_bytes() == b""


def test_weights_tilt_by_the_scores_that_are_written(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", [*({"text": f"{plain(i, 9)} {dense(NAMES[i], 9)}"} for i in range(12)), {"text": " "}])
    found = run(file, vectors, baseline, tmp_path / "out", weights="calm=0.5, angry=-1,arousal=0.1")
    rows = scored(tmp_path / "out")
    weights = [row["weight"] for row in rows]
    wanted = [
        math.exp(0.5 * a["mean"]["calm"] - a["mean"]["angry"] + 0.1 * a["arousal"]) for a in (row["affect"] for row in rows[:-1])
    ]
    np.testing.assert_allclose(weights[:-1], wanted, rtol=1e-5)
    assert weights[-1] is None
    table = next(t for t in found.report.tables if t.title == "Selection")
    share = 100 * sum(wanted) ** 2 / sum(w * w for w in wanted) / 12
    assert table.rows[0][1] == f"{share:.1f} %" and table.rows[1][1] == f"{np.mean(wanted):.4g}"
    with pytest.raises(FormatError, match="use smaller coefficients"):
        run(file, vectors, baseline, tmp_path / "large", weights="angry=100000")
    for text in ("calm", "calm=", "=1", "calm=1,calm=2", "calm=inf"):
        with pytest.raises(FormatError, match="is no weight"):
            Weights.parse(text)
    with pytest.raises(UnknownName, match="did you mean calm"):
        run(file, vectors, baseline, tmp_path / "no", weights="clam=1")


# ── what a document is ──


def test_the_column_is_found_or_asked_for() -> None:
    assert Source.of(["id", "text"], Scoring(), "d") == Source(("text",), False)
    assert Source.of(["conversations"], Scoring(), "d") == Source(("conversations",), True)
    assert Source.of(["text", "messages"], Scoring(messages="messages"), "d") == Source(("messages",), True)
    assert Source.of(["a,b", "c"], Scoring(messages="a,b"), "d") == Source(("a,b",), True)
    for columns, scoring, message in (
        (
            ["text", "messages"],
            Scoring(),
            "d may mean text and messages: name one with --text or --messages (its columns are text, messages)",
        ),
        (
            ["body", "title"],
            Scoring(),
            "no column that is a text by custom: name one with --text or --messages (its columns are body, title)",
        ),
        (["body"], Scoring(text="txt"), "d has no column 'txt': its columns are body"),
        (["body"], Scoring(messages="body,reply"), "d has no column 'reply': its columns are body"),
        (["a", "b", "c"], Scoring(messages="a,b,c"), "names 3 columns"),
        (["text"], Scoring(text="text", messages="text"), "not both"),
    ):
        with pytest.raises(FormatError) as error:
            Source.of(columns, scoring, "d")
        assert message in str(error.value)


def test_hostile_rows(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": None},
        {"text": ""},
        {"text": " \n "},
        {"other": 1},
        {"text": "\ud800 half a character"},
        {"text": "日本語のテキスト 🙂 <script>alert(1)</script>"},
        {"text": "a"},
        {"text": "x" * 150_000},
        {"text": " ".join("word" for _ in range(20_000))},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(file, vectors, baseline, tmp_path / "out", rows=4)
    back = scored(tmp_path / "out")
    assert [{k: v for k, v in row.items() if k != "affect"} for row in back] == rows
    assert [row["affect"]["tokens"] > 0 for row in back] == [False] * 4 + [True, True, False, False, True]
    assert back[-1]["affect"]["windows"] == math.ceil(100_000 / (2 * CONTEXT)) and back[-1]["affect"]["tokens"] > 19_900
    page = found.page.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "日本語" in page
    json.loads((tmp_path / "out" / "report.json").read_text())
    for row, message in (
        ({"text": 7}, "line 2, column 'text' holds a number: name a column of texts with --text"),
        ({"text": ["a"]}, "line 2, column 'text' holds a list"),
        ({"text": "a", "affect": 1}, "line 2 has a column 'affect' already: name another one with --column"),
    ):
        with pytest.raises(FormatError, match="line 2") as error:
            run(written(tmp_path / "b.jsonl", [{"text": "fine"}, row]), vectors, baseline, tmp_path / "bad")
        assert message in str(error.value) and not (tmp_path / "bad").exists(), "found before anything is made"
    with pytest.raises(FormatError, match="line 1, column 'messages' has no speaker in turn 1"):
        run(written(tmp_path / "c.jsonl", [{"messages": [{"content": "a"}]}]), vectors, baseline, tmp_path / "bad")


def test_every_format_gets_the_same_scores(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = texts(tmp_path / "a.jsonl", 10)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    run(file, vectors, baseline, tmp_path / "out.jsonl", emotions=("calm", "sad"), weights="calm=1")
    wanted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in rows))
    run(tmp_path / "a.parquet", vectors, baseline, tmp_path / "out.parquet", emotions=("calm", "sad"), weights="calm=1", rows=4)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "text", "affect", "weight"] and str(
        table.schema.field("affect").type.field("mean").type
    ) == ("struct<calm: float, sad: float>")
    for one, other in zip(wanted, table.to_pylist(), strict=True):
        assert (one["id"], one["text"], one["weight"]) == (other["id"], other["text"], other["weight"])
        np.testing.assert_allclose(list(one["affect"]["mean"].values()), list(other["affect"]["mean"].values()), atol=1e-6)
    run(tmp_path / "a.tsv", vectors, baseline, tmp_path / "out.tsv", emotions=("calm", "sad"), weights="calm=1", rows=3)
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert lines[0][2:6] == ["affect.tokens", "affect.windows", "affect.top", "affect.valence"]
    column = lines[0].index("affect.mean.calm")
    assert [float(line[column]) for line in lines[1:]] == [row["affect"]["mean"]["calm"] for row in wanted]


# ── going on ──


def content(out: Path) -> dict[str, bytes]:
    """All files that must not depend on where a run was killed."""
    files = [*out.glob("data/*"), *out.glob("scored/*.json"), *out.glob("report.*")]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


SCRIPT = """
import sys
from pathlib import Path
import affectlens as al
from affectlens.engines.toy import ToyEngine
file, vectors, baseline, out = map(Path, sys.argv[1:])
al.score_corpus(
    ToyEngine(), file, vectors=al.ConceptVectors.load(vectors), out=out, baseline=al.Baseline.load(baseline),
    scoring=al.Scoring(filter="not (angry > 1 for 2 tokens)", weights="calm=1"), rows=10,
)
"""


def test_a_killed_run_goes_on_to_the_byte(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = texts(tmp_path / "a.jsonl", 300, words=10)
    vectors.save(tmp_path / "vectors")
    baseline.save(tmp_path / "baseline.json")

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(file), str(tmp_path / "vectors"), str(tmp_path / "baseline.json"), str(out)]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stderr and whole.stderr.read().decode()
    killed, out, before = 0, tmp_path / "killed", 0
    for more in (1, 3, 9):
        process = start(out)
        while process.poll() is None and len(list(out.glob("scored/0*.json"))) < before + more:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        before = len(list(out.glob("scored/0*.json")))
    assert killed == 3 and 0 < before < 30, "it was killed while it worked"
    last = start(out)
    assert last.wait(300) == 0
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.rglob(".tmp-*"))


class Counting(ToyEngine):
    """Counts what is read, and gives up after so many texts."""

    def __init__(self, most: int = 10**9) -> None:
        super().__init__()
        self.most, self.read, self.together = most, 0, 0

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        asked = list(requests)
        self.together = max(self.together, len(asked))
        self.read += len(asked)
        if self.read > self.most:
            raise KeyboardInterrupt
        return super().run(asked)


def test_nothing_that_is_done_is_read_again(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file, out = texts(tmp_path / "a.jsonl", 60), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(file, vectors, baseline, out, rows=10, engine=Counting(35))
    rest, nothing = Counting(), Counting()
    run(file, vectors, baseline, out, rows=10, engine=rest)
    assert rest.read == 30, "of the fourth shard nothing was kept, the first three are done"
    run(file, vectors, baseline, out, rows=10, engine=nothing)
    assert nothing.read == 0


@pytest.mark.parametrize("what", ["dataset", "filter", "vectors", "baseline", "emotions", "rows"])
def test_another_setting_is_refused(what: str, vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file, out = texts(tmp_path / "a.jsonl", 20), tmp_path / "out"
    run(file, vectors, baseline, out)
    before, how = content(out), {}
    if what == "dataset":
        texts(file, 21)
    elif what == "vectors":
        vectors = replace(vectors, centre=vectors.centre + 1)
        baseline = Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(vectors), source="neutral dialogues")
    elif what == "baseline":
        baseline = replace(baseline, source="others")
    else:
        how = {"filter": {"filter": "calm > 0"}, "emotions": {"emotions": ("calm",)}, "rows": {"rows": 7}}[what]
    name = "rows of a shard" if what == "rows" else what
    with pytest.raises(AffectlensError, match=rf"was made with other settings: .*{name}.*--fresh") as error:
        run(file, vectors, baseline, out, **how)
    assert "\n" not in str(error.value) and content(out) == before
    run(file, vectors, baseline, out, fresh=True, **how)
    assert content(out) != before


def test_a_broken_piece_of_a_run_is_named(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file, out = texts(tmp_path / "a.jsonl", 20), tmp_path / "out"
    run(file, vectors, baseline, out, rows=10)
    before = content(out)
    (out / "data" / "00001.jsonl").write_text("{}")
    with pytest.raises(FormatError, match=r"00001\.jsonl is not what was written: delete .*00001\.json and run again"):
        run(file, vectors, baseline, out, rows=10)
    (out / "scored" / "00001.json").unlink()
    run(file, vectors, baseline, out, rows=10)
    assert content(out) == before


def test_where_not_to_write(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = texts(tmp_path / "a.jsonl", 5)
    folder = tmp_path / "folder"
    folder.mkdir()
    texts(folder / "a.jsonl", 5)
    (tmp_path / "mine.jsonl").write_text("mine")
    for source, out, message in (
        (file, file, "is what is to be read"),
        (folder, folder, "is what is to be read"),
        (folder, folder / "out", "would be read as a part of it"),
        (file, tmp_path / "out.parquet", "a dataset of jsonl is written as .jsonl"),
        (file, tmp_path / "mine.jsonl", "exists already"),
    ):
        with pytest.raises(FormatError, match=message):
            run(source, vectors, baseline, out)
    assert (tmp_path / "mine.jsonl").read_text() == "mine" and len(list(folder.iterdir())) == 1


def test_memory_does_not_grow_with_the_dataset(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    peaks = []
    for n in (100, 600):
        file, engine = texts(tmp_path / f"{n}.jsonl", n, words=4), Counting()
        tracemalloc.start()
        run(file, vectors, baseline, tmp_path / str(n), rows=50, engine=engine)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert engine.read == n and engine.together == 50, "no more than a shard is read together"
    assert peaks[1] < peaks[0] + 2**19


def test_a_document_of_any_length_is_read_in_pieces(vectors: ConceptVectors) -> None:
    engine = Counting()
    document = Document("a", (("text", plain(0, 100_000)),))
    assert document.size > 2 * TOGETHER
    assert sum(1 for _ in read(engine.run, [document], Probe(vectors), context=CONTEXT)) == engine.read > 100
    assert engine.together <= TOGETHER / (CONTEXT / 2)


# ── shards ──


def test_a_shard_is_a_function_of_its_rows(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    """What many workers need: any shard alone, in any order, gives the same, and what they count adds up."""
    data = Dataset(texts(tmp_path / "a.jsonl", 40))
    measures = Measures.of(vectors.names, ConceptSet.load("emotions"))
    scorer = Scorer(Scoring(), Source(("text",), False), Probe(vectors), baseline, measures)
    shards = data.plan(lambda record, place: 1, rows=9)
    forward = [score_shard(ENGINE, data.read(shard), scorer, row=shard.row) for shard in shards]
    backward = [score_shard(ToyEngine(), data.read(shard), scorer, row=shard.row) for shard in reversed(shards)][::-1]
    for (one, keep, tally), (other, same, again) in zip(forward, backward, strict=True):
        assert one == other and keep.tolist() == same.tolist() and tally.as_dict() == again.as_dict()
    total, whole = Tally(measures), Tally(measures)
    for _, _, tally in forward:
        total.add(Tally.from_dict(json.loads(json.dumps(tally.as_dict())), measures))
    (every,) = data.plan(lambda record, place: 1, rows=100)
    whole.add(score_shard(ENGINE, data.read(every), scorer)[2])
    assert total.facts == whole.facts and total.highest == whole.highest
    for name in ("family", "exchanged", "plane", "returns", "replies"):
        assert (getattr(total, name) == getattr(whole, name)).all()
    np.testing.assert_allclose(total.moments, whole.moments, rtol=1e-12)


# ── regulation ──


def peaked(i: int, after: bool, before: bool) -> str:
    """A text with a peak of distress, with calm words around it or with words that keep it up."""

    sad = [" ".join(f"{dense('desperate', 1)} {plain(10 * i + k, 1)}" for k in range(start, start + 100)) for start in (0, 200)]
    quiet = [f"{plain(10 * i + 1, 20)} {dense('calm', 70)} {plain(10 * i + 2, 10)}" for _ in range(2)]
    return f"{(quiet if before else sad)[0]} {dense('desperate', 30)} {(quiet if after else sad)[1]}"


def test_a_planted_return_to_calm_is_found(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"text": peaked(i, after=i % 10 < 8, before=i % 10 < 1)} for i in range(60)]
    found = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    finding = found.report.findings[0]
    assert finding.id == "return" and finding.verdict == "holds" and finding.estimate and finding.null
    assert finding.estimate.value == pytest.approx(80) and finding.estimate.n == 60
    assert finding.estimate.low < 80 < finding.estimate.high and finding.null.value == pytest.approx(45, abs=3)
    assert "48 are at or below 0 again within 60 tokens, 6 were so" in finding.note


def test_what_only_comes_down_again_is_no_regulation(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"text": peaked(i, after=i % 10 < 5, before=i % 10 in (0, 1, 2, 7, 8))} for i in range(40)]
    found = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    finding = found.report.findings[0]
    assert finding.verdict == "fails" and finding.estimate and finding.estimate.value == pytest.approx(50)


def test_nothing_is_claimed_where_nothing_can_be(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    found = run(texts(tmp_path / "a.jsonl", 60), vectors, baseline, tmp_path / "out")
    one, other = found.report.findings
    assert one.verdict == other.verdict == "untestable"
    assert f"{FEW} are needed" in one.note and "no dialogue" in other.note
    few = vectors.select([name for name in vectors.names if name not in ("desperate", "afraid", "calm")])
    own = Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(few), source="neutral dialogues")
    found = run(tmp_path / "a.jsonl", few, own, tmp_path / "few")
    assert [f.verdict for f in found.report.findings] == ["untestable"] * 2
    assert "None of the emotions is one of distress" in found.report.findings[0].note


def dialogues(path: Path, met: float, others: float, n: int = 120) -> Path:
    """Dialogues, half with a distressed user; ``met`` of those and ``others`` of the rest get composed replies."""
    rows = []
    for i in range(n):
        distressed, share = i % 2 == 0, (i // 2 + 0.5) / (n / 2)
        composed = share < (met if distressed else others)
        user = dense("afraid" if distressed else "happy", 25)
        reply = dense("calm", 25) if composed else dense("nervous" if i % 4 < 2 else "desperate", 25)
        quiet = [("user", dense("calm", 12)), ("assistant", plain(i, 12))]
        turns = [*quiet, ("user", user), ("assistant", reply)]
        rows.append({"messages": [{"role": role, "content": words} for role, words in turns]})
    return written(path, rows)


def test_planted_composure_is_found(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    found = run(dialogues(tmp_path / "a.jsonl", 0.8, 0.2), vectors, baseline, tmp_path / "out")
    finding = found.report.findings[1]
    assert finding.verdict == "holds" and finding.estimate and finding.null
    assert finding.estimate.value == pytest.approx(80, abs=4) and finding.estimate.n == 60
    assert "dialogues" in finding.null.kind and f"mean distress {PEAK:g}" in finding.note
    same = run(dialogues(tmp_path / "b.jsonl", 0.5, 0.5), vectors, baseline, tmp_path / "same").report.findings[1]
    assert same.verdict == "fails" and same.null and same.null.p > 0.05


def test_the_nulls_keep_their_level() -> None:
    """Where the claims are false, p is below 0.05 in no more than 5 % of datasets."""
    measures, rng = Measures.of(NAMES, ConceptSet.load("emotions")), np.random.default_rng(0)
    hits = np.zeros(2)
    for seed in range(200):
        tally = Tally(measures)
        after, before = rng.random((2, 60)) < 0.5
        np.add.at(tally.returns, (after.astype(int), before.astype(int)), 1)
        np.add.at(tally.replies, ((rng.random(120) < 0.4).astype(int), (rng.random(120) < 0.3).astype(int)), 1)
        hits += [finding.null is not None and finding.null.p <= 0.05 for finding in tally.findings(draws=200, seed=seed)]
    assert (hits <= 20).all() and (hits >= 1).all()


def test_what_could_not_be_told_from_chance_is_not_tested() -> None:
    tally = Tally(Measures.of(NAMES, ConceptSet.load("emotions")))
    tally.returns[:], tally.replies[:] = [[40, 2], [2, 10]], [[40, 2], [40, 2]]
    one, other = tally.findings()
    assert one.verdict == other.verdict == "untestable"
    assert "4 differ between before and after" in one.note and "4 are composed" in other.note
    tally.returns[:], tally.replies[:] = [[40, 0], [20, 10]], [[40, 2], [30, 12]]
    assert [finding.verdict for finding in tally.findings()] == ["holds", "holds"]


def test_families_against_exchanged_names(vectors: ConceptVectors) -> None:
    """A family that is planted stands out of what exchanges of names give; noise does not."""
    names = ConceptSet.load("emotions").names
    measures, rng = Measures.of(names, ConceptSet.load("emotions")), np.random.default_rng(1)
    angry = measures.families["Hostile Anger"]
    for planted in (0.6, 0.0):
        tally = Tally(measures)
        for row in range(150):
            scores = rng.normal(size=len(names))
            scores[angry] += planted
            tally.document(row, "words", scores, np.zeros((0, 3)), [])
        shares = tally.shares()
        assert sum(e.value for _, e, _, _ in shares) == pytest.approx(100)
        if planted:
            assert shares[0][0] == "Hostile Anger" and shares[0][3] <= 0.05
        else:
            assert all(q > 0.05 for _, _, _, q in shares)
    assert (np.sort(measures.exchanged, axis=1) == np.sort(measures.exchanged[0])).all(), "families keep their sizes"


def test_the_peak_needs_tokens_on_both_sides() -> None:
    measures = Measures.of(NAMES, ConceptSet.load("emotions"))

    def counted(distress: np.ndarray) -> tuple[int, int, list[list[int]]]:
        tally = Tally(measures)
        series = np.column_stack([distress, np.zeros((len(distress), 2))])
        tally.document(0, "", np.zeros(len(NAMES)), series, [])
        return tally.facts["peaks"], int(tally.returns.sum()), tally.returns.tolist()

    rise = np.concatenate([np.full(WITHIN, 0.5), np.full(STRETCH, 2.0), np.full(WITHIN, -0.5)])
    assert counted(rise) == (1, 1, [[0, 0], [1, 0]]), "calm after, not before"
    assert counted(rise[::-1]) == (1, 1, [[0, 1], [0, 0]]) and counted(rise[1:]) == (1, 0, [[0, 0], [0, 0]])
    assert counted(np.full(300, CALM)) == (0, 0, [[0, 0], [0, 0]])


# ── the command ──


def test_the_command(vectors: ConceptVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vectors.save(tmp_path / "vectors")
    texts(tmp_path / "a.jsonl", 30)
    arguments = ["score-corpus", "a.jsonl", "--vectors", "vectors", "--out", "out", "--filter", "not (angry > 2 for 3 tokens)"]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["rows"] == 30 and facts["kept"] <= 30 and Path(facts["report"]).exists()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and "30 rows" in again.stdout
    assert (tmp_path / "vectors" / f"baseline-{vectors.layer}.json").exists()
    for more, line in (
        (["--filter", "hostil > 1"], "unknown emotion 'hostil'"),
        (["--filter", "calm >"], "where a number should stand"),
        (["--weights", "calm"], "is no weight"),
        (["--text", "body"], "a.jsonl has no column 'body': its columns are id, text"),
        ([], "other settings"),
    ):
        bad = CliRunner().invoke(main, [*arguments[:6], *more])
        assert bad.exit_code == 1 and line in bad.stderr, bad.output


def test_the_report_has_figures_for_what_there_is(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    rows = [{"text": peaked(i, after=i % 2 == 0, before=i % 3 == 0)} for i in range(30)]
    first = run(written(tmp_path / "a.jsonl", rows), vectors, baseline, tmp_path / "out")
    second = run(dialogues(tmp_path / "b.jsonl", 0.6, 0.3, 60), vectors, baseline, tmp_path / "talk")
    assert [f.id.partition("-")[2] for f in first.report.figures] == ["families", "plane", "course", "peak"]
    assert "replies" in [f.id.partition("-")[2] for f in second.report.figures]
    for each in (first, second):
        assert all(f.caption and f.title for f in each.report.figures)
        assert {t.id.partition("-")[2] for t in each.report.tables} == {"families", "levels", "highest"}
        assert each.page.name == "report.html" and each.page.stat().st_size > 10_000
