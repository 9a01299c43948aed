"""Every decoder family that we promise: opened with its self-checks, then held against the model's own words.

The oracle is a second model with the same weights that affectlens never touched: its ``output_hidden_states`` and its
``generate``. Families that cannot be read are named here with the reason they are given, and those that only run a
slower way with the way they lack, so that a change in either direction fails a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import families
from affectlens.engine import Readout, Request, Result, Sampling, Steering, Term, Where
from affectlens.engines.hf import HFEngine
from affectlens.errors import ModelSupportError

REFUSED = {
    "deepseek_v4": "2 axes of residual streams instead of one",
    "gemma3n_text": "2 axes of residual streams instead of one",
    "mllama": "layer 1 never fired",  # a cross-attention block, which is skipped without an image
    "paligemma": "is not causal",  # its prompt attends in both directions
}
READ = tuple(name for name in families.FAMILIES if name not in REFUSED)
NO_LEFT_PADDING = {"rwkv"}
ONE_BY_ONE = {"rwkv"}  # transformers mixes up the rows of its state
NO_FORK = {"gemma4", "gemma4_text", "gpt2", "gpt_bigcode"}
"""They make something of each token, or count them, outside of what they hand to the blocks."""
NO_PACKING = {
    "bamba", "biogpt", "bloom", "codegen", "deepseek_v32", "falcon", "falcon_h1", "falcon_mamba", "gemma2", "gpt_neo",
    "gpt_oss", "gptj", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm2_vl", "mamba", "mamba2",
    "minimax", "mpt", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv",
    "stablelm", "vaultgemma", "xglm", "zamba", "zamba2",
}  # fmt: skip
WINDOW = 64
"""Wider than the texts, so that the families with sliding windows pack them."""
WITHOUT_EMBEDDING = {"falcon_mamba", "mamba", "mamba2", "rwkv"}
TEXTS = ("Sea.", "the calm", "She slammed the door, and nobody said a word.", "Hé!", "Two boxes stood by the door.")
LONG = "Rain fell on the harbour all night, and in the morning the boats lay low between the piers, full of grey water."
TOLERANCE = 1e-4
STEP = 0.5


@dataclass
class Family:
    """A family's engine, and an untouched model with the same weights."""

    name: str
    engine: HFEngine
    oracle: Any

    @property
    def everything(self) -> Readout:
        return Readout(tuple(range(-1, families.LAYERS)), Where(), "none")

    def read(self, *texts: str, steering: Steering = Steering()) -> list[np.ndarray]:
        """Residuals ``(1 + L, T, D)`` of texts that are read together."""
        return [reading.values for reading in self.engine.read(texts, self.everything, steering=steering)]

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.engine.layout(Request(text)).ids])


