"""Top-1 accuracy of every exit."""

from __future__ import annotations

from typing import NamedTuple

import torch

from model.network import MultiExitNet
from model.preprocess import Preprocess
from training.data import DataError, Images
from training.distributed import Processes

BATCH = 1000
"""The most images at once."""


class Accuracy(NamedTuple):
    """Shares of images that are classified right."""

    exits: tuple[float, ...]
    """Of each exit by itself, shallow to deep."""
    ensemble: float
    """Of the mean of all exits' logits."""
    images: int


@torch.inference_mode()
def evaluate(
    net: MultiExitNet,
    images: Images,
    preprocess: Preprocess,
    processes: Processes,
    batch_size: int = BATCH,
) -> Accuracy:
    """Run the network in eval mode and fp32 over all images, each process its share.

    Raises:
        DataError: none of them could be read.
    """
    net.eval()
    right = torch.zeros(net.exits + 2, dtype=torch.long, device=processes.device)
    indices = processes.share(torch.arange(len(images))).split(min(batch_size, BATCH))
    for pixels, class_ids in images.batches(indices):
        x = preprocess.normalise(pixels.to(processes.device, non_blocking=True))
        exits = torch.stack(net(x), dim=1)
        answers = torch.cat([exits, exits.mean(1, keepdim=True)], dim=1).argmax(-1)
        matches = (answers == class_ids.to(processes.device)[:, None]).sum(0)
        right += torch.cat([matches, matches.new_tensor([len(class_ids)])])
    *counts, n = processes.sum(right).tolist()
    if n == 0:
        raise DataError(f"none of {len(images)} images could be read to measure accuracy on")
    shares = [count / n for count in counts]
    return Accuracy(tuple(shares[:-1]), shares[-1], n)
