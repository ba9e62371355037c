"""The images that a load sends."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from model.image import SUFFIXES


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, and its label where the folder tells."""

    data: bytes
    label: str | None


def read_samples(source: Path, most: int = 10_000) -> list[Sample]:
    """Read `CLASS/*` with labels, or `*` without, from a folder or a tar archive.

    Taken evenly over all files, so that a few already show every class.

    Raises:
        ValueError: there is no image.
    """
    if source.is_dir():
        names: list[PurePath] = [p.relative_to(source) for p in source.rglob("*")]
    else:
        names = [PurePath(name) for name in _members(source)]
    chosen = sorted(n for n in names if n.suffix.lower() in SUFFIXES)
    if not chosen:
        raise ValueError(f"{source} has no image")
    taken = min(most, len(chosen))
    chosen = [chosen[i * len(chosen) // taken] for i in range(taken)]
    return [Sample(data, name.parent.name or None) for name, data in _read(source, chosen)]


def _members(archive: Path) -> list[str]:
    try:
        with tarfile.open(archive) as tar:
            return tar.getnames()
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is neither a folder nor a tar archive: {error}") from None


def _read(source: Path, names: list[PurePath]) -> Iterator[tuple[PurePath, bytes]]:
    if source.is_dir():
        yield from ((name, (source / name).read_bytes()) for name in names)
        return
    with tarfile.open(source) as tar:
        for name in names:
            member = tar.extractfile(str(name))
            assert member is not None, "a name with an image's suffix is a file"
            yield name, member.read()
