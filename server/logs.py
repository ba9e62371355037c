"""Log lines, as text or JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

PLAIN = re.compile(r"[!#-<>-~]+")
"""Printable ASCII without space, quote or equals sign."""


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
    _look_up_only_what_is_said()


def _look_up_only_what_is_said() -> None:
    """Spare each line what no line says (Python's logging HOWTO, "Optimization")."""
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = False
    logging.logMultiprocessing = False


def _quoted(value: str) -> str:
    """As it is if it is one plain word; else quoted, so that a path cannot forge a log line."""
    return value if PLAIN.fullmatch(value) else json.dumps(value)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
