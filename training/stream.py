"""Images read from disk as they are needed."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.image import ImageError, decode
from model.preprocess import Preprocess
from training.data import MAX_PIXELS, DataError, Listing
from training.interrupt import SIGNALS
from training.seeds import generator_of

ASPECT = (3 / 4, 4 / 3)
CPU = torch.device("cpu")
ORPHANED_SECONDS = 5.0
"""How often a worker looks whether its run is still there."""

Box = tuple[float, float, float, float]
Read = tuple[np.ndarray, int] | str
"""Pixels with a class id, or why there are none."""


@dataclass(slots=True)
class Stream:
    """The images of a listing, decoded by workers batch by batch."""

    listing: Listing
    preprocess: Preprocess
    workers: int = 0
    crop_area: float = 1.0
    """Least share of an image that a random crop keeps."""
    seed: int = 0
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.listing)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by class id."""
        return self.listing.classes

    @property
    def class_ids(self) -> Tensor:
        """int64 `[N]`."""
        return torch.tensor(self.listing.class_ids)

    @property
    def files(self) -> tuple[Path, ...]:
        """Of all images."""
        return self.listing.files

    def batches(
        self, indices: Sequence[Tensor], draw: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`; an unreadable file is left out of its batch.

        A batch of which nothing could be read is left out too. Where images are drawn to train on,
        those of its batch that can be read stand in: every process must take every step, in as
        many parts.

        Raises:
            DataError: no file of a batch to train on could be read.
        """
        loader: DataLoader[Any] = DataLoader(
            _Files(self, draw),
            batch_sampler=[batch.tolist() for batch in indices],
            num_workers=self.workers,
            collate_fn=_gather if draw is None else _gather_whole,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_end_with_the_run, os.getpid()),
        )
        known = set(self.unreadable)
        with _deaf_to_signals():
            read = iter(loader)
        for pixels, class_ids, failures in read:
            new = [f for f in failures if f not in known]
            known.update(new)
            self.unreadable += new
            if pixels is not None:
                yield pixels, class_ids
            elif draw is not None:
                raise DataError(f"no image of a batch could be read; the first: {failures[0]}")

    def readable_classes(self) -> Iterator[bool]:
        """As `Images.readable_classes`: reads files of a class until one can be read."""
        return map(self._can_read, range(len(self.classes)))

    def _can_read(self, class_id: int) -> bool:
        files, class_ids = _Files(self, None), self.listing.class_ids
        for index in range(bisect_left(class_ids, class_id), bisect_right(class_ids, class_id)):
            read = files[index]
            if not isinstance(read, str):
                return True
            self.unreadable.append(read)
        return False


class _Files(Dataset[Read]):
    """What a worker does for one index."""

    def __init__(self, stream: Stream, draw: int | None) -> None:
        self.stream = stream
        self.draw = draw

    def __getitem__(self, index: int) -> Read:
        stream = self.stream
        file, class_id = stream.listing.files[index], stream.listing.class_ids[index]
        size = stream.preprocess.size
        try:
            image = decode(file.read_bytes(), size, MAX_PIXELS)
        except (ImageError, OSError) as error:
            return f"{file}: {error}"
        if self.draw is None or stream.crop_area >= 1:
            return stream.preprocess.pixels(image), class_id
        generator = generator_of(CPU, stream.seed, "crop", self.draw, index)
        box = random_box(image.size, stream.crop_area, generator)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)), class_id


def random_box(size: tuple[int, int], least_area: float, generator: torch.Generator) -> Box:
    """A box of random area, aspect, place within an image of this size (Szegedy 2015)."""
    width, height = size
    u = torch.rand(4, generator=generator).tolist()
    area = width * height * (least_area + (1 - least_area) * u[0])
    low, high = (math.log(a) for a in ASPECT)
    aspect = math.exp(low + (high - low) * u[1])
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = (width - w) * u[2], (height - h) * u[3]
    return left, top, left + w, top + h


@contextmanager
def _deaf_to_signals() -> Iterator[None]:
    """Start processes that no signal to leave interrupts: it is for this one to act on.

    Terminals and torchrun signal a whole group, and a run without its workers cannot save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_run(run: int, worker: int) -> None:
    """Leave when the run itself says so, or is gone, even if a file keeps this worker waiting."""
    # Not who the parent is by now: the run may have ended as soon as this worker began.
    parent = run if multiprocessing.get_start_method() == "fork" else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            told = signal.sigtimedwait({signal.SIGTERM}, ORPHANED_SECONDS)
            if told and told.si_pid == run:
                break
        os._exit(0)

    if hasattr(signal, "sigtimedwait"):  # macOS has none
        threading.Thread(target=watch, daemon=True).start()


def _gather_whole(read: Sequence[Read]) -> tuple[Tensor | None, Tensor, list[str]]:
    """With images twice for those that could not be read."""
    good = [r for r in read if not isinstance(r, str)]
    return _gather([*read, *islice(cycle(good), len(read) - len(good))])


def _gather(read: Sequence[Read]) -> tuple[Tensor | None, Tensor, list[str]]:
    good = [r for r in read if not isinstance(r, str)]
    failures = [r for r in read if isinstance(r, str)]
    pixels = torch.from_numpy(np.stack([p for p, _ in good])) if good else None
    return pixels, torch.tensor([c for _, c in good]), failures
