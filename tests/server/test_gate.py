"""The gate's laws, on a real event loop."""

import asyncio

import pytest

from server.gate import EACH_TURN, Gate


async def turns_taken(requests):
    """In which turn of the event loop each request passed."""
    gate, turn, passed = Gate(), 0, {}

    async def one(number):
        await gate()
        passed[number] = turn

    tasks = [asyncio.ensure_future(one(number)) for number in range(requests)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    return passed


def test_so_many_pass_a_turn_and_no_more():
    passed = list(asyncio.run(turns_taken(5 * EACH_TURN)).values())
    assert all(passed.count(turn) <= EACH_TURN for turn in passed)
    assert max(passed) <= 5 * 2, "no turn goes by unused"


def test_requests_pass_in_the_order_they_came():
    assert list(asyncio.run(turns_taken(3 * EACH_TURN + 1))) == list(range(3 * EACH_TURN + 1))


def test_a_lone_request_waits_for_no_turn():
    async def alone():
        gate = Gate()
        for _ in range(3 * EACH_TURN):
            with pytest.raises(StopIteration):
                gate().send(None)  # it does not give way even once
            await asyncio.sleep(0)

    asyncio.run(alone())


def test_one_that_was_cancelled_leaves_its_place_to_the_next():
    async def crowd():
        gate = Gate()
        first = [asyncio.ensure_future(gate()) for _ in range(EACH_TURN)]
        gone = [asyncio.ensure_future(gate()) for _ in range(50 * EACH_TURN)]
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        last = asyncio.ensure_future(gate())
        for _ in range(5):
            await asyncio.sleep(0)
        assert last.done()
        await asyncio.gather(*first)

    asyncio.run(crowd())
