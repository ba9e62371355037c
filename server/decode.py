"""Encoded bytes to pixels in a bounded pool, small images without a thread hop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model import image
from model.preprocess import Preprocess
from server.deadline import in_time
from server.errors import (
    BrokenImage,
    DeadlineExceeded,
    ImageTooLarge,
    NoImage,
    OfframpError,
    UnsupportedImage,
)
from server.metrics import Metrics
from server.threads import name_thread

SMALL_PIXELS = 128 * 128
"""Decoding fewer takes about 0.2 ms at most, which is what a thread hop may cost under load."""

SMALL_BYTES = 1 << 16
"""More for so few pixels is no honest image, and reading its header alone may take minutes."""

ERRORS: dict[type[image.ImageError], type[OfframpError]] = {
    image.UnsupportedImage: UnsupportedImage,
    image.BrokenImage: BrokenImage,
    image.ImageTooLarge: ImageTooLarge,
}


def decoding_pool(threads: int) -> ThreadPoolExecutor:
    """So many large images are decoded at once."""
    return ThreadPoolExecutor(threads, "decode", name_thread, ("decode",))


class Decoder:
    """Decodes and preprocesses one image at a time.

    Args:
        preprocess: of the bundle that is served.
        max_pixels: the most pixels that an image's header may announce.
        pool: decodes large images.
        metrics: where durations and rejected images are counted.
    """

    def __init__(
        self, preprocess: Preprocess, max_pixels: int, pool: ThreadPoolExecutor, metrics: Metrics
    ) -> None:
        image.prepare()
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self._pool = pool
        self._seconds = metrics.phase_seconds.labels("decode")
        self._rejected = metrics.rejected_images
        self._missed = metrics.missed_deadlines

    async def __call__(
        self, data: bytes | np.ndarray, deadline: float = math.inf
    ) -> tuple[np.ndarray, float]:
        """Decode one image.

        Args:
            data: as it was sent: encoded, or uint8 pixels `[H, W, 3]`.
            deadline: on `time.perf_counter`; what waits for a thread until then is not decoded.

        Returns:
            uint8 pixels `[H, W, 3]` of the network's size, and the seconds it took.

        Raises:
            NoImage, UnsupportedImage, BrokenImage, ImageTooLarge
            DeadlineExceeded: there are no pixels by then.
        """
        began = time.perf_counter()
        if began > deadline:
            self._missed.inc()
            raise DeadlineExceeded
        try:
            pixels = await self._decode(data, deadline)
        except image.ImageError as error:
            kind = ERRORS[type(error)]
            self._rejected.labels(kind.code).inc()
            raise kind(str(error)) from None
        seconds = time.perf_counter() - began
        self._seconds.observe(seconds)
        return pixels, seconds

    async def _decode(self, data: bytes | np.ndarray, deadline: float) -> np.ndarray:
        if isinstance(data, np.ndarray):
            whole = image.from_pixels(data, self._max_pixels)
            return await self._finish(whole, self._preprocess.pixels, deadline)
        if not data:
            self._rejected.labels(NoImage.code).inc()
            raise NoImage
        if (plain := image.decode_quickly(data, self._max_pixels)) is not None:
            return self._preprocess.pixels(plain)
        if len(data) > SMALL_BYTES:
            return await self._in_pool(deadline, lambda: self._render(self._read_header(data)))
        return await self._finish(self._read_header(data), self._render, deadline)

    async def _finish(
        self, begun: image.Header, finish: Callable[[image.Header], np.ndarray], deadline: float
    ) -> np.ndarray:
        if image.decoded_pixels(begun) <= SMALL_PIXELS:
            return finish(begun)
        return await self._in_pool(deadline, lambda: finish(begun))

    async def _in_pool(self, deadline: float, work: Callable[[], np.ndarray]) -> np.ndarray:
        # Whoever gives up while the image still waits for a thread takes it out of the queue.
        working = asyncio.get_running_loop().run_in_executor(self._pool, work)
        return await in_time(working, deadline, self._missed)

    def _read_header(self, data: bytes) -> image.Header:
        return image.read_header(data, self._max_pixels)

    def _render(self, header: image.Header) -> np.ndarray:
        return self._preprocess.pixels(image.render(header, self._preprocess.size))
