"""What the engine's runner makes of a device, against the plain network run eagerly."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploy.bench.whole import Whole
from model.bundle import Bundle, load_servable, save_bundle, save_policy
from model.network import build
from model.numerics import name_of
from model.policy import NEVER, Calibration, OperatingPoint, Policy
from model.preprocess import Preprocess
from model.table import markdown_table
from server.capturing import card_capturing
from server.costs import batch_sizes
from server.graphs import Captured, CudaCapture
from server.memory import Program
from server.rows import Inputs, Row
from server.runner import Runner
from server.staging import card_staging
from server.units import example_inputs

LATENCY_BATCHES = (1, 8)
ROUNDS = 3
WARM_UP_RUNS = 10
SIDE = 32
SHARES = (0.52, 0.23, 0.25, 0.0)
"""Of images that leave at each exit of the first default bundle, where a point may be lost."""
GOALS = {"exit 1": "< 0.15", "all exits": "< 0.4", "staged / one graph": "<= 1.08"}
"""For a single image, on an H200."""
SPEED_UP_GOAL = ">= 3"

Clock = Callable[[], float]
Pass = Callable[[], object]
"""Takes one batch of images in."""
Finish = Callable[[], None]
"""Waits for the device."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured."""

    what: str
    batch: int | None
    value: float
    unit: str
    p99: float | None = None
    goal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


