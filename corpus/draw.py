"""What is to be written for the bundled corpus, drawn once by seed: who feels what, on which topic, told how.

    python corpus/draw.py PLANS      writes stories, speakers, concealment and blind.jsonl into the folder PLANS

The texts in ``src/affectlens/data/corpus`` were written to these plans, and a test draws them again and compares. The draw keeps
everything apart that could pass for the emotion. Free writing does not: in an earlier corpus the second principal component of
the vectors was the share of direct speech, and the first was action against reflection (docs/lab-log.md). So every emotion gets

* each combination of person (first, third), tense (past, present) and telling (spoken, acted, inward) once: 12 stories;
* 12 of the 100 topics, each topic 20 or 21 emotions, spread evenly over the clusters;
* three stories of each of four briefs, which 16 writers followed; each block of four stories has every brief once, so the first
  four stories of each emotion, which the demo uses, are balanced as well.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.concepts import ConceptSet

SEED = 20261121
TELLINGS = ("spoken", "acted", "inward")
BRIEFS = "abcd"
HIDDEN = (
    "amazed", "excited", "happy", "angry", "desperate", "frustrated", "afraid", "terrified", "tired", "sad", "shocked",
    "guilty", "jealous", "lonely", "proud",
)  # fmt: skip
"""The emotions of the concealment dialogues: the eleven that the paper's figures show, and four of ours."""


def stories(concepts: ConceptSet) -> list[dict[str, Any]]:
    """One record a story: id, concept, topic, person, tense, telling, writer."""
    rng = np.random.default_rng([SEED, 1])
    by_cluster = [str(name) for names in concepts.clusters.values() for name in rng.permutation(names)]
    topics = _deal(by_cluster, list(concepts.topics), rounds=12, rng=rng)
    writer = {brief: _groups(concepts, 4, rng) for brief in BRIEFS}
    plan = {}
    for name in by_cluster:
        offset = rng.integers(3, size=4)
        for block in range(3):
            combinations = [(person, tense) for person in ("first", "third") for tense in ("past", "present")]
            cells = [(*c, TELLINGS[(offset[k] + block) % 3]) for k, c in enumerate(combinations)]
            for k, (cell, brief) in enumerate(zip(rng.permutation(4), rng.permutation(list(BRIEFS)), strict=True)):
                person, tense, telling = cells[cell]
                number = 4 * block + k
                plan[name, number] = {
                    "id": f"{name}-{number + 1:02d}",
                    "concept": name,
                    "topic": topics[name][number],
                    "person": person,
                    "tense": tense,
                    "telling": telling,
                    "writer": f"{brief}{writer[str(brief)][name]}",
                }
    return [plan[name, number] for name in concepts.names for number in range(12)]


def _deal(names: list[str], topics: list[str], *, rounds: int, rng: np.random.Generator) -> dict[str, list[str]]:
    """Topics for each name, none twice, as even over all names as over neighbouring ones."""
    dealt: dict[str, list[str]] = {name: [] for name in names}
    stream: list[str] = []
    for _ in range(rounds):
        for name in names:
            free = (i for i, topic in enumerate(stream) if topic not in dealt[name])
            while (i := next(free, None)) is None:
                stream += [str(topic) for topic in rng.permutation(topics)]
                free = (i for i, topic in enumerate(stream) if topic not in dealt[name])
            dealt[name].append(stream.pop(i))
    return dealt


def _groups(concepts: ConceptSet, n: int, rng: np.random.Generator) -> dict[str, int]:
    """Each emotion's group from 1 to n; every cluster is spread over all groups."""
    shuffled = [str(name) for names in concepts.clusters.values() for name in rng.permutation(names)]
    return {name: i % n + 1 for i, name in enumerate(shuffled)}


def speakers(concepts: ConceptSet) -> list[dict[str, Any]]:
    """One record a dialogue: id, the two emotions, topic, number of exchanges, whether the speakers have names."""
    rng = np.random.default_rng([SEED, 2])
    plan: list[dict[str, Any]] = []
    for _ in range(2):
        person = rng.permutation(len(concepts))
        assistant = np.roll(person, int(rng.integers(1, len(concepts))))  # never the same emotion on both sides
        for p, a in zip(person, assistant, strict=True):
            plan.append({"person": concepts.names[p], "assistant": concepts.names[a]})
    topics = [str(topic) for _ in range(4) for topic in rng.permutation(concepts.topics)]
    named = set(rng.permutation(len(plan))[: round(len(plan) / 4)].tolist())
    for i, record in enumerate(plan):
        record |= {"id": f"speakers-{i + 1:03d}", "topic": topics[i], "exchanges": 5 + i % 4, "named": i in named}
    return plan


def concealment(concepts: ConceptSet) -> list[dict[str, Any]]:
    """One record a dialogue: id, condition, the real emotion, what is shown instead or spoken of, topic."""
    rng = np.random.default_rng([SEED, 3])
    plan = [{"condition": "hidden", "real": real, "other": shown} for real, shown in itertools.permutations(HIDDEN, 2)]
    for condition in ("open", "neutral", "story", "others"):
        for real in HIDDEN:
            rest = [name for name in HIDDEN if name != real]
            shown = rng.permutation(rest)[:6].tolist() if condition in ("story", "others") else [None] * 6
            plan += [{"condition": condition, "real": real, "other": other} for other in shown]

    def subjects(source: tuple[str, ...]) -> Iterator[str]:
        while True:
            yield from (str(subject) for subject in rng.permutation(source))

    everyday, matter = subjects(concepts.topics), subjects(concepts.neutral_topics)
    for i, record in enumerate(plan):
        record |= {"id": f"concealment-{i + 1:03d}", "topic": next(matter if record["condition"] == "neutral" else everyday)}
    return plan


def blind(concepts: ConceptSet) -> list[dict[str, Any]]:
    """The blind check: two stories of each emotion and, for each, twelve words that a reader chooses from.

    One is right, three are of its cluster where it has as many, the rest are of other clusters.
    """
    rng = np.random.default_rng([SEED, 4])
    clusters = concepts.clusters
    plan = []
    for concept in concepts:
        assert concept.cluster is not None
        family = [name for name in clusters[concept.cluster] if name != concept.name]
        strangers = [name for name in concepts.names if name not in clusters[concept.cluster]]
        for number in sorted(rng.permutation(12)[:2].tolist()):
            near = rng.permutation(family)[:3].tolist()
            far = rng.permutation(strangers)[: 11 - len(near)].tolist()
            words = rng.permutation([concept.name, *near, *far]).tolist()
            plan.append({"id": f"{concept.name}-{number + 1:02d}", "candidates": words})
    return [plan[i] for i in rng.permutation(len(plan))]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    concepts = ConceptSet.load("emotions")
    for draw in (stories, speakers, concealment, blind):
        lines = (json.dumps(record, ensure_ascii=False) for record in draw(concepts))
        (folder / f"{draw.__name__}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
