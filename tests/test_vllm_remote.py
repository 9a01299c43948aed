"""A server's model as an engine, with the toy in vLLM's place: what goes over HTTP, and what is said when something is wrong."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware

from affectlens.engine import Readout, Request, Result, Sampling, Where, open_engine
from affectlens.engines import vllm_host, vllm_remote
from affectlens.engines.toy import ToyEngine
from affectlens.engines.vllm_remote import PREFIX, RemoteEngine
from affectlens.errors import AffectlensError, Busy, EngineError, MismatchError, ModelSupportError
from affectlens.vllm_serve import VARIABLE, Emotions
from served import toy_vectors
from test_vllm_serve import Door

KEY = "right"


class Guests:
    """In place of the guests of a server: the toy, and who has come and gone."""

    def __init__(self) -> None:
        self.toy, self.came, self.left, self.told = ToyEngine(), 0, 0, 0
        self.fails = False
        self.tried: Exception | None = None

    def __call__(self, bridge: Any, tokenizer: Any, source: Any, *, info: Any) -> ToyEngine:
        self.came += 1
        guests = self

        class Guest(ToyEngine):
            def run(self, requests: Any) -> Iterator[Result]:
                if guests.fails:
                    raise RuntimeError("a fault of ours")
                for result in super().run(requests):
                    while not bridge._outputs.empty():  # as a step does
                        raise bridge._outputs.get()
                    guests.told += 1
                    yield result
                    if not result.done:
                        time.sleep(0.002)

            def close(self) -> None:
                guests.left += 1

        return Guest()

    def tries(self, bridge: Any) -> Any:
        if self.tried:
            raise self.tried
        return None, None, self.toy.info


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    found = Guests()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(vllm_host, "Guest", found)
    monkeypatch.setattr(vllm_host, "_try", found.tries)
    return found


@pytest.fixture
def url(guests: Guests) -> Iterator[str]:
    class Client:
        vllm_config = model_config = None

    app = Starlette(middleware=[Middleware(Emotions), Middleware(Door)])
    app.state.engine_client = Client()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def engine(url: str) -> Iterator[RemoteEngine]:
    with open_engine(f"vllm/{url}/v1/", api_key=KEY) as engine:
        assert isinstance(engine, RemoteEngine)
        yield engine


def mixed() -> list[Request]:
    vectors = toy_vectors()
    layer = vectors.layer
    onto = vectors.directions[vectors.layers.index(layer)][None]
    readouts = (Readout((layer,), Where(), "none", onto), Readout((0, layer), Where("response"), "mean"))
    sampling = Sampling(max_tokens=6, seed=4, logprobs=2)
    return [
        Request("the calm sea", sampling=sampling, steering=0.1 * vectors["calm"], readouts=readouts),
        Request((("user", "the old door"),), choices=(" opens", " and closes"), readouts=readouts[:1]),
        Request("the rain", sampling=sampling, stream=True, readouts=readouts),
        Request("nothing is asked of it"),
    ]


def test_it_is_the_engine_of_the_server(engine: RemoteEngine, guests: Guests) -> None:
    toy = guests.toy
    assert engine.info == toy.info and list(engine.vocabulary) == list(toy.vocabulary)
    for one, other in zip(engine.run(mixed()), toy.run(mixed()), strict=True):
        assert (one.text, one.layout, one.finish, one.done) == (other.text, other.layout, other.finish, other.done)
        assert (one.choice_logprobs, one.logprobs) == (other.choice_logprobs, other.logprobs)
        for a, b in zip(one.readings, other.readings, strict=True):
            for name in ("values", "norms", "positions"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert engine.layout(mixed()[1]) == toy.layout(mixed()[1])
    x = np.random.default_rng(0).normal(size=(300, toy.info.width)).astype(np.float32)
    # Asked in parts, whose sizes decide how a product is rounded.
    np.testing.assert_allclose(engine.unembed(x), toy.unembed(x), rtol=1e-5, atol=1e-4)
    assert engine.unembed(x[:0]).shape == (0, len(toy.vocabulary))
    assert guests.came == guests.left, "nothing of a caller stays"


def test_windows_of_a_long_run(engine: RemoteEngine, guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteEngine, "window", 3)
    before = guests.came
    prompts = [f"number {i}" for i in range(8)]
    assert engine.generate(prompts, sampling=Sampling(max_tokens=2)) == guests.toy.generate(
        prompts, sampling=Sampling(max_tokens=2)
    )
    assert guests.came - before == 3


def test_who_hangs_up_is_not_worked_for(engine: RemoteEngine, guests: Guests) -> None:
    stream = engine.stream(Request("the rain", sampling=Sampling(max_tokens=2000)))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    end = time.monotonic() + 20
    while guests.left < guests.came and time.monotonic() < end:
        time.sleep(0.01)
    assert guests.left == guests.came and guests.told < 1500


def test_errors_are_those_of_the_engine(engine: RemoteEngine) -> None:
    ahead = engine.run([Request("fine"), Request("a", readouts=(Readout((99,)),))])
    with pytest.raises(EngineError, match="has layers 0 to"):
        list(ahead)
    with pytest.raises(EngineError, match="do not fit the context"):
        list(engine.run([Request("word " * 50, sampling=Sampling(max_tokens=100_000))]))


def test_a_fault_of_the_server_is_no_short_answer(engine: RemoteEngine, guests: Guests) -> None:
    guests.fails = True
    with pytest.raises(EngineError, match="in the middle of an answer"):
        list(engine.run([Request("a")]))


def test_what_is_refused_before_anything_is_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def post(what: str, **options: Any) -> httpx.Response:
        return httpx.post(f"{url}{PREFIX}{what}", **options)

    assert post("run", content=b"x", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert post("secrets", content=b"x").status_code == 404
    assert post("run", content=iter([b"x"])).status_code == 411
    assert httpx.get(f"{url}{PREFIX}run").status_code == 405
    monkeypatch.setattr(vllm_host, "MOST", 10)
    assert post("run", content=b"x" * 11).status_code == 413
    monkeypatch.setattr(vllm_host, "MOST", 2**20)
    monkeypatch.setattr(vllm_host, "AT_ONCE", 0)
    assert post("run", content=b"x").status_code == 429
    with pytest.raises(Busy, match="try again"):
        RemoteEngine(url)


@pytest.mark.parametrize("body", [b"", b"x" * 100, (2**62).to_bytes(8, "little"), b"\x02\0\0\0\0\0\0\0{}"])
def test_broken_questions_are_answered_by_an_error(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}{PREFIX}run", content=body)
    assert answer.status_code == 200 and b"FormatError" in answer.content and answer.content.endswith(bytes(8))


def test_servers_that_are_not_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="wants a key"):
        open_engine(f"vllm/{url}", api_key="wrong")
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with pytest.raises(EngineError, match="wants a key"):
        open_engine(f"vllm/{url}")
    assert open_engine(f"vllm/{url}", api_key="").info.id == "toy"
    with pytest.raises(EngineError, match="no vllm serve answers"):
        open_engine("vllm/http://127.0.0.1:9")
    with pytest.raises(EngineError, match="--middleware"):
        open_engine(f"vllm/{url}/elsewhere", api_key=KEY)
    with pytest.raises(EngineError, match="is no address"):
        open_engine("vllm/http://here:port")
    with pytest.raises(MismatchError, match="has chosen dtype"):
        open_engine(f"vllm/{url}", api_key=KEY, dtype="bfloat16")
    monkeypatch.setattr(vllm_remote, "version", lambda name: "9.9")
    with pytest.raises(MismatchError, match=r"9\.9"):
        open_engine(f"vllm/{url}", api_key=KEY)


def test_a_model_that_failed_its_checks_is_refused(guests: Guests, url: str) -> None:
    guests.tried = ModelSupportError("a tap does not fire: open it with hf/")
    with pytest.raises(AffectlensError, match="a tap does not fire"):
        open_engine(f"vllm/{url}", api_key=KEY)


def test_another_model_is_told_apart(engine: RemoteEngine, guests: Guests) -> None:
    vectors = toy_vectors()
    vectors.check(engine.info)
    with pytest.raises(MismatchError):
        vectors.check(replace(engine.info, fingerprint="another"))


# ── the bridge to vLLM's asynchronous engine ──


class Client:
    """In place of vLLM's client: says ``n`` times something, ``forever``, or fails; and keeps whom nobody follows any more."""

    vllm_config = model_config = None

    def __init__(self) -> None:
        self.ended: list[str] = []

    async def generate(self, prompt: Any, params: Any, key: str) -> AsyncIterator[SimpleNamespace]:
        try:
            if prompt == "fails":
                raise ValueError("too much\nand more")
            for i in itertools.count() if prompt == "forever" else range(prompt):
                await asyncio.sleep(0.001)
                yield SimpleNamespace(request_id=key, finished=i + 1 == params)
        finally:
            self.ended.append(key)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (method, *args)


