"""uvicorn's HTTP protocol, with limits, and with what it knows of a request's time and client."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.arrival import ARRIVED, BODY, READ
from server.departure import CONNECTION, Connection
from server.errors import BadRequest, HeadTooLarge, OfframpError, RequestTimeout
from server.middleware import FAULT, refusal

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

MOST_HEAD_BYTES = 2**16
"""Of a request line with its headers, and of trailers. The parser has no limit, and looks at the
whole of a header with each read that it comes in."""
LINGER_BYTES = 2**26
"""What is read and thrown away of a request that was answered before it was whole."""
LINGER_SECONDS = 30.0
"""And for how long."""
DRAIN_LINGER_SECONDS = 0.5
SILENCE_SECONDS = 30.0
"""How long a client may send nothing amid a request or before one, or take nothing of answers."""
SLOWEST_BYTES_A_SECOND = 500
"""The pace, Apache's, that a client must keep amid a request; it may fall behind by as long."""
ONLY_A_HOST = re.compile(rb"https?://[^/?#]+(?=\?|\Z)", re.IGNORECASE)
"""The beginning of a target without a path, which is "/" then (RFC 9110, 4.2.3)."""


class Protocol(HttpToolsProtocol):
    """Notes in each request's scope when it came, and its connection.

    A request's own code runs a turn of the event loop later or more, and under load a turn takes
    long: a deadline counted from there would be kept on paper alone.

    A request that cannot be parsed, or that stops coming, is answered in its turn, and nothing
    after it is read. A connection that ends amid a request lingers first: with bytes left unread,
    the system would reset it, and many clients would not see their answer.
    """

    __slots__ = (  # uvicorn's attributes fill what Python looks up fast
        "_connection",
        "_cycles",
        "_deaf",
        "_ending",
        "_heard",
        "_kept",
        "_linger_bytes",
        "_linger_seconds",
        "_lingering",
        "_paced",
        "_read",
        "_silence",
        "_unsent",
        "_unsent_since",
        "_whole",
    )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection = Connection()
        self._cycles: deque[RequestResponseCycle] = deque()
        """Of requests that are not answered, pipelined ones too, with some that are before them;
        uvicorn knows the newest."""
        self._ending = _Ending(transport, self._end)
        self._read = 0
        """Bytes of the newest read."""
        self._kept = 0
        """Bytes of the reads since the parser last gave anything away."""
        self._whole = True
        """Whether the newest request has all of its body."""
        self._deaf = False
        """Whether what comes is thrown away."""
        self._linger_bytes = LINGER_BYTES
        self._linger_seconds = LINGER_SECONDS
        self._lingering: asyncio.TimerHandle | None = None
        self._heard = self._paced = self.loop.time()
        """When the newest read was, and until when the newest request has kept the pace; what came
        sooner than it had to is no credit for later."""
        self._unsent, self._unsent_since = 0, self._heard
        """Bytes of answers that the client has not taken, when they were last looked at, and since
        when there are so many."""
        self._silence = self.loop.call_later(SILENCE_SECONDS, self._end_silence)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in self._unanswered():  # or uvicorn would log that they gave no response
            cycle.disconnected = True
            cycle.message_event.set()
        self._connection.lost()
        self._ending.close = self.transport.close  # type: ignore[method-assign]
        self._silence.cancel()
        if self._lingering is not None:
            self._lingering.cancel()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._heard = self.loop.time()
        self._read = len(data)
        self._paced = min(self._heard, self._paced + self._read / SLOWEST_BYTES_A_SECOND)
        if self._deaf:
            self._discard(self._read)
            return
        self._kept += self._read
        try:
            self._parse(data)
        except HttpParserError as error:
            cause = error.__context__  # of a callback that failed
            self._refuse(cause if isinstance(cause, OfframpError) else BadRequest())
        else:
            if self._kept > MOST_HEAD_BYTES:
                self._refuse(HeadTooLarge())

    def _parse(self, data: bytes | memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                data = memoryview(data)[upgrade.args[0] :]
            if self._should_upgrade():
                self.parser = _parser(self)  # to the old one a connection may be over
                self.parser.feed_data(self._without_upgrade())

    def _should_upgrade(self) -> bool:
        """Whether uvicorn leaves a request alone that asks for another protocol.

        The parser takes what follows for that protocol's, and so for no body; without the wish, the
        request is parsed again.
        """
        return self.scope["method"] != "CONNECT"  # which asks for nothing that could be left out

    def _without_upgrade(self) -> bytes:
        line = f"{self.scope['method']} ".encode() + self.url
        head = [line + f" HTTP/{self.scope['http_version']}".encode()]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*head, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self.scope[ARRIVED] = time.perf_counter()  # type: ignore[literal-required]
        self.scope[CONNECTION] = self._connection  # type: ignore[literal-required]
        self._paced = self._heard
        self._kept = 0
        self._whole = False

    def on_headers_complete(self) -> None:
        if found := ONLY_A_HOST.match(self.url):
            self.url = found[0] + b"/" + self.url[found.end() :]
        if (self._kept or self._read > MOST_HEAD_BYTES) and self._head_bytes() > MOST_HEAD_BYTES:
            raise HeadTooLarge
        self._kept = 0
        self.scope[READ] = time.perf_counter()  # type: ignore[literal-required]
        super().on_headers_complete()
        cycle = self._begun()
        if cycle is not None:
            cycle.transport = self._ending
            self._unanswered().append(cycle)

    def on_body(self, body: bytes) -> None:
        """As uvicorn's, which would ask the parser for an upgrade first."""
        self._kept = 0
        self.scope[BODY] = True  # type: ignore[literal-required]
        cycle = self.cycle
        if cycle.response_complete:
            self._discard(len(body))
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        self.scope[BODY] = True  # type: ignore[literal-required]
        super().on_message_complete()
        self._whole = True
        if self.cycle is not None and self.cycle.response_complete:  # it was refused amid its body
            self._rest()
        if not self.pipeline:  # a paused transport does not see its client leave
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:  # uvicorn would read more after each answer, whatever waits here
            self.flow.pause_reading()
        if self._is_answered_amid_its_body() and not (self._deaf or self.transport.is_closing()):
            self._linger()

    def _is_answered_amid_its_body(self) -> bool:
        """Whether the newest request was; the one just answered may be older, of several sent at
        once."""
        cycle = self._begun()
        return not self._whole and cycle is not None and cycle.response_complete

    def _rest(self) -> None:
        """Wait for the next request, now that this one's body is over."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        self._linger_bytes = LINGER_BYTES
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def shutdown(self) -> None:
        self._linger_seconds = DRAIN_LINGER_SECONDS
        super().shutdown()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _begun(self) -> RequestResponseCycle | None:
        """The newest request's, once its head was whole."""
        cycle = self.cycle
        return cycle if cycle is not None and cycle.scope is self.scope else None

    def _unanswered(self) -> deque[RequestResponseCycle]:
        """Oldest first, as they are answered: a read may hold thousands."""
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        return self._cycles

    def _refuse(self, error: OfframpError) -> None:
        """Answer what cannot be read, after what came before it, and read nothing more."""
        self._deaf = True
        if self._whole:
            self.on_message_begin()
        cycle = self._begun()
        if cycle is None:
            self._answer(error)
        elif cycle.response_complete:
            self._end()
        else:  # its application answers, once it asks for more of the body
            cycle.keep_alive = False
            self.scope[FAULT] = error  # type: ignore[literal-required]
            cycle.message_event.set()

    def _answer(self, error: OfframpError) -> None:
        first = not self._unanswered()
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self._ending,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self._unanswered().append(self.cycle)
        app = cast("ASGI3Application", refusal(error))
        if first:
            self._start_asgi_task(self.cycle, app)
        else:
            self.pipeline.appendleft((self.cycle, app))

    def _end_silence(self) -> None:
        """Let go of a client that has stopped sending or taking, or as good as stopped; called
        again and again, for one timer takes less than one for each read."""
        now = self.loop.time()
        if self._takes_nothing(now):
            self.transport.abort()  # which drops what is unsent; closing would wait for it
            return
        left = self._patience_ends() - now
        if not self._is_awaited():
            self._paced = now + SILENCE_SECONDS  # it owes nothing while it is not its turn
            left = SILENCE_SECONDS
        elif left <= 0:
            self._let_go()
        # Of one that was let go, too: it closes only once its client has taken everything.
        again = left if left > 0 else SILENCE_SECONDS
        self._silence = self.loop.call_later(again, self._end_silence)

    def _let_go(self) -> None:
        if self._whole:
            self.transport.close()
        else:
            self._refuse(RequestTimeout())

    def _takes_nothing(self, now: float) -> bool:
        """Whether the client has taken nothing of its answers for too long."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        return unsent > 0 and now - self._unsent_since >= SILENCE_SECONDS

    def _patience_ends(self) -> float:
        """When the client will have kept the connection waiting for too long."""
        return (self._heard if self._whole else self._paced) + SILENCE_SECONDS

    def _is_awaited(self) -> bool:
        """Whether nothing can be done before the client sends more."""
        if self._deaf or self.flow.read_paused:
            return False
        if self._whole:
            return not self._unanswered()
        return not self._is_answered_amid_its_body()  # else it lingers

    def _end(self) -> None:
        """Close, but amid a request not before the client has stopped sending."""
        if self._whole:
            self.transport.close()
            return
        self._deaf = True
        self.pipeline.clear()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._linger()

    def _linger(self) -> None:
        self._lingering = self.loop.call_later(self._linger_seconds, self.transport.close)

    def _discard(self, size: int) -> None:
        self._linger_bytes -= size
        if self._linger_bytes < 0:
            self.transport.close()


def _parser(protocol: Protocol) -> HttpRequestParser:
    """As uvicorn makes it."""
    parser = HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class _Ending(asyncio.Transport):
    """A transport, as responses see it, that is closed in another way."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write  # type: ignore[method-assign]
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.close = close  # type: ignore[method-assign]
