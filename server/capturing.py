"""Brings captured units into a server on a CUDA card, before it takes its first request."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.bundle import Bundle
from server.compiling import Use
from server.costs import batch_sizes
from server.graphs import Capture, Captured
from server.programs import disagreement, share_of_eager
from server.units import Unit, example_inputs

log = logging.getLogger("offramp")


class Capturing:
    """The captured units of one server.

    Args:
        bundle: what is served.
        units: the eager units on the card, shallow to deep, that captured ones must agree with.
        dtype: their numerics.
        device: the card.
        capture: records a unit's work.
    """

    def __init__(
        self,
        bundle: Bundle,
        units: list[Unit],
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._bundle = bundle
        self._units = units
        self._dtype = dtype
        self._device = device
        self._capture = capture

    def use_all(self, max_batch: int, use: Use, required: bool) -> None:
        """Capture every unit for every batch size and hand all over, or none.

        Args:
            max_batch: the largest batch.
            use: takes each.
            required: whether failing is an error rather than a warning.

        Raises:
            RuntimeError: one cannot be captured or disagrees with the eager unit.
        """
        try:
            captured = list(self._captured(max_batch))
        except RuntimeError as error:
            if required:
                raise
            log.warning("stages run without CUDA graphs, so answers take longer: %s", error)
            return
        for stage, size, program, share in captured:
            use(stage, size, program, share)
        log.info("every stage is captured as a CUDA graph")

    @torch.inference_mode()
    def _captured(self, max_batch: int) -> Iterator[tuple[int, int, Captured, float]]:
        """Largest batches first, whose memory is enough for the smaller ones."""
        buffers = [[torch.zeros_like(t) for t in inputs] for inputs in self._examples(max_batch)]
        for size in reversed(batch_sizes(max_batch)):
            for k, inputs in enumerate(self._examples(size)):
                unit = self._units[k]
                captured = Captured(unit, [b[:size] for b in buffers[k]], self._capture)
                self._check(k, size, captured, inputs)
                yield k + 1, size, captured, share_of_eager(captured, unit, inputs)

    def _check(self, k: int, size: int, captured: Captured, inputs: Sequence[Tensor]) -> None:
        """On other inputs than it was captured with, which were zeros."""
        off = disagreement(captured, self._units[k], inputs, self._dtype)
        if off is not None:
            raise RuntimeError(
                f"stage {k + 1}, captured for batches of {size}, differs from the eager one "
                f"by {off:.1e}"
            )

    def _examples(self, size: int) -> list[tuple[Tensor, ...]]:
        return example_inputs(self._units, self._bundle, size, self._device)
