"""The processor's own memory, where numpy moves rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from server.memory import Computed, Program
from server.rows import Inputs, are_whole, rows_in, runs
from server.units import is_features


class HostMemory:
    """Features as numpy has them: `[N, H, W, C]`, and bfloat16, which it lacks, as uint16.

    Stages leave nothing else in a processor's caches, and then torch takes 20 to 50 µs to begin an
    operation, numpy less than 5 (Zen 3).
    """

    plans_anew = False

    def run(self, program: Program, inputs: Inputs) -> Computed:
        """As `Memory`."""
        n = len(inputs)
        for parts, buffer in zip(_parts(inputs), program.buffers, strict=True):
            np.concatenate(parts, out=buffer[:n])
        features, said, passed = program.run()
        return Computed(features, said[:n].copy(), passed)

    @torch.inference_mode()
    def run_eagerly(self, unit: nn.Module, inputs: Inputs) -> Computed:
        """As `Memory`."""
        rows = rows_in(inputs)
        if rows and are_whole(rows):
            arrays = [rows[0].features, rows[0].passed]
        else:
            arrays = [np.concatenate(parts) for parts in _parts(inputs)]
        return Computed(*map(array_of, unit(*map(tensor_of, arrays))))

    def copy(
        self, features: np.ndarray, passed: np.ndarray, places: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Memory`."""
        return features.take(places, axis=0), passed.take(places, axis=0)


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor of the host's memory as it lies there; features `[N, H, W, C]`."""
    if is_features(tensor):
        tensor = tensor.permute(0, 2, 3, 1)
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: np.ndarray = tensor.numpy()
    return array


def tensor_of(array: np.ndarray) -> Tensor:
    """What `array_of` made an array of, in the same memory."""
    tensor = torch.from_numpy(array)
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.permute(0, 3, 1, 2) if is_features(tensor) else tensor


def _parts(inputs: Inputs) -> Iterator[list[np.ndarray]]:
    """For each of a unit's inputs, what it is to be put together from."""
    rows = rows_in(inputs)
    if not rows:
        yield [image[None] for image in cast(Sequence[np.ndarray], inputs)]
        return
    together = list(runs(rows))
    yield [row.features[row.place : row.place + n] for row, n in together]
    yield [row.passed[row.place : row.place + n] for row, n in together]
