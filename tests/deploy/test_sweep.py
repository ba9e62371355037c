"""The sweep's simulation against a server of known costs, and the sweep against a real one."""

import asyncio
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.loadtest.load import Result
from deploy.loadtest.samples import Sample
from deploy.loadtest.schedules import KINDS
from deploy.loadtest.summary import summarise
from deploy.simulator import Overhead
from deploy.sweep.__main__ import FACTORS, main
from deploy.sweep.engine import engine
from deploy.sweep.measuring import Flood, Spent, _answered_flood
from deploy.sweep.pace import pace_of, together, watching
from deploy.sweep.prediction import predict
from deploy.sweep.recording import columns, load_seconds
from deploy.sweep.report import recovery_seconds
from tests.conftest import encode, noise
from tests.deploy.test_reply import saying

ENGINE = {
    "seconds": {str(k): {"1": 0.001, "8": 0.004} for k in (1, 2)},
    "ladder": [
        {"max_accuracy_loss": 0.01, "thresholds": [0.8]},
        {"max_accuracy_loss": 1.0, "thresholds": [0.0]},
    ],
    "max_batch": 8,
    "backlog_seconds": 0.0,
}
MORE = {"teams": {}, "workers": 1, "most_workers": 1, "http_seconds": 0.0}
"""What older servers do not say."""
NONE = Overhead()
SURE, UNSURE = (0.9, 0.9), (0.1, 0.5)


def evenly(rate, seconds=1.0):
    return [(i / rate, i / rate) for i in range(int(rate * seconds))]


def test_the_last_worker_is_simulated_as_far_as_http_leaves_its_core():
    """Images of 0.5 ms each in full batches, one pass of which takes longer than one of a few."""
    slow = {"seconds": {str(k): {"1": 0.01, "8": 0.04} for k in (1, 2)}}
    load = evenly(300)

    def goodput(**said):
        return predict(ENGINE | slow | said, load, [SURE], 0.1, 1.0, NONE)["goodput_per_second"]

    alone = goodput(workers=1)
    assert goodput(workers=1, most_workers=2, http_seconds=0.0) > 1.4 * alone
    assert goodput(workers=2, most_workers=2, http_seconds=1.0) == pytest.approx(alone, rel=0.1)


def test_a_calm_load_is_answered_in_time_at_the_exit_that_suffices():
    said = predict(ENGINE, evenly(100), [SURE], 0.05, 1.0, NONE)
    assert (said["in_time_share"], said["exits"]) == (1.0, {"1": 100, "2": 0})
    assert predict(ENGINE, evenly(100), [UNSURE], 0.05, 1.0, NONE)["exits"] == {"1": 0, "2": 100}


@pytest.mark.slow
def test_beyond_capacity_goodput_stays_near_what_first_exits_allow():
    said = predict(ENGINE, evenly(8000), [UNSURE], 0.05, 1.0, NONE)
    assert 0.8 * 2000 < said["goodput_per_second"] <= 2000 * 1.01
    assert said["exits"]["1"] > 10 * said["exits"]["2"]


def test_an_event_loop_lets_through_only_what_it_has_time_for():
    busy = Overhead(begin_seconds=0.001, answer_seconds=0.001)
    said = predict(ENGINE, evenly(400), [SURE], 0.05, 1.0, busy)
    assert said["in_time_share"] == 1.0
    said = predict(ENGINE, evenly(1000), [SURE], 0.05, 1.0, busy)
    assert 0.4 < said["in_time_share"] < 0.6
    assert said["refused_share"] == pytest.approx(1 - said["in_time_share"], abs=0.1)


@pytest.mark.slow
def test_time_between_batches_is_lost_to_images():
    said = predict(ENGINE, evenly(8000), [UNSURE], 0.05, 1.0, Overhead(batch_seconds=0.004))
    assert 0.8 * 1000 < said["goodput_per_second"] <= 1000 * 1.01


def test_goodput_is_over_the_length_of_the_load_as_it_is_measured():
    times = [0.0, *(1.0 + i / 1000 for i in range(100))]
    sent = [(at, at) for at in times]
    said = predict(ENGINE, sent, [SURE], 0.05, 4.0, NONE)
    results = [Result(at, at, at + 0.001, 200, True) for at in times]
    measured = summarise(results, 0.05, 4.0)
    assert said["goodput_per_second"] == measured["goodput_per_second"] == 101 / 4


