"""The HTTP paths."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from server import uploads
from server.classify import Admission, admit, classify, classify_or_error
from server.engine import Seen
from server.errors import Forbidden, InvalidParameter, OfframpError, Unauthenticated
from server.metrics import CONTENT_TYPE
from server.middleware import Context
from server.protocol import (
    AnswerBody,
    BatchBody,
    ErrorBody,
    ExitBody,
    ModelBody,
    Parameters,
    PolicyBody,
    PolicyChange,
    event,
    seen_body,
)
from server.repository import Served

Query_ = Annotated[Parameters, Query()]
MAX_BATCH_IMAGES = 256


def served_of(request: Request) -> Served:
    """The bundle that this application serves."""
    return cast(Served, request.app.state.served)


def context_of(request: Request) -> Context:
    """What the middleware gave this request."""
    return cast(Context, request.state.context)


Served_ = Annotated[Served, Depends(served_of)]
Context_ = Annotated[Context, Depends(context_of)]


def check_key(request: Request) -> None:
    """Let a request through if it carries an API key, or none is configured.

    Raises:
        Unauthenticated: no key was sent.
        Forbidden: a wrong one was.
    """
    keys = served_of(request).settings.api_keys
    if not keys:
        return
    sent = _sent_key(request)
    if not any(_same(sent, key.get_secret_value()) for key in keys):
        raise Forbidden


def check_admin(request: Request) -> None:
    """Like `check_key`, for the admin token."""
    token = served_of(request).settings.admin_token
    if token is None or not _same(_sent_key(request), token.get_secret_value()):
        raise Forbidden


def _sent_key(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    sent = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not sent:
        raise Unauthenticated
    return sent


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


public = APIRouter()
protected = APIRouter(dependencies=[Depends(check_key)], responses=_errors(401, 403))
admin = APIRouter(dependencies=[Depends(check_admin)], responses=_errors(401, 403))

IMAGE = {"schema": {"type": "string", "format": "binary"}}
ONE_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": IMAGE,
            "image/*": IMAGE,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                }
            },
        },
    }
}
MANY_IMAGES = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "maxItems": MAX_BATCH_IMAGES,
                        }
                    },
                    "required": ["files"],
                }
            }
        },
    }
}


@protected.post(
    "/classify",
    response_model=AnswerBody,
    responses=_errors(400, 413, 422, 429, 500, 503, 504),
    openapi_extra=ONE_IMAGE,
    summary="Classify one image from the shallowest sufficient exit",
)
async def post_classify(
    request: Request, parameters: Query_, served: Served_, context: Context_
) -> Response:
    """The body is the encoded image, or `multipart/form-data` with one part `file`.

    With `Accept: text/event-stream` the response is a stream: one event `exit` for each exit
    reached, then one event `answer`, or `error`.
    """
    admission = admit(parameters, served)  # say no before the body is read
    data = await uploads.read_image(request)
    if "text/event-stream" in request.headers.get("accept", ""):
        events = _events(data, admission, served, context, request)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    body = await classify(data, admission, served, context, request.receive)
    return _encoded(body, served)


@protected.post(
    "/classify/batch",
    response_model=BatchBody,
    responses=_errors(400, 413, 422, 500, 503),
    openapi_extra=MANY_IMAGES,
    summary="Classify many images; a bad one hurts only its own entry",
)
async def post_batch(
    request: Request, parameters: Query_, served: Served_, context: Context_
) -> Response:
    """The body is `multipart/form-data` with one part `files` for each image."""
    admission = admit(parameters, served)
    images = await uploads.read_images(request, MAX_BATCH_IMAGES)
    results = await asyncio.gather(
        *(classify_or_error(data, admission, served, context) for data in images)
    )
    context.server_timing = ""
    context.fields = {"images": len(images)}
    return _encoded({"results": results}, served)


def _encoded(body: dict[str, Any], served: Served) -> Response:
    with served.encode_seconds.time():
        return Response(json.dumps(body), media_type="application/json")


async def _events(
    data: bytes, admission: Admission, served: Served, context: Context, request: Request
) -> AsyncIterator[bytes]:
    labels = served.bundle.description.classes
    passed: asyncio.Queue[Seen | None] = asyncio.Queue()
    work = asyncio.ensure_future(
        classify(data, admission, served, context, request.receive, passed.put_nowait)
    )
    work.add_done_callback(lambda _: passed.put_nowait(None))
    try:
        while (seen := await passed.get()) is not None:
            yield event("exit", seen_body(seen, labels))
        yield event("answer", await work)
    except OfframpError as error:
        context.fields["code"] = error.code
        said = {"error": str(error), "code": error.code, "request_id": context.request_id}
        yield event("error", said)
    finally:
        work.cancel()


@protected.get("/model", response_model=ModelBody, summary="Labels, exits, costs, accuracy")
async def get_model(served: Served_) -> ModelBody:
    """What is served, and what each exit costs and is worth."""
    description = served.bundle.description
    full = description.exits[-1].macs
    return ModelBody(
        name=description.name,
        version=description.version,
        architecture=description.architecture,
        weights_sha256=description.weights_sha256,
        device=served.device.type,
        dtype=str(served.dtype).removeprefix("torch."),
        input_size=description.preprocess.size,
        labels=list(description.classes),
        exits=[
            ExitBody(
                exit=e.exit,
                macs=e.macs,
                macs_share=e.macs / full,
                parameters=e.parameters,
                accuracy=e.accuracy,
            )
            for e in description.exits
        ],
    )


@protected.get("/policy", response_model=PolicyBody, summary="Operating points")
async def get_policy(served: Served_) -> PolicyBody:
    """The ladder of operating points, and the one in force."""
    policy = served.policy
    return PolicyBody(
        method=policy.method,
        delta=policy.delta,
        calibration_images=policy.calibration_images,
        operating_points=list(policy.operating_points),
        in_force=served.point,
        overloaded=served.bent,
    )


@admin.put(
    "/policy",
    response_model=PolicyBody,
    responses=_errors(422),
    summary="Put another operating point in force",
)
async def put_policy(change: PolicyChange, served: Served_) -> PolicyBody:
    """From the next request on, answers may lose at most this much accuracy."""
    try:
        served.use(served.policy.point_for(change.max_accuracy_loss))
    except ValueError as error:
        raise InvalidParameter(f"max_accuracy_loss: {error}") from None
    return await get_policy(served)


@public.get("/livez", summary="Whether the engine loop turns")
async def get_livez(served: Served_) -> Response:
    """200 while the process can do its work, 503 when it should be restarted."""
    return _health(served.alive, "live", "the engine loop is stuck")


@public.get("/readyz", summary="Whether requests are taken")
async def get_readyz(served: Served_) -> Response:
    """200 once every stage and batch size is warm, 503 before that and while draining."""
    return _health(served.ready, "ready", "draining" if served.draining else "warming up")


def _health(good: bool, yes: str, no: str) -> Response:
    return Response(f"{yes if good else no}\n", 200 if good else 503, media_type="text/plain")


@public.get("/metrics", summary="Prometheus exposition")
def get_metrics(served: Served_) -> Response:
    """Runs in a thread, so that a scrape holds up no request."""
    return Response(served.metrics.render(), media_type=CONTENT_TYPE)
