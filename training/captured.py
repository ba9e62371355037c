"""The work of a step, repeated on a card as one CUDA graph.

A step launches hundreds of short kernels, and asking for them one by one takes longer than running
them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3
"""Steps before recording, in which libraries choose their kernels: as many as torch asks for."""

Gradients = Callable[[Tensor, Tensor], Tensor]
"""Takes pixels and target; leaves gradients, gives the loss terms."""
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes work over fixed tensors, not doing it yet; gives what does it again and again."""


class Captured:
    """Gradients of one batch shape, recorded once and replayed.

    Gradients then live in tensors of the graph, which nobody may replace: what runs between two
    calls leaves `grad` as it is.

    Args:
        gradients: run as they are in the first steps.
        record: how they are recorded after those.
    """

    def __init__(self, gradients: Gradients, record: Recorder) -> None:
        self._gradients = gradients
        self._record = record
        self._steps = 0
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, pixels: Tensor, target: Tensor) -> Tensor:
        """As what was recorded; always the same shapes."""
        if self._steps < WARM_UP_STEPS:
            self._steps += 1
            return _aside(self._gradients, pixels, target)
        if self._replay is None:
            self._pixels, self._target = pixels.clone(), target.clone()
            self._replay = self._record(lambda: self._gradients(self._pixels, self._target))
        self._pixels.copy_(pixels)
        self._target.copy_(target)
        return self._replay()


def record_cuda(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = work()

    def replay() -> Tensor:
        graph.replay()
        return values.clone()

    return replay


def _aside(gradients: Gradients, pixels: Tensor, target: Tensor) -> Tensor:
    """On another stream than the usual one, as torch asks for before a recording."""
    if pixels.device.type != "cuda":
        return gradients(pixels, target)
    usual, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        values = gradients(pixels, target)
    usual.wait_stream(side)
    return values
