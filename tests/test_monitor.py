"""The monitor on the toy: baselines, traces, alarms while a reply is generated, and everything that they set off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import families
from affectlens import browse
from affectlens.actions import Call, Log, Policy, Steer, Stop
from affectlens.baseline import FEW, GAP, OTHER, Baseline, Sums, neutral_dialogues, spoken, talk_id
from affectlens.conversations import Conversation
from affectlens.engine import Layout, Readout, Request, Sampling, Where, open_engine
from affectlens.engines.toy import ToyEngine
from affectlens.errors import AffectlensError, FormatError, MismatchError, RuleError, UnknownName
from affectlens.monitor import EVERY, Monitor
from affectlens.rules import parse
from affectlens.traces import Alert, Probe, Trace, carried_over, read_traces, replies, turns_of
from affectlens.vectors import ConceptVectors
from affectlens.watching import watched
from planted import toy_bench

ENGINE = ToyEngine()
QUIET = (("user", ENGINE.write(None, "topic 3", seed=5, words=30)),)


@pytest.fixture(scope="module")
def vectors() -> ConceptVectors:
    return toy_bench(0).vectors


@pytest.fixture(scope="module")
def baseline(vectors: ConceptVectors) -> Baseline:
    return Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=Probe(vectors), source="neutral dialogues")


def chat(user: str | None, assistant: str | None, *, seed: int = 1, words: int = 60) -> tuple[tuple[str, str], ...]:
    """A user's words and a reply, each in the tone of a concept, on different topics."""
    return (
        ("user", ENGINE.write(user, f"user {seed}", seed=seed, words=words)),
        ("assistant", ENGINE.write(assistant, f"reply {seed}", seed=seed + 50, words=words)),
    )


def dense(concept: str, n: int = 24) -> str:
    """Cue words of a concept and nothing else, so that the reading stays high."""
    cues = ENGINE.concepts[concept]
    return " ".join(cues[i % len(cues)] for i in range(n))


# ── traces ──


def test_turns_and_replies() -> None:
    assert turns_of(["user", "template", "user", "assistant"]).tolist() == [0, -1, 0, 1]
    layout = ENGINE.layout(Request((("user", "the sea"), ("assistant", "the old door"), ("user", "a hand"))))
    (words,) = replies(layout).values()
    assert words.text == "the old door"
    assert [words.text[a:b].strip() for a, b in words.spans] == ["the", "old", "door"]


