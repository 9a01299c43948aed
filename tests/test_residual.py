"""``al.steer``: steering a transformers model of one's own, and leaving no trace on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import affectlens as al
import families
from affectlens.engine import Gate, Steering, Term, Where
from affectlens.errors import EngineError, MismatchError

LAYER = 2


@pytest.fixture(scope="module", params=["llama", "falcon", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return families.build(request.param)


def push(strength: float = 1.0, *, width: int = families.WIDTH, layer: int = LAYER, where: Where = Where()) -> Steering:
    direction = np.random.default_rng(0).normal(size=(1, width)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    return Steering((Term("push", strength, (layer,), (layer,), direction, np.full(1, 4, np.float32), where=where),))


def residuals(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What leaves block LAYER, read by a hook of this test's own."""
    from affectlens.engines.residual import find_blocks

    seen: list[torch.Tensor] = []
    handle = find_blocks(model)[LAYER].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_token_moves_by_what_was_added(model: Any) -> None:
    ids = torch.randint(4, families.VOCABULARY, (2, 9))
    before = residuals(model, ids)
    with al.steer(model, push(0.5)):
        moved = residuals(model, ids)
    step = torch.as_tensor(push().terms[0].directions[0]) * 0.5 * 4
    torch.testing.assert_close(moved, before + step, rtol=1e-5, atol=1e-5)
    assert torch.equal(residuals(model, ids), before)


def test_strength_0_changes_no_bit_and_sets_no_hook(model: Any) -> None:
    ids = torch.randint(4, families.VOCABULARY, (1, 7))
    before, count = residuals(model, ids), hooks(model)
    with al.steer(model, push(0.0)):
        assert hooks(model) == count
        assert torch.equal(residuals(model, ids), before)


def test_hooks_are_removed_whatever_happens(model: Any) -> None:
    count = hooks(model)
    with pytest.raises(ZeroDivisionError), al.steer(model, push()):
        assert hooks(model) > count
        raise ZeroDivisionError
    assert hooks(model) == count


def test_the_reply_alone_can_be_steered(model: Any) -> None:
    ids = torch.randint(4, families.VOCABULARY, (1, 8))
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with al.steer(model, push(50, where=Where("response"))):
        reply = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    plain = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    # The first token comes from the prompt, which is left alone; the next ones from steered tokens.
    assert torch.equal(reply.logits[0], plain.logits[0])
    assert not torch.allclose(reply.logits[1], plain.logits[1], atol=1e-2)
    with al.steer(model, push(50, where=Where("prompt"))):
        reply = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    assert not torch.allclose(reply.logits[0], plain.logits[0], atol=1e-2)


@pytest.mark.parametrize(
    ("steering", "error", "says"),
    [
        (push(width=7), MismatchError, "7 wide"),
        (push(layer=99), EngineError, "layers 0 to"),
        (push(where=Where(role="user")), EngineError, "needs a layout"),
        (push(where=Where(turn=-1)), EngineError, "needs a layout"),
        (push(where=Where("prompt", first=2)), EngineError, "needs a layout"),
        (push(where=Where("response", last=2)), EngineError, "needs a layout"),
        (push().when(Gate("d", LAYER, np.ones(7, np.float32), above=0.0)), MismatchError, "7 wide"),
        (push().when(Gate("d", -1, np.ones(families.WIDTH, np.float32), above=0.0)), EngineError, "layers 0 to"),
    ],
)
def test_what_a_bare_model_cannot_do_is_refused(model: Any, steering: Steering, error: type[Exception], says: str) -> None:
    count = hooks(model)
    with pytest.raises(error, match=says), al.steer(model, steering):
        raise AssertionError("must not get here")
    assert hooks(model) == count


def generated(model: Any, steering: Steering, prompt: int = 6, tokens: int = 5) -> list[torch.Tensor]:
    """What leaves block LAYER in each forward pass of a generation: the prompt, then token by token."""
    from affectlens.engines.residual import find_blocks

    ids = torch.arange(4, 4 + 2 * prompt).reshape(2, prompt)
    seen: list[torch.Tensor] = []
    with al.steer(model, steering):
        handle = find_blocks(model)[LAYER].register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        model.generate(ids, max_new_tokens=tokens + 1, min_new_tokens=tokens + 1, do_sample=False, pad_token_id=0)
        handle.remove()
    return seen


ALONG = torch.as_tensor(push().terms[0].directions[0])


@pytest.mark.parametrize("mode", ["ablate", "clamp", "cap", "floor"])
def test_coordinates_are_held_in_prompt_and_reply(model: Any, mode: str) -> None:
    steering = push().ablate() if mode == "ablate" else getattr(push(), mode)(0.1)
    value = 0.0 if mode == "ablate" else 0.1
    before = [x @ ALONG / 4 for x in generated(model, Steering())]
    for number, x in enumerate(generated(model, steering)):
        found = x @ ALONG / 4
        if mode in ("ablate", "clamp"):
            torch.testing.assert_close(found, torch.full_like(found, value), atol=1e-3, rtol=0)
        else:
            assert (found.max() < value + 1e-3) if mode == "cap" else (found.min() > value - 1e-3)
        if number == 0 and mode in ("cap", "floor"):
            torch.testing.assert_close(found, before[0].clamp(**{"max" if mode == "cap" else "min": value}), atol=1e-3, rtol=0)


@pytest.mark.parametrize("prompt", [1, 6])
def test_schedules_and_windows_count_the_passes_of_the_reply(model: Any, prompt: int) -> None:
    """A prompt of one token is a prompt; the next generation begins anew."""
    everywhere = {"ramp": [0, 0.25, 0.5, 0.75, 1, 1], "decay": [1, 1, 0.75, 0.5, 0.25, 0]}
    for kind, shares in everywhere.items():
        steering = push(100.0)
        for _ in range(2):
            # So strong that what is added is all that is left along the direction; another model's size does not matter.
            moved = [float((x @ ALONG).mean()) / 400 for x in generated(model, getattr(steering, kind)(4), prompt)]
            np.testing.assert_allclose(moved, shares, atol=0.05)
    window = push(100.0, where=Where("response", after=1, first=2))
    moved = [float((x @ ALONG).mean()) / 400 for x in generated(model, window, prompt)]
    np.testing.assert_allclose(moved, [0, 0, 1, 1, 0, 0], atol=0.05)


def test_a_gate_opens_token_by_token(model: Any) -> None:
    direction = np.random.default_rng(1).normal(size=families.WIDTH).astype(np.float32)
    direction /= np.linalg.norm(direction)
    ids = torch.randint(4, families.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    before = residuals(model, ids)
    scores = before @ torch.as_tensor(direction) / before.norm(dim=-1)
    ordered = scores.flatten().sort().values
    value = float((ordered[8] + ordered[9]) / 2)
    with al.steer(model, push(0.5).when(Gate("d", LAYER, direction, above=value))):
        moved = residuals(model, ids)
    is_open = scores > value
    assert 0 < is_open.sum() < is_open.numel()
    torch.testing.assert_close(moved[is_open], before[is_open] + 0.5 * 4 * ALONG, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[~is_open], before[~is_open])
