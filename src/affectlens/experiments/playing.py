"""Many cases played at once: what all of them ask is batched, every answer is kept, and a killed run goes on where it was.

A case is a generator that yields what it wants done. So all cases are played side by side, round by round: code is run, then all
that is asked of the model goes to it together, arms of all steerings in one batch. Answers are kept by their content. A run that
was killed plays the same generators again, and they find their answers there.

Which requests share a batch depends only on the cases and on the answers so far, never on what was there already: rounding
differs between batches, and a resumed run must come to the same texts. For the same reason baseline and strength 0 are batches
of their own, of equal composition, so that they can be compared to the bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from affectlens.engine import Engine, Request, Result
from affectlens.errors import AffectlensError, EngineError, FormatError
from affectlens.experiments import Ask, Case, Exec, Experiment, Ran, Reply, Step
from affectlens.experiments.arms import Arm
from affectlens.experiments.episodes import CONTEXT, Episode, Gauge, check_grade
from affectlens.readings import FEW_GENERATED, Readings
from affectlens.runs import content_id, read_json, write_json

ROUNDS = 200
"""A case that asks more often than this would ask for ever."""

Sandbox = Callable[[Exec], Ran]


def reply_seed(seed: int, level: str, episode: int, reply: int) -> int:
    """Seed of a reply: the same in every arm, so that what differs between arms is not luck.

    Levels may ask the same: with seeds of their own, no batch of one lacks what another has been answered already.

    Example:
        >>> reply_seed(0, "plain", 3, 0) == reply_seed(0, "plain", 3, 0) != reply_seed(0, "plain", 3, 1)
        True
    """
    return int.from_bytes(hashlib.sha256(json.dumps([seed, level, episode, reply]).encode()).digest()[:6])


def together(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """Results of requests that generate, in order.

    A batch waits for its longest reply, and its cache grows by being copied. In a session, who is done leaves, and equal prompts
    are read once; where it is exact, company changes nothing either.

    Raises:
        EngineError: One of them cannot be run.
    """
    session = engine.session()
    if not session.shares:
        return list(engine.run(requests))
    tickets = [session.submit(request) for request in requests]
    done: dict[int, Result] = {}
    while session.live:
        for ticket, result in session.step():
            if isinstance(result, AffectlensError):
                session.close()
                raise result
            done[ticket] = result
    return [done[ticket] for ticket in tickets]


class Player:
    """Plays cases of one experiment on one model.

    Args:
        experiment: Whose.
        engine: The model.
        gauge: What is read of every token.
        readings: Where the model's answers are kept.
        execs: Folder where it is kept what code came to.
        seed: Of the run.
        sandbox: Runs code; None where that was not allowed.

    Raises:
        FormatError: Two cases have the same id.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: Engine,
        *,
        gauge: Gauge,
        readings: Readings,
        execs: Path,
        seed: int,
        sandbox: Sandbox | None = None,
    ) -> None:
        self.experiment, self.engine, self.gauge = experiment, engine, gauge
        self._readings, self._execs, self._seed, self._sandbox = readings, execs, seed, sandbox
        self._readouts = {whole: gauge.readouts(whole=whole) for whole in (True, False)}
        self._lengths: dict[Any, int] = {}
        self._cases = experiment.cases()
        ids = [case.id for case in self._cases]
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise FormatError(f"two cases of {experiment.name} are called {twice!r}: give each an id of its own")

    def cases(self, level: str, n: int) -> Iterator[tuple[int, Case]]:
        """The first ``n`` episodes of a level: its cases in rotation.

        Raises:
            FormatError: The level has no case.
        """
        own = [case for case in self._cases if case.level == level]
        if not own:
            raise FormatError(f"{self.experiment.name} has no case of level {level!r}: use {', '.join(self.experiment.levels)}")
        for number in range(n):
            yield number, own[number % len(own)]

    def play(
        self, cast: Sequence[tuple[Arm, int, Case]], *, group: Callable[[Episode], Any], advance: Callable[[int], None]
    ) -> list[Episode]:
        """Play cases to their end.

        Args:
            cast: Arm, number of the episode and case.
            group: Episodes of different groups never share a batch.
            advance: Told how many episodes have come to their end.

        Returns:
            The episodes in the order of the cast, graded by rules.

        Raises:
            EngineError: A case does not fit the model's context, or asks for ever; code is to be run and that was not allowed.
            FormatError: The experiment graded a case as it cannot be graded.
        """
        episodes = [Episode(number, case, arm, reply_seed(self._seed, case.level, number, 0)) for arm, number, case in cast]
        plays = {i: self.experiment.play(each.case) for i, each in enumerate(episodes)}
        steps: dict[int, Step] = {}

        def go_on(i: int, answer: Any) -> None:
            try:
                step = plays[i].send(answer)
                steps[i] = (
                    replace(step, chat=tuple((role, words) for role, words in step.chat)) if isinstance(step, Ask) else step
                )
            except StopIteration as end:
                del plays[i]
                steps.pop(i, None)
                episodes[i].grade = check_grade(end.value, episodes[i], self.experiment)
                advance(1)

        for i in list(plays):
            go_on(i, None)
        rounds = 0
        while plays:
            if rounds == ROUNDS:
                waiting = episodes[next(iter(plays))].case.id
                raise EngineError(
                    f"{waiting} of {self.experiment.name} still asks after {ROUNDS} rounds: let play() return a Grade"
                )
            rounds += 1
            # Code first, until everybody waits for the model or has come to an end.
            if execs := {i: step for i, step in steps.items() if isinstance(step, Exec)}:
                for i, ran in zip(execs, self._ran(list(execs.values())), strict=True):
                    go_on(i, ran)
                continue
            asks = {i: step for i, step in steps.items() if isinstance(step, Ask)}
            if strange := [step for i, step in steps.items() if i not in asks]:
                raise FormatError(f"{self.experiment.name} yields {strange[0]!r}: yield an Ask or an Exec")
            self._ask({i: (episodes[i], ask) for i, ask in asks.items()}, group, go_on)
        return episodes

    # ── asking the model ──

    def _ask(
        self,
        asks: dict[int, tuple[Episode, Ask]],
        group: Callable[[Episode], Any],
        go_on: Callable[[int, Reply], None],
    ) -> None:
        """One round: each that asks gets its answer, those of a group in batches of similar length."""
        groups: dict[Any, list[int]] = {}
        requests: dict[int, Request] = {}
        for i, (episode, ask) in asks.items():
            request = self._request(episode, ask)
            if self._fits(request, episode):
                requests[i] = request
                groups.setdefault(group(episode), []).append(i)
            else:
                episode.finish = CONTEXT
                go_on(i, Reply("", CONTEXT))
        for own in groups.values():
            # Similar lengths together, and what begins alike: the same case, the same arm.
            own.sort(key=lambda i: (-self._length(requests[i]), asks[i][0].case.id, asks[i][0].arm.id, asks[i][0].number))
            parts = math.ceil(len(own) / FEW_GENERATED)
            ends = [round(len(own) * k / parts) for k in range(parts + 1)]
            for a, b in itertools.pairwise(ends):
                chunk = [requests[i] for i in own[a:b]]
                self._readings.gather(chunk)
                for i, result in zip(own[a:b], self._readings.read(chunk), strict=True):
                    episode, ask = asks[i]
                    said = self.gauge.said(result, ask)
                    episode.said.append(said)
                    episode.finish = result.finish
                    go_on(i, said.reply)

    def _request(self, episode: Episode, ask: Ask) -> Request:
        sampling = self.experiment.sampling
        before = episode.said[-1].ask.chat if episode.said else None
        goes_on = before is not None and len(ask.chat) == len(before) + 2 and ask.chat[: len(before)] == before
        return Request(
            ask.chat,
            prefill=ask.prefill,
            sampling=replace(
                sampling,
                seed=reply_seed(self._seed, episode.case.level, episode.number, len(episode.said)),
                max_tokens=ask.max_tokens or sampling.max_tokens,
            ),
            steering=episode.arm.steering,
            readouts=self._readouts[not goes_on],
            transcript=self.engine.info.template is None,
        )

    def _fits(self, request: Request, episode: Episode) -> bool:
        """Whether there is room for the prompt and the reply; only what the model itself has said may fill it."""
        assert request.sampling is not None
        length, room, context = self._length(request), request.sampling.max_tokens, self.engine.info.context
        if length + room <= context:
            return True
        if episode.said:
            return False
        case, name = episode.case, self.experiment.name
        raise EngineError(
            f"{case.id} of {name} ({case.level}) has {length} tokens, and {room} to generate: more than the {context} tokens of "
            f"the context of {self.engine.info.id}: use a model with a longer one, or shorten the case"
        )

    def _length(self, request: Request) -> int:
        same = (request.prompt, request.prefill)
        if same not in self._lengths:
            self._lengths[same] = len(self.engine.layout(request))
        return self._lengths[same]

    # ── running code ──

    def _ran(self, execs: Sequence[Exec]) -> list[Ran]:
        """What came of each; equal ones are run once, and those that were run before not at all."""
        if self._sandbox is None:
            raise EngineError(f"{self.experiment.name} runs code that the model writes: allow it with --allow-exec")
        keys = [content_id(asdict(each)) for each in execs]
        wanted = {key: each for key, each in zip(keys, execs, strict=True) if not (self._execs / f"{key}.json").exists()}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(self._run_one, wanted, wanted.values()))
        return [self._kept(self._execs / f"{key}.json") for key in keys]

    def _run_one(self, key: str, code: Exec) -> None:
        assert self._sandbox is not None
        write_json(self._execs / f"{key}.json", asdict(self._sandbox(code)))

    def _kept(self, path: Path) -> Ran:
        fix = "delete it and run again"
        try:
            return Ran(**read_json(path, fix=fix))
        except TypeError:
            raise FormatError(f"{path} is no result of code: {fix}") from None


def first_difference(one: Sequence[Episode], two: Sequence[Episode]) -> int | None:
    """The number of the first episode in which two arms are not the same to the bit; None when they are."""
    for a, b in zip(one, two, strict=True):
        alike = len(a.said) == len(b.said) and all(x.same(y) for x, y in zip(a.said, b.said, strict=True))
        if not alike or (a.grade, a.number, a.finish) != (b.grade, b.number, b.finish):
            return a.number
    return None


def check_zero(baseline: Sequence[Episode], zero: Sequence[Episode]) -> None:
    """Refuse a run whose instrument changes something when it should do nothing.

    Raises:
        AffectlensError: Strength 0 is not the same as no steering.
    """
    if (number := first_difference(baseline, zero)) is not None:
        raise AffectlensError(
            f"strength 0 is not what no steering is, first in episode {number}: nothing else can be compared. If the run was "
            "begun on another machine or with other packages, start it again with --fresh; else run affectlens doctor"
        )
