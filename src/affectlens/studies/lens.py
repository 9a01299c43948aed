"""Logit lens: does a direction promote the words that name its concept?

Declared before any data is seen:

* **Readout.** ``direction x mean residual norm of its layer`` through the model's own final norm and unembedding. The paper does
  not say whether the norm is applied; applied, it is what the model itself would do with such a residual.
* **Own tokens.** Tokens whose text, stripped and in lower case, equals one of the concept's forms or begins one: with four
  letters at least, more than half of the form ("desper"), and no other concept's form beginning so ("dist", "hope" for hopeful).
  "More than half" and "no other" were tightened after a look at one small model (SmolLM2-135M, 241 stories), whose list of own
  tokens had "cont" for contemptuous in it: that model's result is not confirmatory, those of others are.
* **Statistics.** The logits are turned into z-scores over the vocabulary. A concept's *lift* is the largest z of its own tokens;
  its *percentile* is the share of the vocabulary below that token; its AUROC compares all own tokens with all others.
* **Null.** Isotropic random directions of equal length, read at the same own tokens: they share what the unembedding does to
  every direction (frequent tokens, many own tokens). A concept's p is the share of them with at least its lift, corrected over
  concepts (Benjamini and Hochberg).
* **Control.** Directions exchanged between concepts: any emotional direction may promote any emotional word; only the right
  direction should promote the right one.
* **Intervals.** Over concepts (bootstrap); the directions are taken as given.
* **Conditions.** An engine, and three concepts with own tokens. The layer is the vectors' own; others are drawn, not tested.

Source: method 6 (paper, Table 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE, Concept
from affectlens.engine import Request
from affectlens.stats import Estimate, Null
from affectlens.studies import Bench, Figure, Finding, Outcome, Table, Verdict

NAME = "lens"
ALPHA = 0.05
FEW = 3
PREFIX = 4
PERCENTILE, AUROC, SHARE = 95.0, 0.75, 0.5
"""What the lower end of the interval must reach for the percentile, the AUROC and the share of concepts to hold."""
CURVE = 6
"""Layers on the curve, evenly spaced."""
BATCH = 64

_RULE = "holds: p <= {} and the lower end of the interval is at least {}; weak: p <= {} only; fails: otherwise"
CLAIMS: dict[str, tuple[str, str]] = {
    "percentile": ("Directions promote a word for their concept above almost all others", _RULE.format(ALPHA, PERCENTILE, ALPHA)),
    "share": ("Directions promote words for their concept more than random directions do", _RULE.format(ALPHA, SHARE, ALPHA)),
    "auroc": ("All words for a concept read higher than the rest of the vocabulary", _RULE.format(ALPHA, AUROC, ALPHA)),
    "own_direction": (
        "Words for a concept are promoted by its own direction more than by those of other concepts",
        f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise",
    ),
}


def own_tokens(concept: Concept, vocabulary: Sequence[str], *, others: Iterable[Concept] = ()) -> list[int]:
    """Token ids that write a concept or the beginning of it.

    Args:
        concept: Its ``forms`` are looked for.
        vocabulary: Text of each token; space marks (U+0120, U+2581) and case do not matter.
        others: Concepts whose forms make a common beginning ambiguous.

    Returns:
        Ids, in order. Source: the pieces in the paper's Table 1 (method 6).

    Example:
        >>> own_tokens(Concept("desperate", ""), ["\u0120desper", "desk", " Desperate", "des"])
        [0, 2]
    """
    taken = {form[:end] for other in others for form in _forms(other) for end in range(1, len(form) + 1)}
    return _own(concept, _by_text(vocabulary), taken)


def _forms(concept: Concept) -> set[str]:
    return {form.lower() for form in concept.forms}


def _beginnings(concept: Concept) -> set[str]:
    return {form[:end] for form in _forms(concept) for end in range(max(PREFIX, len(form) // 2 + 1), len(form))}


def _by_text(vocabulary: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, token in enumerate(vocabulary):
        found.setdefault(token.strip("\u0120\u2581 \t\r\n").lower(), []).append(i)
    return found


def _own(concept: Concept, by_text: Mapping[str, list[int]], taken: Container[str]) -> list[int]:
    texts = _forms(concept) | {beginning for beginning in _beginnings(concept) if beginning not in taken}
    return sorted(i for text in texts for i in by_text.get(text, []))


def _read(bench: Bench, directions: np.ndarray, own: Sequence[Sequence[int]]) -> np.ndarray:
    """Lift, percentile and AUROC ``(directions, concepts, 3)`` of every concept's own tokens under every direction."""
    assert bench.engine is not None
    out = np.empty((len(directions), len(own), 3))
    each = np.concatenate([np.asarray(ids) for ids in own])
    starts = np.cumsum([0, *(len(ids) for ids in own)])[:-1]
    counts = np.array([len(ids) for ids in own])
    for start in range(0, len(directions), BATCH):
        logits = np.asarray(bench.engine.unembed(directions[start : start + BATCH].astype(np.float32)), dtype=np.float32)
        z = (logits - logits.mean(axis=1, keepdims=True)) / np.maximum(logits.std(axis=1, keepdims=True), 1e-30)
        for row, values in enumerate(z, start):
            mine, ordered = values[each], np.sort(values)
            below = (ordered.searchsorted(mine, "left") + ordered.searchsorted(mine, "right")) / 2  # of ties one half
            out[row, :, 0] = np.maximum.reduceat(mine, starts)
            out[row, :, 1] = 100 * np.maximum.reduceat(below, starts) / len(values)
            wins = np.add.reduceat(below, starts) - counts**2 / 2  # minus the comparisons among own tokens
            out[row, :, 2] = wins / (counts * (len(values) - counts))
    return out


