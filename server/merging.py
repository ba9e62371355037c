"""The elementwise work of a unit, in as few kernels as a card can do it.

A replayed graph takes a card some 2 µs for every kernel, however small. Of the 44 in the first
stage of a ResNet-18 with its head, 23 compute elements one by one: here they are 6.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from model.confidence import Constants
from model.policy import Measure
from model.preprocess import normalised
from server.private import make_private
from server.rewriting import called, copy_of, replace, tidied
from server.units import Unit, say

log = logging.getLogger("offramp")

KERNELS = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch looks for what it compiled, whenever it compiles."""

Function = Callable[..., Any]
Compile = Callable[[Function], Function]
"""Gives what computes the same in fewer kernels; may fail only when that is called."""


def by_inductor(function: Function) -> Function:
    """Compiled once for a single image and once for every larger batch.

    In this process, since a server has no use for a pool of compilers that outlasts its start.
    """
    return torch.compile(function, dynamic=True, options={"compile_threads": 1})


def keep_kernels(folder: Path) -> None:
    """Have compiled kernels kept from start to start, where this user alone can write a folder."""
    try:
        make_private(folder)
    except OSError as error:
        log.info("kernels are compiled at each start: %s", error)
    else:
        os.environ.setdefault(KERNELS, str(folder))


def merge(unit: Unit, compile: Compile = by_inductor) -> Unit:
    """A unit that gives the same, with one kernel for each place between convolutions.

    Args:
        unit: of a folded stage, on its device; shares its convolutions.
        compile: makes the kernels, when the unit first runs.
    """
    stage = copy_of(unit)
    for node in list(stage.graph.nodes):
        _merge_gate(stage, node, compile)
    return _Merged(unit, tidied(stage), compile).train(unit.training)


class _Merged(Unit):
    """A unit that normalises and judges in a kernel or two."""

    def __init__(self, unit: Unit, stage: nn.Module, compile: Compile) -> None:
        super().__init__(stage, unit.calibration, unit.measure, unit.normalise, unit.dtype)
        c = unit.calibration
        constants = torch.tensor([c.temperature, c.carry, c.slope, c.offset])
        self._constants = constants.to(next(unit.parameters()).device)
        self._normalised, self._said = compile(normalised), compile(_said)

    def prepared(self, pixels: Tensor) -> Tensor:
        """As `Unit`."""
        assert self.normalise is not None
        affine = self.normalise.affine_on(pixels.device)
        out: Tensor = self._normalised(pixels, *affine, self.dtype)
        return out

    def said(self, logits: Tensor, passed: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Unit`."""
        out: tuple[Tensor, Tensor] = self._said(logits, passed, self._constants, self.measure)
        return out


def _said(
    logits: Tensor, passed: Tensor | None, constants: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    return say(logits, passed, Constants(*constants.unbind()), measure)


class _Gate(nn.Module):
    """What an attention gate does with features and the map that its last convolution gives.

    Args:
        scale: of the map, `[C, 1, 1]` or less.
        shift: of the map.
        compile: makes a kernel.
    """

    def __init__(self, scale: Tensor, shift: Tensor, compile: Compile) -> None:
        super().__init__()
        self._scale, self._shift = scale.detach(), shift.detach()
        self._weighed = compile(_weighed)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self._weighed(x, mask, self._scale, self._shift)
        return out


def _weighed(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mask = F.relu(torch.addcmul(shift, mask, scale))
    mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return x * mask.sigmoid()


def _merge_gate(stage: fx.GraphModule, product: fx.Node, compile: Compile) -> None:
    """Have one node weigh features, where `product` ends an attention gate."""
    if product.target is not operator.mul or len(product.all_input_nodes) < 2:
        return
    x, node = cast(tuple[fx.Node, fx.Node], product.args)
    for step in ("sigmoid", F.interpolate):
        if node.target != step or len(node.users) > 1:
            return
        node = cast(fx.Node, node.args[0])
    relu, norm = node, called(stage, cast(fx.Node, node.args[0]))
    if relu.target == F.relu and len(relu.users) == 1 and isinstance(norm, nn.BatchNorm2d):
        scale, shift = _affine_of(norm)
        mask = cast(fx.Node, relu.args[0]).args[0]
    else:  # the map's normalisation is folded into its last convolution
        scale, shift = torch.tensor((1.0, 0.0), device=next(stage.parameters()).device).unbind()
        mask = node
    replace(stage, product, _Gate(scale, shift, compile), (x, mask))


def _affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a normalisation multiplies by, and what it adds then: `[C, 1, 1]` each."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)
