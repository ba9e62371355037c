"""Plots of runs: accuracy with loss terms over epochs, accuracy over cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from training.log import Entry
from training.plots import colours, draw_published

CURVES = "training_curves.png"
"""What a picture of training curves is called, wherever it is written."""
APART = 20
"""Times that one kind of loss may exceed another on an axis that begins at zero."""


def training_curves(runs: Mapping[str, Sequence[Entry]]) -> Figure:
    """One row for each run: validation accuracy of every exit, then loss terms by kind.

    Args:
        runs: their logs by name.
    """
    figure = Figure(figsize=(10, 3.4 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False)
    for (name, history), (left, right) in zip(runs.items(), grid, strict=True):
        _accuracy(left, history)
        _losses(right, history)
        left.set_title(name, parse_math=False)
    return figure


def _accuracy(axes: Axes, history: Sequence[Entry]) -> None:
    epochs = [e["epoch"] for e in history]
    by_exit = list(zip(*(e["validation_accuracy"] for e in history), strict=True))
    for k, (values, colour) in enumerate(zip(by_exit, colours(len(by_exit)), strict=True), start=1):
        axes.plot(epochs, [100 * v for v in values], color=colour, label=f"exit {k}")
    if len(by_exit) > 1 and all("ensemble_accuracy" in e for e in history):
        together = [100 * e["ensemble_accuracy"] for e in history]
        axes.plot(epochs, together, color="tab:red", ls="--", label="ensemble")
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _losses(axes: Axes, history: Sequence[Entry]) -> None:
    """Label terms exit by exit; the other kinds summed over exits."""
    epochs = [e["epoch"] for e in history]
    series: dict[str, list[float]] = defaultdict(list)
    for entry in history:
        sums: dict[str, float] = defaultdict(float)
        for term, value in entry["loss"].items():
            kind, exit = term.split("/")
            sums[f"labels, exit {exit}" if kind == "label" else kind] += value
        for name, value in sorted(sums.items()):
            series[name].append(value)
    labels = [name for name in series if name.startswith("labels")]
    shades = dict(zip(labels, colours(len(labels)), strict=True))
    for name, values in series.items():
        style: dict[str, Any] = {"color": shades[name]} if name in shades else {"ls": "--"}
        axes.plot(epochs, values, label=name, **style)
    axes.set(xlabel="epoch", ylabel="loss, weighted")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    highest = [max(values, default=0.0) for values in series.values()]
    if max(highest, default=0.0) > APART * min(highest, default=0.0) > 0:
        axes.set_yscale("log")  # else the small ones lie on the axis, as labels do beside a teacher
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def accuracy_over_cost(
    runs: Mapping[str, Sequence[tuple[float, float]]], measured_on: str, published: bool
) -> Figure:
    """Every exit of every run, with what others published.

    Args:
        runs: for each, its exits as (MACs in millions, accuracy in %), shallow to deep.
        measured_on: which images the accuracy is over.
        published: whether these are the images that published figures are for.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in runs.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    if published:
        draw_published(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(
        xlabel="multiply-accumulates an image, millions", ylabel=f"accuracy on {measured_on}, %"
    )
    axes.grid(alpha=0.3, which="both")
    for text in axes.legend(fontsize=8, loc="lower right").get_texts():
        text.set_parse_math(False)  # a run may be called anything
    return figure
