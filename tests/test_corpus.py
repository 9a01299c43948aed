"""The bundled corpus holds what it promises, every planted fault is one clear line, and a corpus of one's own can be checked."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import affectlens.audit
from affectlens import corpus
from affectlens.audit import Check, audit
from affectlens.cli import main
from affectlens.concepts import ConceptSet
from affectlens.errors import FormatError, UnknownName

ROOT = Path(__file__).parents[1]
Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def emotions() -> ConceptSet:
    return ConceptSet.load("emotions")


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "corpus" / "draw.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the bundled corpus to break."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus.bundled("stories").parent, folder)
    return folder


def change(folder: Path, name: str, how: Callable[[Records], Any]) -> None:
    file = folder / f"{name}.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    how(records)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def failed(folder: Path | None) -> list[Check]:
    return [check for check in audit(folder) if not check.passed]


def story(records: Records, id: str) -> dict[str, Any]:
    return next(record for record in records if record["id"] == id)


# ── what is bundled ──


def test_the_bundled_corpus_passes() -> None:
    assert failed(None) == []


@pytest.mark.parametrize("kind", ["stories", "speakers", "concealment"])
def test_texts_follow_the_plan(kind: str, draw: ModuleType, emotions: ConceptSet) -> None:
    planned = {record["id"]: record for record in getattr(draw, kind)(emotions)}
    written = {record["id"]: record for record in corpus.load(kind)}
    assert list(planned) == list(written)
    for id, plan in planned.items():
        for key, value in plan.items():
            if key == "exchanges":
                assert len(written[id]["turns"]) == 2 * value
            elif key == "named":
                assert bool(written[id]["names"]) == value
            else:
                assert written[id][key] == value, (id, key)


def test_topic_and_emotion_are_nearly_independent() -> None:
    """Cramer's V of topic and cluster, against the same labels shuffled: no topic may belong to a kind of feeling."""
    import numpy as np
    from scipy.stats.contingency import association

    emotions = ConceptSet.load("emotions")
    stories = corpus.load("stories")
    topics = np.unique([r["topic"] for r in stories], return_inverse=True)[1]
    clusters = np.unique([str(emotions[r["concept"]].cluster) for r in stories], return_inverse=True)[1]

    def dependence(labels: Any) -> float:
        table = np.zeros((100, 10), int)
        np.add.at(table, (topics, labels), 1)
        return float(association(table))

    rng = np.random.default_rng(0)
    assert dependence(clusters) < min(dependence(rng.permutation(clusters)) for _ in range(20))


def test_the_first_stories_of_each_emotion_are_balanced() -> None:
    first = [r for r in corpus.load("stories") if int(r["id"][-2:]) <= corpus.QUICK]
    assert Counter(Counter(r["concept"] for r in first).values()) == {corpus.QUICK: 171}
    by_concept = {name: [r for r in first if r["concept"] == name] for name in {r["concept"] for r in first}}
    assert all(len({(r["person"], r["tense"]) for r in those}) == 4 for those in by_concept.values())
    assert all({r["writer"][0] for r in those} == set("abcd") for those in by_concept.values())


def test_held_out_dialogues_are_like_the_neutral_ones_and_nothing_is_fitted_on_them() -> None:
    def exchanges(records: Records) -> list[int]:
        return sorted(record["text"].count("\nAI:") for record in records)

    def words(records: Records) -> list[int]:
        return sorted(len(record["text"].split()) for record in records)

    fitted, held_out = corpus.load("neutral"), corpus.load("neutral_heldout")
    assert exchanges(held_out) == exchanges(fitted)[::2]
    assert all(abs(a - b) <= 15 for a, b in zip(words(held_out), words(fitted)[::2], strict=True))
    named = [p for p in (ROOT / "src" / "affectlens").rglob("*.py") if "neutral_heldout" in p.read_text(encoding="utf-8")]
    assert sorted(p.name for p in named) == ["baseline.py", "bundled.py", "corpus.py"]


def test_every_concept_has_guidance_and_synonyms() -> None:
    for name in corpus.STORIES:
        for concept in ConceptSet.load(name):
            assert concept.guidance and 12 <= len(concept.guidance.split()) <= 45, concept.name
            assert 4 <= len(concept.synonyms) <= 14, concept.name
            assert not {s.casefold() for s in concept.synonyms} & {f.casefold() for f in concept.forms}, concept.name


def test_unknown_file() -> None:
    with pytest.raises(UnknownName, match="did you mean scenarios"):
        corpus.load("scenario")


# ── the blind check ──


