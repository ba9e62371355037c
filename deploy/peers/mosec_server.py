"""mosec with decoding and inference in workers of their own, as its documentation advises."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mosec import Server, Worker

from deploy.peers.network import Network


class Decode(Worker):
    """Encoded bytes to pixels."""

    def __init__(self) -> None:
        self.network = Network()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> np.ndarray:
        return self.network.pixels(data)


class Classify(Worker):
    """Pixels to answers, in dynamic batches."""

    def __init__(self) -> None:
        self.network = Network()

    def serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def forward(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return self.network.classify(images)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=1, route="/classify")
    server.append_worker(Classify, num=1, max_batch_size=32, max_wait_time=5, route="/classify")
    server.run()
