"""Cores are counted as far as the process may use them, in containers of both kinds."""

import os

import pytest

from model.cores import usable_cores

SECOND = "0::/\n"
FIRST = "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n"
UNIT = "0::/system.slice/offramp.service\n"


def system(root, own, files):
    """A file system that tells of these control groups."""
    for name, text in {"proc/self/cgroup": own, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def second(text, group=""):
    return {f"sys/fs/cgroup{group}/cpu.max": f"{text}\n"}


def first(quota, period=100000):
    folder = "sys/fs/cgroup/cpu"
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (SECOND, second("200000 100000"), 2),
        (SECOND, second("100000 50000"), 2),
        (SECOND, second("350000 100000"), 3),
        (SECOND, second("50000 100000"), 1),
        (SECOND, second("9900000 100000"), 8),
        (SECOND, second("max 100000"), 8),
        (SECOND, {}, 8),
        (FIRST, first(200000), 2),
        (FIRST, first(150000, 50000), 3),
        (FIRST, first(-1), 8),
        (UNIT, second("200000 100000", "/system.slice/offramp.service"), 2),
        (UNIT, second("300000 100000", "/system.slice"), 3),
        ("", {}, 8),
    ],
)
def test_a_limit_counts_where_it_is_less_than_the_cores_allowed(tmp_path, own, files, cores):
    assert usable_cores(system(tmp_path, own, files), allowed=8) == cores


def test_no_more_cores_than_the_process_may_run_on():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system keeps no process to some cores")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= usable_cores() <= len(before)
