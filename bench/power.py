"""How often each study finds what is planted in the toy, and how often what is not.

    python bench/power.py                     # 20 seeds of each condition, every study; about 20 minutes on two cores
    python bench/power.py --seeds 4 --only dose,speakers

Every seed is another toy: other weights, other texts. Conditions: ``planted``; ``nothing`` (the toy with effect 0: cue words mean
nothing); ``coupled`` (what others feel is carried in the speaker's own directions: self and other are one);
``tone`` and ``drift`` for the study of two checkpoints (a later toy with a tone, or one that has only wandered).

Counted is the verdict "holds". What a study rightly says in a condition where only something else is missing (a toy without a
tone is still the same model) is not counted as false: ``FALSE`` lists what would be. Prints a table in Markdown and writes
``bench/results/power.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from affectlens.studies import STUDIES, Bench, Checkpoint, load_study
from host import RESULTS, begun, keep
from planted import toy_bench, with_calibration
from study_tables import power

TONE = (("calm", 1.0),)
CONDITIONS: dict[str, dict[str, Any]] = {"planted": {}, "nothing": {"effect": 0.0}, "coupled": {"coupled": True}}
ONLY_IN: dict[str, tuple[str, ...]] = {
    "coupled": ("speakers", "concealment", "reaction", "deflection"),
    "tone": ("checkpoints",),
    "drift": ("checkpoints",),
}
"""Conditions that not every study is run in; the others are run in all but these."""

FALSE: dict[tuple[str, str], tuple[str, ...]] = {
    ("coupled", "speakers"): ("apart", "leak"),
    ("coupled", "concealment"): ("orthogonal", "outside"),
    ("coupled", "reaction"): ("react", "answer", "apart", "react_own", "assistant", "generated"),
    ("coupled", "deflection"): ("denial", "unsaid", "own", "apart", "generated"),
    ("drift", "checkpoints"): ("largest", "published", "drift"),
}
"""In a condition that takes away one thing, the findings that would be false if they held; with nothing planted, all would be."""

TRUE = (("preferences", "orders"),)
"""But not these: a toy whose words mean nothing still has a taste for words, whichever option is named first."""


def bench_of(condition: str, seed: int) -> Bench:
    """The toy in a condition."""
    if condition == "tone" or condition == "drift":
        before = toy_bench(seed)
        later = toy_bench(seed, tone=TONE) if condition == "tone" else toy_bench(seed, drift=0.3)
        return replace(later, base=Checkpoint(before.engine, before.vectors))
    return toy_bench(seed, **CONDITIONS[condition])


def conditions_of(study: str) -> tuple[str, ...]:
    """The conditions that a study is run in."""
    if study == "checkpoints":
        return ("tone", "drift")
    return tuple(name for name in CONDITIONS if study in ONLY_IN.get(name, (study,)))


def verdicts(seed: int, studies: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """Study, condition, finding and verdict of everything for one seed."""
    out = []
    for study in studies:
        for condition in conditions_of(study):
            bench = bench_of(condition, seed)
            folder = (bench.folder or Path()) / f"{study}-{condition}"
            folder.mkdir(exist_ok=True)
            found = load_study(study).run(replace(with_calibration(bench), folder=folder))
            out += [(study, condition, finding.id, finding.verdict) for finding in found.findings]
    return out


def is_false(study: str, condition: str, finding: str) -> bool:
    """Whether a finding that holds in a condition is a mistake."""
    if (condition, study) == ("nothing", "description"):  # content is kept, whatever the words mean
        return finding != "content"
    if (study, finding) in TRUE:
        return False
    return condition == "nothing" or finding in FALSE.get((condition, study), ())


def rows_of(counts: Counter[tuple[str, str, str, str]], seeds: int) -> list[dict[str, Any]]:
    """One row for each finding: how often it held where its effect is planted, and where it is not."""
    rows = []
    for study, finding in dict.fromkeys((study, finding) for study, _, finding, _ in counts):
        row: dict[str, Any] = {"study": study, "finding": finding, "seeds": seeds}
        for condition in conditions_of(study):
            kind = "planted" if condition in ("planted", "tone") else condition
            held = counts[study, condition, finding, "holds"]
            tested = held + sum(counts[study, condition, finding, verdict] for verdict in ("weak", "fails"))
            row[kind] = {"holds": held, "tested": tested, "false": is_false(study, condition, finding)}
        rows.append(row)
    return rows


def measure(short: bool = False) -> dict[str, Any]:
    """Count what every study finds in every condition; the short form asks one study about one toy."""
    return measured(1, ("lens",), workers=1) if short else measured(20, STUDIES, workers=2)


def measured(seeds: int, studies: tuple[str, ...], *, workers: int) -> dict[str, Any]:
    began = time.monotonic()
    counts: Counter[tuple[str, str, str, str]] = Counter()
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        run = pool.map if pool else map
        for n, found in enumerate(run(verdicts, range(seeds), [studies] * seeds), 1):
            counts.update(found)
            print(f"seed {n} of {seeds}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    rows = rows_of(counts, seeds)
    return {**begun("power"), "seeds": seeds, "draws": bench_of("planted", 0).draws, "findings": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default=",".join(STUDIES), help="studies, separated by commas")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    studies = tuple(options.only.split(","))
    result = measured(options.seeds, studies, workers=options.workers)
    print(power(result))
    if studies == STUDIES:
        keep(result, RESULTS / "power.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
