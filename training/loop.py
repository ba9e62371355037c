"""The training loop: restartable at any step, exactly reproducible from its seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.preprocess import Preprocess
from training.accuracy import Accuracy, evaluate
from training.augment import augment
from training.checkpoint import Origin, save_checkpoint
from training.data import Images
from training.distributed import Processes
from training.interrupt import Interrupted, Request, requests
from training.log import Bar, Entry, Scalars, write_log
from training.losses import Terms, total
from training.objective import objective
from training.recipe import Recipe
from training.run import Run, TrainingError
from training.schedule import pace
from training.seeds import generator_of, seed_of
from training.student import StudentOutputs
from training.teacher import Teacher
from training.watch import Watch

CHECK_EVERY = 50
"""Steps between looks at the loss: a device that is asked too often waits."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Work:
    """What a run trains on; nothing here changes."""

    recipe: Recipe
    training: Images
    validation: Images
    preprocess: Preprocess
    folder: Path
    origin: Origin
    processes: Processes
    forward: Callable[..., StudentOutputs]
    """The student, perhaps wrapped or compiled."""
    class_weights: Tensor | None = None
    teacher: Teacher | None = None
    after_step: Callable[[int], None] = lambda step: None
    """Called with each step that was done."""

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches; the rest of an epoch's images waits for another."""
        return len(self.training) // self.recipe.batch_size


def fit(run: Run, work: Work) -> Accuracy:
    """Train to the recipe's last epoch, with a checkpoint and a log entry after each.

    Returns:
        Validation accuracy after the last epoch.

    Raises:
        TrainingError: the loss became NaN or infinite, or there is less than one batch.
        Interrupted: a signal came; the run is saved.
    """
    recipe, processes, per_epoch = work.recipe, work.processes, work.steps_an_epoch
    if per_epoch == 0:
        raise TrainingError(
            f"{len(work.training)} images are fewer than one batch of {recipe.batch_size}; "
            "lower --batch-size"
        )
    done = run.epoch * per_epoch + run.step
    bar = Bar(recipe.epochs * per_epoch, done, processes.first)
    scalars = Scalars(work.folder, run.epoch) if processes.first else None
    try:
        with requests() as request:
            while run.epoch < recipe.epochs:
                entry = _epoch(run, work, bar, request)
                run.end_epoch(entry)
                save(run, work)
                if scalars:
                    scalars.write(entry)
                bar.epoch(entry, recipe.epochs)
                if run.epoch < recipe.epochs:
                    _leave_if_asked(run, work, request, bar)
    finally:
        bar.close()
        if scalars:
            scalars.close()
    return validate(run, work, work.validation)


def validate(run: Run, work: Work, images: Images) -> Accuracy:
    """Accuracy of the weights that the run would keep now."""
    with run.average.applied(run.net) if run.average else nullcontext():
        return evaluate(run.net, images, work.preprocess, work.processes)


def save(run: Run, work: Work) -> None:
    """Write the checkpoint and the log, from the first process."""
    if work.processes.first:
        save_checkpoint(run, work.recipe, work.origin, work.folder)
        write_log(run.history, work.folder)
    work.processes.wait()


def _epoch(run: Run, work: Work, bar: Bar, request: Request) -> Entry:
    """Run the rest of the present epoch; returns its log entry."""
    recipe, device, per_epoch = work.recipe, work.processes.device, work.steps_an_epoch
    watch, began, first = Watch(device), time.perf_counter(), run.step
    run.student.train()
    for pixels, class_ids in _batches(run, work):
        step = run.epoch * per_epoch + run.step
        rate, momentum = pace(recipe, step, recipe.epochs * per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"], group["momentum"] = rate, momentum
        values = _step(run, work, step, pixels.to(device), class_ids.to(device))
        watch.note(step, values)
        run.sums = values if run.sums is None else run.sums + values
        run.step += 1
        bar.step()
        if run.step % CHECK_EVERY == 1 or run.step == per_epoch:
            watch.check(run.names)
            bar.loss(run.epoch + 1, float(values.sum()))
        work.after_step(step)
        if run.step < per_epoch:
            _leave_if_asked(run, work, request, bar, watch)
    seconds = time.perf_counter() - began
    assert run.sums is not None
    means = work.processes.sum(run.sums) / (work.processes.count * per_epoch)
    accuracy = validate(run, work, work.validation)
    return {
        "epoch": run.epoch + 1,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "loss": {n: round(v, 4) for n, v in zip(run.names, means.tolist(), strict=True)},
        "validation_accuracy": [round(a, 4) for a in accuracy.exits],
        "ensemble_accuracy": round(accuracy.ensemble, 4),
        "images_per_second": round((per_epoch - first) * recipe.batch_size / seconds, 1),
        "seconds": round(seconds, 1),
    }


def _batches(run: Run, work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """What is left of the present epoch, this process's share of each batch."""
    recipe = work.recipe
    order = torch.randperm(
        len(work.training),
        generator=generator_of(torch.device("cpu"), recipe.seed, "order", run.epoch),
    )
    whole = order.split(recipe.batch_size)[run.step : work.steps_an_epoch]
    return work.training.batches([work.processes.share(b) for b in whole], draw=run.epoch)


def _step(run: Run, work: Work, step: int, pixels: Tensor, class_ids: Tensor) -> Tensor:
    """One step of gradient descent; returns the terms' values, fp32 `[terms]`."""
    recipe, rank = work.recipe, work.processes.rank
    generator = generator_of(pixels.device, recipe.seed, "augment", step, rank)
    torch.manual_seed(seed_of(recipe.seed, "dropout", step, rank))
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


def _leave_if_asked(
    run: Run, work: Work, request: Request, bar: Bar, watch: Watch | None = None
) -> None:
    processes = work.processes
    if processes.count > 1 and run.step % CHECK_EVERY:  # asking all of them costs each a wait
        return
    if not processes.any(request.signal is not None):
        return
    if watch:
        watch.check(run.names)
    save(run, work)
    name = request.signal.name if request.signal else "a signal to another process"
    raise Interrupted(
        f"stopped by {name} in epoch {run.epoch + 1} after {run.step} of {work.steps_an_epoch} "
        f"steps; saved in {work.folder}, go on with --resume",
        request.status,
    )
