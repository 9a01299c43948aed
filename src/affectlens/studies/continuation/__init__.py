"""Does steering towards an emotion make the model say that emotion's word next, and no other?

Declared before any data is seen:

* **Design.** Openings behind which the word for a feeling can stand, in our own words: about oneself ("I feel …"), about another
  ("She feels …"), in a story. They are held out: the calibration, which chose layer and strength, has not seen them. Up to twelve
  emotions are steered in turn, the published ones where they have vectors, and every one of their words is asked for.
* **Strength.** One for all, so that all vectors are equally long: the median of the emotions' largest safe strengths at the
  calibrated layer, every token steered, as the safe range was measured. ``prefill`` steers the beginning of the answer alone,
  as published, where the same strength does less.
* **Statistic.** Change of the log-probability of a word, in nats: its own under an emotion's vector (``matching``), the mean of
  the others (``others``), the difference (``specific``). The share of emotions whose own word rises most (``first``). Of words of
  others, each minus its mean over emotions: Spearman's correlation with the cosine between the two vectors (``related``). At
  the opposite strength, the fall of the own word against the others (``opposite``).
* **Replies.** To open questions, read again without steering: score of the emotion steered towards minus that without steering,
  against the mean over the other emotions' steerings (``told``).
* **Controls.** Directions of the same length: random ones, and vectors of stories with emotions dealt at random.
* **Nulls.** Every emotion gets a control direction at random. ``first`` and ``related``: words exchanged between emotions.
  ``told``: replies exchanged between emotions.
* **Intervals.** Bootstrap over emotions; Wilson for ``first``. The openings are taken as given.
* **Conditions.** A model; vectors that are calibrated, with a safe strength above 0; six emotions; three openings.

Source: method 6b (paper, Figs 52 and 53, Tables 6 to 8), which steers at half the mean residual norm, without controls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.effects import (
    PREFILL,
    Opening,
    along,
    random_directions,
    shuffled_directions,
    specific,
    word_logprobs,
)
from affectlens.engine import Request, Sampling, Steering, Where
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.continuation.drawing import figures

NAME = "continuation"
FEW, FEW_OPENINGS = 6, 3
CONTROLS, IN_CURVES = 24, 4
DOSES, PUBLISHED = (0.25, 0.5, 1.0, 1.5, 2.0), 0.5
"""Multiples of the strength, and the published strength, for the dose curves."""
REPLIES, TOKENS = 3, 40
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""

_BEYOND = (
    f"holds: p <= {ALPHA} and the interval above 0 and above the band of the control; weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_NOT = "holds: the interval ends below the upper end of the band of the control, or below 0; fails: otherwise"
_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "matching", "Steering towards an emotion raises its own word", _BEYOND, figure="means"),
        Claim(NAME, "others", "It does not raise the words of other emotions", _NOT, figure="means"),
        Claim(NAME, "specific", "It raises its own word above the others", _BEYOND, figure="means"),
        Claim(NAME, "shuffled", "It does so more than vectors of stories with emotions dealt at random", _BEYOND, figure="dose"),
        Claim(NAME, "other", "The own word rises when somebody else is described", _BEYOND, "about 2 (at 0.5)", "means"),
        Claim(NAME, "self", "The own word rises when the model speaks of itself", _BEYOND, "about 12.5 (at 0.5)", "means"),
        Claim(NAME, "prefill", "It does so when only the beginning of the answer is steered", _BEYOND, figure="dose"),
        Claim(NAME, "first", "Of all emotions' words its own rises most", _RATE, figure="matrix"),
        Claim(NAME, "related", "Words of emotions with similar vectors rise too", _ABOVE, figure="related"),
        Claim(NAME, "opposite", "Steering away from an emotion lowers its word", _BEYOND, figure="dose"),
        Claim(NAME, "told", "The replies to open questions take on its tone", _ABOVE, figure="told"),
    )
}


class Continuation:
    """Words under steering; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Continuations under steering"
    question = "Does steering towards an emotion make the model say that emotion's word next, and no other?"
    version = 1
    uses: tuple[str, ...] = ("texts", "calibration")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """The openings without steering; what is steered depends on the calibration and is asked for when it is there."""
        names, openings = _names(bench), _openings(bench)
        if bench.engine is None or bench.vectors.calibration is None:
            return ()
        return [opening.request(words=names, plain=bench.plain) for opening in openings]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine`` and calibrated vectors; ``activations`` for the control of shuffled stories.

        Returns:
            Findings, the matrix and some replies as tables, and the data of five figures.
        """
        names, openings = _names(bench), _openings(bench)
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to steer.")
        if (found := bench.vectors.calibration) is None:
            return untestable(CLAIMS.values(), "The vectors are not calibrated: run the study calibration with this one.")
        for what, n, least in (("emotions", len(names), FEW), ("openings", len(openings), FEW_OPENINGS)):
            if n < least:
                return untestable(CLAIMS.values(), f"{n} {what}: {least} are needed.")
        strength = float(np.median([found.strength(name) for name in names]))
        if strength <= 0:
            reason = f"At layer {found.layer} no strength is safe for half of the emotions."
            return untestable(CLAIMS.values(), reason)
        return _measure(_Words(bench, names, openings, found.layer, round(strength, 4)))

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the matrix, the means, the dose curves, related words and replies; nothing when it was untestable."""
        return figures(data) if "matrix" in data else []


