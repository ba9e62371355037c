"""Plain pretrained backbone weights, to start from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.backbone import Backbone
from model.network import MultiExitNet
from training.run import TrainingError

NESTED = ("state_dict", "model", "net")
"""Where training scripts keep a state dict beside other things."""
WRAPPER = "module."
"""What DataParallel puts before every name."""


def load_pretrained(net: MultiExitNet, whole: Backbone, file: Path) -> None:
    """Give a network's backbone the weights of a published one; exits stay as they are.

    Args:
        net: whose backbone may end at its last exit.
        whole: the same backbone to its own end, which the file must fit.
        file: a state dict, as `.safetensors` or written by `torch.save`.

    Raises:
        TrainingError: the file cannot be read safely, or belongs to another backbone.
    """
    try:
        whole.load_pretrained(_read(file))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise TrainingError(
            f"{file} does not fit this backbone: {' '.join(lines)[:300]}"
        ) from error
    loaded = whole.state_dict()
    net.backbone.load_state_dict({name: loaded[name] for name in net.backbone.state_dict()})


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return _plain(file, load_file(file))
        return _plain(file, torch.load(file, map_location="cpu", weights_only=True))
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"{file} is not a state dict of plain weights: {first}") from error


def _plain(file: Path, content: Any) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise TrainingError(f"{file} is not a state dict of plain weights")
    return {str(k).removeprefix(WRAPPER): v for k, v in content.items()}
