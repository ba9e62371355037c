"""Files that figures are written to after a measurement."""

from __future__ import annotations

import os
from pathlib import Path


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
