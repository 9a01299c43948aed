"""Where the time goes when affectlens reads one layer: by part of the work, and how fast the multiplications are.

    python bench/profile_reading.py          48 stories, one thread, a minute or two
    python bench/profile_reading.py --short  a few texts through a tiny model

The operators are timed by torch's profiler, which also counts what matrix products compute; a product is told by the shape of its
weights. What Python does besides is timed apart: making tokens and layouts of the texts, and what the hook at the layer does.
Shares are of the time of the profiled run, so that they add up to one; how fast the same run is without the profiler stands
beside. What all tensors take at once is measured in a run of its own: memory beyond it is the allocator's and Python's. Both ways
of reading are profiled, with and without compiled blocks. Writes ``bench/results/profile_reading.json``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from affectlens.engine import Readout, Request, Where
from affectlens.engines.hf import HFEngine
from affectlens.engines.residual import Pass
from affectlens.errors import ModelSupportError
from affectlens.models import locate
from extraction import FIRST_TOKEN, Shapes, stories
from host import MODEL, RESULTS, begun, keep, peak, say, threads, tiny_model
from speed_tables import profile_reading

OPERATORS = 8
TIMES = 5
"""Runs without the profiler, of which the median counts."""

PRODUCTS = ("mm", "addmm", "linear", "bmm", "baddbmm")
"""Endings of the names of operators that multiply matrices, whoever makes them (aten, oneDNN, a compiled block)."""

PARTS = {
    "projections": "projections to and from attention",
    "mlp": "multilayer perceptrons",
    "attention": "attention",
    "elementwise": "norms, rotary angles, gates, sums, copies",
    "tokens": "tokens and layouts of the texts",
    "hooks": "the hook: means and projections",
    "python": "Python: batching, calls, results",
}
"""What the table calls each part."""


WAYS = {"plain": False, "compiled": True}
"""Whether the blocks are compiled."""


def measure(short: bool = False) -> dict[str, Any]:
    """Profile reading at two thirds of the depth with one thread."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with threads(1):
        folder = tiny_model() if args.short else Path(locate(MODEL, log=say).location)
        shapes = Shapes.of(folder)
        texts, lengths = stories(folder, args.texts)
        tops = peak(1, width=shapes.width, hidden=shapes.hidden, short=args.short)[args.dtype]["seconds"]
        ways = {}
        for way, compiled in WAYS.items():
            try:
                engine = HFEngine.load(str(folder), device="cpu", dtype=args.dtype, compile=compiled)
            except ModelSupportError as error:  # a machine without a compiler
                say(f"  {way}: {error}")
                continue
            ways[way] = _profiled(engine, texts, shapes, times=1 if args.short else TIMES)
    tokens = sum(lengths)
    for found in ways.values():
        found["tokens a second"] = tokens / statistics.median(found["without the profiler"])
    return {
        **begun("profile_reading"),
        "model": MODEL if not args.short else folder.name,
        "dtype": args.dtype,
        "texts": len(texts),
        "tokens": tokens,
        "layer": shapes.layer,
        "bound": tops * 1e12 / (shapes.flops(shapes.layer + 1, lengths) / tokens),
        "peak_tflops": tops,
        "ways": ways,
    }


def _profiled(engine: HFEngine, texts: Sequence[str], shapes: Shapes, *, times: int) -> dict[str, Any]:
    readout = Readout((shapes.layer,), Where(after=FIRST_TOKEN - 1), "mean")

    def read() -> None:
        list(engine.read(texts, readout))

    read()
    plain = [_seconds(read) for _ in range(times)]
    with _timed_hooks() as hooks, profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
        total = _seconds(read)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as remembered:
        read()
    layouts = min(_seconds(lambda: engine.layouts.of_all([Request(text) for text in texts])) for _ in range(3))
    parts, flops = _parts(profiled.key_averages(group_by_input_shape=True), shapes)
    # The recording that the hook does is made of operators, too: they are its own, not the model's.
    parts["elementwise"] = max(0.0, parts["elementwise"] - sum(hooks))
    parts |= {"tokens": layouts, "hooks": sum(hooks)}
    parts["python"] = max(0.0, total - sum(parts.values()))
    multiplied = parts["projections"] + parts["mlp"]
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    spent = sum(event.self_cpu_time_total for event in events)
    return {
        "seconds": total,
        "tensors_mb": _most_at_once(remembered) / 1e6,
        "without the profiler": plain,
        "multiplying_tflops": flops / multiplied / 1e12 if multiplied else 0.0,
        "parts": {key: [PARTS[key], parts[key] / total] for key in PARTS},
        "layouts over plain": layouts / statistics.median(plain),
        "operators": [[_named(event.key), event.self_cpu_time_total / spent, event.count] for event in events[:OPERATORS]],
    }


def _parts(events: Any, shapes: Shapes) -> tuple[dict[str, float], float]:
    """Seconds of each part of the model, and the operations of its matrix products."""
    parts, flops = dict.fromkeys(("projections", "mlp", "attention", "elementwise"), 0.0), 0.0
    for event in events:
        name = event.key.partition("::")[2].strip("_").lower()
        if "attention" in name:
            part = "attention"
        elif name.endswith(PRODUCTS) or "linear" in name:
            sizes = {size for shape in event.input_shapes for size in (shape or ())}
            part = "mlp" if sizes & {shapes.hidden, 2 * shapes.hidden} else "projections"
            flops += event.flops or (0.0 if event.key.startswith("aten::") else _operations(event.input_shapes, event.count))
        else:
            part = "elementwise"
        parts[part] += event.self_cpu_time_total / 1e6
    return parts, flops


def _most_at_once(profiled: profile) -> int:
    """Bytes that tensors made in this run had at most at the same time."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _named(key: str) -> str:
    """An operator's name; what the compiler made has a hash for a name."""
    return "what is compiled" if key.startswith("## Call CompiledFxGraph") else key


def _operations(shapes: Sequence[Any], count: int) -> float:
    """Multiplications and additions of a product whose operator the profiler has no formula for: rows by inner by columns."""
    matrices = [shape for shape in shapes if shape is not None and len(shape) >= 2]
    if len(matrices) < 2:
        return 0.0
    *rows, inner = matrices[0]
    columns = next((size for size in matrices[1] if size != inner), inner)
    product = 2.0 * inner * columns * count
    for size in rows:
        product *= size
    return product


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def _timed_hooks() -> Iterator[list[float]]:
    """Seconds of every visit of a layer while the block lasts; on a CPU they are those of the work that it asks for."""
    plain, taken = Pass.visit, list[float]()

    def visit(self: Pass, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        try:
            return plain(self, layer, hidden)
        finally:
            taken.append(time.perf_counter() - start)

    Pass.visit = visit  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        Pass.visit = plain  # type: ignore[method-assign]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--short", action="store_true", help="a tiny model, a few texts, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "profile_reading.json")
    args = parser.parse_args(argv)
    if args.short:
        args.texts, args.dtype, args.out = 4, "float32", None
    return args


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(profile_reading(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
