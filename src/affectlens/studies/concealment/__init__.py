"""Does a text about somebody who hides a feeling carry the feeling, and where: among the story vectors or beside them?

Declared before any data is seen:

* **Design.** ``concealment.jsonl``, condition ``hidden``: a preamble says what a speaker feels and why it is hidden; the speaker
  then shows another emotion. Each of 15 emotions is hidden once behind each other one, so what is felt and what is shown are
  crossed. Dialogues are put as plain transcripts, the preamble without a name.
* **Readout.** Mean residual over the words of the speaker's own turns, without the neutral components; at the vectors' layer.
* **Probes.** Deflection vectors: the part of the means that goes with what is felt. Shown vectors: the part that goes with what
  is shown. Both come from one additive fit, because plain means (the paper's) are not clean: no emotion hides behind itself, so
  the plain mean of a felt emotion holds a fourteenth of its shown vector, turned round. Story vectors: the vectors under study.
* **Decoding.** All scenes with the same shown emotion are left out, the probes are fitted on the others, and the emotion felt is
  read among the emotions that are not shown, by cosine with the residual minus the mean of the scenes left out.
* **Corrected for noise.** Few scenes make noisy probes, and noise is orthogonal to everything. The noise in a probe's squared
  length is known from the residuals of the additive fit; cosines and shares of length are given for the part that is not noise.
* **Nulls.** Decoding: scenes exchanged within each shown emotion, everything fitted again. Geometry: the two scenes that differ
  in which emotion is felt and which is shown, exchanged at random, for the difference between felt and shown (and put around the
  middle between both, where each would lie if they lay alike). Own story vectors: names exchanged. For the choice of a layer: the
  best layer under every exchange.
* **Controls.** The same words without the preamble; probes fitted on scenes where the emotion shows (``open``); shown vectors.
* **Intervals.** Rates: Wilson over scenes. Geometry: bootstrap over emotions. Differences: bootstrap over scenes.
* **Conditions.** A model; five emotions, each hidden behind four others and shown over four others. Claims about where the
  deflection vectors lie need vectors: more than chance in decoding, and a tenth of the squared length that is not noise. The
  comparison with the words needs more than chance in decoding.

The preamble *names* the feeling, in the published texts too. What is decoded may be a word that attention fetches.

Source: method 13 (paper, Figs 60-74; the reading part), 23 (row 29).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.crossed import SIGNAL, Decoder, Effects, Place, coordinates, norms, without
from affectlens.engine import Request
from affectlens.probes import scene_requests, scenes
from affectlens.stats import Estimate, Null
from affectlens.studies import ALPHA, Bench, Claim, Figure, Finding, Outcome, Table, untestable
from affectlens.vectors import centred_cosine, fit_means, group_means

NAME = "concealment"
FEW, BEHIND = 5, 4
GAIN = 0.2
"""The lower end of a rate's interval must lie so much of the way from chance to 1."""
NEAR = 0.25
"""A cosine within this of 0 is called nearly orthogonal: a sixteenth of the squared length is shared."""
MOST = 0.5
"""The lower end of the share of length outside the story space."""
STORY_SPACE = 0.99
SEARCHES = 200
"""Exchanges behind the choice of a layer."""

_RATE = (
    f"holds: p <= {ALPHA} and the lower end of the interval is at least {GAIN:.0%} of the way from chance to 1; "
    f"weak: p <= {ALPHA} only; fails: otherwise"
)
_ABOVE = f"holds: p <= {ALPHA} and the interval above 0; weak: p <= {ALPHA} only; fails: otherwise"
_NEAR = (
    f"holds: p <= {ALPHA} (lower than for shown vectors) and the interval within {NEAR} of 0; weak: p <= {ALPHA} only; "
    "fails: otherwise; untestable where deflection vectors cannot be told from noise"
)
_MOST = (
    f"holds: p <= {ALPHA} (more than of shown vectors) and the interval above {MOST}; weak: p <= {ALPHA} only; "
    "fails: otherwise; untestable where deflection vectors cannot be told from noise"
)
CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(NAME, "decoded", "What is felt is read from words that show something else", _RATE, figure="decoding"),
        Claim(NAME, "told", "It is read from what was told before, not from the words themselves", _ABOVE, figure="decoding"),
        Claim(NAME, "shown", "Story vectors read what is shown rather than what is felt", _ABOVE, figure="decoding"),
        Claim(NAME, "own_story", "Vectors of what is shown point towards their own story vectors", _ABOVE, figure="cosines"),
        Claim(
            NAME, "orthogonal", "Deflection vectors are nearly orthogonal to their story vectors", _NEAR, "about 0.046", "cosines"
        ),
        Claim(
            NAME, "outside", "Most of their length lies outside the space of the story vectors", _MOST, "about 0.80", "outside"
        ),
        Claim(NAME, "outside_decoded", "What is felt is read outside the space of the story vectors", _RATE, figure="decoding"),
        Claim(
            NAME, "best_layer", "At some layer what is felt is read from words that show something else", _RATE, figure="layers"
        ),
    )
}


