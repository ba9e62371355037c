"""A network with what only its training needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.network import MultiExitNet


class StudentOutputs(NamedTuple):
    """One pass; lists run from the shallowest exit to the deepest."""

    logits: list[Tensor]
    """Each `[N, classes]`."""
    pooled: list[Tensor]
    """Each `[N, C]`: features before the classifier."""
    adapted: list[Tensor]
    """Of every exit but the deepest: pooled features mapped to its teacher's space."""


class Student(nn.Module):
    """The network, its adaptation layers, its gradients' balance.

    Args:
        net: the network.
        equilibrium: whether to balance the exits' gradients in the trunk.
        adapt: whether adaptation layers learn; they are idle otherwise.
        next_deeper: whether features are adapted to the next deeper exit, not the deepest.
    """

    def __init__(
        self,
        net: MultiExitNet,
        equilibrium: bool = False,
        adapt: bool = False,
        next_deeper: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.equilibrium = equilibrium
        self.adapt = adapt
        widths = [net.head(k).fc.in_features for k in range(1, net.exits + 1)]
        targets = widths[1:] if next_deeper else [widths[-1]] * (net.exits - 1)
        self.adapters = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], targets, strict=True)
        )
        self.adapters.requires_grad_(adapt)

    def forward(self, x: Tensor) -> StudentOutputs:
        """Normalised images `[N, 3, H, W]` to all that the losses compare."""
        out = StudentOutputs([], [], [])
        exits = self.net.exits
        for k in range(1, exits + 1):
            x = self.net.features(k, x)
            branch = x
            if self.equilibrium:
                deeper = exits - k
                branch, x = (
                    scale_gradient(x, 1 / (deeper + 1)),
                    scale_gradient(x, deeper / (deeper + 1)),
                )
            head = self.net.head(k)
            pooled = head.pooled(branch)
            out.pooled.append(pooled)
            out.logits.append(head.fc(pooled))
            if self.adapt and k < exits:
                out.adapted.append(self.adapters[k - 1](pooled))
        return out


def scale_gradient(x: Tensor, by: float) -> Tensor:
    """The same tensor, whose gradient is multiplied by `by`.

    After Li et al., "Improved Techniques for Training Adaptive Deep Networks" (ICCV 2019): with
    1 / (exits left) into each head and the rest along the trunk, the trunk's gradient does not
    grow with the number of exits behind it.
    """
    scaled: Tensor = _ScaleGradient.apply(x, by)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.by, None
