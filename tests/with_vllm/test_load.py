"""``affectlens serve --engine vllm`` under a load of OpenAI's client: everybody gets what he would get alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

import served_vllm
from vllm_here import DEMO

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

DISTINCT, TIMES, AT_ONCE = 100, 5, 40

# Company decides how the sums of a matrix product are cut, so streams differ in their last bits. A score is a number of standard
# deviations, given to a thousandth: it may fall on the other side of where it is rounded, and no further.
TOLERANCE = 0.0015

SUBJECTS = (
    "the sea",
    "a locked door",
    "my keys",
    "the rain",
    "an old ship",
    "a lamp",
    "the wind",
    "two sisters",
    "the exam",
    "bread",
)
TALES = (
    "",
    "It was late, and nobody had slept. ",
    "The ferry leaves the harbour at nine, and the crossing takes about forty minutes when the wind is low. " * 4,
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    served_vllm.saved(folder / "vectors")
    with served_vllm.running(served_vllm.affectlens_serve(folder / "vectors"), folder / "log") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)


def asked(i: int) -> dict[str, Any]:
    """The i-th request; no two are equal: plain and steered, read and not, short and long, in one piece and as a stream."""
    extra: dict[str, Any] = {}
    if i % 4:
        bias = {served_vllm.NAMES[i % 3]: round(0.05 * (1 + i % 5) * (-1) ** i, 2)}
        if i % 4 == 3:
            bias[served_vllm.NAMES[(i + 1) % 3]] = 0.1
        extra["emotion_bias"] = bias
    if i % 2:
        extra["readings"] = {"emotions": "all"} if i % 3 else True
    words = f"{TALES[i % len(TALES)]}Say something about {SUBJECTS[i // 10]}, number {i}."
    body: dict[str, Any] = {"model": DEMO, "max_tokens": 8 + i % 5, "temperature": 0, "extra_body": extra}
    if i % 7 == 0:
        return {**body, "prompt": words, "stream": i % 2 == 1}
    return {**body, "messages": [{"role": "user", "content": words}], "stream": i % 5 in (1, 2)}


@dataclass
class Said:
    """What came of a request; ``mean`` of the scores is what the untouched model reads in the reply."""

    text: str
    finish: str
    steering: Any
    tokens: list[dict[str, Any]]
    mean: dict[str, float]


def ask(client: Any, i: int) -> Said:
    body = asked(i)
    came = (client.chat.completions if "messages" in body else client.completions).create(**body)
    text, finish, ours, tokens = "", "", {}, []
    for part in came if body["stream"] else [came]:
        for choice in part.choices:
            said = choice if "prompt" in body else choice.delta if body["stream"] else choice.message
            text += (said.text if "prompt" in body else said.content) or ""
            finish = choice.finish_reason or finish
        said = getattr(part, "affectlens", None) or {}
        tokens += [said] if "scores" in said else said.get("tokens", [])
        ours = {**ours, **said}
    return Said(text, finish, ours["steering"], tokens, ours["summary"]["mean"])


def apart(one: Said, other: Said) -> float:
    """The largest difference of their scores; they must be of the same words."""
    assert [row["text"] for row in one.tokens] == [row["text"] for row in other.tokens]
    pairs = [(one.mean, other.mean)] + [(a["scores"], b["scores"]) for a, b in zip(one.tokens, other.tokens, strict=True)]
    assert all(a.keys() == b.keys() for a, b in pairs)
    return max((abs(a[name] - b[name]) for a, b in pairs for name in a), default=0.0)


class Company:
    """How many replies the server generates at once, looked up now and then."""

    def __init__(self, url: str) -> None:
        self.most, self._url, self._over = 0, url, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Company:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            lines = httpx.get(self._url, timeout=60).text.splitlines()
            self.most = max(self.most, *(int(float(x.split()[1])) for x in lines if x.startswith("affectlens_live_requests ")))


def test_500_mixed_requests_give_what_each_gives_alone(client: Any) -> None:
    begin = time.monotonic()
    alone = [ask(client, i) for i in range(DISTINCT)]
    between = time.monotonic()
    order = [i for i in range(DISTINCT) for _ in range(TIMES)]
    random.Random(3).shuffle(order)
    with Company(str(client.base_url).replace("/v1/", "/metrics")) as company, ThreadPoolExecutor(AT_ONCE) as pool:
        together = list(pool.map(lambda i: ask(client, i), order))
    seconds = time.monotonic() - between

    wrong = [(i, alone[i], said) for i, said in zip(order, together, strict=True) if said.text != alone[i].text]
    assert not wrong, f"{len(wrong)} of {len(order)} replies are others, of {wrong[0]}"
    differences = []
    for i, said in zip(order, together, strict=True):
        assert (said.finish, said.steering) == (alone[i].finish, alone[i].steering)
        differences.append(apart(said, alone[i]))
    print(
        f"{len(order)} requests, {company.most} at once, in {seconds:.0f} s; {DISTINCT} alone in {between - begin:.0f} s; "
        f"{sum(bool(said.tokens) for said in together)} with scores of tokens; scores differ by {max(differences):.3f} at most"
    )
    assert [bool(said.tokens) for said in together] == [i % 2 == 1 and alone[i].text != "" for i in order]
    assert max(differences) <= TOLERANCE
    # How many there are depends on how fast this process can ask: 22 to 28 when it has half a core, 4 when others take that.
    assert company.most > 1, "no two of them ran together"


def test_what_is_compared_could_differ(client: Any) -> None:
    """Or the load would show nothing: dials change words and scores by far more than what is let pass."""

    def say(bias: dict[str, float]) -> Said:
        answer = client.chat.completions.create(
            model=DEMO,
            messages=[{"role": "user", "content": "Say something about the sea."}],
            max_tokens=8,
            temperature=0,
            extra_body={"emotion_bias": bias, "readings": {"emotions": "all"}},
        )
        return Said(answer.choices[0].message.content, "", None, answer.affectlens["tokens"], {})

    plain, low, lower, high = (say({"calm": strength} if strength else {}) for strength in (0, 0.05, 0.06, 0.25))
    assert high.text != plain.text
    first = [abs(one.tokens[0]["scores"]["calm"] - plain.tokens[0]["scores"]["calm"]) for one in (low, lower)]
    assert TOLERANCE * 10 < first[0] < first[1] - TOLERANCE * 10


def test_the_client_is_told_what_is_wrong(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown concept"):
        client.chat.completions.create(
            model=DEMO, messages=[{"role": "user", "content": "Hi"}], extra_body={"emotion_bias": {"clam": 0.05}}
        )
