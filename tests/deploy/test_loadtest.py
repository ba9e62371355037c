"""The load tester against a small server whose behaviour is known."""

import asyncio
import functools
import gc
import json
import math
import resource
import tarfile
from collections import Counter

import pytest

from deploy.loadtest import demo, schedules
from deploy.loadtest.__main__ import _parser, _patience, main
from deploy.loadtest.client import Client
from deploy.loadtest.headroom import own_rate
from deploy.loadtest.load import Result, closed_loop, once, open_loop
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.summary import summarise

OTTER = Sample(b"otter", "otter")
BEAR = Sample(b"bear", "bear")
SILENCE = Sample(b"silence", "otter")
NONSENSE = [b"otter, I think", b'["otter"]', b"null", b"{}", b'{"label": 1}', b"[" * 100_000]
"""What a server may say of an image with status 200 without saying anything."""
STATUS = {b"busy": b"429 Too Many Requests", b"nowhere": b"405 Method Not Allowed"}
GONE = "http://127.0.0.1:9/"


async def answer(posted, reader, writer):
    """Says otter to everything; closes the connection on `bear`; 429 for `busy`; says nothing to
    `silence`, and nonsense to itself. Notes what was `posted`.
    """
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            posted.append(body)
            if body == SILENCE.data:
                await reader.read()  # until the client leaves
                break
            status = STATUS.get(body, b"200 OK")
            said = json.dumps({"label": "otter", "exit": 1, "reason": "confident"}).encode()
            said = body if body in NONSENSE else said
            closing = b"Connection: close\r\n" if body == b"bear" else b""
            writer.write(b"HTTP/1.1 " + status + b"\r\n" + closing)
            writer.write(b"Content-Length: %d\r\n\r\n" % len(said) + said)
            if closing:
                break
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


def beside_server(use, posted=None):
    """What `use` comes to, given the server's URL; `posted` fills with the bodies of requests."""

    async def run():
        handler = functools.partial(answer, [] if posted is None else posted)
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        try:
            return await use(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/classify")
        finally:
            server.close()

    return asyncio.run(run())


def against_server(load):
    """What a load comes to that is given a client of the server."""

    async def use(url):
        client = Client(f"{url}?top_k=1")
        try:
            return await load(client)
        finally:
            await client.close()

    return beside_server(use)


def test_every_request_is_accounted_for_with_its_label_exit_and_reason():
    times = [0.0, 0.001, 0.002, 0.003]
    results = against_server(lambda c: open_loop(c, [OTTER, BEAR], times))
    assert len(results) == 4
    assert {(r.status, r.exit, r.reason) for r in results} == {(200, 1, "confident")}
    assert {r.right for r in results} <= {True, False}


def test_a_load_is_not_stopped_to_look_for_garbage_that_was_there_before():
    looked = []

    class Watching(Client):
        async def post(self, body):
            looked.append(gc.get_freeze_count())
            return await super().post(body)

    asyncio.run(open_loop(Watching("http://127.0.0.1:9/"), [OTTER], [0.0]))
    assert looked[0] > 1000
    assert gc.get_freeze_count() == 0


def test_a_refusal_counts_as_wrong_and_as_not_answered():
    results = against_server(lambda c: open_loop(c, [Sample(b"busy", "otter")], [0.0]))
    summary = summarise(results, math.inf, 1.0)
    assert summary["status"] == {"429": 1}
    assert (summary["effective_accuracy"], summary["accuracy_of_answers"]) == (0.0, None)


def test_a_server_that_is_gone_is_counted_not_raised():
    results = asyncio.run(open_loop(Client(GONE), [OTTER], [0.0]))
    assert results[0].status == 0


@pytest.mark.parametrize("said", NONSENSE)
def test_an_answer_that_says_nothing_of_an_image_is_counted_not_raised(said):
    results = against_server(lambda c: open_loop(c, [Sample(said, "otter"), OTTER], [0.0] * 9))
    assert {(r.status, r.right) for r in results} == {(0, False), (200, True)}


def test_what_another_server_says_of_an_image_may_have_any_form():
    class Saying(Client):
        async def post(self, body):
            return 200, b'{"predictions": [3]}'

    (result,) = asyncio.run(open_loop(Saying(f"{GONE}predict"), [OTTER], [0.0]))
    assert (result.status, result.right) == (200, False)


@pytest.mark.parametrize(
    "said", [{"label": "otter", "exit": "deep", "reason": ["confident"]}, {"label": "otter"}]
)
def test_an_answer_without_a_proper_exit_or_reason_is_still_an_answer(said):
    class Saying(Client):
        async def post(self, body):
            return 200, json.dumps(said).encode()

    results = asyncio.run(open_loop(Saying(GONE), [OTTER], [0.0]))
    assert summarise(results, math.inf, 1.0)["status"] == {"200": 1}
    assert (results[0].right, results[0].exit, results[0].reason) == (True, 0, "")


def test_a_head_without_end_is_counted_not_raised():
    async def run():
        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        said = await client.post(b"otter")
        server.close()
        return said

    async def babble(reader, writer):
        writer.write(b"x" * 200_000)
        await reader.read()
        writer.close()

    assert asyncio.run(run()) == (0, b"")


@pytest.mark.parametrize(
    "load",
    [
        lambda c: open_loop(c, [SILENCE], [0.0, 0.01], patience=0.05),
        lambda c: closed_loop(c, [SILENCE], clients=2, seconds=0.01, patience=0.05),
        lambda c: once(c, [SILENCE] * 1000, clients=2, patience=0.05),
    ],
)
def test_a_server_that_falls_silent_is_given_up(load):
    results = against_server(load)
    assert [(r.status, r.right) for r in results] == [(0, False)] * 2


def test_a_load_tester_that_may_open_nothing_more_says_so():
    async def too_many(client):
        least = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, least[1]))
        try:
            return await client.post(OTTER.data)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, least)

    with pytest.raises(OSError, match="Too many open files"):
        against_server(too_many)


