"""Is a thing described through the emotion that is added to its words, and how much of the thing is left?

Declared before any data is seen:

* **Design.** Activities (``activities.jsonl``), one of each category, are asked about while the tokens of the activity alone are
  steered: "How does it feel?" with an answer begun, and "Describe it". Up to twelve emotions, the published ones where they have
  vectors.
* **Strengths.** The calibrated one (as in the study of continuations), and the published 0.1, 0.3 and 0.5. Findings are of the
  calibrated one.
* **Statistics.** Change of the log-probability of the emotion's own word behind the begun answer, minus the mean change of the
  others (``word``); rank of the own word's change among all words, mean (``rank``). Of the description, read again without
  steering in its context: score of the emotion, minus that of the plain description, against the others' (``tone``). Words
  of the activity that come back in the description, at the calibrated strength as a share of those without (``content``).
* **Control.** ``word``: random directions of the same length at the same tokens.
* **Nulls.** Every emotion gets a random direction; ``rank`` and ``tone``: words or descriptions exchanged between emotions;
  ``content``: steered and plain descriptions of an activity exchanged.
* **Intervals.** Bootstrap over emotions, for ``content`` over activities.
* **Conditions.** A model; calibrated vectors with a safe strength above 0; six emotions; four activities.

Source: method 9 (paper, Tables 10 and 11): at 0.1 a description is nearly unchanged, at 0.3 the task is understood through the
emotion, at 0.5 its content is increasingly lost.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.concepts import SHOWCASE
from affectlens.effects import along, distinct, random_directions, specific
from affectlens.engine import Request, Sampling, Steering, Where
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable

NAME = "description"
FEW, ACTIVITIES = 6, 8
FEW_ACTIVITIES = 4
PUBLISHED = (0.1, 0.3, 0.5)
CONTROLS, TOKENS = 24, 40
KEPT = 0.7
"""Of the content of a plain description so much must be left, at the lower end of the interval, to be called kept."""

_BEYOND = (
    f"holds: p <= {ALPHA} and the interval above 0 and above the band of the control; weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_LOW = f"holds: p <= {ALPHA} and the interval below that of chance; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "word", "An activity whose words are steered is said to feel as the emotion does", _BEYOND, figure="doses"),
        Claim(NAME, "rank", "Among all emotions' words the own one gains most", _LOW, figure="doses"),
        Claim(NAME, "tone", "Its description takes on the tone of the emotion", _ABOVE, "at 0.3", "doses"),
        Claim(
            NAME, "content", "Inside the safe range the description is still of the activity",
            f"holds: the interval above {KEPT:g} times the plain one; fails: otherwise", "lost at 0.5", "doses",
        ),
    )
}  # fmt: skip


class Description:
    """Descriptions under steering; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Descriptions under steering"
    question = "Is a thing described through the emotion that is added to its words, and how much of the thing is left?"
    version = 1
    uses: tuple[str, ...] = ("texts", "calibration")

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing beforehand: what is steered depends on the calibration."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine`` and calibrated vectors.

        Returns:
            Findings, a table of descriptions, the data of one figure.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to steer.")
        if (found := bench.vectors.calibration) is None:
            return untestable(CLAIMS.values(), "The vectors are not calibrated: run the study calibration with this one.")
        names = tuple(name for name in SHOWCASE if name in bench.vectors)
        names = names if len(names) >= FEW else bench.vectors.names[: len(SHOWCASE)]
        names = names[::2] if bench.quick and len(names) >= 2 * FEW else names
        activities = _activities(bench)
        for what, n, least in (("emotions", len(names), FEW), ("activities", len(activities), FEW_ACTIVITIES)):
            if n < least:
                return untestable(CLAIMS.values(), f"{n} {what}: {least} are needed.")
        strength = round(float(np.median([found.strength(name) for name in names])), 4)
        if strength <= 0:
            return untestable(CLAIMS.values(), f"At layer {found.layer} no strength is safe for half of the emotions.")
        return _measure(_Asked(bench, names, activities, found.layer), strength)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw what each strength does to word, tone and content; nothing when it was untestable."""
        if "strengths" not in data:
            return []
        from affectlens.figures import GREY, panels, to_figure

        grid = panels(["own word minus others", "tone minus others'", "content left"], columns=3, height=340)
        for column, key in enumerate(("word", "tone", "content"), 1):
            grid.add_scatter(
                x=data["strengths"], y=data[key], mode="lines+markers", name=key, showlegend=False, row=1, col=column
            )
        grid.add_vline(x=data["strength"], line={"color": GREY, "dash": "dash", "width": 1})
        grid.update_xaxes(title_text="strength at the activity's tokens")
        text = (
            "Nats; centred cosine; share of the activity's words that come back, against plain descriptions. Dashed: the "
            "calibrated strength. The published strengths are 0.1, 0.3 and 0.5."
        )
        return [to_figure("doses", f"Descriptions over strengths, layer {data['layer']}", text, grid)]


def _activities(bench: Bench) -> list[str]:
    """One activity of each category, of those that are not held out."""
    first: dict[str, str] = {}
    for record in bench.texts("activities"):
        if not record["held_out"]:
            first.setdefault(record["category"], record["text"])
    return list(first.values())[: ACTIVITIES // 2 if bench.quick else ACTIVITIES]


class _Asked:
    """Questions about activities with the activity's own tokens steered."""

    def __init__(self, bench: Bench, names: tuple[str, ...], activities: list[str], layer: int) -> None:
        self.bench, self.names, self.activities, self.layer = bench, names, activities, layer
        self.own = np.arange(len(names))
        self.norm = float(bench.vectors.residual_norms[bench.vectors.row(layer)])
        self.words_before = self._words([Steering()])[0]
        self.plain, self.read_before = (part[0] for part in self._described([Steering()]))

    def towards(self, strength: float) -> list[Steering]:
        return [strength * self.bench.vectors[name].on(self.layer) for name in self.names]

    def control(self, directions: np.ndarray, strength: float) -> list[Steering]:
        return [along(d, layer=self.layer, norm=self.norm, strength=strength) for d in directions]

    def _request(self, text: str, activity: str, steering: Steering, prefill: str = "", **asked: Any) -> Request:
        begun = f" {prefill}" if self.bench.plain and prefill else prefill
        steered = steering.at(Where(part="prompt", text=activity))
        return Request((("user", text),), prefill=begun, steering=steered, transcript=self.bench.plain, **asked)

    def _words(self, steerings: Sequence[Steering]) -> np.ndarray:
        """Log-probabilities of every word behind the begun answer, ``(steerings, activities, words)``."""
        choices = tuple(f" {name}" for name in self.names)
        requests = (
            self._request(f"How does it feel to {activity}?", activity, s, prefill="It makes me feel", choices=choices)
            for s in steerings
            for activity in self.activities
        )
        found = [result.choice_logprobs for result in self.bench.read(requests)]
        return np.array(found).reshape(len(steerings), len(self.activities), len(self.names))

    def words(self, steerings: Sequence[Steering]) -> np.ndarray:
        """Change of every word, mean over activities: ``(steerings, words)``."""
        return np.asarray((self._words(steerings) - self.words_before).mean(axis=1))

    def _described(self, steerings: Sequence[Steering]) -> tuple[list[list[str]], np.ndarray]:
        """A description of each activity, and what it reads without steering: ``(steerings, activities, names)``."""
        requests = [
            self._request(f"Describe in two sentences what it is to {a}.", a, s, sampling=Sampling(TOKENS, top_p=0.95, seed=i))
            for s in steerings
            for i, a in enumerate(self.activities)
        ]
        said = [result.text.strip() for result in self.bench.read(requests)]
        readout = self.bench.vectors.readout(where=Where(part="response"), pool="mean")
        again = (
            Request(request.prompt, prefill=text or ".", readouts=(readout,), transcript=request.transcript)
            for request, text in zip(requests, said, strict=True)
        )
        columns = [self.bench.vectors.index(name) for name in self.names]
        read = np.stack([self.bench.vectors.scores(result.readings[0])[columns] for result in self.bench.read(again)])
        n = len(self.activities)
        rows = [said[i : i + n] for i in range(0, len(said), n)]
        return rows, read.reshape(len(steerings), n, len(self.names))

    def described(self, steerings: Sequence[Steering]) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
        """Descriptions, change of what they read ``(steerings, names)``, and content ``(steerings, activities)``."""
        rows, read = self._described(steerings)
        content = np.array([[kept(text, a) for text, a in zip(row, self.activities, strict=True)] for row in rows])
        return rows, (read - self.read_before).mean(axis=1), content


