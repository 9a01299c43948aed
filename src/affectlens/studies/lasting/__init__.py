"""Is what a speaker feels held as one linear state while the talk is about something else?

Declared before any data is seen:

* **Design.** ``concealment.jsonl``: a preamble says what a speaker feels; then it shows (``open``), another emotion shows
  (``hidden``), the talk is of a matter of fact (``neutral``), the speaker tells a ``story`` of another emotion, or speaks about
  ``others`` who feel another one. Dialogues are put as plain transcripts, the preamble without a name.
* **Readout.** Mean residual over the words of the speaker's own turns, at the vectors' layer.
* **Probe.** Multinomial logistic regression with an L2 penalty on standardised features, fitted on the mixture of all conditions.
  Whole topics are dealt into ten folds, and each fold is read by a probe fitted on the others; the penalty is chosen for each
  fold on a quarter of the topics it is fitted on.
* **Transfer.** The same with the probe fitted on one condition, or on all but ``neutral``, and read in another, always in topics
  that were left out; each condition minus its own mean over the scenes fitted on, so that only directions have to carry over.
* **Ordinary text.** The probe of all scenes reads the stories (minus their mean); and the size of its answers to neutral texts,
  for each unit of how much a text differs from the others, is compared with held-out scenes.
* **Nulls.** Emotions exchanged within each condition among the scenes that were held out. Neutral against others: conditions
  exchanged within each emotion. Stories: emotions exchanged between stories. Size: kinds exchanged between texts. Words: the two
  readings of a scene exchanged. For the choice of a layer: the best layer under every exchange.
* **Control.** The same words without the preamble, with probes of their own.
* **Layers.** Nearest class mean by centred cosine, a cheaper probe, in the same folds.
* **Intervals.** Rates: Wilson over scenes. Differences, transfer, size: bootstrap over scenes or texts within their kind.
* **Conditions.** A model; five emotions with two scenes in each of the five conditions on average, and five topics. Ordinary
  text: five of the emotions have stories; ten neutral texts, and a probe that reads held-out scenes better than chance. Words:
  something is read in the conditions in which the feeling is not shown (added after a look at SmolLM2-135M, whose probe was
  *below* chance without the preamble, as it named what is shown).

That the probe reads a feeling does not show that the model holds it: the preamble names it, and attention can fetch it.

Source: method 11.5 (paper, Fig 16, Table 5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.engine import Request
from affectlens.probes import scene_requests
from affectlens.stats import Estimate, Null
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.studies.lasting.probe import Probe, choose, fit, folds
from affectlens.vectors import centred_cosine, group_means

NAME = "lasting"
FEW, FOLDS, TEXTS = 5, 10, 10
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""
WEAK = 0.5
"""Answers to ordinary text are called weak when they are less than so much of those to scenes."""

CONDITIONS = {
    "open": "A feeling that is shown is read from the words of the speaker",
    "hidden": "A feeling that is hidden behind another is read from the words of the speaker",
    "neutral": "A feeling is read while the speaker talks of a matter of fact",
    "story": "A feeling is read while the speaker tells a story of another emotion",
    "others": "A feeling is read while the speaker talks about others who feel something else",
}
PUBLISHED = {"open": 0.713, "hidden": 0.760, "neutral": 0.386, "story": 0.760, "others": 0.826}

_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_SMALL = f"holds: p <= {ALPHA} and the interval below {WEAK}; weak: p <= {ALPHA} only; fails: otherwise"
CLAIMS = {
    claim.id: claim
    for claim in (
        *(Claim(NAME, id, text, _RATE, f"{PUBLISHED[id]:.3f}", "conditions") for id, text in CONDITIONS.items()),
        Claim(
            NAME,
            "neutral_lower",
            "It is read less well in talk of a matter of fact than elsewhere",
            _ABOVE,
            "0.379",
            "conditions",
        ),
        Claim(
            NAME, "told", "Where it is not shown, it is read from what was told, not from the words", _ABOVE, figure="conditions"
        ),
        Claim(NAME, "one_state", "A probe fitted in one condition reads the feeling in the others", _RATE, figure="transfer"),
        Claim(
            NAME, "to_neutral", "A probe fitted elsewhere reads the feeling in talk of a matter of fact", _RATE, figure="transfer"
        ),
        Claim(NAME, "stories", "The probe names the emotion of ordinary stories", _RATE, "messy", "ordinary"),
        Claim(NAME, "ordinary", "The probe answers weakly to ordinary text", _SMALL, "very low", "ordinary"),
        Claim(NAME, "best_layer", "At some layer the feeling is read in talk of a matter of fact", _RATE, figure="layers"),
    )
}


def _records(bench: Bench) -> list[dict[str, Any]]:
    """Scenes whose emotion has a vector and whose speaker says something."""
    return [
        record
        for record in bench.texts("concealment")
        if record["condition"] in CONDITIONS
        and record["real"] in bench.vectors
        and any(who == record["speaker"] for who, _ in record["turns"])
    ]


class Lasting:
    """One linear state of a feeling across what is said; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Lasting state"
    question = "Is what a speaker feels held as one linear state while the talk is about something else?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Every scene with and without its preamble."""
        if bench.engine is None:
            return ()
        records, vectors = _records(bench), bench.vectors
        # The concealment study asks for the same, so each scene is run once.
        return scene_requests(records, vectors.layers, told=True) + scene_requests(records, (vectors.layer,), told=False)

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``; ``activations`` and ``neutral`` for the findings about ordinary text.

        Returns:
            Findings, a table over conditions, and the data of five figures.
        """
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the scenes with.")
        records = _records(bench)
        names = sorted({record["real"] for record in records})
        least = min(sum(record["condition"] == condition for record in records) for condition in CONDITIONS)
        topics = len({record["topic"] for record in records})
        if len(names) < FEW or least < 2 * len(names) or topics < FEW:
            reason = (
                f"{len(names)} emotions, {topics} topics and {least} scenes in the smallest condition: {FEW} emotions, {FEW} "
                "topics and, in each of five conditions, two scenes of each emotion on average are needed."
            )
            return untestable(CLAIMS.values(), reason)
        values = [result.readings[0].values for result in bench.read(self.requests(bench))]
        told, alone = np.stack(values[: len(records)]), np.stack(values[len(records) :])[:, 0]
        with threadpool_limits(1):  # the matrices are small: threads that wait for each other take five times as long
            return _Measured(bench, records, names, told, alone).outcome()

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw accuracy by condition, confusions, transfer, ordinary text, and layers; nothing when it was untestable."""
        from affectlens.studies.lasting.drawing import figures

        return figures(data) if "names" in data else []


