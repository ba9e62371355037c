"""The Open Inference Protocol, V2, for clients that speak it: KServe's, Triton's, MLServer's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from model.bundle import Bundle
from server import errors, openapi, tensors, uploads
from server.classify import admit, answered
from server.departure import ending_with_client
from server.dependencies import Context_, Served_, check_key
from server.errors import BadRequest, InvalidParameter, NotFound
from server.gate import each_in_turn
from server.metrics import VERSION
from server.openapi import LOCKED, UNAVAILABLE
from server.parameters import LONGEST_DEADLINE_MS, Parameters, parameters_of
from server.routes import MAX_BATCH_IMAGES
from server.served import Served
from server.tensors import InferenceRequest, Sent, Wanted
from server.tickets import Answer

IMAGE, PIXELS = "image", "pixels"
"""The inputs, of which a request has one."""
PARAMETERS = {"threshold", "max_accuracy_loss", "min_exit", "max_exit", "deadline_ms"}
"""Those of /classify that a request may name, beside the protocol's own."""
OUTPUTS = {
    "label": "BYTES",
    "class_id": "INT32",
    "confidence": "FP32",
    "exit": "INT32",
    "reason": "BYTES",
    "degraded": "BOOL",
    "probabilities": "FP32",
}
"""With their datatypes."""

public = APIRouter()
protected = APIRouter(dependencies=[Depends(check_key)], responses=openapi.failures(*LOCKED))


async def served_as(
    model: Annotated[str, Path(description="the bundle's name", examples=["default"])],
    request: Request,
    served: Served_,
) -> Served:
    """The bundle that is served, if the path names it, and its version if any.

    Raises:
        NotFound: it does not.
    """
    description = served.loaded.bundle.description
    version = request.path_params.get("version", description.version)
    if (model, version) != (description.name, description.version):
        raise NotFound("there is no such model, or no such version of it")
    return served


Named_ = Annotated[Served, Depends(served_as)]


class LiveBody(BaseModel):
    """As /livez."""

    live: bool = Field(description="whether the process works")


class ReadyBody(BaseModel):
    """As /readyz."""

    ready: bool = Field(description="whether requests are taken")


class ModelReadyBody(ReadyBody):
    """The same of the model."""

    name: str = Field(description="the bundle's name")


class ServerBody(BaseModel):
    """What clients may know of the server."""

    name: str = Field(description="offramp")
    version: str = Field(description="its version")
    extensions: list[str] = Field(description="what it knows beside the protocol")


class TensorBody(BaseModel):
    """What a tensor of the model is like."""

    name: str = Field(description="by which requests and responses call it")
    datatype: str = Field(description="of the protocol")
    shape: list[int] = Field(description="-1 where any number of elements goes")


class InferenceModelBody(BaseModel):
    """What clients must know of the model."""

    name: str = Field(description="the bundle's name")
    versions: list[str] = Field(description="the bundle's version")
    platform: str = Field(description="what runs it: offramp")
    inputs: list[TensorBody] = Field(description="of which a request has one")
    outputs: list[TensorBody] = Field(description="all, unless a request names some")


def _health(yes: str, no: str, body: type[BaseModel]) -> openapi.Responses:
    return {200: openapi.good(yes), 503: {**openapi.good(no), "model": body}}


def _told(what: str, good: bool, **others: str) -> JSONResponse:
    return JSONResponse({**others, what: good}, 200 if good else 503)


@public.get(
    "/v2/health/live",
    response_model=LiveBody,
    responses=_health("It does", "It should be restarted", LiveBody),
    summary="V2: whether the process works",
)
async def get_live(served: Served_) -> JSONResponse:
    """As /livez."""
    return _told("live", served.alive)


@public.get(
    "/v2/health/ready",
    response_model=ReadyBody,
    responses=_health("They are", "Not now", ReadyBody),
    summary="V2: whether requests are taken",
)
async def get_ready(served: Served_) -> JSONResponse:
    """As /readyz."""
    return _told("ready", served.ready)


@protected.get(
    "/v2",
    responses={200: openapi.good("The server")},
    summary="V2: the server",
    openapi_extra=openapi.shown("curl localhost:8000/v2"),
)
async def get_server(served: Served_) -> ServerBody:
    """Its name, and what it knows beside the protocol."""
    extensions = ["binary_tensor_data"]
    if served.settings.admin_token is not None:
        extensions.append("model_repository")
    return ServerBody(name="offramp", version=VERSION, extensions=extensions)


@protected.get(
    "/v2/models/{model}",
    responses={200: openapi.good("Its tensors"), **openapi.failures(NotFound)},
    summary="V2: the model",
    openapi_extra=openapi.shown("curl localhost:8000/v2/models/default"),
)
@protected.get("/v2/models/{model}/versions/{version}", include_in_schema=False)
async def get_model(served: Named_) -> InferenceModelBody:
    """Its tensors. There is one model, and one version of it."""
    description = served.loaded.bundle.description
    classes = len(description.classes)
    shapes = {name: [-1, classes] if name == "probabilities" else [-1] for name in OUTPUTS}
    return InferenceModelBody(
        name=description.name,
        versions=[description.version],
        platform="offramp",
        inputs=[
            TensorBody(name=IMAGE, datatype="BYTES", shape=[-1]),
            TensorBody(name=PIXELS, datatype="UINT8", shape=[-1, -1, -1, 3]),
        ],
        outputs=[TensorBody(name=n, datatype=OUTPUTS[n], shape=s) for n, s in shapes.items()],
    )


