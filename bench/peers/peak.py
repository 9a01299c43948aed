"""The machine's matrix-multiply peak: the best of several shapes, large squares and the model's own layers, in both dtypes."""

from __future__ import annotations

import json
import sys
import time

import torch

REPEATS = 4


def tera_flops(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Best of a few runs, as a linear layer does it (weights stored transposed), in 10^12 operations per second."""
    inputs = torch.randn(rows, inner, dtype=dtype)
    weights = torch.randn(columns, inner, dtype=dtype)
    torch.nn.functional.linear(inputs, weights)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weights)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best / 1e12


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    torch.set_grad_enabled(False)
    width, hidden = job["width"], job["hidden"]
    shapes = [(2048, 2048, 2048), (4096, 4096, 4096), (8192, width, hidden), (8192, hidden, width), (2048, width, hidden)]
    peaks = {
        str(dtype).removeprefix("torch."): max(tera_flops(*shape, dtype) for shape in shapes)
        for dtype in (torch.bfloat16, torch.float32)
    }
    json.dump(peaks, sys.stdout)


if __name__ == "__main__":
    main()
