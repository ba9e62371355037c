"""BentoML with adaptive batching between a front service and the network's."""

from __future__ import annotations

from typing import Any

import bentoml
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.peers.network import Network

front = Starlette()


@bentoml.service(workers=1)
class Classifier:
    """The network."""

    def __init__(self) -> None:
        self.network = Network()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=100)  # type: ignore[untyped-decorator]
    def classify(self, images: np.ndarray) -> list[dict[str, Any]]:
        return self.network.classify(list(images))


@bentoml.service(workers=1)
@bentoml.asgi_app(front, path="/")
class Front:
    """Decodes, then asks the network's service."""

    classifier = bentoml.depends(Classifier)

    def __init__(self) -> None:
        self.network = Network()
        front.router.routes.append(Route("/classify", self.post, methods=["POST"]))

    async def post(self, request: Request) -> Response:
        pixels = self.network.pixels(await request.body())
        said = await self.classifier.to_async.classify(pixels[None])
        return JSONResponse(said[0])
