"""Do texts repeat each other: passages, sequences of words, openings?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from scipy.stats import binomtest

from affectlens.audit.checks import WORD, Check, Record, name_of, text_of

SHINGLES = 0.1
"""Two texts may share so much of their 5-word sequences (Jaccard similarity)."""
SEQUENCE, OFTEN = 6, 4
"""A sequence of six words may stand in texts on four topics: that takes an idiom. Texts on one topic may share more."""
VOICE = 2.0
"""One writer's texts may share sequences so many times as often as those of writers who never saw each other's."""
OPENINGS = 6
"""So many texts may begin with the same four words."""


def check_repetition(file: str, read: Sequence[Record], *, openings: bool = True) -> list[Check]:
    texts = [[word.casefold() for word in WORD.findall(text_of(r))] for r in read]
    names = [name_of(r, i) for i, r in enumerate(read)]
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


def check_held_out(file: str, read: Sequence[Record], fitted: Sequence[Record]) -> Check:
    """Texts that are held out are on other topics and in other words than those that something is fitted on."""
    every = [*read, *fitted]
    names = [name_of(r, i) for i, r in enumerate(every)]
    like = _likeness([[word.casefold() for word in WORD.findall(text_of(r))] for r in every])
    across = {(a, b): value for (a, b), value in like.items() if a < len(read) <= b}
    known = {str(r.get("topic")).casefold() for r in fitted}
    faults = [
        f"{names[i]}: {r.get('topic')!r} is a topic of theirs: take another"
        for i, r in enumerate(read)
        if str(r.get("topic")).casefold() in known
    ]
    faults += [
        f"{names[a]} and {names[b]} share {value:.0%} of their 5-word sequences: rewrite the former"
        for (a, b), value in across.items()
        if value > SHINGLES
    ]
    found = f"{max(across.values(), default=0):.1%} in the most similar pair"
    return Check(file, "held out", found, f"{SHINGLES:.0%} with a fitted text, no topic of theirs", tuple(faults))


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


def _likeness(texts: Sequence[Sequence[str]]) -> dict[tuple[int, int], float]:
    """Jaccard similarity of the 5-word sequences of each pair of texts that share any."""
    grams = [_grams(words, 5) for words in texts]
    return {(a, b): shared / len(grams[a] | grams[b]) for (a, b), shared in _pairs(_occurrences(grams)).items()}


def _shingles(file: str, texts: Sequence[Sequence[str]], names: Sequence[str]) -> Check:
    like = _likeness(texts)
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
