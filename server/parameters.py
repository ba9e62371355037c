"""What a request may ask for beside its image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import InvalidParameter

LONGEST_REMEMBERED = 256
"""Bytes of a query string; most clients send one of a few short ones over and over."""
LONGEST_DEADLINE_MS = 3_600_000
"""That a request may ask for."""


class Parameters(BaseModel):
    """Query parameters of /classify and /classify/batch."""

    model_config = ConfigDict(extra="forbid")

    top_k: int = Field(
        5, ge=1, le=10_000, description="how many labels to return, best first", examples=[3]
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="confidence that suffices at any exit, instead of the policy",
        examples=[0.9],
    )
    max_accuracy_loss: float | None = Field(
        None,
        ge=0,
        le=1,
        description="accuracy that early exits may cost this request, as a share: the largest "
        "operating point within it replaces the one in force",
        examples=[0.02],
    )
    min_exit: int = Field(1, ge=1, description="the shallowest exit that may answer", examples=[2])
    max_exit: int | None = Field(None, ge=1, description="the deepest exit to run", examples=[3])
    deadline_ms: float | None = Field(
        None,
        gt=0,
        le=LONGEST_DEADLINE_MS,
        description="milliseconds from the first byte to the answer",
        examples=[500],
    )
    explain: bool = Field(
        False, description="add `seen`: what every exit on the way said", examples=[True]
    )

    def allowed_seconds(self, default_deadline_ms: float | None) -> float:
        """From the first byte to the answer; infinite where there is no deadline.

        Args:
            default_deadline_ms: of requests that name none, if they have one.
        """
        milliseconds = self.deadline_ms or default_deadline_ms
        return math.inf if milliseconds is None else milliseconds / 1e3

    @property
    def bends(self) -> bool:
        """Whether overload may answer shallower: not where the request says what suffices."""
        return self.threshold is None and self.max_accuracy_loss is None


def invalid(errors: Sequence[Any]) -> InvalidParameter:
    """What is said of a request that FastAPI found invalid, from the first of its errors."""
    where = errors[0]["loc"]
    if where == ("body",) or errors[0]["type"] == "json_invalid":
        return InvalidParameter("the body must be a JSON object, and Content-Type say so")
    return InvalidParameter.of(where[1:], _fault(errors[0]))


def _fault(error: Any) -> str:
    """What is wrong with a parameter, in words that a client knows."""
    return "there is no such parameter" if error["type"] == "extra_forbidden" else error["msg"]


def parameters_from(query: bytes) -> Parameters:
    """The parameters that a query string names; of one named twice, the last.

    Raises:
        InvalidParameter: an unknown one, or a bad value.
    """
    return _remembered(query) if len(query) <= LONGEST_REMEMBERED else _parse(query)


def _parse(query: bytes) -> Parameters:
    return parameters_of(dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True)))


def parameters_of(named: Mapping[str, Any]) -> Parameters:
    """The parameters of these names.

    Raises:
        InvalidParameter: an unknown one, or a bad value.
    """
    try:
        return Parameters.model_validate(named)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidParameter.of(first["loc"], _fault(first)) from None


_remembered = lru_cache(maxsize=1024)(_parse)
