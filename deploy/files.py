"""Files that figures are written to after a measurement."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")
"""Ends of the names of pictures."""


def need_picture(file: Path | None) -> None:
    """Say before a measurement that its picture could not be drawn after it.

    Raises:
        ValueError: the file's name is no picture's, or nothing is installed that draws one.
    """
    if file is None:
        return
    if file.suffix.lower() not in PICTURES:
        raise ValueError(f"{file} cannot be drawn: its name must end in {', '.join(PICTURES)}")
    if find_spec("matplotlib") is None:
        raise ValueError(f"{file} cannot be drawn: matplotlib is not installed")


def need_writable(*files: Path | None) -> None:
    """Say before a measurement what would lose its figures after it.

    Raises:
        ValueError: one of the files cannot be written.
    """
    for file in files:
        if file is None:
            continue
        if not file.parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {file.parent}")
        if file.is_dir():
            raise ValueError(f"{file} cannot be written: it is a folder")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{file} cannot be written: permission denied")
