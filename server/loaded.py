"""One bundle, from its folder to an engine that answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from model.bundle import Bundle, BundleError
from model.numerics import name_of
from model.policy import OperatingPoint, Policy
from server.capturing import card_capturing
from server.compiling import Compiling, Use, UseTeam
from server.costs import CostTable, batch_sizes
from server.decode import Decoder
from server.engine import Engine
from server.errors import NotReady
from server.memory import Program
from server.merging import keep_kernels
from server.metrics import EngineMetrics, Metrics
from server.numerics import choose_dtype
from server.overload import Level, OverloadController
from server.runner import Runner, Seconds
from server.scheduler import Scheduler
from server.settings import Settings, workers_at_once

log = logging.getLogger("offramp")

HTTP_SECONDS = 0.0006
"""What a request takes beside its stages: 0.25 ms on a processor of 2024, 0.75 on one of 2021."""


class Loaded:
    """One bundle being served: loaded at once, ready when warm, closed at the end.

    Args:
        bundle: calibrated.
        settings: the server's.
        device: where it runs.
        max_accuracy_loss: that the operating point in force may cost.
        metrics: the server's, which tell of this bundle once it leads.
        pool: decodes large images.
        draining: whether the server drains.

    Raises:
        ValueError: no operating point is as careful as it is asked to be.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        device: torch.device,
        max_accuracy_loss: float,
        metrics: Metrics,
        pool: ThreadPoolExecutor,
        draining: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self.bundle = bundle
        self.policy = bundle.calibrated
        self.point: OperatingPoint = self.policy.point_for(max_accuracy_loss)
        self.device = device
        self.dtype = choose_dtype(settings.dtype, bundle, device)
        fewest, self._workers = (
            workers_at_once(settings.workers, settings.threads) if device.type == "cpu" else (1, 1)
        )
        self._http_seconds = HTTP_SECONDS if fewest < self._workers else 0.0
        self._metrics = metrics
        self._draining = draining
        description = bundle.description
        self.decoder = Decoder(description.preprocess, settings.max_pixels, pool, metrics)
        macs = [e.macs for e in description.exits]
        self._engine_metrics = EngineMetrics(metrics, description.name, macs)
        self._engine_metrics.in_force(self._controller().level)
        self.warm = False
        """Whether the engine answers."""
        self.uncaptured = False
        """Whether it runs without the CUDA graphs that were tried, since they failed."""
        self._engine: Engine | None = None
        self._runner: Runner | None = None
        self._compiling: Compiling | None = None

    def lead(self) -> None:
        """Have the server's metrics tell of this bundle, and no longer of the one before."""
        description = self.bundle.description
        self._metrics.describe(
            len(description.exits),
            {
                "model": description.name,
                "version": description.version,
                "architecture": description.architecture,
                "device": self.device.type,
                "dtype": name_of(self.dtype),
                "weights_sha256": description.weights_sha256[:12],
            },
        )
        self._engine_metrics.lead()

    def warm_up(self, compiled: bool = False) -> None:
        """Run every stage and batch size once and start the engine; takes seconds.

        Args:
            compiled: whether, with COMPILE=auto too, to wait until the compiled stages are there
                that there can be, and on a card to fail without CUDA graphs.

        Raises:
            BundleError: it computes no numbers, or COMPILE is require and it cannot be compiled.
            RuntimeError: it cannot be run here, or not be captured though it has to.
            Draining: the server drains, and it ended early.
        """
        max_batch = self.settings.max_batch
        runner = self._runner = Runner(self.bundle, self.device, self.dtype)
        eager = runner.warm_up(batch_sizes(max_batch), draining=self._draining)
        costs = CostTable(eager)
        scheduler = Scheduler(
            costs,
            self._controller(),
            max_batch,
            self._workers,
            self._http_seconds,
            self.settings.max_queue,
        )
        engine = self._engine = Engine(
            scheduler, runner, self._engine_metrics, self.settings.audit_rate
        )
        self._use_programs(
            runner,
            partial(_hand_over_program, engine, runner, eager, max_batch),
            partial(_hand_over_team, engine, runner),
            compiled or self.settings.compile == "require",
        )
        engine.start()
        compiling = self._compiling
        if compiled and compiling and self.settings.compile == "auto":
            compiling.wait()
        if self.device.type == "cuda" and not self._draining():
            # cuDNN plans every shape anew in each thread: the first request would wait for it.
            engine.prepare(lambda: runner.warm_up(batch_sizes(max_batch)))
        self.warm = True
        engine.use(self._controller())  # another point may have been put in force since it was made
        engine.call(lambda: self._say_ready(costs))  # after the programs handed over before

    def _use_programs(self, runner: Runner, use: Use, use_team: UseTeam, required: bool) -> None:
        """Hand over the compiled stages there are, and have the others compiled.

        Args:
            runner: of the eager stages.
            use: takes a program.
            use_team: takes a team.
            required: whether to fail on a card where they cannot be captured.
        """
        if self.settings.compile == "off" or self._draining():
            return
        if self.device.type == "cuda":
            keep_kernels(self.settings.cache_dir.expanduser() / "kernels")
            capturing = card_capturing(self.bundle, runner.units, self.dtype)
            captured = capturing.use_all(self.settings.max_batch, use, required, self._draining)
            self.uncaptured = not captured
            return
        compiling = self._compiling = self._begin_compiling(runner)
        if compiling is None or self._draining():  # since then, when there was nothing to stop
            return
        if self.settings.compile == "auto":
            compiling.compile_in_background(use, use_team)
            return
        try:
            self._compile_all(compiling, use)
            compiling.use_teams(use_team)
            compiling.use_teams_later(use_team)
        except RuntimeError as error:
            if not self._draining():  # then the compiler was stopped, by this process or with it
                raise BundleError(str(error)) from error
            log.info("compiling ends early: the server drains")

    def _begin_compiling(self, runner: Runner) -> Compiling | None:
        """None where programs can be kept nowhere, not even for as long as the server lives."""
        try:
            return Compiling(self.settings, self.bundle, runner.units, self.dtype, self._workers)
        except OSError as error:
            if self.settings.compile == "require":
                said = f"COMPILE is require, but no folder can hold compiled stages: {error}"
                raise BundleError(said) from error
            said = "stages stay uncompiled, so answers take longer: no folder can hold them: %s"
            log.warning(said, error)
            return None

    def _compile_all(self, compiling: Compiling, use: Use) -> None:
        compiling.use_ready(use)
        for line in compiling.compile():
            log.info(line)
            if self._draining():
                compiling.stop()
        compiling.use_ready(use)
        if not compiling.complete:
            raise RuntimeError("COMPILE is require, but not every stage could be compiled")

    def _say_ready(self, costs: CostTable) -> None:
        if self._draining():
            return
        taken = [1e3 * costs.seconds(k, 1, alone=True) for k in range(1, costs.stages + 1)]
        log.info(
            "ready: %s %s on %s in %s, one image takes %.1f ms to the first exit, %.1f to the last",
            self.bundle.description.name,
            self.bundle.description.version,
            self.device.type,
            name_of(self.dtype),
            taken[0],
            sum(taken),
        )

    @property
    def version(self) -> str:
        """Of the bundle."""
        return self.bundle.description.version

    @property
    def engine(self) -> Engine:
        """The running engine.

        Raises:
            NotReady: still warming up, or closed.
        """
        if not self.warm or self._engine is None:
            raise NotReady
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.warm and self.engine.alive

    @property
    def alive(self) -> bool:
        """Whether the engine loop turns, or has yet to start."""
        return not self.warm or self.engine.alive

    @property
    def broken(self) -> bool:
        """Whether its device computes nothing any more."""
        return self.warm and self.engine.broken

    @property
    def backlog_seconds(self) -> float:
        """Until everything accepted so far is expected to have been answered."""
        return self.engine.scheduler.backlog_seconds if self.warm else 1.0

    @property
    def bent(self) -> bool:
        """Whether overload makes answers shallower now."""
        return self.warm and self.engine.scheduler.controller.bent

    def use(self, max_accuracy_loss: float) -> None:
        """Put another operating point in force.

        Raises:
            ValueError: none is as careful.
        """
        self.point = self.policy.point_for(max_accuracy_loss)
        if self._engine:
            self._engine.use(self._controller())
        else:
            self._engine_metrics.in_force(self._controller().level)

    def stop_compiling(self) -> None:
        """End what compiles, so that a drain does not wait for it."""
        if self._compiling:
            self._compiling.stop()

    def close(self) -> None:
        """End the engine once everything sent to it has been answered; any number of times."""
        engine, self._engine, self.warm = self._engine, None, False
        if engine:
            engine.stop()
        compiling, self._compiling = self._compiling, None
        if compiling:
            compiling.close()

    def let_go(self) -> Iterator[None]:
        """Let go of a closed bundle's programs bit by bit: each holds Python's lock for 10 ms as it
        goes, and all at once would hold up who answers meanwhile.
        """
        runner, self._runner = self._runner, None
        if runner:
            yield from runner.let_go()

    def _controller(self) -> OverloadController:
        levels = ladder(self.policy, self.point, self.settings)
        return OverloadController(levels, self.settings.default_deadline_seconds)


