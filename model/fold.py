"""A stage made ready for inference: batch normalisation folded into the convolutions before it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from model.network import MultiExitNet


class Stage(nn.Module):
    """One stage of a network with its head, as a module of its own; shares its weights."""

    def __init__(self, net: MultiExitNet, k: int) -> None:
        super().__init__()
        self.net = net
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `MultiExitNet.run_stage`."""
        return self.net.run_stage(self.k, x)


def fold_stages(net: MultiExitNet) -> list[nn.Module]:
    """Copies of all stages, shallow to deep, that compute the same with fewer operations.

    Args:
        net: in eval mode and fp32, so that folding loses nothing; left as it is.
    """
    return [fuse(Stage(net, k)) for k in range(1, net.exits + 1)]
