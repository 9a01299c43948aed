"""Models of affectlens as a provider of Inspect: ``affectlens/MODEL``.

Inspect asks for as many replies at once as it has connections. All of them share one engine, whose worker takes every reply one
token further at a time (:mod:`affectlens.sharing`); models of the same name, each with a steering of its own, share it as well.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprobs,
    ModelAPI,
    ModelCall,
    ModelOutput,
    ModelUsage,
    TopLogprob,
)
from inspect_ai.model import Logprob as InspectLogprob
from inspect_ai.tool import ToolChoice, ToolInfo

from affectlens.engine import Logprob, Request, Result, open_engine, plain_data
from affectlens.errors import AffectlensError, EngineError
from affectlens.inspecting.arguments import Arguments
from affectlens.inspecting.asking import DEFAULT_TOKENS, Asked, asked
from affectlens.inspecting.instrument import Instrument
from affectlens.runs import content_id
from affectlens.sharing import Place, SharedEngine, in_a_thread

LIVE = 32
"""Replies that are generated at once; more wait for their turn."""

LEAST = -9999.0
"""What stands for a log-probability of nothing, which JSON cannot say."""

_DAY = 86_400.0


class Shared:
    """A loaded model with its worker; it ends when the last model of Inspect that uses it is gone."""

    def __init__(self, name: str, loading: tuple[tuple[str, Any], ...]) -> None:
        if name == "toy" and loading:
            raise EngineError(f"the toy has no {loading[0][0]}: leave it out")
        # Inspect limits how much is asked for at once, and how long a sample may take: nobody is sent away here.
        engine = in_a_thread(lambda: open_engine(name, **dict(loading)))
        self.engine = SharedEngine(engine, live=LIVE, queue=1_000_000, deadline=7 * _DAY)
        weakref.finalize(self, self.engine.close)


_LOADED: weakref.WeakValueDictionary[tuple[Any, ...], Shared] = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def shared(name: str, loading: tuple[tuple[str, Any], ...] = ()) -> Shared:
    """The model of that name: the one that is in use already, or a new one.

    Raises:
        ModelSupportError, FormatError, UnknownName: As from :func:`affectlens.engine.open_engine`.
    """
    with _LOADING:
        found = _LOADED.get((name, loading))
        if found is None:
            _LOADED[name, loading] = found = Shared(name, loading)
        return found


class AffectlensAPI(ModelAPI):
    """A steered and monitored model.

    Args:
        model_name: As for :func:`affectlens.engine.open_engine`.
        base_url, api_key: Nothing is asked over the network: there are none.
        config: Inspect's own.
        model_args: See :class:`affectlens.inspecting.arguments.Arguments`.

    Raises:
        PrerequisiteError: The model cannot be loaded, or an argument is wrong; one line says which.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),
        **model_args: Any,
    ) -> None:
        try:
            if base_url is not None:
                raise EngineError(f"{model_name} runs here and has no base_url: leave it out")
            self._arguments = Arguments.parse(model_args)
            self._shared: Shared | None = shared(model_name, self._arguments.loading)
            info = self._shared.engine.info
            self._instrument = Instrument.open(self._arguments, info)
        except AffectlensError as error:
            raise PrerequisiteError(str(error)) from None
        # Inspect's cache tells models apart by name and address: what is done to the model has to be in the address.
        self._facts = {"model": info.id, "fingerprint": info.fingerprint, **self._instrument.facts()}
        done = plain_data(self._instrument.steering)
        address = f"affectlens:{model_name}#{content_id([self._facts, info.dtype, done, asdict(self._arguments)])}"
        super().__init__(model_name, address, api_key, [], config)

    def close(self) -> None:
        self._shared = None

    # ── what Inspect asks about a provider ──

    def max_tokens(self) -> int | None:
        return DEFAULT_TOKENS

    def max_connections(self) -> int:
        return LIVE

    def connection_key(self) -> str:
        return self.model_name

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True

    def collapse_system_messages(self) -> bool:
        return True

    async def tokenize(self, text: str) -> list[int]:
        engine = self._engine
        return list((await anyio.to_thread.run_sync(lambda: engine.layout(Request(text)))).ids) if text else []

    async def count_text_tokens(self, text: str) -> int:
        return len(await self.tokenize(text))

    # ── replies ──

    @property
    def _engine(self) -> SharedEngine:
        if self._shared is None:
            raise PrerequisiteError(f"{self.model_name} was closed: get the model again")
        return self._shared.engine

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        engine = self._engine
        try:
            ask = asked(
                input,
                config,
                tools=tools,
                tool_choice=tool_choice,
                emulate_tools=self._arguments.emulate_tools,
                model=self.model_name,
            )
            with engine.place() as place:  # left at once when Inspect gives the sample up: then the thread's work ends too
                return await anyio.to_thread.run_sync(
                    self._answer, ask, place, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
                )
        except AffectlensError as error:
            raise PrerequisiteError(str(error)) from None

    def _answer(self, ask: Asked, place: Place) -> tuple[ModelOutput, ModelCall]:
        """Generate all replies; runs in a thread of its own."""
        place.wait()
        info = place.info
        request = Request(ask.chat, prefill=ask.prefill, transcript=info.template is None)
        sent = {"chat": [list(turn) for turn in ask.chat], "prefill": ask.prefill, "transcript": request.transcript}
        n = self._room(place, request)
        if n is None or n >= info.context:
            said = f"the conversation does not fit the context of {info.context} tokens of {info.id}: shorten it"
            out = ModelOutput.from_content(self.model_name, said, stop_reason="model_length", error=said)
            return out, ModelCall.create(sent, {"error": said})
        sampling = replace(ask.sampling, max_tokens=min(ask.sampling.max_tokens, info.context - n))
        each = replace(request, steering=self._instrument.steering, readouts=self._instrument.readouts)
        results = list(place.run(replace(each, sampling=replace(sampling, seed=seed)) for seed in ask.seeds))
        again = [wanted for result in results if (wanted := self._instrument.again(request, result)) is not None]
        untouched: Sequence[Result | None] = list(place.run(again)) if again else [None] * len(results)
        cut = sampling.max_tokens < ask.sampling.max_tokens
        told = [self._instrument.told(*pair) for pair in zip(results, untouched, strict=True)]
        words = place.vocabulary if sampling.logprobs is not None else ()
        choices, whole = [], []
        for seed, result, (summary, tokens) in zip(ask.seeds, results, told, strict=True):
            choices.append(self._choice(ask, result, {**self._facts, "seed": seed, **summary}, cut=cut, words=words))
            whole.append({"seed": seed, **summary, **tokens})
        metadata = {**self._facts, **whole[0], **({"choices": whole} if len(whole) > 1 else {})}
        generated = sum(len(result.layout) - n for result in results)
        output = ModelOutput(
            model=self.model_name,
            choices=choices,
            usage=ModelUsage(input_tokens=n, output_tokens=generated, total_tokens=n + generated),
            input_context_tokens=n,
            metadata={"affectlens": metadata},
        )
        plain = {key: value for key, value in asdict(sampling).items() if key != "seed"}
        sent |= {"sampling": plain, "seeds": list(ask.seeds), "steering": str(self._instrument.steering)}
        return output, ModelCall.create(sent, {"replies": [{"text": r.text, "finish": r.finish} for r in results]})

    def _room(self, place: Place, request: Request) -> int | None:
        """How many tokens a prompt has; None if it does not fit."""
        try:
            return len(place.layout(request))
        except EngineError as error:
            if "do not fit the context" in str(error):
                return None
            raise

    def _choice(
        self, ask: Asked, result: Result, told: dict[str, Any], *, cut: bool, words: Sequence[str]
    ) -> ChatCompletionChoice:
        message = ChatMessageAssistant(content=result.text, model=self.model_name, source="generate")
        if ask.handler is not None and ask.tools:
            message = ask.handler.parse_assistant_response(result.text, list(ask.tools))
        message.metadata = {"affectlens": told}
        ended: Any = "stop" if result.finish == "stop" else "model_length" if cut else "max_tokens"
        likely = Logprobs(content=[_logprob(each, words) for each in result.logprobs]) if words else None
        return ChatCompletionChoice(message=message, stop_reason="tool_calls" if message.tool_calls else ended, logprobs=likely)


def _logprob(each: Logprob, words: Sequence[str]) -> InspectLogprob:
    def one(token: int, value: float) -> dict[str, Any]:
        # A token that is a part of a character has no text of its own.
        text = words[token]
        raw = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(value, LEAST), "bytes": raw}

    top = [TopLogprob(**one(token, value)) for token, value in each.top]
    return InspectLogprob(**one(each.token, each.value), top_logprobs=top or None)
