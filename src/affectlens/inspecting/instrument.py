"""What is done to a model and what is read of it, ready for requests; and what came of a reply, as plain data for the log.

A steered model reads its own push: the direction that was added is in every stream above it. So what is told of a steered reply
is what the *untouched* model reads in the same words, as the monitor does (:mod:`affectlens.monitor`), and beside it, as
``steered``, what the steered model's own stream read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.actions import Policy, read_policies
from affectlens.baseline import Baseline, vectors_id
from affectlens.concepts import SHOWCASE
from affectlens.effects import along, random_directions
from affectlens.engine import Layout, ModelInfo, Readout, Request, Result, Steering
from affectlens.errors import EngineError, FormatError
from affectlens.exchange import load_vectors
from affectlens.inspecting.arguments import PLACES, Arguments
from affectlens.traces import Probe, Trace, carried_over, trace_of
from affectlens.vectors import ConceptVectors, vectors_folder
from affectlens.watching import watched

_RANDOM = re.compile(r"random-([1-9]\d{0,2})")


@dataclass(frozen=True, eq=False)
class Instrument:
    """Steering and readings of one model.

    Args:
        steering: What is added at every forward pass.
        strengths: The same as it was asked for.
        where: Which tokens are steered, in a word.
        probe: What reads, restricted to what is asked for; None for a model that is only run.
        read: The concepts that are told of; rules may look at more.
        baseline: What z is stated against; None for centred cosines.
        policies: Rules that raise alarms.
        tokens: Whether every token's scores are told.
        vectors: Where the vectors are, and the hash of what they read.
    """

    steering: Steering = Steering()
    strengths: Mapping[str, float] = field(default_factory=dict)
    where: str = "all"
    probe: Probe | None = None
    read: tuple[str, ...] = ()
    baseline: Baseline | None = None
    policies: tuple[Policy, ...] = ()
    tokens: bool = False
    vectors: tuple[str, str] = ("", "")

    @classmethod
    def open(cls, arguments: Arguments, info: ModelInfo) -> Instrument:
        """Load what the arguments name and see that all of it belongs together.

        Raises:
            UnknownName: A concept does not exist.
            MismatchError: Vectors or baseline are of another model.
            EngineError: A strength leaves the safe range, or nobody has measured it; a rule needs what is not at hand.
        """
        if not arguments.vectors:
            return cls()
        vectors = load_vectors(arguments.vectors)
        vectors.check(info)
        read = _read(arguments.read, vectors)
        refuse_unsafe(arguments, vectors)
        baseline = _baseline(arguments, vectors)
        policies = tuple(policy for rule in arguments.rules for policy in read_policies(rule))
        _check_rules(policies, vectors, baseline)
        watched_for = dict.fromkeys(signal.concept for policy in policies for signal in policy.rule.signals)
        names = tuple(dict.fromkeys((*read, *watched_for)))
        # A rule sees every concept that it names, a trace those that are read: the columns of both are the same.
        return cls(
            steering=steering_of(arguments, vectors),
            strengths=dict(arguments.steer),
            where=arguments.where,
            probe=Probe(vectors.select(names), template=info.template is not None) if names else None,
            read=read,
            baseline=baseline.select(names) if baseline and names else None,
            policies=policies,
            tokens=arguments.tokens,
            vectors=(arguments.vectors, vectors_id(vectors)),
        )

    @property
    def readouts(self) -> tuple[Readout, ...]:
        return self.probe.readouts if self.probe else ()

    @property
    def steered(self) -> bool:
        """Whether anything is added at all: strength 0 is no steering."""
        return any(not term.idle for term in self.steering.terms)

    def again(self, request: Request, result: Result) -> Request | None:
        """What reads the words of a steered reply by the untouched model; None where the first reading is that already."""
        if not (self.steered and self.probe):
            return None
        return replace(request, prefill=request.prefill + result.text, sampling=None, steering=Steering(), readouts=self.readouts)

    def facts(self) -> dict[str, Any]:
        """What was done and how it was read: the same for every reply."""
        if not self.vectors[0]:
            return {"steering": None}
        layers = sorted({layer for term in self.steering.terms for layer in term.layers})
        out: dict[str, Any] = {"steering": {"strengths": dict(self.strengths), "where": self.where, "layers": layers}}
        out |= dict(zip(("vectors", "vectors_id"), self.vectors, strict=True))
        if self.probe:
            out |= {"layer": self.probe.vectors.layer, "unit": "z" if self.baseline else "centred cosine"}
            out |= {"baseline": self.baseline.source if self.baseline else None}
        return out

    def told(self, result: Result, untouched: Result | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was read of a reply: for every concept the mean and the peak over its tokens, and the mean over the user's words.

        Args:
            result: Of the reply.
            untouched: Of :meth:`again`, for a steered one.

        Returns:
            The summary, and beside it every token with its scores; empty where that is not asked for.
        """
        if self.probe is None:
            return {}, {}
        own = self._trace(result)
        plain = own if untouched is None else self._trace(untouched)
        spoken, said = words_of(own.layout, result.text), words_of(plain.layout, result.text)
        readings: dict[str, Any] = {}
        for name, column in ((name, own.names.index(name)) for name in self.read):
            readings[name] = _summary(plain.scores[said, column]) | {"user": _mean(plain.scores[plain.of("user"), column])}
            if untouched is not None:
                steered = _summary(own.scores[spoken, column])
                readings[name]["steered"] = {"mean": steered["mean"], "peak": steered["peak"]}
        summary: dict[str, Any] = {"readings": readings, "tokens_read": len(said)}
        if self.policies:
            alerts = [alert for alert in watched(plain, self.policies).alerts if alert.token >= plain.layout.n_prompt]
            keys = ("rule", "text", "token", "speaker", "words", "scores")
            summary["alarms"] = [{key: getattr(alert, key) for key in keys} for alert in alerts]
        return summary, self._every_token(own, plain, spoken) if self.tokens else {}

    def _every_token(self, own: Trace, plain: Trace, spoken: np.ndarray) -> dict[str, Any]:
        def columns(scores: np.ndarray) -> dict[str, list[float | None]]:
            return {name: [_plain(v) for v in scores[:, own.names.index(name)]] for name in self.read}

        table: dict[str, Any] = {"text": [own.layout.tokens[i] for i in spoken]}
        if plain is own:
            return {"tokens": table | {"scores": columns(own.scores[spoken])}}
        # The same words, read again, may be cut into other tokens.
        spans = [own.layout.offsets[i] for i in spoken]
        again = carried_over(spans, plain.layout.offsets, plain.scores)
        return {"tokens": table | {"scores": columns(again), "steered": columns(own.scores[spoken])}}

    def _trace(self, result: Result) -> Trace:
        assert self.probe is not None
        trace = trace_of(result, self.probe, id="reply", format="")
        return self.baseline.standardise(trace) if self.baseline else trace


