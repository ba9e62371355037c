"""One log line a request, in two shapes."""

import json
import logging
import re

import pytest

from server.logs import JsonFormatter, TextFormatter


@pytest.fixture
def lines(caplog):
    """The access log's records so far."""
    caplog.set_level(logging.INFO)
    return lambda: [r for r in caplog.records if r.name == "offramp.access"]


def test_a_request_is_one_line_with_its_id_its_exit_and_its_time(server, png, lines):
    answer = server.client.post("/classify", content=png, headers={"x-request-id": "r1"}).json()
    (record,) = lines()
    fields = record.fields
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/classify", 200)
    assert (fields["request_id"], fields["exit"]) == ("r1", answer["exit"])
    assert fields["reason"] == answer["reason"]
    assert fields["milliseconds"] > 0


def test_a_failed_request_is_one_line_with_its_code(server, lines):
    server.post(b"no image")
    (record,) = lines()
    assert (record.fields["status"], record.fields["code"]) == (400, "unsupported_image")


def test_a_batch_is_one_line_with_its_number_of_images(server, png, lines):
    server.client.post("/classify/batch", files=[("files", png)] * 3)
    (record,) = lines()
    assert (record.fields["path"], record.fields["images"]) == ("/classify/batch", 3)


def test_health_checks_and_scrapes_leave_no_line(server, lines):
    for path in ("/livez", "/readyz", "/metrics"):
        server.client.get(path)
    assert lines() == []


@pytest.fixture
def record():
    made = logging.makeLogRecord({"name": "offramp", "levelname": "INFO", "msg": "request"})
    made.fields = {"request_id": "r1", "status": 200}
    made.created = 0.0
    return made


def test_the_text_shape_reads_from_left_to_right(record):
    line = TextFormatter().format(record)
    assert line == "1970-01-01T00:00:00.000+00:00 INFO    request request_id=r1 status=200"


def test_the_json_shape_is_one_object_a_line(record):
    assert json.loads(JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "logger": "offramp",
        "message": "request",
        "request_id": "r1",
        "status": 200,
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_both_shapes_keep_a_failure_with_its_traceback(record, formatter):
    try:
        raise ValueError("the cause")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert re.search(r"Traceback.*ValueError: the cause", formatter.format(record), re.DOTALL)


def test_a_path_cannot_forge_a_log_line(server, lines):
    server.client.get("/nope%0A2026-01-01 ERROR forged")
    (record,) = lines()
    assert "\n" not in TextFormatter().format(record)
    assert "\n" not in JsonFormatter().format(record)
