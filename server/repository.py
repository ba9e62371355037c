"""The model repository extension of the Open Inference Protocol: a bundle takes another's place."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field

from server import errors, openapi, uploads
from server.dependencies import AdminRoute, Served_
from server.errors import InvalidParameter
from server.openapi import LOCKED
from server.served import Served, State
from server.tensors import Message, parsed

admin = APIRouter(route_class=AdminRoute, responses=openapi.failures(*LOCKED))
CHANGED: openapi.Responses = {200: openapi.good("It is done; the body is empty")}
FAULTS = (*openapi.BODY_FAULTS, errors.NotFound, InvalidParameter)
Name_ = Annotated[str, Path(description="the bundle's name", examples=["default"])]


class IndexBody(BaseModel):
    """A bundle that there is."""

    name: str = Field(description="the bundle's name")
    version: str = Field(description="the bundle's version")
    state: State = Field(description="whether it answers, warms up, or neither")
    reason: str = Field(description="why it does not answer; empty if it does")


class Asked(Message):
    """What these requests may hold."""

    ready: bool = Field(False, description="of the index, only what answers")
    parameters: dict[str, Any] = Field(
        {}, description="none to load; to unload `unload_dependents`, of which there are none"
    )


@admin.post(
    "/v2/repository/index",
    response_model=list[IndexBody],
    responses={
        200: openapi.good("The one bundle that there is"),
        **openapi.failures(*openapi.BODY_FAULTS, InvalidParameter),
    },
    openapi_extra=openapi.shown_to_administrators(
        "curl -X POST -H 'Authorization: Bearer TOKEN' localhost:8000/v2/repository/index"
    ),
    summary="V2: the bundle, and whether it answers",
)
async def post_index(request: Request, served: Served_) -> list[IndexBody]:
    """The body may be empty, or say `{"ready": true}` for what answers alone."""
    sent = await _read(request, served)
    one = _indexed(served)
    return [one] if one.state == "READY" or not sent.ready else []


@admin.post(
    "/v2/repository/models/{model}/load",
    responses={
        **CHANGED,
        **openapi.failures(*FAULTS, errors.UnusableBundle, *openapi.UNAVAILABLE),
    },
    response_class=Response,
    openapi_extra=openapi.shown_to_administrators(
        "curl -X POST -H 'Authorization: Bearer TOKEN' "
        "localhost:8000/v2/repository/models/default/load"
    ),
    summary="V2: serve the bundle that is in the folder now",
)
async def post_load(model: Name_, request: Request, served: Served_) -> Response:
    """The response comes when the new bundle answers; until then the former does, and where the new
    one cannot be served it goes on. Compiling what the cache lacks takes longest.
    """
    await _read(request, served)
    await served.load(model)
    return Response()


@admin.post(
    "/v2/repository/models/{model}/unload",
    responses={**CHANGED, **openapi.failures(*FAULTS, *openapi.UNAVAILABLE)},
    response_class=Response,
    openapi_extra=openapi.shown_to_administrators(
        "curl -X POST -H 'Authorization: Bearer TOKEN' "
        "localhost:8000/v2/repository/models/default/unload"
    ),
    summary="V2: serve no bundle until one is loaded",
)
async def post_unload(model: Name_, request: Request, served: Served_) -> Response:
    """What was let in before is answered; what comes after gets 503 `not_ready`, and so does
    `/readyz`.
    """
    await _read(request, served, {"unload_dependents"})
    await served.unload(model)
    return Response()


async def _read(request: Request, served: Served, known: Container[str] = ()) -> Asked:
    body = await uploads.read_whole(request, math.inf, served.metrics)
    sent = parsed(Asked, body or b"{}")
    for name in sent.parameters:
        if name not in known:
            raise InvalidParameter.of((name,), "there is no such parameter")
    return sent


def _indexed(served: Served) -> IndexBody:
    state, reason = served.state
    return IndexBody(name=served.name, version=served.loaded.version, state=state, reason=reason)
