"""Logits of every exit, computed once and kept by digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from model.bundle import Bundle, write_atomically
from training.data import DataError, ImageSet

BATCH = 250


def cached_logits(bundle: Bundle, images: ImageSet, dtype: torch.dtype, folder: Path) -> Tensor:
    """Logits fp32 `[N, exits, classes]`, from `folder` if these weights saw these pixels before.

    Args:
        bundle: the network and its preprocess.
        images: decoded through that preprocess.
        dtype: what the network computes in, as served.
        folder: for the cache; made if missing.

    Raises:
        DataError: a logit is NaN or infinite.
    """
    file = folder / f"logits-{_digest(bundle, images, dtype)}.safetensors"
    if file.exists():
        return load_file(file)["logits"]
    logits = compute_logits(bundle, images, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save({"logits": logits}))
    return logits


@torch.inference_mode()
def compute_logits(bundle: Bundle, images: ImageSet, dtype: torch.dtype) -> Tensor:
    """Run every stage on every image. Arguments, result and errors as for `cached_logits`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = bundle.net.to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    for pixels in tqdm(images.pixels.split(BATCH), "running the network", leave=False):
        x = bundle.description.preprocess.normalise(pixels.to(device), dtype)
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


def _digest(bundle: Bundle, images: ImageSet, dtype: torch.dtype) -> str:
    digest = hashlib.sha256(bundle.description.weights_sha256.encode())
    digest.update(bundle.description.preprocess.model_dump_json().encode())
    numerics = (dtype, torch.__version__, "cuda" if torch.cuda.is_available() else "cpu")
    digest.update(f"{numerics} {tuple(images.pixels.shape)}".encode())
    digest.update(images.pixels.contiguous().numpy().data)
    return digest.hexdigest()[:24]
