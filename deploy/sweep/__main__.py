"""Loads a running server from calm to three times its capacity, beside its simulation.

    python -m deploy.sweep http://localhost:8000 --images DIR --admin-token TOKEN --json FILE
    python -m deploy.sweep --again FILE

Each load is simulated from the very same send times and images, the confidences that the server
itself gave them, the cost table that the server had in the course of the load, and what is spent
outside stages, which is measured before. A recording holds all of that, so that it can be
simulated again. If the server fails between two loads, the recording has those before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from deploy.files import need_picture, need_writable
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.schedules import KINDS, check_swings, of_kind
from deploy.options import count, positive
from deploy.sweep.engine import Row
from deploy.sweep.measuring import measure, record_exits
from deploy.sweep.prediction import overhead_of, predict
from deploy.sweep.recording import load_seconds, read_recording, record, sent
from deploy.sweep.report import plot, table
from model.cores import usable_cores

FACTORS = (0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
COSTS_SECONDS = 2.0
"""Length of each flood that measures what is spent outside stages."""


class CutShortError(Exception):
    """A sweep that failed after some of its loads.

    Args:
        said: the recording so far.
        loads: how many there were to be.
        reason: why there are no more, in a sentence.
    """

    def __init__(self, said: Row, loads: int, reason: Exception) -> None:
        super().__init__(f"after {len(said['rows'])} of {loads} loads: {reason}")
        self.said = said


def main(argv: list[str] | None = None) -> int:
    """Measure and simulate every load, print one table; a failure is one sentence and status 2.

    What was recorded before a failure is written and shown all the same.
    """
    arguments = _parser().parse_args(argv)
    try:
        need_writable(arguments.json, arguments.plot)
        need_picture(arguments.plot)
        said = read_recording(arguments.again) if arguments.again else _measured(arguments)
    except CutShortError as error:
        _show(error.said, arguments)
        return _failed(error)
    except (ValueError, OSError) as error:
        return _failed(error)
    _show(said, arguments)
    return 0


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _show(said: Row, arguments: argparse.Namespace) -> None:
    """Write a recording, simulate it, print its table, write it again with what was simulated."""
    _keep(said, arguments.json)  # before the simulations, which may fail
    for row in tqdm(said["rows"], "simulations", leave=False, disable=None):
        row["simulated"] = _simulated(said, row)
    print(f"{_costs(said)}\n\n{table(said['rows'])}")
    _keep(said, arguments.json)
    if arguments.plot:
        plot(said["rows"], arguments.plot)


def _keep(said: Row, file: Path | None) -> None:
    if file:
        file.write_text(json.dumps(said) + "\n")


def _measured(arguments: argparse.Namespace) -> Row:
    if not (arguments.url and arguments.images and arguments.admin_token):
        raise ValueError("a sweep needs a URL, --images and --admin-token, or --again FILE")
    check_swings(arguments.seconds)
    url = _server(arguments.url)
    samples = read_samples(arguments.images, arguments.most_images)
    return asyncio.run(_sweep(arguments, url, samples))


def _server(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: it is not that of a server alone.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or url.rstrip("/") != f"http://{parts.netloc}":
        raise ValueError(f"a sweep wants http://host:port of the server, and nothing after: {url}")
    return url.rstrip("/")


async def _sweep(arguments: argparse.Namespace, url: str, samples: list[Sample]) -> Row:
    loads = list(itertools.product(KINDS, FACTORS))
    seconds = len(loads) * arguments.seconds + 5 * COSTS_SECONDS
    print(f"{len(loads)} loads, about {1.3 * seconds / 60:.1f} minutes", file=sys.stderr)
    confidences, right = await record_exits(url, arguments.admin_token, samples)
    costs = await measure(url, arguments.admin_token, samples, COSTS_SECONDS)
    said = {
        "deadline_ms": arguments.deadline_ms,
        "cores": usable_cores(),
        "costs": asdict(costs),
        "confidences": confidences,
        "right": right,
        "rows": [],
    }
    try:
        await _record_all(said, loads, arguments, url, samples)
    except (ValueError, OSError) as error:
        if said["rows"]:
            raise CutShortError(said, len(loads), error) from None
        raise
    return said


async def _record_all(
    said: Row,
    loads: Sequence[tuple[str, float]],
    arguments: argparse.Namespace,
    url: str,
    samples: list[Sample],
) -> None:
    """Send one load after the other; each is a row of the recording once it is over."""
    deadline, seconds = arguments.deadline_ms / 1e3, arguments.seconds
    with tqdm(loads, "loads", leave=False, disable=None) as bar:
        for kind, factor in bar:
            bar.set_description(f"{kind} at {factor:g} of full depth")
            times = of_kind(kind, factor * said["costs"]["full_depth_per_second"], seconds)
            row = await record(url, arguments.admin_token, samples, times, seconds, deadline)
            said["rows"].append({"kind": kind, "load": factor, **row})


def _simulated(said: Row, row: Row) -> Row:
    deadline = said["deadline_ms"] / 1e3
    overhead = overhead_of(said["costs"], row["client_ms"] / 1e3, deadline, said["cores"])
    return predict(
        row["engine"],
        sent(row),
        said["confidences"],
        deadline,
        load_seconds(row),
        overhead,
        said.get("right"),
        row.get("moments", ()),
    )


def _costs(said: Row) -> str:
    ms = {name: 1e3 * seconds for name, seconds in said["costs"].items()}
    return (
        f"full depth: {said['costs']['full_depth_per_second']:.0f} images a second on "
        f"{said['cores']} cores; outside stages {ms['begin']:.2f} ms to begin a request, "
        f"{ms['answer']:.2f} to answer it, {ms['refuse']:.2f} to refuse one, {ms['batch']:.2f} "
        f"between two batches"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.sweep",
        description=__doc__.split("\n", 1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("url", nargs="?", help="http://host:port of the server")
    parser.add_argument("--images", type=Path, help="folder or tar of CLASS/*")
    parser.add_argument("--admin-token", help="the server's, for GET /engine")
    parser.add_argument("--deadline-ms", type=positive, default=50.0, help="of every request")
    parser.add_argument("--seconds", type=positive, default=4.0, help="length of each load")
    parser.add_argument("--most-images", type=count, default=500, help="images to send")
    parser.add_argument("--json", type=Path, help="write the recording here, every figure in it")
    parser.add_argument("--again", type=Path, help="load nothing: simulate this recording again")
    parser.add_argument("--plot", type=Path, help="write the picture here (PNG)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
