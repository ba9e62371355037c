"""A single image that has the cores to itself has several threads, where that is faster."""

import logging
import threading

import numpy as np
import pytest
import torch

from server.compiling import LONGEST_PAUSE_SECONDS, PAUSE_SECONDS, Compiling
from server.runner import Runner
from server.settings import Settings
from server.teams import RUNS, RUNS_SECONDS, WORTH_ITS_CORES, share_of_one, team_sizes
from server.units import make_units
from tests.program import FakeProgram, fake_program

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "most", "sizes"),
    [(1, 1, []), (1, 2, [2]), (1, 6, [2, 4, 6]), (2, 8, [4, 8]), (4, 4, [])],
)
def test_teams_are_tried_up_to_every_core(threads, most, sizes):
    assert team_sizes(threads, most) == sizes


class Timed:
    """A program that takes imagined time: what it is told, one run after another."""

    def __init__(self, clock, taken):
        self.clock = clock
        self.taken = iter(taken)

    def run(self):
        self.clock.now += next(self.taken)
        return ()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_team_is_compared_by_the_least_that_either_takes():
    clock = Clock()
    team = Timed(clock, [9e-3] * (RUNS - 1) + [6e-4])  # another program was busy nearly always
    one = Timed(clock, [1.5e-3, *[1e-3] * (RUNS - 1)])
    assert share_of_one(team, one, clock, clock.sleep) == pytest.approx(0.6)


def test_what_takes_long_runs_less_often():
    clock = Clock()
    team, one = Timed(clock, [0.2] * RUNS), Timed(clock, [0.25] * RUNS)
    assert share_of_one(team, one, clock, clock.sleep) == pytest.approx(0.8)
    assert RUNS_SECONDS < clock.now < 2 * RUNS_SECONDS


class Folder:
    """Programs that are the eager units, of which teams take a set share of one thread's time."""

    def __init__(self, bundle, units):
        self.bundle, self.units = bundle, units
        self.shares = {2: 0.7, 4: 0.5, 6: 0.6}
        self.off = {}
        self.broken = set()
        self.failing = set()
        self.threads = {}

    def load(self, file, dtype, workers, threads):
        stage = int(file.name[len("stage")])
        if threads in self.broken:
            raise RuntimeError("it is damaged")
        program = fake_program(
            self.bundle, self.units, stage, 1, off=self.off.get((stage, threads), 0.0)
        )
        self.threads[id(program)] = threads
        return program

    def share(self, team, one):
        assert self.threads[id(one)] == 1
        if self.threads[id(team)] in self.failing:
            raise RuntimeError("its threads cannot start")
        return self.shares[self.threads[id(team)]]


@pytest.fixture
def units(bundle):
    return make_units(bundle, CPU, torch.float32)


@pytest.fixture
def folder(bundle, units, monkeypatch):
    one = Folder(bundle, units)
    monkeypatch.setattr("server.compiling.share_of_one", one.share)
    return one


class Closing(threading.Event):
    """Time passes at once; what is `next` happens in the pauses, and after that it is set."""

    def __init__(self):
        super().__init__()
        self.next = []
        self.pauses = []

    def wait(self, timeout=None):
        self.pauses.append(timeout)
        if not self.next:
            self.set()
        else:
            self.next.pop(0)()
        return self.is_set()


@pytest.fixture
def closing():
    return Closing()


@pytest.fixture
def compiling(bundle, bundle_path, units, folder, closing, tmp_path):
    """On six cores, with every single image's program handed over."""
    chosen = Settings(bundle=bundle_path, cache_dir=tmp_path, max_batch=1)
    one = Compiling(
        chosen, bundle, units, torch.float32, workers=6, load=folder.load, closing=closing
    )
    for stage in (1, 2, 3, 4):
        one._programs.file(stage, 1).touch()
    one.use_ready(lambda *_: None)
    return one


def teams(compiling, folder, later=False):
    """Threads and share of the team that each stage was given."""
    said = {}

    def use(stage, team, share):
        assert stage not in said
        said[stage] = folder.threads[id(team)], share

    compiling.use_teams(use)
    if later:
        compiling.use_teams_later(use)
        compiling._thread.join(20)
    return said


