"""The bundle that answers, what takes its place, and what outlasts it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Literal

import torch

from model.bundle import Bundle, BundleError, load_servable
from model.numerics import keep_float32_whole
from server.compiled import openvino
from server.crowd import Crowd
from server.decode import decoding_pool
from server.engine import Engine
from server.errors import Draining, NotFound, NotReady, UnusableBundle
from server.loaded import Loaded
from server.metrics import Metrics
from server.settings import Settings
from server.tracing import tracer_from
from server.waiting import STUCK, Waiting

log = logging.getLogger("offramp")

State = Literal["READY", "LOADING", "UNAVAILABLE"]
LETTING_GO_SECONDS = 0.05
"""Between two programs of a former bundle that are let go of."""


class Served:
    """What a server serves: one bundle at a time.

    Another one may take its place while requests are answered: it warms up beside the former, which
    answers until then, and after that what had been let in before.

    Raises:
        BundleError: the bundle cannot be served.
        ValueError: no operating point is as careful as the settings ask, or they ask for what this
            machine does not have.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = device_of(settings.device)
        on_cpu = self.device.type == "cpu"
        if settings.compile == "require" and on_cpu:
            _need_compiler()
        if on_cpu:
            torch.set_num_threads(settings.threads)
        else:
            keep_float32_whole()
        self.metrics = Metrics(
            settings.max_batch, settings.default_deadline_seconds, on_cuda=not on_cpu
        )
        self.leaving = False
        """Told to end and no longer ready, though what comes is answered until it drains."""
        self.draining = False
        self._unable = False
        self._max_accuracy_loss = settings.max_accuracy_loss
        self._held: set[Loaded] = set()
        """All that are not closed: the one that answers, former ones, and one that warms up."""
        self._pool = decoding_pool(settings.decode_threads)
        self.loaded = self._load(load_servable(settings.bundle))
        """The one that answers, or did until it was unloaded."""
        self.loaded.lead()
        self.unloaded = False
        """Whether no bundle answers, until one is loaded."""
        self._changing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self.encode_seconds = self.metrics.phase_seconds.labels("encode")
        self.metrics.max_queue.set(settings.max_queue)
        self.in_flight = 0
        self.waiting = Waiting()
        self.crowd = Crowd(max(1, settings.max_queue // 2))
        self.metrics.in_flight.set_function(lambda: self.in_flight)
        self.metrics.ready.set_function(lambda: self.ready)
        self.tracer = tracer_from(os.environ)

    def warm_up(self) -> None:
        """Have the first bundle answer; takes seconds.

        With COMPILE=require it takes as long as compiling what the cache lacks.

        Raises:
            Draining: the server drains, and it ended early.
        """
        self.loaded.warm_up()

    # --- what takes its place ----------------------------------------------------------------

    async def load(self, model: str) -> None:
        """Have the bundle that is in the folder now answer, in place of the one that does.

        Requests are answered meanwhile, and none is lost. If it cannot be served, nothing changes.

        Args:
            model: its name.

        Raises:
            NotFound: the server serves none of that name.
            UnusableBundle: it cannot be served.
            NotReady: the server still warms up, or is stuck.
            Draining: the server drains.
        """
        async with self._change_of(model):
            try:
                fresh = await asyncio.to_thread(self._in_the_folder)
                await self._bring_up(fresh)
            except (BundleError, ValueError) as error:
                raise UnusableBundle(str(error)) from error
            except RuntimeError as error:  # as torch says it, which is for the log
                log.warning("%s: the bundle in the folder cannot be run", model, exc_info=True)
                raise UnusableBundle(f"it cannot be run here: {_in_short(error)}") from error
            former, self.loaded, self.unloaded = self.loaded, fresh, False
            fresh.lead()
            log.info("%s: version %s answers, after %s", model, fresh.version, former.version)
            self._close_later(former)

    async def unload(self, model: str) -> None:
        """Have no bundle answer; those requests that were let in before are answered.

        Args:
            model: its name.

        Raises:
            NotFound: the server serves none of that name.
            NotReady: the server still warms up, or is stuck.
            Draining: the server drains.
        """
        async with self._change_of(model):
            if not self.unloaded:
                self.unloaded = True
                self.metrics.tell_of_none()
                log.info("%s: version %s is unloaded", model, self.loaded.version)
                self._close_later(self.loaded)

    @asynccontextmanager
    async def _change_of(self, model: str) -> AsyncIterator[None]:
        """One change at a time. Errors as for `unload`."""
        if model != self.name:
            raise NotFound("there is no such model")
        async with self._changing:
            if not self.unloaded:
                _ = self.engine  # or say why not
            yield

    def _load(self, bundle: Bundle) -> Loaded:
        loaded = Loaded(
            bundle,
            self.settings,
            self.device,
            self._max_accuracy_loss,
            self.metrics,
            self._pool,
            lambda: self.draining,
        )
        self._held.add(loaded)
        return loaded

    def _in_the_folder(self) -> Loaded:
        """The bundle that is in the folder now."""
        bundle = load_servable(self.settings.bundle)
        if bundle.description.name != self.name:
            now = f"{self.settings.bundle} holds the bundle {bundle.description.name} now"
            raise BundleError(f"{now}; put {self.name} back, or start a server for it")
        return self._load(bundle)

    async def _bring_up(self, fresh: Loaded) -> None:
        """Warm it up, and put the operating point in force that was meanwhile; or let go of it.

        Raises:
            BundleError: it cannot be served.
            RuntimeError: it cannot be run here.
            ValueError: it has no operating point as careful.
            Draining: the server drains.
        """
        try:
            await asyncio.to_thread(self._warm, fresh)
            fresh.use(self._max_accuracy_loss)
        except Exception:
            await asyncio.to_thread(self._close, fresh)
            self._later(_let_go(fresh))
            raise

    def _warm(self, fresh: Loaded) -> None:
        """Make it no slower than the one that answers until then, or close it."""
        try:
            fresh.warm_up(compiled=not (self.unloaded or self.loaded.uncaptured))
            if self.draining:
                raise Draining
        except BaseException:  # here, since a drain may have ended who waits for this thread
            self._close(fresh)
            raise

    def _close_later(self, former: Loaded) -> None:
        former.stop_compiling()
        self._later(self._drain(former))

    async def _drain(self, former: Loaded) -> None:
        """Close it, after as long as a drain gives to requests that were let in."""
        await asyncio.sleep(self.settings.drain_seconds)
        await asyncio.to_thread(self._close, former)
        self._later(_let_go(former))

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _close(self, loaded: Loaded) -> None:
        loaded.close()
        self._held.discard(loaded)

    # --- how it is ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of the bundle; the same however often it is replaced."""
        return self.loaded.bundle.description.name

    @property
    def state(self) -> tuple[State, str]:
        """As the Open Inference Protocol's repository names it, and why it is not ready."""
        if self.unloaded and self._changing.locked():
            return "LOADING", "another bundle warms up"
        if self.unloaded or self.draining or not self.alive:
            return "UNAVAILABLE", self.why_unready
        return ("READY", "") if self.ready else ("LOADING", self.why_unready)

    @property
    def why_unready(self) -> str:
        """In words, while it is not ready."""
        if self.leaving or self.draining:
            return "draining"
        if self.unloaded:
            return "no bundle is loaded"
        return "warming up" if self.alive else STUCK

    @property
    def engine(self) -> Engine:
        """The running engine.

        Raises:
            NotReady: still warming up, stuck, or nothing is loaded.
            Draining: shutting down.
        """
        if self.draining:
            raise Draining
        if self.unloaded:
            raise NotReady("no bundle is loaded")
        engine = self.loaded.engine
        self.waiting.check(engine)
        return engine

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        # In this order: a scrape asks from another thread, while an engine may just be closed.
        return not (self.unloaded or self.leaving or self.draining) and self.loaded.ready

    @property
    def alive(self) -> bool:
        """Whether the engine loop turns, or does not have to."""
        return not self.failed and (self.unloaded or self.loaded.alive)

    @property
    def failed(self) -> bool:
        """Whether the network cannot run here, from the start or any more."""
        return self._unable or self.loaded.broken

    def give_up(self) -> None:
        """The network could not be warmed up."""
        self._unable = True

    def use(self, max_accuracy_loss: float) -> None:
        """Put another operating point in force, for those bundles too that are loaded later.

        Raises:
            ValueError: none is as careful.
        """
        self.loaded.use(max_accuracy_loss)
        self._max_accuracy_loss = max_accuracy_loss

    # --- the end -----------------------------------------------------------------------------

    def stop_compiling(self) -> None:
        """End what compiles, so that a drain does not wait for it."""
        for loaded in tuple(self._held):
            loaded.stop_compiling()

    def close(self) -> None:
        """End every engine once everything sent to it has been answered."""
        self._unable = self.failed  # which the process's status says
        for loaded in tuple(self._held):
            self._close(loaded)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.tracer:
            self.tracer.close()


async def _let_go(closed: Loaded) -> None:
    """Of a bundle that is closed, bit by bit, once nobody else holds it."""
    await asyncio.sleep(LETTING_GO_SECONDS)  # the error that one failed with has left by then
    for _ in closed.let_go():
        await asyncio.sleep(LETTING_GO_SECONDS)
    del closed
    gc.collect()  # since its graphs refer to themselves


def _in_short(error: RuntimeError) -> str:
    """What it says, without what torch adds for programmers."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the card's memory is full"
    return str(error).partition("\n")[0]


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
