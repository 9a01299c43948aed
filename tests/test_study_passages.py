"""Strongest passages: any corpus is read as a stream, resumed where it was killed, and compared with labels where it has some."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from affectlens import search as searching
from affectlens.corpus import PASSAGE, cut, identity, read_labels, stream
from affectlens.engine import Request
from affectlens.errors import AffectlensError, FormatError, MissingExtra, UnknownName
from affectlens.search import Hit, search
from affectlens.studies import Bench, Outcome, Sources
from affectlens.studies.passages import STUDY, token_views
from affectlens.studies.passages.labels import Ranked
from planted import toy_bench

HEADLINE = ("auroc", "unnamed", "labels", "own")


def fresh(bench: Bench, **changes: object) -> Bench:
    return replace(bench, folder=Path(tempfile.mkdtemp()), **changes)


def run(bench: Bench) -> Outcome:
    return STUDY.run(fresh(bench))


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(bench: Bench, n: int = 6) -> list[dict[str, object]]:
    """Texts of the toy with labels that are not the concepts' names."""
    rows = []
    for i, name in enumerate(bench.vectors.names):
        for k in range(n):
            text = bench.engine.write(name, "topic", seed=100 * i + k, words=40)  # type: ignore[union-attr]
            rows.append({"id": f"{name}-{k}", "text": text, "label": f"is {name}"})
    return rows


# ── the study ──


def test_planted_emotions_are_found_in_texts_with_their_label() -> None:
    outcome = run(toy_bench())
    verdicts = {finding.id: finding.verdict for finding in outcome.findings}
    assert {id: verdicts[id] for id in HEADLINE} == dict.fromkeys(HEADLINE, "holds")
    table = next(table for table in outcome.tables if table.id == "passages")
    assert {row[0] for row in table.rows} == set(toy_bench().vectors.names) and all("⟦" in row[2] for row in table.rows)


def test_nothing_holds_where_nothing_is_planted() -> None:
    assert "holds" not in {finding.verdict for finding in run(toy_bench(effect=0.0)).findings}


def test_scores_marks_and_auroc_agree_with_an_independent_computation(tmp_path: Path) -> None:
    bench = toy_bench()
    rows = labelled(bench)
    names = "\n".join(f'"is {name}" = ["{name}"]' for name in bench.vectors.names)
    (tmp_path / "labels.toml").write_text(f"[labels]\n{names}")
    sources = Sources(corpus=str(write(tmp_path / "texts.jsonl", rows)), labels=tmp_path / "labels.toml")
    outcome = run(replace(bench, sources=sources))

    vectors = bench.vectors
    direction, centre = vectors.at()[vectors.index("calm")].astype(float), vectors.centre[vectors.row()].astype(float)
    scores = []
    for result in bench.engine.run(Request(row["text"], readouts=(replace(vectors.readout(), onto=None),)) for row in rows):
        moved = result.readings[0].values[0][1:].astype(float) - centre  # the first token is not read
        scores.append(moved @ direction / np.linalg.norm(moved, axis=1))
    means = np.array([own.mean() for own in scores])

    raw = outcome.raw["passages"]
    best = [i for i, concept in enumerate(raw["concept"]) if concept == "calm"]
    assert [raw["document"][i] for i in best] == [rows[i]["id"] for i in np.argsort(-means)[: len(best)]]
    assert raw["score"][best[0]] == pytest.approx(means.max(), abs=1e-5)
    threshold = np.quantile(np.concatenate(scores), 0.9)
    assert raw["threshold"][best[0]] == pytest.approx(threshold, abs=searching.WIDTH)
    top = int(means.argmax())
    marked = raw["marked"][best[0]]
    assert marked.replace("⟦", "").replace("⟧", "") == rows[top]["text"]
    inside = " ".join(part.split("⟧")[0] for part in marked.split("⟦")[1:]).split()
    assert abs(len(inside) - (scores[top] > threshold).sum()) <= 6  # full stops are tokens of their own

    table = next(table for table in outcome.tables if table.id == "labels")
    row = next(row for row in table.rows if row[0] == "is calm")
    assert row[3] == pytest.approx(roc_auc_score([own["label"] == "is calm" for own in rows], means), abs=1e-6)


