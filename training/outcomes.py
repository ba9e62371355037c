"""What every image of a set would be answered at every exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from model.confidence import judge
from model.policy import Calibration, Measure, suffices


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Answers and confidences of N images at E exits, shallow to deep."""

    confidence: np.ndarray
    """float64 `[N, E]` in 0..1."""
    answers: np.ndarray
    """int64 `[N, E]`: class ids."""
    right: np.ndarray
    """bool `[N, E]`: whether the answer is the image's class."""
    belief: np.ndarray
    """float64 `[N, E]` in 0..1: the full network's probability of each exit's answer."""

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def exits(self) -> int:
        return self.answers.shape[1]

    def pick(self, indices: np.ndarray) -> Outcomes:
        """The outcomes of these images alone."""
        kept = (getattr(self, field.name)[indices] for field in fields(self))
        return Outcomes(*kept)

    def taken(self, thresholds: Sequence[float]) -> np.ndarray:
        """The exit, 1..E, that each image leaves at under these thresholds: int64 `[N]`."""
        taken = np.full(len(self), self.exits)
        for exit in range(self.exits - 1, 0, -1):
            taken[suffices(self.confidence[:, exit - 1], thresholds[exit - 1])] = exit
        return taken

    def right_at(self, taken: np.ndarray) -> np.ndarray:
        """Whether each image is answered right when it leaves at `taken`: bool `[N]`."""
        return self.right[np.arange(len(self)), taken - 1]

    def differences(self, taken: np.ndarray) -> np.ndarray:
        """+1 where only the full network is right, -1 where only the early answer is: `[N]`."""
        return self.right[:, -1].astype(np.int64) - self.right_at(taken)

    def against_full_network(self) -> Outcomes:
        """The same, with the full network's answer in the place of the truth: needs no labels."""
        same = self.answers == self.answers[:, -1:]
        return replace(self, right=same, belief=same.astype(float))


def outcomes_of(
    logits: Tensor, class_ids: Tensor, calibrations: Sequence[Calibration], measure: Measure
) -> Outcomes:
    """Judge logits `[N, E, classes]` of images with these class ids `[N]`, as the server does."""
    confidences, answers, passed = [], [], None
    for exit, calibration in enumerate(calibrations):
        judgement = judge(logits[:, exit], passed, calibration, measure)
        confidences.append(judgement.confidence.double().numpy())
        answers.append(judgement.probabilities.argmax(dim=1).numpy())
        passed = judgement.log_probabilities
    stacked = np.stack(answers, axis=1)
    right = stacked == class_ids.numpy()[:, None]
    belief = judgement.probabilities.gather(1, torch.from_numpy(stacked)).double().numpy()
    return Outcomes(np.stack(confidences, axis=1), stacked, right, belief)


def shares(taken: np.ndarray, exits: int) -> np.ndarray:
    """Share of images that leave at each exit: float64 `[exits]`."""
    return np.bincount(taken - 1, minlength=exits) / len(taken)
