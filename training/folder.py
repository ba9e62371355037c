"""A data folder made ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from model.cores import usable_cores
from model.image import ImageError, read_header
from model.preprocess import Preprocess
from training.data import MAX_PIXELS, DataError, Images, ImageSet, Listing, load
from training.distributed import Processes
from training.normalisation import normalisation
from training.parts import Parts, names_digest
from training.recipe import Recipe
from training.room import available_memory, check_memory, fits_in_memory, images_bytes
from training.stream import Stream

SMALL = 64
"""Images up to this side are small: trained as 32x32, with a stem that keeps the resolution."""
SMALL_SIZE, LARGE_SIZE = 32, 224
LOOKED_AT = 32
"""Files whose headers decide the size, when nobody said."""
IMAGES_A_WORKER = 500
"""Fewer images than this are read sooner than a worker starts."""


class Storage(Enum):
    """Where training images live."""

    AUTO = "auto"
    MEMORY = "memory"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Folder:
    """Everything that a run takes from its data folder."""

    training: Images
    validation: Images
    test: Images | None
    preprocess: Preprocess
    digest: str
    """Of the names of all files to train on or to hold out."""
    training_digest: str
    """Of the names of those to train on, readable or not."""

    @property
    def unreadable(self) -> list[str]:
        """Files that were skipped so far, each with its reason."""
        parts = (self.training, self.validation, *([self.test] if self.test is not None else []))
        return [failure for part in parts for failure in part.unreadable]

    def class_weights(self, kind: str, device: torch.device) -> Tensor | None:
        """By how much each class counts, fp32 `[classes]`; images count 1 on average.

        `balanced` makes all classes count the same together.
        """
        if kind == "none":
            return None
        counts = torch.bincount(self.training.class_ids.cpu(), minlength=len(self.training.classes))
        return (len(self.training) / (len(counts) * counts.clamp(min=1).float())).to(device)


def open_folder(
    parts: Parts,
    size: int | None,
    crop: float,
    recipe: Recipe,
    processes: Processes,
    storage: Storage = Storage.AUTO,
    workers: int = 0,
) -> Folder:
    """Decode what of a folder is to live in memory, measure its normalisation.

    Args:
        parts: of the data folder.
        size: side of the square input; by the images themselves where it is None.
        crop: share of the shorter side that is kept outside training.
        recipe: of the run.
        processes: of the run.
        storage: where training images live.
        workers: processes that read images.

    Raises:
        DataError: images cannot be read, or do not fit.
        ValueError: the recipe wants random crops of images that live in memory.
    """
    size = size or natural_size(parts.training)
    whole = Preprocess(size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    cropped = whole.model_copy(update={"crop": crop})
    wanted = images_bytes(len(parts.training) + len(parts.held_out), size) * processes.count
    # Processes that disagree would skip unreadable files at other times, and wait for each other.
    in_memory = not processes.any(not _in_memory(storage, wanted, recipe))

    def images(listing: Listing, draft: Preprocess, memory: bool) -> Images:
        if memory:
            return _on_device(load(listing, draft), processes.device)
        enough = min(workers, usable_cores(), len(listing) // IMAGES_A_WORKER)
        return Stream(listing, draft, enough, recipe.crop_area, recipe.seed)

    training = images(parts.training, whole, in_memory)
    validation = images(parts.held_out, cropped, in_memory)
    test = None if parts.test is None else images(parts.test, cropped, memory=False)
    _check(training, validation, test, processes)
    mean, std = normalisation(training, size)
    return Folder(
        training,
        validation,
        test,
        Preprocess(size=size, crop=crop, mean=mean, std=std),
        parts.digest,
        names_digest(parts.training.files),
    )


def natural_size(listing: Listing) -> int:
    """The input size that suits a folder's images: 32 or 224."""
    step = max(1, len(listing) // LOOKED_AT)
    sides = [s for f in listing.files[::step] if (s := _shorter_side(f)) is not None]
    return SMALL_SIZE if sides and median(sides) <= SMALL else LARGE_SIZE


def _shorter_side(file: Path) -> int | None:
    try:
        return min(read_header(file.read_bytes(), MAX_PIXELS).size)
    except (ImageError, OSError):
        return None


def _in_memory(storage: Storage, wanted: int, recipe: Recipe) -> bool:
    available = available_memory()
    if storage is Storage.MEMORY:
        check_memory(wanted, available, "add --storage disk to read them as they are needed")
    if storage is Storage.MEMORY and recipe.crop_area < 1:
        raise ValueError("--crop-area below 1 cuts from whole images; it needs --storage disk")
    if storage is Storage.AUTO:
        return recipe.crop_area >= 1 and fits_in_memory(wanted, available)
    return storage is Storage.MEMORY


def _on_device(images: ImageSet, device: torch.device) -> ImageSet:
    """On the card too, where images leave half of it free."""
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if fits_in_memory(images.pixels.numel(), free) else images


def _check(training: Images, validation: Images, test: Images | None, processes: Processes) -> None:
    """Raise DataError where the run could not begin with these images, or not end."""
    _check_alike(training, processes)
    _check_classes(training)
    _check_any(validation, "held-out")
    if test is not None:
        _check_any(test, "test")


def _check_alike(images: Images, processes: Processes) -> None:
    """Or processes would take other steps of one run, and in the end wait for each other."""
    if len(processes.gather([names_digest(images.files)])) > 1:
        raise DataError("processes do not all have the same training images to read")


def _check_classes(images: Images) -> None:
    for name, readable in zip(images.classes, images.readable_classes(), strict=True):
        if not readable:
            raise DataError(f"no training image of class {name} could be read")


def _check_any(images: Images, kind: str) -> None:
    """Now, since what cannot be measured in the end costs the whole run."""
    if not any(images.readable_classes()):
        raise DataError(f"none of {len(images)} {kind} images could be read")