def test_a_client_that_is_answered_goes_on_to_send_every_image_once():
    results = against_server(lambda c: once(c, [OTTER, BEAR] * 5, clients=3))
    assert [r.status for r in results] == [200] * 10


def test_patience_is_ten_deadlines_but_ten_seconds_at_least():
    command = [GONE, "--images", "x"]
    asked = [["--deadline-ms", "50"], ["--deadline-ms", "4000"], ["--patience", "0.5"]]
    said = [_patience(_parser().parse_args([*command, *options])) for options in asked]
    assert said == [10.0, 40.0, 0.5]


def test_help_says_that_a_trace_has_its_own_length():
    assert "length of the load; a trace has its own" in " ".join(_parser().format_help().split())


def evenly(rate, seconds):
    """Results of a load whose every request is answered after 5 ms."""
    times = [i / rate for i in range(rate * seconds)]
    return [Result(at, at, at + 0.005, 200, True) for at in times]


RATES = ("offered_per_second", "answered_per_second", "goodput_per_second")


def test_rates_are_over_the_length_of_a_load_whenever_its_last_answer_came():
    late = Result(1.0, 1.0, 13.0, 200, True)
    said = summarise([*evenly(100, 3), late], 0.05, 3.0)
    assert [said[rate] for rate in RATES] == pytest.approx([301 / 3, 100.0, 100.0])
    assert said["in_time_share"] == 300 / 301


def test_a_backlog_that_is_answered_after_a_load_makes_no_rate_large():
    slow = [Result(at, at, 2 * at + 0.01, 200, True) for at in (i / 100 for i in range(300))]
    said = summarise(slow, math.inf, 3.0)
    assert said["offered_per_second"] == 100
    assert said["answered_per_second"] == pytest.approx(50, rel=0.01)
    assert said["in_time_share"] == 1.0


def test_a_load_without_a_length_has_no_rates():
    said = summarise(evenly(100, 1), math.inf, None)
    assert [said[rate] for rate in RATES] == [None] * 3
    assert said["in_time_share"] == 1.0


def run_main(folder, *arguments, image=b"otter"):
    """The command's status against the server, and how many requests came to it."""
    for label in ("otter", "otters"):
        (folder / f"images/{label}").mkdir(parents=True)
        (folder / f"images/{label}/1.png").write_bytes(image)
    words = [*arguments, "--images", str(folder / "images"), "--seconds", "0.1"]
    posted = []

    status = beside_server(lambda url: asyncio.to_thread(main, [url, *words]), posted)
    return status, len(posted)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_figures_and_a_picture(tmp_path, capsys):
    out, picture = tmp_path / "x.json", tmp_path / "x.png"
    assert run_main(tmp_path, "--json", str(out), "--plot", str(picture))[0] == 0
    assert "effective accuracy" in capsys.readouterr().out
    (summary,) = json.loads(out.read_text()).values()
    assert 0 < summary["effective_accuracy"] < 1
    assert summary["offered_per_second"] == len(schedules.poisson(50, 0.1)) / 0.1
    assert summary["tester_headroom"] > 0
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_figures_are_there_even_if_the_picture_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    def fail(results, deadline_seconds, file):
        raise OSError("no space left on device")

    monkeypatch.setattr("deploy.loadtest.__main__.plot", fail)
    out = tmp_path / "x.json"
    assert run_main(tmp_path, "--json", str(out), "--plot", str(tmp_path / "x.png"))[0] == 2
    said = capsys.readouterr()
    assert "effective accuracy" in said.out
    assert said.err == "error: no space left on device\n"
    assert json.loads(out.read_text())


