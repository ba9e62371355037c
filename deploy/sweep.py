"""Loads a running server from calm to three times its capacity, beside its simulation.

    python -m deploy.sweep http://localhost:8000 --images DIR --admin-token TOKEN

Each load is simulated from the very same send times and images, the confidences that the server
itself gave them, the cost table that the server had just after the load, and what it spends outside
stages. That is measured before: of the event loop with requests for the first exit, of the
engine as what it does not spend in stages while there is always something to run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deploy.loadtest.client import Client
from deploy.loadtest.load import Result, closed_loop, open_loop
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.schedules import BURST_SECONDS, KINDS
from deploy.loadtest.summary import summarise
from deploy.simulator import Arrival, Overhead, simulate
from model.policy import Rule
from server.classify import RESERVE_SECONDS
from server.costs import CostTable
from server.overload import Level, OverloadController
from server.scheduler import Scheduler

FACTORS = (0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
CLIENTS = 64
"""Enough that the engine finds a full batch whenever it is done with one."""
OVERHEAD_SECONDS = 2.0
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure and simulate every load, print one table; a failure is one sentence and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.seconds < 2 * BURST_SECONDS:
            raise ValueError("--seconds must hold a calm and a burst, so at least 2")
        samples = read_samples(arguments.images, arguments.most_images)
        said = asyncio.run(_sweep(arguments, samples))
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"full depth: {said['full_depth_per_second']:.0f} images a second; outside stages "
        f"{said['request_overhead_ms']:.2f} ms a request and {said['batch_overhead_ms']:.2f} ms a "
        f"batch\n\n{table(said['rows'])}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1) + "\n")
    if arguments.plot:
        _plot(said["rows"], arguments.plot)
    return 0


async def _sweep(arguments: argparse.Namespace, samples: list[Sample]) -> Row:
    loads = list(itertools.product(KINDS, FACTORS))
    seconds = (len(loads) + 1) * arguments.seconds + OVERHEAD_SECONDS
    print(f"{len(loads)} loads, about {1.3 * seconds / 60:.1f} minutes", file=sys.stderr)
    confidences = await record_confidences(arguments.url, samples)
    request_seconds = await request_overhead(arguments.url, samples)
    capacity, batch_seconds = await _saturate(arguments, samples)
    overhead = Overhead(request_seconds, batch_seconds)
    rows = []
    with tqdm(loads, "loads", leave=False) as bar:
        for kind, factor in bar:
            bar.set_description(f"{kind} at {factor:g} of full depth")
            times = KINDS[kind](factor * capacity, arguments.seconds)
            results = await _measure(arguments, samples, times)
            deadline = arguments.deadline_ms / 1e3
            measured = summarise(results, deadline)
            sent = [(r.intended, r.sent) for r in results]
            simulated = predict(_engine(arguments), sent, confidences, deadline, overhead)
            rows.append(
                {"kind": kind, "load": factor, "measured": measured, "simulated": simulated}
            )
    return {
        "full_depth_per_second": capacity,
        "request_overhead_ms": 1e3 * request_seconds,
        "batch_overhead_ms": 1e3 * batch_seconds,
        "rows": rows,
    }


async def request_overhead(url: str, samples: Sequence[Sample]) -> float:
    """Processor seconds that a request takes outside stages: nearly all are the event loop's.

    Measured with requests for the first exit, less the time that stages ran.
    """
    client = Client(f"{url}/classify?threshold=0&deadline_ms=60000")
    cpu, (stages, _) = _metric(url, "process_cpu_seconds_total"), _stages_run(url)
    results = await closed_loop(client, samples, CLIENTS, OVERHEAD_SECONDS)
    await client.close()
    outside = _metric(url, "process_cpu_seconds_total") - cpu - (_stages_run(url)[0] - stages)
    return max(0.0, outside) / len(results)


async def _saturate(arguments: argparse.Namespace, samples: list[Sample]) -> tuple[float, float]:
    """Full-depth images a second, and seconds that the engine spends between two batches."""
    client = Client(f"{arguments.url}/classify?threshold=1&deadline_ms=60000")
    seconds, batches = _stages_run(arguments.url)
    results = await closed_loop(client, samples, CLIENTS, arguments.seconds)
    await client.close()
    more_seconds, more_batches = _stages_run(arguments.url)
    idle = max(r.finished for r in results) - (more_seconds - seconds)
    capacity = summarise(results, 60.0)["answered_per_second"]
    return capacity, max(0.0, idle) / (more_batches - batches)


def _stages_run(url: str) -> tuple[float, float]:
    """Seconds spent in stages so far, and batches run."""
    family = "offramp_stage_duration_seconds"
    return _metric(url, f"{family}_sum"), _metric(url, f"{family}_count")


def _metric(url: str, name: str) -> float:
    """The sum of a metric's series."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line))


