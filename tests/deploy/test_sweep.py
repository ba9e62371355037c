"""The sweep's simulation against a server of known costs, and the sweep against a real one."""

import json

import pytest

from deploy import sweep
from deploy.simulator import Overhead
from tests.conftest import encode, noise

ENGINE = {
    "seconds": {str(k): {"1": 0.001, "8": 0.004} for k in (1, 2)},
    "ladder": [
        {"max_accuracy_loss": 0.01, "thresholds": [0.8]},
        {"max_accuracy_loss": 1.0, "thresholds": [0.0]},
    ],
    "max_batch": 8,
    "backlog_seconds": 0.0,
}
NONE = Overhead()
SURE, UNSURE = (0.9, 0.9), (0.1, 0.5)


def evenly(rate, seconds=1.0):
    return [(i / rate, i / rate) for i in range(int(rate * seconds))]


def test_a_calm_load_is_answered_in_time_at_the_exit_that_suffices():
    said = sweep.predict(ENGINE, evenly(100), [SURE], 0.05, NONE)
    assert (said["in_time_share"], said["exits"]) == (1.0, {"1": 100, "2": 0})
    assert sweep.predict(ENGINE, evenly(100), [UNSURE], 0.05, NONE)["exits"] == {"1": 0, "2": 100}


def test_beyond_capacity_goodput_stays_near_what_first_exits_allow():
    said = sweep.predict(ENGINE, evenly(8000), [UNSURE], 0.05, NONE)
    assert 0.8 * 2000 < said["goodput_per_second"] <= 2000 * 1.01
    assert said["exits"]["1"] > 10 * said["exits"]["2"]


def test_an_event_loop_lets_through_only_what_it_has_time_for():
    busy = Overhead(begin_seconds=0.001, answer_seconds=0.001)
    said = sweep.predict(ENGINE, evenly(400), [SURE], 0.05, busy)
    assert said["in_time_share"] == 1.0
    said = sweep.predict(ENGINE, evenly(1000), [SURE], 0.05, busy)
    assert said["in_time_share"] < 0.2, "answers queue behind requests that nobody refused"


def test_time_between_batches_is_lost_to_images():
    said = sweep.predict(ENGINE, evenly(8000), [UNSURE], 0.05, Overhead(batch_seconds=0.004))
    assert 0.8 * 1000 < said["goodput_per_second"] <= 1000 * 1.01


def test_a_request_sent_late_has_less_time_left():
    late = [(at, at + 0.045) for at, _ in evenly(100)]
    assert sweep.predict(ENGINE, late, [SURE], 0.05, NONE)["in_time_share"] == 1.0
    assert sweep.predict(ENGINE, late, [UNSURE], 0.046, NONE)["in_time_share"] == 0.0


def test_a_server_that_is_gone_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    command = ["http://127.0.0.1:9", "--images", str(tmp_path), "--admin-token", "t"]
    assert sweep.main(command) == 2
    assert "error: http://127.0.0.1:9 gives no answer" in capsys.readouterr().err


def test_a_sweep_shorter_than_a_burst_is_refused(tmp_path, capsys):
    command = ["http://127.0.0.1:9", "--images", str(tmp_path), "--admin-token", "t"]
    assert sweep.main([*command, "--seconds", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_measures_and_simulates_every_load(serve, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(seed=i)))
    out, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    with serve(admin_token="secret") as server:
        command = [server.url, "--images", str(tmp_path), "--admin-token", "secret"]
        command += ["--seconds", "2", "--json", str(out), "--plot", str(picture)]
        assert sweep.main(command) == 0
    said = json.loads(out.read_text())
    rows = said["rows"]
    assert said["request_overhead_ms"] > 0
    assert len(rows) == len(sweep.KINDS) * len(sweep.FACTORS)
    assert rows[0]["measured"]["in_time_share"] > 0
    assert picture.stat().st_size > 1000
    assert "goodput" in capsys.readouterr().out
