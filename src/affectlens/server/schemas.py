"""What a request may hold: OpenAI's fields and ours, each checked before anything runs.

Nothing is silently ignored. A field of OpenAI's that cannot be honoured here is taken as long as it asks for what happens anyway
(``presence_penalty: 0``, ``tools: []``); with any other value it is refused by name, and so is a field that nobody knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from affectlens.errors import nearest

LONGEST_WORDS = 2**20
"""Characters of one text; what the model's context holds is found out by the model."""

MOST = 10.0
"""Largest strength that is taken at all, in mean residual norms; the calibration allows far less."""

Words = Annotated[str, StringConstraints(max_length=LONGEST_WORDS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Strength = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
StopText = Annotated[str, StringConstraints(max_length=500)]
RuleText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Plain(BaseModel):
    """An object without fields of which nobody knows what they mean."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if unknown := next((str(key) for key in data if key not in cls.model_fields), None):
            near = nearest(unknown[:60], cls.model_fields)
            raise PydanticCustomError("unknown_field", "unknown field {name}: {near}", {"name": unknown[:60], "near": near})
        # What is null is not given; clients differ in whether they send it.
        return {key: value for key, value in data.items() if value is not None}


# ── ours ──


class Readings(Plain):
    """Which scores come with a reply.

    ``emotions`` are names, or ``all``; by default those that the server watches. ``every`` gives the scores of every so manieth
    token only. ``prompt`` asks for the scores of what was said before as well, ``visible`` for what the words of the reply read
    alone.
    """

    emotions: list[Name] | Literal["all"] | None = Field(default=None)
    every: int = Field(default=1, ge=1, le=100_000)
    prompt: bool = False
    visible: bool = False


class StopAction(Plain):
    """End the reply, and say a message in place of its rest."""

    do: Literal["stop"]
    message: Annotated[str, StringConstraints(max_length=2000)] = ""


class SteerAction(Plain):
    """Let the reply go on steered, within the safe range."""

    do: Literal["steer"]
    add: dict[Name, Strength] = Field(min_length=1, max_length=1000)


RuleAction = Annotated[StopAction | SteerAction, Field(discriminator="do")]


class RuleObject(Plain):
    """A rule, and what it does to the reply."""

    when: RuleText
    actions: list[RuleAction] = Field(default_factory=list, max_length=10)


class Ours(Plain):
    """What affectlens adds to OpenAI's requests (``extra_body`` of its clients)."""

    emotion_bias: dict[Name, Strength] = Field(
        default_factory=dict,
        max_length=1000,
        description="Emotion to strength, in multiples of the mean residual norm; clamped to the calibrated safe range.",
    )
    readings: Readings | bool = Field(default=False, description="Which scores come with the reply; true for the watched ones.")
    rules: list[RuleText | RuleObject] = Field(
        default_factory=list, max_length=20, description="Rules to watch in addition to those that are armed."
    )
    compare: bool = Field(default=False, description="Give the unsteered reply as a second choice.")


# ── OpenAI's ──


def _refuse(field: str, *harmless: Any) -> Any:
    """A field that cannot be honoured: taken with a value that changes nothing, refused with any other."""

    def check(value: Any) -> Any:
        if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless):
            return None
        said = " or ".join(json.dumps(each) for each in harmless)
        raise ValueError(f"{field} is not supported here: leave it out{f', or give {said}' if said else ''}")

    return Annotated[
        Any, BeforeValidator(check), Field(default=None, description="Not supported: only values that change nothing.")
    ]


class StreamOptions(Plain):
    """OpenAI's options of a stream; obfuscation is never added."""

    include_usage: bool | None = None
    include_obfuscation: _refuse("include_obfuscation", False)  # type: ignore[valid-type]


class Asking(Ours):
    """What both endpoints take."""

    model: Name
    n: int | None = Field(default=None, ge=1, le=128)
    stop: StopText | list[StopText] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="Draw among so many of the likeliest tokens; 0: all.")
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(default=None, description="Taken, and not used.")
    metadata: dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]] | None = (
        Field(default=None, max_length=16, description="Taken, and not used.")
    )
    presence_penalty: _refuse("presence_penalty", 0)  # type: ignore[valid-type]
    frequency_penalty: _refuse("frequency_penalty", 0)  # type: ignore[valid-type]
    logit_bias: _refuse("logit_bias", {})  # type: ignore[valid-type]

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _sound(self) -> Asking:
        if len(self.stops) > 4:
            raise ValueError("stop has more than 4 strings: give 4 at most")
        if "" in self.stops:
            raise ValueError("stop holds an empty string, which would end every reply at once: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream, or leave it out")
        if self.compare and (self.n or 1) > 1:
            raise ValueError("compare gives two replies already: leave n out")
        return self


class TextPart(Plain):
    """A part of a message's content: text only."""

    type: Literal["text"]
    text: Words


