"""Each bound's tests begin where the images that certify nothing say they are likeliest to pass."""

import numpy as np
import pytest

from tests.training.worlds import judged
from training.ladder import LOSSES, Certifier, Method
from training.search import fill, nested_path
from training.start import first_steps
from training.tally import tally

DELTA = 0.1
MACS = np.array([0.3, 0.5, 0.75, 1.0])


@pytest.fixture(scope="module")
def searched():
    return judged(800, seed=1)


@pytest.fixture(scope="module")
def path(searched):
    return fill(nested_path(searched, MACS), searched.confidence)


@pytest.mark.slow
def test_enough_images_begin_with_the_most_careful_thresholds(searched, path):
    first = first_steps(path, searched, 4000, Method.PAIRED, DELTA)
    assert first == {bound: 1 for bound in LOSSES if bound}


@pytest.mark.slow
def test_too_few_images_to_prove_anything_by_losing_none_begin_with_bolder_ones(searched, path):
    first = first_steps(path, searched, 225, Method.PAIRED, DELTA)
    assert 1 < first[0.01] < len(path)
    assert (first[0.03], first[0.05]) == (1, 1)


@pytest.mark.slow
def test_beginning_there_certifies_where_beginning_with_the_most_careful_cannot(searched, path):
    population, rng = judged(20_000, seed=1), np.random.default_rng(0)
    first = first_steps(path, searched, 225, Method.PAIRED, DELTA)[0.01]
    certified = {1: 0, first: 0}
    for _ in range(100):
        images = population.pick(rng.integers(0, len(population), 225))
        counts = tally(images, path)
        for begin in certified:
            step = Certifier(images, DELTA, Method.PAIRED).certified(counts, 0.01, begin)
            assert step == 0 or step >= begin
            certified[begin] += step > 0
    assert certified[1] == 0
    assert certified[first] > 5


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in Method if m is not Method.PAIRED])
def test_methods_that_count_no_gains_begin_with_the_most_careful(searched, path, method):
    assert first_steps(path, searched, 225, method, DELTA) == {}


def test_a_path_of_the_full_network_alone_has_nowhere_to_begin(searched, path):
    assert first_steps(path[:1], searched, 225, Method.PAIRED, DELTA) == {}
