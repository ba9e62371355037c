"""One stage as the engine sees it: what the stage before handed on to a judgement of every row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.bundle import Bundle
from model.confidence import Constants, judge
from model.fold import fold_stages
from model.numerics import carrier
from model.policy import Calibration, Measure
from model.preprocess import Preprocess
from model.quantisation import quantised_stages


class Unit(nn.Module):
    """A stage with its head and the confidence calculation; the first with the normalisation too.

    Args:
        stage: features or images to features and logits; in float32.
        calibration: of this exit.
        measure: what the confidence is made from.
        normalise: turns pixels into images; of the first stage only.
        dtype: the stage's numerics; confidences are always fp32.
    """

    def __init__(
        self,
        stage: nn.Module,
        calibration: Calibration,
        measure: Measure,
        normalise: Preprocess | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        # Channels last on both sides, so that no stage converts what another handed on.
        self.stage = stage.to(dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.calibration = calibration
        self.measure = measure
        self.normalise = normalise
        self.dtype = dtype

    def forward(self, x: Tensor, passed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Run and judge a batch.

        Args:
            x: uint8 pixels `[N, H, W, 3]` for the first stage, else features `[N, C, H, W]`.
            passed: what the unit before returned third; None for the first.

        Returns:
            Features for the next stage; fp32 `[N, 1 + classes]` with each row's confidence before
            its probabilities; and their logarithms, fp32 `[N, classes]`, which the next unit takes
            as `passed`.
        """
        if self.normalise is not None:
            x = self.prepared(x)
        features, logits = self.stage(x)
        return features, *self.said(logits, passed)

    def prepared(self, pixels: Tensor) -> Tensor:
        """What the first stage takes of pixels."""
        assert self.normalise is not None
        return self.normalise.normalise(pixels, self.dtype)

    def said(self, logits: Tensor, passed: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is returned second and third."""
        return say(logits, passed, self.calibration, self.measure)

    def with_stage(self, stage: nn.Module) -> Unit:
        """The same around another stage that is ready to run."""
        unit = Unit(stage, self.calibration, self.measure, self.normalise, self.dtype)
        return unit.train(self.training)


def say(
    logits: Tensor, passed: Tensor | None, calibration: Calibration | Constants, measure: Measure
) -> tuple[Tensor, Tensor]:
    """What a unit returns second and third; arguments as for `judge`."""
    said = judge(logits, passed, calibration, measure)
    return torch.cat([said.confidence[:, None], said.probabilities], 1), said.log_probabilities


def make_units(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> list[Unit]:
    """The units of a calibrated bundle, shallow to deep; its network stays as it is.

    Raises:
        BundleError: it was not calibrated.
        ValueError: for int8 it was not.
    """
    policy = bundle.calibrated
    preprocess = bundle.description.preprocess
    if dtype is torch.int8:
        stages = quantised_stages(bundle.net, policy.for_int8().ranges)
    else:
        stages = fold_stages(bundle.net)
    kept = carrier(dtype)
    return [
        Unit(stage, calibration, policy.measure, preprocess if k == 0 else None, kept)
        .to(device)
        .eval()
        for k, (stage, calibration) in enumerate(zip(stages, policy.calibrations, strict=True))
    ]


def example_inputs(units: list[Unit], bundle: Bundle, size: int) -> list[tuple[Tensor, ...]]:
    """What each unit takes in a batch of `size` random images, shallow to deep."""
    side = bundle.description.preprocess.size
    chance = torch.Generator().manual_seed(size)
    pixels = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=chance)
    device = next(units[0].parameters()).device
    inputs: list[tuple[Tensor, ...]] = [(pixels.to(device),)]
    with torch.inference_mode():
        for unit in units[:-1]:
            features, _, log_probabilities = unit(*inputs[-1])
            inputs.append((features, log_probabilities))
    return [tuple(t.clone() for t in row) for row in inputs]


def is_features(tensor: Tensor) -> bool:
    """Whether a unit's input or output is `[N, C, H, W]`, or the same channels last."""
    return tensor.is_floating_point() and tensor.ndim == 4
