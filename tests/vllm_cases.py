"""Requests that vLLM and transformers must answer alike: every mode of steering, every kind of request, prompts in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from affectlens.engine import Engine, Gate, Readout, Request, Sampling, Steering, Term, Where

GREEDY = Sampling(max_tokens=6, temperature=0)
CHAT = (("system", "Be brief."), ("user", "I lost my keys."), ("assistant", "Oh no."), ("user", "Help me!"))
LONG = "The ferry leaves the harbour at nine, and the crossing takes about forty minutes when the wind is low. " * 4


def directions(engine: Engine) -> np.ndarray:
    """Three unit directions at every layer, ``(3, L, D)``."""
    x = np.random.default_rng(5).normal(size=(3, engine.info.n_layers, engine.info.width))
    x[1:] += 0.5 * x[0]
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def steering(engine: Engine, which: int, strength: float, *layers: int, where: Where = Where()) -> Steering:
    n = engine.info.n_layers
    norms = np.linspace(60, 600, n, dtype=np.float32) if n == 30 else np.full(n, 5.0, np.float32)  # about those of the models
    term = Term(f"d{which}", strength, layers or (n // 2,), tuple(range(n)), directions(engine)[which], norms, where=where)
    return Steering((term,))


def additions(engine: Engine) -> list[Steering]:
    """What can be done by adding."""
    n = engine.info.n_layers
    return [
        Steering(),
        steering(engine, 0, 0.3),
        steering(engine, 1, -0.2, 0, n - 2),
        steering(engine, 0, 0.3, where=Where("response")) + steering(engine, 2, 0.2, where=Where("prompt", last=2)),
        steering(engine, 2, 0.4).ramp(4),
        steering(engine, 0, 0.0),
    ]


def others(engine: Engine) -> list[Steering]:
    """What looks at the stream before it acts."""
    gate = Gate("d1", 1, directions(engine)[1, 1], above=0.0)
    return [
        steering(engine, 0, 1.0).ablate(),
        (steering(engine, 0, 1.0) + steering(engine, 1, 1.0)).clamp(0.1),
        steering(engine, 0, 1.0).cap(0.02) + steering(engine, 1, 1.0).floor(0.01),
        steering(engine, 0, 0.3).when(gate),
    ]


def requests(engine: Engine, *, everything: bool = True) -> list[Request]:
    middle = engine.info.n_layers // 2
    onto = directions(engine)[:, [0, middle]].transpose(1, 0, 2)
    readouts = (Readout((-1, 0, middle, engine.info.n_layers - 1), Where(), "none"), Readout((0, middle), Where(), "mean", onto))
    steerings = additions(engine) + (others(engine) if everything else [])
    made = []
    for n, each in enumerate(steerings):
        for k, prompt in enumerate((CHAT, "the calm sea", LONG if engine.info.context > 1000 else LONG[:150])):
            generates = (n + k) % 3 != 0
            made.append(
                Request(
                    prompt,
                    sampling=GREEDY if generates else None,
                    choices=() if generates else (" and", " and the sea"),
                    steering=each,
                    readouts=readouts,
                )
            )
    return made


def answers(engine: Engine, made: list[Request]) -> dict[str, Any]:
    """What came of them, as arrays."""
    out: dict[str, Any] = {}
    for n, result in enumerate(engine.run(made)):
        out[f"{n} ids"] = np.array(result.layout.ids)
        out[f"{n} choices"] = np.array(result.choice_logprobs)
        for r, reading in enumerate(result.readings):
            out[f"{n} reading {r}"] = reading.values
            out[f"{n} positions {r}"] = reading.positions
    return out
