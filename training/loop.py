"""The training loop: restartable at any step, exactly reproducible from its seed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from training.accuracy import Accuracy, evaluate
from training.augment import augment
from training.captured import Gradients
from training.checkpoint import save_checkpoint
from training.data import Images
from training.interrupt import Interrupted, Leaving, requests
from training.log import Bar, Entry, Scalars, write_log
from training.run import Run, TrainingError
from training.schedule import pace
from training.seeds import generator_of
from training.step import gradients_of, take_step
from training.watch import Watch, check_weights
from training.work import Work

CHECK_EVERY = 50
"""Steps between looks at the loss: a device that is asked too often waits."""


def fit(run: Run, work: Work) -> Accuracy:
    """Train to the recipe's last epoch, with a log entry after each and a checkpoint if due.

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
    gradients = gradients_of(run, work)
    try:
        with requests() as request:
            leaving, saved = Leaving(request, processes, done), -math.inf
            while run.epoch < recipe.epochs:
                first, earlier = run.step, run.seconds
                _take_steps(run, work, gradients, bar, leaving)
                saved = _save_if_due(run, work, saved)  # before validation, which may take long
                entry = _entry(run, work, first, earlier)
                run.end_epoch(entry)
                _keep(run, work)
                if scalars:
                    scalars.write(entry)
                bar.epoch(entry, recipe.epochs)
                if run.epoch < recipe.epochs:
                    _leave_if_asked(run, work, leaving)
    finally:
        bar.close()
        if scalars:
            scalars.close()
    return validate(run, work, work.validation)


def validate(run: Run, work: Work, images: Images) -> Accuracy:
    """Accuracy of the weights that the run would keep now, on as many at once as in training."""
    recipe, processes = work.recipe, work.processes
    parts = recipe.accumulate * processes.count
    at_once = max(1, recipe.batch_size * work.steps_at_once // parts)
    with run.average.applied(run.net) if run.average else nullcontext():
        processes.align(run.net)
        return evaluate(run.net, images, work.preprocess, processes, at_once)


def _save_if_due(run: Run, work: Work, saved: float) -> float:
    """Save after an epoch's steps, unless it was done a moment ago; returns when it was."""
    now = time.monotonic()
    if work.processes.any(now - saved >= work.save_seconds):
        save(run, work)
        return now
    check_weights(run.student)
    return saved


def _keep(run: Run, work: Work) -> None:
    """Keep what is known of an epoch: in the log, and after the last one with the weights."""
    if run.epoch == work.recipe.epochs:
        save(run, work)
    elif work.processes.first:
        write_log(run.history, work.folder)


def save(run: Run, work: Work) -> None:
    """Write the checkpoint and the log, from the first process.

    Raises:
        TrainingError: the weights became NaN or infinite; what was saved before stays.
    """
    check_weights(run.student)
    if run.sums is not None:  # every process goes on from the first one's
        run.sums = work.processes.sum(run.sums) / work.processes.count
    if work.processes.first:
        save_checkpoint(run, work.recipe, work.origin, work.folder)
        write_log(run.history, work.folder)
    work.processes.wait()


def _take_steps(run: Run, work: Work, gradients: Gradients, bar: Bar, leaving: Leaving) -> None:
    """Take the rest of the present epoch's steps."""
    recipe, per_epoch = work.recipe, work.steps_an_epoch
    watch, began = Watch(work.processes.device), time.perf_counter()
    earlier = run.seconds
    run.student.train()
    for pixels, target in _batches(run, work):
        step = run.epoch * per_epoch + run.step
        rate, momentum = pace(recipe, step, recipe.epochs * per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"], group["momentum"] = rate, momentum
        values = take_step(run, gradients, pixels, target)
        watch.note(step, values)
        run.sums = values if run.sums is None else run.sums + values
        run.step += 1
        bar.step()
        if run.step % CHECK_EVERY == 1 or run.step == per_epoch:
            watch.check(run.names)
            bar.loss(run.epoch + 1, float(values.sum()))
        work.after_step(step)
        run.seconds = earlier + time.perf_counter() - began
        if run.step < per_epoch or run.epoch + 1 < recipe.epochs:
            _leave_if_asked(run, work, leaving, watch)


def _entry(run: Run, work: Work, first: int, earlier: float) -> Entry:
    """The log entry of an epoch whose steps were taken, with its validation.

    Args:
        first: the step that it, or the rest of it, began with, by which its speed is measured.
        earlier: the seconds that it had taken by then.
    """
    assert run.sums is not None
    per_epoch = work.steps_an_epoch
    means = work.processes.sum(run.sums) / (work.processes.count * per_epoch)
    if first == per_epoch:  # it was resumed after its last step
        first, earlier = 0, 0.0
    images = (per_epoch - first) * work.recipe.batch_size
    accuracy = validate(run, work, work.validation)
    return {
        "epoch": run.epoch + 1,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "loss": {n: round(v, 4) for n, v in zip(run.names, means.tolist(), strict=True)},
        "validation_accuracy": [round(a, 4) for a in accuracy.exits],
        "ensemble_accuracy": round(accuracy.ensemble, 4),
        "images_per_second": round(images / (run.seconds - earlier), 1),
        "seconds": round(run.seconds, 1),
    }


def _batches(run: Run, work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """What is left of the present epoch, augmented: this process's share of each batch.

    Batches that are augmented together begin at the same steps, wherever a run was resumed.
    """
    recipe, at_once, device = work.recipe, work.steps_at_once, work.processes.device
    order = torch.randperm(
        len(work.training),
        generator=generator_of(torch.device("cpu"), recipe.seed, "order", run.epoch),
    )
    whole = order.split(recipe.batch_size)[: work.steps_an_epoch]
    shares = [work.processes.share(batch) for batch in whole]
    done = run.step % at_once
    starts = range(run.step - done, len(shares), at_once)
    blocks = [torch.cat(shares[i : i + at_once]) for i in starts]
    images = work.training.batches(blocks, draw=run.epoch)
    for start, (pixels, class_ids) in zip(starts, images, strict=True):
        steps = min(at_once, len(shares) - start)
        step = run.epoch * len(shares) + start
        generator = generator_of(device, recipe.seed, "augment", step, work.processes.rank)
        pixels, target = augment(
            pixels.to(device, non_blocking=True),
            class_ids.to(device, non_blocking=True),
            len(work.training.classes),
            recipe,
            generator,
        )
        yield from list(zip(pixels.chunk(steps), target.chunk(steps), strict=True))[done:]
        done = 0


def _leave_if_asked(run: Run, work: Work, leaving: Leaving, watch: Watch | None = None) -> None:
    if not leaving.now(run.epoch * work.steps_an_epoch + run.step, waited=run.step == 0):
        return
    if watch:
        watch.check(run.names)
    save(run, work)
    request = leaving.request
    name = request.signal.name if request.signal else "a signal to another process"
    raise Interrupted(
        f"stopped by {name} in epoch {run.epoch + 1} after {run.step} of {work.steps_an_epoch} "
        f"steps; saved in {work.folder}, go on with --resume",
        request.status,
    )
