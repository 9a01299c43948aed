"""The plug-in for ``vllm serve``, with an application and workers in vLLM's place: what it asks, and makes of the answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from affectlens.engine import Steering
from affectlens.engines.toy import ToyEngine
from affectlens.engines.vllm_orders import NAME, Findings, Inbox, Order, Seen, owner_of
from affectlens.errors import EngineError, ModelSupportError
from affectlens.vllm_serve import PATHS, VARIABLE, Emotions, Panel
from served import toy_baseline, toy_vectors

IDS = [5, 6, 7]


class Tokenizer:
    bos_token_id = 1

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + i) for i in ids)


class Workers:
    """In place of vLLM's engine client: keeps orders, and finds something at each generated token."""

    vllm_config = model_config = None

    def __init__(self) -> None:
        self.inbox, self.orders, self.forgotten = Inbox(), list[Order](), list[str]()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "affectlens_expect":
            owner, *packed = args
            self.orders += self.inbox.unpack(*packed)
            assert owner_of(self.orders[-1].key) == owner
        elif method == "affectlens_forget":
            self.forgotten += args[0]
        else:
            assert method == "affectlens_take" and {owner_of(order.key) for order in self.orders} == set(args)
            found = Findings()
            for order in self.orders:
                for n, noted in enumerate(order.noted):
                    onto = noted.readout.onto
                    assert onto is not None
                    values = np.random.default_rng(0).normal(size=(1, len(IDS) - 1, onto.shape[1])).astype(np.float32)
                    found.seen.append(Seen(order.key, n, 9 + np.arange(len(IDS) - 1), values, np.ones(values.shape[:2], "f") * 9))
            return [found.pack()]
        return [None]


class VLLM(Starlette):
    """In place of vLLM's application: says the same to everybody who has the key, and remembers what it was asked."""

    def __init__(self, workers: Workers) -> None:
        self.bodies: list[dict[str, Any]] = []
        routes = [Route(path, self.answer, methods=["POST"]) for path in PATHS]
        super().__init__(routes=routes, middleware=[Middleware(Emotions), Middleware(Door)])
        self.state.engine_client = workers

    async def answer(self, request: HTTPRequest) -> Response:
        body = await request.json()
        self.bodies.append(body)
        choice = {"index": 0, "token_ids": IDS} if body.get("return_token_ids") else {"index": 0}
        if not body.get("stream"):
            return JSONResponse({"id": "x", "choices": [choice]})

        async def events() -> AsyncIterator[bytes]:
            for event in (json.dumps({"id": "x", "choices": [choice]}), "[DONE]"):
                raw = f"data: {event}\n\n".encode()
                yield raw[:7]  # events may come in pieces
                yield raw[7:]

        return StreamingResponse(events(), media_type="text/event-stream")


class Door:
    """As vLLM checks keys: in a middleware that is behind ours."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") == b"Bearer wrong":
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Served:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vectors = toy_vectors()
        vectors.save(folder)
        toy_baseline().save(folder / f"baseline-{vectors.layer}.json")
        monkeypatch.setenv(VARIABLE, str(folder))
        self.panel, self.workers = Panel(str(folder)), Workers()
        self.app = VLLM(self.workers)
        self.model: Any = ToyEngine().info
        monkeypatch.setattr("affectlens.engines.vllm_host._try", self._tried)

    def _tried(self, bridge: Any) -> Any:
        if isinstance(self.model, Exception):
            raise self.model
        return None, Tokenizer(), self.model

    def post(self, body: Any, path: str = "/v1/chat/completions", key: str = "right") -> tuple[int, Any]:
        """The status and what came back: JSON, or the events of a stream."""
        with TestClient(self.app) as client:
            came = client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
        if came.content.startswith(b"data:"):
            return came.status_code, [event[6:] for event in came.text.split("\n\n") if event]
        return came.status_code, came.json()


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
    dials = served.panel.dials
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


def test_another_model_is_refused(served: Served) -> None:
    served.model = replace(served.model, fingerprint="another")
    status, answer = served.post({**ASKED, "emotion_bias": {"calm": 0.1}})
    assert status == 400 and "fingerprint" in answer["error"]["message"] and not served.workers.orders


def test_a_model_that_failed_its_checks_is_refused(served: Served) -> None:
    served.model = ModelSupportError("a tap does not fire: open it with hf/")
    for _ in range(2):
        status, answer = served.post({**ASKED, "emotion_bias": {"calm": 0.1}})
        assert status == 400 and "does not fire" in answer["error"]["message"] and not served.app.bodies


@pytest.mark.parametrize("given", [{}, {"emotion_bias": {"calm": 0.1}}, {"emotion_bias": {"clam": 0.1}}])
def test_nothing_is_done_for_whom_vllm_does_not_let_in(served: Served, given: dict[str, Any]) -> None:
    assert served.post({**ASKED, **given}, key="wrong") == (401, {"error": "Unauthorized"})
    assert not served.workers.orders and not served.app.bodies


def test_vectors_need_their_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_vectors().save(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(EngineError, match="affectlens baseline"):
        Emotions(None)


def test_without_vectors_dials_are_refused_and_the_rest_is_vllm(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    monkeypatch.delenv(VARIABLE)
    served.app = VLLM(served.workers)
    status, answer = served.post({**ASKED, "readings": True})
    assert status == 400 and VARIABLE in answer["error"]["message"]
    assert served.post(ASKED)[0] == 200
