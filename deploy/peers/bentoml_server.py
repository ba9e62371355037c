"""BentoML with adaptive batching between a front service and the network's."""

from __future__ import annotations

import bentoml
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.peers.network import MOST_IMAGES, WORKERS, Answer, Network, Pictures

front = Starlette()


@bentoml.service(workers=WORKERS)
class Classifier:
    """The network."""

    def __init__(self) -> None:
        self.network = Network()

    # No max_latency_ms: it is no waiting time, but when BentoML gives requests up with a 503.
    @bentoml.api(batchable=True, max_batch_size=MOST_IMAGES)  # type: ignore[untyped-decorator]
    def classify(self, images: np.ndarray) -> list[Answer]:
        return self.network.classify(list(images))


@bentoml.service(workers=1)
@bentoml.asgi_app(front, path="/")
class Front:
    """Decodes, then asks the network's service."""

    classifier = bentoml.depends(Classifier)

    def __init__(self) -> None:
        self.pictures = Pictures()
        front.router.routes.append(Route("/classify", self.post, methods=["POST"]))

    async def post(self, request: Request) -> Response:
        pixels = self.pictures.pixels(await request.body())
        said = await self.classifier.to_async.classify(pixels[None])
        return JSONResponse(said[0])
