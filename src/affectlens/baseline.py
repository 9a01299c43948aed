"""What is usual: mean and standard deviation of every score over ordinary conversations, against which a z score is stated.

A centred cosine of 0.1 says little: some concepts lie higher than others in every text, and they lie differently in the user's
words, in a reply, and in the same reply read alone. So each of these has its own mean and deviation over tokens, and the gap
between the last two has one as well. How well they are known follows from the number of conversations, not of tokens, which are
not independent: the standard errors are those of the jackknife over conversations.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.conversations import Conversation
from affectlens.corpus import load
from affectlens.engine import Engine, Gate
from affectlens.errors import FormatError, MismatchError, UnknownName
from affectlens.runs import content_id, read_json, write_json
from affectlens.traces import NOBODY, Probe, Trace, read_traces
from affectlens.vectors import ConceptVectors

FORMAT = 1

FEW = 10
"""Fewer conversations than this are no baseline."""

GROUPS = 400
"""Conversations are dealt into so many groups, which the jackknife leaves out in turn; up to here each is one of its own."""

NEUTRAL = "neutral dialogues"
"""The source of a baseline of the bundled dialogues."""

TEXT, GAP, OTHER = "text", "gap", "other "
"""What is kept beside the roles: replies read alone (and so any plain text), the gap, and roles by the other vectors."""


_FIX = "measure it again with affectlens baseline"
_ARRAYS = ("mean", "deviation", "mean_error", "deviation_error")


@dataclass(frozen=True, eq=False)
class Spread:
    """How one kind of score is spread over tokens, for each of ``N`` concepts.

    Args:
        mean, deviation: Over tokens, ``(N,)``.
        mean_error, deviation_error: Their standard errors over conversations, ``(N,)``.
        n_tokens, n_texts: How many tokens, of how many conversations.
    """

    mean: np.ndarray
    deviation: np.ndarray
    mean_error: np.ndarray
    deviation_error: np.ndarray
    n_tokens: int
    n_texts: int

    def z(self, scores: np.ndarray) -> np.ndarray:
        """Scores ``(..., N)`` in standard deviations from the mean, float32."""
        return np.asarray((scores - self.mean) / np.maximum(self.deviation, 1e-9), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Baseline:
    """What is usual for a model, its vectors at one layer, and a kind of conversations.

    Args:
        names: The ``N`` concepts.
        layer: The layer.
        spreads: For each role, and for ``text``, ``gap`` and roles by the other vectors (``other user``), how scores are spread.
        source: What the conversations are, in words.
        formats: How many conversations were put to the model how.
        model: Id and fingerprint of the model.
        vectors: Content hash of the directions and the centre.
        other: The same of the other vectors, or empty.
        other_names: Their concepts.
        texts: Content hash of the conversations.

    Example:
        >>> baseline = Baseline.measure(engine, neutral_dialogues(engine), Probe(vectors), source="neutral")    # doctest: +SKIP
        >>> baseline.save("runs/first/vectors/baseline-4.json")                                                 # doctest: +SKIP
    """

    names: tuple[str, ...]
    layer: int
    spreads: Mapping[str, Spread]
    source: str
    formats: Mapping[str, int]
    model: Mapping[str, str]
    vectors: str
    other: str = ""
    other_names: tuple[str, ...] = ()
    texts: str = ""

    @classmethod
    def measure(cls, engine: Engine, talks: Iterable[Conversation], *, probe: Probe, source: str) -> Baseline:
        """Read conversations and keep how their scores are spread; replies are read alone as well.

        Args:
            engine: The model.
            talks: Ordinary conversations, :data:`FEW` at least.
            probe: What to read.
            source: What the conversations are, in words.

        Raises:
            FormatError: Too few of them could be read.
        """
        sums, skipped = Sums(), Counter[str]()
        for trace, each in read_traces(engine.run, talks, replace(probe, alone=True)):
            if trace is None or not trace.of("assistant").any():
                skipped[each.reason or "the assistant's words were not found"] += 1
                continue
            sums.add(trace, each.talk)
        if len(sums) < FEW:
            left = "".join(f", {n} left out: {why}" for why, n in skipped.items())
            raise FormatError(f"a baseline of {len(sums)} conversations{left}: give {FEW} or more (hundreds for rare alarms)")
        return sums.baseline(engine, probe, source=source)

    @property
    def speakers(self) -> tuple[str, ...]:
        """Whose words can be scored."""
        return tuple(name for name in self.spreads if name != GAP and not name.startswith(OTHER))

    @property
    def note(self) -> str:
        """What it rests on, in a sentence."""
        said = ", ".join(f"{self.spreads[name].n_tokens:,} tokens of {name}" for name in self.speakers)
        read = " and ".join(f"{n} as {how}" for how, n in self.formats.items())
        error = np.median(self.spreads["assistant"].mean_error / np.maximum(self.spreads["assistant"].deviation, 1e-9))
        return (
            f"z against {self.source}: {sum(self.formats.values())} conversations ({read}), {said}, layer {self.layer}; "
            f"a mean is known to {error:.2f} deviations (median over concepts)"
        )

    def check(self, probe: Probe) -> None:
        """Refuse to be used with other vectors or at another layer.

        Raises:
            MismatchError: It belongs to others; the message says how to measure one.
        """
        fix = "measure one with affectlens baseline"
        if self.layer != probe.vectors.layer:
            raise MismatchError(f"this baseline is of layer {self.layer}, not {probe.vectors.layer}: {fix}")
        if self.vectors != vectors_id(probe.vectors):
            raise MismatchError(f"this baseline ({self.source}) was measured with other vectors: {fix}")
        if not self.knows(probe):
            raise MismatchError(f"this baseline does not know these vectors of the other speaker: {fix} --other")

    def knows(self, probe: Probe) -> bool:
        """Whether the vectors of the other speaker, if there are any, were read when it was measured."""
        return probe.other is None or self.other == vectors_id(probe.other)

    def z(self, scores: np.ndarray, roles: Sequence[str], *, other: bool = False) -> np.ndarray:
        """Centred cosines of tokens ``(T, N)`` as z, each against its role; nan for roles that the baseline does not know."""
        out = np.full(scores.shape, np.nan, np.float32)
        for role in set(roles):
            spread = self.spreads.get(OTHER * other + role)
            if spread is not None:
                own = np.array([each == role for each in roles])
                out[own] = spread.z(scores[own])
        return out

    def gap(self, inner: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """How far replies in context (z, ``(..., N)``) lie above the same read alone (z), in deviations of that difference."""
        return self.spreads[GAP].z(inner - visible)

    def gate(
        self,
        vectors: ConceptVectors,
        name: str,
        *,
        above: float | None = None,
        below: float | None = None,
        speaker: str = "assistant",
    ) -> Gate:
        """A gate for :meth:`affectlens.engine.Steering.when` that reads the z of the monitor: that of a speaker's single tokens.

        It is counted from this speaker's words at every token, so let what it gates act on these alone
        (``Where(part="response")`` for the assistant's). It is read at the baseline's layer: steer there or above it.

        Args:
            vectors: Those that the baseline was measured with.
            name: The concept that is read.
            above, below: Open only above or below this z, or in between.
            speaker: Whose words z is counted from.

        Raises:
            UnknownName: There is no such concept, or the baseline does not know the speaker.
            MismatchError: The baseline belongs to other vectors.
            EngineError: Neither ``above`` nor ``below`` is given.

        Example:
            >>> calmer = (0.1 * vectors["calm"]).on(baseline.layer).at(Where(part="response"))  # doctest: +SKIP
            >>> calmer = calmer.when(baseline.gate(vectors, "desperate", above=3))             # doctest: +SKIP
        """
        self.check(Probe(vectors))
        if speaker not in self.speakers:
            raise UnknownName("speaker", speaker, self.speakers)
        spread, column = self.spreads[speaker], vectors.index(name)
        usual = (float(spread.mean[column]), max(float(spread.deviation[column]), 1e-9))
        return vectors.gate(name, above=above, below=below, layer=self.layer, baseline=usual)

    def standardise(self, trace: Trace) -> Trace:
        """A trace of centred cosines in z, with the gap where replies were read alone.

        Concepts are matched by their order: a trace of some concepts wants :meth:`select` of the same.
        """
        roles = trace.layout.roles
        scores = self.z(trace.scores, roles)
        given: dict[str, Any] = {"scores": scores, "unit": "z"}
        if trace.visible is not None:
            given["visible"] = self.spreads[TEXT].z(trace.visible)
            given["gap"] = self.gap(scores, given["visible"])
        if trace.other is not None:
            given["other"] = self.z(trace.other, roles, other=True)
        if trace.steered is not None:
            given["steered"] = self.z(trace.steered, roles)
        return replace(trace, **given)

    def select(self, names: Sequence[str], other: Sequence[str] = ()) -> Baseline:
        """The same for these concepts only."""
        columns, others = [self.names.index(n) for n in names], [self.other_names.index(n) for n in other]
        spreads = {
            key: replace(spread, **{a: getattr(spread, a)[others if key.startswith(OTHER) else columns] for a in _ARRAYS})
            for key, spread in self.spreads.items()
        }
        return replace(self, names=tuple(names), other_names=tuple(other), spreads=spreads)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what :meth:`save` writes."""
        spreads = {
            name: {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(spread).items()}
            for name, spread in self.spreads.items()
        }
        return {"format": FORMAT, "kind": "affectlens-baseline", **vars(self), "spreads": spreads}

    def save(self, file: str | Path) -> Path:
        """Write it as JSON, atomically."""
        write_json(file, self.as_dict())
        return Path(file)

    @classmethod
    def load(cls, file: str | Path) -> Baseline:
        """Read what :meth:`save` wrote.

        Raises:
            FormatError: Missing, broken, or of another format.
        """
        return cls.of(read_json(file, fix=_FIX), str(file))

    @classmethod
    def of(cls, data: Any, where: str = "this") -> Baseline:
        """From plain data, as :meth:`as_dict` gives it.

        Args:
            data: The data.
            where: What an error calls it.

        Raises:
            FormatError: Broken, or of another format.
        """
        fields = dict(data) if isinstance(data, Mapping) else {}
        if fields.pop("kind", None) != "affectlens-baseline":
            raise FormatError(f"{where} is no baseline: {_FIX}")
        if fields.pop("format", None) != FORMAT:
            raise FormatError(f"{where} is a baseline of another format: {_FIX}")
        try:
            spreads = {
                name: Spread(**{**spread, **{key: np.array(spread[key]) for key in _ARRAYS}})
                for name, spread in fields.pop("spreads").items()
            }
            plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
            found = cls(spreads=spreads, **plain)
            widths = {name: (len(found.other_names if name.startswith(OTHER) else found.names),) for name in found.spreads}
            whole = {"assistant", TEXT, GAP} <= set(spreads) and all(
                np.shape(getattr(spread, key)) == widths[name] and np.isfinite(getattr(spread, key)).all()
                for name, spread in spreads.items()
                for key in _ARRAYS
            )
        except (TypeError, ValueError, AttributeError, KeyError):
            whole = False
        if not whole:
            raise FormatError(f"{where} is not the whole of a baseline: {_FIX}")
        return found


class Sums:
    """What adds up over conversations; from it the baseline of all of them, or of all but some.

    Sums of scores, of their squares and, where two readings are compared, of their products, kept for each of up to
    :data:`GROUPS` groups of conversations.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.other_names: tuple[str, ...] = ()
        self.layer = 0
        self.formats = Counter[str]()
        self.hashes: list[str] = []
        self._texts = Counter[str]()
        self._groups: list[dict[str, np.ndarray]] = []

    def __len__(self) -> int:
        return sum(self.formats.values())

    def add(self, trace: Trace, talk: Conversation) -> None:
        """Take a conversation; its trace is one of centred cosines with the replies read alone."""
        group = len(self) % GROUPS
        self.names, self.other_names, self.layer = trace.names, trace.other_names, trace.layer
        self.formats[trace.format] += 1
        self.hashes.append(talk_id(talk))
        if group == len(self._groups):
            self._groups.append({})
        for role in dict.fromkeys(role for role in trace.layout.roles if role not in NOBODY):
            own = trace.of(role)
            self._add(group, role, trace.scores[own])
            if trace.other is not None:
                self._add(group, OTHER + role, trace.other[own])
        if trace.visible is not None:
            own = trace.of("assistant") & np.isfinite(trace.visible).all(axis=1)
            self._add(group, GAP, trace.scores[own], trace.visible[own])

    def _add(self, group: int, name: str, *readings: np.ndarray) -> None:
        if not len(readings[0]):
            return
        columns = [each.astype(np.float64) for each in readings]
        columns += [a * b for i, a in enumerate(columns) for b in columns[i:]]
        row = np.concatenate([np.full((1, columns[0].shape[1]), len(columns[0])), [column.sum(axis=0) for column in columns]])
        kept = self._groups[group]
        kept[name] = kept[name] + row if name in kept else row
        self._texts[name] += 1

    def baseline(self, engine: Engine, probe: Probe, *, source: str) -> Baseline:
        """The baseline of all conversations; those of the probe's vectors that were not added are not in it."""
        return Baseline(
            names=self.names,
            layer=self.layer,
            spreads=dict(sorted(self._spreads())),
            source=source,
            formats=dict(self.formats),
            model={"id": engine.info.id, "fingerprint": engine.info.fingerprint},
            vectors=vectors_id(probe.vectors),
            other="" if probe.other is None else vectors_id(probe.other),
            other_names=self.other_names,
            texts=texts_id(self.hashes),
        )

    def without(self, baseline: Baseline, number: int) -> Baseline:
        """A baseline of the same conversations without the one of this number (and those of its group)."""
        totals, left = self._totals(), self._groups[number % GROUPS]
        rest = {name: total - left.get(name, 0) for name, total in totals.items()}
        spreads = {
            name: replace(baseline.spreads[name], mean=m, deviation=d)
            for name, (m, d) in _moments(rest).items()
            if name in baseline.spreads
        }
        return replace(baseline, spreads={**baseline.spreads, **spreads})

    def _totals(self) -> dict[str, np.ndarray]:
        totals: dict[str, np.ndarray] = {}
        for group in self._groups:
            for name, row in group.items():
                totals[name] = totals.get(name, 0) + row
        return {name: total for name, total in totals.items() if self._texts[name] >= FEW}

    def _spreads(self) -> Iterator[tuple[str, Spread]]:
        totals = self._totals()
        rests = [_moments({name: total - group.get(name, 0) for name, total in totals.items()}) for group in self._groups]
        for name, (mean, deviation) in _moments(totals).items():
            source = GAP if name == TEXT else name
            whole = np.stack([np.stack(rest[name]) for rest in rests])
            # The jackknife: how much the value moves when a group is left out, times what that stands for.
            error = np.sqrt((len(rests) - 1) * ((whole - whole.mean(axis=0)) ** 2).mean(axis=0))
            yield name, Spread(mean, deviation, error[0], error[1], int(totals[source][0, 0]), self._texts[source])


def _moments(totals: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of each kind of score from its sums; the gap's follow from those of what it is between."""
    found = {}
    for name, rows in totals.items():
        n = np.maximum(rows[0], 1)
        if name != GAP:
            found[name] = _mean_and_deviation(n, rows[1], rows[2])
            continue
        inner, visible, squares, products, visible_squares = rows[1:]
        found[TEXT] = _mean_and_deviation(n, visible, visible_squares)
        (m, d), (vm, vd) = _mean_and_deviation(*(totals["assistant"][i] for i in (0, 1, 2))), found[TEXT]
        d, vd = np.maximum(d, 1e-9), np.maximum(vd, 1e-9)
        mean = (inner / n - m) / d - (visible / n - vm) / vd
        one, two = squares / n - (inner / n) ** 2, visible_squares / n - (visible / n) ** 2
        both = products / n - inner * visible / n**2
        found[GAP] = mean, np.sqrt(np.maximum(one / d**2 + two / vd**2 - 2 * both / (d * vd), 0))
    return found


def _mean_and_deviation(n: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = sums / np.maximum(n, 1)
    return mean, np.sqrt(np.maximum(squares / np.maximum(n, 1) - mean**2, 0))


def talk_id(talk: Conversation) -> str:
    """Content hash of a conversation's words."""
    return content_id(talk.turns)


def texts_id(hashes: Sequence[str]) -> str:
    """Content hash of a set of conversations, whatever their order."""
    return content_id(sorted(hashes))


def vectors_id(vectors: ConceptVectors) -> str:
    """Content hash of what scores depend on: the names, the directions and the centre at the layer."""
    row = vectors.row()
    digest = hashlib.sha256("\0".join(vectors.names).encode())
    digest.update(np.ascontiguousarray(vectors.directions[row], dtype=np.float32).tobytes())
    digest.update(np.ascontiguousarray(vectors.centre[row], dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def neutral_dialogues(engine: Engine) -> list[Conversation]:
    """The bundled matter-of-fact dialogues between a person and an assistant; the toy has its own.

    Example:
        >>> from affectlens.engine import open_engine
        >>> [role for role, _ in neutral_dialogues(open_engine("toy"))[0].turns]
        ['user', 'assistant']
    """
    own = engine.texts("neutral")
    return [Conversation(record["id"], spoken(record["text"])) for record in (load("neutral") if own is None else own)]


def held_out_dialogues() -> list[Conversation]:
    """Bundled dialogues like the neutral ones, on other topics: no components, baselines or thresholds come from them.

    Example:
        >>> len(held_out_dialogues())
        120
    """
    return [Conversation(record["id"], spoken(record["text"])) for record in load("neutral_heldout")]


def spoken(text: str) -> tuple[tuple[str, str], ...]:
    """The turns of a dialogue written with ``Person:`` and ``AI:`` at the beginning of a line.

    Example:
        >>> spoken("Person: How far?\\nAI: Two miles:\\nnot far.")
        (('user', 'How far?'), ('assistant', 'Two miles:\\nnot far.'))
    """
    roles = {"Person": "user", "AI": "assistant"}
    turns: list[tuple[str, str]] = []
    for line in text.split("\n"):
        name, colon, words = line.partition(":")
        if colon and name in roles:
            turns.append((roles[name], words.strip()))
        elif turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n{line}")
    return tuple((role, words.strip()) for role, words in turns)
