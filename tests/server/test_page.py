"""The demo page's files over HTTP."""

import re

import pytest

from server.page import STATIC
from tests.server.test_bad_input import check_error

FILES = sorted(file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*") if file.is_file())
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "png": "image/png"}


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/static/{name}" for name in FILES)])
def test_every_file_is_served_under_a_strict_policy(server, path):
    response = server.client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe|https?:|\*|data:", policy)
    assert response.headers["x-content-type-options"] == "nosniff"
    suffix = path.rpartition(".")[2]
    assert response.headers["content-type"].startswith(TYPES.get(suffix, ""))


def test_a_file_is_sent_again_only_when_it_has_changed(server):
    tag = server.client.get("/static/page.js").headers["etag"]
    again = server.client.get("/static/page.js", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    other = server.client.get("/static/page.js", headers={"if-none-match": '"other"'})
    assert other.status_code == 200


@pytest.mark.parametrize(
    "path", ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "", "samples", "x.js"]
)
def test_nothing_beside_the_files_can_be_reached(server, path):
    check_error(server.client.get(f"/static/{path}"), 404, "not_found")


EVERYWHERE = (
    *("/", "/docs", "/static/page.js", "/openapi.json", "/livez", "/readyz", "/metrics"),
    *("/model", "/policy", "/v2", "/v2/health/ready", "/v2/models/tiny", "/v2/models/tiny/ready"),
)


@pytest.mark.parametrize("path", EVERYWHERE)
def test_head_is_answered_like_get_without_a_body(server, path):
    head, get = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_files_refer_to_nothing_outside_and_hold_no_inline_code():
    for name in FILES:
        if name.endswith((".html", ".js", ".css")):
            text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|//cdn|@import|innerHTML|eval\(", text), name
        if name.endswith(".html"):
            assert not re.search(r"<style|<script(?![^>]*src=)| style=| on\w+=", text), name


@pytest.mark.slow
def test_the_page_needs_no_key_but_its_requests_do(serve):
    with serve(api_keys="one") as locked:
        assert locked.client.get("/").status_code == 200
        assert locked.client.get("/docs").status_code == 200
        assert locked.client.get("/model").status_code == 401
