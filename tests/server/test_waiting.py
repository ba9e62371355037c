"""What may happen to a request, or to its neighbours, while it waits for the device."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from server.costs import CostTable
from server.engine import BEAT_SECONDS, STUCK_BEATS
from server.errors import NotReady
from server.metrics import SERVER_FAULTS
from server.promise import Promise
from server.tickets import Ticket
from server.waiting import STUCK, Waiting
from tests.conftest import encode, noise, until
from tests.gate import gated
from tests.server.test_bad_input import BROKEN, check_error
from tests.server.test_classify import events

HEAD = b"POST /classify?threshold=1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def one(serve):
    with serve(default_deadline_ms=None, max_batch=4) as server, ThreadPoolExecutor(8) as threads:
        server.later = lambda data, **parameters: threads.submit(server.post, data, **parameters)
        yield server


def queued(server, images):
    until(lambda: server.served.in_flight == images)


@contextmanager
def broken_at(server, stage):
    """From this stage on the server's device fails."""
    with gated(server) as gate:
        run = gate.run

        def fail(k, inputs, alone=False):
            output = run(k, inputs, alone)
            assert k < stage, "what fails on the device"
            return output

        gate.run = fail
        gate.open()
        yield


def leave_behind(server, png, request, images):
    """Send a request of so many images behind one that runs, and go away; none is ever run."""
    with gated(server) as gate:
        first = server.later(png)
        gate.wait_for_a_batch()
        connection = server.send(request)
        queued(server, 1 + images)
        connection.close()
        queued(server, 1)
        gate.open()
        assert first.result().status_code == 200
    assert server.post(png).status_code == 200
    assert {len(inputs) for _, inputs in gate.batches} == {1}


def test_a_client_that_goes_away_frees_its_place_and_is_never_run(one, png):
    gone = encode(noise(seed=1))
    leave_behind(one, png, HEAD % len(gone) + gone, images=1)
    until(lambda: one.metric("requests_total", route="/classify", code="499") == 1)
    assert one.metric("in_flight_jobs") == 0


@pytest.mark.slow
def test_a_streaming_client_that_goes_away_frees_its_place(one, png):
    with gated(one) as gate:
        head = (HEAD % len(png)).replace(b"Host", b"Accept: text/event-stream\r\nHost")
        connection = one.send(head + png)
        gate.wait_for_a_batch()
        connection.close()
        queued(one, 0)
    assert one.post(png).status_code == 200


def test_a_streaming_client_that_goes_away_after_an_exit_was_not_answered(one, png, caplog):
    head = HEAD.replace(b"Host", b"Accept: text/event-stream\r\nHost") % len(png)
    with gated(one) as gate, one.send(head + png) as connection:
        gate.let_through()
        until(lambda: b"event: exit" in connection.recv(4096))
        connection.close()
        until(lambda: one.metric("requests_total", route="/classify", code="499") == 1)
    assert one.metric("requests_total", route="/classify", code="200") == 0
    assert one.post(png).status_code == 200
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.slow
def test_a_client_that_leaves_its_whole_batch_behind_frees_every_place(one, png):
    part = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n'
    body = b"".join(part % encode(noise(seed=s)) for s in range(20)) + b"--X--\r\n"
    head = HEAD.replace(b"/classify", b"/classify/batch") % len(body)
    head = head.replace(b"Host", b"Content-Type: multipart/form-data; boundary=X\r\nHost")
    leave_behind(one, png, head + body, images=20)
    until(lambda: one.metric("requests_total", route="/classify/batch", code="499") == 1)