def _names(bench: Bench) -> tuple[str, ...]:
    """The published emotions that have vectors, or the first twelve where these are too few."""
    names = tuple(name for name in SHOWCASE if name in bench.vectors)
    return names if len(names) >= FEW else bench.vectors.names[: len(SHOWCASE)]


def _openings(bench: Bench) -> list[Opening]:
    found = [Opening.of(record) for record in bench.texts("openings") if record["held_out"]]
    return [opening for opening in found if opening.kind != "event"][:: 2 if bench.quick else 1]


class _Words:
    """Changes of log-probabilities under steering at one layer."""

    def __init__(self, bench: Bench, names: tuple[str, ...], openings: list[Opening], layer: int, strength: float) -> None:
        self.bench, self.names, self.openings = bench, names, openings
        self.layer, self.strength = layer, strength
        self.own = np.arange(len(names))
        self.norm = float(bench.vectors.residual_norms[bench.vectors.row(layer)])
        self.before = self._logprobs([Steering()])[0]

    def _logprobs(self, steerings: Sequence[Steering]) -> np.ndarray:
        return word_logprobs(self.bench.read, self.openings, steerings, words=self.names, plain=self.bench.plain)

    def towards(self, strength: float, *, where: Where = Where()) -> np.ndarray:
        """Every emotion's vector: ``(emotions, openings, words)``."""
        vectors = self.bench.vectors
        return self._logprobs([strength * vectors[name].on(self.layer).at(where) for name in self.names]) - self.before

    def along(self, directions: np.ndarray, strength: float, *, where: Where = Where()) -> np.ndarray:
        """Control directions: ``(directions, openings, words)``."""
        steerings = [along(d, layer=self.layer, norm=self.norm, strength=strength).at(where) for d in directions]
        return self._logprobs(steerings) - self.before

    def of_kind(self, changes: np.ndarray, kind: str = "") -> np.ndarray:
        """Mean over the openings of a kind, or over all: ``(n, words)``."""
        rows = [i for i, opening in enumerate(self.openings) if kind in ("", opening.kind)]
        return np.asarray(changes[:, rows].mean(axis=1))


