"""Runs stage batches of one network on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from server.costs import CostTable, batch_sizes
from server.staging import Staging, card_staging
from server.units import make_units

WARM_UP_RUNS = 5
FEW_SLICES = 8
"""Up to so many, rows are sooner picked out of a card's batch slice by slice than by place."""

Seconds = dict[int, dict[int, float]]
"""By stage, then by batch size."""


class Program(Protocol):
    """A unit compiled for one batch size."""

    @property
    def buffers(self) -> Sequence[Tensor]:
        """Its inputs in the thread that asks; whoever fills them saves a copy."""

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run on these inputs; the outputs last until this thread's next call."""


class Row(NamedTuple):  # which is made in less time than a dataclass
    """One image's features between two stages; only the runner looks inside."""

    features: Tensor
    """The whole batch that the row came out of, `[N, C, H, W]`."""
    passed: Tensor
    """What the exit said to the next one, `[N, classes]` for the same batch."""
    place: int
    lasting: bool = True
    """Whether the batch stays as it is when another is run; `keep` makes a row last."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage batch computed, row by row."""

    confidences: list[float]
    """Calibrated, 0..1."""
    probabilities: np.ndarray
    """Calibrated, float32 `[N, classes]`."""
    rows: list[Row]
    """What the next stage takes."""


class StageRunner(Protocol):
    """What the engine needs of a runner; the seam for its tests."""

    @property
    def exits(self) -> int: ...

    def run(self, stage: int, inputs: Sequence[np.ndarray | Row]) -> StageOutput: ...

    def keep(self, rows: Sequence[Row]) -> list[Row]: ...


