"""Compiled stages: where programs are kept, and when one is used."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from server.compiling import Compiling
from server.costs import CostTable
from server.numerics import choose_dtype
from server.programs import TOLERANCE, Programs, compiler, difference, load_program
from server.runner import Runner
from server.settings import Settings
from server.units import example_inputs, make_units

CPU = torch.device("cpu")


@pytest.fixture
def runner(bundle):
    one = Runner(bundle, CPU, torch.float32)
    one._eager = CostTable({k: {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0} for k in (1, 2, 3, 4)})
    return one


def test_a_batch_is_padded_only_where_that_is_cheaper(runner):
    runner.use_program(1, 4, lambda tensors: tensors, 2.5)
    assert [runner._plan(1, n)[1] for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]
    assert runner.expected(1, 8) == {1: 1.0, 2: 2.0, 4: 2.5, 5: 5.0, 8: 8.0}
    assert runner._plan(2, 3) == (None, 3)


def test_a_program_slower_than_the_eager_stage_is_not_used(runner):
    runner.use_program(1, 4, lambda tensors: tensors, 9.0)
    assert runner._plan(1, 4) == (None, 4)


def test_padding_gives_the_same_answers(runner):
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    eager = runner.run(1, pixels)
    runner.use_program(1, 4, lambda tensors: runner.units[0](*tensors), 0.5)
    padded = runner.run(1, pixels)
    assert runner._plan(1, 3)[1] == 4
    np.testing.assert_allclose(padded.confidences, eager.confidences, atol=1e-4)
    assert len(padded.rows) == len(padded.probabilities) == 3


def test_the_folder_depends_on_what_programs_depend_on(bundle, tmp_path, monkeypatch):
    def folder(dtype=torch.float32, threads=1):
        return Programs(tmp_path, bundle, dtype, threads).folder

    folders = {folder(), folder(torch.bfloat16), folder(threads=2)}
    assert folder() in folders
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len(folders | {folder()}) == 4


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(bundle, tmp_path):
    file = tmp_path / "file"
    file.touch()
    programs = Programs(file / "cache", bundle, torch.float32, 1)
    assert Path(tempfile.gettempdir()) in programs.folder.parents
    programs.close()
    assert not programs.folder.exists()


def test_a_broken_program_is_deleted_and_survived(bundle, bundle_path, tmp_path, caplog):
    chosen = Settings(bundle=bundle_path, cache_dir=tmp_path, max_batch=1)
    units = make_units(bundle, CPU, torch.float32)
    compiling = Compiling(chosen, bundle, units, torch.float32, 1)
    file = compiling._programs.file(1, 1)
    file.write_bytes(b"broken")
    used = []
    compiling.use_ready(lambda *program: used.append(program))
    assert not file.exists()
    assert used == []
    assert "cannot be used" in caplog.text


def test_other_numerics_than_the_policys_are_warned_of(bundle, caplog):
    assert choose_dtype("float32", bundle, CPU) is torch.float32
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert choose_dtype("bfloat16", bundle, CPU) is torch.bfloat16
    assert "certified in float32" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while compiling
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_a_compiled_unit_equals_the_eager_one(bundle, tmp_path):
    from server.compile import compile_unit

    units = make_units(bundle, CPU, torch.float32)
    for size in (1, 2):
        inputs = example_inputs(units, bundle, size, CPU)[0]
        file = tmp_path / f"{size}.pt2"
        compile_unit(units[0], inputs, file)
        assert difference(load_program(file), units[0], inputs) <= TOLERANCE[torch.float32]
