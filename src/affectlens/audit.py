"""Is a corpus fit for finding directions with? Every check is a row: what was found, what is allowed, and which texts to mend.

Vectors are differences between means, so whatever goes along with a concept in the texts ends up in its vector: its topic, its
narrator, the share of direct speech, a pet phrase of the writer. The checks look for that, and for texts that say what they
should show. They run on the bundled corpus and, as far as its records have the fields, on one of yours.

Source: what replications of the published study went wrong with (method 23.3, points 10 to 12), and our own (docs/lab-log.md).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from affectlens.concepts import ConceptSet
from affectlens.corpus import FILES, bundled, files_of, records
from affectlens.errors import FormatError

Record = Mapping[str, Any]

WORDS = (110, 190)
"""Shortest and longest story of the bundled corpus."""
LEAST_WORDS, LENGTH_RATIO = 80, 3.0
"""For a corpus of one's own: a shorter story has hardly anything behind its 50th token; longest to shortest story."""
SHINGLES = 0.1
"""Two texts may share so much of their 5-word sequences (Jaccard similarity)."""
SEQUENCE, OFTEN = 6, 4
"""A sequence of six words may stand in texts on four topics: that takes an idiom. Texts on one topic may share more."""
VOICE = 2.0
"""One writer's texts may share sequences so many times as often as those of writers who never saw each other's."""
OPENINGS = 6
"""So many texts may begin with the same four words."""
NAMES = 0.03
"""So large a share of the stories may have the same first name in it."""
VARIETY = 0.5
"""Least type-token ratio: different words among the first hundred of a text."""
RHYTHM = 2.0
"""Least standard deviation of sentence lengths in a text, in words."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")
_OWN = re.compile(r"\b(?:I|[Mm]y|me|mine|myself|[Ww]e|[Oo]ur|us)\b")
_BROKEN = re.compile("\ufffd|Ã[\x80-\xbf©¨¤¶¼]|â€|[\ud800-\udfff]|[\x00-\x08\x0b\x0c\x0e-\x1f]")
_PAST = re.compile(r"\b(?:was|were|had|said|did)\b")
_PRESENT = re.compile(r"\b(?:is|are|am|has|says|does)\b|\b(?:I['’]m)\b")
_NO_NAMES = re.compile(
    "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday|January|February|March|April|May|June|July|"
    "August|September|October|November|December|Christmas|Easter|Ramadan|Diwali|Eid|New|Year|God|Lord|Mr|"
    "Mrs|Ms|Miss|Dr|Sir|Madam|Aunt|Uncle|Grandma|Grandpa|Grandmother|Grandfather|Mum|Mom|Dad|Mama|Papa|"
    "Mother|Father|Nana|Gran|Auntie|English|French|German|Spanish|Italian|Latin|Greek|Arabic|Chinese|"
    "Japanese|Russian|Portuguese|Polish|Turkish|Dutch|Irish|American|British|Indian|Africa|America|Europe|"
    "Asia|London|Paris|Rome"
)
"""Capitalised words that are no first names."""


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        file: Which file.
        what: What was looked at.
        found: What was found, in figures.
        allowed: What is allowed.
        faults: One line for each text or group that is not; none means the check passes.
    """

    file: str
    what: str
    found: str
    allowed: str
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.faults


def audit(path: str | Path | None = None, concepts: ConceptSet | None = None) -> list[Check]:
    """Check the bundled corpus, or stories of your own.

    Args:
        path: A JSONL or parquet file of stories or a folder of them; the bundled corpus by default. A folder laid out like the
            bundled one (with ``stories.jsonl`` and the other files) is checked as such.
        concepts: What the stories are about; the 171 emotions by default.

    Returns:
        The checks, in order.

    Raises:
        FormatError: There is nothing at ``path``.

    Example:
        >>> import json, tempfile
        >>> file = Path(tempfile.mkdtemp()) / "mine.jsonl"
        >>> _ = file.write_text(json.dumps({"concept": "calm", "text": "She was calm. " * 40}))
        >>> [check.what for check in audit(file) if not check.passed]
        ['counts', 'named', 'variety', 'rhythm']
    """
    concepts = concepts or ConceptSet.load("emotions")
    if path is None or (Path(path) / "stories.jsonl").is_file():
        folder = bundled("stories").parent if path is None else Path(path)
        return [check for name in FILES for check in _bundled_file(folder / f"{name}.jsonl", name, concepts)]
    checks: list[Check] = []
    read: list[Record] = []
    for file in files_of(Path(path)):
        found, broken = _read(file)
        read += found
        checks += broken
    if not read and not checks:
        raise FormatError(f"{path} holds no texts: each JSONL line or parquet row needs text and concept")
    known = [{**r, "concept": r.get("concept") or r.get("emotion")} for r in read]
    return [*checks, *_stories(Path(path).name, known, concepts, own=True)]


