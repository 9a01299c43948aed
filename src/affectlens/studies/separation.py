"""Do the vectors tell concepts apart in texts on topics that they were not fitted on?

Declared before any data is seen:

* **Design.** Whole topics are dealt into at most five folds. On all folds but one, vectors are fitted as in method 4 (class
  means, minus their mean, neutral components projected out); the held-out texts are scored. Without at least three topics the
  folds are dealt over texts, stratified by concept, and every finding says so.
* **Readout.** Cosine between a text's pooled residual minus the *training* centre and each direction, at every layer; layer -1
  (the mean token embedding) is the baseline that any account of the deeper layers has to beat.
* **Statistic.** Top-k accuracy and AUROC, both macro: the mean over concepts of the mean over a concept's texts, so that chance
  is k / N and 0.5 however unequal the counts are. The AUROC compares texts of one fold only, because scores of different folds
  come from different vectors.
* **Choosing the layer.** The headline reads each fold at the layer that was best *among the other folds* (cross-validation
  inside the training topics), so no text helps to choose the layer it is scored at. The best layer over all folds, which is
  what :func:`best_layer` returns as the default for reading, was chosen by looking: it comes with a null that looks as hard.
* **Null.** Labels are exchanged within each topic (between whole topics when each topic has one concept, within folds when
  there are no topics) and everything is done again: fits, every layer, the choice of the layer. There are 20 exchanges, so p is
  never below 1/21.
* **Intervals.** Bootstrap over texts within each concept, given the fitted vectors; the note repeats it over topics, which is
  wider where topics differ in difficulty.
* **Conditions.** Two concepts that each occur in at least three folds: one fold is held out, one chooses, one trains.

Source: ours; the paper gives no such number. Method 4 (vectors), 22 (row 10, centring), 23.1 (replications' accuracies).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats as distributions
from scipy.sparse import csr_array

from affectlens.stats import Estimate, Null, benjamini_hochberg, bootstrap_each, explained_components
from affectlens.stats import permutation_null, selection_adjusted_null
from affectlens.studies import Bench, Figure, Finding, Outcome, Table, Verdict
from affectlens.vectors import fit_means

FOLDS = 5
SHUFFLES = 20
ALPHA = 0.05
GAIN = 0.2
"""Of the way from chance to perfect: what the lower end of the interval must reach for an accuracy to hold."""
AUROC = 0.75
"""What the lower end of the interval must reach for the AUROC to hold."""
FEW_FOLDS = 3
KS = (1, 3, 5)
"""The accuracies that are measured; top 5 is reported for more than 50 concepts."""

_GAIN_RULE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
RULES = {
    "accuracy": _GAIN_RULE,
    "auroc": f"holds: p <= {ALPHA} and the lower end of the interval is at least {AUROC}; weak: p <= {ALPHA} only; fails: otherwise",
    "difference": f"holds: p <= {ALPHA} and the whole interval is above 0; weak: above 0 but not both; fails: 0 or below",
}
CLAIMS = {
    "top1": "The vectors name the concept of a text on a new topic",
    "top3": "The concept of a text on a new topic is among the three strongest readings",
    "top5": "The concept of a text on a new topic is among the five strongest readings",
    "auroc": "A text reads higher on its own concept than texts of other concepts do, on new topics",
    "best_layer": "At the best layer the vectors name the concept of a text on a new topic",
    "beats_embedding": "The residual stream separates concepts better than the words alone do",
}
_REPLICATIONS = "not in the paper; replications with 5 to 20 concepts report 0.64 to 0.92 with probes and splits of their own"


@dataclass(frozen=True)
class _Design:
    """Who is held out when, and what may be exchanged: ``block`` labels change places within a ``stratum``."""

    names: tuple[str, ...]
    rows: np.ndarray
    labels: np.ndarray
    topics: np.ndarray
    fold: np.ndarray
    block: np.ndarray
    stratum: np.ndarray
    over_topics: bool
    exchanged: str

    @property
    def weights(self) -> np.ndarray:
        """What each text counts in a macro mean."""
        return 1.0 / (len(self.names) * np.bincount(self.labels))[self.labels]

    def shuffled(self, rng: np.random.Generator) -> _Design:
        """The same design with labels exchanged: counts in every fold stay as they are."""
        first = np.unique(self.block, return_index=True)[1]
        stratum, labels = self.stratum[first], self.labels[first]
        new = np.empty_like(labels)
        new[np.argsort(stratum, kind="stable")] = labels[np.lexsort((rng.random(len(labels)), stratum))]
        return replace(self, labels=new[self.block])


def held_out_scores(values: np.ndarray, labels: np.ndarray, *, fold: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Centred cosines of every text with the vectors fitted without its fold.

    Args:
        values: Residuals at one layer, ``(n, D)``.
        labels: Concept of each text as a number, ``(n,)``; all numbers up to the largest occur outside every fold.
        fold: Fold of each text, ``(n,)``.
        basis: Neutral components to project out, ``(k, D)``.

    Returns:
        ``(n, N)`` float32. Source: method 4 and 22 (row 10).

    Example:
        >>> x = np.array([[1.0, 0.2], [0.9, 0.0], [-1.0, 0.1], [-1.1, 0.0]])
        >>> held_out_scores(x, np.array([0, 0, 1, 1]), fold=np.array([0, 1, 0, 1]), basis=np.zeros((0, 2))).argmax(1)
        array([0, 0, 1, 1])
    """
    x = _centred(values)
    sums, counts = _class_sums(x, labels, fold)
    scores = np.empty((len(x), counts.shape[1]), np.float32)
    for f in range(len(counts)):
        scores[fold == f] = _score(x[fold == f], sums.sum(0) - sums[f], counts.sum(0) - counts[f], basis)
    return scores


