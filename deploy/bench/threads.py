"""What the cores do best: many threads inside one operation, or several stage batches at once."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from deploy.bench.stages import Pass, staged_pass
from model.bundle import BundleError, load_servable
from model.numerics import DTYPES
from model.table import markdown_table
from server.settings import workers_at_once

WARM_UP_SECONDS = 0.3
ROUNDS = 3
"""Measurements of each setup, in turns with the others, so that a busy machine disturbs all alike;
the median counts."""
PREPARE_SECONDS = 1200.0
"""Compiling takes minutes on a slow machine."""
END_SECONDS = 5.0
RUN_SECONDS = 120.0
TIMES_LONGER = 10
"""A setup is stuck that takes so many times as long as it should run, and the seconds above."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How the cores are shared out."""

    engines: int
    """That run stage batches at the same time, each its own."""
    threads: int
    """Inside one operation of each."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One setup at one batch size."""

    setup: Setup
    dtype: str
    batch: int
    images_per_second: float
    """All engines together, each image through every stage."""
    pass_ms: float
    """Median of a batch through every stage, while the other engines run theirs."""
    ratio: float | None
    """Images a second, over those of what a server takes by default; None if that was stuck."""

    def as_dict(self) -> dict[str, Any]:
        """The figures, flat."""
        return {**asdict(self.setup), **{k: v for k, v in asdict(self).items() if k != "setup"}}


