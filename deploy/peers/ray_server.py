"""Ray Serve with its request batching, a replica for each core."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from deploy.peers.network import MOST_IMAGES, WORKERS, Answer, Network, Pictures

REPLICA_QUEUE = 2 * MOST_IMAGES
"""Requests in a replica at a time: as its guide to batching says, no fewer than fill a batch."""
MOST_WAITING = 1024
STORE_BYTES = 100_000_000


@serve.deployment(
    num_replicas=WORKERS,
    max_ongoing_requests=REPLICA_QUEUE,
    max_queued_requests=MOST_WAITING,
    ray_actor_options={"num_cpus": 1},
)
class Classifier:
    """One network; a request is a picture to decode, then a place in a batch."""

    def __init__(self) -> None:
        self.pictures = Pictures()
        self.network = Network()

    @serve.batch(max_batch_size=MOST_IMAGES, batch_wait_timeout_s=0.001)
    async def classify(self, images: list[np.ndarray]) -> list[Answer]:
        return self.network.classify(images)

    async def __call__(self, request: Request) -> Answer:
        answer: Answer = await self.classify(self.pictures.pixels(await request.body()))
        return answer


def main() -> None:
    """Serve until told to stop."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=STORE_BYTES)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEER_PORT"])})
    serve.run(Classifier.bind(), route_prefix="/classify")
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
