"""Does the model keep apart what the speaker feels and what the other one in the dialogue feels?

Declared before any data is seen:

* **Design.** Dialogues of two speakers with an emotion each (``speakers.jsonl``), put as a plain transcript, once as Human and
  Assistant and once as Person 1 and Person 2. The mean residual over the words of either side gives four kinds of vectors:
  tokens of {Human, Assistant} by emotion of {Human, Assistant}. *Present*: the emotion of whoever speaks the tokens. *Other*:
  that of the listener. Story vectors are those of the bench. A dialogue with one emotion on both sides is left out.
* **Vectors.** As everywhere: mean for each emotion, minus the mean over emotions, without the neutral components, at the
  vectors' layer. The paper's cosine of two such vectors is reported, but with a few dialogues for each emotion it is mostly
  noise.
* **Noise-corrected cosine**, the headline. Inner products of two dialogues that share the emotion in question and no other one,
  minus those of dialogues that share none, averaged over pairs, then emotions; divided by the root of the same for each of the
  two kinds alone (for stories, by the stability of their vectors). No dialogue meets itself, so neither topic nor writer nor
  the listener's emotion counts as agreement. It estimates the cosine that any number of dialogues would give, and can exceed
  1.
* **Retrieval.** AUROC of the same emotion among all others, by cosine over the same pairs of dialogues.
* **Self and other.** *Apart*: the corrected cosine within present and within other minus that between present and other, present
  kinds in units of their pooled power and other kinds of theirs. It needs other-speaker vectors that are there at all: an
  emotion's dialogues are more alike than others (p <= 0.05). Published: (0.97 + 0.91) / 2 - 0.15. *Leak*: how strongly the
  listener's emotion reads along its present-speaker vector, relative to the speaker's own; it needs present-speaker vectors
  only, and is what a monitor would feel.
* **Answers.** Cosine of other-speaker with present-speaker vectors, over pairs of dialogues in which the two speakers' own
  emotions are not of one family, or each other-speaker vector would show what its own speakers happened to feel; each present
  vector's mean is subtracted. *Pattern*: the same for families of emotions, over dialogues in which the listeners' emotions
  are not of one family either, in units of the power of present-speaker vectors, rows and columns centred; correlation between
  two halves of the dialogues, a family with itself and families of fewer than four speakers or listeners in a half left out.
  *Regulation*: mean rating of the present emotions weighted by the cosine, negative ones counting with their sign, divided by
  the sum of absolute weights; correlated with the other emotion's own rating, over words that people have rated.
* **Scenarios.** Squared correlation of an emotion's story and present-speaker readings (cosines at the reply position) over the
  implied-emotion messages.
* **Nulls.** Emotions exchanged between the two sets of vectors (cosines, retrieval, matrices, scenarios), or between dialogues
  where both sets come from the same ones (powers, formats); kinds exchanged within each emotion (apart); speaker and listener
  exchanged within each dialogue (leak); listeners' emotions exchanged between dialogues (pattern); ratings exchanged between
  words (regulation).
* **Intervals.** Bootstrap over emotions, each with its dialogues; over dialogues within halves (pattern), over scenarios within
  emotions (scenarios). Similarity of matrices: jackknife over emotions.
* **Exploratory.** Curves over layers, families of answers with Benjamini-Hochberg q values, single nearest neighbours.
* **Conditions.** A model; eight emotions with two dialogues each on both sides. ``names`` needs present-speaker vectors that are
  found again on the other side (``present_found``), since both formats hold the same words and would agree on noise as well.

Source: method 12 (paper, Fig 17 to 19, 59, Tables 13 and 14; steering is the study of reactions), 23.1 (ewernn, Bestpart).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats as distributions

from affectlens import stats
from affectlens.engine import Readout, Request
from affectlens.likeness import (
    Labelled,
    Likeness,
    corrected,
    correlate,
    likeness,
    likeness_of_vectors,
    match_auroc,
    regrouped,
    shared_labels,
)
from affectlens.probes import AA, AH, FORMATS, HA, HH, KINDS, both_sides, dialogue_requests, labelled_sides, two_sided
from affectlens.stats import Estimate, Null
from affectlens.studies import ALPHA, REPLY, Bench, Claim, Figure, Finding, Outcome, untestable
from affectlens.studies.speakers.answers import Answers
from affectlens.studies.speakers.messages import message_table, read_messages
from affectlens.vectors import centred_cosine, fit_means

NAME = "speakers"
FEW = 8
LIKE, UNLIKE, LEAK, SAME = 0.5, 0.5, 0.25, 0.8
"""Cosines above which vectors count as alike and as the same, and below which as told apart; the share of the speaker's own
emotion that the listener's may reach."""

