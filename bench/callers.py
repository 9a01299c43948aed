"""Callers who look closely at what a server answers: for ``bench/reliability.py``."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from affectlens.engines.toy import PLAIN
from running import Server

WORDS = PLAIN.split()
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

# ── what is asked ──


@dataclass(frozen=True)
class Asked:
    """A request: its number, path and body."""

    number: int
    path: str
    body: dict[str, Any]

    @property
    def replies(self) -> int:
        return 2 if self.body.get("compare") else int(self.body.get("n", 1))


def mixed(number: int, *, model: str, names: Sequence[str], longest: int, strength: float, seed: int = 0) -> Asked:
    """The ``number``-th of many requests that differ in everything a request can differ in; the same number gives the same.

    Args:
        number: Which.
        model: Of whom.
        names: Emotions.
        longest: Tokens of a reply at most.
        strength: Largest strength of steering.
        seed: Of the whole series.
    """
    rng = random.Random(f"{seed} {number}")
    pick, chance = rng.choice, lambda share: rng.random() < share
    words = lambda: f"case {number}: {' '.join(rng.choices(WORDS, k=rng.randint(3, 16)))}"  # noqa: E731
    some = lambda most: rng.sample(list(names), rng.randint(1, min(most, len(names))))  # noqa: E731
    body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(1, longest), "seed": rng.randrange(2**31)}
    if chat := chance(0.75):
        turns = [{"role": "user", "content": words()}]
        if chance(0.3):
            turns = [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}, *turns]
        if chance(0.3):
            turns = [{"role": "system", "content": words()}, *turns]
        body["messages"] = turns
    else:
        body["prompt"] = words()
    if chance(0.5):
        body["stream"] = True
        if chance(0.5):
            body["stream_options"] = {"include_usage": True}
    if chance(0.1):
        body["compare"] = True
    elif chance(0.2):
        body["n"] = rng.randint(2, 3)
    body["temperature"] = pick([0, 0.7, 1, 1.3])
    if chance(0.3):
        body["top_p"] = pick([0.5, 0.9])
    if chance(0.2):
        body["top_k"] = pick([1, 5, 50])
    if chance(0.15):
        body["stop"] = [f" {pick(WORDS)}", "."][: rng.randint(1, 2)]
    if chance(0.15):
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 3)} if chat else {"logprobs": rng.randint(0, 3)}
    if chance(0.6):
        body["emotion_bias"] = {name: round(rng.uniform(-strength, strength), 3) for name in some(3)}
    if chance(0.5):
        wanted = {"emotions": pick(["all", some(4)]), "every": pick([1, 1, 3]), "prompt": chance(0.3)}
        body["readings"] = pick([True, wanted])
    if chance(0.4):
        rule = pick([f'"{pick(names)}" > 1', f'mean("{pick(names)}", 4) > 0.5', f'"{pick(names)}" < -0.5 for 2 tokens'])
        acting = [{"do": "stop", "message": "Stopped."}, {"do": "steer", "add": {pick(names): round(strength / 2, 3)}}]
        body["rules"] = [rule if chance(0.6) else {"when": rule, "actions": [pick(acting)]}]
    return Asked(number, CHAT if chat else COMPLETION, body)


# ── what is answered ──


@dataclass
class Reply:
    """One choice of an answer, as its caller saw it: all that is the same whenever the same is asked."""

    text: str = ""
    finish: str | None = None
    trace: str = ""
    rows: list[Any] = field(default_factory=list)
    likely: list[Any] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What came of a request.

    Args:
        asked: The request.
        replies: Its choices.
        usage: Tokens, where they were told.
        began: When it was asked, the last time.
        first: Seconds to the first token of a stream; None for plain answers.
        total: Seconds to its end.
        busy: How often it was told to come again.
        problems: What was wrong with it; empty when it is whole.
    """

    asked: Asked
    replies: list[Reply] = field(default_factory=list)
    usage: dict[str, int] | None = None
    began: float = 0.0
    first: float | None = None
    total: float = 0.0
    busy: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def facts(self) -> Any:
        """What must be the same when the same is asked again."""
        return [(each.text, each.finish, each.rows, each.likely, each.said) for each in self.replies], self.usage