@pytest.mark.slow
def test_every_stage_gets_its_fastest_team(compiling, folder, caplog):
    caplog.set_level(logging.INFO)
    assert teams(compiling, folder) == {stage: (4, 0.5) for stage in (1, 2, 3, 4)}
    assert "4 in stage 4 (50% of one thread's time)" in caplog.text


def test_a_team_that_gains_next_to_nothing_is_not_used(compiling, folder, caplog):
    caplog.set_level(logging.INFO)
    folder.shares = dict.fromkeys(folder.shares, WORTH_ITS_CORES + 0.01)
    assert teams(compiling, folder) == {}
    assert "an image that is alone" not in caplog.text


def test_what_gained_nothing_on_a_busy_machine_is_tried_again(compiling, folder, closing):
    quiet, folder.shares = folder.shares, dict.fromkeys(folder.shares, 1.0)
    closing.next = [lambda: None, lambda: folder.shares.update(quiet)]
    assert teams(compiling, folder, later=True) == {stage: (4, 0.5) for stage in (1, 2, 3, 4)}
    assert closing.pauses == [PAUSE_SECONDS, 2 * PAUSE_SECONDS]


def test_what_gains_nothing_is_tried_more_and_more_seldom(compiling, folder, closing):
    folder.shares = dict.fromkeys(folder.shares, 1.0)
    closing.next = [lambda: None] * 12
    assert teams(compiling, folder, later=True) == {}
    assert closing.pauses[-2:] == [LONGEST_PAUSE_SECONDS] * 2
    assert sum(closing.pauses[:7]) < LONGEST_PAUSE_SECONDS


def test_a_team_that_disagrees_with_the_eager_stage_is_not_used(compiling, folder):
    folder.off = {(3, 4): 0.5}
    assert teams(compiling, folder)[3] == (6, 0.6)


def test_what_cannot_be_used_is_not_tried_again(compiling, folder, closing, caplog):
    folder.off = dict.fromkeys([(3, 2), (3, 4), (3, 6)], 0.5)
    closing.next = [lambda: None] * 3
    assert 3 not in teams(compiling, folder, later=True)
    assert closing.pauses == []
    assert caplog.text.count("differs from the eager stage") == 3


def test_a_stage_whose_single_image_runs_eagerly_has_no_team(compiling, folder):
    del compiling._used[3, 1]
    compiling._refused.add((3, 1))
    assert teams(compiling, folder, later=True) == {stage: (4, 0.5) for stage in (1, 2, 4)}


def test_a_team_that_cannot_be_loaded_is_a_warning(compiling, folder, caplog):
    folder.broken = {2, 4, 6}
    assert teams(compiling, folder) == {}
    assert "cannot be used with 6 threads (it is damaged)" in caplog.text


def test_a_team_that_cannot_be_run_is_a_warning_and_others_are_tried(compiling, folder, caplog):
    folder.failing = {4}
    assert teams(compiling, folder) == {stage: (6, 0.6) for stage in (1, 2, 3, 4)}
    assert "cannot be used with 4 threads (its threads cannot start)" in caplog.text


def test_a_server_that_drains_looks_for_no_teams(compiling, folder):
    compiling.stop()
    assert teams(compiling, folder) == {}


def test_a_team_computes_an_image_that_is_alone_and_no_other(bundle):
    runner, ran = Runner(bundle, CPU, torch.float32), []
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = runner.run(1, [image])
    team = fake_program(bundle, runner.units, 1, 1, meanwhile=lambda: ran.append("team"))
    assert isinstance(team, FakeProgram)
    runner.use_team(1, team)
    runner.run(1, [image])
    assert ran == []
    said = runner.run(1, [image], alone=True)
    assert ran == ["team"]
    np.testing.assert_allclose(said.probabilities, expected.probabilities, atol=1e-4)
    rows = runner.keep(said, [0])
    runner.run(2, rows, alone=True)  # of which there is no team