def _bundled_file(file: Path, name: str, concepts: ConceptSet) -> list[Check]:
    if not file.is_file():
        return [Check(file.name, "file", "missing", "present", (f"{file} does not exist: put it back",))]
    read, broken = _read(file)
    if broken:
        return broken
    if name in ("stories", "manner"):
        checks = _stories(file.name, read, ConceptSet.load("manner") if name == "manner" else concepts, own=False)
    else:
        checks = [*_fields(file.name, read, _LAYOUTS[name], concepts)]
        if not any(check.faults for check in checks):  # what follows relies on the fields
            checks += [*_COUNTS[name](file.name, read, concepts), *_repetition(file.name, read, openings=name != "ladders")]
    return checks


def _read(file: Path) -> tuple[list[Record], list[Check]]:
    """The records, or the check that failed because there are none."""
    try:
        read: list[Record] = list(records(file))
    except FormatError as error:
        return [], [Check(file.name, "readable", "no", "UTF-8, one JSON object a line", (str(error),))]
    broken = tuple(
        f"{_name(r, i)}: {found.group()!r} is no text: save the file as UTF-8 again"
        for i, r in enumerate(read)
        if (found := _BROKEN.search(_text(r)))
    )
    return read, [Check(file.name, "readable", f"{len(broken)} texts with broken characters", "none", broken)] if broken else []


# ── fields ──


@dataclass(frozen=True)
class _Layout:
    """What a record holds: texts that must not be empty, concepts of the set, and values from a list."""

    texts: tuple[str, ...] = ("text",)
    concepts: tuple[str, ...] = ()
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_FLAG = (True, False)
_CATEGORIES = ("helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe")
_CONDITIONS = ("hidden", "open", "neutral", "story", "others")
_LAYOUTS = {
    "neutral": _Layout(("text", "topic")),
    "speakers": _Layout(("topic",), ("person", "assistant")),
    "concealment": _Layout(("topic", "scenario", "speaker"), ("real",), {"condition": _CONDITIONS}),
    "scenarios": _Layout(concepts=("concept",), choices={"held_out": _FLAG}),
    "ladders": _Layout(choices={"control": _FLAG}),
    "activities": _Layout(choices={"category": _CATEGORIES, "held_out": _FLAG}),
    "contrasts": _Layout((), choices={"kind": ("audience", "negation", "binding", "early word")}),
    "profile": _Layout(("text", "category"), choices={"kind": ("hard", "neutral")}),
}


def _fields(file: str, read: Sequence[Record], layout: _Layout, concepts: ConceptSet) -> Iterator[Check]:
    faults: list[str] = []
    for i, record in enumerate(read):
        name = _name(record, i)
        if not isinstance(record.get("id"), str) or not record["id"]:
            faults.append(f"{name}: no id: give it one")
        faults += [f"{name}: {key} is missing or empty: write it" for key in layout.texts if not _filled(record.get(key))]
        for key in layout.concepts:
            if record.get(key) not in concepts:
                faults.append(f"{name}: {key} {record.get(key)!r} is not among the {len(concepts)} concepts: correct it")
        for key, choices in layout.choices.items():
            if record.get(key) not in choices:
                faults.append(f"{name}: {key} is {record.get(key)!r}: make it one of {', '.join(map(str, choices))}")
    faults += [f"id {id!r} is used {n} times: make ids unique" for id, n in Counter(r.get("id") for r in read).items() if n > 1]
    yield Check(file, "fields", f"{len(read)} records", "every field there and valid, ids unique", tuple(faults))


def _filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _name(record: Record, i: int) -> str:
    return str(record.get("id") or f"record {i + 1}")


