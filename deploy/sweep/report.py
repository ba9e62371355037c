"""A sweep's loads, to be read and to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.loadtest.schedules import BURST_SECONDS, KINDS, SWING_SECONDS
from deploy.sweep.engine import Row
from deploy.sweep.recording import load_seconds
from model.policy import Reason
from model.table import markdown_table

COLUMNS = (
    "load|of full depth|offered/s|goodput/s|simulated|off by|in time|effective accuracy|p99, ms|"
    "bent after a burst, s"
)


def table(rows: Sequence[Row]) -> str:
    """The loads as Markdown."""
    return markdown_table(COLUMNS.split("|"), map(_cells, rows))


def _cells(row: Row) -> list[str]:
    measured, simulated = row["measured"], row["simulated"]["goodput_per_second"]
    goodput = measured["goodput_per_second"]
    off = simulated / goodput - 1 if goodput else float("inf")
    accuracy = measured["effective_accuracy"]
    return [
        row["kind"],
        f"{row['load']:g}",
        f"{measured['offered_per_second']:.0f}",
        f"{goodput:.0f}",
        f"{simulated:.0f}",
        f"{off:+.0%}",
        f"{measured['in_time_share']:.1%}",
        "-" if accuracy is None else f"{accuracy:.1%}",
        f"{measured['latency_ms'].get('p99', float('nan')):.1f}",
        _recovery(row),
    ]


def recovery_seconds(row: Row) -> float | None:
    """How long after a burst's end requests were still answered shallower for its sake, at worst.

    None where no answer of the load was, or no time of it came after a burst; a burst's length if
    it never ended.
    """
    if load_seconds(row) <= SWING_SECONDS:
        return None
    requests = row["requests"]
    bent = [
        sent / 1e3
        for sent, reason in zip(requests["sent_ms"], requests["reason"], strict=True)
        if reason == Reason.OVERLOAD
    ]
    after = [at % SWING_SECONDS for at in bent if at >= SWING_SECONDS]
    return max((at for at in after if at < BURST_SECONDS), default=0.0) if bent else None


def _recovery(row: Row) -> str:
    seconds = recovery_seconds(row) if row["kind"] == "bursts" else None
    return "-" if seconds is None else f"{seconds:.2f}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Goodput over offered load, measured and simulated."""
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
