"""Image bytes out of a request body, raw or multipart."""

from __future__ import annotations

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.errors import BadMultipart, NoImage

MAX_FIELDS = 16


class InMemoryParser(MultiPartParser):
    """Never spills to disk: bodies are bounded, and the file system may be read-only."""

    spool_max_size = 2**62


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
    parser = InMemoryParser(
        request.headers, request.stream(), max_files=most, max_fields=MAX_FIELDS
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        message = getattr(error, "message", "there is no boundary")
        raise BadMultipart(f"the multipart body is malformed: {message}") from None
    try:
        files = [part for part in form.getlist(name) if isinstance(part, UploadFile)]
        if not files:
            raise NoImage(f"no file part named `{name}`")
        return [await file.read() for file in files]
    finally:
        await form.close()
