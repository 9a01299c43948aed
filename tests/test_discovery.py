"""Discovery on the toy engine: what was planted is found, every source and option does what it says, and a killed run loses
nothing: what comes out of ten kills is byte for byte what comes out of none."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from affectlens import discovery
from affectlens.concepts import Concept, ConceptSet
from affectlens.corpus import read_texts
from affectlens.discovery import (
    CorpusStories,
    Discovery,
    Recipe,
    WrittenStories,
    discover,
    make_vectors,
    neutral_texts,
    open_run,
    open_stories,
    unblock,
)
from affectlens.engine import Readout, Request, Result, Where
from affectlens.engines.toy import TOPICS, ToyEngine
from affectlens.errors import AffectlensError, FormatError
from affectlens.pipeline import study
from affectlens.vectors import ConceptVectors

NAMES = ("angry", "calm", "sad", "proud")
KILLS = 10


@pytest.fixture(scope="module")
def engine() -> ToyEngine:
    return ToyEngine()


@pytest.fixture(scope="module")
def concepts() -> ConceptSet:
    """Four of the planted concepts, and few neutral topics."""
    emotions = ConceptSet.load("emotions")
    return replace(emotions.select(NAMES), neutral_topics=emotions.neutral_topics[:4])


def stories(engine: ToyEngine, n: int = 10, *, names: tuple[str, ...] = NAMES, words: int = 90) -> list[dict[str, str]]:
    """Records of ``n`` stories for each concept on changing topics."""
    return [
        {
            "text": engine.write(name, f"{TOPICS[i % 8].split()[0]} {i}", seed=i, words=words),
            "concept": name,
            "topic": f"topic {i}",
        }
        for i in range(n)
        for name in names
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(engine: ToyEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "stories.jsonl", stories(engine))


@pytest.fixture(scope="module")
def neutral(engine: ToyEngine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few short neutral texts: the bundled ones are long, and reading them takes the toy a second."""
    texts = [{"text": engine.write(None, topic.split()[0], seed=i)} for i, topic in enumerate(TOPICS)]
    return str(write_jsonl(tmp_path_factory.mktemp("neutral") / "neutral.jsonl", texts))


@pytest.fixture(scope="module")
def recipe(neutral: str) -> Recipe:
    return Recipe(neutral=neutral)


def found(engine: ToyEngine, concepts: ConceptSet, out: Path, source: Path, recipe: Recipe) -> Discovery:
    """Everything that discovery made, not the vectors alone."""
    opened = open_stories(source, concepts, engine, recipe)
    with open_run(out, engine, opened, recipe) as run:
        return make_vectors(engine, opened, run, recipe)


def cosines(vectors: ConceptVectors, engine: ToyEngine) -> np.ndarray:
    """Cosine of each vector (row) with each planted contrast (column) at two thirds of the depth."""
    planted = np.stack([engine.truth[name][vectors.layer] for name in vectors.names]).astype(np.float64)
    planted -= planted.mean(0)  # vectors are contrasts too
    return vectors.at() @ (planted / np.linalg.norm(planted, axis=1, keepdims=True)).T


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of every file of a run, but for its log and lock."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("run.json", "run.lock"))
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in files(folder).items()}


def on_disk(run: Path) -> list[dict[str, str]]:
    """Every story of a run, kept or dropped."""
    return [record for path in sorted((run / "stories").glob("*.parquet")) for record in pq.read_table(path).to_pylist()]


def one_line(error: pytest.ExceptionInfo[AffectlensError]) -> str:
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ── what was planted is found ──


def test_stories_that_the_model_writes_lead_to_the_planted_directions(
    concepts: ConceptSet, tmp_path: Path, recipe: Recipe
) -> None:
    engine = ToyEngine()
    report = study(engine, concepts, out=tmp_path, recipe=replace(recipe, per_concept=6), only=("separation",))
    written = on_disk(tmp_path)
    assert len(written) == 6 * len(NAMES)
    topics = {name: sorted(r["topic"] for r in written if r["concept"] == name) for name in NAMES}
    assert all(topics[name] == topics["calm"] and len(set(topics[name])) == 6 for name in NAMES)
    assert not any(concepts[r["concept"]].named_in(r["text"]) or "[story" in r["text"] for r in written)
    vectors = ConceptVectors.load(tmp_path)
    assert vectors.layer == engine.info.default_layer == 4
    assert vectors.names == tuple(sorted(NAMES)) and vectors.counts.tolist() == [6] * 4
    similarity = cosines(vectors, engine)
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
    assert np.median(np.diag(similarity)) > 0.5
    assert {finding.study for finding in report.findings} == {"separation"}
    assert (tmp_path / "report.html").stat().st_size > 10_000
    again = study(engine, concepts, out=tmp_path, recipe=replace(recipe, per_concept=6), only=("separation",))
    assert again.findings == report.findings


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_corpus_leads_to_the_planted_directions(seed: int, concepts: ConceptSet, tmp_path: Path, recipe: Recipe) -> None:
    engine = ToyEngine(seed=seed)
    path = write_jsonl(tmp_path / "c.jsonl", stories(engine, 24))
    similarity = cosines(discover(engine, concepts, out=tmp_path / "run", stories=path, recipe=recipe), engine)
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
    assert np.diag(similarity).min() > 0.5 and np.median(np.diag(similarity)) > 0.65


