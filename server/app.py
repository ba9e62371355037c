"""The ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server import inference, repository, routes
from server.context import CLIENT_CLOSED
from server.dependencies import context_of
from server.direct import Direct
from server.errors import BadRequest, Draining, MethodNotAllowed, NotFound, OfframpError
from server.metrics import VERSION
from server.middleware import Surroundings, rendered
from server.openapi import document
from server.page import page_router
from server.parameters import invalid
from server.served import Served

log = logging.getLogger("offramp")

DESCRIPTION = "Image classification that answers from the shallowest sufficient exit."


def create_app(served: Served) -> ASGIApp:
    """The application that serves one bundle; it warms up when its lifespan starts."""
    return surround(Direct(_head_like_get(create_routes(served)), served), served)


def surround(app: ASGIApp, served: Served) -> ASGIApp:
    """What is done for every request, around all of FastAPI, whose own takes time for each."""
    return Surroundings(
        app,
        metrics=served.metrics,
        max_body_bytes=served.settings.max_body_bytes,
        max_bodies_bytes=served.settings.max_bodies_bytes,
        deadline_ms=served.settings.default_deadline_ms,
        tracer=served.tracer,
    )


def _head_like_get(app: ASGIApp) -> ASGIApp:
    """Has HEAD answered as GET; whoever sends the response leaves its body out."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return answer


def create_routes(served: Served) -> FastAPI:
    """Every path, which needs its surroundings."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.metrics.threads.watch("event_loop")
        warming = asyncio.ensure_future(_warm_up(served))
        watching = asyncio.ensure_future(served.waiting.watch())
        try:
            yield
        finally:
            watching.cancel()
            served.draining = True
            served.stop_compiling()
            await warming
            await asyncio.to_thread(served.close)

    app = FastAPI(
        title="Offramp",
        version=VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.served = served
    keys = bool(served.settings.api_keys)
    app.openapi = cache(lambda: document(app, keys))  # type: ignore[method-assign]
    app.state.routers = [page_router(), *routers(served.settings.admin_token is not None)]
    for router in app.state.routers:
        app.include_router(router)
    app.add_exception_handler(OfframpError, _render)
    app.add_exception_handler(HTTPException, _render_http)
    app.add_exception_handler(RequestValidationError, _render_validation)
    app.add_exception_handler(Exception, _render_unexpected)
    return app


def routers(admin: bool) -> list[APIRouter]:
    """Of all documented paths, in order; with those of administrators or without."""
    administrators = [routes.admin, repository.admin] if admin else []
    protected = [routes.protected, inference.protected]
    return [*protected, *administrators, routes.public, inference.public]


async def _warm_up(served: Served) -> None:
    try:
        await asyncio.to_thread(served.warm_up)
    except Draining:
        log.info("warming up ends early: the server drains")
    except Exception:
        log.exception("the network cannot run here")
        served.give_up()


async def _render(request: Request, error: Exception) -> Response:
    assert isinstance(error, OfframpError)
    headers, body = rendered(await context_of(request), error)
    return Response(body, error.status, headers)


async def _render_unexpected(request: Request, error: Exception) -> Response:
    """What Starlette answers with before it raises the error again, for the surroundings to log."""
    if isinstance(error, ClientDisconnect):  # whom nobody answers
        return Response(status_code=CLIENT_CLOSED)
    return await _render(request, OfframpError())


async def _render_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, OfframpError):  # for which FastAPI could not read a body
        return await _render(request, error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        raise error.__cause__
    kinds: dict[int, type[OfframpError]] = {404: NotFound, 405: MethodNotAllowed}
    kind = kinds.get(error.status_code, BadRequest if error.status_code < 500 else OfframpError)
    response = await _render(request, kind())
    response.headers.update(error.headers or {})
    if error.status_code == MethodNotAllowed.status:
        response.headers["Allow"] = ", ".join(_methods(request))
    return response


def _methods(request: Request) -> list[str]:
    """Every method that the path takes; Starlette names those of the first route only."""
    routes = [*request.app.routes, *(r for one in request.app.state.routers for r in one.routes)]
    matching = (
        route
        for route in routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    )
    methods = {method for route in matching for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


async def _render_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _render(request, invalid(error.errors()))
