"""The names of threads as the operating system shows them."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path


def name_thread(name: str) -> None:
    """Name the calling thread, and with it those it starts, for `top -H`.

    Python does so by itself from 3.14 on; elsewhere than on Linux nothing happens.
    """
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
