"""A moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of everything in a network's state.

    Running statistics of batch normalisation are averaged like weights, so that they belong to
    averaged weights; counters are copied.

    Args:
        net: whose state to start from.
        decay: what one step keeps of the average; less in the first steps, so that the average
            soon forgets the random start.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move towards the network's present state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = [(self.state[name], value) for name, value in net.state_dict().items()]
        moving = [(a, b) for a, b in pairs if a.is_floating_point()]
        counting = [(a, b) for a, b in pairs if not a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in moving], [b for _, b in moving], 1 - decay)
        if counting:
            torch._foreach_copy_([a for a, _ in counting], [b for _, b in counting])

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Lend the average to the network while the block runs."""
        own: dict[str, Tensor] = {k: v.detach().clone() for k, v in net.state_dict().items()}
        net.load_state_dict(self.state)
        try:
            yield
        finally:
            net.load_state_dict(own)
