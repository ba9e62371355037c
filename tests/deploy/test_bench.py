"""The benchmark of stage borders: what it counts, and what it cannot."""

import pytest

from deploy.bench.__main__ import main
from deploy.bench.stages import medians


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