class Caller:
    """Somebody with one connection that is kept alive."""

    def __init__(self, server: Server, *, timeout: float = 120.0) -> None:
        self._connection = http.client.HTTPConnection(*server.address, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, asked: Asked, *, again: bool = True) -> Answer:
        """Ask, come again when told to, and look at every piece of what comes.

        Args:
            asked: What.
            again: Whether to come again; otherwise 429 is a problem.
        """
        answer = Answer(asked, [Reply() for _ in range(asked.replies)])
        body = json.dumps(asked.body)
        try:
            while True:
                answer.began = time.monotonic()
                self._connection.request("POST", asked.path, body, {"Content-Type": "application/json"})
                came = self._connection.getresponse()
                if came.status != 429 or not again:
                    break
                came.read()
                answer.busy += 1
                self._connection.close()  # which the server does as well with one that is idle for long
                time.sleep(float(came.headers["Retry-After"]))
            if came.status != 200:
                answer.problems.append(f"status {came.status}: {came.read()[:300].decode(errors='replace')}")
            elif asked.body.get("stream"):
                self._streamed(came, answer)
            else:
                self._whole(json.loads(came.read()), answer)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.problems.append(f"{type(error).__name__}: {error}")
            self._connection.close()
        answer.total = time.monotonic() - answer.began
        if not answer.problems:
            answer.problems += [f"choice {i} has no end" for i, each in enumerate(answer.replies) if each.finish is None]
        return answer

    def _streamed(self, came: http.client.HTTPResponse, answer: Answer) -> None:
        done, id, seen = False, None, set[int]()
        for line in came:
            if not line.strip():
                continue
            if not line.startswith(b"data: "):
                answer.problems.append(f"no event: {line[:80]!r}")
                continue
            if done:
                answer.problems.append("something came after [DONE]")
            if line.strip() == b"data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.problems.append(f"error: {chunk['error']}")
                continue
            id = id or chunk["id"]
            if chunk["id"] != id:
                answer.problems.append(f"a chunk of {chunk['id']} in {id}")
            if chunk.get("usage"):
                answer.usage = chunk["usage"]
            for choice in chunk["choices"]:
                reply, ours = answer.replies[choice["index"]], chunk.get("affectlens") or {}
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                if reply.finish is not None:
                    answer.problems.append(f"choice {choice['index']} goes on after its end")
                if piece and answer.first is None:
                    answer.first = time.monotonic() - answer.began
                reply.text += piece
                reply.likely += _likely(choice["logprobs"])
                reply.finish = choice["finish_reason"]
                if "scores" in ours:
                    reply.rows.append(_again(ours))
                elif choice["index"] not in seen:
                    seen.add(choice["index"])
                    reply.said["began"] = {key: value for key, value in ours.items() if key != "id"}
                if reply.finish is not None:
                    reply.trace, reply.said["ended"] = ours["trace"], _again(ours)
        if not done and not answer.problems:
            answer.problems.append("the stream has no [DONE]")

    def _whole(self, data: dict[str, Any], answer: Answer) -> None:
        answer.usage = data["usage"]
        if len(data["choices"]) != len(answer.replies):
            answer.problems.append(f"{len(data['choices'])} choices in place of {len(answer.replies)}")
        for choice, reply in zip(data["choices"], answer.replies, strict=False):
            ours = dict(choice.get("affectlens") or data["affectlens"])
            reply.text = choice["text"] if "text" in choice else choice["message"]["content"]
            reply.finish, reply.trace, reply.rows = choice["finish_reason"], ours["trace"], ours.pop("tokens", [])
            reply.likely, reply.said["ended"] = _likely(choice["logprobs"]), _again(ours)


def _again(ours: Mapping[str, Any]) -> dict[str, Any]:
    """What affectlens says of a reply, without its id."""
    alerts = [{key: value for key, value in each.items() if key != "conversation"} for each in ours.get("alerts", [])]
    return {**{key: value for key, value in ours.items() if key != "trace"}, "alerts": alerts}


def _likely(logprobs: dict[str, Any] | None) -> list[Any]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    return list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], logprobs["text_offset"], strict=True)
    )


def crowd(
    server: Server, requests: Sequence[Asked], *, callers: int, answered: Callable[[Answer], None] = lambda _: None
) -> list[Answer]:
    """Ask everything, so many at a time; the answers in the order of the requests."""
    waiting, lock = iter(requests), threading.Lock()
    answers: dict[int, Answer] = {}

    def work() -> None:
        with Caller(server) as caller:
            while True:
                with lock:
                    asked = next(waiting, None)
                if asked is None:
                    return
                answer = caller.ask(asked)
                with lock:
                    answers[asked.number] = answer
                    answered(answer)

    threads = [threading.Thread(target=work, name=f"caller {i}", daemon=True) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[asked.number] for asked in requests if asked.number in answers]


@contextlib.contextmanager
def unending(server: Server, requests: Iterator[Asked], *, callers: int, kept: list[Answer]) -> Iterator[None]:
    """So many callers, each with its next request as soon as one is answered, until the block ends; answers go into ``kept``."""
    over, lock = threading.Event(), threading.Lock()

    def work() -> None:
        with Caller(server, timeout=60) as caller:
            while not over.is_set():
                with lock:
                    asked = next(requests)
                answer = caller.ask(asked)
                with lock:
                    kept.append(answer)
                if not server.running:
                    return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def begin(server: Server, asked: Asked, *, receive: int | None = None) -> socket.socket:
    """Send a request and read nothing of its answer.

    Args:
        server: Whom.
        asked: What.
        receive: Bytes that the kernel takes for a reader who does not read.
    """
    connection = socket.socket()
    if receive is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.connect(server.address)
    data = json.dumps(asked.body).encode()
    head = (
        f"POST {asked.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


def stream(words: str, seed: int, *, tokens: int, **more: Any) -> Asked:
    """A plain chat with the toy, streamed; its seed is its number."""
    messages = [{"role": "user", "content": words}]
    return Asked(seed, CHAT, {"model": "toy", "messages": messages, "max_tokens": tokens, "seed": seed, "stream": True, **more})