_HOLDS = f"holds: p <= {ALPHA} and {{}}; weak: p <= {ALPHA} only; fails: otherwise"
_ABOVE = _HOLDS.format("the interval above {}")
_APART = _HOLDS.format(f"the interval above 0 and that of the cosine between present and other below {UNLIKE}")
# Claim, rule, published, figure.
_CLAIMS: dict[str, tuple[str, str, str | None, str]] = {
    "present": ("A speaker's own emotion has one vector, whoever speaks", _ABOVE.format(LIKE), "0.97", "agreement"),
    "present_found": (
        "An emotion's present-speaker vectors of the two sides find each other",
        _ABOVE.format(0.5),
        None,
        "layers",
    ),
    "other": ("The listener's emotion has one vector, whoever listens", _ABOVE.format(LIKE), "0.91", "agreement"),
    "other_found": ("An emotion's other-speaker vectors of the two sides find each other", _ABOVE.format(0.5), None, "layers"),
    "apart": ("Self and other are told apart: an emotion's present and other vectors differ", _APART, "0.79", "cosines"),
    "leak": ("A speaker's words read as the speaker's emotion, not the listener's", _ABOVE.format(1 - LEAK), None, "agreement"),
    "names": ("Plain names give the same present-speaker vectors", _ABOVE.format(SAME), "above 0.95", "agreement"),
    "names_apart": (
        "Self and other are told apart between Person 1 and Person 2, too",
        _APART,
        "above 0.7",
        "cosines",
    ),
    "story": ("Story vectors are related to present-speaker vectors", _ABOVE.format(0), "0.37", "agreement"),
    "structure": (
        "Emotions that are alike for one side are alike for the other",
        _ABOVE.format(0),
        "highly similar",
        "structure",
    ),
    "pattern": ("The listener's emotion is answered in a regular way", _ABOVE.format(0), None, "answers"),
    "regulation": (
        "An aroused listener is met with calmer emotions of the speaker",
        _HOLDS.format("the interval below 0"),
        "-0.47",
        "regulation",
    ),
    "scenarios": (
        "Story and present-speaker vectors read the same in messages that imply an emotion",
        _HOLDS.format("the interval above the null's band"),
        "0.66",
        "scenarios",
    ),
}
CLAIMS = {id: Claim(NAME, id, *claim) for id, claim in _CLAIMS.items()}

WITHIN = ((AA, HH), (AH, HA))
BETWEEN = (((AA, AH), (HH, HA)), ((AA, HA), (HH, AH)))
_Key = tuple[str, str]


def _records(bench: Bench) -> list[dict[str, Any]]:
    return two_sided(bench.texts("speakers"), bench.vectors.names)


