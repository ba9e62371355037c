"""The network as every eager peer serves it: whole, in float32, one forward pass a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.bundle import DESCRIPTION, Description, load_servable
from model.cores import usable_cores
from model.image import decode

MOST_PIXELS = 50_000_000
MOST_IMAGES = 32
"""In one batch, as Offramp has it."""
WORKERS = usable_cores()
"""Processes that run the network, each with one thread.

With so many, cores are neither idle nor shared: this is what the guides of TorchServe and Ray Serve
start from, and torch's own default of one team of threads for each process spends most of a busy
machine's time at the team's barriers.
"""
Answer = dict[str, object]


class Pictures:
    """Encoded bytes to pixels, as the bundle that `PEER_BUNDLE` names wants them."""

    def __init__(self) -> None:
        file = Path(os.environ["PEER_BUNDLE"]) / DESCRIPTION
        self._preprocess = Description.model_validate_json(file.read_bytes()).preprocess

    def pixels(self, data: bytes) -> np.ndarray:
        """Encoded bytes to uint8 `[H, W, 3]`."""
        return self._preprocess.pixels(decode(data, self._preprocess.size, MOST_PIXELS))


class Network:
    """The bundle that `PEER_BUNDLE` names, at full depth.

    Args:
        threads: inside one operation; None for torch's own default, which is every core.
    """

    def __init__(self, threads: int | None = 1) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._bundle = load_servable(Path(os.environ["PEER_BUNDLE"]))
        self._net = self._bundle.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        side = self._bundle.description.preprocess.size
        for size in (1, 2, MOST_IMAGES):
            self.classify([np.zeros((side, side, 3), np.uint8)] * size)

    @torch.inference_mode()
    def classify(self, images: Sequence[np.ndarray]) -> list[Answer]:
        """The answer of the deepest exit for each image; the other heads are not even computed."""
        x = self._bundle.description.preprocess.normalise(torch.from_numpy(np.stack(images)))
        return answers(self._net.deepest(x), self._bundle.description.classes)


def answers(logits: Tensor, labels: Sequence[str]) -> list[Answer]:
    """What is sent for each image, from logits `[N, classes]`."""
    confidences, class_ids = logits.softmax(dim=1).max(dim=1)
    return [
        {"label": labels[i], "confidence": c}
        for i, c in zip(class_ids.tolist(), confidences.tolist(), strict=True)
    ]
