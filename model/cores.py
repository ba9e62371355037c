"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from model.groups import control_groups, text_of


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
    for group, version in control_groups("cpu", root):
        yield _first_version(group) if version == 1 else _second_version(group)


def _second_version(group: Path) -> float:
    quota, _, period = text_of(group / "cpu.max").partition(" ")
    return _cores(quota, period)


def _first_version(group: Path) -> float:
    return _cores(text_of(group / "cpu.cfs_quota_us"), text_of(group / "cpu.cfs_period_us"))


def _cores(quota: str, period: str) -> float:
    """`max`, -1 or nothing is no limit."""
    return int(quota) / int(period) if quota.strip().isdigit() else math.inf
