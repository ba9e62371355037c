"""Brings captured units into a server on a CUDA card, before it takes its first request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.bundle import Bundle
from server.compiling import Use
from server.costs import batch_sizes
from server.fusing import fuse
from server.graphs import Capture, Captured, CudaCapture
from server.programs import disagreement, share_of_eager
from server.units import Unit, example_inputs

log = logging.getLogger("offramp")

HALF = (torch.float16, torch.bfloat16)
"""Numerics that convolutions are fused in; in float32 no kernel does so without rounding."""


class Capturing:
    """The captured units of one server.

    Args:
        bundle: what is served.
        units: the eager units on the card, shallow to deep, that captured ones must agree with.
        dtype: their numerics.
        device: the card.
        capture: records a unit's work.
        faster: by stage, what gives the same and may be faster; the eager units do if it does not.
        clock: tells which is.
    """

    def __init__(
        self,
        bundle: Bundle,
        units: list[Unit],
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
        faster: Sequence[Unit] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._bundle = bundle
        self._units = units
        self._dtype = dtype
        self._device = device
        self._capture = capture
        self._faster = list(faster)
        self._clock = clock

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
        fused = sum(program.unit in self._faster for _, _, program, _ in captured)
        log.info("every stage is captured as a CUDA graph, %d of %d fused", fused, len(captured))

    @torch.inference_mode()
    def _captured(self, max_batch: int) -> Iterator[tuple[int, int, Captured, float]]:
        """Largest batches first, whose memory is enough for the smaller ones."""
        buffers = [[torch.zeros_like(t) for t in inputs] for inputs in self._examples(max_batch)]
        for size in reversed(batch_sizes(max_batch)):
            for k, inputs in enumerate(self._examples(size)):
                fitting = [b[:size] for b in buffers[k]]
                ways = [self._try(self._units[k], k, fitting, inputs)]
                try:
                    ways += [self._try(f, k, fitting, inputs) for f in self._faster[k : k + 1]]
                except RuntimeError as error:
                    log.debug("not fused: %s", error)
                captured, share = min(ways, key=lambda way: way[1])
                yield k + 1, size, captured, share

    def _try(
        self, unit: Unit, k: int, buffers: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Captured, float]:
        """A unit captured and checked, on other inputs than those zeros; its share of eager time.

        Raises:
            RuntimeError: it cannot be captured or disagrees.
        """
        captured, eager = Captured(unit, buffers, self._capture), self._units[k]
        off = disagreement(captured, eager, inputs, self._dtype)
        if off is not None:
            raise RuntimeError(
                f"stage {k + 1}, captured for batches of {len(inputs[0])}, differs from the eager "
                f"one by {off:.1e}"
            )
        return captured, share_of_eager(captured, eager, inputs, self._clock)

    def _examples(self, size: int) -> list[tuple[Tensor, ...]]:
        return example_inputs(self._units, self._bundle, size, self._device)


def card_capturing(
    bundle: Bundle, units: list[Unit], dtype: torch.dtype, device: torch.device
) -> Capturing:
    """As a server on a card has it."""
    faster = [fuse(unit) for unit in units] if dtype in HALF else []
    return Capturing(bundle, units, dtype, device, CudaCapture(), faster)
