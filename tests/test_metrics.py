"""Metrics: what they count, their bounded labels, and a real Prometheus that scrapes them and loads the alarms."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from affectlens.server import metrics as server_metrics
from affectlens.server.metrics import KINDS, OUTCOMES, ROLLING, Metrics
from affectlens.server.store import Store
from affectlens.server.writer import Status
from stored import NAMES, fired, made, missing

MONITORING = Path(server_metrics.__file__).parent / "monitoring"
WATCHED = ("desperate", "calm")


def whole(**more: Any) -> Metrics:
    """Metrics with all there is to ask."""
    given: dict[str, Any] = {"rules": ["panic"], "depth": lambda: (3, 7), "status": lambda: Status(waiting=2, lag=1.5, lost=4)}
    given["undelivered"] = lambda: {url: {"waiting": 1, "failed": n, "dropped": 2 * n} for n, url in enumerate("ab")}
    return Metrics(WATCHED, **{**given, **more})


def samples(metrics: Metrics) -> dict[str, float]:
    """What is exposed, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition()[0].decode()):
        for each in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(each.labels.items()))
            found[f"{each.name}{{{labels}}}"] = each.value
    return found


def test_a_reply_is_counted() -> None:
    metrics = whole()
    record = made(1, alerts=(fired("panic: desperate > 3"), fired("own: calm > 1")))
    metrics.reply(record)
    metrics.ended("chat", "busy")
    found = samples(metrics)
    assert found["affectlens_requests_total{kind=chat,outcome=stop}"] == 1
    assert found["affectlens_requests_total{kind=chat,outcome=busy}"] == 1
    assert found["affectlens_requests_total{kind=score,outcome=read}"] == 0, "what has not happened is 0, not absent"
    assert found["affectlens_tokens_total{type=prompt}"] == record.usage["prompt_tokens"]
    assert found["affectlens_tokens_total{type=generated}"] == record.usage["completion_tokens"]
    assert found["affectlens_alerts_total{rule=panic}"] == 1 and found["affectlens_alerts_total{rule=other}"] == 1
    assert found["affectlens_request_seconds_sum{kind=chat}"] == 0.5
    assert found["affectlens_first_token_seconds_sum{}"] == 0.05 and found["affectlens_queue_seconds_count{}"] == 1
    assert (found["affectlens_waiting_requests{}"], found["affectlens_live_requests{}"]) == (3, 7)
    store = {name: found[f"affectlens_store_{name}{{}}"] for name in ("up", "waiting_records", "lag_seconds", "lost_total")}
    assert store == {"up": 1, "waiting_records": 2, "lag_seconds": 1.5, "lost_total": 4}
    told = {name: found[f"affectlens_webhook_{name}{{}}"] for name in ("waiting_alarms", "failed_total", "dropped_total")}
    assert told == {"waiting_alarms": 2, "failed_total": 1, "dropped_total": 2}, "of all webhooks together"


def test_a_turn_is_its_highest_score_and_its_mean() -> None:
    metrics, record = whole(), made(3)
    metrics.reply(record)
    found = samples(metrics)
    for speaker in ("user", "assistant"):
        rows = record.trace.scores[record.trace.of(speaker)]
        for name in WATCHED:
            own = rows[:, NAMES.index(name)]
            for what, value in (("peak", own.max()), ("mean", own.mean())):
                assert bucket(found, what, name, speaker) == {edge: float(edge >= value) for edge in server_metrics.Z}


def bucket(found: dict[str, float], what: str, emotion: str, speaker: str) -> dict[float, float]:
    """How many turns are at or below each edge. A sum is not exposed where values can be negative."""
    name = f"affectlens_turn_{what}_z_bucket"
    return {edge: found[f"{name}{{emotion={emotion},le={edge},speaker={speaker}}}"] for edge in server_metrics.Z}


def test_only_what_is_new_in_a_conversation_is_counted() -> None:
    """The whole conversation comes again with every request: its earlier turns were counted then."""
    metrics, record = whole(), made(4, tokens=4, prompt="a b")
    roles = ("user", "assistant", "template", "user", "template", *["assistant"] * 4)
    assert len(roles) == len(record.trace.layout) + 1
    layout = replace(record.trace.layout, roles=roles[1:])
    scores = np.full((len(layout), len(NAMES)), 0.5, np.float32)
    scores[:2], scores[2] = 9, 2.5
    metrics.reply(replace(record, trace=replace(record.trace, layout=layout, scores=scores)))
    found = samples(metrics)
    for speaker, mean in (("assistant", 0.5), ("user", 2.5)):
        assert bucket(found, "mean", "calm", speaker) == {edge: float(edge >= mean) for edge in server_metrics.Z}


