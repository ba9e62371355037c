"""Every server under a closed loop of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.loadtest.load import closed_loop, once
from deploy.loadtest.samples import Sample
from deploy.loadtest.summary import summarise
from deploy.peers.peer import Peer, PeerError
from deploy.peers.profile import look, profile
from deploy.peers.running import PORT, client_of
from model.table import markdown_table

CLIENTS = (1, 8, 32)
AT_ONCE = 8
"""Clients that send every image once, which warms a server and tells its accuracy."""
NEVER_LATE = 60.0
"""Seconds until a client gives up, so that whatever is answered is in time."""
Row = dict[str, Any]


def measure(peer: Peer, pid: int, samples: Sequence[Sample], seconds: float) -> Row:
    """A row for a server that runs.

    Args:
        peer: the server.
        pid: its process; Offramp's is profiled while most clients load it.
        samples: images as the server wants them.
        seconds: of each load.

    Raises:
        PeerError: it answers nothing, or nothing to one client alone, which leaves no row.
    """
    return asyncio.run(_measure(peer, pid, samples, seconds))


async def _measure(peer: Peer, pid: int, samples: Sequence[Sample], seconds: float) -> Row:
    row: Row = {"name": peer.name, "clients": {}}
    client = client_of(peer)
    each = summarise(await once(client, samples, AT_ONCE, NEVER_LATE), NEVER_LATE, None)
    if "200" not in each["status"]:
        raise PeerError("answered no image")
    row["accuracy"] = each["accuracy_of_answers"]
    for clients in CLIENTS:
        profiled = peer.ours and clients == CLIENTS[-1]
        before = look(pid, f"http://127.0.0.1:{PORT}") if profiled else None
        results = await closed_loop(client, samples, clients, seconds, 1, NEVER_LATE)
        if before:
            row["profile"] = profile(pid, before, look(pid, f"http://127.0.0.1:{PORT}"))
        row["clients"][str(clients)] = summarise(results, NEVER_LATE, seconds)
        if not saturated(row):
            raise PeerError(f"answered no image of one client alone in {seconds:g} s")
    await client.close()
    return row


def saturated(row: Mapping[str, Any]) -> float:
    """The most images a second that a server answered."""
    return max(summary["answered_per_second"] for summary in row["clients"].values())


def unloaded_ms(row: Mapping[str, Any]) -> float:
    """The median latency of one client alone."""
    median: float = row["clients"]["1"]["latency_ms"]["p50"]
    return median


def table(rows: Sequence[Row]) -> str:
    """The servers as Markdown."""
    loads = [f"{n} client{'s' * (n > 1)}, images/s (p50, p99 in ms)" for n in CLIENTS]
    return markdown_table(["server", *loads, "accuracy"], map(_cells, rows))


def _cells(row: Row) -> list[str]:
    """Of a server that failed, why stands last, where it makes no column wider."""
    if "failed" in row:
        return [row["name"], *["-"] * len(CLIENTS), row["failed"]]
    return [row["name"], *(_cell(row["clients"][str(n)]) for n in CLIENTS), _share(row)]


def _cell(summary: Row) -> str:
    latency = summary["latency_ms"]
    failed = 1 - summary["in_time_share"]
    said = f"{summary['answered_per_second']:.0f}"
    if latency:
        said += f" ({latency['p50']:.1f}, {latency['p99']:.1f})"
    return said + (f", {failed:.1%} failed" if failed else "")


def _share(row: Row) -> str:
    return "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
