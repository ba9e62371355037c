"""Tables as markdown, their columns lined up."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

NARROWEST = 3
"""Characters of a column, since fewer hyphens make no rule."""


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], right: Container[int] = ()
) -> str:
    """A markdown table.

    Args:
        head: names of the columns.
        rows: as many cells each.
        right: columns whose cells line up on the right, as numbers do.
    """
    lines = [[_one_line(str(cell)) for cell in line] for line in (head, *rows)]
    last = len(head) - 1
    columns = [
        _column(cells, i in right, i == last) for i, cells in enumerate(zip(*lines, strict=True))
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def _column(cells: Sequence[str], right: bool, last: bool) -> list[str]:
    """The cells with a rule below the first."""
    # The last column may hold sentences, and nothing has to line up after it.
    width = NARROWEST if last and not right else max(NARROWEST, *map(len, cells))
    pad = str.rjust if right else str.ljust
    head, *rest = (pad(cell, width) for cell in cells)
    return [head, "-" * (width - 1) + (":" if right else "-"), *rest]


def _one_line(cell: str) -> str:
    return " ".join(cell.split()).replace("|", r"\|")
