"""A bench of the toy engine with every effect planted or left out: what tests of studies and ``bench/power.py`` use."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from affectlens.calibration import Bounds, Calibration
from affectlens.concepts import ConceptSet
from affectlens.discovery import Recipe, make_vectors, open_run, open_stories
from affectlens.engines.toy import CUES, ToyEngine
from affectlens.studies import Bench, Finding, Outcome, load_study

CONCEPTS = ConceptSet.load("emotions").select(sorted(CUES))
RECIPE = Recipe(per_concept=8, neutral="model", draws=5)


@lru_cache(maxsize=64)
def toy_bench(seed: int = 0, draws: int = 200, tone: tuple[tuple[str, float], ...] = (), **options: Any) -> Bench:
    """Vectors of a toy with this seed, fitted as for any model; ``options`` go to :class:`ToyEngine` (effect, coupled, …).

    A tone is given as pairs, because what is cached must be hashable.
    """
    engine = ToyEngine(seed=seed, tone=dict(tone), **options)
    source = open_stories("model", CONCEPTS, engine, RECIPE)
    with open_run(tempfile.mkdtemp(prefix="planted-"), engine, source, RECIPE) as run:
        found = make_vectors(engine, source, run, RECIPE)
    folder = Path(tempfile.mkdtemp(prefix="study-"))
    return Bench(found.vectors, found.concepts, found.activations, found.neutral, engine, draws, seed, folder=folder)


def with_calibration(bench: Bench, *, strength: float = 0.15, layer: int = 3) -> Bench:
    """The bench with a calibration by hand, for the studies that steer: what the toy finds by itself is tested elsewhere."""
    vectors, fingerprint = bench.vectors, str(bench.vectors.model["fingerprint"])
    safe = dict.fromkeys(vectors.names, (-strength, strength))
    found = Calibration(layer, vectors.layer, safe, vectors.names, Bounds(), fingerprint)
    return replace(bench, vectors=replace(vectors, calibration=found))


def outcome(study: str, bench: Bench) -> Outcome:
    return load_study(study).run(bench)


def findings(study: str, bench: Bench) -> dict[str, Finding]:
    """The findings of a study by their id."""
    return {finding.id: finding for finding in outcome(study, bench).findings}


def verdicts(study: str, bench: Bench) -> dict[str, str]:
    return {id: finding.verdict for id, finding in findings(study, bench).items()}
