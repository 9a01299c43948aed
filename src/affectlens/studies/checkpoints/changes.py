"""What changed between two checkpoints: profiles, shifts, their growth with depth, and the vectors themselves."""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from affectlens import stats
from affectlens.stats import Estimate
from affectlens.studies import ALPHA, Bench, Finding, Outcome, Table
from affectlens.studies.checkpoints.profiles import CLAIMS, FEW, MOST, Pair, alone, columns, rounded
from affectlens.vectors import fit_means

DEEP = 6
"""Fewer layers up to the vectors' own say nothing about growth: with five there are 16 patterns of signs."""
CURVE = 5
"""So many sets of directions without meaning are enough for their mean at a layer."""
REFITS = 200
"""So many refits on resampled stories are enough for a band of their mean."""


def published() -> dict[str, float]:
    """The published shift of each of the 171 emotions, in cosine (paper, Table 16).

    Example:
        >>> published()["brooding"]
        0.0403
    """
    file = importlib.resources.files("affectlens") / "data" / "post_training.csv"
    with file.open(encoding="utf-8") as lines:
        return {row["emotion"]: float(row["shift"]) for row in csv.DictReader(lines)}


def compared(pair: Pair) -> Outcome:
    """Everything about two checkpoints, with what is measured of the later one alone."""
    profile = alone(pair)
    vectors, hard, names = pair.bench.vectors, pair.hard, pair.bench.vectors.names
    profiles, findings = _profiles(pair)
    shift, low, high = (np.array([getattr(e, end) for e in profiles]) for end in ("value", "low", "high"))
    rest = pair.change[~hard].mean(axis=0)
    p = _sign_flips(pair.change[hard], pair.bench)
    q = stats.benjamini_hochberg(p)
    control = _meaningless(pair)
    largest, band = _largest(pair, profiles, q, control)
    trends, theirs, ratings = _trends(pair, shift)
    growth, curves = _growth(pair, control)
    drift, cosines, noise = _vectors(pair)
    findings = [*profile.findings, *findings, largest, *trends, growth, *drift]

    data: dict[str, Any] = {
        **profile.data,
        "before": {kind: rounded(pair.before[rows].mean(axis=0)) for kind, rows in (("hard", hard), ("neutral", ~hard))},
        "shift": [rounded(shift), rounded(low), rounded(high)],
        "neutral_shift": rounded(rest),
        "published": [theirs.get(name) for name in names],
        "band": band,
        "rated": [[names[i], *rounded(pair_of)] for i, pair_of in ratings],
        "layers": list(vectors.layers),
        "curves": curves,
        "cosines": rounded(cosines) if cosines is not None else None,
        "noise": rounded(noise) if noise is not None else None,
    }
    order = np.argsort(-shift)
    rows = tuple(
        (
            names[i],
            data["clusters"][i],
            float(pair.before[hard, i].mean()),
            float(pair.after[hard, i].mean()),
            float(shift[i]),
            f"{low[i]:+.4f} to {high[i]:+.4f}",
            float(q[i]),
            "–" if band is None else "yes" if abs(shift[i]) > band else "no",
            float(rest[i]),
            theirs.get(names[i], "–"),
            "–" if cosines is None else float(cosines[i]),
        )
        for i in order
    )
    caption = (
        "Plain cosine at the reply position, the same directions for both checkpoints. Interval over prompts; q: signs of paired "
        "differences exchanged, Benjamini-Hochberg. Beyond the band: further than the 97.5th percentile of the largest of as "
        "many directions without meaning. Last: cosine of the vectors fitted before and after."
    )
    head = (
        "emotion", "family", "before", "after", "shift, hard", "interval", "q", "beyond the band", "shift, neutral",
        "published shift", "vector kept",
    )  # fmt: skip
    table = Table("shifts", f"Shift of each emotion, {pair.where}", caption, head, rows)
    raw = {**profile.raw, "before": columns(pair, pair.before)}
    return Outcome(tuple(findings), (table, *profile.tables), data, raw)