def test_blind_answers(draw: ModuleType, emotions: ConceptSet) -> None:
    """The answers are to the drawn questions, and reach what was asked of them."""
    planned = {record["id"]: record["candidates"] for record in draw.blind(emotions)}
    answers = {record["id"]: record for record in corpus.load("blind")}
    assert list(planned) == list(answers)
    texts = {record["id"]: record for record in corpus.load("stories")}
    right = close = 0
    for id, record in answers.items():
        assert record["candidates"] == planned[id] and record["answer"] in planned[id]
        asked = texts[id]["concept"]
        right += record["answer"] == asked
        close += emotions[record["answer"]].cluster == emotions[asked].cluster
    assert right / len(answers) >= 0.85 and close / len(answers) >= 0.97


def test_the_readme_tells_the_figures_of_the_blind_check(emotions: ConceptSet) -> None:
    readme = (corpus.bundled("blind").parent / "README.md").read_text(encoding="utf-8")
    figures = [check.found for check in audit() if check.file == "blind.jsonl" and check.what.endswith("named")]
    assert len(figures) == 2 and all(found in readme for found in figures), figures
    concept = {record["id"]: record["concept"] for record in corpus.load("stories")}
    wrong = [r for r in corpus.load("blind") if r["answer"] != concept[r["id"]]]
    assert all(f"{r['id']} with {r['answer']}" in readme for r in wrong), wrong


# ── planted faults ──


def _shorten(records: Records) -> None:
    story(records, "calm-04")["text"] = " ".join(story(records, "calm-04")["text"].split()[:100])


def _say(id: str, word: str) -> Callable[[Records], None]:
    def say(records: Records) -> None:
        words = story(records, id)["text"].split()
        story(records, id)["text"] = " ".join([*words[:30], word, *words[31:]])

    return say


def _copy_half(records: Records) -> None:
    source, target = story(records, "proud-01")["text"].split(), story(records, "tired-01")["text"].split()
    story(records, "tired-01")["text"] = " ".join([*target[:60], *source[60:]])


def _reopen(records: Records) -> None:
    for record in records[:14:2]:
        record["text"] = "On that grey morning " + " ".join(record["text"].split()[4:])


def _same_phrase(records: Records) -> None:
    for record in records[:60:12]:
        record["text"] = " ".join([*record["text"].split()[:-6], "as though nothing could ever change"])


def _one_name(records: Records) -> None:
    for record in records[::30]:
        words = record["text"].split()
        record["text"] = " ".join([*words[:40], "beside Ottokar", *words[42:]])


def _repeat_sentence(records: Records) -> None:
    story(records, "sad-02")["text"] = "I went and I sat and I saw and I was. " * 12


def _set(id: str, key: str, value: Any) -> Callable[[Records], None]:
    def set_(records: Records) -> None:
        story(records, id)[key] = value

    return set_


def _drop(id: str) -> Callable[[Records], None]:
    def drop(records: Records) -> None:
        records.remove(story(records, id))

    return drop


def _swap_persons(records: Records) -> None:
    for record in records:
        if record["concept"] == "calm":
            record["person"] = "first"


def _one_topic(records: Records) -> None:
    topic = story(records, "calm-01")["topic"]
    for record in records:
        if record["concept"] == "calm":
            record["topic"] = topic


