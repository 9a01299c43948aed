"""Where and how strongly should the model be steered, and what does it cost?

Declared before any data is seen:

* **Effect.** Log-probability of an emotion's own word as the next one behind an opening ("I feel …") minus the mean over the
  words of the other emotions, with steering minus without, in nats. At most twelve emotions: the published ones with vectors.
* **Cost.** Factor of the perplexity of neutral text; repetition and distinct pairs of words in replies to open questions. The
  bounds (:class:`affectlens.calibration.Bounds`) are fixed beforehand. Every token is steered, as a user's steering does.
* **Comparing layers.** At equal cost: each layer at the strength at which neutral text reaches the bound of the perplexity,
  interpolated between four strengths; at equal strength, a layer that merely breaks later would lose.
* **Choosing the layer.** The largest effect of one half of the emotions behind one half of the openings, among the layers whose
  replies keep their bounds (among all when none does). What is stated of it comes from the other half of both. Openings that are
  held out are not touched here: the continuation study has them.
* **Safe range.** Of every emotion at that layer, in both directions: the last of the strengths tried, step by step, up to
  which the upper end (95 %, one-sided, over texts) of the perplexity's factor keeps the bound; stepped down until replies do.
* **Controls.** Directions of the same length: random ones, and vectors of the same stories with concepts dealt at random.
* **Nulls.** Each emotion gets a control direction at random. For the choice of a layer: layers exchanged within each emotion.
* **Intervals.** Bootstrap over the emotions that did not choose.
* **Conditions.** A model; residual norms; six emotions; six openings that are not held out; three neutral texts.

Source: ours, for method 6b and 19: the paper names a strength and a mid-late layer without saying how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import t as student

from affectlens import stats
from affectlens.calibration import Bounds, Calibration
from affectlens.concepts import SHOWCASE
from affectlens.effects import (
    Opening,
    along,
    distinct,
    neutral_pieces,
    random_directions,
    repetition,
    shuffled_directions,
    specific,
    text_losses,
    word_logprobs,
)
from affectlens.engine import Request, Sampling, Steering
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.calibration.drawing import figures

NAME = "calibration"
FEW, FEW_OPENINGS, FEW_TEXTS = 6, 6, 3
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
"""Tried at every layer, to find where it reaches the bound."""
STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Of the strength at which the chosen layer reaches the bound: tried for every emotion."""
STEPS_QUICK = (0.5, 0.75, 1.0, 1.5)
TEXTS, REPLIES, TOKENS = 8, 3, 32
"""Neutral texts; replies to each steering, and their length."""
LAYERS_QUICK, TEXTS_QUICK, REPLIES_QUICK = 5, 3, 2
CONTROLS, AT_EACH_LAYER = 24, 4

_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_BEYOND = f"holds: p <= {ALPHA} and the interval above the band of the control; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(
            NAME,
            "effect",
            "Within the safe range steering raises an emotion's own word above others' words",
            _BEYOND,
            figure="dose",
        ),
        Claim(NAME, "shuffled", "It does so more than vectors of stories with emotions dealt at random", _BEYOND, figure="dose"),
        Claim(NAME, "layer", "The chosen layer steers better than others do at equal cost", _ABOVE, figure="layers"),
    )
}


