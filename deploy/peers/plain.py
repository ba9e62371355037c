"""FastAPI with torch in its handler, as most tutorials have it."""

from __future__ import annotations

import os
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from deploy.peers.network import Network

app, network = FastAPI(), Network()


@app.post("/classify")
async def classify(request: Request) -> dict[str, Any]:
    """The body is the encoded image."""
    return network.classify([network.pixels(await request.body())])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PEER_PORT"]), access_log=False)
