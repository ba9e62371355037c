"""Where workers wait for messages."""

from __future__ import annotations

import threading
from collections.abc import Callable

Message = Callable[[], None] | None
"""What a worker calls; None tells it to end."""


class Inbox:
    """Messages to several workers, of whom the first that waits takes all there are.

    So while one can do all the work it is always the same one, in whose caches the network is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: list[Message] = []
        self._waiting: dict[int, threading.Lock] = {}
        """Each worker that waits, with the lock that it is let go by."""

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Leave a message, from any thread."""
        with self._lock:
            self._messages.append(message)
            # Whoever was let go for an earlier message takes this one too.
            if len(self._messages) == 1 and self._waiting:
                self._waiting.pop(min(self._waiting)).release()

    def wait(self, worker: int, seconds: float) -> None:
        """Wait until there is a message to take, if there is none.

        Args:
            worker: its number; of several that wait the lowest is let go.
            seconds: to wait at most.
        """
        with self._lock:
            if self._messages or not seconds:
                return
            gate = self._waiting[worker] = threading.Lock()
            gate.acquire()
        gate.acquire(timeout=seconds)
        with self._lock:
            self._waiting.pop(worker, None)

    def take(self) -> list[Message]:
        """Every message there is, in the order in which they were put."""
        with self._lock:
            messages, self._messages = self._messages, []
            return messages
