"""OpenTelemetry: a span for every reply, and an event for what was read in it, in the conventions for generative AI.

Off unless it is configured: :meth:`Telemetry.configured` looks for an address in OpenTelemetry's own environment variables
(``OTEL_EXPORTER_OTLP_ENDPOINT``), which also set everything else. A span has numbers, names and settings, and no words.

Spans carry the attributes of ``gen_ai.*``. Readings are ``gen_ai.evaluation.result`` events, that is log records with a name,
tied to the span: the peak and the mean of each watched emotion, and each alarm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from opentelemetry import propagate
from opentelemetry._logs import Logger, LoggerProvider, SeverityNumber
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, TracerProvider, set_span_in_context

from affectlens.errors import MissingExtra
from affectlens.server.records import Record, micros

SCOPE = "affectlens"
OPERATIONS = {"chat": "chat", "completion": "text_completion", "score": "score"}
ADDRESSES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")


class Telemetry:
    """Sends spans and events.

    Args:
        tracers: Where spans go.
        loggers: Where events go.
        watched: The emotions whose readings are told.

    Example:
        >>> Telemetry.configured(["calm"], {}) is None
        True
    """

    def __init__(self, tracers: TracerProvider, loggers: LoggerProvider, watched: Sequence[str]) -> None:
        self.watched = tuple(watched)
        self._providers = (tracers, loggers)
        self._tracer: Tracer = tracers.get_tracer(SCOPE)
        self._logger: Logger = loggers.get_logger(SCOPE)

    @classmethod
    def configured(cls, watched: Sequence[str], environment: Mapping[str, str] = os.environ) -> Self | None:
        """What the environment asks for; None when it asks for nothing.

        Raises:
            MissingExtra: It names an address, but the exporter is not installed.
        """
        if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(environment.get(name) for name in ADDRESSES):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError:
            raise MissingExtra("opentelemetry-exporter-otlp-proto-http", "serve") from None
        from opentelemetry.sdk._logs import LoggerProvider as Loggers
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider as Tracers
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = environment.get("OTEL_SERVICE_NAME") or SERVICE_NAME in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {SERVICE_NAME: SCOPE})
        tracers, loggers = Tracers(resource=resource), Loggers(resource=resource)
        tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        loggers.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
        return cls(tracers, loggers, watched)

    def reply(self, record: Record, headers: Mapping[str, str] | None = None) -> None:
        """Tell of a reply that has ended.

        Args:
            record: The reply.
            headers: Those of the request: with ``traceparent`` the span becomes part of the caller's trace.
        """
        start = 1000 * micros(record.created)
        end = start + int(1e9 * record.timing.get("total", 0.0))
        operation = OPERATIONS.get(record.kind, record.kind)
        parent = propagate.extract({name.lower(): value for name, value in (headers or {}).items()})
        # The model runs in this process: no call leaves it.
        span = self._tracer.start_span(
            f"{operation} {record.model.get('id', '')}",
            context=parent,
            kind=SpanKind.INTERNAL,
            attributes=_attributes(record, operation),
            start_time=start,
        )
        if record.finish in ("error", "timeout"):
            span.set_attribute("error.type", record.finish)
            span.set_status(Status(StatusCode.ERROR))
        context = set_span_in_context(span)
        for attributes in self._evaluations(record):
            self._logger.emit(
                timestamp=end,
                context=context,
                severity_number=SeverityNumber.INFO,
                event_name="gen_ai.evaluation.result",
                attributes={**attributes, "gen_ai.response.id": record.id},
            )
        span.end(end)

    def _evaluations(self, record: Record) -> list[dict[str, Any]]:
        extremes, found = record.extremes(), []
        for emotion in self.watched:
            if emotion not in extremes:
                continue
            for what, value in zip(("peak", "mean"), extremes[emotion], strict=True):
                name = f"affectlens.{emotion}.{what}"
                found.append({"gen_ai.evaluation.name": name, "gen_ai.evaluation.score.value": float(value)})
        for alert in record.trace.alerts:
            fired: dict[str, Any] = {
                "gen_ai.evaluation.name": f"affectlens.rule.{alert.rule}",
                "gen_ai.evaluation.score.label": "alarm",
                "gen_ai.evaluation.explanation": alert.text,
                "affectlens.token": alert.token,
            }
            if alert.scores:
                fired["gen_ai.evaluation.score.value"] = float(next(iter(alert.scores.values())))
            found.append(fired)
        return found

    def close(self) -> None:
        """Send what is left."""
        for provider in self._providers:
            if (shutdown := getattr(provider, "shutdown", None)) is not None:
                shutdown()


def _attributes(record: Record, operation: str) -> dict[str, Any]:
    sampling, model = record.request.get("sampling") or {}, record.model
    asked = {
        f"gen_ai.request.{name}": sampling[name]
        for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
        if sampling.get(name) is not None
    }
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": SCOPE,
        "gen_ai.request.model": str(model.get("id", "")),
        "gen_ai.response.model": str(model.get("id", "")),
        "gen_ai.response.id": record.id,
        "gen_ai.response.finish_reasons": (record.finish,),
        "gen_ai.usage.input_tokens": record.usage.get("prompt_tokens", 0),
        "gen_ai.usage.output_tokens": record.usage.get("completion_tokens", 0),
        **({"gen_ai.response.time_to_first_chunk": float(first)} if (first := record.timing.get("first_token")) else {}),
        **asked,
        "affectlens.fingerprint": str(model.get("fingerprint", "")),
        "affectlens.layer": record.trace.layer,
        "affectlens.company": record.company,
        "affectlens.alerts": len(record.trace.alerts),
        **{f"affectlens.steering.{name}": strength for name, strength in record.steering.items()},
    }
