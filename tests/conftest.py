"""A tiny bundle and real servers on real sockets."""

import asyncio
import io
import json
import os
import shutil
import socket
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tests are many small things: more threads only wait
os.environ["OFFRAMP_COMPILE"] = "off"  # tests that want compiled stages say so
os.environ["OFFRAMP_WORKERS"] = "1"  # whatever cores there are
os.environ["SSL_CERT_DIR"] = os.devnull  # nothing here speaks TLS: no client need read certificates
os.environ.pop("SSL_CERT_FILE", None)

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from model.bundle import load_bundle, save_bundle, save_policy
from model.network import build
from model.policy import Calibration, OperatingPoint, Policy
from model.preprocess import Preprocess
from server.app import create_app
from server.connection import Protocol
from server.served import Served
from server.settings import Settings

ROOT = Path(__file__).parent.parent
CLASSES = tuple(f"class{i}" for i in range(10))
PREPROCESS = Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def point(loss, *thresholds):
    return OperatingPoint(
        max_accuracy_loss=loss,
        thresholds=thresholds,
        certified=True,
        measured_accuracy_loss=0.0,
        mean_macs=0.5 / (1 + loss),
        exit_shares=(0.25, 0.25, 0.25, 0.25),
    )


def make_bundle(path):
    """A calibrated bundle with random weights whose confidences spread over 0..1."""
    torch.manual_seed(0)
    net = build("resnet10", len(CLASSES), width=8)
    with torch.no_grad():  # batch statistics of real activations, so that logits differ by image
        for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        net.train()(torch.randn(64, 3, 32, 32))
    description = save_bundle(
        path,
        net.eval(),
        name="tiny",
        version="7",
        architecture="resnet10",
        arguments={"width": 8},
        classes=CLASSES,
        preprocess=PREPROCESS,
        training={},
    )
    policy = Policy(
        weights_sha256=description.weights_sha256,
        method="by hand",
        delta=0.1,
        calibration_images=100,
        calibrations=(Calibration(temperature=0.2),) * 4,
        operating_points=(
            point(0.0, 2.0, 2.0, 2.0),
            point(0.01, 0.6, 0.6, 0.6),
            point(0.05, 0.4, 0.4, 0.4),
        ),
    )
    save_policy(path, policy)
    return path


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def eager_path(bundle_path, tmp_path_factory):
    """The same bundle with a policy to which every first exit is confident enough."""
    path = tmp_path_factory.mktemp("eager")
    shutil.copytree(bundle_path, path, dirs_exist_ok=True)
    policy = json.loads((path / "policy.json").read_text())
    for point in policy["operating_points"]:
        point["thresholds"] = [0.0] * 3
    (path / "policy.json").write_text(json.dumps(policy))
    return path


@pytest.fixture(scope="session")
def bundle(bundle_path):
    return load_bundle(bundle_path)


def until(condition, seconds=10):
    """Wait for what another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


class RunningServer:
    """One server on a free port, and a client for it."""

    def __init__(self, served, port, loop=None):
        self.served = served
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        hooks = {"response": [lambda _: self.wait_for_a_turn()] if loop else []}
        self.client = httpx.Client(base_url=self.url, timeout=20, event_hooks=hooks)
        self._loop = loop

    def wait_for_a_turn(self):
        """Until what the event loop had to do by now is done; it logs and counts after it sends."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(10)

    def post(self, data, **parameters):
        return self.client.post("/classify", content=data, params=parameters)

    def metric(self, name, **labels):
        value = self.served.metrics.registry.get_sample_value(f"offramp_{name}", labels)
        assert value is not None, f"there is no series {name} {labels}"
        return value

    def send(self, data, timeout=10):
        """Send raw bytes; the connection's socket, for reading or for going away."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        connection.sendall(data)
        return connection


@contextmanager
def running(served, warm=True):
    """Serve on a free port until the block ends."""
    config = uvicorn.Config(
        create_app(served),
        http=Protocol,
        port=0,
        host="127.0.0.1",
        log_config=None,
        access_log=False,
    )
    server, started, wait = uvicorn.Server(config), threading.Event(), threading.Event()
    startup, warm_up = server.startup, served.warm_up

    loops = []

    async def announce(sockets=None):
        loops.append(asyncio.get_running_loop())
        await startup(sockets)
        started.set()

    def warm_when_allowed():
        wait.wait(10)
        warm_up()
        ready.set()

    ready = threading.Event()
    server.startup, served.warm_up = announce, warm_when_allowed
    if warm:
        wait.set()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(10)
        assert not warm or ready.wait(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        one = RunningServer(served, port, *loops)
        one.stop = lambda: setattr(server, "should_exit", True)
        with one.client:
            yield one
    finally:
        wait.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve(bundle_path):
    """Makes servers over the tiny bundle, on the processor; settings as keywords."""

    @contextmanager
    def make(warm=True, **settings):
        chosen = {"bundle": bundle_path, "device": "cpu", "threads": 1, "max_batch": 2}
        chosen["audit_rate"] = 0.0
        with running(Served(Settings(**{**chosen, **settings})), warm) as server:
            yield server

    return make


@pytest.fixture(scope="session")
def shared_server(serve):
    """Without a wait between tests."""
    with serve() as one:
        yield one


@pytest.fixture
def server(shared_server):
    """A server that tests share; they must leave it as it was. It has logged what came before."""
    shared_server.wait_for_a_turn()
    return shared_server


def encode(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(width=32, height=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def png():
    return encode(noise())


@pytest.fixture(scope="session")
def cifar():
    """500 test images of CIFAR-100, five a class: (label, PNG bytes)."""
    with tarfile.open(ROOT / "tests/data/cifar100-test-500.tar") as tar:
        return [
            (member.name.split("/")[1], tar.extractfile(member).read())
            for member in tar.getmembers()
        ]
