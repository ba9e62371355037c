"""The measuring commands at small scale; their figures are for quiet machines."""

import json
import sys

import numpy as np
import pytest
import torch

from deploy.bench import engine, loader
from deploy.bench.__main__ import main
from deploy.bench.memory import MIB, Look, Memory
from deploy.bench.stages import medians
from deploy.bench.threads import (
    Case,
    Fleet,
    Setup,
    Stuck,
    compare,
    default,
    measured,
    setups,
    table,
)
from server.runner import Runner
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
    assert {s.engines * s.threads for s in setups(6)[6:-1]} == {6}
    assert setups(6)[-1] == default(6) == Setup(5, 1)


class Pretended:
    """A fleet of known speed; one that is stuck says so at its n-th order."""

    def __init__(self, setup, milliseconds, stuck_at=None):
        self.setup, self._seconds, self._stuck_at = setup, milliseconds / 1e3, stuck_at
        self.orders, self.closed = 0, False

    def _order(self):
        assert not self.closed, "nothing is asked of one that was left out"
        self.orders += 1
        if self.orders == self._stuck_at:
            raise Stuck("took over 30 s to run")

    def prepare(self, case):
        self._order()

    def run(self, seconds):
        self._order()
        return [self._seconds] * round(seconds / self._seconds)

    def close(self):
        self.closed = True


CASE = Case(None, "folded", "float32", 4, None)


def test_setups_are_measured_against_what_a_server_takes_by_default():
    fleets = [Pretended(Setup(1, 1), 2.0), Pretended(Setup(1, 2), 1.0)]
    rows = measured(compare(fleets, CASE, 3.0), CASE, default(2), 3.0)
    assert [(r.setup.threads, r.ratio) for r in rows] == [(1, 1.0), (2, pytest.approx(2.0))]
    assert [r.images_per_second for r in rows] == pytest.approx([2000, 4000])
    assert [r.pass_ms for r in rows] == pytest.approx([2.0, 1.0])
    assert default(8) == Setup(7, 1)
    assert all(default(cores) in setups(cores) for cores in range(1, 9))


@pytest.mark.parametrize("stuck_at", [1, 3])
def test_a_setup_that_is_stuck_is_said_and_left_out(capsys, stuck_at):
    fleets = [Pretended(Setup(1, 1), 2.0), Pretended(Setup(1, 2), 1.0, stuck_at)]
    rows = measured(compare(fleets, CASE, 3.0), CASE, default(2), 3.0)
    assert [r.setup for r in rows] == [Setup(1, 1)]
    assert fleets[1].closed
    said = "left out: 1 engines with 2 threads each took over 30 s to run\n"
    assert capsys.readouterr().err == said


def test_without_the_default_there_is_nothing_to_compare_with():
    fleets = [Pretended(Setup(1, 1), 2.0, 1), Pretended(Setup(1, 2), 1.0)]
    rows = measured(compare(fleets, CASE, 3.0), CASE, default(2), 3.0)
    assert [r.ratio for r in rows] == [None]
    assert table(rows).endswith("| 1.00       | -   |")


@pytest.mark.slow
def test_threads_are_measured_in_processes_of_their_own(bundle_path, tmp_path, capsys):
    out = tmp_path / "threads.json"
    command = ["threads", "--bundle", str(bundle_path), "--way", "folded", "--cores", "2"]
    command += ["--batches", "2", "--dtypes", "float32", "--seconds", "0.3", "--json", str(out)]
    assert main([*command, "--cache-dir", str(tmp_path)]) == 0
    rows = json.loads(out.read_text())
    assert [(r["engines"], r["threads"]) for r in rows] == [(1, 1), (1, 2), (2, 1)]
    assert rows[0]["ratio"] == 1.0
    assert all(r["images_per_second"] > 0 for r in rows)
    assert "| 2     | 2       | 1 " in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_that_cannot_be_run_is_one_sentence(tmp_path):
    fleet = Fleet(Setup(1, 1))
    try:
        with pytest.raises(RuntimeError, match=str(tmp_path)):
            fleet.prepare(Case(tmp_path / "no", "folded", "float32", 1, tmp_path))
    finally:
        fleet.close()


def run_of(mibs):
    return Memory(tuple(Look(100 * i, mib) for i, mib in enumerate(mibs)), 1.0, {})


def test_memory_that_fills_at_first_and_then_stays_is_flat():
    assert run_of([*range(50), *[50] * 50]).growth_mib == 0.0