async def record_confidences(url: str, samples: Sequence[Sample]) -> list[tuple[float, ...]]:
    """What every exit says of each image, shallow to deep."""
    client = Client(f"{url}/classify?threshold=1&explain=true&deadline_ms=60000")
    recorded = []
    for sample in tqdm(samples, "recording confidences", leave=False):
        status, body = await client.post(sample.data)
        if not status:
            raise ValueError(f"{url} gives no answer")
        if status != 200:
            raise ValueError(f"{url} answers {status}: {body.decode(errors='replace')}")
        recorded.append(tuple(seen["confidence"] for seen in json.loads(body)["seen"]))
    await client.close()
    return recorded


async def _measure(
    arguments: argparse.Namespace, samples: list[Sample], times: Sequence[float]
) -> list[Result]:
    client = Client(f"{arguments.url}/classify?deadline_ms={arguments.deadline_ms:g}")
    results = await open_loop(client, samples, times)
    await client.close()
    return results


def predict(
    engine: Row,
    sent: Sequence[tuple[float, float]],
    confidences: Sequence[tuple[float, ...]],
    deadline: float,
    overhead: Overhead,
) -> Row:
    """Simulate a load on the server's scheduler.

    Args:
        engine: as `GET /engine` gives it.
        sent: when each request should have been sent, and when it was.
        confidences: by image; images are drawn as the load tester draws them.
        deadline: in seconds.
        overhead: what the server spends outside stages.
    """
    costs = CostTable({int(k): _by_size(row) for k, row in engine["seconds"].items()})
    ladder = [Level(x["max_accuracy_loss"], tuple(x["thresholds"])) for x in engine["ladder"]]
    scheduler = Scheduler(costs, OverloadController(ladder, deadline), engine["max_batch"])
    chance, allowed = random.Random(0), deadline - RESERVE_SECONDS
    load = [Arrival(at, chance.choice(confidences), allowed) for _, at in sent]
    late = {id(a): at - intended for a, (intended, at) in zip(load, sent, strict=True)}
    rule = Rule((*ladder[0].thresholds, 0.0), 1, costs.stages)
    outcomes = simulate(scheduler, load, rule, overhead=overhead)
    in_time = [o for o in outcomes if o.exit and o.seconds + late[id(o.arrival)] <= deadline]
    span = max(o.finished for o in outcomes)
    return {
        "goodput_per_second": len(in_time) / span,
        "in_time_share": len(in_time) / len(outcomes),
        "exits": {str(k): sum(o.exit == k for o in outcomes) for k in range(1, costs.stages + 1)},
    }


def _by_size(row: Row) -> dict[int, float]:
    return {int(size): seconds for size, seconds in row.items()}


def _engine(arguments: argparse.Namespace) -> Row:
    request = urllib.request.Request(
        f"{arguments.url}/engine", headers={"Authorization": f"Bearer {arguments.admin_token}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def table(rows: Sequence[Row]) -> str:
    """The loads as Markdown."""
    lines = [
        "| load | of full depth | offered/s | goodput/s | simulated | off by | in time "
        "| effective accuracy | p99, ms |",
        "| --- " * 9 + "|",
    ]
    for row in rows:
        measured, simulated = row["measured"], row["simulated"]["goodput_per_second"]
        goodput = measured["goodput_per_second"]
        off = simulated / goodput - 1 if goodput else float("inf")
        accuracy = measured["effective_accuracy"]
        lines.append(
            f"| {row['kind']} | {row['load']:g} | {measured['offered_per_second']:.0f} "
            f"| {goodput:.0f} | {simulated:.0f} | {off:+.0%} | {measured['in_time_share']:.1%} "
            f"| {'-' if accuracy is None else f'{accuracy:.1%}'} "
            f"| {measured['latency_ms'].get('p99', float('nan')):.1f} |"
        )
    return "\n".join(lines)


def _plot(rows: Sequence[Row], file: Path) -> None:
    import matplotlib  # wanted by this option alone

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(10, 4), layout="constrained", sharey=True)
    for kind, axis in zip(KINDS, axes, strict=True):
        of_kind = [row for row in rows if row["kind"] == kind]
        offered = [row["measured"]["offered_per_second"] for row in of_kind]
        for name, style in (("measured", "o-"), ("simulated", "s--")):
            axis.plot(offered, [r[name]["goodput_per_second"] for r in of_kind], style, label=name)
        axis.plot(offered, offered, ":", color="grey", label="all in time")
        axis.set(title=kind, xlabel="offered, images a second", ylabel="in time, images a second")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.sweep",
        description=__doc__.split("\n", 1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", help="http://host:port of the server")
    parser.add_argument("--images", type=Path, required=True, help="folder or tar of CLASS/*")
    parser.add_argument("--admin-token", required=True, help="the server's, for GET /engine")
    parser.add_argument("--deadline-ms", type=float, default=50.0, help="of every request")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each load")
    parser.add_argument("--most-images", type=int, default=500, help="images to send")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write the picture here (PNG)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