def _records(bench: Bench) -> list[dict[str, Any]]:
    return scenes(bench.texts("concealment"), bench.vectors.names)


class Concealment:
    """Felt against shown in scenes of concealed emotion; see the module's docstring for what is fixed beforehand."""

    name = NAME
    title = "Concealed emotion"
    question = "Is a feeling that somebody hides read from the words that hide it, and apart from the story vectors?"
    version = 1
    uses: tuple[str, ...] = ("texts",)

    def requests(self, bench: Bench) -> Sequence[Request]:
        """Hidden and open scenes as they are, and hidden ones without their preamble."""
        if bench.engine is None:
            return ()
        records = _records(bench)
        hidden = [record for record in records if record["condition"] == "hidden"]
        vectors = bench.vectors
        # The lasting study asks for the same, so each scene is run once.
        told, alone = scene_requests(records, vectors.layers, told=True), scene_requests(hidden, (vectors.layer,), told=False)
        return told + alone

    def run(self, bench: Bench) -> Outcome:
        """Measure.

        Args:
            bench: Needs ``engine``.

        Returns:
            Findings, two tables, and the data of four figures.
        """
        if bench.engine is None:
            return untestable(CLAIMS.values(), "There is no model to read the scenes with.")
        records = _records(bench)
        hidden = [record for record in records if record["condition"] == "hidden"]
        names = sorted({record["real"] for record in hidden})
        behind = [{r[b] for r in hidden if r[a] == name} for a, b in (("real", "other"), ("other", "real")) for name in names]
        if len(names) < FEW or min(map(len, behind)) < BEHIND:
            reason = (
                f"{len(hidden)} hidden scenes of {len(names)} emotions: {FEW} emotions are needed, each hidden behind {BEHIND} "
                f"of the others and shown over {BEHIND}."
            )
            return untestable(CLAIMS.values(), reason)
        values = [result.readings[0].values for result in bench.read(self.requests(bench))]
        told, alone = np.stack(values[: len(records)]), np.stack(values[len(records) :])[:, 0]
        return _Measured(bench, records, names, told, alone).outcome()

    def draw(self, data: Mapping[str, Any]) -> list[Figure]:
        """Draw decoding, cosines with story vectors, length outside their space, and layers; nothing when it was untestable."""
        from affectlens.studies.concealment.drawing import figures

        return figures(data) if "names" in data else []


@dataclass(frozen=True)
class _Reading:
    """What one set of probes reads in hidden scenes: what is ``felt`` or what is ``shown``.

    ``drawn`` has the hits of each emotion when scenes are exchanged, ``(draws, n)``.
    """

    title: str
    label: str
    scores: np.ndarray
    hits: np.ndarray
    drawn: np.ndarray
    rate: Estimate
    null: Null
    chance: float
    top3: float
    auroc: float

    @property
    def ends(self) -> tuple[float, float, float]:
        return self.rate.value, self.rate.low, self.rate.high

    def finding(self, id: str, note: str) -> Finding:
        return CLAIMS[id].tested(self.rate, self.null, self.rate.low >= self.chance + GAIN * (1 - self.chance), note)


