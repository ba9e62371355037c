"""Stage times measured on this device."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from model.bundle import Bundle
from model.confidence import judge
from model.fold import fold_stages
from model.numerics import carrier
from model.policy import Calibration, Measure
from training.logits import serving_device

WARM_UP = 5
REPETITIONS = 40
CALIBRATION = Calibration(temperature=1.0, carry=0.5)
"""Any with a carry takes equally long."""


@torch.inference_mode()
def stage_seconds(bundle: Bundle, dtype: torch.dtype) -> np.ndarray:
    """Seconds to leave at each exit, earlier stages included: float64 `[exits]`.

    The median of repeated eager passes of one image, each stage folded and with its confidence,
    as a server needs them before it may go on.
    """
    device = serving_device()
    dtype = carrier(dtype)  # eagerly, int8 is only simulated
    stages = nn.ModuleList(fold_stages(bundle.net)).to(device, dtype)
    stages = stages.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = bundle.description.preprocess.size
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device)
    passes = []
    for _ in tqdm(range(WARM_UP + REPETITIONS), "timing stages", leave=False, disable=None):
        x, passed = bundle.description.preprocess.normalise(pixels, dtype), None
        times = []
        for stage in stages:
            began = time.perf_counter()
            x, logits = stage(x)
            judgement = judge(logits, passed, CALIBRATION, Measure.MARGIN)
            passed = judgement.log_probabilities
            judgement.confidence.tolist()  # waits for the device
            times.append(time.perf_counter() - began)
        passes.append(times)
    return np.cumsum(np.median(passes[WARM_UP:], axis=0))
