"""What a connection takes, what it makes of it, and how it ends."""

import asyncio
import http.client
import json
import shutil
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.connection import (
    DRAIN_LINGER_SECONDS,
    LINGER_BYTES,
    LINGER_SECONDS,
    MOST_HEAD_BYTES,
    SILENCE_SECONDS,
    SLOWEST_BYTES_A_SECOND,
    Protocol,
)
from server.context import Context
from server.middleware import FAULT, send_error
from tests.conftest import until

LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAA\r\n"
)


# --- over sockets --------------------------------------------------------------------------------


@contextmanager
def saying(server, data):
    """Send raw bytes; the file that the answers are read from."""
    with server.send(data) as connection, connection.makefile("rb") as answers:
        yield answers


def next_answer(answers):
    """Its status, headers and body."""
    status = int(answers.readline().split()[1])
    headers = http.client.parse_headers(answers)
    return status, headers, answers.read(int(headers["content-length"]))


def check_refusal(answers, status, code):
    """An error like any other, after which the connection ends; its request id."""
    said, headers, body = next_answer(answers)
    body = json.loads(body)
    assert (said, body["code"]) == (status, code)
    assert body["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"
    assert answers.read() == b""
    return body["request_id"]


def refused(server, data, status, code):
    with saying(server, data) as answers:
        return check_refusal(answers, status, code)


LONG = b"x" * 2**20
ENDLESS = {
    "a header": b"GET /livez HTTP/1.1\r\nX: " + LONG,
    "headers": b"GET /livez HTTP/1.1\r\n" + b"X: y\r\n" * 2**17,
    "a path": b"GET /" + LONG,
    "a trailer": CHUNKED + b"1\r\nx\r\n0\r\nX: " + LONG,
    "a chunk's extension": CHUNKED + b"1;" + LONG,
    "lines before a request": b"\r\n" * 2**19,
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_cut_off_and_told_so(server, what):
    refused(server, ENDLESS[what], 431, "head_too_large")


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_cut_off_behind_another_request(server, what):
    with saying(server, LIVE + ENDLESS[what]) as answers:
        assert next_answer(answers)[0] == 200
        check_refusal(answers, 431, "head_too_large")


UNREADABLE = {
    "no HTTP": b"hello world\r\n\r\n",
    "a method that there is not": b"BREW /classify HTTP/1.1\r\nHost: x\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a length below zero": POST + b"Content-Length: -1\r\n\r\n",
    "a tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "a chunk without a size": CHUNKED + b"zz\r\n",
    "a chunk that is longer than its size": CHUNKED + b"1\r\nxyz\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_an_error_like_any_other(server, what):
    refused(server, UNREADABLE[what], 400, "bad_request")


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_answered_after_what_came_before_it(server, png, what):
    good = POST + b"Content-Length: %d\r\n\r\n" % len(png) + png
    with saying(server, good + LIVE + UNREADABLE[what] + LIVE) as answers:
        assert next_answer(answers)[0] == 200
        assert next_answer(answers)[2] == b"live\n"
        check_refusal(answers, 400, "bad_request")


def test_what_cannot_be_read_is_one_line_in_the_log(server, caplog):
    caplog.set_level("INFO")
    ids = [refused(server, data, 400, "bad_request") for data in UNREADABLE.values()]
    ids.append(refused(server, ENDLESS["a header"], 431, "head_too_large"))

    def lines():
        return [one for one in caplog.records if one.name not in ("httpx", "uvicorn.access")]

    until(lambda: len(lines()) == len(ids))  # they are answered first
    assert [one.fields["request_id"] for one in lines()] == ids
    assert [one.fields["status"] for one in lines()] == [400] * len(UNREADABLE) + [431]
    assert {one.levelname for one in lines()} == {"INFO"}


@pytest.mark.parametrize("target", [b"http://x", b"HTTP://x:80?top_k=1", b"https://x/", b"/"])
def test_a_target_without_a_path_is_the_first_page(server, target):
    with saying(server, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target) as answers:
        status, headers, _ = next_answer(answers)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_a_client_of_http_1_0_gets_no_chunks(server, png):
    head = POST.replace(b"1.1", b"1.0") + b"Accept: text/event-stream\r\n"
    with saying(server, head + b"Content-Length: %d\r\n\r\n" % len(png) + png) as answers:
        status, headers, body = next_answer(answers)
        assert answers.read() == b""
    assert (status, headers["transfer-encoding"]) == (200, None)
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    assert body.startswith(b"event: exit\n") and b"event: answer\n" in body


def test_what_cannot_be_read_keeps_the_id_that_it_came_with(server):
    request = POST + b"X-Request-ID: mine\r\nContent-Length: x\r\n\r\n"
    assert refused(server, request, 400, "bad_request") == "mine"


def test_a_body_that_cannot_be_read_is_counted_as_its_requests(server):
    def count():
        return server.metric("requests_total", route="/classify", code="400")

    before = count()
    refused(server, CHUNKED + b"5\r\nhello\r\nzz\r\n", 400, "bad_request")
    until(lambda: count() == before + 1)


def upgrading(png, chunked=False):
    if chunked:
        framed = b"%x\r\n" % len(png) + png + b"\r\n0\r\n\r\n"
        return POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n" + framed
    return POST + H2C + b"Content-Length: %d\r\n\r\n" % len(png) + png


@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_that_offers_another_protocol_is_answered_in_this_one(
    server, png, caplog, chunked
):
    requests = upgrading(png, chunked) * 2 + LIVE.replace(b"Host", H2C + b"Host")
    with saying(server, requests) as answers:
        assert [next_answer(answers)[0] for _ in range(3)] == [200, 200, 200]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("also", [b"", b"Connection: close\r\n"])
def test_an_offer_changes_nothing_else_of_a_request(server, png, version, also):
    head = POST.replace(b"1.1", version) + also + b"X-Request-ID: mine\r\n"
    rest = b"Content-Length: %d\r\n\r\n" % len(png) + png
    with saying(server, head + H2C + rest) as offered, saying(server, head + rest) as plain:
        one, other = next_answer(offered), next_answer(plain)
    assert (one[0], one[1]["x-request-id"]) == (200, "mine")
    assert one[1]["connection"] == other[1]["connection"]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_may_offer_http_2(server, png, tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(png)
    command = ["curl", "-s", "--http2", "--data-binary", f"@{image}", f"{server.url}/classify"]
    said = subprocess.run(command, capture_output=True, timeout=20)
    if b"libcurl" in said.stderr or said.returncode == 2:
        pytest.skip("this curl does not speak HTTP/2")
    assert "label" in json.loads(said.stdout)


LARGE = b"x" * 2**23
"""More than sockets hold, so that a client sends while it is answered."""


def pieces():
    yield from [LARGE[: 2**20]] * 8


def chunks():
    yield from [LONG] * 8


def post_all(server, sent, **headers):
    """The status that a client gets which sends all it has before it reads."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        client.request("POST", "/classify", sent, headers)
        return client.getresponse().status
    finally:
        client.close()


@pytest.mark.slow
def test_a_client_that_sends_a_body_over_the_limit_to_its_end_gets_its_answer(serve):
    with serve(max_body_bytes=2**16) as small:
        assert [post_all(small, LARGE) for _ in range(3)] == [413] * 3
        assert [post_all(small, chunks()) for _ in range(3)] == [413] * 3
        assert small.served.in_flight == 0


def test_a_client_that_sends_its_body_without_a_key_to_its_end_gets_its_answer(serve):
    with serve(api_keys="one", warm=False) as locked:
        assert [post_all(locked, LARGE, Connection="close") for _ in range(3)] == [401] * 3


# --- in imagined time ----------------------------------------------------------------------------


class Line(asyncio.Transport):
    """A transport that notes what is done to it."""

    def __init__(self):
        super().__init__()
        self.written, self.ended, self.closed, self.aborted = b"", False, False, False
        self.unsent, self.reads = 0, True

    def write(self, data):
        assert not self.ended
        self.written += data

    def write_eof(self):
        self.ended = True

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def is_closing(self):
        return self.closed

    def get_write_buffer_size(self):
        return self.unsent

    def pause_reading(self):
        self.reads = False

    def resume_reading(self):
        self.reads = True


class Loop:
    """The running loop with a clock that stands still."""

    def __init__(self):
        self.timers = []
        self.now = 0.0

    def time(self):
        return self.now

    def create_task(self, coroutine):
        return asyncio.get_running_loop().create_task(coroutine)

    def call_later(self, seconds, callback):
        timer = SimpleNamespace(seconds=seconds, callback=callback)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def silence(self, protocol, seconds):
        """Let time pass in which nothing is read, and the connection notice."""
        self.now += seconds
        (timer,) = [t for t in self.timers if t.callback == protocol._end_silence]
        timer.cancel()
        timer.callback()

    def others(self, protocol):
        """Timers but the one that every connection has."""
        return [t for t in self.timers if t.callback != protocol._end_silence]


LENGTH = (b"content-length", b"2")


async def answer_at_once(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [LENGTH]})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer_and_close(scope, receive, send):
    headers = [LENGTH, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def opened(app=answer_at_once):
    """A connection to an application that reads no body."""
    config = uvicorn.Config(app, log_config=None, proxy_headers=False, lifespan="off")
    protocol, line = Protocol(config, ServerState(), {}, _loop=Loop()), Line()
    protocol.connection_made(line)
    return protocol, line


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def head(size):
    """A head that counts as so many bytes."""
    line, name = b"/", b"x"
    return b"GET / HTTP/1.1\r\nx: " + b"y" * (size - len(line) - len(name) - 4) + b"\r\n\r\n"


@pytest.mark.parametrize("read", [2**20, MOST_HEAD_BYTES, 10_000, 999])
@pytest.mark.parametrize(("over", "status"), [(0, b"200"), (1, b"431")])
def test_a_heads_limit_is_the_same_however_it_comes(read, over, status):
    async def scenario():
        protocol, line = opened()
        sent = head(MOST_HEAD_BYTES + over)
        for start in range(0, len(sent), read):
            protocol.data_received(sent[start : start + read])
        await turns()
        return line.written

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 " + status)


def test_a_heads_limit_holds_behind_a_request_that_offers_another_protocol():
    async def scenario():
        protocol, line = opened()
        offer = LIVE.replace(b"Host", H2C + b"Host")
        protocol.data_received(offer + head(MOST_HEAD_BYTES + 1))
        await turns()
        return line.written

    assert b"HTTP/1.1 431" in asyncio.run(scenario())


def test_what_is_read_with_a_large_body_does_not_count_for_the_next_head():
    async def scenario():
        protocol, line = opened()
        whole = POST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000
        protocol.data_received(whole + LIVE[:20])
        protocol.data_received(LIVE[20:] + whole)
        await turns()
        return line.written

    assert b"431" not in asyncio.run(scenario())


HALF = POST + b"Content-Length: 1000\r\n\r\nand no more"


async def lingering():
    protocol, line = opened(answer_and_close)
    protocol.data_received(HALF)
    await turns()
    assert line.written.endswith(b"ok") and line.ended and not line.closed
    return protocol, line


async def refused_amid_its_body():
    """A connection that goes on, answered before it has all of a request."""
    protocol, line = opened()
    protocol.data_received(POST + b"Content-Length: %d\r\n\r\n" % (2 * LINGER_BYTES))
    await turns()
    assert line.written.endswith(b"ok") and not line.closed
    return protocol, line


def test_a_whole_request_leaves_nothing_to_linger_for():
    async def scenario():
        protocol, line = opened(answer_and_close)
        protocol.data_received(LIVE)
        await turns()
        return line, protocol.loop.others(protocol)

    line, timers = asyncio.run(scenario())
    assert line.closed and not line.ended and not timers


@pytest.mark.parametrize("answered", [lingering, refused_amid_its_body])
def test_what_is_left_of_a_body_is_read_for_so_many_bytes_and_no_more(answered):
    async def scenario():
        protocol, line = await answered()
        for _ in range(LINGER_BYTES // len(LONG)):
            protocol.data_received(LONG)
        assert not line.closed
        protocol.data_received(b"x")
        assert line.closed

    asyncio.run(scenario())


@pytest.mark.parametrize("answered", [lingering, refused_amid_its_body])
def test_what_is_left_of_a_body_is_read_for_so_long_and_no_longer(answered):
    async def scenario():
        protocol, line = await answered()
        protocol.data_received(b"x")  # it still sends: keep-alive's timer is none of its
        (timer,) = protocol.loop.others(protocol)
        assert timer.seconds == LINGER_SECONDS
        timer.callback()
        assert line.closed
        protocol.connection_lost(None)
        assert not protocol.loop.timers

    asyncio.run(scenario())


def test_a_drain_ends_lingering_at_once():
    async def scenario():
        protocol, line = await lingering()
        protocol.shutdown()
        assert line.closed

    asyncio.run(scenario())


def test_what_is_answered_during_a_drain_lingers_for_a_moment():
    async def scenario():
        protocol, line = opened(answer_and_close)
        protocol.data_received(HALF)
        protocol.shutdown()
        await turns()
        assert line.ended and not line.closed
        assert DRAIN_LINGER_SECONDS in [timer.seconds for timer in protocol.loop.timers]

    asyncio.run(scenario())


def test_once_a_body_is_whole_its_connection_waits_for_another_request_as_ever():
    async def scenario():
        protocol, line = opened()
        protocol.data_received(POST + b"Content-Length: 5\r\n\r\n")
        await turns()
        protocol.data_received(b"hello")
        (timer,) = protocol.loop.others(protocol)
        assert timer.seconds == protocol.timeout_keep_alive
        protocol.data_received(LIVE)
        await turns()
        assert line.written.count(b"200 OK") == 2
        (timer,) = protocol.loop.others(protocol)
        timer.callback()
        assert line.closed

    asyncio.run(scenario())


# --- clients that stop sending -------------------------------------------------------------------


async def reads_its_body(scope, receive, send):
    await receive()
    while FAULT not in scope:
        await receive()
    await send_error(send, Context("7", 0.0), scope[FAULT])


STOPPED = {
    "a request line": LIVE[:9],
    "a head": LIVE[:-2],
    "a body": HALF,
    "a chunk": CHUNKED + b"5\r\nhe",
}


@pytest.mark.parametrize("before", [b"", LIVE])
@pytest.mark.parametrize("what", STOPPED)
def test_a_client_that_stops_amid_a_request_is_told_so(what, before):
    async def scenario():
        async def app(scope, receive, send):
            reads = reads_its_body if scope["method"] == "POST" else answer_at_once
            await reads(scope, receive, send)

        protocol, line = opened(app)
        protocol.data_received(before + STOPPED[what])
        await turns()
        answered = line.written
        protocol.loop.silence(protocol, SILENCE_SECONDS)
        await turns()
        return answered, line

    answered, line = asyncio.run(scenario())
    assert answered.count(b"HTTP/1.1 200") == bool(before)
    said = line.written[len(answered) :]
    assert said.startswith(b"HTTP/1.1 408") and b"request_timeout" in said
    assert line.ended


def slowly(bytes_a_second, seconds):
    """What a connection writes while a client sends a body at this pace, for so long or until it
    is answered."""

    async def scenario():
        protocol, line = opened(reads_its_body)
        protocol.data_received(POST + b"Content-Length: 1000000\r\n\r\n")
        await turns()
        for _ in range(int(seconds / PIECE_SECONDS)):
            protocol.data_received(b"x" * int(bytes_a_second * PIECE_SECONDS))
            protocol.loop.silence(protocol, PIECE_SECONDS)
            await turns()
            if line.written:
                return line.written, protocol.loop.now
        return line.written, protocol.loop.now

    return asyncio.run(scenario())


PIECE_SECONDS = 0.6 * SILENCE_SECONDS


def test_a_client_that_sends_a_little_now_and_then_is_told_so():
    written, seconds = slowly(0.1 * SLOWEST_BYTES_A_SECOND, 600)
    assert written.startswith(b"HTTP/1.1 408")
    assert SILENCE_SECONDS < seconds < 2 * SILENCE_SECONDS


def test_a_client_on_a_slow_line_is_waited_for():
    assert slowly(1.1 * SLOWEST_BYTES_A_SECOND, 600)[0] == b""


def test_a_client_that_sent_much_may_not_be_silent_for_longer():
    async def scenario():
        protocol, line = opened(reads_its_body)
        protocol.data_received(POST + b"Content-Length: 1000000\r\n\r\n" + b"x" * 50_000)
        await turns()
        protocol.loop.silence(protocol, SILENCE_SECONDS)
        await turns()
        return line.written

    assert asyncio.run(scenario()).startswith(b"HTTP/1.1 408")


def test_a_client_that_sends_much_and_then_a_little_is_told_so():
    async def scenario():
        protocol, line = opened(reads_its_body)
        protocol.data_received(POST + b"Content-Length: 1000000\r\n\r\n" + b"x" * 50_000)
        while not line.written and protocol.loop.now < 600:
            await turns()
            protocol.data_received(b"x")
            protocol.loop.silence(protocol, PIECE_SECONDS)
            await turns()
        return line.written, protocol.loop.now

    written, seconds = asyncio.run(scenario())
    assert written.startswith(b"HTTP/1.1 408")
    assert seconds < 3 * SILENCE_SECONDS


def test_a_request_has_its_own_patience_however_old_its_connection_is():
    async def scenario():
        protocol, line = opened()
        for _ in range(9):
            protocol.data_received(LIVE[:9])
            protocol.loop.silence(protocol, 0.9 * SILENCE_SECONDS)
            protocol.data_received(LIVE[9:])
            await turns()
            protocol.loop.silence(protocol, 0.9 * SILENCE_SECONDS)
        return line

    line = asyncio.run(scenario())
    assert line.written.count(b"HTTP/1.1 200") == 9 and not line.closed


@pytest.mark.parametrize("sent", [b"", LIVE + b"\r\n"], ids=["nothing", "an empty line more"])
def test_a_client_that_begins_no_request_is_let_go(sent):
    async def scenario():
        protocol, line = opened()
        protocol.data_received(sent)
        await turns()
        protocol.data_received(b"\r\n")  # which ends keep-alive's patience
        assert not protocol.loop.others(protocol)
        written = line.written
        protocol.loop.silence(protocol, SILENCE_SECONDS)
        assert line.closed and line.written == written

    asyncio.run(scenario())


def test_a_client_that_waits_for_its_answer_is_not_cut_off():
    async def scenario():
        answer = asyncio.Event()

        async def slow(scope, receive, send):
            await answer.wait()
            await answer_at_once(scope, receive, send)

        protocol, line = opened(slow)
        protocol.data_received(LIVE)
        await turns()
        for _ in range(3):
            protocol.loop.silence(protocol, SILENCE_SECONDS)
        assert not line.closed
        answer.set()
        await turns()
        assert line.written.startswith(b"HTTP/1.1 200") and not line.closed

    asyncio.run(scenario())


def test_a_body_that_waits_to_be_taken_is_not_its_clients_silence():
    async def scenario():
        async def busy(scope, receive, send):
            await asyncio.Event().wait()

        protocol, line = opened(busy)
        protocol.data_received(POST + b"Content-Length: 1000000\r\n\r\n" + b"x" * 100_000)
        await turns()
        protocol.loop.silence(protocol, SILENCE_SECONDS)
        await turns()
        assert not line.closed and not line.written

    asyncio.run(scenario())


@pytest.mark.parametrize("app", [answer_at_once, answer_and_close])
def test_a_client_that_takes_nothing_of_its_answer_is_let_go(app):
    async def scenario():
        protocol, line = opened(app)
        protocol.data_received(LIVE)
        await turns()
        for line.unsent in (5000, 4000, 4000):  # it takes a little, and then no more
            assert not line.aborted
            protocol.loop.silence(protocol, SILENCE_SECONDS)
        assert line.aborted

    asyncio.run(scenario())


def test_a_request_that_comes_while_another_is_answered_is_not_cut_off():
    """Its head is there, and its body on the way, when the answer before it is sent."""

    async def scenario():
        answer = asyncio.Event()

        async def app(scope, receive, send):
            if scope["method"] == "GET":
                await answer.wait()
            else:
                while (await receive())["more_body"]:
                    pass
            await answer_at_once(scope, receive, send)

        protocol, line = opened(app)
        protocol.data_received(LIVE + HALF)
        answer.set()
        await turns()
        assert line.written.count(b"200 OK") == 1
        assert not protocol.loop.others(protocol)  # such as a timer that ends it
        protocol.data_received(b"x" * 1000)
        await turns()
        assert line.written.count(b"200 OK") == 2

    asyncio.run(scenario())


def test_nothing_more_is_read_while_requests_wait_behind_one_another():
    async def scenario():
        answers = asyncio.Semaphore(0)

        async def app(scope, receive, send):
            await answers.acquire()
            await answer_at_once(scope, receive, send)

        protocol, line = opened(app)
        protocol.data_received(LIVE * 4)
        for answered in range(4):
            assert line.written.count(b"200 OK") == answered
            assert line.reads == (answered == 3)
            answers.release()
            await turns()
        assert line.reads

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_request_that_stops_coming_is_counted_and_its_neighbours_are_answered(
    serve, png, monkeypatch
):
    monkeypatch.setattr("server.connection.SILENCE_SECONDS", 0.2)
    with serve() as server, saying(server, HALF) as answers:
        check_refusal(answers, 408, "request_timeout")
        server.wait_for_a_turn()
        assert server.metric("requests_total", route="/classify", code="408") == 1
        assert server.post(png).status_code == 200


@pytest.mark.slow
def test_a_client_that_never_reads_is_let_go_with_all_it_was_to_be_sent(serve, monkeypatch):
    monkeypatch.setattr("server.connection.SILENCE_SECONDS", 0.2)
    model = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve() as server, server.send(model * 1000, timeout=20) as connection:
        with pytest.raises(ConnectionResetError):
            while True:
                connection.sendall(model)
        assert server.client.get("/readyz").status_code == 200
