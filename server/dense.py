"""Depthwise convolutions as one with the 1x1 convolutions right after them."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx, nn

from server.rewriting import called, copy_of, replace, tidied
from server.units import Unit

Size = tuple[int, int]


def densify(unit: Unit) -> Unit:
    """A unit that gives the same with half as many kernels in its heads.

    What two convolutions do with nothing between them, one does with the product of their weights.
    That is several times the arithmetic, which takes a card less time than another kernel.

    Args:
        unit: of a folded stage; shares its other convolutions.
    """
    stage = copy_of(unit)
    for node in list(stage.graph.nodes):
        _densify(stage, node)
    return unit.with_stage(tidied(stage))


def _densify(stage: fx.GraphModule, node: fx.Node) -> None:
    """Have one convolution do what `node` and a depthwise convolution before it do."""
    mixing, before = called(stage, node), node.args[0] if node.args else None
    if not isinstance(mixing, nn.Conv2d) or not isinstance(before, fx.Node):
        return
    plain = (mixing.kernel_size, mixing.stride, mixing.padding) == ((1, 1), (1, 1), (0, 0))
    if before.target is not torch.conv2d or len(before.users) > 1 or not plain:
        return
    x, weight, bias, stride, padding, dilation, groups = before.args
    kernels = operator.attrgetter(str(cast(fx.Node, weight).target))(stage)
    if bias is None and groups == kernels.size(0) == mixing.in_channels and mixing.groups == 1:
        where = cast(tuple[Size, Size, Size], (stride, padding, dilation))
        replace(stage, node, _product(mixing, kernels, *where), (x,))


@torch.no_grad()
def _product(
    mixing: nn.Conv2d, kernels: Tensor, stride: Size, padding: Size, dilation: Size
) -> nn.Conv2d:
    """A depthwise convolution by `kernels` `[C, 1, H, W]` and what mixes its outputs, as one."""
    channels, _, height, width = kernels.shape
    out = nn.Conv2d(channels, mixing.out_channels, (height, width), stride, padding, dilation)
    weight = mixing.weight.float() * kernels.float().transpose(0, 1)
    out.weight = nn.Parameter(weight.to(kernels), requires_grad=False)
    out.bias = mixing.bias
    return out.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
