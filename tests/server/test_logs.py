"""One log line a request, in two shapes."""

import json
import logging
import re
import subprocess
import sys
import threading

import pytest
from PIL import Image

from server.logs import JsonFormatter, TextFormatter
from tests.conftest import ROOT, encode, until
from tests.model.test_image import tiff_of
from tests.server.test_bad_input import png_header


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


def test_an_answer_is_sent_before_its_line_is_written(server, png, lines, monkeypatch):
    answered, in_time = threading.Event(), []
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png)
    monkeypatch.setattr(
        logging.getLogger("offramp.access"),
        "log",
        lambda *_, **__: in_time.append(answered.wait(5)),
    )
    with server.send(head + png) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        answered.set()
        until(lambda: in_time)
    assert in_time == [True]


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


PROGRAM = """
import sys, threading, warnings
from pathlib import Path
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser
from model import image
from server.logs import configure

configure("json", "debug")
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        image.render(image.read_header(file.read_bytes(), 10**9), 32)
    except image.ImageError:
        pass
try:
    MultipartParser(b"b").write(b"--c")
except MultipartParseError:
    pass
warnings.warn("of ours")

class Dying:
    def __del__(self):
        raise ValueError("at its end")

Dying()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("the last")
"""


def overwritten(data, first, piece):
    return data[:first] + piece + data[first + len(piece) :]


def test_nothing_but_log_lines_goes_to_standard_error(tmp_path):
    """Nothing that decoders say, who may quote what they read, nor libtiff's own lines; of warnings
    and failures each is one."""
    gray = Image.new("RGB", (300, 300))
    bad = {
        "codes": overwritten(encode(gray, "TIFF", compression="tiff_lzw"), 60, b"\xff" * 30),
        "marker": overwritten(encode(gray, "TIFF", compression="jpeg"), 300, b"\xff" * 100),
        "exif": encode(gray, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"),
        "pixels": png_header(9_000, 10_000),
        "samples": tiff_of((b"II", 2, (1,), 1, (8,) * 7, ())),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True).stderr
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 4, said
    for line, word in zip(lines, ("of ours", "at its end", "division", "the last"), strict=True):
        assert word in line.get("exception", line["message"])
    assert [line["level"] for line in lines] == ["warning", *["critical"] * 3]
