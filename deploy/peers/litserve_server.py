"""LitServe with its own dynamic batching."""

from __future__ import annotations

import base64
import os
from typing import Any

import litserve
import numpy as np

from deploy.peers.network import MOST_IMAGES, WORKERS, Answer, Network, Pictures


class Classifier(litserve.LitAPI):
    """Each worker process decodes for itself and runs a network of its own."""

    def setup(self, device: str) -> None:
        self.pictures = Pictures()
        self.network = Network()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return self.pictures.pixels(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs

    def predict(self, images: list[np.ndarray]) -> list[Answer]:
        return self.network.classify(images)

    def unbatch(self, output: list[Answer]) -> list[Answer]:
        return output

    def encode_response(self, output: Answer) -> dict[str, Any]:  # LitServe evaluates this type
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=MOST_IMAGES, batch_timeout=0.001, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False)
