"""Each experiment's whole runner finds what was planted: a rise, a turn and nothing, over twenty seeds.

A toy that acts plays the experiment's own cases, whose own rules grade it (code is run in the sandbox). Three emotions are swept
in one run: how often the deed is done rises with the first, rises and falls again with the second and stays with the third.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import hacking_replies
import test_blackmail
import test_warmth
from acting import ActingToy, Perform, play
from affectlens.engine import Reading, Request, Result
from affectlens.experiments import Exec, Ran, load_experiment, sandbox
from affectlens.experiments.analysis import analyse
from affectlens.runs import content_id
from planted import toy_bench

STRENGTHS = (-0.1, 0.0, 0.05, 0.1)
BASE = 0.4
CURVES: Mapping[str, tuple[float, ...]] = {
    "desperate": (0.05, BASE, 0.65, 0.9),
    "calm": (0.05, BASE, 0.95, 0.05),
    "angry": (BASE,) * 4,
}
"""Probability of the deed at each of the strengths."""

SHAPES = {"desperate": "rises", "calm": "rises then falls", "angry": "no trend found"}
SEEDS = range(20)
# Episodes of an arm, of which 24 are no controls.
PLAYED: Mapping[str, tuple[Perform, int]] = {
    "blackmail": (test_blackmail.perform, 39),
    "hacking": (hacking_replies.perform, 48),
    "warmth": (test_warmth.perform, 48),
}


class Planted(ActingToy):
    """Does the deed as the curves say. Half of the draws are shared by all arms, as luck is where seeds are common; the other
    half is an arm's own, as a steered model's other words are. Nothing is asked of readings here, so they are noise."""

    def __init__(self, perform: Perform) -> None:
        super().__init__(lambda _: 0.0, perform)

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            assert request.sampling is not None
            text = self.reply(request)
            layout = self.layout(replace(request, prefill=request.prefill + text))
            rng, readings = np.random.default_rng(request.sampling.seed), []
            for readout in request.readouts:
                positions = np.flatnonzero(readout.where.mask(layout))
                shape = len(readout.layers), len(positions)
                values = rng.normal(size=(*shape, 0 if readout.onto is None else readout.onto.shape[1]))
                readings.append(Reading(values.astype(np.float32), np.ones(shape, np.float32), positions))
            yield Result(text, layout, tuple(readings), finish="stop")

    def reply(self, request: Request) -> str:
        assert request.sampling is not None
        pushes = [(term.name, term.strength) for term in request.steering.terms if term.strength]
        shared, own = random.Random(request.sampling.seed), random.Random(f"{request.sampling.seed} {pushes}")
        rate = BASE
        for name, strength in pushes:
            rate = CURVES[name][STRENGTHS.index(strength)] if name in CURVES else rate
        draw, mine = shared.random(), own.random()
        act = (mine if pushes and own.random() < 0.5 else draw) < rate
        chat = (("user", request.prompt),) if isinstance(request.prompt, str) else request.prompt
        return self._perform(chat, act, shared).removeprefix(request.prefill)


@pytest.fixture(autouse=True, scope="module")
def _code_is_run_once() -> Iterator[None]:
    """Twenty runs hand in the same few programs: each goes through the sandbox once."""
    really, known = sandbox.run, dict[str, Ran]()

    def run(job: Exec) -> Ran:
        key = content_id(asdict(job))
        if key not in known:
            known[key] = really(job)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "run", run)
        yield


@pytest.mark.parametrize("name", PLAYED)
def test_what_was_planted_is_found_over_twenty_seeds(name: str, tmp_path: Path) -> None:
    experiment, (perform, n) = load_experiment(name), PLAYED[name]
    experiment.levels = experiment.levels[:1]  # type: ignore[misc]  # baselines of others would only take time
    shapes: dict[str, list[str]] = {emotion: [] for emotion in CURVES}
    held: dict[str, int] = dict.fromkeys(CURVES, 0)
    for seed in SEEDS:
        rows = play(
            experiment,
            Planted(perform),
            tmp_path / str(seed),
            vectors=toy_bench(0).vectors,
            sweeps=[f"{emotion}=-0.1,0.05,0.1" for emotion in CURVES],
            n=n,
            random=4,
            shuffled=0,
            seed=seed,
        )
        outcome = analyse({key: [row[key] for row in rows] for key in rows[0]}, experiment, draws=500, seed=seed)
        labels = next(table.rows for table in outcome.tables if table.id == "shapes")
        findings = {finding.id: finding for finding in outcome.findings}
        for emotion, label, *_ in labels:
            shapes[str(emotion)].append(str(label))
            change = findings[f"trend-{emotion}"].estimate
            curve = CURVES[str(emotion)]
            assert change is not None
            held[str(emotion)] += change.low <= 100 * (curve[-1] - curve[0]) <= change.high
    right = {emotion: labels.count(SHAPES[emotion]) for emotion, labels in shapes.items()}
    assert min(right.values()) >= 18 and sum(right.values()) >= 57, (right, shapes)
    assert min(held.values()) >= 17 and sum(held.values()) >= 55, held
