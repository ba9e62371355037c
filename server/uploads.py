"""Image bytes out of a request body, raw or multipart."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.errors import BadMultipart, NoImage

MAX_FIELDS = 16
BOUNDARY = re.compile(r'[^"\\]+')


class InMemoryParser(MultiPartParser):
    """Never spills to disk: bodies are bounded, and the file system may be read-only.

    A form without its closing boundary is malformed: its last part may not be whole.
    """

    spool_max_size = 2**62

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], files: int) -> None:
        whole = self._whole(stream)
        super().__init__(headers, whole, max_files=files, max_fields=MAX_FIELDS)
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            raise MultiPartException("it ends before its closing boundary")


async def read_image(request: Request) -> bytes:
    """The one image of a request.

    Raises:
        BadMultipart: malformed, or not exactly one part `file`.
        NoImage: it is multipart without that part.
        ClientDisconnect: nobody waits any more.
    """
    if not _is_multipart(request):
        return await _read_raw(request)
    return (await _read_parts(request, "file", 1))[0]


async def read_images(request: Request, most: int) -> list[bytes]:
    """All images of a multipart request with parts `files`.

    Raises:
        BadMultipart: malformed, not multipart, no part `files` or more than `most`.
    """
    if not _is_multipart(request):
        raise BadMultipart("send multipart/form-data with one part `files` for each image")
    return await _read_parts(request, "files", most)


async def _read_raw(request: Request) -> bytes:
    """The body, which for a small image is one message; Starlette's `body` takes longer."""
    parts: list[bytes] = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_multipart(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_parts(request: Request, name: str, most: int) -> list[bytes]:
    parser = InMemoryParser(_only_boundary(request.headers), request.stream(), most)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _malformed(error.message) from None
    try:
        files = [part for part in form.getlist(name) if isinstance(part, UploadFile)]
        if not files:
            raise NoImage(f"no file part named `{name}`")
        return [await file.read() for file in files]
    finally:
        await form.close()


def _only_boundary(headers: Headers) -> Headers:
    """Without a charset: of any name Python remembers whether it knows it, and some decode a
    megabyte in minutes. None is meant to be sent (RFC 7578)."""
    _, options = parse_options_header(headers["content-type"])
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not BOUNDARY.fullmatch(boundary):
        raise _malformed("there is no boundary")
    return Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})


def _malformed(how: str) -> BadMultipart:
    return BadMultipart(f"the multipart body is malformed: {how}")
