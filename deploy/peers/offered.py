"""Every server under loads that do not wait for it, from calm to three times our capacity."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.loadtest.load import Result, closed_loop, once, open_loop
from deploy.loadtest.samples import Sample
from deploy.loadtest.schedules import KINDS, of_kind
from deploy.loadtest.summary import summarise
from deploy.peers.peer import Peer, PeerError
from deploy.peers.running import client_of
from model.table import markdown_table

FACTORS = (0.2, 0.5, 1.0, 1.5, 2.0, 3.0)
"""Of our full-depth capacity."""
DEADLINE_SECONDS = 0.05
PATIENCE_SECONDS = 10 * DEADLINE_SECONDS
"""After which a client gives up, so that a server's backlog ends with its load."""
COLLAPSED = 0.01
"""Share in time below which a server is offered no more."""
CALM_SECONDS = 30.0
CLIENTS, WARM_CLIENTS = 32, 8
REFUSALS = {"429", "503"}
GIVEN_UP = {"0", "408", "504"}
START_SECONDS_GUESSED = 10.0
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """One load to offer."""

    kind: str
    factor: float
    times: tuple[float, ...]
    seconds: float
    """Its length."""


def loads(kind: str, capacity: float, seconds: float) -> list[Load]:
    """The loads of one kind, the smallest first.

    Args:
        kind: a name in `KINDS`.
        capacity: images a second that are load 1.
        seconds: length of each.

    Raises:
        ValueError: at the smallest of them no request comes.
    """
    made = (tuple(of_kind(kind, factor * capacity, seconds)) for factor in FACTORS)
    return [Load(kind, f, times, seconds) for f, times in zip(FACTORS, made, strict=True)]


def longest_seconds(servers: int, seconds: float) -> float:
    """How long all loads take if no server collapses under one."""
    one_kind = START_SECONDS_GUESSED + len(FACTORS) * (seconds + PATIENCE_SECONDS)
    return servers * len(KINDS) * one_kind


def capacity(peer: Peer, samples: Sequence[Sample], seconds: float, *query: str) -> float:
    """Images a second that a running Offramp answers, asked so.

    Raises:
        PeerError: it answers none, so that there is nothing to make loads of.
    """
    return asyncio.run(_capacity(peer, samples, seconds, query))


async def _capacity(
    peer: Peer, samples: Sequence[Sample], seconds: float, query: Sequence[str]
) -> float:
    client = client_of(peer, *query)
    await once(client, samples, WARM_CLIENTS)
    results = await closed_loop(client, samples, CLIENTS, seconds, seed=1)
    await client.close()
    answered: float = summarise(results, math.inf, seconds)["answered_per_second"]
    if not answered:
        raise PeerError(f"{peer.name} answered no image in {seconds:g} s")
    return answered


def measure(peer: Peer, samples: Sequence[Sample], offered: Sequence[Load]) -> Iterator[Row]:
    """A row for each load on a running server, until it collapses.

    Raises:
        PeerError: it answers no image at all, or does not recover from a load that it should have
            been able to bear.
    """
    asyncio.run(_warm(peer, samples))
    for load in offered:
        row = asyncio.run(_measure(peer, samples, load))
        yield row
        if row["in_time_share"] < COLLAPSED:
            return
        asyncio.run(_calm(peer, samples))


async def _warm(peer: Peer, samples: Sequence[Sample]) -> None:
    client = client_of(peer)
    results = await once(client, samples, WARM_CLIENTS)
    await client.close()
    if all(r.status != 200 for r in results):
        raise PeerError("answered no image")


async def _measure(peer: Peer, samples: Sequence[Sample], load: Load) -> Row:
    query = [f"deadline_ms={1e3 * DEADLINE_SECONDS:g}"] if peer.ours else []
    client = client_of(peer, *query)
    results = await open_loop(client, samples, load.times, patience=PATIENCE_SECONDS)
    await client.close()
    summary = summarise([_own(peer, r) for r in results], DEADLINE_SECONDS, load.seconds)
    return {"name": peer.name, "kind": load.kind, "load": load.factor, **outcomes(summary)}


