"""What a server replies when it is asked, with no proxy between."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from http.client import HTTPException

# Proxies of the environment are for other machines than those that are measured here.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def reply(url: str, headers: Mapping[str, str] | None = None, timeout: float = 10.0) -> bytes:
    """The body of what a GET is answered with.

    Args:
        url: `http://host:port/path?query`.
        headers: sent with it.
        timeout: in seconds.

    Raises:
        urllib.error.HTTPError: the status is an error's.
        OSError: there is no answer, or none in HTTP, or a part of one.
    """
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            body: bytes = response.read()
            return body
    except HTTPException as error:
        raise ConnectionError(f"what answers speaks no HTTP, or breaks off ({error!r})") from None
