"""Where the time goes when affectlens reads one layer: shares of processor time by operator, for docs/benchmarks.md.

python bench/profile_reading.py          writes results/profile_reading.json; python bench/table.py puts it into the page
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from affectlens.engine import Readout, Where
from affectlens.engines.hf import HFEngine
from affectlens.models import locate
from extraction import stories

HERE = Path(__file__).resolve().parent
OPERATORS = 6


def main() -> None:
    """Profile reading 64 stories at two thirds of depth with one thread."""
    torch.set_num_threads(1)
    folder = Path(locate("smollm2-135m").location)
    texts, lengths, _ = stories(folder, 64)
    engine = HFEngine.load(str(folder), device="cpu", dtype="bfloat16")
    readout = Readout((engine.info.default_layer,), Where(after=49), "mean")
    list(engine.read(texts[:16], readout))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        list(engine.read(texts, readout))
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    result = {
        "benchmark": "profile_reading",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "texts": len(texts),
        "tokens": sum(lengths),
        "layer": engine.info.default_layer,
        "operators": [[event.key, event.self_cpu_time_total / total, event.count] for event in events[:OPERATORS]],
        "seconds": total / 1e6,
    }
    path = HERE / "results" / "profile_reading.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
