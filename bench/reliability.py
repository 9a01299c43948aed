"""Whether a server holds: ``affectlens serve`` in a process of its own, under load, through faults, under attack.

    python bench/reliability.py                          every section; about an hour on two cores
    python bench/reliability.py --only load-toy kill     these
    python bench/reliability.py --short                  a short form of all but load-demo: does everything still work?

Each section is a function of its name; its docstring says what is done and, under "Met when", what was fixed before it was first
run. Nothing is left out of what is counted. Results are kept in ``bench/results/reliability.json``, section by section;
``bench/table.py`` writes them into ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from affectlens.engine import open_engine
from affectlens.runs import provenance, read_json, write_json
from affectlens.server.records import Record
from affectlens.server.store import Store
from affectlens.vectors import ConceptVectors
from callers import Answer, crowd, mixed
from faults import database, disk, kill, webhook
from host import RESULTS, machine, say
from hostile import fuzz
from readers import hang_up, slow_readers
from running import TOY_STRENGTH, Check, Memory, Section, Server, Setting, median, percentiles, toy_vectors

RESULT = RESULTS / "reliability.json"

# ── load ──


def load_toy(setting: Setting) -> Section:
    """64 callers, 2,000 requests that differ in everything, on the toy; then each of them again, alone.

    Steering, sampling, n, comparisons, streams and plain answers, rules that stop and steer, readings, log-probabilities. 32
    replies at once, 16 may wait: those who come too late come again after Retry-After. Afterwards one caller asks everything
    again, one request at a time.

    Met when: every request has a whole answer in its own shape (no lost, no cut, no mixed-up piece); every answer is equal, and
    every stored trace equal to the bit, to that of the same request alone, as far as the engine says that company changes no
    bit; every reply is in the store; memory grows by at most 2 KB a request after the first half (the record of a
    reply alone would be 10), by the upper end of the interval; nothing is left at work; the server ends cleanly.
    """
    requests, longest = setting.of((2000, 24), (40, 8))
    return _load(setting, "toy", setting.toy, requests=requests, again=requests, longest=longest, growth=2.0)


def load_demo(setting: Setting) -> Section:
    """The same on the demo model, with replies of at most 8 tokens; 200 of the requests, drawn by a seed, are asked again alone.

    Met when: as on the toy, with 20 KB a request, since the scores of 171 emotions alone are that much.
    """
    requests = setting.of(2000, 24)
    assert setting.demo is not None, "asked for with --demo"
    return _load(setting, "smollm2-135m", setting.demo, requests=requests, again=setting.of(200, 8), longest=8, growth=20.0)


def _load(setting: Setting, model: str, vectors: Path, *, requests: int, again: int, longest: int, growth: float) -> Section:
    loaded = ConceptVectors.load(vectors)
    exact = open_engine(model).session().exact
    names, strength = loaded.names, TOY_STRENGTH if loaded.calibration else 0.05
    asked = [mixed(i, model=model, names=names, longest=longest, strength=strength) for i in range(requests)]
    options = ["--concurrency", "32", "--queue", "16", *([] if loaded.calibration else ["--allow-unsafe"])]
    sample = sorted(random.Random(1).sample(range(requests), again))
    with Server(setting.place(f"load-{model}"), *options, vectors=vectors) as server:
        done: list[Answer] = []
        with Memory(server, lambda: len(done)) as memory:
            began = time.monotonic()
            together = crowd(server, asked, callers=64, answered=done.append)
            seconds = time.monotonic() - began
            alone = crowd(server, [asked[i] for i in sample], callers=1, answered=done.append)
        idle, lost = server.idle(), server.counted("affectlens_store_lost_total")
        with Store(server.store, new=False) as store:
            kept = store.count()
            traces = {each.id: each for each in store.records()}
        server.stop()
    broken = [f"{each.asked.number}: {problem}" for each in [*together, *alone] if each.problems for problem in each.problems]
    pairs = list(zip([together[i] for i in sample], alone, strict=True))
    unlike = [one.asked.number for one, other in pairs if one.facts != other.facts]
    bits = [
        one.asked.number
        for one, other in pairs
        if not all(_same(traces.get(a.trace), traces.get(b.trace)) for a, b in zip(one.replies, other.replies, strict=True))
    ]
    for number in unlike[:5]:
        say(f"unlike: {json.dumps(asked[number].body)}")
    absent = [reply.trace for each in [*together, *alone] for reply in each.replies if reply.trace not in traces]
    expected = sum(each.replies for each in asked) + sum(asked[i].replies for i in sample)
    slope = memory.slope()
    crowded = [traces[reply.trace] for each in together for reply in each.replies if reply.trace in traces]
    first = [each.first for each in together if each.first is not None]
    tokens = sum(record.usage["completion_tokens"] for record in crowded)
    p50, p95 = percentiles(first, 50, 95)
    whole = percentiles([each.total for each in together], 50, 95)
    busy = sum(each.busy for each in together)
    company = median([record.company for record in crowded])
    streams = sum(bool(each.body.get("stream")) for each in asked)
    checks = (
        Check("answers that are lost, cut or mixed up", "0", f"{len(broken)} of {len(together) + len(alone)}", not broken),
        Check(
            "answers unlike that of the same request alone",
            "0, as far as company changes no bit",
            f"{len(unlike)} of {len(pairs)}" if exact else f"{len(unlike)} of {len(pairs)}; the engine promises nothing here",
            not unlike if exact else None,
        ),
        Check("stored traces unlike those alone in any bit", "0", f"{len(bits)} of {len(pairs)}", not bits if exact else None),
        Check(
            "replies that are not in the store", "0", f"{len(absent)} of {expected}", not absent and kept == expected and not lost
        ),
        Check("memory that a request leaves behind", *setting.at_most(growth, slope, " KB")),
        Check("nothing at work or waiting at the end; clean exit", "yes", "yes" if idle else "no", idle),
    )
    also = (
        f"Time to the first token of {len(first)} streams: median {p50:.2f} s, 95th percentile {p95:.2f} s, waiting included; "
        f"whole answers {whole[0]:.2f} s and {whole[1]:.2f} s.",
        f"{tokens / seconds:,.0f} tokens a second for {seconds:,.0f} s; a reply had {company - 1:g} others beside it (median).",
        f"{busy} times a caller was told to come again (429), and did.",
        f"Resident memory {memory.samples[0][1]:.0f} MB at the start, {memory.samples[-1][1]:.0f} MB at the end.",
    )
    caption = (
        f"{model}: {len(asked):,} requests of 64 callers ({streams:,} streams, {sum(each.replies for each in asked):,} replies "
        f"of at most {longest} tokens), {len(pairs):,} of them asked again alone."
    )
    figures = {
        "exact": exact,
        "requests": len(asked),
        "again": len(pairs),
        "broken": broken[:50],
        "unlike": unlike,
        "bits": bits,
        "absent": absent[:50],
        "slope_kb": asdict(slope),
        "memory": memory.few(),
        "first": [p50, p95],
        "whole": whole,
        "tokens_per_second": tokens / seconds,
        "busy": busy,
        "company": company,
    }
    return Section(caption, checks, also, figures)


def _same(one: Record | None, other: Record | None) -> bool:
    """Whether two records are equal to the bit in all that is the reply's own."""
    if one is None or other is None:
        return False
    for name in ("scores", "visible", "gap", "other", "steered"):
        a, b = getattr(one.trace, name), getattr(other.trace, name)
        if (a is None) != (b is None) or (a is not None and (a.shape != b.shape or a.tobytes() != b.tobytes())):
            return False
    alerts = [[replace(alert, conversation="") for alert in each.trace.alerts] for each in (one, other)]
    own = [(each.text, each.finish, each.usage, each.request, each.trace.layout, each.trace.steering) for each in (one, other)]
    return own[0] == own[1] and alerts[0] == alerts[1]


