"""vLLM's own server with our plug-in: dials and readings of its clients, and its model as an engine, both at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import pytest

import served_vllm
import vllm_cases as cases
from affectlens.baseline import Baseline
from affectlens.engine import Engine, Request, Sampling, Steering, Where, open_engine
from affectlens.engines.hf import HFEngine
from affectlens.errors import EngineError
from affectlens.models import locate
from affectlens.server.dials import Dials
from affectlens.traces import Probe, trace_of
from affectlens.vectors import ConceptVectors
from vllm_here import DEMO

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

KEY = "a key of vLLM's"
TOLERANCE = 0.0015  # as in test_load.py
CHAT = (("user", "Say something about the sea and the ships that pass."),)


@dataclass
class Server:
    url: str
    client: Any
    engine: Engine
    vectors: ConceptVectors
    baseline: Baseline

    def chat(self, chat: Any = CHAT, *, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        messages = [{"role": role, "content": content} for role, content in chat]
        options = {"max_tokens": 10, "temperature": 0, **options}
        return self.client.chat.completions.create(model=self.model, messages=messages, extra_body=extra or {}, **options)

    @property
    def model(self) -> str:
        return str(self.engine.info.id)

    def steering(self, bias: dict[str, float]) -> Steering:
        dials = Dials(self.vectors)
        return dials.steering(dials.bias(bias))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    vectors = served_vllm.saved(folder / "vectors")
    command, url = served_vllm.vllm_serve(locate(DEMO).location, "--max-model-len", "2048", "--api-key", KEY)
    with (
        served_vllm.running(command, folder / "log", url=url, AFFECTLENS_VECTORS=str(folder / "vectors")),
        open_engine(f"vllm/{url}", api_key=KEY) as engine,
    ):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=300, max_retries=0)
        baseline = Baseline.load(folder / "vectors" / f"baseline-{vectors.layer}.json")
        yield Server(url, client, engine, vectors, baseline)


def test_it_does_what_transformers_does(server: Server) -> None:
    """Every kind of request and of steering, with the caller's own directions; to a thousandth, and the same greedy tokens."""
    made = cases.requests(server.engine)[:18:2] + cases.requests(server.engine)[-6:]
    hf = HFEngine.load(DEMO, dtype="float32", device="cpu")
    assert (server.engine.info.fingerprint, server.engine.info.reply_token) == (hf.info.fingerprint, hf.info.reply_token)
    for one, other in zip(server.engine.run(made), hf.run(made), strict=True):
        assert one.layout == other.layout
        np.testing.assert_allclose(one.choice_logprobs, other.choice_logprobs, atol=5e-3)
        for a, b in zip(one.readings, other.readings, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            size = np.maximum(np.linalg.norm(b.values, axis=-1, keepdims=True), 1e-9)
            assert np.abs((a.values - b.values) / size).max() < 1e-3
    x = np.random.default_rng(0).normal(size=(5, hf.info.width)).astype(np.float32) * 20
    np.testing.assert_allclose(server.engine.unembed(x), hf.unembed(x), atol=2e-2)


@pytest.mark.parametrize("bias", [{}, {"calm": 0.2}, {"happy": -0.1, "desperate": 0.1}])
def test_dials_and_readings_are_those_of_the_engine(server: Server, bias: dict[str, float]) -> None:
    extra = {"vllm_xargs": {"emotion_bias": json.dumps(bias), "readings": json.dumps({"emotions": "all"})}}
    answer = server.chat(extra=extra)
    probe = Probe(server.vectors)
    readouts = tuple(replace(readout, where=Where("response")) for readout in probe.readouts)
    sampling = Sampling(max_tokens=10, temperature=0)
    (result,) = server.engine.run([Request(CHAT, sampling=sampling, steering=server.steering(bias), readouts=readouts)])
    assert answer.choices[0].message.content == result.text
    scores = server.baseline.standardise(trace_of(result, probe, id="x", format="")).scores
    found = {row["token"]: row["scores"] for row in answer.affectlens["tokens"]}
    # The last token is drawn and not run, so nothing is read of it.
    assert set(found) == set(range(9)) and answer.affectlens["steering"]["used"] == bias
    for token, own in found.items():
        expected = scores[result.layout.n_prompt + token] if len(scores) == len(result.layout) else scores[token]
        np.testing.assert_allclose([own[name] for name in server.vectors.names], expected, atol=TOLERANCE)


def test_plain_steered_plain(server: Server) -> None:
    """With vLLM's cache of prompts on, and a prompt that fills blocks of it."""
    chat = (("user", "Once there was a keeper who counted the ships that passed his window. " * 8 + "What did he do?"),)
    said = [server.chat(chat, extra={"emotion_bias": bias} if bias else {}) for bias in ({}, {"calm": 0.3}, {"calm": 0.3}, {})]
    plain, steered, again, last = (answer.choices[0].message.content for answer in said)
    assert plain == last and steered == again != plain


def test_a_stream_says_the_same(server: Server) -> None:
    extra = {"emotion_bias": {"calm": 0.2}, "readings": {"emotions": ["happy"]}}
    whole = server.chat(extra=extra)
    parts = list(server.chat(extra=extra, stream=True))
    text = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    ours = [part.affectlens for part in parts if getattr(part, "affectlens", None)]
    assert text == whole.choices[0].message.content and len(ours) == 1
    assert [row["text"] for row in ours[0]["tokens"]] == [row["text"] for row in whole.affectlens["tokens"]]
    for one, other in zip(ours[0]["tokens"], whole.affectlens["tokens"], strict=True):
        assert one["scores"]["happy"] == pytest.approx(other["scores"]["happy"], abs=TOLERANCE)


def test_clients_and_engines_at_once_give_what_each_gives_alone(server: Server) -> None:
    def ask(i: int) -> Any:
        chat = (("user", f"Say a word about {('the sea', 'a door', 'the rain')[i % 3]}, please. Number {i}."),)
        bias = {server.vectors.names[i % 3]: 0.05 * (1 + i % 4)} if i % 4 else {}
        if i % 2:
            sampling = Sampling(max_tokens=8, temperature=0)
            made = Request(chat, sampling=sampling, steering=server.steering(bias), stream=i % 3 == 0)
            *_, result = server.engine.run([made, made] if i % 5 else [made])
            return result.text, result.layout.ids
        answer = server.chat(chat, extra={"emotion_bias": bias, "readings": True}, max_tokens=8)
        return answer.choices[0].message.content, [row["text"] for row in answer.affectlens["tokens"]]

    alone = [ask(i) for i in range(24)]
    assert len({text for text, _ in alone}) > 12
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, [i % 24 for i in range(72)]))
    assert [i for i, said in enumerate(together) if said != alone[i % 24]] == []


def test_who_has_no_key_gets_nothing(server: Server) -> None:
    with pytest.raises(EngineError, match="wants a key"):
        open_engine(f"vllm/{server.url}", api_key="")
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "emotion_bias": {"clam": 1}}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 401
    with pytest.raises(openai.BadRequestError, match="did you mean calm"):
        server.chat(extra={"emotion_bias": {"clam": 0.1}})


@pytest.mark.parametrize("xargs", [{"affectlens_draw": "x"}, {"affectlens_draw": [0, 0, 0, 0]}])
def test_what_would_end_vllm_is_refused(server: Server, xargs: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="affectlens_draw"):
        server.chat(extra={"vllm_xargs": xargs})
    assert server.chat().choices[0].message.content


@pytest.mark.parametrize("name", ["nobody's order", 3, ["a"]])
def test_orders_that_nobody_gave_do_nothing(server: Server, name: Any) -> None:
    plain = server.chat().choices[0].message.content
    assert server.chat(extra={"vllm_xargs": {"affectlens": name}}).choices[0].message.content == plain