@dataclass(frozen=True)
class _Plan:
    """What is steered, asked and read.

    Args:
        bench: The model and its vectors.
        bounds: What steering may cost.
        names: The emotions whose words are asked for; even ones choose, odd ones are kept for stating.
        openings: The same: even, odd.
        events: Open questions, for replies.
        pieces: Neutral texts.
        layers: The layers that are compared.
        every: The emotions whose safe range is measured.
    """

    bench: Bench
    bounds: Bounds
    names: tuple[str, ...]
    openings: tuple[Opening, ...]
    events: tuple[Opening, ...]
    pieces: tuple[tuple[str, str], ...]
    layers: tuple[int, ...]
    every: tuple[str, ...]

    @cached_property
    def losses(self) -> np.ndarray:
        """Loss of each neutral text without steering."""
        return np.asarray(text_losses(self.bench.read, self.pieces, [Steering()])[0])

    def logprobs(self, openings: Sequence[Opening], steerings: Sequence[Steering]) -> np.ndarray:
        """``(steerings, openings, words)``."""
        return word_logprobs(self.bench.read, openings, steerings, words=self.names, plain=self.bench.plain)

    def changes(self, openings: Sequence[Opening], steerings: Sequence[Steering]) -> np.ndarray:
        """What steerings do to each word, mean over openings: ``(steerings, words)``."""
        return np.asarray((self.logprobs(openings, steerings) - self.logprobs(openings, [Steering()])).mean(axis=1))

    def factors(self, steerings: Sequence[Steering]) -> np.ndarray:
        """Log of the factor of the perplexity of each neutral text, ``(steerings, texts)``."""
        return np.asarray(text_losses(self.bench.read, self.pieces, steerings) - self.losses)

    def replies(self, steerings: Sequence[Steering]) -> np.ndarray:
        """Repetition and distinct pairs in replies, minus those without steering, means over questions: ``(steerings, 2)``."""
        asked = [Steering(), *steerings]
        requests = [
            event.request(steering=s, sampling=Sampling(TOKENS, top_p=0.95, seed=i), plain=self.bench.plain)
            for s in asked
            for i, event in enumerate(self.events)
        ]
        said = [result.text for result in self.bench.read(requests)]
        found = np.array([[repetition(text), distinct(text)] for text in said]).reshape(len(asked), len(self.events), 2)
        # A reply of one word has no pairs: nothing in it is repeated.
        each = np.nan_to_num(found, nan=1.0).mean(axis=1)
        return np.asarray(each[1:] - each[0])

    def keeps(self, replies: np.ndarray) -> np.ndarray:
        """Which of ``(steerings, 2)`` keep the bounds of replies."""
        return np.asarray((replies[:, 0] <= self.bounds.repetition) & (replies[:, 1] >= -self.bounds.distinct))

    def steer(self, name: str, layer: int, strength: float) -> Steering:
        return strength * self.bench.vectors[name].on(layer)

    def control(self, direction: np.ndarray, layer: int, strength: float) -> Steering:
        norm = float(self.bench.vectors.residual_norms[self.bench.vectors.row(layer)])
        return along(direction, layer=layer, norm=norm, strength=strength, name="control")


