"""Rules: what has to be read, for how long, before somebody is told.

    desperate > 3 for 20 tokens
    mean(desperate, 50) > 2 until < 1 cooldown 100 tokens
    cornered: desperate > 3 and calm < -1 and not user.playful > 1
    rise([at ease], 30) > 2 or gap("grief-stricken") > 2

A rule is parsed into data (:class:`Rule`); :class:`affectlens.watching.Watch` runs it along a conversation.

**Scores.** Every number is in standard deviations from a baseline. A concept's name alone is its score at a token. ``gap(x)`` is
how far the reading of a reply in its context lies above that of its words alone, ``other(x)`` the score by the vectors of the
other speaker. Scores count in steps of 2 ** -20 (about a millionth), so that sums over windows are exact and do not drift.

**Speakers.** A name alone means the reply: the assistant's words, or a plain text where there is no chat. ``user.afraid`` means
the user's words; any role of the conversation can stand there. The words of a speaker are one stream, turn after turn. While
others speak, a score keeps the value of the speaker's latest token. Tokens without a score (a template's, the first one of a
text) do not exist.

**Windows.** ``mean(x, n)`` is the mean over the latest n tokens of the speaker, ``rise(x, n)`` by how much the line of least
squares through them rises from the first to the last. Neither has a value before there are n tokens.

**Conditions.** ``>``, ``>=``, ``<``, ``<=`` compare with a number. ``not`` binds more strongly than ``and``, ``and`` than ``or``,
``or`` than ``for``; there are parentheses. What compares a score that has no value yet is unknown; ``and``, ``or`` and ``not``
are those of Kleene's logic, so that what cannot be known yet never raises an alarm, negated or not. ``C for n tokens`` is true
where C has been true at the latest n tokens of the rule, this one included; unknown where C is. The tokens of a rule are those at
which any score that it names gets a value.

**Alarms.** A rule fires at the token at which its condition is true while it is armed. Then it is not armed until it has been
released: at a later token, by ``until CONDITION`` (``until < 1`` speaks of the one score that the condition names), or without
``until`` when the condition is no longer true. Released at one token, it can fire from the next one on. With ``cooldown n
tokens`` it does not fire at the n tokens of the rule after an alarm; if the condition is true after them, it fires then.

**Training.** In :mod:`affectlens.training` a rule runs along the readings of a model in training. There each reading is what a
token is here, and can be called so: ``desperate > 1 for 3 readings``.

**Names.** A name of letters, digits, underscores and hyphens stands as it is; any other one, and one that is a word of this
language, stands in quotes or brackets. A rule may have a name of its own in front, with a colon.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from affectlens.errors import RuleError, nearest

LONGEST = 1000
"""Characters of a rule; it also bounds how deep conditions nest."""

OWN = ("assistant", "text")
"""Whose words a name without a speaker means."""

Kind = Literal["inner", "gap", "other"]
Operator = Literal[">", ">=", "<", "<="]


# ── rules as data ──


@dataclass(frozen=True)
class Signal:
    """A score along a conversation.

    Args:
        concept: Its name.
        speaker: A role, or None for the reply.
        kind: ``inner`` (read in its context), ``gap`` (above what the words alone read) or ``other`` (vectors of the other
        speaker).
        span: Where it stands in the rule.
    """

    concept: str
    speaker: str | None = None
    kind: Kind = "inner"
    span: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def speakers(self) -> tuple[str, ...]:
        """The roles whose tokens have this score."""
        return OWN if self.speaker is None else (self.speaker,)

    def __str__(self) -> str:
        name = _quoted(self.concept) if self.speaker is None else f"{_quoted(self.speaker)}.{_quoted(self.concept)}"
        return name if self.kind == "inner" else f"{self.kind}({name})"


@dataclass(frozen=True)
class Window:
    """``mean`` or ``rise`` of a signal over its latest ``n`` tokens."""

    how: Literal["mean", "rise"]
    signal: Signal
    n: int

    def __str__(self) -> str:
        return f"{self.how}({self.signal}, {self.n})"


@dataclass(frozen=True)
class Compare:
    """A score compared with a number."""

    value: Signal | Window
    operator: Operator
    threshold: float

    @property
    def signal(self) -> Signal:
        return self.value.signal if isinstance(self.value, Window) else self.value

    def __str__(self) -> str:
        return f"{self.value} {self.operator} {self.threshold:g}"


@dataclass(frozen=True)
class Every:
    """All of the parts (``and``)."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Some:
    """At least one of the parts (``or``)."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Not:
    """The contrary."""

    part: Condition


@dataclass(frozen=True)
class Lasting:
    """True at ``n`` tokens in a row (``for n tokens``)."""

    part: Condition
    n: int


Condition = Compare | Every | Some | Not | Lasting


def comparisons(condition: Condition) -> Iterator[tuple[Compare, bool]]:
    """Every comparison in a condition, and whether it stands under an odd number of ``not``.

    Example:
        >>> [(str(each), negated) for each, negated in comparisons(parse("calm < -1 and not sad > 2").condition)]
        [('calm < -1', False), ('sad > 2', True)]
    """
    if isinstance(condition, Compare):
        yield condition, False
    elif isinstance(condition, Every | Some):
        for part in condition.parts:
            yield from comparisons(part)
    else:
        turned = isinstance(condition, Not)
        yield from ((each, negated != turned) for each, negated in comparisons(condition.part))


@dataclass(frozen=True)
class Rule:
    """When to raise an alarm, as data; :func:`parse` makes it, and ``parse(rule.text)`` is equal to it.

    Args:
        text: The rule as it was written.
        name: What it is called; its condition where it has no name of its own.
        condition: When it fires.
        until: What releases it; None when that is the end of the condition.
        cooldown: At how many tokens after an alarm it does not fire.
    """

    text: str
    name: str
    condition: Condition
    until: Condition | None = None
    cooldown: int = 0

    @functools.cached_property
    def signals(self) -> tuple[Signal, ...]:
        """The scores that it names, each once, in the order of the rule: what a watch wants at each token."""
        return tuple(dict.fromkeys(compare.signal for compare, _ in self._comparisons()))

    @property
    def speakers(self) -> tuple[str, ...]:
        """The roles at whose tokens it is looked at."""
        return tuple(dict.fromkeys(speaker for signal in self.signals for speaker in signal.speakers))

    @property
    def needs(self) -> frozenset[Kind]:
        """The kinds of scores that it names."""
        return frozenset(signal.kind for signal in self.signals)

    def check(self, concepts: Sequence[str], speakers: Sequence[str], *, other: Sequence[str] | None = None) -> None:
        """Refuse a rule that names what is not there.

        Args:
            concepts: Names of the vectors.
            speakers: Roles that the baseline knows.
            other: Names of the vectors of the other speaker; None when there are none.

        Raises:
            RuleError: An unknown name; the message shows where and names the nearest ones.

        Example:
            >>> parse("desparate > 3").check(["calm", "desperate"], ["assistant"])
            Traceback (most recent call last):
            ...
            affectlens.errors.RuleError: unknown concept 'desparate': did you mean desperate?, column 1
              desparate > 3
              ^^^^^^^^^
        """
        # Not the unique signals: each place is wrong.
        for signal in (compare.signal for compare, _ in self._comparisons()):
            if signal.kind == "other" and other is None:
                problem = (
                    "no vectors of the other speaker are given: name them (Monitor(other=...), --other), or leave other() out"
                )
                raise RuleError(problem, self.text, *signal.span)
            known = other if signal.kind == "other" and other is not None else concepts
            if signal.concept not in known:
                problem = f"unknown concept {signal.concept!r}: {nearest(signal.concept, known)}"
                raise RuleError(problem, self.text, *signal.span)
            if signal.speaker is not None and signal.speaker not in speakers:
                problem = f"the baseline has no words of {signal.speaker!r}: {nearest(signal.speaker, speakers)}"
                raise RuleError(problem, self.text, *signal.span)

    def _comparisons(self) -> Iterator[tuple[Compare, bool]]:
        yield from comparisons(self.condition)
        if self.until is not None:
            yield from comparisons(self.until)

    def __str__(self) -> str:
        return self.text


# ── the language ──

_GRAMMAR = r"""
start: [name ":"] condition ending*
?ending: UNTIL OP NUMBER [FOR INT TOKENS] -> release
       | UNTIL condition -> released
       | COOLDOWN INT TOKENS -> released

