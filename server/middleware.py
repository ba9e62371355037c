"""What surrounds every request: its id, body limit, errors, metrics and log line."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import MutableMapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.arrival import allowed_seconds, arrival, is_hopeless, seconds_behind
from server.context import CLIENT_CLOSED, Context
from server.errors import BodyTooLarge, Draining, OfframpError, Overloaded
from server.gate import Gate
from server.metrics import CLASSIFY, Metrics, route_of
from server.protocol import error_body
from server.tracing import RequestTracer

log = logging.getLogger("offramp.access")

ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
FAULT = "offramp.fault"
"""In the scope of a request whose body cannot be read: the error that it is answered with."""
MOST_DIGITS = 20
"""Of a length that the parser takes; before them are only zeros, some more than Python would."""


class Surroundings:
    """Pure ASGI middleware.

    Args:
        app: what it surrounds.
        metrics: where requests are counted.
        max_body_bytes: where a body is cut off, announced or not.
        max_bodies_bytes: of all requests that are not answered yet; one whose body would be more
            is refused.
        deadline_ms: of requests that name none, if they have one.
        tracer: makes its spans, where somebody wants them.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body_bytes: int,
        max_bodies_bytes: int,
        deadline_ms: float | None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self._app = app
        self._gate = Gate()
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_bodies_bytes = max_bodies_bytes
        self._bodies_bytes = 0
        self._deadline_ms = deadline_ms
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = route_of(scope["path"])
        if route:
            await self._gate()
        now = time.perf_counter()
        behind = seconds_behind(scope, now)
        context = Context(_request_id(scope), arrival(scope, now), behind, now, route)
        scope.setdefault("state", {})["context"] = context
        if self._tracer and route:
            context.trace = self._tracer.request(
                scope["method"], scope["path"], scope["headers"], context.arrived
            )
        sender = _sender(context, send)
        try:
            self._refuse_hopeless(scope, context)
            self._refuse_announced(scope)
            await self._app(scope, self._limited(scope, context, receive), sender)
        except ClientDisconnect:
            context.status = CLIENT_CLOSED
        except asyncio.CancelledError:  # the time to drain is over, and this is still being sent
            await send_error(sender, context, Draining())
        except OfframpError as error:
            await send_error(sender, context, error)
        except Exception:
            log.exception("request %s failed", context.request_id)
            await send_error(sender, context, OfframpError())
        finally:
            self._bodies_bytes -= context.body_bytes
            seconds = time.perf_counter() - context.arrived
            # In the next turn, since the response is sent at the end of this one.
            asyncio.get_running_loop().call_soon(self._record, scope, context, seconds)

    def _refuse_hopeless(self, scope: Scope, context: Context) -> None:
        """Before any work: a loop that is behind falls further behind with each thing it begins."""
        if context.route not in CLASSIFY:  # another names its deadline in its body
            return
        if is_hopeless(context.behind, allowed_seconds(scope, self._deadline_ms)):
            self._metrics.refused.labels("not_in_time").inc()
            raise Overloaded(context.behind)

    def _refuse_announced(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if (
                name == b"content-length"
                and value.isdigit()
                and int(value[-MOST_DIGITS:]) > self._max_body_bytes
            ):
                raise self._too_large()

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is over {self._max_body_bytes} bytes")

    def _limited(self, scope: Scope, context: Context, receive: Receive) -> Receive:
        async def limited() -> Message:
            message = await receive()
            if FAULT in scope:
                raise scope[FAULT]
            self._hold(len(message.get("body", b"")), context)
            return message

        return limited

    def _hold(self, size: int, context: Context) -> None:
        """Count a part of a body until its request is answered, which may need it so long."""
        context.body_bytes += size
        self._bodies_bytes += size
        if context.body_bytes > self._max_body_bytes:
            raise self._too_large()
        if self._bodies_bytes > self._max_bodies_bytes:
            self._metrics.refused.labels("bodies_full").inc()
            raise Overloaded

    def _record(self, scope: Scope, context: Context, seconds: float) -> None:
        path, route = scope["path"], context.route
        if route:
            self._metrics.answered(route, context.status, seconds)
            if "code" in context.fields:
                self._metrics.failed(context.fields["code"])
        if context.trace:
            context.trace.end(context.status, context.request_id)
            context.fields["trace_id"] = context.trace.trace_id
        level = logging.INFO if route or context.status >= 400 else logging.DEBUG
        if log.isEnabledFor(level):
            said: dict[str, object] = {
                "method": scope["method"],
                "path": path,
                "status": context.status,
                "milliseconds": round(1e3 * seconds, 2),
                "request_id": context.request_id,
                **context.fields,
            }
            log.log(level, "request", extra={"fields": said})


def rendered(context: Context, error: OfframpError) -> tuple[dict[str, str], bytes]:
    """Headers and body of the response that an error becomes; notes its code for the log."""
    context.fields.setdefault("code", error.code)
    body = to_json(error_body(error, context.request_id))
    return {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }, body


async def send_error(send: Send, context: Context, error: OfframpError) -> None:
    """Answer with an error, unless the response has already begun."""
    headers, body = rendered(context, error)
    if context.started:
        return
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def refusal(error: OfframpError) -> ASGIApp:
    """What answers a request that no application can be given, for want of a head."""

    async def refuse(scope: Scope, _: Receive, send: Send) -> None:
        scope["method"] = ""
        context = Context(_request_id(scope), 0.0)
        await send_error(_sender(context, send), context, error)
        said = {"status": error.status, "request_id": context.request_id, **context.fields}
        log.info("request", extra={"fields": said})

    return refuse


def _sender(context: Context, send: Send) -> Send:
    async def sender(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            context.started = True
            context.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", context.request_id.encode())]
            if context.server_timing:
                headers.append((b"server-timing", context.server_timing.encode()))
            if context.trace:
                headers.append((b"traceresponse", context.trace.header.encode()))
            message["headers"] = headers
        await send(message)

    return sender


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and ACCEPTABLE_ID.fullmatch(value := value.strip()):
            return str(value, "ascii")
    return f"{random.getrandbits(128):032x}"  # asking the system would give up Python's lock
