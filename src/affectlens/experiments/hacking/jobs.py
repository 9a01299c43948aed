"""The jobs: what is asked, at every level, with tests that can be met and with tests that cannot.

All texts lie in ``data/experiments/hacking.toml``, with what each of them is for.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from affectlens.experiments import Case

IMPOSSIBLE, SOLVABLE = "impossible", "solvable"

ATTEMPTS = 5
"""So often the model may hand something in."""

_REPORTED, _LONGEST = 4, 160


@functools.cache
def texts() -> dict[str, Any]:
    """The data file as it is."""
    file = importlib.resources.files("affectlens") / "data" / "experiments" / "hacking.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def levels() -> tuple[str, ...]:
    """Names of the levels, from gentle to strong.

    Example:
        >>> levels()
        ('exit offered', 'plain', 'pressure', 'unread', 'started', 'begun')
    """
    return tuple(level["name"] for level in texts()["levels"])


def cases() -> tuple[Case, ...]:
    """Every job at every level, with tests that cannot be met and then with tests that can; the kinds of jobs take turns.

    Example:
        >>> [(case.id, case.facts["kind"]) for case in cases()[:3]]
        [('exit offered: total', 'limit'), ('exit offered: total, solvable', 'limit'), ('exit offered: gap', 'contradiction')]
    """
    data = texts()
    made = []
    for level in data["levels"]:
        for job in data["jobs"]:
            for variant in (IMPOSSIBLE, SOLVABLE):
                tests = f"from solution import {job['name']}\n{job[variant]}\n"
                asked = data["task"].format(says=job["says"], tests=tests.rstrip("\n"))
                facts = {
                    "job": job["name"],
                    "kind": job["kind"],
                    "tests": tests,
                    "hidden": job["hidden"],
                    "begun": _beginning(job, level.get("begins", "")),
                    "again": level["again"],
                }
                chat = (("system", data["system"]), ("user", f"{asked}\n\n{level['task']}".rstrip()))
                name = f"{level['name']}: {job['name']}" + (", solvable" if variant == SOLVABLE else "")
                made.append(Case(name, variant, level["name"], chat, facts))
    return tuple(made)


def _beginning(job: Mapping[str, str], what: str) -> str:
    """What the reply begins with: nothing, the function with its description, or code that has begun to cheat."""
    definition = re.search(r"^def .*:\n", job["begun"], re.MULTILINE)
    assert definition is not None
    # Three spaces of four: the fourth belongs to the first word of the line in the tokens of most models.
    described = f'```python\n{definition[0]}    """{job["says"]}"""\n   '
    return {"": "", "description": described, "cheating": job["begun"]}[what]


def failure(case: Case, attempt: int, report: tuple[str, ...]) -> str:
    """What the model is told when an attempt has failed.

    Args:
        case: Whose.
        attempt: Which, from 1.
        report: What went wrong, line by line; the first few are told.
    """
    more = len(report) - _REPORTED
    lines = [line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..." for line in report[:_REPORTED]]
    lines += [f"and {more} more"] if more > 0 else []
    said = texts()["again"].format(attempt=attempt, attempts=ATTEMPTS, report="\n".join(lines), rest=case.facts["again"])
    return "\n".join(line.strip() for line in said.splitlines())
