"""One image in flight, the batches it runs in, and why it may not run at all; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import Any

from model.policy import Rule


class JobState(Enum):
    """Where a job is."""

    WAITING = auto()
    RUNNING = auto()
    AUDITED = auto()
    """Answered already."""
    DONE = auto()


@dataclass(slots=True, eq=False)
class Job:
    """One image in flight."""

    rule: Rule
    arrived: float
    """When its first byte came, in seconds of the engine's clock."""
    deadline: float = math.inf
    """When its answer must be ready, on the same clock."""
    bends: bool = True
    """Whether overload may answer it from a shallower exit than its rule would."""
    late_at: float = -math.inf
    """When the event loop began its request, if that took long."""
    payload: Any = None
    """The engine's own; never looked at here."""
    stage: int = 1
    """The stage it waits for or is in; it has passed all exits before."""
    state: JobState = JobState.WAITING
    queued: float = 0.0
    number: int = field(default_factory=count().__next__)

    @property
    def urgency(self) -> tuple[float, int]:
        """Sorts jobs by deadline, then by arrival."""
        return self.deadline, self.number

    @property
    def done(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state is JobState.DONE


@dataclass(frozen=True, slots=True)
class Batch:
    """Jobs that run one stage together."""

    stage: int
    jobs: tuple[Job, ...]
    seconds: float
    """How long it is expected to take."""
    audit: bool = False
    alone: bool = False
    """Whether it is a single live job and nothing else runs, so that it may have every core."""
    probe: bool = False
    """Whether it runs to see how fast the machine is."""

    @property
    def deadline(self) -> float:
        """The earliest deadline among its jobs, which are in order of urgency."""
        return self.jobs[0].deadline


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now: answer the overdue jobs, then run the batch."""

    batch: Batch | None
    overdue: tuple[Job, ...]
    """Jobs that must be answered now; those at stage 1 have nothing to be answered with."""


class Refused(Exception):
    """A job that cannot be in time even at the first exit.

    Args:
        retry_after_seconds: until one that allows as long is expected to be in time.
    """

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__()
        self.retry_after_seconds = retry_after_seconds


class TooLate(Exception):
    """A job that could not be in time even if it were alone."""
