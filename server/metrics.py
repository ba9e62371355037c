"""Every metric the server exports."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import prometheus_client
import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from model.policy import Reason
from server.errors import IMAGE_FAULTS, Overloaded, Unavailable, every_error
from server.overload import Level
from server.threads import ThreadClocks

VERSION = "0.1.0"
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PARTS = ("event_loop", "engine")
"""Of the server, by the threads that do it."""
PHASES = ("decode", "queue", "encode")
CLASSIFY = ("/classify", "/classify/batch")
INFER = "/v2/infer"
"""What requests of the Open Inference Protocol count as, whatever model their path names."""
ROUTES = (*CLASSIFY, INFER)
"""That answer images."""
REQUEST_CODES = tuple(
    map(str, (200, 400, 401, 403, 404, 405, 408, 413, 422, 429, 431, 499, 500, 503, 504))
)
REFUSALS = ("queue_full", "bodies_full", "not_in_time")
SERVER_FAULTS = tuple(
    kind.code
    for kind in every_error()
    if (kind.status >= 500 or kind is Overloaded) and kind is not Unavailable
)
"""Codes of the errors with a status of 5xx or 429."""
MODEL_INFO = ("model", "version", "architecture", "device", "dtype", "weights_sha256")
"""What is told of a bundle."""
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SECONDS_BUCKETS = (
    # Millisecond work: a stage takes 0.1 to 10 ms, an answer 1 to 100 ms.
    *(0.00025, 0.0005, 0.001, 0.0015, 0.0025, 0.004, 0.006, 0.01, 0.015, 0.025),
    *(0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)


MANY = 512
"""Observations that wait to be made known: those of some sixty answers."""


def route_of(path: str) -> str | None:
    """The route that answers images at this path, if one does."""
    if path in CLASSIFY:
        return path
    return INFER if path.startswith("/v2/models/") and path.endswith("/infer") else None


class Metrics:
    """All metric families in a registry of their own, with every series present from the start.

    Args:
        max_batch: the largest stage batch.
        deadline_seconds: the default deadline, made a bucket boundary.
        on_cuda: whether there is a card, whose memory is told.
    """

    def __init__(
        self, max_batch: int, deadline_seconds: float | None = None, on_cuda: bool = False
    ) -> None:
        self.leading: EngineMetrics | None = None
        """Whose gauges are told."""
        self._exits = 0
        prometheus_client.disable_created_metrics()  # a second series beside every counter
        self.registry = CollectorRegistry()
        self.ledger = Ledger(self.registry)  # first, since scrapes ask in this order
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.threads = ThreadClocks(self.registry, PARTS)
        boundary = {deadline_seconds} if deadline_seconds else set()
        seconds = sorted({*SECONDS_BUCKETS, *boundary})
        batches = sorted({1, *(2**i for i in range(1, 11) if 2**i < max_batch), max_batch})
        self._requests(seconds)
        self._answers(seconds)
        self._engine(seconds, batches)
        self._device(on_cuda)
        self._policy()
        self._information()
        self._create_series()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"offramp_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"offramp_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        return Histogram(f"offramp_{name}", text, labels, registry=self.registry, buckets=buckets)

    def _requests(self, seconds: Sequence[float]) -> None:
        self.requests = self._counter(
            "requests_total", "Requests to the routes that answer images", ["route", "code"]
        )
        self.request_seconds = self._histogram(
            "request_duration_seconds",
            "First byte to last byte of the requests that were answered (200)",
            ["route"],
            seconds,
        )
        self.phase_seconds = self._histogram(
            "phase_duration_seconds", "Time of one phase of a request", ["phase"], seconds
        )
        self.refused = self._counter("refused_total", "Images refused for load", ["reason"])
        self.rejected_images = self._counter(
            "rejected_images_total", "Images that could not be used", ["code"]
        )
        self.failed_images = self._counter(
            "failed_images_total",
            "Images that failed on the server's side (5xx or 429), sent alone or in a batch",
            ["code"],
        )
        self.deadlines = self._counter(
            "deadlines_total",
            "Images with a deadline that were not refused, by outcome",
            ["outcome"],
        )
        self.in_flight = self._gauge("in_flight_jobs", "Images accepted and not yet answered")
        self.max_queue = self._gauge("max_queue_jobs", "Most images that may be in flight")
        self.ready = self._gauge("ready", "1 where requests should be sent here, as /readyz says")

    def _answers(self, seconds: Sequence[float]) -> None:
        self.answers = self._counter(
            "answers_total", "Answers, by exit and reason", ["model", "exit", "reason"]
        )
        self.answer_seconds = self._histogram(
            "answer_duration_seconds", "Arrival to answer", ["model", "exit"], seconds
        )
        self.confidence = self._histogram(
            "confidence",
            "Calibrated confidence at every exit reached",
            ["model", "exit"],
            CONFIDENCE_BUCKETS,
        )
        self.macs = self._counter(
            "macs_total",
            "Multiply-accumulates spent on answers, and what full depth would have taken",
            ["model", "kind"],
        )
        self.audited = self._counter(
            "audited_total",
            "Early answers of the policy in force, run to the last exit, by whether it agreed",
            ["model", "exit", "agreed"],
        )

    def _engine(self, seconds: Sequence[float], batches: Sequence[float]) -> None:
        self.stage_seconds = self._histogram(
            "stage_duration_seconds", "One stage batch on the device", ["model", "stage"], seconds
        )
        self.stage_cpu_seconds = self._counter(
            "stage_cpu_seconds_total",
            "Processor time of the workers' threads in stage batches; what the batches took beyond "
            "it they waited, for a core or for the card",
            ["model", "stage"],
        )
        self.batch_size = self._histogram(
            "batch_size", "Images in one stage batch", ["model", "stage"], batches
        )
        self.queue_jobs = self._gauge(
            "queue_jobs", "Images waiting for a stage", ["model", "stage"]
        )
        self.workers = self._gauge("workers", "Stage batches that may run at the same time")

    def _device(self, on_cuda: bool) -> None:
        memory = self._gauge("gpu_memory_bytes", "Of the card; all zero without one", ["kind"])
        functions = {
            "allocated": torch.cuda.memory_allocated,
            "reserved": torch.cuda.memory_reserved,
            "used": lambda: _card_memory()[0],
            "total": lambda: _card_memory()[1],
        }
        for kind, function in functions.items():
            child = memory.labels(kind)
            if on_cuda:
                child.set_function(function)

    def _policy(self) -> None:
        self.operating_point = self._gauge(
            "operating_point",
            "Accuracy loss that the operating point in force may cost; 1 for first exit only",
            ["model"],
        )
        self.policy_threshold = self._gauge(
            "policy_threshold", "Confidence that suffices at an exit", ["model", "exit"]
        )

    def _information(self) -> None:
        self.model_info = self._gauge("model_info", "The bundle that is served", MODEL_INFO)
        build = {
            "version": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        self._gauge("build_info", "What is running", list(build)).labels(**build).set(1)

    def _create_series(self) -> None:
        # Looked up here once, since labels() takes longer than counting does.
        self._request_seconds = {route: self.request_seconds.labels(route) for route in ROUTES}
        self._requests_by_code = {
            (route, int(code)): self.requests.labels(route, code)
            for route in ROUTES
            for code in REQUEST_CODES
        }
        for phase in PHASES:
            self.phase_seconds.labels(phase)
        for reason in REFUSALS:
            self.refused.labels(reason)
        for kind in IMAGE_FAULTS:
            self.rejected_images.labels(kind.code)
        for code in SERVER_FAULTS:
            self.failed_images.labels(code)
        self._met_deadlines = self.deadlines.labels("met")
        self.missed_deadlines = self.deadlines.labels("missed")

    def describe(self, exits: int, info: Mapping[str, str]) -> None:
        """Tell of a bundle from now on, with every series of its exits present.

        Args:
            exits: how many its network has.
            info: by the names in `MODEL_INFO`.
        """
        self.model_info.clear()
        self.model_info.labels(**info).set(1)
        model = info["model"]
        for kind in ("spent", "full"):
            self.macs.labels(model, kind)
        self.operating_point.labels(model)
        for exit in range(1, exits + 1):
            self._create_exit(model, str(exit))
        for exit in range(exits + 1, self._exits + 1):  # which the bundle before had
            for family in (self.policy_threshold, self.queue_jobs):
                family.remove(model, str(exit))
        self._exits = exits

    def tell_of_none(self) -> None:
        """No bundle is served from now on, until one leads."""
        self.leading = None
        self.model_info.clear()
        self.workers.set_function(lambda: 0)

    def _create_exit(self, model: str, exit: str) -> None:
        for reason in Reason:
            self.answers.labels(model, exit, reason.value)
        for family in (self.answer_seconds, self.confidence, self.policy_threshold):
            family.labels(model, exit)
        for family in (self.stage_seconds, self.batch_size, self.queue_jobs):
            family.labels(model, exit)
        self.stage_cpu_seconds.labels(model, exit)
        for agreed in ("true", "false"):
            self.audited.labels(model, exit, agreed)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request to one of the routes got its response, so long after its first byte.

        Only an answer's time is observed: a refusal is quick, and would pass for a fast one.
        """
        known = self._requests_by_code.get((route, status))
        (known or self.requests.labels(route, str(status))).inc()
        if status == 200:
            self._request_seconds[route].observe(seconds)

    def answered_by(self, deadline: float, now: float) -> None:
        """An image that its client wants an answer to by a deadline has it now."""
        (self._met_deadlines if now <= deadline else self.missed_deadlines).inc()

    def failed(self, code: object, images: int = 1) -> None:
        """So many images failed with this code; a no-op where that was their client's fault."""
        if code in SERVER_FAULTS:
            self.failed_images.labels(code).inc(images)

    def render(self) -> bytes:
        """The exposition that Prometheus scrapes."""
        return prometheus_client.generate_latest(self.registry)


