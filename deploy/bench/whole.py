"""A network's units as one, against which what their borders cost is measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Whole(nn.Module):
    """All units in one module, so that a compiler sees across their borders."""

    def __init__(self, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Every exit's judgement."""
        inputs: tuple[Tensor, ...] = (pixels,)
        judged = []
        for unit in self.units:
            features, said, log_probabilities = unit(*inputs)
            inputs = (features, log_probabilities)
            judged.append(said)
        return tuple(judged)