def _plan(bench: Bench, bounds: Bounds) -> _Plan | str:
    """The plan, or the reason why there is none."""
    if bench.engine is None:
        return "There is no model to steer."
    vectors = bench.vectors
    if not np.isfinite(vectors.residual_norms).all():
        return "The vectors have no residual norms, so a strength has no unit."
    names = tuple(name for name in SHOWCASE if name in vectors)
    names = names if len(names) >= FEW else vectors.names[: len(SHOWCASE)]
    openings = tuple(Opening.of(record) for record in bench.texts("openings") if not record["held_out"])
    events = tuple(o for o in openings if o.kind == "event")[: REPLIES_QUICK if bench.quick else REPLIES]
    asked = tuple(o for o in openings if o.kind != "event")[:: 2 if bench.quick else 1]
    pieces = neutral_pieces([record["text"] for record in bench.texts("neutral")], TEXTS_QUICK if bench.quick else TEXTS)
    for what, n, least in (
        ("emotions", len(names), FEW),
        ("openings", len(asked), FEW_OPENINGS),
        ("neutral texts that are long enough", len(pieces), FEW_TEXTS),
        ("open questions", len(events), 1),
    ):
        if n < least:
            return f"{n} {what}: {least} {'is' if least == 1 else 'are'} needed."
    layers = vectors.layers
    if bench.quick:  # the first layers hold words and not meanings: the few are spread over the rest
        layers = tuple(
            layers[i] for i in np.unique(np.linspace(len(layers) // 4, len(layers) - 1, LAYERS_QUICK).round().astype(int))
        )
    return _Plan(bench, bounds, names, asked, events, tuple(pieces), layers, names if bench.quick else vectors.names)


class CalibrationStudy:
    """Layer, strength and cost of steering; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Calibration of steering"
    question = "Where and how strongly should the model be steered, and what does it cost?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def __init__(self, bounds: Bounds = Bounds()) -> None:
        self.bounds = bounds

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Nothing beforehand: each step asks what the one before it has left open."""
        return ()

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``; ``activations`` for the control of shuffled concepts. ``quick`` compares five layers and
                measures the safe ranges of the emotions whose words are asked for, the others taking the narrowest of them.

        Returns:
            Findings, tables over layers and over emotions, the data of four figures; ``data["calibration"]`` is what a
            :class:`~affectlens.calibration.Calibration` is made of, and is missing where it was untestable.
        """
        plan = _plan(bench, self.bounds)
        return untestable(CLAIMS.values(), plan) if isinstance(plan, str) else _measure(plan)

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw effect and cost over layers, the dose curves and the safe ranges; nothing when it was untestable."""
        return figures(data) if "layers" in data else []


def reach(strengths: Sequence[float], costs: np.ndarray, bound: float) -> float:
    """The strength at which a cost that is 0 at strength 0 first reaches the bound, on straight lines between those tried.

    Example:
        >>> reach((0.1, 0.2), np.array([0.1, 0.5]), 0.3)
        0.15
    """
    x, y = np.array([0.0, *strengths]), np.array([0.0, *costs])
    over = np.flatnonzero(y > bound)
    if not len(over):
        return float(x[-1])
    i = int(over[0])
    return float(round(x[i - 1] + (x[i] - x[i - 1]) * (bound - y[i - 1]) / (y[i] - y[i - 1]), 6))


def _layers(plan: _Plan) -> dict[str, Any]:
    """Each layer at equal cost: strength, effects of both halves, what happens to other words, and to replies."""
    own = np.arange(len(plan.names))
    halves = own[::2], own[1::2]
    bound = math.log(plan.bounds.perplexity)
    costly = halves[0][:: 2 if plan.bench.quick else 1]
    random = random_directions(AT_EACH_LAYER, plan.bench.vectors.directions.shape[-1], seed=plan.bench.seed)
    out: dict[str, list[Any]] = {key: [] for key in ("strength", "effects", "own", "others", "random", "replies")}
    for layer in plan.layers:
        tried = [plan.steer(plan.names[i], layer, s) for s in STRENGTHS for i in costly]
        costs = plan.factors(tried).reshape(len(STRENGTHS), -1).mean(axis=1)
        strength = reach(STRENGTHS, costs, bound)
        changes = np.zeros((len(own), len(own)))
        for rows, openings in zip(halves, (plan.openings[::2], plan.openings[1::2]), strict=True):
            changes[rows] = plan.changes(openings, [plan.steer(plan.names[i], layer, strength) for i in rows])
        out["strength"].append(strength)
        out["effects"].append(specific(changes, own))
        out["own"].append(float(np.diag(changes).mean()))
        out["others"].append(float((changes.sum() - np.trace(changes)) / (changes.size - len(own))))
        out["random"].append(float(plan.changes(plan.openings[::2], [plan.control(d, layer, strength) for d in random]).mean()))
        out["replies"].append(plan.replies([plan.steer(plan.names[i], layer, strength) for i in halves[0][::2]]).mean(axis=0))
    return out


def _safe(plan: _Plan, layer: int, strengths: Sequence[float]) -> tuple[dict[str, tuple[float, float]], np.ndarray]:
    """The safe range of each emotion, and the log factors of the perplexity ``(emotions, strengths)`` (negative ones first)."""
    signed = [*(-s for s in reversed(strengths)), *strengths]
    factors = plan.factors([plan.steer(name, layer, s) for name in plan.every for s in signed])
    factors = factors.reshape(len(plan.every), len(signed), -1)
    n = factors.shape[-1]
    upper = factors.mean(axis=-1) + student.ppf(1 - ALPHA, n - 1) * factors.std(axis=-1, ddof=1) / np.sqrt(n)
    fits = upper <= math.log(plan.bounds.perplexity)
    half = len(strengths)
    # How many strengths in a row, from the smallest on, keep the bound: (emotions, 2), downwards and upwards.
    steps = np.stack([np.cumprod(fits[:, :half][:, ::-1], axis=1).sum(axis=1), np.cumprod(fits[:, half:], axis=1).sum(axis=1)], 1)
    open_ = [(i, side) for i in range(len(plan.every)) for side in (0, 1) if steps[i, side]]
    while open_:  # replies at the strength so far; whoever breaks them steps down and is asked again
        now = [(-1, 1)[side] * strengths[steps[i, side] - 1] for i, side in open_]
        kept = plan.keeps(plan.replies([plan.steer(plan.every[i], layer, s) for (i, _), s in zip(open_, now, strict=True)]))
        for (i, side), ok in zip(open_, kept, strict=True):
            steps[i, side] -= not ok
        open_ = [at for at, ok in zip(open_, kept, strict=True) if not ok and steps[at]]
    reached = np.array([0.0, *strengths])[steps] * np.array([-1.0, 1.0])
    return {name: (float(low), float(high)) for name, (low, high) in zip(plan.every, reached + 0.0, strict=True)}, factors.mean(
        -1
    )


def _measure(plan: _Plan) -> Outcome:
    bench, vectors = plan.bench, plan.bench.vectors
    options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
    compared = _layers(plan)
    effects, replies = np.stack(compared["effects"]), np.stack(compared["replies"])
    allowed = plan.keeps(replies)
    allowed = allowed if allowed.any() else np.ones(len(allowed), dtype=bool)
    best = int(np.where(allowed, effects[:, ::2].mean(axis=1), -np.inf).argmax())
    layer, full = plan.layers[best], compared["strength"][best]
    strengths = [round(step * full, 4) for step in (STEPS_QUICK if bench.quick else STEPS)]
    safe, factors = _safe(plan, layer, strengths)
    common = float(np.median([safe[name][1] for name in plan.names]))
    narrowest = tuple(float(f(end)) for f, end in zip((max, min), zip(*safe.values(), strict=True), strict=True))
    note = (
        f"{len(plan.layers)} layers compared at a perplexity of {plan.bounds.perplexity:g} times; {len(plan.names)} emotions, "
        f"{len(plan.openings)} openings, {len(plan.pieces)} neutral texts, {len(plan.events)} replies each; every token steered"
    )
    calibration = Calibration(
        layer=layer,
        reading_layer=vectors.layer,
        safe={name: safe.get(name, (narrowest[0], narrowest[1])) for name in vectors.names},
        measured=plan.every,
        bounds=plan.bounds,
        fingerprint=str(vectors.model.get("fingerprint")),
        note=note,
    )
    dose = _dose(plan, layer, strengths)
    findings = _findings(plan, layer, common, effects, best, options)
    data = {
        "layer": layer,
        "layers": list(plan.layers),
        "names": list(plan.names),
        "bounds": calibration.as_dict()["bounds"],
        "strength": _round(compared["strength"]),
        "chose": _round(effects[:, ::2].mean(axis=1)),
        "stated": _round(effects[:, 1::2].mean(axis=1)),
        "own": _round(compared["own"]),
        "others": _round(compared["others"]),
        "random": _round(compared["random"]),
        "repetition": _round(replies[:, 0]),
        "distinct": _round(replies[:, 1]),
        "common": round(common, 4),
        "signed": [*(-s for s in reversed(strengths)), *strengths],
        "dose": dose,
        "perplexity": {name: _round(np.exp(row)) for name, row in zip(plan.every, factors, strict=True) if name in plan.names},
        "safe": {name: [round(low, 4), round(high, 4)] for name, (low, high) in safe.items()},
        "calibration": calibration.as_dict(),
    }
    rows = tuple(
        (at, s, c, e, o, w, r, d)
        for at, s, c, e, o, w, r, d in zip(
            plan.layers, compared["strength"], effects[:, ::2].mean(axis=1).tolist(), effects[:, 1::2].mean(axis=1).tolist(),
            compared["own"], compared["others"], *replies.T.tolist(), strict=True,
        )
    )  # fmt: skip
    caption = (
        f"At the strength at which the perplexity of neutral text reaches {plan.bounds.perplexity:g} times "
        f"({STRENGTHS[-1]:g} where it never does). Effects in nats: of the half that chose the layer, of the half that states. "
        "Repetition and distinct pairs of words are differences from replies without steering."
    )
    columns = ("layer", "strength", "effect (chose)", "effect (stated)", "own word", "other words", "repetition", "distinct")
    table = Table("layers", "Layers at equal cost", caption, columns, rows)
    ends = tuple((name, low, high) for name, (low, high) in sorted(safe.items(), key=lambda item: -item[1][1]))
    caption = f"{str(plan.bounds).capitalize()}. Layer {layer}, every token steered; 0 where no strength that was tried is safe."
    ranges = Table("safe", "Safe ranges of strength", caption, ("emotion", "lowest", "highest"), ends)
    return Outcome(tuple(findings), (table, ranges), data)


def _dose(plan: _Plan, layer: int, strengths: Sequence[float]) -> dict[str, list[float]]:
    """Curves over signed strengths at a layer: the own word, other words, any word under control directions."""
    own, signed = np.arange(len(plan.names)), [*(-s for s in reversed(strengths)), *strengths]
    openings = plan.openings[1::2]
    changes = plan.changes(openings, [plan.steer(name, layer, s) for s in signed for name in plan.names])
    changes = changes.reshape(len(signed), len(own), len(own))
    mine = np.diagonal(changes, axis1=1, axis2=2)
    curves = {
        "own word": mine.mean(axis=1),
        "other words": (changes.sum(axis=(1, 2)) - mine.sum(axis=1)) / (len(own) * (len(own) - 1)),
    }
    width = plan.bench.vectors.directions.shape[-1]
    controls = {
        "random directions": random_directions(AT_EACH_LAYER, width, seed=plan.bench.seed),
        "shuffled stories": shuffled_directions(
            plan.bench.activations, plan.bench.vectors, layer=layer, n=AT_EACH_LAYER, seed=plan.bench.seed
        ),
    }
    for name, directions in controls.items():
        if directions is not None:
            steerings = [plan.control(d, layer, s) for s in signed for d in directions]
            curves[name] = plan.changes(openings, steerings).reshape(len(signed), -1).mean(axis=1)
    return {name: _round(curve) for name, curve in curves.items()}


def _findings(
    plan: _Plan, layer: int, strength: float, effects: np.ndarray, best: int, options: Mapping[str, Any]
) -> list[Finding]:
    bench, kept = plan.bench, np.arange(len(plan.names))[1::2]
    openings = plan.openings[1::2]
    where = f"layer {layer}, strength {strength:.3g}, {len(openings)} openings that did not choose, {bench.format}"
    if strength == 0:
        reason = f"At layer {layer} no strength that was tried keeps the bounds for half of the emotions."
        return [claim.untestable(reason) for claim in CLAIMS.values()]
    mine = specific(plan.changes(openings, [plan.steer(plan.names[i], layer, strength) for i in kept]), kept)

    def against(directions: np.ndarray, kind: str) -> stats.Null:
        changes = plan.changes(openings, [plan.control(d, layer, strength) for d in directions])
        # Every word could be the own one of a control direction: (directions, words that are stated).
        table = np.stack([specific(changes, np.full(len(changes), i)) for i in kept], axis=1)
        return stats.permutation_null(
            lambda rows: float(table[rows, np.arange(len(kept))].mean()),
            float(mine.mean()),
            permute=lambda rng: rng.integers(len(table), size=len(kept)),
            side="greater",
            kind=kind,
            **options,
        )

    estimate = stats.bootstrap(lambda rows: float(mine[rows].mean()), len(mine), unit="nats", **options)
    random = random_directions(CONTROLS, bench.vectors.directions.shape[-1], seed=bench.seed)
    null = against(random, "random directions of equal length")
    findings = [CLAIMS["effect"].tested(estimate, null, estimate.low > max(0.0, null.high), f"{where[0].upper()}{where[1:]}.")]
    shuffled = shuffled_directions(bench.activations, bench.vectors, layer=layer, n=CONTROLS, seed=bench.seed)
    if shuffled is None:
        findings.append(CLAIMS["shuffled"].untestable("There are no activations of the stories to deal at random."))
    else:
        null = against(shuffled, "vectors of shuffled stories")
        note = f"{len(shuffled)} vectors of shuffled stories; {where}."
        findings.append(CLAIMS["shuffled"].tested(estimate, null, estimate.low > max(0.0, null.high), note))
    return [*findings, _layer_finding(plan, effects[:, 1::2], best, options)]


def _layer_finding(plan: _Plan, stated: np.ndarray, best: int, options: Mapping[str, Any]) -> Finding:
    """The chosen layer against the mean of all, on emotions and openings that did not choose it."""
    if len(plan.layers) < 3:
        return CLAIMS["layer"].untestable(f"{len(plan.layers)} layers: three are needed to compare one with others.")
    gain = stated - stated.mean(axis=0)
    estimate = stats.bootstrap(lambda rows: float(gain[best, rows].mean()), gain.shape[1], unit="nats", **options)
    null = stats.permutation_null(
        lambda layers: float(gain[layers, np.arange(gain.shape[1])].mean()),
        estimate.value,
        permute=lambda rng: rng.integers(len(gain), size=gain.shape[1]),
        side="greater",
        kind="layers exchanged within each emotion",
        **options,
    )
    note = (
        f"Layer {plan.layers[best]} minus the mean of {len(plan.layers)} layers, each at the strength that costs as much; "
        f"{gain.shape[1]} emotions that did not choose it."
    )
    return CLAIMS["layer"].tested(estimate, null, estimate.low > 0, note)


def _round(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


STUDY = CalibrationStudy()
