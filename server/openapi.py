"""What the OpenAPI document says beyond the types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server import errors
from server.errors import OfframpError
from server.protocol import ErrorBody, event

Responses = dict[int | str, dict[str, Any]]

SECURITY_SCHEMES = {
    "ApiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "one of the keys in `OFFRAMP_API_KEYS`; asked for where any is set",
    },
    "Bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "the same keys, as `Authorization: Bearer KEY`",
    },
    "AdminToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "the token in `OFFRAMP_ADMIN_TOKEN`, as `Authorization: Bearer TOKEN`",
    },
}
REQUEST_ID = {
    "X-Request-ID": {
        "description": "taken from the request, or made; the log names it",
        "schema": {"type": "string"},
    }
}
SERVER_TIMING = {
    "Server-Timing": {
        "description": "the answer's `timing_ms`, as browsers show it",
        "schema": {"type": "string"},
    }
}
ERROR_HEADERS = {
    401: {"WWW-Authenticate": {"description": "`Bearer`", "schema": {"type": "string"}}},
    429: {
        "Retry-After": {
            "description": "seconds until the backlog is expected to have drained",
            "schema": {"type": "integer", "minimum": 1},
        }
    },
}
LOCKED = (errors.Unauthenticated, errors.Forbidden)
BODY_FAULTS = (
    errors.BadRequest,
    errors.RequestTimeout,
    errors.BodyTooLarge,
    errors.HeadTooLarge,
    OfframpError,
)
"""Of requests with a small body of JSON."""
UNAVAILABLE = (errors.NotReady, errors.Draining)

SEEN_EXAMPLE = [
    {"exit": 1, "label": "seal", "class_id": 72, "confidence": 0.41, "elapsed_ms": 0.9},
    {"exit": 2, "label": "otter", "class_id": 55, "confidence": 0.93, "elapsed_ms": 1.7},
]
ANSWER_EXAMPLE = {
    "label": "otter",
    "class_id": 55,
    "confidence": 0.93,
    "exit": 2,
    "exits": 4,
    "reason": "confident",
    "degraded": False,
    "top_k": [
        {"label": "otter", "class_id": 55, "probability": 0.94},
        {"label": "seal", "class_id": 72, "probability": 0.03},
    ],
    "model": "default",
    "version": "1",
    "request_id": "4f1c2a9be05d4c7c8d9a3a35a0a0f7b1",
    "timing_ms": {"decode": 0.1, "queue": 0.3, "compute": 1.2, "total": 1.9},
}
ERROR_EXAMPLE_ID = ANSWER_EXAMPLE["request_id"]
EVENTS_EXAMPLE = b"".join(
    [*(event("exit", seen) for seen in SEEN_EXAMPLE), event("answer", ANSWER_EXAMPLE)]
).decode()
ANSWER_RESPONSE: dict[str, Any] = {
    "description": "The answer, at once or as a stream of events",
    "headers": {**REQUEST_ID, **SERVER_TIMING},
    "content": {
        "application/json": {"example": ANSWER_EXAMPLE},
        "text/event-stream": {
            "schema": {
                "type": "string",
                "description": "one event `exit` (SeenBody) for each exit reached, "
                "then one event `answer` (AnswerBody), or `error` (ErrorBody) where a later "
                "exit fails",
            },
            "example": EVENTS_EXAMPLE,
        },
    },
}
BATCH_RESPONSE: dict[str, Any] = {
    "description": "An answer or an error for each image, in the order of the parts",
    "headers": REQUEST_ID,
    "content": {
        "application/json": {
            "example": {
                "results": [
                    ANSWER_EXAMPLE,
                    {
                        "error": "the image is truncated or corrupt",
                        "code": "broken_image",
                        "request_id": ERROR_EXAMPLE_ID,
                    },
                ]
            }
        }
    },
}

IMAGE = {"schema": {"type": "string", "format": "binary"}}


def _parts(properties: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "object", "properties": properties, "required": [*properties]}}


def one_image(*samples: str) -> dict[str, Any]:
    """A request body of one image, with command lines that show how to send it."""
    part = {"type": "string", "format": "binary", "description": "the encoded image"}
    body = {
        "required": True,
        "description": "The encoded image (PNG, JPEG, WebP, GIF, BMP or TIFF) under any content "
        "type, or one part `file` of a form.",
        "content": {
            "application/octet-stream": IMAGE,
            "image/*": IMAGE,
            "multipart/form-data": _parts({"file": part}),
        },
    }
    return {"requestBody": body, **shown(*samples)}


def many_images(most: int, *samples: str) -> dict[str, Any]:
    """A request body of up to so many images."""
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "maxItems": most,
        "description": "the encoded images, each a part of this name",
    }
    body = {
        "required": True,
        "description": f"One part `files` for each image, at most {most}.",
        "content": {"multipart/form-data": _parts({"files": files})},
    }
    return {"requestBody": body, **shown(*samples)}


def inference(*samples: str) -> dict[str, Any]:
    """A request body of tensors."""
    settings = {"type": "object", "description": "by name"}
    tensor = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "`image` or `pixels`"},
            "datatype": {"type": "string", "description": "BYTES or UINT8"},
            "shape": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "description": "`[N]` or `[N, H, W, 3]`",
            },
            "data": {
                "type": "array",
                "items": {},
                "description": "its elements, nested or not, where they do not follow raw",
            },
            "parameters": settings,
        },
        "required": ["name", "datatype", "shape"],
    }
    properties = {
        "id": {"type": "string", "description": "given back as it came"},
        "parameters": settings,
        "inputs": {"type": "array", "items": tensor, "description": "one", "minItems": 1},
        "outputs": {
            "type": "array",
            "items": {"type": "object"},
            "description": "those that are asked for, each with its `name`; without any, all",
        },
    }
    body = {
        "required": True,
        "description": "JSON, and behind it the raw bytes of an input whose `parameters` have a "
        "`binary_data_size`; then `Inference-Header-Content-Length` says how much is JSON.",
        "content": {
            "application/json": {
                "schema": {"type": "object", "properties": properties, "required": ["inputs"]}
            },
            "application/octet-stream": IMAGE,
        },
    }
    return {"requestBody": body, **shown(*samples)}


def shown(*samples: str) -> dict[str, Any]:
    """Command lines that show an operation."""
    return {"x-codeSamples": [{"lang": "sh", "source": source} for source in samples]}


def shown_to_administrators(*samples: str) -> dict[str, Any]:
    """Command lines that show an operation which takes the admin token."""
    return {"security": [{"AdminToken": []}], **shown(*samples)}


def good(description: str) -> dict[str, Any]:
    """A response with status 200."""
    return {"description": description, "headers": REQUEST_ID}


def failures(*kinds: type[OfframpError]) -> Responses:
    """The error responses of an operation, by status, each with an example for every code."""
    by_status: dict[int, list[type[OfframpError]]] = {}
    for kind in kinds:
        by_status.setdefault(kind.status, []).append(kind)
    return {status: _failure(status, kinds) for status, kinds in sorted(by_status.items())}


def _failure(status: int, kinds: Iterable[type[OfframpError]]) -> dict[str, Any]:
    examples = {
        kind.code: {
            "value": {
                "error": kind.sentence,
                "code": kind.code,
                "request_id": ERROR_EXAMPLE_ID,
            }
        }
        for kind in kinds
    }
    return {
        "model": ErrorBody,
        "description": "; ".join(f"`{kind.code}`: {kind.sentence}" for kind in kinds),
        "headers": {**REQUEST_ID, **ERROR_HEADERS.get(status, {})},
        "content": {"application/json": {"examples": examples}},
    }


def document(app: FastAPI, keys: bool) -> dict[str, Any]:
    """The OpenAPI document; `keys` says whether API keys are asked for."""
    made: dict[str, Any] = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    made.setdefault("components", {})["securitySchemes"] = SECURITY_SCHEMES
    for name in ("HTTPValidationError", "ValidationError"):
        made["components"].get("schemas", {}).pop(name, None)
    for item in made["paths"].values():
        for operation in item.values():
            said = operation["responses"].items()
            operation["responses"] = dict(sorted(r for r in said if not _is_fastapis(r[1])))
            operation.setdefault("security", _security(operation, keys))
    return made


def _is_fastapis(response: dict[str, Any]) -> bool:
    """Whether FastAPI added it for parameters that it may find invalid, which none of them is: an
    operation that has such says so itself."""
    return "HTTPValidationError" in str(response.get("content"))


def _security(operation: dict[str, Any], keys: bool) -> list[dict[str, list[str]]]:
    if str(errors.Forbidden.status) not in operation["responses"]:
        return []
    sent: list[dict[str, list[str]]] = [{"ApiKey": []}, {"Bearer": []}]
    return sent if keys else [{}, *sent]