def _centred(values: np.ndarray) -> np.ndarray:
    """Minus the grand mean: no score depends on it, and without it float32 sums and norms lose nothing to a large offset."""
    return (values - values.mean(axis=0, dtype=np.float64)).astype(np.float32)


def _class_sums(x: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each concept in each fold, ``(folds, N, D)`` and ``(folds, N)``: every training set is a difference."""
    folds, n = int(fold.max()) + 1, int(labels.max()) + 1
    cell = fold * n + labels
    members = csr_array((np.ones(len(x), np.float32), (cell, np.arange(len(x)))), shape=(folds * n, len(x)))
    return (members @ x).reshape(folds, n, -1), np.bincount(cell, minlength=folds * n).reshape(folds, n)


def _score(x: np.ndarray, sums: np.ndarray, counts: np.ndarray, basis: np.ndarray) -> np.ndarray:
    fitted = fit_means(sums / counts[:, None], basis)
    moved = x - fitted.centre.astype(np.float32)
    norms = np.maximum(np.sqrt(np.einsum("nd,nd->n", moved, moved)), 1e-30)
    return np.asarray((moved @ fitted.directions.T.astype(np.float32)) / norms[:, None])


def _hits(scores: np.ndarray, labels: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
    """Whether the own concept is among the k best, ``(n, len(ks))``; ties count against it."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    return np.asarray((scores >= own).sum(axis=1)[:, None] <= np.array(ks))


def _placements(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the texts of other concepts that read lower on a text's own concept, ``(n,)``: their mean is the AUROC."""
    out = np.full(len(scores), np.nan)
    columns = np.sort(scores.T, axis=1)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        own, others = scores[rows, c], len(scores) - len(rows)
        if others:
            lower = np.searchsorted(columns[c], own, "left") + np.searchsorted(columns[c], own, "right")
            among_own = np.sort(own)
            lower -= np.searchsorted(among_own, own, "left") + np.searchsorted(among_own, own, "right")
            out[rows] = lower / (2 * others)
    return np.where(np.isnan(out), 0.5, out)  # a fold with one concept only compares nothing


def _evaluate(x: np.ndarray, design: _Design, basis: np.ndarray, ks: tuple[int, ...], choice: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer: statistics of each held-out text, and for each fold the accuracy among the other folds."""
    labels, fold = design.labels, design.fold
    sums, counts = _class_sums(x, labels, fold)
    all_sums, all_counts = sums.sum(0), counts.sum(0)
    members = [np.flatnonzero(fold == f) for f in range(len(counts))]
    texts, inner = np.empty((len(x), len(ks) + 1), np.float32), np.zeros((len(members), len(x)))
    for f, rows in enumerate(members):
        scores = _score(x[rows], all_sums - sums[f], all_counts - counts[f], basis)
        texts[rows, :-1] = _hits(scores, labels[rows], ks)
        texts[rows, -1] = _placements(scores, labels[rows])
        for g in range(f):
            # Vectors without both folds serve twice: for either as the held-out one they score the other.
            both = np.concatenate([rows, members[g]])
            scores = _score(x[both], all_sums - sums[f] - sums[g], all_counts - counts[f] - counts[g], basis)
            hits = _hits(scores, labels[both], (choice,))[:, 0]
            inner[g, rows], inner[f, members[g]] = hits[: len(rows)], hits[len(rows) :]
    return texts, np.array([_macro(row[fold != f], labels[fold != f]) for f, row in enumerate(inner)])


def _macro(values: np.ndarray, labels: np.ndarray) -> float:
    counts = np.bincount(labels)
    return float((np.bincount(labels, values)[counts > 0] / counts[counts > 0]).mean())


def _deal(units: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each row: units are dealt round robin in random order, those of one group after the other."""
    first = np.unique(units, return_index=True)[1]
    order = np.lexsort((rng.random(len(first)), groups[first]))
    dealt = np.empty(len(first), dtype=np.intp)
    dealt[order] = np.arange(len(first)) % folds
    return dealt[units]


def _design(bench: Bench) -> _Design | str:
    """The folds, or the reason why there are none."""
    activations = bench.activations
    if activations is None:
        return "no activations: run discover with stories, or name a run that kept them"
    counts = {name: int((activations.concepts == name).sum()) for name in bench.vectors.names}
    names = tuple(name for name, count in counts.items() if count >= FEW_FOLDS)
    if len(names) < 2:
        return f"fewer than two concepts have {FEW_FOLDS} texts: one to hold out, one to choose the layer, one to train"
    rows = np.flatnonzero(np.isin(activations.concepts, names))
    labels = np.array([names.index(concept) for concept in activations.concepts[rows]])
    topics = activations.topics[rows].astype(str)
    over_topics = bool((topics != "").all()) and len(set(topics)) >= FEW_FOLDS
    topic = np.unique(topics, return_inverse=True)[1] if over_topics else np.arange(len(rows))
    together = {(t, c) for t, c in zip(topic, labels, strict=True)}
    nested = over_topics and len(together) == topic.max() + 1
    for attempt in range(50):
        rng = np.random.default_rng([bench.seed, attempt])
        groups = labels if nested or not over_topics else np.zeros_like(labels)
        fold = _deal(topic, groups, min(FOLDS, int(topic.max()) + 1), rng)
        occurs = _class_sums(np.zeros((len(rows), 1), np.float32), labels, fold)[1] > 0
        if (occurs.sum(axis=0) >= FEW_FOLDS).all():
            blocks, strata = (topic, fold) if nested else (np.arange(len(rows)), topic if over_topics else fold)
            exchanged = "between topics" if nested else "within topics" if over_topics else "between texts"
            return _Design(names, rows, labels, topic, fold, blocks, strata, over_topics, exchanged)
    rare = names[int(occurs.sum(axis=0).argmin())]
    return f"{rare!r} would be missing from a training set: it needs texts on more topics (three folds at least)"


class Separation:
    """Held-out separation over topics; see the module's docstring for what is fixed beforehand."""

    name = "separation"
    title = "Separation on held-out topics"
    question = "Do the vectors tell concepts apart in texts on topics they have never seen?"
    version = 1

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``activations``; uses ``neutral`` (projected out as in the vectors), ``draws`` for intervals and ``seed``.

        Returns:
            Findings, a table over layers, a table over concepts, and the data of four figures.
        """
        design = _design(bench)
        if isinstance(design, str):
            reason = f"untestable: {design}"
            findings = [
                Finding(self.name, id, claim, None, None, None, "untestable", _rule(id), reason) for id, claim in CLAIMS.items()
            ]
            return Outcome(tuple(findings), (), {"layer": bench.vectors.layer, "reason": design})
        return _measure(bench, design)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw accuracy and AUROC over layers, the concepts' AUROC and the mean readings; nothing when it was untestable."""
        return _figures(data) if "layers" in data else []


def best_layer(data: Mapping[str, Any]) -> int:
    """The layer to read at: the best held-out accuracy over all folds, of the layers that have vectors.

    Args:
        data: The outcome's data.

    Returns:
        The layer; the vectors' own default when the study was untestable.

    Example:
        >>> best_layer({"layer": 18})
        18
    """
    return int(data["layer"])


def _rule(id: str) -> str:
    return RULES[{"auroc": "auroc", "beats_embedding": "difference"}.get(id, "accuracy")]


@dataclass(frozen=True)
class _Runs:
    """All labellings at all layers; the first labelling is the real one, the others are exchanged.

    Args:
        texts: Statistics of each text, real labels only, ``(L, n, S)``: the hits for each of ``KS``, then the placement.
        parts: What each fold adds to the macro means, ``(1 + SHUFFLES, L, folds, S)``; their sum over folds is the macro mean.
        inner: Accuracy among the other folds, which chooses a fold's layer, ``(1 + SHUFFLES, L, folds)``.
    """

    texts: np.ndarray
    parts: np.ndarray
    inner: np.ndarray


def _basis(bench: Bench, layer: int) -> np.ndarray:
    """Neutral components as in the vectors; refitted here because the vectors keep none for the embedding."""
    share = float(bench.vectors.method.get("share", 0.5))
    if bench.neutral is None or share <= 0:
        return np.zeros((0, bench.vectors.directions.shape[-1]))
    return explained_components(bench.neutral.layer(layer), share)[0]


def _measure_layers(bench: Bench, design: _Design, choice: int) -> _Runs:
    assert bench.activations is not None  # _design gives a reason otherwise
    rng = np.random.default_rng([bench.seed, 1])
    designs = [design, *(design.shuffled(rng) for _ in range(SHUFFLES))]
    folds = np.arange(design.fold.max() + 1)[:, None] == design.fold
    texts, parts, inner = [], [], []
    for layer in bench.activations.layers:
        x = _centred(bench.activations.layer(layer)[design.rows])
        basis = _basis(bench, layer)
        evaluated = [_evaluate(x, d, basis, choice) for d in designs]
        texts.append(evaluated[0][0])
        parts.append([(folds * d.weights) @ values for d, (values, _) in zip(designs, evaluated, strict=True)])
        inner.append([chosen_by for _, chosen_by in evaluated])
    return _Runs(np.stack(texts), np.stack(parts, axis=1), np.stack(inner, axis=1))


def _drawn(values: np.ndarray, kind: str) -> Null:
    """Null from values that were computed beforehand, the observed one first."""
    rest = iter(values[1:])
    return permutation_null(
        float, float(values[0]), permute=lambda _: next(rest), draws=len(values) - 1, side="greater", kind=kind
    )


def _verdict(estimate: Estimate, null: Null, needed: float) -> Verdict:
    if null.p > ALPHA:
        return "fails"
    return "holds" if estimate.low >= needed else "weak"


def _measure(bench: Bench, design: _Design) -> Outcome:
    assert bench.activations is not None
    layers, n = np.array(bench.activations.layers), len(design.names)
    choice = KS[-1] if n > 50 else 1  # among many near-synonyms the very first place is a matter of luck
    column = KS.index(choice)
    runs = _measure_layers(bench, design, choice)
    blocks, each_fold = np.flatnonzero(layers >= 0), np.arange(runs.inner.shape[2])
    picked = blocks[runs.inner[:, blocks].argmax(axis=1)]  # (1 + SHUFFLES, folds): the layer chosen without that fold
    nested = np.stack([part[own, each_fold].sum(axis=0) for part, own in zip(runs.parts, picked, strict=True)])
    macro = runs.parts.sum(axis=2)
    best = int(blocks[macro[0, blocks, column].argmax()])

    def over_texts(values: np.ndarray) -> list[Estimate]:
        """Macro means of the columns with intervals over texts within each concept."""
        return bootstrap_each(
            lambda index: design.weights @ values[index], design.labels, draws=bench.draws, seed=bench.seed
        )

    held_out = runs.texts[picked[0][design.fold], np.arange(len(design.fold))]
    estimates = over_texts(held_out)
    across = _over_topics(held_out, design, bench)
    kind = f"labels exchanged {design.exchanged}"
    chosen = ", ".join(str(layers[i]) for i in picked[0])
    where = f"{len(design.rows)} texts, {n} concepts, {len(each_fold)} folds of " + ("whole topics" if design.over_topics else "texts")
    if not design.over_topics:
        where += " (fewer than three topics, so a concept may be told by its topic)"
    elif design.exchanged == "between topics":
        where += " (each topic has one concept only)"
    findings = []
    for id, j in [("top1", 0), ("top3", 1), *([("top5", 2)] if n > 50 else []), ("auroc", 3)]:
        chance, needed = (0.5, AUROC) if id == "auroc" else (KS[j] / n, KS[j] / n + GAIN * (1 - KS[j] / n))
        note = f"Read at the layer chosen on the training folds ({chosen}); {where}; chance {chance:.3g}"
        note += f"; over topics [{across[j].low:.2f}, {across[j].high:.2f}]" if across else ""
        if chance >= 1:
            findings.append(self_untestable(id, f"with {n} concepts, top {KS[j]} is always right"))
            continue
        null = _drawn(nested[:, j], f"{kind}, refitted, layer chosen again")
        verdict = _verdict(estimates[j], null, needed)
        published = _REPLICATIONS if id == "top1" else None
        findings.append(Finding(NAME, id, CLAIMS[id], estimates[j], null, published, verdict, _rule(id), f"{note}."))
    drawn = iter(macro[1:, blocks, column])
    _, null = selection_adjusted_null(
        lambda values: values,
        macro[0, blocks, column],
        permute=lambda _: next(drawn),
        draws=SHUFFLES,
        side="greater",
        kind=f"{kind}, refitted, best of all layers",
    )
    curves = [over_texts(values) for values in runs.texts]
    at_best = curves[best][column]
    note = f"Layer {layers[best]}, top {choice}; chosen by looking at these texts, so the value is a little high; {where}."
    verdict = _verdict(at_best, null, choice / n + GAIN * (1 - choice / n))
    findings.append(Finding(NAME, "best_layer", CLAIMS["best_layer"], at_best, null, None, verdict, _rule("best_layer"), note))
    findings.append(_beats_embedding(bench, design, held_out[:, column], runs.texts[:, :, column], f"top {choice}; {where}"))
    scores = held_out_scores(
        bench.activations.layer(int(layers[best]))[design.rows], design.labels, fold=design.fold, basis=_basis(bench, int(layers[best]))
    )
    concepts = _concept_rows(design, runs.texts[best], bench)
    low, centre, high = np.quantile(macro[1:], [0.025, 0.5, 0.975], axis=0)
    labels = [*(f"top {k}" for k in KS), "AUROC"]
    data = {
        "layer": int(layers[best]),
        "choice": f"top {choice}",
        "layers": layers.tolist(),
        "chosen": [int(layers[i]) for i in picked[0]],
        "names": list(design.names),
        "curves": {
            label: {
                "value": _round([row[j].value for row in curves]),
                "low": _round([row[j].low for row in curves]),
                "high": _round([row[j].high for row in curves]),
                "shuffled": _round(centre[:, j]),
                "shuffled_low": _round(low[:, j]),
                "shuffled_high": _round(high[:, j]),
            }
            for j, label in enumerate(labels)
        },
        "concepts": [list(row) for row in concepts],
        "readings": [_round(scores[design.labels == c].mean(axis=0)) for c in range(n)],
    }
    return Outcome(tuple(findings), _tables(data), data)