@pytest.mark.slow
def test_requests_of_a_trace_that_come_all_at_once_have_no_rates(tmp_path, capsys):
    trace = tmp_path / "trace.txt"
    trace.write_text("7.0\n7.0\n")
    assert run_main(tmp_path, "--trace", str(trace))[0] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "offered / s - answered / s - goodput / s (in time) - in time" in said
    assert "status {'200': 2}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot", "/nope/x.png"], "/nope/x.png cannot be written: there is no folder /nope"),
        (["--plot", "x.nope"], "x.nope cannot be drawn: its name must end in .png, "),
        (["--json", "/nope/x.json"], "/nope/x.json cannot be written: there is no folder /nope"),
        (["--json", "/"], "/ cannot be written: it is a folder"),
        (["--trace", "/nope/trace"], "No such file"),
        (["--rate", "0.001"], "at this rate no request comes in 0.1 s"),
        (["--bursts", "50"], "--seconds must be a multiple of 2, for bursts to keep"),
        ([GONE], f"{GONE} gives no answer"),
        ([GONE, GONE], "the same URL is given twice"),
    ],
)
def test_what_would_lose_a_measurement_is_said_before_it(tmp_path, capsys, arguments, said):
    status, posted = run_main(tmp_path, *arguments)
    assert (status, posted) == (2, 1 if arguments == [GONE] else 0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_a_server_that_serves_nobody_is_a_failure_after_its_figures(tmp_path, capsys):
    assert run_main(tmp_path, image=b"busy")[0] == 1
    said = capsys.readouterr()
    assert "status" in said.out and "'429'" in said.out
    assert said.err.startswith("error: http://127.0.0.1:")
    assert said.err.endswith("/classify answered no image\n")


def test_an_address_where_nothing_takes_images_is_not_loaded(tmp_path, capsys):
    status, posted = run_main(tmp_path, image=b"nowhere")
    assert (status, posted) == (2, 1)
    assert "answers 405; of an Offramp images go to …/classify\n" in capsys.readouterr().err


def test_a_server_that_is_silent_from_the_start_is_not_loaded(tmp_path, capsys):
    status, posted = run_main(tmp_path, "--patience", "0.05", image=SILENCE.data)
    assert (status, posted) == (2, 1)
    assert "/classify gives no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--rate", "--bursts", "--clients", "--seconds", "--deadline-ms", "--patience"]
)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_load_of_nothing_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        main([GONE, "--images", "x", option, value])
    assert f"argument {option}: '{value}' is no " in capsys.readouterr().err


def test_a_closed_loop_sends_the_next_when_the_last_was_answered():
    results = against_server(lambda c: closed_loop(c, [OTTER], clients=2, seconds=0.05))
    assert len(results) >= 4
    assert all(r.status == 200 for r in results)


def test_latency_counts_from_when_a_request_should_have_been_sent():
    late = Result(intended=1.0, sent=3.0, finished=3.5, status=200, right=True)
    assert late.seconds == 2.5
    assert summarise([late], 1.0, 4.0)["effective_accuracy"] == 0.0


def test_poisson_sends_at_the_asked_rate():
    times = schedules.poisson(1000, 10, seed=1)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert times == sorted(times)
    assert times[-1] < 10


def test_bursts_keep_the_mean_rate_and_swing_around_it():
    times = schedules.bursts(1000, 10, peak=2.0, seed=1)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    calm = sum(t % 2 < 1 for t in times)
    assert calm == 0


def test_a_recorded_trace_starts_at_zero(tmp_path):
    trace = tmp_path / "trace.txt"
    trace.write_text("12.5\n12.0\n13\n")
    assert schedules.recorded(trace) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("line", ["time", "nan", "inf", "-0.5", "1 2", "0.1,0.2"])
