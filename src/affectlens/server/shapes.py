"""What a reply looks like in OpenAI's shapes, with what affectlens adds.

There is one :class:`Reply` for each choice; each makes its own chunks, so that choices can be mixed in the order in which their
tokens come. Ours stands under ``affectlens``: readings and alerts in the chunk of their token, what was steered and a summary in
the chunk with the ``finish_reason``, and all of it in a plain answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from affectlens.engine import Logprob
from affectlens.monitor import Token
from affectlens.server.calls import Began, Call, Choice, Ended, Event, Said, alert_data

FINISHED = {"stop": "stop", "length": "length", "stopped": "content_filter", "timeout": "length", "shutdown": "length"}
"""OpenAI's word for each way to end; ours stands in ``affectlens.finish``."""

LEAST = -9999.0
"""What stands for a log-probability of nothing, which JSON cannot say: OpenAI's own number."""

DONE = b"data: [DONE]\n\n"


def sent(data: Any) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + plain(data) + b"\n\n"


def plain(data: Any) -> bytes:
    """JSON on one line; half a surrogate pair stands as its escape."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


class Reply:
    """One choice of a call, as it grows.

    Args:
        call: What was asked for.
        choice: Which of its replies.
        vocabulary: The text of each token.
        facts: ``model``, ``system_fingerprint``, and what is said of readings: ``layer`` and ``unit``.
    """

    def __init__(self, call: Call, choice: Choice, *, vocabulary: Sequence[str], facts: dict[str, Any]) -> None:
        self._call, self._choice, self._vocabulary = call, choice, vocabulary
        self._echo = call.echo(choice)
        self._chat = call.kind == "chat"
        self._reading = {key: facts[key] for key in ("layer", "unit")}
        self.head = {
            "id": call.id,
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": int(call.created.timestamp()),
            "model": facts["model"],
            "system_fingerprint": facts["system_fingerprint"],
        }
        self._waiting: list[Logprob] = []
        self._likely: list[Logprob] = []
        self._rows: list[dict[str, Any]] = []
        self._offset = len(self._echo)
        self.prompt: tuple[dict[str, Any], ...] | None = None
        self.ended: Ended | None = None

    # ── as it comes ──

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """What a stream sends for an event."""
        if isinstance(event, Began):
            self.prompt = event.prompt
            delta = {"role": "assistant", "content": ""} if self._chat else self._echo
            opening: dict[str, Any] = {"id": self._choice.id, **self._reading, "emotions": list(self._named())}
            opening |= {"steering": self._steering(), "seed": self._choice.seed}
            opening |= {} if event.prompt is None else {"prompt": list(event.prompt)}
            return [self._chunk(delta, ours=opening)]
        if isinstance(event, Said):
            token = event.token
            likely = self._take(token)
            ours = dict(event.row or {})
            if token.alerts:
                ours["alerts"] = [alert_data(alert) for alert in token.alerts]
            if not (token.text or ours or likely):
                return []
            return [self._chunk({"content": token.text} if self._chat else token.text, likely=likely, ours=ours or None)]
        self.ended = event
        return [self._chunk({} if self._chat else "", finish=FINISHED[event.record.finish], ours=self._closing(event))]

    def _chunk(
        self,
        delta: Any,
        *,
        finish: str | None = None,
        likely: Sequence[Logprob] = (),
        ours: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        unsteered = {"unsteered": True} if self._call.compare and not self._choice.steered else {}
        choice = {
            "index": self._choice.index,
            ("delta" if self._chat else "text"): delta,
            "logprobs": self._logprobs(likely) if likely else None,
            "finish_reason": finish,
            **({"affectlens": unsteered} if unsteered else {}),
        }
        return {**self.head, "choices": [choice], **({"affectlens": {**ours, **unsteered}} if ours is not None else {})}

    def _take(self, token: Token) -> list[Logprob]:
        """Log-probabilities that can be told: those of tokens whose text is still held back wait, and are told with it."""
        if token.logprob is not None:
            self._waiting.append(token.logprob)
        if not token.text:
            return []
        likely, self._waiting = self._waiting, []
        return likely

    # ── as a whole ──

    def keep(self, event: Event) -> None:
        """Take an event without making chunks of it."""
        if isinstance(event, Began):
            self.prompt = event.prompt
        elif isinstance(event, Said):
            self._likely += self._take(event.token)
            if event.row is not None:
                self._rows.append(event.row)
        else:
            self.ended = event

    def choice(self) -> dict[str, Any]:
        """The choice of a plain answer; where there are several, each says of itself what the answer says of the first."""
        assert self.ended is not None, "the reply has ended"
        record = self.ended.record
        self._offset = len(self._echo)
        message = {"role": "assistant", "content": record.text, "refusal": None}
        return {
            "index": self._choice.index,
            **({"message": message} if self._chat else {"text": self._echo + record.text}),
            "logprobs": None if self._call.sampling.logprobs is None else self._logprobs(self._likely),
            "finish_reason": FINISHED[record.finish],
            **({"affectlens": self.ours()} if len(self._call.choices) > 1 else {}),
        }

    def ours(self) -> dict[str, Any]:
        """What affectlens says of the whole reply."""
        assert self.ended is not None, "the reply has ended"
        whole = self._closing(self.ended)
        if self._call.readings is not None:
            whole |= {**self._reading, "emotions": list(self._named()), "tokens": self._rows}
            whole |= {} if self.prompt is None else {"prompt": list(self.prompt)}
        if self._call.compare and not self._choice.steered:
            whole["unsteered"] = True
        return whole

    def _closing(self, event: Ended) -> dict[str, Any]:
        record = event.record
        return {
            "steering": self._steering(),
            "seed": self._choice.seed,
            "summary": event.summary,
            "alerts": [alert_data(alert) for alert in record.trace.alerts],
            "trace": record.id,
            "finish": record.finish,
        }

    def _named(self) -> Sequence[str]:
        return self._call.names if self._call.readings is not None else ()

    def _steering(self) -> dict[str, Any]:
        if not self._choice.steered:
            return {"asked": {}, "used": {}, "clamped": {}}
        return self._call.bias.as_dict()

    # ── log-probabilities ──

    def _logprobs(self, likely: Sequence[Logprob]) -> dict[str, Any]:
        words = self._vocabulary
        if self._chat:
            content = [
                {**self._one(each.token, each.value), "top_logprobs": [self._one(token, value) for token, value in each.top]}
                for each in likely
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for each in likely:
            offsets.append(self._offset)
            self._offset += len(words[each.token])
        return {
            "tokens": [words[each.token] for each in likely],
            "token_logprobs": [max(each.value, LEAST) for each in likely],
            "top_logprobs": [{words[token]: max(value, LEAST) for token, value in each.top} for each in likely],
            "text_offset": offsets,
        }

    def _one(self, token: int, value: float) -> dict[str, Any]:
        text = self._vocabulary[token]
        # A token that is a part of a character has no text of its own.
        return {
            "token": text,
            "logprob": max(value, LEAST),
            "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "replace")),
        }


def whole(call: Call, replies: Sequence[Reply]) -> dict[str, Any]:
    """A plain answer of all choices of a call."""
    head = {**replies[0].head, "object": "chat.completion" if call.kind == "chat" else "text_completion"}
    choices = [reply.choice() for reply in replies]
    return {**head, "choices": choices, "usage": usage(call, replies), "affectlens": replies[0].ours()}


def usage_chunk(call: Call, replies: Sequence[Reply]) -> dict[str, Any]:
    """The last chunk of a stream that was asked for its usage."""
    return {**replies[0].head, "choices": [], "usage": usage(call, replies)}


def usage(call: Call, replies: Sequence[Reply]) -> dict[str, int]:
    """Tokens of a call: each prompt counts once, however many replies it has."""
    prompts: dict[Any, int] = {}
    generated = 0
    for choice, reply in zip(call.choices, replies, strict=True):
        assert reply.ended is not None, "the reply has ended"
        counted = reply.ended.record.usage
        prompts[choice.prompt] = counted["prompt_tokens"]
        generated += counted["completion_tokens"]
    total = sum(prompts.values())
    return {"prompt_tokens": total, "completion_tokens": generated, "total_tokens": total + generated}
