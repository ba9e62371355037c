"""Every failure a client can see, each with its status and its stable code.

OfframpError 500 internal
|- BadRequest 400 bad_request
|  |- NoImage no_image, BadMultipart bad_multipart
|  |- UnsupportedImage unsupported_image, BrokenImage broken_image
|- Unauthenticated 401, Forbidden 403
|- NotFound 404, MethodNotAllowed 405
|- RequestTimeout 408
|- UnusableBundle 409 unusable_bundle
|- TooLarge 413: BodyTooLarge body_too_large, ImageTooLarge image_too_large
|- InvalidParameter 422
|- Overloaded 429
|- HeadTooLarge 431 head_too_large
|- Unavailable 503: NotReady not_ready, Draining draining
|- DeadlineExceeded 504
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar


class OfframpError(Exception):
    """A failure with a status, a code and a sentence that is fit for a client."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    sentence: ClassVar[str] = "the server failed; its log has the cause under this request id"

    def __init__(self, sentence: str | None = None) -> None:
        super().__init__(sentence or self.sentence)

    @property
    def headers(self) -> dict[str, str]:
        """Response headers beside the body."""
        return {}


class BadRequest(OfframpError):
    status = 400
    code = "bad_request"
    sentence = "the request is malformed"


class NoImage(BadRequest):
    code = "no_image"
    sentence = "no image was sent"


class BadMultipart(BadRequest):
    code = "bad_multipart"
    sentence = "the multipart body is malformed"


class UnsupportedImage(BadRequest):
    code = "unsupported_image"
    sentence = "not an image of a supported format"


class BrokenImage(BadRequest):
    code = "broken_image"
    sentence = "the image is truncated or corrupt"


class Unauthenticated(OfframpError):
    status = 401
    code = "unauthenticated"
    sentence = "send an API key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(OfframpError):
    status = 403
    code = "forbidden"
    sentence = "this key is not allowed here"


class NotFound(OfframpError):
    status = 404
    code = "not_found"
    sentence = "there is no such path"


class MethodNotAllowed(OfframpError):
    status = 405
    code = "method_not_allowed"
    sentence = "this path does not take that method"


class RequestTimeout(OfframpError):
    status = 408
    code = "request_timeout"
    sentence = "the request stopped coming, or came too slowly"


class UnusableBundle(OfframpError):
    status = 409
    code = "unusable_bundle"
    sentence = "the bundle that is in the folder now cannot be served"


class TooLarge(OfframpError):
    status = 413
    code = "too_large"
    sentence = "the request is too large"


class BodyTooLarge(TooLarge):
    code = "body_too_large"
    sentence = "the body is over the byte limit"

    @property
    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}  # the rest of the body is not read


class ImageTooLarge(TooLarge):
    code = "image_too_large"
    sentence = "the image is over the pixel limit"


class InvalidParameter(OfframpError):
    status = 422
    code = "invalid_parameter"
    sentence = "a parameter is out of range"
    longest_name: ClassVar[int] = 100
    """Characters of an unknown parameter's name that its error repeats."""

    @classmethod
    def of(cls, path: Iterable[int | str], fault: str) -> InvalidParameter:
        """Names the parameter, by its path, and its fault."""
        where = ".".join(map(str, path))[: cls.longest_name] or "request"
        return cls(f"{where}: {fault}")


class Overloaded(OfframpError):
    """Refused for load.

    Args:
        retry_after_seconds: until the same is expected to be in time.
    """

    status = 429
    code = "overloaded"
    sentence = "the server cannot answer in time now; try again later"

    def __init__(self, retry_after_seconds: float = 1.0) -> None:
        super().__init__()
        self.retry_after_seconds = retry_after_seconds

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_seconds)))}


class HeadTooLarge(OfframpError):
    status = 431
    code = "head_too_large"
    sentence = "the request line and headers, or the trailers, are over the byte limit"


class Unavailable(OfframpError):
    status = 503
    code = "unavailable"
    sentence = "the server cannot take requests now"


class NotReady(Unavailable):
    code = "not_ready"
    sentence = "the server is warming up"


class Draining(Unavailable):
    code = "draining"
    sentence = "the server is shutting down"


class DeadlineExceeded(OfframpError):
    status = 504
    code = "deadline_exceeded"
    sentence = "the deadline passed before the first exit"


IMAGE_FAULTS = (NoImage, UnsupportedImage, BrokenImage, ImageTooLarge)
"""What may be wrong with an image itself."""


def every_error() -> list[type[OfframpError]]:
    """All error classes, for the documentation and its test."""

    def below(kind: type[OfframpError]) -> list[type[OfframpError]]:
        return [kind, *(k for child in kind.__subclasses__() for k in below(child))]

    return below(OfframpError)
