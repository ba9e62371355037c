"""Log lines, as text or JSON."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import sys
import threading
import warnings
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType
from typing import Any

from PIL import _imaging

log = logging.getLogger("offramp")

PLAIN = re.compile(r"[!#-<>-~]+")
"""Printable ASCII without space, quote or equals sign."""
DECODERS = ("PIL", "python_multipart")
"""Loggers of what reads clients' bytes."""


class TextFormatter(logging.Formatter):
    """`time level message key=value …`"""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = getattr(record, "fields", {})
        fields = "".join(f" {name}={_quoted(str(value))}" for name, value in said.items())
        line = f"{_time(record)} {record.levelname:7} {record.getMessage()}{fields}"
        return line if not record.exc_info else f"{line}\n{self.formatException(record.exc_info)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def configure(log_format: str, level: str) -> None:
    """Send every log line to standard error, in one shape."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # our own lines say as much
    _skip_what_no_line_says()
    _take_what_goes_past_it()
    _silence_decoders()


def _take_what_goes_past_it() -> None:
    """Log what Python would write to standard error by itself."""
    logging.captureWarnings(True)
    sys.excepthook = _say_uncaught
    threading.excepthook = sys.unraisablehook = _say_end


def _say_end(uncaught: Any) -> None:
    _say_uncaught(uncaught.exc_type, uncaught.exc_value, uncaught.exc_traceback)


def _say_uncaught(
    kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, SystemExit):
        log.critical("nobody caught this", exc_info=(kind, error or kind(), traceback))


def _silence_decoders() -> None:
    """Whoever sent a broken image is told what is wrong with it, so the log need not be, nor what
    is in images. libtiff writes to it past Python, hence by its own means."""
    for name in DECODERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    pillow = ctypes.CDLL(_imaging.__file__)
    for setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(pillow, setter):  # not where libtiff is built in, and its names are hidden
            getattr(pillow, setter)(None)


def _skip_what_no_line_says() -> None:
    """Not even look it up (Python's logging HOWTO, "Optimization")."""
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False


def _quoted(value: str) -> str:
    """As it is if it is one plain word; else quoted, so that a path cannot forge a log line."""
    return value if PLAIN.fullmatch(value) else json.dumps(value)


def _time(record: logging.LogRecord) -> str:
    seconds = int(record.created)
    return f"{_second(seconds)}.{int(1e3 * (record.created - seconds)):03}+00:00"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    """Kept, since under load many lines are of one second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
