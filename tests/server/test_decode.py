"""Decoding: large images in a bounded pool, small ones without a thread hop."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from server.decode import SMALL_BYTES, Decoder, decoding_pool
from server.errors import DeadlineExceeded, UnsupportedImage
from server.metrics import Metrics
from tests.conftest import PREPROCESS, ROOT, encode, noise

LARGE = encode(noise(200, 200))


class Slow:
    """Preprocessing that lasts until it is told to end."""

    size = PREPROCESS.size

    def __init__(self):
        self.end = threading.Event()
        self.inside = threading.Semaphore(0)
        self.threads = []

    def pixels(self, image):
        self.threads.append(threading.current_thread().name)
        if image.width > 32:
            self.inside.release()
            assert self.end.wait(10)
        return PREPROCESS.pixels(image)


@pytest.fixture
def slow():
    return Slow()


@pytest.fixture
def decoder(slow):
    metrics = Metrics(8)
    with decoding_pool(2) as pool:
        yield Decoder(slow, 10**6, pool, metrics)
        slow.end.set()


async def crowd(decoder, slow):
    waiting = [asyncio.ensure_future(decoder(LARGE)) for _ in range(6)]
    for _ in range(2):
        assert await asyncio.to_thread(slow.inside.acquire, timeout=10)
    return waiting


def test_large_images_wait_for_a_thread_of_the_pool(decoder, slow):
    async def run():
        waiting = await crowd(decoder, slow)
        assert len(slow.threads) == 2
        slow.end.set()
        return await asyncio.gather(*waiting)

    pixels = asyncio.run(run())
    assert [p.shape for p, _ in pixels] == [(32, 32, 3)] * 6
    assert {name.rpartition("_")[0] for name in slow.threads} == {"decode"}
    assert len(set(slow.threads)) == 2


def test_a_small_image_overtakes_large_ones(decoder, slow, png):
    async def run():
        waiting = await crowd(decoder, slow)
        await decoder(png)
        still = [not w.done() for w in waiting]
        slow.end.set()
        await asyncio.gather(*waiting)
        return still

    assert all(asyncio.run(run()))
    assert slow.threads[2] == threading.main_thread().name


def test_not_even_the_header_of_a_large_body_is_read_outside_the_pool(decoder, slow):
    """Some headers take Pillow minutes, in which the event loop would answer nobody."""

    async def run():
        waiting = await crowd(decoder, slow)
        large = asyncio.ensure_future(decoder(b"x" * (SMALL_BYTES + 1)))
        with pytest.raises(UnsupportedImage):
            await decoder(b"x" * SMALL_BYTES)
        assert not large.done()
        slow.end.set()
        await asyncio.gather(*waiting)
        with pytest.raises(UnsupportedImage):
            await large

    asyncio.run(run())


def test_what_waits_for_a_thread_until_its_deadline_is_told_so_and_never_decoded(decoder, slow):
    async def run():
        waiting = await crowd(decoder, slow)
        late = [asyncio.ensure_future(decoder(LARGE, time.perf_counter() + 0.02)) for _ in range(3)]
        said = await asyncio.gather(*late, return_exceptions=True)
        slow.end.set()
        await asyncio.gather(*waiting)
        return said

    assert [type(said) for said in asyncio.run(run())] == [DeadlineExceeded] * 3
    assert len(slow.threads) == 6


def test_a_deadline_that_has_passed_already_costs_no_decoding(decoder, slow, png):
    with pytest.raises(DeadlineExceeded):
        asyncio.run(decoder(png, time.perf_counter() - 1))
    assert not slow.threads


def test_whoever_gives_up_leaves_the_queue(decoder, slow):
    async def run():
        waiting = await crowd(decoder, slow)
        gone = asyncio.ensure_future(decoder(LARGE))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        slow.end.set()
        await asyncio.gather(*waiting)

    asyncio.run(run())
    assert len(slow.threads) == 6


def test_no_image_waits_for_its_formats_import():
    code = (
        "from PIL import Image\n"
        "from model.image import FORMATS, prepare\n"
        "prepare()\n"
        "assert set(FORMATS) <= set(Image.OPEN)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
