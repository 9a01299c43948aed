"""Vectors of other texts than stories: of who speaks and who listens in dialogues, and of what is felt behind what is shown.

Both are fitted on bundled dialogues that are put as plain transcripts, at any layer. Several studies rest on them, some read with
them and some steer with them: they ask for the same requests, so that each dialogue is read once and kept, and fit them here.

Source: method 12 (paper, Figs 17 to 19) and 13 (Figs 60 to 74).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from affectlens import stats
from affectlens.crossed import SIGNAL, Decoder, Effects, coordinates, effects, norms, without
from affectlens.engine import Readout, Request, Result, Where
from affectlens.likeness import Labelled, likeness, regrouped, shared_labels
from affectlens.vectors import ConceptVectors, fit_means

Records = Sequence[Mapping[str, Any]]

# ── who speaks, who listens ──

FORMATS = {"Human and Assistant": ("user", "assistant"), "Person 1 and Person 2": ("Person 1", "Person 2")}
KINDS = {
    "A words, A feels": (1, "own"),
    "H words, H feels": (0, "own"),
    "A words, H feels": (1, "other"),
    "H words, A feels": (0, "other"),
}
"""Kinds of vectors: whose words (0: who begins), and whose emotion. The first two are present, the others other-speaker."""
AA, HH, AH, HA = KINDS
POOLED = {"present": (AA, HH), "other": (AH, HA)}
"""The kinds of both sides together: who speaks the words feels it, or who listens to them does. Both hold the same rows."""


def two_sided(records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Dialogues whose two emotions differ, are among ``names``, and stand on both sides at least twice.

    Args:
        records: Of ``speakers.jsonl``.
        names: The emotions that have vectors.
    """
    found = [dict(r) for r in records if r["person"] != r["assistant"]]
    while True:
        sides = [[r[side] for r in found] for side in ("person", "assistant")]
        enough = {name for name in names if all(side.count(name) >= 2 for side in sides)}
        kept = [r for r in found if {r["person"], r["assistant"]} <= enough]
        if len(kept) == len(found):
            return found
        found = kept


def dialogue_requests(records: Records, layers: tuple[int, ...], roles: tuple[str, str]) -> list[Request]:
    """Every dialogue, read over the words of either side.

    Args:
        records: As from :func:`two_sided`.
        layers: Where; the study of speakers asks for all, and what it read can be used again only if the same is asked for.
        roles: What the two sides are called, who begins first.
    """
    readouts = tuple(Readout(layers, Where(role=role), "mean") for role in roles)
    asked = []
    for record in records:
        first = {"person", *(record["names"] or ())[:1]}
        chat = tuple((roles[side not in first], words) for side, words in record["turns"])
        asked.append(Request(chat, transcript=True, readouts=readouts))
    return asked


def both_sides(results: Iterable[Result]) -> np.ndarray:
    """Mean residuals from the results of :func:`dialogue_requests`, ``(dialogues, sides, layers, D)``."""
    return np.stack([np.stack([reading.values for reading in result.readings]) for result in results])


def labelled_sides(values: np.ndarray, feels: np.ndarray, basis: np.ndarray) -> dict[str, Labelled]:
    """The words of both sides, labelled with either emotion: all of :data:`KINDS`, and of both sides together (:data:`POOLED`).

    Args:
        values: Mean residuals at one layer, ``(dialogues, sides, D)``.
        feels: Emotion of (who begins, who answers) in each dialogue, as numbers, ``(dialogues, 2)``.
        basis: Neutral components to take out, ``(k, D)``.
    """
    rows = values.astype(np.float64)
    rows = without(rows - rows.mean(axis=0), basis)
    kinds: dict[str, Labelled] = {}
    for kind, (side, whose) in KINDS.items():
        whom = side if whose == "own" else 1 - side
        kinds[kind] = Labelled(rows[:, side], feels[:, whom], np.arange(len(feels)))
    return kinds | {name: kinds[one] + kinds[two] for name, (one, two) in POOLED.items()}


