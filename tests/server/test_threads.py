"""The processor time of the server's threads."""

import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from server.threads import ThreadClocks
from tests.conftest import until

BUSY_SECONDS = 0.05


@pytest.fixture
def registry():
    return CollectorRegistry()


def seconds(registry, part):
    return registry.get_sample_value("offramp_cpu_seconds_total", {"part": part})


def test_a_part_takes_what_its_threads_take_and_no_other(registry):
    clocks = ThreadClocks(registry, ["busy", "idle"])
    assert seconds(registry, "busy") == seconds(registry, "idle") == 0.0
    enough = threading.Event()

    def work():
        clocks.watch("busy")
        while not enough.is_set():
            sum(range(1000))

    def rest():
        clocks.watch("idle")
        enough.wait()

    threads = [threading.Thread(target=one) for one in (work, work, rest)]
    for thread in threads:
        thread.start()
    until(lambda: seconds(registry, "busy") > BUSY_SECONDS)
    assert seconds(registry, "idle") < BUSY_SECONDS / 2
    enough.set()
    for thread in threads:
        thread.join()


def test_a_thread_that_has_ended_is_no_error(registry):
    clocks = ThreadClocks(registry, ["brief"])
    thread = threading.Thread(target=clocks.watch, args=("brief",))
    thread.start()
    thread.join()
    until(lambda: seconds(registry, "brief") == 0.0)


def test_where_threads_have_no_clocks_the_series_stays_at_zero(registry, monkeypatch):
    monkeypatch.delattr(time, "pthread_getcpuclockid")
    ThreadClocks(registry, ["part"]).watch("part")
    assert seconds(registry, "part") == 0.0


def test_a_server_says_what_its_event_loop_and_its_engine_take(server, png):
    def taken():
        registry = server.served.metrics.registry
        return [seconds(registry, part) for part in ("event_loop", "engine")]

    before = taken()
    assert server.post(png, threshold=1).status_code == 200
    until(lambda: all(now > then for now, then in zip(taken(), before, strict=True)))
