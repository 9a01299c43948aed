"""What is tried on every model when vLLM has loaded it: nothing about its taps is taken for granted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from affectlens.engine import Reading, Readout, Request
from affectlens.engines.checks import TEXTS, TOLERANCE, apart, causal, sane, steered
from affectlens.errors import EngineError, ModelSupportError
from affectlens.layout import Layout, Where

if TYPE_CHECKING:
    from affectlens.engines.vllm import VLLMEngine


def examine(engine: VLLMEngine) -> tuple[list[tuple[str, str]], str | None]:
    """Try the model: does every tap fire, does steering arrive and leave nothing behind, and is the stream the model's own?

    Raises:
        ModelSupportError: One of these does not hold.
    """
    info = engine.info
    limit = TOLERANCE.get(info.dtype, 0.1)
    everything = Readout(tuple(range(-1, info.n_layers)), Where(), "none")
    blocks = Readout(tuple(range(info.n_layers)), Where(), "none")
    requests = [Request(text, readouts=(blocks,)) for text in TEXTS]

    def read(*which: Request) -> list[tuple[Layout, Reading]]:
        return [(result.layout, result.readings[0]) for result in engine.run(which)]

    checks = [("residual stream", f"{info.n_layers} blocks, width {info.width}")]
    try:
        read(Request(TEXTS[2], readouts=(everything,)))
        alone = [read(request)[0] for request in requests]
    except EngineError as error:
        raise ModelSupportError(
            f"a tap does not fire in {info.id} under vLLM ({str(error).partition(':')[0]}): open it with hf/"
        ) from None
    checks.append(("taps", f"each of {info.n_layers} blocks fired once a step"))
    checks.append(("residual norm", sane(alone, info.id)))
    checks.append(("causal", causal(engine, blocks, alone, limit)))
    checks.append(("steering", steered(engine, requests[0], alone[0], limit)))
    after = read(requests[0])[0][1]
    if not np.array_equal(after.values, alone[0][1].values):
        raise ModelSupportError(f"steering leaves something behind in {info.id} under vLLM: open it with hf/")
    checks.append(("plain, steered, plain", "the same bits before and after"))
    together = max(apart(got.values, want.values) for (_, got), (_, want) in zip(read(*requests), alone, strict=True))
    if not together <= limit:
        raise ModelSupportError(f"texts that run together read differently in {info.id} ({together:.1e}): open it with hf/")
    checks.append(("together = alone", f"largest relative difference {together:.1e}"))
    checks.append(("stream = what is unembedded", _unembedded(engine, limit)))
    reply_token = None
    if engine.tokenizer.chat_template:
        try:
            layout = engine.layout(Request((("user", "Hello."),)))
            reply_token = layout.tokens[layout.n_prompt - 1]
            checks.append(("chat template", f"reply position is {reply_token!r}"))
        except EngineError as error:
            checks.append(("chat template", f"unusable: {error}"))
    else:
        checks.append(("chat template", "none: chats are refused, plain texts work"))
    return checks, reply_token


def _unembedded(engine: VLLMEngine, limit: float) -> str:
    """The last stream, unembedded, gives the model's own log-probabilities: the two parts of a block's output add up to it."""
    info = engine.info
    last = Readout((info.n_layers - 1,), Where(last=1), "last")
    word = " the"
    token, *more = engine.layouts.continuation(word)
    if more:
        return f"not tried: {word!r} is several tokens"
    (result,) = engine.run([Request(TEXTS[1], readouts=(last,), choices=(word,))])
    logits = engine.unembed(result.readings[0].values)[0].astype(np.float64)
    got = logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    if not abs(got - result.choice_logprobs[0]) <= 20 * limit:
        raise ModelSupportError(
            f"what is read in {info.id} under vLLM is not what it unembeds (log-probability {got:.3f} against "
            f"{result.choice_logprobs[0]:.3f}): open it with hf/"
        )
    return f"log-probabilities differ by {abs(got - result.choice_logprobs[0]):.1e}"
