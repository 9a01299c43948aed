"""A request's tokens as the model sees them: which text, whose words, which turn; and :class:`Where`, which selects among them.

Positions are counted from a text's own first token; padding and an added beginning-of-sequence token never count.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from affectlens.errors import EngineError

Part = Literal["all", "prompt", "response"]
Chat = tuple[tuple[str, str], ...]
Turn = tuple[str, int, int]
"""A turn's role, the first token of its words, and the first token behind them."""

LATER = {"later": True}
"""Marks a field that was added to a format later: unset, it is in no content hash, so hashes of earlier runs stay."""


@dataclass(frozen=True)
class Layout:
    """A request's tokens as the model sees them, without padding.

    Args:
        text: The rendered prompt followed by the generated text.
        tokens: Each token's own text.
        ids: Token ids.
        offsets: ``(start, end)`` of each token in ``text``; empty spans for tokens without text of their own.
        roles: For each token the role whose words it belongs to (``user``, ``assistant``, …), ``text`` in a plain prompt,
            ``template`` for what a chat template adds, ``special`` for a beginning-of-sequence token. What is generated, and a
            prefill, is the assistant's, after a plain prompt too.
        n_prompt: Number of tokens before the reply: the last of them is the reply position.
        turns: Role, first token and end of each turn of the prompt; a plain prompt is one turn. A reply that is part of the chat
            is among them, one that is generated is not.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]
    n_prompt: int
    turns: tuple[Turn, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Where:
    """Which tokens: one selector for reading and for steering. The conditions narrow each other in the order given.

    Args:
        part: ``prompt`` (everything before the reply), ``response`` (the words of the reply, a prefill included) or ``all``.
        role: Only words of this role's turns (``user``, ``assistant``, ``system``); template tokens are nobody's.
        turn: Only words of this turn among those that are left, counted from 0, or from the end when negative. The reply is the
            last turn, even before it has words: ``Where(role="user", turn=-1)`` is the user's last message, and
            ``Where("prompt", turn=-1)`` the last message before the reply, whoever wrote it.
        text: Only tokens that overlap an occurrence of this text.
        after: Skip so many of the tokens selected so far.
        first: Keep only so many of the first ones: with ``part="response"`` a window of the reply.
        last: Keep only so many of the last ones.

    Example:
        >>> Where(part="prompt", last=1)          # the reply position: the last token before the model answers
        Where(part='prompt', role=None, turn=None, text=None, after=0, first=None, last=1)
        >>> print(Where(part="response", after=10, first=20))
        response, after 10, first 20
    """

    part: Part = "all"
    role: str | None = None
    turn: int | None = field(default=None, metadata=LATER)
    text: str | None = None
    after: int = 0
    first: int | None = field(default=None, metadata=LATER)
    last: int | None = None

    def __post_init__(self) -> None:
        if self.part not in ("all", "prompt", "response"):
            raise EngineError(f"part is {self.part!r}: use all, prompt or response")
        if self.after < 0 or any(n is not None and n < 1 for n in (self.first, self.last)):
            raise EngineError("after counts from 0, first and last from 1: use Where(after=0), Where(first=1) or Where(last=1)")
        if self.text == "":
            raise EngineError("text is empty: name the words to select, or leave text out")

    def __str__(self) -> str:
        named = {"role": self.role, "turn": self.turn, "text": self.text and repr(self.text), "after": self.after or None}
        named |= {"first": self.first, "last": self.last}
        return ", ".join([self.part, *(f"{name} {value}" for name, value in named.items() if value is not None)])

    def mask(self, layout: Layout) -> np.ndarray:
        """Return a boolean array with one entry for each token of ``layout``.

        Raises:
            EngineError: A turn is asked for, but the layout does not say where its turns are.
        """
        index = np.arange(len(layout))
        mask = np.array([role != "special" for role in layout.roles], dtype=bool)
        if self.part == "prompt":
            mask &= index < layout.n_prompt
        elif self.part == "response":
            mask &= (index >= layout.n_prompt) & np.array([role != "template" for role in layout.roles], dtype=bool)
        if self.role is not None:
            mask &= np.array([role == self.role for role in layout.roles], dtype=bool)
        if self.turn is not None:
            _, start, end = self._turn(layout) or ("", 0, 0)
            mask &= (start <= index) & (index < end)
        if self.text is not None:
            mask &= self._overlaps(layout)
        selected = np.flatnonzero(mask)[self.after :][: self.first]
        if self.last is not None:
            selected = selected[-self.last :]
        mask = np.zeros(len(layout), dtype=bool)
        mask[selected] = True
        return mask

    def _turn(self, layout: Layout) -> Turn | None:
        """The turn that is selected, if there is one; the reply that is still to come begins and ends behind everything."""
        if not layout.turns:
            raise EngineError("nothing is known about the turns of this text: run it again, or leave turn out of Where")
        turns = list(layout.turns)
        if turns[-1][1] < layout.n_prompt:
            turns.append(("assistant", layout.n_prompt, len(layout)))
        if self.part != "all":
            turns = [turn for turn in turns if (turn[1] < layout.n_prompt) == (self.part == "prompt")]
        if self.role is not None:
            turns = [turn for turn in turns if turn[0] == self.role]
        assert self.turn is not None
        return turns[self.turn] if -len(turns) <= self.turn < len(turns) else None

    def _overlaps(self, layout: Layout) -> np.ndarray:
        mask = np.zeros(len(layout), dtype=bool)
        start = layout.text.find(self.text or "")
        while start >= 0:
            end = start + len(self.text or "")
            mask |= np.array([a < end and b > start for a, b in layout.offsets], dtype=bool)
            start = layout.text.find(self.text or "", end)
        return mask

    def ahead(self, given: Layout) -> range:
        """Which tokens that are generated behind ``given`` are selected, as their numbers from 0: known before they are there.

        ``text`` and ``last`` speak of tokens that exist: they never select a token that is not there yet.

        Example:
            >>> Where("response", after=2, first=3).ahead(Layout("Hi", ("Hi",), (7,), ((0, 2),), ("text",), 1))
            range(2, 5)
        """
        if self.part == "prompt" or self.role not in (None, "assistant") or self.text is not None or self.last is not None:
            return range(0)
        if self.turn is not None and ((turn := self._turn(given)) is None or turn[1] < given.n_prompt):
            return range(0)
        before = int(replace(self, after=0, first=None).mask(given).sum())
        start = max(0, self.after - before)
        return range(start, sys.maxsize if self.first is None else max(start, self.after + self.first - before))


NAMES = {"user": "Human", "assistant": "Assistant", "system": ""}
"""What a transcript calls the roles of a chat; every other role is a name and stands as it is."""


def transcript(chat: Chat) -> tuple[str, list[tuple[str, int, int]]]:
    """A chat as plain text: ``Human: … Assistant: …``, turns apart by an empty line (method 2, 7).

    A system turn stands without a name. Behind a last turn of the user stands the assistant's name: its colon is the reply
    position. Any other last turn ends the text.

    Returns:
        The text, and for each turn its role and where its words begin and end.

    Example:
        >>> transcript((("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye.")))[0]
        'Human: Hi!\\n\\nAssistant: Hello.\\n\\nHuman: Bye.\\n\\nAssistant:'
    """
    text, spans = "", []
    for role, content in chat:
        name, words = NAMES.get(role, role), content.strip()
        text += "\n\n" * bool(text) + f"{name}: " * bool(name)
        spans.append((role, len(text), len(text) + len(words)))
        text += words
    return text + "\n\nAssistant:" * (chat[-1][0] == "user"), spans


def place_turns(spans: Sequence[tuple[str, int, int]], offsets: Sequence[tuple[int, int]]) -> tuple[list[str], tuple[Turn, ...]]:
    """Whose words each token carries, and which tokens each turn has.

    Args:
        spans: Role, start and end of each turn's words, in order.
        offsets: ``(start, end)`` of each token.

    Returns:
        For each token a role, or ``template``; for each turn its role, first token and end. A turn without words has no tokens.

    Example:
        >>> place_turns([("user", 3, 5), ("Anna", 6, 9)], [(0, 3), (3, 5), (5, 6), (6, 8), (8, 9)])
        (['template', 'user', 'template', 'Anna', 'Anna'], (('user', 1, 2), ('Anna', 3, 5)))
    """
    roles = ["template"] * len(offsets)
    own: list[list[int]] = [[] for _ in spans]
    number = 0
    for i, (a, b) in enumerate(offsets):
        while a >= spans[number][2] and number + 1 < len(spans):
            number += 1
        role, start, end = spans[number]
        if b > a and a < end and b > start:
            roles[i] = role
            own[number].append(i)
    turns: list[Turn] = []
    for (role, _, _), tokens in zip(spans, own, strict=True):
        behind = turns[-1][2] if turns else 0
        turns.append((role, tokens[0], tokens[-1] + 1) if tokens else (role, behind, behind))
    return roles, tuple(turns)


def mark_chat(chat: Chat) -> Chat:
    """The chat with a mark that occurs nowhere else in place of every message: rendered, it shows where messages stand.

    Example:
        >>> mark_chat((("user", "Hi"), ("assistant", "Hello")))
        (('user', 'MARKq0q'), ('assistant', 'MARKq1q'))
    """
    return tuple((role, f"MARKq{i}q") for i, (role, _) in enumerate(chat))


def place_chat(
    text: str, chat: Chat, offsets: Sequence[tuple[int, int]], *, marked: str | None = None
) -> tuple[list[str], tuple[Turn, ...]]:
    """:func:`place_turns` of a rendered chat.

    Short messages also occur in the template's own words ("user", "a", "I"), so searching for them is not enough:
    ``marked`` shows where each one stands. A template may strip a message, and it may treat messages by their content (dropping
    earlier thinking, say); where the marked rendering does not fit, each message is searched after the one before.

    Args:
        text: The chat as the template renders it.
        chat: Its turns.
        offsets: ``(start, end)`` of each token in ``text``.
        marked: :func:`mark_chat` of the same chat, rendered by the same template.

    Raises:
        EngineError: The template dropped or rewrote a message, so positions in it would be guesses.
    """
    return place_turns((_spans_by_mark(text, chat, marked) if marked else None) or _spans_by_search(text, chat), offsets)


def _spans_by_mark(text: str, chat: Chat, marked: str) -> list[tuple[str, int, int]] | None:
    """Where each message stands if ``text`` is ``marked`` with the messages put in for their marks, stripped or not."""
    pattern, rest = "", marked
    for (_, content), (_, mark) in zip(chat, mark_chat(chat), strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        pattern += rf"{re.escape(before)}\s*({re.escape(content.strip())})\s*"
    match = re.fullmatch(pattern + re.escape(rest), text)
    return match and [(role, *match.span(i)) for i, (role, _) in enumerate(chat, 1)]


def _spans_by_search(text: str, chat: Chat) -> list[tuple[str, int, int]]:
    spans, cursor = [], 0
    for role, content in chat:
        words = content.strip()
        start = text.find(words, cursor)
        if start < 0:
            raise EngineError(f"the chat template dropped or rewrote the {role} turn: use turns that it supports")
        spans.append((role, start, start + len(words)))
        cursor = start + len(words)
    return spans
