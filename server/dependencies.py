"""What FastAPI gives the paths: the bundle, the request's context, and whether its key is right."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, cast

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from server.context import Context
from server.errors import Forbidden, Unauthenticated
from server.served import Served

# Dependencies are coroutines, since FastAPI would run each plain function in a thread of its own.


async def served_of(request: Request) -> Served:
    """The bundle that this application serves."""
    return cast(Served, request.app.state.served)


async def context_of(request: Request) -> Context:
    """What the middleware gave this request."""
    return cast(Context, request.state.context)


Served_ = Annotated[Served, Depends(served_of)]
Context_ = Annotated[Context, Depends(context_of)]


async def check_key(request: Request, served: Served_) -> None:
    """Let a request through if it carries an API key, or none is configured.

    Raises:
        Unauthenticated: no key was sent.
        Forbidden: a wrong one was.
    """
    keys = served.settings.api_keys
    if not keys:
        return
    sent = _sent_key(request)
    if not any(_same(sent, key.get_secret_value()) for key in keys):
        raise Forbidden


class AdminRoute(APIRoute):
    """Checks the admin token before anything else: FastAPI reads a body before it asks what a
    route depends on.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            token = (await served_of(request)).settings.admin_token
            if token is None or not _same(_sent_key(request), token.get_secret_value()):
                raise Forbidden
            return await handle(request)

        return check_and_handle


def _sent_key(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    sent = bearer or request.headers.get("x-api-key", "").strip()
    if not sent:
        raise Unauthenticated
    return sent


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())
