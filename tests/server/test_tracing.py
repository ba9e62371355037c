"""Spans of real requests, kept in memory instead of sent."""

import os
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.served import Served
from server.settings import Settings
from server.tickets import Seen
from server.tracing import RequestTracer, intervals, tracer_from
from tests.conftest import ROOT, running, until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


@pytest.fixture(scope="module")
def exporter():
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(bundle_path, exporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    served = Served(Settings(bundle=bundle_path, threads=1, max_batch=2))
    served.tracer = RequestTracer(provider)
    with running(served) as server:
        yield server


@pytest.fixture
def spans(traced, exporter):
    """Posts a request; its response, and its spans by name (a list each), once all have ended."""

    def post(path="/classify", headers=None, **request):
        exporter.clear()
        response = traced.client.post(path, headers=headers, **request)
        traced.client.get("/livez")  # the request's own span ends after its response
        found = {}
        for span in exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return response, found

    return post


def test_an_image_has_a_span_for_decode_and_one_for_queue_and_stage_of_each_exit(spans, png):
    response, found = spans(content=png, params={"min_exit": 3, "max_exit": 3})
    assert {name: len(s) for name, s in found.items()} == {
        "POST /classify": 1,
        "image": 1,
        "decode": 1,
        "queue": 3,
        "stage 1": 1,
        "stage 2": 1,
        "stage 3": 1,
    }
    (image,), (request,) = found["image"], found["POST /classify"]
    answer = response.json()
    assert image.attributes["offramp.exit"] == 3
    assert image.attributes["offramp.reason"] == answer["reason"]
    assert image.parent.span_id == request.context.span_id
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["offramp.request_id"] == answer["request_id"]


def test_spans_follow_each_other_within_their_request(spans, png):
    _, found = spans(content=png, params={"min_exit": 4})
    (request,), (image,) = found["POST /classify"], found["image"]
    parts = [*found["decode"], *found["queue"], *(found[f"stage {k}"][0] for k in range(1, 5))]
    parts.sort(key=lambda s: (s.start_time, s.end_time))
    assert all(p.parent.span_id == image.context.span_id for p in parts)
    assert all(a.end_time <= b.start_time + 1000 for a, b in pairwise(parts))
    assert request.start_time <= image.start_time <= image.end_time <= request.end_time


def test_the_trace_of_the_caller_goes_on_and_is_told(spans, png):
    response, found = spans(content=png, headers={"traceparent": TRACEPARENT})
    (request,) = found["POST /classify"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == CALLER
    told = response.headers["traceresponse"]
    assert told == f"00-{TRACE}-{request.context.span_id:016x}-01"


def test_a_caller_who_does_not_sample_gets_no_spans(spans, png):
    response, found = spans(content=png, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert response.status_code == 200
    assert found == {}


def test_a_malformed_traceparent_starts_a_trace_of_its_own(spans, png):
    response, found = spans(content=png, headers={"traceparent": "00-oops"})
    assert response.status_code == 200
    assert found["POST /classify"][0].parent is None


def test_images_of_a_batch_hang_below_one_request(spans, png):
    _, found = spans("/classify/batch", files=[("files", png), ("files", png), ("files", b"no")])
    (request,) = found["POST /classify/batch"]
    assert [s.parent.span_id for s in found["image"]] == [request.context.span_id] * 2


def test_a_client_error_has_its_span_and_is_no_failure_of_ours(spans):
    _, found = spans(content=b"no image")
    (request,) = found["POST /classify"]
    assert request.attributes["http.response.status_code"] == 400
    assert request.status.is_ok or request.status.is_unset
    assert set(found) == {"POST /classify"}


def test_a_failure_of_ours_marks_its_span(traced, exporter):
    exporter.clear()
    traced.served.tracer.request("POST", "/classify", [], 0.0).end(500, "id")
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok and not span.status.is_unset


def test_time_between_stages_is_waiting():
    seen = [Seen(1, 0, 0.5, 30.0, 5.0), Seen(2, 0, 0.9, 60.0, 15.0)]
    parts = list(intervals(arrived=1.0, accepted=1.01, decode_seconds=0.004, seen=seen))
    assert [(p.name, round(p.began, 6), round(p.ended, 6)) for p in parts] == [
        ("decode", 1.006, 1.01),
        ("queue", 1.01, 1.025),
        ("stage 1", 1.025, 1.03),
        ("queue", 1.03, 1.05),
        ("stage 2", 1.05, 1.06),
    ]


@pytest.mark.parametrize(
    "environment",
    [{}, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}],
)
def test_tracing_is_off_unless_configured(environment):
    assert tracer_from(environment) is None


def test_an_endpoint_turns_tracing_on(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracer = tracer_from({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert isinstance(tracer, RequestTracer)
    tracer.close()


def test_a_collector_that_takes_nothing_holds_up_no_end(monkeypatch):
    monkeypatch.setattr("server.tracing.CLOSE_SECONDS", 0.05)
    asked, goes_on = threading.Event(), threading.Event()

    class Silent(InMemorySpanExporter):
        def export(self, spans):
            asked.set()
            assert goes_on.wait(20)
            return super().export(spans)

    provider, exporter = TracerProvider(shutdown_on_exit=False), Silent()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = RequestTracer(provider)
    tracer.request("POST", "/classify", [], 0.0).end(200, "id")
    tracer.close()
    assert asked.wait(10) and not exporter.get_finished_spans()
    goes_on.set()
    until(exporter.get_finished_spans)


@pytest.mark.parametrize(
    ("attributes", "service", "name"),
    [
        ("", "", "offramp"),
        ("service.name=mine,team=x", "", "mine"),
        ("service.name=mine", "ours", "ours"),
        ("", "ours", "ours"),
    ],
)
def test_spans_are_of_the_service_that_the_environment_names(
    monkeypatch, attributes, service, name
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", attributes)
    monkeypatch.setenv("OTEL_SERVICE_NAME", service)
    tracer = tracer_from(os.environ)
    assert tracer._provider.resource.attributes["service.name"] == name
    tracer.close()


def test_an_endpoint_without_the_packages_stops_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match="not installed; install the extra 'tracing'"):
        tracer_from({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})


@pytest.mark.slow
def test_nothing_of_the_sdk_is_imported_while_tracing_is_off():
    program = "import sys, server.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