def setups(cores: int) -> list[Setup]:
    """One engine with 1 to all cores' threads, the even splits, and the default."""
    alone = [Setup(1, threads) for threads in range(1, cores + 1)]
    even = [Setup(n, cores // n) for n in range(2, cores + 1) if cores % n == 0]
    return list(dict.fromkeys([*alone, *even, default(cores)]))


def default(cores: int) -> Setup:
    """What a server takes on so many cores for a quick network, unless it is told."""
    return Setup(workers_at_once(0, 1, cores)[0], 1)


@dataclass(frozen=True, slots=True)
class Case:
    """What all setups run."""

    bundle: Path
    way: str
    dtype: str
    batch: int
    cache: Path
    """Where a server keeps compiled stages."""


class Stuck(Exception):
    """A setup that took too long, with what it was at."""


class Fleet:
    """The engines of one setup, in a process of their own.

    So no team of threads that another setup has left is in the way, and one that takes too long, as
    teams do that wait for a core that others keep busy, can be ended.

    Args:
        setup: what it is.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=_obey, args=(theirs, setup), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self, case: Case) -> None:
        """Load what a case needs, compiling what the cache lacks.

        Raises:
            Stuck: it took too long.
            RuntimeError: it failed.
        """
        self._order(case, PREPARE_SECONDS, "to load and compile")

    def run(self, seconds: float) -> list[float]:
        """Seconds of each pass that ended within so long, of all engines at once.

        Raises:
            Stuck, RuntimeError: as `prepare`.
        """
        passes: list[float] = self._order(
            seconds, RUN_SECONDS + TIMES_LONGER * seconds, f"to run for {seconds:.1f} s"
        )
        return passes

    def close(self) -> None:
        """End the process, which does so by itself unless it is stuck."""
        self._orders.close()
        self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()

    def _order(self, order: Case | float, most_seconds: float, doing: str) -> Any:
        self._orders.send(order)
        if not self._orders.poll(most_seconds):
            raise Stuck(f"took over {most_seconds:.0f} s {doing}")
        try:
            said = self._orders.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.setup} ended") from None
        if isinstance(said, Exception):
            raise RuntimeError(f"{self.setup}: {said}")
        return said


def _obey(orders: Connection, setup: Setup) -> None:
    """Prepare each case and run for each number of seconds, until killed or left alone."""
    warnings.filterwarnings("ignore")  # torch's own
    torch.set_num_threads(setup.threads)
    passes: list[Pass] = []
    with suppress(EOFError, ConnectionError):
        while True:
            order = orders.recv()
            try:
                if isinstance(order, Case):
                    passes = [_pass(order) for _ in range(setup.engines)]
                    orders.send(None)
                else:
                    orders.send(run_at_once(passes, setup.threads, order))
            except (OSError, RuntimeError, BundleError) as error:
                orders.send(RuntimeError(str(error)))


def _pass(case: Case) -> Pass:
    bundle = load_servable(case.bundle)
    return staged_pass(bundle, case.way, DTYPES[case.dtype], case.batch, case.cache)


def measure(cases: Sequence[Case], cores: int, seconds: float) -> list[Measured]:
    """Time every setup in every case; one that is stuck is said and left out from there on."""
    rows: list[Measured] = []
    with ExitStack() as ending:
        fleets = [Fleet(setup) for setup in setups(cores)]
        for fleet in fleets:
            ending.callback(fleet.close)
        for i, case in enumerate(cases, start=1):
            name = f"{case.way} {case.dtype} batch {case.batch}"
            print(f"{i}/{len(cases)} {name}", file=sys.stderr, flush=True)
            runs = compare(fleets, case, seconds)
            fleets = [fleet for fleet in fleets if fleet.setup in runs]
            rows += measured(runs, case, default(cores), seconds)
    return rows


def compare(fleets: Sequence[Fleet], case: Case, seconds: float) -> dict[Setup, list[list[float]]]:
    """The passes of each round, by setup; without those that are stuck."""
    runs: dict[Setup, list[list[float]]] = {fleet.setup: [] for fleet in fleets}
    for step in range(ROUNDS + 1):
        for fleet in fleets:
            if fleet.setup not in runs:
                continue
            try:
                if step == 0:
                    fleet.prepare(case)
                else:
                    runs[fleet.setup].append(fleet.run(seconds / ROUNDS))
            except Stuck as stuck:
                engines, threads = fleet.setup.engines, fleet.setup.threads
                print(
                    f"left out: {engines} engines with {threads} threads each {stuck}",
                    file=sys.stderr,
                )
                fleet.close()
                del runs[fleet.setup]
    return runs


def measured(
    runs: dict[Setup, list[list[float]]], case: Case, reference: Setup, seconds: float
) -> list[Measured]:
    """What the rounds of each setup say."""
    rates = {
        setup: statistics.median(case.batch * len(taken) * ROUNDS / seconds for taken in rounds)
        for setup, rounds in runs.items()
    }
    usual = rates.get(reference)
    return [
        Measured(
            setup,
            case.dtype,
            case.batch,
            rate,
            1e3 * _median(list(itertools.chain(*runs[setup]))),
            rate / usual if usual else None,
        )
        for setup, rate in rates.items()
    ]


def _median(passes: Sequence[float]) -> float:
    return statistics.median(passes) if passes else math.inf


def run_at_once(passes: Sequence[Pass], threads: int, seconds: float) -> list[float]:
    """Run each pass over and over in a thread of its own; the seconds of all that ended in time."""
    together = threading.Barrier(len(passes))

    @torch.inference_mode()
    def one(run: Pass) -> list[float]:
        torch.set_num_threads(threads)
        warm = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < warm:
            run()
        together.wait()
        taken: list[float] = []
        began = time.perf_counter()
        end = began + seconds
        while True:
            run()
            now = time.perf_counter()
            if now > end:
                return taken
            taken.append(now - began)
            began = now

    with ThreadPoolExecutor(len(passes)) as pool:
        return [seconds for taken in pool.map(one, passes) for seconds in taken]


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    head = ["numerics", "batch", "engines", "threads each", "images/s", "a pass, ms"]
    cells = [
        [
            r.dtype,
            r.batch,
            r.setup.engines,
            r.setup.threads,
            f"{r.images_per_second:.0f}",
            f"{r.pass_ms:.2f}",
            "-" if r.ratio is None else f"{r.ratio:.2f}",
        ]
        for r in rows
    ]
    return markdown_table([*head, "of the default"], cells)