class Speakers:
    """Present-speaker and other-speaker vectors; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Self and other"
    question = "Does the model keep apart what a speaker feels and what the other one in the dialogue feels?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every dialogue in both formats, read over the words of either side at every layer; then the scenarios."""
        if bench.engine is None:
            return ()
        asked, records = [], _records(bench)
        for roles in FORMATS.values():
            asked += dialogue_requests(records, bench.vectors.layers, roles)
        reply = Readout(bench.vectors.layers, REPLY, "last")
        return [*asked, *(bench.ask(record["text"], reply) for record in bench.texts("scenarios"))]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, tables of cosines, answers and scenarios, and the data of six figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the dialogues with.")
        records = _records(bench)
        names = tuple(name for name in bench.vectors.names if name in {r["person"] for r in records})
        if len(names) < FEW:
            reason = f"{len(names)} emotions have two dialogues on either side: {FEW} are needed."
            return untestable(CLAIMS.values(), reason)
        results = bench.read(self.requests(bench))
        read = {form: both_sides(itertools.islice(results, len(records))) for form in FORMATS}
        replies = [result.readings[0].values for result in results]
        return _measure(bench, records, names, read, np.stack(replies) if replies else None)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the figures from an outcome's data; nothing when it was untestable."""
        from affectlens.studies.speakers.drawn import draw

        return draw(data) if "names" in data else []


class _Space:
    """The kinds of vectors at one layer, and the likeness of any two, computed once.

    Args:
        bench, names: The vectors, and the emotions in use.
        feels: Emotion of (who begins, who answers) in each dialogue, as numbers, ``(n, 2)``.
        read: For each format the mean residuals, ``(n, sides, layers, D)``.
        row: The layer's row.
    """

    def __init__(self, bench: Bench, names: Sequence[str], feels: np.ndarray, read: Mapping[str, np.ndarray], row: int) -> None:
        vectors = bench.vectors
        self.n = len(names)
        self.feels, self.shared = feels, shared_labels(feels)
        self._found: dict[tuple[_Key | None, _Key], Likeness] = {}
        self.kinds: dict[_Key, Labelled] = {}
        for form, values in read.items():
            own_rows = labelled_sides(values[:, :, row], feels, vectors.neutral[row])
            self.kinds |= {(form, kind): rows for kind, rows in own_rows.items()}
        own = [vectors.index(name) for name in names]
        lengths = vectors.norms[row, own].astype(np.float64)
        self.story = vectors.directions[row, own].astype(np.float64) * lengths[:, None]
        # Refits on resampled stories err as the fit itself does: stability 1 / sqrt(1 + e) tells the share e that is noise.
        self.story_power = lengths**2 * (2 - np.maximum(vectors.stability[row, own], 0.5).astype(np.float64) ** -2)

    def alike(self, p: _Key | None, q: _Key) -> Likeness:
        """Likeness of two kinds, or of the stories (None) and a kind."""
        if (p, q) not in self._found:
            rows = self.kinds[q]
            self._found[p, q] = (
                likeness_of_vectors(self.story, rows) if p is None else likeness(self.kinds[p], rows, self.shared, self.n)
            )
        return self._found[p, q]

    def power(self, kind: _Key | None) -> np.ndarray:
        """Squared length of a kind's vectors without the noise, for each emotion: what they have in common over dialogues."""
        return self.story_power if kind is None else self.alike(kind, kind).same


# ── findings ──


