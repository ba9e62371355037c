"""The processes of one run, one for each device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all of its run."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch of indices that all of them know."""
        return batch[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Add up over processes."""
        if self.count == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def gather(self, lines: Sequence[str]) -> list[str]:
        """The lines of all processes, each once, in the order of processes."""
        if self.count == 1:
            return list(dict.fromkeys(lines))
        every: list[list[str]] = [[] for _ in range(self.count)]
        dist.all_gather_object(every, list(lines))
        return list(dict.fromkeys(line for some in every for line in some))

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return bool(self.sum(torch.tensor(int(flag))).item()) if self.count > 1 else flag

    def wrapped(self, net: nn.Module) -> nn.Module:
        """A module whose gradients are averaged over processes.

        On CUDA batch normalisation then looks at the whole batch; on the CPU, where torch has no
        such layer, each process at its share, while running statistics are the first process's.
        """
        if self.count == 1:
            return net
        # A 1x1 convolution's gradient has two names for one layout, which is all it warns of.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        if self.device.type == "cpu":
            return nn.parallel.DistributedDataParallel(net)
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return nn.parallel.DistributedDataParallel(net, device_ids=[self.device.index])

    def align(self, net: nn.Module) -> None:
        """Give every process the first one's running statistics, which are those that are kept."""
        if self.count > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the run that `torchrun` started, or be its only process.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA where there is a card.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    count, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = _device(device, local)
    if count == 1:
        yield Processes(place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
        # Told its card, a process need not guess it at the first barrier.
        dist.init_process_group("nccl", device_id=place)
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes(place, dist.get_rank(), count)
        # Leave together: DDP keeps gloo's threads past the group's end, and a process that left
        # right after a collective died where such a thread let go of its tensor (pytorch#190489).
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _device(name: str, local: int) -> torch.device:
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ValueError("there is no CUDA device; leave --device out or say cpu")
    return torch.device("cuda", local) if cuda and name != "cpu" else torch.device("cpu")