def test_the_rolling_mean_is_over_words() -> None:
    metrics = whole()
    records = [made(n, tokens=5 + n) for n in range(ROLLING + 5)]
    for record in records:
        metrics.reply(record)
    metrics.reply(replace(made(99), kind="score", finish="read"))  # what is only read is no reply
    rows = np.concatenate([record.trace.scores[record.trace.of("assistant")] for record in records[-ROLLING:]])
    for name in WATCHED:
        expected = rows[:, NAMES.index(name)].mean(dtype=np.float64)
        assert samples(metrics)[f"affectlens_rolling_z{{emotion={name}}}"] == pytest.approx(expected, abs=1e-6)


def test_labels_are_bounded() -> None:
    """Whatever callers bring, the number of series stays."""
    metrics = whole()
    metrics.reply(made(0))
    before = set(samples(metrics))
    for n in range(1, 60):
        alerts = (fired(f"rule_{n}: calm > {n}"),)
        record = made(n, alerts=alerts, key=f"key {n}", model={"id": f"model {n}"})
        roles = tuple(f"role {n}" if role == "user" else role for role in record.trace.layout.roles)
        metrics.reply(replace(record, trace=replace(record.trace, layout=replace(record.trace.layout, roles=roles))))
    assert set(samples(metrics)) == before
    assert samples(metrics)["affectlens_alerts_total{rule=other}"] == 59
    metrics.add_rule("rule_5")
    metrics.reply(made(5, alerts=(fired("rule_5: calm > 5"),)))
    assert samples(metrics)["affectlens_alerts_total{rule=rule_5}"] == 1
    for kind, outcome in (("chat", "whatever"), ("whatever", "stop")):
        with pytest.raises(AssertionError, match="fixed lists"):
            metrics.ended(kind, outcome)


def test_replies_of_many_threads_are_all_counted() -> None:
    metrics, records = whole(), [made(n) for n in range(40)]
    threads = [
        threading.Thread(target=lambda part=part: [metrics.reply(record) for record in part])
        for part in (records[:20], records[20:])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics)["affectlens_requests_total{kind=chat,outcome=stop}"] == 40


def test_two_servers_in_one_process_do_not_meet() -> None:
    first, second = whole(), whole()
    first.reply(made(1))
    assert samples(second)["affectlens_requests_total{kind=chat,outcome=stop}"] == 0


def test_the_format_is_the_one_that_is_asked_for() -> None:
    body, kind = whole().exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
    assert whole().exposition()[1].startswith("text/plain")


def test_without_a_store_or_a_model_nothing_is_made_up() -> None:
    names = {name.partition("{")[0] for name in samples(Metrics(["calm"]))}
    assert not any("store" in name or "waiting" in name for name in names)


def test_the_state_of_a_store_shows(tmp_path: Path) -> None:
    with Store(str(tmp_path / "traces.db")) as store:
        metrics = whole(status=store.status)
        store.put(made(1)).result(30)
        assert samples(metrics)["affectlens_store_written_total{}"] == 1
        (tmp_path / "traces.db").rename(tmp_path / "away.db")
        future = store.put(made(2))
        end = time.monotonic() + 20
        while samples(metrics)["affectlens_store_up{}"] == 1 and time.monotonic() < end:
            time.sleep(0.02)
        found = samples(metrics)
        assert found["affectlens_store_up{}"] == 0 and found["affectlens_store_waiting_records{}"] == 1
        assert found["affectlens_store_failures_total{}"] >= 1 and found["affectlens_store_lag_seconds{}"] > 0
        (tmp_path / "away.db").rename(tmp_path / "traces.db")
        future.result(30)
        assert samples(metrics)["affectlens_store_up{}"] == 1


# ── what reads them ──


