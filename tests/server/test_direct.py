"""The direct path answers as FastAPI would, whatever is sent."""

import asyncio

import httpx
import pytest

from server.app import create_app, create_routes, surround
from server.errors import InvalidParameter
from server.parameters import parameters_from
from server.served import Served
from server.settings import Settings

QUERIES = [
    "",
    "top_k=3&explain=true",
    "top_k=2&top_k=3",
    "explain=yes&max_exit=2",
    "threshold=0.5&deadline_ms=60000",
    "max_accuracy_loss=0.01",
    "top_k=0",
    "top_k=",
    "top_k=many",
    "explain",
    "threshold=nan",
    "threshold=0.5&max_accuracy_loss=0.01",
    "min_exit=9",
    "no_such=1",
    "%74op_k=1",
    "a&b&c=%ff",
    "top_k=1" + "0" * 300,
]
SAID_BY_CHANCE = ("request_id", "timing_ms", "seen")


class Client:
    """Calls an application, each time from an event loop of its own."""

    def __init__(self, app):
        self.transport = httpx.ASGITransport(app)

    def request(self, method, url, **sent):
        async def ask():
            async with httpx.AsyncClient(transport=self.transport, base_url="http://x") as client:
                return await client.request(method, url, **sent)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def ways(bundle_path):
    """Clients of the same server with and without the direct path."""
    served = Served(Settings(bundle=bundle_path, threads=1, max_batch=4, audit_rate=0.0))
    served.warm_up()
    yield Client(create_app(served)), Client(surround(create_routes(served), served))
    served.close()


def said(response):
    body = {k: v for k, v in response.json().items() if k not in SAID_BY_CHANCE}
    return response.status_code, body, response.headers["content-type"]


@pytest.mark.parametrize("query", QUERIES)
def test_parameters_mean_the_same(ways, png, query):
    direct, usual = (client.request("POST", f"/classify?{query}", content=png) for client in ways)
    assert said(direct) == said(usual)


@pytest.mark.parametrize("body", [b"", b"no image", "form"])
def test_bodies_mean_the_same(ways, png, body):
    sent = {"files": {"file": png}} if body == "form" else {"content": body}
    direct, usual = (client.request("POST", "/classify", **sent) for client in ways)
    assert said(direct) == said(usual)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_left_to_fastapi(ways, method):
    direct, usual = (client.request(method, "/classify") for client in ways)
    assert said(direct) == said(usual)
    assert direct.headers["allow"] == usual.headers["allow"] == "POST"


def test_a_bad_query_is_no_better_for_being_repeated():
    for _ in range(2):
        with pytest.raises(InvalidParameter, match="top_k"):
            parameters_from(b"top_k=0")
