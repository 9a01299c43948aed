"""From a request to the tokens that are run for it, for engines with a tokenizer of ``transformers``.

A request becomes a :class:`Layout`: the rendered chat or the plain text, then the prefill, each token with its offsets and its
role. What is run are :class:`Row` objects: the request itself, and one more for each choice of several tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from affectlens.engine import Request
from affectlens.engines.changes import Tokens
from affectlens.errors import EngineError
from affectlens.layout import Chat, Layout, Where, mark_chat, place_chat, place_turns, transcript


@dataclass
class Row:
    """One sequence to run: a request's tokens, or those with a choice behind them.

    Args:
        job: The request's number in its window.
        request: What is asked.
        layout: Tokens, roles and offsets; grows while generating.
        wanted: ``(position, token, choice)``: log-probability of ``token`` after ``position`` counts towards ``choice``.
        given: The layout of the request itself; shorter than ``layout`` in a row that carries a choice.
        masks: What :meth:`steered` found so far; rows of the same layout share it.
    """

    job: int
    request: Request
    layout: Layout
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    given: Layout | None = None
    masks: dict[Where, np.ndarray] = field(default_factory=dict)

    @property
    def is_request(self) -> bool:
        """Whether this row is the request itself, from which its readouts are taken."""
        return self.given is None

    @property
    def numbers(self) -> np.ndarray:
        """The number of each token in the reply, negative in the prompt."""
        return np.arange(len(self)) - self.layout.n_prompt

    def steered(self, where: Where) -> np.ndarray:
        """The tokens to steer; those of a choice count as if they were being generated."""
        if where not in self.masks:
            mask = where.mask(self.given or self.layout)
            if self.given is not None:
                ahead = where.ahead(self.given)
                mask = np.concatenate([mask, np.array([k in ahead for k in range(len(self) - len(self.given))], dtype=bool)])
            self.masks[where] = mask
        return self.masks[where]

    def __len__(self) -> int:
        return len(self.layout)


class Layouts:
    """Makes layouts of requests.

    Args:
        tokenizer: A fast tokenizer of ``transformers``.
        id: Of the model, for messages.
    """

    def __init__(self, tokenizer: Any, id: str) -> None:
        self.tokenizer, self.id = tokenizer, id
        self.continuation = lru_cache(4096)(lambda text: tuple(self._encode(text, special=False)[0]))
        """The tokens of a text that stands behind another."""

    def of(self, request: Request) -> Layout:
        """Tokenize a request: the rendered template or plain text, then the prefill, each with offsets and roles.

        Raises:
            EngineError: A chat without a template, a template without a reply position, or an empty prompt.
        """
        n_reply = None
        if isinstance(request.prompt, str) or request.transcript:
            text, spans = (request.prompt, None) if isinstance(request.prompt, str) else transcript(request.prompt)
            ids, offsets = self._encode(text, special=True)
            own, turns = place_turns([("text", 0, len(text))] if spans is None else spans, offsets)
            own = ["text"] * len(ids) if spans is None else own  # a token without text of its own belongs to a plain text, too
            roles = [
                "special" if a == b and i in self.tokenizer.all_special_ids else role
                for i, (a, b), role in zip(ids, offsets, own, strict=True)
            ]
            while len(ids) > 1 and roles[-1] == "special":  # an end-of-sequence token would stand between prompt and reply
                ids, offsets, roles = ids[:-1], offsets[:-1], roles[:-1]
        else:
            text = self._render(request.prompt, request)
            ids, offsets = self._encode(text, special=False)
            marked = self._render(mark_chat(request.prompt), request)
            roles, turns = place_chat(text, request.prompt, offsets, marked=marked)
            if ids and ids[0] == self.tokenizer.bos_token_id and roles[0] == "template":
                roles[0] = "special"  # the attention sink, whether the tokenizer or the template put it there
        if not isinstance(request.prompt, str):
            n_reply = _start_of_reply(request.prompt, roles)
        n_prompt = len(ids) if n_reply is None else n_reply
        if request.prefill:
            more, places = self._encode(request.prefill, special=False)
            ids += more
            offsets += [(len(text) + a, len(text) + b) for a, b in places]
            roles += ["assistant"] * len(more)
            text += request.prefill
        if not any(role != "special" for role in roles):
            raise EngineError("the prompt is empty: give at least one token of text")
        tokens = tuple(text[a:b] for a, b in offsets)
        return Layout(text, tokens, tuple(ids), tuple(offsets), tuple(roles), n_prompt, turns)

    def of_all(self, requests: Sequence[Request]) -> list[Layout]:
        """The layout of each request; requests that differ in steering or readouts alone have one layout."""
        known: dict[Any, Layout] = {}
        layouts = []
        for q in requests:
            same = (repr(q.prompt), q.prefill, q.transcript, q.sampling is None, not q.choices)
            if same not in known:
                known[same] = self.of(q)
            layouts.append(known[same])
        return layouts

    def with_choices(self, row: Row) -> list[Row]:
        """The request's own row, told what is wanted of it, and one more for each choice of several tokens."""
        rows = [row]
        for c, choice in enumerate(row.request.choices):
            ids = self.continuation(choice)
            if not ids:
                raise EngineError("a choice is empty: every choice needs at least one token")
            last = len(row.layout) - 1
            row.wanted.append((last, ids[0], c))
            if len(ids) > 1:
                longer = grown(row.layout, ids[:-1], self.tokenizer.batch_decode([[i] for i in ids[:-1]]))
                wanted = [(last + k, ids[k], c) for k in range(1, len(ids))]
                rows.append(Row(row.job, row.request, longer, wanted, row.layout))
        return rows

    def _encode(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]

    def _render(self, chat: Chat, request: Request) -> str:
        if not self.tokenizer.chat_template:
            raise EngineError(f"{self.id} has no chat template: give a plain text, or a chat model")
        turns = [{"role": role, "content": content} for role, content in chat]
        answered = chat[-1][0] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
            bare = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        except Exception as error:  # jinja raises what the template's author liked
            raise EngineError(f"the chat template refuses these turns ({error}): use roles that it supports") from None
        if answered and (request.sampling or request.prefill or request.choices):
            raise EngineError("the chat ends with the assistant's turn: end it with a user turn, and give a beginning as prefill")
        if not answered and text == bare:
            raise EngineError(
                "the chat template has no reply position (no generation prompt): give a plain text transcript instead"
            )
        return text