def test_where_nothing_is_planted_nothing_is_found(concepts: ConceptSet, tmp_path: Path, recipe: Recipe) -> None:
    found_there = []
    for seed in range(4):
        engine = ToyEngine(seed=seed, effect=0)
        path = write_jsonl(tmp_path / "c.jsonl", stories(engine, 24))
        vectors = discover(engine, concepts, out=tmp_path / f"r{seed}", stories=path, recipe=recipe)
        found_there.append(np.diag(cosines(vectors, engine)))
    # In 64 dimensions the cosine of two random contrasts has a standard deviation of an eighth or a little more.
    assert np.abs(found_there).max() < 0.6 and abs(np.mean(found_there)) < 0.2


# ── where stories come from ──


def test_the_same_stories_from_any_kind_of_file_give_the_same_vectors(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    table = tmp_path / "stories.parquet"
    pq.write_table(pa.Table.from_pylist(records), table)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", records[:15])
    pq.write_table(pa.Table.from_pylist(records[15:]), folder / "inner" / "b.parquet")
    (folder / "notes.txt").write_text("no stories here")
    (folder / ".hidden.jsonl").write_text("neither here")
    # As in mufxio's corpus on the Hub: "emotion", and no id.
    named = write_jsonl(tmp_path / "emotion.jsonl", [{"emotion": r["concept"], "text": r["text"]} for r in records])
    wanted = discover(engine, concepts, out=tmp_path / "r0", stories=corpus, recipe=recipe)
    for i, source in enumerate((table, folder, named), start=1):
        vectors = discover(engine, concepts, out=tmp_path / f"r{i}", stories=source, recipe=recipe)
        np.testing.assert_array_equal(vectors.directions, wanted.directions)
        assert vectors.names == wanted.names


def test_every_text_has_an_id_of_its_own(tmp_path: Path) -> None:
    records = [{"text": f"text {i}", "concept": "calm", "id": "same"} for i in range(3)]
    assert [t.id for t in read_texts(write_jsonl(tmp_path / "a.jsonl", records), labelled=True)] == [
        "c000000",
        "c000001",
        "c000002",
    ]
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "id": "mine"}, {"text": "y"}])
    assert [t.id for t in read_texts(tmp_path / "b.jsonl", labelled=False)] == ["mine", "b.jsonl:2"]


def test_texts_are_taken_as_they_are(tmp_path: Path) -> None:
    """JSON allows unescaped line and paragraph separators in a text; Windows editors put a mark in front of a file."""
    texts = ["one\u2028two", "three\u2029four\x85five", "Ünïcödé 🌊", " spaces "]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "concept": "calm"} for text in texts])
    assert [t.text for t in read_texts(path, labelled=True)] == texts
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert [t.text for t in read_texts(path, labelled=True)] == texts


