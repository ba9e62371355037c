"""What it costs to run a network stage by stage, against the whole at once."""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.bench.whole import Whole
from model.bundle import Bundle
from model.fold import Stage
from model.numerics import name_of, suits_cpu
from model.table import markdown_table
from server.compile import compile_unit, traceable_units
from server.compiled import CompiledUnit
from server.host import array_of
from server.programs import Programs
from server.units import Unit, example_inputs, make_units

WAYS = ("eager", "folded", "compiled")
WARM_UP_RUNS = 10

CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}

Clock = Callable[[], float]
Run = Callable[[Sequence[Any]], Sequence[Any]]
"""A unit's inputs to its outputs: tensors of an eager one, arrays of a compiled one."""
Pass = Callable[[], None]
"""Takes one batch through all stages, as far as numbers on the host."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to run the network, at one batch size."""

    way: str
    dtype: str
    batch: int
    staged_ms: float
    """Median of a batch, stage after stage with a look at each exit's confidences."""
    fused_ms: float
    """Median of a batch through all stages and heads at once."""

    @property
    def ratio(self) -> float:
        """What the stage borders cost."""
        return self.staged_ms / self.fused_ms

    def as_dict(self) -> dict[str, Any]:
        """The figures with their ratio."""
        return {**asdict(self), "ratio": self.ratio}


def measure(
    bundle: Bundle,
    batches: Sequence[int],
    threads: int,
    seconds: float,
    clock: Clock,
    cache: Path,
) -> list[Measured]:
    """Time every way, dtype and batch size, staged and fused in turns.

    Args:
        cache: where a server keeps compiled stages.
    """
    torch.set_num_threads(threads)
    rows = []
    cases = list(cases_of(bundle, batches))
    with tempfile.TemporaryDirectory(prefix="offramp-") as scratch:
        for i, (dtype, batch, way) in enumerate(cases, start=1):
            name = name_of(dtype)
            print(f"{i}/{len(cases)} {way} {name} batch {batch}", file=sys.stderr, flush=True)
            staged = staged_pass(bundle, way, dtype, batch, cache)
            fused = fused_pass(bundle, way, dtype, batch, Path(scratch))
            rows.append(Measured(way, name, batch, *medians(staged, fused, seconds, clock)))
    return rows


def cases_of(bundle: Bundle, batches: Sequence[int]) -> Iterator[tuple[torch.dtype, int, str]]:
    """Numerics, batch size and way; int8 where policy and processor have it, only real compiled."""
    yield from itertools.product((torch.float32, torch.bfloat16), batches, WAYS)
    if bundle.policy and bundle.policy.quantisation and suits_cpu(torch.int8):
        yield from itertools.product((torch.int8,), batches, ("compiled",))


def fused_pass(bundle: Bundle, way: str, dtype: torch.dtype, batch: int, folder: Path) -> Pass:
    """A pass over random images through all stages at once, compiled into `folder`."""
    units = _units(bundle, way, dtype)
    example = example_inputs(units, bundle, batch)[0]
    whole = _programs([Whole(units)], [example], way, dtype, [folder / f"{dtype}-{batch}.bin"])[0]
    pixels = _given(way, example)

    def fused() -> None:
        for said in whole(pixels):
            said[:, 0].tolist()

    return fused


def staged_pass(bundle: Bundle, way: str, dtype: torch.dtype, batch: int, cache: Path) -> Pass:
    """A pass over random images, stage after stage with a look at each exit's confidences.

    What a server with as many threads has compiled is only loaded.
    """
    units = _units(bundle, way, dtype)
    examples = example_inputs(units, bundle, batch)
    kept = Programs(cache, bundle, dtype, torch.get_num_threads())
    files = [kept.file(stage, batch) for stage in range(1, len(units) + 1)]
    programs = _programs(units, examples, way, dtype, files)
    kept.close()
    pixels = _given(way, examples[0])

    def staged() -> None:
        inputs = pixels
        for program in programs:
            features, said, log_probabilities = program(inputs)
            said[:, 0].tolist()
            inputs = (features, log_probabilities)

    return staged


def _units(bundle: Bundle, way: str, dtype: torch.dtype) -> list[Unit]:
    if way == "compiled":
        return traceable_units(bundle, dtype)
    units = make_units(bundle, torch.device("cpu"), dtype)
    if way == "eager":
        for k, unit in enumerate(units, start=1):
            stage = Stage(copy.deepcopy(bundle.net), k).to(dtype=dtype)
            unit.stage = stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return units


def _programs(
    modules: Sequence[nn.Module],
    examples: Sequence[tuple[Tensor, ...]],
    way: str,
    dtype: torch.dtype,
    files: Sequence[Path],
) -> list[Run]:
    if way != "compiled":
        return [_eager(module) for module in modules]
    for module, inputs, file in zip(modules, examples, files, strict=True):
        if not file.exists():
            compile_unit(module, inputs, dtype, file)
    threads = torch.get_num_threads()
    return [_compiled(CompiledUnit(file, dtype, threads=threads)) for file in files]


def _given(way: str, inputs: Sequence[Tensor]) -> Sequence[Any]:
    return [array_of(tensor) for tensor in inputs] if way == "compiled" else inputs


@torch.inference_mode()
def medians(staged: Pass, fused: Pass, seconds: float, clock: Clock) -> tuple[float, float]:
    """Milliseconds of each, run in turns so that a busy machine disturbs both alike."""
    for run in (staged, fused) * WARM_UP_RUNS:
        run()
    taken: dict[Pass, list[float]] = {staged: [], fused: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run, times in taken.items():
            began = clock()
            run()
            times.append(1e3 * (clock() - began))
    return statistics.median(taken[staged]), statistics.median(taken[fused])


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    head = ["numerics", "batch", "way", "staged, ms", "fused, ms", "staged / fused"]
    cells = [
        [r.dtype, r.batch, r.way, f"{r.staged_ms:.2f}", f"{r.fused_ms:.2f}", f"{r.ratio:.3f}"]
        for r in rows
    ]
    return markdown_table(head, cells)


def _compiled(program: CompiledUnit) -> Run:
    def run(arrays: Sequence[Any]) -> Sequence[Any]:
        for buffer, array in zip(program.buffers, arrays, strict=True):
            np.copyto(buffer, array)
        return program.run()

    return run


def _eager(module: nn.Module) -> Run:
    return lambda tensors: module(*tensors)