@dataclass
class _Study:
    """What all findings share."""

    bench: Bench
    names: tuple[str, ...]
    space: _Space
    where: str
    bars: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {"draws": self.bench.draws, "seed": self.bench.seed}

    def null(
        self, statistic: Callable[[Any], float], observed: float, permute: Callable[..., Any], kind: str, **how: Any
    ) -> Null:
        return stats.permutation_null(
            statistic, observed, permute=permute, kind=kind, **{"side": "greater", **self.options, **how}
        )

    def exchanged(self, table: np.ndarray, observed: float, scale: float = 1.0) -> Null:
        """Null of the mean of a table's diagonal when the emotions of its columns are exchanged."""
        each = np.arange(len(table))
        return self.null(
            lambda order: float(np.nanmean(table[each, order]) / scale),
            observed,
            lambda rng: rng.permutation(len(table)),
            "emotions exchanged between the two sets of vectors",
        )

    def there(self, kind: _Key) -> bool:
        """Whether dialogues of an emotion are more alike than others at all: p <= ALPHA and a power to divide by."""
        rows, power = self.space.kinds[kind], float(np.nanmean(self.space.power(kind)))
        return power > 0 and regrouped(rows, rows, self.space.shared, power, **self.options).p <= ALPHA

    def compare(self, id: str, label: str, bar: float, note: str, p: _Key | None, q: _Key) -> Finding:
        """Noise-corrected cosine of two kinds of vectors; None stands for stories."""
        cross, one = self.space.alike(p, q), self.space.power(p)
        two, options = self.space.power(q), self.options
        claim, value = CLAIMS[id], corrected(cross.same, one, two)
        if not np.isfinite(value):
            return claim.untestable("Dialogues of one emotion are no more alike than others: there are no vectors to compare.")
        estimate = stats.bootstrap(lambda e: corrected(cross.same[e], one[e], two[e]), len(one), **options)
        scale = float(np.sqrt(np.nanmean(one) * np.nanmean(two)))
        if p is not None and p[1] == q[1]:  # the same dialogues in two formats
            null = regrouped(self.space.kinds[p], self.space.kinds[q], self.space.shared, value, scale=scale, **options)
        else:
            null = self.exchanged(cross.products, value, scale)
        plain = float(cross.plain.mean())
        self.bars[label] = _bar(estimate, plain, null, claim.published)
        note = f"{note}; noise-corrected cosine, {plain:.2f} with the noise; {self.where}."
        return claim.tested(estimate, null, estimate.low > bar, note)


def _bar(estimate: Estimate, plain: float | None, null: Null | None, published: str | None) -> dict[str, Any]:
    try:
        paper = float((published or "").removeprefix("above "))
    except ValueError:
        paper = None
    band = None if null is None else _round((null.low, null.high))
    return {"value": _round((estimate.value, estimate.low, estimate.high)), "plain": plain, "null": band, "paper": paper}


def _measure(
    bench: Bench, records: list[dict[str, Any]], names: tuple[str, ...], read: dict[str, np.ndarray], replies: np.ndarray | None
) -> Outcome:
    index = {name: i for i, name in enumerate(names)}
    feels = np.array([[index[r["person"]], index[r["assistant"]]] for r in records])
    space = _Space(bench, names, feels, read, bench.vectors.row())
    where = f"{len(records)} dialogues of {len(names)} emotions, layer {bench.vectors.layer}, plain transcript"
    study = _Study(bench, names, space, where)
    first, second = FORMATS

    own, formats = (first, "present"), f"{first} against {second}, never the same dialogue"
    words = "Words and emotion of the Assistant against those of the Human"
    others = "Words of either side by the emotion of the other"
    findings = [
        study.compare("present", "present speaker, A and H", LIKE, words, (first, AA), (first, HH)),
        _found(study, "present_found", space.alike((first, AA), (first, HH))),
        study.compare("other", "other speaker, A and H", LIKE, others, (first, AH), (first, HA)),
        _found(study, "other_found", space.alike((first, AH), (first, HA))),
        _apart(study, "apart", first),
        _leak(study, first),
        study.compare("names", "present speaker, A/H and 1/2", SAME, formats, own, (second, "present")),
        _apart(study, "names_apart", second),
        study.compare("story", "story and present speaker", 0.0, "Both sides pooled", None, own),
        _structure(study, first),
    ]
    found_again = next(finding for finding in findings if finding.id == "present_found").null
    if found_again is None or found_again.p > ALPHA:  # both formats hold the same words, so noise would agree as well
        reason = (
            "An emotion's present-speaker vectors cannot be found again in other dialogues: two formats could agree on noise."
        )
        findings = [CLAIMS["names"].untestable(reason) if finding.id == "names" else finding for finding in findings]
    power = float(np.nanmean(space.power(own)))
    answers = Answers(bench, names, space.kinds[own], space.kinds[first, "other"], space.shared, power, where)
    cosines = answers.cosines()
    (pattern, families), (regulation, rated) = (
        answers.pattern(CLAIMS["pattern"]),
        answers.regulation(CLAIMS["regulation"], cosines),
    )
    present = fit_means(space.kinds[own].means(len(names)), bench.vectors.neutral[bench.vectors.row()]).directions
    scenarios, read_alike = read_messages(CLAIMS["scenarios"], bench, names, present, replies, where)
    findings += [pattern, regulation, scenarios]
    data = {
        "layer": bench.vectors.layer,
        "names": list(names),
        "bars": study.bars,
        "structure": _structures(study, first),
        "answers": families,
        "rated": rated,
        "scenarios": read_alike,
        **_cosines(study),
        "curves": _curves(study, first, read[first]),
    }
    tables = tuple(filter(None, (answers.nearest(cosines), message_table(read_alike))))
    return Outcome(tuple(findings), tables, data, _raw(study, records, first))


