"""The rule language: every form fires exactly where its definition says, every mistake is shown where it is."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from fractions import Fraction
from functools import cache

import pytest

from affectlens.errors import RuleError
from affectlens.rules import (
    OWN,
    Compare,
    Condition,
    Every,
    Lasting,
    Not,
    Rule,
    Signal,
    Some,
    Window,
    comparisons,
    parse,
)
from affectlens.watching import STEP, Watch

Tokens = list[tuple[str, tuple[float, ...]]]


def fires(rule: Rule | str, scores: list[float], speaker: str = "assistant") -> list[int]:
    """Where a rule of one score fires."""
    watch = Watch(parse(rule) if isinstance(rule, str) else rule)
    return [i for i, score in enumerate(scores) if watch.step(speaker, [score] * len(watch.rule.signals))]


def test_a_reading_of_a_model_in_training_is_counted_like_a_token() -> None:
    for written in ("calm > 1 for 3 {}", "calm > 1 until < 0 cooldown 2 {}"):
        one, two = (parse(written.format(word)) for word in ("readings", "tokens"))
        assert (one.condition, one.until, one.cooldown) == (two.condition, two.until, two.cooldown)


# ── the definition, over whole arrays ──


def by_definition(rule: Rule, tokens: Tokens) -> list[int]:
    """Where a rule fires, computed from all tokens at once and from nothing that was computed at another token."""

    def scored(token: tuple[str, tuple[float, ...]], signal: Signal) -> int | None:
        speaker, scores = token
        wanted = OWN if signal.speaker is None else (signal.speaker,)
        score = scores[rule.signals.index(signal)]
        return round(score * STEP) if speaker in wanted and math.isfinite(score) else None

    clock = [i for i, token in enumerate(tokens) if any(scored(token, signal) is not None for signal in rule.signals)]

    @cache
    def value(what: Signal | Window, t: int) -> float | None:
        signal = what.signal if isinstance(what, Window) else what
        known = [score for i in clock[: t + 1] if (score := scored(tokens[i], signal)) is not None]
        if isinstance(what, Signal):
            return float(Fraction(known[-1], STEP)) if known else None
        if len(known) < what.n:
            return None
        x = [Fraction(score, STEP) for score in known[-what.n :]]
        middle, mean = Fraction(what.n - 1, 2), sum(x) / what.n
        if what.how == "mean":
            return float(mean)
        slope = sum((i - middle) * (v - mean) for i, v in enumerate(x)) / sum((i - middle) ** 2 for i in range(what.n))
        return float(slope * (what.n - 1))

    @cache  # of the same token only: it saves time and shares nothing between tokens
    def truth(c: Condition, t: int) -> bool | None:
        if isinstance(c, Compare):
            v, k = value(c.value, t), c.threshold
            return None if v is None else {">": v > k, ">=": v >= k, "<": v < k, "<=": v <= k}[c.operator]
        if isinstance(c, Every):
            found = {truth(part, t) for part in c.parts}
            return False if False in found else None if None in found else True
        if isinstance(c, Some):
            found = {truth(part, t) for part in c.parts}
            return True if True in found else None if None in found else False
        if isinstance(c, Not):
            return None if (inner := truth(c.part, t)) is None else not inner
        if truth(c.part, t) is None:
            return None
        return t + 1 >= c.n and all(truth(c.part, u) is True for u in range(t - c.n + 1, t + 1))

    fired: list[int] = []
    armed = True
    for t in range(len(clock)):
        if armed:
            if truth(rule.condition, t) is True and (not fired or t - fired[-1] > rule.cooldown):
                fired.append(t)
                armed = False
        elif rule.until is None:
            armed = truth(rule.condition, t) is not True
        else:
            armed = truth(rule.until, t) is True
    return [clock[t] for t in fired]


class Drawn:
    """Random rules, written out, and random conversations; scores and thresholds are coarse, so that they often tie."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def rule(self) -> str:
        until = self.random.choice(["", "", f" until {self.condition(1)}", f" until {self.operator()} {self.number()}"])
        if until and until.split()[1] in (">", ">=", "<", "<=", "≥"):
            condition = f"{self.value()} {self.operator()} {self.number()}"
            until += self.random.choice(["", f" for {self.random.randint(1, 3)} tokens"])
        else:
            condition = self.condition(3)
        pause = self.random.choice(["", "", f" cooldown {self.random.randint(1, 9)} tokens"])
        lasts = self.random.choice(["", f" for {self.random.randint(1, 4)} tokens"])
        return condition + lasts + (until + pause if self.random.random() < 0.5 else pause + until)

    def condition(self, depth: int) -> str:
        kind = self.random.choice(["and", "or", "not", "for", "", ""]) if depth else ""
        if kind in ("and", "or"):
            parts = [f"({self.condition(depth - 1)})" for _ in range(self.random.randint(2, 3))]
            return f" {kind} ".join(parts)
        if kind == "not":
            return f"not ({self.condition(depth - 1)})"
        if kind == "for":
            return f"({self.condition(depth - 1)} for {self.random.randint(1, 4)} tokens)"
        return f"{self.value()} {self.operator()} {self.number()}"

    def value(self) -> str:
        signal = self.random.choice(["a", "a", '"b c"', "[b c]", "user.a", "user.[b c]", "gap(a)", "other(user.a)", "text.a"])
        n = self.random.randint(2, 6)
        return self.random.choice([signal, f"mean({signal}, {n})", f"rise({signal}, {n})"])

    def operator(self) -> str:
        return self.random.choice([">", ">", ">=", "<", "<=", "≥"])

    def number(self) -> str:
        return self.random.choice(["0", "1", "-1", "0.5", "-.25", "−1.5", "+2"])

    def tokens(self, rule: Rule) -> Tokens:
        roles = [
            role
            for _ in range(self.random.randint(1, 5))
            for role in [self.random.choice(["assistant", "user", "text", "template", "Anna"])] * self.random.randint(1, 15)
        ]
        steps = [-1.5, -1.0, -0.5, -0.25, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, math.nan, math.inf]
        return [(role, tuple(self.random.choice(steps) for _ in rule.signals)) for role in roles]


