"""What one of several processes on one card does in the test of synchronised normalisation."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.training.conftest import PREPROCESS, image_set, tiny_net, tiny_recipe
from training.distributed import Processes
from training.losses import total
from training.objective import objective
from training.student import Student


def fresh(device):
    return Student(tiny_net(), adapt=True).to(device).to(memory_format=torch.channels_last)


def step_of(mine, student, forward):
    """Gradients and running statistics after one batch, in exact fp32."""
    batch, images = mine.share(torch.arange(16)), image_set(16)
    x = PREPROCESS.normalise(images.pixels[batch].to(mine.device))
    target = images.class_ids[batch].to(mine.device)
    student.train()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        terms = objective(tiny_recipe(feature_weight=0.1), forward(x), target)
        total(terms).backward()
    return {
        "gradients": {n: p.grad.cpu() for n, p in student.named_parameters()},
        "state": {n: b.cpu() for n, b in student.named_buffers()},
        "synchronised": any(isinstance(m, nn.SyncBatchNorm) for m in student.modules()),
    }


def main(backend, device, folder):
    device = torch.device(device)
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    mine = Processes(device, dist.get_rank(), dist.get_world_size())
    student = fresh(device)
    # One process is wrapped as one of several are, to have what they use run at all.
    wrapped = Processes(device, mine.rank, max(2, mine.count)).wrapped(student)
    torch.save(step_of(mine, student, wrapped), folder / f"rank{mine.rank}.pt")
    mine.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