def test_an_answer_after_the_end_of_a_load_counts_in_no_goodput():
    slow = Overhead(batch_seconds=0.03)
    said = predict(ENGINE, [(0.0, 0.0), (0.99, 0.99)], [UNSURE], 0.05, 1.0, slow)
    assert (said["in_time_share"], said["goodput_per_second"]) == (1.0, 1.0)


def test_a_recording_that_does_not_say_how_long_its_load_was_ends_with_its_last_request():
    row = recording()["rows"][0]
    assert load_seconds(row) == 1.0
    del row["seconds"]
    assert load_seconds(row) == 0.99


def test_batches_take_as_long_as_they_did_at_that_time_of_the_load():
    whole = together(ENGINE)
    slower = [(0.0, whole), (0.5, 30 * whole)]
    said = predict(ENGINE, evenly(100), [SURE], 0.02, 1.0, NONE, moments=slower)
    assert said["in_time_share"] == pytest.approx(0.5, abs=0.02)
    slow = [(0.0, 30 * whole)]
    said = predict(ENGINE, evenly(100), [SURE], 0.02, 1.0, NONE, moments=slow)
    assert said["in_time_share"] == 0.0


def test_a_server_that_does_not_answer_a_look_costs_the_load_nothing():
    async def scenario():
        async with watching("http://127.0.0.1:9", "token") as moments:
            await asyncio.sleep(0.05)
        return moments

    assert asyncio.run(scenario()) == []


def test_the_pace_between_two_moments_is_that_of_the_first():
    pace = pace_of([(0.1, 2.0), (0.3, 4.0), (0.5, 1.0)])
    assert [pace(t) for t in (0.0, 0.1, 0.29, 0.3, 9.0)] == [1.0, 1.0, 1.0, 2.0, 0.5]
    assert pace_of([])(3.0) == 1.0


def test_a_request_sent_late_has_less_time_left():
    late = [(at, at + 0.045) for at, _ in evenly(100)]
    assert predict(ENGINE, late, [SURE], 0.05, 1.0, NONE)["in_time_share"] == 1.0
    assert predict(ENGINE, late, [UNSURE], 0.046, 1.0, NONE)["in_time_share"] == 0.0


def test_a_server_that_is_gone_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    command = ["http://127.0.0.1:9", "--images", str(tmp_path), "--admin-token", "t"]
    assert main(command) == 2
    assert "error: http://127.0.0.1:9 gives no answer" in capsys.readouterr().err


