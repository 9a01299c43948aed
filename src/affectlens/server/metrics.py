"""What Prometheus scrapes: how the server is, and how the replies are.

    metrics = Metrics(["desperate", "calm"], rules=["cornered"], depth=engine.depth, status=store.status)
    metrics.reply(record)                      # once for every reply that has ended
    body, kind = metrics.exposition(accept)    # GET /metrics

All labels are from lists that the server knows: the watched emotions, the names of its rules, kinds and outcomes. Nothing that a
caller writes becomes a label. Rules that a caller brought along are counted together, as ``other``.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from affectlens.server.records import Record
from affectlens.server.writer import Status

KINDS = ("chat", "completion", "score")
OUTCOMES = ("stop", "length", "stopped", "timeout", "shutdown", "read", "cancelled", "error", "busy", "refused")
"""How a request can end: as its reply does (by the time limit and a shutdown, too), or by a caller who hung up, a fault, a full
queue, a bad request."""

SPEAKERS = ("assistant", "user")
ROLLING = 20
"""Replies over which the rolling means are taken."""

Z = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The server's metrics, in a registry of their own. Safe to use from many threads.

    Args:
        watched: The emotions that have metrics.
        rules: Names of the server's rules.
        depth: Gives how many requests wait for the model and how many it is running.
        status: Gives how the store is; None without a store.
        undelivered: Gives what webhooks have not been told (:attr:`affectlens.actions.Reporter.undelivered`); None without them.

    Example:
        >>> metrics = Metrics(["calm"], rules=["cornered"])
        >>> metrics.ended("chat", "busy")
        >>> b'affectlens_requests_total{kind="chat",outcome="busy"} 1.0' in metrics.exposition()[0]
        True
    """

    def __init__(
        self,
        watched: Sequence[str],
        *,
        rules: Iterable[str] = (),
        depth: Callable[[], tuple[int, int]] | None = None,
        status: Callable[[], Status] | None = None,
        undelivered: Callable[[], Mapping[str, Mapping[str, int]]] | None = None,
    ) -> None:
        self.watched = tuple(watched)
        self.registry = registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._latest: deque[tuple[np.ndarray, int]] = deque(maxlen=ROLLING)
        ProcessCollector(registry=registry)
        build = Gauge("affectlens_build_info", "The version that runs; always 1.", ["version"], registry=registry)
        build.labels(importlib.metadata.version("affectlens")).set(1)
        self._requests = Counter("affectlens_requests", "Requests that have ended.", ["kind", "outcome"], registry=registry)
        self._seconds = Histogram(
            "affectlens_request_seconds", "From a request to its last token.", ["kind"], buckets=SECONDS, registry=registry
        )
        self._first = Histogram(
            "affectlens_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=registry
        )
        self._queued = Histogram(
            "affectlens_queue_seconds", "How long a request waited for the model.", buckets=SECONDS, registry=registry
        )
        self._tokens = Counter("affectlens_tokens", "Tokens read and generated.", ["type"], registry=registry)
        self._peak = Histogram(
            "affectlens_turn_peak_z", "Highest z in a turn.", ["emotion", "speaker"], buckets=Z, registry=registry
        )
        self._mean = Histogram(
            "affectlens_turn_mean_z", "Mean z over a turn.", ["emotion", "speaker"], buckets=Z, registry=registry
        )
        self._rolling = Gauge(
            "affectlens_rolling_z", f"Mean z over the words of the latest {ROLLING} replies.", ["emotion"], registry=registry
        )
        self._alerts = Counter("affectlens_alerts", "Alarms.", ["rule"], registry=registry)
        self._rules = {"other"}
        for rule in rules:
            self.add_rule(rule)
        # What has not happened yet is 0, not absent: a rate over it must not be either.
        self._alerts.labels("other")
        for kind in KINDS:
            self._seconds.labels(kind)
            for outcome in OUTCOMES:
                self._requests.labels(kind, outcome)
        for kind in ("prompt", "generated"):
            self._tokens.labels(kind)
        for emotion in self.watched:
            for speaker in SPEAKERS:
                self._peak.labels(emotion, speaker)
                self._mean.labels(emotion, speaker)
        if depth is not None:
            waiting = Gauge("affectlens_waiting_requests", "Requests that wait for the model.", registry=registry)
            live = Gauge("affectlens_live_requests", "Requests that the model is running.", registry=registry)
            waiting.set_function(lambda: depth()[0])
            live.set_function(lambda: depth()[1])
        if status is not None:
            registry.register(_StoreCollector(status))
        if undelivered is not None:
            registry.register(_WebhookCollector(undelivered))

    def add_rule(self, name: str) -> None:
        """Count a rule's alarms by its name from now on."""
        self._rules.add(name)
        self._alerts.labels(name)

    def ended(self, kind: str, outcome: str) -> None:
        """Count a request that ended without a record.

        Args:
            kind: One of :data:`KINDS`.
            outcome: One of :data:`OUTCOMES`.
        """
        assert kind in KINDS and outcome in OUTCOMES, "labels are from fixed lists"
        self._requests.labels(kind, outcome).inc()

    def reply(self, record: Record) -> None:
        """Count a reply that has ended, or a text that was scored."""
        self.ended(record.kind, record.finish)
        self._seconds.labels(record.kind).observe(record.timing.get("total", 0.0))
        self._queued.observe(record.timing.get("queued", 0.0))
        if record.usage.get("completion_tokens", 0):
            self._first.observe(record.timing.get("first_token", 0.0))
        self._tokens.labels("prompt").inc(record.usage.get("prompt_tokens", 0))
        self._tokens.labels("generated").inc(record.usage.get("completion_tokens", 0))
        for alert in record.trace.alerts:
            self._alerts.labels(alert.rule if alert.rule in self._rules else "other").inc()
        columns = [record.trace.names.index(name) for name in self.watched]
        turns = list(_turns(record))
        for speaker, rows in turns:
            for emotion, peak, mean in zip(
                self.watched, rows[:, columns].max(axis=0), rows[:, columns].mean(axis=0), strict=True
            ):
                self._peak.labels(emotion, speaker).observe(float(peak))
                self._mean.labels(emotion, speaker).observe(float(mean))
        if turns and turns[-1][0] == "assistant" and record.kind != "score":
            self._roll(turns[-1][1][:, columns])

    def _roll(self, rows: np.ndarray) -> None:
        with self._lock:
            self._latest.append((rows.sum(axis=0, dtype=np.float64), len(rows)))
            mean = np.sum([total for total, _ in self._latest], axis=0) / sum(n for _, n in self._latest)
            for emotion, value in zip(self.watched, mean, strict=True):
                self._rolling.labels(emotion).set(float(value))

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """What ``/metrics`` answers, and its content type.

        Args:
            accept: The header of the request, by which Prometheus says which format it reads.
        """
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind


