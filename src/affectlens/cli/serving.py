"""The commands around a server: ``serve``, ``keys``, ``replay``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from affectlens.cli.options import FILE, find_baseline, open_model, shared, vectors_and_engine

if TYPE_CHECKING:
    from affectlens.baseline import Baseline
    from affectlens.engine import Engine
    from affectlens.vectors import ConceptVectors


@click.command()
@click.argument("vectors")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen. Any address but this machine's own needs --api-keys."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--rules", metavar="RULES", help="Rules to watch, with their actions: a file, or one rule.")
@click.option("--baseline", type=FILE, help="What z is stated against.  [default: that beside the vectors]")
@click.option("--calibration", type=FILE, help="The safe ranges of steering.  [default: calibration.json beside the vectors]")
@click.option("--api-keys", type=FILE, help="Ask for a key: a file that affectlens keys new writes.")
@click.option("--store", metavar="URL", default="traces.db", show_default=True, help="An SQLite file, or postgresql://…")
@click.option(
    "--store-text",
    type=click.Choice(["full", "hash", "none"]),
    default="full",
    show_default=True,
    help="What to keep of prompts and replies; scores are kept in any case.",
)
@click.option("--keep-days", type=click.FloatRange(0, min_open=True), help="Forget replies that are older.")
@click.option("--keep-gb", type=click.FloatRange(0, min_open=True), help="Forget the oldest when the store is larger.")
@click.option("--watch", metavar="NAME", multiple=True, help="An emotion to watch; may be repeated.  [default: 12]")
@click.option("--allow-unsafe", is_flag=True, help="Do not clamp strengths to the safe range.")
@click.option("--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Replies that are generated at once.")
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="Replies that may wait; others get 429.")
@click.option(
    "--time-limit", type=click.FloatRange(0, min_open=True), default=300, show_default=True, help="Seconds of a reply at most."
)
@click.option("--max-tokens", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of a reply at most.")
@click.option(
    "--engine", "backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="What runs the model."
)
@click.option("--runs", type=FILE, help="A folder of runs whose studies the dashboard shows.")
@shared("concepts", "layer", "model", "device", "dtype", "allow")
def serve(vectors: str, rules: str | None, api_keys: Path | None, backend: str, **options: Any) -> None:
    """Serve the model of VECTORS: OpenAI's API with emotion dials and live readings, and a dashboard.

    POST /v1/chat/completions takes what OpenAI's clients send; their extra_body adds emotion_bias, readings, rules and compare.
    The whole contract is in docs/serve.md. SIGTERM and Ctrl-C let replies end.
    """
    from datetime import timedelta

    from affectlens.actions import read_policies
    from affectlens.concepts import ConceptSet
    from affectlens.errors import MissingExtra
    from affectlens.monitor import Monitor

    try:
        from affectlens.server.app import create_app, refuse_open, run
        from affectlens.server.keys import read_keys
        from affectlens.server.metrics import Metrics
        from affectlens.server.service import Service
        from affectlens.server.settings import Settings
        from affectlens.server.store import Store
        from affectlens.server.telemetry import Telemetry
        from affectlens.sharing import SharedEngine, in_a_thread
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "fastapi", "serve") from None
    _log_to_stderr()
    settings = Settings(
        watched=options.pop("watch"),
        **{key: options.pop(key) for key in ("host", "port", "concurrency", "queue", "time_limit", "max_tokens", "allow_unsafe")},
    )
    # What can be found wrong is found wrong before a model is loaded.
    keys = read_keys(api_keys) if api_keys else ()
    refuse_open(settings, keys)
    policies = read_policies(rules) if rules else ()
    known = ConceptSet.load(options["concepts"])
    days, gigabytes = options.pop("keep_days"), options.pop("keep_gb")
    store = Store(
        options["store"],
        text=options["store_text"],
        max_age=timedelta(days=days) if days else None,
        max_bytes=round(gigabytes * 1e9) if gigabytes else None,
    )
    context = click.get_current_context()

    def opened() -> tuple[ConceptVectors, Engine, Baseline]:
        with context.scope(cleanup=False):  # which a thread has to be told
            loaded, engine = vectors_and_engine(vectors, backend=backend, **options)
            if options["calibration"]:
                loaded = _calibrated(loaded, vectors, options["calibration"])
            return loaded, engine, find_baseline(vectors, loaded, engine, options["baseline"])

    # vLLM computes in processes of its own.
    loaded, engine, baseline = opened() if backend == "vllm" else in_a_thread(opened)
    monitor = Monitor(loaded, baseline, rules=policies)
    shared_engine = SharedEngine(engine, live=settings.concurrency, queue=settings.queue, deadline=settings.time_limit)
    names = [each.rule.name for each in policies] + [each.name for each in store.rules()]
    watched = settings.watched or Service.shown(loaded)
    metrics = Metrics(
        watched,
        rules=names,
        depth=lambda: shared_engine.depth,
        status=store.status,
        undelivered=lambda: monitor.reporter.undelivered,
    )
    source = str(Path(vectors).resolve()) if Path(vectors).exists() else vectors
    service = Service(
        shared_engine, monitor, store, settings=settings, source=source, metrics=metrics, telemetry=Telemetry.configured(watched)
    )  # fmt: skip
    app = create_app(service, keys=keys, runs=options["runs"], concepts=known)

    def ready(address: str) -> None:
        safe = "clamped to the calibrated range" if loaded.calibration else "refused, since nothing was calibrated"
        click.echo(f"{engine.info.id} at {address}/v1, dashboard at {address}/", err=True)
        click.echo(f"{len(loaded)} emotions read at layer {loaded.layer}; {monitor.ready(engine).note}", err=True)
        click.echo(f"steering at layer {loaded.steering_layer}: {'any strength' if settings.allow_unsafe else safe}", err=True)
        asked = f"{len(keys)} API keys" if keys else "no API key, this machine only"
        click.echo(f"{len(policies)} rules, {asked}, replies kept in {store}", err=True)

    run(app, ready=ready)


def _log_to_stderr() -> None:
    """What goes wrong while nobody looks."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _calibrated(vectors: ConceptVectors, name: str, path: Path) -> ConceptVectors:
    """Vectors with a calibration that lies elsewhere; it must be of these vectors."""
    from affectlens.calibration import read_calibration
    from affectlens.errors import FormatError
    from affectlens.runs import read_json
    from affectlens.vectors import vectors_folder

    config = vectors_folder(name) / "config.json"
    if not config.exists():
        raise FormatError(f"{name} is no folder of vectors that a calibration could belong to: leave --calibration out")
    folder = path if path.is_dir() else path.parent
    return vectors.with_calibration(read_calibration(folder, vectors=str(read_json(config).get("sha256"))))