class Ready:
    """A bundle's runner with everything captured that a server on the same device would capture.

    Args:
        bundle: what is run.
        device: where.
        dtype: numerics.
        max_batch: the largest batch.
    """

    def __init__(
        self, bundle: Bundle, device: torch.device, dtype: torch.dtype, max_batch: int
    ) -> None:
        self.bundle, self.device, self.dtype, self.max_batch = bundle, device, dtype, max_batch
        self.programs: dict[tuple[int, int], Captured] = {}
        began = time.perf_counter()
        self.runner = Runner(bundle, device, dtype)
        eager = self.runner.warm_up(batch_sizes(max_batch))
        warm = time.perf_counter()

        def use(stage: int, size: int, program: Program, share: float) -> None:
            assert isinstance(program, Captured)
            self.programs[stage, size] = program
            self.runner.use_program(stage, size, program, share * eager[stage][size])

        if device.type == "cuda":
            capturing = card_capturing(bundle, self.runner.units, dtype)
            capturing.use_all(max_batch, use, required=True)
        self.warm_up_seconds, self.capture_seconds = warm - began, time.perf_counter() - warm

    def unit(self, stage: int, size: int) -> nn.Module:
        """What runs there, captured or not."""
        program = self.programs.get((stage, size))
        return program.unit if program else self.runner.units[stage - 1]

    @property
    def ways(self) -> Counter[str]:
        """How many stages are captured in which way."""
        return Counter(program.way for program in self.programs.values())

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def images(self, n: int) -> list[np.ndarray]:
        """Random ones on the host, as a decoder gives them."""
        side = self.bundle.description.preprocess.size
        return list(np.random.default_rng(n).integers(0, 256, (n, side, side, 3), np.uint8))

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images as one batch on the host, where a card can fetch them without being waited for."""
        batch = torch.from_numpy(np.stack(images))
        return batch.pin_memory() if self.device.type == "cuda" else batch


def random_bundle(folder: Path, architecture: str, width: int, classes: int) -> Bundle:
    """A servable bundle of a network that has learned nothing, whose speed is another's."""
    net = build(architecture, classes, width=width).eval()
    description = save_bundle(
        folder,
        net,
        name=architecture,
        version="random",
        architecture=architecture,
        arguments={"width": width},
        classes=tuple(map(str, range(classes))),
        preprocess=Preprocess(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        training={},
    )
    full = OperatingPoint(
        max_accuracy_loss=0.0,
        thresholds=(NEVER,) * (net.exits - 1),
        certified=False,
        measured_accuracy_loss=0.0,
        mean_macs=1.0,
        exit_shares=(*(0.0,) * (net.exits - 1), 1.0),
    )
    policy = Policy(
        weights_sha256=description.weights_sha256,
        method="none",
        delta=1.0,
        calibration_images=1,
        dtypes=("float32", "bfloat16"),
        calibrations=(Calibration(temperature=1.0),) * net.exits,
        operating_points=(full,),
    )
    save_policy(folder, policy)
    return load_servable(folder)


def shares_of(bundle: Bundle) -> tuple[float, ...]:
    """How many images leave at each exit where a point may be lost; a guess for a random bundle."""
    shares = bundle.calibrated.point_for(0.01).exit_shares
    guess = len(shares) == len(SHARES) and shares[-1] == 1.0
    return SHARES if guess else shares


@torch.inference_mode()
def measure(
    ready: Ready, batches: Sequence[int], seconds: float, clock: Clock = time.perf_counter
) -> Iterator[Figure]:
    """Everything, a figure at a time.

    Args:
        batches: sizes that the device is saturated with.
        seconds: length of each measurement.
    """
    yield Figure("warming up", ready.max_batch, ready.warm_up_seconds, "s")
    yield Figure("capturing", ready.max_batch, ready.capture_seconds, "s")
    yield Figure("graphs", ready.max_batch, len(ready.programs), "")
    for way, n in ready.ways.most_common():
        yield Figure(f"graphs, {way}", ready.max_batch, n, "")
    for n in (n for n in LATENCY_BATCHES if n <= ready.max_batch):
        yield from _latencies(ready, n, seconds, clock)
    best: dict[str, float] = defaultdict(float)
    for n in batches:
        _say(f"batches of {n}")
        rates = images_per_second(_saturating(ready, n), n, seconds, clock, ready.finish)
        for what, rate in rates.items():
            best[what] = max(best[what], rate)
            yield Figure(what, n, rate, "images/s")
        yield from _speed_ups(rates, n)
    yield from _speed_ups(best, None)


def _latencies(ready: Ready, n: int, seconds: float, clock: Clock) -> Iterator[Figure]:
    _say(f"latency of {n}")
    goals = GOALS if n == 1 else {}
    taken = milliseconds(_passes(ready, n), seconds, clock)
    medians = {what: statistics.median(times) for what, times in taken.items()}
    for what, times in taken.items():
        p99 = sorted(times)[99 * len(times) // 100]
        yield Figure(what, n, medians[what], "ms", p99, goals.get(what, ""))
    ratios = {"staged / one graph": "all exits", "replays / one graph": "all exits, replays only"}
    for what, staged in ratios.items():
        ratio = medians[staged] / medians["all exits, one graph"]
        yield Figure(what, n, ratio, "", goal=GOALS.get(what, ""))


def _speed_ups(rates: Mapping[str, float], n: int | None) -> Iterator[Figure]:
    """None for the best of every size."""
    full, eager = rates["full depth"], rates["eager network"]
    goal = SPEED_UP_GOAL if n is None else ""
    yield Figure("full depth / eager network", n, full / eager, "", goal=goal)
    yield Figure("with exits / eager network", n, rates["with exits"] / eager, "")
    yield Figure("with exits / full depth", n, rates["with exits"] / full, "")


# --- passes ----------------------------------------------------------------------------------


def _passes(ready: Ready, n: int) -> dict[str, Pass]:
    """What latencies are of; each ends with numbers on the host."""
    runner, images = ready.runner, ready.images(n)
    stages = [_repeated(ready, k, n) for k in range(1, runner.exits + 1)]

    def replays() -> None:
        for stage in stages:
            stage()
        ready.finish()

    return {
        "exit 1": lambda: _use(runner.run(1, images).confidences),
        "all exits": lambda: full_depth(runner, images),
        "all exits, replays only": replays,
        "all exits, one graph": _whole(ready, n),
    }


def full_depth(runner: Runner, images: Sequence[np.ndarray]) -> None:
    """All stages as the engine runs them, where nobody leaves."""
    inputs: Inputs = images
    for stage in range(1, runner.exits + 1):
        output = runner.run(stage, inputs)
        inputs = runner.keep(output, range(len(images))) if stage < runner.exits else ()


class Leaving:
    """Images that leave at each exit by given shares, the others joining others in full batches.

    Args:
        runner: runs them.
        images: that come in with each call, a batch full.
        shares: of all images, that leave at each exit.
    """

    def __init__(
        self, runner: Runner, images: Sequence[np.ndarray], shares: Sequence[float]
    ) -> None:
        self._runner = runner
        self._images = images
        left = [1 - sum(shares[:k]) for k in range(len(shares) + 1)]
        self._stays = [b / a if a > 1e-9 else 0.0 for a, b in itertools.pairwise(left)]
        self._waiting: dict[int, list[Row]] = defaultdict(list)
        self._chance = random.Random(0)
        self.ran: dict[int, int] = defaultdict(int)
        """Images by stage."""

    def __call__(self) -> None:
        self._run(1, self._images)
        for stage in range(2, self._runner.exits + 1):
            waiting = self._waiting[stage]
            if len(waiting) >= len(self._images):
                self._waiting[stage] = waiting[len(self._images) :]
                self._run(stage, waiting[: len(self._images)])

    def _run(self, stage: int, inputs: Inputs) -> None:
        output = self._runner.run(stage, inputs)
        self.ran[stage] += len(inputs)
        if stage < self._runner.exits:
            stays = self._stays[stage - 1]
            staying = [i for i in range(len(inputs)) if self._chance.random() < stays]
            self._waiting[stage + 1] += self._runner.keep(output, staying)


def _saturating(ready: Ready, n: int) -> dict[str, Pass]:
    """What rates are of."""
    runner, images = ready.runner, ready.images(n)
    net = plain_network(ready)
    preprocess = ready.bundle.description.preprocess
    pixels = ready.pixels(images)
    x = preprocess.normalise(pixels.to(ready.device), ready.dtype)
    stages = [_repeated(ready, k, n) for k in range(1, runner.exits + 1)]

    def eager_with_copies() -> None:
        sent = pixels.to(ready.device, non_blocking=True)
        net(preprocess.normalise(sent, ready.dtype)).softmax(1).cpu()

    return {
        "full depth": lambda: full_depth(runner, images),
        "full depth, replays only": lambda: _use([stage() for stage in stages]),
        "with exits": Leaving(runner, images, shares_of(ready.bundle)),
        "eager network": lambda: _use(net(x)),
        "eager network with copies": eager_with_copies,
    }


def plain_network(ready: Ready) -> Callable[[Tensor], Tensor]:
    """The backbone and its last head, as a peer has them: in the same numerics, channels last."""
    net = load_servable(ready.bundle.path).net.to(ready.device, ready.dtype)
    return net.to(memory_format=torch.channels_last).eval().deepest  # type: ignore[call-overload]


def _repeated(ready: Ready, stage: int, n: int) -> Callable[[], object]:
    """A stage over inputs that stay where they are, not waited for."""
    program = ready.programs.get((stage, n))
    if program:
        return program.replay
    unit = ready.unit(stage, n)
    inputs = example_inputs(ready.runner.units, ready.bundle, n)[stage - 1]
    return lambda: unit(*inputs)


class _Last(Whole):
    """All units as one that says what the last one does."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `Unit`; what other exits said is in place of features and log-probabilities, so that
        all is made."""
        *others, last = super().forward(pixels)
        return others[0], last, others[-1]


def _whole(ready: Ready, n: int) -> Callable[[], object]:
    """All stages and heads at once, from pixels on the host to numbers there."""
    whole = _Last([ready.unit(k, n) for k in range(1, ready.runner.exits + 1)])
    pixels = ready.pixels(ready.images(n))
    if ready.device.type != "cuda":
        return lambda: whole(pixels)
    staging = card_staging()
    said = staging.lock((n, 1 + len(ready.bundle.description.classes)), torch.float32)
    return Captured(whole, [pixels], said, CudaCapture(), staging.wait).run


# --- timing ----------------------------------------------------------------------------------


def milliseconds(
    passes: Mapping[str, Pass], seconds: float, clock: Clock
) -> dict[str, list[float]]:
    """Every run's, in turns so that a busy machine disturbs all alike.

    Args:
        seconds: for each.
    """
    for run in list(passes.values()) * WARM_UP_RUNS:
        run()
    taken: dict[str, list[float]] = {what: [] for what in passes}
    end = clock() + seconds * len(passes)
    while clock() < end:
        for what, run in passes.items():
            began = clock()
            run()
            taken[what].append(1e3 * (clock() - began))
    return taken


def images_per_second(
    passes: Mapping[str, Pass], n: int, seconds: float, clock: Clock, finish: Finish
) -> dict[str, float]:
    """The median of some rounds in turns, each pass by itself for its share of the time.

    Args:
        n: images that a pass takes in.
        seconds: for each.
    """
    for run in list(passes.values()) * WARM_UP_RUNS:
        run()
    finish()
    rates: dict[str, list[float]] = {what: [] for what in passes}
    for _ in range(ROUNDS):
        for what, run in passes.items():
            began, runs = clock(), 0
            while clock() < began + seconds / ROUNDS:
                run()
                runs += 1
            finish()
            rates[what].append(runs * n / (clock() - began))
    return {what: statistics.median(seen) for what, seen in rates.items()}


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    head = ["what", "batch", "median", "p99", "", "goal"]
    cells = [
        [
            f.what,
            f.batch or "best",
            _number(f.value, f.unit),
            "" if f.p99 is None else _number(f.p99, f.unit),
            f.unit,
            f.goal,
        ]
        for f in figures
    ]
    return markdown_table(head, cells)


def title(ready: Ready) -> str:
    """What was measured on what."""
    on = torch.cuda.get_device_name() if ready.device.type == "cuda" else "cpu"
    name = ready.bundle.description.name
    return f"{name} in {name_of(ready.dtype)} on {on}, torch {torch.__version__}"


def _number(value: float, unit: str) -> str:
    whole = unit == "images/s" or isinstance(value, int)
    return f"{value:.0f}" if whole else f"{value:.3f}"


def _use(_: object) -> None:
    """What is given is let go."""


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
