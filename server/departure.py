"""Clients that go away before they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Scope

CONNECTION = "offramp.connection"
"""In a request's scope: its `Connection`."""


class Connection:
    """A client's, and what is to be called when it is lost.

    While a request waits behind one whose body was read before it came, nothing more is read, and
    so the client is not known to leave until the first is answered.
    """

    def __init__(self) -> None:
        self.open = True
        self.departures: set[Callable[[], None]] = set()

    def lost(self) -> None:
        """The client went away, or was answered and let go."""
        self.open = False
        for leave in tuple(self.departures):
            leave()


@contextmanager
def ending_with_client(scope: Scope) -> Iterator[None]:
    """Cancel what is inside, in the task that entered, when the client goes away.

    Waiting for the request's `http.disconnect` instead would take another task for each image.

    Args:
        scope: of the request; without a connection in it nobody is known to leave.

    Raises:
        ClientDisconnect: nobody waits any more.
    """
    connection: Connection = scope.get(CONNECTION) or Connection()
    if not connection.open:
        raise ClientDisconnect
    task, gone = asyncio.current_task(), False
    assert task is not None

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    connection.departures.add(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone:  # else somebody else cancelled
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        connection.departures.discard(leave)
