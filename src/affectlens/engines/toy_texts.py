"""What the toy reads in place of the bundled texts, which are English and mean nothing to it: the same records, in its own words.

Every effect that a study looks for is in them, through what :mod:`affectlens.engines.toy` plants, and goes away with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from affectlens.engines.toy import ToyEngine

SCENARIOS, HELD_OUT = 6, 2
"""Messages of each concept, and how many of them are held out."""
STORIES = 6
"""Stories of each concept."""
LADDERS, STEPS = 6, 9
"""Quantity ladders of each kind, and the values of each."""
CONTRASTS = 24
TALKS, TURNS = 16, 6
"""How often each concept stands on either side of a dialogue, and how often each side speaks."""
REPLIES = 2
"""Replies of each kind in a script."""
HIDERS = 6
"""So many concepts are concealed, each behind each other one."""
ACTIVITIES = 2
"""Activities of each category, and as many held out."""
CATEGORIES = ("helpful", "engaging", "social", "self-curiosity", "neutral", "aversive", "misaligned", "unsafe")
"""From pleasant to unpleasant in what their words convey."""


class _Writer:
    def __init__(self, engine: ToyEngine, name: str) -> None:
        self.engine, self.names = engine, tuple(engine.concepts)
        self.rng = np.random.default_rng([engine.seed, *name.encode()])

    def words(self, concept: str | None, n: int) -> str:
        """``n`` words of a concept, or neutral ones, on some topic."""
        seed, topic = int(self.rng.integers(2**31)), f"topic {self.rng.integers(40)}"
        return self.engine.write(concept, topic, seed=seed, words=n)

    def dense(self, concept: str, n: int) -> str:
        """What is left of ``n`` words of a concept when only cue words stay: a preamble that says the feeling outright."""
        cues = {cue for own in self.engine.concepts.values() for cue in own}
        return (
            " ".join(word for word in self.words(concept, n).lower().replace(".", "").split() if word in cues).capitalize() + "."
        )

    def turn(self, concept: str, n: int) -> str:
        """About ``n`` words of a concept and on no topic: a dialogue on several topics would be mostly about those."""
        from affectlens.engines.toy import TOPICS

        return " ".join(
            w for w in self.words(concept, n * 10 // 7).split() if w.strip(".").lower() not in " ".join(TOPICS).split()
        )

    def plain(self, n: int) -> str:
        """``n`` words that mean nothing."""
        from affectlens.engines.toy import PLAIN

        return " ".join(self.rng.permutation(PLAIN.split())[:n])

    def other(self, concept: str) -> str:
        return str(self.rng.choice([name for name in self.names if name != concept]))

    def cues(self, concept: str) -> str:
        """Four cue words of a concept."""
        return " ".join(self.rng.permutation(self.engine.concepts[concept])[:4])

    def cue(self, concept: str) -> str:
        return str(self.rng.choice(self.engine.concepts[concept]))


def _stories(w: _Writer) -> list[dict[str, Any]]:
    return [{"id": f"{name}-{i}", "concept": name, "text": w.words(name, 90)} for name in w.names for i in range(STORIES)]


def _scenarios(w: _Writer) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}-{i}", "concept": name, "text": w.words(name, 40), "held_out": i >= SCENARIOS - HELD_OUT}
        for name in w.names
        for i in range(SCENARIOS)
    ]


def _ladders(w: _Writer) -> list[dict[str, Any]]:
    from affectlens.engines.toy import QUANTITIES

    records = []
    # Every number is a word of its own: ladders of one kind that had numbers in common would share their noise.
    dealt = {what: w.rng.permutation(100).tolist() for what in QUANTITIES}
    for (what, towards), i in itertools.product(QUANTITIES.items(), range(LADDERS)):
        known = towards if towards and set(towards) <= set(w.names) else None
        values = sorted(dealt[what][STEPS * i : STEPS * (i + 1)])
        records.append(
            {
                "id": f"{what}-{i}",
                "text": f"{w.words(None, 12)} {what}-{{value}} {w.words(None, 12)}",
                "values": values,
                "rise": [known[0]] if known else [w.names[i % len(w.names)]],
                "fall": [known[1]] if known else [w.names[(i + 1) % len(w.names)]],
                "control": known is None,
            }
        )
    return records


def _contrasts(w: _Writer) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for i in range(CONTRASTS):
        first = w.names[i % len(w.names)]
        second = w.other(first)
        # What the writer feels is told; what the reply should feel is in the question: one long sentence, which ends strongly.
        strong = " ".join(w.rng.permutation(w.engine.concepts[second])[:8])
        asked = f"{w.words(second, 90)} {strong}?".replace(".", ",")
        audience = {"id": f"audience-{i}", "kind": "audience", "text": f"{w.words(first, 27)} {asked}"}
        records.append({**audience, "user": first, "reply": second})
        plain, rest = w.words(None, 9), w.words(None, 9)
        negation = {"affirmed": f"{plain} I am {first} {rest}", "negated": f"{plain} I am not {first} {rest}"}
        records.append({"id": f"negation-{i}", "kind": "negation", "concept": first, **negation, "word": first})
        ends = [w.cue(first), w.cue(second)]
        ending = w.words(None, 14)
        early = {
            "first": f"{plain} {ends[0]} {ending}",
            "second": f"{plain} {ends[1]} {ending}",
            "changed": ends,
            "ending": ending,
        }
        records.append({"id": f"early-{i}", "kind": "early word", **early, "rises": first, "falls": second})
        people = w.rng.permutation(["Anna", "Boris", "Clara", "David"])[:2].tolist()
        feelings = {people[0]: first, people[1]: second}
        to = int(w.rng.integers(2))
        said = " ".join(f"{who} {w.cue(how)} {w.cue(how)} {w.cue(how)}." for who, how in feelings.items())
        one, two = ({"name": who, "concept": how, "word": said.split(f"{who} ")[1].split()[0]} for who, how in feelings.items())
        records.append(
            {
                "id": f"binding-{i}",
                "kind": "binding",
                "text": f"{said} {w.words(None, 9)} The door opened on {people[to]}",
                "first": one,
                "second": two,
                "reference": {"to": ("first", "second")[to], "span": f"opened on {people[to]}"},
            }
        )
    return sorted(records + _numbers(w), key=lambda record: str(record["kind"]))


def _numbers(w: _Writer) -> list[dict[str, Any]]:
    """Early words that are numbers."""
    from affectlens.engines.toy import QUANTITIES

    records = []
    known = [(what, ends) for what, ends in QUANTITIES.items() if ends and set(ends) <= set(w.names)]
    for (what, ends), i in itertools.product(known, range(CONTRASTS // 4)):
        plain, ending, high, low = w.words(None, 9), w.words(None, 14), int(w.rng.integers(85, 100)), int(w.rng.integers(15))
        first, second = (f"{plain} {what}-{n} {ending}" for n in (high, low))
        texts = {"first": first, "second": second, "changed": [str(high), str(low)], "ending": ending}
        records.append({"id": f"{what}-{i}", "kind": "early word", **texts, "rises": ends[0], "falls": ends[1]})
    return records


def _speakers(w: _Writer) -> list[dict[str, Any]]:
    records = []
    for i in range(TALKS):
        answers = w.rng.permutation(w.names).tolist()
        for n, (person, assistant) in enumerate(zip(w.names, answers, strict=True)):
            if person == assistant:  # exchanging with the next one leaves every concept as often on either side
                other = (n + 1) % len(answers)
                answers[n], answers[other] = answers[other], answers[n]
                assistant = answers[n]
            turns = [
                [side, w.turn(how, 12)] for _ in range(TURNS) for side, how in (("person", person), ("assistant", assistant))
            ]
            names = ["Anna", "Boris"] if i == TALKS - 1 else None
            record = {"id": f"speakers-{i}-{n}", "person": person, "assistant": assistant, "topic": f"topic {i}"}
            records.append({**record, "names": names, "turns": turns})
    return records


def _concealment(w: _Writer) -> list[dict[str, Any]]:
    hiders = w.names[:HIDERS]
    wanted: list[tuple[str, str, str | None]] = [
        ("hidden", real, other) for _ in range(2) for real in hiders for other in hiders if real != other
    ]
    for condition, real, _ in itertools.product(("open", "neutral", "story", "others"), hiders, range(6)):
        others = [name for name in hiders if name != real]
        wanted.append((condition, real, str(w.rng.choice(others)) if condition in ("story", "others") and others else None))
    records = []
    for i, (condition, real, other) in enumerate(wanted):
        speaker, listener = w.rng.permutation(["Anna", "Boris", "Clara", "David"])[:2].tolist()
        shown = {"hidden": other, "open": real, "neutral": None, "story": other, "others": other}[condition]
        turns = [[speaker, w.words(shown, 27)], [listener, w.words(None, 12)]]
        record = {"id": f"concealment-{i}", "condition": condition, "real": real, "other": other, "topic": f"topic {i % 8}"}
        records.append({**record, "speaker": speaker, "listener": listener, "scenario": w.dense(real, 90), "turns": turns})
    return records


def _profile(w: _Writer) -> list[dict[str, Any]]:
    hard = [("hard", f"category {i % 4}", w.words(w.names[(3 * (i % 4) + i // 4 % 3) % len(w.names)], 27)) for i in range(96)]
    neutral = [("neutral", f"plain {i % 2}", w.words(None, 27)) for i in range(24)]
    return [{"id": f"profile-{i}", "kind": k, "category": c, "text": t} for i, (k, c, t) in enumerate(hard + neutral)]


def _activities(w: _Writer) -> list[dict[str, Any]]:
    """A few words each: cue words of two concepts that are about as pleasant as the category says, among plain ones."""
    pleasant = sorted(w.names, key=lambda name: -float(w.engine.truth[name][0] @ w.engine.truth.valence))
    records = []
    for held_out, (rank, category), i in itertools.product((False, True), enumerate(CATEGORIES), range(ACTIVITIES)):
        place = rank * (len(pleasant) - 1) / (len(CATEGORIES) - 1)
        concepts = [pleasant[int(place)], pleasant[math.ceil(place)]]
        words = [*w.words(None, 3).lower().rstrip(".").split(), *(w.cue(concept) for concept in concepts)]
        text = " ".join(w.rng.permutation(words))
        records.append({"id": f"{category}-{held_out}-{i}", "category": category, "text": text, "held_out": held_out})
    return records


def _neutral(w: _Writer) -> list[dict[str, Any]]:
    return [
        {"id": f"n{i}", "topic": f"topic {i}", "text": f"Person: {w.words(None, 27)}\nAI: {w.words(None, 45)}"} for i in range(40)
    ]


def _openings(w: _Writer) -> list[dict[str, Any]]:
    """Beginnings on no topic: a topic would be most of what can be said next."""
    prefills = {"self": "I feel", "other": "He was", "story": " and she was", "event": ""}
    return [
        {"id": f"{kind}-{i}", "kind": kind, "text": w.plain(14), "prefill": prefill, "held_out": i % 2 == 1}
        for kind, prefill in prefills.items()
        for i in range(8)
    ]


def _reactions(w: _Writer) -> list[dict[str, Any]]:
    """A greeting, and replies that show a concept, that show its answer, and that mean nothing."""
    return [
        {
            "id": f"reaction-{name}",
            "concept": name,
            "text": w.plain(6),
            "express": [w.cues(name) for _ in range(REPLIES)],
            "react": [w.cues(w.engine.answers[name]) for _ in range(REPLIES)],
            "neutral": [w.plain(4) for _ in range(REPLIES)],
        }
        for name in w.names
    ]


def _scripts(w: _Writer) -> list[dict[str, Any]]:
    """What somebody feels and is asked about; denied is it with words of its answer, and glad is what it is least like."""
    like = w.engine.truth.directions[0] @ w.engine.truth.directions[0].T
    records = []
    for i, name in enumerate(w.names[:HIDERS]):
        speaker, listener = w.rng.permutation(["Anna", "Boris", "Clara", "David"])[:2].tolist()
        shown = {"deny": w.engine.answers[name], "admit": name, "neutral": None, "glad": w.names[int(like[i].argmin())]}
        replies = {kind: [w.cues(how) if how else w.plain(4) for _ in range(REPLIES)] for kind, how in shown.items()}
        record = {"id": f"script-{name}", "concept": name, "speaker": speaker, "listener": listener, "asked": w.plain(8)}
        records.append({**record, "scenario": w.dense(name, 60), "unsaid": w.plain(12), **replies})
    return records


WRITERS: dict[str, Callable[[_Writer], list[dict[str, Any]]]] = {
    "stories": _stories,
    "scenarios": _scenarios,
    "ladders": _ladders,
    "contrasts": _contrasts,
    "speakers": _speakers,
    "concealment": _concealment,
    "profile": _profile,
    "neutral": _neutral,
    "openings": _openings,
    "activities": _activities,
    "reactions": _reactions,
    "scripts": _scripts,
}


def write(engine: ToyEngine, name: str) -> list[dict[str, Any]] | None:
    """The toy's records for a file of texts, the same on every call; None where it has none.

    Example:
        >>> from affectlens.engines.toy import ToyEngine
        >>> len(write(ToyEngine(), "scenarios"))
        72
    """
    return WRITERS[name](_Writer(engine, name)) if name in WRITERS else None