@protected.get(
    "/v2/models/{model}/ready",
    response_model=ModelReadyBody,
    responses=_health("It does", "Not now", ModelReadyBody) | openapi.failures(NotFound),
    summary="V2: whether the model answers",
)
@protected.get("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
async def get_model_ready(served: Named_) -> JSONResponse:
    """As /readyz."""
    return _told("ready", served.ready, name=served.name)


@protected.post(
    "/v2/models/{model}/infer",
    responses={
        200: openapi.good("The outputs, as JSON, or raw behind it where the request says so"),
        **openapi.failures(
            errors.BadRequest,
            *errors.IMAGE_FAULTS,
            errors.RequestTimeout,
            errors.NotFound,
            errors.BodyTooLarge,
            errors.InvalidParameter,
            errors.Overloaded,
            errors.HeadTooLarge,
            errors.OfframpError,
            *UNAVAILABLE,
            errors.DeadlineExceeded,
        ),
    },
    openapi_extra=openapi.inference(
        'curl -d \'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], '
        '"data": ["\'$(base64 -w0 photo.jpg)\'"]}]}\' localhost:8000/v2/models/default/infer'
    ),
    summary="V2: classify images",
)
@protected.post("/v2/models/{model}/versions/{version}/infer", include_in_schema=False)
async def post_infer(request: Request, served: Named_, context: Context_) -> Response:
    """One input: `image`, BYTES `[N]`, encoded images (in base64 where they are JSON); or `pixels`,
    UINT8 `[N, H, W, 3]`. The request's `parameters` may be `threshold`, `max_accuracy_loss`,
    `min_exit`, `max_exit` and `deadline_ms`, as of /classify. The first image that fails fails the
    request.
    """
    _refuse_query(request)
    usual = admit(Parameters(), served, context)  # say no before the body is read
    # It may name another deadline, and is kept to that once it is there.
    latest = max(usual.deadline, context.arrived + LONGEST_DEADLINE_MS / 1e3)
    body = await uploads.read_whole(request, latest, served.metrics)
    asked, raw = tensors.read_request(body, request.headers.get(tensors.HEADER_LENGTH))
    admission = admit(_parameters(asked), served, context, usual)
    wanted = _wanted(asked)
    images = _images(asked.inputs, raw)
    context.fields["images"] = len(images)

    async def answer_of(image: bytes | np.ndarray) -> Answer:
        answer, _ = await answered(image, admission, served, context)
        return answer

    place = partial(served.crowd.place, admission.deadline)
    with ending_with_client(request.scope):
        answers = await each_in_turn(answer_of, images, place)
    return _response(asked, wanted, answers, admission.loaded.bundle, served)


def _refuse_query(request: Request) -> None:
    for name in request.query_params:
        raise InvalidParameter.of((name,), "there is no such parameter here; they go into the body")


def _parameters(asked: InferenceRequest) -> Parameters:
    given = {n: value for n, value in asked.parameters.items() if n != "binary_data_output"}
    for name, value in given.items():
        if name not in PARAMETERS:
            raise InvalidParameter.of((name,), "there is no such parameter")
        if isinstance(value, bool):  # which pydantic takes for a number
            raise InvalidParameter.of((name,), "must be a number")
    return parameters_of(given)


def _wanted(asked: InferenceRequest) -> Sequence[Wanted]:
    for output in asked.outputs:
        if output.name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise BadRequest(f"there is no output {output.name[:100]}; there are {known}")
    return asked.outputs or [Wanted(name=name) for name in OUTPUTS]


def _images(inputs: Sequence[Sent], raw: bytes) -> Sequence[bytes] | np.ndarray:
    if len(inputs) > 1:
        raise BadRequest(f"send one input, `{IMAGE}` or `{PIXELS}`")
    (sent,) = inputs
    tensors.check_raw(sent, raw)
    if (sent.name, sent.datatype) == (IMAGE, "BYTES"):
        images: Sequence[bytes] | np.ndarray = tensors.elements_of(sent, raw)
    elif (sent.name, sent.datatype) == (PIXELS, "UINT8"):
        if len(sent.shape) != 4 or sent.shape[-1] != 3:
            raise BadRequest(f"{PIXELS}: its shape must be [N, height, width, 3]")
        images = tensors.array_of(sent, raw)
    else:
        raise BadRequest(f"send `{IMAGE}` of BYTES or `{PIXELS}` of UINT8")
    if not 0 < len(images) <= MAX_BATCH_IMAGES:
        raise BadRequest(f"send 1 to {MAX_BATCH_IMAGES} images, not {len(images)}")
    return images


def _response(
    asked: InferenceRequest,
    wanted: Sequence[Wanted],
    answers: Sequence[Answer],
    bundle: Bundle,
    served: Served,
) -> Response:
    description = bundle.description
    values = _values(answers, description.classes)
    outputs = [
        tensors.written(one.name, OUTPUTS[one.name], values[one.name], asked.wants_binary(one))
        for one in wanted
    ]
    said = {"model_name": description.name, "model_version": description.version}
    if asked.id is not None:
        said["id"] = asked.id
    with served.encode_seconds.time():
        body, json_bytes = tensors.write_response(said, outputs)
    if json_bytes is None:
        return Response(body, media_type="application/json")
    headers = {tensors.HEADER_LENGTH: str(json_bytes)}
    return Response(body, headers=headers, media_type="application/octet-stream")


def _values(
    answers: Sequence[Answer], classes: Sequence[str]
) -> dict[str, np.ndarray | Sequence[str]]:
    probabilities = np.stack([answer.probabilities for answer in answers])
    class_ids = probabilities.argmax(axis=1)
    return {
        "label": [classes[i] for i in class_ids],
        "class_id": class_ids,
        "confidence": np.array([answer.confidence for answer in answers], np.float32),
        "exit": np.array([answer.exit for answer in answers]),
        "reason": [answer.reason.value for answer in answers],
        "degraded": np.array([answer.degraded for answer in answers]),
        "probabilities": probabilities,
    }
