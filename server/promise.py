"""A result that is not there yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Loop(Protocol):
    """What is needed of a client's event loop; the seam for tests."""

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context
    ) -> object: ...

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object: ...


class Promise(Generic[T]):
    """What a task waits for, and goes on from within the very call that keeps it.

    From asyncio's own future it would go on in the loop's next turn, behind everything that came
    meanwhile: under load that is milliseconds, which an answer may not have. So only a callback of
    the loop may keep a promise, never a task, and one task at most may wait for it.

    To a task it is a future, which it knows by `_asyncio_future_blocking`, as asyncio documents for
    those that are not its own.
    """

    _asyncio_future_blocking = False

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._done = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._going_on: tuple[Callable[[Promise[T]], object], Context] | None = None

    def get_loop(self) -> Loop:
        """The loop of whoever waits."""
        return self._loop

    def done(self) -> bool:
        """Whether it is kept, or nobody waits any more."""
        return self._done

    def result(self) -> T:
        """What it is kept with.

        Raises:
            InvalidStateError: it is not kept yet.
            BaseException: what it is kept with instead.
        """
        if not self._done:
            raise asyncio.InvalidStateError("the result is not there yet")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def set_result(self, result: T) -> None:
        """Keep it, from a callback of the loop."""
        self._result = result
        self._keep()

    def set_exception(self, error: BaseException) -> None:
        """Keep it with an error, from a callback of the loop."""
        self._error = error
        self._keep()

    def cancel(self, msg: object = None) -> bool:
        """Have the task that waits raise CancelledError; what asyncio calls when it is cancelled.

        Returns:
            Whether it was not done before.
        """
        if self._done:
            return False
        self._done = True
        self._error = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
        if self._going_on:
            go_on, context = self._going_on
            self._loop.call_soon(go_on, self, context=context)  # since a task may have called this
        return True

    def add_done_callback(
        self, callback: Callable[[Promise[T]], object], *, context: Context
    ) -> None:
        """Have the task that waits go on when it is kept; what asyncio calls when one awaits it."""
        self._going_on = callback, context

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def _keep(self) -> None:
        self._done = True
        if self._going_on:
            go_on, context = self._going_on
            context.run(go_on, self)