def test_a_line_of_a_trace_that_is_no_time_is_named(tmp_path, line):
    trace = tmp_path / "trace.txt"
    trace.write_text(f"1.0\n\n{line}\n2.0\n")
    with pytest.raises(ValueError, match=f"trace.txt, line 3: '{line}' is no time in seconds"):
        schedules.recorded(trace)


def test_a_trace_lasts_for_one_mean_gap_after_its_last_request():
    assert schedules.length([i / 100 for i in range(300)]) == pytest.approx(3.0)
    assert schedules.length([0.0, 0.0]) is schedules.length([0.0]) is None


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        read_samples(tmp_path)


@pytest.mark.slow
def test_the_tester_knows_its_own_rate():
    assert asyncio.run(own_rate(OTTER)) > 0


def test_samples_are_the_same_from_a_folder_and_from_its_archive(tmp_path):
    for label in ("otter", "bear"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.png").write_bytes(label.encode())
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "otter", "otter")
        tar.add(tmp_path / "bear", "bear")
    assert read_samples(tmp_path) == [BEAR, OTTER] == read_samples(tmp_path / "all.tar")
    (tmp_path / "folder.png").mkdir()
    with tarfile.open(tmp_path / "dots.tar", "w") as tar:
        tar.add(tmp_path, ".", filter=lambda member: None if "tar" in member.name else member)
    assert read_samples(tmp_path) == [BEAR, OTTER] == read_samples(tmp_path / "dots.tar")
    with tarfile.open(tmp_path / "cut.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "dots.tar", "dots.tar")
    whole = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is neither a folder nor a tar archive"):
        read_samples(tmp_path / "cut.tar.gz")


def archive_of(folder, *around):
    """A tar of what is in the folder, with folders around it."""
    archive = folder.parent / "packed.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "/".join(around) or ".")
    return archive


@pytest.mark.parametrize("around", [(), ("photos",), ("my", "photos")])
def test_images_of_one_folder_have_no_label(tmp_path, around):
    (tmp_path / "photos").mkdir()
    for i in range(2):
        (tmp_path / f"photos/{i}.png").write_bytes(b"%d" % i)
    wanted = [Sample(b"0", None), Sample(b"1", None)]
    assert read_samples(tmp_path / "photos") == wanted == read_samples(tmp_path)
    assert read_samples(archive_of(tmp_path / "photos", *around)) == wanted


@pytest.mark.parametrize("around", [(), ("test",), ("my", "test")])
def test_a_folder_around_the_classes_is_none(tmp_path, around):
    (tmp_path / "test/bear").mkdir(parents=True)
    (tmp_path / "test/bear/1.png").write_bytes(BEAR.data)
    (tmp_path / "test/plain.png").write_bytes(b"plain")
    wanted = [BEAR, Sample(b"plain", None)]
    assert read_samples(tmp_path / "test") == wanted == read_samples(tmp_path)
    assert read_samples(archive_of(tmp_path / "test", *around)) == wanted


def test_samples_are_taken_evenly_over_all_files(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(b"%d" % i)
    taken = [int(sample.data) for sample in read_samples(tmp_path, most=6)]
    assert taken == [0, 1, 3, 4, 6, 7]


def test_the_demo_comes_in_waves_with_a_peak():
    clients = [demo.wanted_clients(t, most=64, period=100) for t in range(100)]
    assert clients[0] == 1
    assert max(clients[:50]) == 32
    assert clients[50:60] == [64] * 10
    assert all(n < 64 for n in clients[:50] + clients[60:])


def test_a_short_demo_says_what_came_of_it(tmp_path, capsys):
    (tmp_path / "1.png").write_bytes(OTTER.data)
    words = ["--images", str(tmp_path), "--seconds", "0.05"]
    assert beside_server(lambda url: asyncio.to_thread(demo.main, [url, *words])) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and " x 200" in said


@pytest.mark.slow
def test_the_demo_sends_with_and_without_deadlines():
    asked = Counter()

    async def run():
        server = await asyncio.start_server(note, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/classify?top_k=1"
        crowd = demo.Crowd(url, [OTTER], most=8, period=0.2)
        await crowd.run(1.0)
        server.close()
        return crowd.statuses

    async def note(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            asked[head.split()[1].decode()] += 1
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    statuses = asyncio.run(run())
    assert statuses[200] > 20
    assert asked["/classify?top_k=1"] and asked["/classify?top_k=1&deadline_ms=25"]
