"""How fast are replies when several people ask at once, and what do readings and steering cost then?

    python bench/serving.py              some twelve minutes on two idle cores, two of them for vectors
    python bench/serving.py --short      a tiny model, few and short replies

Callers ask over HTTP, each for one reply after the other, streaming; all ways get the same prompts, seeds and lengths. Measured
are generated tokens per second over all callers, from the first request to the last token, and the time to the first token.

* **a loop**: one request at a time through ``Engine.stream`` in this process, without HTTP: what somebody writes first. It has a
  thread of its own, the only one here that computes, since that is how it is fastest.
* **transformers serve**, where it runs, in its default settings and with continuous batching, in a process of its own.
* **affectlens serve** in a process of its own. It always reads 171 emotions of every token, watches rules, and keeps every
  reply; the rows differ in what callers ask for besides: nothing, readings of all emotions with every token, their own steering.
* **the passes alone**: the same requests through :meth:`Engine.session` in this process with and without readouts and steering,
  in turn. What readings and steering cost is told here, apart from HTTP and the store.

Vectors are fitted to a few bundled stories of every emotion, and z scores are against the neutral dialogues, before anything is
timed; the short form makes both up. Targets, fixed beforehand: at 8 callers at least 3
times the loop; readings of 171 emotions and mixed steering together cost at most 8 % of the passes. Writes
``bench/results/serving.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from affectlens.baseline import Baseline, neutral_dialogues
from affectlens.corpus import load
from affectlens.discovery import Recipe, discover
from affectlens.engine import Request, Result, Sampling, Where
from affectlens.engines.hf import HFEngine
from affectlens.server.service import model_name
from affectlens.sharing import in_a_thread
from affectlens.traces import Probe
from affectlens.vectors import ConceptVectors
from host import MODEL, RESULTS, begun, keep, peak, say, threads, tiny_model
from monitoring import MadeUp
from speed_tables import serving

SEED = 20261129
STRENGTH = 0.05
DIALS = ("calm", "desperate", "angry", "happy")
STORIES, DIALOGUES = 2, 60  # of each emotion, that vectors are fitted to; and behind the baseline
START = 300.0  # seconds that a server may take to start


@dataclass(frozen=True)
class Asked:
    """One reply that somebody wants."""

    prompt: str
    seed: int
    dial: tuple[str, float]


def asked(count: int) -> list[Asked]:
    """Requests for stories; each caller turns another dial."""
    stories = load("stories")
    step = len(stories) // count
    prompts = [f"Tell me a long story about {stories[i * step]['topic']}." for i in range(count)]
    return [
        Asked(prompt, SEED + i, (DIALS[i % len(DIALS)], STRENGTH * (-1) ** (i // len(DIALS)))) for i, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class Reply:
    """When its first token came, in seconds after it was asked for, and how many tokens it has."""

    first: float
    tokens: int


# ── callers ──


def callers(count: int, wanted: Sequence[Asked], ask: Callable[[Asked], Reply]) -> dict[str, Any]:
    """All requests, shared out among so many callers; each asks for its next reply when it has one."""
    waiting, replies, errors = list(wanted)[::-1], list[Reply](), list[BaseException]()
    lock = threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                if not waiting:
                    return
                each = waiting.pop()
            try:
                reply = ask(each)
            except BaseException as error:
                errors.append(error)
                return
            with lock:
                replies.append(reply)

    threads = [threading.Thread(target=work) for _ in range(count)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    firsts = sorted(reply.first for reply in replies)
    return {
        "replies": len(replies),
        "tokens": sum(reply.tokens for reply in replies),
        "seconds": seconds,
        "first": {"median": statistics.median(firsts), "p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]},
    }


def over_http(url: str, model: str, tokens: int, extra: Callable[[Asked], dict[str, Any]]) -> Callable[[Asked], Reply]:
    """Ask an OpenAI-compatible server for a streamed chat completion."""
    client = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None))

    def ask(each: Asked) -> Reply:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": each.prompt}],
            "max_tokens": tokens,
            "temperature": 0.0,
            "seed": each.seed,
            "stream": True,
            **extra(each),
        }
        start, first, pieces = time.perf_counter(), None, 0
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{url} answered {response.status_code}: {response.read()[:300]!r}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                choices = json.loads(line[6:]).get("choices") or [{}]
                if (choices[0].get("delta") or {}).get("content"):
                    first = time.perf_counter() - start if first is None else first
                    pieces += 1
        return Reply(first or time.perf_counter() - start, pieces)

    return ask


def in_a_loop(engine: HFEngine, tokens: int) -> Callable[[Asked], Reply]:
    """Answer one request after the other in this process, in one thread: more of them that compute would be slower."""
    thread = ThreadPoolExecutor(1)

    def answered(each: Asked, start: float) -> Reply:
        first, pieces = None, 0
        sampling = Sampling(max_tokens=tokens, temperature=0.0, seed=each.seed)
        for result in engine.stream(Request((("user", each.prompt),), sampling=sampling)):
            if not result.done and result.text:
                first = time.perf_counter() - start if first is None else first
                pieces += 1
        return Reply(first or 0.0, pieces)

    return lambda each: thread.submit(answered, each, time.perf_counter()).result()


# ── servers ──


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], url: str, ready: str, threads: int) -> Iterator[None]:
    """A server in a process of its own, until the block ends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )
        try:
            end = time.monotonic() + START
            while True:
                try:
                    if httpx.get(url + ready, timeout=5).status_code < 400:
                        break
                except httpx.HTTPError:
                    pass
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} does not serve: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def saved(engine: HFEngine, folder: Path) -> Path:
    """The model as a folder, which transformers' server can load."""
    if not (folder / "config.json").exists():
        engine.model.save_pretrained(folder)
        engine.tokenizer.save_pretrained(folder)
    return folder


