"""How programs come into their folder, and when one may stand in for an eager unit."""

import errno
import itertools
import math
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from model.files import put_in_place
from server.agreement import disagreement, share_of_eager
from server.private import make_private
from server.programs import STALE_SECONDS, Programs
from server.runner import WARM_UP_RUNS
from tests.program import FakeProgram

INPUTS = (torch.zeros(2, 3),)


def saying(value):
    """A unit all of whose confidences and probabilities are this."""
    return lambda *_: (torch.zeros(2), torch.full((2, 5), value), torch.zeros(2))


@pytest.mark.parametrize(
    ("off", "dtype", "too_far"),
    [
        (0.0, torch.float32, False),
        (5e-4, torch.float32, False),
        (0.01, torch.float32, True),
        (0.01, torch.bfloat16, False),
        (0.5, torch.bfloat16, True),
    ],
)
def test_a_program_may_be_as_far_off_as_its_numerics_are_coarse(off, dtype, too_far):
    said = disagreement(FakeProgram(saying(0.25), INPUTS, off=off), saying(0.25), INPUTS, dtype)
    assert said == (pytest.approx(off) if too_far else None)


def test_a_program_that_gives_no_numbers_disagrees():
    assert math.isnan(
        disagreement(FakeProgram(saying(math.nan), INPUTS), saying(0.25), INPUTS, torch.float32)
    )


class BusyMachine:
    """Time goes by only where something runs, and the longer the more else runs."""

    def __init__(self, loads):
        self.now = 0.0
        self.loads = iter(loads)

    def clock(self):
        return self.now

    def taking(self, seconds):
        """A unit that takes so long on an idle machine."""

        def run(*_):
            self.now += seconds * next(self.loads)
            return saying(0.25)()

        return run


@pytest.mark.parametrize(
    "loads", [[1.0], [5.0], [1.0, 1.0, 1.0, 7.0, 2.0, 2.0, 3.0, 3.0, 9.0, 3.0]]
)
def test_a_program_is_as_fast_against_the_eager_unit_beside_traffic_as_alone(loads):
    runs = 2 * WARM_UP_RUNS
    machine = BusyMachine((loads * runs)[:runs])
    program, unit = FakeProgram(machine.taking(0.001), INPUTS), machine.taking(0.002)
    assert share_of_eager(program, unit, INPUTS, machine.clock) == pytest.approx(0.5)


def test_what_takes_long_is_compared_once():
    machine = BusyMachine(itertools.repeat(1.0))
    program, unit = FakeProgram(machine.taking(0.25), INPUTS), machine.taking(0.5)
    assert share_of_eager(program, unit, INPUTS, machine.clock) == pytest.approx(0.5)
    assert machine.now == 0.75


def test_only_what_a_killed_compiler_left_is_removed(bundle, tmp_path):
    programs = Programs(tmp_path, bundle, torch.float32, 1)
    ready = programs.file(1, 1)
    ready.touch()
    old, new = (ready.with_name(f"stage2-batch1.{i}.partial") for i in "ab")
    for file, age_seconds in ((ready, 9e9), (old, STALE_SECONDS + 1), (new, STALE_SECONDS - 1)):
        file.touch()
        os.utime(file, (1e10 - age_seconds, 1e10 - age_seconds))
    programs.remove_stale(clock=lambda: 1e10)
    assert sorted(programs.folder.iterdir()) == [ready, new]


@pytest.fixture
def filled(bundle, tmp_path):
    """A program that an image was filled with, and what opens its cache where that is read-only."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    file = Programs(cache, bundle, torch.float32, 1).file(1, 1)
    file.write_text("compiled before")
    file.chmod(0o644)

    def make(folder):
        if cache in folder.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make_private(folder)

    return file, lambda: Programs(cache, bundle, torch.float32, 1, make)


def test_a_cache_filled_beforehand_is_used_where_it_cannot_be_written(filled):
    file, open_read_only = filled
    programs = open_read_only()
    assert programs.file(1, 1).read_text() == "compiled before"
    lacking = programs.file(1, 2)
    assert not lacking.exists()
    put_in_place(lacking, Path.touch)
    assert lacking.exists()
    assert Path(tempfile.gettempdir()) in lacking.parents
    programs.file(1, 1).unlink()  # as one that turns out to be damaged
    programs.close()
    assert not programs.folder.exists()
    assert [f.read_text() for f in file.parent.iterdir()] == ["compiled before"]


@pytest.mark.parametrize("place", ["program", "folder", "cache"])
def test_a_program_that_others_may_change_is_not_taken_from_a_read_only_cache(
    filled, place, caplog
):
    file, open_read_only = filled
    {"program": file, "folder": file.parent, "cache": file.parent.parent}[place].chmod(0o777)
    programs = open_read_only()
    assert not programs.file(1, 1).exists()
    assert "1 of 1 programs in" in caplog.text
    programs.close()


@pytest.mark.parametrize(("mode", "private"), [(0o777, False), (0o770, True), (0o700, True)])
def test_a_folder_that_anyone_may_write_is_not_private_and_that_of_a_volumes_group_is(
    tmp_path, mode, private
):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    for place in (folder, folder / "within"):
        with nullcontext() if private else pytest.raises(PermissionError, match="can change"):
            make_private(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_not_private(tmp_path):
    os.chown(tmp_path, 54321, 54321)
    with pytest.raises(PermissionError, match="can change"):
        make_private(tmp_path / "within")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["program", "folder"])
def test_a_program_of_another_user_is_not_taken_from_a_read_only_cache(filled, place):
    file, open_read_only = filled
    os.chown(file if place == "program" else file.parent, 54321, 54321)
    programs = open_read_only()
    assert not programs.file(1, 1).exists()
    programs.close()
