"""An answer as a stream of events: each exit as it is passed, then the answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.classify import Admission, classify
from server.context import Context
from server.departure import ending_with_client
from server.errors import OfframpError
from server.protocol import error_body, event, seen_body
from server.served import Served
from server.tickets import Seen

WEIGHT = re.compile(r"q=([01](?:\.[0-9]*)?)")
"""How much a client would like to have something; 0 is not at all (RFC 9110, 12.4.2)."""


def wants_events(accept: str) -> bool:
    """Whether an `Accept` header names the event stream, and not JSON with more weight."""
    weights = {"text/event-stream": 0.0, "application/json": 0.0}
    for kind, *rest in (each.split(";") for each in "".join(accept.lower().split()).split(",")):
        if kind in weights:
            weights[kind] = max(weights[kind], _weight(rest))
    events, json = weights.values()
    return events > 0 and events >= json


def _weight(parameters: Iterable[str]) -> float:
    given = (float(found[1]) for each in parameters if (found := WEIGHT.fullmatch(each)))
    return next(given, 1.0)


class EventStream(StreamingResponse):
    """Ends with its client, by an error: Starlette's would count as sent whole.

    Args:
        first: the event that there is already.
        others: gives those that follow.
    """

    def __init__(self, first: bytes, others: AsyncGenerator[bytes]) -> None:
        headers = {"cache-control": "no-store"}
        self._events, self._others = _after(first, others), others
        super().__init__(self._events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ending_with_client(scope):
            async with aclosing(self._others):
                if scope["http_version"] == "1.0":  # which has no chunks
                    await self._together(scope, receive, send)
                else:
                    await self.stream_response(send)

    async def _together(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = b"".join([each async for each in self._events])
        await Response(whole, headers=dict(self.headers))(scope, receive, send)


async def _after(first: bytes, others: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for each in others:
        yield each


async def answer_events(
    data: bytes, admission: Admission, served: Served, context: Context
) -> AsyncGenerator[bytes]:
    """What is sent of one image, as it happens.

    Raises:
        OfframpError: it failed before its first exit; after it an event says so.
    """
    labels = admission.loaded.bundle.description.classes
    passed: asyncio.Queue[Seen | None] = asyncio.Queue()

    def end(done: asyncio.Task[dict[str, Any]]) -> None:
        passed.put_nowait(None)
        if not done.cancelled():
            done.exception()  # which asyncio would log, where nobody asks any more

    work = asyncio.ensure_future(classify(data, admission, served, context, passed.put_nowait))
    work.add_done_callback(end)
    begun = False
    try:
        while (seen := await passed.get()) is not None:
            begun = True
            yield event("exit", seen_body(seen, labels))
        body = await work
        context.note_answer(body)
        yield event("answer", body)
    except OfframpError as error:
        if not begun:
            raise
        context.fields["code"] = error.code
        yield event("error", error_body(error, context.request_id))
    finally:
        work.cancel()
