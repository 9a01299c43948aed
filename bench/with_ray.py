"""What workers give and cost: speed with none, one and two, memory of the head, and what a hundred would need.

    python bench/with_ray.py                # nine minutes on two cores
    python bench/with_ray.py --short        # few texts, one round, results not kept: does everything still work?

* **Speed.** Texts a second, read at every layer (what discover does) and scored at every token (what score-corpus reads), in this
  process and by one and two workers. Each way runs in a process of its own, ways take turns. Seconds of processor time of the
  process that asks (the head) are measured with it.
* **Memory.** Peaks of the head and of two workers while they read corpora of three sizes, each four times the one before, from a
  parquet file: every token's residual at every layer of the toy, which is far more than anyone asks for. Then growth for each
  further thousand texts. Of the head also the memory of its own, without the pages of Ray's object store that it has seen (Ray
  maps the whole store into each process, and each page that was ever touched counts). Peaks of score-corpus beside it. What is
  under way fills memory first, so growth falls from one size to the next; where it does not, something is kept of each text.
* **A hundred workers.** Bytes of each item on the wire are counted, its seconds in the head and in a worker measured, and a
  program multiplies them. For a larger model the bytes are counted on results of its shape and a worker's seconds computed from
  its operations; the card's peak and the share of it that is reached are named.

Writes ``results/with_ray.json``; ``table.py`` puts the tables into ``docs/scale.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from affectlens.activations import SHARD, Text
from affectlens.corpus import load, stream
from affectlens.dataset import ROWS
from affectlens.engine import Engine, Reading, Readout, Request, Result, Where, open_engine
from affectlens.engines.ray import AHEAD, RayEngine
from host import HERE, MODEL, RESULTS, begun, keep, say
from speed_tables import on, packages, spread, table

WINDOW, WARM = 16, 16
"""Windows are small so that few texts make many of them."""

WAYS = {
    "process-1": ("in this process, 1 thread", 0, 1),
    "process-2": ("in this process, 2 threads", 0, 2),
    "workers-1": ("1 worker, 2 threads", 1, 2),
    "workers-2": ("2 workers, 1 thread each", 2, 2),
}
"""Label, workers (0: none), and threads that there are for all of it."""

DIALOGUES = 60
"""Behind the baseline that score-corpus needs: what it is does not matter here."""

WORKERS = 100
LARGE = {"name": "an 8B model (Qwen3-8B)", "layers": 36, "width": 4096, "parameters": 8.19e9}
CARD = {"name": "H200", "peak": 989e12, "share": 0.5}
"""Dense bf16 peak by the data sheet, and the share of it at which a worker is taken to read."""

Work = Callable[[Engine, list[str]], list[Request]]


def means(engine: Engine, texts: list[str]) -> list[Request]:
    """What extraction asks for: the mean and the norm at every layer."""
    layers, where = tuple(range(-1, engine.info.n_layers)), Where(after=49)
    readouts = Readout(layers, where), Readout(layers, where, "norm")
    return [Request(text, readouts=readouts) for text in texts]


def scores(engine: Engine, texts: list[str]) -> list[Request]:
    """What score-corpus asks for: every token's product with 171 directions and the centre, at one layer."""
    onto = np.random.default_rng(0).normal(size=(1, 172, engine.info.width)).astype(np.float32)
    readout = Readout((engine.info.default_layer,), Where(after=1), "none", onto)
    return [Request(text, readouts=(readout,)) for text in texts]


TASKS: dict[str, tuple[str, Work]] = {
    "means": ("means at every layer", means),
    "scores": ("171 scores of every token", scores),
}


