"""Which images a bundle has seen, known again by their content wherever they are."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm import tqdm

from model.bundle import REPORT, Bundle
from model.files import write_atomically
from training.data import DataError, Listing, in_order
from training.distributed import Processes
from training.parts import names_digest

TRAINED = "training_files.npy"
CALIBRATED = "calibration_files.npy"
FITTED = "confidence_files.npy"
"""Within a bundle's report: the sorted digests of files."""
AHEAD = 4096
"""Files that wait to be read; a million of them would take gigabytes."""
KNOWN_SHARE = 0.1
"""Of a folder that was trained on, at least; others may hold a few of the same images by chance."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a bundle was made from, as far as it says so."""

    path: Path
    """The bundle's folder."""
    folder: str | None
    """`names_digest` of the folder that it was trained on a part of."""
    trained: np.ndarray | None
    """Digests of the files that it was trained on."""
    calibrated: np.ndarray | None
    """The same of those that its policy comes from."""
    fitted: np.ndarray | None
    """Of those that its confidences come from, if its thresholds come from others."""

    def knows(self, listing: Listing) -> bool:
        """Whether the bundle was trained on a part of this folder, as it is or as it was."""
        if self.names(listing):
            return True
        if self.trained is None or not len(listing):
            return False
        found = marks(listing, self.trained)
        return bool(found.mean() >= KNOWN_SHARE or found.sum() >= len(self.trained) / 2)

    def names(self, listing: Listing) -> bool:
        """Whether these are, by their names, the files that the bundle was trained on a part of."""
        return names_digest(listing.files) == self.folder

    def left_by_training(self, listing: Listing, known: bool) -> Listing:
        """The images of a listing that the bundle was not trained on, saying how many it was.

        Args:
            listing: what to look through.
            known: whether nothing needs to be said where none are recognised.

        Raises:
            DataError: it was trained on all of them.
        """
        if self.trained is None and not known:
            tqdm.write(
                f"{self.path} does not say which images it was trained on; "
                "no bound and no accuracy counts if any of these are among them"
            )
        left = self._without(listing, "trained", self.trained)
        if self.trained is not None and len(left) == len(listing) and not known:
            tqdm.write(
                f"none of these images is known from the training of {self.path}; "
                "one that was scaled or encoded anew since would not be"
            )
        return left

    def left_by_calibration(self, listing: Listing) -> Listing:
        """The images of a listing that the bundle's policy does not come from.

        Raises:
            DataError: it comes from all of them.
        """
        return self._without(listing, "calibrated", self.calibrated, self.fitted)

    def left_by_confidences(self, listing: Listing) -> Listing:
        """The images of a listing that the bundle's confidences do not come from.

        Raises:
            DataError: they come from all of them.
        """
        return self._without(listing, "calibrated", self.heard)

    @property
    def heard(self) -> np.ndarray | None:
        """Digests of the files that its confidences come from."""
        return self.calibrated if self.fitted is None else self.fitted

    def _without(self, listing: Listing, done: str, *records: np.ndarray | None) -> Listing:
        known = [digests for digests in records if digests is not None]
        if not known:
            return listing
        found = marks(listing, np.concatenate(known))
        if len(listing) and found.all():
            raise DataError(f"{self.path} was {done} on all of these images; take others")
        if found.any():
            tqdm.write(
                f"left out {found.sum()} of {len(listing)} images, which {self.path} was {done} on"
            )
        return listing.pick(np.flatnonzero(~found).tolist())


def seen_by(bundle: Bundle) -> Seen:
    """What a bundle says that it was made from.

    Raises:
        DataError: a record is malformed.
    """
    folder = bundle.description.training.get("files_sha256")
    records = (load_digests(bundle.path, name) for name in (TRAINED, CALIBRATED, FITTED))
    return Seen(bundle.path, folder, *records)


