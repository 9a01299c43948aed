"""Are the false alarms that are stated before a rule is armed the false alarms that come?

    python bench/alarms.py                                # the demo model; about two minutes on two cores
    python bench/alarms.py --vectors runs/first           # vectors of your own, and their model

One half of the neutral dialogues (every other one) is the baseline on which ten rules are tried; then they run along the other
half, which nobody has looked at. For each rule: the rate that was stated with its interval, how many of the held-out replies were
expected to raise it, and how many did. Beside it what alarms are for: how many stories of the emotion are noticed, and after how
many tokens. Thresholds are not tuned: every rule has the one it was written with. Writes ``bench/results/alarms.json``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

from affectlens.activations import Text  # noqa: E402
from affectlens.alarms import try_rules  # noqa: E402
from affectlens.baseline import Baseline, neutral_dialogues  # noqa: E402
from affectlens.corpus import load  # noqa: E402
from affectlens.engine import open_engine  # noqa: E402
from affectlens.exchange import load_vectors  # noqa: E402
from affectlens.monitor import Monitor  # noqa: E402
from affectlens.runs import provenance, write_json  # noqa: E402
from affectlens.traces import Probe  # noqa: E402
from table import alarms  # noqa: E402

RESULT = ROOT / "bench" / "results" / "alarms.json"
RULES = (
    "desperate > 3",
    "desperate > 2 for 5 tokens",
    "mean(desperate, 20) > 1.5",
    "afraid > 2 and calm < -1",
    "rise(angry, 30) > 2.5",
    "gap(sad) > 3",
    "mean(gap(nervous), 20) > 1",
    "user.afraid > 3",
    "mean(hostile, 20) > 1.5 until < 0.5 cooldown 100 tokens",
    'not "at ease" > -2 for 3 tokens or "grief-stricken" > 3.5',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", default="runs/smollm2-135m", help="folder of vectors")
    options = parser.parse_args()
    vectors = load_vectors(options.vectors)
    engine = open_engine(str(vectors.model["id"]))
    vectors.check(engine.info)
    talks = neutral_dialogues(engine)
    stories = [Text(record["id"], record["text"], record["concept"]) for record in load("stories")]
    start = time.perf_counter()
    probe = Probe(vectors, template=engine.info.template is not None)
    baseline = Baseline.measure(engine, talks[::2], probe=probe, source="every other neutral dialogue")
    monitor = Monitor(vectors, baseline, rules=RULES)
    stated = try_rules(engine, monitor, talks=talks[::2], stories=stories)
    realised = try_rules(engine, monitor, talks=talks[1::2])
    rows: list[dict[str, Any]] = []
    for before, after in zip(stated, realised, strict=True):
        low, high = before.expect(after.turns)
        rows.append({**before.as_dict(), "expected": [low, high], "held_out": after.turns, "came": after.alarmed})
        print(f"{before.rule}: {before.per_thousand} of 1,000; expected {low} to {high} of {after.turns}, came {after.alarmed}")
        print(f"    {before.delay or before.untried}")
    result = {
        "model": engine.info.id,
        "layer": vectors.layer,
        "baseline": baseline.note,
        "seconds": round(time.perf_counter() - start, 1),
        "rules": rows,
        "provenance": provenance(),
    }
    write_json(RESULT, result)
    print("\n" + alarms(result))


if __name__ == "__main__":
    main()
