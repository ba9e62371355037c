"""A separate trained network that teaches another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.bundle import load_bundle
from model.network import MultiExitNet
from model.preprocess import Preprocess
from training.run import TrainingError


class Teacher:
    """Conventional knowledge distillation's teacher: frozen, in eval mode.

    Args:
        net: the trained network.
        preprocess: what it was trained with, which need not be the student's.
        device: where it runs.
        digest: SHA-256 of its weights.
    """

    def __init__(
        self, net: MultiExitNet, preprocess: Preprocess, device: torch.device, digest: str = ""
    ) -> None:
        self.net = net.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.preprocess = preprocess
        self.digest = digest
        self._deepest: Callable[[Tensor], Tensor] = self.net.deepest

    def compile(self) -> None:
        """Compile what it runs."""
        self._deepest = torch.compile(self.net.deepest)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits `[N, classes]` of its deepest exit for pixels uint8 `[N, H, W, 3]`."""
        x = self.preprocess.normalise(pixels)
        size = self.preprocess.size
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return self._deepest(x)


def load_teacher(path: Path, classes: Sequence[str], device: torch.device) -> Teacher:
    """A bundle, calibrated or not, as a teacher.

    Raises:
        TrainingError: it knows other classes.
    """
    bundle = load_bundle(path)
    if bundle.description.classes != tuple(classes):
        raise TrainingError(
            f"the teacher {path} knows {len(bundle.description.classes)} classes that are not "
            f"the {len(classes)} of the data"
        )
    described = bundle.description
    return Teacher(bundle.net, described.preprocess, device, described.weights_sha256)
