"""mosec with the network in OpenVINO at bfloat16, the fastest full-depth backend for CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from mosec import Worker
from torch import Tensor, nn

from deploy.peers.mosec_server import serve
from deploy.peers.network import MOST_IMAGES, Answer, answers
from model.bundle import Bundle, load_servable
from server.compiled import core, openvino


class Deepest(nn.Module):
    """Pixels to the logits of the deepest exit; the other heads are not even computed."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._net = bundle.net
        self._preprocess = bundle.description.preprocess

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `[N, H, W, 3]` to `[N, classes]`."""
        return self._net.deepest(self._preprocess.normalise(pixels))


class Classify(Worker):
    """Pixels to answers, in dynamic batches."""

    def __init__(self) -> None:
        bundle = load_servable(Path(os.environ["PEER_BUNDLE"]))
        self._labels = bundle.description.classes
        side = bundle.description.preprocess.size
        example = torch.zeros((2, side, side, 3), dtype=torch.uint8)
        deepest = Deepest(bundle).eval()
        with torch.inference_mode():
            deepest(example)  # what it computes once must not be in the trace
            converted = openvino().convert_model(deepest, example_input=example)
        converted.reshape([-1, side, side, 3])
        # One stream over all cores, since mosec hands its worker one batch at a time.
        self._run = core().compile_model(
            converted, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}
        )
        for size in range(1, MOST_IMAGES + 1):
            self.forward([example[0].numpy()] * size)

    def serialize(self, data: Answer) -> bytes:
        return json.dumps(data).encode()

    def forward(self, images: list[np.ndarray]) -> list[Answer]:
        return answers(torch.from_numpy(self._run(np.stack(images))[0]), self._labels)


if __name__ == "__main__":
    serve(Classify, 1)