@pytest.mark.parametrize(
    ("target", "kind", "route"),
    [
        ("/classify?deadline_ms=60000", "image/png", "/classify"),
        ("/classify?deadline_ms=60000", "multipart/form-data; boundary=X", "/classify"),
        ("/classify/batch?deadline_ms=60000", "multipart/form-data; boundary=X", "/classify/batch"),
        ("/v2/models/tiny/infer", "application/json", "/v2/infer"),
    ],
)
def test_a_client_that_leaves_amid_its_body_is_no_failure_of_the_server(one, target, kind, route):
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    connection = one.send(head.encode() + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
    assert connection.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the rest
    connection.close()
    until(lambda: one.metric("requests_total", route=route, code="499") == 1)
    assert all(one.metric("failed_images_total", code=code) == 0 for code in SERVER_FAULTS)


def test_a_body_of_which_nothing_comes_is_waited_for_until_the_deadline(serve):
    with serve(default_deadline_ms=100) as server:
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        with server.send(head) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 504")
        assert server.metric("deadlines_total", outcome="missed") == 1


@pytest.mark.slow
def test_bad_requests_neither_slow_nor_fail_their_neighbours(one, png):
    """Everything bad is answered while the device is busy; the good ones share a batch."""
    with gated(one) as gate:
        first = one.later(png)
        gate.wait_for_a_batch()
        neighbours = [one.later(encode(noise(seed=s)), threshold=0) for s in range(4)]
        queued(one, 5)
        for data, status, code in BROKEN.values():
            response = one.post(data)
            check_error(response, status, code or response.json()["code"])
        gate.open()
        assert {n.result().status_code for n in [first, *neighbours]} == {200}
    assert (1, 4) in [(stage, len(inputs)) for stage, inputs in gate.batches]


def test_an_image_that_the_network_fails_on_fails_alone(one, png):
    guilty = noise(seed=99)
    with gated(one) as gate:
        run = gate.run

        def fail_on_guilty(stage, inputs, alone=False):
            output = run(stage, inputs, alone)
            pixels = [i for i in inputs if hasattr(i, "shape")]
            assert not any((p == guilty).all() for p in pixels), "what fails on the device"
            return output

        gate.run = fail_on_guilty
        first = one.later(png)
        gate.wait_for_a_batch()
        bad = one.later(encode(guilty))
        neighbours = [one.later(encode(noise(seed=s))) for s in range(3)]
        queued(one, 5)
        gate.open()
        check_error(bad.result(), 500, "internal")
        assert {n.result().status_code for n in [first, *neighbours]} == {200}
    assert one.client.get("/livez").status_code == 200
    until(lambda: one.metric("failed_images_total", code="internal") == 1)


@pytest.mark.slow
def test_images_that_fail_in_a_batch_are_counted_and_logged_though_it_succeeds(one, png, caplog):
    caplog.set_level(logging.INFO)
    headers = {"x-request-id": "r1"}
    with broken_at(one, stage=1):
        files = [("files", png), ("files", png), ("files", b"no image")]
        response = one.client.post("/classify/batch", files=files, headers=headers)
    codes = [entry["code"] for entry in response.json()["results"]]
    assert (response.status_code, codes) == (200, ["internal", "internal", "unsupported_image"])
    assert one.metric("failed_images_total", code="internal") == 2
    assert one.metric("requests_total", route="/classify/batch", code="500") == 0
    until(lambda: logged(caplog, "offramp.access"))
    (line,) = logged(caplog, "offramp.access")
    assert line["errors"] == {"internal": 2, "unsupported_image": 1}
    assert ["r1"] in [said["request_ids"] for said in logged(caplog, "offramp.engine")]


def test_images_that_come_together_wait_for_one_another_where_a_single_one_is_refused(serve, png):
    with serve(max_queue=2) as small:
        files = [("files", png)] * 12
        results = small.client.post("/classify/batch", files=files).json()["results"]
        assert {entry.get("code") for entry in results} == {None}
        small.served.in_flight = 2
        assert small.post(png).status_code == 429
        small.served.in_flight = 0


def logged(caplog, name):
    return [record.fields for record in caplog.records if record.name == name]


@pytest.mark.slow
def test_a_failed_request_counts_as_one_failed_image_if_that_was_not_its_client(one, png):
    one.served.in_flight = one.served.settings.max_queue
    assert one.post(png).status_code == 429
    one.served.in_flight = 0
    assert one.post(b"no image").status_code == 400
    one.served.draining = True
    files = [("files", png)] * 3
    assert one.client.post("/classify/batch", files=files).status_code == 503
    one.served.draining = False
    until(lambda: one.metric("failed_images_total", code="draining") == 1)
    failed = {code: one.metric("failed_images_total", code=code) for code in SERVER_FAULTS}
    assert {code for code, count in failed.items() if count} == {"overloaded", "draining"}
    assert failed["overloaded"] == 1


def test_only_answers_have_a_duration_lest_a_quick_refusal_is_a_fast_answer(one, png):
    one.served.in_flight = one.served.settings.max_queue
    assert one.post(png).status_code == 429
    one.served.in_flight = 0
    assert one.post(b"no image").status_code == 400
    assert one.post(png).status_code == 200
    until(lambda: one.metric("requests_total", route="/classify", code="200") == 1)
    assert one.metric("request_duration_seconds_count", route="/classify") == 1


def test_a_deadline_that_passes_in_the_queue_is_a_504(one, png):
    with gated(one) as gate:
        first = one.later(png)
        gate.wait_for_a_batch()
        late = one.later(png, deadline_ms=20)
        queued(one, 2)
        threading.Event().wait(0.05)  # the deadline is on the real clock
        gate.open()
        check_error(late.result(), 504, "deadline_exceeded")
        assert first.result().status_code == 200
    assert one.metric("deadlines_total", outcome="missed") == 1


@pytest.mark.slow
def test_a_deadline_that_even_one_image_alone_would_miss_is_a_504(one, png):
    one.served.engine.scheduler.costs = CostTable({k: {1: 3.0} for k in range(1, 5)})
    check_error(one.post(png, deadline_ms=1000), 504, "deadline_exceeded")
    assert one.metric("deadlines_total", outcome="missed") == 1


def test_a_deadline_that_the_queue_would_miss_is_refused_with_a_time_to_retry(one, png):
    with gated(one) as gate:
        one.later(png)
        gate.wait_for_a_batch()
        one.served.engine.scheduler.costs = CostTable({k: {1: 1e-3, 2: 60.0} for k in range(1, 5)})
        one.later(png, deadline_ms=8000)
        queued(one, 2)
        refused = one.later(png, deadline_ms=9000)
        queued(one, 3)
        gate.open()
        check_error(refused.result(), 429, "overloaded")
    assert int(refused.result().headers["retry-after"]) >= 1
    assert one.metric("refused_total", reason="not_in_time") == 1


@pytest.mark.parametrize("more", ["", "/batch"])
def test_a_body_that_comes_too_slowly_for_its_deadline_is_not_waited_for(one, more):
    """It takes memory meanwhile, and could only be told that it is late."""
    kind = b"Content-Type: multipart/form-data; boundary=X\r\n" if more else b""
    head = b"POST /classify%s?deadline_ms=50 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    with one.send(head % more.encode() + kind + b"\r\n" + b"--X\r\n") as connection:
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 504") and b"deadline_exceeded" in answer
    assert one.metric("deadlines_total", outcome="missed") == 1


def test_a_batch_lets_others_through_while_its_images_are_decoded(one, png):
    served, seen = one.served, []
    decode = served.loaded.decoder._decode

    async def slowly(data, seconds):
        threading.Event().wait(0.02)
        seen.append("image")
        return await decode(data, seconds)

    served.loaded.decoder._decode = slowly
    with ThreadPoolExecutor(1) as thread:
        files = [("files", png)] * 20
        batch = thread.submit(one.client.post, "/classify/batch", files=files)
        until(lambda: seen)
        with one.send(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        seen.append("neighbour")
        assert batch.result().status_code == 200
    assert seen[-1] == "image"


STREAMED = {"accept": "text/event-stream"}


def test_a_stream_that_would_be_late_has_the_status_of_any_request(one, png):
    one.served.engine.scheduler.costs = CostTable({k: {1: 3.0} for k in range(1, 5)})
    late = one.client.post("/classify?deadline_ms=1000", content=png, headers=STREAMED)
    check_error(late, 504, "deadline_exceeded")
    assert one.metric("requests_total", route="/classify", code="504") == 1


@pytest.mark.slow
def test_a_stream_that_fails_after_an_exit_ends_with_the_error(one, png):
    with broken_at(one, stage=2):
        response = one.client.post("/classify?threshold=1", content=png, headers=STREAMED)
    assert response.status_code == 200
    (first, _), (last, error) = events(response)
    assert (first, last, error["code"]) == ("exit", "error", "internal")
    assert error["request_id"] == response.headers["x-request-id"]
    until(lambda: one.metric("failed_images_total", code="internal") == 1)


def test_a_deadline_that_passes_after_the_first_exit_is_an_answer(one, png):
    with gated(one) as gate:
        late = one.later(png, deadline_ms=300, threshold=1)
        gate.wait_for_a_batch()
        one.served.engine.scheduler.costs = CostTable({k: {1: 3.0} for k in range(1, 5)})
        gate.open()
        answer = late.result()
    assert answer.status_code == 200
    body = answer.json()
    assert (body["exit"], body["reason"], body["degraded"]) == (1, "deadline", True)


def test_a_deadline_counts_from_a_requests_first_byte(one, png):
    """Its head comes in two parts, further apart than its deadline allows."""
    connection = one.send(b"POST /classify?deadline_ms=20 HTTP/1.1\r\n")
    threading.Event().wait(0.04)
    connection.sendall(b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(png) + png)
    assert connection.recv(64).startswith(b"HTTP/1.1 504")
    connection.close()
    assert one.metric("deadlines_total", outcome="missed") == 1


@contextmanager
def stuck(server, png):
    """A server whose worker does not come back from the batch of a request; gives its answer."""
    engine = server.served.engine
    with gated(server) as gate:
        first = server.later(png)
        gate.wait_for_a_batch()
        engine._beats[0] -= STUCK_BEATS * BEAT_SECONDS + 1.0
        yield first


def test_a_stuck_engine_answers_503_until_it_turns_again(one, png):
    assert one.metric("ready") == 1
    with stuck(one, png) as first:
        assert one.client.get("/readyz").text == one.client.get("/livez").text == f"{STUCK}\n"
        assert one.metric("ready") == 0
        for _ in range(2):
            one._loop.call_soon_threadsafe(one.served.waiting.look)
        for response in (first.result(), one.post(png)):
            check_error(response, 503, "not_ready")
            assert response.json()["error"] == STUCK
        with pytest.raises(NotReady, match="stuck"):  # before anything is done for a request
            _ = one.served.engine
        queued(one, 0)
    until(lambda: one.metric("ready"))
    assert one.post(png).status_code == 200
    assert one.metric("failed_images_total", code="not_ready") == 2


@pytest.mark.slow
def test_a_server_looks_whether_its_engine_is_stuck(one, png):
    with stuck(one, png) as first:
        check_error(first.result(), 503, "not_ready")


class FakeEngine:
    """Turns or not, and is told of those who gave up."""

    def __init__(self):
        self.turning = True
        self.cancelled = []

    def cancel(self, ticket):
        self.cancelled.append(ticket)


def test_an_engine_is_given_up_only_if_it_is_stuck_whenever_it_is_looked_at():
    """Where the whole process stood still, its workers turn again within a beat."""

    async def wait():
        loop = asyncio.get_running_loop()
        waiting, engine, well = Waiting(), FakeEngine(), FakeEngine()
        tickets = [Ticket(loop, Promise(loop), None, 0.0, None) for _ in range(3)]
        engines = (engine, engine, well)
        tasks = [
            asyncio.ensure_future(waiting.answer(*one))
            for one in zip(tickets, engines, strict=True)
        ]
        await asyncio.sleep(0)
        for engine.turning in (False, True, False):
            waiting.look()
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        waiting.look()
        for task in tasks[:2]:
            with pytest.raises(NotReady, match="stuck"):
                await task
        assert engine.cancelled == tickets[:2]
        waiting.look()
        waiting.check(well)
        with pytest.raises(NotReady, match="stuck"):
            waiting.check(engine)  # though nobody waits for it any more
        engine.turning = True
        waiting.look()
        waiting.check(engine)
        assert not tasks[2].done()
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        assert well.cancelled == tickets[2:]

    asyncio.run(wait())
