"""Do the vectors tell concepts apart in texts on topics that they were not fitted on?

Declared before any data is seen:

* **Design.** Whole topics are dealt into at most five folds; vectors are fitted (method 4) without a fold and score its texts.
  Without at least three topics the folds are dealt over texts, stratified by concept, and every finding says so.
* **Readout.** Cosine between a text's pooled residual minus the *training* centre and each direction, at every layer; layer -1,
  the mean token embedding, is the baseline that deeper layers have to beat.
* **Statistic.** Top-k accuracy and AUROC, both macro: the mean over concepts of the mean over a concept's texts, so that chance
  is k / N and 0.5 however unequal the counts are. The AUROC compares texts of one fold only, because scores of different folds
  come from different vectors.
* **Choosing the layer.** The headline reads each fold at the layer that was best *among the other folds* (cross-validation
  inside the training topics), so no text helps to choose the layer it is scored at. The best layer over all folds, which
  :func:`best_layer` gives as the default for reading, was chosen by looking: it comes with a null that looks as hard.
* **Null.** Labels change places within each topic, a concept's texts on a topic staying together, since they may be alike for
  reasons of their own (text by text where that leaves under 1,000 arrangements; whole topics when each has one concept; within
  folds without topics), and everything is done again: fits, every layer, its choice. 20 exchanges: p is at least 1/21.
* **Intervals.** Bootstrap over texts within each concept, given the fitted vectors; the note repeats it over topics, which is
  wider where topics differ in difficulty.
* **Conditions.** Every concept occurs in at least three folds: one is held out, one chooses, one trains.

Source: ours, the paper gives no such number; method 4, 22 (row 10, centring), 23.1 (replications).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as distributions
from scipy.sparse import csr_array
from scipy.special import gammaln

from affectlens import stats
from affectlens.engine import Request
from affectlens.stats import Estimate, Null
from affectlens.studies import Bench, Figure, Finding, Outcome, Table, Verdict

NAME = "separation"
FOLDS, FEW_FOLDS = 5, 3
SHUFFLES, FEW_ARRANGEMENTS = 20, 1000
ALPHA = 0.05
KS = (1, 3, 5)
MANY = 50
"""Above so many concepts top 5 is reported too and chooses the layer: among near-synonyms the first place is luck."""
GAIN, AUROC = 0.2, 0.75
"""What the lower end of the interval must reach: so much of the way from chance to 1 for an accuracy; this for the AUROC."""

_ACCURACY = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_AREA = f"holds: p <= {ALPHA}, lower end of the interval at least {AUROC}; weak: p <= {ALPHA} only; fails: otherwise"
_MORE = f"holds: p <= {ALPHA} and the interval above 0; weak: above 0 but not both; fails: 0 or below"
CLAIMS: dict[str, tuple[str, str]] = {
    "top1": ("The vectors name the concept of a text on a new topic", _ACCURACY),
    "top3": ("The concept of a text on a new topic is among the three strongest readings", _ACCURACY),
    "top5": ("The concept of a text on a new topic is among the five strongest readings", _ACCURACY),
    "auroc": ("Texts on new topics read higher on their own concept than texts of other concepts do", _AREA),
    "best_layer": ("At the best layer the vectors name the concept of a text on a new topic", _ACCURACY),
    "beats_embedding": ("The residual stream separates concepts better than the mean token embedding does", _MORE),
}
_COLUMNS = (*(f"top {k}" for k in KS), "AUROC")
_FIGURE = {"auroc": "auroc"}
"""The figure that shows a finding, where it is not the accuracy over layers."""
_DEALT = {
    "within topics": "whole topics",
    "within topics, text by text": "whole topics",
    "between topics": "whole topics (each topic has one concept)",
    "between texts": "texts (fewer than three topics: a concept may be told by its topic)",
}


@dataclass(frozen=True)
class _Design:
    """Who is held out when, and what may be exchanged: labels of a ``block`` change places within a ``stratum``."""

    names: tuple[str, ...]
    rows: np.ndarray
    labels: np.ndarray
    topics: np.ndarray
    fold: np.ndarray
    block: np.ndarray
    stratum: np.ndarray
    exchanged: str

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Labels after an exchange; each still occurs in the same folds."""
        first = np.unique(self.block, return_index=True)[1]
        stratum, labels = self.stratum[first], self.labels[first]
        new = np.empty_like(labels)
        new[np.argsort(stratum, kind="stable")] = labels[np.lexsort((rng.random(len(labels)), stratum))]
        return new[self.block]


