"""A task goes on from a promise within the call that keeps it, and else as from any future."""

import asyncio
import contextvars
import threading

import pytest
import uvloop

from server.promise import Promise

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine function, which is given its loop."""

    def run(function):
        with asyncio.Runner(loop_factory=request.param) as runner:

            async def main():
                return await function(asyncio.get_running_loop())

            return runner.run(main())

    return run


def test_a_task_goes_on_within_the_call_that_keeps_its_promise(run):
    async def scenario(loop):
        promise, told = Promise(loop), []

        async def waiter():
            told.append(await promise)

        task = asyncio.create_task(waiter())
        await asyncio.sleep(0)

        def keep():
            promise.set_result(7)
            told.append("after")

        loop.call_soon_threadsafe(keep)
        await task
        return told

    assert run(scenario) == [7, "after"]


def test_an_error_is_raised_where_the_task_waits(run):
    async def scenario(loop):
        promise = Promise(loop)
        loop.call_soon(promise.set_exception, KeyError("gone"))
        with pytest.raises(KeyError, match="gone"):
            await promise
        return promise.done()

    assert run(scenario)


def test_what_is_kept_before_anybody_waits_is_there_at_once(run):
    async def scenario(loop):
        kept, broken = Promise(loop), Promise(loop)
        kept.set_result("here")
        broken.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await broken
        return await kept

    assert run(scenario) == "here"


def test_a_cancelled_task_leaves_its_promise(run):
    async def scenario(loop):
        promise, left = Promise(loop), []

        async def waiter():
            try:
                await promise
            except asyncio.CancelledError as error:
                left.append(error.args)
                raise

        task = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert promise.done() and not promise.cancel()
        return left

    assert run(scenario) == [("why",)]


def test_a_wait_can_time_out(run):
    async def scenario(loop):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await Promise(loop)
        promise = Promise(loop)
        loop.call_later(0.01, promise.set_result, 3)
        async with asyncio.timeout(5):
            return await promise

    assert run(scenario) == 3


def test_another_thread_keeps_it_through_the_loop(run):
    async def scenario(loop):
        promise = Promise(loop)
        threading.Timer(0.01, loop.call_soon_threadsafe, (promise.set_result, 5)).start()
        return await promise

    assert run(scenario) == 5


def test_a_task_goes_on_in_its_own_context(run):
    variable = contextvars.ContextVar("variable", default="none")

    async def scenario(loop):
        promise = Promise(loop)

        async def waiter():
            variable.set("own")
            await promise
            return variable.get()

        task = asyncio.create_task(waiter())
        await asyncio.sleep(0)
        loop.call_soon(promise.set_result, None)
        return await task, variable.get()

    assert run(scenario) == ("own", "none")


def test_a_result_that_is_not_there_cannot_be_had(run):
    async def scenario(loop):
        with pytest.raises(asyncio.InvalidStateError):
            Promise(loop).result()

    run(scenario)