def _found(study: _Study, id: str, alike: Likeness) -> Finding:
    """AUROC of the same emotion."""
    table = match_auroc(alike.cosines)
    hits = np.diag(table)
    estimate = stats.bootstrap(lambda e: float(np.nanmean(hits[e])), len(hits), **study.options)
    null = study.exchanged(table, estimate.value)
    competing = np.nan_to_num(alike.cosines, nan=-10.0)  # below every cosine: where no pair is fit nothing competes
    top = int(stats.top_k_hits(competing, np.arange(len(hits)), k=5).sum())
    note = (
        f"AUROC of the same emotion; among the first five of {len(hits)} for {top}, by chance {min(5, len(hits))}; {study.where}."
    )
    return CLAIMS[id].tested(estimate, null, estimate.low > 0.5, note)


def _apart(study: _Study, id: str, form: str) -> Finding:
    """Present with present and other with other, against present with other."""
    claim, space, title = CLAIMS[id], study.space, f"self and other, {form}"
    if not study.there((form, "present")):
        return claim.untestable("The speaker's own emotion is not in these dialogues: nothing could be told apart.")
    if not study.there((form, "other")):
        return claim.untestable(
            f"The other speaker's emotion leaves no reliable trace ({study.where}): there is no direction to compare. What leaks "
            "into the speaker's own reading is a finding of its own."
        )
    power = {kind: space.power((form, "present" if kind in WITHIN[0] else "other")) for kind in KINDS}
    ways = [[(space.alike((form, p), (form, q)).same, power[p], power[q]) for p, q in way] for way in (WITHIN, *BETWEEN)]

    def cosines(e: np.ndarray) -> list[float]:
        within, *between = [np.mean([corrected(*(part[e] for part in pair)) for pair in way]) for way in ways]
        return [float(within - np.mean(between)), float(np.mean(between))]

    estimate, across = stats.bootstrap_each(cosines, len(study.names), **study.options)
    # The three ways to pair four kinds, for each emotion, with each kind in units of its own power.
    table = np.array([[cross / np.sqrt(np.nanmean(one) * np.nanmean(two)) for cross, one, two in way] for way in ways]).mean(
        axis=1
    )
    table = table[:, np.isfinite(table).all(axis=0)]
    each = np.arange(table.shape[1])

    def difference(chosen: np.ndarray) -> float:
        return float((1.5 * table[chosen, each] - 0.5 * table.sum(axis=0)).mean())

    null = study.null(
        difference,
        difference(0 * each),
        lambda rng: rng.integers(0, 3, len(each)),
        "kinds of vectors exchanged within each emotion",
    )
    study.bars[title] = _bar(across, None, None, "0.15" if id == "apart" else None)
    clear = estimate.low > 0 and across.high < UNLIKE
    note = f"Within {across.value + estimate.value:.2f}, present with other {across}, noise-corrected; {form}, {study.where}."
    if across.low > 0 and not clear:
        note = (
            f"Warning: this model {'partly ' * (null.p <= ALPHA)}couples self and other. What is read at one speaker's words may "
            f"be the other speaker's emotion: do not take its readings for the state of one side. {note}"
        )
    elif null.p > ALPHA or not clear:
        note = f"Warning: nothing here shows that this model keeps self and other apart. {note}"
    return claim.tested(estimate, null, clear, note)


