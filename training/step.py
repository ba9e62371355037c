"""One step of gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from training.augment import augment
from training.losses import Terms, total
from training.objective import objective
from training.run import Run
from training.seeds import generator_of
from training.student import StudentOutputs
from training.work import Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def take_step(run: Run, work: Work, step: int, pixels: Tensor, class_ids: Tensor) -> Tensor:
    """Descend once; returns the terms' values, fp32 `[terms]`.

    Args:
        run: the state to move.
        work: what does not change.
        step: of the whole run, which all randomness comes from.
        pixels: uint8 `[N, H, W, 3]`, this process's share.
        class_ids: int64 `[N]`.
    """
    recipe, rank = work.recipe, work.processes.rank
    generator = generator_of(pixels.device, recipe.seed, "augment", step, rank)
    pixels, target = augment(pixels, class_ids, len(work.training.classes), recipe, generator)
    run.optimizer.zero_grad()
    parts = list(zip(pixels.chunk(recipe.accumulate), target.chunk(recipe.accumulate), strict=True))
    values = torch.zeros((), device=pixels.device)
    for i, (some, targets) in enumerate(parts):
        share = len(some) / len(pixels)
        with _without_exchange(work.forward) if i + 1 < len(parts) else nullcontext():
            terms = _terms(work, some, targets)
            run.scaler.scale(total(terms) * share).backward()
        run.names = list(terms)
        values = values + share * torch.stack([t.detach() for t in terms.values()])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average:
        run.average.update(run.net)
    return values


def _terms(work: Work, pixels: Tensor, target: Tensor) -> Terms:
    dtype = DTYPES[work.recipe.precision]
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        outputs = work.forward(work.preprocess.normalise(pixels))
        teacher = work.teacher(pixels) if work.teacher else None
    return objective(work.recipe, outputs, target, work.class_weights, teacher)


def _without_exchange(forward: Callable[..., StudentOutputs]) -> AbstractContextManager[None]:
    """Gradients of all parts but the last stay in their process."""
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        return forward.no_sync()
    return nullcontext()
