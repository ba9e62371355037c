"""mosec with decoding and inference in workers of their own, as its documentation advises."""

from __future__ import annotations

import json

import numpy as np
from mosec import Server, Worker

from deploy.peers.network import MOST_IMAGES, WORKERS, Answer, Network, Pictures

WAIT_MILLISECONDS = 1
"""For a batch to fill, which an idle server waits too; behind a busy worker it fills anyhow."""


class Decode(Worker):
    """Encoded bytes to pixels."""

    def __init__(self) -> None:
        self.pictures = Pictures()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> np.ndarray:
        return self.pictures.pixels(data)


class Classify(Worker):
    """Pixels to answers, in dynamic batches."""

    def __init__(self) -> None:
        self.network = Network()

    def serialize(self, data: Answer) -> bytes:
        return json.dumps(data).encode()

    def forward(self, images: list[np.ndarray]) -> list[Answer]:
        return self.network.classify(images)


def serve(network: type[Worker], workers: int) -> None:
    """Serve a kind of worker behind the one that decodes; never returns.

    Left at mosec's defaults are its queue (1024 requests) and its timeout (3 s): both are far
    beyond what a healthy server needs.
    """
    server = Server()
    server.append_worker(Decode, num=1, route="/classify")
    server.append_worker(
        network,
        num=workers,
        max_batch_size=MOST_IMAGES,
        max_wait_time=WAIT_MILLISECONDS,
        route="/classify",
    )
    server.run()


if __name__ == "__main__":
    serve(Classify, WORKERS)