@pytest.mark.parametrize("seed", range(40))
def test_every_form_fires_where_its_definition_says(seed: int) -> None:
    drawn, hits = Drawn(seed), 0
    for _ in range(12):
        rule = parse(drawn.rule())
        tokens = drawn.tokens(rule)
        watch = Watch(rule)
        fired = [i for i, (speaker, scores) in enumerate(tokens) if watch.step(speaker, scores)]
        assert fired == by_definition(rule, tokens), rule.text
        hits += len(fired)
    assert hits, "rules that never fire would agree with anything"


def test_scores_off_the_grid_agree_as_well() -> None:
    noise = random.Random(1)
    for form in (
        "mean(a, 50) > 0.1",
        "rise(a, 30) > 0.6",
        "a > 1.2 for 2 tokens",
        "mean(a, 7) > 0.5 until < 0 cooldown 20 tokens",
    ):
        rule = parse(form)
        tokens: Tokens = [("assistant", (noise.gauss(0, 1),)) for _ in range(400)]
        assert fires(rule, [scores[0] for _, scores in tokens]) == by_definition(rule, tokens) != []


# ── the forms, by hand ──


def test_lasting() -> None:
    assert fires("desperate > 3 for 3 tokens", [4, 4, 2, 4, 4, 4, 4, 2, 4, 4, 4]) == [5, 10]
    assert fires("desperate > 3", [4, 4, 3, 4]) == [0, 3]  # equal is not above
    assert fires("desperate >= 3 for 1 token", [3, 2, 3]) == [0, 2]


def test_means_wait_for_their_window() -> None:
    assert fires("mean(desperate, 3) > 2", [9, 9, 9]) == [2]
    assert fires("mean(desperate, 3) > 2", [0, 0, 6, 0.5, 0]) == [3]


def test_rise_is_that_of_the_line() -> None:
    ramp = [0.1 * i for i in range(40)]
    assert fires("rise(desperate, 30) > 2.89", ramp) == [29] and fires("rise(desperate, 30) > 2.91", ramp) == []
    assert fires("rise(desperate, 2) > 2", [0, 1, 4]) == [2]  # two tokens: their difference
    assert fires("rise(desperate, 30) > 0.001", [5.0] * 60) == []


def test_hysteresis_holds_one_alarm_until_it_is_released() -> None:
    scores = [4, 2, 4, 2, 0.5, 4, 4, 2, 4]
    assert fires("desperate > 3", scores) == [0, 2, 5, 8]
    assert fires("desperate > 3 until < 1", scores) == [0, 5]
    assert fires("desperate > 3 until < 1 for 2 tokens", [4, 0, 4, 0, 0, 4]) == [0, 5]