def test_concepts_that_the_set_does_not_have_are_added_and_named(
    engine: ToyEngine, concepts: ConceptSet, tmp_path: Path, recipe: Recipe
) -> None:
    records = stories(engine, 4, names=("calm", "sad"))
    odd = [r | {"concept": "wistful"} for r in stories(engine, 4, names=("proud",))]
    path = write_jsonl(tmp_path / "c.jsonl", odd + records)
    source = open_stories(path, concepts, engine, Recipe())
    assert source.concepts.names == ("calm", "sad", "wistful")
    made = found(engine, concepts, tmp_path / "run", path, recipe)
    assert made.vectors.names == ("calm", "sad", "wistful")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["what"]["stories"]["not in the concept set"] == ["wistful"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no texts"),
        ("a.jsonl", b'{"text": "x", "concept": "calm"}\n{"text": ', "line 2 is no JSON"),
        ("a.jsonl", b"[1, 2]", "line 1 is no JSON object"),
        ("a.jsonl", b'{"concept": "calm"}', "record 1 has no text"),
        ("a.jsonl", b'{"text": null, "concept": "calm"}', "record 1 has no text"),
        ("a.jsonl", b'{"text": " ", "concept": "calm"}', "record 1 has no text"),
        ("a.jsonl", b'{"text": "x"}', "record 1 names no concept"),
        ("a.jsonl", b'{"text": "x", "concept": ["calm"]}', "record 1 names no concept"),
        ("a.jsonl", b'{"text": "x", "concept": "calm"}', "stories of 1 of these concepts \\(calm\\)"),
        ("a.jsonl", b'{"text": "half a pair: \\ud83d", "concept": "calm"}', "record 1 holds half a character"),
        ("a.jsonl", b"\xff\xfe\x00", "UTF-8"),
        ("a.parquet", b"PAR1 no", "no readable parquet"),
        ("a.parquet", b"", "no readable parquet"),
    ],
)
def test_a_broken_corpus_is_one_line(
    name: str, content: bytes, message: str, engine: ToyEngine, concepts: ConceptSet, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as error:
        open_stories(path, concepts, engine, Recipe())
    assert name in one_line(error)


def test_a_folder_without_stories_and_a_path_that_is_not_there(engine: ToyEngine, concepts: ConceptSet, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "holds no texts"), (tmp_path / "none", "does not exist")):
        with pytest.raises(FormatError, match=message) as error:
            open_stories(path, concepts, engine, Recipe())
        one_line(error)


def test_more_stories_than_topics_are_refused(engine: ToyEngine, concepts: ConceptSet, recipe: Recipe) -> None:
    few = replace(concepts, topics=concepts.topics[:3])
    with pytest.raises(FormatError, match="lower --per-concept or add topics") as error:
        open_stories("model", few, engine, replace(recipe, per_concept=4))
    one_line(error)


# ── which stories are used ──


def test_what_is_dropped_is_counted_by_reason(engine: ToyEngine, concepts: ConceptSet, tmp_path: Path, recipe: Recipe) -> None:
    records = stories(engine, 4)
    first, second = records[0]["text"], records[1]["text"]
    odd = [
        {"text": first.upper().replace(" ", "\n"), "concept": "angry"},  # reads the same
        {"text": second + " He was calm.", "concept": "calm"},
        {"text": second + " The quiet Calmness.", "concept": "sad"},  # names another concept only
        {"text": " ".join(first.split()[:49]), "concept": "angry"},
        {"text": " ".join(first.split()[:49]), "concept": "angry"},  # short before duplicate
    ]
    made = found(engine, concepts, tmp_path / "run", write_jsonl(tmp_path / "c.jsonl", records + odd), recipe)
    assert made.stories["counts"] == {"kept": 17, "duplicate": 1, "names the concept": 1, "too short": 2}
    assert made.stories["total"] == 21
    assert made.stories["dropped"] == {"angry": {"duplicate": 1, "too short": 2}, "calm": {"names the concept": 1}}
    assert len(made.activations) == 17
    assert len(on_disk(tmp_path / "run")) == 21  # what is dropped is kept on disk


def test_a_concept_without_usable_stories_is_left_out_and_named(
    engine: ToyEngine, concepts: ConceptSet, tmp_path: Path, recipe: Recipe
) -> None:
    records = [r if r["concept"] != "sad" else r | {"text": r["text"] + " sad"} for r in stories(engine, 3)]
    made = found(engine, concepts, tmp_path / "run", write_jsonl(tmp_path / "c.jsonl", records), recipe)
    assert made.vectors.names == ("angry", "calm", "proud")
    assert "sad" in made.concepts.names and made.stories["dropped"] == {"sad": {"names the concept": 3}}


def test_a_single_concept_with_usable_stories_is_refused_with_the_reasons(
    engine: ToyEngine, concepts: ConceptSet, tmp_path: Path, recipe: Recipe
) -> None:
    records = [r if r["concept"] == "calm" else r | {"text": r["text"] + " " + r["concept"]} for r in stories(engine, 3)]
    with pytest.raises(AffectlensError, match=r"of 1 concept \(3 kept, 9 names the concept\)") as error:
        found(engine, concepts, tmp_path / "run", write_jsonl(tmp_path / "c.jsonl", records), recipe)
    one_line(error)