# ── running them ──

SECTIONS: dict[str, Callable[[Setting], Section]] = {
    "load-toy": load_toy,
    "kill": kill,
    "disk": disk,
    "database": database,
    "webhook": webhook,
    "fuzz": fuzz,
    "slow-readers": slow_readers,
    "hang-up": hang_up,
    "load-demo": load_demo,
}


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Run a section."""
    say(f"{name} …")
    began = time.monotonic()
    found = SECTIONS[name](setting)
    for check in found.checks:
        verdict = {True: "met", False: "MISSED", None: "–"}[check.met]
        say(f"  {verdict:7} {check.what}: {check.found} (wanted: {check.wanted})")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": inspect.cleandoc(SECTIONS[name].__doc__ or ""),
        "seconds": time.monotonic() - began,
        "load_average": os.getloadavg()[2],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "machine": machine(),
        "provenance": provenance(),
        **asdict(found),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections; the results of others are kept")
    parser.add_argument("--short", action="store_true", help="a short form; results are written only where --out says so")
    parser.add_argument("--demo", type=Path, help="folder of the demo model's vectors, which load-demo needs")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder that is removed")
    parser.add_argument("--out", type=Path, help="where the results go; by default bench/results/reliability.json")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    out = args.out or (None if args.short else RESULT)
    chosen = args.only or [name for name in SECTIONS if name != "load-demo" or args.demo]
    if "load-demo" in chosen and not args.demo:
        say("load-demo needs the demo model's vectors: --demo FOLDER")
        return 2
    missed = 0
    with contextlib.ExitStack() as stack:
        folder = (args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reliability-")))).resolve()
        setting = Setting(folder, args.short, toy_vectors(folder / "vectors"), args.demo and args.demo.resolve())
        results: dict[str, Any] = read_json(out) if out is not None and out.exists() else {"sections": {}}
        for name in chosen:
            sections = {**results["sections"], name: (found := measure(name, setting))}
            results["sections"] = {each: sections[each] for each in SECTIONS if each in sections}
            missed += sum(check["met"] is False for check in found["checks"])
            if out is not None:
                write_json(out, results)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
