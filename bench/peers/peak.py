"""The machine's matrix-multiply peak: the best of several shapes, large squares and the model's own layers, in both dtypes.

It is told for both clocks, so that a share of the peak compares like with like: by processor time a busy machine looks idle.
"""

from __future__ import annotations

import json
import sys
import time

import torch

REPEATS = 6
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def tera_flops(rows: int, inner: int, columns: int, dtype: torch.dtype) -> dict[str, float]:
    """Best of a few runs by each clock, as a linear layer does it (weights stored transposed), in 10^12 operations per second."""
    inputs = torch.randn(rows, inner, dtype=dtype)
    weights = torch.randn(columns, inner, dtype=dtype)
    torch.nn.functional.linear(inputs, weights)
    best = dict.fromkeys(CLOCKS, float("inf"))
    for _ in range(REPEATS):
        start = {name: clock() for name, clock in CLOCKS.items()}
        torch.nn.functional.linear(inputs, weights)
        best = {name: min(best[name], clock() - start[name]) for name, clock in CLOCKS.items()}
    return {name: 2 * rows * inner * columns / taken / 1e12 for name, taken in best.items()}


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    width, hidden = job["width"], job["hidden"]
    shapes = [(2048, 2048, 2048), (4096, 4096, 4096), (8192, width, hidden), (8192, hidden, width), (2048, width, hidden)]
    if job.get("short"):
        shapes = [(256, 256, 256)]
    peaks = {}
    for dtype in (torch.bfloat16, torch.float32):
        measured = [tera_flops(*shape, dtype) for shape in shapes]
        peaks[str(dtype).removeprefix("torch.")] = {clock: max(one[clock] for one in measured) for clock in CLOCKS}
    json.dump(peaks, sys.stdout)


if __name__ == "__main__":
    main()