class Runner:
    """A bundle's network on a device, one stage batch at a time.

    A batch runs eagerly, or through the program compiled for its size or the next larger one,
    padded: whichever was measured to be faster.

    Args:
        bundle: a calibrated bundle.
        device: where it runs.
        dtype: its numerics.
        staging: what a card's batches pass through, so that one thread runs them at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        dtype: torch.dtype,
        staging: Staging | None = None,
    ) -> None:
        self.units = make_units(bundle, device, dtype)
        self._staging = card_staging() if device.type == "cuda" else staging
        self._side = bundle.description.preprocess.size
        self._device = device
        self._plans_anew = device.type == "cuda"
        """Whether a shape that a thread has not run before makes libraries plan: on a card, tens of
        milliseconds for each convolution, so that nothing runs eagerly that need not."""
        self._eager: CostTable | None = None
        self._programs: dict[tuple[int, int], tuple[Program, float]] = {}
        self._plans: dict[tuple[int, int], tuple[Program | None, int]] = {}

    @property
    def exits(self) -> int:
        """How many stages there are."""
        return len(self.units)

    @torch.inference_mode()
    def run(self, stage: int, inputs: Sequence[np.ndarray | Row]) -> StageOutput:
        """Run one stage on a batch, with a single device synchronisation.

        Args:
            stage: 1..exits.
            inputs: for stage 1 uint8 pixels `[H, W, 3]`, else the rows that the stage before gave.
        """
        n = len(inputs)
        program, _ = self._plan(stage, n)
        if program:
            features, said, state = program(self._fill(program.buffers, inputs))
        else:
            features, said, state = self.units[stage - 1](*self._gather(inputs))
        host = self._to_host(_slice(said, 0, n))
        rows = _rows_of(features, state, n, lasting=program is None)
        return StageOutput(host[:, 0].tolist(), host[:, 1:], rows)

    @torch.inference_mode()
    def keep(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows in a batch of their own, so that the one they came from is freed.

        Args:
            rows: of one batch, before another is run.
        """
        if not rows or (rows[0].lasting and len(rows) == len(rows[0].features)):
            return list(rows)
        scattered = self._staging and sum(1 for _ in _runs(rows)) > FEW_SLICES
        features, passed = self._pick(rows) if scattered else _join(rows)
        return _rows_of(features, passed, len(rows))

    def warm_up(
        self, sizes: Sequence[int], clock: Callable[[], float] = time.perf_counter
    ) -> Seconds:
        """Run every stage at every batch size; eagerly, where no program has come yet.

        Returns:
            Median seconds.
        """
        seconds: Seconds = {k: {} for k in range(1, self.exits + 1)}
        for size in sizes:
            inputs: list[np.ndarray | Row] = [
                np.zeros((self._side, self._side, 3), np.uint8)
            ] * size
            for stage in seconds:
                output, seconds[stage][size] = self._timed(stage, inputs, clock)
                inputs = list(output.rows)
        self._eager = CostTable(seconds)
        return seconds

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

    def expected(self, stage: int, largest: int) -> dict[int, float]:
        """Seconds of a stage by batch size, at every size where they leave a straight line."""
        sizes = {s for k, s in self._programs if k == stage}
        corners = {*batch_sizes(largest), *sizes, *(s + 1 for s in sizes)}
        return {n: self._best(stage, n)[0] for n in sorted(corners) if n <= largest}

    def _plan(self, stage: int, n: int) -> tuple[Program | None, int]:
        plans = self._plans  # once: a plan made before a program came must not outlast it
        plan = plans.get((stage, n))
        if plan is None:
            plan = plans[stage, n] = self._best(stage, n)[1:]
        return plan

    def _best(self, stage: int, n: int) -> tuple[float, Program | None, int]:
        return min(self._ways(stage, n), key=lambda way: way[0])

    def _ways(self, stage: int, n: int) -> Iterator[tuple[float, Program | None, int]]:
        fitting = [(s, p, z) for (k, z), (p, s) in self._programs.items() if k == stage and z >= n]
        if not (self._plans_anew and fitting):
            yield self._eager.seconds(stage, n) if self._eager else float("inf"), None, n
        yield from fitting

    def _timed(
        self, stage: int, inputs: Sequence[np.ndarray | Row], clock: Callable[[], float]
    ) -> tuple[StageOutput, float]:
        output = self.run(stage, inputs)
        taken = []
        for _ in range(WARM_UP_RUNS):
            began = clock()
            output = self.run(stage, inputs)
            taken.append(clock() - began)
        return output, statistics.median(taken)

    def _gather(self, inputs: Sequence[np.ndarray | Row]) -> Sequence[Tensor]:
        rows = _rows(inputs)
        if not rows:
            return [self._pixels(inputs).to(self._device, non_blocking=True)]
        whole = rows[0]
        together = all(r.features is whole.features and r.place == i for i, r in enumerate(rows))
        if together and len(rows) == len(whole.features):
            return [whole.features, whole.passed]
        return list(_join(rows))

    def _pick(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Those of one batch by their places, which takes a host less time than many slices."""
        assert self._staging
        places = self._staging.places([row.place for row in rows])
        places = places.to(self._device, non_blocking=True)
        features, passed = rows[0].features, rows[0].passed
        by_pixel = features.permute(0, 2, 3, 1).index_select(0, places)
        return by_pixel.permute(0, 3, 1, 2), passed.index_select(0, places)

    def _fill(
        self, buffers: Sequence[Tensor], inputs: Sequence[np.ndarray | Row]
    ) -> Sequence[Tensor]:
        """Put a batch into buffers with room for it.

        What is beyond it stays from an earlier batch: no row's answer depends on another row.
        """
        fitting = [_slice(buffer, 0, len(inputs)) for buffer in buffers]
        rows = _rows(inputs)
        if rows:
            for parts, buffer in zip(_parts(rows), fitting, strict=True):
                torch.cat(parts, out=buffer)
        else:
            fitting[0].copy_(self._pixels(inputs), non_blocking=True)
        return buffers

    def _pixels(self, inputs: Sequence[np.ndarray | Row]) -> Tensor:
        """Images on the host; where a card fetches them, until it has given an answer."""
        images = cast(Sequence[np.ndarray], inputs)
        if self._staging:
            return self._staging.images(images)
        return torch.from_numpy(np.stack(images))

    def _to_host(self, said: Tensor) -> np.ndarray:
        return self._staging.said(said) if self._staging else said.clone().numpy()


def _rows_of(features: Tensor, passed: Tensor, n: int, lasting: bool = True) -> list[Row]:
    """The first of a batch, made without a call into Python for each."""
    fields = zip(repeat(features), repeat(passed), range(n), repeat(lasting), strict=False)
    return list(map(partial(tuple.__new__, Row), fields))


def _rows(inputs: Sequence[np.ndarray | Row]) -> Sequence[Row]:
    """The rows of a batch; none where it is of images.

    Raises:
        TypeError: it is of neither alone, and what is missing would be answered by a neighbour.
    """
    kinds = set(map(type, inputs))
    if Row not in kinds:
        return ()
    if len(kinds) > 1:
        raise TypeError("a batch is of rows alone or of images alone")
    return cast(Sequence[Row], inputs)


def _join(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    features, passed = map(torch.cat, _parts(rows))
    return features.contiguous(memory_format=torch.channels_last), passed


def _parts(rows: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Slices that `cat` gathers on the device, with no index to be sent there."""
    runs = list(_runs(rows))
    features = [_slice(row.features, row.place, n) for row, n in runs]
    return features, [_slice(row.passed, row.place, n) for row, n in runs]


def _slice(batch: Tensor, start: int, n: int) -> Tensor:
    """Some rows; a view of all would only take the host's time."""
    return batch if batch.size(0) == n else batch.narrow(0, start, n)


def _runs(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Neighbours of one batch as one: the first of them, and how many there are."""
    first, n = rows[0], 1
    for row in rows[1:]:
        if row.features is first.features and row.place == first.place + n:
            n += 1
        else:
            yield first, n
            first, n = row, 1
    yield first, n