# ── vectors ──


def fitted(engine: HFEngine) -> tuple[ConceptVectors, Baseline]:
    """Vectors of every emotion from a few bundled stories each, and how their scores are spread over neutral dialogues."""
    say("  fitting vectors")
    with tempfile.TemporaryDirectory() as folder:
        vectors = discover(engine, out=Path(folder) / "run", recipe=Recipe(per_concept=STORIES))
    probe = Probe(vectors, template=engine.info.template is not None)
    talks = neutral_dialogues(engine)[:DIALOGUES]
    return vectors, Baseline.measure(engine, talks, probe=probe, source=f"{DIALOGUES} neutral dialogues")


def made_up(engine: HFEngine) -> tuple[ConceptVectors, Baseline]:
    """Random directions in their place."""
    made = MadeUp.of(engine)
    return made.vectors(), made.baseline()


# ── the passes alone ──


def passes(engine: HFEngine, requests: Sequence[Request], together: int) -> tuple[float, int]:
    """Seconds, and tokens generated, when so many requests are with a session at any time."""
    session, waiting, tokens = engine.session(), list(requests)[::-1], 0
    start = time.perf_counter()
    while waiting or session.live:
        while waiting and session.live < together:
            session.submit(waiting.pop())
        for _, result in session.step():
            if not isinstance(result, Result):
                raise result
            tokens += 0 if result.done else 1
    session.close()
    return time.perf_counter() - start, tokens


