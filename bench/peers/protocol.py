"""What every subject of the extraction benchmark has in common: one process, one JSON job in, one JSON result out.

A subject is a script that calls :func:`serve` with a function that loads the model and returns a function which turns
texts into an array ``(texts, layers, width)``. Everything that could favour one subject is done here, once: threads,
warm-up, the clock and the memory that is counted. It runs in the environments of all peers, so it needs torch and numpy only.

The clock covers what a user waits for, from a list of strings to a float32 array: tokenising, batching, the forward passes
and the means. Loading the model and a warm-up over a few of the texts come before.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

Run = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Args:
        model: Model folder as ``save_pretrained`` writes it.
        texts: JSON file with a list of strings.
        layers: The layers whose residual is wanted, counted from 0.
        first_token: The mean starts at this token of each text, counted from 1.
        threads: Threads for matrix multiplications.
        dtype: ``bfloat16`` or ``float32``.
        out: Where the array goes (``.npy``).
        warm_up: How many of the texts are read once before the clock starts.
        options: What makes this configuration of the subject (batch size, stopped early, …).
    """

    model: str
    texts: str
    layers: tuple[int, ...]
    first_token: int
    threads: int
    dtype: str
    out: str
    warm_up: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 8))

    def own(self, row: torch.Tensor) -> torch.Tensor:
        """Mean of one text's residuals ``(tokens, width)``, without padding, from the first counted token on, in float32."""
        return row[self.first_token - 1 :].float().mean(0)


def serve(load: Callable[[Job], Run], package: str) -> None:
    """Answer the job on stdin.

    Args:
        load: Loads the model and returns the function that is measured.
        package: The distribution whose version is reported.
    """
    # Libraries print progress to stdout, which carries the result here: they get stderr instead.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    described = json.load(sys.stdin)
    job = Job(**{**described, "layers": tuple(described["layers"])})
    texts = json.loads(Path(job.texts).read_text())
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)
    run = load(job)

    _touch_weights()
    loaded = _settled_memory()
    run(texts[: job.warm_up])
    warm = _settled_memory()
    # Writing 5 resets the high-water mark, so that the peak is that of the measured pass alone.
    Path("/proc/self/clear_refs").write_text("5")
    cpu, clock = time.process_time(), time.perf_counter()
    values = run(texts)
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    peak = _memory("VmHWM")

    if values.dtype != np.float32 or values.shape[:2] != (len(texts), len(job.layers)):
        raise ValueError(f"{values.dtype} {values.shape} is not float32 (texts, layers, width)")
    np.save(job.out, values)
    json.dump(
        {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "loaded_mb": loaded,
            "warm_mb": warm,
            "peak_mb": peak,
            "above_mb": peak - loaded,
            "versions": {name: importlib.metadata.version(name) for name in (package, "torch", "transformers")},
        },
        answer,
    )
    answer.close()


def batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Consecutive slices of ``items``, in the order in which they arrived."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _touch_weights() -> None:
    # Weights are mapped from the file and become resident when first used: without this, a subject that loads lazily
    # would be charged for its weights, and one that never reaches the last blocks would not.
    for thing in gc.get_objects():
        # Not isinstance, which would ask what a weak reference stands for: compilers leave some behind whose objects are gone.
        if issubclass(type(thing), torch.nn.Parameter) and thing.device.type == "cpu":
            thing.detach().sum()


def _settled_memory() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory("VmRSS")


def _memory(key: str) -> float:
    """A line of /proc/self/status in megabytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"this kernel does not report {key}: the benchmark needs Linux")
    return int(found[1]) * 1024 / 1e6
