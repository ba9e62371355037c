"""Spans of every request, for whoever configured OpenTelemetry.

The engine knows nothing of them: they are made afterwards, from the times that an answer carries.
Nothing of OpenTelemetry is imported until it is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.tickets import Answer, Seen

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either turns tracing on; the other OTEL_… variables are the SDK's own."""
CLOSE_SECONDS = 2.0
"""That the end waits for a collector to take what is left."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that took time, in seconds of the engine's clock."""

    name: str
    began: float
    ended: float
    confidence: float | None = None


def intervals(
    arrived: float, accepted: float, decode_seconds: float, seen: Sequence[Seen]
) -> Iterator[Interval]:
    """What happened to one image, in order: decode, then queue and stage for each exit reached.

    Args:
        arrived: when its request came.
        accepted: when it was decoded and handed to the engine.
        decode_seconds: how long decoding took.
        seen: every exit passed, shallow to deep.
    """
    yield Interval("decode", accepted - decode_seconds, accepted)
    free, computed = accepted, 0.0
    for one in seen:
        ended = arrived + one.milliseconds / 1e3
        began = max(free, ended - (one.compute_milliseconds - computed) / 1e3)
        yield Interval("queue", free, began)
        yield Interval(f"stage {one.exit}", began, ended, one.confidence)
        free, computed = ended, one.compute_milliseconds


class RequestTrace:
    """The span of one request; those of its images hang below it."""

    def __init__(self, tracer: RequestTracer, span: Span, below: Context) -> None:
        self._tracer = tracer
        self._span = span
        self._below = below

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, as in logs and other tools."""
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def header(self) -> str:
        """What a `traceresponse` header says: version, trace, this span, whether sampled."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def image(self, arrived: float, accepted: float, decode_seconds: float, answer: Answer) -> None:
        """One of its images was answered."""
        parts = list(intervals(arrived, accepted, decode_seconds, answer.seen))
        span, below = self._tracer.start("image", parts[0].began, self._below)
        span.set_attributes(
            {
                "offramp.exit": answer.exit,
                "offramp.reason": answer.reason.value,
                "offramp.confidence": answer.confidence,
                "offramp.degraded": answer.degraded,
            }
        )
        for part in parts:
            child, _ = self._tracer.start(part.name, part.began, below)
            if part.confidence is not None:
                child.set_attribute("offramp.confidence", part.confidence)
            child.end(self._tracer.nanoseconds(part.ended))
        span.end(self._tracer.nanoseconds(parts[-1].ended))

    def end(self, status: int, request_id: str) -> None:
        """The response is out."""
        self._span.set_attributes(
            {"http.response.status_code": status, "offramp.request_id": request_id}
        )
        if status >= 500:
            self._tracer.mark_failed(self._span)
        self._span.end()


class RequestTracer:
    """Makes spans of a provider.

    Args:
        provider: where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._provider = provider
        self._tracer = provider.get_tracer("offramp")
        self._propagator = TraceContextTextMapPropagator()
        self._epoch = time.time_ns() - time.perf_counter_ns()

    def request(
        self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], arrived: float
    ) -> RequestTrace:
        """A request came in; it goes on the trace that its `traceparent` header names, if any."""
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        span = self._tracer.start_span(
            f"{method} {path}",
            context=self._propagator.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            start_time=self.nanoseconds(arrived),
            attributes={"http.request.method": method, "url.path": path},
        )
        return RequestTrace(self, span, self._api.set_span_in_context(span))

    def start(self, name: str, began: float, below: Context) -> tuple[Span, Context]:
        """A span below another, and the context for those below it."""
        span = self._tracer.start_span(name, below, start_time=self.nanoseconds(began))
        return span, self._api.set_span_in_context(span)

    def mark_failed(self, span: Span) -> None:
        """It ended in a failure of ours."""
        span.set_status(self._api.StatusCode.ERROR)

    def nanoseconds(self, seconds: float) -> int:
        """Since the epoch, from seconds of the engine's clock."""
        return self._epoch + int(1e9 * seconds)

    def close(self) -> None:
        """Send what is left, in a thread of its own: to a collector that is gone the SDK would send
        for as long as it has batches, whatever time it is given."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(CLOSE_SECONDS)


def tracer_from(environment: Mapping[str, str]) -> RequestTracer | None:
    """A tracer that sends to the configured collector, or None where there is none.

    Raises:
        ValueError: one is configured, but OpenTelemetry is not installed.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if not any(environment.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        missing = f"tracing is configured, but {error.name} is not installed"
        raise ValueError(
            f"{missing}; install the extra 'tracing', or unset OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from None
    usual = Resource.create({"service.name": "offramp"})
    resource = usual.merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return RequestTracer(provider)
