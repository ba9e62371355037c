"""Tables as markdown, their columns lined up."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """A markdown table.

    Args:
        head: names of the columns.
        rows: as many cells each.
        right: whether cells line up on the right, as numbers do.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rules = ["-" * (w - 1) + ":" if right else "-" * w for w in widths]
    pad = str.rjust if right else str.ljust
    return "\n".join(
        "| " + " | ".join(pad(cell, w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in (head, rules, *rows)
    )
