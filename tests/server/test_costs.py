import pytest

from server.costs import CostTable, batch_sizes


@pytest.fixture
def costs():
    return CostTable({1: {1: 1.0, 4: 2.0, 8: 3.0}})


def test_costs_are_linear_between_measured_sizes(costs):
    assert costs.seconds(1, 4) == 2.0
    assert costs.seconds(1, 6) == 2.5


def test_a_batch_never_costs_less_than_one_image(costs):
    assert costs.seconds(1, 0.2) == costs.seconds(1, 1)


def test_costs_are_proportional_beyond_the_largest_measured_size(costs):
    assert costs.seconds(1, 16) == 6.0


def test_a_device_that_has_become_slower_is_soon_known_to_be_so_at_every_size():
    costs = CostTable({1: {1: 1.0, 4: 2.0, 8: 3.0}, 2: {1: 1.0}})
    for _ in range(30):
        costs.observe(1, 4, 4.0)
    assert costs.seconds(1, 4) == pytest.approx(4.0, rel=0.05)
    assert 5.0 < costs.seconds(1, 8) < 6.5
    assert 1.6 < costs.seconds(2, 1) < 2.0
    for _ in range(30):
        costs.observe(1, 4, 2.0)
    assert costs.seconds(1, 4) == pytest.approx(2.0, rel=0.05)
    assert costs.seconds(2, 1) == pytest.approx(1.0, rel=0.2)
    assert costs.as_rows()[2] == {1: costs.seconds(2, 1)}


def test_a_size_that_was_measured_wrongly_is_put_right_by_itself(costs):
    for _ in range(300):
        costs.observe(1, 4, 4.0)
        costs.observe(1, 1, 1.0)
    assert costs.seconds(1, 4) == pytest.approx(4.0, rel=0.1)
    assert costs.seconds(1, 1) == pytest.approx(1.0, rel=0.1)


def test_one_outlier_moves_the_table_little(costs):
    costs.observe(1, 1, 1000.0)
    assert costs.seconds(1, 1) <= 1.3


def test_a_team_costs_a_share_of_one_thread_for_a_lone_image_alone(costs):
    assert costs.seconds(1, 1, alone=True) == 1.0
    costs.use_team(1, 0.6)
    assert costs.seconds(1, 1, alone=True) == pytest.approx(0.6)
    assert costs.seconds(1, 1) == 1.0


def test_a_team_that_was_measured_wrongly_is_put_right_and_changes_no_other_cost(costs):
    costs.use_team(1, 0.6)
    for _ in range(300):
        costs.observe(1, 1, 0.8, alone=True)
        costs.observe(1, 1, 1.0)
        costs.observe(1, 4, 2.0)
    assert costs.seconds(1, 1, alone=True) == pytest.approx(0.8, rel=0.05)
    assert costs.seconds(1, 1) == pytest.approx(1.0, rel=0.05)
    assert costs.seconds(1, 4) == pytest.approx(2.0, rel=0.05)
    assert costs.teams() == {1: pytest.approx(0.8, rel=0.1)}


def test_a_machine_that_has_become_slower_is_noticed_by_its_team_too(costs):
    costs.use_team(1, 0.5)
    for _ in range(30):
        costs.observe(1, 1, 1.0, alone=True)
    assert 1.3 < costs.seconds(1, 1) < 1.5
    assert costs.seconds(1, 1, alone=True) == pytest.approx(1.0, rel=0.1)


class ReadMeanwhile(dict):
    """New measurements; whenever one is looked up, somebody reads the whole table."""

    def __init__(self, row, read):
        super().__init__(row)
        self.read = read

    def __getitem__(self, size):
        self.read()
        return super().__getitem__(size)


def test_who_reads_while_a_stage_is_replaced_sees_the_old_row_or_the_new_one(costs):
    old, new = {1: 1.0, 4: 2.0, 8: 3.0}, {n: 0.5 * n for n in range(1, 9)}
    seen = []
    costs.replace(1, ReadMeanwhile(new, lambda: seen.append(costs.as_rows()[1])))
    assert seen == [old] * len(new)
    assert costs.as_rows()[1] == new


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 32, 100])
def test_a_batch_is_padded_by_less_than_half(most):
    sizes = batch_sizes(most)
    assert list(sizes) == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    for n in range(1, most + 1):
        padded = min(size for size in sizes if size >= n)
        assert padded < 1.5 * n