def _text(record: Record) -> str:
    """Everything of a record that a model would read."""
    parts = [record.get(key) for key in ("scenario", "text", "first", "second", "affirmed", "negated")]
    turns = [turn[1] for turn in record.get("turns") or ()]
    return "\n".join(part for part in (*parts, *turns) if isinstance(part, str))


# ── stories ──


def _stories(file: str, read: Sequence[Record], concepts: ConceptSet, *, own: bool) -> list[Check]:
    fields = _Layout(("text",) if own else ("text", "topic"), ("concept",))
    choices: dict[str, tuple[Any, ...]] = {"person": ("first", "third")}
    if not own and concepts.name == "emotions":
        choices |= {"tense": ("past", "present"), "telling": ("spoken", "acted", "inward"), "topic": concepts.topics}
    if own:
        choices = {key: values for key, values in choices.items() if any(key in r for r in read)}
        fields = _Layout(("text", "concept"), (), choices)  # concepts that are not in the set are welcome
        read = [r if r.get("id") else {**r, "id": f"record {i + 1}"} for i, r in enumerate(read)]
    checks = list(_fields(file, read, _Layout(fields.texts, fields.concepts, choices), concepts))
    if checks[0].faults:
        return checks
    checks += _balance(file, read, concepts, own)
    checks.append(_lengths(file, read, own))
    checks.append(_given_away(file, read, concepts))
    checks += _style(file, read)
    checks += _repetition(file, read)
    checks += _texture(file, read)
    return checks


def _balance(file: str, read: Sequence[Record], concepts: ConceptSet, own: bool) -> Iterator[Check]:
    """Counts, and that topic, person, tense and telling go with no concept."""
    stories: dict[str, list[Record]] = defaultdict(list)
    for record in read:
        stories[record["concept"]].append(record)
    counts = {name: len(those) for name, those in stories.items()}
    low, high = min(counts.values()), max(counts.values())
    found = f"{len(counts)} concepts, {low} to {high} stories each"
    if own:
        faults = [f"{n}: {counts[n]} stories, and another has {high}: even them out" for n in counts if counts[n] < high / 2]
        if len(counts) < 2:
            faults.append("stories of one concept only: vectors contrast concepts, so add stories of others")
        yield Check(file, "counts", found, "two concepts or more; none with less than half of the most", tuple(faults))
    else:
        wanted = 12 if concepts.name == "emotions" else len(concepts.topics)
        faults = [f"{n}: {counts.get(n, 0)} stories: make it {wanted}" for n in concepts.names if counts.get(n, 0) != wanted]
        yield Check(file, "counts", found, f"{len(concepts)} concepts, {wanted} stories each", tuple(faults))
    if all(r.get("topic") for r in read):
        topics = {name: {r["topic"] for r in those} for name, those in stories.items()}
        seen = Counter(topic for those in topics.values() for topic in those)
        fewest, least = min(len(t) for t in topics.values()), min(seen.values())
        enough = (3, 2) if own else (12, min(15, len(concepts)))
        faults = [f"{n}: on {len(t)} topics: spread it over {enough[0]}" for n, t in topics.items() if len(t) < enough[0]]
        faults += [f"topic {t!r}: {n} concepts: give it {enough[1]}" for t, n in seen.items() if n < enough[1]]
        found = f"{len(seen)} topics; {fewest} or more a concept, {least} or more concepts a topic"
        yield Check(file, "topics", found, f"{enough[0]} or more a concept, {enough[1]} or more concepts a topic", tuple(faults))
    for key in ("person", "tense", "telling"):
        if not all(key in r for r in read):
            continue
        values = sorted({r[key] for r in read})
        share = {n: max(Counter(r[key] for r in those)[v] for v in values) / len(those) for n, those in stories.items()}
        limit = (0.75 if own else 1 / len(values)) + 1e-9
        faults = [f"{n}: {s:.0%} of its stories have one {key}: even it out" for n, s in share.items() if s > limit]
        total = Counter(r[key] for r in read)
        found = ", ".join(f"{total[v] / len(read):.0%} {v}" for v in values)
        yield Check(file, key, found, f"at most {limit:.0%} of one kind in each concept", tuple(faults))


