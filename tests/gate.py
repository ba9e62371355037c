"""A device that works only when a test lets it."""

import threading
from contextlib import contextmanager

from server.costs import CostTable


class Gate:
    """Stands in front of a runner; holds every batch until it is let through."""

    def __init__(self, runner):
        self._runner = runner
        self._allowed = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.batches = []
        """(stage, inputs) of every batch that was asked for."""

    def run(self, stage, inputs, alone=False):
        self.batches.append((stage, list(inputs)))
        self.entered.release()
        assert self._allowed.acquire(timeout=20)
        return self._runner.run(stage, inputs, alone)

    def keep(self, output, places):
        return self._runner.keep(output, places)

    def probe(self):
        self._runner.probe()

    def let_through(self, batches=1):
        self._allowed.release(batches)

    def open(self):
        self.let_through(1000)

    def wait_for_a_batch(self):
        assert self.entered.acquire(timeout=10)


@contextmanager
def gated(server):
    """The server's device, closed; opened at the end of the block at the latest.

    It is taken to need as long for many images as for one, whatever warm-up measured of a busy
    machine: what waits for it shares a batch.
    """
    engine = server.served.engine
    scheduler = engine.scheduler
    flat = {1: 0.001, scheduler.max_batch: 0.001}
    scheduler.costs = CostTable({stage: flat for stage in range(1, scheduler.exits + 1)})
    gate = Gate(engine._runner)
    engine._runner = gate
    try:
        yield gate
    finally:
        gate.open()
