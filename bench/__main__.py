"""Every benchmark of speed, one after the other, beside its peers: ``make bench``, or ``python bench``.

    python bench                        an hour or two on a machine that does nothing else
    python bench --only extraction generation
    python bench --short                tiny models, a few minutes: does everything still work? (``make bench-short``)
    python bench --short --out FOLDER   keeps its JSON and its pages there

Each benchmark is a script of this folder with a function ``measure(short)`` that gives its result as plain data. In the whole run
each has a process of its own and writes ``bench/results/NAME.json``; then the tables and the targets are printed, and
``docs/benchmarks.md`` is written from all results that there are. One that fails is named at the end, and the others go on. The
short form measures everything in this process, draws every table of what it measured and every page, and changes no file of ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import table
import targets
from affectlens.runs import write_json
from host import HERE, QUIET, others, say, tiny_model

NAMES = [name for name in table.TABLES if name not in table.TESTED_APART]

WAITING = ("extraction", "serving")


def whole(names: Sequence[str]) -> list[str]:
    """Run these in processes of their own, then write the pages; which have failed."""
    if (busy := others()) > QUIET:
        say(f"this machine is busy with something else ({busy:.1f} cores): ratios may hold, figures do not")
    failed = []
    for name in names:
        say(f"── {name} ──")
        began = time.monotonic()
        if subprocess.run([sys.executable, HERE / f"{name}.py"], check=False).returncode != 0:
            failed.append(name)
        say(f"── {name}: {'failed' if name in failed else 'done'} after {(time.monotonic() - began) / 60:.0f} minutes ──")
    results = table.stored()
    table.write(results)
    print(targets.targets(results))
    return failed


def short(names: Sequence[str], out: Path | None) -> list[str]:
    """Measure everything small, in this process; which have failed.

    What waits for processes of its own most of the time is measured beside the others: nobody looks at how fast this is.
    """
    tiny_model()
    results, failures = dict[str, dict[str, Any]](), dict[str, str]()

    def measured(name: str) -> None:
        began = time.monotonic()
        try:
            # As it would be stored and read again: what JSON cannot say must fail here.
            results[name] = json.loads(json.dumps(importlib.import_module(name).measure(True), allow_nan=False))
        except Exception:
            failures[name] = traceback.format_exc()
        say(f"{name}: {time.monotonic() - began:.0f} s")

    with ThreadPoolExecutor(1) as beside:
        waiting = [beside.submit(measured, name) for name in names if name in WAITING]
        for name in names:
            if name not in WAITING:
                measured(name)
        for each in waiting:
            each.result()
    texts = dict[str, str]()
    for name in names:
        try:
            texts[name] = failures[name] if name in failures else table.TABLES[name](results[name])
        except Exception:
            texts[name] = failures[name] = traceback.format_exc()
        print(f"\n## {name}\n\n{texts[name]}", file=sys.stderr if name in failures else sys.stdout)
    whole = {name: result for name, result in results.items() if name not in failures}
    print("\n## targets, which mean nothing here\n\n" + targets.targets(whole))
    pages = table.pages(whole)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, result in whole.items():
            write_json(out / f"{name}.json", result)
        for path, page in pages.items():
            (out / path.name).write_text(page, encoding="utf-8")
    return [name for name in names if name in failures]


def _gpu() -> list[str]:
    """The benchmark of a GPU, where there is one."""
    import torch

    return ["gpu"] if torch.cuda.is_available() else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--short", action="store_true", help="tiny models: does everything still work?")
    parser.add_argument("--out", type=Path, help="where the short form keeps what it made")
    args = parser.parse_args()
    failed = short(args.only or NAMES, args.out) if args.short else whole(args.only or [*table.SPEED, *_gpu()])
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
