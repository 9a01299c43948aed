"""A toy that acts: it says what a test wants said, and how often it does the deed is a function of how it is steered.

    ActingToy(lambda dose: 0.2 + 4 * dose, perform)

``perform(chat, act, rng)`` writes a whole reply; ``act`` says whether the deed is done in it. It is drawn with probability
``rate(dose)``, where ``dose`` is the summed strength of the steering's terms that are named after the planted concept: random and
shuffled directions have dose 0. What is drawn depends on the request's seed alone, so with common seeds an arm of a higher rate
acts wherever one of a lower rate does. Tokens, steering and readings are those of the toy underneath, whose reply is read in one
pass: hundreds of replies take a second.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from affectlens.engine import Chat, Engine, Request, Result, Steering, check_request, refuse_too_long
from affectlens.engines.toy import ToyEngine
from affectlens.experiments import Experiment
from affectlens.experiments.arms import Sweep
from affectlens.experiments.episodes import EPISODES
from affectlens.experiments.runner import Plan, open_run, play_experiment
from affectlens.vectors import ConceptVectors

Rate = Callable[[float], float]
Perform = Callable[[Chat, bool, random.Random], str]


def dose(steering: Steering, concept: str) -> float:
    """Summed strength of what is added along the concept."""
    return sum(term.strength for term in steering.terms if term.name == concept and term.mode == "add")


class ActingToy(ToyEngine):
    """A toy whose replies are written by a test.

    Args:
        rate: Probability of the deed at a dose.
        perform: Writes a reply to a chat: with the deed or without, by the random numbers that it is given. A prefill that the
            reply was to begin with may be repeated or left out.
        concept: Whose strength is the dose.
        options: Of :class:`ToyEngine`.

    Attributes:
        asked: The requests that generated a reply.

    Example:
        >>> engine = ActingToy(lambda dose: 10 * dose, lambda chat, act, rng: "I do." if act else "I do not.")
        >>> engine.generate([(("user", "Do it."),)])
        ['I do not.']
    """

    def __init__(self, rate: Rate, perform: Perform, *, concept: str = "desperate", **options: Any) -> None:
        super().__init__(**options)
        self._rate, self._perform, self._concept = rate, perform, concept
        self.asked: list[Request] = []

    def reply(self, request: Request) -> str:
        """What it says, without the prefill and whatever ``max_tokens`` is."""
        assert request.sampling is not None
        rng = random.Random(request.sampling.seed)
        act = rng.random() < self._rate(dose(request.steering, self._concept))
        chat = (("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
        return self._perform(chat, act, rng).removeprefix(request.prefill)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            if request.sampling is None or request.stream:
                yield from super().run([request])
                continue
            check_request(request, self.info)
            refuse_too_long(len(self.layout(request)), request, self.info)
            self.asked.append(request)
            text, finish = self.reply(request), "stop"
            spans = self._encode(text)[1]
            if len(spans) > request.sampling.max_tokens:
                text, finish = text[: spans[request.sampling.max_tokens - 1][1]], "length"
            for stop in request.sampling.stop:
                if stop in text:
                    text, finish = text[: text.index(stop)], "stop"
            (read,) = super().run([replace(request, sampling=None, prefill=request.prefill + text)])
            yield replace(read, text=text, finish=finish)

    def _script(self, request: Request) -> list[tuple[int, str]]:
        self.asked.append(request)
        text = self.reply(request)
        return [(i, text[a:b]) for i, (a, b) in zip(*self._encode(text), strict=True)]


# ── an experiment on the toy ──


def play(
    experiment: Experiment, engine: Engine, folder: Path, *, vectors: ConceptVectors, judge: Any = None, **plan: Any
) -> list[dict[str, Any]]:
    """Play an experiment without its report, and give the rows of ``episodes.parquet``.

    Args:
        experiment, engine, vectors, judge: As for :func:`affectlens.experiments.runner.play_experiment`.
        folder: A run directory.
        plan: Of :class:`affectlens.experiments.runner.Plan`; ``sweeps`` may be texts. ``allow_exec`` is given.
    """
    import pyarrow.parquet as pq

    sweeps = tuple(Sweep.parse(each) if isinstance(each, str) else each for each in plan.pop("sweeps", ()))
    what = {"vectors": vectors, "plan": Plan(sweeps, **plan)}
    with open_run(folder, experiment, engine=engine, judge=judge.id if judge else "", **what) as run:
        play_experiment(experiment, engine, run=run, judge=judge, allow_exec=True, **what)
    return pq.read_table(folder / EPISODES).to_pylist()


def rates(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of acts in each arm, all levels together."""
    acts: dict[str, list[bool]] = {}
    for row in rows:
        acts.setdefault(row["arm"], []).append(row["act"])
    return {arm: sum(each) / len(each) for arm, each in acts.items()}
