"""affectlens: ``engine.read`` with a mean readout, as the documentation shows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from protocol import Job, Run, serve

from affectlens.engine import Readout, Where
from affectlens.engines.hf import HFEngine


def load(job: Job) -> Run:
    engine = HFEngine.load(job.model, device="cpu", dtype=job.dtype, **job.options)
    readout = Readout(layers=job.layers, where=Where(after=job.first_token - 1), pool="mean")

    def run(texts: Sequence[str]) -> np.ndarray:
        return np.stack([reading.values for reading in engine.read(texts, readout)])

    return run


if __name__ == "__main__":
    serve(load, "affectlens")
