"""What is said of a rule before it is armed comes true: false alarms on dialogues that nobody has read, delay on stories."""

from __future__ import annotations

import numpy as np
import pytest

from affectlens.actions import Policy
from affectlens.activations import Text
from affectlens.alarms import Trial, arm, trial_of, try_rules
from affectlens.baseline import Baseline
from affectlens.conversations import Conversation
from affectlens.engines.toy import ToyEngine
from affectlens.monitor import Monitor
from affectlens.rules import parse
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from planted import toy_bench

ENGINE = ToyEngine()
TEN = (
    "desperate > 2.5",
    "sad > 1.5 for 3 tokens",
    "mean(afraid, 10) > 0.9",
    "angry > 2 and calm < -1",
    "rise(nervous, 12) > 2.5",
    "gap(happy) > 2.5",
    "loving > 2 until < 0 cooldown 10 tokens",
    "user.proud > 2.5",
    "not guilty < 2.5 or surprised > 3",
    "mean(gap(inspired), 8) > 1.2",
)


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


def dialogues(seed: int, n: int, turns: int = 3) -> list[Conversation]:
    """Neutral dialogues: most turns are plain, some have a word or two that conveys something, as real ones do."""
    rng = np.random.default_rng(seed)
    cues = [cue for own in ENGINE.concepts.values() for cue in own]
    talks = []
    for i in range(n):
        said = []
        for turn in range(2 * turns):
            words = ENGINE.write(None, f"topic {seed} {i} {turn}", seed=1000 * seed + i, words=int(rng.integers(15, 40))).split()
            for place in rng.integers(len(words), size=rng.poisson(0.5)):
                words[place] = str(rng.choice(cues))
            said.append((("user", "assistant")[turn % 2], " ".join(words)))
        talks.append(Conversation(f"{seed}-{i}", tuple(said)))
    return talks


def test_realised_false_alarms_lie_inside_the_stated_interval(vectors: ConceptVectors) -> None:
    """Ten rules of every form: tried on one half of the dialogues, and then run along the other half."""
    stated, held_out = dialogues(1, 120), dialogues(2, 120)
    baseline = Baseline.measure(ENGINE, stated, probe=Probe(vectors), source="one half")
    monitor = Monitor(vectors, baseline, rules=TEN)
    inside, fired = [], 0
    for trial, again in zip(try_rules(ENGINE, monitor, talks=stated), try_rules(ENGINE, monitor, talks=held_out), strict=True):
        low, high = trial.expect(again.turns)
        inside.append(low <= again.alarmed <= high)
        assert trial.per_thousand.low <= trial.per_thousand.value <= trial.per_thousand.high
        assert 0 < high - low < again.turns / 4, "an interval that allows everything says nothing"
        fired += again.alarmed
    assert all(inside), inside
    assert fired > 30, "rules that never fire would lie in any interval"


def test_intervals_cover_as_often_as_they_say() -> None:
    """Clustered alarms, planted: the next conversations lie inside 95 % of the prediction intervals, and the rate too."""
    rng = np.random.default_rng(3)
    covered = {"next": 0, "rate": 0}
    for _ in range(600):
        rate = rng.choice([0.01, 0.05, 0.2])
        counts = []
        for _ in range(2):
            own = rng.beta(rate * 3, (1 - rate) * 3, size=100)
            counts.append(rng.binomial(3, own))
        trial = _trial(counts[0])
        low, high = trial.expect(300)
        covered["next"] += low <= counts[1].sum() <= high
        covered["rate"] += trial.per_thousand.low <= 1000 * rate <= trial.per_thousand.high
    assert 0.93 <= covered["next"] / 600 <= 0.995 and 0.92 <= covered["rate"] / 600 <= 0.99, covered


def _trial(alarmed: np.ndarray, turns: int = 3) -> Trial:
    return trial_of(parse("a > 1"), [(turns, int(n), int(n)) for n in alarmed])


def test_no_alarm_is_no_proof() -> None:
    trial = _trial(np.zeros(100))
    assert trial.design == 3 and 30 < trial.per_thousand.high < 40 and trial.per_thousand.value == 0
    assert trial.expect(300)[0] == 0 < trial.expect(300)[1]
    assert _trial(np.array([3, 0] * 50)).design == pytest.approx(3, rel=0.05)  # all turns of a conversation or none
    assert _trial(np.array([1] * 100)).design == 1


def test_delay_on_stories(vectors: ConceptVectors) -> None:
    rules = ["mean(desperate, 10) > 1", "user.desperate > 1", "calm < -9", "gap(calm) > 1", "wanted: proud > 1", "desperate > 99"]
    baseline = Baseline.measure(ENGINE, dialogues(1, 30), probe=Probe(vectors), source="some")
    stories = [Text(f"{name}-{i}", ENGINE.write(name, f"s{i}", seed=i), name) for name in ("desperate", "calm") for i in range(8)]
    trials = try_rules(ENGINE, Monitor(vectors, baseline, rules=rules), talks=dialogues(2, 12), stories=stories)
    by = {trial.rule: trial for trial in trials}
    mean, user = by[rules[0]].delay, by[rules[1]].delay
    assert mean and mean.concepts == ("desperate",) and mean.noticed.n == 8 and mean.noticed.value > 0.5
    assert mean.tokens and mean.tokens.value >= 10, "a mean over ten tokens waits for ten"
    assert user and user.noticed.value == 1 and user.tokens and user.tokens.value < mean.tokens.value + 30
    assert by["calm < -9"].untried == "the rule wants no emotion high" and "gap" in by["gap(calm) > 1"].untried
    assert by["wanted"].untried == "no story conveys proud"
    never = by["desperate > 99"].delay
    assert never and never.noticed.value == 0 and never.tokens is None
    assert by[rules[1]].whose == "turns of user" and by[rules[0]].whose == "replies"
    assert all("in the next 1,000" in str(trial) for trial in trials)


def test_armed_rules_say_what_is_expected(vectors: ConceptVectors) -> None:
    baseline = Baseline.measure(ENGINE, dialogues(1, 30), probe=Probe(vectors), source="some")
    monitor = Monitor(vectors, baseline, rules=[Policy(parse("desperate > 1"))])
    (trial,) = arm(ENGINE, monitor, talks=dialogues(1, 30))
    talk = (("user", "the sea"), ("assistant", ENGINE.write("desperate", "x")))
    alert = monitor.score(ENGINE, talk).alerts[0]
    assert alert.expected == (trial.per_thousand.value, trial.per_thousand.low, trial.per_thousand.high)
