"""Whether the labels that people gave to texts agree with what is read on them: half of the study of passages.

What is fixed beforehand stands in the docstring of :mod:`affectlens.studies.passages`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, rankdata

from affectlens import stats
from affectlens.search import Search
from affectlens.stats import Null
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable

NAME = "passages"
TEXTS = 10_000
FEW, FEW_LABELS = 4, 6
CLEAR = 0.6
"""The lower end of a mean AUROC's interval must reach this: 0.5 is chance."""
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""

_MEAN = f"holds: p <= {ALPHA} and the lower end of the interval is at least {CLEAR:g}; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "auroc", "Texts with a label read higher on its emotion than other texts", _MEAN, figure="labels"),
        Claim(NAME, "unnamed", "The same where no text names the emotion", _MEAN, figure="labels"),
        Claim(
            NAME,
            "labels",
            "Most labels are read better than by chance",
            f"holds: p <= {ALPHA} and the interval above 0.5; weak: p <= {ALPHA} only; fails: otherwise",
            figure="labels",
        ),
        Claim(
            NAME,
            "own",
            "A vector of the label's own is among the three that tell its texts best",
            f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
            f"weak: p <= {ALPHA} only; fails: otherwise",
            figure="matrix",
        ),
    )
}


class Phrases:
    """Words and short phrases of a text, to look up which concepts it names without a search for each."""

    def __init__(self, text: str) -> None:
        words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold().replace("\u2019", "'"))
        self._known = set(words)
        self._line = f" {' '.join(words)} "

    def any_of(self, forms: Iterable[str]) -> bool:
        return any(form in self._known or (" " in form and f" {form} " in self._line) for form in forms)

    @staticmethod
    def of(forms: Iterable[str]) -> frozenset[str]:
        """Forms as they are looked up."""
        return frozenset(Phrases(form)._line.strip() for form in forms)


class _Texts:
    """The texts with labels: scores, which labels they have, which labels' emotions they name."""

    def __init__(self, bench: Bench, found: Search, mapping: Mapping[str, Sequence[str]]) -> None:
        rng = np.random.default_rng(bench.seed)
        scored = [text for text in found.with_labels() if rng.random() * found.labelled < TEXTS]
        counts = Counter(label for text in scored for label in text.labels)
        meaning = {label: tuple(mapping.get(label, (label,) if label in bench.vectors else ())) for label in sorted(counts)}
        kinds = np.array([text.kind for text in scored])
        has = np.array([[label in text.labels for label in meaning] for text in scored], dtype=bool).reshape(len(scored), -1)
        comparable = np.zeros(len(meaning), dtype=int)
        for kind in np.unique(kinds):
            rows = has[kinds == kind]
            comparable += np.where(rows.any(axis=0), (~rows).sum(axis=0), 0)
        enough = (has.sum(axis=0) >= FEW) & (comparable >= FEW)
        counting = [i for i, (label, own) in enumerate(meaning.items()) if own and enough[i]]
        order = {name: i for i, name in enumerate(name for group in bench.concepts.clusters.values() for name in group)}
        names = list(meaning)
        counting.sort(key=lambda i: (order.get(meaning[names[i]][0], len(order)), names[i]))
        # Texts of a kind in which no label counts would be compared with nothing.
        used = np.isin(kinds, kinds[has[:, counting].any(axis=1)])
        scored = [text for text, own in zip(scored, used, strict=True) if own]
        self.kinds = np.unique(kinds[used], return_inverse=True)[1]
        self.labels = [names[i] for i in counting]
        self.left_out = [name for i, name in enumerate(names) if i not in counting and has[used, i].any()]
        self.concepts = [meaning[label] for label in self.labels]
        self.has = has[used][:, counting]
        self.scores = np.array([text.scores for text in scored]).reshape(len(scored), len(bench.vectors))
        indices = [[bench.vectors.index(name) for name in own] for own in self.concepts]
        self.own = np.stack([self.scores[:, own].mean(axis=1) for own in indices], axis=1) if indices else self.scores[:, :0]
        self.indices = indices
        forms = [
            Phrases.of(form for name in own if name in bench.concepts for form in bench.concepts[name].forms)
            for own in self.concepts
        ]
        phrases = [Phrases(text.text) for text in scored]
        self.names = np.array([[each.any_of(own) for own in forms] for each in phrases], dtype=bool).reshape(self.has.shape)

    def __len__(self) -> int:
        return len(self.scores)

    def exchanged(self, rng: np.random.Generator) -> np.ndarray:
        """Rows for an exchange of labels between texts of a kind."""
        rows = np.empty(len(self), dtype=np.intp)
        rows[np.argsort(self.kinds, kind="stable")] = np.lexsort((rng.random(len(self)), self.kinds))
        return rows