def test_memory_that_grows_in_the_last_half_is_told_by_request():
    grown = run_of([100 + i / 100 for i in range(100)])
    assert grown.growth_mib == pytest.approx(0.4)
    assert grown.bytes_per_request == pytest.approx(0.4 * MIB / 4900)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_event_loop_is_measured_for_requests_of_every_sort(bundle_path, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(encode(noise()))
    figures = tmp_path / "loop.json"
    command = ["loop", "--bundle", str(bundle_path), "--images", str(tmp_path), "--seconds", "0.1"]
    assert main([*command, "--json", str(figures)]) == 0
    answered, refused, early = json.loads(figures.read_text())
    assert answered["least_us"] > early["least_us"] > 0
    assert refused["least_us"] > early["least_us"]
    said = capsys.readouterr()
    assert "answered at exit 1" in said.out
    assert "request_id" not in said.out + said.err


def plain(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_the_usual_loop_is_measured_beside_training_without_a_loader(monkeypatch):
    monkeypatch.setattr(loader, "WARM_UP", 1)
    seen = []

    def noted(image):
        seen.append(image.size)
        return plain(image)

    rows = loader.measure("resnet10", 8, [0], 4, 2, noted, torch.device("cpu"))
    assert [r.workers for r in rows] == [0, None]
    assert all(r.images_per_second > 0 for r in rows)
    assert seen == [(32, 32)] * 12
    assert "| no loader |" in loader.table(rows)


def test_only_steps_after_the_warm_up_are_timed(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    net, cpu = loader.build("resnet10", loader.CLASSES, width=8).train(), torch.device("cpu")
    before = net.head(1).fc.weight.clone()
    batches = iter(loader.loader(loader.Noise(8, plain), 2, 0))
    assert loader.train(net, batches, 1, 2, cpu) == 2.5
    assert not torch.equal(net.head(1).fc.weight, before)


def test_the_hole_of_an_image_is_a_square_that_its_border_may_cut():
    black = [(loader.cutout(torch.ones(3, 32, 32))[0] == 0).sum().item() for _ in range(50)]
    assert max(black) <= 16 * 16 and min(black) >= 8 * 8


def test_without_torchvision_what_is_missing_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["loader"]) == 2
    assert capsys.readouterr().err == "error: this takes torchvision, which is not installed\n"


class Stopwatch:
    """Passes that move their own clock, and what ran in which order."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def taking(self, name, seconds):
        def run():
            self.now += seconds
            self.ran.append(name)

        return run

    def clock(self):
        return self.now


def test_latencies_are_taken_in_turns():
    watch = Stopwatch()
    passes = {name: watch.taking(name, s) for name, s in (("a", 0.001), ("b", 0.002))}
    taken = engine.milliseconds(passes, 0.3, watch.clock)
    assert taken["a"] == pytest.approx([1.0] * 200)
    assert taken["b"] == pytest.approx([2.0] * 200)
    assert watch.ran == ["a", "b"] * (len(watch.ran) // 2)


def test_rates_count_what_the_device_has_still_to_do():
    watch = Stopwatch()
    passes = {"lazy": watch.taking("lazy", 0.01)}
    rates = engine.images_per_second(passes, 4, 0.3, watch.clock, watch.taking("finish", 0.1))
    assert rates["lazy"] == pytest.approx(40 / 0.2, rel=0.15)


@pytest.mark.slow
def test_images_leave_by_shares_and_run_on_in_full_batches(bundle):
    runner = Runner(bundle, torch.device("cpu"), torch.float32)
    images = [np.asarray(noise(seed=i)) for i in range(8)]
    leaving = engine.Leaving(runner, images, (0.5, 0.25, 0.25, 0.0))
    for _ in range(60):
        leaving()
    assert leaving.ran[1] == 480
    assert leaving.ran[2] == pytest.approx(240, rel=0.2)
    assert leaving.ran[3] == pytest.approx(120, rel=0.3)
    assert leaving.ran[4] == 0
    assert all(n % 8 == 0 for n in leaving.ran.values())


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_engine_is_measured_beside_the_eager_network(device, tmp_path, capsys):
    out = tmp_path / "engine.json"
    command = ["engine", "--device", device, "--architecture", "resnet10", "--width", "8"]
    command += ["--classes", "10", "--batches", "2", "4", "--seconds", "0.05", "--json", str(out)]
    assert main(command) == 0
    seen = {(f["what"], f["batch"]): f for f in json.loads(out.read_text())["figures"]}
    assert all(f["value"] > 0 for f in seen.values() if f["unit"] in ("ms", "images/s"))
    assert bool(seen["graphs", 4]["value"]) == (device == "cuda")
    assert seen["exit 1", 1]["value"] < seen["all exits", 1]["value"] <= seen["all exits", 1]["p99"]
    fastest = max(seen["full depth", n]["value"] for n in (2, 4))
    plain = max(seen["eager network", n]["value"] for n in (2, 4))
    ratio = seen["full depth / eager network", None]["value"]
    assert ratio == pytest.approx(fastest / plain)
    assert "| staged / one graph" in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_that_is_not_there_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    assert main(["engine", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: DEVICE is cuda, but torch finds no CUDA card\n"
