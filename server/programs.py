"""Compiled units on disk: which file holds which, whether it may be trusted, how fast it is."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import model
from model.bundle import Bundle
from server.runner import WARM_UP_RUNS, Program
from server.units import Unit

log = logging.getLogger("offramp")

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1, torch.int8: 0.2}
"""Furthest that a confidence or probability may be from the eager unit's."""

PARTIAL = ".partial"
"""How the names of files end that are still being written."""
STALE_SECONDS = 3600.0
"""After so long nobody writes to such a file any more: a program takes well under a second."""


class Programs:
    """The compiled units of one bundle, on one kind of machine, in a folder of the cache.

    Args:
        cache: its folder; a temporary one takes its place where it cannot be written.
        bundle: a calibrated bundle.
        dtype: the units' numerics.
        threads: inside one operation.
    """

    def __init__(self, cache: Path, bundle: Bundle, dtype: torch.dtype, threads: int) -> None:
        self.cache = cache.expanduser()
        self.folder = self.cache / _digest(bundle, dtype, threads)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            _make_private(self.folder)
        except OSError as error:
            log.info("%s cannot be written (%s); compiling anew at each start", cache, error)
            self._temporary = tempfile.TemporaryDirectory(prefix="offramp-")
            self.cache = Path(self._temporary.name)
            self.folder = self.cache / self.folder.name
            _make_private(self.folder)

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


def put_in_place(file: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place and moved there at once, so that it is never half one.

    Args:
        file: its place.
        write: writes to the path that it is given, which no other process is given: process ids
            would be alike in containers that share the folder.
    """
    partial = file.with_name(f"{file.stem}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


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
    _, said, _ = program(inputs)
    off = float((said - expected).abs().max())
    return None if off <= TOLERANCE[dtype] else off  # NaN is too far


@torch.inference_mode()
def share_of_eager(
    program: Program,
    unit: Unit,
    inputs: Sequence[Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """A program's time as a share of the eager unit's, by runs of both in turns.

    What else runs slows both. Timed alone beside busy threads, 7 of 24 programs seemed slower than
    eager units that had been timed before the first request; in turns at most one did.
    """
    shares = []
    for _ in range(WARM_UP_RUNS):
        began = clock()
        program(inputs)[1].cpu()  # a card has finished only then
        between = clock()
        unit(*inputs)[1].cpu()
        shares.append((between - began) / (clock() - between))
    return statistics.median(shares)


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can put code into, which this process will run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _digest(bundle: Bundle, dtype: torch.dtype, threads: int) -> str:
    """Names everything that a compiled unit depends on."""
    policy, description = bundle.policy, bundle.description
    assert policy is not None
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
