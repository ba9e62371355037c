"""When Python looks for garbage: never amid requests, if it can be helped."""

from __future__ import annotations

import gc


def keep() -> None:
    """Never look through what is there now: that takes 0.1 s for all that torch has brought, and
    nothing is answered meanwhile."""
    gc.freeze()


def collect() -> None:
    """Look through everything once, then keep what is left.

    For when a network has gone: its graphs refer to themselves, and so would stay for ever.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