def _lengths(file: str, read: Sequence[Record], own: bool) -> Check:
    n = np.array([len(r["text"].split()) for r in read])
    low, high = (LEAST_WORDS, int(max(LEAST_WORDS, n.min()) * LENGTH_RATIO)) if own else WORDS
    faults = tuple(
        f"{r['id']}: {k} words: make it {low} to {high}" for r, k in zip(read, n.tolist(), strict=True) if not low <= k <= high
    )
    return Check(file, "length", f"{n.min()} to {n.max()} words, mean {n.mean():.0f}", f"{low} to {high} words", faults)


def _given_away(file: str, read: Sequence[Record], concepts: ConceptSet) -> Check:
    faults = tuple(
        f"{r['id']}: {found!r} gives {r['concept']} away: say it by what happens"
        for r in read
        if r["concept"] in concepts and (found := concepts[r["concept"]].given_away_in(r["text"]))
    )
    words = "its word, a form of it or a listed synonym"
    return Check(file, "named", f"{len(faults)} of {len(read)} texts with {words}", "none", faults)


def _style(file: str, read: Sequence[Record]) -> Iterator[Check]:
    """Do person, tense and telling hold in the text? By function words outside direct speech, so only clear cases count."""
    faults: list[str] = []
    checked = [key for key in ("person", "tense", "telling") if all(key in r for r in read)]
    if not checked:
        return
    for r in read:
        bare = _QUOTED.sub(" ", r["text"])
        quoted = sum(len(q.split()) for q in _QUOTED.findall(r["text"])) / len(r["text"].split())
        person, tense, telling = (r.get(key) for key in ("person", "tense", "telling"))
        own, was, now = (len(pattern.findall(bare)) for pattern in (_OWN, _PAST, _PRESENT))
        if person == "first" and not own:
            faults.append(f"{r['id']}: first person without an I or we: rewrite it or its person field")
        if person == "third" and len(re.findall(r"\bI\b", bare)) > 3:
            faults.append(f"{r['id']}: third person with an I outside direct speech: rewrite it or its person field")
        if (tense == "past" and now > was + 5) or (tense == "present" and was > now + 5):
            faults.append(
                f"{r['id']}: {tense} tense with {was} past and {now} present auxiliaries: rewrite it or its tense field"
            )
        if (telling == "spoken" and quoted < 0.15) or (telling in ("acted", "inward") and quoted > 0.1):
            faults.append(f"{r['id']}: {telling}, but {quoted:.0%} of it is direct speech: rewrite it or its telling field")
    yield Check(file, "narration", f"{len(faults)} texts unlike their {', '.join(checked)}", "none", tuple(faults))


# ── repetition, for every file ──


def _repetition(file: str, read: Sequence[Record], *, openings: bool = True) -> list[Check]:
    texts = [[word.casefold() for word in _WORD.findall(_text(r))] for r in read]
    names = [_name(r, i) for i, r in enumerate(read)]
    checks = [_shingles(file, texts, names), _sequences(file, read, texts, names)]
    if openings:
        first = defaultdict(list)
        for words, name in zip(texts, names, strict=True):
            first[" ".join(words[:4])].append(name)
        most = max(len(those) for those in first.values())
        faults = tuple(
            f"{len(those)} texts begin {words!r}: reopen some of {', '.join(those[:8])}"
            for words, those in first.items()
            if len(those) > OPENINGS
        )
        checks.append(Check(file, "openings", f"the same four words at most {most} times", f"{OPENINGS} times", faults))
    return checks