def stories(n: int) -> list[str]:
    records = load("stories")
    return [records[i * len(records) // n]["text"] for i in range(n)]


# ── in a process of its own ──


def opened(model: str, workers: int) -> Engine:
    return RayEngine(model, replicas=workers) if workers else open_engine(model)


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """One round of every task."""
    texts = stories(job["texts"])
    found: dict[str, Any] = {}
    began = time.perf_counter()
    with opened(job["model"], job["workers"]) as engine:
        engine.window = WINDOW
        found["start"] = time.perf_counter() - began
        for name, (_, work) in TASKS.items():
            list(engine.run(work(engine, texts[: WARM * max(1, job["workers"])])))
            asked = work(engine, texts)
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(len(result.layout) for result in engine.run(asked))
            found[name] = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens}
    return found


def sizes(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes of an item on the wire, and the time to write and read it, as this model and the larger one have it."""
    from affectlens.engines import wire

    engine = open_engine(job["model"])
    texts = stories(WINDOW)
    found: dict[str, Any] = {"info": asdict(engine.info), "wire": {}}
    for name, (_, work) in TASKS.items():
        asked = tuple(work(engine, texts))
        results = tuple(engine.run(asked))
        found["wire"][name] = {"demo": _sizes(wire, asked, results)}
        many = LARGE["layers"] + 1 if name == "means" else 1
        large = tuple(replace(r, readings=tuple(_of_shape(x, many, name) for x in r.readings)) for r in results)
        found["wire"][name]["large"] = _sizes(wire, asked, large)
        found["wire"][name]["tokens"] = sum(len(r.layout) for r in results) / len(results)
    return found


def _of_shape(reading: Reading, layers: int, task: str) -> Reading:
    """A reading as the larger model would give it."""
    shape = reading.values.shape
    width = (LARGE["width"],) if task == "means" and len(shape) == 2 else shape[1:]
    return Reading(
        np.zeros((layers, *width), np.float32), np.zeros((layers, *reading.norms.shape[1:]), np.float32), reading.positions
    )


def _sizes(wire: Any, asked: tuple[Request, ...], results: tuple[Result, ...]) -> dict[str, float]:
    apart: dict[str, np.ndarray] = {}
    up, down = wire.pack(asked, apart=apart), wire.pack((results, None))

    def timed(work: Callable[[], Any]) -> float:
        spent = []
        for _ in range(20):
            began = time.process_time()
            work()
            spent.append(time.process_time() - began)
        return statistics.median(spent) / len(asked)

    return {
        "up": len(up) / len(asked),
        "down": len(down) / len(asked),
        "values": sum(reading.values.nbytes for result in results for reading in result.readings) / len(asked),
        "once": sum(array.nbytes for array in apart.values()),
        "head": timed(lambda: wire.pack(asked, apart={}))
        + timed(lambda: wire.unpack(down, tuple[tuple[Result, ...], wire.Failure | None])),
    }


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peaks of this process and of two workers while they read a corpus from disk."""
    count = own = 0
    with opened("toy", 2) as engine:
        engine.window = WINDOW
        everything = Readout(tuple(range(-1, engine.info.n_layers)), Where(), "none")
        requests = (Request(document.text, readouts=(everything,)) for document in stream(job["file"]))
        for number, result in enumerate(engine.run(requests)):
            count += result.readings[0].values.nbytes
            if not number % engine.window:
                own = max(own, _status()["RssAnon"])
        workers = [engine._ray.get(each.actor.__ray_call__.remote(lambda _: _status())) for each in engine._pool.up()]
    return {
        "came": count, "peak_mb": _status()["VmHWM"], "own_mb": own, "worker_mb": max(each["VmHWM"] for each in workers),
    }  # fmt: skip


def _status() -> dict[str, float]:
    """What the kernel says of this process's memory, in MB: ``VmHWM`` is its peak, ``RssAnon`` what is its own now."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[-1:] == ["kB"]}


def scored(job: dict[str, Any]) -> dict[str, Any]:
    """Processor time and peak of this process while workers score a corpus, and the bytes that it writes."""
    import affectlens as al
    from affectlens.baseline import Baseline, neutral_dialogues
    from affectlens.traces import Probe

    with opened(job["model"], 2) as engine:
        vectors = _vectors(engine)
        probe = Probe(vectors, template=engine.info.template is not None)
        baseline = Baseline.measure(engine, neutral_dialogues(engine)[:DIALOGUES], probe=probe, source="neutral dialogues")
        wall, cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as out:
            al.score_corpus(engine, job["file"], vectors=vectors, out=Path(out) / "scored", baseline=baseline, rows=job["rows"])
            seconds, spent = time.perf_counter() - wall, time.process_time() - cpu
            written = sum(path.stat().st_size for path in (Path(out) / "scored" / "data").iterdir())
    return {"seconds": seconds, "cpu": spent, "peak_mb": _status()["VmHWM"], "written": written}


def _vectors(engine: Engine) -> Any:
    """Vectors of any directions, as many as there are emotions."""
    from affectlens.concepts import ConceptSet
    from affectlens.vectors import ConceptVectors

    info, names = engine.info, tuple(ConceptSet.load("emotions").names)
    rng = np.random.default_rng(1)
    shape = (info.n_layers, len(names), info.width)
    directions = rng.normal(size=shape).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    ones = np.ones(shape[:2], np.float32)
    return ConceptVectors(
        names, tuple(range(info.n_layers)), info.default_layer, directions, ones, np.zeros((shape[0], info.width), np.float32),
        np.full(shape[0], 50.0, np.float32), tuple(np.zeros((0, info.width), np.float32) for _ in range(shape[0])),
        np.stack([0 * ones, 0.1 * ones], axis=-1), ones, np.ones(len(names)), asdict(info),
    )  # fmt: skip


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "speed": speed,
    "sizes": sizes,
    "memory": memory,
    "scored": scored,
}


# ── the whole ──


def part(name: str, threads: int, **job: Any) -> dict[str, Any]:
    """Run a part in a process of its own."""
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "with_ray.py"), "--part", name, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def corpus(folder: Path, n: int, *, short: bool) -> str:
    """A parquet file of texts for the toy, of 60 words each, or of bundled stories."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / f"{'toy' if short else 'stories'}-{n}.parquet"
    if short:
        toy = open_engine("toy")
        some = [toy.write(None, f"topic {i}", seed=i, words=60) for i in range(200)]
        rows: Iterator[Text] = (Text(f"t{i}", f"{i} {some[i % 200]}") for i in range(n))
    else:
        rows = (Text(f"t{i}", text) for i, text in enumerate(stories(n)))
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(file, schema) as writer:
        batch: list[dict[str, str]] = []
        for row in rows:
            batch.append({"id": row.id, "text": row.text})
            if len(batch) == 1000:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return str(file)


def growth(rows: list[dict[str, Any]], key: str) -> str:
    """MB for each further thousand texts: what each larger corpus shows beside the next smaller one."""
    pairs = itertools.pairwise(rows)
    found = [1000 * (more[key] - less[key]) / (more["texts"] - less["texts"]) for less, more in pairs]
    return ", then ".join(f"{each:+.2f}" for each in found)


def cluster(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a hundred workers would need, from bytes and seconds of an item.

    Of the demo model a worker is one thread of this machine; of the larger one a card, whose seconds follow from operations.
    """
    rows = []
    depth, width = result["sizes"]["info"]["n_layers"], result["sizes"]["info"]["width"]
    for task in TASKS:
        size = result["sizes"]["wire"][task]
        two = [run[task] for run in result["speed"]["workers-2"]]
        n = result["texts"]
        for shape in ("demo", "large"):
            if shape == "demo":
                worker = statistics.median(run["seconds"] for run in two) * 2 / n
            else:
                worker = 2 * LARGE["parameters"] * size["tokens"] / (CARD["peak"] * CARD["share"])
            head = statistics.median(run["cpu"] for run in two) / n + size[shape]["head"] - size["demo"]["head"]
            layers, wide = (depth, width) if shape == "demo" else (LARGE["layers"], LARGE["width"])
            stored = 4 * (layers + 1) * (wide + 1)
            if task == "scores":
                # With everything that score-corpus does with them.
                few, many = result["scored"]
                head, stored = ((many[key] - few[key]) / (many["rows"] - few["rows"]) for key in ("cpu", "written"))
            rate = WORKERS / worker
            # In flight are two shards for each worker, and as many again are drawn or wait to be handed on.
            shard = SHARD if task == "means" else ROWS
            units = AHEAD * WORKERS * shard * (size[shape]["down"] + 2 * size[shape]["up"])
            rows.append(
                {
                    "task": task, "model": result["model"] if shape == "demo" else LARGE["name"], "computed": shape == "large",
                    "worker_seconds": worker, "head_seconds": head, "rate": rate, "mb_in": rate * size[shape]["down"] / 1e6,
                    "mb_out": rate * size[shape]["up"] / 1e6, "head_cores": rate * head, "most_workers": worker / head,
                    "head_gb": (result["memory"][0]["peak_mb"] / 1e3) + units / 1e9, "gb_per_million": stored * 1e6 / 1e9,
                    "hours_per_million": 1e6 / min(rate, 1 / head) / 3600,
                }
            )  # fmt: skip
    return rows


def measure(short: bool = False) -> dict[str, Any]:
    """All parts, each in a process of its own; ways take turns. The short form asks the toy."""
    model, n, rounds = ("toy", 32, 1) if short else (MODEL, 64, 3)
    counts = (200, 400, 800) if short else (1000, 4000, 16000)
    result: dict[str, Any] = {
        **begun("with_ray"),
        "model": model, "texts": n, "rounds": rounds, "window": WINDOW, "workers": WORKERS, "card": CARD, "large": LARGE,
        "labels": {key: label for key, (label, _, _) in WAYS.items()}, "tasks": {key: label for key, (label, _) in TASKS.items()},
    }  # fmt: skip
    result["sizes"] = part("sizes", 1, model=model)
    result["speed"] = {key: [] for key in WAYS}
    for number in range(rounds):
        for key in list(WAYS)[:: -1 if number % 2 else 1]:
            _, workers, threads = WAYS[key]
            result["speed"][key].append(part("speed", threads, model=model, workers=workers, texts=n))
            say(f"round {number + 1}, {key}: {result['speed'][key][-1]}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, job in (("memory", {}), ("scored", {"model": "toy", "rows": 200})):
            files = [corpus(place, count, short=True) for count in counts]
            found = [{"texts": count, **part(name, 2, file=file, **job)} for count, file in zip(counts, files, strict=True)]
            result["memory" if name == "memory" else "scoring"] = found
            say(f"{name}: {found}")
        result["scored"] = []
        for rows in (n // 4, n):  # two sizes: what a report costs once is no cost of a text
            job = {"model": model, "rows": 16, "file": corpus(place, rows, short=False)}
            result["scored"].append({"rows": rows, **part("scored", 2, **job)})
        say(f"scored: {result['scored']}")
    return {**result, "cluster": cluster(result)}


def tables(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    n, runs = result["texts"], result["speed"]
    lines = [
        f"{result['model']}, {result['sizes']['info']['dtype']}, {n} bundled stories, windows of {result['window']}, "
        f"{result['rounds']} round(s), medians (ranges). {on(result['machine'])}. Versions: {packages(result)}.",
        "",
    ]
    rows = []
    for key, label in result["labels"].items():
        rates = [spread([n / run[task]["seconds"] for run in runs[key]], 1) for task in result["tasks"]]
        rows.append([label, *rates, f"{statistics.median(run['start'] for run in runs[key]):.0f}"])
    lines += table(["way", *(f"{label}: items/s" for label in result["tasks"].values()), "start, s"], rows)
    lines += [
        "",
        "Peak memory, measured, while two workers read a parquet file of the toy's texts, every token at every layer; and of "
        "score-corpus. The head's own is without the pages of Ray's object store.",
        "",
    ]
    peaks = ("own_mb", "peak_mb", "worker_mb")
    rows = [
        [f"{row['texts']:,}", f"{row['came'] / 1e9:.2f}", *(f"{row[key]:,.0f}" for key in peaks), f"{scored['peak_mb']:,.0f}"]
        for row, scored in zip(result["memory"], result["scoring"], strict=True)
    ]
    grown = [growth(result["memory"], key) for key in peaks]
    rows.append(["MB for each further 1,000", "", *grown, growth(result["scoring"], "peak_mb")])
    lines += table(["texts", "GB that came", "head's own, MB", "head, MB", "a worker, MB", "head at score-corpus, MB"], rows)
    card = result["card"]
    lines += [
        "",
        f"What {result['workers']} workers would need, computed. Of {result['model']} a worker is one thread of this machine, "
        f"and its seconds and bytes are measured. Of {result['large']['name']} it is one {card['name']}: bytes are counted on "
        f"results of its shape, seconds computed from its operations at {card['share']:.0%} of {card['peak'] / 1e12:,.0f} "
        "TFLOP/s.",
        "",
    ]
    heads = (
        "task", "model", "items/s of all", "into the head, MB/s", "out of it, MB/s", "cores of the head",
        "memory of the head, GB", "most workers of one head", "GB stored per million", "hours per million",
    )  # fmt: skip
    rows = [
        [
            result["tasks"][row["task"]], row["model"], f"{row['rate']:,.0f}", f"{row['mb_in']:,.1f}", f"{row['mb_out']:,.1f}",
            f"{row['head_cores']:.1f}", f"{row['head_gb']:.1f}", f"{row['most_workers']:,.0f}", f"{row['gb_per_million']:,.1f}",
            f"{row['hours_per_million']:.1f}",
        ]
        for row in result["cluster"]
    ]  # fmt: skip
    lines += table(heads, rows)
    lines += [
        "",
        "The head is one process: where it would need more than one core, it holds the workers up, and hours are those of the "
        "head. Stored are activations of extraction, and the columns that score-corpus adds, with the texts.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few texts, one round, results not kept")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part[0]](json.loads(args.part[1]))))
        return 0
    result = measure(args.short)
    keep(result, None if args.short else RESULTS / "with_ray.json")
    print(tables(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
