"""What a run tells while it goes on: lines, scalars, a bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.files import write_atomically

LOG = "log.jsonl"
TENSORBOARD = "tensorboard"

Entry = dict[str, Any]


def write_log(history: list[Entry], folder: Path) -> None:
    """Write one JSON line for each epoch; rewritten whole, so a resumed run repeats none."""
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(folder / LOG, lines.encode())


def read_log(folder: Path) -> list[Entry]:
    """The entries of a run's log."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


class Scalars:
    """One epoch's figures for TensorBoard.

    Args:
        folder: of the run.
        epoch: the epochs that are already there; later ones are purged.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=epoch + 1)

    def write(self, entry: Entry) -> None:
        """Add the figures of a complete epoch."""
        epoch = entry["epoch"]
        for name, value in entry["loss"].items():
            self.writer.add_scalar(f"loss/{name}", value, epoch)
        for k, value in enumerate(entry["validation_accuracy"], start=1):
            self.writer.add_scalar(f"validation_accuracy/exit_{k}", value, epoch)
        self.writer.add_scalar("validation_accuracy/ensemble", entry["ensemble_accuracy"], epoch)
        for name in ("learning_rate", "images_per_second"):
            self.writer.add_scalar(name, entry[name], epoch)
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()


class Bar:
    """Progress over all steps of a run, with the time that is left.

    Args:
        steps: of the whole run.
        done: steps of an earlier part.
        shown: whether this process shows anything.
    """

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.shown = shown
        self.accuracy = ""
        hidden = None if shown else True  # None hides it where nobody looks: not a terminal
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=hidden, leave=False)

    def step(self) -> None:
        """One step is done."""
        self.bar.update()

    def loss(self, epoch: int, value: float) -> None:
        """Show the present epoch with its loss, and the exits' last known accuracy."""
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(f"loss {value:.3f}{self.accuracy}", refresh=False)

    def epoch(self, entry: Entry, epochs: int) -> None:
        """Print a complete epoch."""
        exits = " ".join(f"{a:.1%}" for a in entry["validation_accuracy"])
        self.accuracy = f", exits {exits}"
        self.say(
            f"epoch {entry['epoch']}/{epochs}: exits {exits}, ensemble "
            f"{entry['ensemble_accuracy']:.1%}, loss {sum(entry['loss'].values()):.3f}, "
            f"{entry['images_per_second']:.0f} images/s, {entry['seconds']:.0f} s"
        )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.shown:
            tqdm.write(line)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
