"""Clients that go away before they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive


@contextmanager
def ending_with_client(receive: Receive) -> Iterator[None]:
    """Cancel what is inside, in the task that entered, when the client goes away.

    Args:
        receive: the request's, once its body is read.

    Raises:
        ClientDisconnect: nobody waits any more.
    """
    task = asyncio.current_task()
    assert task is not None
    watching = asyncio.ensure_future(_cancel_when_gone(task, receive))
    try:
        yield
    except asyncio.CancelledError:
        if watching.done():  # else somebody else cancelled
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


async def _cancel_when_gone(task: asyncio.Task[Any], receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()
