"""Teams: several threads that compute one image, for when it has the cores to itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.memory import Program

RUNS = 30
RUNS_SECONDS = 0.5
"""Fewer runs where they would take longer: meanwhile live requests lack the cores."""
PAUSE_SECONDS = 0.0003
"""Before each run, as between the stages of a lone request: threads that wait so long sleep, and
waking them belongs to what a team costs."""
WORTH_ITS_CORES = 0.9
"""A team that takes more than this share of one thread's time keeps cores busy for nothing."""


def team_sizes(threads: int, most: int) -> list[int]:
    """Numbers of threads to try: more than one program has anyway, doubled up to all there are."""
    sizes = []
    while threads < most:
        threads = min(2 * threads, most)
        sizes.append(threads)
    return sizes


def share_of_one(
    team: Program,
    one: Program,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """A team's time as a share of one thread's, by runs of both in turns.

    The least of each counts: what else runs takes a core from either only at times, and a team
    needs all of them at once.
    """
    least = {team: float("inf"), one: float("inf")}
    end = clock() + RUNS_SECONDS
    for runs in range(RUNS):
        if runs and clock() > end:
            break
        for program in least:
            sleep(PAUSE_SECONDS)
            began = clock()
            program.run()
            least[program] = min(least[program], clock() - began)
    return least[team] / least[one]
