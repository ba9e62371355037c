"""The comparison with other servers: what it needs of none of them."""

import asyncio
import json
import socket
import subprocess
from dataclasses import dataclass, replace

import pytest

from deploy.loadtest.load import Result
from deploy.loadtest.samples import Sample
from deploy.loadtest.summary import summarise
from deploy.peers import __main__ as peers
from deploy.peers import closed, goals, offered, profile, running
from deploy.peers.peer import (
    AS_ACCURATE,
    BEST_BACKEND,
    OURS,
    PLAIN,
    Peer,
    PeerError,
    offramp,
    pinned,
)
from tests.conftest import CLASSES, encode, noise

SUMMARY = {
    "answered_per_second": 120.4,
    "in_time_share": 0.99,
    "reasons": {"confident": 10},
    "latency_ms": {"p50": 8.04, "p99": 12.0},
}


def closed_row(name, rate, p50, accuracy=0.731, overhead=0.1):
    summary = {**SUMMARY, "answered_per_second": rate, "latency_ms": {"p50": p50, "p99": 12.0}}
    clients = {str(n): summary for n in closed.CLIENTS}
    said = {"outside_stages": overhead}
    return {"name": name, "clients": clients, "accuracy": accuracy, "profile": said}


def offered_row(name, load, accuracy, late=0.0, refused=0.0):
    shares = {"late_share": late, "refused_share": refused, "failed_share": 0.0}
    accuracies = {"effective_accuracy": accuracy}
    return {"name": name, "kind": "poisson", "load": load, **accuracies, **shares}


def test_the_table_holds_a_row_a_server_with_its_failures():
    rows = [closed_row("fast", 120.4, 8.04), {"name": "gone", "failed": "did not answer"}]
    *_, good, bad = closed.table(rows).split("\n")
    assert good.startswith("| fast   | 120 (8.0, 12.0), 1.0% failed ")
    assert good.endswith("| 73.1% |")
    assert bad.startswith("| gone   | - ") and bad.endswith("| did not answer |")


def test_a_goal_stands_beside_what_was_measured():
    rows = [
        closed_row("FastAPI", 100, 12.0),
        closed_row("mosec", 250, 20.0),
        closed_row(BEST_BACKEND.name, 500, 3.0),
        closed_row("Offramp", 1000, 2.0, accuracy=0.725, overhead=0.2),
    ]
    measured = goals.of_closed(rows)
    assert [goal.value for goal in measured] == pytest.approx([6.0, 1.5, 4.0, 2.0, 0.2, 0.006])
    assert [goal.met for goal in measured] == [True, True, True, True, False, True]
    assert measured[2].name.endswith("mosec")
    assert goals.table(measured).endswith("| 0.6%       | at most 1.0%        | met |")


def test_goals_are_for_our_fastest_way_that_is_as_accurate_as_the_best_peer():
    peer, ours = closed_row(PLAIN.name, 100, 6.0), closed_row(OURS.name, 1000, 2.0, 0.742)
    fast = closed_row(AS_ACCURATE.name, 1300, 1.5, 0.721)
    assert "at 2 points" in goals.of_closed([peer, ours, fast])[1].name
    rough = closed_row(AS_ACCURATE.name, 1300, 1.5, 0.719)
    assert "at 2 points" not in goals.of_closed([peer, ours, rough])[1].name


def test_goals_leave_out_a_way_of_ours_whose_answers_were_bent():
    ours, bent = closed_row(OURS.name, 1000, 2.0), closed_row(AS_ACCURATE.name, 1300, 1.5)
    full_load = {**bent["clients"]["32"], "reasons": {"confident": 9, "overload": 1}}
    bent = {**bent, "clients": {**bent["clients"], "32": full_load}}
    peer = closed_row(PLAIN.name, 100, 6.0)
    assert goals.of_closed([peer, ours, bent]) == goals.of_closed([peer, ours])
    assert goals.of_closed([peer, bent]) == []


def test_goals_leave_out_servers_that_failed():
    failed = {"name": BEST_BACKEND.name, "failed": "cannot be installed"}
    assert goals.of_closed([failed]) == []
    names = [g.name for g in goals.of_closed([failed, closed_row("Offramp", 1000, 2.0)])]
    assert names == ["share of the machine outside stages at saturation"]


