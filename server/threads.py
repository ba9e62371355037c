"""The server's threads as the operating system shows them: their names, and how busy each is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector


def name_thread(name: str) -> None:
    """Name the calling thread, and with it those it starts, for `top -H`.

    Python does so by itself from 3.14 on; elsewhere than on Linux nothing happens.
    """
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


class ThreadClocks(Collector):
    """Processor time of threads, read whenever somebody scrapes, and so free for them.

    Args:
        registry: what is scraped.
        parts: what the threads do, each a series from the start.
    """

    def __init__(self, registry: CollectorRegistry, parts: Sequence[str]) -> None:
        self._clocks: dict[str, list[int]] = {part: [] for part in parts}
        self._ended = dict.fromkeys(parts, 0.0)
        """Seconds of threads that were released."""
        self._lock = threading.Lock()
        registry.register(self)

    def watch(self, part: str) -> None:
        """Count the calling thread's time to a part; a no-op where threads have no clocks."""
        if (clock := _own_clock()) is not None:
            with self._lock:
                self._clocks[part].append(clock)

    def release(self, part: str) -> None:
        """Keep the calling thread's time so far, and count on no more of it: what is counted must
        never fall, and another thread may be given the clock of one that has ended."""
        if (clock := _own_clock()) is not None:
            with self._lock:
                self._clocks[part].remove(clock)
                self._ended[part] += _read(clock)

    def describe(self) -> Iterable[CounterMetricFamily]:
        """The one family."""
        yield self._family()

    def collect(self) -> Iterable[CounterMetricFamily]:
        """As it is now."""
        family = self._family()
        with self._lock:
            for part, clocks in self._clocks.items():
                family.add_metric([part], self._ended[part] + sum(map(_read, clocks)))
        yield family

    def _family(self) -> CounterMetricFamily:
        said = "Processor time of the event loop's thread, and of the engine's without their teams'"
        return CounterMetricFamily("offramp_cpu_seconds", said, labels=["part"])


def _own_clock() -> int | None:
    """The calling thread's; None where threads have none."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    return time.pthread_getcpuclockid(threading.get_ident())


def _read(clock: int) -> float:
    try:
        return time.clock_gettime(clock)
    except OSError:  # the thread has ended
        return 0.0
