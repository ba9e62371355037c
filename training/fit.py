"""Calibrations fitted to logits by maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from model.confidence import judge, scores
from model.policy import Calibration, Measure

MOST_IMAGES = 20_000
"""Enough to fit a handful of parameters; more only takes longer."""
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
    logits, class_ids = logits[:MOST_IMAGES], class_ids[:MOST_IMAGES]
    calibrations: list[Calibration] = []
    passed: Tensor | None = None
    for exit in range(logits.shape[1]):
        carried = passed if ensemble else None
        temperature, carry = _fit_answer(logits[:, exit], carried, class_ids)
        alone = temperature if carried is None else _fit_answer(logits[:, exit], None, class_ids)[0]
        answer = Calibration(
            temperature=temperature, carry=carry, alone=alone, coefficients=_prior(measure)
        )
        calibrations.append(_fit_confidence(logits[:, exit], passed, class_ids, answer, measure))
        passed = judge(logits[:, exit], passed, calibrations[-1], measure).state
    return calibrations


def _fit_answer(logits: Tensor, passed: Tensor | None, class_ids: Tensor) -> tuple[float, float]:
    """Temperature and carry that give the labels the highest likelihood: a convex problem."""

    def loss(w: Tensor) -> Tensor:
        own = w[0] * logits
        return F.cross_entropy(own if passed is None else own + w[1] * passed, class_ids)

    start, bounds = [1.0, 0.5], [(1e-3, None), (0.0, None)]
    parts = 1 if passed is None else 2
    found = _minimise(loss, np.array(start[:parts]), bounds[:parts])
    return 1 / found[0], sum(found[1:])


def _fit_confidence(
    logits: Tensor,
    passed: Tensor | None,
    class_ids: Tensor,
    answer: Calibration,
    measure: Measure,
) -> Calibration:
    """Logistic regression of "the answer is right" on the measure's scores (Platt 1999)."""
    if measure is Measure.PROBABILITY:
        return answer
    judgement = judge(logits, passed, answer, measure)
    right = (judgement.probabilities.argmax(dim=1) == class_ids).float()
    score = scores(measure, judgement.probabilities, passed)
    design = torch.cat([score, torch.ones(len(score), 1)], dim=1)
    prior = torch.tensor([*_prior(measure), 0.0])

    def loss(w: Tensor) -> Tensor:
        likelihood = F.binary_cross_entropy_with_logits(design @ w, right)
        return likelihood + RIDGE * (w - prior).square().sum() / len(right)

    *coefficients, offset = _minimise(loss, prior.numpy())
    return answer.model_copy(update={"coefficients": tuple(coefficients), "offset": offset})


def _prior(measure: Measure) -> tuple[float, ...]:
    return (1.0,) + (0.0,) * (measure.scores - 1)


def _minimise(
    loss: Callable[[Tensor], Tensor],
    start: np.ndarray,
    bounds: Sequence[tuple[float, None]] | None = None,
) -> list[float]:
    def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(w, dtype=torch.float32, requires_grad=True)
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.double().numpy()

    found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return [float(w) for w in found.x]
