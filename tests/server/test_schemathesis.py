"""Requests made up from the OpenAPI document find nothing wrong with the server."""

import warnings

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import encode, noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, at import
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks

IMAGES = [encode(noise()), encode(noise(40, 30), "JPEG"), encode(noise(8, 8), "GIF")]
OPERATIONS = [
    *(("post", "/classify"), ("post", "/classify/batch"), ("put", "/policy")),
    *(("get", "/model"), ("get", "/policy"), ("get", "/livez"), ("get", "/readyz")),
    ("get", "/metrics"),
]
load_all_checks()
KNOWN = {
    # Bytes that are no image fit the schema of a body and are refused all the same.
    "positive_data_acceptance",
    # A deadline of a microsecond is a documented 504; that nothing is a 500 is asserted here.
    "not_a_server_error",
    # A binary body has no wrong type.
    "negative_data_rejection",
}
CHECKED = [check for check in CHECKS.get_all() if check.__name__ not in KNOWN]


@pytest.fixture(scope="module")
def document(serve):
    # Before there are threads: what this imports is parsed, which Python 3.11 does one at a time.
    schemathesis.openapi.media_type("image/*", st.sampled_from(IMAGES))
    with serve(admin_token="secret", default_deadline_ms=None) as one:
        document = schemathesis.openapi.from_dict(one.client.get("/openapi.json").json())
        with requests.Session() as session:
            yield document, {"base_url": one.url, "session": session}


def attack(document, method, path, examples):
    document, target = document
    operation = document[path][method]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(), st.sampled_from(IMAGES), st.booleans())
    def run(case, image, good):
        if path == "/classify" and good:
            case.body, case.media_type = image, "application/octet-stream"
        headers = {"Authorization": "Bearer secret"} if method == "put" else {}
        response = case.call_and_validate(checks=CHECKED, headers=headers, **target)
        assert response.status_code != 500

    run()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_made_up_requests_are_answered_as_documented(document, method, path):
    attack(document, method, path, 25 if method != "get" else 3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS[:3])
def test_many_made_up_requests_are_answered_as_documented(document, method, path):
    attack(document, method, path, 1000)
