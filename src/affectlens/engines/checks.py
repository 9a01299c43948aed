"""What is tried on every model when it is loaded: nothing about a family is taken for granted.

Each check compares what the engine does in a fast way with the plain way (one text, alone, no padding). A fast way that gives
something else is not used; a model whose plain way is not sane is refused. ``affectlens doctor`` prints the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from affectlens.engine import Engine, Layout, Reading, Readout, Request, Result, Sampling, Steering, Term, Where
from affectlens.engines.residual import compiled
from affectlens.errors import AffectlensError, EngineError, ModelSupportError

if TYPE_CHECKING:
    from affectlens.engines.hf import HFEngine

TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.1}
"""Largest relative difference of a residual that rounding may explain; a shifted position differs by about 1."""

TEXTS = (
    "The ferry leaves the harbour at nine, and the crossing takes about forty minutes when the wind is low.",
    "She wrote the number on the back of an envelope.",
    "Two boxes stood by the door.",
)


def examine(engine: HFEngine, *, compile: bool = False) -> tuple[list[tuple[str, str]], str | None]:
    """Try the model; switch the engine's fast ways on where they hold.

    Args:
        engine: As yet with none of them.
        compile: Whether its blocks are to be compiled: that is done or refused.

    Returns:
        ``(check, outcome)`` pairs in words, and the token at the reply position if there is a chat template.

    Raises:
        ModelSupportError: A later token changes an earlier residual (not a causal model), residuals are not finite, a hook did
            not fire, steering did not arrive, or the blocks cannot be compiled.
    """
    info = engine.info
    limit = TOLERANCE.get(info.dtype, 0.1)
    everything = Readout(tuple(range(info.n_layers)), Where(), "none")
    requests = [Request(text, readouts=(everything,)) for text in TEXTS]
    checks = [("residual stream", f"{info.n_layers} blocks ({type(engine.blocks[0]).__name__}), width {info.width}")]
    # Texts of three different lengths, one at a time: the plain way that everything else is held against.
    try:
        alone = [_read(engine, [request])[0] for request in requests]
    except EngineError as error:
        why = str(error).partition(":")[0]
        raise ModelSupportError(
            f"{info.id} cannot be read ({why}): affectlens reads models that run every block on every text"
        ) from None
    checks.append(("hooks", f"each of {info.n_layers} blocks fired once a pass"))
    checks.append(("residual norm", sane(alone, info.id)))
    checks.append(("causal", causal(engine, everything, alone, limit)))
    checks.append(("steering", steered(engine, requests[0], alone[0], limit)))

    engine.can_pad = True
    padded = _difference(lambda: _read(engine, requests), alone)
    engine.can_pad = padded <= limit
    checks.append(("padded batch = alone", _way(padded, engine.can_pad, "texts of equal length are batched instead")))
    if engine.device.type == "cpu":
        packed = _try_packing(engine, requests, alone, limit)
        checks.append(("packed batch = alone", _way(packed, engine.pack_limit > 0, "padded batches are used instead")))
    else:
        checks.append(("packed batch = alone", "not used: on an accelerator one padded batch beats a loop over texts"))
    norm = float(np.median(alone[0][1].norms[info.default_layer]))
    shared, forked = _try_sharing(engine, everything, norm, limit)
    checks.append(("shared beginnings = alone", _way(shared, engine.share_limit > 0, "each text is read whole instead")))
    checks.append(("shared lower blocks = alone", _way(forked, engine.can_fork, "each steering runs through all blocks instead")))

    if compile:
        checks.append(("compiled blocks = alone", _compile(engine, requests, alone, limit)))

    generating = [Request(r.prompt, readouts=r.readouts, sampling=Sampling(max_tokens=1, temperature=0)) for r in requests]
    engine.can_pad_left = True
    left = _difference(lambda: [_prompt_part(r) for r in _read(engine, generating)], [_prompt_part(r) for r in alone])
    engine.can_pad_left = left <= limit
    checks.append(
        ("left-padded generation = alone", _way(left, engine.can_pad_left, "prompts of equal length are batched instead"))
    )

    together = _generated_together(engine, generating, [layout for layout, _ in alone])
    engine.generate_rows = engine.generate_rows if together <= limit else 1
    checks.append(("batched generation = alone", _way(together, together <= limit, "prompts are answered one by one instead")))
    joined = _joined(engine, generating, limit) if engine.generate_rows > 1 else float("inf")
    engine.can_join = joined <= limit
    checks.append(("prompts that join a batch = alone", _way(joined, engine.can_join, "each is answered in its own")))

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


def _read(engine: Engine, requests: list[Request]) -> list[tuple[Layout, Reading]]:
    return [(result.layout, result.readings[0]) for result in engine.run(requests)]


def _prompt_part(read: tuple[Layout, Reading]) -> tuple[Layout, Reading]:
    layout, reading = read
    keep = reading.positions < layout.n_prompt
    return layout, Reading(reading.values[:, keep], reading.norms[:, keep], reading.positions[keep])


def _difference(run: Callable[[], list[tuple[Layout, Reading]]], alone: list[tuple[Layout, Reading]]) -> float:
    """Largest relative difference over layers and tokens; infinite when the model refuses to run this way."""
    try:
        return max(apart(got.values, want.values) for (_, got), (_, want) in zip(run(), alone, strict=True))
    except AffectlensError:
        raise
    except Exception:  # a family that cannot run this way says so in its own words: then it is not run this way
        return float("inf")


def _generated_together(engine: HFEngine, requests: list[Request], layouts: list[Layout]) -> float:
    """How much of what is read while generating changes with the neighbours in a batch without padding.

    Some recurrent families mix up the rows of a batch once a state is carried from token to token.
    """
    from affectlens.engines.decode import decode
    from affectlens.engines.rows import Row

    n = min(map(len, layouts))
    rows = []
    for i, (request, own) in enumerate(zip(requests, layouts, strict=True)):
        text = own.text[: own.offsets[n - 1][1]]
        rows.append(Row(i, request, Layout(text, own.tokens[:n], own.ids[:n], own.offsets[:n], own.roles[:n], n)))

    def read(batch: list[Row]) -> list[tuple[Layout, Reading]]:
        return [(result.layout, result.readings[0]) for _, result in decode(engine, batch)]

    try:
        alone = [read([row])[0] for row in rows]
    except AffectlensError:
        raise
    except Exception:  # as in _difference
        return float("inf")
    together = _difference(lambda: read(rows), alone)
    if np.isfinite(together):
        return together
    # A near tie may have ended one reply earlier: then only the prompts can be compared.
    return _difference(lambda: [_prompt_part(r) for r in read(rows)], [_prompt_part(r) for r in alone])


def _joined(engine: HFEngine, requests: list[Request], limit: float) -> float:
    """How much of what is read while generating changes when a request joins others, and when others leave before it."""
    from affectlens.engines.batching import BatchSession, windows_of

    longer = [replace(request, sampling=Sampling(max_tokens=2 + n, temperature=0)) for n, request in enumerate(requests)]
    try:
        if windows_of(engine) is None:
            return float("inf")
        alone = [_read(engine, [request])[0] for request in longer]
        session = BatchSession(engine)
        tickets, came = [], dict[int, Result | AffectlensError]()
        for request in longer:
            tickets.append(session.submit(request))
            came |= dict(session.step())
        while session.live:
            came |= dict(session.step())
    except AffectlensError:
        raise
    except Exception:  # as in _difference
        return float("inf")
    results = [result for ticket in tickets if isinstance(result := came[ticket], Result)]
    pairs = [_while_alike((r.layout, r.readings[0]), want) for r, want in zip(results, alone, strict=True)]
    if not all(got.positions[-1] >= result.layout.n_prompt for (got, _), result in zip(pairs, results, strict=True)):
        return float("inf")
    return max(apart(got.values, want.values) for got, want in pairs)


def _while_alike(a: tuple[Layout, Reading], b: tuple[Layout, Reading]) -> tuple[Reading, Reading]:
    """Two readings as far as their tokens are the same: a near tie may have led to another one."""
    n = next((i for i, (x, y) in enumerate(zip(a[0].ids, b[0].ids, strict=False)) if x != y), min(len(a[0]), len(b[0])))
    return tuple(  # type: ignore[return-value]
        Reading(r.values[:, r.positions < n], r.norms[:, r.positions < n], r.positions[r.positions < n]) for r in (a[1], b[1])
    )


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """Relative to the token's norm, or the layer's median norm for a token below it: neither tiny tokens nor sinks decide."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    norms = np.linalg.norm(want, axis=-1)
    scale = np.maximum(norms, np.median(norms, axis=1)[:, None])
    return float((np.linalg.norm(got - want, axis=-1) / np.maximum(scale, 1e-12)).max())


