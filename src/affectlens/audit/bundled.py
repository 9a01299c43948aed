"""Checks of the other bundled files: their fields, their counts, and that nobody names what should only be shown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from affectlens.audit.checks import Check, Layout, Record, check_fields, is_filled, listed, read_file, text_of
from affectlens.audit.repetition import check_held_out, check_repetition
from affectlens.concepts import ConceptSet
from affectlens.stats import wilson

BLIND = 0.85, 0.97
"""In the blind check: least shares of stories whose emotion was named, and of answers from the right cluster."""

DIALOGUES = {"neutral": 240, "neutral_heldout": 120}
"""How many there are in each file."""

_FLAG = (True, False)
_CATEGORIES = ("helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe")
_CONDITIONS = ("hidden", "open", "neutral", "story", "others")
_LAYOUTS = {
    "neutral": Layout(("text", "topic")),
    "neutral_heldout": Layout(("text", "topic")),
    "speakers": Layout(("topic",), ("person", "assistant")),
    "concealment": Layout(("topic", "scenario", "speaker"), ("real",), {"condition": _CONDITIONS}),
    "scenarios": Layout(concepts=("concept",), choices={"held_out": _FLAG}),
    "ladders": Layout(choices={"control": _FLAG}),
    "activities": Layout(choices={"category": _CATEGORIES, "held_out": _FLAG}),
    "openings": Layout(("text",), choices={"kind": ("self", "other", "story", "event"), "held_out": _FLAG}),
    "reactions": Layout(("text",), ("concept",)),
    "scripts": Layout(("speaker", "listener", "scenario", "unsaid", "asked"), ("concept",)),
    "contrasts": Layout((), choices={"kind": ("audience", "negation", "binding", "early word")}),
    "profile": Layout(("text", "category"), choices={"kind": ("hard", "neutral")}),
    "blind": Layout(("reader",), ("answer",)),
}


def bundled_file(file: Path, read: Sequence[Record], concepts: ConceptSet) -> list[Check]:
    """The checks of one of the bundled files that hold no stories."""
    kind = file.stem
    if kind == "blind":
        return _blind(file, read, concepts)
    checks = list(check_fields(file.name, read, _LAYOUTS[kind], concepts))
    if not checks[0].faults:  # what follows relies on the fields
        checks += [
            *_COUNTS[kind](file.name, read, concepts),
            *check_repetition(file.name, read, openings=kind not in ("ladders", "openings", "reactions")),
        ]
        if kind == "neutral_heldout":
            checks.append(check_held_out(file.name, read, read_file(file.with_name("neutral.jsonl"))[0]))
    return checks


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
    yield _exactly(file, "counts", {"dialogues": len(read)}, {"dialogues": DIALOGUES[Path(file).stem]}, "texts")
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
        turns = listed(r, "turns")
        if not turns or not all(isinstance(t, list) and len(t) == 2 and all(map(is_filled, t)) for t in turns):
            faults.append(f"{r['id']}: turns must be pairs of speaker and words: write them")
        elif not least <= len(turns) <= most or any(a[0] == b[0] for a, b in pairwise(turns)):
            faults.append(f"{r['id']}: {len(turns)} turns: make it {least} to {most}, the speakers taking turns")
    n = [len(listed(r, "turns")) for r in read]
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
    faults = tuple(
        f"{r['id']}: other {other!r} is not among the {len(concepts)} concepts: correct it"
        for r in read
        if r["condition"] == "hidden" and (not is_filled(other := r.get("other")) or other not in concepts)
    )
    if faults:
        yield Check(file, "other", f"{len(faults)} unknown", "hidden scenes show a concept of the set", faults)
        return
    hidden = Counter((r["real"], r["other"]) for r in read if r["condition"] == "hidden")
    yield _exactly(file, "pairs", hidden, 1, "hidden scenes")
    yield _turns(file, read, 1, 3)
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
        if (found := concepts[name].named_in(text_of(r)))
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
        values, affected = listed(r, "values"), [*listed(r, "rise"), *listed(r, "fall")]
        if r["text"].count("{value}") != 1:
            faults.append(f"{r['id']}: {{value}} must stand in it once: write it where the number belongs")
        numbers = [value for value in values if isinstance(value, (int, float))]
        if numbers != values or len(values) < 8 or values != sorted(set(values)):
            faults.append(f"{r['id']}: values must be 8 or more, ascending: correct them")
        sides = all(isinstance(r.get(side), list) for side in ("rise", "fall"))
        if not sides or not affected or not all(is_filled(name) and name in concepts for name in affected):
            faults.append(f"{r['id']}: rise and fall must name concepts of the set, at least one: correct them")
    steps = [len(listed(r, "values")) for r in read]
    yield Check(file, "values", f"{min(steps)} to {max(steps)} a ladder", "8 or more, ascending, put in once", tuple(faults))


def _activities(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    wanted = {(category, held): 8 for category in _CATEGORIES for held in _FLAG}
    yield _exactly(file, "counts", Counter((r["category"], r["held_out"]) for r in read), wanted, "activities")


def _openings(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    wanted = {(kind, held): 3 if kind == "event" else 6 for kind in _LAYOUTS["openings"].choices["kind"] for held in _FLAG}
    yield _exactly(file, "counts", Counter((r["kind"], r["held_out"]) for r in read), wanted, "openings")
    yield _feeling(file, read, concepts)


def _reactions(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    yield _exactly(file, "counts", {"emotions": len({r["concept"] for r in read})}, {"emotions": 11}, "greetings")
    yield from _replies(file, read, concepts, ("express", "react", "neutral"), 4)


def _scripts(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    counts = Counter(r["concept"] for r in read)
    yield _exactly(file, "counts", counts, 2, "scripts")
    yield _exactly(file, "emotions", {"emotions": len(counts)}, {"emotions": 10}, "in all")
    faults = tuple(
        f"{r['id']}: the scenario does not name {r['concept']}: say it there, or the script is unsaid twice"
        for r in read
        if not concepts[r["concept"]].named_in(r["scenario"])
    )
    yield Check(file, "said", f"{len(faults)} scenarios without the emotion", "none", faults)
    faults = tuple(
        f"{r['id']}: {r[who]} is not in the opening that says nothing: name them there"
        for r in read
        for who in ("speaker", "listener")
        if r[who] not in r["unsaid"]
    )
    yield Check(file, "people", f"{len(faults)} missing", "both in the opening that says nothing", faults)
    yield from _replies(file, [{**r, "scenario": ""} for r in read], concepts, ("deny", "admit", "neutral", "glad"), 2)


WORDS = 6, 16
"""Words of a reply: much longer ones are easier to foretell for each word."""


def _replies(file: str, read: Sequence[Record], concepts: ConceptSet, kinds: Sequence[str], n: int) -> Iterator[Check]:
    """So many replies of each kind, of similar length, and none that names any emotion."""
    faults, lengths = [], []
    for r, kind in ((r, kind) for r in read for kind in kinds):
        replies = [reply for reply in listed(r, kind) if is_filled(reply)]
        if len(replies) != n or len(listed(r, kind)) != n:
            faults.append(f"{r['id']}: {len(replies)} replies {kind}: make it {n}")
        words = [len(reply.split()) for reply in replies]
        lengths += words
        odd = [w for w in words if not WORDS[0] <= w <= WORDS[1]]
        faults += [f"{r['id']}: a reply {kind} of {w} words: make it {WORDS[0]} to {WORDS[1]}" for w in odd]
    found = f"{min(lengths, default=0)} to {max(lengths, default=0)} words"
    yield Check(file, "replies", found, f"{n} of each kind, {WORDS[0]} to {WORDS[1]} words", tuple(faults))
    yield _feeling(file, read, concepts)


def _feeling(file: str, read: Sequence[Record], concepts: ConceptSet) -> Check:
    faults = tuple(
        f"{r['id']}: {word!r} names {concept.name}: make it neutral"
        for r in read
        for concept in concepts
        if (word := concept.named_in(text_of(r)))
    )
    return Check(file, "feeling", f"{len(faults)} emotions named", "none", faults)


def _contrasts(file: str, read: Sequence[Record], concepts: ConceptSet) -> Iterator[Check]:
    kinds = _LAYOUTS["contrasts"].choices["kind"]
    yield _exactly(file, "counts", Counter(r["kind"] for r in read), dict.fromkeys(kinds, 24), "contrasts")
    faults = tuple(f"{r['id']}: {fault}" for r in read if (fault := _broken_contrast(r, concepts)))
    yield Check(file, "parts", f"{len(faults)} incomplete", "emotions known, marked words in the text", faults)


def _broken_contrast(r: Record, concepts: ConceptSet) -> str:
    """What is wrong with a contrast, or ``""``."""
    try:
        return _contrast(r, concepts)
    except (KeyError, TypeError, AttributeError):
        return "a part is missing or of the wrong kind: write it as the corpus README says"


def _contrast(r: Record, concepts: ConceptSet) -> str:
    names: list[Any]
    if r["kind"] == "audience":
        names, right = [r.get("user"), r.get("reply")], is_filled(r.get("text"))
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


def _blind(file: Path, read: Sequence[Record], concepts: ConceptSet) -> list[Check]:
    """How often a reader named the emotion of a story, or one of its cluster."""
    fields, *_ = check_fields(file.name, read, _LAYOUTS["blind"], concepts)
    stories, broken = read_file(file.with_name("stories.jsonl"))
    told = {r.get("id"): str(r.get("concept")) for r in stories}
    if fields.faults or broken or any(name not in concepts for name in told.values()):
        return [fields]  # the stories' own checks say what is wrong with them
    faults = tuple(f"{r['id']}: no such story with such an answer: ask again" for r in read if not _answers(r, told))
    if faults:
        return [fields, Check(file.name, "answers", f"{len(faults)} wrong", "none", faults)]
    checks = [fields]
    asked = [(concepts[told[r["id"]]], concepts[r["answer"]], r["id"]) for r in read]
    for what, least, right in (
        ("emotion named", BLIND[0], [a == b for a, b, _ in asked]),
        ("cluster named", BLIND[1], [a.cluster == b.cluster for a, b, _ in asked]),
    ):
        share = wilson(sum(right), len(right))
        wrong = [f"{id}: taken for {b.name}: rewrite it" for (_, b, id), hit in zip(asked, right, strict=True) if not hit]
        found = f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}] of {share.n}"
        checks.append(Check(file.name, what, found, f"{least:.0%} or more", tuple(wrong if share.value < least else ())))
    return checks


def _answers(r: Record, told: Mapping[Any, str]) -> bool:
    words = r.get("candidates")
    return r["id"] in told and isinstance(words, list) and r["answer"] in words and len(set(map(str, words))) == 12


_COUNTS: dict[str, Callable[[str, Sequence[Record], ConceptSet], Iterator[Check]]] = {
    **dict.fromkeys(DIALOGUES, _neutral),
    "speakers": _speakers,
    "concealment": _concealment,
    "scenarios": _scenarios,
    "ladders": _ladders,
    "activities": _activities,
    "openings": _openings,
    "reactions": _reactions,
    "scripts": _scripts,
    "contrasts": _contrasts,
    "profile": _profile,
}