def test_a_peer_of_unknown_accuracy_is_left_out_of_what_ours_is_compared_with():
    rows = [
        closed_row("FastAPI", 100, 12.0, accuracy=None),
        closed_row("mosec", 250, 20.0, accuracy=0.73),
        closed_row("Offramp", 1000, 2.0, accuracy=0.725),
    ]
    assert goals.of_closed(rows)[-1].value == pytest.approx(0.005)
    assert goals.of_closed([rows[0], rows[2]])[-1].name.startswith("share of the machine outside")


@dataclass(frozen=True, slots=True)
class Elsewhere(Peer):
    """A peer on a port of its own."""

    port: int = 0

    def url(self, port, *more):
        return Peer.url(self, self.port, *more)


async def answering(most, reader, writer):
    """Says otter, but leaves without a word once it has said it `most` times in all."""
    while head := await reader.readline():
        if head.lower().startswith(b"content-length:"):
            length = int(head.split(b":")[1])
        elif head == b"\r\n":
            await reader.readexactly(length)
            if not most:
                break
            most.pop()
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"label": "otter"}')
    writer.close()


def while_answering(times, measure):
    """What `measure` makes of a peer that answers so often and then no more."""

    async def run():
        most = [None] * times
        server = await asyncio.start_server(
            lambda reader, writer: answering(most, reader, writer), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        try:
            return await asyncio.to_thread(measure, Elsewhere("fading", (), port=port))
        finally:
            server.close()

    return asyncio.run(run())


OTTERS = [Sample(b"otter", "otter")] * 4
FEW_SECONDS = 0.2


@pytest.mark.parametrize(
    ("answers", "said"), [(0, "answered no image$"), (4, "answered no image of one client alone")]
)
def test_a_peer_that_answers_nothing_under_load_has_no_row(answers, said):
    with pytest.raises(PeerError, match=said):
        while_answering(answers, lambda peer: closed.measure(peer, 0, OTTERS, FEW_SECONDS))


@pytest.mark.slow
def test_a_peer_that_dies_under_more_clients_keeps_what_it_answered_before():
    row = while_answering(5, lambda peer: closed.measure(peer, 0, OTTERS, FEW_SECONDS))
    assert row["accuracy"] == 1.0
    assert closed.saturated(row) == 1 / FEW_SECONDS
    assert closed.unloaded_ms(row) > 0
    assert "100.0% failed" in closed.table([row])


def test_a_peer_that_answers_nothing_is_offered_nothing():
    load = offered.Load("poisson", 1.0, (0.0,), 1.0)
    with pytest.raises(PeerError, match="answered no image"):
        while_answering(0, lambda peer: list(offered.measure(peer, OTTERS, [load])))
    (row,) = while_answering(4, lambda peer: list(offered.measure(peer, OTTERS, [load])))
    assert (row["late_share"], row["offered_per_second"]) == (1.0, 1.0)


def test_loads_are_not_made_of_a_capacity_that_is_nothing():
    with pytest.raises(PeerError, match="fading answered no image in"):
        while_answering(0, lambda peer: offered.capacity(peer, OTTERS, FEW_SECONDS))


@pytest.mark.parametrize("kind", offered.KINDS)
def test_loads_that_would_hold_no_request_are_refused(kind):
    with pytest.raises(ValueError, match="no request comes within 2 s"):
        offered.loads(kind, capacity=1.0, seconds=2)


def test_offered_loads_are_multiples_of_our_capacity_with_the_same_mean_in_bursts():
    for kind in offered.KINDS:
        made = offered.loads(kind, capacity=500, seconds=8)
        assert [load.factor for load in made] == list(offered.FACTORS)
        for load in made:
            assert len(load.times) == pytest.approx(load.factor * 500 * 8, rel=0.1)
    calm = [t for t in offered.loads("bursts", 500, 8)[-1].times if t % 2 < 1]
    assert len(calm) == pytest.approx(0.1 * 3 * 500 * 8, rel=0.15)


def test_every_request_of_an_offered_load_is_in_time_late_refused_or_failed():
    statuses = [(200, 0.01), (200, 0.2), (0, 0.5), (429, 0.01), (500, 0.01)]
    results = [Result(0.0, 0.0, seconds, status, status == 200) for status, seconds in statuses]
    said = offered.outcomes(summarise(results, offered.DEADLINE_SECONDS, 1.0))
    shares = [said[f"{name}_share"] for name in ("in_time", "late", "refused", "failed")]
    assert shares == pytest.approx([0.2, 0.4, 0.2, 0.2])
    assert said["effective_accuracy"] == pytest.approx(0.2)


def test_an_exit_alone_gets_no_help_from_another():
    shallow = Result(0.0, 0.0, 0.01, 200, True, exit=1)
    own = replace(shallow, exit=3)
    assert offered._own(pinned(3), own) is own
    assert offered._own(pinned(3), shallow).status == 504
    assert offered._own(OURS, shallow) is shallow


def test_the_goals_of_offered_loads_name_the_worst_place():
    rows = [
        offered_row("Offramp", 0.5, 0.73),
        offered_row("Offramp", 1.0, 0.70, late=0.01),
        offered_row("Offramp", 3.0, 0.50, refused=0.3),
        offered_row("exit 1", 1.0, 0.66),
        offered_row("exit 1", 3.0, 0.52),
        {"name": "gone", "kind": "poisson", "failed": "did not answer"},
    ]
    calm, margin = goals.of_offered(rows, full_depth=100, first_exit=200)
    assert (calm.value, calm.met) == (pytest.approx(0.01), False)
    assert "worst at 1 (poisson)" in calm.name
    assert (margin.value, margin.met) == (pytest.approx(-0.02), False)
    assert "over exit 1 at 3 (poisson)" in margin.name


def test_the_table_and_picture_of_offered_loads_show_where_a_server_was_given_up(tmp_path):
    rows = [
        offered_row("Offramp", 0.2, 0.73),
        {"name": "gone", "kind": "poisson", "failed": "did not answer"},
    ]
    said = offered.table(rows)
    assert "| 0.2                | 0.5 | 1   | 1.5 | 2   | 3   | failure |" in said
    assert "| Offramp | 73.0% (0.0%, 0.0%) | -   | -   | -   | -   | -   |     |" in said
    assert "| gone    | -                  | -   | -   | -   | -   | -   | did not answer |" in said
    assert "failure" not in offered.table(rows[:1])
    offered.plot(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_profile_counts_as_outside_what_is_neither_stage_nor_idle():
    def moment(seconds, engine, ready, team, loop, stages):
        counts = {10: (loop, 0), 11: (engine, ready), 12: (team, 0)}
        threads = {
            n: profile.Thread(n, "engine" if n > 10 else "python", int(r * 1e9), int(w * 1e9))
            for n, (r, w) in counts.items()
        }
        return profile.Moment(seconds, threads, stages, 0.0)

    before = moment(0.0, engine=1.0, ready=0.0, team=1.0, loop=1.0, stages=1.0)
    after = moment(10.0, engine=9.0, ready=1.0, team=8.0, loop=3.0, stages=9.0)
    said = profile.profile(10, before, after)
    assert said["cpu_seconds"][profile.TEAM] == pytest.approx(7.0)
    assert said["scheduling_seconds"] == pytest.approx(1.0)  # 8 running + 1 ready - 8 in stages
    assert said["outside_stages"] == pytest.approx((1.0 + 2.0) / (10 * said["cores"]))
    assert "| event loop               | 2.00 " in profile.table(said)


def test_a_profile_counts_every_worker_of_the_engine():
    def moment(seconds, busy, stages):
        names = {10: "python", 11: "engine-0", 12: "engine-1", 13: "engine-1"}
        ran = {10: 0.0, 11: busy, 12: busy, 13: 1.0}
        threads = {
            n: profile.Thread(n, name, int(ran[n] * seconds * 1e9), 0) for n, name in names.items()
        }
        return profile.Moment(seconds, threads, stages, 0.0)

    said = profile.profile(10, moment(0.0, 0.0, 0.0), moment(10.0, 0.9, 16.0))
    assert said["cpu_seconds"][profile.ENGINE] == pytest.approx(18.0)
    assert said["cpu_seconds"][profile.TEAM] == pytest.approx(10.0)
    assert said["scheduling_seconds"] == pytest.approx(2.0)


def test_queries_of_a_server_are_joined():
    assert PLAIN.url(80) == "http://127.0.0.1:80/classify"
    url = offramp("x", "threshold=1").url(80, "deadline_ms=50")
    assert url == "http://127.0.0.1:80/classify?threshold=1&deadline_ms=50"


@pytest.fixture
def listener(monkeypatch):
    """A socket on the port that peers are to use; close it to free the port."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        monkeypatch.setattr(running, "PORT", bound.getsockname()[1])
        monkeypatch.setattr(running, "STOP_SECONDS", 0.0)
        yield bound


def test_a_port_that_is_taken_is_a_row_that_says_so(tmp_path, capsys, listener):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    assert peers.main(["--images", str(tmp_path), "--only", "FastAPI"]) == 0
    assert f"port {running.PORT} is in use by another program" in capsys.readouterr().out


@pytest.mark.slow
def test_a_peer_that_ends_while_starting_is_a_row_that_says_so(
    tmp_path, capsys, monkeypatch, listener
):
    listener.close()
    (tmp_path / "x.png").write_bytes(encode(noise()))
    broken = Peer("broken", ("-c", "raise SystemExit('it needs Java')"))
    monkeypatch.setattr(peers, "OTHERS", (broken,))
    assert peers.main(["--images", str(tmp_path), "--only", "broken"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("| broken | -")
    assert said.endswith("| ended with status 1 while starting: it needs Java |")


DYING = """
import http.server, os
class Once(http.server.BaseHTTPRequestHandler):
    answered = False
    def do_POST(self):
        if Once.answered:
            os._exit(1)
        Once.answered = True
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"42")
http.server.HTTPServer(("127.0.0.1", int(os.environ["PEER_PORT"])), Once).serve_forever()
"""


@pytest.mark.slow
def test_a_peer_that_dies_under_load_is_a_row_that_says_so(tmp_path, capsys, monkeypatch, listener):
    listener.close()
    (tmp_path / "x.png").write_bytes(encode(noise()))
    out = tmp_path / "x.json"
    monkeypatch.setattr(peers, "OTHERS", (Peer("dying", ("-c", DYING)),))
    command = ["--images", str(tmp_path), "--only", "dying", "--quiet-seconds", "0"]
    assert peers.main([*command, "--json", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("| dying  | -") and said.endswith("| answered no image |")
    assert json.loads(out.read_text())["rows"] == [{"name": "dying", "failed": "answered no image"}]


def test_figures_are_there_even_if_no_goals_can_be_made_of_them(
    tmp_path, capsys, monkeypatch, listener
):
    def fail(rows):
        raise KeyError("p50")

    monkeypatch.setattr(goals, "of_closed", fail)
    (tmp_path / "x.png").write_bytes(encode(noise()))
    out = tmp_path / "x.json"
    with pytest.raises(KeyError):
        peers.main(["--images", str(tmp_path), "--only", "FastAPI", "--json", str(out)])
    assert f"| port {running.PORT} is in use by another program |" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"][0]["name"] == "FastAPI"


def test_a_peer_whose_environment_cannot_be_made_is_one_that_cannot_be_installed(tmp_path):
    def without_ensurepip(home):
        said = b"Traceback\nNo module named ensurepip\n"
        raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"], said)

    with pytest.raises(PeerError, match=r"cannot be installed: .*: No module named ensurepip"):
        running.prepare(BEST_BACKEND, tmp_path, without_ensurepip)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(option, capsys):
    assert peers.main(["--images", "x", option, "/nope/x"]) == 2
    assert "/nope/x cannot be written: there is no folder /nope" in capsys.readouterr().err


def test_a_load_of_no_length_is_refused(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--images", "x", "--seconds", "0"])
    assert "argument --seconds: '0' is no finite number above 0" in capsys.readouterr().err


def test_an_unknown_server_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    assert peers.main(["--images", str(tmp_path), "--only", "fastapi"]) == 2
    assert "no server is called fastapi; there are FastAPI, LitServe" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plainest_peer_answers_with_the_networks_own_labels(bundle_path, tmp_path):
    for label in CLASSES[:2]:
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(encode(noise()))
    out = tmp_path / "peers.json"
    command = ["--images", str(tmp_path), "--bundle", str(bundle_path), "--only", "FastAPI"]
    command += ["--most-images", "1"]
    assert peers.main([*command, "--seconds", "0.2", "--json", str(out)]) == 0
    said = json.loads(out.read_text())
    assert said["images"] == 1
    (row,) = said["rows"]
    assert row["accuracy"] in (0.0, 1.0)
    assert row["clients"]["8"]["status"].keys() == {"200"}