def test_without_labels_or_without_a_model_it_says_so_and_shows_the_passages_all_the_same(tmp_path: Path) -> None:
    bench = toy_bench()
    rows = [{"text": row["text"]} for row in labelled(bench)]
    outcome = run(replace(bench, sources=Sources(corpus=str(write(tmp_path / "texts.jsonl", rows)))))
    found = {finding.id: finding for finding in outcome.findings}
    assert {found[id].verdict for id in HEADLINE} == {"untestable"} and "no labels" in found["auroc"].note
    assert outcome.tables[0].rows and outcome.raw["passages"]["text"] and STUDY.draw(outcome.data) == []
    bare = STUDY.run(replace(bench, engine=None))
    assert {finding.verdict for finding in bare.findings} == {"untestable"} and STUDY.requests(replace(bench, engine=None)) == ()


def test_words_of_an_emotion_count_only_in_its_own_passages(tmp_path: Path) -> None:
    bench = toy_bench()
    rows: list[dict[str, object]] = [
        {"text": f"{row['text']} {str(row['label'])[3:]} {row['text']}"} for row in labelled(bench, 8)
    ]
    found = {}
    for right, shift in (("holds", 0), ("fails", 9)):  # every text names its own emotion, or that of another one
        moved = [
            {"text": row["text"].replace(f" {name} ", f" {other} ")}
            for row, name, other in zip(
                rows, np.repeat(bench.vectors.names, 8), np.roll(np.repeat(bench.vectors.names, 8), 8 * shift), strict=True
            )
        ]
        sources = Sources(corpus=str(write(tmp_path / f"{shift}.jsonl", moved)))
        found[right] = next(f for f in run(replace(bench, sources=sources)).findings if f.id == "words").verdict
    assert found["holds"] == "holds" and found["fails"] == "fails"


def test_figures_and_token_views_are_drawn_from_plain_data() -> None:
    outcome = run(toy_bench())
    data = json.loads(json.dumps(outcome.data, allow_nan=False))
    assert {figure.id for figure in STUDY.draw(data)} == {"labels", "matrix"}
    assert {finding.figure for finding in outcome.findings} <= {"labels", "matrix", ""}
    for view in token_views(data):
        assert len(view["tokens"]) == len(view["scores"][view["concept"]]) and view["scores"][view["concept"]][0] is None


def test_auroc_compares_texts_of_a_kind_only_and_counts_ties_and_weights() -> None:
    rng = np.random.default_rng(0)
    scores, kinds, has = rng.integers(0, 5, (60, 3)).astype(float), rng.integers(0, 3, 60), rng.random((60, 3)) < 0.3
    weights = rng.integers(0, 3, 60)
    for c in range(3):
        wins = pairs = 0.0
        for i in np.flatnonzero(has[:, c]):
            for j in np.flatnonzero(~has[:, c] & (kinds == kinds[i])):
                wins += weights[i] * weights[j] * (0.5 + 0.5 * np.sign(scores[i, c] - scores[j, c]))
                pairs += weights[i] * weights[j]
        assert Ranked(scores, kinds).auroc(has, weights[:, None])[c] == pytest.approx(wins / pairs)


# ── the search ──


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from affectlens import search as searching
    from affectlens.corpus import stream
    from affectlens.engines.toy import ToyEngine
    from affectlens.vectors import ConceptVectors
    searching.SHARD, corpus, folder, vectors, after = 8, *sys.argv[1:4], int(sys.argv[4])
    class Mortal(ToyEngine):
        def run(self, requests):
            global after
            after -= 1
            for result in super().run(requests):
                if after < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result
    searching.search(Mortal(), ConceptVectors.load(vectors), stream(corpus), Path(folder), identity="corpus")
