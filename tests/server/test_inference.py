"""The Open Inference Protocol: the answers of /classify, to clients that know only tensors."""

import base64
import json
import struct
import time

import numpy as np
import pytest
from PIL import Image

from server.inference import OUTPUTS
from server.metrics import INFER
from server.routes import MAX_BATCH_IMAGES
from server.tensors import HEADER_LENGTH, MOST_JSON_BYTES, MOST_JSON_NUMBERS
from tests.conftest import encode, noise

INFER_PATH = "/v2/models/tiny/infer"


def encoded(*images):
    """An input of encoded images, as JSON."""
    data = [base64.b64encode(image).decode() for image in images]
    return {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}


def infer(server, *inputs, path=INFER_PATH, **others):
    return server.client.post(path, json={"inputs": inputs, **others})


def infer_raw(server, tensor, raw, **others):
    header = json.dumps({"inputs": [tensor], **others}).encode()
    headers = {HEADER_LENGTH: str(len(header))}
    return server.client.post(INFER_PATH, content=header + raw, headers=headers)


def outputs_of(response):
    """By name, of a response of JSON or with raw tensors behind it."""
    assert response.status_code == 200, response.text
    length = int(response.headers.get(HEADER_LENGTH, len(response.content)))
    said, raw = json.loads(response.content[:length]), response.content[length:]
    found = {}
    for output in said["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        found[output["name"]] = output["data"] if size is None else raw[:size]
        raw = raw[size or 0 :]
    assert raw == b""
    return found


def test_the_model_says_which_tensors_it_takes_and_gives(server):
    said = server.client.get("/v2/models/tiny").json()
    assert (said["name"], said["versions"]) == ("tiny", ["7"])
    assert {t["name"]: (t["datatype"], t["shape"]) for t in said["inputs"]} == {
        "image": ("BYTES", [-1]),
        "pixels": ("UINT8", [-1, -1, -1, 3]),
    }
    assert {t["name"]: t["datatype"] for t in said["outputs"]} == OUTPUTS
    assert server.client.get("/v2/models/tiny/versions/7").json() == said
    assert server.client.get("/v2").json()["extensions"] == ["binary_tensor_data"]


def test_health_is_told_in_the_protocols_words(server):
    assert server.client.get("/v2/health/live").json() == {"live": True}
    assert server.client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/tiny/ready", "/v2/models/tiny/versions/7/ready"):
        assert server.client.get(path).json() == {"name": "tiny", "ready": True}
    server.served.leaving = True
    try:
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            assert server.client.get(path).status_code == 503
    finally:
        server.served.leaving = False


@pytest.mark.parametrize("binary", [False, True])
def test_images_get_the_answers_of_classify(server, binary):
    sent = [encode(noise(seed=seed)) for seed in range(3)]
    expected = [server.post(image, top_k=1).json() for image in sent]
    response = infer(server, encoded(*sent), id="mine", parameters={"binary_data_output": binary})
    found = outputs_of(response)
    assert list(found) == list(OUTPUTS)
    assert response.headers["x-request-id"]
    if binary:
        assert response.headers["content-type"] == "application/octet-stream"
        exits = np.frombuffer(found["exit"], "<i4").tolist()
        confidences = np.frombuffer(found["confidence"], "<f4")
        probabilities = np.frombuffer(found["probabilities"], "<f4").reshape(3, -1)
        labels = b"".join(
            struct.pack("<I", len(e["label"])) + e["label"].encode() for e in expected
        )
        assert found["label"] == labels
        assert found["degraded"] == bytes(3)
    else:
        assert response.json()["id"] == "mine"
        assert (response.json()["model_name"], response.json()["model_version"]) == ("tiny", "7")
        exits, confidences = found["exit"], found["confidence"]
        probabilities = np.reshape(found["probabilities"], (3, -1))
        assert found["label"] == [e["label"] for e in expected]
        assert found["reason"] == [e["reason"] for e in expected]
        assert found["class_id"] == [e["class_id"] for e in expected]
        assert found["degraded"] == [False] * 3
    assert exits == [e["exit"] for e in expected]
    np.testing.assert_allclose(confidences, [e["confidence"] for e in expected], atol=1e-3)
    np.testing.assert_allclose(
        probabilities.max(axis=1), [e["top_k"][0]["probability"] for e in expected], atol=1e-3
    )


def test_images_may_come_raw(server, png):
    raw = struct.pack("<I", len(png)) + png
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    asked = [{"name": "exit"}, {"name": "label", "parameters": {"binary_data": True}}]
    found = outputs_of(infer_raw(server, tensor, raw, outputs=asked))
    one = server.post(png).json()
    assert found["exit"] == [one["exit"]]
    assert found["label"][4:].decode() == one["label"]


@pytest.mark.parametrize("side", [16, 32, 300])
def test_images_may_come_decoded(server, side):
    picture = noise(side, side)
    pixels = np.asarray(Image.open(picture) if isinstance(picture, bytes) else picture)[None]
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    raw = tensor | {"parameters": {"binary_data_size": pixels.size}}
    found = outputs_of(infer_raw(server, raw, pixels.tobytes()))
    assert found["label"] == [server.post(encode(picture)).json()["label"]]
    if side < 300:
        as_lists = infer(server, tensor | {"data": pixels.tolist()})
        assert outputs_of(as_lists)["label"] == found["label"]


def test_parameters_are_those_of_classify(server, png):
    def exits(**parameters):
        return outputs_of(infer(server, encoded(png), parameters=parameters))["exit"]

    assert exits(max_exit=1) == [1]
    assert exits(min_exit=3, threshold=0) == [3]
    assert exits(max_accuracy_loss=0) == [4]
    late = infer(server, encoded(png), parameters={"deadline_ms": 0.001})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    for name, value in (("threshold", 2), ("threshold", True), ("top_k", 3), ("priority", 1)):
        bad = infer(server, encoded(png), parameters={name: value})
        assert (bad.status_code, bad.json()["code"]) == (422, "invalid_parameter")


def test_a_query_string_has_no_parameters(server, png):
    for query in ("deadline_ms=-5", "foo=1", "deadline_ms=500", "x"):
        bad = infer(server, encoded(png), path=f"{INFER_PATH}?{query}")
        assert (bad.status_code, bad.json()["code"]) == (422, "invalid_parameter")
        assert bad.json()["error"].startswith(f"{query.partition('=')[0]}: ")
    assert infer(server, encoded(png), path=f"{INFER_PATH}?").status_code == 200


def test_null_is_as_good_as_absent(server, png):
    absent = {"id": None, "parameters": None, "outputs": None}
    everything = outputs_of(infer(server, encoded(png) | {"parameters": None}, **absent))
    assert list(everything) == list(OUTPUTS)
    named = [{"name": "label", "parameters": None}, {"name": "exit", "parameters": {"x": None}}]
    limits = {"max_exit": 1, "min_exit": None, "binary_data_output": None}
    found = outputs_of(infer(server, encoded(png), outputs=named, parameters=limits))
    assert (list(found), found["exit"]) == (["label", "exit"], [1])
    raw = struct.pack("<I", len(png)) + png
    tensor = encoded(png) | {"data": None, "parameters": {"binary_data_size": len(raw)}}
    assert outputs_of(infer_raw(server, tensor, raw)) == everything


def test_a_body_is_waited_for_as_long_as_it_may_allow(serve, png):
    def infer_slowly(**parameters):
        body = json.dumps({"inputs": [encoded(png)], "parameters": parameters}).encode()
        head = f"POST {INFER_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with one.send(head.encode() + body[:-1]) as connection:
            time.sleep(0.1)
            connection.sendall(body[-1:])
            return connection.recv(1 << 16).split()[1]

    with serve(default_deadline_ms=50) as one:
        assert infer_slowly(deadline_ms=60_000) == b"200"
        assert infer_slowly() == infer_slowly(deadline_ms=60) == b"504"


PIXELS = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3]}
MALFORMED = {
    "no JSON": b"{",
    "no inputs": {},
    "two inputs": {"inputs": [encoded(b"x"), encoded(b"x")]},
    "another input": {"inputs": [encoded(b"x") | {"name": "audio"}]},
    "another datatype": {"inputs": [encoded(b"x") | {"datatype": "FP64"}]},
    "no data": {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]},
    "no base64": {"inputs": [encoded(b"x") | {"data": ["?"]}]},
    "a number for an image": {"inputs": [encoded(b"x") | {"data": [1]}]},
    "another shape": {"inputs": [encoded(b"x") | {"shape": [2]}]},
    "a negative shape": {"inputs": [encoded(b"x") | {"shape": [-1]}]},
    "no image": {"inputs": [encoded()]},
    "too many images": {"inputs": [encoded(*[b"x"] * (MAX_BATCH_IMAGES + 1))]},
    "an unknown output": {"inputs": [encoded(b"x")], "outputs": [{"name": "mask"}]},
    "pixels of two channels": {"inputs": [PIXELS | {"shape": [1, 1, 1, 2], "data": [1, 2]}]},
    "pixels that are no tensor": {"inputs": [PIXELS | {"data": [[1, 2], [3]]}]},
    "pixels beyond a byte": {"inputs": [PIXELS | {"data": [1, 2, 256]}]},
    "pixels below nothing": {"inputs": [PIXELS | {"data": [1, 2, -1]}]},
    "pixels that are no whole numbers": {"inputs": [PIXELS | {"data": [1, 2, 0.5]}]},
    "pixels that are words": {"inputs": [PIXELS | {"data": ["1", "2", "3"]}]},
    "fewer pixels": {"inputs": [PIXELS | {"data": [1, 2]}]},
    "pixels that should come raw": {"inputs": [PIXELS | {"shape": [1, 200, 200, 3], "data": [1]}]},
    "raw bytes that do not come": {"inputs": [PIXELS | {"parameters": {"binary_data_size": 3}}]},
    "data twice": {"inputs": [PIXELS | {"data": [1] * 3, "parameters": {"binary_data_size": 3}}]},
    "a word among pixels": {"inputs": [PIXELS | {"data": ["x" * 1000, *[1] * 50_000]}]},
    "too many pixels": {"inputs": [PIXELS | {"data": [1] * (MOST_JSON_NUMBERS + 1)}]},
    "a shape without room": {"inputs": [PIXELS | {"shape": [0, 2**30, 2**30, 3], "data": []}]},
    "a shape beyond numbers": {"inputs": [PIXELS | {"shape": [1, 0, 10**30, 3], "data": []}]},
    "a shape beyond printing": {"inputs": [encoded(b"x") | {"shape": [10**4000, 10**4000]}]},
    "many dimensions": {"inputs": [encoded(b"x") | {"shape": [1] * 100}]},
    "an output twice": {"inputs": [encoded(b"x")], "outputs": [{"name": "exit"}] * 2},
    "a size in words": {"inputs": [PIXELS | {"parameters": {"binary_data_size": "0"}}]},
    "too much JSON": {"inputs": [encoded(bytes(MOST_JSON_BYTES))]},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_a_clear_error(server, name):
    body = MALFORMED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post(INFER_PATH, content=content)
    assert response.status_code == 400, response.text
    said = response.json()
    assert said["code"] == "bad_request" and said["request_id"] and len(said["error"]) < 300