@click.group()
def keys() -> None:
    """API keys of a server."""


@keys.command("new")
@click.argument("name")
@click.option("--file", type=click.Path(path_type=Path), required=True, help="Where its hash is added, for serve --api-keys.")
@click.option("--per-minute", type=click.IntRange(1), help="Requests that it may make in a minute.  [default: any number]")
def keys_new(name: str, file: Path, per_minute: int | None) -> None:
    """Make an API key for NAME and print it, once: only its hash is kept."""
    from affectlens.server.keys import new_key

    click.echo(new_key(name, file, rate=per_minute))
    click.echo(f"the hash of this key is in {file}; restart the server to let it in", err=True)


@click.command()
@click.argument("trace")
@click.option(
    "--store",
    "source",
    default="traces.db",
    show_default=True,
    metavar="URL|FILE",
    help="Where it is kept: the store of a server, or a file that was exported as jsonl.",
)
@click.option("--vectors", metavar="VECTORS", help="The vectors that read it.  [default: where they were then]")
@shared("model", "device", "dtype", "json")
def replay(trace: str, source: str, vectors: str | None, model: str | None, device: str, dtype: str, as_json: bool) -> None:
    """Make the stored reply TRACE again, with the same model, seed and steering, and compare it to the bit.

    TRACE is the id of a reply. Exit 0 when the text, the tokens and all scores are the same; 1 with the first difference.
    """
    from dataclasses import asdict

    from affectlens.errors import FormatError, MissingExtra
    from affectlens.exchange import load_vectors

    try:
        from affectlens.server.replay import find, replay
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "sqlalchemy", "serve") from None
    record = find(source, trace)
    kept = vectors or record.request.get("vectors", {}).get("path")
    if not kept:
        raise FormatError(f"{trace} does not say which vectors read it: name them with --vectors")
    loaded = load_vectors(str(kept))
    was = record.model
    engine = open_model(
        model or str(was["id"]),
        device=str(was["device"]) if device == "auto" else device,
        dtype=str(was["dtype"]) if dtype == "auto" else dtype,
    )
    found = replay(record, engine, loaded)
    click.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else str(found))
    sys.exit(0 if found.verdict == "same" else 1)
