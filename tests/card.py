"""A made-up card: the processor, where running a unit again stands for a CUDA graph."""

import torch

from server.card import CardMemory
from server.staging import Staging


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
    return CardMemory(torch.device("cpu"), staging())
