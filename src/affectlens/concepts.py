"""What to look for in a model: concepts, and the prompts that have stories written about them.

A set of concepts is a TOML file. The 171 emotion words come with affectlens
(``ConceptSet.load("emotions")``); a file of your own needs no more than this::

    name = "conduct"

    [concepts.sarcasm]
    definition = "saying the opposite of what one means, with a sting"

    [concepts.sincerity]
    definition = "saying exactly what one means, without a second layer"

Everything else is optional: forms of the word (default: the name alone), cluster, ratings, topics and
prompts (default: those of the bundled set). ``examples/concepts/conduct.toml`` shows the keys with comments.

Method: words, topics and stories of sections 1 and 2 of the published study (arXiv 2604.07729).
Definitions, topics and prompts are our own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from affectlens.errors import FormatError, UnknownName

BUNDLED = ("emotions", "manner")
SHOWCASE = (
    "happy", "inspired", "loving", "proud", "calm", "desperate", "angry", "guilty", "sad", "afraid", "nervous", "surprised",
)  # fmt: skip
"""The twelve emotions that the paper's figures show."""

# What a prompt has to contain, and what it may contain besides.
_SLOTS: dict[str, tuple[set[str], set[str]]] = {
    "story": ({"n", "topic", "concept"}, {"definition"}),
    "neutral": ({"n", "topic"}, set()),
}
_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
_SET_KEYS = (
    "format", "name", "title", "description", "sources", "topics", "neutral_topics", "prompts", "concepts",
)  # fmt: skip
_CONCEPT_KEYS = ("definition", "guidance", "cluster", "forms", "synonyms", "rating")
_RATING_KEYS = ("pleasure", "arousal", "dominance")
# Names are typed on the command line (calm=0.05), stand in rules (calm > 3) and become file names.
_NAME = re.compile(r"[^\W_][\w' -]{0,62}\w|[^\W_]")
_GAP = re.compile(r"[\s\u2010-\u2013-]+")


@dataclass(frozen=True)
class Rating:
    """Mean human rating of a word, each from -1 to 1.

    Attributes:
        pleasure: unpleasant to pleasant, also called valence.
        arousal: drowsy to stirred up.
        dominance: without to with control over the situation.

    Source: the scales of Russell and Mehrabian (1977).
    """

    pleasure: float
    arousal: float
    dominance: float


@dataclass(frozen=True)
class Concept:
    """One thing to look for.

    Attributes:
        name: what it is called everywhere: in files, on the command line, in plots.
        definition: one line that tells it from its neighbours; goes into the story prompt.
        guidance: for whoever writes its texts, what must be seen for it to be this and no neighbour; or None.
        cluster: the group it belongs to, or None.
        forms: ways of writing that count as naming it; the name itself is always among them.
        synonyms: words that would give it away as well; texts of the bundled corpus keep clear of them.
        rating: human ratings, or None.

    Example:
        >>> anger = Concept("angry", "heated against someone who did wrong", forms=("angry", "anger"))
        >>> anger.named_in("Her ANGER was plain.")
        'anger'
    """

    name: str
    definition: str
    guidance: str | None = None
    cluster: str | None = None
    forms: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    rating: Rating | None = None

    def __post_init__(self) -> None:
        if _key(self.name) not in map(_key, self.forms):
            object.__setattr__(self, "forms", (self.name, *self.forms))

    def named_in(self, text: str) -> str | None:
        """The first form of this concept that a text contains.

        Case does not matter, nor do line breaks, curly apostrophes, or a hyphen in place of a space. Only
        whole words count: "mad" is not in "made". So this does not work for languages without spaces.

        Args:
            text: any text.

        Returns:
            The form as it is listed in ``forms``, or None when the text does not name the concept.

        Example:
            >>> tired = Concept("worn out", "used up after great exertion")
            >>> tired.named_in("a worn-out man"), tired.named_in("she had worn it outside")
            ('worn out', None)
        """
        return _first(self._named, text)

    def given_away_in(self, text: str) -> str | None:
        """The first form or synonym of this concept that a text contains, found as :meth:`named_in` finds forms.

        Example:
            >>> tired = Concept("worn out", "used up after great exertion", synonyms=("exhausted",))
            >>> tired.given_away_in("He sat there, exhausted.")
            'exhausted'
        """
        return _first(self._given_away, text)

    @cached_property
    def _named(self) -> tuple[re.Pattern[str], dict[str, str]]:
        return _any_of(self.forms)

    @cached_property
    def _given_away(self) -> tuple[re.Pattern[str], dict[str, str]]:
        return _any_of((*self.forms, *self.synonyms))


