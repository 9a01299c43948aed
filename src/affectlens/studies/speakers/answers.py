"""Which present-speaker emotion answers which emotion of the listener."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.likeness import Labelled, weighted_rating
from affectlens.studies import ALPHA, Bench, Claim, Finding, Table

FEW_RATED = 8
FEW_SPEAKERS = 4


@dataclass(frozen=True, eq=False)
class Answers:
    """Other-speaker vectors seen from the present-speaker vectors.

    Args:
        bench, names: The model, and the emotions in use.
        present, other: The same rows, labelled with the speaker's and with the listener's emotion.
        shared: How many emotions two dialogues share.
        power: Squared length of a present-speaker vector without the noise, the unit of the pattern.
        where: For notes.
    """

    bench: Bench
    names: tuple[str, ...]
    present: Labelled
    other: Labelled
    shared: np.ndarray
    power: float
    where: str

    @property
    def options(self) -> dict[str, Any]:
        return {"draws": self.bench.draws, "seed": self.bench.seed}

    @property
    def families(self) -> tuple[list[str], np.ndarray]:
        """Names of the families and the family of each emotion; an emotion without one is a family of its own."""
        concepts = self.bench.concepts
        own = [(concepts[name].cluster if name in concepts else None) or name for name in self.names]
        families = list(dict.fromkeys(own))
        return families, np.array([families.index(name) for name in own])

    def pattern(self, claim: Claim) -> tuple[Finding, dict[str, Any] | None]:
        """Whether two halves of the dialogues agree on which families answer which."""
        (every, family), rows, texts = self.families, self.present.rows, self.present.texts
        halves, dialogues = texts % 2, np.arange(len(self.shared))
        sides = [family[kind.labels] for kind in (self.present, self.other)]
        sizes = [np.bincount(labels[halves == half], minlength=len(every)) for labels in sides for half in (0, 1)]
        kept = np.flatnonzero(np.min(sizes, axis=0) >= FEW_SPEAKERS)
        families, n = [every[f] for f in kept], len(kept)
        if not 4 <= n <= 40:
            reason = f"{n} families of emotions have {FEW_SPEAKERS} speakers in both halves of the dialogues: 4 to 40 are needed."
            return claim.untestable(reason), None
        # Those that are left out are neither rows nor columns.
        speaks, listens = (np.where(np.isin(labels, kept), np.searchsorted(kept, labels), n) for labels in sides)
        fit = (self.shared[np.ix_(texts, texts)] == 0) & (texts[:, None] != texts) & (speaks[:, None] != speaks)
        inner, by = np.where(fit, rows @ rows.T, 0.0), np.eye(n + 1)[speaks][:, :n]
        # For each family of the listener: what a row gives with each family of speakers whose listener is of another family.
        sums = np.stack([inner @ (by * (listens != f)[:, None]) for f in range(n)])
        counts = np.stack([fit @ (by * (listens != f)[:, None]) for f in range(n)])
        off = ~np.eye(n, dtype=bool)
        # What is left of the cells off the diagonal without the effects of rows and columns.
        effects = np.concatenate([np.eye(n)[place] for place in np.nonzero(off)], axis=1)
        centring = np.eye(len(effects)) - effects @ np.linalg.pinv(effects)

        def answers(weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
            chosen = np.eye(n + 1)[labels].T[:n] * weights
            pairs = np.einsum("fr,frg->fg", chosen, counts)[off]
            return np.asarray(centring @ (np.einsum("fr,frg->fg", chosen, sums)[off] / np.maximum(pairs, 1)))

        def agreement(weights: np.ndarray, labels: np.ndarray) -> float:
            one, two = (answers(weights * (halves == half), labels) for half in (0, 1))
            return float(np.corrcoef(one, two)[0, 1])

        side, ones = np.arange(len(rows)) // len(dialogues), np.ones(len(rows))
        blocks = [np.flatnonzero((halves == half) & (side == one)) for half in (0, 1) for one in (0, 1)]

        def shuffled(rng: np.random.Generator) -> np.ndarray:
            labels = listens.copy()
            for block in blocks:
                labels[block] = rng.permutation(listens[block])
            return labels

        def resampled(drawn: np.ndarray) -> float:
            return agreement(np.bincount(drawn, minlength=len(dialogues))[texts].astype(np.float64), listens)

        estimate = stats.bootstrap(resampled, dialogues % 2, **self.options)
        null = stats.permutation_null(
            lambda labels: agreement(ones, labels),
            estimate.value,
            permute=shuffled,
            side="greater",
            kind="listeners' emotions exchanged between dialogues",
            **self.options,
        )
        whole, rng = answers(ones, listens) / self.power, np.random.default_rng([self.bench.seed, 3])
        drawn = np.stack([answers(ones, shuffled(rng)) for _ in range(self.bench.draws)]) / self.power
        p = (1 + (np.abs(drawn) >= np.abs(whole)).sum(axis=0)) / (1 + len(drawn))
        strength, q = np.full((2, n, n), np.nan)
        strength[off], q[off] = whole, stats.benjamini_hochberg(p)
        found = f"{int((q[off] <= ALPHA).sum())} of which stand out (q <= {ALPHA})"
        note = f"r between two halves of the dialogues over the pairs of {n} families, {found}; {self.where}."
        data = {"families": families, "strength": _plain(strength), "q": _plain(q)}
        return claim.tested(estimate, null, estimate.low > 0, note), data

    def cosines(self) -> np.ndarray:
        """Cosines of other-speaker (rows) with present-speaker vectors (columns), columns centred; NaN where no pair is fit."""
        present, other, n = self.present, self.other, len(self.names)
        speaks = self.families[1][present.labels]
        same = other.labels[:, None] == present.labels
        strange = (other.texts[:, None] != present.texts) & (speaks[:, None] != speaks)
        fit = (self.shared[np.ix_(other.texts, present.texts)] == same) & strange
        one, two = np.eye(n)[other.labels], np.eye(n)[present.labels]
        pairs = one.T @ fit @ two
        products = one.T @ np.where(fit, other.rows @ present.rows.T, 0.0) @ two / np.where(pairs, pairs, np.nan)
        cosines = products / np.outer(*(np.linalg.norm(kind.means(n), axis=1) for kind in (other, present)))
        return np.asarray(cosines - np.nanmean(cosines, axis=0))

    def regulation(self, claim: Claim, cosines: np.ndarray) -> tuple[Finding, dict[str, Any] | None]:
        """Arousal of what answers an emotion, against its own; the same for pleasure in the note."""
        concepts = self.bench.concepts
        known = {i: concepts[name].rating for i, name in enumerate(self.names) if name in concepts}
        rated = {i: (rating.arousal, rating.pleasure) for i, rating in known.items() if rating}
        if len(rated) < FEW_RATED:
            reason = f"{len(rated)} of the emotions have a human rating of arousal: {FEW_RATED} are needed."
            return claim.untestable(reason), None
        rows, scales = list(rated), np.array(list(rated.values())).T
        met = [weighted_rating(cosines[np.ix_(rows, rows)], scale) for scale in scales]
        estimate, null = stats.correlation_with_null(scales[0], met[0], side="less", **self.options)
        pleasure, _ = stats.correlation_with_null(scales[1], met[1], **self.options)
        note = f"Over {len(rows)} rated words; the same for pleasure gives r = {pleasure} (published 0.07); {self.where}."
        data = {"names": [self.names[i] for i in rows], "own": _plain(scales[0]), "met": _plain(met[0])}
        return claim.tested(estimate, null, estimate.high < 0, note), {
            **data,
            "r": _plain((estimate.value, estimate.low, estimate.high)),
        }

    def nearest(self, cosines: np.ndarray) -> Table:
        """The published table: for each of the 12 emotions, if it is there, what is nearest to its other-speaker vector."""
        rows = []
        for name in [name for name in SHOWCASE if name in self.names] or self.names[: len(SHOWCASE)]:
            row = np.where(np.isfinite(line := cosines[self.names.index(name)]), line, -np.inf)
            best = [i for i in np.argsort(-row)[:5] if np.isfinite(row[i])]
            rows.append((name, *(f"{self.names[i]} {row[i]:.2f}" for i in best), *[""] * (5 - len(best))))
        caption = (
            "Present-speaker vectors nearest to the other-speaker vector of the listener's emotion, with cosines. Each row rests "
            f"on about {2 * len(self.shared) / len(self.names):.0f} dialogues and is exploratory: what is tested is the pattern "
            "over families."
        )
        head = ("the listener feels", "nearest", "second", "third", "fourth", "fifth")
        return Table(
            "answers", f"What answers the listener's emotion at layer {self.bench.vectors.layer}", caption, head, tuple(rows)
        )


def _plain(values: Any) -> Any:
    """Nested lists with five decimals, None for NaN."""
    if np.ndim(values):
        return [_plain(value) for value in values]
    return round(float(values), 5) if np.isfinite(values) else None
