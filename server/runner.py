"""Runs stage batches of one network on one device."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from model.bundle import Bundle, BundleError
from server.card import CardMemory
from server.costs import CostTable, batch_sizes
from server.errors import Draining
from server.host import HostMemory
from server.memory import Memory, Program
from server.rows import Inputs, Row
from server.units import make_units

WARM_UP_RUNS = 5
"""How often a batch is timed…"""
WARM_UP_SECONDS = 0.1
"""…unless this is over before: what takes long varies less, and a start waits for it."""

Seconds = dict[int, dict[int, float]]
"""By stage, then by batch size."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage batch computed, row by row."""

    confidences: list[float]
    """Calibrated, 0..1."""
    probabilities: np.ndarray
    """Calibrated, float32 `[n, classes]`."""
    features: Any = None
    """For the next stage, as the device's memory has them."""
    passed: Any = None
    """Log-probabilities, fp32 `[N, classes]`, which the next exit takes as `passed`."""
    lasts: bool = True
    """Whether these two stay as they are when another batch is run."""

    @property
    def is_finite(self) -> bool:
        """Whether every confidence is a number."""
        return all(map(math.isfinite, self.confidences))


class StageRunner(Protocol):
    """What the engine needs of a runner; the seam for its tests."""

    def run(self, stage: int, inputs: Inputs, alone: bool = False) -> StageOutput: ...

    def keep(self, output: StageOutput, places: Sequence[int]) -> list[Row]: ...

    def probe(self) -> None: ...


