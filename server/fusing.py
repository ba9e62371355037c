"""Convolutions that a card computes in one with what follows them."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from server.rewriting import called, copy_of, replace, tidied
from server.units import Unit

log = logging.getLogger("offramp")

Compute = Callable[[nn.Conv2d, Tensor, Tensor | None], Tensor]
"""A convolution, its input and what is added to its output, if anything; ends with a ReLU."""


class FusedConvolution(nn.Module):
    """A convolution with its bias, a sum and a ReLU.

    Args:
        convolution: shared with the stage that it is of.
        compute: all of it; where that fails once, it is computed in parts from then on.
    """

    def __init__(self, convolution: nn.Conv2d, compute: Compute) -> None:
        super().__init__()
        self.convolution = convolution
        self._compute = compute
        self._fails = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """`other` is as large as the output."""
        if not self._fails:
            try:
                return self._compute(self.convolution, x, other)
            except RuntimeError as error:
                log.debug("%s is computed in parts: %s", self.convolution, error)
                self._fails = True  # before a graph is captured, since units warm up first
        out: Tensor = self.convolution(x)
        return F.relu(out if other is None else out + other)


def by_cudnn(convolution: nn.Conv2d, x: Tensor, other: Tensor | None) -> Tensor:
    """On a card; not every convolution can be computed so.

    Raises:
        RuntimeError: this one cannot.
    """
    c = convolution
    how = (c.bias, c.stride, c.padding, c.dilation, c.groups)
    if other is None:
        return torch.cudnn_convolution_relu(x, c.weight, *how)  # type: ignore[arg-type]
    return torch.cudnn_convolution_add_relu(x, c.weight, other, 1.0, *how)  # type: ignore[arg-type]


def fuse(unit: Unit, compute: Compute = by_cudnn) -> Unit:
    """A unit that gives the same with fewer operations; shares its weights.

    Args:
        unit: of a folded stage.
        compute: a convolution with what follows it.
    """
    stage = copy_of(unit)
    for relu in [node for node in stage.graph.nodes if _is_relu(stage, node)]:
        _fuse(stage, relu, compute)
    return unit.with_stage(tidied(stage))


def _fuse(stage: fx.GraphModule, relu: fx.Node, compute: Compute) -> None:
    """Have one node do what a ReLU's inputs and the ReLU do, if they can be one."""
    before = relu.args[0]
    if not isinstance(before, fx.Node) or len(before.users) > 1:
        return
    convolution, other = before, None
    if before.target in (operator.add, operator.iadd, torch.add) and not before.kwargs:
        for one, another in (before.args, before.args[::-1]):
            if isinstance(one, fx.Node) and _convolution(stage, one):
                convolution, other = one, another
                break
    module = _convolution(stage, convolution)
    if module is None or (other is not None and not isinstance(other, fx.Node)):
        return
    inputs = (convolution.args[0],) if other is None else (convolution.args[0], other)
    replace(stage, relu, FusedConvolution(module, compute), inputs)


def _convolution(stage: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    """What a node calls, if it is a convolution that nobody else wants the output of."""
    module = called(stage, node)
    if not isinstance(module, nn.Conv2d) or len(node.users) > 1:
        return None
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return module if plain else None


def _is_relu(stage: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in (F.relu, torch.relu) or isinstance(called(stage, node), nn.ReLU)
