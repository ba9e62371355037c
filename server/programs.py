"""Compiled units on disk: which file holds which, whether it may be trusted, how fast it is."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import model
from model.bundle import Bundle
from model.files import PARTIAL
from server.host import array_of, tensor_of
from server.memory import Program
from server.runner import WARM_UP_RUNS, WARM_UP_SECONDS
from server.units import Unit

log = logging.getLogger("offramp")

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1, torch.int8: 0.2}
"""Furthest that a confidence or probability may be from the eager unit's."""

STALE_SECONDS = 3600.0
"""After so long nobody writes to a partial file any more: a program takes well under a second."""


def make_private(folder: Path) -> None:
    """Make a folder that only this user can put code into, which this process will run.

    A group may, where the folder was there before: orchestrators give a volume to one of its own.

    Raises:
        OSError: it cannot be written, or it, or a folder that it is in, is somebody else's.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_safe(folder, stat.S_IWOTH):
        raise PermissionError(f"others than this user can change {folder}")
    with tempfile.TemporaryFile(dir=folder):
        pass


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
        safe = [program for program in programs if _is_safe(program)]
        for program in safe:
            (self.folder / program.name).symlink_to(program.resolve())
        if len(safe) < len(programs):
            said = "%d of %d programs in %s are not used: others than this user can change them"
            log.warning(said, len(programs) - len(safe), len(programs), filled)
        return len(safe)


def outputs_of(program: Program, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a program gives for a unit's inputs, as the unit would; until this thread's next run."""
    for buffer, tensor in zip(program.buffers, inputs, strict=True):
        if isinstance(buffer, Tensor):
            buffer.copy_(tensor)
        else:
            np.copyto(buffer, array_of(tensor))
    return [x if isinstance(x, Tensor) else tensor_of(x) for x in program.run()]


@torch.inference_mode()
def disagreement(
    program: Program, unit: Unit, inputs: Sequence[Tensor], dtype: torch.dtype
) -> float | None:
    """How far a confidence or probability is from the eager unit's, where that is too far.

    Args:
        program: gives what the unit gives, or should.
        unit: eager.
        inputs: of both.
        dtype: their numerics, which say how far is too far.
    """
    _, expected, _ = unit(*inputs)
    _, said, _ = outputs_of(program, inputs)
    off = float((said.cpu() - expected.cpu()).abs().max())
    return None if off <= TOLERANCE[dtype] else off  # NaN is too far


@torch.inference_mode()
def share_of_eager(
    program: Program,
    unit: Unit,
    inputs: Sequence[Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """A program's time as a share of the eager unit's, by runs of both in turns.

    What else runs slows both. Timed alone beside three busy threads, 9 to 13 of 24 programs seemed
    slower than eager units that had been timed before; in turns at most two did, and none by
    `thread_time`.

    Args:
        program: gives what the unit gives.
        unit: eager.
        inputs: of both.
        clock: `thread_time` leaves out the wait for Python's lock, which eager units need after
            every operation: by other clocks a lone image's share may be a third of what it is.
    """
    shares: list[float] = []
    spent = 0.0
    while len(shares) < WARM_UP_RUNS and spent < WARM_UP_SECONDS:
        began = clock()
        outputs_of(program, inputs)
        between = clock()
        unit(*inputs)[1].cpu()  # a card has finished only then
        ended = clock()
        shares.append((between - began) / (ended - between))
        spent += ended - began
    return statistics.median(shares)


def _is_safe(file: Path, writing: int = stat.S_IWGRP | stat.S_IWOTH) -> bool:
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
