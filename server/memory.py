"""What a device's memory does for a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from server.rows import Inputs


class Program(Protocol):
    """A unit compiled for one batch size, over inputs that stay where they are.

    These, and what it gives, are arrays on the host and tensors on a card.
    """

    @property
    def buffers(self) -> Sequence[Any]:
        """Its inputs, for the thread that asks to fill."""

    def run(self) -> Sequence[Any]:
        """Run on what they hold; the outputs last until this thread's next run."""


class Computed(NamedTuple):
    """A batch of `n` that ran, in which there may be room for more."""

    features: Any
    """For the next stage."""
    said: np.ndarray
    """Each row's confidence before its probabilities, float32 `[n, 1 + classes]`; a copy."""
    passed: Any
    """Log-probabilities, fp32 `[N, classes]`, which the next exit takes as `passed`."""


class Memory(Protocol):
    """Where features lie: brings batches together, has them run, and takes out who goes on."""

    plans_anew: bool
    """Whether libraries plan anew for each shape that a thread has not run, which on a card takes
    tens of milliseconds for each convolution: then nothing runs eagerly that has a program."""

    def run(self, program: Program, inputs: Inputs) -> Computed:
        """Run a program that has room for the inputs.

        What is beyond them stays from an earlier batch: no row's answer depends on another row.
        """

    def run_eagerly(self, unit: nn.Module, inputs: Inputs) -> Computed:
        """Run a unit on exactly these inputs."""

    def copy(self, features: Any, passed: Any, places: Sequence[int]) -> tuple[Any, Any]:
        """Some rows of what a batch gave, as a batch of their own."""
