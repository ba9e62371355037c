"""Whether a run fits into memory, on disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from model.groups import control_groups
from training.checkpoint import CHECKPOINT
from training.data import DataError

MARGIN = 1.2
"""Room asked for beyond what is counted: logs, plots, buffers."""
SHARE_FOR_IMAGES = 0.5
"""Of the free memory, what images may take before they stream from disk by themselves."""

MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version of control groups: the files with limit and use, and the name of what is cached."""


def images_bytes(images: int, size: int) -> int:
    """What decoded images take in memory."""
    return images * size * size * 3


def fits_in_memory(wanted: int, available: int | None) -> bool:
    """Whether images should live in memory, when nobody said where."""
    return available is None or wanted <= SHARE_FOR_IMAGES * available


def check_memory(wanted: int, available: int | None, advice: str) -> None:
    """Raise DataError, with advice, where images are wanted in memory that cannot hold them."""
    if available is not None and wanted * MARGIN > available:
        raise DataError(
            f"the images take {_gigabytes(wanted)} decoded, and {_gigabytes(available)} of memory "
            f"is free; {advice}"
        )


def check_disk(folder: Path, net: nn.Module, averaged: bool, free: int | None = None) -> None:
    """Raise DataError where checkpoints will not fit.

    A checkpoint holds weights, momentum and perhaps an average; while one is replaced there are
    two, of which a run that goes on has one, and the bundle follows.
    """
    weights = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    wanted = int(weights * (2 * (3 if averaged else 2) + 0.5) * MARGIN)
    free = shutil.disk_usage(folder).free if free is None else free
    if wanted > free + _size(folder / CHECKPOINT):
        raise DataError(
            f"checkpoints and the bundle take {_gigabytes(wanted)}, and {folder} has "
            f"{_gigabytes(free)} free"
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def available_memory() -> int | None:
    """Memory that can still be had, in bytes, a container's or batch job's limit included; None if
    unknown."""
    known = [x for x in (_of_machine(), _of_groups()) if x is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _of_groups(root: Path = Path("/")) -> int | None:
    """What the limits of this process's control groups leave, and of those that they are in."""
    left = (_left_of(*group) for group in control_groups("memory", root))
    return min((x for x in left if x is not None), default=None)


def _left_of(group: Path, version: int) -> int | None:
    limit, used, cached = MEMORY_FILES[version]
    try:
        most = (group / limit).read_text().strip()
        taken = int((group / used).read_text()) - _cached(group, cached)
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - taken)


def _cached(group: Path, name: str) -> int:
    """Bytes of files that were read, and that memory is taken from first: images, on a resume."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return next((int(count) for one, count in lines if one == name), 0)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:.0f} GB"
