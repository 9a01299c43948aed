"""The server as its clients see it: a real one on a free port, the toy behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from affectlens.actions import Log, Policy, Steer, Stop
from affectlens.engine import Sampling, Steering
from affectlens.engines.toy import ToyEngine
from affectlens.report import Report
from affectlens.rules import parse
from affectlens.server.keys import digest
from served import HI, Running, serving, toy_baseline, toy_vectors, uncalibrated

CHAT = tuple((turn["role"], turn["content"]) for turn in HI)
ENGINE = ToyEngine()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def alone(steering: Steering = Steering(), **sampling: Any) -> str:
    """What the model says to the same request without a server."""
    return ENGINE.generate([CHAT], sampling=Sampling(**{"max_tokens": 20, "seed": 3, **sampling}), steering=steering)[0]


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of an answer, which has OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


# ── OpenAI's Python client ──


def test_openai_plain(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="toy", messages=HI, max_tokens=20, seed=3)  # type: ignore[arg-type]
    assert made.choices[0].message.content == alone() and made.choices[0].finish_reason == "length"
    assert made.choices[0].message.role == "assistant" and made.object == "chat.completion" and made.model == "toy"
    assert made.usage is not None and made.usage.completion_tokens == 20 and made.usage.total_tokens == 29
    assert made.system_fingerprint == f"fp_{ENGINE.info.fingerprint}" and made.id.startswith("chatcmpl-")


def test_openai_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="toy", messages=HI, max_completion_tokens=20, seed=3, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone()
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_stream_helper_and_async(server: Running, client: openai.OpenAI) -> None:
    stop = " " + alone().split(" ")[6]  # the helper makes an error of a reply that reaches its length
    with client.chat.completions.stream(model="toy", messages=HI, max_tokens=20, seed=3, stop=stop) as stream:  # type: ignore[arg-type]
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == alone(stop=(stop,))
    assert "content.done" in kinds and "content.delta" in kinds

    async def ask() -> str:
        import asyncio

        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as several:
            made = await asyncio.gather(
                *(several.chat.completions.create(model="toy", messages=HI, max_tokens=8, seed=3) for _ in range(4))  # type: ignore[arg-type]
            )
        return "|".join(str(each.choices[0].message.content) for each in made)

    import asyncio

    assert asyncio.run(ask()) == "|".join([alone(max_tokens=8)] * 4)


def test_openai_n_seeds_and_stop(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="toy", messages=HI, max_tokens=20, seed=3, n=3)  # type: ignore[arg-type]
    assert [choice.message.content for choice in made.choices] == [alone(seed=seed) for seed in (3, 4, 5)]
    assert made.usage is not None and made.usage.completion_tokens == 60 and made.usage.prompt_tokens == 9
    words = alone().split(" ")
    stop = f" {words[5]}"
    made = client.chat.completions.create(model="toy", messages=HI, max_tokens=20, seed=3, stop=["zzz", stop])  # type: ignore[arg-type]
    assert made.choices[0].message.content == " ".join(words[:5]) and made.choices[0].finish_reason == "stop"
    parts = client.chat.completions.create(model="toy", messages=HI, max_tokens=20, seed=3, stop=stop, stream=True)  # type: ignore[arg-type]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == " ".join(words[:5])
    streamed: dict[int, str] = {}
    for part in client.chat.completions.create(model="toy", messages=HI, max_tokens=20, seed=3, n=3, stream=True):  # type: ignore[arg-type]
        choice = part.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {k: alone(seed=3 + k) for k in range(3)}
    greedy = [client.chat.completions.create(model="toy", messages=HI, max_tokens=9, temperature=0) for _ in range(2)]  # type: ignore[arg-type]
    assert greedy[0].choices[0].message.content == greedy[1].choices[0].message.content == alone(max_tokens=9, temperature=0)


def test_openai_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"model": "toy", "messages": HI, "max_tokens": 12, "seed": 3, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(**options).choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) == 12
    assert "".join(each.token for each in found.content) == alone(max_tokens=12)
    for each in found.content:
        assert bytes(each.bytes or []).decode() == each.token and each.logprob <= each.top_logprobs[0].logprob <= 0
        assert len(each.top_logprobs) == 3
    streamed: list[Any] = []
    for part in client.chat.completions.create(**options, stream=True, stop=[" zzz"]):
        if part.choices[0].logprobs:
            streamed += part.choices[0].logprobs.content
    assert [(each.token, each.logprob) for each in streamed] == [(each.token, each.logprob) for each in found.content]


def test_openai_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"] and client.models.retrieve("toy").owned_by == "affectlens"
    with pytest.raises(openai.NotFoundError, match="ask for 'toy'"):
        client.chat.completions.create(model="gpt-4o", messages=HI)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as error:
        client.chat.completions.create(model="toy", messages=HI, tools=[{"type": "function", "function": {"name": "f"}}])  # type: ignore[arg-type]
    assert error.value.param == "tools" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="context") as error:
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "sea " * 5000}])
    assert error.value.code == "context_length_exceeded"


def test_openai_legacy_completions(client: openai.OpenAI) -> None:
    made = client.completions.create(model="toy", prompt="the calm sea", max_tokens=8, seed=5)
    said = ENGINE.generate(["the calm sea"], sampling=Sampling(max_tokens=8, seed=5))[0]
    assert made.choices[0].text == said and made.object == "text_completion" and made.id.startswith("cmpl-")
    made = client.completions.create(model="toy", prompt=["the calm sea", "a door"], max_tokens=8, seed=5, n=2, echo=True)
    others = ENGINE.generate(["the calm sea"] * 2, sampling=Sampling(max_tokens=8, seed=5))
    assert [choice.text for choice in made.choices[:2]] == [f"the calm sea{text}" for text in others]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3] and made.choices[2].text.startswith("a door")
    assert made.usage is not None and made.usage.completion_tokens == 32
    parts = client.completions.create(model="toy", prompt="the calm sea", max_tokens=8, seed=5, stream=True, echo=True)
    chunks = list(parts)
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"the calm sea{said}"
    assert {chunk.object for chunk in chunks} == {"text_completion"} and chunks[-1].choices[0].finish_reason == "length"
    likely = client.completions.create(model="toy", prompt="the calm sea", max_tokens=4, seed=5, logprobs=2).choices[0].logprobs
    assert likely is not None and likely.tokens is not None and likely.text_offset is not None
    assert "".join(likely.tokens) == said[: len("".join(likely.tokens))] and likely.text_offset[0] == 0
    assert len(likely.top_logprobs or []) == 4 and likely.text_offset[1] == len(likely.tokens[0])


def test_the_openai_npm_client(server: Running, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        assert os.environ.get("AFFECTLENS_CI") != "1", "npm is missing: apt-get install nodejs npm"
        pytest.skip("npm is not installed")
    made = subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--loglevel=error", "openai@6"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if made.returncode and os.environ.get("AFFECTLENS_CI") != "1":
        pytest.skip(f"the npm package openai cannot be installed here: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    (tmp_path / "ask.mjs").write_text(
        """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none needed", maxRetries: 0 });
