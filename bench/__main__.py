"""Every benchmark of speed, one after the other, beside its peers: ``make bench``, or ``python bench``.

    python bench                        planned for an hour on a machine of two cores that does nothing else
    python bench --prepare              fetches the model and makes the peers' environments: then the hour begins
    python bench --only serving store   some of them; the results of the others stay
    python bench --short                tiny models, a few minutes: does everything still work? (``make bench-short``)
    python bench --short --out FOLDER   keeps its JSON and its pages there

Each benchmark is a script of this folder with a function ``measure(short)`` that gives its result as plain data. In the whole run
each has a process of its own and writes ``bench/results/NAME.json`` when it is done; then the tables and the targets are printed,
and the pages are written from all results that there are. One that fails is named at the end, and the others go on; after an
interruption the pages are written as well, and the command that goes on is printed. The short form measures everything in this
process, draws every table of what it measured and every page, and changes no file of ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import extraction
import table
import targets
from affectlens.models import locate
from affectlens.runs import write_json
from host import HERE, MODEL, QUIET, others, say, tiny_model

SHORT = [name for name in table.TABLES if name not in table.TESTED_APART]

WAITING = ("extraction", "serving", "with_ray")
"""What waits for processes of its own most of the time: the short form measures it beside the others."""

LIMIT = 40 * 60
"""Seconds after which a script is ended, so that the others come to their turn."""

VLLM = HERE.parent / ".venv-vllm" / "bin" / "python"
"""The Python of the environment that ``make bench`` makes for vLLM, whose packages contradict ours."""


def whole(names: Sequence[str], pythons: dict[str, Path]) -> list[str]:
    """Run these in processes of their own, then write the pages; which have failed."""
    if (busy := others()) > QUIET:
        say(f"this machine is busy with something else ({busy:.1f} cores): ratios may hold, figures do not")
    locate(MODEL, log=say)  # downloaded here, once: the scripts' own processes look for it on disk
    failed, left = list[str](), list(names)
    try:
        while left:
            name = left[0]
            say(f"── {name}, {time.strftime('%H:%M')} ──")
            began = time.monotonic()
            if not _done(name, pythons.get(name, Path(sys.executable))):
                failed.append(name)
            said = "failed" if name in failed else "done"
            say(f"── {name}: {said} after {(time.monotonic() - began) / 60:.1f} minutes ──")
            left.pop(0)
    except KeyboardInterrupt:
        say(f"interrupted: go on with `python bench --only {' '.join(left)}`")
        failed += left
    results = table.stored()
    for name in names:
        if name in results and name not in failed:
            print(f"\n## {name}\n\n{table.TABLES[name](results[name])}")
    table.write(results)
    print(f"\n## targets\n\n{targets.targets(results)}")
    return failed


def _done(name: str, python: Path) -> bool:
    """Whether a script has run to its end; it prints its own error."""
    if not python.exists():
        say(f"{python} is not there: `make {python.parents[1].name}/.ready` makes it, and --vllm names another")
        return False
    # A group of its own, so that one that hangs ends with all that it has begun.
    process = subprocess.Popen([python, HERE / f"{name}.py"], stdout=subprocess.DEVNULL, process_group=0)
    try:
        return process.wait(LIMIT) == 0
    except subprocess.TimeoutExpired:
        say(f"{name} does not come to an end: {LIMIT / 60:.0f} minutes are over")
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def short(names: Sequence[str], out: Path | None) -> list[str]:
    """Measure everything small, in this process; which have failed.

    What waits for processes of its own is measured beside the others: nobody looks at how fast this is.
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
    for name in names:
        try:
            text = failures[name] if name in failures else table.TABLES[name](results[name])
        except Exception:
            text = failures[name] = traceback.format_exc()
        print(f"\n## {name}\n\n{text}", file=sys.stderr if name in failures else sys.stdout)
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


def _speed() -> list[str]:
    """What a whole run measures: the GPU only where there is one."""
    import torch

    return [name for name in table.SPEED if name != "gpu" or torch.cuda.is_available()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench", description=(__doc__ or "").splitlines()[0])
    names = list(table.TABLES)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--prepare", action="store_true", help="fetch and make what is needed, and measure nothing")
    parser.add_argument("--short", action="store_true", help="tiny models: does everything still work?")
    parser.add_argument("--out", type=Path, help="where the short form keeps what it made")
    parser.add_argument("--vllm", type=Path, default=VLLM, help="the Python of an environment that has vLLM")
    args = parser.parse_args()
    if args.prepare:
        locate(MODEL, log=say)
        failed = list(extraction.prepare(extraction.SUBJECTS))
    elif args.short:
        failed = short(args.only or SHORT, args.out)
    else:
        failed = whole(args.only or _speed(), {"with_vllm": args.vllm.absolute()})
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