def _hand_over_program(
    engine: Engine,
    runner: Runner,
    eager: Seconds,
    max_batch: int,
    stage: int,
    size: int,
    program: Program,
    share: float,
) -> None:
    """Between two batches. The last four arguments are those of `Use`."""

    def take() -> None:
        runner.use_program(stage, size, program, share * eager[stage][size])
        engine.scheduler.costs.replace(stage, runner.expected(stage, max_batch))

    engine.call(take)


def _hand_over_team(
    engine: Engine, runner: Runner, stage: int, program: Program, share: float
) -> None:
    """Between two batches. The last three arguments are those of `UseTeam`."""

    def take() -> None:
        runner.use_team(stage, program)
        engine.scheduler.costs.use_team(stage, share)

    engine.call(take)


def ladder(policy: Policy, peace: OperatingPoint, settings: Settings) -> list[Level]:
    """The levels that overload may move along, each cheaper than the one before it.

    They go from peace to the most lossy one allowed.
    """
    points = [peace]
    for point in policy.operating_points:
        loss = point.max_accuracy_loss
        beyond = peace.max_accuracy_loss < loss <= settings.overload_accuracy_loss
        if beyond and point.budget is None and point.mean_macs < points[-1].mean_macs:
            points.append(point)
    levels = [Level(p.max_accuracy_loss, p.thresholds) for p in points]
    if settings.overload_first_exit:
        levels.append(Level(1.0, (0.0,) * (policy.exits - 1)))
    return levels
