"""affectlens: find, check, map, watch and steer the emotion concepts inside any open-weights language model.

>>> import affectlens as al
>>> engine = al.open_engine("toy")                                   # or "smollm2-135m", a Hub id, a folder, a GGUF file
>>> reading = next(engine.read(["the sea was flat"], al.Readout(layers=(3,))))
>>> reading.values.shape
(1, 64)

Everything is loaded when it is first used: importing affectlens does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affectlens.activations import Activations
    from affectlens.baseline import Baseline
    from affectlens.concepts import ConceptSet
    from affectlens.curation import Scoring, score_corpus
    from affectlens.discovery import Recipe, discover
    from affectlens.engine import Readout, Request, Sampling, Steering, Where, open_engine
    from affectlens.engines.residual import steer
    from affectlens.errors import AffectlensError
    from affectlens.monitor import Monitor
    from affectlens.pipeline import study
    from affectlens.report import Report
    from affectlens.vectors import ConceptVectors

_HOME = {
    "Activations": "activations",
    "AffectlensError": "errors",
    "Baseline": "baseline",
    "ConceptSet": "concepts",
    "ConceptVectors": "vectors",
    "Monitor": "monitor",
    "Readout": "engine",
    "Recipe": "discovery",
    "Report": "report",
    "Request": "engine",
    "Sampling": "engine",
    "Scoring": "curation",
    "Steering": "engine",
    "Where": "engine",
    "discover": "discovery",
    "open_engine": "engine",
    "score_corpus": "curation",
    "steer": "engines.residual",
    "study": "pipeline",
}

__all__ = [
    "Activations",
    "AffectlensError",
    "Baseline",
    "ConceptSet",
    "ConceptVectors",
    "Monitor",
    "Readout",
    "Recipe",
    "Report",
    "Request",
    "Sampling",
    "Scoring",
    "Steering",
    "Where",
    "discover",
    "open_engine",
    "score_corpus",
    "steer",
    "study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'affectlens' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"affectlens.{_HOME[name]}"), name)
    globals()[name] = value
    return value
