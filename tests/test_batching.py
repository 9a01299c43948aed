"""Company: what requests that share forward passes have of each other (:mod:`affectlens.engines.batching`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from affectlens.engine import Engine, Gate, Readout, Request, Result, Sampling, Steering, Term, Where, open_engine
from affectlens.engines.decode import _at

PROMPTS = ("The sea was calm.", (("user", "I lost my keys on the train. What should I do?"),), "A")
LAYER = 15


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("smollm2-135m", dtype="bfloat16", device="cpu")


def requests(engine: Engine) -> list[Request]:
    """Every kind of steering at every prompt, sampled, with the scores of 171 directions and log-probabilities."""
    rng = np.random.default_rng(2)
    width = engine.info.width
    unit = rng.normal(size=(173, width)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    norm = np.array([60.0], np.float32)
    push = Steering((Term("a", 0.3, (LAYER,), (LAYER,), unit[:1], norm),))
    other = Steering((Term("b", 0.2, (LAYER,), (LAYER,), unit[1:2], norm, where=Where("response")),))
    gate = Gate("a", LAYER, unit[0], above=0.0)
    steerings = (Steering(), push, other.ramp(4), other.when(gate), push.clamp(0.05), push.ablate())
    readouts = (Readout((LAYER,), Where(after=1), "none", unit[None, :171]),)
    reads = [Request(prompt, steering=push, readouts=readouts) for prompt in PROMPTS[:2]]
    return reads + [
        Request(prompt, sampling=Sampling(max_tokens=6 + n, seed=n, logprobs=2), steering=steering, readouts=readouts)
        for n, (prompt, steering) in enumerate((prompt, steering) for prompt in PROMPTS for steering in steerings)
    ]


def served(engine: Engine, arrivals: dict[int, list[Request]]) -> list[Result]:
    """Results in the order of arrival; keys say before which steps requests come."""
    session, found, step = engine.session(), dict[int, Result | None](), 0
    while session.live or any(at >= step for at in arrivals):
        found |= {session.submit(request): None for request in arrivals.get(step, [])}
        for ticket, result in session.step():
            assert isinstance(result, Result)
            found[ticket] = result
        step += 1
    return [result for result in found.values() if result is not None]


@pytest.mark.real
def test_company_changes_no_bit(engine: Engine) -> None:
    if not engine.session().exact:
        pytest.skip("matrix products of this processor depend on the number of rows in bfloat16")
    asked = requests(engine)
    together = served(engine, {0: asked[:5], 1: asked[5:6], 3: asked[6:11], 7: asked[11:]})
    assert len(together) == len(asked)
    for request, result in zip(asked, together, strict=True):
        (alone,) = served(engine, {0: [request]})
        assert (result.text, result.layout, result.finish) == (alone.text, alone.layout, alone.finish)
        assert result.logprobs == alone.logprobs
        np.testing.assert_array_equal(result.readings[0].values, alone.readings[0].values)
        np.testing.assert_array_equal(result.readings[0].norms, alone.readings[0].norms)


def test_a_product_by_rows_does_not_depend_on_the_other_rows() -> None:
    from affectlens.engines.changes import by_rows

    generator = torch.Generator().manual_seed(3)
    for n, k in ((576, 171), (64, 3), (33, 1)):
        x, matrix = torch.randn(40, n, generator=generator), torch.randn(n, k, generator=generator)
        whole = by_rows(x, matrix)
        torch.testing.assert_close(whole, x @ matrix, rtol=1e-3, atol=1e-3)
        for rows in ([0], [39], [3, 17], list(range(5, 30))):
            assert torch.equal(by_rows(x[rows], matrix), whole[rows])


@pytest.mark.real
def test_equal_prompts_are_read_once(engine: Engine) -> None:
    """Several replies to one prompt: it is run for the first of them, and changes no bit of the others'."""
    asked = requests(engine)[2:5]  # one prompt, three steerings
    several = [
        replace(request, sampling=replace(request.sampling, seed=seed))
        for request in asked
        for seed in range(3)
        if request.sampling
    ]
    passes: list[tuple[int, int]] = []
    words = engine.model.get_input_embeddings()  # type: ignore[attr-defined]
    hook = words.register_forward_pre_hook(lambda module, args: passes.append(tuple(args[0].shape)))
    together = served(engine, {0: several})
    hook.remove()
    assert sum(rows for rows, length in passes if length > 1) == len(asked)
    assert len({result.text for result in together}) > len(asked)
    if not engine.session().exact:
        return
    for request, result in zip(several, together, strict=True):
        (alone,) = served(engine, {0: [request]})
        assert (result.text, result.layout, result.logprobs) == (alone.text, alone.layout, alone.logprobs)
        np.testing.assert_array_equal(result.readings[0].values, alone.readings[0].values)


@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("tokens", "spread"), [(20, 1.0), (5000, 2.0), (5000, 8.0)])
def test_the_nucleus_is_that_of_a_sorted_vocabulary(tokens: int, spread: float, top_p: float) -> None:
    """Also where many tokens are equally likely, as coarse logits make them, and where few or all of the rows are flat."""
    torch.manual_seed(0)
    logits = torch.randn(8, tokens) * spread
    logits[::3] *= 0.1
    weights = logits.bfloat16().float().softmax(-1)
    ordered, order = weights.sort(descending=True, stable=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    kept = torch.zeros_like(weights).scatter_(1, order, ordered).double()
    for share in torch.rand(20).tolist():
        # In double precision the sums of both are the same to where a share falls.
        wanted = torch.searchsorted(kept.cumsum(-1), share * kept.sum(-1, keepdim=True), right=True)[:, 0]
        assert torch.equal(_at(weights.double(), top_p, torch.full((8, 1), share).double()), wanted)