class Ranked:
    """Scores sorted once, within each kind of text, so that AUROCs with other labels or weights are quick.

    Args:
        scores: ``(n, m)``.
        kinds: Number of each text's kind, ``(n,)``: only texts of a kind are compared.

    Example:
        >>> ranked = Ranked(np.array([[0.1], [0.4], [0.35], [0.8]]), np.zeros(4, int))
        >>> ranked.auroc(np.array([[False], [False], [True], [True]]))
        array([0.75])
    """

    def __init__(self, scores: np.ndarray, kinds: np.ndarray) -> None:
        n, m = scores.shape
        self.order = np.stack([np.lexsort((scores[:, c], kinds)) for c in range(m)]) if m else np.zeros((0, n), np.intp)
        sizes = np.bincount(kinds)
        # Where the texts of a place's kind begin and end, the same in every column; then where those with an equal score do.
        self.kind = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(np.cumsum(sizes), sizes)
        values, kind = np.take_along_axis(scores.T, self.order, axis=1), kinds[self.order]
        new = np.ones((m, n + 1), dtype=bool)
        new[:, 1:n] = (np.diff(values, axis=1) != 0) | (np.diff(kind, axis=1) != 0)
        at = np.arange(n)
        first = np.maximum.accumulate(np.where(new[:, :n], at, 0), axis=1)
        last = np.minimum.accumulate(np.where(new[:, 1:], at + 1, n)[:, ::-1], axis=1)[:, ::-1]
        self.ties = first, last

    def auroc(self, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """AUROC of each column, ``(m,)``; NaN where nothing can be compared.

        Args:
            positive: Which texts have the label, ``(n, m)`` or ``(n, 1)``.
            weights: How often each text counts, ``(n, m)`` or ``(n, 1)``.
        """
        shape = (self.order.shape[1], self.order.shape[0])
        has = np.take_along_axis(np.broadcast_to(positive, shape).T, self.order, axis=1)
        each = np.ones(has.shape)
        if weights is not None:
            each = np.take_along_axis(np.broadcast_to(weights, shape).T, self.order, axis=1).astype(np.float64)
        below = np.zeros((shape[1], shape[0] + 1))
        np.cumsum(np.where(has, 0.0, each), axis=1, out=below[:, 1:])
        columns, places = np.nonzero(has)
        start = below[columns, self.kind[0][places]]
        equal = (below[columns, self.ties[0][columns, places]] + below[columns, self.ties[1][columns, places]]) / 2
        own = each[columns, places]
        wins = np.bincount(columns, own * (equal - start), minlength=shape[1])
        pairs = np.bincount(columns, own * (below[columns, self.kind[1][places]] - start), minlength=shape[1])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(wins / pairs)


def by_label(bench: Bench, found: Search, mapping: Mapping[str, Sequence[str]], corpus: str) -> Outcome:
    """Findings, a table and figure data from the texts that have labels.

    Args:
        bench: With the vectors that were searched for.
        found: In the corpus.
        mapping: Label to concepts; a label that it lacks stands for the concept of its name.
        corpus: What it is, in words.
    """
    if not found.labelled:
        return untestable(
            CLAIMS.values(), "The corpus has no labels to compare with; its strongest passages are shown all the same."
        )
    texts = _Texts(bench, found, mapping)
    n, many = len(texts), len(texts.labels)
    if many < 2:
        reason = f"{many} labels of the corpus stand for an emotion here and have {FEW} texts: two are needed (see --labels)."
        return untestable(CLAIMS.values(), reason)
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    ranked, plain = Ranked(texts.own, texts.kinds), (~texts.names).astype(np.float64)
    fair = (texts.has & ~texts.names).sum(axis=0) >= FEW

    def both(has: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """AUROC of each label over all texts, then over those that do not name its emotion."""
        unnamed = ranked.auroc(has, plain if weights is None else plain * weights)
        return np.concatenate([ranked.auroc(has, weights), np.where(fair, unnamed, np.nan)])

    def resampled(rows: np.ndarray) -> list[float]:
        values = both(texts.has, np.bincount(rows, minlength=n).astype(np.float64)[:, None])
        return [*values, _mean(values[:many]), _mean(values[many:])]

    *each, whole, unnamed = stats.bootstrap_each(resampled, texts.kinds, **options)
    rng = np.random.default_rng([bench.seed, 3])
    drawn = np.stack([both(texts.has[texts.exchanged(rng)]) for _ in range(bench.draws)])
    value = np.array([estimate.value for estimate in each])
    p = (1 + (drawn[:, :many] >= value[:many] - 1e-12).sum(axis=0)) / (1 + bench.draws)
    q = stats.benjamini_hochberg(p)
    where = f"{n:,} texts with {many} labels of {corpus}; layer {bench.vectors.layer}"
    if texts.left_out:
        where += f"; no emotion, or too few texts: {', '.join(texts.left_out[:8])}{' …' * (len(texts.left_out) > 8)}"

    def exchanged(values: np.ndarray, real: float, kind: str = "labels exchanged between texts") -> Null:
        rest = iter(values)
        options: dict[str, Any] = {"draws": len(values), "side": "greater", "kind": kind}
        return stats.permutation_null(float, real, permute=lambda _: next(rest), **options)

    chance = np.array([_mean(row[:many]) for row in drawn])
    null = exchanged(chance, whole.value)
    findings = [CLAIMS["auroc"].tested(whole, null, whole.low >= CLEAR, f"Mean AUROC over labels; {where}.")]
    if fair.sum() >= 2:
        null = exchanged(np.array([_mean(row[many:]) for row in drawn]), unnamed.value)
        note = f"{int((texts.has & texts.names).sum()):,} texts name the emotion of their label; {int(fair.sum())} labels."
        findings.append(CLAIMS["unnamed"].tested(unnamed, null, unnamed.low >= CLEAR, note))
    else:
        findings.append(CLAIMS["unnamed"].untestable("Almost all texts name the emotion of their label."))
    every = np.stack([Ranked(texts.scores, texts.kinds).auroc(texts.has[:, [k]]) for k in range(many)])
    best = np.array([every[k, texts.indices[k]].max() for k in range(many)])
    rank = 1 + (every > best[:, None]).sum(axis=1)
    if many >= FEW_LABELS:
        findings += [_share(drawn[:, :many], q, exchanged), _own(every, texts, options)]
    else:
        findings += [CLAIMS[id].untestable(f"{many} labels: {FEW_LABELS} are needed.") for id in ("labels", "own")]

    among = np.stack([ranked.auroc(texts.has[:, [k]]) for k in range(many)])
    data = {
        "labels": texts.labels,
        "concepts": [list(own) for own in texts.concepts],
        "texts": texts.has.sum(axis=0).tolist(),
        "auroc": [_round(value[:many]), _round(e.low for e in each[:many]), _round(e.high for e in each[:many])],
        "unnamed": _round(value[many:]),
        "q": _round(q),
        "matrix": [_round(row) for row in among],
    }
    rows = [
        (
            label,
            ", ".join(texts.concepts[k]),
            data["texts"][k],
            float(value[k]),
            f"{each[k].low:.3f} to {each[k].high:.3f}",
            float(value[many + k]) if fair[k] else None,
            float(q[k]),
            int(rank[k]),
            bench.vectors.names[int(every[k].argmax())],
        )
        for k, label in enumerate(texts.labels)
    ]
    head = ("label", "emotions", "texts", "AUROC", "interval", "unnamed", "q", "own rank", "best of all")
    caption = (
        "How often a text with the label reads higher than one without. Unnamed: among texts that do not name the emotion. Own "
        f"rank: of the label's best vector among all {len(bench.vectors)}. q: Benjamini-Hochberg."
    )
    table = Table("labels", "Each label", caption, head, tuple(sorted(rows, key=lambda row: -row[3])))
    raw = {
        "labels": {
            "label": texts.labels,
            "p": p,
            **{f"AUROC {name}": every[:, c] for c, name in enumerate(bench.vectors.names)},
        }
    }
    return Outcome(tuple(findings), (table,), data, raw)


def _share(drawn: np.ndarray, q: np.ndarray, exchanged: Any) -> Finding:
    """Share of labels above chance after correction, against the same share of every exchange."""
    # Of each exchange, its p among all exchanges, corrected as the real ones are.
    ranks = rankdata(-drawn, method="max", axis=0)
    shares = (false_discovery_control(ranks / len(drawn), axis=1) <= ALPHA).mean(axis=1)
    estimate = stats.wilson(int((q <= ALPHA).sum()), len(q))
    note = f"{int((q <= ALPHA).sum())} of {len(q)} labels with AUROC above 0.5 at q <= {ALPHA}."
    return CLAIMS["labels"].tested(estimate, exchanged(shares, estimate.value), estimate.low > 0.5, note)


def _own(every: np.ndarray, texts: _Texts, options: Mapping[str, Any]) -> Finding:
    """Whether a vector of a label is among the three with the highest AUROC on its texts, against those of other labels."""
    third = np.sort(every, axis=1)[:, -3]
    hit = np.stack([(every[:, own] >= third[:, None]).any(axis=1) for own in texts.indices], axis=1)
    n, chance = len(hit), float(hit.mean())
    estimate = stats.wilson(int(hit.diagonal().sum()), n)
    null = stats.permutation_null(
        lambda other: float(hit[np.arange(n), other].mean()),
        estimate.value,
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="emotions exchanged between labels",
        **options,
    )
    note = f"{int(hit.diagonal().sum())} of {n} labels; {every.shape[1]} vectors; vectors of another label: {chance:.2f}."
    return CLAIMS["own"].tested(estimate, null, estimate.low >= chance + GAIN * (1 - chance), note)


def _mean(values: np.ndarray) -> float:
    """Over what could be compared."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _round(values: Iterable[float]) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]


def figures(data: Mapping[str, Any]) -> list[Figure]:
    """AUROC of each label with its interval, and of every label by the emotions of every other."""
    from affectlens.figures import GREY, PALETTE, blank, heat_map, to_figure

    value, low, high = (np.array(part, dtype=float) for part in data["auroc"])
    order = np.argsort(value)
    labels = [f"{label} ({n})" for label, n in zip(data["labels"], data["texts"], strict=True)]
    figure = blank(x="AUROC", height=110 + 21 * len(order), wide=True)
    sure = np.array([q is not None and q <= ALPHA for q in data["q"]])
    for name, symbol, chosen in (("above chance", "circle", sure), ("not above chance", "circle-open", ~sure)):
        rows = [k for k in order if chosen[k]]
        figure.add_scatter(
            x=value[rows],
            y=[labels[k] for k in rows],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (high - value)[rows],
                "arrayminus": (value - low)[rows],
                "thickness": 1.4,
                "width": 0,
                "color": PALETTE[0],
            },
            mode="markers",
            name=name,
            marker={"color": PALETTE[0], "size": 9, "symbol": symbol},
            text=[", ".join(data["concepts"][k]) for k in rows],
            hovertemplate="%{y}: %{text}<br>AUROC %{x:.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=[data["unnamed"][k] for k in order],
        y=[labels[k] for k in order],
        mode="markers",
        name="the same, texts that do not name the emotion",
        marker={"color": PALETTE[1], "size": 8, "symbol": "diamond-open"},
        hovertemplate="%{y}<br>unnamed: AUROC %{x:.3f}<extra></extra>",
    )
    figure.add_vline(x=0.5, line={"color": GREY, "width": 1, "dash": "dash"})
    figure.update_yaxes(
        type="category", showgrid=True, title_text="", categoryorder="array", categoryarray=[labels[k] for k in order]
    )
    caption = (
        "How often a text with the label reads higher on the label's emotions than one without (number of texts in brackets); "
        f"95 % intervals over texts, dashed: chance. From {data['corpus']}."
    )
    matrix = np.array(data["matrix"], dtype=float) - 0.5
    limit = round(float(np.nanmax(np.abs(matrix))), 2)
    across = heat_map(matrix, data["labels"], limit=limit, unit="AUROC above 0.5")
    note = (
        "Texts with a label (row), told from the others by the emotions of each label (column). Red: read higher than the others."
    )
    return [
        to_figure("labels", f"Labels and readings at layer {data['layer']}", caption, figure),
        to_figure("matrix", "Every label by the emotions of every other", note, across),
    ]
