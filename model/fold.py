"""A stage made ready for inference: batch normalisation folded into the convolutions before it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.network import MultiExitNet

_TRACING = threading.Lock()
"""torch's tracers hook into the whole process, and are confused by one another."""


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
    return [_fold(_traced(Stage(net, k))) for k in range(1, net.exits + 1)]


def _traced(stage: Stage) -> fx.GraphModule:
    with _TRACING:
        return fx.GraphModule(stage, _Tracer().trace(stage))


class _Tracer(fx.Tracer):
    """Sees what its own thread does. While any tracer traces, torch has it asked about every module
    that is called in this process, and a server's other threads call theirs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As torch's, in its own thread; in others the call itself."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As torch's, in its own thread; in others the attribute itself."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


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
