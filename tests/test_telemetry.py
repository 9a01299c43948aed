"""Spans and events, as OpenTelemetry's own exporter gets them."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind

from affectlens.errors import MissingExtra
from affectlens.server.records import Record, micros
from affectlens.server.telemetry import Telemetry
from stored import fired, made


def told(record: Record, headers: dict[str, str] | None = None) -> tuple[Any, list[Any]]:
    """The span and the events of a record."""
    spans, logs = InMemorySpanExporter(), InMemoryLogRecordExporter()
    tracers, loggers = TracerProvider(), LoggerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(spans))
    loggers.add_log_record_processor(SimpleLogRecordProcessor(logs))
    telemetry = Telemetry(tracers, loggers, ["desperate", "calm", "an emotion of other vectors"])
    telemetry.reply(record, headers)
    telemetry.close()
    (span,) = spans.get_finished_spans()
    return span, [each.log_record for each in logs.get_finished_logs()]


def test_a_reply_is_a_span_in_the_conventions() -> None:
    record = made(1, company=3)
    span, _ = told(record)
    assert span.name == "chat made-up" and span.kind is SpanKind.INTERNAL
    given = dict(span.attributes)
    assert given == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "affectlens",
        "gen_ai.request.model": "made-up",
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 1,
        "gen_ai.response.model": "made-up",
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.05,
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 12,
        "affectlens.fingerprint": "0123456789abcdef",
        "affectlens.layer": 4,
        "affectlens.company": 3,
        "affectlens.alerts": 0,
    }
    known = {name for key, name in vars(gen_ai_attributes).items() if key.startswith("GEN_AI_")}
    assert {name for name in given if name.startswith("gen_ai.")} <= known, "the names are those of the conventions"
    assert span.start_time == 1000 * micros(record.created) and span.end_time - span.start_time == 500_000_000


def test_readings_and_alarms_are_events_of_the_span() -> None:
    record = made(2, alerts=(fired("panic: desperate > 3"),))
    span, events = told(record)
    assert {each.event_name for each in events} == {"gen_ai.evaluation.result"}
    assert {(each.trace_id, each.span_id) for each in events} == {(span.context.trace_id, span.context.span_id)}
    found = {each.attributes["gen_ai.evaluation.name"]: dict(each.attributes) for each in events}
    extremes = record.extremes()
    for name in ("desperate", "calm"):
        for what, value in zip(("peak", "mean"), extremes[name], strict=True):
            assert found[f"affectlens.{name}.{what}"]["gen_ai.evaluation.score.value"] == pytest.approx(value)
    alarm = found["affectlens.rule.panic"]
    assert alarm["gen_ai.evaluation.score.label"] == "alarm" and alarm["gen_ai.evaluation.score.value"] == 3.25
    assert alarm["gen_ai.evaluation.explanation"] == "panic: desperate > 3"
    assert len(found) == 5 and all(each["gen_ai.response.id"] == record.id for each in found.values())


def test_a_span_joins_the_trace_of_the_caller() -> None:
    span, events = told(made(3), {"Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert events[0].trace_id == span.context.trace_id
    assert told(made(3), {"traceparent": "nonsense"})[0].parent is None


def test_no_words_are_told() -> None:
    alert = replace(fired("panic: desperate > 3"), words="xylophonist")
    span, events = told(made(4, prompt="a xylophonist", reply="a xylophonist indeed", alerts=(alert,)))
    assert "xylophonist" not in span.to_json() + "".join(str(dict(each.attributes)) + str(each.body) for each in events)


@pytest.mark.parametrize("kind", ["completion", "score"])
def test_other_kinds(kind: str) -> None:
    record = replace(made(5), kind=kind, request={"prompt": "a text", "sampling": None})
    span, _ = told(record)
    assert span.name.startswith({"completion": "text_completion", "score": "score"}[kind])
    assert "gen_ai.request.seed" not in span.attributes


def test_it_is_off_unless_it_is_configured() -> None:
    assert Telemetry.configured(["calm"], {}) is None
    assert Telemetry.configured(["calm"], {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}) is None


def test_an_address_without_an_exporter_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http._log_exporter", None)
    with pytest.raises(MissingExtra, match="opentelemetry-exporter-otlp-proto-http"):
        Telemetry.configured(["calm"], {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})


def test_nothing_is_set_up_behind_the_users_back() -> None:
    """Whoever embeds the server keeps the providers that they have."""
    code = (
        "from opentelemetry import trace; import affectlens.server.telemetry; print(type(trace.get_tracer_provider()).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ProxyTracerProvider"


def test_a_collector_gets_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real exporter, to something that listens where a collector would."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    came: dict[str, bytes] = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        telemetry = Telemetry.configured(["calm"])
        assert telemetry is not None
        telemetry.reply(made(1))
        telemetry.close()
        server.shutdown()
    assert b"chat made-up" in came["/v1/traces"] and b"affectlens" in came["/v1/traces"]
    assert b"gen_ai.evaluation.result" in came["/v1/logs"] and b"affectlens.calm.peak" in came["/v1/logs"]