class Runner:
    """A bundle's network on a device, one stage batch at a time.

    A batch runs eagerly, or through the program compiled for its size or else for the next larger
    one, padded: whichever was measured to be faster. A single image that has the cores to itself
    runs with a team of threads, where that was.

    Args:
        bundle: a calibrated bundle.
        device: where it runs.
        dtype: its numerics.
        memory: the device's.
        clock: seconds.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        memory: Memory | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.units = make_units(bundle, device, dtype)
        self._memory = memory or memory_of(device)
        self._clock = clock
        side = bundle.description.preprocess.size
        self._black = np.zeros((side, side, 3), np.uint8)
        self._eager: CostTable | None = None
        self._programs: dict[tuple[int, int], tuple[Program, float]] = {}
        self._teams: dict[int, Program] = {}
        self._plans: dict[tuple[int, int], Program | None] = {}

    @property
    def exits(self) -> int:
        """How many stages there are."""
        return len(self.units)

    def run(self, stage: int, inputs: Inputs, alone: bool = False) -> StageOutput:
        """Run one stage on a batch, with a single device synchronisation.

        Args:
            stage: 1..exits.
            inputs: for stage 1 uint8 pixels `[H, W, 3]`, else rows that were kept of the stage
                before.
            alone: whether it is a single image and nothing else runs.
        """
        program = self._teams.get(stage) if alone else None
        if program is None:
            program = self._plan(stage, len(inputs))
        if program:
            features, said, passed = self._memory.run(program, inputs)
        else:
            features, said, passed = self._memory.run_eagerly(self.units[stage - 1], inputs)
        return StageOutput(said[:, 0].tolist(), said[:, 1:], features, passed, program is None)

    def keep(self, output: StageOutput, places: Sequence[int]) -> list[Row]:
        """The rows that go on to the next stage, in a batch of their own.

        Args:
            output: of the batch that ran last.
            places: which of its rows, in order.
        """
        if not places:
            return []
        features, passed = output.features, output.passed
        if not output.lasts or len(places) < len(features):
            features, passed = self._memory.copy(features, passed, places)
        return [Row(features, passed, place) for place in range(len(places))]

    def warm_up(
        self,
        sizes: Sequence[int],
        draining: Callable[[], bool] = lambda: False,
    ) -> Seconds:
        """Run every stage at every batch size; eagerly, where no program has come yet.

        In rounds, so that what else runs for a while makes none look dearer than the others.

        Args:
            sizes: small to large.
            draining: whether nobody wants the result any more.

        Returns:
            Median seconds.

        Raises:
            BundleError: the network computes no numbers.
            Draining: before all of them had run.
        """
        stages = range(1, self.exits + 1)
        taken: dict[int, list[list[float]]] = {size: [] for size in sizes}
        for _ in range(1 + WARM_UP_RUNS):
            for size, passes in taken.items():
                if draining():
                    raise Draining
                if not _are_enough(passes):
                    passes.append(self._timed_pass(size))
        seconds = {k: {n: _usual(passes, k) for n, passes in taken.items()} for k in stages}
        self._eager = CostTable(seconds)
        return seconds

    def probe(self) -> None:
        """Run a black image through the first stage, which any device that works can.

        A card whose memory is full works: others may leave it some in a moment. Torch has given
        back what it could before it says so.

        Raises:
            Exception: whatever else the device raises.
        """
        with suppress(torch.OutOfMemoryError):
            self.run(1, [self._black])

    def use_program(self, stage: int, size: int, program: Program, seconds: float) -> None:
        """Take a program that was compiled for batches of `size`.

        Args:
            stage: its.
            size: its.
            program: gives what the eager unit gives.
            seconds: what it would have taken at warm-up, when the eager units were measured.
        """
        self._programs = {**self._programs, (stage, size): (program, seconds)}
        self._plans = {}  # both anew and in this order, since other workers look into them

    def use_team(self, stage: int, program: Program) -> None:
        """Take a program in which several threads compute a single image."""
        self._teams[stage] = program

    def let_go(self) -> Iterator[None]:
        """Forget all programs, one after another."""
        programs = [*(program for program, _ in self._programs.values()), *self._teams.values()]
        self._plans, self._programs, self._teams = {}, {}, {}
        while programs:
            programs.pop()
            yield

    def expected(self, stage: int, largest: int) -> dict[int, float]:
        """Seconds of a stage by batch size, at every size where they leave a straight line."""
        sizes = {s for k, s in self._programs if k == stage}
        corners = {*batch_sizes(largest), *sizes, *(s + 1 for s in sizes)}
        return {n: self._best(stage, n)[0] for n in sorted(corners) if n <= largest}

    def _plan(self, stage: int, n: int) -> Program | None:
        plans = self._plans  # once: a plan made before a program came must not outlast it
        if (stage, n) not in plans:
            _, plans[stage, n] = self._best(stage, n)
        return plans[stage, n]

    def _best(self, stage: int, n: int) -> tuple[float, Program | None]:
        return min(self._ways(stage, n), key=lambda way: way[0])

    def _ways(self, stage: int, n: int) -> Iterator[tuple[float, Program | None]]:
        """The ways for `n` images: eagerly, and through the smallest program with room for them. A
        larger one only seems faster where the machine was busier when the smaller was timed."""
        size = min((z for k, z in self._programs if k == stage and z >= n), default=None)
        if size is None or not self._memory.plans_anew:
            yield self._eager.seconds(stage, n) if self._eager else float("inf"), None
        if size is not None:
            program, seconds = self._programs[stage, size]
            yield seconds, program

    def _timed_pass(self, size: int) -> list[float]:
        """Seconds of each stage, for a batch of black images."""
        inputs: Inputs = [self._black] * size
        taken = []
        for stage in range(1, self.exits + 1):
            began = self._clock()
            output = self.run(stage, inputs)
            taken.append(self._clock() - began)
            if not output.is_finite:
                raise BundleError(f"its network computes no numbers: exit {stage} is NaN sure")
            inputs = self.keep(output, range(size))
        return taken


def _are_enough(passes: Sequence[Sequence[float]]) -> bool:
    """Whether they took so long that one more would tell little; the first does not count, since a
    card plans what it has not run before."""
    timed = passes[1:]
    return bool(timed) and sum(map(sum, timed)) >= WARM_UP_SECONDS * len(timed[0])


def _usual(passes: Sequence[Sequence[float]], stage: int) -> float:
    return statistics.median(seconds[stage - 1] for seconds in passes[1:])


def memory_of(device: torch.device) -> Memory:
    """What moves rows on this device."""
    return CardMemory(device) if device.type == "cuda" else HostMemory()