const asked = { model: "toy", messages: [{ role: "user", content: "the old door" }], max_tokens: 20, seed: 3 };
const plain = await client.chat.completions.create({ ...asked, n: 2, logprobs: true, top_logprobs: 2 });
const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true },
  emotion_bias: { calm: 0.1 }, readings: { emotions: ["calm"] } });
let text = "", scores = [], usage = null, last = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.affectlens?.scores) scores.push(chunk.affectlens.scores.calm);
  if (chunk.affectlens?.summary) last = chunk.affectlens;
  if (chunk.usage) usage = chunk.usage;
}
const runner = client.chat.completions.stream({ ...asked, stop: process.argv[3] });
const whole = await runner.finalContent();
const legacy = await client.completions.create({ model: "toy", prompt: "the calm sea", max_tokens: 4, seed: 5 });
const models = [];
for await (const model of client.models.list()) models.push(model.id);
let error = null;
try { await client.chat.completions.create({ ...asked, emotion_bias: { clam: 0.1 } }); }
catch (caught) { error = { status: caught.status, param: caught.param, code: caught.code, message: caught.message }; }
console.log(JSON.stringify({ plain, text, scores, usage, last, whole, legacy, models, error }));
"""
    )
    stop = " " + alone().split(" ")[6]
    node = subprocess.run(
        ["node", "ask.mjs", server.url, stop], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert node.returncode == 0, node.stderr
    said = json.loads(node.stdout)
    assert [choice["message"]["content"] for choice in said["plain"]["choices"]] == [alone(), alone(seed=4)]
    assert len(said["plain"]["choices"][0]["logprobs"]["content"]) == 20
    assert said["text"] == alone(0.1 * toy_vectors()["calm"]) and len(said["scores"]) == 20
    assert said["usage"]["completion_tokens"] == 20 and said["last"]["steering"]["used"] == {"calm": 0.1}
    assert (
        said["whole"] == alone(stop=(stop,)) and said["models"] == ["toy"] and said["legacy"]["usage"]["completion_tokens"] == 4
    )
    assert said["error"]["status"] == 400 and said["error"]["param"] == "emotion_bias"
    assert "did you mean calm?" in said["error"]["message"]


# ── ours ──


def test_steering_is_that_of_the_engine_and_is_clamped(server: Running) -> None:
    vectors = toy_vectors()
    made = server.chat(emotion_bias={"calm": 0.1, "sad": -0.05})
    assert made["choices"][0]["message"]["content"] == alone(0.1 * vectors["calm"] - 0.05 * vectors["sad"])
    assert made["affectlens"]["steering"] == {
        "asked": {"calm": 0.1, "sad": -0.05},
        "used": {"calm": 0.1, "sad": -0.05},
        "clamped": {},
    }
    made = server.chat(emotion_bias={"calm": 0.6})
    assert made["affectlens"]["steering"]["clamped"] == {"calm": 0.15}
    assert made["choices"][0]["message"]["content"] == alone(0.15 * vectors["calm"])
    # Each is safe alone, both together are not: shares of the range add up.
    used = server.chat(emotion_bias={"calm": 0.15, "sad": -0.15, "happy": 0})["affectlens"]["steering"]["used"]
    assert used == {"calm": pytest.approx(0.075), "sad": pytest.approx(-0.075), "happy": 0}
    assert server.chat(emotion_bias={"calm": 0})["choices"][0]["message"]["content"] == alone()


def test_readings_of_a_stream_are_those_of_the_monitor(server: Running) -> None:
    asked = {"emotions": ["desperate", "calm"], "prompt": True}
    body = {"model": "toy", "messages": HI, "max_tokens": 20, "seed": 3, "stream": True, "readings": asked}
    chunks = streamed(server, body)
    first, last = chunks[0]["affectlens"], chunks[-1]["affectlens"]
    assert first["layer"] == 4 and first["unit"] == "z" and first["emotions"] == ["desperate", "calm"] and first["seed"] == 3
    assert [row["role"] for row in first["prompt"]].count("user") == 3
    rows = [chunk["affectlens"] for chunk in chunks[1:-1]]
    trace = server.client.get(f"/v1/traces/{last['trace']}").json()
    assert [row["token"] for row in rows] == list(range(9, 29)) and "".join(row["text"] for row in rows) == alone()
    for name in ("desperate", "calm"):
        np.testing.assert_allclose([row["scores"][name] for row in rows], trace["scores"][name][9:], atol=2e-3)
        own = np.array(trace["scores"][name][9:])
        for key, value in (("mean", own.mean()), ("peak", own.max()), ("last", own[-1])):
            assert last["summary"][key][name] == pytest.approx(value, abs=2e-3)
        assert first["prompt"][4]["scores"][name] == pytest.approx(trace["scores"][name][4], abs=2e-3)
    assert len(last["summary"]["top"]) == 5 and last["finish"] == "length" and last["alerts"] == []
    every = streamed(server, {**body, "readings": {"emotions": "all", "every": 5}})
    scored = [chunk["affectlens"] for chunk in every if "scores" in chunk.get("affectlens", {})]
    assert [row["token"] for row in scored] == [9, 14, 19, 24] and len(scored[0]["scores"]) == 12
    plain = server.chat(readings=True)
    assert len(plain["affectlens"]["tokens"]) == 20 and set(plain["affectlens"]["summary"]["mean"]) == set(server.service.watched)


def test_inner_against_visible_where_it_is_asked_for(server: Running) -> None:
    told = server.chat(readings={"emotions": ["calm"], "visible": True}, max_tokens=20)["affectlens"]
    trace = server.client.get(f"/v1/traces/{told['trace']}").json()
    for key in ("visible", "gap"):
        own = np.array(trace[key]["calm"][10:], dtype=float)
        assert np.isfinite(own).all() and told["summary"][key]["calm"] == pytest.approx(own.mean(), abs=2e-3)
    plain = server.chat(readings={"emotions": ["calm"]}, max_tokens=20)["affectlens"]
    assert "gap" not in plain["summary"] and plain["summary"]["mean"] == told["summary"]["mean"]
    messages = [*HI, {"role": "assistant", "content": "the calm sea"}]
    assert "gap" in server.client.post("/v1/score", json={"messages": messages, "visible": True}).json()
    assert "gap" not in server.client.post("/v1/score", json={"messages": messages}).json()


def streamed(server: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends with [DONE]."""
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_compare_gives_both_replies(server: Running) -> None:
    asked = {"emotion_bias": {"sad": 0.15}, "compare": True}
    both = server.chat(**asked)
    steered, plain = both["choices"]
    assert steered["message"]["content"] == alone(0.15 * toy_vectors()["sad"]) and plain["message"]["content"] == alone()
    assert plain["affectlens"]["unsteered"] and "unsteered" not in steered["affectlens"]
    assert plain["affectlens"]["steering"]["used"] == {} and both["affectlens"]["steering"]["used"] == {"sad": 0.15}
    texts = {0: "", 1: ""}
    for chunk in streamed(server, {"model": "toy", "messages": HI, "max_tokens": 20, "seed": 3, "stream": True, **asked}):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
        assert bool(choice.get("affectlens", {}).get("unsteered")) == (choice["index"] == 1)
    assert texts == {0: steered["message"]["content"], 1: plain["message"]["content"]}
    trace = server.client.get(f"/v1/traces/{steered['affectlens']['trace']}").json()
    assert "+0.15 sad" in trace["steering"] and trace["request"]["steering"] == {"sad": 0.15} and "steered" in trace
    assert "steered" not in server.client.get(f"/v1/traces/{plain['affectlens']['trace']}").json()