def _start_of_reply(chat: Chat, roles: Sequence[str]) -> int | None:
    """First token of the last turn's words when the assistant has already spoken it; None when the reply is still to come."""
    if chat[-1][0] != "assistant":
        return None
    end = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=len(roles))
    start = end
    while start and roles[start - 1] == "assistant":
        start -= 1
    return start


def grown(layout: Layout, ids: Sequence[int], pieces: Sequence[str]) -> Layout:
    """The layout with generated tokens behind it."""
    text, tokens, offsets = layout.text, list(layout.tokens), list(layout.offsets)
    for piece in pieces:
        offsets.append((len(text), len(text) + len(piece)))
        tokens.append(piece)
        text += piece
    roles = (*layout.roles, *("assistant",) * len(ids))
    return Layout(text, tuple(tokens), (*layout.ids, *ids), tuple(offsets), roles, layout.n_prompt, layout.turns)


def tokens_of(row: Row, places: np.ndarray, own: np.ndarray) -> Tokens:
    """Those tokens of a row that is read which are its ``own``; all of them stand at ``places`` of the flattened pass."""
    masks = {where: row.steered(where)[own] for where in {term.where for term in row.request.steering.terms}}
    return Tokens(places[own], row.numbers[own], masks)


def words_of(tokenizer: Any, size: int) -> list[str]:
    """The text of every token id of a vocabulary of ``size``, in order."""
    known = min(size, len(tokenizer))
    return list(tokenizer.batch_decode([[i] for i in range(known)])) + [""] * (size - known)