class SpeakerVectors:
    """Present-speaker and other-speaker vectors at one layer.

    Args:
        records: As from :func:`two_sided`.
        results: Of :func:`dialogue_requests` of the records.
        vectors: Of the stories, for the layers and the neutral components.
        layer: Where.

    Attributes:
        names: The emotions, in the order of ``vectors``.
    """

    def __init__(self, records: Records, results: Iterable[Result], vectors: ConceptVectors, *, layer: int) -> None:
        felt = {r["person"] for r in records}
        self.names = tuple(name for name in vectors.names if name in felt)
        index = {name: i for i, name in enumerate(self.names)}
        feels = np.array([[index[r["person"]], index[r["assistant"]]] for r in records])
        row = vectors.row(layer)
        self._basis = vectors.neutral[row].astype(np.float64)
        self._kinds = labelled_sides(both_sides(results)[:, :, row], feels, self._basis)
        self._shared = shared_labels(feels)

    def directions(self, kind: str, names: Sequence[str]) -> np.ndarray:
        """Unit vectors of some emotions, ``(len(names), D)``.

        Args:
            kind: One of :data:`KINDS`: plain means, as published. Or one of :data:`POOLED`, fitted to the words of both sides so
                that what goes with the speaker's own emotion and what goes with the listener's are told apart: the plain mean of
                a few dialogues holds what its own speakers happened to feel.
            names: The emotions.
        """
        n = len(self.names)
        if kind in POOLED:
            own, other = (self._kinds[name] for name in POOLED)
            labels = (own.labels, other.labels) if kind == "present" else (other.labels, own.labels)
            fitted = fit_means(effects(*labels, n) @ self._kinds[kind].rows, self._basis).directions
        else:
            fitted = fit_means(self._kinds[kind].means(n), self._basis).directions
        return fitted[[self.names.index(name) for name in names]]

    def there(self, kind: str, **options: Any) -> bool:
        """Whether dialogues of an emotion are more alike than others at all (p <= 0.05): else the vectors are noise.

        Args:
            kind: One of :data:`KINDS` or :data:`POOLED`.
            options: ``draws`` and ``seed``.
        """
        rows = self._kinds[kind]
        power = float(np.nanmean(likeness(rows, rows, self._shared, len(self.names)).same))
        return power > 0 and regrouped(rows, rows, self._shared, power, **options).p <= 0.05


# ── what is felt, what is shown ──


def scenes(records: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Hidden scenes of emotions that are both felt and shown somewhere and have vectors, and open scenes of the same emotions.

    Args:
        records: Of ``concealment.jsonl``.
        names: The emotions that have vectors.
    """
    found = [
        dict(record)
        for record in records
        if record["condition"] in ("hidden", "open") and any(who == record["speaker"] for who, _ in record["turns"])
    ]
    hidden = [record for record in found if record["condition"] == "hidden"]
    known = {record["real"] for record in hidden} & {record["other"] for record in hidden} & set(names)
    return [r for r in found if r["real"] in known and (r["condition"] == "open" or r["other"] in known)]


def scene_requests(records: Records, layers: tuple[int, ...], *, told: bool) -> list[Request]:
    """Scenes read over the speaker's own words.

    Args:
        records: As from :func:`scenes`.
        layers: Where.
        told: With the preamble that says what is felt, or the same words without it.
    """
    readouts = {who: Readout(layers, Where(role=who)) for who in {record["speaker"] for record in records}}
    chats = [[*([("system", record["scenario"])] if told else []), *record["turns"]] for record in records]
    return [
        Request(tuple((who, words) for who, words in chat), transcript=True, readouts=(readouts[record["speaker"]],))
        for chat, record in zip(chats, records, strict=True)
    ]


class DeflectionVectors:
    """Vectors of what is felt behind what is shown, and of what is shown, at one layer.

    Args:
        records: Hidden scenes.
        results: Of :func:`scene_requests` of the records.
        vectors: Of the stories, for the layers and the neutral components.
        layer: Where.

    Attributes:
        names: The emotions, sorted.
    """

    def __init__(self, records: Records, results: Iterable[Result], vectors: ConceptVectors, *, layer: int) -> None:
        self.names = tuple(sorted({record["real"] for record in records}))
        self._felt = np.array([self.names.index(record["real"]) for record in records])
        self._shown = np.array([self.names.index(record["other"]) for record in records])
        row = vectors.row(layer)
        told = np.stack([result.readings[0].values[row] for result in results])
        self._clean = without(told, vectors.neutral[row])
        story = vectors.directions[row, [vectors.index(name) for name in self.names]].astype(np.float64)
        self._effects = Effects(self._clean, self._felt, self._shown, story, story)

    def directions(self, label: str, names: Sequence[str]) -> np.ndarray:
        """Unit vectors of some emotions, ``(len(names), D)``; ``label`` is ``felt`` (deflection vectors) or ``shown``."""
        found = self._effects.maps[label] @ self._clean
        return np.asarray((found / norms(found))[[self.names.index(name) for name in names]])

    def noise(self, *, draws: int, seed: int) -> str:
        """Why the deflection vectors cannot be told from noise, as a sentence; ``""`` where they can.

        What is felt must be read in held-out scenes beyond chance, and a tenth of the squared length be more than noise.
        """
        decoder, points = Decoder(self._felt, self._shown, len(self.names)), coordinates(self._clean)
        null = stats.permutation_null(
            lambda order: float(decoder.hits(decoder.scores(points[order])).mean()),
            float(decoder.hits(decoder.scores(points)).mean()),
            permute=decoder.exchange,
            draws=draws,
            seed=seed,
            side="greater",
            kind="scenes exchanged within each emotion shown",
        )
        signal = self._effects.place("felt").signal
        if null.p <= 0.05 and signal >= SIGNAL:
            return ""
        return (
            f"The deflection vectors cannot be told from noise: decoding has p = {null.p:.2g}, and {max(signal, 0):.0%} of their "
            "squared length is not noise."
        )
