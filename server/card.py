"""A card's memory, where torch moves rows without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from server.memory import Computed, Program
from server.rows import Inputs, Row, are_whole, rows_in, runs
from server.staging import Staging, card_staging, stack

FEW_SLICES = 8
"""Up to so many, rows are sooner picked out of a batch slice by slice than by place."""


class CardMemory:
    """Features as torch has them: `[N, C, H, W]`, channels last.

    One thread runs batches at a time.

    Args:
        device: the card.
        staging: what images go there through, and what is said of them comes back through.
    """

    plans_anew = True

    def __init__(self, device: torch.device, staging: Staging | None = None) -> None:
        self._device = device
        self._staging = staging or card_staging()

    @torch.inference_mode()
    def run(self, program: Program, inputs: Inputs) -> Computed:
        """As `Memory`, with a single device synchronisation."""
        n = len(inputs)
        buffers = [_slice(buffer, 0, n) for buffer in program.buffers]
        if rows := rows_in(inputs):
            for parts, buffer in zip(_parts(list(runs(rows))), buffers, strict=True):
                torch.cat(parts, out=buffer)
        else:
            stack(cast(Sequence[np.ndarray], inputs), buffers[0])
        features, said, passed = program.run()
        return Computed(features, _slice(said, 0, n).numpy().copy(), passed)

    @torch.inference_mode()
    def run_eagerly(self, unit: nn.Module, inputs: Inputs) -> Computed:
        """As `Memory`, with a single device synchronisation."""
        features, said, passed = unit(*self._gathered(inputs))
        return Computed(features, self._staging.said(said), passed)

    @torch.inference_mode()
    def copy(
        self, features: Tensor, passed: Tensor, places: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `Memory`."""
        together = list(runs([Row(features, passed, place) for place in places]))
        if len(together) <= FEW_SLICES:
            return _joined(together)
        # By their places, which takes a host less time than many slices.
        there = self._staging.places(places).to(self._device, non_blocking=True)
        by_pixel = features.permute(0, 2, 3, 1).index_select(0, there)
        return by_pixel.permute(0, 3, 1, 2), passed.index_select(0, there)

    def _gathered(self, inputs: Inputs) -> Sequence[Tensor]:
        rows = rows_in(inputs)
        if not rows:
            images = self._staging.images(cast(Sequence[np.ndarray], inputs))
            return [images.to(self._device, non_blocking=True)]
        if are_whole(rows):
            return rows[0].features, rows[0].passed
        return _joined(list(runs(rows)))


def _joined(together: Sequence[tuple[Row, int]]) -> tuple[Tensor, Tensor]:
    features, passed = map(torch.cat, _parts(together))
    return features.contiguous(memory_format=torch.channels_last), passed


def _parts(together: Sequence[tuple[Row, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Slices of `runs` that `cat` gathers on the device, with no index to be sent there."""
    features = [_slice(row.features, row.place, n) for row, n in together]
    return features, [_slice(row.passed, row.place, n) for row, n in together]


def _slice(batch: Tensor, start: int, n: int) -> Tensor:
    """Some rows; a view of all would only take the host's time."""
    return batch if batch.size(0) == n else batch.narrow(0, start, n)