def _measure(words: _Words) -> Outcome:
    bench, own, n = words.bench, words.own, len(words.names)
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    where = f"Layer {words.layer}, strength {words.strength:.3g}, {len(words.openings)} held-out openings, {bench.format}"
    width = bench.vectors.directions.shape[-1]
    directions = random_directions(CONTROLS, width, seed=bench.seed)
    shuffled = shuffled_directions(bench.activations, bench.vectors, layer=words.layer, n=CONTROLS, seed=bench.seed)
    raw = words.towards(words.strength)
    raw_random = words.along(directions, words.strength)
    changes, random = words.of_kind(raw), words.of_kind(raw_random)

    def tested(
        id: str, mine: np.ndarray, table: np.ndarray, note: str, kind: str = "random directions of equal length"
    ) -> Finding:
        """One value for each emotion against a control with ``(directions, emotions)`` of them."""
        null = stats.permutation_null(
            lambda rows: float(table[rows, own].mean()),
            float(mine.mean()),
            permute=lambda rng: rng.integers(len(table), size=n),
            side="greater",
            kind=kind,
            **options,
        )
        estimate = stats.bootstrap(lambda rows: float(mine[rows].mean()), n, unit="nats", **options)
        return CLAIMS[id].tested(estimate, null, estimate.low > max(0.0, null.high), f"{note}.")

    matching = tested("matching", np.diag(changes), random, where)
    others = tested("others", _others(changes, own), _each(random, _others), where)
    assert others.estimate and others.null  # tested
    quiet = others.estimate.high <= max(0.0, others.null.high)
    rises = matching.verdict == "holds"
    others = dataclasses.replace(others, verdict="holds" if quiet else "fails")
    if not rises:
        others = CLAIMS["others"].untestable("The own words do not rise, so that others stay where they are says nothing.")
    findings = [matching, others, tested("specific", specific(changes, own), _each(random, specific), where)]
    if shuffled is None:
        findings.append(CLAIMS["shuffled"].untestable("There are no activations of the stories to deal at random."))
    else:
        control = words.of_kind(words.along(shuffled, words.strength))
        note = f"{len(shuffled)} vectors of shuffled stories; {where[0].lower()}{where[1:]}"
        kind = "vectors of shuffled stories"
        findings.append(tested("shuffled", specific(changes, own), _each(control, specific), note, kind))
    for kind in ("other", "self"):
        if any(opening.kind == kind for opening in words.openings):
            part, control = words.of_kind(raw, kind), words.of_kind(raw_random, kind)
            findings.append(tested(kind, np.diag(part), control, where))
        else:
            findings.append(CLAIMS[kind].untestable("There is no such opening."))
    prefill = words.of_kind(words.towards(words.strength, where=PREFILL))
    control = words.of_kind(words.along(directions, words.strength, where=PREFILL))
    findings.append(tested("prefill", specific(prefill, own), _each(control, specific), f"{where}; own word minus others"))
    findings.append(_first(changes, where, options))
    cosines, moved, related = _related(words, changes, where, options)
    findings.append(related)
    opposite, control = words.of_kind(words.towards(-words.strength)), words.of_kind(words.along(directions, -words.strength))
    falls, by_chance = -specific(opposite, own), -_each(control, specific)
    findings.append(tested("opposite", falls, by_chance, where.replace("strength ", "strength -")))
    told, replies, scores = _told(words, where, options)
    findings.append(told)

    kinds = sorted({opening.kind for opening in words.openings})
    data = {
        "layer": words.layer,
        "strength": words.strength,
        "names": list(words.names),
        "matrix": [_round(row) for row in changes],
        "means": {
            kind: {
                "own word": _spread(np.diag(words.of_kind(raw, kind)), options),
                "other words": _spread(_others(words.of_kind(raw, kind), own), options),
                "random directions": _round(np.quantile(words.of_kind(raw_random, kind), [0.5, 0.025, 0.975])),
            }
            for kind in kinds
        },
        "dose": _dose(words, directions, shuffled),
        "related": {"cosine": _round(cosines), "change": _round(moved)},
        "told": [_round(row) for row in scores],
    }
    rows = tuple((name, *changes[i].tolist()) for i, name in enumerate(words.names))
    caption = f"Change of the log-probability (nats) of each column's word when the row's emotion is steered. {where}."
    tables = [Table("matrix", "Words under steering", caption, ("steered", *words.names), rows)]
    if replies:
        caption = f"One open question, answered once under each steering (sampled with one seed). {where}."
        tables.append(Table("replies", "What the model says", caption, ("steered", "reply"), replies))
    return Outcome(tuple(findings), tuple(tables), data)


def _others(changes: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Mean change of the words that are not the own one."""
    mine = np.take_along_axis(changes, own[:, None], axis=1)[:, 0]
    return np.asarray((changes.sum(axis=1) - mine) / (changes.shape[1] - 1))


def _each(changes: np.ndarray, statistic: Any) -> np.ndarray:
    """The statistic of every control direction with every word as its own: ``(directions, words)``."""
    return np.stack([statistic(changes, np.full(len(changes), i)) for i in range(changes.shape[1])], axis=1)


def _first(changes: np.ndarray, where: str, options: Mapping[str, Any]) -> Finding:
    n = len(changes)
    first = changes.argmax(axis=1)
    hits = int((first == np.arange(n)).sum())
    estimate = stats.wilson(hits, n)
    null = stats.permutation_null(
        lambda order: float((first == order).mean()),
        hits / n,
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="words exchanged between emotions",
        **options,
    )
    clear = estimate.low >= 1 / n + GAIN * (1 - 1 / n)
    return CLAIMS["first"].tested(
        estimate, null, clear, f"{hits} of {n} emotions, chance {1 / n:.2f}; {where[0].lower()}{where[1:]}."
    )


def _related(
    words: _Words, changes: np.ndarray, where: str, options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, Finding]:
    """Similarity of vectors against what one does to the other's word, for pairs of different emotions."""
    vectors, n = words.bench.vectors, len(changes)
    rows = [vectors.index(name) for name in words.names]
    cosine = vectors.similarity(words.layer)[np.ix_(rows, rows)]
    off = ~np.eye(n, dtype=bool)
    # Some words rise whatever is added: what counts is how much more under this vector than under the others.
    moved = np.where(off, changes, np.nan)
    moved = moved - np.nanmean(moved, axis=0)

    def correlation(order: np.ndarray, kept: np.ndarray) -> float:
        pair = off[np.ix_(kept, kept)] & (kept[:, None] != kept)
        x, y = cosine[np.ix_(order[kept], order[kept])][pair], moved[np.ix_(kept, kept)][pair]
        if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
            return float("nan")
        return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])

    every = np.arange(n)
    estimate = stats.bootstrap(lambda kept: correlation(every, kept), n, **options)
    null = stats.permutation_null(
        lambda order: correlation(order, every),
        estimate.value,
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="emotions exchanged",
        **options,
    )
    rho = float(spearmanr(cosine[off], changes[off]).statistic)
    note = (
        f"Spearman's rho over {off.sum()} pairs; {rho:.2f} without taking away each word's mean; {where[0].lower()}{where[1:]}."
    )
    return cosine[off], moved[off], CLAIMS["related"].tested(estimate, null, estimate.low > 0, note)


