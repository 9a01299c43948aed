"""Replies that their caller steers: what is said, what is read of it, and what rules see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from affectlens.actions import Log, Policy, Steer, Stop
from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.engine import Sampling, Steering, Where
from affectlens.engines.toy import ToyEngine
from affectlens.errors import EngineError, RuleError
from affectlens.monitor import EVERY, Monitor
from affectlens.rules import parse
from affectlens.traces import Probe, Trace
from affectlens.vectors import ConceptVectors
from planted import toy_bench

ENGINE = ToyEngine()
QUIET = (("user", ENGINE.write(None, "topic 3", seed=5, words=30)),)
SAMPLING = Sampling(max_tokens=80, seed=3)


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


@pytest.fixture(scope="module")
def baseline(vectors: ConceptVectors) -> Baseline:
    return Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(vectors), source="neutral dialogues")


def replay(monitor: Monitor, steering: Steering, **options: Any) -> tuple[list[Any], Any]:
    stream = monitor.stream(ENGINE, QUIET, sampling=options.pop("sampling", SAMPLING), steering=steering, **options)
    return list(stream), stream


def test_the_reply_is_that_of_the_steered_model(vectors: ConceptVectors, baseline: Baseline) -> None:
    steering = 0.5 * vectors["sad"] - 0.3 * vectors["happy"]
    tokens, stream = replay(Monitor(vectors, baseline), steering)
    assert stream.text == ENGINE.generate([QUIET], sampling=SAMPLING, steering=steering)[0]
    assert stream.text != ENGINE.generate([QUIET], sampling=SAMPLING)[0]
    assert all(token.steering == str(steering) for token in tokens if token.text)
    assert stream.usage == (stream.trace.layout.n_prompt, 80) and stream.finish == "length"


def test_the_trace_keeps_both_readings(vectors: ConceptVectors, baseline: Baseline) -> None:
    steering = 0.5 * vectors["sad"]
    monitor = Monitor(vectors, baseline)
    tokens, stream = replay(monitor, steering)
    trace: Trace = stream.trace
    reply, sad = np.flatnonzero(trace.of("assistant")), vectors.index("sad")
    assert trace.steering == str(steering) and trace.steered is not None
    live = np.array([token.scores for token in tokens if np.isfinite(token.scores).all()])
    np.testing.assert_allclose(live, trace.steered[reply], atol=2e-3)
    assert (trace.steered[reply, sad] - trace.scores[reply, sad]).min() > 0.5
    # Untouched is what an engine that never steered reads in the same words.
    untouched = monitor.score(ENGINE, (*QUIET, ("assistant", stream.text.strip())))
    np.testing.assert_allclose(trace.scores[reply[:40]], untouched.scores[untouched.of("assistant")][:40], atol=2e-3)
    np.testing.assert_allclose(stream.before.scores, trace.scores[: len(stream.before)], atol=1e-6)


def test_rules_watch_the_untouched_reading(vectors: ConceptVectors, baseline: Baseline) -> None:
    """Steering towards sad raises the reading; a rule that this would set off is not, one that the words set off is."""
    steering = 0.6 * vectors["sad"]
    trace = replay(Monitor(vectors, baseline), steering)[1].trace
    own, sad = trace.of("assistant"), vectors.index("sad")
    touched, untouched = np.nanmax(trace.steered[own, sad]), trace.scores[own, sad].max()
    assert touched > untouched + 0.5
    rules = [f"sad > {(touched + untouched) / 2:.3f}", f"sad > {untouched - 0.05:.3f}", "gap(sad) > -50"]
    _, stream = replay(Monitor(vectors, baseline, rules=rules), steering)
    assert {alert.rule for alert in stream.alerts} == set(rules[1:])
    assert all(0 <= alert.noticed - alert.token <= EVERY and alert.steering for alert in stream.alerts)


def test_strength_0_is_no_steering_at_all(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["calm > 0.5 for 2 tokens"])
    plain, steered = replay(monitor, Steering()), replay(monitor, 0.0 * vectors["sad"])
    assert plain[1].text == steered[1].text and plain[1].alerts == steered[1].alerts
    np.testing.assert_array_equal(plain[1].trace.scores, steered[1].trace.scores)
    assert steered[1].trace.steered is None and not steered[1].trace.steering


def test_a_rule_steers_on_top(vectors: ConceptVectors, baseline: Baseline) -> None:
    """The caller's steering goes on beneath what the rule adds: from the tenth token on both act."""
    given, steer = 0.4 * vectors["happy"], Policy(parse("user.calm > -50"), (Steer((("sad", 0.5),)),))
    _, stream = replay(Monitor(vectors, baseline, rules=[steer]), given)
    both = given + (0.5 * vectors["sad"]).at(Where("prompt", last=1)) + (0.5 * vectors["sad"]).at(Where("response"))
    assert stream.text == ENGINE.generate([QUIET], sampling=SAMPLING, steering=both)[0]
    later = Policy(parse("calm > -50 for 10 tokens"), (Steer((("sad", 0.5),)),))
    tokens, stream = replay(Monitor(vectors, baseline, rules=[later]), given)
    assert [token.text for token in tokens[:10]] == [token.text for token in replay(Monitor(vectors, baseline), given)[0][:10]]
    assert tokens[0].steering == str(given) and tokens[-1].steering == str(given + 0.5 * vectors["sad"])
    reply = np.flatnonzero(stream.trace.of("assistant"))
    assert np.isfinite(stream.trace.steered[reply[:10]]).all(), "both readings from the first token on"


