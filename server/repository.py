"""From a bundle on disk to an engine that answers."""

from __future__ import annotations

import logging
import os

import torch

from model.bundle import Bundle, load_servable
from model.numerics import keep_float32_whole, name_of
from model.policy import OperatingPoint, Policy
from server.capturing import card_capturing
from server.compiled import openvino
from server.compiling import Compiling, Use, UseTeam
from server.costs import CostTable, batch_sizes
from server.decode import Decoder
from server.engine import Engine
from server.errors import Draining, NotReady
from server.memory import Program
from server.merging import keep_kernels
from server.metrics import EngineMetrics, Metrics
from server.numerics import choose_dtype
from server.overload import Level, OverloadController
from server.runner import Runner
from server.scheduler import Scheduler
from server.settings import Settings, workers_at_once
from server.tracing import tracer_from

log = logging.getLogger("offramp")

HTTP_SECONDS = 0.0006
"""What a request takes beside its stages: 0.25 ms on a processor of 2024, 0.75 on one of 2021."""


class Served:
    """One bundle being served: loaded at once, ready when warm, draining at the end.

    Raises:
        BundleError: the bundle cannot be served.
        ValueError: no operating point is as careful as the settings ask.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.bundle: Bundle = load_servable(settings.bundle)
        self.policy = self.bundle.calibrated
        self.point: OperatingPoint = self.policy.point_for(settings.max_accuracy_loss)
        self.device = device_of(settings.device)
        on_cpu = self.device.type == "cpu"
        if settings.compile == "require" and on_cpu:
            _need_compiler()
        fewest, self.workers = (
            workers_at_once(settings.workers, settings.threads) if on_cpu else (1, 1)
        )
        self._http_seconds = HTTP_SECONDS if fewest < self.workers else 0.0
        if on_cpu:
            torch.set_num_threads(settings.threads)
        else:
            keep_float32_whole()
        self.dtype = choose_dtype(settings.dtype, self.bundle, self.device)
        self.metrics = _metrics(settings, self.bundle, self.device, self.dtype)
        self.decoder = Decoder(
            self.bundle.description.preprocess,
            settings.max_pixels,
            settings.decode_threads,
            self.metrics,
        )
        self.missed_deadlines = self.metrics.deadlines.labels("missed")
        self.encode_seconds = self.metrics.phase_seconds.labels("encode")
        self.metrics.max_queue.set(settings.max_queue)
        self.in_flight = 0
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.tracer = tracer_from(os.environ)
        macs = [e.macs for e in self.bundle.description.exits]
        self._engine_metrics = EngineMetrics(self.metrics, macs)
        self._engine_metrics.in_force(self._controller().level)
        self.leaving = False
        """Told to end and no longer ready, though what comes is answered until it drains."""
        self.draining = False
        self._unable = False
        self._engine: Engine | None = None
        self._compiling: Compiling | None = None

    def warm_up(self) -> None:
        """Run every stage and batch size once and start the engine; takes seconds.

        With COMPILE=require it takes as long as compiling what the cache lacks.

        Raises:
            Draining: the server drains, and it ended early.
        """
        max_batch = self.settings.max_batch
        runner = Runner(self.bundle, self.device, self.dtype)
        eager = runner.warm_up(batch_sizes(max_batch), draining=lambda: self.draining)
        costs = CostTable(eager)
        scheduler = Scheduler(
            costs, self._controller(), max_batch, self.workers, self._http_seconds
        )
        engine = Engine(scheduler, runner, self._engine_metrics, self.settings.audit_rate)

        def use(stage: int, size: int, program: Program, share: float) -> None:
            def take() -> None:
                runner.use_program(stage, size, program, share * eager[stage][size])
                costs.replace(stage, runner.expected(stage, max_batch))

            engine.call(take)

        def use_team(stage: int, program: Program, share: float) -> None:
            def take() -> None:
                runner.use_team(stage, program)
                costs.use_team(stage, share)

            engine.call(take)

        self._use_programs(runner, use, use_team)
        engine.start()
        if self.device.type == "cuda" and not self.draining:
            # cuDNN plans every shape anew in each thread: the first request would wait for it.
            engine.prepare(lambda: runner.warm_up(batch_sizes(max_batch)))
        self._engine = engine
        engine.use(self._controller())  # another point may have been put in force since it was made
        engine.call(lambda: self._say_ready(costs))  # after the programs handed over before

    def _use_programs(self, runner: Runner, use: Use, use_team: UseTeam) -> None:
        """Hand over the compiled stages there are, and have the others compiled."""
        if self.settings.compile == "off" or self.draining:
            return
        if self.device.type == "cuda":
            keep_kernels(self.settings.cache_dir.expanduser() / "kernels")
            capturing = card_capturing(self.bundle, runner.units, self.dtype, self.device)
            required = self.settings.compile == "require"
            capturing.use_all(self.settings.max_batch, use, required, lambda: self.draining)
            return
        compiling = self._compiling = Compiling(
            self.settings, self.bundle, runner.units, self.dtype, self.workers
        )
        if self.draining:  # since then, when there was nothing to stop
            return
        if self.settings.compile == "auto":
            compiling.compile_in_background(use, use_team)
            return
        try:
            self._compile_all(compiling, use)
            compiling.use_teams(use_team)
            compiling.use_teams_later(use_team)
        except RuntimeError:
            if not self.draining:  # then the compiler was stopped, by this process or with it
                raise
            log.info("compiling ends early: the server drains")

    def _compile_all(self, compiling: Compiling, use: Use) -> None:
        compiling.use_ready(use)
        for line in compiling.compile():
            log.info(line)
            if self.draining:
                compiling.stop()
        compiling.use_ready(use)
        if not compiling.complete:
            raise RuntimeError("COMPILE is require, but not every stage could be compiled")

    def _say_ready(self, costs: CostTable) -> None:
        if self.draining:
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
    def engine(self) -> Engine:
        """The running engine.

        Raises:
            NotReady: still warming up.
            Draining: shutting down.
        """
        if self.draining:
            raise Draining
        if self._engine is None:
            raise NotReady
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return (
            self._engine is not None and self._engine.alive and not (self.leaving or self.draining)
        )

    @property
    def alive(self) -> bool:
        """Whether the engine loop turns, or has yet to start."""
        return not self.failed and (self._engine is None or self._engine.alive)

    @property
    def failed(self) -> bool:
        """Whether the network cannot run here, from the start or any more."""
        return self._unable or (self._engine is not None and self._engine.broken)

    def give_up(self) -> None:
        """The network could not be warmed up."""
        self._unable = True

    @property
    def backlog_seconds(self) -> float:
        """Until everything accepted so far is expected to have been answered."""
        return self._engine.scheduler.backlog_seconds if self._engine else 1.0

    @property
    def bent(self) -> bool:
        """Whether overload makes answers shallower now."""
        return self._engine is not None and self._engine.scheduler.controller.bent

    def use(self, point: OperatingPoint) -> None:
        """Put another operating point in force."""
        self.point = point
        if self._engine:
            self._engine.use(self._controller())
        else:
            self._engine_metrics.in_force(self._controller().level)

    def stop_compiling(self) -> None:
        """End what compiles, so that a drain does not wait for it."""
        if self._compiling:
            self._compiling.stop()

    def close(self) -> None:
        """End the engine once everything accepted has been answered."""
        if self._engine:
            self._engine.stop()
        if self._compiling:
            self._compiling.close()
        self.decoder.close()
        if self.tracer:
            self.tracer.close()

    def _controller(self) -> OverloadController:
        deadline_ms = self.settings.default_deadline_ms
        return OverloadController(
            ladder(self.policy, self.point, self.settings), deadline_ms and deadline_ms / 1e3
        )


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


def device_of(asked: str) -> torch.device:
    """Where the network runs, as the settings ask.

    Raises:
        ValueError: there is no card.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("DEVICE is cuda, but torch finds no CUDA card")
    return torch.device(asked)


def _need_compiler() -> None:
    try:
        openvino()
    except RuntimeError as error:
        raise ValueError(f"COMPILE is require, but {error}") from error


def _metrics(
    settings: Settings, bundle: Bundle, device: torch.device, dtype: torch.dtype
) -> Metrics:
    description = bundle.description
    deadline_ms = settings.default_deadline_ms
    return Metrics(
        description.name,
        description.version,
        len(description.exits),
        settings.max_batch,
        deadline_ms and deadline_ms / 1e3,
        {
            "architecture": description.architecture,
            "device": device.type,
            "dtype": name_of(dtype),
            "weights_sha256": description.weights_sha256[:12],
        },
    )