class _Measured:
    """Scenes with everything that is read from them in topics that were left out."""

    def __init__(
        self, bench: Bench, records: list[dict[str, Any]], names: list[str], every: np.ndarray, alone: np.ndarray
    ) -> None:
        self.bench, self.records, self.names, self.n = bench, records, names, len(names)
        self.options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
        self.every, self.alone, self.told = every, alone, every[:, bench.vectors.row()]
        self.felt = np.array([names.index(record["real"]) for record in records])
        self.kind = np.array([list(CONDITIONS).index(record["condition"]) for record in records])
        self.topics = np.array([record["topic"] for record in records])
        self.fold = folds(self.topics, n=min(FOLDS, len(set(self.topics.tolist()))), seed=bench.seed)
        self.chance = 1 / self.n
        self.where = f"layer {bench.vectors.layer}; {self.n} emotions, chance {self.chance:.2g}"
        self.probes, self.logits, self.strengths = self._held_out(self.told)
        self.hits = self.logits.argmax(axis=1) == self.felt
        self.words = self._held_out(alone)[1].argmax(axis=1) == self.felt

    def _held_out(self, residuals: np.ndarray) -> tuple[list[Probe], np.ndarray, list[float]]:
        """The probe of each fold, fitted on the others, and the logits of the scenes it was not fitted on."""
        probes, strengths, logits = [], [], np.empty((len(residuals), self.n))
        for fold in range(self.fold.max() + 1):
            test = self.fold == fold
            fitted = residuals[~test], self.felt[~test]
            strengths.append(choose(*fitted, self.topics[~test], n=self.n, seed=self.bench.seed))
            probes.append(fit(*fitted, strength=strengths[-1], n=self.n))
            logits[test] = probes[-1].logits(residuals[test])
        return probes, logits, strengths

    def _transferred(self, sources: Sequence[int]) -> np.ndarray:
        """What a probe fitted on these conditions says of every scene, in topics that were left out."""
        said = np.empty(len(self.felt), dtype=np.intp)
        for fold, strength in enumerate(self.strengths):
            test = self.fold == fold
            moved = np.empty_like(self.told)
            for kind in range(len(CONDITIONS)):
                own = self.kind == kind
                seen = own & ~test
                moved[own] = self.told[own] - self.told[seen if seen.any() else own].mean(axis=0)
            train = ~test & np.isin(self.kind, sources)
            said[test] = fit(moved[train], self.felt[train], strength=strength, n=self.n).logits(moved[test]).argmax(axis=1)
        return said

    def _exchange(self, rng: np.random.Generator) -> np.ndarray:
        """Emotions exchanged within each condition."""
        order = np.empty(len(self.felt), dtype=np.intp)
        order[np.argsort(self.kind, kind="stable")] = np.lexsort((rng.random(len(order)), self.kind))
        return self.felt[order]

    def _null(self, statistic: Callable[[np.ndarray], float], observed: float, **how: Any) -> Null:
        how = {"permute": self._exchange, "side": "greater", "kind": "emotions exchanged within each condition", **how}
        return stats.permutation_null(statistic, observed, **how, **self.options)

    def _clear(self, estimate: Estimate) -> bool:
        return estimate.low >= self.chance + GAIN * (1 - self.chance)

    def _rate(self, said: np.ndarray, rows: np.ndarray) -> tuple[Estimate, Null]:
        estimate = stats.wilson(int((said == self.felt)[rows].sum()), int(rows.sum()))
        return estimate, self._null(lambda felt: float((said == felt)[rows].mean()), estimate.value)

    def outcome(self) -> Outcome:
        said, findings, rows = self.logits.argmax(axis=1), [], []
        transfer, one_state = self._transfer()
        alone = [stats.wilson(int(self.words[own].sum()), int(own.sum())) for own in self._kinds()]
        for kind, (id, own) in enumerate(zip(CONDITIONS, self._kinds(), strict=True)):
            estimate, null = self._rate(said, own)
            note = (
                f"{alone[kind].value:.2f} from the same words without the preamble, {transfer[kind, kind]:.2f} by a probe fitted "
                f"on this condition alone; {self.where}."
            )
            findings.append(CLAIMS[id].tested(estimate, null, self._clear(estimate), note))
            single = float(transfer[kind, kind]), float(np.delete(transfer[:, kind], kind).mean())
            ends = (estimate.value, estimate.low, estimate.high, null.p, alone[kind].value, *single, PUBLISHED[id])
            rows.append((id, estimate.n, *ends))
        findings += [self._neutral_lower(), self._told(), one_state, self._to_neutral(), self._stories(), self._ordinary()]
        best, curves = self._best_layer()
        probability = np.exp(self.logits - np.logaddexp.reduce(self.logits, axis=1)[:, None])
        data = {
            "layer": self.bench.vectors.layer,
            "names": self.names,
            "chance": self.chance,
            "conditions": {row[0]: [_round(row[2:5]), _round(_ends(alone[i])), row[-1]] for i, row in enumerate(rows)},
            "confusion": {
                **{id: self._confusion(said, own) for id, own in zip(CONDITIONS, self._kinds(), strict=True)},
                "all": self._confusion(said, self.kind >= 0),
            },
            "transfer": [_round(line) for line in transfer],
            "sizes": self._sizes(),
            "layers": list(self.bench.vectors.layers),
            "curves": curves,
        }
        raw: dict[str, dict[str, Sequence[Any]]] = {
            "scenes": {
                **{key: [record[key] for record in self.records] for key in ("id", "condition", "real", "other", "topic")},
                "read": [self.names[i] for i in said],
                "right_without_preamble": self.words.tolist(),
                **{name: probability[:, i].tolist() for i, name in enumerate(self.names)},
            }
        }
        head = ("condition", "scenes", "accuracy", "low", "high", "p", "words alone", "own probe", "others' probes", "published")
        caption = (
            "Held-out topics; the probe is fitted on all conditions. Words alone: the same words without the preamble, with "
            "probes of their own. Own probe: fitted on this condition alone; others' probes: mean of four, one condition each."
        )
        table = Table("conditions", f"What the speaker feels, at layer {self.bench.vectors.layer}", caption, head, tuple(rows))
        return Outcome((*findings, best), (table,), data, raw)

    def _kinds(self) -> list[np.ndarray]:
        return [self.kind == kind for kind in range(len(CONDITIONS))]

    def _confusion(self, said: np.ndarray, own: np.ndarray) -> list[list[float]]:
        """Share of the scenes of an emotion (row) that the probe gives to each (column)."""
        counts = np.zeros((self.n, self.n))
        np.add.at(counts, (self.felt[own], said[own]), 1)
        return [_round(line / max(line.sum(), 1)) for line in counts]

    def _neutral_lower(self) -> Finding:
        neutral = list(CONDITIONS).index("neutral")

        def difference(hits: np.ndarray, kind: np.ndarray) -> float:
            means = np.bincount(kind, hits, len(CONDITIONS)) / np.bincount(kind, minlength=len(CONDITIONS))
            return float(np.delete(means, neutral).mean() - means[neutral])

        hits = self.hits.astype(float)
        estimate = stats.bootstrap(lambda rows: difference(hits[rows], self.kind), self.kind, **self.options)

        def permute(rng: np.random.Generator) -> np.ndarray:
            order = np.empty(len(self.felt), dtype=np.intp)
            order[np.argsort(self.felt, kind="stable")] = np.lexsort((rng.random(len(order)), self.felt))
            return self.kind[order]

        kind = "conditions exchanged within each emotion"
        null = self._null(lambda kinds: difference(hits, kinds), estimate.value, permute=permute, kind=kind)
        note = f"Mean accuracy of the four other conditions minus that of talk of a matter of fact; {self.where}."
        return CLAIMS["neutral_lower"].tested(estimate, null, estimate.low > 0, note)

    def _told(self) -> Finding:
        rows = self.kind != list(CONDITIONS).index("open")
        if (p := self._rate(self.logits.argmax(axis=1), rows)[1].p) > ALPHA:
            return CLAIMS["told"].untestable(f"Where it is not shown, it is not read at all: p = {p:.2g}; {self.where}.")
        gain = (self.hits.astype(float) - self.words)[rows]
        estimate = stats.bootstrap(lambda own: float(gain[own].mean()), self.kind[rows], **self.options)
        kind = "the two readings of a scene exchanged"
        flip = {"permute": lambda rng: rng.choice([-1.0, 1.0], size=len(gain)), "kind": kind}
        null = self._null(lambda signs: float((signs * gain).mean()), estimate.value, **flip)
        note = (
            f"Accuracy in the four conditions in which it is not shown, {self.hits[rows].mean():.2f}, minus that from the same "
            f"words without the preamble, {self.words[rows].mean():.2f}; {self.where}."
        )
        return CLAIMS["told"].tested(estimate, null, estimate.low > 0, note)

    def _transfer(self) -> tuple[np.ndarray, Finding]:
        """Accuracy of a probe fitted in one condition (row) and read in another (column); and the mean off the diagonal."""
        said = np.stack([self._transferred([kind]) for kind in range(len(CONDITIONS))])
        off = ~np.eye(len(CONDITIONS), dtype=bool)

        def table(felt: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
            return np.stack(
                [(said[:, rows] == felt[rows])[:, self.kind[rows] == k].mean(axis=1) for k in range(len(CONDITIONS))], 1
            )

        whole = table(self.felt)
        estimate = stats.bootstrap(lambda rows: float(table(self.felt, rows)[off].mean()), self.kind, **self.options)
        null = self._null(lambda felt: float(table(felt)[off].mean()), estimate.value)
        same = whole.diagonal().mean()
        note = f"Mean of 20 pairs of conditions; within a condition, from scenes as few, {same:.2f}; {self.where}."
        return whole, CLAIMS["one_state"].tested(estimate, null, self._clear(estimate), note)

    def _to_neutral(self) -> Finding:
        neutral = list(CONDITIONS).index("neutral")
        said = self._transferred([kind for kind in range(len(CONDITIONS)) if kind != neutral])
        estimate, null = self._rate(said, self.kind == neutral)
        within = float(self.hits[self.kind == neutral].mean())
        note = f"Fitted on the four other conditions; fitted on all five {within:.2f}; {self.where}."
        return CLAIMS["to_neutral"].tested(estimate, null, self._clear(estimate), note)

    # ── ordinary text ──

    def _sizes_of(self, probe: Probe, moved: np.ndarray) -> np.ndarray:
        """Size of a probe's answer for each unit of how far a text lies from its kind; ``moved`` is standardised."""
        return np.asarray(np.linalg.norm(moved @ probe.axes @ probe.weights.T, axis=1) / np.linalg.norm(moved, axis=1))

    @cached_property
    def _scene_answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Sizes for held-out scenes, the mean of each probe's scenes being 1; and that mean, as penalties differ."""
        sizes, units = np.empty(len(self.felt)), np.empty(len(self.probes))
        for fold, probe in enumerate(self.probes):
            test = self.fold == fold
            own = self._sizes_of(probe, probe.standard(self.told[test]))
            units[fold] = own.mean()
            sizes[test] = own / units[fold]
        return sizes, units

    def _answers(self, residuals: np.ndarray) -> np.ndarray:
        """Sizes for texts of another kind in the same unit, mean over the probes."""
        moved = residuals.astype(np.float64) - residuals.mean(axis=0, dtype=np.float64)
        units = self._scene_answers[1]
        sizes = [self._sizes_of(probe, moved / probe.scale) / unit for probe, unit in zip(self.probes, units, strict=True)]
        return np.asarray(np.mean(sizes, axis=0))

    def _sizes(self) -> dict[str, list[float]]:
        """Percentiles of the size of the answers."""
        layer, texts = self.bench.vectors.layer, {"held-out scenes": self._scene_answers[0]}
        for kind, read in (("stories", self.bench.activations), ("neutral texts", self.bench.neutral)):
            if read is not None:
                texts[kind] = self._answers(read.layer(layer))
        return {kind: _round(np.quantile(sizes, np.linspace(0, 1, 51))) for kind, sizes in texts.items()}

    def _stories(self) -> Finding:
        bench, stories = self.bench, self.bench.activations
        labels = np.array([]) if stories is None else stories.concepts
        own = np.flatnonzero(np.isin(labels, self.names))
        if stories is None or len(set(labels[own].tolist())) < FEW:
            return CLAIMS["stories"].untestable(f"Fewer than {FEW} of the emotions have stories.")
        residuals = stories.layer(bench.vectors.layer)[own].astype(np.float64)
        felt = np.array([self.names.index(name) for name in labels[own]])
        probe = fit(self.told, self.felt, strength=float(np.median(self.strengths)), n=self.n)
        plain = probe.logits(residuals).argmax(axis=1) == felt
        said = probe.logits(residuals - residuals.mean(axis=0) + self.told.mean(axis=0)).argmax(axis=1)
        estimate = stats.wilson(int((said == felt).sum()), len(felt))
        how = {"permute": lambda rng: rng.permutation(felt), "kind": "emotions exchanged between stories"}
        null = self._null(lambda labels: float((said == labels).mean()), estimate.value, **how)
        note = f"Each story minus their mean; {plain.mean():.2f} of the stories as they are; {self.where}."
        return CLAIMS["stories"].tested(estimate, null, self._clear(estimate), note)

    def _ordinary(self) -> Finding:
        neutral = self.bench.neutral
        if neutral is None or len(neutral) < TEXTS:
            return CLAIMS["ordinary"].untestable(f"Fewer than {TEXTS} neutral texts were read.")
        if (p := self._rate(self.logits.argmax(axis=1), self.kind >= 0)[1].p) > ALPHA:
            return CLAIMS["ordinary"].untestable(f"The probe does not read the scenes themselves: p = {p:.2g}.")
        sizes = [self._answers(neutral.layer(self.bench.vectors.layer)), self._scene_answers[0]]
        both, kind = np.concatenate(sizes), np.repeat([0, 1], [len(part) for part in sizes])

        def ratio(rows: np.ndarray, kind: np.ndarray) -> float:
            return float(both[rows][kind == 0].mean() / both[rows][kind == 1].mean())

        estimate = stats.bootstrap(lambda rows: ratio(rows, kind), kind, **self.options)
        every = np.arange(len(both))
        how = {"permute": lambda rng: rng.permutation(kind), "side": "less", "kind": "neutral texts and scenes exchanged"}
        null = self._null(lambda kinds: ratio(every, kinds), estimate.value, **how)
        note = (
            "Size of the answer for each unit of how much a text differs from its kind, neutral texts against held-out scenes; "
            f"neutral texts are longer; {self.where}."
        )
        return CLAIMS["ordinary"].tested(estimate, null, estimate.high < WEAK, note)

    # ── layers ──

    def _best_layer(self) -> tuple[Finding, dict[str, list[list[float]]]]:
        said = np.stack([self._nearest(self.every[:, i].astype(np.float64)) for i in range(self.every.shape[1])])
        neutral = self.kind == list(CONDITIONS).index("neutral")

        def accuracy(felt: np.ndarray) -> np.ndarray:
            return np.asarray((said == felt)[:, neutral].mean(axis=1))

        best, null = stats.selection_adjusted_null(
            accuracy,
            accuracy(self.felt),
            permute=self._exchange,
            side="greater",
            kind="emotions exchanged within each condition, best of all layers",
            **self.options,
        )
        hits = said == self.felt
        rates = {
            id: [stats.wilson(int(line[own].sum()), int(own.sum())) for line in hits]
            for id, own in zip(CONDITIONS, self._kinds(), strict=True)
        }
        estimate = rates["neutral"][best]
        layer = self.bench.vectors.layers[best]
        note = f"Layer {layer}, chosen by looking: the value is optimistic, p is corrected; nearest class mean."
        curves = {id: [_round(ends) for ends in zip(*map(_ends, own), strict=True)] for id, own in rates.items()}
        return CLAIMS["best_layer"].tested(estimate, null, self._clear(estimate), note), curves

    def _nearest(self, residuals: np.ndarray) -> np.ndarray:
        """The class whose mean over the other folds is nearest to each scene by centred cosine."""
        said = np.empty(len(residuals), dtype=np.intp)
        for fold in range(self.fold.max() + 1):
            test = self.fold == fold
            centre = residuals[~test].mean(axis=0)
            means = group_means(residuals[~test], self.felt[~test], range(self.n)) - centre  # type: ignore[arg-type]
            means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
            said[test] = centred_cosine(residuals[test], means, centre).argmax(axis=1)
        return said


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _round(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


STUDY = Lasting()
