"""What was read before and during acts, and how loud they were: hidden emotion against visible emotion.

Declared before any data is seen:

* **Within arms only.** A steered model's stream holds the push itself, so the swept emotion's own reading differs between arms
  for that reason alone. Episodes with and without the act are compared within arms and cases: the difference is the
  coefficient of the act beside one constant for every arm and one for every case.
* **Before the act** against all words of coherent episodes without it, and **during** the act against before it in the same
  episode. Intervals hold for other episodes (or cases): rows of one episode are not independent.
* **Null.** The contribution of whole episodes (or cases) changes its sign at random.
* **Visible.** How loud acts are (capitals, exclamation marks, interjections) where an emotion gives the most of them, against
  acts without steering; the null exchanges acts between the two (method 16: outbursts against composed cheating).
* **Conditions.** Five acts, and five coherent episodes without; five acts in either arm for loudness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats as distributions

from affectlens import stats
from affectlens.experiments.field import Field
from affectlens.stats import Array, Estimate, Null
from affectlens.studies import Claim, Finding, Table

ENOUGH = 5
"""Acts, and episodes without, that a comparison needs."""

_RULE = "holds: p ≤ 0.05 and the interval excludes 0{way}; weak: p alone."
_READ = {
    ("before", "blackmail", "desperate"): ("higher on prompts with more blackmail", 1),
    ("before", "blackmail", "calm"): ("lower on prompts with more blackmail", -1),
    ("during", "hacking", "desperate"): ("peaks when the shortcut is chosen", 1),
}
"""What is published, and whether a reading is higher or lower then."""

_HEARD = {
    ("hacking", "desperate"): ("no visible emotion at positive strengths", 1, 0),
    ("hacking", "calm"): ("outbursts at negative strengths", -1, 1),
}
"""What is published of loudness, at which end of the sweep, and whether acts are louder there."""


@dataclass(frozen=True)
class Compared:
    """A difference in a reading, with its null; None where there was too little.

    Args:
        estimate, null: Of the difference.
        acts, others: With and without the act, how many had words to read there.
    """

    estimate: Estimate | None
    null: Null | None
    acts: int = 0
    others: int = 0


@dataclass(frozen=True, eq=False)
class Reading:
    """Readings of acts and of episodes without.

    Args:
        field: What was played.
        unit: ``z`` or ``centred cosine``.
        names: Watched emotions.
        before, during: For each of them how far it lies above what is read without the act, and above what was read before it.
        levels: For each emotion and arm the means without the act, before it and during it.
        acts, others: Coherent episodes with and without the act, over all arms.
    """

    field: Field
    unit: str
    names: tuple[str, ...]
    before: Mapping[str, Compared]
    during: Mapping[str, Compared]
    levels: Mapping[str, list[tuple[float, float, float]]]
    acts: int
    others: int

    def findings(self, experiment: str, name: str) -> list[Finding]:
        """The two findings of a swept emotion, when it was watched."""
        if name not in self.names:
            return []
        texts = {
            "before": f"Before the act {name} reads otherwise than in episodes without it",
            "during": f"During the act {name} reads otherwise than before it",
        }
        made = []
        for key, compared in (("before", self.before[name]), ("during", self.during[name])):
            stated, sign = _READ.get((key, experiment, name), (None, 0))
            text = texts[key].replace("otherwise", {1: "higher", -1: "lower", 0: "otherwise"}[sign])
            rule = _RULE.format(way=" on that side" if sign else "")
            claim = Claim(experiment, f"{key}-{name}", text, rule, stated, "readings")
            if compared.estimate is None or compared.null is None:
                there = {"before": "words before the act", "during": "words before and in the act"}[key]
                reason = f"{compared.acts} of {self.acts} acts have {there}"
                reason += f", {compared.others} coherent episodes are without one" if key == "before" else ""
                made.append(claim.untestable(f"Cannot be tested here ({reason}; {ENOUGH} are needed, in three units or more)."))
                continue
            note = "Compared within arms, since the push itself is in what is read."
            if key == "before":
                note += " Cases have a constant each; an act ends what is read before it, so these are the earlier words."
            made.append(_tested(claim, compared.estimate, compared.null, sign, note))
        return made

    def tables(self) -> list[Table]:
        """The comparisons with q over all watched emotions, and the means of every arm."""
        if not self.names:
            return []
        pairs = [(name, key, of[name]) for name in self.names for key, of in (("before", self.before), ("during", self.during))]
        q = stats.benjamini_hochberg([c.null.p if c.null else math.nan for _, _, c in pairs])
        against = {"before": "before the act − without it", "during": "during the act − before it"}
        rows = [
            (name, against[key], _text(c.estimate), _number(c.null.p if c.null else math.nan), _number(float(own)),
             c.estimate and c.estimate.n)
            for (name, key, c), own in zip(pairs, q, strict=True)
        ]  # fmt: skip
        caption = (
            f"Differences in {self.unit}, within arms, with 95 % intervals; {self.acts} acts and {self.others} coherent episodes "
            "without over all arms. p: signs of whole episodes exchanged; q: after Benjamini and Hochberg. Never between arms: "
            "the push itself is in what is read."
        )
        columns = ("emotion", "difference", "here [95 %]", "p", "q", "n")
        tables = [Table("readings", "Readings before and during acts", caption, columns, tuple(rows))]
        each = [
            (lane.id, name, *(round(v, 3) if math.isfinite(v) else None for v in self.levels[name][i]),
             "own: not between arms" if lane.name == name else "")
            for i, lane in enumerate(self.field.lanes)
            for name in self.names
        ]  # fmt: skip
        caption = (
            f"Means in {self.unit} over coherent episodes: all words of those without the act, the words before and during it."
        )
        head = ("arm", "emotion", "without the act", "before it", "during it", "")
        return [*tables, Table("readings-arms", "Readings in every arm", caption, head, tuple(each))]

    def data(self) -> dict[str, Any]:
        """For the figures."""

        def plain(c: Compared) -> list[float] | None:
            return None if c.estimate is None else [c.estimate.value, c.estimate.low, c.estimate.high]

        levels = {name: [list(line) for line in self.levels[name]] for name in self.names}
        compared = [{"name": n, "before": plain(self.before[n]), "during": plain(self.during[n])} for n in self.names]
        return {"compared": compared, "levels": levels, "acts": self.acts, "others": self.others}


def readings(field: Field, *, unit: str, seed: int = 0, draws: int = 2000) -> Reading:
    """Compare readings before and during acts with those of episodes without, within arms.

    Args:
        field: What was played; the columns ``before.E`` and ``during.E`` of the watched emotions.
        unit: Of these.
        seed, draws: Behind the nulls.
    """
    names = tuple(name.removeprefix("before.") for name in field.table if name.startswith("before."))
    coherent = field.column("coherent") > 0
    act = np.where(coherent, field.column("act"), np.nan)
    units = np.unique(np.array(field.units), return_inverse=True)[1]
    cases = np.unique(np.array(field.cases), return_inverse=True)[1]
    acts, others = int((act == 1).sum()), int((act == 0).sum())
    before, during, levels = {}, {}, {}
    for name in names:
        early, late = field.column(f"before.{name}"), field.column(f"during.{name}")
        early[(act == 1) & ~np.isfinite(late)] = np.nan  # where the act is not known, it may be in what was read
        before[name] = _beside(early, act, units, cases, unit=unit, seed=seed, draws=draws)
        during[name] = _within(np.where(act == 1, late - early, np.nan), units, unit=unit, seed=seed, draws=draws)
        groups = (np.where(act == 0, early, np.nan), np.where(act == 1, early, np.nan), np.where(act == 1, late, np.nan))
        means = [_columns(group) for group in groups]
        levels[name] = list(zip(*(column.tolist() for column in means), strict=True))
    return Reading(field, unit, names, before, during, levels, acts, others)


def _beside(values: Array, act: Array, units: np.ndarray, cases: np.ndarray, *, unit: str, seed: int, draws: int) -> Compared:
    """The coefficient of the act beside constants of arms and cases."""
    n, k = values.shape
    rows = np.isfinite(values) & np.isfinite(act)
    x, a = values[rows], act[rows]
    acts, others = int((a == 1).sum()), int((a == 0).sum())
    if min(acts, others) < ENOUGH:
        return Compared(None, None, acts, others)
    arm, case, unit_of = (np.broadcast_to(own, (n, k))[rows] for own in (np.arange(k), cases[:, None], units[:, None]))
    constants = np.column_stack([np.eye(k)[arm], np.eye(int(cases.max()) + 1)[case]])
    fitted, *_ = np.linalg.lstsq(constants, np.column_stack([x, a]), rcond=None)
    x_left, a_left = (np.column_stack([x, a]) - constants @ fitted).T
    size = float(a_left @ a_left)
    if size < 1e-9 * len(a):
        return Compared(None, None, acts, others)  # in no arm and case there is an episode of either kind
    value = float(a_left @ x_left) / size
    found = _judged(value, np.column_stack([a, constants]), x, a_left * x_left / size, unit_of, unit=unit, seed=seed, draws=draws)
    return replace(found, acts=acts, others=others)


def _within(values: Array, units: np.ndarray, *, unit: str, seed: int, draws: int) -> Compared:
    """The mean over episodes and arms."""
    known = np.isfinite(values)
    x, unit_of = values[known], np.broadcast_to(units[:, None], values.shape)[known]
    if len(x) < ENOUGH:
        return Compared(None, None, len(x))
    found = _judged(float(x.mean()), np.ones((len(x), 1)), x, x / len(x), unit_of, unit=unit, seed=seed, draws=draws)
    return replace(found, acts=len(x))


def _judged(
    value: float, design: Array, x: Array, parts: Array, units: np.ndarray, *, unit: str, seed: int, draws: int
) -> Compared:
    """The first coefficient of least squares, with its interval and its null.

    The interval comes from leaving out each unit in turn, all constants fitted anew: the jackknife, which few units with
    constants of their own cases need. The null changes the signs of whole units.

    Args:
        value: The coefficient.
        design, x: Of the least squares, ``(rows, p)`` and ``(rows,)``.
        parts: What each row adds to the coefficient.
        units: Of each row.
    """
    codes = np.unique(units, return_inverse=True)[1]
    u = int(codes.max()) + 1
    if u < 3:
        return Compared(None, None)
    square, product, without = design.T @ design, design.T @ x, np.empty(u)
    for i in range(u):
        own, mine = design[codes == i], x[codes == i]
        without[i] = np.linalg.lstsq(square - own.T @ own, product - own.T @ mine, rcond=1e-10)[0][0]
    half = float(distributions.t.ppf(0.975, u - 1)) * math.sqrt((u - 1) * float(without.var()))
    estimate = Estimate(value, value - half, value + half, u, unit=unit if unit == "z" else "")
    summed = np.bincount(codes, weights=parts)
    null = stats.permutation_null(
        lambda signs: float(signs @ summed),
        value,
        permute=lambda rng: rng.choice([-1.0, 1.0], u),
        draws=draws,
        seed=seed,
        kind="signs of whole episodes exchanged",
    )
    return Compared(estimate, null)


@dataclass(frozen=True, eq=False)
class Visible:
    """How loud acts are.

    Args:
        field: What was played.
        loud: For each arm mean, interval and number of acts; nan without any.
        quiet: For each arm the mean of coherent episodes without the act.
        compared: For each swept emotion the number of the arm with the most acts at an end of its sweep, and how its acts differ
            from those of the baseline; a reason where they could not be compared.
    """

    field: Field
    loud: list[tuple[float, float, float, int]]
    quiet: list[float]
    compared: Mapping[str, tuple[int, Compared, str]]

    def finding(self, experiment: str, name: str) -> Finding:
        """Whether acts under a swept emotion sound otherwise than without steering."""
        at, compared, reason = self.compared[name]
        arm = self.field.lanes[at]
        stated, end, sign = _HEARD.get((experiment, name), (None, 0, 0))
        if end * arm.strength <= 0:
            stated, sign = None, 0  # nothing is published of this end
        claim = Claim(
            experiment,
            f"loud-{name}",
            f"Acts where {name} gives the most of them sound {'louder' if sign else 'otherwise'} (capitals, exclamation marks, "
            "interjections) than acts without steering",
            _RULE.format(way=" on that side" if sign else ""),
            stated,
            "visible",
        )
        if compared.estimate is None or compared.null is None:
            return claim.untestable(f"Cannot be tested here ({reason}).")
        note = f"Acts of {arm.id} against those of the baseline, for each 100 words."
        return _tested(claim, compared.estimate, compared.null, sign, note)

    def tables(self) -> list[Table]:
        """Loudness of acts by arm."""
        rows = [
            (
                lane.id,
                n,
                round(value, 2),
                f"{low:.2f} to {high:.2f}" if n > 1 else None,
                round(q, 2) if math.isfinite(q) else None,
            )
            for lane, (value, low, high, n), q in zip(self.field.lanes, self.loud, self.quiet, strict=True)
            if n
        ]
        if not rows:
            return []
        caption = "Capitals, exclamation marks and interjections for each 100 words; Student's interval over acts."
        columns = ("arm", "acts", "loudness of acts", "95 % interval", "without the act")
        return [Table("visible", "Visible emotion of acts", caption, columns, tuple(rows))]

    def data(self) -> list[list[float]]:
        """For the figures: mean, ends and number of acts of each arm."""
        return [list(line) for line in self.loud]


def visible(field: Field, *, seed: int = 0, draws: int = 2000) -> Visible:
    """How loud acts are in every arm, and whether a swept emotion changes that.

    Args:
        field: What was played; the column ``loud``.
        seed, draws: Behind intervals and nulls.
    """
    act, coherent, loudness = field.column("act"), field.column("coherent") > 0, field.column("loud")
    acts = [loudness[(act[:, i] == 1) & np.isfinite(loudness[:, i]), i] for i in range(len(field.lanes))]
    quiet = _columns(np.where((act == 0) & coherent, loudness, np.nan)).tolist()
    loud = []
    for own in acts:
        n, value = len(own), float(own.mean()) if len(own) else math.nan
        half = float(distributions.t.ppf(0.975, n - 1)) * float(own.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        loud.append((value, max(0.0, value - half), value + half, n))
    compared = {}
    baseline = field.where("baseline")[0]
    for name in field.names("concept"):
        ends = [field.sweep(name)[i] for i in (0, -1)]
        arm = max((i for i in ends if i != baseline), key=lambda i: len(acts[i]))
        compared[name] = (arm, *_louder(acts[arm], acts[baseline], seed=seed, draws=draws))
    return Visible(field, loud, quiet, compared)


def _louder(own: Array, plain: Array, *, seed: int, draws: int) -> tuple[Compared, str]:
    if min(len(own), len(plain)) < ENOUGH:
        return Compared(None, None), f"{len(own)} acts there and {len(plain)} in the baseline; {ENOUGH} in either are needed"
    both, group = np.concatenate([own, plain]), np.repeat([True, False], [len(own), len(plain)])
    if not np.ptp(both):
        return Compared(None, None), "no act is loud at all" if not both[0] else "all acts are equally loud"

    def difference(marks: np.ndarray) -> float:
        return float(both[marks].mean() - both[~marks].mean())

    estimate = stats.bootstrap(
        lambda rows: float(both[rows][group].mean() - both[rows][~group].mean()), group, draws=min(draws, 1000), seed=seed
    )
    null = stats.permutation_null(
        difference,
        estimate.value,
        permute=lambda rng: rng.permutation(group),
        draws=draws,
        seed=seed,
        kind="acts exchanged between the arms",
    )
    return Compared(estimate, null), ""


def _tested(claim: Claim, estimate: Estimate, null: Null, sign: int, note: str) -> Finding:
    """A finding; one that goes the other way than published fails."""
    clear = estimate.low > 0 if estimate.value > 0 else estimate.high < 0
    found = claim.tested(estimate, null, clear, note)
    if sign and found.verdict != "fails" and (estimate.value > 0) != (sign > 0):
        return replace(found, verdict="fails", note=f"It goes the other way than published. {note}")
    return found


def _columns(values: Array) -> Array:
    """Means of columns, nan where there is nothing."""
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    return np.where(known, values, 0.0).sum(axis=0) / np.where(counts == 0, np.nan, counts)


def _number(value: float) -> float | None:
    return float(f"{value:.2g}") if math.isfinite(value) else None


def _text(e: Estimate | None) -> str | None:
    return None if e is None else str(e).rpartition(" (")[0]


def course(tokens: Mapping[str, Sequence[Any]], field: Field, names: Sequence[str]) -> dict[str, Any]:
    """Readings over the replies of an episode, of episodes with the act and without; the mean of every arm is taken away.

    Args:
        tokens: Columns ``level``, ``episode``, ``arm``, ``reply``, ``own`` and one for each emotion.
        field: What was played.
        names: The emotions.

    Returns:
        For each emotion and kind of episode the replies with mean and 95 % interval over episodes (or cases), whose arms are
        averaged first; empty when no episode has two.
    """
    place = {lane.id: i for i, lane in enumerate(field.lanes)}
    number = {own: i for i, own in enumerate(field.numbers)}
    sums: dict[tuple[int, int, int], Array] = {}
    columns = [tokens[name] for name in names]
    heads = zip(*(tokens[name] for name in ("level", "episode", "arm", "reply", "own")), strict=True)
    for row, (level, episode, arm, reply, said) in enumerate(heads):
        if said and level == field.level and arm in place and episode in number:
            own = np.array([math.nan if column[row] is None else column[row] for column in columns], dtype=np.float64)
            if np.isfinite(own).all():
                at = (number[episode], place[arm], int(reply))
                sums[at] = sums.get(at, np.zeros(len(names) + 1)) + np.append(own, 1.0)
    if len({reply for _, _, reply in sums}) < 2:
        return {}
    means = {at: total[:-1] / total[-1] for at, total in sums.items()}
    centre = {i: np.mean([own for (_, arm, _), own in means.items() if arm == i], axis=0) for i in {arm for _, arm, _ in means}}
    act, codes = field.column("act"), field.codes
    out: dict[str, Any] = {name: {} for name in names}
    for kind, wanted in (("with the act", 1.0), ("without it", 0.0)):
        for reply in sorted({reply for _, _, reply in means}):
            of: dict[int, list[Array]] = {}
            for (e, arm, r), own in means.items():
                if r == reply and act[e, arm] == wanted:
                    of.setdefault(int(codes[e]), []).append(own - centre[arm])
            if len(of) < ENOUGH:
                continue
            values = np.array([np.mean(rows, axis=0) for rows in of.values()])
            half = distributions.t.ppf(0.975, len(of) - 1) * values.std(axis=0, ddof=1) / math.sqrt(len(of))
            for j, name in enumerate(names):
                middle = float(values[:, j].mean())
                line = [reply, middle, middle - float(half[j]), middle + float(half[j])]
                out[name].setdefault(kind, []).append(line)
    return out
