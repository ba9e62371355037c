"""What one of two processes does in the tests of several processes."""

import signal
import sys
from pathlib import Path

import torch

from tests.training.conftest import PREPROCESS, image_set, tiny_net, tiny_recipe
from training.accuracy import evaluate
from training.checkpoint import resume
from training.distributed import processes
from training.interrupt import Interrupted
from training.loop import fit
from training.losses import total
from training.objective import objective
from training.run import start
from training.student import Student
from training.work import Work


def gradients(mine):
    """Of one batch shared by all, batch statistics frozen so that shards do not differ by them."""
    student = Student(tiny_net(), adapt=True).eval()
    forward = mine.wrapped(student)
    batch = mine.share(torch.arange(16))
    images = image_set(16)
    outputs = forward(PREPROCESS.normalise(images.pixels[batch]))
    recipe = tiny_recipe(feature_weight=0.1)
    total(objective(recipe, outputs, images.class_ids[batch])).backward()
    return {n: p.grad for n, p in student.named_parameters()}


class Watching:
    """Images that note a running statistic of the network that they are given to."""

    def __init__(self, net):
        self.net = net
        self.images = image_set(25)
        self.seen = []

    def __len__(self):
        return len(self.images)

    def batches(self, indices):
        self.seen.append(self.net.backbone.bn1.running_mean.clone())
        return self.images.batches(indices)


def work_of(mine, folder, after_step=lambda step: None):
    """A run with its work, averaged weights and all."""
    recipe = tiny_recipe(accumulate=2, ema=0.5)
    folder.mkdir(exist_ok=True)
    run = start(tiny_net(), recipe, mine.device)
    work = Work(
        recipe=recipe,
        training=image_set(),
        validation=Watching(run.net),
        preprocess=PREPROCESS,
        folder=folder,
        origin={},
        processes=mine,
        forward=mine.wrapped(run.student),
        after_step=after_step,
    )
    return run, work


def trained(mine, folder):
    """A whole run; every process's weights must end the same."""
    run, work = work_of(mine, folder)
    fit(run, work)
    return run, work.validation.seen


def trained_in_parts(mine, folder):
    """The same run, stopped by a signal to the second process alone, and resumed."""

    def stop(step):
        if mine.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    run, work = work_of(mine, folder, stop)
    try:
        fit(run, work)
    except Interrupted as left:
        said = str(left)
    run, work = work_of(mine, folder)
    resume(run, work.recipe, work.origin, folder)
    fit(run, work)
    return run, said


def main(folder):
    with processes("cpu") as mine:
        found = gradients(mine)
        accuracy = evaluate(tiny_net(), image_set(25), PREPROCESS, mine)
        run, validated = trained(mine, folder / "whole")
        resumed, said = trained_in_parts(mine, folder / "parts")
        flags = [mine.any(False), mine.any(mine.rank == 1)]
        state = {
            "gradients": found,
            "accuracy": accuracy.exits,
            "images": accuracy.images,
            "weights": dict(run.net.named_parameters()),
            "flags": flags,
            "history": run.history,
            "validated": validated,
            "resumed": dict(resumed.net.named_parameters()),
            "resumed_history": resumed.history,
            "said": said,
            "lines": mine.gather([f"of {mine.rank}", "of both"]),
        }
        torch.save(state, folder / f"rank{mine.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