def _profiles(pair: Pair) -> tuple[list[Estimate], list[Finding]]:
    """The shift of each emotion on hard prompts, and how profiles and shifts agree; all intervals from the same resamples."""
    hard, n, options = pair.hard, len(pair.bench.vectors), pair.options
    before, after = pair.before, pair.after

    def measured(rows: np.ndarray) -> np.ndarray:
        # position i holds a prompt of the category of prompt i, so the kinds stay where they are
        weights = [np.bincount(rows[kind], minlength=len(rows)) / kind.sum() for kind in (hard, ~hard)]
        (b_hard, a_hard), (b_rest, a_rest) = ((w @ before, w @ after) for w in weights)
        pairs = ((b_hard, a_hard), (b_rest, a_rest), (a_hard - b_hard, a_rest - b_rest))
        return np.array([*(np.corrcoef(x, y)[0, 1] for x, y in pairs), *(a_hard - b_hard)])

    alike_hard, alike_rest, alike_shift, *shifts = stats.bootstrap_each(measured, pair.categories, **options)
    contrasts = [scores[hard].mean(axis=0) - scores[~hard].mean(axis=0) for scores in (before, after)]
    contrast = float(np.corrcoef(contrasts[0], contrasts[1])[0, 1])
    unlike = _isotropic(pair)
    notes = {
        "hard": (alike_hard, before[hard], f"of hard minus neutral, without what every prompt has, it is {contrast:.2f}"),
        "neutral": (alike_rest, before[~hard], f"{int((~hard).sum())} prompts"),
        "same_shift": (
            alike_shift,
            pair.change[hard],
            f"a constant offset of the residual would give 1 along any directions; along random ones it is {unlike:.2f}",
        ),
    }
    findings = []
    for id, (estimate, given, note) in notes.items():
        kind = "shift of a random change" if id == "same_shift" else "profile of a random residual"
        null = pair.null(estimate.value, given.mean(axis=0), np.arange(n), "greater", kind)
        findings.append(CLAIMS[id].tested(estimate, null, estimate.low > 0, f"r over {n} emotions; {note}; {pair.where}."))
    return shifts, findings


