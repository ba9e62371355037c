"""Brings captured units into a server on a CUDA card, before it takes its first request."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.bundle import Bundle
from server.agreement import disagreement, share_of_eager
from server.compiling import Use
from server.costs import batch_sizes
from server.dense import densify
from server.errors import Draining
from server.fusing import fuse
from server.graphs import Capture, Captured, CudaCapture
from server.merging import merge
from server.staging import Staging, card_staging
from server.units import Unit, example_inputs

log = logging.getLogger("offramp")

Way = Callable[[Unit], Unit]

HALF = (torch.float16, torch.bfloat16)
"""Numerics that convolutions are fused in; in float32 no kernel does so without rounding."""

AS_IT_IS = "as it is"


class Capturing:
    """The captured units of one server.

    Args:
        bundle: what is served.
        units: the eager units on the card, shallow to deep, that captured ones must agree with.
        dtype: their numerics.
        capture: records a unit's work.
        staging: of the card.
        ways: by a name, what makes of a unit one that gives the same and may be faster; where
            none is, the eager unit is captured.
        clock: tells which is.
    """

    def __init__(
        self,
        bundle: Bundle,
        units: list[Unit],
        dtype: torch.dtype,
        capture: Capture,
        staging: Staging,
        ways: Mapping[str, Way],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._bundle = bundle
        self._units = units
        self._dtype = dtype
        self._capture = capture
        self._staging = staging
        self._made = [
            {AS_IT_IS: unit} | {name: way(unit) for name, way in ways.items()} for unit in units
        ]
        self._clock = clock

    def use_all(
        self,
        max_batch: int,
        use: Use,
        required: bool,
        draining: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Capture every unit for every batch size and hand all over, or none.

        Args:
            max_batch: the largest batch.
            use: takes each.
            required: whether failing is an error rather than a warning.
            draining: whether nobody wants them any more.

        Returns:
            Whether they were handed over.

        Raises:
            RuntimeError: one cannot be captured or disagrees with the eager unit.
            Draining: before all of them were.
        """
        captured = []
        try:
            for each in self._captured(max_batch):
                if draining():
                    raise Draining
                captured.append(each)
        except RuntimeError as error:
            if required:
                raise
            log.warning("stages run without CUDA graphs, so answers take longer: %s", error)
            return False
        for stage, size, program, share in captured:
            use(stage, size, program, share)
        ways = Counter(program.way for _, _, program, _ in captured)
        said = ", ".join(f"{n} {way}" for way, n in ways.most_common())
        log.info("every stage is captured as a CUDA graph: %s", said)
        return True

    @torch.inference_mode()
    def _captured(self, max_batch: int) -> Iterator[tuple[int, int, Captured, float]]:
        """Largest batches first, whose memory is enough for the smaller ones."""
        buffers = self._buffers(max_batch)
        said = self._staging.lock(
            (max_batch, 1 + len(self._bundle.description.classes)), torch.float32
        )
        for size in reversed(batch_sizes(max_batch)):
            for k, inputs in enumerate(self._examples(size)):
                fitting = [b[:size] for b in buffers[k]]
                captured, share = self._fastest(k, fitting, said[:size], inputs)
                yield k + 1, size, captured, share

    def _buffers(self, max_batch: int) -> list[list[Tensor]]:
        """Every unit's inputs: pixels on the host, which the card fetches, and features there."""
        (pixels,), *others = self._examples(max_batch)
        fetched = self._staging.lock(tuple(pixels.shape), pixels.dtype)
        return [[fetched.zero_()], *([torch.zeros_like(t) for t in inputs] for inputs in others)]

    def _fastest(
        self, k: int, buffers: Sequence[Tensor], said: Tensor, inputs: Sequence[Tensor]
    ) -> tuple[Captured, float]:
        """A stage captured in whichever way is fastest; its share of eager time.

        Raises:
            RuntimeError: the eager unit cannot be captured or disagrees with itself.
        """
        tried = []
        for way, unit in list(self._made[k].items()):
            try:
                tried.append(self._try(unit, way, k, buffers, said, inputs))
            except RuntimeError as error:
                if way == AS_IT_IS:
                    raise
                # Once, since compiling takes long.
                log.info("stage %d is not captured %s: %s", k + 1, way, error)
                del self._made[k][way]
        return min(tried, key=lambda one: one[1])

    def _try(
        self,
        unit: Unit,
        way: str,
        k: int,
        buffers: Sequence[Tensor],
        said: Tensor,
        inputs: Sequence[Tensor],
    ) -> tuple[Captured, float]:
        """A unit captured and checked, on other inputs than those zeros; its share of eager time.

        Raises:
            RuntimeError: it cannot be captured or disagrees.
        """
        captured = Captured(unit, buffers, said, self._capture, self._staging.wait, way)
        eager = self._units[k]
        off = disagreement(captured, eager, inputs, self._dtype)
        if off is not None:
            raise RuntimeError(
                f"stage {k + 1}, captured for batches of {len(inputs[0])}, differs from the eager "
                f"one by {off:.1e}"
            )
        return captured, share_of_eager(captured, eager, inputs, self._clock)

    def _examples(self, size: int) -> list[tuple[Tensor, ...]]:
        return example_inputs(self._units, self._bundle, size)


def card_capturing(bundle: Bundle, units: list[Unit], dtype: torch.dtype) -> Capturing:
    """As a server on a card has it."""
    ways: dict[str, Way] = {"merged": merge}
    if dtype in HALF:
        ways = {
            "fused": fuse,
            "fused and merged": lambda unit: merge(fuse(unit)),
            "dense, fused and merged": lambda unit: merge(fuse(densify(unit))),
        }
    return Capturing(bundle, units, dtype, CudaCapture(), card_staging(), ways)
