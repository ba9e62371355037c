"""Every failure that a client can provoke, over real HTTP."""

import json
import re
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.errors import OfframpError, Overloaded
from server.uploads import MAX_FIELDS
from tests.conftest import encode, noise, until
from tests.gate import gated


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def check_error(response, status, code):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "code", "request_id"}
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert "/" not in body["error"].replace("multipart/form-data", "")
    assert "Traceback" not in response.text


BROKEN = {
    "text": (b"hello, this is no image", 400, "unsupported_image"),
    "json": (b'{"image": null}', 400, "unsupported_image"),
    "truncated PNG": (encode(noise())[:1500], 400, "broken_image"),
    "truncated JPEG": (encode(noise(64, 64), "JPEG")[:900], 400, "broken_image"),
    "truncated WebP": (encode(noise(64, 64), "WEBP")[:900], 400, "broken_image"),
    "the beginning of a JPEG": (encode(noise(), "JPEG")[:20], 400, "broken_image"),
    "the beginning of a GIF": (encode(noise(), "GIF")[:10], 400, "broken_image"),
    "the beginning of a TIFF": (encode(noise(), "TIFF")[:20], 400, "broken_image"),
    "0x0": (png_header(0, 0), 400, "broken_image"),
    "icon, a format that is not allowed": (encode(noise(), "ICO"), 400, "unsupported_image"),
    "PPM, a format that is not allowed": (encode(noise(), "PPM"), 400, "unsupported_image"),
    "bomb": (png_header(60_000, 60_000), 413, "image_too_large"),
    "over the pixel limit": (png_header(8_000, 8_000), 413, "image_too_large"),
    "empty": (b"", 400, "no_image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_no_usable_image_is_a_clear_error(server, name):
    data, status, code = BROKEN[name]
    response = server.post(data)
    check_error(response, status, code or response.json()["code"])


def test_a_broken_image_is_counted_by_its_code(server):
    before = server.metric("rejected_images_total", code="broken_image")
    server.post(BROKEN["truncated PNG"][0])
    assert server.metric("rejected_images_total", code="broken_image") == before + 1


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 5)])
def test_odd_shapes_are_answered(server, size):
    assert server.post(encode(noise(*size))).status_code == 200


def test_a_decompression_bomb_costs_no_memory(server):
    tracemalloc.start()
    try:
        assert server.post(BROKEN["bomb"][0]).status_code == 413
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_a_client_whose_image_is_too_large_keeps_its_connection(server):
    refused = server.post(BROKEN["bomb"][0])
    assert refused.status_code == 413
    assert "connection" not in refused.headers, "its body was read whole"


@pytest.mark.parametrize(("backlog", "seconds"), [(0.0, 1), (1.0, 1), (1.2, 2), (2.0, 2), (3.5, 4)])
def test_a_refused_client_is_told_whole_seconds_that_suffice(backlog, seconds):
    assert Overloaded(backlog).headers == {"Retry-After": str(seconds)}


PARAMETERS = {
    "top_k": ["0", "-1", "x", "1.5"],
    "threshold": ["-0.1", "1.1", "x", "nan"],
    "min_exit": ["0", "5", "x"],
    "max_exit": ["0", "5", "x"],
    "deadline_ms": ["0", "-1", "x", "nan"],
    "explain": ["maybe"],
    "treshold": ["0.5"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in PARAMETERS.items() for value in values]
)
def test_a_bad_parameter_is_named(server, png, name, value):
    response = server.post(png, **{name: value})
    check_error(response, 422, "invalid_parameter")
    assert name in response.json()["error"]


def test_a_parameter_that_does_not_exist_is_said_to(server, png):
    for path in ("/classify", "/classify/batch"):
        response = server.client.post(f"{path}?treshold=0.5", files={"file": png})
        assert response.json()["error"] == "treshold: there is no such parameter"


def test_exits_that_leave_none_to_answer_are_refused(server, png):
    check_error(server.post(png, min_exit=3, max_exit=2), 422, "invalid_parameter")


def test_a_wrong_multipart_field_is_named(server, png):
    response = server.client.post("/classify", files={"image": png})
    check_error(response, 400, "no_image")
    assert "`file`" in response.json()["error"]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"not multipart at all"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="f'),
        ("multipart/form-data; boundary=b", b""),
    ],
)
def test_malformed_multipart_is_a_400(server, content_type, body):
    response = server.client.post("/classify", content=body, headers={"content-type": content_type})
    check_error(response, 400, response.json()["code"])


