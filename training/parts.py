"""The parts of a data folder: training, held out, test."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from model.image import SUFFIXES
from training.data import (
    DataError,
    Listing,
    list_folder,
    name_digest,
    split_by_hash,
    visible,
)

NAMES = {"train", "test", "val", "valid", "validation", "dev", "eval"}
"""What folders of parts are called."""
HELD_OUT = 0.1
"""Share of the training images that nothing but validation, then calibration, sees; at most."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Disjoint listings of the same classes."""

    training: Listing
    held_out: Listing
    test: Listing | None
    digest: str
    """Of the names of all files but the test folder's, so that the same folder is known again."""


def part_of(root: Path, name: str) -> Path | None:
    """`root/train` or `root/test`; None where there is none or where that is a class.

    A class may have such a name: CIFAR-100 has one of trains. Then it has other classes beside it,
    and no folder within.
    """
    folder = root / name
    if not folder.is_dir():
        return None
    folders_within = any(p.is_dir() for p in visible(folder))
    return None if not folders_within and has_classes(root) else folder


def has_classes(root: Path) -> bool:
    """Whether folders of images are right within, other than those called as parts are."""
    return any(map(_is_class, visible(root)))


def _is_class(folder: Path) -> bool:
    """Whether images are right within, and it is called as no part is, whatever is made in it."""
    return (
        folder.name not in NAMES
        and folder.is_dir()
        and any(f.suffix.lower() in SUFFIXES for f in visible(folder))
    )


def check_apart(root: Path, out: Path) -> None:
    """Raise DataError where a run in the folder `out` would make a class of the data in `root`."""
    trained = part_of(root, "train")
    for classes in (trained, root / "test") if trained else (root,):
        if not out.resolve().is_relative_to(classes.resolve()):
            continue
        first = out.resolve().relative_to(classes.resolve()).parts[:1]
        if not first or not (first[0].startswith(".") or _is_class(classes / first[0])):
            raise DataError(
                f"--out {out} would be among the classes in {classes}; choose a folder elsewhere"
            )


def find_parts(root: Path, per_class: int | None = None, share: float = HELD_OUT) -> Parts:
    """Find `root/train/CLASS` with `root/test/CLASS`, or cut a single `root/CLASS` in three.

    A single folder of less than 7 images a class is too small for a test part; it has none.

    Args:
        root: the data folder.
        per_class: the most training images of a class; the other parts stay whole.
        share: of the training images, that is held out. Fewer of the same are, the test part stays.

    Raises:
        DataError: a folder is missing or empty, there is one class, or the test folder has others.
    """
    trained = part_of(root, "train")
    listing = list_folder(trained or root)
    if len(listing.classes) < 2:
        raise DataError(f"{root} has one class only, {listing.classes[0]}; it takes several")
    training, held_out = split_by_hash(listing, HELD_OUT)
    if not len(held_out):
        raise DataError(
            f"{root} has too few images a class to hold {HELD_OUT:.0%} of each out; "
            "a class needs at least 6"
        )
    test = None
    if trained is None:
        training, test = split_by_hash(training, HELD_OUT)
    elif (root / "test").is_dir():
        test = list_folder(root / "test")
        if test.classes != listing.classes:
            raise DataError(f"{root}/test has other classes than {root}/train")
    if share < HELD_OUT:
        training, held_out = _given_back(listing, training, held_out, share)
    if per_class is not None:
        training = fewer(training, per_class)
    return Parts(training, held_out, test or None, names_digest(listing.files))


def left_to_test(listing: Listing) -> Listing:
    """What `find_parts` leaves of a single folder to be tested on; maybe nothing."""
    rest, _ = split_by_hash(listing, HELD_OUT)
    return split_by_hash(rest, HELD_OUT)[1]


def _given_back(
    listing: Listing, training: Listing, held_out: Listing, share: float
) -> tuple[Listing, Listing]:
    """What is trained on and what held out where only `share` of a listing's images shall be."""
    back, held_out = split_by_hash(held_out, share / HELD_OUT)
    if not len(held_out):
        raise DataError(f"too few images a class to hold {share:.1%} of each out")
    trained = {*training.files, *back.files}
    return listing.pick([i for i, f in enumerate(listing.files) if f in trained]), held_out


def fewer(listing: Listing, per_class: int) -> Listing:
    """At most `per_class` files of each class, always the same."""
    if per_class < 1:
        raise DataError(f"at least 1 image a class is needed, not {per_class}")
    taken: dict[int, int] = {}
    chosen = []
    names = [name_digest(f) for f in listing.files]
    for i in sorted(range(len(listing)), key=names.__getitem__):
        class_id = listing.class_ids[i]
        taken[class_id] = taken.get(class_id, 0) + 1
        if taken[class_id] <= per_class:
            chosen.append(i)
    return listing.pick(sorted(chosen))


def names_digest(files: Iterable[Path]) -> str:
    """SHA-256 of all files' `CLASS/FILENAME`."""
    names = "\n".join(f"{f.parent.name}/{f.name}" for f in files)
    return hashlib.sha256(os.fsencode(names)).hexdigest()
