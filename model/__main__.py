"""The table of architectures with what each costs, as markdown."""

from __future__ import annotations

import argparse
import sys

import torch

from model.architectures import ARCHITECTURES
from model.exits import HEADS
from model.macs import StageCost, count_stages
from model.network import build
from model.table import markdown_table

CLASSES = {32: 100, 224: 1000}
"""Of the data sets that networks of each stem are published for."""
COLUMNS = "architecture|exits|MACs, M|parameters, M|heads: paper|compact|default"
NUMBERS = range(1, 6)
"""Columns that line up on the right."""


def table(stem: int) -> str:
    """A row for each architecture, at images of `stem` x `stem` and its published width."""
    return markdown_table(COLUMNS.split("|"), (_row(a, stem) for a in ARCHITECTURES), NUMBERS)


def _row(architecture: str, stem: int) -> list[object]:
    costs = {head: _count(architecture, stem, head) for head in HEADS}
    trunk = costs["paper"]
    return [
        f"`{architecture}`",
        len(trunk),
        f"{sum(c.trunk_macs for c in trunk) / 1e6:,.0f}",
        f"{sum(c.trunk_parameters for c in trunk) / 1e6:.2f}",
        *(f"{_head_share(cost):.1%}" for cost in costs.values()),
        _default_head(architecture),
    ]


def _count(architecture: str, stem: int, head: str) -> list[StageCost]:
    with torch.device("meta"):
        net = build(architecture, CLASSES[stem], stem=stem, head=head)
    return count_stages(net, stem)


def _head_share(costs: list[StageCost]) -> float:
    return sum(c.head_macs for c in costs) / sum(c.trunk_macs for c in costs)


def _default_head(architecture: str) -> str:
    with torch.device("meta"):
        return ARCHITECTURES[architecture]().default_head


def main(argv: list[str] | None = None) -> int:
    """Print the tables of `docs/architectures.md`."""
    argparse.ArgumentParser(prog="python -m model", description=__doc__).parse_args(argv)
    for stem, classes in CLASSES.items():
        print(f"### {stem} x {stem}, {classes} classes\n")
        print(table(stem), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
