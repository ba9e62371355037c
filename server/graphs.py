"""A unit captured as one CUDA graph, over buffers that stay where they are.

What stands around `CudaCapture` is tested on CPU too, with a capture that runs the unit again over
the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

WARM_UP_RUNS = 3

Work = Callable[[], Sequence[Tensor]]
Replay = Callable[[], None]
Capture = Callable[[Work], tuple[Replay, Sequence[Tensor]]]
"""Takes work over fixed tensors; gives what does it again, and the outputs that it overwrites."""


class Captured:
    """A unit for one batch size, run by a single call to the card, copies to and fro included.

    Args:
        unit: takes what the buffers hold; says second what the host wants to know.
        buffers: its inputs, channels last; pixels on the host, where the card can fetch them.
        said: on the host, where the card can write what the unit says.
        capture: how its work is recorded.
        wait: until the card has done what it was told so far.
        way: how the unit was changed to be faster.
    """

    def __init__(
        self,
        unit: nn.Module,
        buffers: Sequence[Tensor],
        said: Tensor,
        capture: Capture,
        wait: Callable[[], None],
        way: str = "",
    ) -> None:
        self.unit = unit
        self.buffers = tuple(buffers)
        self.way = way
        self._said = said
        self._wait = wait
        self.replay, self._outputs = capture(self._work)

    def run(self) -> Sequence[Tensor]:
        """Run on what the buffers hold; the outputs last until the next run."""
        self.replay()
        self._wait()
        return self._outputs

    def _work(self) -> Sequence[Tensor]:
        device = next(self.unit.parameters()).device
        inputs = [buffer.to(device, non_blocking=True) for buffer in self.buffers]
        features, said, passed = self.unit(*inputs)
        self._said.copy_(said, non_blocking=True)
        return features, self._said, passed


class CudaCapture:
    """Records CUDA graphs that share one memory pool.

    Sharing is safe in any order of replays: they never overlap, and the outputs of every graph are
    held, so that no other graph is given their memory.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # For all of them, since cuBLAS keeps 32 MiB for each stream that it has ever worked on.
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Work) -> tuple[Replay, Sequence[Tensor]]:
        """Warm up on the same stream, as torch asks for, then record."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local, since other threads may ask the card for its memory in the meantime.
        recording = torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        # The outer one goes back to the stream there was even if recording fails.
        with torch.cuda.stream(torch.cuda.current_stream()), _with_own_workspaces(recording):
            outputs = work()
        return graph.replay, outputs


@contextmanager
def _with_own_workspaces(recording: AbstractContextManager[object]) -> Iterator[None]:
    """Record so that cuBLAS computes in memory of the graph's own pool.

    cuBLAS has a workspace for each thread and stream, made when first used: by a warm-up, in memory
    that no graph holds. Since torch 2.12 a graph that goes, as all but the fastest do, frees the
    workspaces of its stream, though those that stay know them by address (pytorch#193402), and the
    next recording gives their memory back to the card. One that is made while recording is in the
    pool, which lasts as long as any of its graphs.

    Workspaces are forgotten in the whole process. An engine that answers meanwhile does not miss
    them: its graphs compute in a pool that they hold, in which nothing is recorded any more. One
    without graphs makes another, and the former is used again in its stream's order.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with recording:
            yield
    finally:  # or what runs on the stream next would compute in the pool
        torch._C._cuda_clearCublasWorkspaces()
