"""Contact sheets of images by where they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from training.data import ImageSet
from training.evaluation import Measured

COLUMNS, ROWS = 10, 4
RIGHT, WRONG = "tab:green", "tab:red"


def draw_all(m: Measured, images: ImageSet, folder: Path) -> list[str]:
    """Write every sheet that has an image, returning the file names."""
    taken, right = m.taken, m.outcomes.right
    early_right = m.outcomes.right_at(taken)
    late = _late(taken, m.outcomes.exits)
    sheets = {
        "leave_first.png": (taken == 1, "leave at exit 1"),
        "leave_last.png": (
            taken >= late,
            f"need exit {late}" if late == m.outcomes.exits else f"need exit {late} or deeper",
        ),
        "lost.png": (right[:, -1] & ~early_right, "early answer wrong, full network right"),
        "gained.png": (~right[:, -1] & early_right, "early answer right, full network wrong"),
    }
    drawn = []
    for name, (chosen, title) in sheets.items():
        indices = np.flatnonzero(chosen)
        if len(indices):
            _sheet(m, images, indices, title).savefig(folder / name, dpi=100)
            drawn.append(name)
    return drawn


def _late(taken: np.ndarray, exits: int) -> int:
    """The deepest exit that, with those below it, answers enough images to fill a sheet."""
    full = [k for k in range(1, exits + 1) if (taken >= k).sum() >= COLUMNS * ROWS]
    return max(full, default=exits)


def _sheet(m: Measured, images: ImageSet, indices: np.ndarray, title: str) -> Figure:
    """A random sample, each image under its answer, exit and confidence."""
    count = COLUMNS * ROWS
    drawn = np.random.default_rng(0).permutation(indices)[:count]
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(1.25 * COLUMNS, 1.6 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, drawn, strict=False):
        axes.imshow(images.pixels[i].numpy(), interpolation="nearest")
        text, colour = _caption(m, images, int(i))
        axes.set_title(text, fontsize=7.5, color=colour, linespacing=1.1, parse_math=False)
    figure.suptitle(f"{title}: {len(indices)} of {len(images)}", fontsize=11)
    return figure


def _caption(m: Measured, images: ImageSet, i: int) -> tuple[str, str]:
    k = int(m.taken[i]) - 1
    answer = images.classes[m.outcomes.answers[i, k]]
    truth = images.classes[int(images.class_ids[i])]
    sure = f"exit {k + 1}, {m.outcomes.confidence[i, k]:.0%}"
    if answer == truth:
        return f"{answer}\n{sure}", RIGHT
    return f"{answer}\nnot {truth}\n{sure}", WRONG
