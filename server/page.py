"""The demo page, the reference page and the files that they load."""

from __future__ import annotations

import mimetypes
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from server.errors import NotFound

STATIC = Path(__file__).parent / "static"
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version shows at once; the ETag makes asking cheap
}


class StaticFiles:
    """All files of a folder, read once: what is not in it has no path at all."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            file.relative_to(folder).as_posix(): _with_tag(file.read_bytes())
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    def response(self, name: str, request: Request) -> Response:
        """The file, or 304 if the client has it.

        Raises:
            NotFound: there is no such file.
        """
        if name not in self._files:
            raise NotFound
        content, tag = self._files[name]
        headers = {**HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=mimetypes.guess_type(name)[0])


def _with_tag(content: bytes) -> tuple[bytes, str]:
    return content, f'"{sha256(content).hexdigest()[:16]}"'


def page_router() -> APIRouter:
    """Routes for people; they tell nothing that needs a key."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(STATIC)

    @router.get("/")
    async def get_page(request: Request) -> Response:
        return files.response("index.html", request)

    @router.get("/docs")
    async def get_reference(request: Request) -> Response:
        return files.response("reference.html", request)

    @router.get("/static/{name:path}")
    async def get_file(name: str, request: Request) -> Response:
        return files.response(name, request)

    return router