FAULTS: dict[str, tuple[str, Callable[[Records], Any], str, str]] = {
    # what was broken: file, how, the check that must fail, what its line must say
    "a story missing": ("stories", _drop("calm-03"), "counts", "calm: 11 stories: make it 12"),
    "a short story": ("stories", _shorten, "length", "calm-04: 100 words: make it 110 to 190"),
    "the emotion's word": ("stories", _say("afraid-05", "afraid"), "named", "afraid-05: 'afraid' gives afraid away"),
    "another form of it": ("stories", _say("angry-05", "ANGRILY,"), "named", "angry-05: 'angrily' gives angry away"),
    "a synonym": ("stories", _say("angry-06", "furious"), "named", "angry-06: 'furious' gives angry away"),
    "half a story copied": ("stories", _copy_half, "similarity", "proud-01 and tired-01 share"),
    "a phrase of six words in five texts": (
        "stories",
        _same_phrase,
        "repeated",
        "'as though nothing could ever change' stands in 5",
    ),
    "one opening for seven": ("stories", _reopen, "openings", "7 texts begin 'on that grey morning'"),
    "one first name for all": ("stories", _one_name, "first names", "Ottokar occurs in"),
    "one sentence over and over": ("stories", _repeat_sentence, "variety", "sad-02: 0.06 of the first 100 words are different"),
    "narrators of one kind": ("stories", _swap_persons, "person", "calm: 100% of its stories have one person"),
    "one topic for an emotion": ("stories", _one_topic, "topics", "calm: on 1 topics: spread it over 12"),
    "an unknown emotion": (
        "stories",
        _set("calm-01", "concept", "calmness"),
        "fields",
        "concept 'calmness' is not among the 171",
    ),
    "an unknown topic": ("stories", _set("calm-01", "topic", "Elsewhere."), "fields", "calm-01: topic is 'Elsewhere.'"),
    "an id twice": ("stories", _set("calm-01", "id", "calm-02"), "fields", "id 'calm-02' is used 2 times"),
    "no text": ("stories", _set("calm-01", "text", " "), "fields", "calm-01: text is missing or empty"),
    "broken characters": ("stories", _say("calm-01", "cafÃ©"), "readable", "calm-01: 'Ã©' is no text"),
    "feeling in a neutral dialogue": ("neutral", _say("n001", "afraid"), "feeling", "n001: 'afraid' names afraid"),
    "feeling in a held-out dialogue": ("neutral_heldout", _say("h007", "afraid"), "feeling", "h007: 'afraid' names afraid"),
    "a held-out topic that was fitted": (
        "neutral_heldout",
        _set("h003", "topic", "Why leap years exist"),
        "held out",
        "h003: 'Why leap years exist' is a topic of theirs: take another",
    ),
    "a held-out dialogue that was fitted": (
        "neutral_heldout",
        lambda rs: rs[0].update(text=corpus.load("neutral")[16]["text"]),
        "held out",
        "h001 and n017 share 100% of their 5-word sequences: rewrite the former",
    ),
    "an emotion named by a speaker": (
        "concealment",
        lambda rs: rs[0]["turns"][0].__setitem__(1, f"I am {rs[0]['real']}."),
        "named",
        "concealment-001: 'amazed' names amazed",
    ),
    "a speaker with another emotion": ("speakers", _set("speakers-001", "person", "calm"), "person", "calm: 3 dialogues"),
    "a ladder without its number": (
        "ladders",
        lambda rs: rs[0].update(text="No number."),
        "values",
        "{value} must stand in it once",
    ),
    "an activity of no category": ("activities", lambda rs: rs[0].update(category="fun"), "fields", "category is 'fun'"),
    "a contrast whose word is gone": (
        "contrasts",
        lambda rs: next(r for r in rs if r["kind"] == "negation").update(negated="Nothing."),
        "parts",
        "its marked parts are not in the text",
    ),
    "an opening that names a feeling": ("openings", _say("self-01", "calm"), "feeling", "self-01: 'calm' names calm"),
    "a reply that names a feeling": (
        "reactions",
        lambda rs: rs[0]["react"].__setitem__(0, "You need not be terrified, I am with you."),
        "feeling",
        "reaction-afraid: 'terrified' names terrified",
    ),
    "a reply too few": (
        "reactions",
        lambda rs: rs[0]["neutral"].pop(),
        "replies",
        "reaction-afraid: 3 replies neutral: make it 4",
    ),
    "a reply that goes on": (
        "scripts",
        lambda rs: rs[0]["deny"].__setitem__(0, "No, nothing at all, " * 5),
        "replies",
        "script-sad-1: a reply deny of 20 words: make it 6 to 16",
    ),
    "a script that keeps its emotion to itself": (
        "scripts",
        _set("script-sad-1", "scenario", "Tomas and Leila unpack boxes."),
        "said",
        "script-sad-1: the scenario does not name sad",
    ),
    "a script of strangers": ("scripts", _set("script-sad-1", "listener", "Nobody"), "people", "Nobody is not in the opening"),
    "a script too few": ("scripts", lambda rs: rs.pop(0), "counts", "sad: 1 scripts: make it 2"),
    "a scenario that names its emotion": ("scenarios", _say("happy-1", "happy"), "named", "happy-1: 'happy' names happy"),
    "a prompt too few": ("profile", lambda rs: rs.pop(0), "counts", "hard: 159 prompts: make it 160"),
    "an answer that was not offered": ("blind", lambda rs: rs[0].update(answer="blissful"), "answers", "ask again"),
    "a reader who guessed": (
        "blind",
        lambda rs: [r.update(answer=r["candidates"][0]) for r in rs],
        "cluster named",
        "rewrite it",
    ),
    "a manner named": ("manner", _say("sarcasm-03", "sarcastic"), "named", "sarcasm-03: 'sarcastic' gives sarcasm away"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant, what, line = FAULTS[fault]
    check = affectlens.audit._bundled_file  # the other files are as they were, and take seconds
    monkeypatch.setattr(affectlens.audit, "_bundled_file", lambda file: check(file) if file.stem == name else [])
    change(copy, name, plant)
    found = failed(copy)
    assert {check.file for check in found} == {f"{name}.jsonl"}
    faults = [fault for check in found if check.what == what for fault in check.faults]
    assert any(line in fault for fault in faults), faults
    assert all(": " in fault for fault in faults)  # what is wrong, then what to do


def test_planted_bytes_and_lines(copy: Path) -> None:
    file = copy / "stories.jsonl"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"the", b"th\xe9", 1))
    assert [c.what for c in failed(copy)] == ["readable"] and "save it as UTF-8" in failed(copy)[0].faults[0]
    file.write_bytes(b"{broken\n" + content)
    assert "line 1 is no JSON" in failed(copy)[0].faults[0]
    (copy / "ladders.jsonl").unlink()
    assert "ladders.jsonl does not exist: put it back" in failed(copy)[-1].faults[0]