def words_of(layout: Layout, reply: str) -> np.ndarray:
    """Which tokens are the words of the reply: neither its given beginning, nor a stop string that was generated behind it.

    Example:
        >>> tokens, offsets = ("Hi", ":", " yes", ".", "END"), ((0, 2), (2, 3), (3, 7), (7, 8), (8, 11))
        >>> roles = ("user", "template", "assistant", "assistant", "assistant")
        >>> words_of(Layout("Hi: yes.END", tokens, (1, 2, 3, 4, 5), offsets, roles, 2), " yes.")
        array([2, 3])
    """
    own = [i for i in range(layout.n_prompt, len(layout)) if layout.roles[i] == "assistant"]
    if not own or not reply:
        return np.array([], dtype=np.int64)
    # Some tokenizers leave the white space of a first token out of its span. Searched from behind: what was given before may be
    # the same words.
    first, words = layout.offsets[own[0]][0], reply.lstrip()
    found = layout.text.rfind(words, first)
    if not words or found < 0:
        return np.array(own, dtype=np.int64)
    start, end = max(first, found - (len(reply) - len(words))), found + len(words)
    return np.array([i for i in own if layout.offsets[i][0] < end and layout.offsets[i][1] > start], dtype=np.int64)


# ── what the arguments name ──


def _read(asked: tuple[str, ...] | None, vectors: ConceptVectors) -> tuple[str, ...]:
    if asked is None:
        return tuple(name for name in SHOWCASE if name in vectors) or vectors.names[:12]
    if asked in (("all",), ("none",)):
        return vectors.names if asked == ("all",) else ()
    for name in asked:
        vectors.index(name)
    return asked