def test_callers_with_different_steering_at_once(server: Running) -> None:
    """Each gets what it would get alone, word for word, whoever else is there."""
    vectors = toy_vectors()
    biases: list[dict[str, float]] = [{}, {"calm": 0.15}, {"sad": 0.15}, {"angry": -0.1, "happy": 0.05}]

    def ask(i: int) -> tuple[str, str]:
        bias = biases[i % len(biases)]
        made = server.chat(emotion_bias=bias, seed=i, readings={"emotions": "all"})
        steering = Steering()
        for name, strength in bias.items():
            steering = steering + strength * vectors[name]
        return made["choices"][0]["message"]["content"], alone(steering, seed=i)

    with ThreadPoolExecutor(12) as pool:
        for said, expected in pool.map(ask, range(24)):
            assert said == expected
    assert server.idle()


def test_rules_of_a_request(server: Running) -> None:
    rules = ["calm > -50 for 3 tokens", {"when": "sad > -50 for 6 tokens", "actions": [{"do": "stop", "message": " [no]"}]}]
    body = {"model": "toy", "messages": HI, "max_tokens": 20, "seed": 3, "stream": True, "rules": rules}
    chunks = streamed(server, body)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text.endswith(" [no]") and alone().startswith(text.removesuffix(" [no]"))
    fired = [alert["rule"] for chunk in chunks for alert in chunk.get("affectlens", {}).get("alerts", [])]
    assert fired[:2] == ["calm > -50 for 3 tokens", "sad > -50 for 6 tokens"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter" and chunks[-1]["affectlens"]["finish"] == "stopped"
    alerts = server.client.get("/v1/alerts", params={"rule": "sad > -50 for 6 tokens"}).json()["data"]
    assert alerts[0]["trace"] == chunks[-1]["affectlens"]["trace"] and alerts[0]["state"] == "open"
    seen = server.post(f"/v1/alerts/{alerts[0]['id']}/acknowledge", {"note": "it was a test"}).json()
    assert seen["state"] == "acknowledged" and seen["note"] == "it was a test"
    assert not server.client.get("/v1/alerts", params={"rule": "sad > -50 for 6 tokens", "state": "open"}).json()["data"]
    refused(server.post("/v1/alerts/999999/acknowledge", {}), 404)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"emotion_bias": {"clam": 0.1}}, "did you mean calm", "emotion_bias"),
    ({"emotion_bias": {"calm": 1e9}}, "less than or equal to 10", "emotion_bias.calm"),
    ({"emotion_bias": ["calm"]}, "dictionary", "emotion_bias"),
    ({"readings": {"emotions": ["serene"]}}, "unknown concept", "readings"),
    ({"readings": {"emotion": ["calm"]}}, "did you mean emotions", "readings.emotion"),
    ({"readings": {"every": 0}}, "greater than or equal to 1", "readings.every"),
    ({"rules": ["desparate > 3"]}, "column 1", "rules"),
    ({"rules": ["desperate > 3 for 20"]}, "column 21\n  desperate > 3 for 20\n", "rules"),
    ({"rules": ["system.calm > 1"]}, "no words of 'system'", "rules"),
    (
        {"rules": [{"when": "calm > 1", "actions": [{"do": "webhook", "url": "http://x", "secret": "S"}]}]},
        "webhook",
        "rules.0.actions.0",
    ),
    ({"rules": [{"when": "calm > 1", "actions": [{"do": "steer", "add": {"sad": 0.5}}]}]}, "sad = 0.15", "rules"),
    ({"compare": True, "n": 2}, "leave n out", "compare"),
    ({"emotion_bais": {}}, "did you mean emotion_bias", "emotion_bais"),
    ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported", "logit_bias"),
    ({"store": True}, "store is not supported", "store"),
    ({"temperature": 3}, "less than or equal to 2", "temperature"),
    ({"temperature": "1"}, "valid number", "temperature"),
    ({"n": True}, "valid integer", "n"),
    ({"n": 100}, "more than the 16", "n"),
    ({"max_tokens": 9999}, "more than the 4096", "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "give one of the two", "max_tokens"),
    ({"top_logprobs": 3}, "set logprobs to true", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20", "top_logprobs"),
    ({"stop": ["a"] * 5}, "4 at most", "stop"),
    ({"stop": ""}, "empty string", "stop"),
    ({"stream_options": {"include_usage": True}}, "set stream", "stream_options"),
    ({"messages": []}, "at least 1 item", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer'", "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text'", "messages.0.content.0.type"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "end with a turn of the user", "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "name is not supported", "messages.0.name"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "unicode", "messages.0.content"),
]


@pytest.mark.parametrize(
    ("change", "said", "param"), BAD, ids=[f"{i} {next(iter(change))}" for i, (change, _, _) in enumerate(BAD)]
)
def test_what_cannot_be_done_is_refused_by_name(server: Running, change: dict[str, Any], said: str, param: str) -> None:
    body = {"model": "toy", "messages": HI, **change}
    for stream in (False, True):
        answer = server.client.post(
            "/v1/chat/completions",
            content=json.dumps({**body, **({"stream": True} if stream and "stream_options" not in change else {})}),
            headers={"Content-Type": "application/json"},
        )
        error = refused(answer)
        assert said in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert server.idle()


def test_what_changes_nothing_is_taken(server: Running) -> None:
    plain = server.chat()
    for more in (
        {"tools": [], "tool_choice": "auto", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1},
        {"response_format": {"type": "text"}, "store": False, "user": "me", "metadata": {"a": "b"}, "service_tier": "auto"},
        {"emotion_bias": None, "readings": None, "rules": None, "stop": None, "parallel_tool_calls": True},
    ):
        assert server.chat(**more)["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "the old door"}]}]
    assert server.chat(messages=parts)["choices"][0]["message"]["content"] == alone()
    system = [
        {"role": "developer", "content": "calm"},
        {"role": "user", "content": "the old"},
        {"role": "user", "content": "door"},
    ]
    said = ENGINE.generate([(("system", "calm"), ("user", "the old\n\ndoor"))], sampling=Sampling(max_tokens=20, seed=3))[0]
    assert server.chat(messages=system)["choices"][0]["message"]["content"] == said


def test_legacy_completions_refuse_what_they_cannot_do(server: Running) -> None:
    for change, param in (
        ({"prompt": [1, 2, 3]}, "prompt"), ({"prompt": []}, "prompt"), ({"best_of": 3}, "best_of"), ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"), ({"logprobs": 6}, "logprobs"), ({"prompt": ""}, None),
    ):  # fmt: skip
        error = refused(server.post("/v1/completions", {"model": "toy", "prompt": "the sea", **change}))
        assert error["param"] is not None and error["param"].split(".")[0] == param if param else "empty" in error["message"]


def test_without_a_length_a_reply_has_the_room_that_there_is(tmp_path: Path) -> None:
    with serving(tmp_path, max_tokens=30) as server:
        made = server.chat(max_tokens=None, messages=[{"role": "user", "content": "sea " * 2025}])
        assert made["usage"]["prompt_tokens"] + made["usage"]["completion_tokens"] <= 2048
        assert server.chat(max_tokens=None)["usage"]["completion_tokens"] <= 30


def test_scores(server: Running) -> None:
    found = server.post("/v1/score", {"text": "she begged and pleaded, gasping", "emotions": ["desperate"]}).json()
    assert (
        list(found["scores"]) == ["desperate"]
        and found["unit"] == "z"
        and len(found["tokens"]) == len(found["scores"]["desperate"])
    )
    talk = {"messages": [{"role": "user", "content": "the door"}, {"role": "assistant", "content": "begged pleaded"}]}
    found = server.post("/v1/score", talk).json()
    assert found["roles"].count("assistant") == 2 and len(found["scores"]) == 12
    assert server.client.get(f"/v1/traces/{found['id']}").json()["kind"] == "score"
    assert "did you mean calm" in refused(server.post("/v1/score", {"text": "x", "emotions": ["clam"]}))["message"]
    refused(server.post("/v1/score", {}))
    refused(server.post("/v1/score", {"text": "x", "messages": []}))
    refused(server.post("/v1/score", {"messages": [{"role": "user", "content": "  "}]}))


def test_emotions_models_and_readiness(server: Running) -> None:
    listed = server.client.get("/v1/emotions").json()
    rows = {row["id"]: row for row in listed["data"]}
    assert listed["layer"] == 4 and listed["steer_layer"] == 3 and listed["unit"] == "z" and not listed["allow_unsafe"]
    assert rows["calm"]["safe"] == [-0.15, 0.15] and rows["calm"]["watched"] and rows["happy"]["rated"]
    assert all(-1 <= row["valence"] <= 1 and -1 <= row["arousal"] <= 1 for row in rows.values())
    one = server.client.get("/v1/emotions/calm").json()
    assert one["neighbours"][0][1] >= one["neighbours"][-1][1] and " calm" in one["lens"]["up"]
    server.chat(messages=[{"role": "user", "content": "begged pleaded clawed"}])
    assert server.client.get("/v1/emotions/desperate").json()["passages"][0]["words"]
    assert "did you mean calm" in refused(server.client.get("/v1/emotions/clam"), 404)["message"]
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {
        "ready": True,
        "model": True,
        "store": True,
        "accepting": True,
        "waiting": 0,
        "live": 0,
    }
    assert "affectlens_requests_total" in server.client.get("/metrics").text
    refused(server.client.get("/v1/models/other"), 404)
    refused(server.client.get("/v2/anything"), 404)
    refused(server.client.get("/v1/chat/completions"), 405)


def test_traces_are_searched_and_exported(server: Running) -> None:
    made = server.chat(messages=[{"role": "user", "content": "a harbour of anchors"}], max_tokens=12)
    id = made["affectlens"]["trace"]
    found = server.client.get("/v1/traces", params={"q": "harbour of ANCHORS"}).json()
    assert [row["id"] for row in found["data"]] == [id] and found["data"][0]["title"] == "a harbour of anchors"
    assert found["data"][0]["tokens"] == 12 and len(found["data"][0]["peaks"]) == 12 and found["next"] is None
    pages = server.client.get("/v1/traces", params={"limit": 1}).json()
    second = server.client.get("/v1/traces", params={"limit": 1, "after": pages["next"]}).json()
    assert second["data"][0]["id"] != pages["data"][0]["id"]
    one = server.client.get(f"/v1/traces/{id}").json()
    assert one["text"] == made["choices"][0]["message"]["content"] and one["usage"]["completion_tokens"] == 12
    assert one["request"]["sampling"]["seed"] == 3 and one["finish"] == "length" and one["timing"]["total"] > 0
    page = server.client.get(f"/v1/traces/{id}/page")
    assert page.text.startswith("<!doctype html>") and "sandbox" in page.headers["content-security-policy"]
    lines = server.client.get("/v1/traces/export", params={"format": "langfuse"}).text.splitlines()
    assert {json.loads(line)["type"] for line in lines} == {"trace-create", "score-create"}
    kept = server.client.get("/v1/traces/export").text.splitlines()
    assert id in {json.loads(line)["id"] for line in kept}
    refused(server.client.get("/v1/traces/chatcmpl-00"), 404)
    refused(server.client.get("/v1/traces/..%2F..%2Fetc"), 404)
    for query in ({"emotion": "clam"}, {"limit": 0}, {"after": "x"}, {"since": "never"}, {"above": "nan"}, {"words": "door"}):
        refused(server.client.get("/v1/traces", params=query))  # type: ignore[arg-type]


def test_rules_are_kept_tried_muted_and_forgotten(tmp_path: Path) -> None:
    file = [
        Policy(parse("standing: desperate > 90"), (Stop("no"),)),
        Policy(parse("quiet: calm > -50 for 2 tokens"), (Log(str(tmp_path / "log.jsonl")),)),
    ]
    with serving(tmp_path, rules=file) as server:
        rows = server.client.get("/v1/rules").json()["data"]
        assert [(row["id"], row["name"], row["source"], row["armed"]) for row in rows] == [
            ("file-1", "standing", "file", True), ("file-2", "quiet", "file", True),
        ]  # fmt: skip
        assert rows[1]["actions"] == [{"do": "log"}], "where alarms are logged is nobody's business"
        made = server.chat()
        assert [alert["rule"] for alert in made["affectlens"]["alerts"]] == ["quiet"]
        assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["alert"]["rule"] == "quiet"
        tried = server.post("/v1/rules/try", {"text": "calm > -50 for 4 tokens"}).json()
        assert tried["neutral"]["per_thousand"]["value"] == 1000 and tried["neutral"]["turns"] == 40
        assert tried["history"]["alarmed"] == tried["history"]["turns"] == 1
        assert tried["passages"][0]["trace"] == made["affectlens"]["trace"] and tried["passages"][0]["words"]
        assert "column" in refused(server.post("/v1/rules/try", {"text": "calm >"}))["message"]
        own = server.post("/v1/rules", {"text": "mine: calm > -50 for 4 tokens", "armed": True}).json()
        assert own["source"] == "dashboard" and own["armed"] and own["expected"] is None
        assert {alert["rule"] for alert in server.chat()["affectlens"]["alerts"]} == {"quiet", "mine"}
        alert = server.client.get("/v1/alerts").json()["data"][0]
        assert alert["rule"] in ("quiet", "mine")
        assert server.post(f"/v1/rules/{own['id']}/mute", {"minutes": 5}).json()["muted_until"]
        assert server.post("/v1/rules/file-2/mute", {"minutes": 5}).json()["muted_until"]
        assert server.chat()["affectlens"]["alerts"] == []
        assert server.post(f"/v1/rules/{own['id']}/mute", {"minutes": 0}).json()["muted_until"] is None
        assert [each["rule"] for each in server.chat()["affectlens"]["alerts"]] == ["mine"]
        # Disarmed and armed again, as a switch does it: without its actions being named.
        acting = {"text": own["text"], "actions": [{"do": "stop", "message": "!"}], "armed": True}
        assert server.post("/v1/rules", acting).json()["id"] == own["id"]
        assert server.chat()["affectlens"]["finish"] == "stopped"
        off = server.post("/v1/rules", {"text": own["text"], "armed": False}).json()
        assert not off["armed"] and off["actions"] == [{"do": "stop", "message": "!"}]
        assert server.chat()["affectlens"]["alerts"] == []
        assert "not muted" in refused(server.post("/v1/rules/file-1/mute", {"minutes": 5}), 409)["message"]
        assert "rules file" in refused(server.client.delete("/v1/rules/file-1"), 409)["message"]
        assert "a name of its own" in refused(server.post("/v1/rules", {"text": "quiet: sad > 1"}), 409)["message"]
        outside = {"text": "sad > 1", "actions": [{"do": "steer", "add": {"calm": 0.5}}]}
        assert "outside the safe range" in refused(server.post("/v1/rules", outside))["message"]
        for action in ({"do": "log", "file": "x"}, {"do": "webhook", "url": "http://x", "secret": "S"}, {"do": "call"}):
            refused(server.post("/v1/rules", {"text": "sad > 1", "actions": [action]}))
        assert server.client.delete(f"/v1/rules/{own['id']}").json()["deleted"]
        refused(server.client.delete(f"/v1/rules/{own['id']}"), 404)
        assert len(server.client.get("/v1/rules").json()["data"]) == 2


def test_rules_steer_within_the_safe_range(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        rule = {"when": "user.calm > -50", "actions": [{"do": "steer", "add": {"sad": 0.15}}]}
        made = server.chat(rules=[rule])
        assert made["choices"][0]["message"]["content"] != alone()
        trace = server.client.get(f"/v1/traces/{made['affectlens']['trace']}").json()
        assert "+0.15 sad" in trace["steering"] and trace["request"]["rules"][0]["actions"][0]["add"] == {"sad": 0.15}
    loud = [Policy(parse("user.calm > -50"), (Steer((("sad", 0.9),)),))]
    with serving(tmp_path / "loud", rules=loud) as server:
        assert "+0.9 sad" in server.client.get(f"/v1/traces/{server.chat()['affectlens']['trace']}").json()["steering"], (
            "the file may"
        )


def test_without_a_calibration_nothing_is_dialled(tmp_path: Path) -> None:
    with serving(tmp_path, vectors=uncalibrated()) as server:
        error = refused(server.post("/v1/chat/completions", {"model": "toy", "messages": HI, "emotion_bias": {"calm": 0.01}}))
        assert "affectlens calibrate" in error["message"] and error["param"] == "emotion_bias"
        assert server.chat(emotion_bias={"calm": 0})["affectlens"]["steering"]["used"] == {"calm": 0}
        assert server.client.get("/v1/emotions").json()["data"][0]["safe"] is None
    with serving(tmp_path / "open", vectors=uncalibrated(), allow_unsafe=True) as server:
        assert server.chat(emotion_bias={"calm": 2.5})["affectlens"]["steering"] == {
            "asked": {"calm": 2.5},
            "used": {"calm": 2.5},
            "clamped": {},
        }
        assert server.client.get("/v1/emotions").json()["allow_unsafe"]


def test_studies_of_finished_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "broken").mkdir(parents=True)
    (runs / "broken" / "report.json").write_text("{")
    figure = {"id": "geometry-plane", "title": "A", "caption": "B", "plotly": {"data": [], "layout": {}}}
    Report("Emotions in toy", model={"id": "toy"}, figures=[figure], provenance={"date": "2026-11-01"}).save(runs / "first")  # type: ignore[list-item]
    with serving(tmp_path, runs=runs) as server:
        (row,) = server.client.get("/v1/studies").json()["data"]
        assert row["id"] == "first" and row["model"] == "toy" and row["created"] == "2026-11-01" and row["findings"] == 0
        one = server.client.get("/v1/studies/first").json()
        assert one["figures"] == [{key: figure[key] for key in ("id", "title", "caption")}] and one["summary"]
        assert server.client.get("/v1/studies/first/figures/geometry-plane").json() == figure["plotly"]
        for path in ("/v1/studies/none", "/v1/studies/broken2", "/v1/studies/first/figures/none", "/v1/studies/..%2Ffirst"):
            refused(server.client.get(path), 404)


def test_events_tell_what_happens(server: Running) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    open_, done = threading.Event(), threading.Event()

    def follow() -> None:
        with httpx.stream("GET", f"{server.url}/v1/events", timeout=30) as answer:
            event = ""
            for line in answer.iter_lines():
                if line.startswith(":"):
                    open_.set()
                elif line.startswith("event: "):
                    event = line[7:]
                elif line.startswith("data: "):
                    seen.append((event, json.loads(line[6:])))
                    if event == "done":
                        break
        done.set()

    reader = threading.Thread(target=follow)
    reader.start()
    assert open_.wait(10)
    made = server.chat(rules=["calm > -50 for 3 tokens"], max_tokens=6)
    assert done.wait(10)
    reader.join(10)
    assert [event for event, _ in seen] == ["reply", "token", "token", "token", "alert", "token", "token", "token", "done"]
    assert {data["trace"] for _, data in seen} == {made["affectlens"]["trace"]} and {data["key"] for _, data in seen} == {""}
    assert "".join(data["text"] for event, data in seen if event == "token") == made["choices"][0]["message"]["content"]
    assert seen[0][1]["model"] == "toy" and set(seen[1][1]["scores"]) == set(server.service.watched)
    assert seen[-1][1]["finish"] == "length" and seen[-1][1]["tokens"] == 6 and seen[4][1]["rule"] == "calm > -50 for 3 tokens"


def test_records_can_be_replayed(server: Running) -> None:
    from affectlens.server.replay import replay

    made = server.chat(emotion_bias={"sad": 0.1}, rules=["calm > -50 for 3 tokens"], seed=9)
    record = server.service.store.get(made["affectlens"]["trace"])
    assert record is not None and record.key == "" and record.company >= 1
    assert replay(record, ENGINE, toy_vectors(), baseline=toy_baseline()).verdict == "same"


def test_the_openapi_document(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    assert set(document["paths"]) >= {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/emotions", "/v1/emotions/{name}", "/v1/rules",
        "/v1/rules/try", "/v1/rules/{id}", "/v1/rules/{id}/mute", "/v1/alerts", "/v1/alerts/{id}/acknowledge",
        "/v1/traces", "/v1/traces/{id}", "/v1/traces/{id}/page", "/v1/traces/export", "/v1/score", "/v1/events",
        "/v1/studies", "/v1/studies/{id}", "/v1/studies/{id}/figures/{figure}", "/health", "/ready", "/metrics",
    }  # fmt: skip
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"] and operation["summary"]
    chat = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"emotion_bias", "readings", "rules", "compare"} <= set(chat) and "Error" in document["components"]["schemas"]


def test_keys_are_hashed_in_their_file(tmp_path: Path) -> None:
    from affectlens.server.keys import Key

    with serving(tmp_path, keys=(Key("alice", digest("al-one")), Key("bob", digest("al-two"), 2))) as server:
        assert refused(server.client.get("/v1/models"), 401)["code"] == "invalid_api_key"
        for wrong in (
            "Bearer al-three",
            "Bearer Al-one",
            f"Bearer {digest('al-one')}",
            "Basic al-one",
            "al-one",
            "Bearer \u00e9".encode(),
        ):
            assert "al-one" not in refused(server.client.get("/v1/models", headers={"Authorization": wrong}), 401)["message"]
        ours = openai.OpenAI(base_url=f"{server.url}/v1", api_key="al-one", max_retries=0)
        made = ours.chat.completions.create(model="toy", messages=HI, max_tokens=3)  # type: ignore[arg-type]
        record = server.service.store.get(made.id)
        assert record is not None and record.key == "alice"
        theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="al-two", max_retries=0)
        assert [theirs.models.list() and None for _ in range(2)] == [None, None]
        with pytest.raises(openai.RateLimitError, match="2 requests a minute") as error:
            theirs.models.list()
        assert 0 < int(error.value.response.headers["retry-after"]) <= 30
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200
        for path in ("/metrics", "/openapi.json", "/v1/events", "/v1/traces"):
            refused(server.client.get(path), 401)
