"""The control groups of this process, by which containers and batch systems set limits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """The folders of its groups and of all that those are in, each with its version, 1 or 2.

    In a container the path may be the host's, so that some of them are not there.

    Args:
        controller: what the first version has groups of its own for, `cpu` or `memory`.
        root: of the file system.
    """
    mount = root / "sys/fs/cgroup"
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from ((group, 2) for group in _upwards(mount, path))
        elif controller in controllers.split(","):
            yield from ((group, 1) for group in _upwards(mount / controller, path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    return accumulate(path.strip("/").split("/"), Path.joinpath, initial=mount)


def text_of(file: Path) -> str:
    """What a file says; nothing where it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