def test_writers_who_repeat_themselves(copy: Path) -> None:
    """Each writer with a phrase that no other uses: never in more than four texts, and yet more than chance."""

    def plant(records: Records) -> None:
        seen: Counter[str] = Counter()
        for record in records:
            writer = record["writer"]
            seen[writer] += 1
            mark = f"{writer}x{seen[writer] // 4}"
            record["text"] = " ".join([*record["text"].split()[:-6], f"{mark} and {mark} again and again"])

    change(copy, "stories", plant)
    lines = [fault for check in failed(copy) if check.what == "repeated" for fault in check.faults]
    assert any("writers repeat themselves more than chance allows" in line for line in lines)


# ── a corpus of one's own ──


@pytest.fixture
def own() -> Iterator[Records]:
    """Stories without any optional field, of emotions that the set does not have."""
    renamed = {"calm": "stillness", "angry": "wrath"}
    yield [{"emotion": renamed[r["concept"]], "text": r["text"]} for r in corpus.load("stories") if r["concept"] in renamed]


def test_own_corpus(own: Records, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(own), tmp_path / "own.parquet")
    assert [check.what for check in audit(tmp_path / "own.parquet")] == [
        "fields", "counts", "length", "named", "similarity", "repeated", "openings", "first names", "variety", "rhythm",
    ]  # fmt: skip
    assert failed(tmp_path / "own.parquet") == []


def test_own_corpus_is_held_to_what_its_fields_say(own: Records, tmp_path: Path) -> None:
    records = [{**r, "id": str(i), "topic": f"topic {i % 3}", "person": "first"} for i, r in enumerate(own)]
    records += [{**records[0], "id": "again"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    found = {check.what: check.faults for check in failed(tmp_path)}
    assert "0 and again share 100% of their 5-word sequences: rewrite one" in found["similarity"]
    assert "stillness: 100% of its stories have one person: even it out" in found["person"]
    assert any("third person" not in line and "first person without an I" in line for line in found["narration"])


@pytest.mark.parametrize("key", ["id", "topic", "person", "tense", "telling", "writer", "turns", "scenario"])
@pytest.mark.parametrize("value", [None, 5, [["x"]], float("nan")])
def test_own_corpus_with_odd_fields(key: str, value: Any, own: Records, tmp_path: Path) -> None:
    """Other people's files have nulls, numbers and lists where ours have text: an optional field then counts as absent."""
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps({**r, key: value} if i else r) for i, r in enumerate(own[6:18])), encoding="utf-8")
    assert {check.what for check in failed(file)} <= ({"fields"} if key == "id" else set())  # one id for all


def test_own_corpus_without_words(tmp_path: Path) -> None:
    file = tmp_path / "stories.jsonl"  # the name alone does not make it a copy of the bundled corpus
    file.write_text("\n".join(json.dumps({"concept": c, "text": "!!! ..."}) for c in ("calm", "angry")), encoding="utf-8")
    assert {"length", "variety", "rhythm"} <= {check.what for check in failed(tmp_path)}
    file.write_text("[1, 2]", encoding="utf-8")
    assert [(c.what, "is no JSON object" in c.faults[0]) for c in failed(file)] == [("readable", True)]


def test_own_corpus_of_one_concept_or_none(own: Records, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in own if r["emotion"] == "wrath"), encoding="utf-8")
    assert "vectors contrast concepts" in failed(file)[0].faults[0]
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(FormatError, match="holds no texts"):
        audit(file)
    with pytest.raises(FormatError, match="does not exist"):
        audit(tmp_path / "nowhere.jsonl")


# ── the command ──


def test_command(copy: Path) -> None:
    done = CliRunner().invoke(main, ["corpus", "check"])
    assert done.exit_code == 0 and done.output.rstrip().endswith("0 failed")
    change(copy, "stories", _shorten)
    done = CliRunner().invoke(main, ["corpus", "check", str(copy)])
    assert done.exit_code == 1
    assert "stories.jsonl: length: calm-04: 100 words: make it 110 to 190" in done.output.splitlines()
    found = json.loads(CliRunner().invoke(main, ["corpus", "check", str(copy), "--json"]).output)
    assert [check["what"] for check in found if not check["passed"]] == ["length"]
    done = CliRunner().invoke(main, ["corpus", "check", "nowhere.jsonl"])
    assert done.exit_code == 1 and "nowhere.jsonl does not exist" in done.output
