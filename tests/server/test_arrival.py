"""How far behind the event loop is, and what then need not be begun."""

import math

import pytest

from server.arrival import (
    ARRIVED,
    READ,
    TIMES_BEHIND,
    TIMES_LATE,
    allowed_seconds,
    arrival,
    is_hopeless,
    is_late,
    seconds_behind,
)


def scope(query=b"", **noted):
    return {"type": "http", "query_string": query, **noted}


def test_a_request_came_when_its_first_byte_was_read():
    assert arrival(scope(**{ARRIVED: 3.0, READ: 4.0}), 5.0) == 3.0
    assert arrival(scope(), 5.0) == 5.0  # behind another protocol nothing is noted


def test_the_loop_is_behind_by_what_it_took_to_begin_a_request_that_was_read():
    assert seconds_behind(scope(**{ARRIVED: 3.0, READ: 4.0}), 5.0) == 1.0
    assert seconds_behind(scope(), 5.0) == 0.0


@pytest.mark.parametrize(
    "query",
    [
        *(b"deadline_ms=50", b"top_k=3&deadline_ms=50", b"deadline_ms=5e1", b"deadline%5Fms=50"),
        b"deadline_ms=9000&deadline_ms=50",
    ],
)
def test_a_request_allows_what_it_names(query):
    assert allowed_seconds(scope(query), None) == allowed_seconds(scope(query), 1.0) == 0.05


@pytest.mark.parametrize("query", [b"deadline_ms=0", b"no_deadline_ms=9000", b"deadline_ms=soon"])
def test_a_request_that_is_wrong_is_told_so_rather_than_to_try_again(query):
    assert allowed_seconds(scope(query), 50.0) == math.inf


def test_a_request_that_names_no_deadline_has_the_usual_one():
    assert allowed_seconds(scope(b"top_k=3"), 50.0) == 0.05
    assert allowed_seconds(scope(), None) == math.inf


def test_a_request_is_hopeless_once_what_it_will_wait_is_more_than_it_allows():
    behind = 0.05 / TIMES_BEHIND
    assert not is_hopeless(0.99 * behind, 0.05)
    assert is_hopeless(1.01 * behind, 0.05)
    assert not is_hopeless(100.0, math.inf)


def test_the_loop_is_late_long_before_a_request_is_hopeless():
    behind = 0.05 / TIMES_LATE
    assert not is_late(0.99 * behind, 0.05)
    assert is_late(1.01 * behind, 0.05)
    assert not is_hopeless(1.01 * behind, 0.05)
    assert not is_late(100.0, math.inf)
    assert not is_late(0.0009, 0.001)


def test_a_short_deadline_alone_makes_no_request_hopeless():
    assert not is_hopeless(0.0009, 0.001)


def test_what_the_event_loop_is_too_late_to_begin_is_refused_before_any_work(
    serve, png, monkeypatch
):
    with serve() as server:
        monkeypatch.setattr("server.middleware.seconds_behind", lambda scope, now: 0.1)
        refused = server.post(png, deadline_ms=100)
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert refused.headers["Retry-After"] == "1"
        assert server.metric("refused_total", reason="not_in_time") == 1
        assert server.client.get("/readyz").status_code == 200
        monkeypatch.undo()
        assert server.post(png, deadline_ms=2000).status_code == 200