def _card_memory() -> tuple[int, int]:
    """Bytes used by everybody, bytes in total."""
    free, total = torch.cuda.mem_get_info()
    return total - free, total


class Ledger(Collector):
    """Observations that are made known later, many at once, and before any scrape.

    Between two stages each takes several times as long, since stages leave nothing else in the
    processor's caches.

    Args:
        registry: what is scraped.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waiting: deque[tuple[Callable[[float], None], float]] = deque()
        registry.register(self)

    def __call__(self, observe: Callable[[float], None], amount: float = 1) -> None:
        """Note what is to be observed; from any thread."""
        self._waiting.append((observe, amount))

    def settle(self, least: int = 1) -> None:
        """Observe what was noted, if that is so much; in any thread."""
        if len(self._waiting) < least:
            return
        with suppress(IndexError):
            while True:
                observe, amount = self._waiting.popleft()
                observe(amount)

    def describe(self) -> Iterable[Metric]:
        """No family of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Nothing; what is collected after it is up to date."""
        self.settle()
        return ()


class EngineMetrics:
    """What the engine records, with every child looked up once.

    Args:
        metrics: the families.
        model: the bundle's name.
        macs: of the network up to each exit, shallow to deep.
    """

    def __init__(self, metrics: Metrics, model: str, macs: Sequence[int]) -> None:
        exits = range(1, len(macs) + 1)
        self._metrics = metrics
        self._note = metrics.ledger
        self._macs = macs
        self._model = model
        self._level: Level | None = None
        self._queued: Callable[[], Sequence[int]] | None = None
        self._workers: Callable[[], int] | None = None
        self._spent = metrics.macs.labels(model, "spent")
        self._full = metrics.macs.labels(model, "full")
        self._queue = metrics.phase_seconds.labels("queue")
        self._missed = metrics.missed_deadlines
        self._confidence = [metrics.confidence.labels(model, str(k)) for k in exits]
        self._answer_seconds = [metrics.answer_seconds.labels(model, str(k)) for k in exits]
        self._stage_seconds = [metrics.stage_seconds.labels(model, str(k)) for k in exits]
        self._stage_cpu_seconds = [metrics.stage_cpu_seconds.labels(model, str(k)) for k in exits]
        self._batch_size = [metrics.batch_size.labels(model, str(k)) for k in exits]
        self._answers = {
            (k, reason): metrics.answers.labels(model, str(k), reason.value)
            for k in exits
            for reason in Reason
        }

    def works_here(self) -> None:
        """The calling thread is one of the engine's."""
        self._metrics.threads.watch("engine")

    def ends_here(self) -> None:
        """The calling thread was, and is about to end."""
        self._metrics.threads.release("engine")

    def ran(self, stage: int, jobs: int, seconds: float, cpu_seconds: float) -> None:
        """A stage batch ran."""
        self._note(self._stage_seconds[stage - 1].observe, seconds)
        self._note(self._stage_cpu_seconds[stage - 1].inc, cpu_seconds)
        self._note(self._batch_size[stage - 1].observe, jobs)

    def saw(self, exit: int, confidence: float) -> None:
        """A job passed an exit."""
        self._note(self._confidence[exit - 1].observe, confidence)

    def answered(self, exit: int, reason: Reason, seconds: float, queue_seconds: float) -> None:
        """A job was answered, so many seconds after it arrived."""
        self._note(self._answers[exit, reason].inc)
        self._note(self._answer_seconds[exit - 1].observe, seconds)
        self._note(self._queue.observe, queue_seconds)
        self._note(self._spent.inc, self._macs[exit - 1])
        self._note(self._full.inc, self._macs[-1])

    def missed_deadline(self) -> None:
        """A job was given up, which had no answer by its deadline."""
        self._note(self._missed.inc)

    def settle(self) -> None:
        """Make known what has been recorded, once it is much; for when nobody waits."""
        self._note.settle(MANY)

    def refused(self, reason: str) -> None:
        """A job was refused for load."""
        self._metrics.refused.labels(reason).inc()

    def audited(self, exit: int, agreed: bool) -> None:
        """An early answer was run to the last exit."""
        labels = (self._model, str(exit), "true" if agreed else "false")
        self._metrics.audited.labels(*labels).inc()

    def watch(self, queued: Callable[[], Sequence[int]], workers: Callable[[], int]) -> None:
        """Have every scrape ask how many jobs wait for each stage, and how many workers there are.

        Right whatever happens to a job, and free for it.
        """
        self._queued, self._workers = queued, workers
        self._tell_queues()

    def in_force(self, level: Level) -> None:
        """The operating point that answers are given under."""
        if level is not self._level:
            self._level = level
            self._tell_level()

    def lead(self) -> None:
        """Have the gauges tell of this engine, and no longer of the one before."""
        self._metrics.leading = self
        self._tell_level()
        self._tell_queues()

    def _tell_level(self) -> None:
        metrics, model, level = self._metrics, self._model, self._level
        if metrics.leading is not self or level is None:
            return
        metrics.operating_point.labels(model).set(level.max_accuracy_loss)
        for exit, threshold in enumerate((*level.thresholds, 0.0), start=1):
            metrics.policy_threshold.labels(model, str(exit)).set(threshold)

    def _tell_queues(self) -> None:
        metrics, queued, workers = self._metrics, self._queued, self._workers
        if metrics.leading is not self or queued is None or workers is None:
            return
        for stage in range(1, len(self._macs) + 1):
            waiting = partial(_element, queued, stage - 1)
            metrics.queue_jobs.labels(self._model, str(stage)).set_function(waiting)
        metrics.workers.set_function(workers)


def _element(sequence: Callable[[], Sequence[int]], place: int) -> int:
    return sequence()[place]
