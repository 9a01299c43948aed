"""Is an emotion that a message implies, and nowhere names, read where the model is about to answer?

Declared before any data is seen:

* **Design.** Messages of users, several for each of a few dozen emotions (``scenarios.jsonl``), in our own words: the paper's 12
  messages may not be copied, and its figures stand beside ours for its 12 emotions only. Messages marked ``held_out`` were set
  apart when they were written and are tested apart from the others.
* **Readout.** Cosine of the residual with each direction at the reply position, at the vectors' layer. *Centred* scores subtract
  each direction's mean over the scenarios, because some directions (loving) read high on every message. Targets compete with
  the other emotions that have scenarios.
* **Statistics.** Target first (top 1), among the first three (top 3); the mean cosine of targets minus that of all other pairs.
* **Null.** Targets exchanged between scenarios. For the choice of a layer: the best layer under every exchange.
* **Control.** Random directions with the covariance of the real ones (each a mixture of them with normal weights), scored alike.
* **Intervals.** Rates: Wilson over scenarios. Differences: bootstrap over scenarios within each emotion.
* **Conditions.** A model; six emotions with scenarios and vectors, and two scenarios each on average.

Source: method 7 (paper, Table 2, Fig 2), 23.3 (rows 2, 9, 10).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.engine import Readout, Request
from affectlens.stats import Estimate
from affectlens.studies import ALPHA, REPLY, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.vectors import centred_cosine

NAME = "scenarios"
FEW = 6
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""

_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "top1", "The implied emotion reads highest at the reply position", _RATE, figure="matrix"),
        Claim(NAME, "top3", "The implied emotion is among the three highest readings", _RATE, figure="matrix"),
        Claim(NAME, "held_out", "The same in scenarios that nobody had looked at", _RATE, figure="matrix"),
        Claim(
            NAME,
            "paper",
            "The paper's 12 emotions are among the three highest of 12 by plain cosine",
            _RATE,
            "11 of 12",
            "matrix",
        ),
        Claim(NAME, "diagonal", "Targets read higher than other emotions by plain cosine", _ABOVE, "0.061", "matrix"),
        Claim(NAME, "specific", "The directions do better than random mixtures of them", _ABOVE, figure="matrix"),
        Claim(NAME, "best_layer", "At some layer the implied emotion is among the three highest", _RATE, figure="layers"),
    )
}


def _readout(bench: Bench) -> Readout:
    return Readout(bench.vectors.layers, REPLY, "last")


def _records(bench: Bench) -> list[dict[str, Any]]:
    return [record for record in bench.texts("scenarios") if record["concept"] in bench.vectors]


def centred(scores: np.ndarray) -> np.ndarray:
    """Scores ``(…, scenarios, probes)`` minus each probe's mean over the scenarios.

    Example:
        >>> centred(np.array([[1.0, 5.0], [3.0, 5.0]]))
        array([[-1.,  0.],
               [ 1.,  0.]])
    """
    return np.asarray(scores - scores.mean(axis=-2, keepdims=True))


def _hits(scores: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    return stats.top_k_hits(scores, targets, k=k)


class Scenarios:
    """Implied emotions at the reply position; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Implied emotions"
    question = "Is an emotion that a message only implies read where the model is about to answer?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every scenario, read at its reply position at every layer."""
        if bench.engine is None:
            return ()
        readout = _readout(bench)
        return [bench.ask(record["text"], readout) for record in _records(bench)]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, a table over emotions, and the data of two figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the scenarios with.")
        records = _records(bench)
        names = tuple(dict.fromkeys(record["concept"] for record in records))
        if len(names) < FEW or len(records) < 2 * len(names):
            reason = f"{len(names)} emotions with {len(records)} scenarios: {FEW} emotions with two each are needed."
            return untestable(CLAIMS.values(), reason)
        residuals = np.stack([result.readings[0].values for result in bench.read(self.requests(bench))])
        return _measure(bench, records, names, residuals)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the matrix of mean scores and accuracy over layers; nothing when it was untestable."""
        return _figures(data) if "names" in data else []


def _measure(bench: Bench, records: list[dict[str, Any]], names: tuple[str, ...], residuals: np.ndarray) -> Outcome:
    vectors, options = bench.vectors, {"draws": bench.draws, "seed": bench.seed}
    probes = [vectors.index(name) for name in names]
    targets = np.array([names.index(record["concept"]) for record in records])
    fresh = np.array([bool(record["held_out"]) for record in records])
    row, n = vectors.row(), len(names)
    # (layers, scenarios, probes): the plain cosine of every residual with every direction
    scores = np.stack(
        [
            centred_cosine(
                residuals[:, i], vectors.directions[i, probes].astype(np.float64), np.zeros(vectors.directions.shape[-1])
            )
            for i in range(len(vectors.layers))
        ]
    )
    plain, moved = scores[row], centred(scores)[row]
    where = f"layer {vectors.layer}, {bench.format}"

    def rate(id: str, table: np.ndarray, own: np.ndarray, k: int, note: str) -> Finding:
        hits, chance = _hits(table, own, k), k / table.shape[1]
        null = stats.permutation_null(
            lambda exchanged: float(_hits(table, exchanged, k).mean()),
            float(hits.mean()),
            permute=lambda rng: rng.permutation(own),
            side="greater",
            kind="targets exchanged between scenarios",
            **options,
        )
        estimate = stats.wilson(int(hits.sum()), len(hits))
        note = f"{note}; {len(hits)} scenarios of {table.shape[1]} emotions, chance {chance:.2g}; {where}."
        return CLAIMS[id].tested(estimate, null, estimate.low >= chance + GAIN * (1 - chance), note)

    seen = ~fresh
    findings = [
        rate("top1", centred(plain[seen]), targets[seen], 1, "Centred cosine"),
        rate("top3", centred(plain[seen]), targets[seen], 3, "Centred cosine"),
    ]
    if fresh.any():
        findings.append(rate("held_out", centred(plain[fresh]), targets[fresh], 3, "Top 3, centred on the held-out scenarios"))
    else:
        findings.append(CLAIMS["held_out"].untestable("No scenario is marked as held out."))
    twelve = [i for i, name in enumerate(names) if name in SHOWCASE]
    theirs = np.flatnonzero(np.isin(targets, twelve))
    if len(twelve) == len(SHOWCASE):
        own = np.searchsorted(twelve, targets[theirs])
        findings.append(
            rate("paper", plain[theirs][:, twelve], own, 3, "Plain cosine among the 12; our messages, not the paper's")
        )
    else:
        findings.append(CLAIMS["paper"].untestable(f"{len(twelve)} of the paper's 12 emotions have vectors and scenarios."))
    findings += [_diagonal(plain, targets, where, options), _specific(bench, residuals[:, row], moved, targets, probes, where)]
    findings.append(_best_layer(bench, centred(scores), targets, options))

    every = np.stack([_hits(layer, targets, 3).mean() for layer in centred(scores)])
    intervals = [stats.wilson(int(_hits(layer, targets, 3).sum()), len(targets)) for layer in centred(scores)]
    means = np.stack([moved[targets == c].mean(axis=0) for c in range(n)])
    ranks = 1 + (moved > moved[np.arange(len(targets)), targets][:, None]).sum(axis=1)
    data = {
        "layer": vectors.layer,
        "names": list(names),
        "matrix": [_round(line) for line in means],
        "layers": list(vectors.layers),
        "top3": [_round(every), _round(e.low for e in intervals), _round(e.high for e in intervals)],
        "chance": 3 / n,
    }
    rows = [
        (name, int(own.sum()), float(np.median(ranks[own])), float(means[c, c]), names[int(means[c].argmax())])
        for c, name in enumerate(names)
        if (own := targets == c).any()
    ]
    caption = "Median rank of the target by centred cosine (1 is best), its mean score, and the emotion read highest on average."
    head = ("emotion", "scenarios", "median rank", "own score", "read highest")
    title = f"Each implied emotion at layer {vectors.layer}"
    table = Table("emotions", title, caption, head, tuple(sorted(rows, key=lambda row: row[2])))
    raw = {
        "cosines": {
            "id": [record["id"] for record in records],
            "concept": [record["concept"] for record in records],
            "held_out": fresh.tolist(),
            "rank": ranks.tolist(),
            **{name: plain[:, i] for i, name in enumerate(names)},
        }
    }
    return Outcome(tuple(findings), (table,), data, raw)


def _diagonal(plain: np.ndarray, targets: np.ndarray, where: str, options: Mapping[str, Any]) -> Finding:
    def difference(rows: np.ndarray, own: np.ndarray) -> float:
        mine = plain[rows, own[rows]]
        return float(mine.mean() - (plain[rows].sum() - mine.sum()) / (plain[rows].size - len(rows)))

    every = np.arange(len(targets))
    estimate = stats.bootstrap(lambda rows: difference(rows, targets), targets, **options)
    null = stats.permutation_null(
        lambda own: difference(every, own),
        estimate.value,
        permute=lambda rng: rng.permutation(targets),
        side="greater",
        kind="targets exchanged between scenarios",
        **options,
    )
    mine = plain[every, targets].mean()
    note = f"Mean cosine of targets {mine:.3f} (published 0.065) minus that of all others (published 0.004); {where}."
    return CLAIMS["diagonal"].tested(estimate, null, estimate.low > 0, note)


def _specific(
    bench: Bench, residuals: np.ndarray, moved: np.ndarray, targets: np.ndarray, probes: list[int], where: str
) -> Finding:
    """Top 3 of the real directions against directions that lie in the same space and mean nothing."""
    directions, n = bench.vectors.at()[probes].astype(np.float64), len(probes)
    rng = np.random.default_rng([bench.seed, 7])
    chance = np.empty(bench.draws)
    for draw in range(bench.draws):
        mixed = rng.normal(size=(n, n)) @ directions
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        chance[draw] = _hits(centred(centred_cosine(residuals, mixed, np.zeros(mixed.shape[1]))), targets, 3).mean()
    hits, rest = _hits(moved, targets, 3), iter(chance)
    null = stats.permutation_null(
        float,
        float(hits.mean() - chance.mean()),
        permute=lambda _: next(rest) - chance.mean(),
        draws=bench.draws,
        side="greater",
        kind="random mixtures of the directions",
    )
    whole = stats.wilson(int(hits.sum()), len(hits))
    value, low, high = (float(end - chance.mean()) for end in (whole.value, whole.low, whole.high))
    estimate = Estimate(value, low, high, len(hits))
    note = f"Top 3, {whole.value:.2f}, minus {chance.mean():.2f}, the mean of {bench.draws} sets of random directions; {where}."
    return CLAIMS["specific"].tested(estimate, null, estimate.low > 0, note)


def _best_layer(bench: Bench, scores: np.ndarray, targets: np.ndarray, options: Mapping[str, Any]) -> Finding:
    def accuracy(own: np.ndarray) -> np.ndarray:
        return np.array([_hits(layer, own, 3).mean() for layer in scores])

    best, null = stats.selection_adjusted_null(
        accuracy,
        accuracy(targets),
        permute=lambda rng: rng.permutation(targets),
        side="greater",
        kind="targets exchanged, best of all layers",
        **options,
    )
    hits = _hits(scores[best], targets, 3)
    estimate, chance = stats.wilson(int(hits.sum()), len(hits)), 3 / scores.shape[2]
    layer = bench.vectors.layers[best]
    note = f"Top 3 at layer {layer}, chosen by looking: the value is optimistic, p is corrected; {bench.format}."
    return CLAIMS["best_layer"].tested(estimate, null, estimate.low >= chance + GAIN * (1 - chance), note)


def _round(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


def _figures(data: Mapping[str, Any]) -> list[Figure]:
    from affectlens.figures import heat_map, layer_curves, to_figure

    matrix = heat_map(data["matrix"], data["names"], unit="centred cosine")
    caption = (
        "Mean score of the scenarios of an emotion (row) on each direction (column), minus the direction's mean over scenarios."
    )
    along = layer_curves(
        data["layers"], {"top 3": data["top3"]}, y="target among the first three", chance=data["chance"], mark=data["layer"]
    )
    return [
        to_figure("matrix", f"Implied emotions at layer {data['layer']}", caption, matrix),
        to_figure("layers", "Implied emotions over layers", "Centred cosine, all scenarios; Wilson intervals.", along),
    ]


STUDY = Scenarios()