def digests_of(files: Sequence[Path], show: bool = True) -> np.ndarray:
    """32 bits of each file's SHA-256: int64 `[files]`, -1 where it cannot be read.

    They are enough: beside a million of them, one image in four thousand is left out by chance.
    With `show`, a terminal sees how far it is.
    """
    hide = None if show else True
    with ThreadPoolExecutor(4) as pool:
        found = in_order(pool, _digest, files, AHEAD)
        bar = tqdm(found, "knowing images again", len(files), leave=False, disable=hide)
        return np.fromiter(bar, np.int64, len(files))


def shared_digests(files: Sequence[Path], mine: Processes) -> np.ndarray:
    """As `digests_of`, each process reading its share; every process must come here."""
    own = slice(mine.rank, None, mine.count)
    found = torch.zeros(len(files), dtype=torch.int64)
    found[own] = torch.from_numpy(digests_of(files[own], mine.first))
    return mine.sum(found).numpy()


def save_calibrated(seen: Seen, digests: np.ndarray, labelled: bool) -> None:
    """Record the files that a policy comes from; without labels, its confidences come from those of
    the one before."""
    fitted = None if labelled else seen.heard
    if fitted is None:
        (seen.path / REPORT / FITTED).unlink(missing_ok=True)
    else:
        save_digests(seen.path, FITTED, fitted.astype(np.int64))
    save_digests(seen.path, CALIBRATED, digests)


def save_digests(path: Path, name: str, digests: np.ndarray) -> None:
    """Write a record to the report of the bundle at `path`."""
    file = io.BytesIO()
    np.save(file, np.unique(digests[digests >= 0]).astype("<u4"), allow_pickle=False)
    (path / REPORT).mkdir(parents=True, exist_ok=True)
    write_atomically(path / REPORT / name, file.getvalue())


def load_digests(path: Path, name: str) -> np.ndarray | None:
    """Read a record from the report of the bundle at `path`; None where there is none.

    Raises:
        DataError: it is malformed.
    """
    file = path / REPORT / name
    try:
        with file.open("rb") as opened:
            digests = np.load(opened, allow_pickle=False)
    except (FileNotFoundError, NotADirectoryError):  # a plain backbone is a file
        return None
    except (ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{file} is damaged ({error}); copy the bundle again") from error
    if not isinstance(digests, np.ndarray) or digests.dtype != np.uint32 or digests.ndim != 1:
        raise DataError(f"{file} holds no digests of files; copy the bundle again")
    return digests


def hand_on(path: Path, out: Path) -> None:
    """Give a bundle that is made of another the other's records."""
    for name in (TRAINED, CALIBRATED, FITTED):
        if (digests := load_digests(path, name)) is not None:
            save_digests(out, name, digests)
        else:
            (out / REPORT / name).unlink(missing_ok=True)


def save_trained(path: Path, own: np.ndarray, parents: Sequence[Path]) -> Iterator[str]:
    """Record what a bundle was trained on; yields what cannot be told, for people.

    Args:
        path: its folder.
        own: digests of the files that it was trained on, -1 where one cannot be read.
        parents: what it started from or was taught by: what they saw, it has seen too; the file of
            a plain backbone never says.
    """
    if gone := np.count_nonzero(own < 0):
        yield f"{gone} of {len(own)} training images cannot be read, so would not be known again"
    everything = [own]
    for parent in parents:
        if (digests := load_digests(parent, TRAINED)) is None:
            yield f"{parent} does not say which images it was trained on; they are not known again"
        else:
            everything.append(digests)
    save_digests(path, TRAINED, np.concatenate(everything))
    for name in (CALIBRATED, FITTED):
        (path / REPORT / name).unlink(missing_ok=True)  # of weights that were here before


def marks(listing: Listing, digests: np.ndarray) -> np.ndarray:
    """Which files of a listing have one of these digests: bool `[N]`."""
    return np.isin(digests_of(listing.files), digests)


def _digest(file: Path) -> int:
    try:
        return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:4], "big")
    except OSError:
        return -1