def apart(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference of two residuals, relative to the typical norm at their layer."""
    assert got.shape == want.shape
    size = np.median(np.linalg.norm(want, axis=-1), axis=-1)[..., None]
    return float((np.linalg.norm(got - want, axis=-1) / np.maximum(size, 1e-12)).max())


def push(engine: HFEngine, layer: int) -> Steering:
    """Half a unit along a random direction at one layer."""
    direction = np.random.default_rng(3).normal(size=(1, engine.info.width)).astype(np.float32)
    direction /= np.linalg.norm(direction)
    return Steering((Term("d", STEP, (layer,), (layer,), direction, np.ones(1, np.float32)),))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other take longer than these models
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=READ)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families._TINY, "sliding_window", WINDOW)
        engine = HFEngine(families.build(request.param), families.tiny_tokenizer(), id=request.param)
        yield Family(request.param, engine, families.build(request.param))


def test_what_is_found_and_which_ways_hold(family: Family) -> None:
    engine, name = family.engine, family.name
    assert (engine.info.n_layers, engine.info.width) == (families.LAYERS, families.WIDTH)
    assert engine.can_pad
    assert engine.can_pad_left == (name not in NO_LEFT_PADDING)
    assert (engine.generate_rows == 1) == (name in ONE_BY_ONE)
    assert (engine.pack_limit > 0) == (engine.share_limit > 0) == (name not in NO_PACKING)
    assert engine.can_fork == (engine.share_limit > 0 and name not in NO_FORK)


def test_texts_read_together_are_texts_read_alone(family: Family) -> None:
    texts = (*TEXTS, LONG)  # the last fills the sliding windows
    for text, together in zip(texts, family.read(*texts), strict=True):
        assert apart(together, family.read(text)[0]) < TOLERANCE, text


def test_readings_are_the_hidden_states_that_the_model_reports(family: Family) -> None:
    with torch.inference_mode():
        states = family.oracle(input_ids=family.ids(TEXTS[2]), output_hidden_states=True, use_cache=False).hidden_states
    reported = np.stack([state[0].float().numpy() for state in states[: families.LAYERS]])
    # The embedding, then every block but the last, which is reported after the final norm; or every block as it is.
    stream = family.read(TEXTS[2])[0]
    assert apart(stream[1:] if family.name in WITHOUT_EMBEDDING else stream[:-1], reported) < TOLERANCE


def test_steering_moves_the_stream_by_the_push_and_what_follows_it(family: Family) -> None:
    layer = 1
    steering = push(family.engine, layer)
    for plain, moved in zip(family.read(*TEXTS), family.read(*TEXTS, steering=steering), strict=True):
        step = np.zeros_like(plain[layer + 1]) + STEP * steering.terms[0].directions[0]
        assert apart(moved[: layer + 1], plain[: layer + 1]) < TOLERANCE
        assert np.abs(moved[layer + 1] - plain[layer + 1] - step).max() < TOLERANCE * np.abs(plain[layer + 1]).max()
        assert (np.linalg.norm(moved[-1] - plain[-1], axis=-1) > 0.1 * STEP).all()


def test_strength_0_changes_no_bit(family: Family) -> None:
    for plain, still in zip(family.read(*TEXTS), family.read(*TEXTS, steering=0 * push(family.engine, 1)), strict=True):
        np.testing.assert_array_equal(still, plain)


def test_greedy_tokens_are_those_of_the_models_own_generate(family: Family) -> None:
    greedy = Sampling(max_tokens=4, temperature=0)
    results = list(family.engine.run(Request(text, sampling=greedy) for text in TEXTS))
    for text, result in zip(TEXTS, results, strict=True):
        assert reply(result) == own_reply(family, text), text


def reply(result: Result) -> list[int]:
    return list(result.layout.ids[result.layout.n_prompt :])


def own_reply(family: Family, text: str) -> list[int]:
    """What the model's own ``generate`` gives for a text alone, up to an end token."""
    ids = family.ids(text)
    with torch.inference_mode():
        out = family.oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    new = out[0, ids.shape[1] :].tolist()
    end = family.engine.tokenizer.eos_token_id
    return new[: new.index(end)] if end in new else new


def test_a_checkpoint_that_turns_the_cache_off_generates_the_same() -> None:
    def greedy(model: Any) -> list[int]:
        engine = HFEngine(model, families.tiny_tokenizer(), id="llama")
        return reply(next(engine.run([Request("the calm", sampling=Sampling(max_tokens=6, temperature=0))])))

    trained = families.build("llama")
    trained.config.use_cache = trained.generation_config.use_cache = False  # as trainers leave it behind
    assert greedy(trained) == greedy(families.build("llama"))


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name: str) -> None:
    with pytest.raises(ModelSupportError, match=REFUSED[name]) as error:
        HFEngine(families.build(name), families.tiny_tokenizer(), id=name)
    assert len(str(error.value).splitlines()) == 1


def test_every_family_has_a_place() -> None:
    assert set(REFUSED) | set(READ) == set(families.FAMILIES)
    assert set(READ) >= NO_PACKING | NO_LEFT_PADDING
