"""Compiled units on disk: which file holds which."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import model
from model.bundle import Bundle
from model.files import PARTIAL
from server.private import is_safe, make_private

log = logging.getLogger("offramp")

STALE_SECONDS = 3600.0
"""After so long nobody writes to a partial file any more: a program takes well under a second."""


class Programs:
    """The compiled units of one bundle, on one kind of machine, in a folder of the cache.

    Args:
        cache: its folder; where it cannot be written, a temporary one with links to what it holds.
        bundle: a calibrated bundle.
        dtype: the units' numerics.
        threads: inside one operation.
        make: a folder for programs.
    """

    def __init__(
        self,
        cache: Path,
        bundle: Bundle,
        dtype: torch.dtype,
        threads: int,
        make: Callable[[Path], None] = make_private,
    ) -> None:
        self.cache = cache.expanduser()
        self.folder = self.cache / _digest(bundle, dtype, threads)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            make(self.folder)
        except OSError as error:
            filled = self.folder
            self._temporary = tempfile.TemporaryDirectory(prefix="offramp-")
            self.cache = Path(self._temporary.name)
            self.folder = self.cache / filled.name
            make(self.folder)
            linked = self._link_to(filled)
            said = "%s cannot be written (%s); what its %d programs lack is compiled at each start"
            log.info(said, cache, error, linked)

    def file(self, stage: int, size: int) -> Path:
        """Where the program for a stage and batch size is, or will be."""
        return self.folder / f"stage{stage}-batch{size}.bin"

    def remove_stale(self, clock: Callable[[], float] = time.time) -> None:
        """Remove what compilers left half written that were killed meanwhile."""
        for partial in self.folder.glob(f"*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):  # another compiler removes them too
                if clock() - partial.stat().st_mtime > STALE_SECONDS:
                    partial.unlink()

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if self._temporary:
            self._temporary.cleanup()

    def _link_to(self, filled: Path) -> int:
        """Link to the programs that somebody filled a folder with beforehand; how many.

        A program is code, and who filled a folder that this user cannot write is not known.
        """
        programs = list(filled.glob("*.bin"))
        safe = [program for program in programs if is_safe(program)]
        for program in safe:
            (self.folder / program.name).symlink_to(program.resolve())
        if len(safe) < len(programs):
            said = "%d of %d programs in %s are not used: others than this user can change them"
            log.warning(said, len(programs) - len(safe), len(programs), filled)
        return len(safe)


def _digest(bundle: Bundle, dtype: torch.dtype, threads: int) -> str:
    """Names everything that a compiled unit depends on."""
    policy, description = bundle.calibrated, bundle.description
    digest = hashlib.sha256(_code())
    said = (
        description.weights_sha256,
        description.preprocess.model_dump_json(),
        [c.model_dump_json() for c in policy.calibrations],
        policy.measure,
        policy.quantisation,
        dtype,
        threads,
        torch.__version__,
        _compiler(),
        _machine(),
    )
    digest.update(repr(said).encode())
    return digest.hexdigest()[:16]


def _code() -> bytes:
    here = [Path(__file__).with_name(name) for name in ("units.py", "compile.py", "compiled.py")]
    files = [*Path(model.__file__).parent.glob("*.py"), *here]
    return b"".join(file.read_bytes() for file in sorted(files))


def _compiler() -> str:
    try:
        return version("openvino")
    except PackageNotFoundError:
        return ""


def _machine() -> str:
    """The processor's features, which compiled code is made for."""
    flags = ""
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        flags = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {flags}"
