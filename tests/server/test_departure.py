"""What a client that goes away ends, and what it does not."""

import asyncio
import gc
import logging
import time

import pytest
from starlette.requests import ClientDisconnect

from server.departure import CONNECTION, Connection, ending_with_client
from tests.conftest import until
from tests.gate import gated

HEAD = b"POST /classify?threshold=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


async def waiting(scope, begun):
    with ending_with_client(scope):
        begun.set()
        await asyncio.sleep(30)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_client_that_leaves_ends_what_waits_for_its_answer():
    async def scenario():
        connection, begun = Connection(), asyncio.Event()
        task = asyncio.create_task(waiting({CONNECTION: connection}, begun))
        await begun.wait()
        connection.lost()
        with pytest.raises(ClientDisconnect):
            await task
        assert task.cancelling() == 0 and not connection.departures

    run(scenario)


def test_every_request_of_a_connection_ends_with_it():
    async def scenario():
        connection, events = Connection(), [asyncio.Event() for _ in range(3)]
        tasks = [asyncio.create_task(waiting({CONNECTION: connection}, e)) for e in events]
        for event in events:
            await event.wait()
        connection.lost()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(e, ClientDisconnect) for e in ended)

    run(scenario)


def test_what_begins_after_the_client_left_ends_before_it_is_begun():
    async def scenario():
        connection, begun = Connection(), asyncio.Event()
        connection.lost()
        with pytest.raises(ClientDisconnect):
            await waiting({CONNECTION: connection}, begun)
        assert not begun.is_set()

    run(scenario)


def test_somebody_else_who_cancels_is_no_client_that_left():
    async def scenario():
        begun = asyncio.Event()
        task = asyncio.create_task(waiting({CONNECTION: Connection()}, begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario)


def test_a_connection_lost_after_the_answer_ends_nothing():
    async def scenario():
        connection = Connection()
        with ending_with_client({CONNECTION: connection}):
            pass
        connection.lost()
        await asyncio.sleep(0)
        return "answered"

    assert run(scenario) == "answered"


def test_behind_another_protocol_nobody_is_known_to_leave():
    async def scenario():
        with ending_with_client({}):
            await asyncio.sleep(0)
        return "answered"

    assert run(scenario) == "answered"


@pytest.mark.slow
@pytest.mark.parametrize("size", [70_505, 587_310])
def test_a_client_whose_image_came_in_large_pieces_is_heard_to_leave(serve, png, size):
    body = png + bytes(size - len(png))
    with serve(default_deadline_ms=None) as server:
        with gated(server) as gate:
            connection = server.send(HEAD % size)
            time.sleep(0.05)
            connection.sendall(body[:1000])
            time.sleep(0.05)
            connection.sendall(body[1000:])
            gate.wait_for_a_batch()
            connection.close()
            until(lambda: server.served.in_flight == 0)
        assert server.post(png).status_code == 200


@pytest.mark.slow
def test_pipelined_requests_of_a_client_that_leaves_are_all_ended(serve, png, caplog):
    """The first runs when the second is already read."""
    head = HEAD % len(png)
    with serve(default_deadline_ms=None) as server:
        with gated(server) as gate:
            connection = server.send(head + png + head + png)
            gate.wait_for_a_batch()
            connection.close()
            until(lambda: server.served.in_flight == 0)
        assert server.post(png).status_code == 200
    gc.collect()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