@pytest.mark.parametrize(
    ("length", "raw"),
    [
        ("x", b""),
        ("-1", b""),
        ("9" * 30, b""),
        ("9999", b""),
        (None, b"\x05\0\0\0abc"),
        (None, b"\1"),
    ],
)
def test_raw_bytes_that_are_not_as_announced_are_a_clear_error(server, length, raw):
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {HEADER_LENGTH: str(len(header)) if length is None else length}
    response = server.client.post(INFER_PATH, content=header + raw, headers=headers)
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")


def test_the_first_image_that_fails_fails_the_request_and_no_other(server, png):
    failed = infer(server, encoded(png, b"no image", png))
    assert (failed.status_code, failed.json()["code"]) == (400, "unsupported_image")
    assert outputs_of(infer(server, encoded(png)))["label"]
    assert server.metric("in_flight_jobs") == 0


def test_too_large_an_image_is_refused_however_it_comes(serve):
    with serve(max_pixels=100) as small:
        tensor = PIXELS | {"shape": [1, 1, 101, 3], "parameters": {"binary_data_size": 303}}
        refused = infer_raw(small, tensor, bytes(303))
        assert (refused.status_code, refused.json()["code"]) == (413, "image_too_large")
        nothing = PIXELS | {"shape": [1, 0, 5, 3], "data": []}
        assert infer(small, nothing).json()["code"] == "broken_image"


def test_what_is_not_served_is_not_found(server, png):
    for path in ("/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/other/ready"):
        assert server.client.get(path).json()["code"] == "not_found"
    for path in ("/v2/models/other/infer", "/v2/models/tiny/versions/2/infer"):
        assert infer(server, encoded(png), path=path).status_code == 404
    assert infer(server, encoded(png), path="/v2/models/tiny/versions/7/infer").status_code == 200


def test_keys_are_asked_for_but_by_health(serve, png):
    with serve(api_keys="one") as locked:
        assert infer(locked, encoded(png)).status_code == 401
        for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/ready"):
            assert locked.client.get(path).status_code == 401
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert locked.client.get(path).status_code == 200


def test_requests_count_as_one_route_whatever_their_path_names(server, png):
    def count(code):
        return server.metric("requests_total", route=INFER, code=code)

    before = count("200"), count("404")
    infer(server, encoded(png))
    infer(server, encoded(png), path="/v2/models/other/infer")
    assert (count("200"), count("404")) == (before[0] + 1, before[1] + 1)
