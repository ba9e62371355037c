"""Compiled stages: where programs are kept, and when one is used."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bundle import load_servable
from model.fold import fold_stages
from model.numerics import DTYPES
from model.policy import LARGEST_WEIGHT, Quantisation
from model.quantisation import observe
from server.costs import CostTable
from server.numerics import choose_dtype
from server.programs import Programs
from server.runner import WARM_UP_RUNS, Runner
from server.units import make_units
from tests.card import CARD, CPU
from tests.conftest import ROOT
from tests.program import fake_program


def in_eight_bits(bundle):
    """The bundle with a policy that was calibrated for int8 as well."""
    noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    quantisation = Quantisation(
        ranges=observe(fold_stages(bundle.net), [noise]),
        measured_accuracy_loss=0.001,
        accuracy_loss_bound=0.002,
        largest_weight=LARGEST_WEIGHT,
    )
    changed = {"quantisation": quantisation, "dtypes": ("float32", "int8")}
    return replace(bundle, policy=bundle.policy.model_copy(update=changed))


@pytest.fixture
def runner(bundle):
    one = Runner(bundle, CPU, torch.float32)
    one._eager = CostTable({k: {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0} for k in (1, 2, 3, 4)})
    return one


class Clock:
    """Stands still but when it is looked at; then so many seconds pass, by how often it was."""

    def __init__(self, seconds):
        self._seconds = seconds
        self.now, self.looks = 0.0, 0

    def __call__(self):
        self.now += self._seconds(self.looks)
        self.looks += 1
        return self.now


def test_a_slow_spell_makes_no_size_look_dearer_than_another(bundle):
    sizes, looks_a_round = (1, 2, 4), 3 * 4 * 2
    clock = Clock(lambda look: 0.003 if 1.2 < look / looks_a_round < 3.1 else 0.001)
    seconds = Runner(bundle, CPU, torch.float32, clock=clock).warm_up(sizes)
    assert all(one == pytest.approx(0.001) for row in seconds.values() for one in row.values())
    assert [list(row) for row in seconds.values()] == [list(sizes)] * 4


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 1 + WARM_UP_RUNS), (0.06, 3), (0.5, 2)])
def test_what_takes_long_is_timed_less_often(bundle, seconds, rounds):
    clock = Clock(lambda _: seconds)
    Runner(bundle, CPU, torch.float32, clock=clock).warm_up((1, 2))
    assert clock.looks == rounds * 2 * 4 * 2


def test_a_batch_is_padded_only_where_that_is_cheaper(runner):
    program = object()
    runner.use_program(1, 4, program, 2.5)
    plans = [runner._plan(1, n) for n in (1, 2, 3, 4, 5)]
    assert plans == [None, None, program, program, None]
    expected = {1: 1.0, 2: 2.0, 3: 2.5, 4: 2.5, 5: 5.0, 6: 6.0, 8: 8.0}
    assert runner.expected(1, 8) == expected
    assert runner._plan(2, 3) is None


def test_a_batch_is_never_padded_beyond_the_next_larger_program(runner):
    small, large = object(), object()
    runner.use_program(1, 8, large, 0.1)  # measured while the machine was idle
    assert runner._plan(1, 2) is large
    runner.use_program(1, 4, small, 0.9)  # and this one while it was busy
    assert runner._plan(1, 2) is small
    assert runner._plan(1, 5) is large


def test_a_program_slower_than_the_eager_stage_is_not_used(runner):
    runner.use_program(1, 4, object(), 9.0)
    assert runner._plan(1, 4) is None


class Interrupted(Runner):
    """Something happens in another thread after a way to run a batch was chosen."""

    def __init__(self, bundle, happening):
        super().__init__(bundle, CPU, torch.float32)
        self._happening = happening

    def _best(self, stage, n):
        best = super()._best(stage, n)
        self._happening(self)
        return best


def test_a_program_that_comes_while_a_batch_is_planned_is_used_for_the_next(bundle):
    program = object()
    runner = Interrupted(bundle, lambda one: one.use_program(1, 4, program, 0.5))
    assert runner._plan(1, 3) is None
    assert runner._plan(1, 3) is program


def test_padding_gives_the_same_answers(bundle, runner):
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    eager = runner.run(1, pixels)
    program = fake_program(bundle, runner.units, 1, 4)
    runner.use_program(1, 4, program, 0.5)
    padded = runner.run(1, pixels)
    assert runner._plan(1, 3) is program
    np.testing.assert_allclose(padded.confidences, eager.confidences, atol=1e-4)
    assert len(padded.probabilities) == 3


def test_an_input_that_is_missing_is_never_made_up_for_by_a_neighbour(bundle, runner):
    pixels = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    rows = runner.keep(runner.run(1, pixels), range(3))
    for stage, inputs in ((1, pixels), (2, rows)):
        with pytest.raises((TypeError, ValueError)):
            runner.run(stage, [inputs[0], None, inputs[2]])
        runner.use_program(stage, 4, fake_program(bundle, runner.units, stage, 4), 0.0)
        with pytest.raises((TypeError, ValueError)):
            runner.run(stage, [inputs[0], None, inputs[2]])


def test_the_folder_depends_on_what_programs_depend_on(bundle, tmp_path, monkeypatch):
    def folder(bundle=bundle, dtype=torch.float32, threads=1):
        return Programs(tmp_path, bundle, dtype, threads).folder

    retrained = bundle.description.model_copy(update={"weights_sha256": "0" * 64})
    warmer = bundle.policy.calibrations[0].model_copy(update={"temperature": 3.0})
    calibrations = (warmer, *bundle.policy.calibrations[1:])
    recalibrated = bundle.policy.model_copy(update={"calibrations": calibrations})
    folders = [
        folder(),
        folder(dtype=torch.bfloat16),
        folder(threads=2),
        folder(replace(bundle, description=retrained)),
        folder(replace(bundle, policy=recalibrated)),
    ]
    assert folder() == folders[0]
    monkeypatch.setattr(torch, "__version__", "0.0")
    folders.append(folder())
    assert len(set(folders)) == len(folders)


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(bundle, tmp_path):
    file = tmp_path / "file"
    file.touch()
    programs = Programs(file / "cache", bundle, torch.float32, 1)
    assert Path(tempfile.gettempdir()) in programs.folder.parents
    programs.close()
    assert not programs.folder.exists()


def test_other_numerics_than_the_policys_are_warned_of(bundle, caplog):
    assert choose_dtype("float32", bundle, CPU) is torch.float32
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert choose_dtype("bfloat16", bundle, CPU) is torch.bfloat16
    assert "certified in float32" in caplog.text


def always(dtype, device):
    return True


def never(dtype, device):
    return False


def test_int8_is_served_where_the_policy_was_calibrated_for_it(bundle, caplog):
    with pytest.raises(ValueError, match="not calibrated for int8; run: python -m training"):
        choose_dtype("int8", bundle, CPU, suits=always)
    with pytest.raises(ValueError, match="int8, which is for CPU, and the device is cuda"):
        choose_dtype("int8", bundle, CARD)
    eight = in_eight_bits(bundle)
    former = eight.policy.quantisation.model_copy(update={"largest_weight": 127})
    with pytest.raises(ValueError, match="weights up to 127 steps, where they are now up to 63"):
        policy = eight.policy.model_copy(update={"quantisation": former})
        choose_dtype("int8", replace(eight, policy=policy), CPU, suits=always)
    with pytest.raises(ValueError, match="needs a processor with AVX2; this one has none"):
        choose_dtype("int8", eight, CPU, suits=never)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert choose_dtype("int8", eight, CPU, suits=always) is torch.int8
    assert "loses at most 0.20 points of accuracy against float32, with probability 0.9" in (
        caplog.text
    )
    assert "WARNING" not in caplog.text
    assert choose_dtype("auto", eight, CPU) is not torch.int8


def test_the_folder_depends_on_the_ranges_of_int8(bundle, tmp_path):
    folders = {Programs(tmp_path, b, torch.int8, 1).folder for b in (bundle, in_eight_bits(bundle))}
    assert len(folders) == 2


def test_a_policy_for_several_numerics_leaves_the_choice_to_the_server(bundle, caplog):
    several = bundle.policy.model_copy(update={"dtypes": ("float32", "bfloat16")})
    chosen = choose_dtype("auto", replace(bundle, policy=several), CPU)
    assert chosen in (torch.float32, torch.bfloat16)
    assert choose_dtype("auto", bundle, CPU) is torch.float32  # certified in nothing else
    assert caplog.text == ""


@pytest.mark.slow
def test_the_default_bundle_is_served_in_every_numerics_that_its_policy_names():
    bundle = load_servable(ROOT / "model" / "default")
    for name in bundle.policy.dtypes:
        assert len(make_units(bundle, torch.device("cpu"), DTYPES[name])) == 4


@pytest.mark.parametrize(
    ("certified", "taken", "holds"),
    [
        ((), torch.float16, False),
        (("float32", "bfloat16", "int8"), torch.bfloat16, True),
        (("float32", "bfloat16", "float16"), torch.float16, True),
    ],
)
def test_a_card_takes_half_precision_that_the_guarantee_holds_in_if_there_is_one(
    bundle, caplog, certified, taken, holds
):
    policy = bundle.policy.model_copy(update={"dtypes": certified})
    on_card = choose_dtype("auto", replace(bundle, policy=policy), CARD, suits=always)
    assert on_card is taken
    assert ("guarantee does not hold" in caplog.text) != holds


def test_only_a_card_without_bf16_is_said_to_be_slow_in_it(bundle, caplog):
    def said(dtype, device, suits):
        caplog.clear()
        policy = bundle.policy.model_copy(update={"dtypes": (dtype,)})
        choose_dtype(dtype, replace(bundle, policy=policy), device, suits)
        return caplog.text

    assert "DTYPE=float16 is faster here" in said("bfloat16", CARD, never)
    assert said("bfloat16", CARD, always) == said("bfloat16", CPU, never) == ""
