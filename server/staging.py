"""Memory on the host that a card copies from and to without being waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Lock = Callable[[tuple[int, ...], torch.dtype], Tensor]
Wait = Callable[[], None]


class Staging:
    """What images go to a card through, and what it says comes back through.

    Locking memory, and making an event to wait for, takes as long as a small stage: so both are
    done once. One batch at a time: the next one overwrites it.

    Args:
        lock: makes memory that the card can reach.
        wait: until the card has done what it was told so far.
    """

    def __init__(self, lock: Lock, wait: Wait) -> None:
        self.lock = lock
        self.wait = wait
        self._images = torch.empty(0)
        self._said = torch.empty(0)
        self._places = torch.empty(0)

    def images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images as one batch, which stays until the next one."""
        n, shape = len(images), images[0].shape
        if len(self._images) < n or self._images.shape[1:] != shape:
            self._images = self.lock((n, *shape), torch.uint8)
        return stack(images, self._images[:n])

    def places(self, places: Sequence[int]) -> Tensor:
        """Which rows of a batch go on, until another batch has been waited for."""
        if len(self._places) < len(places):
            self._places = self.lock((len(places),), torch.int64)
        whole = self._places[: len(places)]
        whole.numpy()[:] = places
        return whole

    def said(self, said: Tensor) -> np.ndarray:
        """A copy of what a batch was judged to be; waits for the card, this once a batch."""
        n, shape = len(said), said.shape[1:]
        if len(self._said) < n or self._said.shape[1:] != shape:
            self._said = self.lock((n, *shape), said.dtype)
        whole = self._said[:n]
        whole.copy_(said, non_blocking=True)
        self.wait()
        return whole.numpy().copy()


def stack(images: Sequence[np.ndarray], batch: Tensor) -> Tensor:
    """Put images into a batch of as many; as `np.stack`, which takes twice as long."""
    np.concatenate(images, out=batch.numpy().reshape(-1, *batch.shape[2:]))
    return batch


def card_staging() -> Staging:
    """For the current card and stream."""
    done = torch.cuda.Event()

    def wait() -> None:
        done.record()
        done.synchronize()

    return Staging(lambda shape, dtype: torch.empty(shape, dtype=dtype, pin_memory=True), wait)
