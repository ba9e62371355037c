"""The training loop: restartable, and exactly reproducible from its seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.network import MultiExitNet
from model.preprocess import Preprocess
from training.augment import crop_and_flip, cutout
from training.data import ImageSet
from training.losses import self_distillation, total
from training.recipe import Recipe, learning_rate

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class TrainingError(Exception):
    """A run that cannot go on; the message says why."""


@dataclass(slots=True)
class Run:
    """All that changes while training; a checkpoint holds exactly this."""

    net: MultiExitNet
    adapters: nn.ModuleList
    optimizer: torch.optim.Optimizer
    epoch: int = 0


def start(net: MultiExitNet, recipe: Recipe, device: torch.device) -> Run:
    """Move a network to its device with fresh adaptation layers and an optimizer."""
    width = net.head(net.exits).fc.in_features
    adapters = nn.ModuleList(nn.Linear(width, width) for _ in range(net.exits - 1))
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    adapters.to(device)
    optimizer = torch.optim.SGD(
        _parameter_groups([net, adapters], recipe),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
        foreach=True,
    )
    return Run(net, adapters, optimizer)


def _parameter_groups(modules: list[nn.Module], recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay on weights alone; biases and normalisation go without."""
    parameters = [p for m in modules for p in m.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def fit(
    run: Run,
    recipe: Recipe,
    data: ImageSet,
    validation: ImageSet,
    preprocess: Preprocess,
    folder: Path,
) -> list[float]:
    """Train to the recipe's last epoch, with a checkpoint and a log line after each.

    Returns:
        Validation accuracy of every exit after the last epoch.

    Raises:
        TrainingError: the loss became NaN or infinite.
    """
    accuracy: list[float] = []
    for epoch in range(run.epoch, recipe.epochs):
        began = time.perf_counter()
        terms = _epoch(run, recipe, epoch, data, preprocess)
        seconds = time.perf_counter() - began
        accuracy = evaluate(run.net, validation, preprocess)
        run.epoch = epoch + 1
        save_checkpoint(run, recipe, folder)
        line = {
            "epoch": run.epoch,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "loss": {name: round(value, 4) for name, value in terms.items()},
            "validation_accuracy": [round(a, 4) for a in accuracy],
            "images_per_second": round(len(data) / seconds, 1),
            "seconds": round(seconds, 1),
        }
        with (folder / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
        shown = " ".join(f"{a:.1%}" for a in accuracy)
        tqdm.write(f"epoch {run.epoch}/{recipe.epochs}: exits {shown}, {seconds:.0f} s")
    return accuracy or evaluate(run.net, validation, preprocess)


def _epoch(
    run: Run, recipe: Recipe, epoch: int, data: ImageSet, preprocess: Preprocess
) -> dict[str, float]:
    device = next(run.net.parameters()).device
    generator = torch.Generator(device).manual_seed(recipe.seed * 100_003 + epoch)
    per_epoch = len(data) // recipe.batch_size
    if per_epoch == 0:
        raise TrainingError(f"{len(data)} images are fewer than one batch of {recipe.batch_size}")
    run.net.train()
    sums: dict[str, Tensor] = {}
    bar = tqdm(_batches(data, recipe, generator), f"epoch {epoch + 1}", per_epoch, leave=False)
    for i, (pixels, class_ids) in enumerate(bar):
        step = epoch * per_epoch + i
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, per_epoch * recipe.epochs)
        terms = _step(run, recipe, preprocess.normalise(pixels), class_ids)
        for name, value in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value
        if i % 50 == 0:
            _check_finite(terms, step)
            bar.set_postfix(loss=f"{total(terms):.3f}")
    return {name: value.item() / per_epoch for name, value in sums.items()}


def _batches(
    data: ImageSet, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data), generator=generator, device=generator.device)
    for indices in order.split(recipe.batch_size):
        if len(indices) < recipe.batch_size:
            return
        pixels = crop_and_flip(data.pixels[indices], recipe.pad, generator)
        yield cutout(pixels, recipe.cutout, generator), data.class_ids[indices]


def _step(run: Run, recipe: Recipe, x: Tensor, class_ids: Tensor) -> dict[str, Tensor]:
    with torch.autocast(x.device.type, torch.bfloat16):
        logits, pooled = run.net.outputs(x)
        adapted = [a(p) for a, p in zip(run.adapters, pooled, strict=False)]
    terms = self_distillation(
        logits,
        adapted,
        pooled[-1],
        class_ids,
        distillation_weight=recipe.distillation_weight,
        feature_weight=recipe.feature_weight,
        temperature=recipe.temperature,
        smoothing=recipe.label_smoothing,
    )
    run.optimizer.zero_grad()
    total(terms).backward()
    run.optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def _check_finite(terms: dict[str, Tensor], step: int) -> None:
    values = {name: value.item() for name, value in terms.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise TrainingError(f"the loss is not finite at step {step}: {values}")


@torch.inference_mode()
def logits_of(
    net: MultiExitNet, data: ImageSet, preprocess: Preprocess, batch_size: int = 250
) -> Tensor:
    """Logits of every exit for every image, in eval mode and fp32: `[N, exits, classes]`."""
    device = next(net.parameters()).device
    net.eval()
    parts = []
    for pixels in data.pixels.split(batch_size):
        x = preprocess.normalise(pixels.to(device))
        parts.append(torch.stack(net(x), dim=1).float().cpu())
    return torch.cat(parts)


def evaluate(net: MultiExitNet, data: ImageSet, preprocess: Preprocess) -> list[float]:
    """Top-1 accuracy of every exit, shallow to deep."""
    right = logits_of(net, data, preprocess).argmax(-1) == data.class_ids.cpu()[:, None]
    return right.float().mean(0).tolist()


def save_checkpoint(run: Run, recipe: Recipe, folder: Path) -> None:
    """Write the run's state atomically."""
    state = {
        "net": run.net.state_dict(),
        "adapters": run.adapters.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "epoch": run.epoch,
        "recipe": asdict(recipe),
    }
    partial = folder / f".{CHECKPOINT}"
    torch.save(state, partial)
    partial.replace(folder / CHECKPOINT)


def resume(run: Run, recipe: Recipe, folder: Path) -> None:
    """Continue from the folder's checkpoint, exactly where it was written.

    Raises:
        TrainingError: it was written under another recipe.
    """
    state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise TrainingError(f"{folder / CHECKPOINT} was written with {state['recipe']}")
    run.net.load_state_dict(state["net"])
    run.adapters.load_state_dict(state["adapters"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.epoch = state["epoch"]
