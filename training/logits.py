"""Logits of every exit, computed once and kept by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from model.bundle import Bundle
from model.files import write_atomically
from model.fold import fold_stages
from model.numerics import carrier, keep_float32_whole
from model.policy import LARGEST_WEIGHT
from model.quantisation import Ranges, quantised_stages
from training.data import DataError, ImageSet

BATCH_PIXELS = 250 * 64 * 64
"""Run together; wide networks take a thousand bytes of memory for each."""
LARGEST_BATCH = 250


class Chain(nn.Module):
    """Stages one after another, each of which gives features and logits."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images `[N, 3, H, W]` to the logits of every exit, each `[N, classes]`."""
        every = []
        for stage in self.stages:
            x, logits = stage(x)
            every.append(logits)
        return every


def cached_logits(
    bundle: Bundle,
    images: ImageSet,
    dtype: torch.dtype,
    folder: Path,
    ranges: Ranges | None = None,
) -> Tensor:
    """Logits fp32 `[N, exits, classes]`, from `folder` if these weights saw these pixels before.

    Args:
        bundle: the network and its preprocess.
        images: decoded through that preprocess.
        dtype: what the network computes in, as served.
        folder: for the cache; made if missing.
        ranges: of this network's activations, for int8.

    Raises:
        DataError: a logit is NaN or infinite.
    """
    file = folder / f"logits-{_digest(bundle, images, dtype, ranges)}.safetensors"
    try:
        return load_file(file)["logits"]
    except (FileNotFoundError, SafetensorError, KeyError):
        pass  # not there, or damaged
    logits = compute_logits(bundle, images, dtype, ranges)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save({"logits": logits}))
    return logits


def serving_device() -> torch.device:
    """Where a server on this machine would run, computing as there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    keep_float32_whole()
    return torch.device("cuda")


@torch.inference_mode()
def compute_logits(
    bundle: Bundle,
    images: ImageSet,
    dtype: torch.dtype,
    ranges: Ranges | None = None,
) -> Tensor:
    """Run every stage on every image. Arguments, result and errors as for `cached_logits`."""
    device = serving_device()
    kept = carrier(dtype)
    net = _network(bundle, dtype, ranges).to(device, kept)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    for pixels in tqdm(
        images.pixels.split(batch_size(bundle)), "running the network", leave=False, disable=None
    ):
        x = bundle.description.preprocess.normalise(pixels.to(device), kept)
        parts.append(torch.stack(net(x), dim=1).float().cpu())
    logits = torch.cat(parts)
    broken = ~logits.isfinite().flatten(1).all(dim=1)
    if broken.any():
        first = images.files[int(broken.nonzero()[0])]
        raise DataError(
            f"the network's logits are not finite on {int(broken.sum())} of {len(images)} images, "
            f"{first} first; its weights are broken, or {dtype} is too narrow for them"
        )
    return logits


def batch_size(bundle: Bundle) -> int:
    """How many of its images run together."""
    side = bundle.description.preprocess.size
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // side**2))


def _network(bundle: Bundle, dtype: torch.dtype, ranges: Ranges | None) -> nn.Module:
    if dtype is torch.int8:
        assert ranges is not None
        return Chain(quantised_stages(bundle.net, ranges))
    return Chain(fold_stages(bundle.net))  # as served: rounded after normalisation is folded


def _digest(bundle: Bundle, images: ImageSet, dtype: torch.dtype, ranges: Ranges | None) -> str:
    digest = hashlib.sha256(bundle.description.weights_sha256.encode())
    digest.update(bundle.description.preprocess.model_dump_json().encode())
    numerics = (
        "folded",
        dtype,
        (ranges, LARGEST_WEIGHT) if dtype is torch.int8 else None,
        torch.__version__,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    digest.update(f"{numerics} {tuple(images.pixels.shape)}".encode())
    digest.update(images.pixels.contiguous().numpy().data)
    return digest.hexdigest()[:24]