"""


def test_a_killed_search_goes_on_where_it_stopped_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = toy_bench()
    corpus = write(tmp_path / "texts.jsonl", labelled(bench, 4))  # 48 texts
    bench.vectors.save(tmp_path / "vectors")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), corpus, tmp_path / "killed", tmp_path / "vectors", "3"]
    assert subprocess.run(list(map(str, command)), capture_output=True).returncode == -9
    monkeypatch.setattr(searching, "SHARD", 8)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("passages-*")}
    assert len(kept) == 3 and not list((tmp_path / "killed").glob("*4*"))

    def searched(name: str, identity: str = "corpus") -> searching.Search:
        return search(bench.engine, bench.vectors, stream(corpus), tmp_path / name, identity=identity)  # type: ignore[arg-type]

    resumed, whole = searched("killed"), searched("whole")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (resumed.counts == whole.counts).all() and resumed.passages == whole.passages == 48
    for mine, theirs in zip(resumed.best, whole.best, strict=True):
        assert [(hit.score, hit.document) for hit in mine] == [(hit.score, hit.document) for hit in theirs]
        assert all((a.scores == b.scores).all() and (a.spans == b.spans).all() for a, b in zip(mine, theirs, strict=True))
    shards = sorted((tmp_path / "killed").glob("passages-*"))
    assert [shard.read_bytes() for shard in shards] == [f.read_bytes() for f in sorted((tmp_path / "whole").glob("passages-*"))]
    assert searched("killed", "another").passages == 48 and not any(
        file.stat().st_mtime_ns == time for file, time in kept.items()
    )


def test_long_texts_are_pooled_over_their_passages_and_equal_passages_count_once(tmp_path: Path) -> None:
    bench = toy_bench()
    long = " ".join(bench.engine.write("calm", f"topic {k}", seed=k, words=90) for k in range(4))  # type: ignore[union-attr]
    rows: list[dict[str, object]] = [{"text": long, "label": "calm"}, {"text": long, "label": "sad"}, {"text": "so"}]
    found = search(bench.engine, bench.vectors, stream(write(tmp_path / "a.jsonl", rows)), tmp_path / "found", identity=0)  # type: ignore[arg-type]
    n = len(list(cut(long)))
    assert n > 1 and found.passages == 2 * n + 1 and (found.documents, found.labelled) == (3, 2)
    first, second = found.with_labels()
    assert first.labels == ("calm",) and first.tokens == second.tokens > 300
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-6)
    assert all(len({hit.text for hit in own}) == len(own) == n for own in found.best)  # "so" is too short to be ranked
    assert all("".join(hit.tokens()[0]) == hit.text for own in found.best for hit in own)


def test_a_stretch_of_a_long_passage_is_shown_around_its_strongest_tokens() -> None:
    text = "a b c d e f"
    spans, scores = np.array([[i, i + 1] for i in range(2, 11, 2)]), np.array([0.0, 0.3, 0.3, 0.0, 0.0])
    assert Hit(0.1, "", 0, text, spans, scores).marked(0.2, most=2) == "… ⟦c d⟧ …"
    assert Hit(0.1, "", 0, text, spans, scores).marked(0.2) == "a b ⟦c d⟧ e f"


# ── corpora ──


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "one", "labels": ["joy", 3]}, {"text": " "}, {"content": "two", "emotion": "fear"}])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    value = [{"from": "gpt", "value": "No."}]
    write(tmp_path / "b.jsonl", [{"conversation": chat}, {"turns": [["Anna", "Yes."]]}, {"conversations": value}])
    pq.write_table(pa.table({"text": ["three", "four"], "label": [0, 1]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("five\nsix\n", encoding="utf-8-sig")
    (tmp_path / "e.csv").write_text('id,text,labels\nx,"se, ven","a, b"\n')
    (tmp_path / "f.tsv").write_text("it's \"eight\t0,1\tz\n")
    (tmp_path / "labels.txt").write_text("zero\nfirst\n")
    found = [(document.text, document.labels) for document in stream(tmp_path)]
    assert found == [
        ("one", ("joy", "3")),
        ("two", ("fear",)),
        ("user: Hi\n\nassistant: Hello", ()),
        ("Anna: Yes.", ()),
        ("gpt: No.", ()),
        ("three", ("zero",)),
        ("four", ("first",)),
        ("five\nsix\n", ()),
        ("se, ven", ("a", "b")),
        ("it's \"eight", ("zero", "first")),
    ]
    assert identity(tmp_path) == identity(tmp_path)
    (tmp_path / "d.txt").write_text("another")
    assert identity(tmp_path) != identity(tmp_path / "d.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"words": "x"}', "a.jsonl:1 has no text"),
        ("a.jsonl", "{", "line 1 is no JSON"),
        ("a.jsonl", '{"text": ""}', "holds no texts"),
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.csv", 'text\n"never closed\n', "no table"),
        ("a.parquet", "no", "no readable parquet"),
    ],
)
def test_a_broken_corpus_gets_one_clear_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match=message) as caught:
        STUDY.requests(replace(toy_bench(), sources=Sources(corpus=str(tmp_path))))
    assert "\n" not in str(caught.value)


def test_passages_are_whole_texts_cut_evenly() -> None:
    rng = np.random.default_rng(0)
    text = " ".join("word" * rng.integers(1, 4) + "." * int(rng.random() < 0.1) for _ in range(3000))
    parts = list(cut(text))
    assert " ".join(parts) == text
    assert all(PASSAGE / 4 < len(part) <= PASSAGE for part in parts) and all(part.endswith(".") for part in parts[:-1])
    for odd in ("x" * 5000, "😀" * 2000, "。好" * 1000, "half \ud800"):
        parts = list(cut(odd))
        assert "".join(parts) == odd.encode("utf-8", "replace").decode() and max(len(p.encode()) for p in parts) <= PASSAGE
    assert list(cut(" \n ")) == []


def test_a_data_set_is_streamed_and_its_numbered_labels_get_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Rows(list[dict[str, object]]):
        def __init__(self, rows: list[dict[str, object]]) -> None:
            super().__init__(rows)
            self.features = {"labels": types.SimpleNamespace(feature=types.SimpleNamespace(names=["joy", "fear"]))}

    def load_dataset(name: str, **options: object) -> Rows:
        asked.append((name, options))
        if name == "no/thing":
            raise FileNotFoundError("Dataset 'no/thing' doesn't exist")
        return Rows([{"text": "Oh", "labels": [1]}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert [document.labels for document in stream("org/name:test")] == [("fear",)]
    assert asked == [("org/name", {"split": "test", "streaming": True})]
    with pytest.raises(FormatError, match=r"doesn't exist.*check the name"):
        list(stream("no/thing"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'affectlens\[datasets\]'"):
        list(stream("org/name"))
    for missing in ("texts.jsonl", "folder/texts.jsonl", "../texts", "name"):
        with pytest.raises(FormatError, match="does not exist"):
            list(stream(missing))


def test_labels_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    bench, file = toy_bench(), tmp_path / "labels.toml"
    for content, error, message in (
        ('[labels]\njoy = ["hapy"]', UnknownName, "did you mean happy"),
        ("[labels]\njoy = 3", FormatError, "neither a concept nor a list"),
        ("joy = 'happy'", FormatError, "no table of labels"),
        ("[labels", FormatError, "no TOML"),
    ):
        file.write_text(content)
        with pytest.raises(error, match=message) as caught:
            STUDY.requests(replace(bench, sources=Sources(labels=file)))
        assert isinstance(caught.value, AffectlensError) and "\n" not in str(caught.value)


def test_the_example_maps_every_label_of_goemotions_to_emotions_of_the_set() -> None:
    from affectlens.concepts import ConceptSet

    meaning = read_labels(Path(__file__).parents[1] / "examples" / "goemotions.toml")
    emotions = ConceptSet.load("emotions")
    assert len(meaning) == 28 and all(name in emotions for own in meaning.values() for name in own)