def _isotropic(pair: Pair) -> float:
    """Correlation of hard and neutral shifts along random directions of the whole space."""
    moved = pair.moved[:, pair.bench.vectors.row()]
    directions = np.random.default_rng([pair.bench.seed, 5]).normal(size=(1000, moved.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hard, rest = moved @ directions.T
    return float(np.corrcoef(hard, rest)[0, 1])


def _sign_flips(change: np.ndarray, bench: Bench) -> np.ndarray:
    """p of each emotion's mean paired difference, two-sided, signs exchanged prompt by prompt."""
    signs = np.random.default_rng([bench.seed, 2]).choice([-1.0, 1.0], size=(bench.draws, len(change)))
    hits = (np.abs(signs @ change) >= np.abs(change.sum(axis=0)) - 1e-12).sum(axis=0)
    return np.asarray((1 + hits) / (1 + bench.draws))


@dataclass(frozen=True)
class _Control:
    """Shifts along directions without meaning, on hard prompts.

    Args:
        largest: The largest absolute shift of as many directions as there are emotions, ``(draws,)``, at the vectors' layer.
        means: Mean absolute shift at every layer ``(L,)``.
    """

    largest: np.ndarray
    means: np.ndarray


def _meaningless(pair: Pair) -> _Control | None:
    """Vectors fitted on what sets stories of the same emotion apart, dealt out at random: as natural as the vectors, and empty.

    Stories change places within their topic only, so topics weigh no more than in the vectors.
    """
    vectors, activations = pair.bench.vectors, pair.bench.activations
    if activations is None:
        return None
    of = [np.flatnonzero(activations.concepts == name) for name in vectors.names]
    rows, sizes = np.concatenate(of), np.array([len(stories) for stories in of])
    starts = np.cumsum(sizes) - sizes
    topics = np.unique(activations.topics[rows].astype(str), return_inverse=True)[1]
    by_topic = np.argsort(topics, kind="stable")
    rng = np.random.default_rng([pair.bench.seed, 4])
    means, largest = [], np.zeros(0)
    for row, layer in enumerate(vectors.layers):
        stories = activations.layer(layer)[rows].astype(np.float64)
        stories -= np.repeat(np.add.reduceat(stories, starts) / sizes[:, None], sizes, axis=0)
        basis, moved = vectors.neutral[row].astype(np.float64), pair.moved[0, row]

        def shifts(stories: np.ndarray = stories, basis: np.ndarray = basis, moved: np.ndarray = moved) -> np.ndarray:
            order = np.empty(len(rows), dtype=np.intp)
            order[by_topic] = np.lexsort((rng.random(len(rows)), topics))
            dealt = np.add.reduceat(stories[order], starts) / sizes[:, None]
            return np.asarray(np.abs(fit_means(dealt, basis).directions @ moved))

        means.append(float(np.mean([shifts().mean() for _ in range(CURVE)])))
        if row == vectors.row():
            largest = np.array([shifts().max() for _ in range(pair.bench.draws)])
    return _Control(largest, np.array(means))


def _largest(pair: Pair, shifts: Sequence[Estimate], q: np.ndarray, control: _Control | None) -> tuple[Finding, float | None]:
    """The largest shift against the largest of as many directions without meaning, and the band of those."""
    claim, names = CLAIMS["largest"], pair.bench.vectors.names
    if control is None:
        return claim.untestable("The residuals of the stories, from which the control is made, are not at hand."), None
    values = np.array([e.value for e in shifts])
    top = int(np.abs(values).argmax())
    own = shifts[top] if values[top] >= 0 else Estimate(-values[top], -shifts[top].high, -shifts[top].low, shifts[top].n)
    rest = iter(control.largest)
    null = stats.permutation_null(
        float,
        own.value,
        permute=lambda _: next(rest),
        draws=len(control.largest),
        side="greater",
        kind=f"the largest of {len(names)} directions without meaning",
    )
    order = np.argsort(-values)
    up, down = (
        ", ".join(f"{names[i]} {values[i]:+.3f}" for i in end if np.sign(values[i]) == sign) or "none"
        for sign, end in ((1, order[:5]), (-1, order[::-1][:5]))
    )
    centred = pair.cosines(pair.later, centred=True) - pair.cosines(pair.earlier, centred=True)
    alike = np.corrcoef(values, centred[pair.hard].mean(axis=0))[0, 1]
    note = (
        f"Absolute shift of {names[top]} on {int(pair.hard.sum())} hard prompts. Most up: {up}; most down: {down}. "
        f"{int((q <= ALPHA).sum())} of {len(names)} shifts differ from 0 (q <= {ALPHA}), "
        f"{int((np.abs(values) > null.high).sum())} leave the control's band. Shifts of the centred cosine correlate with "
        f"these at {alike:.2f}; {pair.where}."
    )
    return claim.tested(own, null, own.low > null.high, note), null.high


def _trends(pair: Pair, shift: np.ndarray) -> tuple[list[Finding], dict[str, float], list[tuple[int, tuple[float, float]]]]:
    """Shifts over words against the published shifts and against human ratings."""
    bench, names = pair.bench, pair.bench.vectors.names
    known = published()
    theirs = {name: known[name] for name in names if name in known and bench.concepts.name == "emotions"}
    rated = [(i, r) for i, name in enumerate(names) if name in bench.concepts and (r := bench.concepts[name].rating)]

    def trend(id: str, words: list[int], other: list[float], side: stats.Side, what: str) -> Finding:
        if len(words) < FEW or np.ptp(other) == 0:
            return CLAIMS[id].untestable(f"{len(words)} of these concepts have {what}: {FEW} are needed.")
        estimate, _ = stats.correlation_with_null(shift[words], other, **pair.options)
        null = pair.null(estimate.value, np.array(other), np.array(words), side, "shift of a random change")
        note = f"r of the shift on hard prompts with {what}, {len(words)} words, interval over words; {pair.where}."
        return CLAIMS[id].tested(estimate, null, estimate.low > 0 if side == "greater" else estimate.high < 0, note)

    words = [i for i, _ in rated]
    shared = [i for i, name in enumerate(names) if name in theirs]
    findings = [
        trend("published", shared, [theirs[names[i]] for i in shared], "greater", "the published shift"),
        trend("pleasure", words, [rating.pleasure for _, rating in rated], "less", "human ratings of pleasure"),
        trend("arousal", words, [rating.arousal for _, rating in rated], "less", "human ratings of arousal"),
    ]
    return findings, theirs, [(i, (rating.pleasure, rating.arousal)) for i, rating in rated]


def _growth(pair: Pair, control: _Control | None) -> tuple[Finding, dict[str, list[list[float]]]]:
    """The mean absolute shift by layer, and whether it grows up to the vectors' layer."""
    vectors, deep = pair.bench.vectors, pair.bench.vectors.row() + 1
    shape = pair.by_layer.shape
    flat = pair.by_layer.reshape(len(pair.by_layer), -1)

    def rise(along: np.ndarray) -> float:
        return float(spearmanr(np.arange(deep), along[:deep]).statistic)

    def measured(rows: np.ndarray) -> np.ndarray:
        mean = (np.bincount(rows, minlength=len(rows)) / len(rows)) @ flat
        along = np.abs(mean.reshape(shape[1:])).mean(axis=1)
        return np.array([rise(along) if deep > 1 else np.nan, *along])

    growth, *along = stats.bootstrap_each(measured, pair.categories[pair.hard], **pair.options)
    curves = {"emotions": [rounded(e.value for e in along), rounded(e.low for e in along), rounded(e.high for e in along)]}
    if control is not None:
        curves["directions without meaning"] = [rounded(control.means)]
    claim = CLAIMS["growth"]
    if deep < DEEP:
        return claim.untestable(f"{deep} layers up to layer {vectors.layer} are too few: {DEEP} are needed."), curves
    values = np.array([e.value for e in along])[:deep]
    null = stats.permutation_null(
        lambda signs: rise(np.concatenate([values[:1], values[0] + np.cumsum(signs * np.diff(values))])),
        growth.value,
        permute=lambda rng: rng.choice([-1.0, 1.0], size=deep - 1),
        side="greater",
        kind="steps between layers with random signs",
        **pair.options,
    )
    falls = int((np.diff(values) < 0).sum())
    ratio = ""
    if control is not None:
        own = values / np.maximum(control.means[:deep], 1e-30)
        ratio = f" It is {own[0]:.1f} times that of directions without meaning at the first layer, {own[-1]:.1f} at the last."
    note = (
        f"Rank correlation of the mean absolute shift on hard prompts with depth, layers {vectors.layers[0]} to {vectors.layer}; "
        f"{falls} of {deep - 1} steps go down.{ratio}"
    )
    return claim.tested(growth, null, growth.low > 0, note), curves


def _vectors(pair: Pair) -> tuple[list[Finding], np.ndarray | None, np.ndarray | None]:
    """How far the vectors themselves moved: cosines before and after, and those of refits on resampled stories."""
    bench = pair.bench
    assert bench.base is not None
    mine, theirs = bench.vectors, bench.base.vectors
    if mine.names != theirs.names or mine.layer not in theirs.layers:
        reason = "The earlier checkpoint has vectors of other concepts or layers: fit both from the same stories."
        return [CLAIMS["preserved"].untestable(reason), CLAIMS["drift"].untestable(reason)], None, None
    later, earlier = mine.at().astype(np.float64), theirs.at(mine.layer).astype(np.float64)
    between = earlier @ later.T
    own, everyone = np.diag(between), np.arange(len(mine))
    hits = stats.top_k_hits(between, everyone, k=1)
    null = stats.permutation_null(
        lambda targets: float(stats.top_k_hits(between, targets, k=1).mean()),
        float(hits.mean()),
        permute=lambda rng: rng.permutation(everyone),
        side="greater",
        kind="emotions exchanged",
        **pair.options,
    )
    share = stats.wilson(int(hits.sum()), len(hits))
    lost = ", ".join(mine.names[i] for i in np.flatnonzero(~hits)[:5])
    note = f"{int(hits.sum())} of {len(hits)} vectors at layer {mine.layer}{lost and f', not for instance {lost}'}; same stories."
    findings = [CLAIMS["preserved"].tested(share, null, share.low >= MOST, note)]
    noise = mine.stability[mine.row()].astype(np.float64)
    if bench.activations is None:
        missing = CLAIMS["drift"].untestable("The residuals of the stories are not at hand to refit vectors.")
        return [*findings, missing], own, noise

    stories = bench.activations.layer(mine.layer)
    of = [np.flatnonzero(bench.activations.concepts == name) for name in mine.names]
    order, sizes = np.concatenate(of), np.array([len(rows) for rows in of])
    starts, basis = np.cumsum(sizes) - sizes, mine.neutral[mine.row()].astype(np.float64)
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)

    def kept(rows: np.ndarray) -> float:
        means = np.add.reduceat(stories[order[rows]], starts, axis=0, dtype=np.float64) / sizes[:, None]
        return float((fit_means(means, basis).directions * later).sum(axis=1).mean())

    estimate = stats.bootstrap(lambda rows: float(own[rows].mean()), len(own), **pair.options)
    refits = stats.permutation_null(
        kept,
        estimate.value,
        permute=lambda rng: start + rng.integers(0, size),
        draws=min(bench.draws, REFITS),
        seed=bench.seed,
        side="less",
        kind="refits on resampled stories",
    )
    beyond = int((own < noise).sum())
    note = (
        f"Mean cosine of the vectors before and after at layer {mine.layer}, the same stories; null: that of the later "
        f"checkpoint's vectors with their refits. {beyond} of {len(own)} moved further than that; furthest "
        f"{mine.names[int(own.argmin())]} ({own.min():.2f})."
    )
    findings.append(CLAIMS["drift"].tested(estimate, refits, estimate.high < refits.low, note))
    return findings, own, noise
