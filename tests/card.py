"""A made-up card: the processor, where running a unit again stands for a CUDA graph."""

import itertools
import math
import weakref

import torch

from server.capturing import Capturing
from server.card import CardMemory
from server.runner import Runner
from server.staging import Staging

CPU, CARD = torch.device("cpu"), torch.device("cuda")


def rerun(work):
    """As a CUDA graph: every replay reads the same inputs and overwrites the same outputs."""
    outputs = work()

    def replay():
        for old, new in zip(outputs, work(), strict=True):
            old.copy_(new)

    return replay, outputs


def staging():
    """The processor's, for a card that is done at once."""
    return Staging(lambda shape, dtype: torch.empty(shape, dtype=dtype), lambda: None)


def card_memory():
    return CardMemory(CPU, staging())


class Card:
    """The card of a server.

    Args:
        patch: pytest's, which puts it there.
    """

    def __init__(self, patch):
        self.room = math.inf
        """For how many more warm-ups and graphs it has memory."""
        self.captures = True
        """Whether it can."""
        self.units = []
        """Of every network that it was given; weak references."""
        patch.setattr("server.served.device_of", lambda asked: CARD)
        patch.setattr("server.loaded.keep_kernels", lambda folder: None)
        patch.setattr("server.loaded.card_capturing", self._capturing)
        patch.setattr("server.loaded.Runner", self._runner)

    def take(self):
        """Some of its memory."""
        if self.room < 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nGPU 0…")
        self.room -= 1

    def _capture(self, work):
        self.take()
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with…")
        return rerun(work)

    def _capturing(self, bundle, units, dtype):
        clock = itertools.count().__next__  # by which all is timed once
        return Capturing(bundle, units, dtype, self._capture, staging(), {}, clock)

    def _runner(self, bundle, device, dtype):
        runner = OnCard(self, bundle, dtype)
        self.units += map(weakref.ref, runner.units)
        return runner


class OnCard(Runner):
    """A runner that a warm-up takes memory of the card for."""

    def __init__(self, card, bundle, dtype):
        super().__init__(bundle, CPU, dtype, card_memory())
        self._card = card

    def warm_up(self, *args, **options):
        self._card.take()
        return super().warm_up(*args, **options)
