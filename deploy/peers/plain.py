"""FastAPI with torch in its handler, as most tutorials have it."""

from __future__ import annotations

import os

import uvicorn
from fastapi import FastAPI, Request

from deploy.peers.network import Answer, Network, Pictures

app = FastAPI()
# Requests are answered one by one, so every core may work for each.
pictures, network = Pictures(), Network(threads=None)


@app.post("/classify")
async def classify(request: Request) -> Answer:
    """The body is the encoded image."""
    return network.classify([pictures.pixels(await request.body())])[0]


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PEER_PORT"]), access_log=False)
