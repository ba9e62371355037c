"""What the cores do best: many threads inside one operation, or several stage batches at once."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deploy.bench.stages import Pass, staged_pass
from model.bundle import Bundle

WARM_UP_SECONDS = 0.3
ROUNDS = 3
"""Measurements of each setup, in turns with the others, so that a busy machine disturbs all alike;
the median counts."""


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
    ratio: float
    """Images a second, over those of one engine with a thread for each core."""

    def as_dict(self) -> dict[str, Any]:
        """The figures, flat."""
        return {**asdict(self.setup), **{k: v for k, v in asdict(self).items() if k != "setup"}}


def setups(cores: int) -> list[Setup]:
    """One engine with 1 to all cores' threads, then the even splits; the default is among them."""
    alone = [Setup(1, threads) for threads in range(1, cores + 1)]
    return alone + [Setup(n, cores // n) for n in range(2, cores + 1) if cores % n == 0]


def measure(
    bundle: Bundle,
    way: str,
    dtypes: Sequence[str],
    batches: Sequence[int],
    cores: int,
    seconds: float,
) -> list[Measured]:
    """Time every setup at every batch size."""
    rows: list[Measured] = []
    cases = list(itertools.product(dtypes, batches))
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        for i, (dtype, batch) in enumerate(cases, start=1):
            print(f"{i}/{len(cases)} {way} {dtype} batch {batch}", file=sys.stderr, flush=True)
            fleets = {
                setup: _fleet(bundle, way, getattr(torch, dtype), batch, setup, Path(scratch))
                for setup in setups(cores)
            }
            rows += _compare(fleets, dtype, batch, cores, seconds)
    return rows


def _fleet(
    bundle: Bundle, way: str, dtype: torch.dtype, batch: int, setup: Setup, folder: Path
) -> list[Pass]:
    torch.set_num_threads(setup.threads)
    return [staged_pass(bundle, way, dtype, batch, folder) for _ in range(setup.engines)]


def _compare(
    fleets: dict[Setup, list[Pass]], dtype: str, batch: int, cores: int, seconds: float
) -> list[Measured]:
    runs: dict[Setup, list[list[float]]] = {setup: [] for setup in fleets}
    for _ in range(ROUNDS):
        for setup, passes in fleets.items():
            runs[setup].append(run_at_once(passes, setup.threads, seconds / ROUNDS))
    rates = {
        setup: statistics.median(batch * len(taken) * ROUNDS / seconds for taken in of_setup)
        for setup, of_setup in runs.items()
    }
    return [
        Measured(
            setup,
            dtype,
            batch,
            rates[setup],
            1e3 * statistics.median(itertools.chain(*runs[setup])),
            rates[setup] / rates[Setup(1, cores)],
        )
        for setup in fleets
    ]


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
        taken, began = [], time.perf_counter()
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
    lines = [
        "| numerics | batch | engines | threads each | images/s | a pass, ms | of the default |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.dtype} | {r.batch} | {r.setup.engines} | {r.setup.threads} "
        f"| {r.images_per_second:.0f} | {r.pass_ms:.2f} | {r.ratio:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)