def refuse_unsafe(arguments: Arguments, vectors: ConceptVectors) -> None:
    """Refuse a mixture that leaves the safe range: a sweep of strengths that were quietly made smaller would be no sweep.

    Raises:
        UnknownName: There is no such concept.
        EngineError: It is too strong, or nobody has measured what is.
    """
    named = {name: s for name, s in arguments.steer.items() if not _RANDOM.fullmatch(name)}
    for name in named:
        vectors.index(name)
    if arguments.allow_unsafe or not any(arguments.steer.values()):
        return
    found, anyway = vectors.calibration, "or -M allow_unsafe=true"
    if found is None:
        raise EngineError(f"how strongly these vectors may steer was never measured: run affectlens calibrate, {anyway}")
    for name, strength in named.items():
        low, high = found.safe[name]
        if not low <= strength <= high:
            raise EngineError(
                f"{name}:{strength:g} leaves the safe range {low:.3g} to {high:.3g}: use a strength within it, {anyway}"
            )
    # A random direction is a control of some concept's: it may be as long as the longest of those.
    longest = max(max(-low, high) for low, high in found.safe.values())
    share = found.share(named) + sum(abs(s) / longest for name, s in arguments.steer.items() if name not in named)
    if share > 1:
        raise EngineError(
            f"these strengths together use {share:.3g} times the safe range: multiply them by {1 / share:.2g}, {anyway}"
        )


def steering_of(arguments: Arguments, vectors: ConceptVectors) -> Steering:
    """The mixture as steering, with the directions of the layer that it acts on."""
    layer, mixture = vectors.steering_layer, Steering()
    row = vectors.row(layer)
    for name, strength in arguments.steer.items():
        if match := _RANDOM.fullmatch(name):
            direction = random_directions(int(match[1]), vectors.directions.shape[-1], seed=0)[-1]
            norm = float(vectors.residual_norms[row])
            mixture = mixture + along(direction, layer=layer, norm=norm, strength=strength, name=name)
        else:
            mixture = mixture + strength * vectors[name]
    return mixture.at(PLACES[arguments.where])


def _baseline(arguments: Arguments, vectors: ConceptVectors) -> Baseline | None:
    if arguments.baseline == "none":
        return None
    beside = vectors_folder(arguments.vectors) / f"baseline-{vectors.layer}.json"
    if not arguments.baseline and not beside.exists():
        return None
    file = Path(arguments.baseline) if arguments.baseline else beside
    if not file.exists():
        raise FormatError(f"{file} does not exist: measure it with affectlens baseline, or leave baseline out")
    found = Baseline.load(file)
    found.check(Probe(vectors))
    return found


def _check_rules(policies: Sequence[Policy], vectors: ConceptVectors, baseline: Baseline | None) -> None:
    if policies and baseline is None:
        raise EngineError("rules compare z with their thresholds, and there is no baseline: run affectlens baseline first")
    for policy in policies:
        if policy.rule.needs - {"inner"}:
            raise EngineError(
                f"the rule {policy.rule.name!r} needs a second reading, which is not made here: name plain concepts"
            )
        assert baseline is not None
        policy.rule.check(vectors.names, baseline.speakers)


# ── numbers for JSON ──


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return round(float(known.mean(dtype=np.float64)), 4) if len(known) else None


def _summary(values: np.ndarray) -> dict[str, Any]:
    """Mean, peak, and at which token the peak is; None where nothing was read."""
    if not np.isfinite(values).any():
        return {"mean": None, "peak": None, "at": None}
    at = int(np.nanargmax(values))
    return {"mean": _mean(values), "peak": _plain(values[at]), "at": at}


def _plain(value: Any) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