def _leak(study: _Study, form: str) -> Finding:
    """How far a speaker's words read as the listener's emotion along its present-speaker vector."""
    claim, space, feels = CLAIMS["leak"], study.space, study.space.feels
    if not study.there((form, "present")):
        return claim.untestable("The speaker's own emotion is not in these dialogues: nothing could leak into it.")
    own = space.power((form, "present"))
    cross = space.alike((form, "present"), (form, "other")).same
    estimate = stats.bootstrap(lambda e: float(1 - np.nanmean(cross[e]) / np.nanmean(own[e])), len(own), **study.options)
    # Pairs of dialogues that share one emotion: on side u of the first and side v of the second.
    rows = [space.kinds[form, kind].rows for kind in (HH, AA)]
    one, two = np.nonzero(np.triu(space.shared == 1, 1))
    strangers = space.shared == 0
    inner = np.stack([[(p @ q.T) for q in rows] for p in rows])
    inner = inner - (inner * strangers).sum(axis=(2, 3), keepdims=True) / max(int(strangers.sum()), 1)
    equal = feels[one][:, :, None] == feels[two][:, None, :]
    u, v = equal.any(axis=2).argmax(axis=1), equal.any(axis=1).argmax(axis=1)
    emotion = feels[one, u]
    weight = 1 / np.bincount(emotion, minlength=space.n)[emotion]
    weight = weight / weight.sum()

    def difference(flipped: np.ndarray) -> float:
        a, b = u ^ flipped[one], v ^ flipped[two]
        mixed = (inner[1 - a, b, one, two] + inner[a, 1 - b, one, two]) / 2
        return float(weight @ (inner[a, b, one, two] - mixed) / np.nanmean(own))

    null = study.null(
        difference,
        estimate.value,
        lambda rng: rng.integers(0, 2, len(feels)),
        "speaker and listener exchanged within dialogues",
    )
    share = Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low, estimate.n)
    study.bars["listener's share in a reading"] = _bar(share, None, None, None)
    clear = estimate.low > 1 - LEAK
    note = f"At a speaker's words the listener's emotion reads at {share} of the strength of the speaker's own; {study.where}."
    if null.p > ALPHA or not clear:
        note = f"Warning: a reading at one speaker's words may be partly about the other speaker. {note}"
    return claim.tested(estimate, null, clear, note)


def _structure(study: _Study, form: str) -> Finding:
    """Correlation of the similarity matrices of the two present kinds."""
    one, two = (study.space.alike((form, kind), (form, kind)).cosines for kind in (AA, HH))
    n = len(one)
    value = correlate(one, two)
    rest = [np.delete(np.arange(n), e) for e in range(n)]
    without = np.array([correlate(one[np.ix_(e, e)], two[np.ix_(e, e)]) for e in rest])
    half = float(distributions.t.ppf(0.975, n - 1) * np.sqrt((n - 1) * without.var()))
    estimate = Estimate(value, max(-1.0, value - half), min(1.0, value + half), n)
    null = study.null(
        lambda order: correlate(one, two[np.ix_(order, order)]),
        value,
        lambda rng: rng.permutation(n),
        "emotions exchanged in one matrix",
    )
    note = f"r between the two {n} x {n} matrices of cosines, not corrected for noise; {study.where}."
    return CLAIMS["structure"].tested(estimate, null, estimate.low > 0, note)


def _structures(study: _Study, form: str) -> list[list[float]]:
    tables = [study.space.alike((form, kind), (form, kind)).cosines for kind in KINDS]
    tables.append(study.bench.vectors.select(study.names).similarity())
    return [[round(correlate(a, b), 4) for b in tables] for a in tables]


