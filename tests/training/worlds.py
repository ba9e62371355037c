"""Imagined networks: logits of many images at several exits, deeper ones being better."""

import numpy as np
import torch

from model.policy import Measure
from training.fit import fit_calibrations
from training.outcomes import outcomes_of


def world(n, seed=0, exits=4, classes=10):
    """Logits fp32 `[n, exits, classes]`, class ids `[n]`: easy and hard images, shared noise."""
    rng = np.random.default_rng(seed)
    class_ids = rng.integers(0, classes, n)
    ease = rng.gamma(2.0, 2.0, n)
    truth = np.eye(classes)[class_ids] * ease[:, None]
    shared = rng.normal(size=(n, classes))
    logits = [
        (0.7 + 0.3 * k / exits) * truth
        + shared
        + (1.0 - 0.6 * k / exits) * rng.normal(size=(n, classes))
        for k in range(exits)
    ]
    return torch.tensor(np.stack(logits, axis=1), dtype=torch.float32), torch.tensor(class_ids)


def judged(n, seed=0, measure=Measure.MARGIN, ensemble=True, **shape):
    """Outcomes of an imagined network's images, calibrated on 1,000 others of its images."""
    logits, class_ids = world(n + 1000, seed, **shape)
    calibrations = fit_calibrations(logits[:1000], class_ids[:1000], measure, ensemble)
    return outcomes_of(logits[1000:], class_ids[1000:], calibrations, measure)
