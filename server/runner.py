"""Runs stage batches of one network on one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.bundle import Bundle
from model.confidence import judge

WARM_UP_RUNS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One image's features between two stages; only the runner looks inside."""

    features: Tensor
    """The whole batch that the row came out of, `[N, C, H, W]`."""
    passed: Tensor
    """What the exit said to the next one, `[N, classes]` for the same batch."""
    index: int


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


class Runner:
    """A bundle's network on a device, one stage batch at a time.

    Args:
        bundle: a calibrated bundle.
        device: where it runs.
        dtype: its numerics.
    """

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> None:
        if bundle.policy is None:
            raise ValueError("the bundle has no policy")
        self._preprocess = bundle.description.preprocess
        self._device = device
        self._dtype = dtype
        net = bundle.net.eval().to(device=device, dtype=dtype)
        self._net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._policy = bundle.policy

    @property
    def exits(self) -> int:
        """How many stages there are."""
        return self._net.exits

    @torch.inference_mode()
    def run(self, stage: int, inputs: Sequence[np.ndarray | Row]) -> StageOutput:
        """Run one stage on a batch, with a single device synchronisation.

        Args:
            stage: 1..exits.
            inputs: for stage 1 uint8 pixels `[H, W, 3]`, else the rows that the stage before gave.
        """
        x, passed = self._gather(inputs)
        features, logits = self._net.run_stage(stage, x)
        calibration = self._policy.calibrations[stage - 1]
        said = judge(logits, passed, calibration, self._policy.measure)
        host = torch.cat([said.confidence[:, None], said.probabilities], dim=1).cpu().numpy()
        rows = [Row(features, said.state, i) for i in range(len(inputs))]
        return StageOutput(host[:, 0].tolist(), host[:, 1:], rows)

    def warm_up(
        self, sizes: Sequence[int], clock: Callable[[], float] = time.perf_counter
    ) -> dict[int, dict[int, float]]:
        """Run every stage at every batch size.

        Returns:
            Median seconds by stage, then by batch size.
        """
        seconds: dict[int, dict[int, float]] = {k: {} for k in range(1, self.exits + 1)}
        side = self._preprocess.size
        for size in sizes:
            inputs: list[np.ndarray | Row] = [np.zeros((side, side, 3), np.uint8)] * size
            for stage in seconds:
                output, seconds[stage][size] = self._timed(stage, inputs, clock)
                inputs = list(output.rows)
        return seconds

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

    def _gather(self, inputs: Sequence[np.ndarray | Row]) -> tuple[Tensor, Tensor | None]:
        rows = [row for row in inputs if isinstance(row, Row)]
        if not rows:
            pixels = torch.from_numpy(np.stack([p for p in inputs if isinstance(p, np.ndarray)]))
            return self._preprocess.normalise(pixels.to(self._device), self._dtype), None
        whole = rows[0]
        if all(r.features is whole.features and r.index == i for i, r in enumerate(rows)):
            return whole.features[: len(rows)], whole.passed[: len(rows)]
        features = torch.cat([r.features[r.index : r.index + 1] for r in rows])
        return features, torch.cat([r.passed[r.index : r.index + 1] for r in rows])


def batch_sizes(max_batch: int) -> Sequence[int]:
    """The sizes that are warmed and measured: powers of two, and the largest."""
    return sorted({*(2**i for i in range(max_batch.bit_length())), max_batch})