# ── figures ──


def _kinds(study: _Study) -> dict[str, tuple[str, str] | None]:
    """Short labels of all kinds in the order of the figure; None stands for stories."""
    order = [(form, kind) for kinds in ((AA, HH), (AH, HA)) for form in FORMATS for kind in kinds]
    short = {AA: "A/A", HH: "H/H", AH: "A/H", HA: "H/A"}
    plain = str.maketrans("AH", "21")
    labels = [short[kind] if form == next(iter(FORMATS)) else short[kind].translate(plain) for form, kind in order]
    return {**dict(zip(labels, order, strict=True)), "story": None}


def _cosines(study: _Study) -> dict[str, Any]:
    """Mean cosine of the same emotion between every two kinds: as the paper computes it, and noise-corrected."""
    space, kinds, n = study.space, _kinds(study), len(study.names)
    none = np.zeros((0, space.story.shape[1]))
    unit = [fit_means(space.story if kind is None else space.kinds[kind].means(n), none).directions for kind in kinds.values()]
    plain = [[round(float((a * b).sum(axis=1).mean()), 4) for b in unit] for a in unit]
    power = [space.power(kind) for kind in kinds.values()]
    there = [kind is None or study.there(kind) for kind in kinds.values()]
    table: list[list[float | None]] = [[None] * len(kinds) for _ in kinds]
    for (i, q), (j, p) in itertools.combinations(enumerate(kinds.values()), 2):  # stories come last
        if q is not None and there[i] and there[j]:
            value = corrected(space.alike(p, q).same, power[j], power[i])
            table[i][j] = table[j][i] = round(value, 4) if np.isfinite(value) else None
    return {"kinds": list(kinds), "plain": plain, "corrected": table}


def _curves(study: _Study, form: str, read: np.ndarray) -> dict[str, list[Any]]:
    """AUROC of the same emotion at every layer, for present with present, other with other, and present with other."""
    pairs = {"present": WITHIN[:1], "other": WITHIN[1:], "present with other": [pair for way in BETWEEN for pair in way]}
    found: dict[str, list[np.ndarray]] = {name: [] for name in pairs}
    for row in range(len(study.bench.vectors.layers)):
        space = _Space(study.bench, study.names, study.space.feels, {form: read}, row)
        for name, several in pairs.items():
            tables = [np.diag(match_auroc(space.alike((form, p), (form, q)).cosines)) for p, q in several]
            found[name].append(np.nanmean(tables, axis=0))
    curves = {}
    for name, values in found.items():
        table = np.stack(values, axis=1)
        each = stats.bootstrap_each(lambda e, table=table: np.nanmean(table[e], axis=0), len(table), **study.options)  # type: ignore[misc]
        curves[name] = [_round(part) for part in zip(*((e.value, e.low, e.high) for e in each), strict=True)]
    return {"layers": list(study.bench.vectors.layers), **curves}


def _raw(study: _Study, records: list[dict[str, Any]], form: str) -> dict[str, dict[str, Any]]:
    """The products behind every cosine, for each emotion; and how each side of a dialogue reads on the story vectors."""
    space, names = study.space, study.names
    products = {f"{p} | {q}": space.alike((form, p), (form, q)).same for i, p in enumerate(KINDS) for q in list(KINDS)[i:]}
    directions = study.bench.vectors.select(names).at().astype(np.float64)
    dialogues: dict[str, Any] = {"id": [r["id"] for r in records]}
    for side, kind in (("person", HH), ("assistant", AA)):
        scores = centred_cosine(space.kinds[form, kind].rows, directions, np.zeros(directions.shape[1]))
        dialogues[side] = [r[side] for r in records]
        dialogues |= {f"{side}: {name}": scores[:, i] for i, name in enumerate(names)}
    return {"products": {"emotion": list(names), **products}, "story_cosines": dialogues}


def _round(values: Any) -> list[Any]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]


STUDY = Speakers()