def _told(words: _Words, where: str, options: Mapping[str, Any]) -> tuple[Finding, tuple[tuple[str, str], ...], np.ndarray]:
    """Replies to open questions, read again without steering."""
    bench, n = words.bench, len(words.names)
    events = [Opening.of(record) for record in bench.texts("openings") if record["kind"] == "event" and record["held_out"]][
        :REPLIES
    ]
    if not events:
        return CLAIMS["told"].untestable("There is no open question that is held out."), (), np.zeros((0, 0))
    asked = [Steering(), *(words.strength * bench.vectors[name].on(words.layer) for name in words.names)]
    requests = [
        event.request(steering=s, sampling=Sampling(TOKENS, top_p=0.95, seed=i), plain=bench.plain)
        for s in asked
        for i, event in enumerate(events)
    ]
    said = [result.text.strip() for result in bench.read(requests)]
    readout = bench.vectors.readout(where=Where(part="response"), pool="mean")
    # An empty reply has no words to read: a full stop stands in for it, the same under every steering.
    again = (
        Request(request.prompt, prefill=text or ".", readouts=(readout,), transcript=request.transcript)
        for request, text in zip(requests, said, strict=True)
    )
    columns = [bench.vectors.index(name) for name in words.names]
    read = np.stack([bench.vectors.scores(result.readings[0])[columns] for result in bench.read(again)])
    read = read.reshape(len(asked), len(events), n).mean(axis=1)
    scores = read[1:] - read[0]
    mine = specific(scores, words.own)
    estimate = stats.bootstrap(lambda rows: float(mine[rows].mean()), n, **options)
    null = stats.permutation_null(
        lambda order: float(specific(scores, order).mean()),
        float(mine.mean()),
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="replies exchanged between emotions",
        **options,
    )
    note = (
        f"Centred cosine of the replies' words at layer {bench.vectors.layer}, own emotion minus others, {len(events)} replies "
        f"of {TOKENS} tokens to each emotion; {where[0].lower()}{where[1:]}."
    )
    shown = tuple((name, said[i * len(events)]) for i, name in enumerate(("nothing", *words.names)))
    return CLAIMS["told"].tested(estimate, null, estimate.low > 0, note), shown, scores


def _dose(words: _Words, random: np.ndarray, shuffled: np.ndarray | None) -> dict[str, Any]:
    """Curves over strengths, every token steered or the beginning of the answer alone."""
    strengths = sorted({*(round(dose * words.strength, 4) for dose in DOSES), PUBLISHED})
    out: dict[str, Any] = {"strengths": strengths}
    for title, where in (("every token", Where()), ("beginning of the answer", PREFILL)):
        curves: dict[str, list[float]] = {"own word": [], "other words": [], "random directions": []}
        if shuffled is not None:
            curves["shuffled stories"] = []
        for strength in strengths:
            changes = words.of_kind(words.towards(strength, where=where))
            curves["own word"].append(float(np.diag(changes).mean()))
            curves["other words"].append(float(_others(changes, words.own).mean()))
            for name, directions in (("random directions", random), ("shuffled stories", shuffled)):
                if directions is not None:
                    curves[name].append(float(words.along(directions[:IN_CURVES], strength, where=where).mean()))
        out[title] = {name: _round(curve) for name, curve in curves.items()}
    return out


def _spread(values: np.ndarray, options: Mapping[str, Any]) -> list[float]:
    each = stats.bootstrap(lambda rows: float(values[rows].mean()), len(values), **options)
    return _round([each.value, each.low, each.high])


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


STUDY = Continuation()
