"""Calibrations fitted to logits by maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from model.confidence import judge, score
from model.policy import Calibration, Measure

RIDGE = 1.0
"""Weight, in images, of the prior that a confidence is the score itself."""


def fit_calibrations(
    logits: Tensor, class_ids: Tensor, measure: Measure, ensemble: bool
) -> list[Calibration]:
    """Fit every exit's calibration, shallow to deep.

    Args:
        logits: fp32 `[N, exits, classes]`.
        class_ids: int64 `[N]`.
        measure: what confidences are made from.
        ensemble: whether answers come from all exits passed so far.
    """
    calibrations: list[Calibration] = []
    passed: Tensor | None = None
    for exit in range(logits.shape[1]):
        own = logits[:, exit]
        temperature, carry = _fit_answer(own, passed if ensemble else None, class_ids)
        alone = _fit_answer(own, None, class_ids)[0] if carry else temperature
        answer = Calibration(temperature=temperature, carry=carry, alone=alone)
        judgement = judge(own, passed, answer, measure)
        if measure is not Measure.PROBABILITY:  # which is calibrated by its temperature
            right = judgement.probabilities.argmax(dim=1) == class_ids
            sureness = score(measure, judgement.probabilities, passed)
            slope, offset = _fit_confidence(sureness, right.float())
            answer = answer.model_copy(update={"slope": slope, "offset": offset})
        calibrations.append(answer)
        passed = judgement.log_probabilities
    return calibrations


def _fit_answer(logits: Tensor, passed: Tensor | None, class_ids: Tensor) -> tuple[float, float]:
    """Temperature and carry that give the labels the highest likelihood: a convex problem."""

    def loss(w: Tensor) -> Tensor:
        own = w[0] * logits
        return F.cross_entropy(own if passed is None else own + w[1] * passed, class_ids)

    start, bounds = [1.0, 0.5], [(1e-3, None), (0.0, None)]
    parts = 1 if passed is None else 2
    found = _minimise(loss, start[:parts], bounds[:parts])
    return 1 / found[0], sum(found[1:])


def _fit_confidence(sureness: Tensor, right: Tensor) -> tuple[float, float]:
    """Slope and offset of the log-odds of being right (Platt 1999), both fp32 `[N]`."""
    prior = torch.tensor([1.0, 0.0])

    def loss(w: Tensor) -> Tensor:
        likelihood = F.binary_cross_entropy_with_logits(w[0] * sureness + w[1], right)
        return likelihood + RIDGE * (w - prior).square().sum() / len(right)

    slope, offset = _minimise(loss, prior.tolist(), [(1e-3, None), (None, None)])
    return slope, offset


def _minimise(
    loss: Callable[[Tensor], Tensor],
    start: Sequence[float],
    bounds: Sequence[tuple[float | None, float | None]],
) -> list[float]:
    def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(w, dtype=torch.float32, requires_grad=True)
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.double().numpy()

    found = minimize(
        value_and_gradient, np.array(start), jac=True, method="L-BFGS-B", bounds=bounds
    )
    return [float(w) for w in found.x]