@pytest.fixture
def bridge() -> Iterator[vllm_host.Bridge]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield vllm_host.Bridge(Client(), loop)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


def heard(bridge: vllm_host.Bridge, key: str) -> int:
    """How often something was said for a request until it was finished."""
    n = 0
    while True:
        for output in bridge.step():
            n += output.request_id == key
            if output.request_id == key and output.finished:
                return n


def test_a_bridge_is_stepped_like_an_engine_in_process(bridge: vllm_host.Bridge) -> None:
    bridge.add_request("a", "forever", 0)
    bridge.add_request("b", 5, 5)
    assert heard(bridge, "b") == 5
    assert bridge.collective_rpc("take", ("me",)) == ["take", "me"]
    client: Any = bridge._client
    bridge.abort_request(["a", "b", "nobody"])
    assert sorted(client.ended) == ["a", "b"], "when this returns vLLM knows that nobody follows"


@pytest.mark.parametrize(("prompt", "said"), [("fails", r"\(too much\)"), (2, "was not done")])
def test_what_goes_wrong_in_vllm_is_told(bridge: vllm_host.Bridge, prompt: Any, said: str) -> None:
    bridge.add_request("a", prompt, 3)
    with pytest.raises(EngineError, match=said):
        heard(bridge, "a")


def test_who_hangs_up_ends_the_run(bridge: vllm_host.Bridge) -> None:
    bridge.add_request("a", "forever", 0)
    bridge.hang_up()
    with pytest.raises(vllm_host.Gone):
        heard(bridge, "a")
    bridge.abort_request(["a"])
