"""Image folders as tensors, split the same way every time."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.image import SUFFIXES, ImageError, decode
from model.preprocess import Preprocess

T = TypeVar("T")

MAX_PIXELS = 100_000_000
READERS = 4
"""Threads that read files into memory."""


class DataError(Exception):
    """A data folder that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Files with their classes, not yet read."""

    classes: tuple[str, ...]
    files: tuple[Path, ...]
    class_ids: tuple[int, ...]

    def pick(self, indices: Sequence[int]) -> Listing:
        """The listing of these positions alone."""
        return Listing(
            self.classes,
            tuple(self.files[i] for i in indices),
            tuple(self.class_ids[i] for i in indices),
        )

    def __len__(self) -> int:
        return len(self.files)


class Images(Protocol):
    """Labelled images, wherever they are kept."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by class id."""

    @property
    def class_ids(self) -> Tensor:
        """int64 `[N]`."""

    @property
    def files(self) -> Sequence[Path]:
        """Where they come from; some may be unreadable."""

    @property
    def unreadable(self) -> Sequence[str]:
        """Files that were skipped so far, each with its reason."""

    def __len__(self) -> int: ...

    def readable_classes(self) -> Iterator[bool]:
        """For each class, whether any image of it can be read; looked up as it is asked for."""

    def batches(
        self, indices: Sequence[Tensor], draw: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels uint8 `[n, H, W, 3]` with class ids `[n]` for each batch of indices.

        Args:
            indices: of each batch.
            draw: a number that random crops come from; none are made without it.
        """


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Decoded images in memory."""

    classes: tuple[str, ...]
    pixels: Tensor
    """uint8 `[N, H, W, 3]`."""
    class_ids: Tensor
    """int64 `[N]`."""
    files: tuple[Path, ...]
    unreadable: tuple[str, ...] = ()
    """Files that were skipped, each with its reason."""
    copies: tuple[Path, ...] = ()
    """Files that were left out because an earlier one has the same pixels."""

    def __len__(self) -> int:
        return len(self.class_ids)

    def readable_classes(self) -> Iterator[bool]:
        """As `Images.readable_classes`."""
        counts = torch.bincount(self.class_ids.cpu(), minlength=len(self.classes))
        return iter((counts > 0).tolist())

    def batches(
        self, indices: Sequence[Tensor], draw: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`; images in memory are cropped after this."""
        for batch in indices:
            batch = batch.to(self.pixels.device)
            yield self.pixels[batch], self.class_ids[batch]

    def to(self, device: torch.device) -> ImageSet:
        """The same images on a device."""
        return replace(self, pixels=self.pixels.to(device), class_ids=self.class_ids.to(device))


def list_folder(root: Path) -> Listing:
    """List `root/CLASS/*.png` (or another image suffix), classes and files in sorted order.

    Folders within classes are left alone, which is said.

    Raises:
        DataError: the folder is missing, has no classes, or a class has no image.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    folders = sorted(p for p in visible(root) if p.is_dir())
    if not folders:
        raise DataError(f"{root} has no class folders; expected {root}/CLASS/*.png")
    files: list[Path] = []
    class_ids: list[int] = []
    within: list[Path] = []
    for class_id, folder in enumerate(folders):
        _check_name(folder)
        inside = sorted(visible(folder))
        found = [p for p in inside if p.suffix.lower() in SUFFIXES]
        if not found:
            raise DataError(f"class folder {folder} has no image right in it")
        files += found
        class_ids += [class_id] * len(found)
        within += (p for p in inside if p.suffix.lower() not in SUFFIXES and _is_folder(p))
    if within and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(
            f"{len(within)} folders within classes are left alone, {within[0]} first; "
            "images must be right in a class folder",
            file=sys.stderr,
        )
    return Listing(tuple(f.name for f in folders), tuple(files), tuple(class_ids))


def visible(folder: Path) -> Iterator[Path]:
    """What is in a folder but hidden files and folders, which editors and systems leave there."""
    return (p for p in folder.iterdir() if not p.name.startswith("."))


def _is_folder(path: Path) -> bool:
    """Also where one may not look, which is no reason to stop."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _check_name(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"class folder {os.fsencode(folder)!r} has a name that is not UTF-8; rename it"
        ) from None


def split_by_hash(listing: Listing, share: float) -> tuple[Listing, Listing]:
    """Hold out `share` of each class, always the same files.

    The held-out files of a class are those whose SHA-256 of `CLASS/FILENAME` is smallest, so the
    split depends on nothing but the names: not on the order of reading, a seed or a library.

    Returns:
        The files kept, and the files held out.
    """
    by_class: dict[int, list[int]] = {}
    for i, class_id in enumerate(listing.class_ids):
        by_class.setdefault(class_id, []).append(i)
    held: set[int] = set()
    for indices in by_class.values():
        ranked = sorted(indices, key=lambda i: name_digest(listing.files[i]))
        held.update(ranked[: round(share * len(indices))])
    everything = range(len(listing))
    return (
        listing.pick([i for i in everything if i not in held]),
        listing.pick([i for i in everything if i in held]),
    )


def name_digest(file: Path) -> bytes:
    """SHA-256 of `CLASS/FILENAME`."""
    return hashlib.sha256(os.fsencode(f"{file.parent.name}/{file.name}")).digest()


def load(listing: Listing, preprocess: Preprocess, keep_copies: bool = True) -> ImageSet:
    """Read and decode every file through the serving preprocess.

    An unreadable file is skipped and listed in `unreadable`.

    Args:
        listing: what to read.
        preprocess: gives each image its size.
        keep_copies: whether an image whose pixels are those of an earlier one, of any class, is
            taken too, rather than listed in `copies`.

    Raises:
        DataError: no file could be read.
    """

    def read(file: Path) -> np.ndarray | str:
        try:
            return preprocess.pixels(decode(file.read_bytes(), preprocess.size, MAX_PIXELS))
        except (ImageError, OSError) as error:
            return f"{file}: {error}"

    # Filled in place: a list of arrays, stacked in the end, would take twice the memory.
    pixels = np.empty((len(listing), preprocess.size, preprocess.size, 3), np.uint8)
    ids: list[int] = []
    files: list[Path] = []
    unreadable: list[str] = []
    copies: list[Path] = []
    known: set[bytes] = set()
    with ThreadPoolExecutor(READERS) as pool:
        results = in_order(pool, read, listing.files, 2 * READERS)
        bar = tqdm(results, "reading", len(listing), unit="image", leave=False, disable=None)
        for file, class_id, result in zip(listing.files, listing.class_ids, bar, strict=True):
            if isinstance(result, str):
                unreadable.append(result)
                continue
            if not keep_copies and _is_in(known, result):
                copies.append(file)
                continue
            pixels[len(ids)] = result
            ids.append(class_id)
            files.append(file)
    if not ids:
        raise DataError(f"none of {len(listing)} files could be read; the first: {unreadable[0]}")
    return ImageSet(
        listing.classes,
        torch.from_numpy(pixels[: len(ids)]),
        torch.tensor(ids),
        tuple(files),
        tuple(unreadable),
        tuple(copies),
    )


def _is_in(known: set[bytes], pixels: np.ndarray) -> bool:
    """Whether these pixels are among those known before; from now on they are."""
    digest, before = hashlib.sha256(pixels.tobytes()).digest(), len(known)
    known.add(digest)
    return len(known) == before


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Path], T], files: Iterable[Path], ahead: int
) -> Iterator[T]:
    """As `pool.map`, but with at most `ahead` results that nobody has taken yet."""
    waiting: deque[Future[T]] = deque()
    for file in files:
        waiting.append(pool.submit(work, file))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
