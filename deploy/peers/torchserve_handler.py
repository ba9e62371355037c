"""The handler that TorchServe's workers load."""

from __future__ import annotations

from typing import Any

from deploy.peers.network import Answer, Network, Pictures


class Handler:
    """Bodies to answers, in the batches that TorchServe hands over."""

    def initialize(self, context: Any) -> None:
        """Load the network; `context` is TorchServe's own."""
        self.pictures = Pictures()
        self.network = Network()
        self.manifest = context.manifest

    def handle(self, requests: list[dict[str, bytes]], _context: Any) -> list[Answer]:
        """One answer for each request."""
        bodies = [request["body"] for request in requests]
        return self.network.classify([self.pictures.pixels(bytes(body)) for body in bodies])
