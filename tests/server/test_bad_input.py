"""Every failure that a client can provoke, over real HTTP."""

import json
import struct
import tracemalloc
import zlib

import pytest

from server.errors import OfframpError
from tests.conftest import encode, noise


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
    "0x0": (png_header(0, 0), 400, None),
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
        right = {"authorization": "Bearer secret"}
        response = one.client.put("/policy", json=change, headers=right)
        assert response.json()["in_force"]["max_accuracy_loss"] == 0.05
        assert one.client.get("/policy").json()["in_force"]["max_accuracy_loss"] == 0.05
        bad = one.client.put("/policy", json={"max_accuracy_loss": 2}, headers=right)
        check_error(bad, 422, "invalid_parameter")


def test_a_deadline_that_has_passed_on_arrival_is_a_504(server, png):
    check_error(server.post(png, deadline_ms=0.001), 504, "deadline_exceeded")


def test_a_full_server_refuses_at_once(serve, png):
    with serve(max_queue=1) as one:
        one.served.in_flight = 1
        response = one.post(png)
        one.served.in_flight = 0
        check_error(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert one.metric("refused_total", reason="queue_full") == 1


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


def test_an_unknown_failure_tells_the_client_nothing_and_the_log_everything(serve, png, caplog):
    with serve() as one:
        one.served.decoder._render = lambda _: 1 / 0
        response = one.post(png)
        check_error(response, 500, "internal")
        assert response.json()["error"] == OfframpError.sentence
        assert "ZeroDivisionError" in caplog.text
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
