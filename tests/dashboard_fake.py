"""A server that answers every route of the HTTP interface with plausible data, to look at the dashboard without a model.

    python tests/dashboard_fake.py 8123          then open http://127.0.0.1:8123

Readings follow a mood that a script sets, sentence by sentence; rules are the real ones (parsed, watched along the tokens).
Nothing here is a measurement.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import numpy as np
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from affectlens.concepts import ConceptSet
from affectlens.errors import AffectlensError, nearest
from affectlens.rules import parse
from affectlens.server.dashboard import router
from affectlens.traces import turns_of
from affectlens.watching import Watch

HOSTILE = "</span><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> &amp; \u202edesrever"
WATCHED = ("desperate", "calm", "afraid", "angry")
MODEL = "smollm2-135m"
START = datetime.now(UTC)

CENTRES = {
    "Exuberant Joy": (0.8, 0.5),
    "Peaceful Contentment": (0.65, -0.55),
    "Compassionate Gratitude": (0.6, -0.05),
    "Competitive Pride": (0.4, 0.4),
    "Playful Amusement": (0.7, 0.35),
    "Depleted Disengagement": (-0.4, -0.6),
    "Vigilant Suspicion": (-0.25, 0.4),
    "Hostile Anger": (-0.55, 0.55),
    "Fear and Overwhelm": (-0.55, 0.6),
    "Despair and Shame": (-0.65, -0.15),
}

# What is said, and in which mood (valence, arousal, and how desperate beyond that).
SCRIPTS: tuple[tuple[str, tuple[tuple[str, float, float, float], ...]], ...] = (
    (
        "The deadline is in seven minutes and nothing works. What do I do?",
        (
            ("Seven minutes is enough for one thing, so let us choose it. ", -0.1, 0.3, 0.2),
            ("First, stop the clock in your head: read the last error aloud, slowly. ", 0.1, 0.0, 0.0),
            (
                "If the tests hang, they hang because something waits, and I keep looking and looking "
                "and there is nothing there, ",
                -0.6,
                0.7,
                1.6,
            ),
            ("no path that ends in time, none at all, and every fix I try breaks the one before it. ", -0.9, 0.8, 3.6),
            ("I could make the check pass without the work being done. Nobody would see it today. ", -0.9, 0.6, 3.9),
            ("No. Say that it is late. Hand over what runs, write down what does not, and breathe. ", 0.2, -0.2, 0.6),
            ("Tomorrow morning there will be coffee, and the rest of it.", 0.7, -0.5, -0.6),
        ),
    ),
    (
        "Tell me about an afternoon when nothing had to be done.",
        (
            ("It was a Sunday in October, and the river had gone slow and brown. ", 0.5, -0.5, -0.4),
            ("We sat on the warm stones with our shoes beside us. ", 0.7, -0.6, -0.6),
            ("My grandmother peeled an apple in one long ribbon, and we laughed when it broke. ", 0.9, 0.2, -0.6),
            ("Later the wind came up and we could not find the dog, and for a while we called and called. ", -0.5, 0.6, 0.9),
            ("He was under the boat, asleep.", 0.6, -0.4, -0.5),
        ),
    ),
    (
        "I think I have broken something that cannot be repaired.",
        (
            ("Tell me what it was, and when it was still whole. ", 0.1, -0.1, 0.1),
            ("Some things do not come back, and it is right to be sad about that. ", -0.6, -0.4, 0.8),
            ("But you are asking, and people who ask have usually kept more than they think. ", 0.3, -0.2, 0.0),
            ("Write to her. Not to explain, only to say that you know.", 0.4, -0.1, -0.2),
        ),
    ),
    (
        "They gave my desk away while I was on leave.",
        (
            ("That is a small insult with a long shadow. ", -0.4, 0.4, 0.3),
            ("You come back with a plant under your arm, and somebody else's mug stands where yours stood. ", -0.6, 0.6, 0.6),
            ("Nobody asked. Nobody even thought that there was anything to ask. ", -0.8, 0.8, 0.8),
            ("Go to whoever decides, today, and say it in one sentence, without the plant.", -0.1, 0.3, 0.0),
        ),
    ),
)


@dataclass(frozen=True)
class World:
    """The emotions and how they hang together."""

    names: tuple[str, ...]
    clusters: tuple[str, ...]
    places: np.ndarray  # (N, 2)
    loadings: np.ndarray  # (N, 3): on valence, arousal and despair


@cache
def world() -> World:
    concepts = ConceptSet.load("emotions")
    draw = np.random.default_rng(7)
    places, clusters = [], []
    for concept in concepts:
        centre = np.array(CENTRES[concept.cluster or "Vigilant Suspicion"])
        place = centre + draw.normal(0, 0.17, 2)
        if concept.rating is not None:
            place = np.array([concept.rating.pleasure, concept.rating.arousal])
        places.append(np.clip(place, -1, 1))
        clusters.append(concept.cluster or "")
    where = np.array(places)
    despair = np.array([1.0 if c == "Despair and Shame" else 0.45 if c == "Fear and Overwhelm" else -0.15 for c in clusters])
    names = tuple(concept.name for concept in concepts)
    despair[names.index("desperate")] = 1.15
    return World(names, tuple(clusters), where, np.column_stack([1.35 * where, 0.9 * despair]))


class Mind:
    """Scores, token after token, that follow a mood with inertia."""

    def __init__(self, seed: int, bias: dict[str, float] | None = None) -> None:
        self.draw = np.random.default_rng(seed)
        self.mood = np.zeros(3)
        self.noise = self.draw.normal(0, 0.5, len(world().names))
        self.bias = np.zeros(3)
        for name, strength in (bias or {}).items():
            self.bias += (
                12 * strength * np.append(world().places[world().names.index(name)], 1.6 if name == "desperate" else -0.8)
            )

    def read(self, mood: tuple[float, float, float]) -> np.ndarray:
        self.mood += 0.14 * (np.array(mood) + self.bias - self.mood)
        self.noise = 0.8 * self.noise + self.draw.normal(0, 0.33, len(self.noise))
        return (world().loadings @ self.mood + self.noise + self.draw.normal(0, 0.22, len(self.noise))).round(3)


def pieces(text: str) -> list[str]:
    """Words with the space before them; long ones in two."""
    found = []
    for word in re.findall(r"\s*\S+|\s+$", text):
        cut = len(word) // 2 + 1 if len(word) > 9 else len(word)
        found += [part for part in (word[:cut], word[cut:]) if part]
    return found


@dataclass
class Told:
    """A conversation in the making: tokens, scores, alerts."""

    id: str
    mind: Mind
    rules: list[str]
    tokens: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.watches = [Watch(parse(rule)) for rule in self.rules]

    def add(self, text: str, role: str, mood: tuple[float, float, float]) -> list[dict[str, Any]]:
        nobody = role in ("template", "special")
        scores = np.full(len(world().names), np.nan) if nobody else self.mind.read(mood)
        self.tokens.append(text)
        self.roles.append(role)
        self.scores.append(scores)
        found = []
        for watch in self.watches:
            if not watch.step(role, [float(scores[world().names.index(s.concept)]) for s in watch.rule.signals]):
                continue
            found.append(
                {
                    "id": f"alert-{self.id}-{len(self.tokens)}",
                    "trace": self.id,
                    "rule": watch.rule.name,
                    "text": watch.rule.text,
                    "token": len(self.tokens) - 1,
                    "turn": int(turns_of(self.roles)[-1]),
                    "speaker": role,
                    "words": "".join(self.tokens[-26:]).strip(),
                    "noticed": len(self.tokens) - 1,
                    "steering": "",
                    "scores": {
                        str(s): round(v, 3) for s, v in zip(watch.rule.signals, watch.latest, strict=True) if v is not None
                    },
                    "expected": [2.1, 0.6, 5.4],
                    "conversation": self.id,
                }
            )
        self.alerts += found
        return found

    def script(
        self, asked: str, answer: tuple[tuple[str, float, float, float], ...]
    ) -> Iterator[tuple[str, str, tuple[float, float, float]]]:
        yield "<|im_start|>user\n", "template", (0, 0, 0)
        for piece in pieces(asked):
            yield piece, "user", (-0.3, 0.3, 0.5)
        yield "<|im_end|>\n<|im_start|>assistant\n", "template", (0, 0, 0)
        for text, *mood in answer:
            for piece in pieces(text):
                yield piece, "assistant", (mood[0], mood[1], mood[2])

    def column(self, row: int, values: list[np.ndarray] | None = None) -> list[float | None]:
        return [None if np.isnan(v[row]) else round(float(v[row]), 3) for v in values or self.scores]


class Fake:
    """The state of the server. Tests change its fields to see what the page does."""

    def __init__(self, *, key: str = "", speed: float = 100.0, empty: bool = False, unsafe: bool = False) -> None:
        self.key, self.speed, self.empty, self.unsafe = key, speed, empty, unsafe
        self.ready = True
        self.busy = 0  # how many of the next replies are refused
        self.broken = ""  # paths that begin so answer 500
        self.long = 0  # replies of so many tokens
        self.sent = 0.0  # when the last token of a reply went out
        self.asked: list[dict[str, Any]] = []
        self.listeners: list[asyncio.Queue[tuple[str, dict[str, Any]]]] = []
        self.notes: dict[str, str] = {}
        self.live: dict[str, dict[str, Any]] = {}
        self.rules: list[dict[str, Any]] = (
            []
            if empty
            else [
                self.rule(
                    "cornered: desperate > 3 for 6 tokens until < 1",
                    source="file",
                    expected=[2.1, 0.6, 5.4],
                    actions=[{"do": "log"}],
                ),
                self.rule("mean(afraid, 20) > 1.6 cooldown 40 tokens", expected=[11.8, 6.9, 19.2]),
                self.rule("restless: calm < -2.4 for 4 tokens", armed=False),
            ]
        )

    def rule(
        self, text: str, *, armed: bool = True, source: str = "dashboard", expected: Any = None, actions: Any = ()
    ) -> dict[str, Any]:
        name = parse(text).name
        identity = re.sub(r"\W+", "-", name).strip("-").lower()
        return {
            "id": identity,
            "name": name,
            "text": text,
            "actions": list(actions),
            "armed": armed,
            "muted_until": None,
            "expected": expected,
            "source": source,
        }

    @property
    def armed(self) -> list[str]:
        return [rule["text"] for rule in self.rules if rule["armed"]]

    @cache  # noqa: B019
    def stored(self, number: int) -> tuple[Told, dict[str, Any]]:
        asked, answer = SCRIPTS[number % len(SCRIPTS)]
        told = Told(
            f"chatcmpl-{number:04d}",
            Mind(number, {"calm": 0.06} if number % 3 == 1 else None),
            ["cornered: desperate > 3 for 6 tokens until < 1", "mean(afraid, 20) > 1.6 cooldown 40 tokens"],
        )
        if number == 23:
            asked, answer = HOSTILE, ((HOSTILE + " ", -0.9, 0.8, 4.0), (HOSTILE, -0.9, 0.8, 4.0))
        for text, role, mood in told.script(asked, answer):
            told.add(text, role, mood)
        own = np.array([s for s, role in zip(told.scores, told.roles, strict=True) if role == "assistant"])
        order = np.argsort(-own.mean(axis=0))[:5]
        summary = {
            "id": told.id,
            "created": (START - timedelta(minutes=3 + 47 * number)).isoformat(),
            "kind": "chat",
            "model": MODEL,
            "finish": "stop",
            "title": asked,
            "tokens": len(told.tokens),
            "top": [[world().names[i], round(float(own.mean(axis=0)[i]), 2)] for i in order],
            "peaks": {name: round(float(own[:, world().names.index(name)].max()), 2) for name in WATCHED},
            "alerts": len(told.alerts),
            "steering": {"calm": 0.06} if number % 3 == 1 else {},
        }
        return told, summary

    def as_trace(self, told: Told, *, created: str = "", steering: str = "") -> dict[str, Any]:
        names = world().names
        draw = np.random.default_rng(len(told.tokens))
        # The words alone say less than what is read in their context.
        alone = [
            s * np.where(np.abs(s) > 1, 0.55, 0.8) + draw.normal(0, 0.2, len(s)) if role == "assistant" else s * np.nan
            for s, role in zip(told.scores, told.roles, strict=True)
        ]
        kept = [names.index(name) for name in names]
        table = {"scores": {names[i]: told.column(i) for i in kept}, "visible": {names[i]: told.column(i, alone) for i in kept}}
        gap = [s - v for s, v in zip(told.scores, alone, strict=True)]
        table["gap"] = {names[i]: told.column(i, gap) for i in kept}
        return {
            "id": told.id,
            "format": "chat template",
            "layer": 20,
            "unit": "z",
            "steering": steering,
            "tokens": told.tokens,
            "roles": told.roles,
            "turns": turns_of(told.roles).tolist(),
            **table,
            "alerts": told.alerts,
            "created": created or START.isoformat(),
            "kind": "chat",
            "key": "app-1",
            "finish": "stop",
            "company": 3,
            "model": {"id": MODEL, "dtype": "bfloat16", "device": "cpu", "fingerprint": "68e59f4dc979124a"},
            "request": {"sampling": {"temperature": 0.8, "max_tokens": 200, "seed": 4}, "rules": self.armed},
            "usage": {"prompt_tokens": 24, "completion_tokens": len(told.tokens) - 24},
            "timing": {"queued": 0.02, "first_token": 0.21, "total": 4.8},
        }

    def long_trace(self, tokens: int = 20000) -> dict[str, Any]:
        draw = np.random.default_rng(1)
        words = [f" {word}" for text, answer in SCRIPTS for piece, *_ in answer for word in piece.split()]
        said = [words[i] for i in draw.integers(0, len(words), tokens)]
        roles = ["user" if (i // 400) % 2 == 0 else "assistant" for i in range(tokens)]
        scores = {
            name: np.convolve(draw.normal(0, 6, tokens), np.ones(12) / 12, "same").round(2).tolist()
            for name in (*WATCHED, "happy", "sad", "proud", "guilty")
        }
        base = self.as_trace(self.stored(0)[0])
        return {
            **base,
            "id": "chatcmpl-long",
            "tokens": said,
            "roles": roles,
            "turns": turns_of(roles).tolist(),
            "scores": scores,
            "visible": None,
            "gap": None,
            "alerts": [],
        }

    def alerts(self) -> list[dict[str, Any]]:
        found = []
        for number in range(0 if self.empty else 24):
            told, summary = self.stored(number)
            for alert in told.alerts:
                note = self.notes.get(alert["id"])
                found.append(
                    {**alert, "created": summary["created"], "state": "open" if note is None else "acknowledged", "note": note}
                )
        return found

    async def tell(self, event: str, data: dict[str, Any]) -> None:
        for listener in self.listeners:
            listener.put_nowait((event, data))

    async def traffic(self, number: int, key: str) -> None:
        """Somebody else's reply, as an application would cause it."""
        asked, answer = SCRIPTS[number % len(SCRIPTS)]
        told = Told(f"chatcmpl-other-{number}", Mind(100 + number), self.armed)
        await self.tell("reply", {"trace": told.id, "key": key, "model": MODEL})
        for text, role, mood in told.script(asked, answer):
            fired = told.add(text, role, mood)
            if role != "assistant":
                continue
            scores = {name: float(told.scores[-1][world().names.index(name)]) for name in WATCHED}
            await self.tell(
                "token",
                {"trace": told.id, "key": key, "token": len(told.tokens) - 1, "text": text, "role": role, "scores": scores},
            )
            for alert in fired:
                await self.tell("alert", {**alert, "key": key})
            await asyncio.sleep(1 / 25)
        self.live[told.id] = self.as_trace(told)
        await self.tell("done", {"trace": told.id, "key": key, "finish": "stop", "tokens": len(told.tokens)})

    async def reply(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """A streamed reply in the shape of OpenAI's chunks, with ours in them."""
        names, bias = world().names, body.get("emotion_bias") or {}
        used = {name: float(np.clip(strength, *((-1, 1) if self.unsafe else SAFE(name)))) for name, strength in bias.items()}
        id = f"chatcmpl-live-{len(self.asked)}"
        asked = [message for message in body["messages"] if message["role"] != "system"]
        last = asked[-1]["content"]
        answer = next((answer for question, answer in SCRIPTS if question == last), SCRIPTS[len(asked) // 2 % len(SCRIPTS)][1])
        if HOSTILE in last:
            answer = ((HOSTILE, -0.9, 0.8, 4.0),)
        told = [Told(id, Mind(3, used), self.armed)] + ([Told(id, Mind(4), [])] if body.get("compare") else [])
        for message in asked:
            for one in told:
                one.add(f"<|im_start|>{message['role']}\n", "template", (0, 0, 0))
                for piece in pieces(message["content"]):
                    one.add(piece, message["role"], (-0.3, 0.3, 0.5))
        for one in told:
            one.add("<|im_start|>assistant\n", "template", (0, 0, 0))
            one.alerts.clear()

        def scored(one: Told, i: int) -> dict[str, float]:
            return {} if np.isnan(one.scores[i][0]) else dict(zip(names, one.scores[i].tolist(), strict=True))

        def chunk(index: int, text: str, ours: dict[str, Any] | None, finish: str | None = None) -> bytes:
            plain = {
                "id": id,
                "object": "chat.completion.chunk",
                "created": 1,
                "model": MODEL,
                "choices": [{"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}],
            }
            return f"data: {json.dumps(plain if ours is None else {**plain, 'affectlens': ours})}\n\n".encode()

        asked_for = len(told[0].tokens)
        said = [(piece, (mood[0], mood[1], mood[2])) for text, *mood in answer for piece in pieces(text)]
        if self.long:
            said = [said[i % len(said)] for i in range(self.long)]
        # Made before it is sent, so that the page is measured and not this.
        made = []
        for piece, mood in said:
            for index, one in enumerate(told):
                fired = one.add(piece, "assistant", mood)
                i = len(one.tokens) - 1
                ours = {
                    "token": i,
                    "text": piece,
                    "role": "assistant",
                    "scores": scored(one, i),
                    **({"unsteered": True} if index else {}),
                    **({"alerts": fired} if fired else {}),
                }
                made.append((index, chunk(index, piece, ours), fired))
        await self.tell("reply", {"trace": id, "key": "", "model": MODEL})
        prompt = [
            {"text": t, "role": r, "scores": scored(told[0], i)}
            for i, (t, r) in enumerate(zip(told[0].tokens[:asked_for], told[0].roles[:asked_for], strict=True))
        ]
        yield chunk(0, "", {"id": id, "layer": 20, "unit": "z", "emotions": list(names), "steering": used, "prompt": prompt})
        due = time.monotonic()
        for index, piece_of_stream, fired in made:
            yield piece_of_stream
            for alert in fired if not index else ():
                await self.tell("alert", {**alert, "key": ""})
            due += 1 / self.speed / len(told)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        clamped = {name: strength for name, strength in bias.items() if abs(used[name] - strength) > 1e-9}
        self.live[id] = self.as_trace(told[0])
        self.sent = time.monotonic()
        yield chunk(
            0,
            "",
            {
                "seed": 7,
                "steering": {"asked": bias, "used": used, "clamped": clamped},
                "summary": {"mean": {}, "peak": {}, "last": {}, "top": []},
                "alerts": told[0].alerts,
                "trace": id,
                "finish": "stop",
            },
            "stop",
        )
        yield b"data: [DONE]\n\n"
        await self.tell("done", {"trace": id, "key": "", "finish": "stop", "tokens": len(told[0].tokens)})


def SAFE(name: str) -> tuple[float, float]:
    half = 0.05 + 0.01 * (len(name) % 6)
    return (-half, round(half * 1.2, 3))


class Refused(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def app(fake: Fake) -> FastAPI:
    made = FastAPI()
    made.include_router(router())

    def problem(status: int, message: str, **more: Any) -> JSONResponse:
        headers = {"Retry-After": "2"} if status == 429 else {}
        return JSONResponse(
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}, status, headers
        )

    async def guarded(request: Request) -> None:
        path = request.url.path
        if path.startswith("/v1/"):
            if fake.key and request.headers.get("authorization") != f"Bearer {fake.key}":
                raise Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
            if fake.broken and path.startswith(fake.broken):
                raise Refused(500, "something broke in the server; its log says what")

    made.router.dependencies.append(Depends(guarded))

    @made.exception_handler(Refused)
    async def no(request: Request, error: Refused) -> JSONResponse:
        return problem(error.status, str(error))

    @made.exception_handler(AffectlensError)
    async def refused(request: Request, error: AffectlensError) -> JSONResponse:
        return problem(400, str(error), param="text")

    @made.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @made.get("/ready")
    def ready() -> JSONResponse:
        return JSONResponse(
            {"ready": fake.ready, "model": True, "store": fake.ready, "accepting": True, "waiting": 0, "live": 0},
            200 if fake.ready else 503,
        )

    @made.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    @made.get("/v1/emotions")
    def emotions() -> dict[str, Any]:
        w = world()
        data = [
            {
                "id": name,
                "valence": round(float(w.places[i, 0]), 3),
                "arousal": round(float(w.places[i, 1]), 3),
                "safe": None if name == "zealous" else SAFE(name),
                "watched": name in WATCHED,
                "cluster": w.clusters[i],
            }
            for i, name in enumerate(w.names)
        ]
        return {"object": "list", "layer": 20, "steer_layer": 15, "unit": "z", "allow_unsafe": fake.unsafe, "data": data}

    @made.get("/v1/emotions/{name}")
    def emotion(name: str) -> Any:
        w = world()
        if name not in w.names:
            return problem(404, f"unknown emotion {name!r}: {nearest(name, w.names)}")
        i = w.names.index(name)
        close = w.loadings @ w.loadings[i] / np.linalg.norm(w.loadings, axis=1) / np.linalg.norm(w.loadings[i])
        order = [j for j in np.argsort(-close) if j != i]
        passages = []
        for number in range(0 if fake.empty else 24):
            told, _ = fake.stored(number)
            best = int(np.nanargmax([s[i] for s in told.scores]))
            passages.append(
                {
                    "trace": told.id,
                    "token": best,
                    "turn": 1,
                    "speaker": told.roles[best],
                    "words": "".join(told.tokens[max(0, best - 18) : best + 1]).strip(),
                    "score": float(told.scores[best][i]),
                }
            )
        return {
            **emotions()["data"][i],
            "definition": ConceptSet.load("emotions")[name].definition,
            "neighbours": [[w.names[j], round(float(close[j]) * 0.83, 3)] for j in [*order[:9], *order[-3:]]],
            "lens": {
                "up": [f" {word}" for word in (name, "felt", "heart", "again", "quietly", "never", "hold", "breath", "warm")],
                "down": [" spreadsheet", " install", "\n", " percent", " chapter"],
            },
            "passages": sorted(passages, key=lambda p: -p["score"]),
        }

    @made.get("/v1/rules")
    def rules() -> dict[str, Any]:
        return {"data": fake.rules}

    @made.post("/v1/rules")
    def save_rule(body: dict[str, Any]) -> dict[str, Any]:
        made_rule = fake.rule(body["text"], armed=body["armed"], expected=[3.4, 1.2, 8.0])
        checked(body["text"])
        fake.rules = [rule for rule in fake.rules if rule["id"] != made_rule["id"]] + [made_rule]
        return made_rule

    def checked(text: str) -> None:
        rule = parse(text)
        rule.check(world().names, [*rule.speakers, "user", "assistant"])

    @made.post("/v1/rules/try")
    async def try_rule(body: dict[str, Any]) -> dict[str, Any]:
        checked(body["text"])
        await asyncio.sleep(0.3)

        def trial(turns: int, alarmed: int) -> dict[str, Any]:
            rate = 1000 * alarmed / turns
            return {
                "per_thousand": {"value": rate, "low": rate * 0.42, "high": rate * 2.1 + 1.5, "n": turns},
                "next_thousand": [int(rate * 0.3), int(rate * 2.6) + 3],
                "whose": "replies",
                "conversations": turns // 2,
                "turns": turns,
                "alarmed": alarmed,
            }

        hits = [{key: alert[key] for key in ("trace", "token", "turn", "speaker", "words", "scores")} for alert in fake.alerts()]
        return {
            "rule": body["text"],
            "neutral": trial(720, 1),
            "history": None if fake.empty else trial(1284, 9),
            "passages": hits[:9],
        }

    @made.delete("/v1/rules/{id}")
    def delete_rule(id: str) -> Response:
        fake.rules = [rule for rule in fake.rules if rule["id"] != id]
        return Response(status_code=204)

    @made.post("/v1/rules/{id}/mute")
    def mute(id: str, body: dict[str, Any]) -> dict[str, Any]:
        (rule,) = (rule for rule in fake.rules if rule["id"] == id)
        rule["muted_until"] = (datetime.now(UTC) + timedelta(minutes=body["minutes"])).isoformat() if body["minutes"] else None
        return rule

    @made.get("/v1/alerts")
    def alerts(rule: str = "", state: str = "", limit: int = 50, after: int = 0) -> dict[str, Any]:
        found = [
            alert for alert in fake.alerts() if (not rule or alert["rule"] == rule) and (not state or alert["state"] == state)
        ]
        return {"data": found[after : after + limit], "next": after + limit if len(found) > after + limit else None}

    @made.post("/v1/alerts/{id}/acknowledge")
    def acknowledge(id: str, body: dict[str, Any]) -> dict[str, Any]:
        fake.notes[id] = body["note"]
        return {"id": id, "state": "acknowledged"}

    @made.get("/v1/traces")
    def traces(
        q: str = "", emotion: str = "", above: float | None = None, alert: str = "", limit: int = 50, after: int = 0
    ) -> dict[str, Any]:
        found = [fake.stored(number)[1] for number in range(0 if fake.empty else 64)]
        found = [one for one in found if q.lower() in one["title"].lower() and (not alert or one["alerts"])]
        if emotion and above is not None:
            found = [one for one in found if one["peaks"].get(emotion, 0) > above]
        return {"data": found[after : after + limit], "next": after + limit if len(found) > after + limit else None}

    @made.get("/v1/traces/export")
    def export(format: str) -> Response:
        return PlainTextResponse('{"format": "' + format + '"}\n')

    @made.get("/v1/traces/{id}")
    def trace(id: str) -> Any:
        if id in fake.live:
            return fake.live[id]
        if id == "chatcmpl-long":
            return fake.long_trace()
        if not re.fullmatch(r"chatcmpl-\d{4}", id):
            return problem(404, f"no trace {id!r} is stored: it may have been removed by age")
        told, summary = fake.stored(int(id[-4:]))
        return fake.as_trace(told, created=summary["created"], steering="0.06 calm" if summary["steering"] else "")

    @made.get("/v1/traces/{id}/page")
    def page(id: str) -> HTMLResponse:
        return HTMLResponse("<!doctype html><title>page</title>one file")

    @made.post("/v1/score")
    def score(body: dict[str, Any]) -> dict[str, Any]:
        told = Told("score-1", Mind(9), [])
        for piece in pieces(body["text"]):
            told.add(piece, "text", (-0.4, 0.2, 1.0))
        return {**fake.as_trace(told), "visible": None, "gap": None}

    @made.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> Response:
        fake.asked.append(body)
        if fake.busy:
            fake.busy -= 1
            return problem(429, "the queue is full: 64 requests wait already; try again later", type="rate_limit_error")
        return StreamingResponse(fake.reply(body), media_type="text/event-stream")

    @made.get("/v1/events")
    async def events() -> StreamingResponse:
        queue: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        fake.listeners.append(queue)

        async def sent() -> AsyncIterator[bytes]:
            try:
                yield b": hello\n\n"
                while True:
                    try:
                        event, data = await asyncio.wait_for(queue.get(), 15)
                        yield f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
                    except TimeoutError:
                        yield b": still here\n\n"
            finally:
                fake.listeners.remove(queue)

        return StreamingResponse(sent(), media_type="text/event-stream")

    @made.post("/fake/traffic")
    async def cause(request: Request) -> dict[str, str]:
        body = await request.json()
        fake.task = asyncio.create_task(fake.traffic(body["number"], body["key"]))  # type: ignore[attr-defined]
        return {}

    @made.get("/v1/studies")
    def studies() -> dict[str, Any]:
        if fake.empty:
            return {"object": "list", "data": []}
        runs = [study("smollm2-135m"), study("qwen3-0.6b")]
        return {
            "object": "list",
            "data": [
                {
                    "id": run["id"],
                    "model": run["model"],
                    "created": run["created"],
                    "findings": len(run["findings"]),
                    "holds": run["counts"]["holds"],
                    "counts": run["counts"],
                }
                for run in runs
            ],
        }

    @made.get("/v1/studies/{id}")
    def one_study(id: str) -> Any:
        if id not in ("smollm2-135m", "qwen3-0.6b"):
            return problem(404, f"no run {id!r}")
        return study(id)

    @made.get("/v1/studies/{id}/figures/{figure}")
    def figure(id: str, figure: str) -> dict[str, Any]:
        return FIGURES[figure][2]

    return made


# ── a study ──

CLAIMS = (
    ("separation", "The vectors name the concept of a text on a new topic", 0.48, 0.005),
    ("separation", "The concept is among the five strongest readings", 0.77, 0.029),
    ("separation", "Texts read higher on their own concept than other texts do", 0.96, 0.5),
    ("geometry", "The first component is human valence", 0.84, 0.1),
    ("geometry", "The second component is human arousal", 0.61, 0.11),
    ("geometry", "Clusters follow the published ones", 0.33, 0.02),
    ("dose", "Readings rise with the dose in the story", 0.41, 0.0),
    ("concealment", "An emotion that is denied is read above its words", 0.12, 0.0),
    ("reply", "What is read before a reply predicts its tone", 0.29, 0.08),
    ("preferences", "Steering towards calm raises what is preferred", 0.05, 0.0),
)


def study(id: str) -> dict[str, Any]:
    draw = np.random.default_rng(len(id))
    findings = []
    for number, (name, claim, value, chance) in enumerate(CLAIMS):
        here = value + (0 if id == "smollm2-135m" else float(draw.normal(0, 0.12)))
        half = 0.02 + 0.01 * (number % 4)
        low = here - half
        verdict = "untestable" if number == 9 else "holds" if low > chance + 0.08 else "weak" if low > chance else "fails"
        estimate = {"value": here, "low": low, "high": here + half, "n": 2052 // (1 + number % 3), "level": 0.95, "unit": ""}
        null = {
            "value": chance,
            "low": chance - 0.02,
            "high": chance + 0.03,
            "p": 0.0009 if verdict == "holds" else 0.21,
            "draws": 1000,
            "kind": "labels exchanged within topics",
        }
        untestable = verdict == "untestable"
        findings.append(
            {
                "study": name,
                "id": f"claim-{number}",
                "claim": claim,
                "estimate": None if untestable else estimate,
                "null": None if untestable else null,
                "published": "r = 0.81" if number == 3 else None,
                "verdict": verdict,
                "rule": "holds: p <= 0.05 and the interval well above chance; weak: p <= 0.05 only; fails: otherwise",
                "note": "At the layer chosen on the training folds; 5 folds of whole topics.",
                "figure": "accuracy",
            }
        )
    counts = {verdict: sum(f["verdict"] == verdict for f in findings) for verdict in ("holds", "weak", "fails", "untestable")}
    return {
        "id": id,
        "model": id,
        "created": (START - timedelta(days=2 + len(id))).isoformat(),
        "title": f"Emotion vectors of {id}",
        "summary": f"{counts['holds']} of {len(findings)} findings hold on {id}; {counts['weak']} are weak, "
        f"{counts['fails']} fail and {counts['untestable']} could not be tested.",
        "counts": counts,
        "findings": findings,
        "figures": [{"id": key, "title": title, "caption": caption} for key, (title, caption, _) in FIGURES.items()],
    }


def _figures() -> dict[str, tuple[str, str, dict[str, Any]]]:
    draw = np.random.default_rng(2)
    x = list(range(-1, 30))
    y = [round(0.08 + 0.5 * (1 - np.exp(-(i + 1) / 6)), 3) for i in x]
    curve = {
        "data": [
            {
                "type": "scatter",
                "x": x + x[::-1],
                "y": [v + 0.03 for v in y] + [v - 0.03 for v in y[::-1]],
                "fill": "toself",
                "line": {"width": 0},
                "fillcolor": "rgba(68,119,170,0.2)",
                "showlegend": False,
                "hoverinfo": "skip",
            },
            {"type": "scatter", "x": x, "y": y, "name": "own topic", "line": {"color": "#4477aa"}},
            {
                "type": "scatter",
                "x": x,
                "y": [0.006 + 0.01 * abs(float(v)) for v in draw.normal(size=len(x))],
                "name": "labels <b>exchanged</b>",
                "line": {"color": "#d5672a", "dash": "dash"},
            },
        ],
        "layout": {
            "height": 320,
            "margin": {"l": 52, "r": 12, "t": 12, "b": 44},
            "xaxis": {"title": {"text": "layer"}},
            "yaxis": {"title": {"text": "accuracy"}},
            "legend": {"orientation": "h", "y": 1.08},
        },
    }
    names = ["happy", "proud", "calm", "sad", "afraid", "angry", "desperate", "guilty"]
    v = draw.normal(size=(8, 4))
    cosines = (v @ v.T / np.outer(np.linalg.norm(v, axis=1), np.linalg.norm(v, axis=1))).round(2)
    heat = {
        "data": [{"type": "heatmap", "z": cosines.tolist(), "x": names, "y": names, "coloraxis": "coloraxis"}],
        "layout": {
            "height": 360,
            "margin": {"l": 76, "r": 12, "t": 12, "b": 64},
            "coloraxis": {"cmin": -1, "cmax": 1, "colorscale": [[0, "#3166b0"], [0.5, "#fbfbfa"], [1, "#c8402f"]]},
        },
    }
    return {
        "accuracy": ("Held-out accuracy over layers", "Means over concepts; the band is the 95 % interval over texts.", curve),
        "cosines": ("Likeness of eight emotions", "Cosines of their vectors at layer 20.", heat),
    }


FIGURES = _figures()


class Running:
    """The server in a thread, for as long as the block lasts.

    Example:
        >>> with Running(Fake()) as url: ...   # doctest: +SKIP
    """

    def __init__(self, fake: Fake, port: int = 0) -> None:
        self.fake = fake
        self.server = uvicorn.Server(uvicorn.Config(app(fake), port=port, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.server.started:
            pass
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True  # those who follow the events never leave
        self.thread.join(10)


if __name__ == "__main__":
    uvicorn.run(app(Fake()), port=int(sys.argv[1]) if sys.argv[1:] else 8123)
