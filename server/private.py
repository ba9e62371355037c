"""Folders of code that nobody else can change."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder that only this user can put code into, which this process will run.

    A group may, where the folder was there before: orchestrators give a volume to one of its own.

    Raises:
        OSError: it cannot be written, or it, or a folder that it is in, is somebody else's.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_safe(folder, stat.S_IWOTH):
        raise PermissionError(f"others than this user can change {folder}")
    with tempfile.TemporaryFile(dir=folder):
        pass


def is_safe(file: Path, writing: int = stat.S_IWGRP | stat.S_IWOTH) -> bool:
    """Whether nobody but root and this user can change a file, or put another in its place.

    Args:
        file: or folder.
        writing: the bits of a mode that others have who can.
    """
    with contextlib.suppress(OSError):  # what cannot be looked at is not safe
        whole = file.resolve(strict=True)
        return all(_is_ours(path.stat(), writing) for path in (whole, *whole.parents))
    return False


def _is_ours(status: os.stat_result, writing: int) -> bool:
    """Whether root or this user owns it, and others may at most add to it, as to /tmp."""
    others_write = status.st_mode & writing
    only_add = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.geteuid()) and bool(only_add or not others_write)
