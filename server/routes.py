"""The HTTP paths."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic_core import to_json

from model.numerics import name_of
from server import errors, openapi, uploads
from server.classify import admit, classify, classify_or_error
from server.departure import ending_with_client
from server.dependencies import AdminRoute, Context_, Served_, check_key
from server.errors import InvalidParameter, OfframpError
from server.events import EventStream, answer_events, wants_events
from server.gate import each_in_turn
from server.metrics import CONTENT_TYPE
from server.openapi import LOCKED, UNAVAILABLE
from server.parameters import Parameters
from server.protocol import (
    AnswerBody,
    BatchBody,
    EngineBody,
    ExitBody,
    LevelBody,
    ModelBody,
    PolicyBody,
    PolicyChange,
)
from server.served import Served
from server.waiting import STUCK

Query_ = Annotated[Parameters, Query()]
MAX_BATCH_IMAGES = 256


public = APIRouter()
protected = APIRouter(dependencies=[Depends(check_key)], responses=openapi.failures(*LOCKED))
admin = APIRouter(route_class=AdminRoute, responses=openapi.failures(*LOCKED))


@protected.post(
    "/classify",
    response_model=AnswerBody,
    responses={
        200: openapi.ANSWER_RESPONSE,
        **openapi.failures(
            *errors.IMAGE_FAULTS,
            errors.BadMultipart,
            errors.RequestTimeout,
            errors.BodyTooLarge,
            InvalidParameter,
            errors.Overloaded,
            errors.HeadTooLarge,
            OfframpError,
            *UNAVAILABLE,
            errors.DeadlineExceeded,
        ),
    },
    openapi_extra=openapi.one_image(
        "curl --data-binary @photo.jpg localhost:8000/classify",
        "curl -F file=@photo.jpg 'localhost:8000/classify?top_k=1'",
        "curl -N -H 'Accept: text/event-stream' --data-binary @photo.jpg localhost:8000/classify",
    ),
    summary="Classify one image from the shallowest sufficient exit",
)
async def post_classify(
    request: Request, parameters: Query_, served: Served_, context: Context_
) -> Response:
    """The answer names the exit that gave it and the reason.

    With `Accept: text/event-stream`, unless it gives JSON more weight, the response is a stream:
    one event `exit` for each exit reached, then one event `answer`. What fails before the first
    exit has its own status, as without a stream; after it, the stream ends with an event `error`.
    Over HTTP/1.0 all events come together.
    """
    admission = admit(parameters, served, context)  # say no before the body is read
    data = await uploads.read_image(request, admission.deadline, served.metrics)
    with ending_with_client(request.scope):
        if wants_events(",".join(request.headers.getlist("accept"))):
            events = answer_events(data, admission, served, context)
            # With its first event, so that what fails before it still has its status.
            return EventStream(await anext(events), events)
        body = await classify(data, admission, served, context)
    context.note_answer(body)
    timing = body["timing_ms"].items()
    context.server_timing = ", ".join(f"{name};dur={ms}" for name, ms in timing)
    return _encoded(body, served)


@protected.post(
    "/classify/batch",
    response_model=BatchBody,
    responses={
        200: openapi.BATCH_RESPONSE,
        **openapi.failures(
            errors.NoImage,
            errors.BadMultipart,
            errors.RequestTimeout,
            errors.BodyTooLarge,
            InvalidParameter,
            errors.Overloaded,
            errors.HeadTooLarge,
            OfframpError,
            *UNAVAILABLE,
            errors.DeadlineExceeded,
        ),
    },
    openapi_extra=openapi.many_images(
        MAX_BATCH_IMAGES, "curl -F files=@a.png -F files=@b.png localhost:8000/classify/batch"
    ),
    summary="Classify many images; a bad one hurts only its own entry",
)
async def post_batch(
    request: Request, parameters: Query_, served: Served_, context: Context_
) -> Response:
    """An image that cannot be answered has its error in its place, with the code that it would
    have had alone. The whole batch is late if its body is.
    """
    admission = admit(parameters, served, context)
    images = await uploads.read_images(
        request,
        MAX_BATCH_IMAGES,
        admission.deadline,
        served.metrics,
    )

    async def result_of(data: bytes) -> dict[str, Any]:
        return await classify_or_error(data, admission, served, context)

    place = partial(served.crowd.place, admission.deadline)
    with ending_with_client(request.scope):
        results = await each_in_turn(result_of, images, place)
    context.fields["images"] = len(images)
    if failures := Counter(result["code"] for result in results if "code" in result):
        context.fields["errors"] = dict(failures)
        for code, count in failures.items():
            served.metrics.failed(code, count)
    return _encoded({"results": results}, served)


def _encoded(body: dict[str, Any], served: Served) -> Response:
    with served.encode_seconds.time():
        return Response(to_json(body), media_type="application/json")


@protected.get(
    "/model",
    response_model=ModelBody,
    responses={200: openapi.good("The network that answers")},
    summary="Labels, exits, costs, accuracy",
    openapi_extra=openapi.shown("curl localhost:8000/model"),
)
async def get_model(served: Served_) -> ModelBody:
    """What is served, and what each exit costs and is worth."""
    loaded = served.loaded
    description = loaded.bundle.description
    full = description.exits[-1].macs
    return ModelBody(
        name=description.name,
        version=description.version,
        architecture=description.architecture,
        weights_sha256=description.weights_sha256,
        device=loaded.device.type,
        dtype=name_of(loaded.dtype),
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


@protected.get(
    "/policy",
    response_model=PolicyBody,
    responses={200: openapi.good("The policy as it is now")},
    summary="Operating points",
    openapi_extra=openapi.shown("curl localhost:8000/policy"),
)
async def get_policy(served: Served_) -> PolicyBody:
    """The ladder of operating points, and the one in force."""
    policy = served.loaded.policy
    return PolicyBody(
        method=policy.method,
        delta=policy.delta,
        calibration_images=policy.calibration_images,
        operating_points=list(policy.operating_points),
        in_force=served.loaded.point,
        overloaded=served.loaded.bent,
    )


@admin.get(
    "/engine",
    response_model=EngineBody,
    responses={
        200: openapi.good("The cost table and the ladder as they are now"),
        **openapi.failures(*UNAVAILABLE),
    },
    summary="What the scheduler decides with",
    openapi_extra=openapi.shown_to_administrators(
        "curl -H 'Authorization: Bearer TOKEN' localhost:8000/engine"
    ),
)
async def get_engine(served: Served_) -> EngineBody:
    """The cost table, as measured so far, and the levels of overload; `deploy.sweep` reads it."""
    scheduler = served.engine.scheduler
    return EngineBody(
        seconds=scheduler.costs.as_rows(),
        teams=scheduler.costs.teams(),
        ladder=[
            LevelBody(max_accuracy_loss=x.max_accuracy_loss, thresholds=list(x.thresholds))
            for x in scheduler.controller.ladder
        ],
        max_batch=scheduler.max_batch,
        workers=scheduler.workers,
        most_workers=scheduler.most_workers,
        http_seconds=scheduler.http_seconds,
        backlog_seconds=scheduler.backlog_seconds,
    )


@admin.put(
    "/policy",
    response_model=PolicyBody,
    responses={
        200: openapi.good("The policy from now on"),
        **openapi.failures(*openapi.BODY_FAULTS, InvalidParameter),
    },
    openapi_extra=openapi.shown_to_administrators(
        "curl -X PUT -H 'Authorization: Bearer TOKEN' -H 'Content-Type: application/json' "
        "-d '{\"max_accuracy_loss\": 0.02}' localhost:8000/policy"
    ),
    summary="Put another operating point in force",
)
async def put_policy(change: PolicyChange, served: Served_) -> PolicyBody:
    """From the next request on, answers may lose at most this much accuracy."""
    try:
        served.use(change.max_accuracy_loss)
    except ValueError as error:
        raise InvalidParameter(f"max_accuracy_loss: {error}") from None
    return await get_policy(served)


def _text(yes: str, no: str | None = None) -> dict[str, Any]:
    """A documented response of plain text, and the one that says otherwise."""
    plain = {"text/plain": {"schema": {"type": "string"}}}
    responses: openapi.Responses = {200: {"description": yes, "content": plain}}
    if no:
        responses[503] = {"description": no, "content": plain}
    return {"response_class": PlainTextResponse, "responses": responses}


@public.get(
    "/livez",
    summary="Whether the process works",
    **_text("It does", f"It should be restarted: {STUCK}"),
)
async def get_livez(served: Served_) -> Response:
    """200 while the engine loop turns, whether or not requests are taken."""
    return _health(served.alive, "live", STUCK)


@public.get(
    "/readyz",
    summary="Whether requests are taken",
    **_text("They are", f"Not now: warming up, draining, no bundle loaded, or {STUCK}"),
)
async def get_readyz(served: Served_) -> Response:
    """200 once every stage and batch size is warm, 503 before that, once told to end, and
    while /livez says no.
    """
    return _health(served.ready, "ready", served.why_unready)


def _health(good: bool, yes: str, no: str) -> Response:
    return PlainTextResponse(f"{yes if good else no}\n", 200 if good else 503)


@public.get("/metrics", summary="Prometheus exposition", **_text("All metrics"))
def get_metrics(served: Served_) -> Response:
    """In the Prometheus text format. Never needs a key."""
    # Not a coroutine: it runs in a thread, so that a scrape holds up no request.
    return Response(served.metrics.render(), media_type=CONTENT_TYPE)
