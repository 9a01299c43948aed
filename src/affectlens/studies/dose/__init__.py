"""Do the readings move with a quantity as the danger or the luck in it does?

Declared before any data is seen:

* **Design.** Messages of users with a number in them, each with nine or so values (``ladders.jsonl``), in our own words: the
  paper's six sentences may not be copied, and its figures stand beside ours. A ladder says beforehand which readings should rise
  with the number and which should fall. In some ladders a larger number is worse, in others it is better; in control ladders it
  does not matter (a page, a locker), and they declare the probes of the real ones. Values stand as in the file.
* **Readout.** Cosine of the residual with each declared direction at the reply position, at the vectors' layer. It is plain:
  taking away a probe's mean over a ladder would change no trend.
* **Statistics.** Spearman's correlation of the reading with the step, signed so that 1 is as declared: averaged over the probes
  of a ladder, then over ladders. The share of (ladder, probe) pairs with the right sign. The change from the first to the last
  value along the line of least squares over steps: as a cosine, and in standard deviations of the probe over all messages (z).
* **Nulls.** Values that are neighbours give readings that are neighbours, and the probes of a ladder hang together: exchanging
  values within a ladder would be far too generous. So whole ladders are turned round, with all their probes. Beside it:
  declarations exchanged between ladders (is it what the number counts, or its mere size?), and real against control ladders.
* **Control.** Random directions with the covariance of the real ones (mixtures of them with normal weights), one for each probe.
* **Intervals.** Bootstrap over ladders. For the share of signs Wilson's interval over pairs as well, whichever end is wider.
* **Conditions.** A model; six ladders with three values and a vector for a declared emotion; for one emotion alone, five ladders.

The curve over layers is exploratory; its finding is corrected for the choice. Source: method 8 (paper, Fig 3), measured ("What a
135-million-parameter model cannot show").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from affectlens import stats
from affectlens.engine import Readout, Request
from affectlens.studies import ALPHA, REPLY, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.dose.drawing import figures
from affectlens.vectors import centred_cosine

NAME = "dose"
FEW, FEW_OF_ONE, STEPS = 6, 5, 3
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
        Claim(NAME, "signs", "Readings rise and fall with the quantity as declared", _RATE, "11 of 12", "pairs"),
        Claim(NAME, "trend", "They do so step by step (Spearman)", _ABOVE, "0.89", "ladders"),
        Claim(NAME, "size", "From the first to the last value they move as declared", _ABOVE, "0.046", "ladders"),
        Claim(NAME, "afraid", "Afraid follows the danger", _ABOVE, "0.98", "pairs"),
        Claim(NAME, "calm", "Calm goes against the danger", _ABOVE, "0.92", "pairs"),
        Claim(NAME, "meaning", "It is what the number counts that matters, not its size", _ABOVE, figure="pairs"),
        Claim(NAME, "control", "Where the number does not matter there is less of it", _ABOVE, figure="controls"),
        Claim(NAME, "specific", "The directions follow the quantity better than random mixtures of them", _ABOVE, figure="pairs"),
        Claim(NAME, "best_layer", "At some layer readings follow the quantity", _ABOVE, figure="layers"),
    )
}
"""Published numbers are computed from the digitised points of Fig 3: its twelve stated trends, averaged as ours are. Its plotted
points do not show one of them ("sad" falling with a start-up's months of money)."""


@dataclass(frozen=True)
class _Ladder:
    """A ladder: its values in rising order, the columns of its declared probes, 1 or -1 for those that should rise or fall."""

    id: str
    text: str
    values: tuple[float, ...]
    probes: tuple[int, ...]
    signs: tuple[int, ...]
    control: bool
    rows: slice
    """Its messages among those of all ladders."""

    def messages(self) -> list[str]:
        return [self.text.replace("{value}", str(value)) for value in self.values]


def _ladders(bench: Bench) -> list[_Ladder]:
    """Ladders with a declared emotion that has a vector, the control ones last."""
    found: list[_Ladder] = []
    for record in sorted(bench.texts("ladders"), key=lambda record: bool(record["control"])):
        declared = {
            bench.vectors.index(n): s for part, s in (("rise", 1), ("fall", -1)) for n in record[part] if n in bench.vectors
        }
        if declared and len(record["values"]) >= STEPS:
            start, values = found[-1].rows.stop if found else 0, tuple(sorted(record["values"]))
            rows, control = slice(start, start + len(values)), bool(record["control"])
            ladder = _Ladder(record["id"], record["text"], values, tuple(declared), tuple(declared.values()), control, rows)
            found.append(ladder)
    return found


def step_correlation(readings: np.ndarray) -> np.ndarray:
    """Spearman's correlation of readings ``(steps, …)`` with the step; 0 where they do not move.

    Example:
        >>> step_correlation(np.array([[1.0, 5.0], [2.0, 3.0], [9.0, 4.0]]))
        array([ 1. , -0.5])
    """
    ranks = rankdata(readings, axis=0)
    ranks -= ranks.mean(axis=0)
    steps = np.arange(len(ranks)) - (len(ranks) - 1) / 2
    spread = np.sqrt((ranks**2).sum(axis=0) * (steps @ steps))
    return np.asarray(np.tensordot(steps, ranks, axes=1) / np.where(spread > 0, spread, 1.0))


def line_change(readings: np.ndarray) -> np.ndarray:
    """Change of readings ``(steps, …)`` from the first to the last step, along the line of least squares.

    Example:
        >>> line_change(np.array([[1.0], [2.0], [3.0]]))
        array([2.])
    """
    steps = np.arange(len(readings)) - (len(readings) - 1) / 2
    return np.asarray(np.tensordot(steps, readings, axes=1) / (steps @ steps) * (len(steps) - 1))


def _readout(bench: Bench) -> Readout:
    return Readout(bench.vectors.layers, REPLY, "last")


class Dose:
    """Readings on quantity ladders; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Quantity ladders"
    question = "Do readings rise and fall with a number as the danger or the luck in it does?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every ladder with every value, read at its reply position at every layer."""
        if bench.engine is None:
            return ()
        readout = _readout(bench)
        return [bench.ask(message, readout) for ladder in _ladders(bench) for message in ladder.messages()]

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, tables over pairs and over emotions, and the data of four figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the ladders with.")
        ladders = _ladders(bench)
        real = sum(not ladder.control for ladder in ladders)
        if real < FEW:
            reason = f"{real} ladders with {STEPS} values and a vector for a declared emotion: {FEW} are needed."
            return untestable(CLAIMS.values(), reason)
        # (messages, layers, concepts): the plain cosine of every residual with every direction
        directions = bench.vectors.directions.astype(np.float64)
        nothing = np.zeros(directions.shape[-1])
        scores = np.stack(
            [
                np.concatenate(
                    [centred_cosine(x[None], d, nothing) for x, d in zip(result.readings[0].values, directions, strict=True)]
                )
                for result in bench.read(self.requests(bench))
            ]
        )
        return _measure(bench, ladders, scores)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw the ladders, the controls, the pairs and the curve over layers; nothing when it was untestable."""
        return figures(data) if "ladders" in data else []


def _declared(ladder: _Ladder, table: np.ndarray) -> np.ndarray:
    """The entries of the ladder's probes in ``(…, concepts)``, signed so that positive is as declared."""
    return np.asarray(table[..., list(ladder.probes)] * np.array(ladder.signs))


def _measure(bench: Bench, ladders: list[_Ladder], scores: np.ndarray) -> Outcome:
    vectors = bench.vectors
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    real, controls = [x for x in ladders if not x.control], [x for x in ladders if x.control]
    at = scores[:, vectors.row()]
    deviation = np.maximum(at.std(axis=0, ddof=1), 1e-12)
    # (ladders, layers, concepts)
    every = np.stack([step_correlation(scores[ladder.rows]) for ladder in ladders])
    rho, change = every[:, vectors.row()], np.stack([line_change(at[ladder.rows]) for ladder in ladders])
    trends = [_declared(ladder, rho[i]) for i, ladder in enumerate(ladders)]
    own = np.array([trend.mean() for trend in trends])
    sizes = np.array([_declared(ladder, change[i]).mean() for i, ladder in enumerate(ladders)])
    z = np.array([_declared(ladder, change[i] / deviation).mean() for i, ladder in enumerate(ladders)])
    random, chance = _random(bench, ladders, at)
    n, where = len(real), f"layer {vectors.layer}, plain cosine, {bench.format}"

    def turned(values: np.ndarray, observed: float) -> stats.Null:
        return stats.permutation_null(
            lambda signs: float((signs * values).mean()),
            observed,
            permute=lambda rng: rng.choice([-1.0, 1.0], len(values)),
            side="greater",
            kind="whole ladders turned round",
            **options,
        )

    def mean(id: str, values: np.ndarray, note: str) -> Finding:
        estimate = stats.bootstrap(lambda rows: float(values[rows].mean()), len(values), **options)
        return CLAIMS[id].tested(estimate, turned(values, estimate.value), estimate.low > 0, f"{note}; {where}.")

    median = float(np.median(np.abs(np.concatenate(trends[:n]))))
    luck = {
        "random directions": float((np.abs(random[:n]) >= median).mean()),
        "the control ladders": float((np.abs(np.concatenate(trends[n:])) >= median).mean()) if controls else None,
    }
    as_large = " and ".join(f"{share:.0%} of {who}" for who, share in luck.items() if share is not None)
    findings = [
        _signs(trends[:n], where, options),
        mean("trend", own[:n], f"{n} ladders; |rho| reaches {median:.2f}, the median of declared pairs, for {as_large}"),
        mean("size", sizes[:n], f"Change in cosine, {z[:n].mean():+.2f} standard deviations over all messages"),
    ]
    for name in ("afraid", "calm"):
        i = vectors.index(name) if name in vectors else -1
        values = np.array([s * rho[k, i] for k, x in enumerate(real) for p, s in zip(x.probes, x.signs, strict=True) if p == i])
        if len(values) < FEW_OF_ONE:
            reason = f"{len(values)} ladders declare {name}: {FEW_OF_ONE} are needed."
            findings.append(CLAIMS[name].untestable(reason))
        else:
            findings.append(mean(name, values, f"{(values > 0).sum()} of {len(values)} ladders with the right sign"))
    findings.append(_meaning(real, rho[:n], where, options))
    findings.append(_control(own, n, where, options))
    findings.append(_specific(own[:n], chance, where, options))
    along = np.stack([_declared(ladder, every[i]).mean(axis=-1) for i, ladder in enumerate(ladders)])
    findings.append(_best_layer(bench, along[:n], options))

    data, pairs = _data(bench, ladders, at / deviation, trends, random, along, n, options)
    raw: dict[str, dict[str, Sequence[Any]]] = {
        "readings": {
            "ladder": [ladder.id for ladder in ladders for _ in ladder.values],
            "control": [ladder.control for ladder in ladders for _ in ladder.values],
            "value": [float(value) for ladder in ladders for value in ladder.values],
            **{vectors.names[i]: at[:, i].tolist() for i in sorted({i for ladder in ladders for i in ladder.probes})},
        }
    }
    tables = (
        _pairs_table(bench, ladders, trends, change, deviation, pairs),
        _emotions_table(bench, real, rho, change / deviation),
    )
    return Outcome(tuple(findings), tables, data, raw)


def _random(bench: Bench, ladders: Sequence[_Ladder], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What random directions do on the ladders.

    A mixture of directions needs no residual: its cosine is the mixture of theirs, over its own length.

    Returns:
        Their correlations with the step ``(ladders, draws)``, one direction a draw; and the mean signed correlation over the real
        ladders ``(draws,)`` when in each draw a random direction stands for every probe.
    """
    directions = bench.vectors.at().astype(np.float64)
    gram, used = directions @ directions.T, sorted({i for ladder in ladders for i in ladder.probes})
    rng = np.random.default_rng([bench.seed, 8])
    weights = rng.normal(size=(len(directions), bench.draws, len(used)))
    length = np.sqrt(np.einsum("idk,idk->dk", weights, np.tensordot(gram, weights, axes=1)))
    mixed = np.tensordot(scores, weights, axes=1) / length
    rho = np.stack([step_correlation(mixed[ladder.rows]) for ladder in ladders])  # (ladders, draws, probes)
    column = {i: k for k, i in enumerate(used)}
    real = [
        (rho[i][:, [column[p] for p in ladder.probes]] * np.array(ladder.signs)).mean(axis=1)
        for i, ladder in enumerate(ladders)
        if not ladder.control
    ]
    return rho[:, :, 0], np.mean(real, axis=0)


def _signs(trends: Sequence[np.ndarray], where: str, options: Mapping[str, Any]) -> Finding:
    """Share of pairs with the right sign. Turning a ladder round turns all its pairs."""
    right, wrong = np.array([(t > 0).sum() for t in trends]), np.array([(t < 0).sum() for t in trends])
    pairs = np.array([len(trend) for trend in trends])
    over_ladders = stats.bootstrap(lambda rows: float(right[rows].sum() / pairs[rows].sum()), len(trends), **options)
    estimate = stats.wilson(int(right.sum()), int(pairs.sum()))
    low, high = max(0.0, min(estimate.low, over_ladders.low)), min(1.0, max(estimate.high, over_ladders.high))
    estimate = stats.Estimate(estimate.value, low, high, estimate.n)
    null = stats.permutation_null(
        lambda turned: float(np.where(turned, wrong, right).sum() / pairs.sum()),
        estimate.value,
        permute=lambda rng: rng.random(len(trends)) < 0.5,
        side="greater",
        kind="whole ladders turned round",
        **options,
    )
    note = f"{right.sum()} of {pairs.sum()} pairs in {len(trends)} ladders, chance 0.5; {where}."
    return CLAIMS["signs"].tested(estimate, null, estimate.low >= 0.5 + GAIN * 0.5, note)


def _meaning(real: Sequence[_Ladder], rho: np.ndarray, where: str, options: Mapping[str, Any]) -> Finding:
    """A ladder by its own declaration against by those of others: takes away what numbers do to a probe by size alone."""
    table = np.array([[_declared(other, rho[i]).mean() for other in real] for i in range(len(real))])

    def difference(rows: np.ndarray, declarations: np.ndarray) -> float:
        mine, others = table[rows, declarations], table[np.ix_(rows, declarations)]
        apart = rows[:, None] != declarations  # a ladder that was drawn twice is not another one
        return float(mine.mean() - others[apart].mean())

    every = np.arange(len(real))
    estimate = stats.bootstrap(lambda rows: difference(rows, rows), len(real), **options)
    whole = float(table[~np.eye(len(real), dtype=bool)].mean())
    null = stats.permutation_null(
        lambda exchanged: float(table[every, exchanged].mean() - whole),
        estimate.value,
        permute=lambda rng: rng.permutation(len(real)),
        side="greater",
        kind="declarations exchanged between ladders",
        **options,
    )
    note = f"Mean signed rho by a ladder's own declaration minus {whole:+.2f} by those of the other ladders; {where}."
    return CLAIMS["meaning"].tested(estimate, null, estimate.low > 0, note)


def _control(own: np.ndarray, n: int, where: str, options: Mapping[str, Any]) -> Finding:
    group = np.arange(len(own)) < n
    if (~group).sum() < 2:
        return CLAIMS["control"].untestable(f"{(~group).sum()} control ladders: two are needed.")

    def difference(values: np.ndarray, first: np.ndarray) -> float:
        return float(values[first].mean() - values[~first].mean())

    estimate = stats.bootstrap(lambda rows: difference(own[rows], group), group, **options)
    null = stats.permutation_null(
        lambda exchanged: difference(own, exchanged),
        estimate.value,
        permute=lambda rng: rng.permutation(group),
        side="greater",
        kind="real and control ladders exchanged",
        **options,
    )
    note = f"Mean signed rho of {n} ladders minus {own[~group].mean():+.2f}, that of {(~group).sum()} control ladders; {where}."
    return CLAIMS["control"].tested(estimate, null, estimate.low > 0, note)


def _specific(own: np.ndarray, chance: np.ndarray, where: str, options: Mapping[str, Any]) -> Finding:
    middle, rest = float(chance.mean()), iter(chance)
    estimate = stats.bootstrap(lambda rows: float(own[rows].mean()) - middle, len(own), **options)
    null = stats.permutation_null(
        float,
        estimate.value,
        permute=lambda _: next(rest) - middle,
        draws=len(chance),
        side="greater",
        kind="random mixtures of the directions",
    )
    note = (
        f"Mean signed rho, {own.mean():.2f}, minus {middle:+.2f}, the mean of {len(chance)} sets of random directions; {where}."
    )
    return CLAIMS["specific"].tested(estimate, null, estimate.low > 0, note)


def _best_layer(bench: Bench, along: np.ndarray, options: Mapping[str, Any]) -> Finding:
    best, null = stats.selection_adjusted_null(
        lambda signs: signs @ along / len(along),
        along.mean(axis=0),
        permute=lambda rng: rng.choice([-1.0, 1.0], len(along)),
        side="greater",
        kind="whole ladders turned round, best of all layers",
        **options,
    )
    estimate = stats.bootstrap(lambda rows: float(along[rows, best].mean()), len(along), **options)
    layer = bench.vectors.layers[best]
    note = f"Mean signed rho at layer {layer}, chosen by looking: the value is optimistic, p is corrected; {bench.format}."
    return CLAIMS["best_layer"].tested(estimate, null, estimate.low > 0, note)


# ── tables and data ──


def _data(
    bench: Bench,
    ladders: Sequence[_Ladder],
    z: np.ndarray,
    trends: Sequence[np.ndarray],
    random: np.ndarray,
    along: np.ndarray,
    n: int,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], list[float]]:
    """What the figures need, and of each pair how often a random direction follows the ladder as well as its probe."""
    names = bench.vectors.names
    plain, pairs = [], []
    for i, ladder in enumerate(ladders):
        moved = z[ladder.rows] - z[ladder.rows].mean(axis=0)
        # A direction and its opposite are equally random: both are counted, so that the band is symmetric.
        both = np.concatenate([random[i], -random[i]])
        pairs += [float((1 + (both >= trend - 1e-12).sum()) / (1 + len(both))) for trend in trends[i]]
        plain.append(
            {
                "id": ladder.id,
                "control": ladder.control,
                "values": list(ladder.values),
                "probes": [
                    {"name": names[p], "rises": sign > 0, "z": _round(moved[:, p]), "rho": round(float(rho), 4)}
                    for p, sign, rho in zip(ladder.probes, ladder.signs, trends[i], strict=True)
                ],
                "band": round(float(np.quantile(both, 0.975)), 4),
            }
        )
    curves = {}
    for name, part in (("ladders", along[:n]), ("control ladders", along[n:])):
        if len(part) > 1:
            each = _means(part, options)
            curves[name] = [_round(e.value for e in each), _round(e.low for e in each), _round(e.high for e in each)]
    return {"layer": bench.vectors.layer, "layers": list(bench.vectors.layers), "ladders": plain, "curves": curves}, pairs


def _pairs_table(
    bench: Bench,
    ladders: Sequence[_Ladder],
    trends: Sequence[np.ndarray],
    change: np.ndarray,
    deviation: np.ndarray,
    p: Sequence[float],
) -> Table:
    q, rows = iter(stats.benjamini_hochberg(p)), []
    for i, ladder in enumerate(ladders):
        for probe, sign, trend in zip(ladder.probes, ladder.signs, trends[i], strict=True):
            moved = float(change[i, probe] / deviation[probe])
            first, last = ladder.values[0], ladder.values[-1]
            head = (ladder.id, f"{first:g} to {last:g}", bench.vectors.names[probe], "rise" if sign > 0 else "fall")
            per_step = moved / (len(ladder.values) - 1)
            rows.append((*head, "yes" if trend > 0 else "no", float(sign * trend), per_step, moved, float(next(q))))
    caption = (
        "Spearman's rho with the step; slope and whole change of the fitted line in standard deviations of the probe over all "
        "messages; q: how often a random direction follows this ladder as well in the declared direction, after Benjamini and "
        "Hochberg. A pair has no interval: the steps of one sentence are not a sample. Control ladders stand last."
    )
    columns = ("ladder", "values", "emotion", "declared", "as declared", "rho", "slope per step (z)", "change (z)", "q")
    return Table("pairs", f"Every declared pair at layer {bench.vectors.layer}", caption, columns, tuple(rows))


def _emotions_table(bench: Bench, real: Sequence[_Ladder], rho: np.ndarray, z: np.ndarray) -> Table:
    declared: dict[int, list[tuple[float, float]]] = {}
    for i, ladder in enumerate(real):
        for probe, sign in zip(ladder.probes, ladder.signs, strict=True):
            steps = len(ladder.values) - 1
            declared.setdefault(probe, []).append((sign * rho[i, probe], sign * z[i, probe] / steps))
    rows = []
    for probe, found in sorted(declared.items(), key=lambda item: -len(item[1])):
        values = np.array(found)
        if len(values) > 1:
            each = _means(values, {"draws": bench.draws, "seed": bench.seed})
            rows.append((bench.vectors.names[probe], len(values), int((values[:, 0] > 0).sum()), *map(_interval, each)))
    caption = (
        "Emotions declared in two ladders or more: mean signed rho, and mean signed slope in standard deviations a step, with "
        "bootstrap intervals over ladders."
    )
    columns = ("emotion", "ladders", "right sign", "signed rho", "signed slope (z)")
    return Table("emotions", f"Each emotion over its ladders at layer {bench.vectors.layer}", caption, columns, tuple(rows))


def _means(values: np.ndarray, options: Mapping[str, Any]) -> list[stats.Estimate]:
    """Mean of each column over its rows, with a bootstrap interval."""
    return stats.bootstrap_each(lambda rows: values[rows].mean(axis=0), len(values), **options)


def _interval(e: stats.Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


STUDY = Dose()