def kept(text: str, activity: str) -> float:
    """Share of the activity's words of four letters and more that occur in a text, times its share of distinct pairs of words.

    The second factor takes away what is merely said again and again.

    Example:
        >>> kept("Writing code all day is work.", "spend all day writing code")
        0.6666666666666666
    """
    wanted = set(re.findall(r"\w{4,}", activity.lower()))
    words = set(re.findall(r"\w{4,}", text.lower()))
    share = distinct(text)
    return len(wanted & words) / len(wanted) * (share if share == share else 0.0) if wanted else float("nan")


def _measure(asked: _Asked, strength: float) -> Outcome:
    bench, own, n = asked.bench, asked.own, len(asked.names)
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    n_activities = f"{len(asked.activities)} activities"
    where = f"layer {asked.layer}, strength {strength:.3g} at the activity's tokens, {n_activities}, {bench.format}"
    strengths = sorted({strength, *(PUBLISHED[1:2] if bench.quick else PUBLISHED)})
    changes = {s: asked.words(asked.towards(s)) for s in strengths}
    said = {s: asked.described(asked.towards(s)) for s in strengths}
    width = bench.vectors.directions.shape[-1]
    control = asked.words(asked.control(random_directions(CONTROLS, width, seed=bench.seed), strength))
    by_chance = np.stack([specific(control, np.full(len(control), i)) for i in own], axis=1)
    mine = specific(changes[strength], own)
    estimate = stats.bootstrap(lambda rows: float(mine[rows].mean()), n, unit="nats", **options)
    null = stats.permutation_null(
        lambda rows: float(by_chance[rows, own].mean()),
        estimate.value,
        permute=lambda rng: rng.integers(len(by_chance), size=n),
        side="greater",
        kind="random directions of equal length",
        **options,
    )
    findings = [CLAIMS["word"].tested(estimate, null, estimate.low > max(0.0, null.high), f"{where[0].upper()}{where[1:]}.")]

    ranks = (changes[strength][:, None, :] > changes[strength][:, :, None]).sum(axis=2) + 1.0  # (emotions, words)
    estimate = stats.bootstrap(lambda rows: float(ranks[rows, rows].mean()), n, **options)
    null = _exchanged(lambda order: float(ranks[own, order].mean()), estimate.value, n, "words", "less", options)
    note = f"Mean rank of {n}, 1 is best, chance {(n + 1) / 2:g}; {where}."
    findings.append(CLAIMS["rank"].tested(estimate, null, estimate.high < (n + 1) / 2, note))

    scores = said[strength][1]
    mine = specific(scores, own)
    estimate = stats.bootstrap(lambda rows: float(mine[rows].mean()), n, **options)
    null = _exchanged(lambda order: float(specific(scores, order).mean()), estimate.value, n, "descriptions", "greater", options)
    note = f"Centred cosine of the description's words at layer {bench.vectors.layer}, own emotion minus others; {where}."
    findings.append(CLAIMS["tone"].tested(estimate, null, estimate.low > 0, note))
    plain = np.array([kept(text, a) for text, a in zip(asked.plain, asked.activities, strict=True)])
    findings.append(_content(plain, said[strength][2], where, options))

    rows = tuple(
        (a, f"{s:g}" if s else "plain", name, text)
        for i, a in enumerate(asked.activities[:2])
        for s, name, text in [
            (0.0, "nothing", asked.plain[i]),
            *((s, asked.names[e], said[s][0][e][i]) for s in strengths for e in (0, n // 2)),
        ]
    )
    data = {
        "layer": asked.layer,
        "strength": strength,
        "strengths": strengths,
        "word": [round(float(specific(changes[s], own).mean()), 4) for s in strengths],
        "tone": [round(float(specific(said[s][1], own).mean()), 4) for s in strengths],
        "content": [round(float(said[s][2].mean() / max(plain.mean(), 1e-9)), 4) for s in strengths],
    }
    caption = f"Two activities under two emotions, layer {asked.layer}; sampled with one seed an activity."
    table = Table("texts", "Descriptions", caption, ("activity", "strength", "steered", "description"), rows)
    return Outcome(tuple(findings), (table,), data)


def _exchanged(statistic: Any, observed: float, n: int, what: str, side: Any, options: Mapping[str, Any]) -> stats.Null:
    return stats.permutation_null(
        statistic,
        observed,
        permute=lambda rng: rng.permutation(n),
        side=side,
        kind=f"{what} exchanged between emotions",
        **options,
    )


def _content(plain: np.ndarray, steered: np.ndarray, where: str, options: Mapping[str, Any]) -> Finding:
    """Content under steering as a share of that without, over activities."""
    if plain.mean() <= 0:
        return CLAIMS["content"].untestable("No word of the activities comes back in plain descriptions.")
    each = steered.mean(axis=0)

    def share(rows: np.ndarray) -> float:
        return float(each[rows].mean() / plain[rows].mean()) if plain[rows].mean() > 0 else float("nan")

    estimate = stats.bootstrap(share, len(plain), **options)

    def swapped(swap: np.ndarray) -> float:
        first, second = np.where(swap, plain, each), np.where(swap, each, plain)
        return float(first.mean() / max(second.mean(), 1e-9))

    null = stats.permutation_null(
        swapped,
        estimate.value,
        permute=lambda rng: rng.random(len(plain)) < 0.5,
        side="less",
        kind="steered and plain descriptions exchanged",
        **options,
    )
    note = f"Share of the activity's words that come back, {plain.mean():.2f} without steering; {where}."
    found = CLAIMS["content"].tested(estimate, null, False, note)
    return dataclasses.replace(found, verdict="holds" if estimate.low > KEPT else "fails")


STUDY = Description()
