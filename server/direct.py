"""The one path that every image takes, without FastAPI's routing, dependencies and validation."""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import InvalidParameter
from server.protocol import Parameters
from server.routes import check_key, context_of, post_classify, served_of

LONGEST_REMEMBERED = 256
"""Bytes of a query string; most clients send one of a few short ones over and over."""


class Direct:
    """ASGI middleware that calls `post_classify` as FastAPI would, only sooner.

    What FastAPI does for any endpoint took longer than what this one does for a small image. The
    route stays declared there, for its documentation and for every method but POST.

    Args:
        app: what answers everything else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/classify" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        await check_key(request)
        parameters = parameters_from(scope["query_string"])
        served, context = await served_of(request), await context_of(request)
        response = await post_classify(request, parameters, served, context)
        await response(scope, receive, send)


def parameters_from(query: bytes) -> Parameters:
    """The parameters that a query string names; of one named twice, the last.

    Raises:
        InvalidParameter: an unknown one, or a bad value.
    """
    return _remembered(query) if len(query) <= LONGEST_REMEMBERED else _parse(query)


def _parse(query: bytes) -> Parameters:
    named = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    try:
        return Parameters.model_validate(named)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidParameter.of(first["loc"], first["msg"]) from None


_remembered = lru_cache(maxsize=1024)(_parse)