def test_cooldown_delays_and_does_not_forget() -> None:
    assert fires("desperate > 3 cooldown 3 tokens", [4, 0, 4, 4, 4, 4, 0, 0, 0, 4]) == [0, 4, 9]


def test_negation_of_what_is_unknown_raises_no_alarm() -> None:
    watch = Watch(parse("not user.calm > 0 and desperate > 3"))
    assert not watch.step("assistant", [math.nan, 4.0])  # the user has not said a word
    assert not watch.step("user", [1.0, math.nan]) and not watch.step("assistant", [math.nan, 4.0])
    assert watch.step("user", [-1.0, math.nan])  # the latest score of the reply still stands
    assert fires("not mean(desperate, 3) > 2", [0, 0, 0]) == [2]


def test_speakers_are_streams_of_their_own() -> None:
    watch = Watch(parse("mean(user.afraid, 2) > 1"))
    said = [("user", 2.0), ("assistant", -9.0), ("template", -9.0), ("user", 2.0), ("assistant", 2.0)]
    assert [watch.step(speaker, [score]) for speaker, score in said] == [False, False, False, True, False]
    assert fires("afraid > 1", [2.0], speaker="user") == [] and fires("afraid > 1", [2.0], speaker="text") == [0]


def test_a_watch_needs_neither_more_time_nor_memory_for_longer_windows() -> None:
    def seconds(n: int) -> float:
        watch = Watch(parse(f"mean(a, {n}) > 9 or rise(a, {n}) > 9 or a > 9 for {n} tokens"))
        noise = [random.Random(i).gauss(0, 1) for i in range(64)]
        for i in range(n):
            watch.step("assistant", [noise[i % 64]])
        start = time.process_time()
        for i in range(4000):
            watch.step("assistant", [noise[i % 64]])
        return time.process_time() - start

    assert min(seconds(5000) for _ in range(3)) < 3 * min(seconds(5) for _ in range(3))


def test_sums_over_windows_do_not_drift() -> None:
    """A running sum of floats would be off by the first large score for ever."""
    assert fires("mean(a, 2) <= 0.125", [1e15, 0.125, 0.125, 0.125]) == [2]
    assert fires("rise(a, 2) > 0", [1e15, 0.125, 0.125, 0.125, 0.125]) == []


# ── the language ──


def test_rules_are_data() -> None:
    rule = parse(" cornered : mean(gap(desperate), 50) > 2 and NOT [at ease] < −1.5 until desperate < 1 cooldown 100 tokens")
    assert rule.name == "cornered" and rule.cooldown == 100
    assert parse(rule.text) == rule and hash(parse(rule.text)) == hash(rule)
    assert [str(signal) for signal in rule.signals] == ["gap(desperate)", '"at ease"', "desperate"]
    assert rule.needs == {"inner", "gap"} and rule.speakers == OWN
    assert [(str(c), negated) for c, negated in comparisons(rule.condition)] == [
        ("mean(gap(desperate), 50) > 2", False),
        ('"at ease" < -1.5', True),
    ]
    assert parse("desperate > 3").name == "desperate > 3"
    assert parse("a > 1").condition == parse("a   >1.0").condition
    assert parse("not not a > 1").condition == parse("a > 1").condition


@pytest.mark.parametrize(
    ("written", "concept"),
    [
        ('"at ease" > 1', "at ease"),
        ("'at ease' > 1", "at ease"),
        ("[at ease] > 1", "at ease"),
        ("grief-stricken > 1", "grief-stricken"),
        ('"not" > 1', "not"),
        ("mean > 1", "mean"),
        ("for > 1", "for"),
        ('[it\'s "odd"] > 1', 'it\'s "odd"'),
        ("Überraschung > 1", "Überraschung"),
        ("悲しい > 1", "悲しい"),
        ("order > 1", "order"),  # begins like a word of the language
        ("fortunate > 1 or notable > 1", "fortunate"),
    ],
)
def test_names(written: str, concept: str) -> None:
    (signal, *_) = parse(written).signals
    assert signal.concept == concept
    assert parse(f"{signal} > 1").signals == (signal,)  # what it is called in messages can be written


