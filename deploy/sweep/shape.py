"""The shape of a recording, as far as simulations and tables read it."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator

from server.protocol import LevelBody


class Engine(BaseModel):
    """What a scheduler decides with; older servers name no teams, and no workers or only those that
    were at work."""

    seconds: dict[int, dict[int, float]] = Field(min_length=1)
    ladder: list[LevelBody] = Field(min_length=1)
    max_batch: int
    workers: int = 1
    most_workers: int | None = None
    http_seconds: float = 0.0
    teams: dict[int, float] = {}


class Costs(BaseModel):
    """Seconds outside stages, and the capacity in images a second."""

    begin: float
    answer: float
    refuse: float
    batch: float
    full_depth_per_second: float = Field(gt=0)


class Measured(BaseModel):
    """What clients saw."""

    offered_per_second: float
    goodput_per_second: float
    in_time_share: float
    effective_accuracy: float | None
    latency_ms: dict[str, float]


class Requests(BaseModel):
    """A column for each figure, all of one length."""

    intended_ms: list[float] = Field(min_length=1)
    sent_ms: list[float]
    reason: list[str]

    @model_validator(mode="after")
    def _as_long_as_each_other(self) -> Self:
        if len({len(self.intended_ms), len(self.sent_ms), len(self.reason)}) > 1:
            raise ValueError("its columns differ in length")
        return self


class Load(BaseModel):
    """One load; older recordings neither say how long it was nor watched its moments."""

    kind: str
    load: float
    client_ms: float
    measured: Measured
    engine: Engine
    requests: Requests
    seconds: float | None = None
    moments: list[tuple[float, float]] = []


class Recording(BaseModel):
    """A sweep."""

    deadline_ms: float = Field(gt=0)
    cores: float = Field(gt=0)
    costs: Costs
    confidences: list[list[float]] = Field(min_length=1)
    right: list[list[bool]] | None = None
    rows: list[Load] = Field(min_length=1)
