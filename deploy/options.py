"""Numbers on the command lines of measurements."""

from __future__ import annotations

import argparse
import contextlib
import math


def positive(text: str) -> float:
    """A finite number above zero."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")


def count(text: str) -> int:
    """A whole number above zero."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")


def share(text: str) -> float:
    """A number above zero, at most one."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no share above 0, at most 1")
