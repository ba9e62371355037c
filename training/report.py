"""The report command: trained runs side by side, as tables with plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from model.bundle import DESCRIPTION, REPORT, BundleError, Description
from model.files import write_atomically
from model.table import markdown_table
from training import curves
from training.bundling import BUNDLE
from training.log import LOG, Entry, read_log
from training.normalisation import is_cifar100
from training.plots import DPI, PUBLISHED
from training.recipe import Recipe

PAGE = "report.md"
COST_PLOT = "accuracy_over_macs.png"
BEST_PUBLISHED = PUBLISHED["BoostNet (2023)"]
"""The best published anytime curve on CIFAR-100: accuracy in % by MACs in millions."""


def add_command(commands: Any) -> None:
    """Add `report` to the command line."""
    command = commands.add_parser(
        "report",
        help="draw trained runs side by side: accuracy over cost, ablations, curves",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("runs", nargs="+", type=Path, help="runs, or bundles that train wrote")
    command.add_argument("--out", type=Path, default=Path("report"), help="folder to write")
    command.set_defaults(run=_report)


@dataclass(frozen=True, slots=True)
class Trained:
    """One run as its bundle tells it."""

    name: str
    description: Description
    history: list[Entry]

    @property
    def tested(self) -> bool:
        """Whether it saw test images."""
        return "test_accuracy" in self.description.training

    def accuracy(self, test: bool) -> tuple[list[float], float]:
        """Of each exit, then of their ensemble."""
        facts, kind = self.description.training, "test" if test else "validation"
        return facts[f"{kind}_accuracy"], facts[f"{kind}_ensemble_accuracy"]

    @property
    def changes(self) -> str:
        """The options in which its recipe differs from the default one, as typed."""
        recipe, facts = self.description.training["recipe"], self.description.training
        default = Recipe()
        said = [
            _flag(name, value)
            for name, value in recipe.items()
            if value != getattr(default, name, value)
        ]
        said += [f"--{n} {facts[n]}" for n in ("teacher", "pretrained") if facts.get(n)]
        return " ".join(said) or "default"


def _report(arguments: argparse.Namespace) -> None:
    runs = [
        read_run(path, name)
        for path, name in zip(arguments.runs, names(arguments.runs), strict=True)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_report(runs, arguments.out)
    print(ablation_table(runs), f"wrote {arguments.out / PAGE}", sep="\n\n")


def names(paths: Sequence[Path]) -> list[str]:
    """What tells runs apart: as much of each path's end as no other path has.

    Raises:
        ValueError: a run is given twice.
    """
    runs = [_run_folder(path) for path in paths]
    twice = [run for run in runs if runs.count(run) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")

    def name(run: Path) -> str:
        ends = (run.parts[-n:] for n in range(1, len(run.parts) + 1))
        alone = (e for e in ends if sum(r.parts[-len(e) :] == e for r in runs) == 1)
        return Path(*next(alone)).as_posix()

    return [name(run) for run in runs]


def _run_folder(path: Path) -> Path:
    """Where a run is, also where its bundle is named."""
    whole = path.resolve()
    return whole.parent if whole.name == BUNDLE and (whole / DESCRIPTION).exists() else whole


def read_run(path: Path, name: str) -> Trained:
    """Read a run's folder, or its bundle's.

    Args:
        path: the folder.
        name: what to call the run.

    Raises:
        BundleError: it is neither, or was trained by something else.
    """
    bundle = path if (path / DESCRIPTION).exists() else path / BUNDLE
    try:
        description = Description.model_validate_json((bundle / DESCRIPTION).read_bytes())
        history = read_log(bundle / REPORT)
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} has no finished training to report ({DESCRIPTION} with {REPORT}/{LOG}): "
            f"{str(error).splitlines()[0]}"
        ) from error
    if "validation_ensemble_accuracy" not in description.training:
        raise BundleError(f"{path} does not say how accurate its training was; train it again")
    return Trained(name, description, history)


def write_report(runs: Sequence[Trained], out: Path) -> None:
    """Write the plots, the page, and the figures as JSON."""
    on_test = all(run.tested for run in runs)
    images = "test images" if on_test else "validation images"
    # What others published is accuracy on CIFAR-100's test images.
    published = on_test and all(is_cifar100(run.description.classes) for run in runs)
    points = {run.name: _points(run, on_test) for run in runs}
    plot = curves.accuracy_over_cost(points, images, published)
    plot.savefig(out / COST_PLOT, dpi=DPI)
    histories = {run.name: run.history for run in runs if run.history}
    if histories:
        curves.training_curves(histories).savefig(out / curves.CURVES, dpi=DPI)
    write_atomically(out / PAGE, page(runs, images, published, bool(histories)).encode())
    figures = {run.name: run.description.training for run in runs}
    write_atomically(out / "report.json", json.dumps(figures, indent=1).encode() + b"\n")


def page(runs: Sequence[Trained], images: str, published: bool, drawn: bool) -> str:
    """All of report.md."""
    parts = [
        "# Trained networks side by side",
        f"Accuracy on {images}, after the last epoch of each run, never the best one. *Ensemble* "
        "is the mean of all exits' logits.",
        ablation_table(runs),
        "## Accuracy over cost",
        cost_table(runs, published),
        f"![Accuracy of every exit over its multiply-accumulates.]({COST_PLOT})",
        "## Commands",
        "\n\n".join(
            f"{run.name}:\n\n```sh\n{run.description.training['command']}\n```" for run in runs
        ),
    ]
    if drawn:
        parts += ["## Curves", f"![Accuracy, loss terms over epochs.]({curves.CURVES})"]
    return "\n\n".join(parts) + "\n"


def ablation_table(runs: Sequence[Trained]) -> str:
    """One row for each run: what it changes, what every exit reaches, how long it took."""
    on_test = all(run.tested for run in runs)
    exits = max(len(run.description.exits) for run in runs)
    head = ["run", "network", *(f"exit {k}" for k in range(1, exits + 1)), "ensemble"]
    rows = []
    for run in runs:
        alone, ensemble = run.accuracy(on_test)
        # A network with fewer exits ends at the deepest: its last exit stands in the last column.
        blank = [""] * (exits - len(alone))
        shown = [*blank, *(f"{a:.2%}" for a in alone)]
        facts = run.description
        network = f"{facts.architecture} {_arguments(facts.arguments)}".strip()
        minutes = f"{run.description.training['seconds'] / 60:.1f}"
        rows.append([run.name, network, *shown, f"{ensemble:.2%}", minutes, run.changes])
    return markdown_table([*head, "minutes", "options"], rows)


def cost_table(runs: Sequence[Trained], published: bool) -> str:
    """One row for each exit of each run; if `published`, against the best published accuracy."""
    on_test = all(run.tested for run in runs)
    rows = [
        [
            run.name,
            k,
            f"{macs:.1f}",
            f"{accuracy:.2f}%",
            *([_against(macs, accuracy)] if published else []),
        ]
        for run in runs
        for k, (macs, accuracy) in enumerate(_points(run, on_test), start=1)
    ]
    against = ["against BoostNet"] if published else []
    return markdown_table(["run", "exit", "MACs, M", "accuracy", *against], rows)


def published_at(macs: float) -> float | None:
    """BoostNet's accuracy in % for this cost in millions, between its points; None outside them."""
    for (low, at_low), (high, at_high) in pairwise(BEST_PUBLISHED):
        if low <= macs <= high:
            return at_low + (at_high - at_low) * (macs - low) / (high - low)
    return None


def _flag(name: str, value: Any) -> str:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words} {value}"


def _against(macs: float, accuracy: float) -> str:
    there = published_at(macs)
    return "outside its range" if there is None else f"{accuracy - there:+.1f} points"


def _points(run: Trained, on_test: bool) -> list[tuple[float, float]]:
    alone, _ = run.accuracy(on_test)
    macs = [e.macs / 1e6 for e in run.description.exits]
    return [(m, 100 * a) for m, a in zip(macs, alone, strict=True)]


def _arguments(arguments: dict[str, Any]) -> str:
    return " ".join(f"{n}={v}".replace(", ", ",") for n, v in arguments.items() if n != "stem")
