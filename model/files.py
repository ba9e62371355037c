"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"
"""How the names of files end that are still being written."""


def put_in_place(file: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and moved there at once, so that it is never half one.

    Args:
        file: its place.
        write: writes to the path that it is given, which no other process is given: process ids
            would be alike in containers that share the folder.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        write(partial)
        _store(partial)
        partial.replace(file)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk does not say for which file
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _store(file: Path) -> None:
    """Wait until its bytes are on the disk: a machine that stops might keep its name alone."""
    with file.open("rb") as written:
        os.fsync(written.fileno())


def write_atomically(file: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new one, never half."""
    put_in_place(file, lambda partial: partial.write_bytes(data))
