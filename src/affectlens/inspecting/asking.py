"""A conversation and a configuration of Inspect as what our engines run, or one line that says why not."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageTool, ContentReasoning, ContentText, GenerateConfig
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleHandler
from inspect_ai.model._providers.util import ChatAPIHandler, chat_api_input
from inspect_ai.solver._task_state import sample_state
from inspect_ai.tool import ToolChoice, ToolInfo

from affectlens.conversations import joined
from affectlens.engine import Chat, Sampling
from affectlens.errors import EngineError

DEFAULT_TOKENS = 2048
"""Longest reply where nobody says how long it may be, as with Inspect's own providers of local models."""

REFUSED = (
    "best_of", "extra_body", "frequency_penalty", "logit_bias", "modalities", "presence_penalty", "prompt_logprobs",
    "response_schema",
)  # fmt: skip
"""Fields of a configuration that change what is said, and that our engines do not know. Those that tune a vendor's service
(``reasoning_effort``, ``verbosity``, ``cache_prompt``, …) mean nothing here and are left alone, as everywhere in Inspect."""


@dataclass(frozen=True)
class Asked:
    """What to generate.

    Args:
        chat: The conversation, ending with what the model is to answer.
        prefill: Beginning of the reply, which is not said again.
        sampling: But for the seed, and for a limit that the context sets.
        seeds: One for each reply.
        tools: That the model may call in its reply.
        handler: Inspect's own, which finds the calls; None without tools.
    """

    chat: Chat
    prefill: str
    sampling: Sampling
    seeds: tuple[int, ...]
    tools: tuple[ToolInfo, ...] = ()
    handler: ChatAPIHandler | None = None


def asked(
    messages: Sequence[ChatMessage],
    config: GenerateConfig,
    *,
    tools: Sequence[ToolInfo] = (),
    tool_choice: ToolChoice = "auto",
    emulate_tools: bool = False,
    model: str = "",
) -> Asked:
    """What Inspect asks for, as an engine can run it.

    Args:
        messages: The conversation. A last message of the assistant is the beginning of its reply.
        config: How to generate.
        tools, tool_choice: What the model may call.
        emulate_tools: Whether tools are described in the prompt, in Inspect's words.
        model: Its name, for messages.

    Raises:
        EngineError: Tools that are not emulated, something other than text, a setting that is not known here.
    """
    set_to = [name for name in REFUSED if getattr(config, name, None) is not None]
    if set_to:
        raise EngineError(f"{set_to[0]} is not known to affectlens models: leave it out")
    handler = _handler(messages, tools, tool_choice, emulate_tools, model)
    for message in messages:
        _refuse_all_but_text(message)
    plain = [
        (str(m["role"]), str(m["content"])) for m in chat_api_input(list(messages), list(tools), handler or ChatAPIHandler(model))
    ]
    chat, prefill = joined(tuple((role, words) for role, words in plain if words.strip())), ""
    if chat and chat[-1][0] == "assistant":
        chat, prefill = chat[:-1], chat[-1][1]
    if not chat:
        raise EngineError("the conversation has no words to answer: give it a message that has some")
    return Asked(chat, prefill, _sampling(config), seeds(config.seed, config.num_choices or 1, messages), tuple(tools), handler)


def _handler(
    messages: Sequence[ChatMessage], tools: Sequence[ToolInfo], choice: ToolChoice, emulate: bool, model: str
) -> ChatAPIHandler | None:
    used = any(isinstance(m, ChatMessageTool) or (isinstance(m, ChatMessageAssistant) and m.tool_calls) for m in messages)
    if not (tools or used):
        return None
    if not emulate:
        what = f"the tools {', '.join(tool.name for tool in tools[:3])}" if tools else "results of tools"
        raise EngineError(
            f"{what} cannot be given to a model that is asked by its chat template alone: use -M emulate_tools=true to describe "
            "them in the prompt, or a task without tools"
        )
    if tools and choice not in ("auto", "none"):
        raise EngineError("a model whose tools are emulated cannot be forced to call one: use tool_choice auto")
    return OpenAICompatibleHandler(model)


def _refuse_all_but_text(message: ChatMessage) -> None:
    if isinstance(message.content, str):
        return
    for part in message.content:
        if not isinstance(part, ContentText | ContentReasoning):
            raise EngineError(f"a {message.role}'s message holds {part.type}, and this model reads text only: leave it out")


def _sampling(config: GenerateConfig) -> Sampling:
    likely = None
    if config.logprobs or config.top_logprobs:
        likely = config.top_logprobs or 0
    return Sampling(
        max_tokens=DEFAULT_TOKENS if config.max_tokens is None else config.max_tokens,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        top_k=config.top_k or 0,
        stop=tuple(config.stop_seqs or ()),
        logprobs=likely,
    )


def seeds(seed: int | None, n: int, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    """A seed for each of ``n`` replies.

    Without a seed they are drawn, and the log says which. With one they follow from it, from the sample and its epoch (the
    conversation, where nothing is evaluated), and from how long the conversation is. So samples are independent of each other, a
    reply does not depend on what runs beside it, and a steered model draws the same random numbers as an untouched one.
    """
    if seed is None:
        return tuple(secrets.randbelow(2**31) for _ in range(n))
    state = sample_state()
    who: Any = [(m.role, m.text) for m in messages] if state is None else (str(state.sample_id), state.epoch)
    content = [json.dumps([seed, who, len(messages), k]).encode() for k in range(n)]
    return tuple(int.from_bytes(hashlib.sha256(each).digest()[:4], "big") % 2**31 for each in content)
