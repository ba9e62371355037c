"""Pictures of a load test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.loadtest.load import Result


def plot(results: Mapping[str, Sequence[Result]], deadline_seconds: float, file: Path) -> None:
    """Draw each server's latencies as a cumulative share, with the deadline."""
    import matplotlib  # the server's image, which has the rest, has none

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for url, of_server in results.items():
        times = sorted(1e3 * r.seconds for r in of_server if r.status == 200)
        shares = [(i + 1) / len(of_server) for i in range(len(times))]
        axes.step(times, shares, where="post", label=url)
    axes.axvline(1e3 * deadline_seconds, color="grey", linestyle=":", label="deadline")
    axes.set(xscale="log", xlabel="latency from intended send, ms", ylabel="share of all offered")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