def measure(short: bool = False) -> dict[str, Any]:
    """Time replies over HTTP and without, for one caller and for many."""
    return measured(arguments(["--short"] if short else []))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    with threads(args.threads):
        return _measured(args)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    model = str(tiny_model()) if args.short else MODEL
    dtype = "float32" if args.short else "auto"

    def opened() -> tuple[HFEngine, ConceptVectors, Baseline, bool]:
        engine = HFEngine.load(model, dtype=dtype)
        return engine, *(made_up(engine) if args.short else fitted(engine)), engine.session().exact

    engine, vectors, baseline, exact = in_a_thread(opened)  # the loop, too, has a thread of its own
    tokens, config = args.tokens, engine.model.config
    result: dict[str, Any] = {
        **begun("serving"),
        "model": engine.info.id if not args.short else "tiny",
        "dtype": engine.info.dtype,
        "parameters": engine.info.n_parameters,
        "threads": args.threads,
        "tokens": tokens,
        "emotions": len(vectors),
        "peak_tflops": peak(args.threads, width=config.hidden_size, hidden=config.intermediate_size, short=args.short),
        "exact": exact,
        "ways": {},
        "passes": {},
    }

    def timed(key: str, label: str, ask: Callable[[Asked], Reply], counts: Sequence[int]) -> None:
        callers(1, asked(1), ask)  # caches of shapes, connections
        entry = result["ways"].setdefault(key, {"label": label, "callers": {}})
        for count in counts:
            replies = args.replies * count * (2 if count == 1 else 1)
            entry["callers"][str(count)] = found = callers(count, asked(replies), ask)
            say(f"  {key:12} {count:3} callers: {found['tokens'] / found['seconds']:6.1f} tokens/s, first {found['first']}")

    timed("loop", "a loop, one at a time, no HTTP", in_a_loop(engine, tokens), args.callers[:2])

    dials: dict[str, Callable[[Asked], dict[str, Any]]] = {
        "affectlens": lambda each: {},
        "readings": lambda each: {"readings": {"emotions": "all"}},
        "steered": lambda each: {"emotion_bias": dict([each.dial])},
        "everything": lambda each: {"readings": {"emotions": "all"}, "emotion_bias": dict([each.dial])},
    }
    labels = {
        "affectlens": "**affectlens serve**",
        "readings": f"**affectlens serve**, {len(vectors)} readings with every token",
        "steered": "**affectlens serve**, each caller steers",
        "everything": "**affectlens serve**, both",
    }
    with tempfile.TemporaryDirectory() as folder:
        place = vectors.save(Path(folder) / "vectors")
        baseline.save(place / f"baseline-{vectors.layer}.json")
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [
            str(Path(sys.executable).with_name("affectlens")), "serve", str(place), "--port", str(port), "--allow-unsafe",
            "--store", f"{folder}/traces.db", "--rules", "desperate > 9 for 20 tokens", "--model", model, "--dtype", dtype,
        ]  # fmt: skip
        with server(command, url, "/ready", args.threads):
            for key, extra in dials.items():
                timed(key, labels[key], over_http(url, model_name(engine.info.id), tokens, extra), args.callers)

        hub = saved(engine, Path(folder) / "model")
        batched = ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
        for key, label, options, counts in (
            ("transformers", "transformers serve", [], args.callers[:2]),  # one at a time, as the loop
            ("continuous", "transformers serve, continuous batching", batched, args.callers),
        )[args.short :]:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [
                str(Path(sys.executable).with_name("transformers")), "serve", str(hub), "--host", "127.0.0.1",
                "--port", str(port), "--device", "cpu", "--dtype", engine.info.dtype, *options,
            ]  # fmt: skip
            try:
                with server(command, url, "/health", args.threads):
                    timed(key, label, over_http(url, str(hub), tokens, lambda each: {}), counts)
            except (RuntimeError, httpx.HTTPError) as error:
                say(f"{label} could not be measured: {str(error)[-500:]}")
                result["ways"].setdefault(key, {"label": label, "callers": {}})["problem"] = (
                    str(error).strip().splitlines()[-1][-200:]
                )

    readouts = (vectors.readout(where=Where(after=1), pool="none"),)
    for together in args.callers[1:]:
        plain = [
            Request((("user", each.prompt),), sampling=Sampling(max_tokens=tokens, temperature=0.0, seed=each.seed), stream=True)
            for each in asked(2 * together)
        ]
        full = [
            replace(request, readouts=readouts, steering=each.dial[1] * vectors[each.dial[0]])
            for request, each in zip(plain, asked(2 * together), strict=True)
        ]
        passes(engine, plain[:together], together)
        passes(engine, full[:together], together)
        pairs = []
        for number in range(args.rounds):
            order = [("plain", plain), ("full", full)][:: 1 if number % 2 else -1]
            pairs.append({key: passes(engine, requests, together) for key, requests in order})
        result["passes"][str(together)] = pairs
        costs = [pair["full"][0] / pair["full"][1] / (pair["plain"][0] / pair["plain"][1]) - 1 for pair in pairs]
        say(f"  passes of {together}: readings and steering cost {100 * float(np.median(costs)):+.1f} %")
    return result


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--replies", type=int, default=2, help="of each caller; twice as many where there is one caller")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5, help="of the passes alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--short", action="store_true", help="a tiny model, few and short replies, results not kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    args = parser.parse_args(argv)
    if args.short:
        args.callers, args.replies, args.tokens, args.rounds, args.out = [1, 2], 1, 4, 2, None
    return args


def main() -> int:
    args = arguments()
    result = measured(args)
    keep(result, args.out)
    print(serving(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