def _plan(bench: Bench) -> _Design | str:
    """The folds, or the reason why there are none."""
    activations = bench.activations
    if activations is None:
        return "there are no activations: discover keeps them in the run's folder"
    names = tuple(name for name in bench.vectors.names if (activations.concepts == name).sum() >= FEW_FOLDS)
    if len(names) < 2:
        return f"fewer than two concepts have {FEW_FOLDS} texts: one to hold out, one to choose the layer, one to train"
    rows = np.flatnonzero(np.isin(activations.concepts, names))
    labels = np.array([names.index(concept) for concept in activations.concepts[rows]])
    topics = np.unique(activations.topics[rows].astype(str), return_inverse=True)[1]
    cells, blocks = np.unique(topics * len(names) + labels, return_inverse=True)
    arrangements = gammaln(1 + np.bincount(cells // len(names))).sum() - gammaln(1 + len(names))
    exchanged = "within topics"
    if topics.max() + 1 < FEW_FOLDS or (activations.topics[rows] == "").any():
        topics = blocks = np.arange(len(rows))
        exchanged = "between texts"
    elif len(cells) == topics.max() + 1:
        exchanged = "between topics"
    elif arrangements < np.log(FEW_ARRANGEMENTS):
        blocks, exchanged = np.arange(len(rows)), "within topics, text by text"
    first = np.unique(topics, return_index=True)[1]
    # Topics that belong to one concept are dealt concept by concept, as texts are when there are no topics.
    groups = np.zeros(len(first)) if exchanged.startswith("within") else labels[first]
    has = np.zeros((len(first), len(names)), dtype=bool)
    has[topics, labels] = True
    on = has.sum(axis=0)
    if on.min() < FEW_FOLDS:  # no deal can help
        return _too_few(names[on.argmin()])
    for attempt in range(10):  # concepts may have texts on some topics only: not every deal leaves enough of each
        rng = np.random.default_rng([bench.seed, attempt])
        order = np.lexsort((rng.random(len(first)), groups))
        dealt = np.empty(len(first), dtype=np.intp)
        dealt[order] = np.arange(len(first)) % FOLDS
        occurs = _spread(dealt, groups, has, rng)
        fold = dealt[topics]
        if (occurs >= FEW_FOLDS).all():
            stratum = topics if exchanged.startswith("within") else fold
            return _Design(names, rows, labels, topics, fold, blocks, stratum, exchanged)
    return _too_few(names[occurs.argmin()])


def _too_few(name: str) -> str:
    return f"{name!r} would be missing from a training set: it needs texts on at least {FEW_FOLDS} topics"


def _spread(dealt: np.ndarray, groups: np.ndarray, has: np.ndarray, rng: np.random.Generator, swaps: int = 3000) -> np.ndarray:
    """Let units of one group change folds, in place, until every concept occurs in enough folds or none helps.

    Args:
        dealt: Fold of each unit (a topic, or a text), ``(U,)``.
        groups: Only units of one group change places, ``(U,)``.
        has: Which concepts a unit has, ``(U, N)``.

    Returns:
        In how many folds each concept occurs, ``(N,)``.
    """

    def occurrences() -> np.ndarray:
        return np.asarray(np.stack([has[dealt == f].any(axis=0) for f in range(FOLDS)]).sum(axis=0))

    best = occurrences()
    for _ in range(swaps):
        if (best >= FEW_FOLDS).all():
            break
        needy = np.flatnonzero(has[:, best.argmin()])
        a = rng.choice(needy)
        b = rng.choice(np.flatnonzero((groups == groups[a]) & (dealt != dealt[a]) | (np.arange(len(dealt)) == a)))
        dealt[[a, b]] = dealt[[b, a]]
        found = occurrences()
        if np.minimum(found, FEW_FOLDS).sum() < np.minimum(best, FEW_FOLDS).sum():
            dealt[[a, b]] = dealt[[b, a]]
        else:
            best = found
    return best


def held_out_scores(values: np.ndarray, labels: np.ndarray, *, fold: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Centred cosines of every text with the vectors that were fitted without its fold.

    Args:
        values: Residuals at one layer, ``(n, D)``.
        labels, fold: Concept and fold of each text as numbers, ``(n,)``; each concept occurs in three folds or more.
        basis: Orthonormal neutral components to project out, ``(k, D)``.

    Returns:
        ``(n, N)`` float32. Source: method 4 and 22 (row 10).

    Example:
        >>> x = np.array([[1.0, 0.2], [0.9, 0.0], [1.2, 0.1], [-1.0, 0.1], [-1.1, 0.0], [-0.9, 0.2]])
        >>> held_out_scores(x, np.array([0, 0, 0, 1, 1, 1]), fold=np.array([0, 1, 2] * 2), basis=np.zeros((0, 2))).argmax(1)
        array([0, 0, 0, 1, 1, 1])
    """
    out = np.empty((len(values), labels.max() + 1), np.float32)
    for _, rows, scores, _ in _scored(_centred(values), labels[None], fold, basis):
        out[rows] = scores[:, 0]
    return out


def _centred(values: np.ndarray) -> np.ndarray:
    """Minus the grand mean: no score depends on it, and without it float32 sums and norms lose nothing to a large offset."""
    return np.asarray(values - values.mean(axis=0, dtype=np.float64), dtype=np.float32)


def _scored(
    x: np.ndarray, labels: np.ndarray, fold: np.ndarray, basis: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Score each fold with all vectors fitted without it, for several labellings ``(B, n)`` at once.

    Yields the fold; its rows; their centred cosines ``(rows, B, N)`` with the vectors fitted without it; and their dot products
    ``(rows, B, folds, N)`` with those fitted without it and one more fold, which rank concepts just as cosines do. The products
    are few and large: hundreds of small ones cost ten times as much on a busy machine.
    """
    folds, n, width = int(fold.max()) + 1, int(labels.max()) + 1, x.shape[1]
    pairs = [(f, g) for f in range(folds) for g in range(f, folds)]
    # Directions lie outside the neutral components. In coordinates outside and inside of them, the first are all that a dot
    # product sees, and nothing has to be projected for each of hundreds of fits.
    inside = x @ basis.T.astype(np.float32)
    x = np.concatenate([x - inside @ basis.astype(np.float32), inside], axis=1)
    directions = np.empty((len(pairs), len(labels), n, width), np.float32)
    centres = np.empty((len(pairs), len(labels), x.shape[1]), np.float32)
    for b, own in enumerate(labels):
        cell = fold * n + own
        members = csr_array((np.ones(len(x), np.float32), (cell, np.arange(len(x)))), shape=(folds * n, len(x)))
        sums = (members @ x).reshape(folds, n, -1)
        counts = np.bincount(cell, minlength=folds * n).reshape(folds, n).astype(np.float32)
        total, texts = sums.sum(axis=0), counts.sum(axis=0)
        for i, (f, g) in enumerate(pairs):
            both = f != g
            means = (total - sums[f] - both * sums[g]) / (texts - counts[f] - both * counts[g])[:, None]
            centres[i, b] = means.mean(axis=0)
            contrasts = means[:, :width] - centres[i, b, :width]
            lengths = np.sqrt(np.einsum("nd,nd->n", contrasts, contrasts))
            np.divide(contrasts, np.maximum(lengths, 1e-30)[:, None], out=directions[i, b])
    offsets = np.einsum("pbd,pbnd->pbn", centres[:, :, :width], directions)
    for f in range(folds):
        which = [pairs.index((min(f, g), max(f, g))) for g in range(folds)]
        rows = np.flatnonzero(fold == f)
        dots = np.empty((len(rows), len(labels), folds, n), np.float32)
        for g, i in enumerate(which):
            dots[:, :, g] = (x[rows, :width] @ directions[i].reshape(-1, width).T).reshape(len(rows), len(labels), n) - offsets[i]
        moved = [np.linalg.norm(x[rows] - centre, axis=1) for centre in centres[which[f]]]
        yield f, rows, dots[:, :, f] / np.maximum(np.stack(moved, axis=1), 1e-30)[:, :, None], dots


def _rank(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of the own concept, 1 for the best; ties count against it."""
    return np.asarray((scores >= np.take_along_axis(scores, labels[:, None], axis=1)).sum(axis=1))


def _placements(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of the texts of other concepts that read lower on a text's own concept; their mean is the AUROC."""
    out = np.full(len(scores), 0.5)
    columns = np.sort(scores.T, axis=1)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        own = scores[rows, c]
        if len(rows) < len(scores):
            lower = columns[c].searchsorted(own, "left") + columns[c].searchsorted(own, "right")
            lower -= np.sort(own).searchsorted(own, "left") + np.sort(own).searchsorted(own, "right")
            out[rows] = lower / (2 * (len(scores) - len(rows)))
    return out


def _basis(bench: Bench, layer: int) -> np.ndarray:
    """Neutral components as in the vectors; computed here because the vectors keep none for the embedding."""
    share = float(bench.vectors.method.get("share", 0.5))
    if bench.neutral is None or share <= 0 or layer not in bench.neutral.layers:
        return np.zeros((0, bench.vectors.directions.shape[-1]))
    return stats.explained_components(bench.neutral.layer(layer), share)[0]


def _measure_layers(bench: Bench, design: _Design, choice: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every layer under the real labels and, after these, under SHUFFLES exchanges of them.

    Returns:
        Hits for each of ``KS`` and placement of each text, real labels, ``(L, n, S)``; what each fold adds to their macro means
        ``(1 + SHUFFLES, L, folds, S)``; the accuracy among the other folds, which chooses a fold's layer.
    """
    assert bench.activations is not None  # _plan gives a reason otherwise
    rng = np.random.default_rng([bench.seed, 1])
    labels = np.stack([design.labels, *(design.shuffled(rng) for _ in range(SHUFFLES))])
    shape = (len(bench.activations.layers), len(design.rows))
    folds, size = int(design.fold.max()) + 1, len(design.names) * bench.activations.width * FOLDS * (FOLDS + 1) * 2
    texts = np.empty((*shape, len(_COLUMNS)), np.float32)
    parts, inner = np.zeros((len(labels), shape[0], folds, len(_COLUMNS))), np.zeros((len(labels), shape[0], folds))
    totals = np.stack([np.bincount(own) for own in labels])
    for i, layer in enumerate(bench.activations.layers):
        x, basis = _centred(bench.activations.layer(layer)[design.rows]), _basis(bench, layer)
        for some in np.array_split(np.arange(len(labels)), -(-len(labels) * size // 2**27)):  # directions fill 128 MB at most
            hits = np.zeros((len(some), folds, shape[1]), np.float32)
            for f, rows, scores, dots in _scored(x, labels[some], design.fold, basis):
                for s, b in enumerate(some):
                    own = labels[b, rows]
                    ranks = _rank(scores[:, s], own)
                    values = np.column_stack([*(ranks <= k for k in KS), _placements(scores[:, s], own)])
                    parts[b, i, f] = (1 / (totals.shape[1] * totals[b, own])) @ values
                    if b == 0:
                        texts[i, rows] = values
                    for g in range(folds):  # vectors without this fold and g say how well the layer would do for g
                        hits[s, g, rows] = _rank(dots[:, s, g], own) <= choice
            for s, b in enumerate(some):
                for g in range(folds):
                    others = labels[b, design.fold != g]
                    inner[b, i, g] = (np.bincount(others, hits[s, g, design.fold != g]) / np.bincount(others)).mean()
    return texts, parts, inner


class Separation:
    """Held-out separation; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Separation on held-out topics"
    question = "Do the vectors tell concepts apart in texts on topics they have never seen?"
    version = 3
    uses: tuple[str, ...] = ()

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing: the stories were read when the vectors were made."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``activations``; ``neutral`` is projected out as in the vectors; ``draws`` is for intervals.

        Returns:
            Findings, a table over concepts, the data of four figures; as raw values what each text scored when held out.
        """
        plan = _plan(bench)
        if isinstance(plan, str):
            asked = [id for id in CLAIMS if id != "top5" or len(bench.vectors) > MANY]
            return Outcome(tuple(_untestable(id, plan) for id in asked), (), {"layer": bench.vectors.layer, "reason": plan})
        return _measure(bench, plan)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw accuracy and AUROC over layers, each concept's AUROC and the mean readings; nothing when it was untestable."""
        return _figures(data) if "layers" in data else []


def best_layer(data: Mapping[str, Any]) -> int:
    """The layer to read at, from the outcome's data: the one whose held-out accuracy over all folds is best.

    When the study was untestable it is the vectors' own layer.

    Example:
        >>> best_layer({"layer": 18})
        18
    """
    return int(data["layer"])


def _untestable(id: str, reason: str) -> Finding:
    return Finding(NAME, id, CLAIMS[id][0], None, None, None, "untestable", CLAIMS[id][1], f"{reason[0].upper()}{reason[1:]}.")


def _tested(id: str, estimate: Estimate, null: Null, note: str, *, needed: float) -> Finding:
    verdict: Verdict = "holds" if null.p <= ALPHA and estimate.low >= needed else "weak"
    if null.p > ALPHA and (id != "beats_embedding" or estimate.value <= 0):
        verdict = "fails"
    return Finding(NAME, id, CLAIMS[id][0], estimate, null, None, verdict, CLAIMS[id][1], note, _FIGURE.get(id, "accuracy"))


def _drawn(values: np.ndarray, kind: str) -> Null:
    """Null from values that were computed beforehand, the observed one first."""
    rest = iter(values[1:])
    return stats.permutation_null(float, values[0], permute=lambda _: next(rest), draws=SHUFFLES, side="greater", kind=kind)


def _measure(bench: Bench, design: _Design) -> Outcome:
    assert bench.activations is not None
    layers, n, folds = np.array(bench.activations.layers), len(design.names), np.arange(design.fold.max() + 1)
    choice = KS[-1] if n > MANY else 1
    column = KS.index(choice)
    texts, parts, inner = _measure_layers(bench, design, choice)
    blocks = np.flatnonzero(layers >= 0)
    picked = blocks[inner[:, blocks].argmax(axis=1)]  # (1 + SHUFFLES, folds): each fold's layer, chosen without it
    nested = np.stack([part[own, folds].sum(axis=0) for part, own in zip(parts, picked, strict=True)])
    macro = parts.sum(axis=2)
    best = int(blocks[macro[0, blocks, column].argmax()])
    weights = 1 / (n * np.bincount(design.labels))[design.labels]
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    kind = f"labels exchanged {design.exchanged}, refitted"

    def over_texts(values: np.ndarray) -> list[Estimate]:
        return stats.bootstrap_each(lambda index: weights @ values[index], design.labels, **options)

    def over_topics(index: np.ndarray) -> np.ndarray:
        drawn = np.bincount(index, minlength=len(index))[design.topics]
        count = np.bincount(design.labels, drawn)
        return np.asarray((drawn / np.maximum(count, 1)[design.labels]) @ held_out / np.count_nonzero(count))

    held_out = texts[picked[0][design.fold], np.arange(len(design.fold))]
    estimates = over_texts(held_out)
    across = [] if design.exchanged == "between texts" else stats.bootstrap_each(over_topics, design.topics.max() + 1, **options)
    where = f"{len(design.rows)} texts, {n} concepts, {len(folds)} folds of {_DEALT[design.exchanged]}"
    chosen = ", ".join(str(layers[i]) for i in picked[0])
    findings = []
    asked = [("top1", 0, 1 / n), ("top3", 1, 3 / n), ("top5", 2, 5 / n), ("auroc", 3, 0.5)]
    for id, j, level in asked if n > MANY else [asked[0], asked[1], asked[3]]:
        if level >= 1:
            findings.append(_untestable(id, f"with {n} concepts, {_COLUMNS[j]} is always right"))
            continue
        note = f"At the layer chosen on the training folds ({chosen}); {where}; chance {level:.3g}"
        note += f"; interval over topics {across[j].low:.2f} to {across[j].high:.2f}." if across else "."
        needed = AUROC if id == "auroc" else GAIN + (1 - GAIN) * level
        findings.append(_tested(id, estimates[j], _drawn(nested[:, j], f"{kind}, layer chosen again"), note, needed=needed))
    curves = [over_texts(values) for values in texts]
    # Every relabelling looks for its own best layer, so the null is of the best of all.
    null = _drawn(macro[:, blocks, column].max(axis=1), f"{kind}, best of all layers")
    note = f"Top {choice} at layer {layers[best]}; chosen by looking at these texts, so the value is a little high; {where}."
    findings.append(_tested("best_layer", curves[best][column], null, note, needed=GAIN + (1 - GAIN) * choice / n))
    if -1 in layers:
        gain = held_out[:, [column]] - texts[layers == -1][0][:, [column]]
        null = stats.permutation_null(
            lambda sign: float(sign @ gain[:, 0]),
            float(weights @ gain[:, 0]),
            permute=lambda rng: rng.choice((-1, 1), size=len(gain)) * weights,
            kind="layer and embedding exchanged for each text",
            **options | {"side": "greater"},
        )
        note = f"Top {choice} at the layer chosen on the training folds minus top {choice} of the mean token embedding; {where}."
        findings.append(_tested("beats_embedding", over_texts(gain)[0], null, note, needed=np.nextafter(0, 1)))
    else:
        findings.append(_untestable("beats_embedding", "the activations were collected without the embedding, layer -1"))
    layer = int(layers[best])
    x, basis = bench.activations.layer(layer)[design.rows], _basis(bench, layer)
    scores = held_out_scores(x, design.labels, fold=design.fold, basis=basis)
    band = np.quantile(macro[1:], [0.5, 0.025, 0.975], axis=0)
    data: dict[str, Any] = {
        "layer": layer,
        "choice": _COLUMNS[column],
        "layers": layers.tolist(),
        "chosen": [int(layers[i]) for i in picked[0]],
        "names": list(design.names),
        "curves": {
            label: {
                "real": [_round(getattr(row[j], end) for row in curves) for end in ("value", "low", "high")],
                "shuffled": [_round(end[:, j]) for end in band],
            }
            for j, label in enumerate(_COLUMNS)
        },
        "concepts": _concepts(design, texts[best], scores, options),
        "readings": [_round(scores[design.labels == c].mean(axis=0)) for c in range(n)],
    }
    head = ("concept", "texts", "top 1", "AUROC", "low", "high", "q", "reads like")
    caption = "Worst first; 95 % interval over texts; q after Benjamini and Hochberg; last: the other concept read highest."
    table = Table("concepts", f"Each concept at layer {layer}", caption, head, tuple(map(tuple, data["concepts"])))
    # Each text at the layer that its fold was read at, with vectors fitted without it.
    raw = {
        "id": [bench.activations.ids[row] for row in design.rows],
        "concept": [design.names[c] for c in design.labels],
        "topic": bench.activations.topics[design.rows],
        "fold": design.fold,
        "layer": layers[picked[0]][design.fold],
        **{label: held_out[:, j] for j, label in enumerate(_COLUMNS[:-1])},
        "placement": held_out[:, -1],
    }
    return Outcome(tuple(findings), (table,), data, {"texts": raw})


def _concepts(design: _Design, texts: np.ndarray, scores: np.ndarray, options: dict[str, Any]) -> list[list[Any]]:
    """Each concept with n, accuracy, AUROC, its interval, q, and what it is mistaken for; worst AUROC first.

    p is of a Mann-Whitney test stratified by fold (normal approximation), as 20 exchanges cannot carry a correction for 171
    tests. The interval resamples the concept's own texts only, and is too narrow where others are not far more numerous.
    """
    labels, n, placements = design.labels, len(design.names), texts[:, -1].astype(np.float64)
    counts = np.bincount(labels)
    intervals = stats.bootstrap_each(lambda index: np.bincount(labels, placements[index]) / counts, labels, **options)
    sizes = np.bincount(design.fold)[:, None]
    own = np.bincount(design.fold * n + labels, minlength=len(sizes) * n).reshape(-1, n)
    wins = np.bincount(labels, placements * (sizes - own)[design.fold, labels])
    deviation = np.sqrt((own * (sizes - own) * (sizes + 1)).sum(axis=0) / 12)
    q = stats.benjamini_hochberg(distributions.norm.sf((wins - (own * (sizes - own)).sum(axis=0) / 2) / deviation))
    rows: list[list[Any]] = []
    for c, (name, auc) in enumerate(zip(design.names, intervals, strict=True)):
        mean = scores[labels == c].mean(axis=0)
        mean[c] = -np.inf
        numbers = _round([texts[labels == c, 0].mean(), auc.value, auc.low, auc.high])
        rows.append([name, int(counts[c]), *numbers, float(f"{q[c]:.3g}"), design.names[int(mean.argmax())]])
    return sorted(rows, key=lambda row: row[3])


def _round(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _figures(data: Mapping[str, Any]) -> list[Figure]:
    from scipy.cluster.hierarchy import average, leaves_list

    from affectlens.figures import GREY, PALETTE, blank, heat_map, layer_curves, to_figure

    def curves(*labels: str) -> dict[str, Any]:
        real = {label: data["curves"][label]["real"] for label in labels}
        return real | {f"{label}, relabelled": data["curves"][label]["shuffled"] for label in labels}

    layer, second = data["layer"], "top 3" if data["choice"] == "top 1" else data["choice"]
    accuracy = layer_curves(data["layers"], curves("top 1", second), y="held-out accuracy", mark=layer)
    auroc = layer_curves(data["layers"], curves("AUROC"), y="held-out AUROC", chance=0.5, mark=layer)
    rows = data["concepts"] if len(data["concepts"]) <= 40 else data["concepts"][:20] + data["concepts"][-20:]
    values, lows, highs = np.array([row[3:6] for row in rows]).T
    dots = blank(x="held-out AUROC", height=90 + 17 * len(rows)).update_yaxes(type="category", showgrid=False)
    bars = {"array": highs - values, "arrayminus": values - lows, "thickness": 1, "width": 0, "color": GREY}
    dots.add_scatter(x=values, y=[row[0] for row in rows], mode="markers", error_x=bars, marker={"color": PALETTE[0], "size": 7})
    readings = np.array(data["readings"])
    order = leaves_list(average(readings)) if len(readings) > 2 else np.arange(len(readings))  # what reads alike stands together
    matrix = heat_map(readings[np.ix_(order, order)], [data["names"][i] for i in order], unit="centred cosine")
    bands = f"Means over concepts, 95 % intervals over texts; the lower curves have their labels exchanged ({SHUFFLES} times)."
    which = "The 20 worst and the 20 best concepts" if len(rows) < len(data["concepts"]) else "All concepts"
    read = "Mean centred cosine of held-out texts of a concept (row) with each vector (column), fitted without their topics."
    return [
        to_figure("accuracy", "Held-out accuracy over layers", f"{bands} Layer -1 is the mean token embedding.", accuracy),
        to_figure("auroc", "Held-out AUROC over layers", bands, auroc),
        to_figure("concepts", f"AUROC of each concept at layer {layer}", f"{which}, with 95 % intervals.", dots),
        to_figure("readings", f"What held-out texts read at layer {layer}", read, matrix),
    ]


STUDY = Separation()
