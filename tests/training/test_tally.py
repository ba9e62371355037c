"""Counting a whole path at once is counting each of its steps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.policy import NEVER
from training.outcomes import Outcomes
from training.tally import tally


@st.composite
def nested(draw):
    """Outcomes of a few images with coarse confidences, so that ties abound, and a nested path."""
    exits, n = draw(st.integers(2, 4)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    confidence = rng.integers(0, 6, (n, exits)) / 5
    right = rng.random((n, exits)) < 0.5
    jumps = rng.integers(0, 7, (draw(st.integers(0, 8)), exits - 1)) / 5
    vectors = np.minimum.accumulate(np.vstack([np.full(exits - 1, NEVER), jumps]))
    path = [tuple(v.tolist()) for v in vectors]
    return Outcomes(confidence, right.astype(int), right, confidence), path


@given(nested())
def test_a_tally_counts_what_every_step_loses_and_gains(world):
    outcomes, path = world
    counts = tally(outcomes, path)
    differences = np.array([outcomes.differences(outcomes.taken(step)) for step in path])
    assert counts.losses.tolist() == (differences > 0).sum(axis=1).tolist()
    assert counts.gains.tolist() == (differences < 0).sum(axis=1).tolist()
    ever = np.logical_or.accumulate(differences > 0, axis=0).sum(axis=1)
    assert counts.ever_lost.tolist() == ever.tolist()