def test_a_wrong_token_is_one_sentence(server, tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    assert main([server.url, "--images", str(tmp_path), "--admin-token", "t"]) == 2
    assert "/engine answers 404; is it the server's admin token?" in capsys.readouterr().err


def test_a_sweep_shorter_than_a_burst_is_refused(tmp_path, capsys):
    command = ["http://127.0.0.1:9", "--images", str(tmp_path), "--admin-token", "t"]
    for seconds in ("1", "3"):
        assert main([*command, "--seconds", seconds]) == 2
        assert "--seconds must be a multiple of 2" in capsys.readouterr().err


def test_floods_add_up():
    once = Flood(Spent(1.0, 0.2, 0.9, 0.7, 50), 400)
    both = once + Flood(Spent(3.0, 0.6, 1.8, 2.0, 100), 400)
    assert both.spent == Spent(4.0, pytest.approx(0.8), pytest.approx(2.7), 2.7, 150)
    assert both.request_seconds == pytest.approx(1e-3)
    assert both.per_second == 200


def test_what_workers_spend_between_batches_leaves_out_stages_and_waiting():
    assert Flood(Spent(9.0, 1.0, 1.7, 1.5, 200), 1000).batch_seconds == pytest.approx(1e-3)


def test_stages_counted_a_moment_later_leave_nothing_between():
    assert Flood(Spent(1.0, 0.1, 1.0, 1.01, 10), 10).batch_seconds == 0.0


def recording(seconds=0.1):
    results = [Result(at, at, at + 0.01, 200, True, 1, "confident") for at, _ in evenly(100)]
    costs = {"begin": seconds, "answer": 1e-4, "refuse": 1e-4, "batch": 1e-4}
    row = {
        "kind": "poisson",
        "load": 0.5,
        "seconds": 1.0,
        "measured": summarise(results, 0.05, 1.0),
        "client_ms": 0.1,
        "engine": ENGINE,
        "requests": columns(results),
    }
    return {
        "deadline_ms": 50.0,
        "cores": 2,
        "costs": {**costs, "full_depth_per_second": 200.0},
        "confidences": [SURE],
        "rows": [row],
    }


@pytest.mark.parametrize(
    ("begin", "off"), [(1e-4, ["100", "100", "+0%"]), (0.2, ["100", "0", "-100%"])]
)
def test_a_recording_is_simulated_again_without_a_server(tmp_path, capsys, begin, off):
    file, out = tmp_path / "sweep.json", tmp_path / "again.json"
    file.write_text(json.dumps(recording(begin)))
    assert main(["--again", str(file), "--json", str(out)]) == 0
    assert re.split(r" *\| ", capsys.readouterr().out)[-7:-4] == off
    assert main(["--again", str(out)]) == 0, "what is written can be read"
    assert re.split(r" *\| ", capsys.readouterr().out)[-7:-4] == off


@pytest.mark.parametrize(
    ("bent", "seconds"),
    [([], None), ([1.2], 0.0), ([1.2, 2.3, 2.4, 3.1, 3.9], 0.4), ([0.5, 5.9, 6.99], 0.99)],
)
def test_how_long_answers_are_bent_after_a_burst_is_seen_in_their_reasons(bent, seconds):
    sent = [(at, "overload") for at in bent] + [(at / 10, "confident") for at in range(80)]
    results = [Result(at, at, at + 0.01, 200, True, 1, reason) for at, reason in sent]
    said = recovery_seconds({"requests": columns(results)})
    assert said == (None if seconds is None else pytest.approx(seconds))


def test_nothing_of_a_load_of_one_swing_comes_after_its_burst():
    results = [Result(at, at, at + 0.01, 200, True, 1, "overload") for at in (1.2, 1.9)]
    assert recovery_seconds({"seconds": 2.0, "requests": columns(results)}) is None
    assert recovery_seconds({"seconds": 4.0, "requests": columns(results)}) == 0.0


def test_a_file_that_is_no_recording_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text("[]")
    assert main(["--again", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} is no recording of a sweep: all of it: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("costs", "batch"), "slow", "costs.batch: Input should be a valid number"),
        (("rows", 0, "engine", "ladder"), [], "rows.0.engine.ladder: List should have at least 1"),
        (("rows", 0, "engine", "seconds"), {"one": {}}, "rows.0.engine.seconds.one"),
        (("rows", 0, "requests", "sent_ms"), [1.0], "its columns differ in length"),
        (("rows", 0, "measured"), None, "rows.0.measured: Input should be"),
    ],
)
def test_a_recording_of_another_shape_is_one_sentence_that_says_where(
    tmp_path, capsys, path, value, said
):
    file, made = tmp_path / "x.json", json.loads(json.dumps(recording()))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(made))
    assert main(["--again", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_sweep_of_nothing_is_one_sentence(capsys):
    assert main([]) == 2
    assert "a sweep needs a URL, --images and --admin-token, or --again" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(capsys):
    assert main(["http://127.0.0.1:9", "--images", "x", "--json", "/nope/x.json"]) == 2
    assert "/nope/x.json cannot be written: there is no folder /nope" in capsys.readouterr().err


@pytest.mark.parametrize("again", [[], ["--again", "x.json"]])
def test_a_picture_that_cannot_be_drawn_is_said_before_anything_is_measured(capsys, again):
    assert main([*again, "--plot", "x.nope"]) == 2
    assert "error: x.nope cannot be drawn: its name must end in .png, " in capsys.readouterr().err


@pytest.mark.parametrize("after", ["/classify", "?x=1", "/engine/"])
def test_an_address_of_more_than_a_server_is_one_sentence(tmp_path, capsys, after):
    words = ["--images", str(tmp_path), "--admin-token", "t"]
    assert main([f"http://127.0.0.1:9{after}", *words]) == 2
    assert "a sweep wants http://host:port of the server, and nothing" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"[]", b"hi", b'{"seconds": {}}'])
def test_an_engine_of_something_else_is_one_sentence(data):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data)
    with (
        saying(head + data) as url,
        pytest.raises(OSError, match="/engine answers what no Offramp does"),
    ):
        engine(url, "token")