def _own(peer: Peer, result: Result) -> Result:
    """What an exit alone would have sent: nothing where another exit had to help it out."""
    if peer.exit in (None, result.exit) or result.status != 200:
        return result
    return replace(result, status=504, right=None if result.right is None else False)


def outcomes(summary: Row) -> Row:
    """A summary with what became of all requests, as shares of the offered."""
    offered, status = summary["offered"], summary["status"]
    refused = sum(n for code, n in status.items() if code in REFUSALS)
    given_up = sum(n for code, n in status.items() if code in GIVEN_UP)
    answered_late = status.get("200", 0) - round(summary["in_time_share"] * offered)
    failed = offered - status.get("200", 0) - refused - given_up
    return summary | {
        "late_share": (answered_late + given_up) / offered,
        "refused_share": refused / offered,
        "failed_share": failed / offered,
    }


async def _calm(peer: Peer, samples: Sequence[Sample]) -> None:
    """Wait until one image alone is answered in time again."""
    client = client_of(peer)
    ends = time.monotonic() + CALM_SECONDS
    while time.monotonic() < ends:
        (result,) = await open_loop(client, samples, [0.0], patience=PATIENCE_SECONDS)
        if result.status == 200 and result.seconds <= 2 * DEADLINE_SECONDS:
            await client.close()
            return
        await asyncio.sleep(DEADLINE_SECONDS)
    raise PeerError(f"did not recover from a load within {CALM_SECONDS:g} s")


def table(rows: Sequence[Row]) -> str:
    """Effective accuracy, one table a kind of load, as Markdown."""
    return "\n\n".join(_table(kind, [r for r in rows if r.get("kind") == kind]) for kind in KINDS)


def _table(kind: str, rows: Sequence[Row]) -> str:
    by_load = {(row["name"], row["load"]): row for row in rows if "failed" not in row}
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    head = ["server", *(f"{factor:g}" for factor in FACTORS), *(["failure"] if failed else [])]
    cells = [
        [
            name,
            *(_cell(by_load.get((name, factor))) for factor in FACTORS),
            *([failed.get(name, "")] if failed else []),
        ]
        for name in dict.fromkeys(row["name"] for row in rows)
    ]
    return (
        f"{kind.capitalize()}, load as a multiple of our full-depth capacity: effective accuracy "
        f"(late, refused)\n\n{markdown_table(head, cells)}"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    accuracy = row["effective_accuracy"]
    said = "-" if accuracy is None else f"{accuracy:.1%}"
    said += f" ({row['late_share']:.1%}, {row['refused_share']:.1%})"
    return said + (f", {row['failed_share']:.1%} failed" if row["failed_share"] else "")


def plot(rows: Sequence[Row], file: Path) -> None:
    """Draw effective accuracy over offered load, one line a server."""
    import matplotlib  # wanted by this option alone

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(11, 4.5), layout="constrained", sharey=True)
    names = dict.fromkeys(row["name"] for row in rows)
    for kind, axis in zip(KINDS, axes, strict=True):
        for name in names:
            mine = [
                r for r in rows if (r["name"], r.get("kind")) == (name, kind) and "failed" not in r
            ]
            accuracies = [100 * (r["effective_accuracy"] or 0) for r in mine]
            ours = name.startswith("Offramp")
            style = {"linewidth": 2.5 if name == "Offramp" else 1, "marker": "o" if ours else "x"}
            line = "-" if name == "Offramp" else "--" if ours else ":"
            axis.plot([r["load"] for r in mine], accuracies, line, label=name, **style)
        axis.set(title=kind, xlabel="offered, times our full-depth capacity")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="right and in time, % of all offered", ylim=(0, None))
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=120)
    plt.close(figure)
