"""Files that `torch.save` wrote, read without pickle's powers."""

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