class Double(BaseHTTPRequestHandler):
    """Answers as an Offramp does: every image at once, metrics a number of times."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/engine":
            self._say(json.dumps(ENGINE | MORE).encode())
            return
        self.server.scrapes_left -= 1
        if self.server.scrapes_left < 0:
            self.close_connection = True
            return
        lines = ("stage_cpu_seconds_total", "stage_duration_seconds_count")
        parts = [f'cpu_seconds_total{{part="{p}"}}' for p in ("event_loop", "engine")]
        now = time.perf_counter()
        self._say("".join(f"offramp_{name} {now}\n" for name in (*lines, *parts)).encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(json.dumps(self.server.answer).encode(), self.server.status)

    def _say(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


SEEN = {"label": "x", "class_id": 0, "confidence": 0.9}
ANSWER = {
    **SEEN,
    **{"exit": 1, "exits": 2, "reason": "confident", "degraded": False, "top_k": []},
    **{"model": "m", "version": "1", "request_id": "r"},
    "timing_ms": {"decode": 0.1, "queue": 0.1, "compute": 1.0, "total": 2.0},
    "seen": [{**SEEN, "exit": k, "elapsed_ms": 0.9 * k} for k in (1, 2)],
}


@contextmanager
def double(scrapes=1000, status=200, answer=ANSWER):
    """The address of a server that looks like an Offramp."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 512  # every client comes at once

    with Server(("127.0.0.1", 0), Double) as server:
        server.scrapes_left, server.status, server.answer = scrapes, status, answer
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def brief_sweep(monkeypatch, tmp_path):
    """A sweep of loads of a tenth of a second, given an address and further words."""
    monkeypatch.setattr("deploy.sweep.__main__.COSTS_SECONDS", 0.05)
    monkeypatch.setattr("deploy.sweep.__main__.check_swings", lambda seconds: None)
    (tmp_path / "x.png").write_bytes(b"an image")
    words = ["--images", str(tmp_path), "--admin-token", "t", "--seconds", "0.1"]
    return lambda url, *more: main([url, *words, *more])


def test_a_sweep_whose_server_dies_keeps_what_was_recorded_before(brief_sweep, tmp_path, capsys):
    out = tmp_path / "sweep.json"
    floods, loads = 5, 2
    with double(scrapes=2 * (floods + loads)) as url:
        assert brief_sweep(f"{url}/", "--json", str(out)) == 2
    said = capsys.readouterr()
    assert f"error: after 2 of 14 loads: {url} gives no metrics: " in said.err
    assert said.out.count("\n| poisson") == 2
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert main(["--again", str(out)]) == 0


def test_refusals_are_no_capacity(tmp_path, capsys):
    sample = Sample(b"an image", None)
    with double(status=429) as url, pytest.raises(ValueError) as caught:
        asyncio.run(_answered_flood(url, [sample], "threshold=0", 0.05))
    assert "did not answer all of 64 clients at once (" in str(caught.value)
    assert "x 429" in str(caught.value) and "raise OFFRAMP_MAX_QUEUE" in str(caught.value)


@pytest.mark.parametrize("answer", [[], {"label": "x"}, ANSWER | {"seen": None}])
def test_an_answer_of_something_else_is_one_sentence(brief_sweep, capsys, answer):
    with double(answer=answer) as url:
        assert brief_sweep(url) == 2
    assert f"error: {url}/classify answers what no Offramp does\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_measures_and_simulates_every_load(serve, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(seed=i)))
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    with serve(admin_token="secret") as server:
        command = [server.url, "--images", str(tmp_path), "--admin-token", "secret"]
        command += ["--seconds", "2", "--json", str(out), "--plot", str(picture)]
        command += ["--deadline-ms", "1000"]  # on a busy machine, 50 may be kept by no answer
        assert main(command) == 0
    said = json.loads(out.read_text())
    rows = said["rows"]
    assert all(cost > 0 for cost in said["costs"].values())
    assert len(rows) == len(KINDS) * len(FACTORS)
    assert len(rows[0]["requests"]["status"]) == rows[0]["measured"]["offered"]
    assert len(rows[0]["moments"]) > 1
    assert rows[0]["measured"]["in_time_share"] > 0
    assert picture.stat().st_size > 1000
    assert "goodput" in capsys.readouterr().out
