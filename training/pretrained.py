"""Trained weights to start from: a plain backbone's or a whole bundle's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.backbone import Backbone
from model.bundle import WEIGHTS, load_bundle
from model.network import MultiExitNet
from training.run import TrainingError
from training.tensor_file import read_tensor_file

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


def load_trained(net: MultiExitNet, path: Path, classes: Sequence[str]) -> None:
    """Give a network the weights of a bundle, so that its training goes on.

    Where the data has other classes than the bundle, classifiers start afresh.

    Args:
        net: of the bundle's architecture and exits.
        path: the bundle's folder; it may be calibrated or not.
        classes: of the data, by class id.

    Raises:
        TrainingError: the bundle is of another network.
    """
    bundle = load_bundle(path, with_policy=False)
    trained, own = bundle.net.state_dict(), net.state_dict()
    odd = trained.keys() ^ own.keys()
    odd |= {k for k in trained.keys() & own.keys() if trained[k].shape != own[k].shape}
    classifiers = {name for name in own if ".fc." in name}
    fresh = odd & classifiers if trained.keys() == own.keys() else set()
    if odd - fresh:
        raise TrainingError(f"{path} is of another network: it differs at {min(odd - fresh)}")
    if bundle.description.classes != tuple(classes):  # as many others, perhaps
        fresh = classifiers
    net.load_state_dict(trained | {k: own[k] for k in fresh})


def weights_digest(path: Path) -> str:
    """SHA-256 of the weights in a bundle, or of the file of a plain backbone."""
    with (path / WEIGHTS if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return _plain(file, load_file(file))
        return _plain(file, read_tensor_file(file))
    except OSError as error:
        raise TrainingError(f"cannot read {file}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise TrainingError(f"{file} is not a state dict of plain weights: {first}") from error


def _plain(file: Path, content: Any) -> dict[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise TrainingError(f"{file} is not a state dict of plain weights")
    return {str(k).removeprefix(WRAPPER): v for k, v in content.items()}
