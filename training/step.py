"""One step of gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from training.captured import Captured, Gradients
from training.losses import Terms, total
from training.objective import objective
from training.run import Run
from training.student import StudentOutputs
from training.work import Work

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def take_step(run: Run, gradients: Gradients, pixels: Tensor, target: Tensor) -> Tensor:
    """Descend once; returns the terms' values, fp32 `[terms]`.

    Args:
        run: the state to move.
        gradients: leaves those of the batch.
        pixels: augmented, uint8 `[N, H, W, 3]`, this process's share.
        target: class ids int64 `[N]`, or probabilities fp32 `[N, classes]`.
    """
    values = gradients(pixels, target)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average:
        run.average.update(run.net)
    return values


def gradients_of(run: Run, work: Work) -> Gradients:
    """What a step begins with: it leaves the gradients of a batch and gives its terms."""

    def gradients(pixels: Tensor, target: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        parts = work.recipe.accumulate
        chunks = list(zip(pixels.chunk(parts), target.chunk(parts), strict=True))
        values = torch.zeros((), device=pixels.device)
        for i, (some, targets) in enumerate(chunks):
            share = len(some) / len(pixels)
            with _without_exchange(work.forward) if i + 1 < len(chunks) else nullcontext():
                terms = _terms(work, some, targets)
                run.scaler.scale(total(terms) * share).backward()
            run.names = list(terms)
            values = values + share * torch.stack([t.detach() for t in terms.values()])
        return values

    return Captured(gradients, work.record) if work.record else gradients


def _terms(work: Work, pixels: Tensor, target: Tensor) -> Terms:
    dtype = DTYPES[work.recipe.precision]
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        outputs = work.forward(work.preprocess.normalise(pixels))
        teacher = work.teacher(pixels) if work.teacher else None
    return objective(work.recipe, outputs, target, work.class_weights, teacher)


def _without_exchange(forward: Callable[..., StudentOutputs]) -> AbstractContextManager[None]:
    """Gradients of all parts but the last stay in their process."""
    whole = getattr(forward, "_orig_mod", forward)  # what torch.compile hides
    if isinstance(whole, nn.parallel.DistributedDataParallel):
        return whole.no_sync()
    return nullcontext()
