"""Images between two stages: each a row of the batch that it came out of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np


class Row(NamedTuple):  # which is made in less time than a dataclass
    """One image's features between two stages; only a memory looks inside."""

    features: Any
    """The whole batch that the row is of: an array on the host, a tensor on a card."""
    passed: Any
    """The batch's log-probabilities, fp32 `[N, classes]`, which the next exit takes as `passed`."""
    place: int


Inputs = Sequence[np.ndarray | Row]
"""A batch: uint8 pixels `[H, W, 3]` for the first stage, else rows."""


def rows_in(inputs: Inputs) -> Sequence[Row]:
    """The rows of a batch; none where it is of images.

    Raises:
        TypeError: it is of neither alone, and what is missing would be answered by a neighbour.
    """
    kinds = set(map(type, inputs))
    if Row not in kinds:
        return ()
    if len(kinds) > 1:
        raise TypeError("a batch is of rows alone or of images alone")
    return cast(Sequence[Row], inputs)


def runs(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Neighbours of one batch as one: the first of them, and how many there are."""
    first, n = rows[0], 1
    for row in rows[1:]:
        if row.features is first.features and row.place == first.place + n:
            n += 1
        else:
            yield first, n
            first, n = row, 1
    yield first, n


def are_whole(rows: Sequence[Row]) -> bool:
    """Whether these are all rows of one batch, in order."""
    (_, n), *others = runs(rows)
    return not others and n == len(rows[0].features)