def test_precedence() -> None:
    a, b, c = (Compare(Signal(name), ">", 1.0) for name in "abc")
    assert parse("a > 1 or b > 1 and not c > 1").condition == Some((a, Every((b, Not(c)))))
    assert parse("(a > 1 or b > 1) and c > 1").condition == Every((Some((a, b)), c))
    assert parse("a > 1 and b > 1 for 3 tokens").condition == Lasting(Every((a, b)), 3)
    assert parse("a > 1 and (b > 1 for 3 tokens)").condition == Every((a, Lasting(b, 3)))


@pytest.mark.parametrize(
    ("text", "said", "marked"),
    [
        ("", "empty", ""),
        ("desperate", "> or <", ""),
        ("desperate 3", "'3' where > or <", "3"),
        ("at ease > 2", 'in quotes: write "at ease"', "ease"),
        ("desperate > x", "a number", "x"),
        ("desperate == 3", "never equal", "="),
        ("desperate > 3 for 2.5 tokens", "a whole number", "2.5"),
        ("desperate > 3 for 0 tokens", "begin with 1", "0"),
        ("desperate > 3 for 20", "tokens", ""),
        ("(desperate > 3", ")", ""),
        ("desperate > 3)", "closes nothing", ")"),
        ("mean(desperate) > 2", "a comma", ")"),
        ("mean(mean(a, 2), 3) > 1", "a comma", "("),
        ("rise(a, 1) > 2", "two tokens", "rise"),
        ("gap(user.calm) > 1", "leave the speaker out", "user.calm"),
        ('"unclosed > 3', "do not end", '"unclosed > 3'),
        ('"" > 3', "empty", '"" > 3'),
        ("a > 1 and b > 2 until < 1", "several scores", "until"),
        ("a > 1 cooldown 3 tokens cooldown 4 tokens", "a second cooldown", "cooldown"),
        ("a > 1 for 3 tokens or c < 2", "in parentheses", "or"),
        ("a > 1 then b", "'then' where", "then"),
        ("a > 1e400", "a number", "1"),
        ("a > §", "a number", "§"),
        ("\ta\n> \n x", "a number", "x"),
        ("a > 1 " + "and a > 1 " * 200, "several rules", "…"),
    ],
)
def test_mistakes_are_shown_where_they_are(text: str, said: str, marked: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse(text)
    error = caught.value
    first, line, marks = str(error).splitlines()
    assert said in first and first.endswith(f"column {error.start + 1}")
    assert line[2:][error.start : error.end].strip() == marked
    assert len(marks) - len(marks.lstrip()) - 2 == error.start and set(marks.strip()) == {"^"}


def test_names_that_do_not_exist_are_shown_with_the_nearest_ones() -> None:
    known, speakers = ["calm", "desperate", "at ease"], ["assistant", "user"]
    rule = parse("desperate > 3 and user.clam < 1")
    replace(rule, condition=parse("calm > 1").condition).check(known, speakers)
    with pytest.raises(RuleError, match="unknown concept 'clam': did you mean calm") as caught:
        rule.check(known, speakers)
    assert rule.text[caught.value.start : caught.value.end] == "user.clam"
    with pytest.raises(RuleError, match="no words of 'usr': did you mean user"):
        parse("usr.calm > 1").check(known, speakers)
    with pytest.raises(RuleError, match="no vectors of the other speaker"):
        parse("other(calm) > 1").check(known, speakers)
    parse("other(angry) > 1").check(known, speakers, other=["angry"])
    with pytest.raises(RuleError, match="unknown concept 'calm'"):
        parse("calm > 1 until other(calm) < 0").check(known, speakers, other=["angry"])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_but_rule_errors_comes_of_rubbish(seed: int) -> None:
    pieces = [
        "desperate", "user.", "mean(", "rise(", "gap(", "other(", ",", ")", "(", ">", "<=", "3", "-1", "for", "tokens", "until",
        "cooldown", "and", "or", "not", '"', "[", "]", ":", " ", "\n", "\0", "é", "🙂", "9" * 30,
    ]  # fmt: skip
    draw = random.Random(seed)
    for _ in range(60):
        text = " ".join(draw.choice(pieces) for _ in range(draw.randint(1, 14)))
        try:
            rule = parse(text)
        except RuleError as error:
            assert len(str(error).splitlines()) == 3
        else:
            assert parse(rule.text) == rule


def test_deep_nesting_is_no_crash() -> None:
    for text in ("not " * 240 + "a > 1", "(" * 490 + "a > 1" + ")" * 490, "not(a>1 and " * 75 + "a>1" + ")" * 75):
        assert fires(text, [2.0]) in ([0], [])
