"""Whether a compiled program says what its eager unit says, and how fast it is beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from server.host import array_of, tensor_of
from server.memory import Program
from server.runner import WARM_UP_RUNS, WARM_UP_SECONDS
from server.units import Unit

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1, torch.int8: 0.2}
"""Furthest that a confidence or probability may be from the eager unit's."""


def outputs_of(program: Program, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a program gives for a unit's inputs, as the unit would; until this thread's next run."""
    for buffer, tensor in zip(program.buffers, inputs, strict=True):
        if isinstance(buffer, Tensor):
            buffer.copy_(tensor)
        else:
            np.copyto(buffer, array_of(tensor))
    return [x if isinstance(x, Tensor) else tensor_of(x) for x in program.run()]


@torch.inference_mode()
def disagreement(
    program: Program, unit: Unit, inputs: Sequence[Tensor], dtype: torch.dtype
) -> float | None:
    """How far a confidence or probability is from the eager unit's, where that is too far.

    Args:
        program: gives what the unit gives, or should.
        unit: eager.
        inputs: of both.
        dtype: their numerics, which say how far is too far.
    """
    _, expected, _ = unit(*inputs)
    _, said, _ = outputs_of(program, inputs)
    off = float((said.cpu() - expected.cpu()).abs().max())
    return None if off <= TOLERANCE[dtype] else off  # NaN is too far


@torch.inference_mode()
def share_of_eager(
    program: Program,
    unit: Unit,
    inputs: Sequence[Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """A program's time as a share of the eager unit's, by runs of both in turns.

    What else runs slows both. Timed alone beside three busy threads, 9 to 13 of 24 programs seemed
    slower than eager units that had been timed before; in turns at most two did, and none by
    `thread_time`.

    Args:
        program: gives what the unit gives.
        unit: eager.
        inputs: of both.
        clock: `thread_time` leaves out the wait for Python's lock, which eager units need after
            every operation: by other clocks a lone image's share may be a third of what it is.
    """
    shares: list[float] = []
    spent = 0.0
    while len(shares) < WARM_UP_RUNS and spent < WARM_UP_SECONDS:
        began = clock()
        outputs_of(program, inputs)
        between = clock()
        unit(*inputs)[1].cpu()  # a card has finished only then
        ended = clock()
        shares.append((between - began) / (ended - between))
        spent += ended - began
    return statistics.median(shares)
