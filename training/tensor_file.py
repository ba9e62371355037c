"""Files of `torch.save`, read without pickle's powers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_tensor_file(file: Path) -> Any:
    """What the file holds, its tensors on the CPU.

    Raises:
        OSError: it cannot be opened.
        ValueError: torch did not write it, it is broken, or it holds more than tensors.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes make an unpickler raise any kind
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(first) from error


def write_tensor_file(file: Path, content: Any) -> None:
    """Write what `read_tensor_file` reads.

    Raises:
        OSError: the disk is full, say. Of a path torch would tell where in its own code it failed.
        KeyboardInterrupt: as ever.
    """
    with file.open("wb") as opened:
        try:
            torch.save(content, opened)
        except RuntimeError as error:
            if error.__context__:  # why the file has no end, as torch says; Ctrl-C for one
                raise error.__context__ from None
            raise