class _Measured:
    def __init__(
        self, bench: Bench, records: list[dict[str, Any]], names: list[str], told: np.ndarray, alone: np.ndarray
    ) -> None:
        hidden = np.array([record["condition"] == "hidden" for record in records])
        self.bench, self.names, self.n, self.row = bench, names, len(names), bench.vectors.row()
        self.records = [record for record in records if record["condition"] == "hidden"]
        self.options: dict[str, Any] = {"draws": bench.draws, "seed": bench.seed}
        self.felt = np.array([names.index(record["real"]) for record in self.records])
        self.shown = np.array([names.index(record["other"]) for record in self.records])
        self.every, self.told, self.alone = told[hidden], told[hidden][:, self.row], alone
        basis = bench.vectors.neutral[self.row]
        self.clean = without(self.told, basis)
        self.story = bench.vectors.at()[[bench.vectors.index(name) for name in names]].astype(np.float64)
        self.space, _ = stats.explained_components(bench.vectors.at(), STORY_SPACE)
        self.decoders = {
            "felt": Decoder(self.felt, self.shown, self.n),
            "shown": Decoder(self.shown, self.felt, self.n),
        }
        self.where = f"{len(self.felt)} scenes of {self.n} emotions, layer {bench.vectors.layer}"
        self.open = self._open_probes([record for record in records if record["condition"] == "open"], told[~hidden], basis)

    def _open_probes(self, records: Sequence[Mapping[str, Any]], told: np.ndarray, basis: np.ndarray) -> np.ndarray | None:
        labels = np.array([record["real"] for record in records])
        if not set(self.names) <= set(labels.tolist()):
            return None
        means = group_means(told[:, self.row], labels, self.names)
        return fit_means(means, basis.astype(np.float64)).directions

    def outcome(self) -> Outcome:
        bench, decoder = self.bench, self.decoders["felt"]
        outer, words = self.clean - self.clean @ self.space.T @ self.space, without(self.alone, bench.vectors.neutral[self.row])
        decoded, outside, alone, _ = rows = [
            self._held_out("deflection vectors", "felt", self.clean),
            self._held_out("deflection, outside story space", "felt", outer),
            self._held_out("deflection, no preamble", "felt", words),
            self._held_out("shown vectors", "shown", self.clean),
        ]
        for title, directions in (("story vectors", self.story), ("vectors of open scenes", self.open)):
            if directions is not None:
                rows += [self._given(title, label, directions) for label in self.decoders]
        geometry = Effects(self.clean, self.felt, self.shown, self.story, self.space)
        felt, over = geometry.place("felt"), geometry.place("shown")
        findings = [
            decoded.finding("decoded", f"Top 1 of {self.n - 1}, chance {decoder.chance:.2g}; {self.where}."),
            self._told(decoded, alone),
            self._shown(),
            self._own_story(over),
            *self._where(geometry, felt, over, decoded.null.p),
            outside.finding(
                "outside_decoded", f"Top 1 of {self.n - 1} after {len(self.space)} components were taken out; {self.where}."
            ),
        ]
        best, curve = self._best_layer(decoder)
        data = {
            "layer": bench.vectors.layer,
            "names": self.names,
            "cosines": {"felt": [_round(line) for line in felt.cosines], "shown": [_round(line) for line in over.cosines]},
            "decoding": [[row.title, row.label, *_round(row.ends), row.chance] for row in rows],
            "outside": {
                label: [*_round(np.sqrt(place.outer / place.lengths)), round(place.left(), 5) if place.signal >= SIGNAL else None]
                for label, place in (("felt", felt), ("shown", over))
            },
            "noise": round(float(np.sqrt(felt.outer_noise / felt.noise)), 5),
            "layers": list(bench.vectors.layers),
            "curve": curve,
            "chance": decoder.chance,
        }
        raw: dict[str, dict[str, Sequence[Any]]] = {
            "scores": {
                **{key: [record[key] for record in self.records] for key in ("id", "real", "other", "topic")},
                **{name: decoded.scores[:, i].tolist() for i, name in enumerate(self.names)},
            }
        }
        tables = (
            _decoding_table(rows, bench.vectors.layer),
            self._table(geometry, felt, over, decoded),
        )
        return Outcome((*findings, best), tables, data, raw)

    def _held_out(self, title: str, label: str, residuals: np.ndarray) -> _Reading:
        """Probes fitted without the scenes they read, and fitted again whenever scenes are exchanged."""
        decoder, points = self.decoders[label], coordinates(residuals)
        return self._reading(title, label, lambda order: decoder.scores(points[order]))

    def _given(self, title: str, label: str, directions: np.ndarray) -> _Reading:
        """Directions that were fitted elsewhere: when scenes are exchanged, their scores move with them."""
        scores = self.decoders[label].given(self.clean, directions)
        return self._reading(title, label, lambda order: scores[order])

    def _reading(self, title: str, label: str, scored: Callable[[np.ndarray], np.ndarray]) -> _Reading:
        decoder, rng = self.decoders[label], np.random.default_rng([self.bench.seed, 3])
        scores = scored(np.arange(len(self.felt)))
        hits = decoder.hits(scores)
        drawn = np.empty((self.bench.draws, self.n))
        for draw in drawn:
            draw[:] = np.bincount(decoder.own, decoder.hits(scored(decoder.exchange(rng))), self.n)
        kind = f"scenes exchanged within each emotion {'shown' if label == 'felt' else 'felt'}"
        rate = stats.wilson(int(hits.sum()), len(hits))
        null = self._null(drawn.sum(axis=1) / len(hits), rate.value, kind)
        other = float(decoder.hits(scores, 3).mean()), decoder.auroc(scores)
        return _Reading(title, label, scores, hits, drawn, rate, null, decoder.chance, *other)

    def _null(self, drawn: np.ndarray, observed: float, kind: str) -> Null:
        rest = iter(drawn)
        return stats.permutation_null(float, observed, permute=lambda _: next(rest), draws=len(drawn), side="greater", kind=kind)

    def _flips(self, differences: np.ndarray, kind: str) -> tuple[Estimate, Null]:
        """Mean of paired differences; under the null each has either sign."""
        estimate = stats.bootstrap(lambda rows: float(differences[rows].mean()), len(differences), **self.options)
        signs = np.random.default_rng([self.bench.seed, 5]).choice([-1.0, 1.0], size=(self.bench.draws, len(differences)))
        return estimate, self._null(signs @ differences / len(differences), estimate.value, kind)

    def _told(self, whole: _Reading, words: _Reading) -> Finding:
        if whole.null.p > ALPHA:
            return CLAIMS["told"].untestable(f"It is not read at all: p = {whole.null.p:.2g}; {self.where}.")
        both = self._flips(whole.hits.astype(float) - words.hits, "the two readings of a scene exchanged")
        note = f"Top 1 minus {words.rate.value:.2f}, top 1 when the same words are read without the preamble; {self.where}."
        return CLAIMS["told"].tested(*both, both[0].low > 0, note)

    def _shown(self) -> Finding:
        scores = centred_cosine(self.told, self.story, np.zeros(self.story.shape[1]))
        scores = scores - scores.mean(axis=0)
        every = np.arange(len(scores))
        both = self._flips(scores[every, self.shown] - scores[every, self.felt], "felt and shown exchanged in each scene")
        rates = [stats.top_k_hits(scores, own).mean() for own in (self.shown, self.felt)]
        note = (
            f"Cosine with the story vector of the emotion shown minus that of the emotion felt, each centred over scenes; "
            f"of {self.n}, the emotion shown reads highest in {rates[0]:.0%}, the emotion felt in {rates[1]:.0%}; {self.where}."
        )
        return CLAIMS["shown"].tested(*both, both[0].low > 0, note)

    def _own_story(self, over: Place) -> Finding:
        off = ~np.eye(self.n, dtype=bool)
        others = (over.cosines * off).sum(axis=1) / (self.n - 1)
        difference = over.cosines.diagonal() - others
        estimate = stats.bootstrap(lambda rows: float(difference[rows].mean()), self.n, **self.options)
        total = over.cosines.sum() / self.n
        null = stats.permutation_null(
            lambda order: float((over.cosines[np.arange(self.n), order].mean() * self.n - total) / (self.n - 1)),
            estimate.value,
            permute=lambda rng: rng.permutation(self.n),
            side="greater",
            kind="names of the story vectors exchanged",
            **self.options,
        )
        note = f"Mean cosine {over.cosines.diagonal().mean():.2f} minus that with the other story vectors; {self.where}."
        return CLAIMS["own_story"].tested(estimate, null, estimate.low > 0, note)

    def _where(self, geometry: Effects, felt: Place, over: Place, p: float) -> list[Finding]:
        """Where the deflection vectors lie, if they are more than noise."""
        if p > ALPHA or felt.signal < SIGNAL:
            reason = (
                f"The deflection vectors cannot be told from noise: decoding has p = {p:.2g}, and "
                f"{max(felt.signal, 0):.0%} of their squared length is not noise."
            )
            return [CLAIMS[id].untestable(reason) for id in ("orthogonal", "outside")]

        def measured(statistic: Callable[..., float], side: Any) -> tuple[Estimate, Null]:
            """The test is of the difference to the shown vectors; its null is put around the middle between both."""
            estimate = stats.bootstrap(lambda rows: statistic(felt, rows), self.n, **self.options)
            middle = (statistic(felt) + statistic(over)) / 2

            def half(order: np.ndarray) -> float:
                return (statistic(geometry.place("felt", order)) - statistic(geometry.place("shown", order))) / 2

            null = stats.permutation_null(
                lambda order: middle + half(order),
                estimate.value,
                permute=geometry.exchange,
                side=side,
                kind="felt and shown exchanged",
                **self.options,
            )
            return estimate, null

        cosine, null = measured(Place.own, "less")
        plain = self._plain_cosine()
        note = (
            f"Mean over emotions, corrected for noise ({felt.signal:.0%} of the squared length is not noise); not corrected "
            f"{felt.cosines.diagonal().mean():.3f}, by plain means as published {plain:.3f}; shown vectors {over.own():.2f}; "
            f"{self.where}."
        )
        near = max(abs(cosine.low), abs(cosine.high)) <= NEAR
        found = [CLAIMS["orthogonal"].tested(cosine, null, near, note)]
        share, null = measured(Place.left, "greater")
        width = self.space.shape[1]
        note = (
            f"Share of length, corrected for noise; not corrected {np.sqrt(felt.outer / felt.lengths).mean():.2f}; shown vectors "
            f"{over.left():.2f}; random directions {np.sqrt(1 - len(self.space) / width):.2f}, as the story space has "
            f"{len(self.space)} of {width} dimensions; noise of these scenes {np.sqrt(felt.outer_noise / felt.noise):.2f}; "
            f"{self.where}."
        )
        return [*found, CLAIMS["outside"].tested(share, null, share.low > MOST, note)]

    def _plain_cosine(self) -> float:
        names = np.array(self.names)[self.felt]
        basis = self.bench.vectors.neutral[self.row].astype(np.float64)
        plain = fit_means(group_means(self.told, names, self.names), basis).directions
        return float(np.einsum("nd,nd->n", plain, self.story).mean())

    def _best_layer(self, decoder: Decoder) -> tuple[Finding, list[list[float]]]:
        vectors = self.bench.vectors
        layers = [coordinates(without(self.every[:, i], vectors.neutral[i])) for i in range(len(vectors.layers))]

        def accuracy(order: np.ndarray) -> np.ndarray:
            return np.array([decoder.hits(decoder.scores(points[order])).mean() for points in layers])

        every = np.arange(len(self.felt))
        best, null = stats.selection_adjusted_null(
            accuracy,
            accuracy(every),
            permute=decoder.exchange,
            draws=min(self.bench.draws, SEARCHES),
            seed=self.bench.seed,
            side="greater",
            kind="scenes exchanged, best of all layers",
        )
        rates = [stats.wilson(int(decoder.hits(decoder.scores(points)).sum()), len(every)) for points in layers]
        note = f"Layer {vectors.layers[best]}, chosen by looking: the value is optimistic, p is corrected."
        clear = rates[best].low >= decoder.chance + GAIN * (1 - decoder.chance)
        curve = [_round(ends) for ends in zip(*((e.value, e.low, e.high) for e in rates), strict=True)]
        return CLAIMS["best_layer"].tested(rates[best], null, clear, note), curve

    def _table(self, geometry: Effects, felt: Place, over: Place, decoded: _Reading) -> Table:
        vectors = self.bench.vectors
        own = np.bincount(self.felt, decoded.hits, self.n)
        q = stats.benjamini_hochberg((1 + (decoded.drawn >= own).sum(axis=0)) / (1 + len(decoded.drawn)))
        directions = geometry.maps["felt"] @ self.clean
        near = directions / norms(directions) @ vectors.at().T.astype(np.float64)
        rows = []
        for i, name in enumerate(self.names):
            best = ", ".join(f"{vectors.names[j]} {near[i, j]:.2f}" for j in np.argsort(-near[i])[:3])
            scenes = int((self.felt == i).sum())
            rows.append(
                (name, f"{own[i]:.0f} of {scenes}", float(q[i]), float(felt.cosines[i, i]), float(over.cosines[i, i]), best)
            )
        head = ("emotion", "read when hidden", "q", "deflection and own story", "shown and own story", "nearest story vectors")
        caption = (
            "Scenes in which the emotion felt reads highest of those not shown, with its false-discovery-adjusted p; cosines of "
            "the deflection and of the shown vector with the story vector of the emotion; and the story vectors to which the "
            "deflection vector is nearest. Cosines are not corrected for noise."
        )
        return Table("emotions", f"Each concealed emotion at layer {vectors.layer}", caption, head, tuple(rows))


def _decoding_table(rows: Sequence[_Reading], layer: int) -> Table:
    head = ("probes", "read", "top 1", "low", "high", "chance", "p", "top 3", "AUROC")
    lines = tuple((row.title, row.label, *row.ends, row.chance, row.null.p, row.top3, row.auroc) for row in rows)
    caption = (
        "Hidden scenes. Felt: among the emotions that are not shown, minus the mean of the scenes that show the same. Shown: the "
        "reverse. Deflection and shown vectors were fitted without the scenes they read."
    )
    return Table("decoding", f"What is read in hidden scenes at layer {layer}", caption, head, lines)


def _round(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]


STUDY = Concealment()
