"""The command line: python -m deploy.loadtest URL [URL …] --images DIR."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.files import need_picture, need_writable
from deploy.loadtest import schedules
from deploy.loadtest.client import Client
from deploy.loadtest.headroom import own_rate
from deploy.loadtest.load import Result, closed_loop, open_loop
from deploy.loadtest.plot import plot
from deploy.loadtest.samples import Sample, read_samples
from deploy.loadtest.summary import summarise
from deploy.options import count, positive

PATIENCE_DEADLINES = 10
LEAST_PATIENCE_SECONDS = 10.0
NOWHERE = 404, 405
"""What is answered where nothing takes images, such as at a server's root."""


@dataclass(frozen=True, slots=True)
class Load:
    """What every server is sent."""

    send: Callable[[Client, Sequence[Sample]], Awaitable[list[Result]]]
    seconds: float | None
    """Its length; None where all requests are sent at once."""


def main(argv: list[str] | None = None) -> int:
    """Load each server in turn with the same load, print one table.

    Returns:
        0; 1 where a server served nobody, 2 where something could not be done.
    """
    arguments = _parser().parse_args(argv)
    try:
        need_writable(arguments.json, arguments.plot)
        need_picture(arguments.plot)
        load, samples = _load(arguments), read_samples(arguments.images)
        results, summaries = asyncio.run(_run(arguments, load, samples))
        print(_table(summaries))
        if arguments.json:
            arguments.json.write_text(json.dumps(summaries, indent=2) + "\n")
        if arguments.plot:
            plot(results, arguments.deadline_ms / 1e3, arguments.plot)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _served(summaries)


def _served(summaries: dict[str, Any]) -> int:
    """The status: 1 if one of the servers answered no request with an answer."""
    silent = [url for url, summary in summaries.items() if "200" not in summary.get("status", ())]
    for url in silent:
        print(f"error: {url} answered no image", file=sys.stderr)
    return 1 if silent else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.loadtest",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("urls", nargs="+", metavar="URL", help="where images are posted")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder or tar of CLASS/*, or plain"
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=positive, default=50.0, help="Poisson requests a second")
    load.add_argument(
        "--bursts", type=positive, metavar="RATE", help="bursts around this mean rate"
    )
    load.add_argument("--trace", type=Path, help="file of send times in seconds, one a line")
    load.add_argument("--clients", type=count, help="closed loop with so many clients instead")
    parser.add_argument(
        "--seconds", type=positive, default=10.0, help="length of the load; a trace has its own"
    )
    parser.add_argument("--deadline-ms", type=positive, default=50.0, help="what counts as in time")
    parser.add_argument(
        "--patience",
        type=positive,
        metavar="SECONDS",
        help="after which a request is given up and counts as failed, with status 0; if not given, "
        f"{PATIENCE_DEADLINES} deadlines, but at least {LEAST_PATIENCE_SECONDS:g} s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of send times and images")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--plot", type=Path, help="write the latency picture here (PNG)")
    return parser


def _patience(arguments: argparse.Namespace) -> float:
    """Seconds after which a request is given up."""
    deadlines = PATIENCE_DEADLINES * arguments.deadline_ms / 1e3
    given: float | None = arguments.patience
    return max(LEAST_PATIENCE_SECONDS, deadlines) if given is None else given


def _load(arguments: argparse.Namespace) -> Load:
    seconds, seed, patience = arguments.seconds, arguments.seed, _patience(arguments)
    if (clients := arguments.clients) is not None:
        return Load(lambda c, s: closed_loop(c, s, clients, seconds, seed, patience), seconds)
    if arguments.trace is not None:
        times = schedules.recorded(arguments.trace)
        seconds = schedules.length(times)
    elif arguments.bursts is not None:
        schedules.check_swings(seconds)
        times = schedules.bursts(arguments.bursts, seconds, seed=seed)
    else:
        times = schedules.poisson(arguments.rate, seconds, seed)
    if not times:
        raise ValueError(f"at this rate no request comes in {seconds:g} s")
    return Load(lambda c, s: open_loop(c, s, times, seed, patience), seconds)


async def _run(
    arguments: argparse.Namespace, load: Load, samples: Sequence[Sample]
) -> tuple[dict[str, list[Result]], dict[str, Any]]:
    clients = {url: Client(url) for url in arguments.urls}
    if len(clients) < len(arguments.urls):
        raise ValueError("the same URL is given twice, for which there would be one column")
    for url in clients:
        await _need_answer(url, samples[0], _patience(arguments))
    possible = await own_rate(samples[0])
    results: dict[str, list[Result]] = {}
    for url, client in clients.items():
        results[url] = await load.send(client, samples)
        await client.close()
    deadline = arguments.deadline_ms / 1e3
    summaries = {url: summarise(rs, deadline, load.seconds) for url, rs in results.items()}
    for summary in summaries.values():
        offered = summary["offered_per_second"]
        summary["tester_headroom"] = possible / offered if offered else None
    return results, summaries


async def _need_answer(url: str, sample: Sample, patience: float) -> None:
    """Any answer: before the first load, lest its figures are lost to the next server's address.

    Raises:
        ValueError: none comes, or nothing there takes images.
    """
    client, status = Client(url), 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            status, _ = await client.post(sample.data)
    await client.close()
    if not status:
        raise ValueError(f"{url} gives no answer")
    if status in NOWHERE:
        raise ValueError(f"{url} answers {status}; of an Offramp images go to …/classify")


def _table(summaries: dict[str, Any]) -> str:
    rows = [("", *summaries)]
    columns = list(summaries.values())

    def add(name: str, *path: str, form: str = "{:.1f}") -> None:
        cells = []
        for value in columns:
            for key in path:
                value = (value or {}).get(key)
            cells.append("-" if value is None else form.format(value))
        rows.append((name, *cells))

    add("offered / s", "offered_per_second")
    add("answered / s", "answered_per_second")
    add("goodput / s (in time)", "goodput_per_second")
    add("in time", "in_time_share", form="{:.1%}")
    add("accuracy of answers", "accuracy_of_answers", form="{:.1%}")
    add("effective accuracy", "effective_accuracy", form="{:.1%}")
    for p in ("p50", "p95", "p99"):
        add(f"latency of answers {p}, ms", "latency_ms", p)
    for name in ("status", "exits", "reasons"):
        add(name, name, form="{}")
    add("tester could send, times this", "tester_headroom")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
