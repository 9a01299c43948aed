"""The plug-in for ``vllm serve``, with an application and workers in vLLM's place: what it asks, and makes of the answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affectlens.engine import Steering
from affectlens.engines.vllm_orders import NAME, Findings, Inbox, Order, Seen
from affectlens.errors import EngineError
from affectlens.vllm_serve import VARIABLE, Emotions
from served import toy_baseline, toy_vectors

IDS = [5, 6, 7]


class Tokenizer:
    bos_token_id = 1

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids)


class Workers:
    """In place of vLLM's engine client: keeps orders, and finds something at each generated token."""

    def __init__(self, width: int) -> None:
        self.inbox, self.orders, self.forgotten, self.width = Inbox(), list[Order](), list[str](), width

        class Config:
            model = "toy"

        self.model_config = Config()

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "affectlens_expect":
            self.orders += self.inbox.unpack(*args)
        elif method == "affectlens_forget":
            self.forgotten += args[0]
        elif method == "affectlens_take":
            found = Findings()
            for order in self.orders:
                for n, noted in enumerate(order.noted):
                    onto = noted.readout.onto
                    assert onto is not None
                    values = np.random.default_rng(0).normal(size=(1, len(IDS) - 1, onto.shape[1])).astype(np.float32)
                    found.seen.append(Seen(order.key, n, 9 + np.arange(len(IDS) - 1), values, np.ones(values.shape[:2], "f") * 9))
            return [found.pack()]
        else:
            raise AttributeError(method)
        return [None]


class App:
    """In place of vLLM's application: says the same to everybody, and remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        choice = {"index": 0, "token_ids": IDS} if body.get("return_token_ids") else {"index": 0}
        if not body.get("stream"):
            await send({"type": "http.response.body", "body": json.dumps({"id": "x", "choices": [choice]}).encode()})
            return
        for event in (json.dumps({"id": "x", "choices": [choice]}), "[DONE]"):
            raw = f"data: {event}\n\n".encode()
            await send({"type": "http.response.body", "body": raw[:7], "more_body": True})  # events may come in pieces
            await send({"type": "http.response.body", "body": raw[7:], "more_body": event != "[DONE]"})


class Served:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = toy_vectors()
        vectors.save(folder)
        toy_baseline().save(folder / f"baseline-{vectors.layer}.json")
        monkeypatch.setenv(VARIABLE, str(folder))
        monkeypatch.setattr("affectlens.engines.vllm_checkpoint.fingerprint_of", lambda name: vectors.model["fingerprint"])
        self.app, self.workers = App(), Workers(vectors.directions.shape[-1])
        self.middleware = Emotions(self.app)

    def post(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any]:
        """The status and what came back: JSON, or the events of a stream."""
        sent: list[Any] = []
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages = [{"type": "http.request", "body": raw[:5], "more_body": True}, {"type": "http.request", "body": raw[5:]}]

        class State:
            engine_client = self.workers

        class Application:
            state = State()

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "app": Application()}
        asyncio.run(self.middleware(scope, receive, send))
        came = b"".join(message.get("body", b"") for message in sent)
        length = dict(sent[0]["headers"]).get(b"content-length")
        if came.startswith(b"data:"):
            return sent[0]["status"], [event[6:] for event in came.decode().split("\n\n") if event]
        assert length is None or int(length) == len(came) or not self.workers.orders
        return sent[0]["status"], json.loads(came)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(tmp_path, monkeypatch)


ASKED = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}]}


def test_what_is_not_ours_goes_by_untouched(served: Served) -> None:
    served.post(ASKED)
    assert served.app.bodies == [ASKED] and not served.workers.orders


@pytest.mark.parametrize("form", ["text", "object", "beside"])
def test_a_dial_becomes_an_order_a_salt_and_a_name(served: Served, form: str) -> None:
    bias = {"calm": 0.1, "desperate": -0.05}
    given: dict[str, Any] = {"emotion_bias": bias} if form == "beside" else {
        "vllm_xargs": {"emotion_bias": json.dumps(bias) if form == "text" else bias, "own": 3}
    }  # fmt: skip
    status, answer = served.post({**ASKED, **given})
    (order,), (body,) = served.workers.orders, served.app.bodies
    dials = served.middleware.dials
    assert status == 200 and order.steering == dials.steering(dials.bias(bias)) and order.n_prompt == -1 and order.sink == 1
    assert body["vllm_xargs"][NAME] == order.key and "emotion_bias" not in json.dumps(body) and body["cache_salt"].strip()
    assert form == "beside" or body["vllm_xargs"]["own"] == 3
    assert answer["affectlens"]["steering"]["used"] == bias and served.workers.forgotten == [order.key]
    served.post({**ASKED, "emotion_bias": {"calm": -0.1}})
    assert served.app.bodies[1]["cache_salt"] != body["cache_salt"]


@pytest.mark.parametrize("stream", [False, True])
def test_readings_come_with_the_reply(served: Served, stream: bool) -> None:
    status, answer = served.post({**ASKED, "stream": stream, "vllm_xargs": {"readings": {"emotions": ["calm"]}}})
    if stream:
        *_, last, done = answer
        assert done == "[DONE]" and "token_ids" not in "".join(answer)
        answer = json.loads(last)
        assert answer["choices"] == [] and answer["id"] == "x"
    ours = answer["affectlens"]
    assert status == 200 and ours["unit"] == "z" and ours["emotions"] == ["calm"]
    # The last token is drawn and not run, so nothing is read of it.
    assert [(row["token"], row["text"]) for row in ours["tokens"]] == [(0, "f"), (1, "g")]
    assert all(set(row["scores"]) == {"calm"} for row in ours["tokens"]) and "token_ids" not in json.dumps(answer["choices"])
    assert served.workers.orders[0].steering == Steering() and "cache_salt" not in served.app.bodies[0]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"emotion_bias": {"clam": 0.1}}, "emotion_bias", "did you mean calm"),
        ({"emotion_bias": {"calm": "much"}}, "emotion_bias.calm", "number"),
        ({"emotion_bias": {"calm": 99}}, "emotion_bias.calm", "less than or equal"),
        ({"readings": {"emotion": ["calm"]}}, "readings.emotion", "unknown field"),
        ({"readings": {"emotions": ["clam"]}}, "readings", "did you mean calm"),
        ({"readings": {"prompt": True}}, "readings", "affectlens serve"),
        ({"readings": True, "n": 2}, "n", "affectlens serve"),
    ],
)
def test_what_is_wrong_is_said_as_our_own_server_says_it(served: Served, body: dict[str, Any], param: str, said: str) -> None:
    status, answer = served.post({**ASKED, **body})
    assert status == 400 and answer["error"]["param"] == param and said in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error" and not served.app.bodies and not served.workers.orders


def test_another_model_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affectlens.engines.vllm_checkpoint.fingerprint_of", lambda name: "another")
    status, answer = served.post({**ASKED, "emotion_bias": {"calm": 0.1}})
    assert status == 400 and "other weights" in answer["error"]["message"]


def test_workers_without_taps_are_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        raise NotImplementedError(method)

    monkeypatch.setattr(served.workers, "collective_rpc", nothing)
    status, answer = served.post({**ASKED, "emotion_bias": {"calm": 0.1}})
    assert status == 400 and "--worker-cls" in answer["error"]["message"]


def test_it_starts_with_vectors_and_a_baseline_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(EngineError, match=VARIABLE):
        Emotions(None)
    toy_vectors().save(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(EngineError, match="affectlens baseline"):
        Emotions(None)
