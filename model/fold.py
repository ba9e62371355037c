"""A stage made ready for inference: batch normalisation folded into the convolutions before it."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.network import MultiExitNet


class Stage(nn.Module):
    """One stage of a network with its head, as a module of its own; shares its weights."""

    def __init__(self, net: MultiExitNet, k: int) -> None:
        super().__init__()
        self.net = net
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `MultiExitNet.run_stage`."""
        return self.net.run_stage(self.k, x)


def fold_stages(net: MultiExitNet) -> list[nn.Module]:
    """Copies of all stages, shallow to deep, that compute the same with fewer operations.

    Args:
        net: in eval mode and fp32, so that folding loses nothing; left as it is.
    """
    net = copy.deepcopy(net)
    return [_fold(fx.symbolic_trace(Stage(net, k))) for k in range(1, net.exits + 1)]


def _fold(stage: fx.GraphModule) -> fx.GraphModule:
    modules = dict(stage.named_modules())
    for node in list(stage.graph.nodes):
        norm = modules.get(str(node.target))
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        convolution = modules.get(str(before.target))
        if isinstance(convolution, nn.Conv2d) and len(before.users) == 1:
            stage.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            stage.graph.erase_node(node)
    stage.delete_all_unused_submodules()
    stage.recompile()
    return stage