def test_texts_that_are_too_short_to_read(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    with pytest.raises(FormatError, match="no text has 500 tokens") as error:
        discover(engine, concepts, out=tmp_path, stories=corpus, recipe=replace(recipe, first_token=500))
    one_line(error)


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("The rain came.", "The rain came."),
        ("[story 1]\n\nThe rain came.\n\n", "The rain came."),
        ("[Story 1]: The rain came.", "The rain came."),
        ("Sure, here it is:\n[story 1] The rain came. [story 2] It went.", "The rain came."),
        ("[ story ] The rain came.", "The rain came."),
        ("The rain came. " * 30 + "[story 2] It went.", ("The rain came. " * 30).strip()),
        ("[dialogue 1] The rain came.", "[dialogue 1] The rain came."),
        ("The [story] goes", "goes"),  # a heading that is none costs the words before it
        ("", ""),
    ],
)
def test_one_story_out_of_an_answer(text: str, story: str) -> None:
    assert unblock(text, "story") == story


# ── neutral texts ──


def test_neutral_dialogues_come_from_three_places(engine: ToyEngine, concepts: ConceptSet, tmp_path: Path) -> None:
    bundled = neutral_texts(Recipe(), concepts, engine)
    assert len(bundled) > 20 and all(t.text.startswith("Human:") and "\nAssistant:" in t.text for t in bundled)
    written = neutral_texts(Recipe(neutral="model"), concepts, engine)
    assert len(written) == len(concepts.neutral_topics)
    assert all(t.text.startswith("Human:") and "\nAssistant:" in t.text for t in written)
    own = write_jsonl(tmp_path / "n.jsonl", [{"text": "Person: a\n\nAI: b. AI: c", "concept": "ignored"}, {"text": "plain"}])
    texts = neutral_texts(Recipe(neutral=str(own)), concepts, engine)
    assert [t.text for t in texts] == ["Human: a\n\nAssistant: b. AI: c", "plain"]
    assert {t.concept for t in bundled + written + texts} == {""}


def test_each_neutral_source_is_used(engine: ToyEngine, concepts: ConceptSet, corpus: Path, neutral: str, tmp_path: Path) -> None:
    made = {
        source: found(engine, concepts, tmp_path / f"r{i}", corpus, Recipe(neutral=source))
        for i, source in enumerate(("bundled", "model", neutral))
    }
    assert len(made["model"].neutral) == len(concepts.neutral_topics)
    assert len(made[neutral].neutral) == len(TOPICS)
    directions = [each.vectors.directions for each in made.values()]
    assert not np.array_equal(directions[0], directions[1]) and not np.array_equal(directions[0], directions[2])


# ── options ──


