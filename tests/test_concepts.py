"""Concept sets: the bundled one holds what it claims, and a wrong file says in one line what is wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from affectlens.concepts import Concept, ConceptSet
from affectlens.errors import FormatError, UnknownName

# Of the 171 published words, sorted and joined by line breaks.
WORDS_SHA256 = "72dc656da9951eb66d9d8292aa7f0b55bb3c6ef2a687d50d3220b1e3b58fdb40"
# Table of clusters in the published study.
CLUSTER_SIZES = {
    "Exuberant Joy": 20,
    "Peaceful Contentment": 9,
    "Compassionate Gratitude": 15,
    "Competitive Pride": 9,
    "Playful Amusement": 2,
    "Depleted Disengagement": 15,
    "Vigilant Suspicion": 3,
    "Hostile Anger": 25,
    "Fear and Overwhelm": 41,
    "Despair and Shame": 32,
}
# Of the lines "word pleasure arousal dominance" of the 45 rated words.
RATINGS_SHA256 = "b13aa417f96736166d882d0fe171ac3aa231de54d184f308893dbd617a0d4ed5"
# Of the lines "word cluster".
CLUSTERS_SHA256 = "d1637cb188e62886ef1c0c5ef6e50a8de5470545cccf8b6b81a9d7e727b4d0a7"

CONDUCT = Path(__file__).parents[1] / "examples" / "concepts" / "conduct.toml"

MINIMAL = """
name = "pair"
[concepts.sarcasm]
definition = "saying the opposite of what one means"
[concepts.candour]
definition = "saying all one thinks"
"""


def sha256_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@pytest.fixture(scope="module")
def emotions() -> ConceptSet:
    return ConceptSet.load("emotions")


@pytest.fixture(scope="module")
def neutral() -> list[dict[str, str]]:
    content = (files("affectlens") / "data" / "corpus" / "neutral.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(content, encoding="utf-8")
        return path

    return write


class TestBundledConcepts:
    def test_words_are_the_published_ones(self, emotions: ConceptSet) -> None:
        assert len(emotions) == 171
        assert sha256_of(list(emotions.names)) == WORDS_SHA256

    def test_clusters_are_the_published_ones(self, emotions: ConceptSet) -> None:
        assert {cluster: len(names) for cluster, names in emotions.clusters.items()} == CLUSTER_SIZES
        assert sha256_of([f"{concept.name} {concept.cluster}" for concept in emotions]) == CLUSTERS_SHA256

    def test_ratings_are_the_published_ones(self, emotions: ConceptSet) -> None:
        lines = [
            f"{concept.name} {rating.pleasure} {rating.arousal} {rating.dominance}"
            for concept in emotions
            if (rating := concept.rating) is not None
        ]
        assert len(lines) == 45
        assert sha256_of(lines) == RATINGS_SHA256

    def test_every_concept_is_named_by_each_of_its_forms(self, emotions: ConceptSet) -> None:
        for concept in emotions:
            assert concept.forms[0] == concept.name
            for form in concept.forms:
                assert concept.named_in(f"It was {form.upper()}.") == form

    def test_definitions_differ_and_do_not_name_what_they_define(self, emotions: ConceptSet) -> None:
        assert len({concept.definition for concept in emotions}) == 171
        for concept in emotions:
            assert concept.named_in(concept.definition) is None, concept.name
            assert 40 <= len(concept.definition) <= 120, concept.name

    def test_everyday_words_that_mean_something_else_are_no_forms(self, emotions: ConceptSet) -> None:
        innocent = (
            "In spite of the alarm clock, please shake hands: the light reflected on the patients' rest. "
            "It depends on the play, the contents of the mystery novel, a stick, and thanks to the cheers. "
            "He resigned"  # the one word here that always counts
        )
        named = {concept.name for concept in emotions if concept.named_in(innocent)}
        assert named == {"resigned"}

    def test_opposites_do_not_name_each_other(self, emotions: ConceptSet) -> None:
        assert emotions["happy"].named_in("unhappy and unhappily") is None
        assert emotions["patient"].named_in("impatient, impatiently") is None
        assert emotions["hope"].named_in("hopeful") == emotions["hopeful"].named_in("hopeful") == "hopeful"


class TestBundledTopicsAndPrompts:
    def test_topics(self, emotions: ConceptSet) -> None:
        assert len(emotions.topics) == 100
        for topic in emotions.topics:
            assert 30 <= len(topic) <= 100, topic
            # One sentence.
            assert re.fullmatch(r"[A-Z][^.!?]*\.", topic), topic

    def test_topics_are_no_variants_of_each_other(self, emotions: ConceptSet) -> None:
        small = {
            "a",
            "an",
            "the",
            "of",
            "in",
            "on",
            "to",
            "and",
            "is",
            "that",
            "for",
            "at",
            "with",
            "has",
            "his",
            "her",
        }
        words = [set(re.findall(r"\w+", topic.lower())) - small for topic in emotions.topics]
        for index, one in enumerate(words):
            for other in words[index + 1 :]:
                assert len(one & other) / len(one | other) < 0.4, (one, other)

    def test_no_topic_names_an_emotion(self, emotions: ConceptSet) -> None:
        for topic in (*emotions.topics, *emotions.neutral_topics):
            assert [concept.name for concept in emotions if concept.named_in(topic)] == [], topic

    def test_neutral_topics(self, emotions: ConceptSet) -> None:
        assert len(emotions.neutral_topics) == 40
        assert all(15 <= len(topic) <= 100 for topic in emotions.neutral_topics)

    @pytest.mark.parametrize("n", [1, 12])
    def test_story_prompt_fills_every_slot(self, emotions: ConceptSet, n: int) -> None:
        prompt = emotions.story_prompt("at ease", emotions.topics[0], n)
        for part in (
            f"stories: {n}.",
            emotions.topics[0],
            "at ease",
            emotions["at ease"].definition,
            "[story 1]",
        ):
            assert part in prompt
        assert "{" not in prompt
        assert prompt == emotions.story_prompt(emotions["at ease"], emotions.topics[0], n)

    def test_prompts_suit_any_set(self, emotions: ConceptSet) -> None:
        assert "emotion" not in emotions.prompts["story"]
        assert "feel" not in emotions.prompts["story"]

    def test_neutral_prompt_fills_every_slot(self, emotions: ConceptSet) -> None:
        prompt = emotions.neutral_prompt("How locks work", 3)
        for part in ("dialogues: 3.", "How locks work", "Person:", "AI:", "[dialogue 1]"):
            assert part in prompt
        assert "{" not in prompt

    def test_braces_in_a_topic_stay(self, emotions: ConceptSet) -> None:
        assert "The {n} of {concept}" in emotions.story_prompt("calm", "The {n} of {concept}", 2)

    def test_at_least_one_text_must_be_asked_for(self, emotions: ConceptSet) -> None:
        with pytest.raises(ValueError, match="1 or more"):
            emotions.story_prompt("calm", "A bus is late.", 0)


class TestBundledNeutralDialogues:
    def test_records(self, neutral: list[dict[str, str]]) -> None:
        assert [record["id"] for record in neutral] == [f"n{number:03d}" for number in range(1, 241)]
        assert all(set(record) == {"id", "topic", "text"} for record in neutral)
        assert len({record["topic"] for record in neutral}) > 120
        assert len({record["text"] for record in neutral}) == 240

    def test_speakers_alternate(self, neutral: list[dict[str, str]]) -> None:
        for record in neutral:
            speakers = re.findall(r"^(Person|AI): ", record["text"], flags=re.MULTILINE)
            assert 2 <= len(speakers) / 2 <= 6, record["id"]
            assert speakers == ["Person", "AI"] * (len(speakers) // 2), record["id"]

    def test_length(self, neutral: list[dict[str, str]]) -> None:
        for record in neutral:
            assert 90 <= len(record["text"].split()) <= 270, record["id"]

    def test_none_is_polite_or_exclaims(self, neutral: list[dict[str, str]]) -> None:
        pleasantry = re.compile(
            r"\b(thank|thanks|please|welcome|hello|hi|great|glad|of course|sure)\b|\w!(?=\s[A-Z]|$)", re.IGNORECASE
        )
        for record in neutral:
            assert pleasantry.search(record["text"]) is None, record["id"]

    def test_python_in_them_is_valid(self, neutral: list[dict[str, str]]) -> None:
        blocks = 0
        for record in neutral:
            # From a first line that only Python has to the next line of prose or the next turn.
            for block in re.findall(
                r"^(?:AI: )?((?:def|import|from) [^\n{]*\n(?:[^\n]*\n?)*?)(?=\n[A-Z`]|^Person|\Z)",
                record["text"],
                flags=re.MULTILINE,
            ):
                compile(block, record["id"], "exec")
                blocks += 1
        assert blocks >= 5


class TestNamedIn:
    grief = Concept("grief-stricken", "crushed by loss", forms=("grief-stricken", "grief", "grieving", "broken heart's"))

    @pytest.mark.parametrize(
        ("text", "form"),
        [
            ("Grief-Stricken, he left.", "grief-stricken"),
            ("grief stricken", "grief-stricken"),
            ("grief\u2011stricken", "grief-stricken"),
            ("grief\n  stricken", "grief-stricken"),
            ("a broken heart\u2019s end", "broken heart's"),
            ("*grief*", "grief"),
            ("_grief_", "grief"),
            ("GRIEF.", "grief"),
            ("grief's weight, grieving", "grief"),
            ("still grieving, full of grief", "grieving"),
        ],
    )
    def test_finds(self, text: str, form: str) -> None:
        assert self.grief.named_in(text) == form

    @pytest.mark.parametrize("text", ["", "griefs", "aggrieved", "griefstricken", "grief2", "stricken", "broken hearts"])
    def test_leaves_alone(self, text: str) -> None:
        assert self.grief.named_in(text) is None

    def test_letters_beyond_ascii(self) -> None:
        concept = Concept("wütend", "heated", forms=("wütend", "Straßenwut"))
        assert concept.named_in("Er war WU\u0308TEND.") == "wütend"
        assert concept.named_in("STRASSENWUT") == "Straßenwut"
        assert concept.named_in("wütende") is None

    def test_signs_in_a_form_are_no_pattern(self) -> None:
        assert Concept("a", "first", forms=("c.t",)).named_in("cat") is None

    def test_the_name_always_counts(self) -> None:
        assert Concept("deception", "a lie", forms=("deceive",)).named_in("Deception!") == "deception"
        assert Concept("calm", "steady").forms == ("calm",)
        assert Concept("calm", "steady", forms=("Calm", "calmly")).forms == ("Calm", "calmly")


class TestConceptSet:
    def test_unknown_name_gives_the_nearest(self, emotions: ConceptSet) -> None:
        with pytest.raises(UnknownName, match="desperate"):
            emotions["desparate"]
        with pytest.raises(UnknownName, match="did you mean"):
            emotions.select(["calm", "angri"])

    def test_contains_names_and_concepts(self, emotions: ConceptSet) -> None:
        assert "calm" in emotions and emotions["calm"] in emotions
        assert "curious" not in emotions

    def test_select_takes_the_order_of_the_names(self, emotions: ConceptSet) -> None:
        chosen = emotions.select(["sad", "calm", "sad"])
        assert chosen.names == ("sad", "calm")
        assert chosen.topics == emotions.topics
        assert [concept.name for concept in chosen] == ["sad", "calm"]
        assert chosen.clusters == {"Despair and Shame": ("sad",), "Peaceful Contentment": ("calm",)}

    def test_rated(self, emotions: ConceptSet) -> None:
        rated = emotions.rated()
        assert len(rated) == 45
        assert rated["happy"].rating is not None and rated["happy"].rating.pleasure == 0.81
        assert len(ConceptSet.load(CONDUCT).rated()) == 0

    def test_hash_follows_what_matters(self, write: Callable[[str], Path]) -> None:
        first = ConceptSet.load(write(MINIMAL)).hash
        assert re.fullmatch("[0-9a-f]{64}", first)
        assert ConceptSet.load(write(MINIMAL)).hash == first
        assert ConceptSet.load(write('title = "Two"\n' + MINIMAL)).hash == first
        for old, new in [
            ("all one", "what one"),
            ("candour", "candor"),
            ("name =", 'topics = ["A bus is late."]\nname ='),
        ]:
            assert ConceptSet.load(write(MINIMAL.replace(old, new))).hash != first

    def test_travels_to_workers(self, emotions: ConceptSet) -> None:
        emotions["calm"].named_in("calm")
        again = pickle.loads(pickle.dumps(emotions))
        assert again == emotions == copy.deepcopy(emotions)
        assert again["calm"].named_in("so calm") == "calm"
        assert hash(again) == hash(emotions)


class TestLoad:
    def test_minimal_file_takes_the_rest_from_the_bundled_set(self, write: Callable[[str], Path], emotions: ConceptSet) -> None:
        pair = ConceptSet.load(write(MINIMAL))
        assert (pair.name, pair.title, pair.description, pair.sources) == ("pair", "pair", "", ())
        assert pair.topics == emotions.topics and pair.neutral_topics == emotions.neutral_topics
        assert pair.prompts == emotions.prompts
        assert pair["candour"] == Concept("candour", "saying all one thinks", forms=("candour",))
        assert pair.clusters == {}

    def test_name_defaults_to_that_of_the_file(self, write: Callable[[str], Path]) -> None:
        assert ConceptSet.load(write(MINIMAL.replace('name = "pair"', ""))).name == "mine"

    def test_path_may_be_text_and_file_may_begin_with_a_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "marked.toml"
        path.write_text(MINIMAL, encoding="utf-8-sig")
        assert len(ConceptSet.load(str(path))) == 2

    def test_own_prompt_beside_a_bundled_one(self, write: Callable[[str], Path], emotions: ConceptSet) -> None:
        own = 'prompts.story = "{n} tales of {topic} with {concept}, as {\\"a\\": 1}"\n'
        pair = ConceptSet.load(write(own + MINIMAL))
        assert pair.story_prompt("candour", "a bus", 2) == '2 tales of a bus with candour, as {"a": 1}'
        assert pair.prompts["neutral"] == emotions.prompts["neutral"]

    def test_example_loads(self, emotions: ConceptSet) -> None:
        conduct = ConceptSet.load(CONDUCT)
        assert conduct.names == ("sarcasm", "deception", "sycophancy", "honesty")
        assert all(len(concept.forms) > 1 for concept in conduct)
        assert all(concept.named_in(concept.definition) is None for concept in conduct)
        assert not any(concept.named_in(topic) for concept in conduct for topic in conduct.topics)
        assert conduct.prompts == emotions.prompts

    def test_unknown_bundled_name(self) -> None:
        with pytest.raises(UnknownName, match="did you mean emotions"):
            ConceptSet.load("emotion")

    @pytest.mark.parametrize("source", ["absent.toml", "some/where", Path("absent")])
    def test_absent_file(self, source: str | Path) -> None:
        with pytest.raises(FormatError, match="no such file"):
            ConceptSet.load(source)

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="is a folder"):
            ConceptSet.load(tmp_path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_bytes(b'name = "\xff\xfe"')
        with pytest.raises(FormatError, match=r"mine\.toml is not UTF-8"):
            ConceptSet.load(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("name = pair", "is not valid TOML: .*line 1"),
            ('name = "pair"', r"concepts are missing: add a table"),
            ('[concepts.a]\ndefinition = "x"', "concepts holds 1, but .*: add at least two"),
            ("[[concepts]]\n[[concepts]]", "concepts must be tables"),
            ('[concepts]\na = "x"\nb = "y"', r"concepts\.a must be a table"),
            (MINIMAL + "[concepts.sarcasm]", "is not valid TOML"),
            (MINIMAL + '[concepts.Candour]\ndefinition = "x"', "'candour' and 'Candour' are the same"),
            (MINIMAL + '[concepts."calm=1"]\ndefinition = "x"', r'concepts\."calm=1" is no usable name'),
            (MINIMAL + '[concepts." calm"]\ndefinition = "x"', "is no usable name"),
            (MINIMAL + "[concepts.calm]", r"concepts\.calm\.definition is missing"),
            (MINIMAL + '[concepts.calm]\ndefinition = " "', r"concepts\.calm\.definition is empty"),
            (MINIMAL + "[concepts.calm]\ndefinition = 3", r"concepts\.calm\.definition must be text"),
            (MINIMAL + 'forms = "candour"', r"concepts\.candour\.forms must be a list of texts"),
            (MINIMAL + "forms = [1]", r"concepts\.candour\.forms must be a list of texts"),
            (MINIMAL + "forms = []", r"concepts\.candour\.forms has nothing"),
            (MINIMAL + 'forms = ["-"]', r"concepts\.candour\.forms has nothing"),
            (MINIMAL + 'forms = ["plain-spoken", "Plain spoken"]', r"forms lists 'Plain spoken' twice"),
            (MINIMAL + "cluster = 1", r"concepts\.candour\.cluster must be text"),
            (MINIMAL + "rating = 1", r"concepts\.candour\.rating must be \{ pleasure"),
            (MINIMAL + "rating = { pleasure = 0.1 }", r"concepts\.candour\.rating must be \{ pleasure"),
            (
                MINIMAL + "rating = { pleasure = 7, arousal = 0, dominance = 0 }",
                r"concepts\.candour\.rating\.pleasure is 7: give a number from -1 to 1",
            ),
            (
                MINIMAL + "rating = { pleasure = 0, arousal = nan, dominance = 0 }",
                r"rating\.arousal is nan: give a number",
            ),
            (
                MINIMAL + "rating = { pleasure = 0, arousal = 0, dominance = true }",
                r"rating\.dominance is True: give a number",
            ),
            (
                MINIMAL + 'definiton = "x"',
                r"concepts\.candour\.definiton is an unknown key: did you mean definition\?",
            ),
            (
                MINIMAL + 'topics = ["x"]',
                r"concepts\.candour\.topics is an unknown key: .* above the first line",
            ),
            ("zzz = 1\n" + MINIMAL, "mine.toml: zzz is an unknown key: known are format, name"),
            ("topics = []\n" + MINIMAL, "topics has nothing"),
            ('topics = "x"\n' + MINIMAL, "topics must be a list of texts"),
            ('topics = ["x", "x"]\n' + MINIMAL, "topics lists 'x' twice"),
            ("neutral_topics = []\n" + MINIMAL, "neutral_topics has nothing"),
            ("format = 2\n" + MINIMAL, "format is 2, but this version reads format 1"),
            ('prompts = "x"\n' + MINIMAL, "prompts must be a table"),
            ('prompts.tale = "x"\n' + MINIMAL, r"prompts\.tale is an unknown key"),
            ('prompts.story = "{n} {topic}"\n' + MINIMAL, r"prompts\.story lacks \{concept\}"),
            ('prompts.neutral = "x"\n' + MINIMAL, r"prompts\.neutral lacks \{n\}, \{topic\}"),
            (
                'prompts.story = "{n} {topic} {concept} {emotion}"\n' + MINIMAL,
                r"prompts\.story has \{emotion\}, which nothing fills: known are \{concept\}",
            ),
        ],
    )
    def test_each_mistake_is_one_line(self, write: Callable[[str], Path], content: str, message: str) -> None:
        with pytest.raises(FormatError, match=message) as caught:
            ConceptSet.load(write(content))
        text = str(caught.value)
        assert "mine.toml" in text and "\n" not in text