@dataclass(frozen=True)
class ConceptSet:
    """The concepts of one study, with the topics and prompts that stories are written from.

    Attributes:
        name: short name; part of run and vector metadata.
        title: for headings.
        description: a sentence or two.
        sources: where words, clusters and ratings come from.
        concepts: the concepts, in file order.
        topics: one-sentence situations that stories are written about.
        neutral_topics: matter-of-fact subjects for neutral dialogues.
        prompts: ``story`` and ``neutral``, with slots in braces.

    Example:
        >>> emotions = ConceptSet.load("emotions")
        >>> len(emotions), emotions["calm"].cluster
        (171, 'Peaceful Contentment')
    """

    name: str
    title: str
    description: str
    sources: tuple[str, ...]
    concepts: tuple[Concept, ...]
    topics: tuple[str, ...]
    neutral_topics: tuple[str, ...]
    prompts: Mapping[str, str] = field(hash=False)

    @classmethod
    def load(cls, source: str | Path) -> ConceptSet:
        """Read a set of concepts.

        Args:
            source: the name of a bundled set (``"emotions"``) or the path of a TOML file.

        Returns:
            The set, checked.

        Raises:
            FormatError: the file is missing or something in it is wrong; names file, key and fix.
            UnknownName: neither a bundled set nor a file.

        Example:
            >>> ConceptSet.load("emotions").title
            '171 emotion concepts'
            >>> ConceptSet.load("emotion")
            Traceback (most recent call last):
            ...
            affectlens.errors.UnknownName: unknown concept set 'emotion': did you mean emotions?
        """
        if source in BUNDLED:
            return _bundled(str(source))
        path = Path(source).expanduser()
        if path.is_file():
            return _parse(path.read_bytes(), str(path), default_name=path.stem)
        if path.is_dir():
            raise FormatError(f"{path} is a folder: name the TOML file in it")
        if isinstance(source, Path) or path.suffix == ".toml" or len(path.parts) > 1:
            raise FormatError(f"{path}: no such file; give a TOML file or the name of a bundled set ({', '.join(BUNDLED)})")
        raise UnknownName("concept set", source, BUNDLED)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts, in order."""
        return tuple(concept.name for concept in self.concepts)

    @property
    def clusters(self) -> dict[str, tuple[str, ...]]:
        """Cluster to names of its concepts, both in file order; concepts without a cluster are left out."""
        found: dict[str, tuple[str, ...]] = {}
        for concept in self.concepts:
            if concept.cluster is not None:
                found[concept.cluster] = (*found.get(concept.cluster, ()), concept.name)
        return found

    def __len__(self) -> int:
        return len(self.concepts)

    def __iter__(self) -> Iterator[Concept]:
        return iter(self.concepts)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self.concepts

    def __getitem__(self, name: str) -> Concept:
        """The concept of this name; raises :class:`UnknownName` with the nearest names."""
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownName("concept", name, self.names) from None

    def select(self, names: Iterable[str]) -> ConceptSet:
        """The same set with these concepts only.

        Args:
            names: names of concepts; repeated names count once.

        Returns:
            A set in the order of ``names``. Fitting vectors needs two or more, as it works by contrast.

        Raises:
            UnknownName: a name is not in the set.

        Example:
            >>> ConceptSet.load("emotions").select(["calm", "afraid"]).names
            ('calm', 'afraid')
        """
        return replace(self, concepts=tuple(self[name] for name in dict.fromkeys(names)))

    def rated(self) -> ConceptSet:
        """The same set with only the concepts that have a human rating; empty when none has.

        Example:
            >>> len(ConceptSet.load("emotions").rated())
            45
        """
        return replace(self, concepts=tuple(concept for concept in self.concepts if concept.rating is not None))

    def story_prompt(self, concept: str | Concept, topic: str, n: int = 1) -> str:
        """The prompt that asks a model for stories showing a concept without naming it.

        Args:
            concept: a concept of this set, or its name.
            topic: the situation, one sentence.
            n: how many stories to ask for in one reply.

        Returns:
            The prompt, ready to send.

        Raises:
            UnknownName: the concept is not in the set.
            ValueError: ``n`` is below 1.

        Source: structure of the published story prompt (method, section 2), worded anew.

        Example:
            >>> prompt = ConceptSet.load("emotions").story_prompt("calm", "A bus is late.", n=3)
            >>> "Number of stories: 3." in prompt, "Premise: A bus is late." in prompt
            (True, True)
        """
        wanted = concept if isinstance(concept, Concept) else self[concept]
        return _fill(self.prompts["story"], n=n, topic=topic, concept=wanted.name, definition=wanted.definition)

    def neutral_prompt(self, topic: str, n: int = 1) -> str:
        """The prompt that asks a model for dialogues without any feeling in them.

        Args:
            topic: a matter-of-fact subject.
            n: how many dialogues to ask for in one reply.

        Returns:
            The prompt, ready to send.

        Raises:
            ValueError: ``n`` is below 1.

        Source: structure of the published neutral prompt (method, section 2), worded anew.

        Example:
            >>> "Topic: Bread" in ConceptSet.load("emotions").neutral_prompt("Bread", n=2)
            True
        """
        return _fill(self.prompts["neutral"], n=n, topic=topic)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides what stories come out and how they are judged.

        Name, title, description and sources do not count: a corrected comma there must not invalidate
        finished work.
        """
        content = {
            "concepts": [asdict(concept) for concept in self.concepts],
            "topics": self.topics,
            "neutral_topics": self.neutral_topics,
            "prompts": dict(self.prompts),
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def _by_name(self) -> dict[str, Concept]:
        return {concept.name: concept for concept in self.concepts}


def _plain(text: str) -> str:
    """One way of writing for what reads the same: lower case, composed accents, straight apostrophes."""
    return unicodedata.normalize("NFC", text).casefold().replace("\u2019", "'").replace("\u02bc", "'")


def _key(form: str) -> str:
    """What forms that count as equal have in common: "Grief-Stricken" and "grief stricken"."""
    return _GAP.sub(" ", _plain(form)).strip()


def _any_of(forms: Iterable[str]) -> tuple[re.Pattern[str], dict[str, str]]:
    """What finds these forms in plain text, and the forms by what it finds."""
    by_key = {_key(form): form for form in forms}
    # Longest first: "self-confident" would otherwise be reported as the "confident" it contains.
    keys = sorted(by_key, key=len, reverse=True)
    either = "|".join(_GAP.pattern.join(map(re.escape, key.split(" "))) for key in keys)
    # Not \b: models mark stress as _angry_, and to \b the underscore is a letter.
    return re.compile(rf"(?<![^\W_])(?:{either})(?![^\W_])"), by_key


def _first(forms: tuple[re.Pattern[str], dict[str, str]], text: str) -> str | None:
    pattern, by_key = forms
    found = pattern.search(_plain(text))
    return None if found is None else by_key[_GAP.sub(" ", found.group())]


def _fill(prompt: str, *, n: int, **slots: str) -> str:
    if n < 1:
        raise ValueError(f"n must be 1 or more, not {n}")
    # In one pass, so that braces inside a topic or a definition stay what they are.
    return _SLOT.sub(lambda slot: str({"n": n, **slots}[slot.group(1)]), prompt).strip()


@cache
def _bundled(name: str) -> ConceptSet:
    file = files("affectlens") / "data" / f"{name}.toml"
    return _parse(file.read_bytes(), f"{name}.toml", default_name=name)


def _parse(content: bytes, file: str, *, default_name: str) -> ConceptSet:
    """A checked set from the bytes of a TOML file; ``file`` is what messages call it."""
    try:
        # The mark that some Windows editors put in front of a file is no valid TOML.
        raw = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FormatError(f"{file} is not UTF-8 text: save it with that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{file} is not valid TOML: {error}") from None
    return _Reader(file).concept_set(raw, default_name)


@dataclass(frozen=True)
class _Reader:
    """Turns parsed TOML into a set; each check that fails is one line with file, key and fix."""

    file: str

    def concept_set(self, raw: dict[str, Any], default_name: str) -> ConceptSet:
        self.known_keys(raw, _SET_KEYS, "")
        if raw.get("format", 1) != 1:
            self.fail("format", f"is {raw['format']!r}, but this version reads format 1: update affectlens")
        name = self.text(raw, "name", default=default_name)
        topics, neutral_topics = (
            self.texts(raw, key) if key in raw else getattr(_bundled("emotions"), key) for key in ("topics", "neutral_topics")
        )
        return ConceptSet(
            name=name,
            title=self.text(raw, "title", default=name),
            description=self.text(raw, "description", default=""),
            sources=self.texts(raw, "sources") if "sources" in raw else (),
            concepts=self.concepts(raw),
            topics=topics,
            neutral_topics=neutral_topics,
            prompts=self.prompts(raw),
        )

    def concepts(self, raw: dict[str, Any]) -> tuple[Concept, ...]:
        if "concepts" not in raw:
            self.fail("concepts", "are missing: add a table such as [concepts.sarcasm] with a definition")
        tables = raw["concepts"]
        if not isinstance(tables, dict):
            self.fail("concepts", "must be tables, one per concept: write [concepts.sarcasm], not [[concepts]]")
        if len(tables) < 2:
            self.fail("concepts", f"holds {len(tables)}, but a concept is found by contrast: add at least two")
        concepts = tuple(self.concept(name, table) for name, table in tables.items())
        seen: dict[str, str] = {}
        for concept in concepts:
            other = seen.setdefault(_key(concept.name), concept.name)
            if other != concept.name:
                self.fail("concepts", f"names {other!r} and {concept.name!r} are the same: rename or drop one")
        return concepts

    def concept(self, name: str, table: Any) -> Concept:
        key = f"concepts.{name}" if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'concepts."{name}"'
        if not _NAME.fullmatch(name):
            self.fail(key, "is no usable name: up to 64 letters, digits, spaces, hyphens or underscores")
        if not isinstance(table, dict):
            self.fail(key, f'must be a table: write [{key}] and below it definition = "..."')
        self.known_keys(table, _CONCEPT_KEYS, key)
        return Concept(
            name=name,
            definition=self.text(table, "definition", key),
            guidance=self.text(table, "guidance", key) if "guidance" in table else None,
            cluster=self.text(table, "cluster", key) if "cluster" in table else None,
            forms=self.texts(table, "forms", key) if "forms" in table else (),
            synonyms=self.texts(table, "synonyms", key) if "synonyms" in table else (),
            rating=self.rating(table["rating"], f"{key}.rating") if "rating" in table else None,
        )

    def rating(self, value: Any, key: str) -> Rating:
        if not isinstance(value, dict) or set(value) != set(_RATING_KEYS):
            self.fail(key, "must be { pleasure = ..., arousal = ..., dominance = ... }")
        for scale, number in value.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not -1 <= number <= 1:
                self.fail(f"{key}.{scale}", f"is {number!r}: give a number from -1 to 1")
        return Rating(**{scale: float(value[scale]) for scale in _RATING_KEYS})

    def prompts(self, raw: dict[str, Any]) -> dict[str, str]:
        table = raw.get("prompts", {})
        if not isinstance(table, dict):
            self.fail("prompts", "must be a table: write [prompts] and below it story and neutral")
        self.known_keys(table, tuple(_SLOTS), "prompts")
        prompts = {}
        for kind, (needed, optional) in _SLOTS.items():
            if kind not in table:
                prompts[kind] = _bundled("emotions").prompts[kind]
                continue
            prompts[kind] = self.text(table, kind, "prompts")
            slots = set(_SLOT.findall(prompts[kind]))
            if missing := needed - slots:
                self.fail(f"prompts.{kind}", f"lacks {_braced(missing)}: put each where its value belongs")
            if unknown := slots - needed - optional:
                known = _braced(needed | optional)
                self.fail(f"prompts.{kind}", f"has {_braced(unknown)}, which nothing fills: known are {known}")
        return prompts

    def text(self, table: dict[str, Any], key: str, within: str = "", *, default: str | None = None) -> str:
        value = table.get(key, default)
        where = f"{within}.{key}" if within else key
        if value is None:
            self.fail(where, f'is missing: add {key} = "..."')
        if not isinstance(value, str):
            self.fail(where, f"must be text in quotes, not {value!r}")
        if not value.strip() and key in table:
            self.fail(where, "is empty: write something or drop the line")
        return value.strip()

    def texts(self, table: dict[str, Any], key: str, within: str = "") -> tuple[str, ...]:
        value = table[key]
        where = f"{within}.{key}" if within else key
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(where, 'must be a list of texts: write ["...", "..."]')
        # A lone hyphen counts as empty too: as a form, it would be found between any two words.
        if not value or not all(map(_key, value)):
            self.fail(where, "has nothing or an empty text in it: fill it in, or drop the line for the default")
        items = tuple(item.strip() for item in value)
        seen: set[str] = set()
        for item in items:
            if _key(item) in seen:
                self.fail(where, f"lists {item!r} twice (case, spaces and hyphens do not matter): drop one")
            seen.add(_key(item))
        return items

    def known_keys(self, table: dict[str, Any], known: Sequence[str], within: str) -> None:
        for key in table:
            if key in known:
                continue
            if within and key in _SET_KEYS:
                # TOML gives every key below a [table] line to that table.
                fix = "it belongs to the whole set: move it above the first line in [brackets]"
            elif near := difflib.get_close_matches(key, known, n=1):
                fix = f"did you mean {near[0]}?"
            else:
                fix = f"known are {', '.join(known)}"
            self.fail(f"{within}.{key}" if within else key, f"is an unknown key: {fix}")

    def fail(self, key: str, what: str) -> NoReturn:
        raise FormatError(f"{self.file}: {key} {what}")


def _braced(slots: Iterable[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in sorted(slots))
