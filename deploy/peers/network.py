"""The network as every peer serves it: whole, eager, float32, one forward pass a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from model.bundle import load_servable
from model.image import decode

MOST_PIXELS = 50_000_000


class Network:
    """The bundle that `PEER_BUNDLE` names, at full depth."""

    def __init__(self) -> None:
        self._bundle = load_servable(Path(os.environ["PEER_BUNDLE"]))
        net = self._bundle.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._net = net
        self._labels = self._bundle.description.classes
        self.classify([np.zeros((self._side, self._side, 3), np.uint8)])

    @property
    def _side(self) -> int:
        return self._bundle.description.preprocess.size

    def pixels(self, data: bytes) -> np.ndarray:
        """Encoded bytes to uint8 `[H, W, 3]`."""
        preprocess = self._bundle.description.preprocess
        return preprocess.pixels(decode(data, preprocess.size, MOST_PIXELS))

    @torch.inference_mode()
    def classify(self, images: Sequence[np.ndarray]) -> list[dict[str, object]]:
        """The answer of the deepest exit for each image."""
        x = self._bundle.description.preprocess.normalise(torch.from_numpy(np.stack(images)))
        logits = self._net(x)[-1]
        confidences, class_ids = logits.softmax(dim=1).max(dim=1)
        return [
            {"label": self._labels[i], "confidence": c}
            for i, c in zip(class_ids.tolist(), confidences.tolist(), strict=True)
        ]
