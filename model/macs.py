"""Multiply-accumulates, counted from the modules that run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.network import MultiExitNet


class StageCost(NamedTuple):
    """What one stage adds, its own head included."""

    trunk_macs: int
    head_macs: int
    trunk_parameters: int
    head_parameters: int


def count_stages(net: MultiExitNet, size: int) -> list[StageCost]:
    """Count each stage of `net` for one image of `size` x `size`, shallow to deep.

    Convolutions and linear layers count; normalisation, activations and pooling do not, as is
    usual in the field. Runs on the meta device, so nothing is computed.
    """
    net = copy.deepcopy(net).to("meta").eval()
    x = torch.empty(1, 3, size, size, device="meta")
    costs = []
    for k in range(1, net.exits + 1):
        head = net.head(k)
        trunk, x = _count(net, partial(net.features, k), x)
        head_macs, _ = _count(net, head, x)
        costs.append(StageCost(trunk, head_macs, _trunk_parameters(net, k), _parameters(head)))
    return costs


def cumulative_macs(costs: list[StageCost]) -> list[int]:
    """MACs to leave at each exit: all trunk stages and all heads up to it."""
    return list(accumulate(c.trunk_macs + c.head_macs for c in costs))


def cumulative_parameters(costs: list[StageCost]) -> list[int]:
    """Parameters used by an image that leaves at each exit, earlier heads included."""
    return list(accumulate(c.trunk_parameters + c.head_parameters for c in costs))


def _count(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, Tensor]:
    macs = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += out.numel() * module.in_features

    hooks = [m.register_forward_hook(add) for m in net.modules()]
    try:
        out = run(x)
    finally:
        for hook in hooks:
            hook.remove()
    return macs, out


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trunk_parameters(net: MultiExitNet, k: int) -> int:
    own = sum(_parameters(block) for block in net.blocks(k))
    if k > 1:
        return own
    in_blocks = sum(_parameters(b) for j in range(1, net.exits + 1) for b in net.blocks(j))
    return own + _parameters(net.backbone) - in_blocks
