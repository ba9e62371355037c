"""Brings compiled programs into a running server, as they become ready."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.bundle import Bundle
from model.numerics import name_of
from server.agreement import disagreement, outputs_of, share_of_eager
from server.compile import READY, order
from server.compiled import CompiledUnit, openvino
from server.memory import Program
from server.programs import Programs
from server.settings import Settings
from server.teams import WORTH_ITS_CORES, share_of_one, team_sizes
from server.units import Unit, example_inputs

log = logging.getLogger("offramp")

PAUSE_SECONDS = 15.0
"""Until stages without a team are timed again; twice as long each time…"""
LONGEST_PAUSE_SECONDS = 3600.0
"""…up to this."""

Use = Callable[[int, int, Program, float], None]
"""Takes a stage, a batch size, the program for both and its time as a share of the eager one's."""
UseTeam = Callable[[int, Program, float], None]
"""Takes a stage, a lone image's program in which several threads compute, and its time as a share
of one thread's."""


class Compiling:
    """The compiled units of one server, on CPU.

    Args:
        settings: the server's.
        bundle: what is served.
        units: the eager units, shallow to deep, that programs must agree with.
        dtype: their numerics.
        workers: how many threads run programs at the same time.
        load: a program from its file, its numerics, and for how many workers and threads of each.
        closing: set when nothing more is to be handed over.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        units: list[Unit],
        dtype: torch.dtype,
        workers: int = 1,
        load: Callable[[Path, torch.dtype, int, int], Program] = CompiledUnit,
        closing: threading.Event | None = None,
    ) -> None:
        self._settings = settings
        self._bundle = bundle
        self._units = units
        self._dtype = dtype
        self._workers = workers
        self._programs = Programs(settings.cache_dir, bundle, dtype, settings.threads)
        self._load = load
        # The thread that calls computes by itself, unless it has others do so.
        self._clock = time.thread_time if settings.threads == 1 else time.perf_counter
        self._used: dict[tuple[int, int], Program] = {}
        self._refused: set[tuple[int, int]] = set()
        most = settings.threads * workers
        self._teams = {
            stage: team_sizes(settings.threads, most) for stage in range(1, len(units) + 1)
        }
        """By stage, how many threads to try; none any more where a team was handed over."""
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._closing = closing or threading.Event()
        self._beginning = threading.Lock()
        self._tried = threading.Event()
        """Set once every program was handed over that can be."""

    def use_ready(self, use: Use) -> None:
        """Hand over every program in the cache that has not been handed over yet."""
        for size in order(self._settings.max_batch):
            inputs: list[tuple[Tensor, ...]] = []
            for stage in range(1, len(self._units) + 1):
                known = self._used.keys() | self._refused
                wanted = (stage, size) not in known and not self._closing.is_set()
                if wanted and self._programs.file(stage, size).exists():
                    inputs = inputs or self._examples(size)
                    self._use(stage, size, inputs[stage - 1], use)

    def use_teams(self, use: UseTeam) -> None:
        """Hand over each stage's fastest team for a single image, where one thread is slower.

        To be called when nothing is left to compile, which would take the cores that teams need.
        """
        said = []
        examples = self._examples(1) if self._lacks_teams else []
        for stage, inputs in enumerate(examples, start=1):
            if self._closing.is_set():
                return
            if (stage, 1) not in self._used:
                continue
            measured = self._measured_teams(stage, inputs)
            share, threads, team = min(measured, default=(1.0, 1, None))
            if team and share <= WORTH_ITS_CORES:
                use(stage, team, share)
                self._teams[stage] = []
                said.append(f"{threads} in stage {stage} ({share:.0%} of one thread's time)")
        if said:
            log.info("an image that is alone has threads: %s", ", ".join(said))

    def use_teams_later(self, use: UseTeam) -> None:
        """Time teams again and again, in the background, until each stage has one.

        A team needs all cores at once: whatever else ran hides what it gains, and where one server
        starts others often do.
        """
        self._begin_thread(lambda: self._use_teams_later(use))

    @property
    def complete(self) -> bool:
        """Whether every program has been handed over."""
        return len(self._used) == self._wanted

    @property
    def _settled(self) -> bool:
        """Whether no program is left to compile: those that disagreed would be no better later."""
        return len(self._used) + len(self._refused) == self._wanted

    @property
    def _wanted(self) -> int:
        return len(self._units) * len(order(self._settings.max_batch))

    def compile(self) -> Iterator[str]:
        """Compile what the cache lacks, in a process of its own; none where it lacks nothing.

        Yields:
            A line for each program.

        Raises:
            RuntimeError: there is no compiler, or it failed.
        """
        process = None if self._settled else self._begin(self._command())
        if process is None:
            return
        with process:
            assert process.stdout is not None
            last = ""
            for line in process.stdout:
                if line.startswith(READY):
                    yield line.strip()
                elif line.strip():
                    last = line.strip()
        if process.returncode and not self._closing.is_set():
            raise RuntimeError(last.removeprefix("error: ") or "the compiler failed")

    def compile_in_background(self, use: Use, use_team: UseTeam) -> None:
        """Hand over what the cache holds, then compile what it lacks and hand that over, without
        being waited for; failing is a warning."""

        def work() -> None:
            try:
                self.use_ready(use)
                for line in self.compile():
                    log.debug(line)
                    self.use_ready(use)
            except Exception as error:
                log.warning("stages stay uncompiled, so answers take longer: %s", error)
                return
            finally:
                self._tried.set()
            if self.complete:
                log.info("every stage is compiled")
            if self._settled:
                self.use_teams(use_team)
                self._use_teams_later(use_team)

        self._begin_thread(work)

    def wait(self) -> None:
        """Until what `compile_in_background` began has handed over every program that there can be,
        or was stopped."""
        self._tried.wait()

    def stop(self) -> None:
        """End the compiler and hand over nothing more."""
        self._tried.set()  # nobody is to wait for more
        with self._beginning:
            self._closing.set()
            if self._process and self._process.poll() is None:
                self._process.terminate()

    def close(self) -> None:
        """Stop, wait for that, and remove what is temporary."""
        self.stop()
        if self._thread:
            self._thread.join()
        self._programs.close()

    def _begin_thread(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="compiling", daemon=True)
        self._thread.start()

    @property
    def _lacks_teams(self) -> bool:
        return any(sizes for stage, sizes in self._teams.items() if (stage, 1) in self._used)

    def _use_teams_later(self, use: UseTeam) -> None:
        pause = PAUSE_SECONDS
        while self._lacks_teams and not self._closing.wait(pause):
            self.use_teams(use)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _begin(self, command: list[str]) -> subprocess.Popen[str] | None:
        """The compiler; None where it was stopped before it began."""
        with self._beginning:
            if self._closing.is_set():
                return None
            # Ctrl-C would end it before this process knows that it drains. It begins in the same
            # group, where a signal can meet it before it has left for its own.
            former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,  # read as it comes, or a full pipe would hold it
                    text=True,
                    process_group=0,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, former)
            return self._process

    def _command(self) -> list[str]:
        openvino()
        command = [sys.executable, "-m", "server.compile", "--bundle", str(self._settings.bundle)]
        command += ["--dtype", name_of(self._dtype)]
        command += ["--threads", str(self._settings.threads)]
        command += ["--max-batch", str(self._settings.max_batch)]
        return [*command, "--cache-dir", str(self._programs.cache)]

    def _examples(self, size: int) -> list[tuple[Tensor, ...]]:
        return example_inputs(self._units, self._bundle, size)

    def _measured_teams(
        self, stage: int, inputs: tuple[Tensor, ...]
    ) -> Iterator[tuple[float, int, Program]]:
        """Of each team: its time as a share of one thread's, how many threads, its program."""
        one, file = self._used[stage, 1], self._programs.file(stage, 1)
        for size in tuple(self._teams[stage]):
            if self._closing.is_set():
                return
            try:
                team = self._load(file, self._dtype, 1, size)
                off = disagreement(team, self._units[stage - 1], inputs, self._dtype)
                if off is None:
                    outputs_of(one, inputs)  # so that both run on the same
                    yield share_of_one(team, one), size, team
                    continue
                fault = f"it differs from the eager stage by {off:.1e}"
            except Exception as error:
                fault = str(error)
            log.warning("%s cannot be used with %d threads (%s)", file, size, fault)
            self._teams[stage].remove(size)  # which would be no better later

    def _use(self, stage: int, size: int, inputs: tuple[Tensor, ...], use: Use) -> None:
        file, unit = self._programs.file(stage, size), self._units[stage - 1]
        try:
            program = self._load(file, self._dtype, self._workers, self._settings.threads)
            off = disagreement(program, unit, inputs, self._dtype)
        except (RuntimeError, OSError) as error:
            log.warning("%s cannot be used (%s); it is deleted and compiled anew", file, error)
            file.unlink(missing_ok=True)
            return
        if off is not None:
            log.warning("%s differs from the eager stage by %.1e; not used", file, off)
            self._refused.add((stage, size))
            return
        self._used[stage, size] = program
        use(stage, size, program, share_of_eager(program, unit, inputs, self._clock))
