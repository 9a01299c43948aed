"""Checks of stories: counts and balance, lengths, narration, names, texture; bundled ones or one's own."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from affectlens.audit.checks import WORD, Check, Layout, Record, check_fields, is_filled, name_of
from affectlens.audit.repetition import check_repetition
from affectlens.concepts import ConceptSet

WORDS = (110, 190)
"""Shortest and longest story of the bundled corpus."""
LEAST_WORDS, LENGTH_RATIO = 80, 3.0
"""For a corpus of one's own: a shorter story has hardly anything behind its 50th token; longest to shortest story."""
NAMES = 0.03
"""So large a share of the stories may have the same first name in it."""
VARIETY = 0.5
"""Least type-token ratio: different words among the first hundred of a text."""
RHYTHM = 2.0
"""Least standard deviation of sentence lengths in a text, in words."""

_QUOTED = re.compile(r"[\"“]([^\"“”]*)[\"”]")
_OWN = re.compile(r"\b(?:I|[Mm]y|me|mine|myself|[Ww]e|[Oo]ur|us)\b")
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


def check_stories(file: str, read: Sequence[Record], concepts: ConceptSet, *, own: bool) -> list[Check]:
    """All checks of stories; ``own`` ones may lack optional fields and have other concepts and counts."""
    choices: dict[str, tuple[Any, ...]] = {"person": ("first", "third")}
    if own:
        # Optional fields may be null or hold anything: what is no text counts as absent. Ids may be numbers.
        read = [{**{key: value for key, value in r.items() if is_filled(value)}, "id": name_of(r, i)} for i, r in enumerate(read)]
        layout = Layout(("text", "concept"), (), choices if any("person" in r for r in read) else {})
    else:
        choices["topic"] = concepts.topics
        if concepts.name == "emotions":
            choices |= {"tense": ("past", "present"), "telling": ("spoken", "acted", "inward")}
        layout = Layout(("text",), ("concept",), choices)
    checks = list(check_fields(file, read, layout, concepts))
    if checks[0].faults:
        return checks
    checks += _balance(file, read, concepts, own)
    checks.append(_lengths(file, read, own))
    checks.append(_given_away(file, read, concepts))
    checks += _style(file, read)
    checks += check_repetition(file, read)
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


def _texture(file: str, read: Sequence[Record]) -> Iterator[Check]:
    """First names, variety of words, rhythm of sentences."""
    in_texts: Counter[str] = Counter()
    lower = {word for r in read for word in WORD.findall(r["text"]) if word[0].islower()}
    for r in read:
        # Behind a lower-case word or a comma, a capital makes a name.
        inside = set(re.findall(r"(?<=[a-z,;] )[A-Z][^\W\d_]+", r["text"]))
        in_texts.update(name for name in inside if not _NO_NAMES.fullmatch(name) and name.casefold() not in lower)
    name, most = in_texts.most_common(1)[0] if in_texts else ("no name", 0)
    limit = max(NAMES * len(read), 3)
    faults = tuple(f"{name} occurs in {n} texts: rename some" for name, n in in_texts.most_common() if n > limit)
    yield Check(file, "first names", f"{name} in {most / len(read):.1%}", f"{NAMES:.0%} of the texts", faults)

    def variety(text: str) -> float:
        words = [word.casefold() for word in WORD.findall(text)[:100]]
        return len(set(words)) / max(len(words), 1)

    yield _least(file, "variety", read, variety, VARIETY, "of the first 100 words are different")

    def rhythm(text: str) -> float:
        sentences = [len(WORD.findall(part)) for part in re.split(r"[.!?…]+[\"”’)]*(?:\s|$)", text) if WORD.search(part)]
        return float(np.std(sentences)) if sentences else 0.0

    yield _least(file, "rhythm", read, rhythm, RHYTHM, "words standard deviation of sentence length")


def _least(file: str, what: str, read: Sequence[Record], measure: Callable[[str], float], limit: float, unit: str) -> Check:
    values = [measure(r["text"]) for r in read]
    faults = tuple(f"{r['id']}: {value:.2f} {unit}: vary it" for r, value in zip(read, values, strict=True) if value < limit)
    return Check(file, what, f"mean {np.mean(values):.2f}, least {min(values):.2f} {unit}", f"at least {limit:g}", faults)