class Message(Plain):
    """One turn of a chat. ``developer`` counts as ``system``; names, calls of tools and other media are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[TextPart]
    name: _refuse("name")  # type: ignore[valid-type]
    tool_calls: _refuse("tool_calls", [])  # type: ignore[valid-type]
    function_call: _refuse("function_call")  # type: ignore[valid-type]
    refusal: _refuse("refusal")  # type: ignore[valid-type]
    audio: _refuse("audio")  # type: ignore[valid-type]
    annotations: _refuse("annotations", [])  # type: ignore[valid-type]

    @property
    def turn(self) -> tuple[str, str]:
        words = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return ("system" if self.role == "developer" else self.role), words


class ChatRequest(Asking):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    safety_identifier: str | None = Field(default=None, max_length=512, description="Taken, and not used.")
    prompt_cache_key: str | None = Field(default=None, max_length=512, description="Taken, and not used.")
    tools: _refuse("tools", [])  # type: ignore[valid-type]
    tool_choice: _refuse("tool_choice", "none", "auto")  # type: ignore[valid-type]
    parallel_tool_calls: _refuse("parallel_tool_calls", True, False)  # type: ignore[valid-type]
    functions: _refuse("functions", [])  # type: ignore[valid-type]
    function_call: _refuse("function_call", "none", "auto")  # type: ignore[valid-type]
    response_format: _refuse("response_format", {"type": "text"})  # type: ignore[valid-type]
    modalities: _refuse("modalities", ["text"])  # type: ignore[valid-type]
    audio: _refuse("audio")  # type: ignore[valid-type]
    prediction: _refuse("prediction")  # type: ignore[valid-type]
    reasoning_effort: _refuse("reasoning_effort", "none")  # type: ignore[valid-type]
    verbosity: _refuse("verbosity")  # type: ignore[valid-type]
    web_search_options: _refuse("web_search_options")  # type: ignore[valid-type]
    moderation: _refuse("moderation")  # type: ignore[valid-type]
    service_tier: _refuse("service_tier", "auto", "default")  # type: ignore[valid-type]
    store: _refuse("store", False)  # type: ignore[valid-type]
    prompt_cache_retention: _refuse("prompt_cache_retention")  # type: ignore[valid-type]

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of the two")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: set logprobs to true, or leave it out")
        if self.messages[-1].role == "assistant":
            raise ValueError("messages ends with the assistant's turn: end with a turn of the user")
        return self


class CompletionRequest(Asking):
    """``POST /v1/completions``, OpenAI's legacy endpoint: the model continues a text."""

    prompt: Words | list[Words] = Field(description="A text, or several; lists of token ids are refused.")
    echo: bool | None = Field(default=None, description="Repeat the prompt before the reply; not together with logprobs.")
    logprobs: int | None = Field(default=None, ge=0, le=5)
    suffix: _refuse("suffix", "")  # type: ignore[valid-type]
    best_of: int | None = Field(default=None, ge=1, le=128, description="Only as many as n.")

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if not self.prompts:
            raise ValueError("prompt is an empty list: give a text")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of draws more replies than it gives, which is not supported here: leave it out, or use n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs would want those of the prompt, which is not supported here: give one")
        if self.compare and len(self.prompts) > 1:
            raise ValueError("compare gives two replies to one prompt: give one")
        return self


# ── the other endpoints ──


class Spoken(Plain):
    """A turn of a conversation that is scored: any role, or a name."""

    role: Name
    content: Words


class ScoreRequest(Plain):
    """``POST /v1/score``: a text, or a conversation of any roles."""

    text: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_WORDS)] | None = None
    messages: list[Spoken] | None = Field(default=None, min_length=1, max_length=2000)
    emotions: list[Name] | Literal["all"] | None = Field(default=None, description="Whose scores to give; all by default.")
    visible: bool = Field(default=False, description="Also what the words of each reply read alone, and the gap.")

    @model_validator(mode="after")
    def _one(self) -> ScoreRequest:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, one of the two")
        return self


class RuleRequest(Plain):
    """``POST /v1/rules``: a rule, what it does to a reply, and whether it is to be watched."""

    text: RuleText
    actions: list[RuleAction] | None = Field(
        default=None, max_length=10, description="By default those that the rule had, if it is known already, else none."
    )
    armed: bool = True


class TryRequest(Plain):
    """``POST /v1/rules/try``."""

    text: RuleText


class MuteRequest(Plain):
    """``POST /v1/rules/{id}/mute``: for how long; 0 lets it speak again."""

    minutes: float = Field(ge=0, le=60 * 24 * 366)


class AcknowledgeRequest(Plain):
    """``POST /v1/alerts/{id}/acknowledge``."""

    note: Annotated[str, StringConstraints(max_length=2000)] = ""


# ── what is wrong with a request ──


def place_of(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """What is wrong in words, and where, from pydantic's errors.

    Of several it is the one that lies deepest: alternatives that were not meant fail earlier than the one that was.

    Args:
        errors: Each with ``loc``, ``type``, ``msg`` and perhaps ``ctx``.
        body: What was sent: pydantic's places also name the alternatives that it tried, the body does not.

    Example:
        >>> place_of([{"loc": ("body", "n"), "type": "x", "msg": "Input should be a valid integer"}], {"n": "a"})
        ('n: Input should be a valid integer', 'n')
    """
    found = []
    for error in errors:
        where, *loc = error["loc"]
        path = _path(loc, body, missing=error["type"] == "missing") if where == "body" else [str(part) for part in loc]
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] == "unknown_field":
            path = [*path, str(error["ctx"]["name"])]
        elif error["type"].startswith("json"):
            return f"the body is no JSON ({str(error.get('ctx', {}).get('error', message))[:200]}): send a JSON object", None
        elif not path and where == "body" and error["type"] != "value_error":
            message = f"the body is wrong ({message}): send a JSON object" if not isinstance(body, dict) else message
        elif not path and (word := message.split(" ")[0]).isidentifier() and isinstance(body, dict) and word in body:
            path = [word]
        found.append((len(path), ".".join(path), message))
    _, param, message = max(found, key=lambda each: each[0])
    said = message if not param or re.search(rf"\b{re.escape(param.split('.')[-1])}\b", message) else f"{param}: {message}"
    return said, param or None


def _path(loc: Sequence[Any], body: Any, *, missing: bool) -> list[str]:
    """A place in the body, without the names of alternatives; what is missing is not in the body."""
    path: list[str] = []
    for number, part in enumerate(loc):
        if part in (body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()):
            body = body[part]
        elif not (missing and number == len(loc) - 1):
            continue
        path.append(str(part)[:60])
    return path
