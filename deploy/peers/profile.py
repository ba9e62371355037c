"""Where a loaded Offramp spends its machine's time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.exposition import scrape
from model.cores import usable_cores
from model.table import markdown_table

ENGINE, TEAM, LOOP, DECODERS, REST = (
    "engine",
    "engine's team of threads",
    "event loop",
    "decoders",
    "other threads",
)


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread of a process, with its nanoseconds so far."""

    number: int
    name: str
    running: int
    ready: int
    """While others had the cores."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Everything that counts up, at one time."""

    seconds: float
    threads: Mapping[int, Thread]
    stage_seconds: float
    tester_seconds: float
    """CPU time of the load tester, which is this process."""


def look(pid: int, url: str) -> Moment:
    """Read the counters of a running Offramp.

    Args:
        pid: of its process.
        url: `http://host:port`.
    """
    stage_seconds = scrape(url).total("offramp_stage_duration_seconds_sum")
    threads = {t.number: t for t in _threads(pid)}
    return Moment(time.perf_counter(), threads, stage_seconds, time.process_time())


def profile(pid: int, before: Moment, after: Moment) -> dict[str, Any]:
    """What happened between two moments, as seconds and as shares of the whole machine.

    Outside stages is the event loop, decoding and whatever else is not the engine; and of the
    engine's workers the time that they ran, or were ready to run, less what they spent in stages.
    """
    cores = usable_cores()
    seconds = after.seconds - before.seconds
    stages = after.stage_seconds - before.stage_seconds
    running = dict.fromkeys((ENGINE, TEAM, LOOP, DECODERS, REST), 0.0)
    workers = _workers(after)
    scheduling = -stages
    for number, thread in after.threads.items():
        was = before.threads.get(number, Thread(number, thread.name, 0, 0))
        group = _group(thread, pid, workers)
        running[group] += (thread.running - was.running) / 1e9
        if group == ENGINE:
            ready = thread.ready - was.ready
            scheduling += (thread.running - was.running + ready) / 1e9
    outside = max(0.0, scheduling) + running[LOOP] + running[DECODERS] + running[REST]
    tester = after.tester_seconds - before.tester_seconds
    return {
        "seconds": seconds,
        "cores": cores,
        "cpu_seconds": running | {"load tester": tester},
        "stage_seconds": stages,
        "scheduling_seconds": max(0.0, scheduling),
        "outside_stages": outside / (seconds * cores),
    }


def table(said: Mapping[str, Any]) -> str:
    """A profile as Markdown."""
    machine = said["seconds"] * said["cores"]
    rows = [
        [name, f"{seconds:.2f}", f"{seconds / machine:.1%}"]
        for name, seconds in said["cpu_seconds"].items()
    ]
    return (
        f"{markdown_table(['at saturation', 'CPU seconds', 'of the machine'], rows)}\n\n"
        f"Stages ran for {said['stage_seconds'] / said['seconds']:.1%} of the time; the engine "
        f"did {said['scheduling_seconds']:.2f} s of other work. Decoding, HTTP and scheduling took "
        f"{said['outside_stages']:.1%} of the machine."
    )


def _workers(moment: Moment) -> set[int]:
    """The first thread of each name that is the engine's; its team has inherited the name."""
    first: dict[str, int] = {}
    for thread in moment.threads.values():
        if thread.name.startswith(ENGINE):
            first[thread.name] = min(thread.number, first.get(thread.name, thread.number))
    return set(first.values())


def _group(thread: Thread, pid: int, workers: Set[int]) -> str:
    if thread.number == pid:
        return LOOP
    if thread.name.startswith(ENGINE):
        return ENGINE if thread.number in workers else TEAM
    return DECODERS if thread.name.startswith("decode") else REST


def _threads(pid: int) -> list[Thread]:
    found = []
    for folder in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            running, ready, _ = (folder / "schedstat").read_text().split()
            name = (folder / "comm").read_text().strip()
            found.append(Thread(int(folder.name), name, int(running), int(ready)))
    return found
