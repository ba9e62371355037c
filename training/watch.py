"""The first step whose loss is not a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.run import TrainingError

ADVICE = (
    "the last checkpoint, if there is one, is from before. Starting again in another --out with a "
    "lower --learning-rate or with --precision fp32 may help"
)


class Watch:
    """Remembers, on the device, the first loss that is NaN or infinite.

    Asking a device for a number makes it wait, so it is asked only now and then; the step it then
    names is exact all the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = torch.tensor(-1, device=device)
        self.terms: Tensor | None = None

    def note(self, step: int, terms: Tensor) -> None:
        """Look at one step's terms, fp32 `[terms]`."""
        if self.terms is None:
            self.terms = torch.zeros_like(terms)
        first = (self.step < 0) & ~terms.isfinite().all()
        self.step = torch.where(first, step, self.step)
        self.terms = torch.where(first, terms, self.terms)

    def check(self, names: Sequence[str]) -> None:
        """Raise TrainingError where a step went wrong, with that step's terms."""
        step = int(self.step)
        if step < 0 or self.terms is None:
            return
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, self.terms.tolist(), strict=True))
        raise TrainingError(f"the loss is not finite at step {step}: {values}; {ADVICE}")


def check_weights(net: nn.Module) -> None:
    """Raise TrainingError where a weight or a running statistic is NaN or infinite."""
    weights = [value for value in net.state_dict().values() if value.is_floating_point()]
    if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise TrainingError(f"the weights are not finite after the last step; {ADVICE}")