PART = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'


def send_form(server, path, body, content_type="multipart/form-data; boundary=b"):
    return server.client.post(path, content=body, headers={"content-type": content_type})


@pytest.mark.parametrize("named", [b"", b"; filename*=UTF-8''a.png", b"; filename=a.png"])
def test_a_part_is_a_file_whether_or_not_it_names_one(server, png, named):
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    one = server.client.post("/classify", content=part % (b"file", named, png), headers=headers)
    assert one.status_code == 200
    many = part % (b"files", named, png)
    said = server.client.post("/classify/batch", content=many, headers=headers).json()
    assert [result["label"] for result in said["results"]] == [one.json()["label"]]


@pytest.mark.parametrize("missing", [1, len("--b--"), len("\r\n--b--"), 100])
def test_a_form_that_ends_before_its_last_boundary_loses_no_image_unsaid(server, png, missing):
    one, more = PART % (b"file", b"a", png), PART % (b"files", b"a", png) * 3
    for path, parts in {"/classify": one, "/classify/batch": more}.items():
        response = send_form(server, path, (parts + b"--b--")[:-missing])
        check_error(response, 400, "bad_multipart")
        assert "closing boundary" in response.json()["error"]
        for ending in (b"--b--", b"--b--\r\n", b"--b--\r\nan epilogue"):
            assert send_form(server, path, parts + ending).status_code == 200


PREAMBLES = {
    "nothing": b"",
    "a line's end": b"\r\n",
    "a line": b"a preamble\r\n",
    "much, and almost a boundary": b"x" * 2**21 + b"\r\n--bx\r\n",
}


@pytest.mark.parametrize("before", PREAMBLES)
@pytest.mark.parametrize("blanks", [b"", b" \t "])
def test_a_form_may_have_a_preamble_and_blanks_behind_its_boundaries(server, png, before, blanks):
    for path, name, parts in (("/classify", b"file", 1), ("/classify/batch", b"files", 3)):
        form = (PART % (name, b"a", png) * parts).replace(b"--b\r\n", b"--b" + blanks + b"\r\n")
        whole = PREAMBLES[before] + form + b"--b--" + blanks
        assert send_form(server, path, whole).status_code == 200


def test_a_form_has_so_many_fields_and_no_more(server, png):
    field = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\nx\r\n'
    for fields, status in ((MAX_FIELDS, 200), (MAX_FIELDS + 1, 400)):
        body = field * fields + PART % (b"file", b"a", png) + b"--b--"
        assert send_form(server, "/classify", body).status_code == status


def test_a_form_without_its_part_counts_as_no_image(server, png):
    def count():
        return server.metric("rejected_images_total", code="no_image")

    for path in ("/classify", "/classify/batch"):
        before = count()
        check_error(
            send_form(server, path, PART % (b"other", b"a", png) + b"--b--"), 400, "no_image"
        )
        assert count() == before + 1


@pytest.mark.parametrize(
    "charset", ["undefined", "punycode", "idna", "hex", "utf-16", "no-such", "x" * 5000, ""]
)
def test_the_charset_of_a_form_changes_no_answer(server, png, charset):
    named = f"multipart/form-data; charset={charset}; boundary=b"
    field = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\n\xff-9\r\n'
    body = field + PART % (b"file", b"\xe9.png", png) + b"--b--"
    assert send_form(server, "/classify", body, named).status_code == 200


@pytest.mark.parametrize("boundary", ['"', '""', '"b\\"; charset=punycode"', "x" * 300, "\xff"])
def test_no_boundary_of_a_form_is_the_servers_fault(server, png, boundary):
    named = f"multipart/form-data; boundary={boundary}".encode("latin-1")
    response = send_form(server, "/classify", PART % (b"file", b"a", png) + b"--b--", named)
    check_error(response, 400, "bad_multipart")


def test_two_files_where_one_is_wanted_are_a_400(server, png):
    response = server.client.post("/classify", files=[("file", png), ("file", png)])
    check_error(response, 400, "bad_multipart")


