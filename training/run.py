"""All that changes while training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.network import MultiExitNet
from training.ema import Average
from training.recipe import NEXT, Recipe
from training.student import Student


class TrainingError(Exception):
    """A run that cannot go on; the message says why."""


@dataclass(slots=True)
class Run:
    """The state of training; a checkpoint holds exactly this."""

    student: Student
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None = None
    epoch: int = 0
    """Epochs that are complete."""
    step: int = 0
    """Steps of the next epoch that are done."""
    names: list[str] = field(default_factory=list)
    """Of the loss terms."""
    sums: Tensor | None = None
    """Of the loss terms over those steps, fp32 `[terms]`."""
    seconds: float = 0.0
    """Spent on those steps, those before a resume included."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each complete epoch."""

    @property
    def net(self) -> MultiExitNet:
        """The network that is trained."""
        return self.student.net

    def end_epoch(self, entry: dict[str, Any]) -> None:
        """Note a complete epoch."""
        self.history.append(entry)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, None, 0.0


def start(net: MultiExitNet, recipe: Recipe, device: torch.device) -> Run:
    """Move a network to its device with fresh adaptation layers, an optimizer, an average."""
    adapt = recipe.own_feature_weight > 0
    student = Student(net, recipe.equilibrium, adapt, recipe.distill_from == NEXT)
    student.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        _parameter_groups([net, student.adapters], recipe),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        foreach=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    average = Average(net, recipe.ema) if recipe.ema else None
    return Run(student, optimizer, scaler, average)


def _parameter_groups(modules: list[nn.Module], recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay on weights; on biases and normalisation only where the recipe says so."""
    parameters = [p for m in modules for p in m.parameters()]
    rest = recipe.weight_decay if recipe.decay_all else 0.0
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": rest},
    ]
