"""The images that a load sends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, and its label where the folder tells."""

    data: bytes
    label: str | None


def read_samples(folder: Path, most: int = 10_000) -> list[Sample]:
    """Read `folder/CLASS/*` with labels, or `folder/*` without.

    Taken evenly over all files, so that a few already show every class.

    Raises:
        ValueError: there is no image.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} has no image")
    step = max(1, len(files) // most)
    return [
        Sample(f.read_bytes(), None if f.parent == folder else f.parent.name) for f in files[::step]
    ][:most]
