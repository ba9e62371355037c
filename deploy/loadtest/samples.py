"""The images that a load sends."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from model.image import SUFFIXES

UNREADABLE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
"""What archives raise that are none, or are cut off."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, and its label where the folder tells."""

    data: bytes
    label: str | None


def read_samples(source: Path, most: int = 10_000) -> list[Sample]:
    """Read `CLASS/*` with labels, or `*` without, from a folder or a tar archive.

    A folder that all images share is no class: archives often have one around everything. Taken
    evenly over all files, so that a few already show every class.

    Raises:
        ValueError: there is no image.
    """
    files = _in_folder(source) if source.is_dir() else _in_archive(source)
    chosen = sorted(n for n in files if n.suffix.lower() in SUFFIXES)
    if not chosen:
        raise ValueError(f"{source} has no image")
    shared = os.path.commonpath([name.parent for name in chosen])
    taken = min(most, len(chosen))
    chosen = [chosen[i * len(chosen) // taken] for i in range(taken)]
    return [
        Sample(data, name.parent.relative_to(shared).name or None)
        for name, data in _read(source, chosen, files)
    ]


def _in_folder(folder: Path) -> dict[PurePath, str]:
    """Every file, by its path within."""
    return {p.relative_to(folder): str(p) for p in folder.rglob("*") if p.is_file()}


def _in_archive(archive: Path) -> dict[PurePath, str]:
    """The name of every file in it, by its path: `./a` is `a` as well."""
    try:
        with tarfile.open(archive) as tar:
            return {PurePath(m.name): m.name for m in tar.getmembers() if m.isfile()}
    except UNREADABLE as error:
        raise ValueError(f"{archive} is neither a folder nor a tar archive: {error}") from None


def _read(
    source: Path, chosen: list[PurePath], files: dict[PurePath, str]
) -> Iterator[tuple[PurePath, bytes]]:
    if source.is_dir():
        yield from ((path, Path(files[path]).read_bytes()) for path in chosen)
        return
    with tarfile.open(source) as tar:
        for path in chosen:
            member = tar.extractfile(files[path])
            assert member is not None, "it is a file"
            yield path, member.read()
