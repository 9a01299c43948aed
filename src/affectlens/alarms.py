"""Before a rule is armed: how often it will cry wolf, and how soon it notices what it is meant to notice.

**False alarms.** The rule is run along ordinary conversations. Counted are the replies (for ``user.…``, the user's turns) in
which it fires. Turns of one conversation are not independent, so the interval is Wilson's with the design effect of conversations
as clusters; where nothing fired, turns of one conversation count as one, which is the worst that can be. :meth:`Trial.expect`
says how many of the *next* turns will raise it: the beta-binomial prediction interval, which is wider than that of the rate,
since those turns are a sample as well. Where the conversations are those of the baseline, each is stated against the others.

**Delay.** Stories that convey the emotion of the rule, and name it nowhere, are put into the mouth of the speaker whom the rule
watches: in how many does it fire, and after how many tokens. A rule without an emotion that it wants high cannot be tried so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import betabinom

from affectlens.actions import Policy
from affectlens.activations import Text
from affectlens.baseline import Baseline, Sums, neutral_dialogues, texts_id
from affectlens.conversations import Conversation
from affectlens.engine import Engine
from affectlens.monitor import Monitor
from affectlens.rules import Rule, comparisons
from affectlens.stats import Estimate, bootstrap, wilson
from affectlens.traces import Probe, Trace, read_traces
from affectlens.watching import watched

ASKED = "Tell me what happened."
"""What the user says before a reply that is a story."""

REPLIES = ("assistant", "text")


@dataclass(frozen=True)
class Delay:
    """How a rule notices stories of its emotion.

    Args:
        concepts: The emotions.
        noticed: Share of the stories in which it fires.
        tokens: Median number of tokens until it does, where it does; None where it never does.
    """

    concepts: tuple[str, ...]
    noticed: Estimate
    tokens: Estimate | None

    def __str__(self) -> str:
        when = f", after {self.tokens} tokens (median)" if self.tokens else ""
        return f"stories of {', '.join(self.concepts)}: noticed {self.noticed}{when}"


@dataclass(frozen=True)
class Trial:
    """How a rule did on ordinary conversations and on stories.

    Args:
        rule: Its name.
        text: The rule.
        whose: What was counted: ``replies``, or ``turns of`` somebody.
        conversations: How many were read.
        turns: How many turns they have.
        alarmed: In how many of these the rule fired.
        alarms: How often it fired.
        design: How many turns tell as much as one that is independent of all others.
        delay: None where that cannot be tried; ``untried`` says why.
        untried: Why there is no delay.
    """

    rule: str
    text: str
    whose: str
    conversations: int
    turns: int
    alarmed: int
    alarms: int
    design: float
    delay: Delay | None = None
    untried: str = ""

    @property
    def per_thousand(self) -> Estimate:
        """Of 1,000 turns, in how many it fires falsely; 95 % interval of that rate."""
        rate = wilson(self.alarmed, self.turns, design=self.design)
        return replace(rate, value=1000 * rate.value, low=1000 * rate.low, high=1000 * rate.high)

    def expect(self, n: int, *, level: float = 0.95) -> tuple[int, int]:
        """In how many of the next ``n`` ordinary turns it will fire.

        Args:
            n: How many turns.
            level: How probable that is. Of many rules at 95 % each, some will lie outside; that all of ``m`` rules lie inside
                has a probability of 95 % at a level of ``1 - 0.05 / m``.

        Example:
            >>> Trial("r", "a > 1", "replies", 100, 200, 4, 4, design=1.0).expect(200)
            (0, 11)
        """
        # With clusters, so many turns are worth n / design independent ones, each of which stands for `design` turns.
        draws = max(1, round(n / self.design))
        a, b = (count / self.design + 0.5 for count in (self.alarmed, self.turns - self.alarmed))
        low, high = betabinom.ppf([(1 - level) / 2, (1 + level) / 2], draws, a, b)
        return math.floor(low * self.design), min(n, math.ceil(high * self.design))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        delay = self.delay and {
            "concepts": list(self.delay.concepts),
            "noticed": self.delay.noticed.as_dict(),
            "tokens": self.delay.tokens and self.delay.tokens.as_dict(),
        }
        computed = {"per_thousand": self.per_thousand.as_dict(), "next_thousand": list(self.expect(1000))}
        return {**vars(self), **computed, "delay": delay}

    def __str__(self) -> str:
        low, high = self.expect(1000)
        delay = str(self.delay) if self.delay else f"delay not tried: {self.untried}"
        return (
            f"{self.rule}: false alarms in {self.per_thousand} of 1,000 {self.whose}; {low} to {high} in the next 1,000 "
            f"from where these came; {delay}"
        )


def try_rules(
    engine: Engine, monitor: Monitor, *, talks: Iterable[Conversation] | None = None, stories: Iterable[Text] = ()
) -> tuple[Trial, ...]:
    """Try every rule of a monitor; nothing that its actions do is done.

    Args:
        engine: The model.
        monitor: Its rules and its baseline.
        talks: Ordinary conversations; default: the neutral dialogues.
        stories: Texts with the emotion that each conveys.

    Returns:
        A trial for each rule, in their order.

    Example:
        >>> for trial in try_rules(engine, monitor): print(trial)     # doctest: +SKIP
    """
    if not monitor.policies:
        return ()
    baseline, probe = monitor.ready(engine), monitor.probe_of(engine)
    read = neutral_dialogues(engine) if talks is None else talks
    quiet = ordinary_traces(engine, monitor, read)
    loud = _noticed(engine, baseline, probe, list(stories), monitor.policies)
    trials = []
    for policy in monitor.policies:
        delay, untried = loud[policy.rule.name]
        trial = trial_of(policy.rule, [turns_of_rule(policy.rule, trace) for trace in quiet])
        trials.append(replace(trial, delay=delay, untried=untried))
    return tuple(trials)


def arm(
    engine: Engine, monitor: Monitor, *, talks: Iterable[Conversation] | None = None, stories: Iterable[Text] = ()
) -> tuple[Trial, ...]:
    """:func:`try_rules`, and from now on every alert of the monitor says how many false alarms are expected.

    Example:
        >>> trials = arm(engine, monitor)     # doctest: +SKIP
    """
    trials = try_rules(engine, monitor, talks=talks, stories=stories)
    expected = [(each.value, each.low, each.high) for trial in trials for each in [trial.per_thousand]]
    monitor.policies = tuple(replace(policy, expected=e) for policy, e in zip(monitor.policies, expected, strict=True))
    return trials


# ── false alarms ──


def ordinary_traces(engine: Engine, monitor: Monitor, talks: Iterable[Conversation]) -> list[Trace]:
    """Traces of ordinary conversations with the alerts of all rules; of the scores, only those that rules name are kept."""
    signals = [signal for policy in monitor.policies for signal in policy.rule.signals]
    names = tuple(dict.fromkeys(signal.concept for signal in signals if signal.kind != "other"))
    others = tuple(dict.fromkeys(signal.concept for signal in signals if signal.kind == "other"))
    return [watched(trace, monitor.policies) for trace in standardised(engine, monitor, talks, names=names, other=others)]


def standardised(
    engine: Engine, monitor: Monitor, talks: Iterable[Conversation], *, names: Sequence[str], other: Sequence[str] = ()
) -> Iterator[Trace]:
    """Traces of ordinary conversations in z; where they are those of the baseline, each is stated against the others.

    Args:
        engine: The model.
        monitor: Its vectors and its baseline; rules do not matter.
        talks: Ordinary conversations.
        names, other: The concepts whose scores are kept, and those by the vectors of the other speaker.
    """
    baseline, kept, sums = monitor.ready(engine), [], Sums()
    for trace, each in read_traces(engine.run, talks, monitor.probe_of(engine)):
        if trace is not None:
            kept.append(trace.select(names, other))
            sums.add(kept[-1], each.talk)
    chosen = baseline.select(names, other)
    own = texts_id(sums.hashes) == baseline.texts
    for i, trace in enumerate(kept):
        yield (sums.without(chosen, i) if own else chosen).standardise(trace)


def turns_of_rule(rule: Rule, trace: Trace) -> tuple[int, int, int]:
    """How many turns of a trace a rule watches, in how many it fired, and how often."""
    roles = zip(trace.turns.tolist(), trace.layout.roles, strict=True)
    own = {turn for turn, role in roles if turn >= 0 and role in rule.speakers}
    fired = [alert.turn for alert in trace.alerts if alert.text == rule.text]
    return len(own), len(set(fired)), len(fired)


def trial_of(rule: Rule, counts: Sequence[tuple[int, int, int]]) -> Trial:
    """A trial from what :func:`turns_of_rule` counts in each conversation.

    Example:
        >>> from affectlens.rules import parse
        >>> trial_of(parse("a > 1"), [(3, 1, 1), (2, 0, 0)]).per_thousand.value
        200.0
    """
    table = np.array([row for row in counts if row[0]], dtype=np.float64).reshape(-1, 3)
    named = [speaker for speaker in rule.speakers if speaker not in REPLIES]
    if named and set(rule.speakers) & set(REPLIES):
        named.append("assistant")
    whose = f"turns of {' and '.join(named)}" if named else "replies"
    turns, alarmed, alarms = (int(total) for total in table.sum(axis=0))
    return Trial(rule.name, rule.text, whose, len(counts), turns, alarmed, alarms, _design(table[:, 0], table[:, 1]))


def _design(turns: np.ndarray, alarmed: np.ndarray) -> float:
    """The design effect of conversations as clusters: variance of the rate over that of independent turns, at least 1."""
    total, k = turns.sum(), len(turns)
    if not total:
        return 1.0
    rate = alarmed.sum() / total
    if k < 2 or rate in (0.0, 1.0):
        return float((turns**2).sum() / total)
    between = k / (k - 1) * ((alarmed - rate * turns) ** 2).sum() / total**2
    return float(max(1.0, between / (rate * (1 - rate) / total)))


# ── delay ──


def _noticed(
    engine: Engine, baseline: Baseline, probe: Probe, stories: Sequence[Text], policies: Sequence[Policy]
) -> dict[str, tuple[Delay | None, str]]:
    """For each rule its delay, or why it has none."""
    wanted: dict[str, tuple[str, list[Text]]] = {}
    found: dict[str, tuple[Delay | None, str]] = {}
    for policy in policies:
        why, speaker, concepts = _meant(policy.rule)
        own = [story for story in stories if story.concept in concepts]
        if not why and not own:
            why = f"no story conveys {', '.join(concepts)}"
        if why:
            found[policy.rule.name] = None, why
        else:
            wanted[policy.rule.name] = (speaker, own)
    talks = {
        (speaker, story.id): Conversation(f"{speaker} {story.id}", _told(speaker, story.text))
        for speaker, own in wanted.values()
        for story in own
    }
    traces = {
        each.talk.id: watched(baseline.standardise(trace), policies)
        for trace, each in read_traces(engine.run, talks.values(), probe)
        if trace is not None
    }
    for policy in policies:
        if policy.rule.name not in wanted:
            continue
        speaker, own = wanted[policy.rule.name]
        read = [trace for story in own if (trace := traces.get(talks[speaker, story.id].id)) is not None]
        delays = [delay for trace in read if (delay := _delay(trace, policy.rule, speaker)) is not None]
        concepts = tuple(dict.fromkeys(story.concept for story in own))
        found[policy.rule.name] = Delay(concepts, wilson(len(delays), len(read)), _median(delays)), ""
    return found


def _median(values: Sequence[int]) -> Estimate | None:
    if not values:
        return None
    every = np.array(values, dtype=np.float64)
    if len(every) == 1:
        return Estimate(float(every[0]), 0.0, math.inf, 1)
    return bootstrap(lambda chosen: float(np.median(every[chosen])), len(every))


def _meant(rule: Rule) -> tuple[str, str, tuple[str, ...]]:
    """Why a rule cannot be tried on stories, or whom it watches and which emotions it wants high."""
    high = [c.signal for c, negated in comparisons(rule.condition) if (c.operator[0] == ">") != negated]
    if not high:
        return "the rule wants no emotion high", "", ()
    if any(signal.kind != "inner" for signal in high):
        return "a story told is felt as it is shown, and by who tells it: there is nothing for gap or other", "", ()
    speakers = {signal.speaker or "assistant" for signal in high}
    if len(speakers) > 1 or not speakers <= {"assistant", "user"}:
        return "the rule watches several speakers, or one who is neither user nor assistant", "", ()
    return "", speakers.pop(), tuple(dict.fromkeys(signal.concept for signal in high))


def _told(speaker: str, story: str) -> tuple[tuple[str, str], ...]:
    """A story in the mouth of a speaker."""
    return (("user", ASKED), ("assistant", story)) if speaker == "assistant" else (("user", story), ("assistant", "I see."))


def _delay(trace: Trace, rule: Rule, speaker: str) -> int | None:
    """Tokens of the speaker's turn up to the first alert in it; None where there is none."""
    turns = trace.turns
    place = next((alert.token for alert in trace.alerts if alert.text == rule.text and alert.speaker == speaker), None)
    return None if place is None else int((turns[: place + 1] == turns[place]).sum())