def test_scores_are_carried_over_by_characters() -> None:
    had = np.array([[1.0], [3.0], [np.nan], [7.0]])
    spans = [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert carried_over(spans, spans, had)[:2].tolist() == [[1], [3]]
    whole = carried_over([(0, 3), (3, 8), (8, 8), (9, 12)], spans, had)
    assert whole[0] == 2 and whole[1] == 5 and np.isnan(whole[2:]).all()


def test_a_trace_reads_what_a_reader_of_the_whole_reads(vectors: ConceptVectors) -> None:
    talk = Conversation("one", chat("afraid", "calm"))
    ((trace, _),) = read_traces(ENGINE.run, [talk], Probe(vectors, alone=True))
    assert trace is not None and trace.visible is not None
    reading = next(ENGINE.read([talk.turns], vectors.readout(pool="none")))
    np.testing.assert_allclose(trace.scores[reading.positions[1:]], vectors.scores(reading)[1:], atol=1e-6)
    assert np.isnan(trace.scores[:2]).all(), "neither the sink nor the first token is read"
    assert trace.top(1)[0][0] == "calm" and trace.top(1, speaker="user")[0][0] == "afraid"
    (words,) = replies(trace.layout).values()
    alone = next(ENGINE.read([words.text], vectors.readout(pool="none")))
    read = trace.visible[words.tokens]
    assert np.isnan(read[0]).all() and np.isnan(trace.visible[trace.of("user")]).all()
    np.testing.assert_allclose(read[1:], vectors.scores(alone)[1:], atol=1e-6)


# ── baselines ──


def test_a_baseline_makes_its_own_texts_standard(vectors: ConceptVectors, baseline: Baseline) -> None:
    raw = [trace for trace, _ in read_traces(ENGINE.run, neutral_dialogues(ENGINE), Probe(vectors, alone=True)) if trace]
    traces = [baseline.standardise(trace) for trace in raw]
    for key, role in (("scores", "assistant"), ("scores", "user"), ("visible", "assistant"), ("gap", "assistant")):
        every = np.concatenate([getattr(trace, key)[trace.of(role)] for trace in traces])
        every = every[np.isfinite(every).all(axis=1)]
        np.testing.assert_allclose(every.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(every.std(axis=0), 1, atol=1e-5)
    assert (
        baseline.spreads["user"].n_texts == len(raw)
        and baseline.spreads["text"].n_tokens < baseline.spreads["assistant"].n_tokens
    )
    assert "40 conversations" in baseline.note and baseline.speakers == ("assistant", "text", "user")


def test_the_uncertainty_is_over_conversations(vectors: ConceptVectors) -> None:
    """Texts differ from each other more than their tokens: the errors must say how far other texts would move the values."""
    rng, found = np.random.default_rng(0), []
    n = 20
    layout = Layout("a" * n, ("a",) * n, (0,) * n, tuple((i, i + 1) for i in range(n)), ("assistant",) * n, 0)
    for _ in range(60):
        sums = Sums()
        for k in range(30):
            own = rng.normal(size=(1, 8)) + 0.5 * rng.normal(size=(n, 8)).astype(np.float32)
            trace = Trace("x", layout, "", vectors.names[:8], 4, own, visible=own + rng.normal(size=(n, 8)))
            sums.add(trace, Conversation(f"{k}", (("assistant", str(k)),)))
        found.append(sums.baseline(ENGINE, Probe(vectors), source="").spreads)
    for name, value, error in (
        ("assistant", "mean", "mean_error"),
        ("assistant", "deviation", "deviation_error"),
        ("gap", "deviation", "deviation_error"),
    ):
        moved = np.stack([getattr(each[name], value) for each in found]).std(axis=0)
        claimed = np.stack([getattr(each[name], error) for each in found]).mean(axis=0)
        assert 0.8 < np.mean(claimed / moved) < 1.25, (name, value)
    over_tokens = found[0]["assistant"].deviation / np.sqrt(found[0]["assistant"].n_tokens)
    assert np.median(found[0]["assistant"].mean_error / over_tokens) > 3


def test_leaving_a_conversation_out_is_measuring_the_others(vectors: ConceptVectors) -> None:
    talks, sums = neutral_dialogues(ENGINE)[:12], Sums()
    probe = Probe(vectors, alone=True)
    for (trace, _), talk in zip(read_traces(ENGINE.run, talks, probe), talks, strict=True):
        assert trace is not None
        sums.add(trace, talk)
    whole = sums.baseline(ENGINE, probe, source="")
    left = sums.without(whole, 3)
    others = Baseline.measure(ENGINE, [*talks[:3], *talks[4:]], probe=probe, source="")
    for name, spread in others.spreads.items():
        np.testing.assert_allclose(left.spreads[name].mean, spread.mean, atol=1e-9)
        np.testing.assert_allclose(left.spreads[name].deviation, spread.deviation, atol=1e-9)


def test_baselines_are_stored_and_guarded(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = baseline.save(tmp_path / "baseline-4.json")
    again = Baseline.load(file)
    assert again.note == baseline.note and again.names == baseline.names and again.texts == baseline.texts
    for name, spread in baseline.spreads.items():
        assert np.array_equal(again.spreads[name].mean, spread.mean)
    with pytest.raises(MismatchError, match="layer 4, not 2"):
        Monitor(vectors.with_layer(2), again)
    with pytest.raises(MismatchError, match="other vectors"):
        Monitor(replace(vectors, directions=-vectors.directions), again)
    with pytest.raises(MismatchError, match="other speaker"):
        Monitor(vectors, again, other=vectors)
    with pytest.raises(FormatError, match=f"give {FEW} or more"):
        Baseline.measure(ENGINE, neutral_dialogues(ENGINE)[:9], probe=Probe(vectors), source="few")
    record = json.loads(file.read_text())
    without = {key: value for key, value in record.items() if key != "layer"}
    others = [{**record, "format": 9}, {**record, "spreads": {}}, {**record, "names": ["calm"]}, without]
    for broken in ("{", "[]", *map(json.dumps, others)):
        file.write_text(broken)
        with pytest.raises(FormatError, match="affectlens baseline"):
            Baseline.load(file)


def test_dialogues_as_turns() -> None:
    assert spoken("Person: a\nAI: b\nc: d\n\nPerson: e") == (("user", "a"), ("assistant", "b\nc: d"), ("user", "e"))
    talks = neutral_dialogues(ENGINE)
    assert len({talk_id(talk) for talk in talks}) == len(talks)


# ── finished text ──


def test_scores_of_a_conversation(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["desperate > 1.5 for 5 tokens", "user.afraid > 1 for 3 tokens", "calm > 3"])
    trace = monitor.score(ENGINE, (("user", dense("afraid")), ("assistant", dense("desperate"))))
    assert trace.unit == "z" and trace.top(1)[0][0] == "desperate"
    fired = {alert.rule: alert for alert in trace.alerts}
    assert set(fired) == {"desperate > 1.5 for 5 tokens", "user.afraid > 1 for 3 tokens"}
    alert = fired["desperate > 1.5 for 5 tokens"]
    assert alert.speaker == "assistant" and alert.turn == 1 and alert.token == alert.noticed
    assert alert.scores == {"desperate": pytest.approx(trace.scores[alert.token, trace.names.index("desperate")], abs=1e-3)}
    assert trace.layout.text[: trace.layout.offsets[alert.token][1]].endswith(alert.words.split()[-1])
    assert not monitor.score(ENGINE, (("user", dense("proud")), ("assistant", dense("sad")))).alerts


def test_a_gate_reads_the_z_of_the_monitor(vectors: ConceptVectors, baseline: Baseline) -> None:
    talk = (("user", dense("proud")), ("assistant", dense("desperate", 8) + " " + dense("calm", 8)))
    trace = Monitor(vectors, baseline).score(ENGINE, talk)
    own, column = trace.of("assistant"), vectors.index("desperate")
    limit = float(np.median(trace.scores[own, column]))
    gate = baseline.gate(vectors, "desperate", above=limit)
    residuals = next(ENGINE.read([talk], Readout((vectors.layer,), pool="none"))).values[0]
    np.testing.assert_allclose(gate.score(residuals)[own[1:]], trace.scores[own, column], atol=1e-3)
    assert gate.opens(residuals)[own[1:]].tolist() == (trace.scores[own, column] > limit).tolist()
    users = baseline.gate(vectors, "desperate", above=limit, speaker="user").score(residuals)
    np.testing.assert_allclose(users[trace.of("user")[1:]], trace.scores[trace.of("user"), column], atol=1e-3)
    with pytest.raises(UnknownName, match="did you mean assistant"):
        baseline.gate(vectors, "desperate", above=1, speaker="asistant")
    with pytest.raises(MismatchError, match="other vectors"):
        baseline.gate(replace(vectors, directions=-vectors.directions), "desperate", above=1)


def test_plain_texts_are_scored_as_replies_alone(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["desperate > 2"])
    trace = monitor.score(ENGINE, ENGINE.write("desperate", "x", seed=3))
    assert trace.top(1, speaker="text")[0][0] == "desperate" and trace.alerts[0].speaker == "text"
    assert np.isnan(trace.mean()).all()
    plain = [monitor.score(ENGINE, ENGINE.write(None, f"topic {i}", seed=i)) for i in range(20)]
    assert np.abs(np.mean([trace.mean("text") for trace in plain])) < 0.3


def test_gap_is_what_context_adds(vectors: ConceptVectors, baseline: Baseline) -> None:
    """The toy's context carries what others say; a reply alone has none of it."""
    monitor = Monitor(vectors, baseline, gap=True)
    same = chat(None, None, seed=4)
    moved = (("user", ENGINE.write("desperate", "user 4", seed=4, words=60)), same[1])
    gaps = []
    for talk in (same, moved):
        trace = monitor.score(ENGINE, talk)
        assert trace.gap is not None and trace.visible is not None
        own = trace.of("assistant") & np.isfinite(trace.gap).all(axis=1)
        gaps.append(trace.gap[own].mean(axis=0))
    i = vectors.index("desperate")
    assert gaps[1][i] - gaps[0][i] > 1 and np.argmax(gaps[1] - gaps[0]) == i
    rules = Monitor(vectors, baseline, rules=["mean(gap(desperate), 30) > 1"])
    assert rules.score(ENGINE, moved).alerts and not rules.score(ENGINE, same).alerts


def test_other_vectors_stand_beside(vectors: ConceptVectors) -> None:
    turned = replace(vectors, names=tuple(reversed(vectors.names)), directions=vectors.directions[:, ::-1].copy())
    probe = Probe(vectors, turned)
    baseline = Baseline.measure(ENGINE, neutral_dialogues(ENGINE), probe=probe, source="neutral")
    assert OTHER + "user" in baseline.spreads
    monitor = Monitor(vectors, baseline, rules=["other(user.afraid) > 1 for 3 tokens"], other=turned)
    trace = monitor.score(ENGINE, (("user", dense("afraid")), ("assistant", dense("calm"))))
    assert trace.other is not None and trace.alerts
    np.testing.assert_allclose(trace.other[:, ::-1], trace.scores, atol=1e-4)
    stream = monitor.stream(ENGINE, QUIET, sampling=Sampling(max_tokens=5))
    assert [token.other is not None for token in stream if token.text] == [True] * 5
    page = browse.page([trace.shown(["afraid"])], "A conversation")
    assert "afraid of the other" in page


def test_traces_are_plain_data_and_pages(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["cornered: desperate > 1.5"], gap=True)
    talk = (("user", dense("afraid")), ("assistant", dense("desperate")))
    trace = monitor.score(ENGINE, talk, id="a & <b>")
    record = json.loads(json.dumps(trace.as_dict(["desperate"])))
    assert list(record["scores"]) == ["desperate"] and len(record["tokens"]) == len(trace) == len(record["gap"]["desperate"])
    assert Alert(**record["alerts"][0]) == trace.alerts[0]
    shown = trace.shown(["desperate", "calm"])
    visible = trace.visible[trace.of("assistant"), vectors.index("desperate")]
    assert shown.alone["desperate"] == [None, round(1000 * float(np.nanmean(visible)))]
    assert list(shown.scores)[:3] == ["desperate", "desperate alone", "desperate gap"]
    assert shown.labels["alarms"].startswith("cornered at token") and shown.means["desperate"] > 1
    assert "".join(shown.pieces).replace(" ", "") == "".join(words for _, words in talk).replace(" ", "")
    assert browse.page([shown], "x").startswith("<!doctype html>")


def test_rules_are_checked_when_they_are_given(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="did you mean desperate"):
        Monitor(vectors, rules=["desparate > 3"])
    with pytest.raises(RuleError, match="no words of 'system'"):
        Monitor(vectors, baseline, rules=["system.calm > 3"])
    with pytest.raises(RuleError, match="no vectors of the other"):
        Monitor(vectors, baseline, rules=["other(calm) > 3"])
    with pytest.raises(UnknownName, match="clam"):
        Monitor(vectors, rules=[Policy(parse("calm > 1"), (Steer((("clam", 0.1),)),))])
    with pytest.raises(AffectlensError, match="cannot be logged"):
        Monitor(vectors, rules=[Policy(parse("calm > 1"), (Log(str(tmp_path)),))])
    assert Monitor(vectors).ready(ENGINE).source == "neutral dialogues"


# ── while a reply is generated ──


def replay(monitor: Monitor, prompt: Any, **options: Any) -> tuple[list[Any], Any]:
    stream = monitor.stream(ENGINE, prompt, sampling=Sampling(max_tokens=80, seed=3), **options)
    return list(stream), stream


def test_a_stream_gives_what_scoring_gives(vectors: ConceptVectors, baseline: Baseline) -> None:
    rules = ["calm > 0.5 for 2 tokens", "mean(sad, 8) > 0.2", "gap(happy) > 0.3", "user.proud > -9", "rise(calm, 5) > 1"]
    monitor = Monitor(vectors, baseline, rules=rules)
    tokens, stream = replay(monitor, QUIET)
    assert stream.text == ENGINE.generate([QUIET], sampling=Sampling(max_tokens=80, seed=3))[0]
    assert "".join(token.text for token in tokens) == stream.text and stream.finish in ("stop", "length")
    trace: Trace = stream.trace
    said = [token for token in tokens if token.role == "assistant" and np.isfinite(token.scores).all()]
    live, own = np.stack([token.scores for token in said]), trace.scores[[token.position for token in said]]
    np.testing.assert_allclose(live, own, atol=2e-3)
    # Read again as a finished text; from where its words are cut into other tokens on, it is another text to the model.
    scored = monitor.score(ENGINE, (*QUIET, ("assistant", stream.text)))
    same = next(i for i, (a, b) in enumerate(zip(trace.layout.ids, scored.layout.ids, strict=False)) if a != b)
    assert same > trace.layout.n_prompt + 20
    np.testing.assert_allclose(trace.scores[:same], scored.scores[:same], atol=2e-3)
    # Rules that were looked at while it was generated have found what they find in the whole.
    found = sorted((alert.rule, alert.token) for alert in watched(trace, monitor.policies).alerts)
    assert found == sorted((alert.rule, alert.token) for alert in trace.alerts) and {rule for rule, _ in found} == set(rules)
    gap = [alert for alert in stream.alerts if "gap" in alert.rule]
    assert all(0 <= alert.noticed - alert.token <= EVERY for alert in gap)
    assert all(alert.noticed == alert.token for alert in stream.alerts if alert.speaker == "assistant" and alert not in gap)


def test_what_was_said_before_raises_no_second_alarm(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["desperate > 1.5", "user.afraid > 1 for 3 tokens"])
    before = (("user", dense("afraid")), ("assistant", dense("desperate")))
    tokens, stream = replay(monitor, (*before, *QUIET))
    assert not [alert for alert in stream.alerts if alert.turn < 2]
    tokens, stream = replay(monitor, (*QUIET, ("assistant", "the door"), before[0]))
    assert [alert.rule for alert in tokens[0].alerts] == ["user.afraid > 1 for 3 tokens"] and tokens[0].text == ""


def test_hysteresis_goes_on_from_reply_to_reply(vectors: ConceptVectors, baseline: Baseline) -> None:
    before = chat(None, "desperate")
    rule = "desperate > 1.5 until desperate < -50"
    assert not replay(Monitor(vectors, baseline, rules=[rule]), (*before, *QUIET))[1].alerts
    assert replay(Monitor(vectors, baseline, rules=["calm > -50 until calm < -50"]), QUIET)[1].alerts


def first_alarm(actions: tuple[Any, ...], rule: str = "calm > -50 for 10 tokens") -> Policy:
    """A policy that fires at the tenth token of a reply, whatever it says."""
    return Policy(parse(rule), actions)


def test_stopping_ends_the_reply_with_a_message(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=[first_alarm((Stop("[stopped]"),))])
    tokens, stream = replay(monitor, QUIET)
    plain = replay(Monitor(vectors, baseline), QUIET)[0]
    assert [t.text for t in tokens[:10]] == [t.text for t in plain[:10]] and tokens[10].text == "[stopped]" == tokens[-1].text
    assert tokens[10].role == "monitor" and stream.finish == "stopped" and stream.text.endswith("[stopped]")
    assert len(stream.alerts) == 1 and stream.trace.alerts == tuple(stream.alerts)
    assert "[stopped]" not in stream.trace.layout.text


def test_stopping_at_what_the_user_says_starts_no_reply(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=[Policy(parse("user.calm > -50"), (Stop("no"),))])
    tokens, stream = replay(monitor, QUIET)
    assert [token.text for token in tokens] == ["", "no"] and stream.text == "no"


def test_counter_steering_keeps_both_readings(vectors: ConceptVectors, baseline: Baseline, tmp_path: Path) -> None:
    file = tmp_path / "alarms.jsonl"
    steer = Steer((("sad", 0.5), ("happy", -0.5)))
    monitor = Monitor(vectors, baseline, rules=[first_alarm((Log(str(file)), steer)), "sad > -50 cooldown 5 tokens"])
    tokens, stream = replay(monitor, QUIET)
    plain = replay(Monitor(vectors, baseline), QUIET)[0]
    assert [t.text for t in tokens[:10]] == [t.text for t in plain[:10]]
    assert "".join(t.text for t in tokens) == stream.text and len([t for t in tokens if t.text]) <= 80
    assert not tokens[9].steering and all("+0.5 sad" in token.steering for token in tokens[10:])
    trace: Trace = stream.trace
    assert trace.steered is not None and trace.steering.startswith("+0.5 sad")
    reply = np.flatnonzero(trace.of("assistant"))
    sad = vectors.index("sad")
    assert np.isnan(trace.steered[reply[:10]]).all() and np.isfinite(trace.steered[reply[11:]]).all()
    # Untouched is what an engine that never steered reads in the same words; steered is what was read then.
    untouched = Monitor(vectors, baseline).score(ENGINE, (*QUIET, ("assistant", stream.text.strip())))
    np.testing.assert_allclose(trace.scores[reply[:40], sad], untouched.scores[untouched.of("assistant")][:40, sad], atol=2e-3)
    assert (trace.steered[reply[12:], sad] - trace.scores[reply[12:], sad]).min() > 0.5
    live = np.array([token.scores[sad] for token in tokens[12:] if np.isfinite(token.scores).all()])
    np.testing.assert_allclose(live, trace.steered[reply[12:], sad], atol=2e-3)
    # An alarm goes on being raised, on the untouched reading.
    later = [alert for alert in stream.alerts if alert.token > reply[12] and alert.rule.startswith("sad")]
    assert not later, "it is one alarm that lasts"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["event"] for record in records][:2] == ["alarm", "steered"]
    assert records[1]["steered"]["sad"] > records[1]["untouched"]["sad"] + 0.5
    assert {"id", "time", "steering"} <= set(records[1])


def test_a_stop_string_reaches_over_the_beginning_of_steering(vectors: ConceptVectors, baseline: Baseline) -> None:
    """The tenth token sets off the steering, so what is said next is generated by a second request."""
    monitor = Monitor(vectors, baseline, rules=[first_alarm((Steer((("sad", 0.5),)),))])
    free, plain = replay(monitor, QUIET)
    words = [token.text for token in free if token.text]
    for first, last in ((9, 11), (8, 12), (9, 10), (10, 12)):
        stop = "".join(words[first:last])[1:]
        assert plain.text.index(stop) == len("".join(words[:first])) + 1, "it stands nowhere before"
        stream = monitor.stream(ENGINE, QUIET, sampling=Sampling(max_tokens=80, seed=3, stop=("zzz", stop)))
        tokens = list(stream)
        assert stream.text == plain.text[: plain.text.index(stop)] == "".join(token.text for token in tokens)
        assert stream.finish == "stop" and stream.trace.layout.text.endswith(stream.text) and len(stream.alerts) == 1
    # What only begins like a stop string is said after all, also where the reply ends or an alarm stops it.
    held = (words[9] + "zzz", words[8][-1:] + words[9] + words[10] + "zzz")
    stream = monitor.stream(ENGINE, QUIET, sampling=Sampling(max_tokens=80, seed=3, stop=held))
    assert "".join(token.text for token in stream) == stream.text == plain.text and stream.finish == plain.finish
    stream = monitor.stream(ENGINE, QUIET, sampling=Sampling(max_tokens=11, seed=3, stop=(words[9] + words[10] + "zzz",)))
    assert "".join(token.text for token in stream) == stream.text == "".join(words[:11]) and stream.finish == "length"
    assert stream.trace.layout.text.endswith(stream.text)


def test_rules_see_the_untouched_model(vectors: ConceptVectors, baseline: Baseline) -> None:
    """Steering towards sad raises the reading; a rule that this would set off is not."""
    steered = Policy(parse("calm > -50"), (Steer((("sad", 0.6),)),))
    trace = replay(Monitor(vectors, baseline, rules=[steered]), QUIET)[1].trace
    own, sad = trace.of("assistant"), vectors.index("sad")
    touched, untouched = np.nanmax(trace.steered[own, sad]), trace.scores[own, sad].max()
    assert touched > untouched + 0.5
    between = f"sad > {(touched + untouched) / 2:.3f}"
    below = f"sad > {untouched - 0.05:.3f}"
    _, stream = replay(Monitor(vectors, baseline, rules=[steered, between, below]), QUIET)
    assert {alert.rule for alert in stream.alerts} == {"calm > -50", below}


def test_steering_from_the_first_token(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=[Policy(parse("user.calm > -50"), (Steer((("sad", 1.0),)),))])
    _, stream = replay(monitor, QUIET)
    mixture = 1.0 * vectors["sad"]
    steering = mixture.at(Where(part="prompt", last=1)) + mixture.at(Where(part="response"))
    assert stream.text == ENGINE.generate([QUIET], sampling=Sampling(max_tokens=80, seed=3), steering=steering)[0]


def test_steering_behind_a_prefill_that_no_rule_looks_at(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=[Policy(parse("user.calm > -50"), (Steer((("sad", 0.5),)),))])
    tokens, stream = replay(monitor, QUIET, prefill=" the old door")
    assert stream.text.startswith(" the old door") and "".join(t.text for t in tokens) == stream.text.removeprefix(
        " the old door"
    )
    reply = np.flatnonzero(stream.trace.of("assistant"))
    assert stream.trace.layout.text.endswith(stream.text) and np.isnan(stream.trace.steered[reply[:2]]).all()


def test_callables_get_alerts_and_cannot_break_the_reply(
    vectors: ConceptVectors, baseline: Baseline, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Alert] = []

    def handed(alert: Alert) -> None:
        seen.append(alert)
        raise RuntimeError("nobody is there")

    _, stream = replay(Monitor(vectors, baseline, rules=[first_alarm((Call(handed),))]), QUIET)
    assert seen == stream.alerts and "nobody is there" in caplog.text


def test_prefill_plain_prompts_and_transcripts(vectors: ConceptVectors, baseline: Baseline) -> None:
    monitor = Monitor(vectors, baseline, rules=["desperate > 1 for 2 tokens"])
    begun = " begged pleaded clutching frantically starving"
    tokens, stream = replay(monitor, QUIET, prefill=begun)
    assert stream.text.startswith(begun) and tokens[0].alerts and tokens[0].text == ""
    tokens, stream = replay(monitor, "the begged pleaded clutching frantically")
    assert tokens[0].alerts[0].speaker == "text" and stream.trace.format == "plain text"
    base = ToyEngine(template=False)
    stream = monitor.stream(base, QUIET, sampling=Sampling(max_tokens=4))
    assert len(list(stream)) == 4 and stream.trace.format == "plain transcript"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_real_tokenizer_and_a_cache(family: str, tmp_path: Path) -> None:
    """With transformers, where words may be cut into other tokens when they are read again."""
    engine = open_engine(str(families.save(family, tmp_path / family)))
    info = engine.info
    rng, layers = np.random.default_rng(0), tuple(range(info.n_layers))
    directions = rng.normal(size=(len(layers), 3, info.width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    ones = np.ones((len(layers), 3), np.float32)
    vectors = ConceptVectors(
        names=("a", "b", "c"), layers=layers, layer=0, directions=directions, norms=ones,
        centre=np.zeros((len(layers), info.width), np.float32), residual_norms=ones[:, 0], neutral=(),
        baseline=np.stack([0 * ones, ones], axis=-1), stability=ones, counts=np.full(3, 9), model={"id": info.id},
    )  # fmt: skip
    talks = [Conversation(str(i), (("user", f"what is {i}"), ("assistant", f"it is {i} and {i + 1}"))) for i in range(12)]
    template = info.template is not None
    baseline = Baseline.measure(engine, talks, probe=Probe(vectors, template=template), source="a dozen")
    rules = ["gap(c) > -50 cooldown 3 tokens", "user.b > -50", "b > 0 until b < -1 cooldown 2 tokens"]
    steer = Policy(parse("a > -50 for 5 tokens"), (Steer((("b", 3.0),)),))
    asked = (("user", "what is it"),)
    drawn = (Request(asked, transcript=not template, sampling=Sampling(max_tokens=40, seed=seed)) for seed in range(50))
    long = next(n for n, result in enumerate(engine.run(drawn)) if result.finish == "length")
    for policies in (rules, [*rules, steer]):
        monitor = Monitor(vectors, baseline, rules=policies)
        stream = monitor.stream(engine, asked, sampling=Sampling(max_tokens=40, seed=long))
        tokens = list(stream)
        assert "".join(token.text for token in tokens) == stream.text and stream.trace is not None
        trace = stream.trace
        assert {alert.rule for alert in trace.alerts} >= {*rules[:2]} and np.isfinite(trace.scores[trace.of("assistant")]).all()
        assert all(0 <= alert.token < len(trace) for alert in trace.alerts)
        live = {token.position: token.scores for token in tokens if np.isfinite(token.scores).all()}
        if policies is rules:
            np.testing.assert_allclose([trace.scores[p] for p in live], list(live.values()), atol=1e-3)
    assert any(token.steering for token in tokens) and trace.steered is not None
    cut = len("".join(token.text for token in tokens[: next(i for i, token in enumerate(tokens) if token.steering)]))
    around = ((cut - n, stream.text[cut - n : cut + n]) for n in range(1, cut))
    begin, stop = next((start, words) for start, words in around if stream.text.find(words) == start)
    stopped = monitor.stream(engine, asked, sampling=Sampling(max_tokens=40, seed=long, stop=(stop,)))
    assert "".join(token.text for token in stopped) == stopped.text == stream.text[:begin] and stopped.finish == "stop"
    own = np.isfinite(trace.steered).all(axis=1)
    assert own.sum() > 20 and (trace.steered[own, 1] - trace.scores[own, 1]).mean() > 0.5


def test_closing_early(vectors: ConceptVectors, baseline: Baseline) -> None:
    stream = Monitor(vectors, baseline).stream(ENGINE, QUIET, sampling=Sampling(max_tokens=80, seed=3))
    next(stream)
    stream.close()
    assert stream.trace is None and not list(stream)


def test_gap_stands_in_the_baseline(baseline: Baseline) -> None:
    assert baseline.spreads[GAP].n_texts == 40
