"""The servers that are compared."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass


class PeerError(Exception):
    """A peer that cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server to compare, or one way to ask it."""

    name: str
    command: tuple[str, ...]
    """After the interpreter, with `{port}` and `{bundle}`."""
    packages: tuple[str, ...] = ()
    """What its environment needs beside torch; nothing where it runs in Offramp's own."""
    path: str = "/classify"
    query: tuple[str, ...] = ()
    wrap: Callable[[bytes], bytes] = bytes
    """From an encoded image to what is posted."""
    content_type: str = "application/octet-stream"
    ours: bool = False
    """Whether it is Offramp, which can be told deadlines."""
    exit: int | None = None
    """The only exit that may answer."""

    def url(self, port: int, *more: str) -> str:
        """Where images are posted."""
        query = "&".join((*self.query, *more))
        return f"http://127.0.0.1:{port}{self.path}{'?' * bool(query)}{query}"


def offramp(name: str, *query: str, exit: int | None = None, dtype: str = "auto") -> Peer:
    """The server itself, asked so."""
    command = ("-m", "server", "--bundle", "{bundle}", "--port", "{port}")
    flags = ("--compile", "require", "--log-level", "warning", "--dtype", dtype)
    return Peer(name, (*command, *flags), query=query, ours=True, exit=exit)


def pinned(exit: int) -> Peer:
    """The server as one without early exits would be, cut off after this exit."""
    query = ("threshold=1", f"min_exit={exit}", f"max_exit={exit}")
    return offramp(f"Offramp, exit {exit} alone", *query, exit=exit)


def _in_json(data: bytes) -> bytes:
    return b'{"image": "%s"}' % base64.b64encode(data)


PLAIN = Peer("FastAPI", ("-m", "deploy.peers.plain"))
EAGER = (
    PLAIN,
    Peer(
        "LitServe",
        ("-m", "deploy.peers.litserve_server"),
        ("litserve", "pydantic"),
        wrap=_in_json,
        content_type="application/json",
    ),
    Peer("mosec", ("-m", "deploy.peers.mosec_server", "--port", "{port}"), ("mosec", "pydantic")),
    Peer(
        "BentoML",
        ("-m", "bentoml", "serve", "deploy.peers.bentoml_server:Front", "--port", "{port}"),
        # From 1.4.31 on its inner client closes its connections every 100 requests, under those
        # that are in flight: https://github.com/bentoml/BentoML/issues/5540
        ("bentoml==1.4.30", "pydantic"),
    ),
    Peer("Ray Serve", ("-m", "deploy.peers.ray_server"), ("ray[serve]", "pydantic")),
    Peer(
        "TorchServe",
        ("-m", "deploy.peers.torchserve_server"),
        # Its workers import yaml, which it does not ask for.
        ("torchserve", "torch-model-archiver", "pyyaml", "pydantic"),
        path="/predictions/classify",
    ),
)
BEST_BACKEND = Peer(
    "mosec with OpenVINO bf16",
    ("-m", "deploy.peers.openvino_server", "--port", "{port}"),
    ("openvino", "mosec", "pydantic"),
)
OTHERS = (*EAGER, BEST_BACKEND)
FULL_DEPTH = offramp("Offramp, every image at full depth", "threshold=1")
OURS = offramp("Offramp")
AS_ACCURATE = offramp("Offramp at 2 points", "max_accuracy_loss=0.02")
"""Which brings the default bundle down to what the others' last exit is worth."""
IN_INT8 = offramp("Offramp in int8", dtype="int8")
AS_ACCURATE_IN_INT8 = offramp("Offramp in int8 at 2 points", "max_accuracy_loss=0.02", dtype="int8")
OUR_WAYS = (FULL_DEPTH, OURS, AS_ACCURATE, IN_INT8, AS_ACCURATE_IN_INT8)