def _turns(record: Record) -> Iterator[tuple[str, np.ndarray]]:
    """The scores of what is new in a conversation: the last turn of the user and the reply. Earlier ones were counted before."""
    trace = record.trace
    numbers = trace.turns
    read = np.isfinite(trace.scores).all(axis=1)
    latest: dict[str, int] = {}
    for number, role in zip(numbers.tolist(), trace.layout.roles, strict=True):
        speaker = "assistant" if role == "text" else role
        if number >= 0 and speaker in SPEAKERS:
            latest[speaker] = number
    for _, speaker in sorted((number, speaker) for speaker, number in latest.items()):
        rows = trace.scores[read & (numbers == latest[speaker])]
        if len(rows):
            yield speaker, rows


class _StoreCollector:
    """How the store is, asked for at every scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        found = self._status()
        for name, text, value in (
            ("up", "Whether the latest write succeeded.", float(not found.error)),
            ("waiting_records", "Records that wait for the database.", found.waiting),
            ("waiting_bytes", "What they take in memory.", found.waiting_bytes),
            ("lag_seconds", "How long the oldest of them has waited.", found.lag),
        ):
            yield GaugeMetricFamily(f"affectlens_store_{name}", text, value=value)
        for name, text, count in (
            ("written", "Records that were written.", found.written),
            ("failures", "Commits that failed and were tried again.", found.failures),
            ("lost", "Records that found no room or were refused.", found.lost),
            ("pruned", "Records that were deleted, being too old or too much.", found.pruned),
        ):
            yield CounterMetricFamily(f"affectlens_store_{name}", text, value=count)


class _WebhookCollector:
    """What webhooks have not been told, all together: their addresses are nobody else's business."""

    def __init__(self, undelivered: Callable[[], Mapping[str, Mapping[str, int]]]) -> None:
        self._undelivered = undelivered

    def collect(self) -> Iterator[Metric]:
        found = self._undelivered().values()
        waiting, failed, dropped = (sum(each[key] for each in found) for key in ("waiting", "failed", "dropped"))
        yield GaugeMetricFamily("affectlens_webhook_waiting_alarms", "Alarms that webhooks are still to be told.", value=waiting)
        yield CounterMetricFamily("affectlens_webhook_failed", "Alarms that no webhook took.", value=failed)
        yield CounterMetricFamily("affectlens_webhook_dropped", "Alarms dropped since too many waited.", value=dropped)