def queries() -> Iterator[str]:
    """Every expression of the board and of the alarms."""
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for annotation in board["annotations"]["list"]:
        yield annotation["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    for line in (MONITORING / "alerts.yml").read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("expr: "):
            yield line.strip().removeprefix("expr: ")


def test_every_query_names_what_exists() -> None:
    metrics = whole()
    metrics.reply(made(1))
    there = samples(metrics)
    series: dict[str, set[str]] = {}
    for key in there:
        name, _, labels = key.partition("{")
        series.setdefault(name, set()).update(part.partition("=")[0] for part in labels.rstrip("}").split(",") if part)
    known = {*series, "up"}
    asked = list(queries())
    assert len(asked) > 30
    for query in asked:
        names = re.findall(r"\b(?:affectlens|process)_\w+|\bup\b", query)
        assert names and set(names) <= known, query
        for name, body in re.findall(r"\b((?:affectlens|process)_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)=", body))
            assert labels <= series[name] | {"instance", "job"}, query
            for label, value in re.findall(r'(\w+)=~?"([^"$]*)"', body):
                allowed = {
                    "outcome": OUTCOMES,
                    "kind": KINDS,
                    "speaker": server_metrics.SPEAKERS,
                    "type": ("prompt", "generated"),
                }
                assert set(value.split("|")) <= set(allowed[label]), query
    used = {name for query in asked for name in re.findall(r"affectlens_\w+", query)}
    counted = {name for name in series if name.startswith("affectlens_") and not name.endswith(("_created", "_sum", "_count"))}
    assert counted - used == set(), "everything is shown somewhere"


def test_the_board_fits_together() -> None:
    board = json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and board["uid"] == "affectlens"
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing("prometheus")
    assert found is not None
    return found


def test_promtool_accepts_the_alarms_and_the_metrics() -> None:
    promtool = tool("promtool")
    done = subprocess.run(
        [promtool, "check", "rules", str(MONITORING / "alerts.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "9 rules found" in done.stdout, done.stdout + done.stderr
    metrics = whole()
    metrics.reply(made(1))
    done = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.exposition()[0].decode(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[tuple[Metrics, int]]:
    """Metrics behind HTTP, and the port of a Prometheus that scrapes them twice a second with our alarms."""
    prometheus, metrics = tool("prometheus"), whole()

    def app(environment: dict[str, Any], start: Any) -> list[bytes]:
        body, kind = metrics.exposition(environment.get("HTTP_ACCEPT", ""))
        start("200 OK", [("Content-Type", kind)])
        return [body]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with make_server("127.0.0.1", 0, app, handler_class=_Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shutil.copy(MONITORING / "alerts.yml", tmp_path)
        settings = (
            "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\nrule_files: [alerts.yml]\nscrape_configs:\n"
            f"  - job_name: affectlens\n    static_configs: [{{targets: ['127.0.0.1:{server.server_port}']}}]\n"
        )
        (tmp_path / "prometheus.yml").write_text(settings)
        with (tmp_path / "log").open("wb") as log:
            flags = [f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
            process = subprocess.Popen([prometheus, *flags, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            yield metrics, port
        finally:
            process.terminate()
            process.wait(20)
            server.shutdown()


def ask(port: int, path: str, seconds: float = 40.0, until: Any = bool) -> Any:
    """What Prometheus answers, once it does."""
    end = time.monotonic() + seconds
    last: Any = None
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                last = json.load(answer)["data"]
            if until(last):
                return last
        except OSError as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"{path}: {last}")


def value(port: int, query: str, until: Any = bool) -> float:
    path = f"/api/v1/query?query={urllib.request.quote(query)}"  # type: ignore[attr-defined]
    found = ask(port, path, until=lambda data: data["result"] and until(float(data["result"][0]["value"][1])))
    return float(found["result"][0]["value"][1])


def test_a_real_prometheus_scrapes_and_alarms(scraped: tuple[Metrics, int]) -> None:
    metrics, port = scraped
    metrics.reply(made(1))
    assert value(port, 'up{job="affectlens"}') == 1
    assert value(port, 'affectlens_requests_total{kind="chat",outcome="stop"}') == 1
    assert value(port, "affectlens_store_lost_total") == 4
    groups = ask(port, "/api/v1/rules", until=lambda data: data["groups"])["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert len(rules) == 9 and all(rule["health"] in ("ok", "unknown") for rule in rules.values())
    for n in range(3):
        metrics.reply(made(10 + n, alerts=(fired("panic: desperate > 3"),)))
        time.sleep(1.1)
    firing = ask(port, "/api/v1/alerts", until=lambda data: any(each["state"] == "firing" for each in data["alerts"]))["alerts"]
    panic = next(each for each in firing if each["labels"]["alertname"] == "AffectlensRuleFired")
    assert panic["labels"]["rule"] == "panic" and panic["annotations"]["summary"] == "Rule panic fired"
    for query in queries():  # Prometheus understands all of them
        if query.startswith("label_values"):
            continue
        plain = query.replace("$instance", ".*")
        ask(port, f"/api/v1/query?query={urllib.request.quote(plain)}", until=lambda data: "result" in data)  # type: ignore[attr-defined]
