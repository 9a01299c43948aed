"""The pages that show the results of benchmarks: no number there is typed by hand.

    python bench/table.py            rewrites what stands between the markers of each result
    python bench/table.py --print    prints the tables

A result ``bench/results/NAME.json`` goes between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` of
``docs/benchmarks.md``, or of the page that ``PAGES`` names. What has no result yet says so. The prose around is the template: no
digit in it stands for anything measured (``tests/test_bench.py``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_tables as gpu
import speed_tables as speed
import study_tables as studies
import targets
import with_ray
import with_vllm
from affectlens.runs import write_json
from host import HERE, RESULTS

DOCS = HERE.parent / "docs"
PAGE, PAGES = "benchmarks.md", {"reliability": "reliability.md", "with_ray": "scale.md", "with_vllm": "scale.md"}
"""Where results stand, if nothing else is said, and those that stand elsewhere."""

TARGETS = "targets.json"
"""In ``bench/results``: every target with what was measured."""

Results = dict[str, dict[str, Any]]

SPEED: dict[str, Callable[[dict[str, Any]], str]] = {
    "extraction": speed.extraction,
    "profile_reading": speed.profile_reading,
    "generation": speed.generation,
    "monitoring": speed.monitoring,
    "serving": speed.serving,
    "with_vllm": with_vllm.tables,
    "with_ray": with_ray.tables,
    "gpu": gpu.tables,
}
"""What ``make bench`` measures: modules of this folder, in this order, the GPU where there is one."""

TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    **SPEED,
    "preferences": speed.preferences,
    "store": speed.store,
    "corpus": studies.corpus,
    "power": studies.power,
    "tuned_pair": studies.tuned_pair,
    "alarms": studies.alarms,
    "sae": studies.sae,
    "training": studies.training,
    "reliability": studies.reliability,
}

TESTED_APART = ("reliability", "with_vllm")
"""Whose short forms have tests of their own (the second in the environment of vLLM): ``python bench --short`` leaves them out."""

DATED = ("gpu", "reliability")
"""Whose parts (cards, sections) are measured at different times: each says when itself."""

MISSING = {"gpu": "Not measured yet: no GPU was at hand. `python bench/gpu.py` measures this on one, with random weights."}
"""What a page says instead of a table."""


def stored(folder: Path = RESULTS) -> Results:
    """The results that there are."""
    return {name: json.loads(path.read_text()) for name in TABLES if (path := folder / f"{name}.json").is_file()}


def drawn(results: Results) -> dict[str, str]:
    """The text between each pair of markers."""
    texts = dict[str, str]()
    for name, draw in TABLES.items():
        if name not in results:
            texts[name] = MISSING.get(name, f"Not measured yet: `python bench/{name}.py`.")
        elif name in DATED:
            texts[name] = draw(results[name])
        else:
            texts[name] = f"{draw(results[name])}\n\n{speed.when(results[name])}"
    return {"targets": targets.targets(results), **texts}


def filled(page: str, texts: Mapping[str, str]) -> str:
    """A page with these texts between their markers.

    Raises:
        ValueError: It has markers that belong to no result.
    """

    def between(match: re.Match[str]) -> str:
        name = match[1]
        if name not in texts:
            raise ValueError(f"the page has markers of {name}, which is no benchmark: use {', '.join(texts)}")
        return f"<!-- bench:{name} -->\n{texts[name]}\n<!-- /bench:{name} -->"

    return re.sub(r"<!-- bench:(\w+) -->.*?<!-- /bench:\1 -->", between, page, flags=re.DOTALL)


def pages(results: Results) -> dict[Path, str]:
    """Every page as it should be.

    Raises:
        ValueError: A page lacks the markers of a benchmark.
    """
    texts, found = drawn(results), {}
    for name in texts:
        path = DOCS / PAGES.get(name, PAGE)
        if f"<!-- bench:{name} -->" not in path.read_text(encoding="utf-8"):
            raise ValueError(f"{path} has no place for {name}: write <!-- bench:{name} --> and <!-- /bench:{name} --> into it")
        found[path] = filled(path.read_text(encoding="utf-8"), texts)
    return found


def write(results: Results) -> None:
    """Write every page, and the targets as data."""
    for path, page in pages(results).items():
        path.write_text(page, encoding="utf-8")
    write_json(RESULTS / TARGETS, targets.as_data(results))


def prose(page: str) -> str:
    """What of a page is not written by a program."""
    return re.sub(r"<!-- bench:(\w+) -->.*?<!-- /bench:\1 -->", "", page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables and leave the pages alone")
    args = parser.parse_args()
    results = stored()
    if args.print:
        for name, text in drawn(results).items():
            print(f"\n## {name}\n\n{text}")
        return 0
    write(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
