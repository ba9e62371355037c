"""LitServe with its own dynamic batching."""

from __future__ import annotations

import base64
import os
from typing import Any

import litserve
import numpy as np

from deploy.peers.network import Network


class Classifier(litserve.LitAPI):
    """One network in one worker process; batches as long as it was busy, 5 ms at most."""

    def setup(self, device: str) -> None:
        self.network = Network()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return self.network.pixels(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs

    def predict(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return self.network.classify(images)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.005, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=int(os.environ["PEER_PORT"]), generate_client_file=False)
