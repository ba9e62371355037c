"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path


def usable_cores(root: Path = Path("/"), allowed: int | None = None) -> int:
    """Cores that it may run on, or fewer where a container's limit grants less time; at least 1.

    Args:
        root: of the file system that tells the limit.
        allowed: cores that it may run on; by default, asked of the system.
    """
    return max(1, int(min(allowed or _allowed(), *_limits(root))))


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limits(root: Path) -> Iterator[float]:
    """In cores, of this process's control groups and those above them; infinite for none."""
    yield math.inf
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _upwards(mount, path, _second_version)
        elif "cpu" in controllers.split(","):
            yield from _upwards(mount / "cpu", path, _first_version)


def _upwards(mount: Path, path: str, limit: Callable[[Path], float]) -> Iterator[float]:
    """The limits of a group and of those it is in. In a container the path may be the host's; what
    is not there sets no limit."""
    return map(limit, accumulate(path.strip("/").split("/"), Path.joinpath, initial=mount))


def _second_version(group: Path) -> float:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return _cores(quota, period)


def _first_version(group: Path) -> float:
    return _cores(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float:
    """`max`, -1 or nothing is no limit."""
    return int(quota) / int(period) if quota.strip().isdigit() else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