def test_unknown_paths_and_methods_have_the_same_shape_of_error(server):
    check_error(server.client.get("/nope"), 404, "not_found")
    check_error(server.client.get("/classify"), 405, "method_not_allowed")
    check_error(server.client.put("/policy", json={}), 405, "method_not_allowed")


def test_an_announced_body_over_the_limit_is_refused_unread(serve, png):
    with serve(max_body_bytes=1000) as small:
        connection = small.send(
            b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        connection.close()


def test_a_length_may_have_many_digits(server, png):
    for digits, status in ((f"{len(png):05000}", b"200"), (f"{2**64 - 1:05000}", b"413")):
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {digits}\r\n\r\n"
        with server.send(head.encode() + png) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 " + status)


def test_a_body_without_a_length_is_cut_off_while_streaming(serve):
    with serve(max_body_bytes=100_000) as small:
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection = small.send(head)
        piece = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
        for _ in range(3):  # never ends the body
            connection.sendall(piece)
        answer = connection.recv(1000)
        connection.close()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"body_too_large" in answer


def test_keys_are_asked_for_but_health_and_metrics_stay_open(serve, png):
    with serve(api_keys="one,two") as locked:
        check_error(locked.post(png), 401, "unauthenticated")
        wrong = locked.client.post("/classify", content=png, headers={"x-api-key": "three"})
        check_error(wrong, 403, "forbidden")
        padded = b"GET /model HTTP/1.1\r\nHost: x\r\nX-API-Key: one \r\nX-Request-ID: me \r\n\r\n"
        with locked.send(padded) as connection:
            assert re.match(b"HTTP/1.1 200 (?s:.)*x-request-id: me\r\n", connection.recv(4096))
        for headers in ({"x-api-key": "one"}, {"authorization": "Bearer two"}):
            right = locked.client.post("/classify", content=png, headers=headers)
            assert right.status_code == 200
        for path in ("/livez", "/readyz", "/metrics"):
            assert locked.client.get(path).status_code == 200
        assert locked.client.get("/model").status_code == 401


def test_the_operating_point_is_changed_with_the_admin_token_only(serve, png):
    with serve(admin_token="secret") as one:
        change = {"max_accuracy_loss": 0.05}
        check_error(one.client.put("/policy", json=change), 401, "unauthenticated")
        head = b"PUT /policy HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        with one.send(head) as connection:  # no byte of a body is waited for
            assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        right = {"authorization": "Bearer secret"}
        response = one.client.put("/policy", json=change, headers=right)
        assert response.json()["in_force"]["max_accuracy_loss"] == 0.05
        assert one.client.get("/policy").json()["in_force"]["max_accuracy_loss"] == 0.05
        for wrong in (2, True, "0.01", None):
            bad = one.client.put("/policy", json={"max_accuracy_loss": wrong}, headers=right)
            check_error(bad, 422, "invalid_parameter")


JSON = {"content-type": "application/json"}
NO_OBJECTS = [
    (b'{"max_accuracy_loss": 0.05}', {}),
    (b'{"max_accuracy_loss": 0.05,}', JSON),
    (b'"0.05"', JSON),
    (b"null", JSON),
    (b"", JSON),
    (b"", {}),
]


def test_a_body_that_is_no_json_object_is_told_so_in_a_sentence(serve):
    with serve(admin_token="secret", warm=False) as one:
        for body, kind in NO_OBJECTS:
            headers = {"authorization": "Bearer secret", **kind}
            bad = one.client.put("/policy", content=body, headers=headers)
            check_error(bad, 422, "invalid_parameter")
            assert bad.json()["error"] == "the body must be a JSON object, and Content-Type say so"


def test_a_deadline_that_has_passed_on_arrival_is_a_504(server, png):
    check_error(server.post(png, deadline_ms=0.001), 504, "deadline_exceeded")


@pytest.mark.slow
def test_a_full_server_refuses_at_once(serve, png):
    with serve(max_queue=1) as one:
        one.served.in_flight = 1
        response = one.post(png)
        one.served.in_flight = 0
        check_error(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert one.metric("refused_total", reason="queue_full") == 1


def test_bodies_share_a_limit_of_their_own(serve):
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n"
    with serve(max_body_bytes=1000, max_bodies_bytes=1500) as one:
        with one.send(head + b"x" * 800):
            until(lambda: one.post(b"x" * 900).status_code == 429)
            response = one.post(b"x" * 900)
            check_error(response, 429, "overloaded")
            assert int(response.headers["retry-after"]) >= 1
            assert one.metric("refused_total", reason="bodies_full") == 2
            assert one.post(b"x" * 600).status_code == 400  # for which there is room
        until(lambda: one.post(b"x" * 900).status_code == 400)
        for _ in range(3):
            assert one.post(b"x" * 900).status_code == 400


@pytest.mark.slow
def test_an_image_that_is_sure_to_be_refused_is_not_decoded(serve, png):
    with serve() as one, ThreadPoolExecutor(1) as threads, gated(one) as gate:
        running = threads.submit(one.post, png, deadline_ms=60_000)
        gate.wait_for_a_batch()
        refusing = 0.0, time.perf_counter() + 3600  # by whoever waits behind it
        one.served.engine.scheduler._refusing = refusing
        response = one.post(b"no image")
        check_error(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        gate.open()
        assert running.result().status_code == 200
        until(lambda: one.metric("refused_total", reason="not_in_time") == 1)
        check_error(one.post(b"no image"), 400, "unsupported_image")


@pytest.mark.slow
def test_requests_before_warm_and_while_draining_are_503(serve, png):
    with serve(warm=False) as one:
        check_error(one.post(png), 503, "not_ready")
        assert one.client.get("/readyz").status_code == 503
        assert one.client.get("/livez").status_code == 200
    with serve() as one:
        assert one.client.get("/readyz").status_code == 200
        one.served.draining = True
        check_error(one.post(png), 503, "draining")
        assert one.client.get("/readyz").status_code == 503


@pytest.mark.parametrize("path", ["/classify", "/classify/batch"])
def test_an_unknown_failure_tells_the_client_nothing_and_the_log_everything(
    serve, png, caplog, path
):
    async def broken(data, seconds):
        return 1 / 0

    with serve() as one:
        one.served.loaded.decoder._decode = broken
        response = one.client.post(path, files={"file" if path == "/classify" else "files": png})
        check_error(response, 500, "internal")
        assert response.json()["error"] == OfframpError.sentence
        until(lambda: one.metric("requests_total", route=path, code="500") == 1)
    assert caplog.text.count("ZeroDivisionError: ") == 1
    assert response.json()["request_id"] in caplog.text


def test_a_bad_image_hurts_only_its_own_entry_of_a_batch(server, png):
    files = [("files", png), ("files", b"no image"), ("files", png)]
    results = server.client.post("/classify/batch", files=files).json()["results"]
    assert [set(r) >= {"label"} for r in results] == [True, False, True]
    assert results[1]["code"] == "unsupported_image"
    assert results[0]["label"] == results[2]["label"]


def test_a_client_that_stops_half_way_through_its_upload_hurts_nobody(server, png):
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    server.send(head + png[:100]).close()
    assert server.post(png).status_code == 200
    assert server.served.in_flight == 0


def test_errors_of_clients_and_answers_of_neighbours_do_not_mix(server, png):
    right = server.post(png).json()
    for data, *_ in BROKEN.values():
        server.post(data)
    again = server.post(png).json()
    assert json.dumps(right["top_k"]) == json.dumps(again["top_k"])


STRANGE = {
    "HEAD where only POST is": ("HEAD", "/classify", 405),
    "OPTIONS": ("OPTIONS", "/classify", 405),
    "TRACE": ("TRACE", "/classify", 405),
    "an unheard-of method": ("PROPFIND", "/classify", 405),
    "a trailing slash": ("POST", "/classify/", 404),
    "another case": ("POST", "/Classify", 404),
    "a null byte in the path": ("GET", "/model%00", 404),
    "invalid UTF-8 in the path": ("GET", "/%ff%fe", 404),
    "invalid UTF-8 in a value": ("POST", "/classify?threshold=%ff", 422),
    "invalid UTF-8 in a name": ("POST", "/classify?%ff=1", 422),
    "a huge number": ("POST", "/classify?min_exit=" + "9" * 5000, 422),
    "a huge name": ("POST", "/classify?" + "x" * 20_000 + "=1", 422),
    "a number in another script": ("POST", "/classify?top_k=%E0%A5%A7x", 422),
    "no value": ("POST", "/classify?top_k=", 422),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_requests_are_clear_errors(server, png, name):
    method, path, status = STRANGE[name]
    response = server.client.request(method, path, content=png)
    assert response.status_code == status
    assert response.headers["x-request-id"]
    assert len(response.content) < 1000
    if method != "HEAD":
        assert set(response.json()) == {"error", "code", "request_id"}
    if status == 405:
        assert response.headers["allow"] == "POST"


def test_a_405_names_every_method_of_its_path(serve):
    with serve(admin_token="secret", warm=False) as one:
        assert one.client.delete("/policy").headers["allow"] == "GET, HEAD, PUT"
        assert one.client.delete("/openapi.json").headers["allow"] == "GET, HEAD"
        assert one.client.post("/livez").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "headers",
    [
        {b"x-request-id": b"\xff\xfe"},
        {b"x-request-id": b"a" * 5000},
        {b"accept": b"\xff, */*;q=oops"},
        {b"accept": b"text/event-stream;q=0, application/json"},
        {b"content-type": b"\xff/\xfe; boundary=\x80"},
        {b"content-type": b""},
        {b"authorization": b"Bearer"},
        {b"x-api-key": b"\xe9"},
        {b"if-none-match": b"*"},
        {b"expect": b"100-continue"},
    ],
)
def test_garbage_in_headers_changes_no_answer(server, png, headers):
    response = server.client.post("/classify", content=png, headers=list(headers.items()))
    assert response.status_code == 200
    assert response.json()["label"] == server.post(png).json()["label"]


def test_garbage_for_a_key_is_a_wrong_key(serve, png):
    with serve(api_keys="one", warm=False) as locked:
        for value in (b"\xe9", b"one\xff", b"x" * 10_000):
            headers = {b"x-api-key": value}
            check_error(locked.client.get("/model", headers=headers), 403, "forbidden")


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("application/json, text/event-stream", True),
        ("application/json;q=0.5, text/event-stream;q=0.5", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0.1, application/json;q=0.2;v=1", False),
        ("application/json;q=0.5, text/event-stream;q=0.6, */*", True),
        ("application/json;q=0, text/event-stream;q=0.1", True),
        ("text/event-stream;q=0", False),
        ("text/event-stream; q=0.000", False),
        ("text/event-stream;q=0.001", True),
        ("*/*", False),
        ("text/*", False),
        ("text/event-streams", False),
    ],
)
def test_the_stream_is_given_to_who_names_it_and_does_not_prefer_json(server, png, accept, streams):
    response = server.client.post("/classify", content=png, headers={"accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream") == streams


def test_every_line_of_accept_counts(server, png):
    accept = [("accept", "application/json"), ("accept", "text/event-stream")]
    response = server.client.post("/classify", content=png, headers=accept)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "server-timing" not in response.headers, "it would be of no answer yet"


def test_of_a_parameter_given_twice_the_last_counts(server, png):
    response = server.client.post("/classify?top_k=1&top_k=2", content=png)
    assert len(response.json()["top_k"]) == 2


def test_an_operating_point_can_be_chosen_for_one_request(server, png):
    assert server.post(png, max_accuracy_loss=0).json()["exit"] == 4
    assert server.post(png, max_accuracy_loss=0).json()["reason"] == "final"
    cheap = server.post(png, max_accuracy_loss=0.07).json()
    assert cheap["exit"] == server.post(png, threshold=0.4).json()["exit"]
    both = server.post(png, max_accuracy_loss=0.05, threshold=0.5)
    check_error(both, 422, "invalid_parameter")


@pytest.mark.slow
def test_the_engines_table_takes_the_admin_token_and_tells_every_stage(serve):
    with serve(admin_token="secret") as one:
        check_error(one.client.get("/engine"), 401, "unauthenticated")
        said = one.client.get("/engine", headers={"authorization": "Bearer secret"}).json()
    assert sorted(said["seconds"]) == ["1", "2", "3", "4"]
    assert [level["max_accuracy_loss"] for level in said["ladder"]] == [0.01, 0.05, 1.0]
    with serve() as one:
        check_error(one.client.get("/engine"), 404, "not_found")
