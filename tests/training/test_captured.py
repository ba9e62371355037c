"""A step's work, recorded once and run again: with a recording that runs it in earnest."""

import torch

from training.captured import WARM_UP_STEPS, Captured


class Recorded:
    """Work with what it was given, and a recording of it."""

    def __init__(self):
        self.given, self.replays = [], 0

    def gradients(self, pixels, target):
        self.given.append((pixels, target))
        return (pixels * target).sum()[None]

    def record(self, work):
        def replay():
            self.replays += 1
            return work()

        return replay


def batch(i):
    return torch.full((4,), float(i)), torch.full((4,), i + 1.0)


def test_the_first_steps_run_as_they_are_and_the_others_are_replayed():
    work = Recorded()
    captured = Captured(work.gradients, work.record)
    values = [captured(*batch(i)) for i in range(WARM_UP_STEPS + 3)]
    assert [v.item() for v in values] == [4.0 * i * (i + 1) for i in range(WARM_UP_STEPS + 3)]
    assert work.replays == 3


def test_what_is_recorded_runs_over_its_own_tensors_alone():
    work = Recorded()
    captured = Captured(work.gradients, work.record)
    batches = [batch(i) for i in range(WARM_UP_STEPS + 3)]
    for pixels, target in batches:
        captured(pixels, target)
    recorded = work.given[WARM_UP_STEPS:]
    assert len({pixels.data_ptr() for pixels, _ in recorded}) == 1
    assert all(p.data_ptr() != recorded[0][0].data_ptr() for p, _ in batches)