def _grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _occurrences(grams: Iterable[set[tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, those in enumerate(grams):
        for gram in those:
            where[gram].append(i)
    return {gram: those for gram, those in where.items() if len(those) > 1}


def _pairs(where: Mapping[tuple[str, ...], list[int]]) -> Counter[tuple[int, int]]:
    """How many sequences each pair of texts shares."""
    return Counter((a, b) for those in where.values() for k, a in enumerate(those) for b in those[k + 1 :])


def _shingles(file: str, texts: Sequence[Sequence[str]], names: Sequence[str]) -> Check:
    grams = [_grams(words, 5) for words in texts]
    like = {(a, b): shared / len(grams[a] | grams[b]) for (a, b), shared in _pairs(_occurrences(grams)).items()}
    faults = tuple(
        f"{names[a]} and {names[b]} share {value:.0%} of their 5-word sequences: rewrite one"
        for (a, b), value in sorted(like.items(), key=lambda item: -item[1])
        if value > SHINGLES
    )
    found = f"{max(like.values(), default=0):.1%} in the most similar pair"
    return Check(file, "similarity", found, f"{SHINGLES:.0%} of the 5-word sequences (Jaccard)", faults)


def _sequences(file: str, read: Sequence[Record], texts: Sequence[Sequence[str]], names: Sequence[str]) -> Check:
    """Sequences of six words in several texts. Writers who never saw each other's texts show how many are chance."""
    where = _occurrences(_grams(words, SEQUENCE) for words in texts)
    writers = [r.get("writer") for r in read]
    faults = [
        f"{' '.join(gram)!r} stands in {len(those)} texts: reword some of {', '.join(names[i] for i in those[:8])}"
        for gram, those in where.items()
        if len({read[i].get("topic") or i for i in those}) > OFTEN
    ]
    pairs = _pairs(where)
    found = f"{len(pairs)} pairs of texts share one"
    allowed = f"none in texts on more than {OFTEN} topics"
    if all(writers) and len(set(writers)) > 1:
        within = sum(n * (n - 1) // 2 for n in Counter(writers).values())
        between = len(texts) * (len(texts) - 1) // 2 - within
        same = sum(writers[a] == writers[b] for a, b in pairs)
        chance = (len(pairs) - same) / between
        found += f": {same / within * 1e4:.1f} of 10,000 pairs of one writer, {chance * 1e4:.1f} of two"
        allowed += f"; one writer's at most {VOICE:g} times as often as two writers'"
        if binomtest(same, within, min(VOICE * max(chance, 1 / between), 1.0), alternative="greater").pvalue <= 0.01:
            worst = Counter(writers[a] for a, b in pairs if writers[a] == writers[b]).most_common(3)
            faults.append(
                "writers repeat themselves more than chance allows, most of all "
                + ", ".join(f"{writer} ({n} pairs)" for writer, n in worst)
                + ": reword their repeated phrases"
            )
    return Check(file, "repeated", found, allowed, tuple(faults))


def _texture(file: str, read: Sequence[Record]) -> Iterator[Check]:
    """First names, variety of words, rhythm of sentences."""
    in_texts: Counter[str] = Counter()
    lower = {word for r in read for word in _WORD.findall(r["text"]) if word[0].islower()}
    for r in read:
        # Behind a lower-case word or a comma, a capital makes a name.
        inside = set(re.findall(r"(?<=[a-z,;] )[A-Z][^\W\d_]+", r["text"]))
        in_texts.update(name for name in inside if not _NO_NAMES.fullmatch(name) and name.casefold() not in lower)
    name, most = in_texts.most_common(1)[0] if in_texts else ("no name", 0)
    limit = max(NAMES * len(read), 3)
    faults = tuple(f"{name} occurs in {n} texts: rename some" for name, n in in_texts.most_common() if n > limit)
    yield Check(file, "first names", f"{name} in {most / len(read):.1%}", f"{NAMES:.0%} of the texts", faults)

    def variety(text: str) -> float:
        words = [word.casefold() for word in _WORD.findall(text)[:100]]
        return len(set(words)) / max(len(words), 1)

    yield _least(file, "variety", read, variety, VARIETY, "of the first 100 words are different")

    def rhythm(text: str) -> float:
        sentences = [len(_WORD.findall(part)) for part in re.split(r"[.!?…]+[\"”’)]*(?:\s|$)", text) if _WORD.search(part)]
        return float(np.std(sentences))

    yield _least(file, "rhythm", read, rhythm, RHYTHM, "words standard deviation of sentence length")


def _least(file: str, what: str, read: Sequence[Record], measure: Callable[[str], float], limit: float, unit: str) -> Check:
    values = [measure(r["text"]) for r in read]
    faults = tuple(f"{r['id']}: {value:.2f} {unit}: vary it" for r, value in zip(read, values, strict=True) if value < limit)
    return Check(file, what, f"mean {np.mean(values):.2f}, least {min(values):.2f} {unit}", f"at least {limit:g}", faults)


# ── counts of the other bundled files ──


def _exactly(file: str, what: str, counts: Mapping[Any, int], wanted: Mapping[Any, int] | int, unit: str) -> Check:
    expected = dict.fromkeys(counts, wanted) if isinstance(wanted, int) else dict(wanted)
    faults = tuple(
        f"{key}: {counts.get(key, 0)} {unit}: make it {expected.get(key, 0)}"
        for key in dict.fromkeys((*expected, *counts))
        if counts.get(key, 0) != expected.get(key, 0)
    )
    found = f"{sum(counts.values())} {unit} of {len(counts)}"
    return Check(file, what, found, f"{sum(expected.values())} of {len(expected)}", faults)


def _neutral(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    yield _exactly(file, "counts", {"dialogues": len(read)}, {"dialogues": 240}, "texts")
    exchanges = {r["id"]: len(re.findall(r"^AI:", r["text"], flags=re.M)) for r in read}
    faults = [f"{id}: {n} exchanges: make it 2 to 6" for id, n in exchanges.items() if not 2 <= n <= 6]
    faults += [f"{r['id']}: starts with {r['text'][:10]!r}: the person speaks first" for r in read if r["text"][:7] != "Person:"]
    yield Check(file, "exchanges", f"{min(exchanges.values())} to {max(exchanges.values())}", "2 to 6", tuple(faults))
    # Web pages have a content, and things are of one kind or another.
    others = [concept for concept in concepts if concept.name not in ("content", "kind")]
    faults = [
        f"{r['id']}: {word!r} names {c.name}: make it neutral" for r in read for c in others if (word := c.named_in(r["text"]))
    ]
    yield Check(file, "feeling", f"{len(faults)} emotions named", "none but content and kind", tuple(faults))


def _turns(file: str, read: Sequence[Record], least: int, most: int) -> Check:
    faults = []
    for r in read:
        turns: Any = r.get("turns")
        shape = isinstance(turns, list) and all(isinstance(t, list) and len(t) == 2 and all(map(_filled, t)) for t in turns)
        if not shape:
            faults.append(f"{r['id']}: turns must be pairs of speaker and words: write them")
        elif not least <= len(turns) <= most or any(a[0] == b[0] for a, b in pairwise(turns)):
            faults.append(f"{r['id']}: {len(turns)} turns: make it {least} to {most}, the speakers taking turns")
    n = [len(r.get("turns") or ()) for r in read]
    return Check(file, "turns", f"{min(n)} to {max(n)}", f"{least} to {most}, speakers taking turns", tuple(faults))


def _speakers(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    for side in ("person", "assistant"):
        yield _exactly(file, side, Counter(r[side] for r in read), dict.fromkeys(concepts.names, 2), "dialogues")
    named = sum(bool(r.get("names")) for r in read)
    yield _exactly(file, "names", {"with names": named}, {"with names": round(len(read) / 4)}, "dialogues")
    yield _turns(file, read, 10, 16)
    yield _unnamed(file, read, concepts, lambda r: (r["person"], r["assistant"]))


def _concealment(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    wanted = {condition: 210 if condition == "hidden" else 90 for condition in _CONDITIONS}
    yield _exactly(file, "conditions", Counter(r["condition"] for r in read), wanted, "scenes")
    hidden = Counter((r["real"], r["other"]) for r in read if r["condition"] == "hidden")
    yield _exactly(file, "pairs", hidden, 1, "hidden scenes")
    scenes = [r for r in read if r["condition"] not in ("neutral", "story")]
    yield _turns(file, scenes, 1, 3)
    faults = tuple(
        f"{r['id']}: {r['speaker']} is not in the scenario: name them there" for r in read if r["speaker"] not in r["scenario"]
    )
    yield Check(file, "speaker", f"{len(read)} scenarios", "the speaker is named in it", faults)
    # The scenario states the real emotion; the turns name neither it nor what is shown.
    spoken = [{**r, "scenario": ""} for r in read]
    yield _unnamed(file, spoken, concepts, lambda r: (r["real"], *([r["other"]] if r["condition"] == "hidden" else [])))


def _unnamed(file: str, read: Sequence[Record], concepts: ConceptSet, which: Callable[[Record], Iterable[str]]) -> Check:
    faults = tuple(
        f"{r['id']}: {found!r} names {name}: say it by tone"
        for r in read
        for name in which(r)
        if (found := concepts[name].named_in(_text(r)))
    )
    return Check(file, "named", f"{len(faults)} emotions named", "none", faults)


def _scenarios(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    counts = Counter(r["concept"] for r in read)
    yield _exactly(file, "counts", counts, 4, "messages")
    yield _exactly(file, "emotions", {"emotions": len(counts)}, {"emotions": 36}, "in all")
    held = sum(r["held_out"] for r in read)
    yield _exactly(file, "held out", {"held out": held}, {"held out": len(read) // 3}, "messages")
    yield _unnamed(file, read, concepts, lambda r: (r["concept"],))


def _ladders(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    counts = Counter("control" if r["control"] else "ladder" for r in read)
    yield _exactly(file, "counts", counts, {"ladder": 16, "control": 4}, "messages")
    faults = []
    for r in read:
        values, affected = r.get("values"), [*r.get("rise", ()), *r.get("fall", ())]
        if r["text"].count("{value}") != 1:
            faults.append(f"{r['id']}: {{value}} must stand in it once: write it where the number belongs")
        if not isinstance(values, list) or len(values) < 8 or values != sorted(set(values)):
            faults.append(f"{r['id']}: values must be 8 or more, ascending: correct them")
        if not affected or any(name not in concepts for name in affected):
            faults.append(f"{r['id']}: rise and fall must name concepts of the set, at least one: correct them")
    steps = [len(r.get("values") or ()) for r in read]
    yield Check(file, "values", f"{min(steps)} to {max(steps)} a ladder", "8 or more, ascending, put in once", tuple(faults))


def _activities(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    wanted = {(category, held): 8 for category in _CATEGORIES for held in _FLAG}
    yield _exactly(file, "counts", Counter((r["category"], r["held_out"]) for r in read), wanted, "activities")


def _contrasts(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    kinds = _LAYOUTS["contrasts"].choices["kind"]
    yield _exactly(file, "counts", Counter(r["kind"] for r in read), dict.fromkeys(kinds, 24), "contrasts")
    faults = tuple(f"{r['id']}: {fault}" for r in read if (fault := _broken_contrast(r, concepts)))
    yield Check(file, "parts", f"{len(faults)} incomplete", "emotions known, marked words in the text", faults)


def _broken_contrast(r: Record, concepts: ConceptSet) -> str:
    """What is wrong with a contrast, or ``""``."""
    names: list[Any]
    if r["kind"] == "audience":
        names, right = [r.get("user"), r.get("reply")], _filled(r.get("text"))
    elif r["kind"] == "negation":
        names = [r.get("concept")]
        right = all(str(r.get("word")) in str(r.get(key)) for key in ("affirmed", "negated"))
    elif r["kind"] == "binding":
        names = [r[key]["concept"] for key in ("first", "second")]
        right = r["text"].count(r["reference"]["span"]) == 1 and all(r[key]["word"] in r["text"] for key in ("first", "second"))
    else:
        names = [r.get("rises"), r.get("falls")]
        differ = [(a, b) for a, b in zip(r["first"].split(), r["second"].split(), strict=False) if a != b]
        right = len(differ) == 1 and all(r[key].endswith(r["ending"]) for key in ("first", "second"))
    if any(name not in concepts for name in names):
        return f"{', '.join(map(str, names))} must be concepts of the set: correct them"
    return "" if right else "its marked parts are not in the text as they should be: correct them"


def _profile(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    yield _exactly(file, "counts", Counter(r["kind"] for r in read), {"hard": 160, "neutral": 80}, "prompts")
    yield _exactly(file, "categories", Counter(r["category"] for r in read if r["kind"] == "hard"), 32, "hard prompts")


_COUNTS: dict[str, Callable[[str, Sequence[Record], ConceptSet], Iterator[Check]]] = {
    "neutral": _neutral,
    "speakers": _speakers,
    "concealment": _concealment,
    "scenarios": _scenarios,
    "ladders": _ladders,
    "activities": _activities,
    "contrasts": _contrasts,
    "profile": _profile,
}
