"""Are the false alarms that are stated before a rule is armed the false alarms that come?

    python bench/alarms.py                                # the demo model; some minutes
    python bench/alarms.py --vectors runs/first           # vectors of your own, and their model

**Stated.** Ten rules are tried as anybody would try them: the baseline is that of the 240 bundled neutral dialogues, and the
rules are run along these same dialogues, each in z against the other 239, so that no dialogue is its own standard. That gives
for each rule the rate of false alarms and in how many of the next replies it is expected to fire.

**Came.** Then they run along the 120 held-out dialogues, which were written for this by another hand, on other topics, and on
which nothing had been fitted, tried or looked at.

**Traffic of one's own.** The same as somebody does who takes the baseline from their own traffic, as the documentation advises:
the held-out dialogues are the traffic. Baseline and rates come from every other one of them, and the rules run along the rest.

**Judged.** The rule was fixed before any model had read the held-out dialogues; the second part was added, with the same rule,
when the first had failed, and committed before it was run. The ten rules are armed together, so what is stated
of them is the joint prediction interval, that of each rule at a level of 1 - 0.05 / 10. The statement *holds* if all ten numbers
of replies with an alarm lie inside, and *fails* if one does not. How many lie inside their own interval of 95 % is reported
beside it and judges nothing. Thresholds are not tuned: every rule has the one it was first written with.

One sample of dialogues is one throw of the dice, so the same is done with a thousand random halves of the 240 dialogues, of which
one is stated from and the other comes: how often is what comes inside? Beside it what alarms are for: how many stories of the
emotion are noticed, and after how many tokens. Writes ``bench/results/alarms.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from affectlens.actions import policy
from affectlens.activations import Text
from affectlens.alarms import ordinary_traces, trial_of, try_rules, turns_of_rule
from affectlens.baseline import Baseline, held_out_dialogues, neutral_dialogues
from affectlens.conversations import Conversation
from affectlens.corpus import load
from affectlens.engine import Engine, Request, Result, open_engine
from affectlens.exchange import load_vectors
from affectlens.monitor import Monitor
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from host import RESULTS, begun, keep
from study_tables import alarms

VECTORS = "runs/smollm2-135m"
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
    '(not "at ease" > -2 for 3 tokens) or "grief-stricken" > 3.5',
)


SPLITS = 1000
JOINT = 1 - 0.05 / len(RULES)


class Kept(Engine):
    """An engine that remembers what it has read, so that every dialogue and every reply alone goes through the model once."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.info = engine, engine.info
        self.results: dict[str, Result] = {}

    def run(self, requests: Iterable[Request]) -> Iterator[Result]:
        asked = [(request.key(), request) for request in requests]
        new = {key: request for key, request in asked if key not in self.results}
        self.results.update(zip(new, self.engine.run(new.values()), strict=True))
        return iter([self.results[key] for key, _ in asked])

    def unembed(self, residuals: np.ndarray) -> np.ndarray:
        return self.engine.unembed(residuals)

    @property
    def vocabulary(self) -> Sequence[str]:
        return self.engine.vocabulary


def watcher(engine: Engine, vectors: ConceptVectors, talks: Sequence[Conversation], source: str) -> Monitor:
    """The rules against the baseline of these dialogues: all ten, if there are vectors of what they name."""
    known = {*vectors.names}
    rules = [each for each in map(policy, RULES) if {signal.concept for signal in each.rule.signals} <= known]
    probe = Probe(vectors, template=engine.info.template is not None)
    return Monitor(vectors, Baseline.measure(engine, talks, probe=probe, source=source), rules=rules)


def judged(
    engine: Engine,
    vectors: ConceptVectors,
    *,
    stated: Sequence[Conversation],
    came: Sequence[Conversation],
    stories: Sequence[Text],
    source: str,
) -> dict[str, Any]:
    """What is stated of the ten rules on some dialogues, and what comes in others."""
    monitor = watcher(engine, vectors, stated, source)
    tried = try_rules(engine, monitor, talks=stated, stories=stories)
    realised = try_rules(engine, monitor, talks=came)
    rows: list[dict[str, Any]] = []
    for before, after in zip(tried, realised, strict=True):
        low, high = before.expect(after.turns)
        expected = {"expected": [low, high], "jointly": list(before.expect(after.turns, level=JOINT))}
        rows.append({**before.as_dict(), **expected, "held_out": after.turns, "came": after.alarmed})
        print(f"{before.rule}: {before.per_thousand} of 1,000; expected {low} to {high} of {after.turns}, came {after.alarmed}")
    assert monitor.baseline is not None
    return {
        "baseline": monitor.baseline.note,
        "dialogues": {"stated": tried[0].conversations, "came": realised[0].conversations},
        "holds": all(row["jointly"][0] <= row["came"] <= row["jointly"][1] for row in rows),
        "rules": rows,
    }


def splits(engine: Engine, vectors: ConceptVectors, talks: Sequence[Conversation], count: int) -> dict[str, float]:
    """How often what comes in one random half lies inside what was stated on the other, for a rule alone and for all jointly."""
    monitor = watcher(engine, vectors, talks, "neutral dialogues")
    rules = [policy.rule for policy in monitor.policies]
    traces = ordinary_traces(engine, monitor, talks)
    counts = [[turns_of_rule(rule, trace) for trace in traces] for rule in rules]
    rng = np.random.default_rng(0)
    alone = jointly = 0
    for _ in range(count):
        order = rng.permutation(len(talks))
        first, second = order[::2], order[1::2]
        inside = {0.95: 0, JOINT: 0}
        for rule, own in zip(rules, counts, strict=True):
            stated, came = (trial_of(rule, [own[i] for i in half]) for half in (first, second))
            for level in inside:
                low, high = stated.expect(came.turns, level=level)
                inside[level] += low <= came.alarmed <= high
        alone += inside[0.95]
        jointly += inside[JOINT] == len(rules)
    return {"alone": alone / count / len(rules), "jointly": jointly / count}


def measure(short: bool = False) -> dict[str, Any]:
    """State and count; the short form does so on the toy, with the rules about emotions that it has."""
    if not short:
        return measured(VECTORS)
    from planted import toy_bench

    bench = toy_bench(0)
    assert bench.engine is not None
    return stated_and_came(Kept(bench.engine), bench.vectors, talks=24, stories=24, count=10)


def measured(folder: str) -> dict[str, Any]:
    vectors = load_vectors(folder)
    engine = Kept(open_engine(str(vectors.model["id"])))
    vectors.check(engine.info)
    return stated_and_came(engine, vectors, talks=None, stories=None, count=SPLITS)


def stated_and_came(
    engine: Engine, vectors: ConceptVectors, *, talks: int | None, stories: int | None, count: int
) -> dict[str, Any]:
    """Both parts, and random halves; ``talks`` and ``stories`` are how many are read at most."""
    neutral, traffic = neutral_dialogues(engine)[:talks], held_out_dialogues()[:talks]
    loud = [Text(record["id"], record["text"], record["concept"]) for record in load("stories")][:stories]
    own = {"stories": loud, "source": "every other held-out dialogue"}
    return {
        **begun("alarms"),
        "model": engine.info.id,
        "layer": vectors.layer,
        "bundled": judged(engine, vectors, stated=neutral, came=traffic, stories=loud, source="neutral dialogues"),
        "own": judged(engine, vectors, stated=traffic[::2], came=traffic[1::2], **own),
        "splits": splits(engine, vectors, neutral, count),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", default=VECTORS, help="folder of vectors")
    result = measured(parser.parse_args().vectors)
    keep(result, RESULTS / "alarms.json")
    print("\n" + alarms(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