?condition: either
          | either FOR INT TOKENS -> lasting
?either: both (OR both)*
?both: one (AND one)*
?one: value OP NUMBER -> compare
    | NOT one -> negation
    | "(" condition ")"
?value: signal
      | WINDOW "(" signal "," INT ")" -> window
?signal: plain
       | KIND "(" plain ")" -> other_kind
plain: [name "."] name
name: WORD | STRING | BRACKETED

// Words of the language are names where only a name can stand, and windows are names where no parenthesis follows.
WINDOW.3: /(mean|rise)(?=\s*\()/i
KIND.3: /(gap|other)(?=\s*\()/i
AND.2: /and(?![\w-])/i
OR.2: /or(?![\w-])/i
NOT.2: /not(?![\w-])/i
FOR.2: /for(?![\w-])/i
UNTIL.2: /until(?![\w-])/i
COOLDOWN.2: /cooldown(?![\w-])/i
TOKENS.2: /(tokens?|readings?)(?![\w-])/i
WORD: /[^\W\d][\w-]*/
STRING: /"[^"]+"|'[^']+'/
BRACKETED: /\[[^\]]+\]/
OP: />=|<=|≥|≤|>|</
NUMBER: /[-+−]?(\d+(\.\d*)?|\.\d+)(?![\w.])/
INT: /\d+(?![\w.])/
%import common.WS
%ignore WS
"""

_SAID = {
    "WORD": "a concept", "STRING": "", "BRACKETED": "", "OP": "> or <", "NUMBER": "a number", "INT": "a whole number",
    "TOKENS": "tokens", "LPAR": "(", "RPAR": ")", "COMMA": "a comma", "AND": "and", "OR": "or", "NOT": "", "FOR": "for",
    "UNTIL": "until", "COOLDOWN": "cooldown", "WINDOW": "", "KIND": "", "DOT": "", "COLON": "", "$END": "",
}  # fmt: skip
"""What the pieces of the grammar are called in a message; some go without saying."""


def parse(text: str) -> Rule:
    """Read a rule.

    Args:
        text: In the language of this module.

    Raises:
        RuleError: It is no rule; the message shows the column.

    Example:
        >>> rule = parse("cornered: mean(desperate, 50) > 2 until < 1 cooldown 100 tokens")
        >>> rule.name, str(rule.condition), str(rule.until), rule.cooldown
        ('cornered', 'mean(desperate, 50) > 2', 'mean(desperate, 50) < 1', 100)
        >>> parse("desperate 3")
        Traceback (most recent call last):
        ...
        affectlens.errors.RuleError: '3' where > or < should stand, column 11
          desperate 3
                    ^
    """
    from lark.exceptions import UnexpectedCharacters, UnexpectedToken, VisitError

    if len(text) > LONGEST:
        raise RuleError(f"a rule of {len(text)} characters: write {LONGEST} at most, or several rules", text[:60] + "…", 60, 61)
    if not text.strip():
        raise RuleError("the rule is empty: write one, for example desperate > 3 for 20 tokens", text, 0, 1)
    language, reader = _language()
    try:
        tree = language.parse(text)
    except UnexpectedToken as error:
        start, end = (len(text.rstrip()), 0) if error.token.type == "$END" else (error.token.start_pos, error.token.end_pos)
        raise _unexpected(text, start or 0, end or 0, error.accepts or error.expected) from None
    except UnexpectedCharacters as error:
        start = error.pos_in_stream or 0
        raise _unexpected(text, start, start + 1, error.allowed or ()) from None
    try:
        rule: Rule = reader(text).transform(tree)
        return rule
    except VisitError as error:
        raise error.orig_exc from None


def _unexpected(text: str, start: int, end: int, expected: Iterable[str]) -> RuleError:
    names = set(expected)
    found = repr(text[start : max(end, start + 1)]) if start < len(text) else "the end"
    before = text[:start].split()
    if "OP" in names and "DOT" in names and text[start:end].isidentifier() and before:
        together = f"{before[-1]} {text[start:end]}"
        return RuleError(f'a name with a space stands in quotes: write "{together}"', text, start, end)
    if text[start : start + 1] == "=" and "OP" in names:
        return RuleError("scores are compared with > and <: they are never equal to a number", text, start, start + 1)
    if text[start:end] == ")" and not names & {"RPAR", "COMMA"}:
        return RuleError("this parenthesis closes nothing: take it away, or open one before", text, start, end)
    if start < len(text) and text[start] in "\"'[" and names & {"STRING", "BRACKETED"}:
        return RuleError('the quotes or brackets around a name are empty or do not end: write "at ease"', text, start, len(text))
    if text[start:end].lower() in ("and", "or") and before[-1:] and before[-1].lower() in ("token", "tokens"):
        return RuleError("for speaks of all before it: put the part that it belongs to in parentheses", text, start, end)
    said = list(dict.fromkeys(word for name in _SAID if name in names and (word := _SAID[name])))
    wanted = f"{', '.join(said[:-1])} or {said[-1]}" if len(said) > 1 else (said or ["nothing"])[0]
    return RuleError(f"{found} where {wanted} should stand", text, start, end)


@functools.cache
def _language() -> tuple[Any, Any]:
    """The parser, and what makes a rule of its trees."""
    from lark import Lark, Transformer

    class Reader(Transformer):
        """Trees to rules; methods are called as the grammar's rules are."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

        def name(self, parts: list[Any]) -> Any:
            (token,) = parts
            return token if token.type == "WORD" else token.update(value=token[1:-1].strip())

        def INT(self, token: Any) -> int:
            value = int(token)
            if value < 1:
                raise RuleError("counts of tokens begin with 1", self.text, token.start_pos, token.end_pos)
            return value

        def NUMBER(self, token: Any) -> float:
            return float(token.replace("−", "-"))

        def OP(self, token: Any) -> str:
            return {"≥": ">=", "≤": "<="}.get(str(token), str(token))

        def plain(self, parts: list[Any]) -> Signal:
            speaker, concept = parts
            if not concept:
                raise RuleError("a name is empty: write a concept", self.text, concept.start_pos, concept.end_pos)
            start = concept.start_pos if speaker is None else speaker.start_pos
            return Signal(str(concept), None if speaker is None else str(speaker), span=(start, concept.end_pos))

        def other_kind(self, parts: list[Any]) -> Signal:
            word, plain = parts
            kind: Kind = "gap" if word.lower() == "gap" else "other"
            if kind == "gap" and plain.speaker not in (None, "assistant"):
                problem = "gap compares a reply with its words alone: leave the speaker out"
                raise RuleError(problem, self.text, *plain.span)
            return Signal(plain.concept, plain.speaker, kind, plain.span)

        def window(self, parts: list[Any]) -> Window:
            how, signal, n = parts
            if how.lower() == "rise" and n < 2:
                raise RuleError("one token does not rise: give rise() two tokens or more", self.text, how.start_pos, how.end_pos)
            return Window(how.lower(), signal, n)

        def compare(self, parts: list[Any]) -> Compare:
            return Compare(*parts)

        def negation(self, parts: list[Any]) -> Condition:
            part = parts[1]
            return part.part if isinstance(part, Not) else Not(part)

        def both(self, parts: list[Any]) -> Condition:
            return Every(tuple(parts[::2]))

        def either(self, parts: list[Any]) -> Condition:
            return Some(tuple(parts[::2]))

        def lasting(self, parts: list[Any]) -> Lasting:
            return Lasting(parts[0], parts[2])

        def release(self, parts: list[Any]) -> Any:
            until, sign, threshold, _, n, _ = parts
            return until, lambda value: Compare(value, sign, threshold), n

        def released(self, parts: list[Any]) -> Any:
            return parts[0], parts[1], None

        def start(self, parts: list[Any]) -> Rule:
            label, condition, *rest = parts
            given: dict[str, Any] = {}
            for word, value, n in rest:
                key = word.lower()
                if key in given:
                    raise RuleError(f"a second {key}: give one", self.text, word.start_pos, word.end_pos)
                if callable(value):
                    values = {compare.value for compare, _ in comparisons(condition)}
                    if len(values) > 1:
                        problem = "until has several scores to speak of: name one, for example until desperate < 1"
                        raise RuleError(problem, self.text, word.start_pos, word.end_pos)
                    value = value(values.pop())
                    value = Lasting(value, n) if n else value
                given[key] = value
            return Rule(self.text, str(label or self.text.strip()), condition, **given)

    return Lark(_GRAMMAR, parser="lalr", maybe_placeholders=True), Reader


def _quoted(name: str) -> str:
    """A name as it can stand in a rule."""
    bare = name.replace("-", "_").isidentifier() and name.lower() not in ("not",)
    return name if bare else f'"{name}"' if '"' not in name else f"'{name}'" if "'" not in name else f"[{name}]"