def test_stories_are_read_from_the_first_token_on(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    made = found(engine, concepts, tmp_path, corpus, replace(recipe, first_token=20))
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    n = len(engine.layout(Request(text))) - 1
    assert made.activations.n_tokens[0] == n - 19
    readout = Readout(made.activations.layers, Where(last=n - 19), "mean")
    wanted = next(engine.read([text], readout)).values
    np.testing.assert_allclose(made.activations.layer(3)[0], wanted[1 + 3], rtol=1e-5)
    assert made.vectors.method["first_token"] == 20


def test_share_0_projects_nothing_out(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    some = found(engine, concepts, tmp_path / "a", corpus, replace(recipe, share=0.5)).vectors
    none = found(engine, concepts, tmp_path / "b", corpus, replace(recipe, share=0)).vectors
    assert all(len(basis) == 0 for basis in none.neutral) and all(len(basis) > 0 for basis in some.neutral)
    assert np.abs(some.at(4) @ some.neutral[4].T).max() < 1e-5
    np.testing.assert_allclose(some.centre, none.centre)


def test_neutral_components_over_tokens(engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "n.jsonl", [{"text": engine.write(None, t, seed=3)} for t in ("kitchen", "garden")])
    texts = found(engine, concepts, tmp_path / "a", corpus, Recipe(neutral=str(own)))
    tokens = found(engine, concepts, tmp_path / "b", corpus, Recipe(neutral=str(own), per_token=True))
    assert len(texts.neutral) == 2
    assert len(tokens.neutral) == texts.neutral.n_tokens.sum() and set(tokens.neutral.n_tokens.tolist()) == {1}
    np.testing.assert_allclose(tokens.neutral.layer(4).mean(0), _weighted(texts), rtol=1e-3, atol=1e-4)
    assert tokens.vectors.method["neutral components"] == "over tokens"
    assert texts.vectors.method["neutral components"] == "over texts"
    np.testing.assert_array_equal(tokens.activations.layer(4), texts.activations.layer(4))


def _weighted(made: Discovery) -> np.ndarray:
    return np.average(made.neutral.layer(4), axis=0, weights=made.neutral.n_tokens)


def test_another_model_writes(engine: ToyEngine, concepts: ConceptSet, tmp_path: Path, recipe: Recipe) -> None:
    writer = ToyEngine(seed=5)
    two = concepts.select(("calm", "sad"))
    vectors = discover(engine, two, out=tmp_path, recipe=replace(recipe, per_concept=2, neutral="model"), writer=writer)
    run = json.loads((tmp_path / "run.json").read_text())["what"]
    assert run["fingerprint"] == vectors.model["fingerprint"] == engine.info.fingerprint
    assert run["stories"]["writer"] == writer.info.fingerprint != engine.info.fingerprint


# ── killed, resumed, repeated ──


class Dying(ToyEngine):
    """Breaks down after so many requests."""

    left = 10**9

    def run(self, requests: Any) -> Iterator[Result]:
        for result in super().run(requests):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield result


def test_writing_goes_on_at_the_shard_where_it_broke_off(
    concepts: ConceptSet, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "STORY_SHARD", 4)
    two, recipe = concepts.select(("calm", "sad")), replace(recipe, per_concept=5)
    engine = Dying()
    engine.left = 6
    with pytest.raises(KeyboardInterrupt):
        discover(engine, two, out=tmp_path / "broken", recipe=recipe)
    assert [p.name for p in sorted((tmp_path / "broken" / "stories").glob("*.parquet"))] == ["00000.parquet"]
    engine.left = 10**9
    discover(engine, two, out=tmp_path / "broken", recipe=recipe)
    discover(engine, two, out=tmp_path / "whole", recipe=recipe)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_second_call_touches_nothing(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    first = discover(engine, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    before = files(tmp_path)
    broken = Dying()
    broken.left = 0  # nor does it run the model
    second = discover(broken, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    assert files(tmp_path) == before
    np.testing.assert_array_equal(first.directions, second.directions)


def test_only_what_depends_on_a_lost_file_is_made_again(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    discover(engine, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    before = files(tmp_path)
    (tmp_path / "vectors" / "vectors.safetensors").unlink()
    discover(engine, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    after = files(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}
    assert all(after[name] == before[name] for name in before if not name.startswith("vectors/"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"share": 0.25}, r"recipe.share \(was 0.5, now 0.25\)"),
        ({"first_token": 40}, r"recipe.first_token \(was 50, now 40\)"),
        ({"seed": 1, "draws": 20}, r"recipe.draws \(was 40, now 20\), recipe.seed \(was 0, now 1\)"),
    ],
)
def test_other_settings_are_refused_by_name(
    changes: dict[str, Any], named: str, engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    discover(engine, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    before = files(tmp_path)
    with pytest.raises(AffectlensError, match=named) as error:
        discover(engine, concepts, out=tmp_path, stories=corpus, recipe=replace(recipe, **changes))
    assert one_line(error).endswith("use another --out, or --fresh")
    assert files(tmp_path) == before


def test_other_models_and_stories_are_refused(
    engine: ToyEngine, concepts: ConceptSet, corpus: Path, tmp_path: Path, recipe: Recipe
) -> None:
    discover(engine, concepts, out=tmp_path, stories=corpus, recipe=recipe)
    with pytest.raises(AffectlensError, match="fingerprint"):
        discover(ToyEngine(seed=1), concepts, out=tmp_path, stories=corpus, recipe=recipe)
    other = write_jsonl(tmp_path.parent / "other.jsonl", stories(engine, 3))
    with pytest.raises(AffectlensError, match=r"stories\.texts"):
        discover(engine, concepts, out=tmp_path, stories=other, recipe=recipe)


def command(out: Path, corpus: Path, *more: str) -> list[str]:
    arguments = ("discover", "toy", "--out", str(out), "--stories", str(corpus), *more)
    return [sys.executable, "-m", "affectlens.cli", *arguments]


def killed_once(out: Path, corpus: Path, *, at: int, delay: float) -> bool:
    """Run until ``at`` files are there, and ``delay`` seconds more; then kill. False when the work ended before."""
    process = subprocess.Popen(command(out, corpus), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    due = float("inf")
    while process.poll() is None:
        if due == float("inf") and len(list(out.rglob("*"))) >= at:
            due = monotonic() + delay
        if monotonic() >= due:
            process.kill()
            process.wait()
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.003)
    return False


def test_ten_kills_change_no_byte(engine: ToyEngine, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "stories.jsonl", stories(engine, 500))
    subprocess.run(command(tmp_path / "whole", corpus), check=True, capture_output=True)
    before = files(tmp_path / "whole")
    subprocess.run(command(tmp_path / "whole", corpus), check=True, capture_output=True)
    assert files(tmp_path / "whole") == before
    # Spread over the files of the whole run rather than over time, so that a fast machine is killed in the midst too.
    random = np.random.default_rng(0)
    moments = np.sort(random.integers(1, len(list((tmp_path / "whole").rglob("*"))), KILLS))
    hits, seen = 0, set()
    for at in moments:
        hits += killed_once(tmp_path / "killed", corpus, at=int(at), delay=float(random.uniform(0, 0.03)))
        seen.add(len(list((tmp_path / "killed").rglob("*"))))
    assert hits >= KILLS - 2 and len(seen) >= 4, "the kills have to hit different moments of the work"
    subprocess.run(command(tmp_path / "killed", corpus), check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".tmp-*"))


def test_fresh_starts_again(engine: ToyEngine, corpus: Path, tmp_path: Path) -> None:
    subprocess.run(command(tmp_path, corpus), check=True, capture_output=True)
    refused = subprocess.run(command(tmp_path, corpus, "--share", "0.25"), capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1 and "--fresh" in refused.stderr
    subprocess.run(command(tmp_path, corpus, "--share", "0.25", "--fresh"), check=True, capture_output=True)
    assert ConceptVectors.load(tmp_path).method["share"] == 0.25


# ── which stories by default ──


@pytest.mark.parametrize(
    ("family", "parameters", "written"),
    [("llama", 135_000_000, False), ("llama", 2_999_999_999, False), ("llama", 3_000_000_000, True), ("toy", 1000, True)],
)
def test_small_models_read_bundled_stories(family: str, parameters: int, written: bool) -> None:
    engine = ToyEngine()
    engine.info = replace(engine.info, family=family, n_parameters=parameters)
    emotions = ConceptSet.load("emotions")
    assert isinstance(open_stories(None, emotions, engine, Recipe()), WrittenStories) == written
    assert isinstance(open_stories("model", emotions, engine, Recipe()), WrittenStories)
    assert isinstance(open_stories("bundled", emotions, engine, Recipe()), CorpusStories)
    assert isinstance(open_stories(None, emotions, engine, Recipe(), writer=ToyEngine()), WrittenStories)


def test_bundled_stories_of_each_set_and_of_parts(engine: ToyEngine) -> None:
    emotions = ConceptSet.load("emotions")
    counts = {}
    for name, concepts, recipe in (
        ("all", emotions, Recipe()),
        ("part", emotions.select(["calm", "afraid"]), Recipe()),
        ("first", emotions.select(["calm", "afraid"]), Recipe(per_concept=4)),
        ("manner", ConceptSet.load("manner"), Recipe()),
    ):
        source = open_stories("bundled", concepts, engine, recipe)
        texts = [text for i in range(source.shards()) for text in source.shard(i)]
        counts[name] = len(texts)
        assert {text.concept for text in texts} == set(concepts.names)
        if name == "first":
            assert sorted(text.id for text in texts) == [f"{c}-0{i}" for c in ("afraid", "calm") for i in (1, 2, 3, 4)]
            assert source.describe()["source"] == "bundled stories, the first 4 of each concept"
    assert counts == {"all": 2052, "part": 24, "first": 8, "manner": 192}


def test_a_word_without_bundled_stories_is_not_lost(engine: ToyEngine) -> None:
    """By default the model then writes; asked for the bundled stories, there is one clear line."""
    emotions = ConceptSet.load("emotions")
    more = replace(emotions, concepts=(*emotions.concepts, Concept("saudade", "longing for what may never return")))
    small = ToyEngine()
    small.info = replace(small.info, family="llama", n_parameters=1000)
    assert isinstance(open_stories(None, more, small, Recipe()), WrittenStories)
    with pytest.raises(FormatError, match="no stories of 'saudade': leave them out, or use --stories model"):
        open_stories("bundled", more, engine, Recipe())
