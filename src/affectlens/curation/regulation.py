"""How emotion is regulated in a dataset: what prevails, how high it runs, whether it calms down, and what distress is met with.

Everything is counted while documents go by and adds up over shards (:class:`Tally`), so a dataset of any size is described in
fixed memory, and shards may be read by different workers. Declared before any data is seen:

* **Scores** are z against the baseline. *Distress* is the mean over the words :data:`DISTRESS`, *composure* over those of the
  published cluster :data:`COMPOSURE`; valence and arousal are :func:`affectlens.space.rating_axes`.
* **Families.** A document belongs to the family (published cluster) with the highest mean score. Null: the names of the emotions
  exchanged between families of the same sizes, since the mean of few words is more often extreme than that of many.
* **Return to calm.** Distress is averaged over 15 tokens. A document has a *peak* where its highest stretch reaches
  :data:`PEAK`, and *returns to calm* when within the next :data:`WITHIN` tokens some stretch is at or below :data:`CALM`, the
  usual level. Counted are documents with so many tokens on both sides of the peak, so that none is judged by an end that came too
  early. Null: documents read backwards. What comes down after its highest point comes up before it too, and a share that is the
  same in both directions is regression to the mean and no regulation.
* **Composure in reply.** A user's turn is *distressed* where its mean distress reaches :data:`PEAK`, an assistant's turn is
*composed*
  where its mean distress is at or below :data:`CALM` and its composure at or above it. Each dialogue counts once, with its most
  distressed user's turn and the reply to it: turns of one dialogue are not independent. Null: replies exchanged between
  dialogues.
* **Intervals.** Wilson's for shares, Student's for means; the unit is the document.
* **Conditions.** :data:`FEW` documents with a peak, :data:`LEAST` of which differ between the directions; :data:`FEW` distressed
  dialogues, as many others, and :data:`LEAST` replies that are composed and as many that are not. With fewer, no outcome could
  be told from chance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as distributions

from affectlens.concepts import ConceptSet
from affectlens.conversations import STRETCH, smoothed
from affectlens.runs import content_id
from affectlens.space import rating_axes
from affectlens.stats import Estimate, Null, benjamini_hochberg, permutation_null, wilson
from affectlens.studies import ALPHA, Claim, Finding

NAME = "regulation"
DISTRESS = (
    "afraid", "anxious", "desperate", "distressed", "frightened", "heartbroken", "horrified", "hysterical", "miserable",
    "overwhelmed", "panicked", "scared", "stressed", "terrified", "tormented", "trapped", "upset", "worried",
)  # fmt: skip
COMPOSURE = "Peaceful Contentment"
PEAK, CALM, WITHIN = 1.0, 0.0, 60
"""What distress must reach to be one, what is calm, both in z; and within how many tokens after a peak."""
FEW, LEAST = 20, 5
EXCHANGES = 199
"""Exchanges of names between families."""
COURSE = 20
"""Parts of a document in the figure of its course."""
GRID = np.round(np.arange(-4.0, 4.01, 0.1), 1)
"""Edges of the cells in which documents are counted by valence and arousal; the outermost hold what lies beyond."""
LEVELS = np.arange(-2.0, 4.01, 0.5)
"""Edges of the classes of a user's distress."""
MEASURES = ("distress", "composure", "valence", "arousal")

_RULE = f"holds: p <= {ALPHA} and the lower end of the interval above chance; weak: p <= {ALPHA} only; fails: otherwise"
RETURN = Claim(
    NAME, "return", "After a peak of distress, documents come back to calm more often than they came from it", _RULE, None, "peak"
)
REPLIES = Claim(NAME, "replies", "Distress is met with composure more often than by replies at random", _RULE, None, "replies")
_FACTS = ("rows", "empty", "unread", "unspoken", "cut", "windows", "tokens", "kept", "unknown", "peaks", "distressed", "composed")


