"""Image bytes out of a request body, raw or multipart."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.arrival import BODY
from server.deadline import in_time
from server.errors import BadMultipart, NoImage
from server.metrics import Metrics

MAX_FIELDS = 16
BOUNDARY = re.compile(r'[^"\\]+')
PREAMBLE = b'--%b\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n'
"""Before a form, it makes a field of what comes before the first part, as a rule nothing."""


class InMemoryParser(MultiPartParser):
    """Never spills to disk: bodies are bounded, and the file system may be read-only.

    A form without its closing boundary is malformed: its last part may not be whole. Parts of one
    name are files whether or not they name one, which RFC 7578 leaves open. Before the first there
    may be a preamble (RFC 2046, 5.1.1), which the parser of itself takes for a fault.
    """

    spool_max_size = 2**62

    def __init__(
        self, boundary: str, stream: AsyncGenerator[bytes, None], name: str, files: int
    ) -> None:
        headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})
        whole = self._whole(stream, PREAMBLE % boundary.encode("latin-1"))
        super().__init__(headers, whole, max_files=files, max_fields=MAX_FIELDS)
        self._name = name.encode()
        self._ended = False
        self._current_fields = -1  # before the preamble, which counts as one

    def on_headers_finished(self) -> None:
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        if options.get(b"name") == self._name and b"filename" not in options:
            part.content_disposition = b"%b; filename=image" % (part.content_disposition or b"")
        super().on_headers_finished()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is not None:  # what a field holds, nobody asks for
            super().on_part_data(data, start, end)

    def on_end(self) -> None:
        self._ended = True

    async def _whole(
        self, stream: AsyncGenerator[bytes, None], before: bytes
    ) -> AsyncGenerator[bytes, None]:
        yield before
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("it ends before its closing boundary")


async def read_image(request: Request, deadline: float, metrics: Metrics) -> bytes:
    """The one image of a request.

    Args:
        request: whose body nobody has read.
        deadline: on `time.perf_counter`; a body takes memory while it comes.
        metrics: count deadlines that were missed, and images that could not be used.

    Raises:
        BadMultipart: malformed, or more than one part `file`.
        NoImage: it is multipart without that part.
        DeadlineExceeded: it has not come by then, and so would be of no use.
        ClientDisconnect: nobody waits any more.
    """
    if _is_multipart(request):
        reading = _read_parts(request, "file", 1, metrics)
        (image,) = await in_time(reading, deadline, metrics.missed_deadlines)
        return image
    return await read_whole(request, deadline, metrics)


async def read_whole(request: Request, deadline: float, metrics: Metrics) -> bytes:
    """A request's body as it is. Arguments as for `read_image`.

    Raises:
        DeadlineExceeded: it has not come by then, and so would be of no use.
        ClientDisconnect: nobody waits any more.
    """
    begun, whole = b"", False
    if BODY in request.scope:  # a small one is there at once, and a timer would take longer
        begun, whole = await _read_more(request)
    if whole:
        return begun
    return await in_time(_read_rest(request, begun), deadline, metrics.missed_deadlines)


async def read_images(
    request: Request, most: int, deadline: float, metrics: Metrics
) -> list[bytes]:
    """All images of a multipart request with parts `files`.

    Args:
        request: whose body nobody has read.
        most: images that it may hold.
        deadline: on `time.perf_counter`; a body takes memory while it comes.
        metrics: count deadlines that were missed, and images that could not be used.

    Raises:
        BadMultipart: not multipart, malformed, or more than `most` files.
        NoImage: there is no file part `files`.
        DeadlineExceeded: they have not come by then, and so would be of no use.
        ClientDisconnect: nobody waits any more.
    """
    if not _is_multipart(request):
        raise BadMultipart("send multipart/form-data with one part `files` for each image")
    reading = _read_parts(request, "files", most, metrics)
    return await in_time(reading, deadline, metrics.missed_deadlines)


async def _read_rest(request: Request, begun: bytes) -> bytes:
    parts, whole = [begun], False
    while not whole:
        part, whole = await _read_more(request)
        parts.append(part)
    return b"".join(parts)


async def _read_more(request: Request) -> tuple[bytes, bool]:
    """A part of the body, and whether it is the last."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), not message.get("more_body", False)


def _is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_parts(request: Request, name: str, most: int, metrics: Metrics) -> list[bytes]:
    parser = InMemoryParser(_boundary(request.headers), request.stream(), name, most)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _malformed(error.message) from None
    try:
        files = [part for part in form.getlist(name) if isinstance(part, UploadFile)]
        if not files:
            metrics.rejected_images.labels(NoImage.code).inc()
            raise NoImage(f"no file part named `{name}`")
        return [await file.read() for file in files]
    finally:
        await form.close()


def _boundary(headers: Headers) -> str:
    """Of the content type nothing else, such as a charset, which RFC 7578 does not use here: Python
    keeps every name that it is asked for, and some codecs take minutes for a megabyte."""
    _, options = parse_options_header(headers["content-type"])
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not BOUNDARY.fullmatch(boundary):
        raise _malformed("there is no boundary")
    return boundary


def _malformed(how: str) -> BadMultipart:
    return BadMultipart(f"the multipart body is malformed: {how}")
