"""The one path that every image takes, without FastAPI's routing, dependencies and validation."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.dependencies import check_key, context_of
from server.parameters import parameters_from
from server.routes import post_classify
from server.served import Served


class Direct:
    """Calls `post_classify` as FastAPI would, only sooner.

    What FastAPI does for any endpoint took longer than what this one does for a small image. The
    route stays declared there, for its documentation and for every method but POST.

    Args:
        app: what answers everything else.
        served: the bundle that it answers from.
    """

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/classify" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        await check_key(request, self._served)
        parameters = parameters_from(scope["query_string"])
        context = await context_of(request)
        response = await post_classify(request, parameters, self._served, context)
        await response(scope, receive, send)