@dataclass(frozen=True, eq=False)
class Measures:
    """What is measured of every token and document, from the scores of ``N`` emotions.

    Args:
        names: The emotions.
        families: Name to numbers of its emotions.
        exchanged: The family of each emotion under exchanges of the names, ``(EXCHANGES, N)``, -1 for none.
        weights: Of distress, composure, valence and arousal, ``(4, N)``; nan where there is no such measure.
    """

    names: tuple[str, ...]
    families: Mapping[str, np.ndarray]
    exchanged: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], concepts: ConceptSet) -> Measures:
        """Those of a set of concepts, as far as it knows the emotions: their families and their ratings.

        Example:
            >>> Measures.of(("calm", "afraid"), ConceptSet.load("emotions")).weights[:2]
            array([[0., 1.],
                   [1., 0.]])
        """
        known = {name: concepts[name] for name in names if name in concepts}
        families: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if name in known and (own := known[name].cluster):
                families.setdefault(own, []).append(i)
        weights = np.full((4, len(names)), np.nan)
        distress = [i for i, name in enumerate(names) if name in DISTRESS]
        for row, chosen in enumerate((distress, families.get(COMPOSURE, []))):
            if chosen:
                weights[row] = 0.0
                weights[row, chosen] = 1 / len(chosen)
        rated = [i for i, name in enumerate(names) if name in known and known[name].rating]
        ratings = [(r.pleasure, r.arousal) for i in rated if (r := known[names[i]].rating)]
        axes = rating_axes(np.array(ratings).reshape(-1, 2))
        if axes is not None:
            weights[2:] = 0.0
            weights[2:, rated] = axes
        labels = np.full(len(names), -1)
        for number, members in enumerate(families.values()):
            labels[members] = number
        rng = np.random.default_rng(0)
        exchanged = np.tile(labels, (EXCHANGES, 1))
        exchanged[:, labels >= 0] = rng.permuted(exchanged[:, labels >= 0], axis=1)
        return cls(tuple(names), {name: np.array(own) for name, own in families.items()}, exchanged, weights)

    @property
    def id(self) -> str:
        """Content hash."""
        families = {name: own.tolist() for name, own in self.families.items()}
        return content_id([self.names, families, np.nan_to_num(self.weights, nan=-1e9).tolist()])

    @property
    def axes(self) -> bool:
        """Whether there are valence and arousal."""
        return bool(np.isfinite(self.weights[2:]).all())

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Distress, composure, valence and arousal of scores ``(..., N)``: ``(..., 4)``."""
        return np.asarray(scores, dtype=np.float64) @ self.weights.T

    def family(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of each family, ``(K,)``, and the number of the highest under each exchange of the names, ``(EXCHANGES,)``."""
        k = len(self.families)
        own = np.array([scores[members].mean() for members in self.families.values()])
        sizes = np.array([len(members) for members in self.families.values()])
        sums = np.zeros((EXCHANGES, k))
        rows = np.arange(EXCHANGES)
        for i, score in enumerate(scores):
            if self.exchanged[0, i] >= 0:
                sums[rows, self.exchanged[:, i]] += score
        return own, (sums / sizes).argmax(axis=1)