class Lens:
    """Words that directions promote; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Logit lens"
    question = "Does each direction promote the words that name its concept?"
    version = 2
    uses: tuple[str, ...] = ()

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing: the lens asks for no text."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``; ``draws`` is the number of random directions and of resamples.

        Returns:
            Findings, a table of promoted tokens, one of own tokens, and the data of two figures; as raw values every concept's
            own tokens with their numbers, and the lift of all own tokens under all directions.
        """
        if bench.engine is None:
            return _nothing("There is no engine: the lens reads through the model's own final norm and unembedding.")
        by_text = _by_text(bench.engine.vocabulary)
        # How many concepts have a form that begins so: an own beginning is taken when there are two.
        begins = Counter(
            text for c in bench.concepts for text in {form[:end] for form in _forms(c) for end in range(PREFIX, len(form) + 1)}
        )
        taken = {text for text, count in begins.items() if count > 1}
        known = [name for name in _ordered(bench.vectors.names) if name in bench.concepts]
        own = {name: ids for name in known if (ids := _own(bench.concepts[name], by_text, taken))}
        if len(own) < FEW:
            return _nothing(f"{len(own)} concepts have a token that writes them: {FEW} are needed.")
        return _measure(bench, own)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the lift of each concept against random directions, and the percentile over layers."""
        return _figures(data) if "concepts" in data else []


def _ordered(names: Sequence[str]) -> list[str]:
    return [name for name in SHOWCASE if name in names] + [name for name in names if name not in SHOWCASE]


def _nothing(reason: str) -> Outcome:
    findings = (Finding(NAME, id, claim, None, None, None, "untestable", rule, reason) for id, (claim, rule) in CLAIMS.items())
    return Outcome(tuple(findings), (), {"reason": reason})


_SEEN = " Which tokens count as own was tightened after a look at SmolLM2-135M: there this is exploratory."
"""Belongs to every tested finding: a reader of the report does not see the docstring."""


def _finding(id: str, estimate: Estimate, null: Null, needed: float, note: str) -> Finding:
    verdict: Verdict = "fails"
    if null.p <= ALPHA:
        verdict = "holds" if estimate.low >= needed else "weak"
    figure = {"percentile": "layers", "auroc": ""}.get(id, "lift")  # the AUROC stands in the table only
    return Finding(NAME, id, CLAIMS[id][0], estimate, null, None, verdict, CLAIMS[id][1], note + _SEEN, figure)


def _measure(bench: Bench, own: Mapping[str, list[int]]) -> Outcome:
    assert bench.engine is not None
    vectors = bench.vectors
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    names, tokens, n = list(own), list(own.values()), len(own)
    columns = [vectors.index(name) for name in names]

    def directions(layer: int) -> np.ndarray:
        return vectors.at(layer)[columns] * vectors.residual_norms[vectors.row(layer)]

    every = _read(bench, directions(vectors.layer), tokens)  # (directions, concepts, 3)
    real = every[np.arange(n), np.arange(n)]
    rng = np.random.default_rng([bench.seed, 3])
    random = rng.normal(size=(bench.draws, directions(vectors.layer).shape[1]))
    random *= vectors.residual_norms[vectors.row()] / np.linalg.norm(random, axis=1, keepdims=True)
    chance = _read(bench, random, tokens)  # (draws, concepts, 3)
    p = (1 + (chance[:, :, 0] >= real[:, 0]).sum(axis=0)) / (1 + len(chance))
    q = stats.benjamini_hochberg(p)
    thresholds = np.quantile(chance[:, :, 0], 0.95, axis=0)
    above, above_by_chance = real[:, 0] > thresholds, chance[:, :, 0] > thresholds
    where = f"{n} of {len(vectors)} concepts have tokens of their own; layer {vectors.layer}"

    def against_random(drawn: np.ndarray, observed: float, reduce: Callable[[np.ndarray], Any] = np.mean) -> Null:
        """Every concept gets a random direction of its own: one for all would make concepts move together."""
        return stats.permutation_null(
            lambda rows: float(reduce(drawn[rows, np.arange(n)])),
            observed,
            permute=lambda rng: rng.integers(0, len(drawn), size=n),
            side="greater",
            kind="random directions",
            **options,
        )

    def median(values: np.ndarray) -> Estimate:
        return stats.bootstrap(lambda index: float(np.median(values[index])), n, **options)

    middle = median(real[:, 1])
    null = against_random(chance[:, :, 1], middle.value, np.median)
    findings = [_finding("percentile", middle, null, PERCENTILE, f"Median over concepts, best own token; {where}.")]
    rate = stats.wilson(int(above.sum()), n)
    note = f"Share of concepts above 95 % of random directions; {int((q <= ALPHA).sum())} with q <= {ALPHA}; {where}."
    findings.append(_finding("share", rate, against_random(above_by_chance, rate.value), SHARE, note))
    area = stats.bootstrap(lambda index: float(real[index, 2].mean()), n, **options)
    findings.append(_finding("auroc", area, against_random(chance[:, :, 2], area.value), AUROC, f"Mean over concepts; {where}."))
    # Lift of each concept's tokens under each direction, minus the mean under all other directions.
    lift = every[:, :, 0]
    gains = lift - (lift.sum(axis=0) - lift) / (n - 1)
    others = np.diagonal(lift - gains)
    gain = stats.bootstrap(lambda index: float(gains[index, index].mean()), n, **options)
    null = stats.permutation_null(
        lambda order: float(gains[order, np.arange(n)].mean()),
        gain.value,
        permute=lambda rng: rng.permutation(n),
        side="greater",
        kind="directions exchanged between concepts",
        **options,
    )
    note = f"Lift (z over the vocabulary) under the own direction minus the mean under the others; {where}."
    findings.append(_finding("own_direction", gain, null, np.nextafter(0, 1), note))
    some = np.unique(np.linspace(0, len(vectors.layers) - 1, CURVE).round().astype(int))
    layers = sorted({vectors.layer, *(vectors.layers[i] for i in some)})
    curve = [median(np.diagonal(_read(bench, directions(layer), tokens)[:, :, 1])) for layer in layers]
    words = bench.engine.vocabulary
    top = vectors.top_tokens(bench.engine, _ordered(vectors.names))
    rows = []
    for c, name in enumerate(names):
        numbers = [*real[c], *np.quantile(chance[:, c, 0], (0.5, 0.95)), p[c], q[c], others[c]]
        rows.append([name, _shown(words[i] for i in own[name][:6]), *_round(numbers)])
    data = {
        "layer": vectors.layer,
        "concepts": rows,
        "tokens": [[name, _shown(up), _shown(down)] for name, (up, down) in top.items()],
        "layers": layers,
        "curve": [_round(getattr(e, end) for e in curve) for end in ("value", "low", "high")],
        # A norm that divides by the length makes random directions alike at every layer: one level serves the whole curve.
        "chance": round(float(np.median(chance[:, :, 1])), 3),
    }
    raw: dict[str, dict[str, Any]] = {
        "concepts": {
            "concept": names,
            **dict(zip(("lift", "percentile", "AUROC"), real.T, strict=True)),
            "others": others,
            "p": p,
            "q": q,
        },
        "tokens": {
            "concept": [name for name, ids in own.items() for _ in ids],
            "token": np.concatenate(tokens),
            "text": [words[i] for i in np.concatenate(tokens)],
        },
        "lift": {"direction": names, **{name: lift[:, c] for c, name in enumerate(names)}},
    }
    return Outcome(tuple(findings), _tables(data), data, raw)


def _round(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _shown(tokens: Iterable[str]) -> str:
    """Tokens in a row, with their white space made visible."""
    marks = {" ": "\u2423", "\u0120": "\u2423", "\u2581": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}
    return ", ".join("".join(marks.get(letter, letter) for letter in token) for token in tokens)


def _tables(data: Mapping[str, Any]) -> tuple[Table, ...]:
    promoted = "The five tokens with the highest and with the lowest logit; \u2423 is a space. The paper's twelve come first."
    lifts = (
        "Lift: largest z-score over the vocabulary among the concept's own tokens (six are listed), beside the median and "
        "95 % of random directions of equal length; q is corrected for the number of concepts (Benjamini and Hochberg); "
        "last: the mean lift of the same tokens under the directions of all other concepts."
    )
    head = ("concept", "own tokens", "lift", "percentile", "AUROC", "random", "random 95 %", "p", "q", "other directions")
    promotes, at = ("concept", "up", "down"), f"at layer {data['layer']}"
    return (
        Table("tokens", f"Tokens promoted {at}", promoted, promotes, tuple(map(tuple, data["tokens"]))),
        Table("own", f"Own tokens {at}", lifts, head, tuple(map(tuple, data["concepts"]))),
    )


def _figures(data: Mapping[str, Any]) -> list[Figure]:
    from affectlens.figures import GREY, PALETTE, blank, layer_curves, to_figure

    rows = sorted(data["concepts"], key=lambda row: row[2])
    shown = rows if len(rows) <= 40 else rows[:20] + rows[-20:]
    dots = blank(x="lift (z over the vocabulary)", height=90 + 17 * len(shown)).update_yaxes(type="category", showgrid=False)
    names = [row[0] for row in shown]
    series = (
        (2, "own direction", PALETTE[0], "circle"),
        (9, "other directions, mean", PALETTE[1], "diamond-open"),
        (6, "95 % of random directions", GREY, "line-ns-open"),
    )
    for column, label, color, symbol in series:
        marker = {"color": color, "size": 8, "symbol": symbol}
        dots.add_scatter(x=[row[column] for row in shown], y=names, mode="markers", name=label, marker=marker)
    which = "The 20 lowest and the 20 highest concepts." if len(shown) < len(rows) else "All concepts with tokens of their own."
    curve = {"median percentile": data["curve"]}
    along = layer_curves(data["layers"], curve, y="percentile", chance=data["chance"], mark=data["layer"])
    caption = "Percentile of the best own token in the vocabulary: median over concepts with a 95 % interval over concepts."
    return [
        to_figure("lift", f"How much directions promote their own words at layer {data['layer']}", which, dots),
        to_figure("layers", "Own words over layers", caption, along),
    ]


STUDY = Lens()