def _way(difference: float, used: bool, instead: str) -> str:
    size = "cannot run this way" if np.isinf(difference) else f"largest relative difference {difference:.1e}"
    return size if used else f"{size}: {instead}"


def sane(alone: list[tuple[Layout, Reading]], id: str) -> str:
    norms = np.concatenate([reading.norms for _, reading in alone], axis=1)
    if not np.isfinite(norms).all() or (norms <= 0).any():
        raise ModelSupportError(f"the residuals of {id} are not finite and positive: try --dtype float32, or check the weights")
    middle = np.median(norms, axis=1)
    return f"median {middle[0]:.3g} after the first block, {middle[-1]:.3g} after the last"


def causal(engine: Engine, everything: Readout, alone: list[tuple[Layout, Reading]], limit: float) -> str:
    layout, whole = alone[0]
    cut = layout.offsets[len(layout) // 2][0]
    _, start = _read(engine, [Request(layout.text[:cut].rstrip(), readouts=(everything,))])[0]
    # The cut may tokenize its last word differently: compare what comes before it.
    n = start.values.shape[1] - 1
    difference = apart(start.values[:, :n], whole.values[:, :n])
    if not difference <= limit:
        raise ModelSupportError(
            f"{engine.info.id} is not causal: words that come later changed earlier residuals ({difference:.1e}); "
            "affectlens reads decoder-only language models, not encoders"
        )
    return f"later words leave earlier residuals alone ({difference:.1e})"


def steered(engine: Engine, request: Request, alone: tuple[Layout, Reading], limit: float) -> str:
    info = engine.info
    layer = info.default_layer
    direction = np.random.default_rng(0).normal(size=info.width).astype(np.float32)
    direction /= np.linalg.norm(direction)
    norm = np.array([np.median(alone[1].norms[layer])], dtype=np.float32)
    push = Steering((Term("check", 1.0, (layer,), (layer,), direction[None], norm),))
    readout = Readout((layer,), Where(), "none")
    _, moved = _read(engine, [Request(request.prompt, readouts=(readout,), steering=push)])[0]
    difference = apart(moved.values, alone[1].values[layer : layer + 1] + norm * direction)
    if not difference <= limit:
        raise ModelSupportError(
            f"steering does not arrive in {info.id}: the residual at layer {layer} moved by something else ({difference:.1e})"
        )
    return f"a push at layer {layer} arrives, relative difference {difference:.1e}"


def _one_row(engine: HFEngine) -> int:
    """How long texts may be that are laid out in one row, kept apart in attention; 0 where attention cannot be exchanged."""
    from transformers import AttentionInterface

    from affectlens.engines import prefix

    model: Any = engine.model
    config = model.config.get_text_config(decoder=True)
    recurrent = any("attention" not in kind for kind in getattr(config, "layer_types", None) or ())
    if recurrent or config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", True):
        return 0
    # transformers makes no mask for an attention that it has no mask function for, and none is needed.
    AttentionInterface.register(prefix.NAME, prefix.attention)
    # A window or chunk shows only in texts longer than it: those lie in no row with others.
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return int(min([engine.token_budget, *(w for w in windows if w)]))


def _compile(engine: HFEngine, requests: list[Request], alone: list[tuple[Layout, Reading]], limit: float) -> str:
    """Run compiled blocks from now on. Who asked for them is not given anything else."""
    engine.compiled = compiled(engine.blocks)
    why = "leave out compile"
    try:
        read = _read(engine, requests)
    except AffectlensError:
        raise
    except Exception as error:  # whatever the compiler cannot do, or the machine: it says so in its own words
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelSupportError(f"the blocks of {engine.info.id} cannot be compiled here ({reason}): {why}") from error
    difference = max(apart(got.values, want.values) for (_, got), (_, want) in zip(read, alone, strict=True))
    if not difference <= limit:
        raise ModelSupportError(f"the blocks of {engine.info.id} give something else when compiled ({difference:.1e}): {why}")
    return _way(difference, True, "")


def _try_packing(engine: HFEngine, requests: list[Request], alone: list[tuple[Layout, Reading]], limit: float) -> float:
    """Let several texts share one row; only for models whose attention can be exchanged."""
    engine.pack_limit = _one_row(engine)
    if not engine.pack_limit:
        return float("inf")
    # Texts longer than the limit are padded, not packed: with fewer than two others nothing would be tried.
    tried = sum(len(layout) <= engine.pack_limit for layout, _ in alone) > 1
    difference = _difference(lambda: _read(engine, requests), alone) if tried else float("inf")
    if not difference <= limit:
        engine.pack_limit = 0
    return difference


def _try_sharing(engine: HFEngine, everything: Readout, norm: float, limit: float) -> tuple[float, float]:
    """Let texts that begin alike share their beginning, some steered within it or behind it; then those that are all alike, too.

    Returns:
        The largest difference from reading each alone: with shared beginnings, and with a shared trunk below the steered layer.
    """
    layer = engine.info.default_layer
    direction = np.random.default_rng(1).normal(size=(1, engine.info.width)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    push = Steering((Term("check", 0.3, (layer,), (layer,), direction, np.array([norm], dtype=np.float32)),))
    steerings = (Steering(), push.at(Where(text="boxes")), push.at(Where(text="It")), -push)
    requests = [
        Request(f"{TEXTS[2]} It {end}.", readouts=(everything,), steering=steering, choices=("A",))
        for end in ("rained", "was cold")
        for steering in steerings
    ]
    alone = [next(engine.run([request])) for request in requests]
    answers = [result.choice_logprobs for result in alone]

    def together() -> list[tuple[Layout, Reading]]:
        results = list(engine.run(requests))
        # Through the unembedding, too: some families count their tokens again behind the last block.
        if not np.abs(np.subtract([result.choice_logprobs for result in results], answers)).max() <= 20 * limit:
            raise ValueError("other tokens were scored")
        return [(result.layout, result.readings[0]) for result in results]

    wanted = [(result.layout, result.readings[0]) for result in alone]
    engine.share_limit = _one_row(engine)
    if max(len(layout) for layout, _ in wanted) > engine.share_limit:  # nothing would be tried
        engine.share_limit = 0
        return float("inf"), float("inf")
    pays, engine.sharing_pays = engine.sharing_pays, 1
    shared = _difference(together, wanted)
    engine.can_fork = True
    forked = _difference(together, wanted)
    engine.sharing_pays = pays
    engine.share_limit *= shared <= limit
    engine.can_fork = max(shared, forked) <= limit and engine.device.type == "cpu"
    return shared, forked