def test_stop_strings_and_log_probabilities(vectors: ConceptVectors, baseline: Baseline) -> None:
    steering = 0.5 * vectors["sad"]
    free, plain = replay(Monitor(vectors, baseline), steering)
    words = [token.text for token in free if token.text]
    stop = "".join(words[9:11])[1:]
    asked = Sampling(max_tokens=80, seed=3, stop=(stop,), logprobs=2)
    tokens, stream = replay(Monitor(vectors, baseline), steering, sampling=asked)
    assert stream.text == plain.text[: plain.text.index(stop)] and stream.finish == "stop"
    likely = [token.logprob for token in tokens if token.logprob is not None]
    assert "".join(ENGINE.vocabulary[each.token] for each in likely).startswith(stream.text)
    assert all(len(each.top) == 2 and each.value <= each.top[0][1] <= 0 for each in likely)
    assert all(token.logprob is None for token in free)


def test_ending_a_reply_makes_its_trace(vectors: ConceptVectors, baseline: Baseline) -> None:
    for steering in (Steering(), 0.5 * vectors["sad"]):
        stream = Monitor(vectors, baseline, rules=["calm > -50"]).stream(ENGINE, QUIET, sampling=SAMPLING, steering=steering)
        said = [next(stream), next(stream)]
        stream.end("time limit")
        said += list(stream)
        assert stream.finish == "time limit" and stream.text == "".join(token.text for token in said)
        assert stream.trace is not None and stream.trace.layout.text.endswith(stream.text) and stream.alerts
        assert stream.usage[1] == 2
    ended = replay(Monitor(vectors, baseline), Steering(), sampling=Sampling(max_tokens=1))[1]
    ended.end("too late")
    assert ended.finish == "length"


def test_rules_of_one_reply(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["one: calm > -50", "two: sad > -50", "gap(sad) > 50"])
    more = monitor.joined(["three: happy > -50", Policy(parse("proud > 90"), (Stop("no"),))], without={"one"})
    _, stream = replay(more, Steering())
    assert {alert.rule for alert in stream.alerts} == {"two", "three"}
    assert more.baseline is baseline and more.reporter is monitor.reporter and more.probe.alone
    assert {alert.rule for alert in replay(monitor, Steering())[1].alerts} == {"one", "two"}
    with pytest.raises(EngineError, match="stop and steer, not log"):
        monitor.joined([Policy(parse("calm > 1"), (Log("anywhere.jsonl"),))])
    with pytest.raises(RuleError, match="did you mean desperate"):
        monitor.joined(["desparate > 1"])
