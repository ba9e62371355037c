"""When a program may stand in for an eager unit."""

import math

import pytest
import torch

from server.programs import disagreement

INPUTS = (torch.zeros(2, 3),)


def saying(value):
    """A unit or program all of whose confidences and probabilities are this."""
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
    said = disagreement(saying(0.25 + off), saying(0.25), INPUTS, dtype)
    assert said == (pytest.approx(off) if too_far else None)


def test_a_program_that_gives_no_numbers_disagrees():
    assert math.isnan(disagreement(saying(math.nan), saying(0.25), INPUTS, torch.float32))
