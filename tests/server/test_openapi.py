"""The OpenAPI document says all that the server does."""

import base64
import re
import shlex
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from server.errors import every_error
from server.openapi import ANSWER_EXAMPLE, BATCH_RESPONSE, EVENTS_EXAMPLE, SEEN_EXAMPLE
from server.protocol import AnswerBody, BatchBody, ErrorBody, SeenBody
from tests.server.test_classify import events

BRANCHES = {"too_large", "unavailable", "not_found", "method_not_allowed"}
"""Codes of errors that only their kinds raise, or that belong to no documented path."""


@pytest.fixture(scope="module")
def one(serve):
    with serve(admin_token="secret", default_deadline_ms=None) as server:
        yield server


@pytest.fixture(scope="module")
def cold(serve):
    with serve(admin_token="secret", max_body_bytes=1000, warm=False) as server:
        yield server


@pytest.fixture(scope="module")
def document(one):
    return one.client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def operations(document):
    return {
        (method, path): operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def test_every_call_of_the_contract_is_there(operations):
    assert set(operations) >= {
        *(("post", "/classify"), ("post", "/classify/batch"), ("get", "/model")),
        *(("get", "/policy"), ("put", "/policy")),
        *(("get", "/livez"), ("get", "/readyz"), ("get", "/metrics")),
    }


def undescribed(where, node):
    """Places of a schema without a description."""
    for name, field in node.get("properties", {}).items():
        if not field.get("description"):
            yield f"{where}.{name}"
        yield from undescribed(f"{where}.{name}", field)
    if "items" in node:
        yield from undescribed(f"{where}[]", node["items"])


def test_every_operation_parameter_response_and_field_is_described(document, operations):
    missing = []
    for (method, path), operation in operations.items():
        where = f"{method} {path}"
        missing += [where for key in ("summary", "description") if not operation.get(key)]
        missing += [
            f"{where} ?{p['name']}" for p in operation.get("parameters", ()) if not p["description"]
        ]
        missing += [
            f"{where} {status}"
            for status, response in operation["responses"].items()
            if response.get("description") in (None, "", "Successful Response", "Bad Request")
        ]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            missing += undescribed(where, content["schema"])
    for name, schema in document["components"]["schemas"].items():
        missing += [] if schema.get("description") else [name]
        missing += undescribed(name, schema)
    assert missing == []


def test_every_error_code_is_an_example_of_its_status(operations):
    shown = {}
    for operation in operations.values():
        for status, response in operation["responses"].items():
            for content in response.get("content", {}).values():
                for code, example in content.get("examples", {}).items():
                    assert ErrorBody.model_validate(example["value"]).code == code
                    shown[code] = int(status)
    wanted = {kind.code: kind.status for kind in every_error() if kind.code not in BRANCHES}
    assert {code: shown.get(code) for code in wanted} == wanted


TO_THE_ADMINISTRATOR = {
    "a body that is no UTF-8": ("put", "/policy", b"\xff", 400),
    "too large a body": ("put", "/policy", b"1" * 2000, 413),
    "too large a body that is not announced": ("put", "/policy", [b"1" * 1000] * 2, 413),
    "a body that is no JSON": ("put", "/policy", b"{", 422),
    "before it is warm": ("get", "/engine", b"", 503),
}


@pytest.mark.parametrize("name", TO_THE_ADMINISTRATOR)
def test_every_status_that_an_administrator_gets_is_documented(cold, name):
    method, path, body, status = TO_THE_ADMINISTRATOR[name]
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    response = cold.client.request(method.upper(), path, content=body, headers=headers)
    assert response.status_code == status
    documented = cold.client.get("/openapi.json").json()["paths"][path][method]["responses"]
    code = response.json()["code"]
    assert code in documented[str(status)]["content"]["application/json"]["examples"]


def test_nothing_of_fastapis_own_errors_is_left(document):
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_each_locked_operation_names_how_to_unlock_it(operations, serve):
    for operation in operations.values():
        assert bool(operation["security"]) == ("403" in operation["responses"])
    for operation in (("put", "/policy"), ("get", "/engine")):
        assert operations[operation]["security"] == [{"AdminToken": []}]
    assert {} in operations["post", "/classify"]["security"]  # no key is configured
    with serve(api_keys="key", warm=False) as locked:
        paths = locked.client.get("/openapi.json").json()["paths"]
        assert paths["/classify"]["post"]["security"] == [{"ApiKey": []}, {"Bearer": []}]
        assert "put" not in paths["/policy"]  # no admin token is configured


def test_each_example_of_a_parameter_is_answered(one, operations, png):
    sent = 0
    for parameter in operations["post", "/classify"]["parameters"]:
        for example in parameter["schema"]["examples"]:
            response = one.post(png, **{parameter["name"]: example})
            assert response.status_code == 200, response.text
            sent += 1
    assert sent == 7


def test_the_examples_of_answers_have_the_shape_of_real_ones(one, png):
    real = one.post(png, explain=True, threshold=1).json()
    assert list(ANSWER_EXAMPLE) == [name for name in real if name != "seen"]
    assert ANSWER_EXAMPLE["timing_ms"].keys() == real["timing_ms"].keys()
    assert ANSWER_EXAMPLE["top_k"][0].keys() == real["top_k"][0].keys()
    assert SEEN_EXAMPLE[0].keys() == real["seen"][0].keys()
    AnswerBody.model_validate(ANSWER_EXAMPLE)
    TypeAdapter(list[SeenBody]).validate_python(SEEN_EXAMPLE)
    BatchBody.model_validate(BATCH_RESPONSE["content"]["application/json"]["example"])


def test_the_example_of_a_stream_has_the_shape_of_a_real_one(one, png):
    accept = {"accept": "text/event-stream"}
    real = one.client.post("/classify?max_exit=2&threshold=1", content=png, headers=accept)

    def shape(stream):
        return [(name, set(data)) for name, data in events(stream)]

    assert shape(real) == shape(SimpleNamespace(text=EVENTS_EXAMPLE))


@pytest.mark.slow
def test_each_command_line_of_the_document_works(one, operations, png):
    """Sends what curl would; curl itself may not be there."""
    ran = 0
    for operation in operations.values():
        for sample in operation.get("x-codeSamples", ()):
            response = curl(one, sample["source"], png)
            assert response.status_code == 200, (sample["source"], response.text)
            ran += 1
    assert ran >= 6


def with_image(line, image):
    """What a shell would make of a command line that has an image in base64."""
    return line.replace("$(base64 -w0 photo.jpg)", base64.b64encode(image).decode())


def curl(server, line, image):
    """The response to a curl command line, sent by httpx; every file in it is `image`."""
    line = with_image(line, image).replace("/models/default", f"/models/{server.served.name}")
    command, *words = shlex.split(line, comments=True)
    assert command == "curl"
    method, url, body, files, headers = None, None, None, [], {}
    while words:
        word = words.pop(0)
        if word in ("-N", "-s", "-i"):
            continue
        if word == "--data-binary":
            assert words.pop(0).startswith("@")
            body = image
        elif word == "-d":
            body = words.pop(0).encode()
        elif word == "-F":
            name, _, file = words.pop(0).partition("=@")
            files.append((name, (file, image)))
        elif word == "-H":
            name, _, value = words.pop(0).replace("TOKEN", "secret").partition(": ")
            headers[name] = value
        elif word == "-X":
            method = words.pop(0)
        else:
            url = re.fullmatch(r"(?:http://)?localhost:8000(/.*)", word).group(1)
    method = method or ("POST" if body or files else "GET")
    sent = {"content": body, "files": files or None, "headers": headers}
    response = server.client.request(method, url, **sent)
    if url.endswith("/unload"):  # the next one wants to be answered
        assert server.client.request(method, url.replace("/unload", "/load"), **sent).is_success
    return response