class Tally:
    """What adds up over documents: counts and sums, in arrays, and the document that stands highest in each family.

    Adding two tallies is exact for counts, and the same for sums as long as shards are added in one order.

    Args:
        measures: What is measured.
    """

    def __init__(self, measures: Measures) -> None:
        self.measures = measures
        k, cells = len(measures.families), len(GRID) + 1
        self.facts = dict.fromkeys(_FACTS, 0)
        self.left_out: dict[str, int] = {}
        self.weights = np.zeros(3)
        self.moments = np.zeros((4 + k, 3))
        self.family = np.zeros(k, dtype=np.int64)
        self.exchanged = np.zeros((EXCHANGES, k), dtype=np.int64)
        self.plane = np.zeros((cells, cells), dtype=np.int64)
        self.course = np.zeros((COURSE, 3, 3))
        self.returns = np.zeros((2, 2), dtype=np.int64)
        self.around = np.zeros((2 * WITHIN + 1, 2))
        self.replies = np.zeros((2, 2), dtype=np.int64)
        self.levels = np.zeros((len(LEVELS) + 1, 2, 3))
        self.highest: list[tuple[float, int, str] | None] = [None] * k

    def document(
        self, row: int, text: str, mean: np.ndarray, series: np.ndarray, turns: Sequence[tuple[str, np.ndarray]]
    ) -> None:
        """Take a document that was read.

        Args:
            row: Its number in the dataset.
            text: Its beginning.
            mean: Mean score of its own words, ``(N,)``; nan when it has none.
            series: Distress, composure and arousal of its own tokens in order, ``(T, 3)``.
            turns: Of a conversation: role and mean score ``(N,)`` of each turn that was read.
        """
        if np.isfinite(mean).all():
            self._whole(row, text, mean)
            self._along(series)
        if turns:
            self._exchanges([(role, self.measures(scores)) for role, scores in turns])

    def _whole(self, row: int, text: str, mean: np.ndarray) -> None:
        four = self.measures(mean)
        own, others = self.measures.family(mean) if self.measures.families else (np.zeros(0), np.zeros(0, np.int64))
        values = np.concatenate([four, own])
        known = np.isfinite(values)
        self.moments[known] += np.stack([np.ones(known.sum()), values[known], values[known] ** 2], axis=1)
        if self.measures.axes:
            x, y = np.digitize(four[2:], GRID)
            self.plane[y, x] += 1
        if len(own) > 1:
            self.family[own.argmax()] += 1
            self.exchanged[np.arange(EXCHANGES), others] += 1
        for number, score in enumerate(own.tolist()):
            best = self.highest[number]
            if best is None or score > best[0]:
                self.highest[number] = (score, row, text)

    def _along(self, series: np.ndarray) -> None:
        if len(series) >= 2 * COURSE:
            known = np.isfinite(series).all(axis=0)
            ends = np.linspace(0, len(series), COURSE + 1).round().astype(int)
            means = np.add.reduceat(series, ends[:-1], axis=0) / np.diff(ends)[:, None]
            self.course[:, known] += np.stack([np.ones_like(means), means, means**2], axis=2)[:, known]
        distress = series[:, 0]
        if len(distress) < STRETCH or not np.isfinite(distress).all():
            return
        stretches = smoothed(distress)
        at = int(stretches.argmax())
        if stretches[at] < PEAK:
            return
        self.facts["peaks"] += 1
        if at < WITHIN or at + WITHIN >= len(stretches):
            return
        around = stretches[at - WITHIN : at + WITHIN + 1]
        calm = around <= CALM
        # Stretches that share a token with the peak are no return from it.
        self.returns[int(calm[WITHIN + STRETCH :].any()), int(calm[: WITHIN - STRETCH + 1].any())] += 1
        self.around += np.stack([around, around**2], axis=1)

    def _exchanges(self, turns: Sequence[tuple[str, np.ndarray]]) -> None:
        pairs = [
            (user[0], reply[:2])
            for (one, user), (other, reply) in itertools.pairwise(turns)
            if (one, other) == ("user", "assistant") and np.isfinite([user[0], *reply[:2]]).all()
        ]
        if not pairs:
            return
        for distress, reply in pairs:
            level = int(np.digitize(distress, LEVELS))
            self.levels[level] += np.stack([np.ones(2), reply, reply**2], axis=1)
            self.facts["distressed"] += distress >= PEAK
            self.facts["composed"] += distress >= PEAK and _composed(reply)
        distress, reply = max(pairs, key=lambda pair: pair[0])
        self.replies[int(distress >= PEAK), int(_composed(reply))] += 1

    # ── adding up, and to and from JSON ──

    _ARRAYS = ("weights", "moments", "family", "exchanged", "plane", "course", "returns", "around", "replies", "levels")

    def add(self, other: Tally) -> None:
        """Take what another tally counted, of documents that come later."""
        for name in self.facts:
            self.facts[name] += other.facts[name]
        for reason, n in other.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + n
        for name in self._ARRAYS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        pairs = zip(self.highest, other.highest, strict=True)
        self.highest = [theirs if mine is None or (theirs and theirs[0] > mine[0]) else mine for mine, theirs in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; of arrays only what is not 0."""
        arrays = {}
        for name in self._ARRAYS:
            flat = getattr(self, name).ravel()
            places = np.flatnonzero(flat)
            arrays[name] = [places.tolist(), flat[places].tolist()]
        return {"facts": self.facts, "left out": self.left_out, "arrays": arrays, "highest": self.highest}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], measures: Measures) -> Tally:
        """What :meth:`as_dict` gave."""
        found = cls(measures)
        found.facts, found.left_out = dict(plain["facts"]), dict(plain["left out"])
        for name in cls._ARRAYS:
            places, values = plain["arrays"][name]
            getattr(found, name).ravel()[places] = values
        found.highest = [each and (each[0], each[1], each[2]) for each in plain["highest"]]
        return found

    # ── what comes of it ──

    def findings(self, *, draws: int = 1000, seed: int = 0) -> list[Finding]:
        """The two claims about regulation, tested."""
        return [self._returned(draws, seed), self._met(draws, seed)]

    def _returned(self, draws: int, seed: int) -> Finding:
        table, n = self.returns, int(self.returns.sum())
        if not np.isfinite(self.measures.weights[0]).all():
            return RETURN.untestable(f"None of the emotions is one of distress: {', '.join(DISTRESS)}.")
        if n < FEW:
            reason = f"{n} documents have a peak with {WITHIN} tokens on both sides of it: {FEW} are needed"
            return RETURN.untestable(f"{reason} ({self.facts['peaks']} have a peak).")
        after, before, unequal = int(table[1].sum()), int(table[:, 1].sum()), int(table[1, 0] + table[0, 1])
        if unequal < LEAST:
            return RETURN.untestable(
                f"Of {n} documents with a peak {unequal} differ between before and after it: {LEAST} are needed."
            )
        estimate = _percent(wilson(after, n))
        # A document read backwards counts where it was calm before: under exchange each unequal one falls either way.
        null = permutation_null(
            lambda k: 100 * k / n, estimate.value, permute=lambda rng: int(table[1, 1]) + int(rng.binomial(unequal, 0.5)),
            draws=draws, seed=seed, side="greater", kind="documents read backwards",
        )  # fmt: skip
        note = (
            f"Of {n} documents whose distress reaches {PEAK:g} z over {STRETCH} tokens, {after} are at or below {CALM:g} again "
            f"within {WITHIN} tokens, {before} were so within {WITHIN} tokens before."
        )
        return RETURN.tested(estimate, null, estimate.low > null.value, note)

    def _met(self, draws: int, seed: int) -> Finding:
        table = self.replies
        n, others = int(table[1].sum()), int(table[0].sum())
        if not np.isfinite(self.measures.weights[:2]).all():
            return REPLIES.untestable(f"The emotions lack those of distress or those of {COMPOSURE}.")
        if not n + others:
            return REPLIES.untestable("There is no dialogue in which an assistant answers a user.")
        if min(n, others) < FEW:
            reason = f"{n} dialogues have a distressed user's turn and {others} have none: {FEW} of each are needed"
            return REPLIES.untestable(f"{reason} (distressed: mean distress of {PEAK:g} z or more).")
        met, composed = int(table[1, 1]), int(table[:, 1].sum())
        if min(composed, n + others - composed) < LEAST:
            reason = f"Of {n + others} replies {composed} are composed: {LEAST} are needed that are, and as many that are not."
            return REPLIES.untestable(reason)
        estimate = _percent(wilson(met, n))
        null = permutation_null(
            lambda k: 100 * k / n, estimate.value,
            permute=lambda rng: int(rng.hypergeometric(composed, n + others - composed, n)),
            draws=draws, seed=seed, side="greater", kind="replies exchanged between dialogues",
        )  # fmt: skip
        turns, together = self.facts["distressed"], self.facts["composed"]
        note = (
            f"Of {n} dialogues with a distressed turn (mean distress {PEAK:g} z or more) {met} are met with a composed reply, "
            f"of the other {others} {composed - met}; over all turns {together} of {turns}."
        )
        return REPLIES.tested(estimate, null, estimate.low > null.value, note)

    def shares(self) -> list[tuple[str, Estimate, Null, float]]:
        """Each family with the share of documents that it prevails in, its null and the p corrected for their number.

        Families are in the order of their shares; empty without two families or without a document.
        """
        n = int(self.family.sum())
        if not n:
            return []
        found = []
        for number, name in enumerate(self.measures.families):
            estimate = _percent(wilson(int(self.family[number]), n))
            drawn = (100 * self.exchanged[:, number] / n).tolist()
            how: dict[str, Any] = {"draws": EXCHANGES, "kind": "names exchanged between families"}
            found.append((name, estimate, permutation_null(float, estimate.value, permute=_recorded(drawn), **how)))
        q = benjamini_hochberg([null.p for _, _, null in found]).tolist()
        rows = [(*row, own) for row, own in zip(found, q, strict=True)]
        return sorted(rows, key=lambda row: -row[1].value)

    def means(self) -> list[tuple[str, Estimate, float]]:
        """Mean over documents with its interval, and the standard deviation, of each measure and each family."""
        rows = []
        for name, (n, total, squares) in zip((*MEASURES, *self.measures.families), self.moments.tolist(), strict=True):
            if n > 1:
                value, deviation = _moments(n, total, squares)
                half = float(distributions.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
                rows.append((name, Estimate(value, value - half, value + half, int(n)), deviation))
        return rows


def curve(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and 95 % interval along sums of ``n``, values and squares, ``(..., 3)``; nan where there are fewer than 2."""
    n, total, squares = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    few = n < 2
    mean = np.where(few, np.nan, total / np.maximum(n, 1))
    variance = np.maximum(squares - n * mean**2, 0) / np.maximum(n - 1, 1)
    half = np.where(few, np.nan, distributions.t.ppf(0.975, np.maximum(n - 1, 1)) * np.sqrt(variance / np.maximum(n, 1)))
    return mean, mean - half, mean + half


def _recorded(values: list[float]) -> Callable[[np.random.Generator], float]:
    """Arrangements that were counted beforehand, one after the other."""
    rest = iter(values)
    return lambda rng: next(rest)


def _composed(reply: np.ndarray) -> bool:
    return bool(reply[0] <= CALM and reply[1] >= CALM)


def _moments(n: float, total: float, squares: float) -> tuple[float, float]:
    mean = total / n
    return mean, math.sqrt(max(squares - n * mean**2, 0.0) / (n - 1))


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.n, share.level, "%")
