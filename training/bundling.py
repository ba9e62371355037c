"""A finished run as a bundle with its report."""

from __future__ import annotations

import datetime
import platform
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bundle import REPORT, save_bundle
from model.files import write_atomically
from model.table import markdown_table
from training import curves
from training.accuracy import Accuracy
from training.folder import Folder
from training.log import write_log
from training.plots import DPI
from training.presets import Preset
from training.run import Run
from training.seen import save_trained

BUNDLE = "bundle"
"""Within a run's folder."""
PAGE = "training.md"


@dataclass(frozen=True, slots=True)
class Finished:
    """A run after its last epoch."""

    run: Run
    preset: Preset
    data: Folder
    arguments: dict[str, Any]
    """That build the network again."""
    validation: Accuracy
    test: Accuracy | None
    """Measured once, after the last epoch."""
    command: str
    digests: np.ndarray
    """Of the files that it was trained on."""
    device: torch.device
    unreadable: int = 0
    """Files that were skipped, by whichever process."""
    processes: int = 1
    teacher: str | None = None
    pretrained: str | None = None


def write_bundle(done: Finished, path: Path, name: str, version: str) -> None:
    """Save the weights that the recipe keeps, with their provenance and report."""
    run, kept = done.run, done.run.average
    with kept.applied(run.net) if kept else nullcontext():
        save_bundle(
            path,
            run.net,
            name=name,
            version=version,
            architecture=done.preset.shape.architecture,
            arguments=done.arguments,
            classes=done.data.training.classes,
            preprocess=done.data.preprocess,
            training=provenance(done),
        )
    write_report(done, path)
    parents = [Path(p) for p in (done.pretrained, done.teacher) if p]
    for sentence in save_trained(path, done.digests, parents):
        print(sentence)


def provenance(done: Finished) -> dict[str, Any]:
    """How the weights came to be, for bundle.json."""
    test = done.test
    measured = (
        {}
        if test is None
        else {
            "test_images": test.images,
            "test_accuracy": [round(a, 4) for a in test.exits],
            "test_ensemble_accuracy": round(test.ensemble, 4),
        }
    )
    return {
        "command": printable(done.command),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(done.device),
        "processes": done.processes,
        "training_images": len(done.data.training),
        "held_out_images": len(done.data.validation),
        "files_sha256": done.data.digest,
        "unreadable_files": done.unreadable,
        "teacher": done.teacher and printable(done.teacher),
        "pretrained": done.pretrained and printable(done.pretrained),
        "recipe": asdict(done.preset.recipe),
        "validation_accuracy": list(done.validation.exits),
        "validation_ensemble_accuracy": done.validation.ensemble,
        "seconds": round(sum(entry["seconds"] for entry in done.run.history), 1),
        **measured,
    }


def printable(text: str) -> str:
    """With bytes of paths that are no UTF-8 as their codes, so that JSON can hold it."""
    return text.encode(errors="backslashreplace").decode()


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def write_report(done: Finished, path: Path) -> None:
    """Write the log, the curves and a page with tables beside the weights."""
    folder = path / REPORT
    folder.mkdir(exist_ok=True)
    history = done.run.history
    write_log(history, folder)
    if history:
        curves.training_curves({"": history}).savefig(folder / curves.CURVES, dpi=DPI)
    write_atomically(folder / PAGE, page(done).encode())


def page(done: Finished) -> str:
    """All of training.md."""
    facts = provenance(done)
    rows = {"validation": done.validation} | ({} if done.test is None else {"test": done.test})
    exits = [f"exit {k}" for k in range(1, len(done.validation.exits) + 1)]
    note = (
        "The test images were looked at once, after the last epoch."
        if done.test
        else "The data has no test images."
    )
    parts = [
        "# How this network was trained",
        f"```sh\n{facts['command']}\n```",
        markdown_table(
            ["images", "number", *exits, "ensemble"],
            [
                [name, a.images, *(f"{x:.2%}" for x in a.exits), f"{a.ensemble:.2%}"]
                for name, a in rows.items()
            ],
        ),
        f"{note} *Ensemble* is the mean of all exits' logits. Trained for {facts['seconds']:.0f} s "
        f"on {facts['processes']} x {facts['device']} with torch {facts['torch']}, from "
        f"{facts['training_images']} images; {facts['unreadable_files']} could not be read.",
        f"![Accuracy of each exit, loss terms, over epochs.]({curves.CURVES})",
        "## Recipe",
        markdown_table(
            ["option", "value"],
            [[f"--{n.replace('_', '-')}", v] for n, v in facts["recipe"].items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"
