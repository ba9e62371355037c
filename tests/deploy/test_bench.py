"""The measuring commands at small scale; their figures are for quiet machines."""

import json

import pytest

from deploy.bench.__main__ import main
from deploy.bench.memory import MIB, Look, Memory
from deploy.bench.stages import medians
from deploy.bench.threads import Setup, setups
from tests.conftest import encode, noise


class Processor:
    """A clock that only what runs on it moves."""

    def __init__(self):
        self.now = 0.0
        self.ran = []

    def work(self, name, milliseconds):
        def run():
            self.now += milliseconds / 1e3
            self.ran.append(name)

        return run


def test_staged_and_fused_are_timed_in_turns_by_the_clock_given():
    processor = Processor()
    staged, fused = processor.work("staged", 3.0), processor.work("fused", 2.0)
    assert medians(staged, fused, 0.05, lambda: processor.now) == pytest.approx((3.0, 2.0))
    assert processor.ran == ["staged", "fused"] * (len(processor.ran) // 2)


def test_processor_time_of_several_threads_is_refused(capsys):
    assert main(["stages", "--clock", "cpu", "--threads", "2"]) == 2
    said = "error: --clock cpu counts one thread, so --threads must be 1\n"
    assert capsys.readouterr().err == said


def test_every_even_split_of_the_cores_is_tried_beside_one_engine_with_fewer_threads():
    assert setups(1) == [Setup(1, 1)]
    assert setups(2) == [Setup(1, 1), Setup(1, 2), Setup(2, 1)]
    assert {s.engines * s.threads for s in setups(6)[6:]} == {6}


def test_threads_are_measured_against_one_engine_with_them_all(bundle_path, tmp_path, capsys):
    out = tmp_path / "threads.json"
    command = ["threads", "--bundle", str(bundle_path), "--way", "folded", "--cores", "2"]
    command += ["--batches", "2", "--dtypes", "float32", "--seconds", "0.3", "--json", str(out)]
    assert main(command) == 0
    rows = json.loads(out.read_text())
    assert [(r["engines"], r["threads"]) for r in rows] == [(1, 1), (1, 2), (2, 1)]
    assert rows[1]["ratio"] == 1.0
    assert all(r["images_per_second"] > 0 for r in rows)
    assert "| 2 | 2 | 1 |" in capsys.readouterr().out


def run_of(mibs):
    return Memory(tuple(Look(100 * i, mib) for i, mib in enumerate(mibs)), 1.0, {})


def test_memory_that_fills_at_first_and_then_stays_is_flat():
    assert run_of([*range(50), *[50] * 50]).growth_mib == 0.0


def test_memory_that_grows_in_the_last_half_is_told_by_request():
    grown = run_of([100 + i / 100 for i in range(100)])
    assert grown.growth_mib == pytest.approx(0.4)
    assert grown.bytes_per_request == pytest.approx(0.4 * MIB / 4900)


@pytest.mark.parametrize(("allowed", "status"), [("1000", 0), ("-1000", 1)])
def test_memory_is_watched_under_requests_of_every_kind(server, tmp_path, capsys, allowed, status):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(seed=i)))
    out, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    command = ["memory", server.url, "--images", str(tmp_path), "--requests", "200"]
    command += ["--clients", "8", "--most-mib", allowed, "--json", str(out), "--plot", str(picture)]
    assert main(command) == status
    seen = json.loads(out.read_text())
    assert sum(seen["statuses"].values()) == seen["requests"] == 200
    assert {"200"} <= set(seen["statuses"]) <= {"200", "400", "504", "left"}
    assert picture.stat().st_size > 1000
    assert ("NOT flat" in capsys.readouterr().out) == bool(status)


def test_a_server_that_is_gone_is_one_sentence(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(encode(noise()))
    assert main(["memory", "http://127.0.0.1:9", "--images", str(tmp_path)]) == 2
    assert "error: http://127.0.0.1:9 gives no metrics" in capsys.readouterr().err
