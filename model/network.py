"""The multi-exit network, whose primitive is running one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from model.backbone import STEMS, Backbone
from model.exits import ExitHead
from model.resnet import ResNet

ARCHITECTURES: dict[str, Callable[..., Backbone]] = {
    "resnet10": partial(ResNet, depths=(1, 1, 1, 1)),
    "resnet18": partial(ResNet, depths=(2, 2, 2, 2)),
    "resnet18-lite": partial(
        ResNet, depths=(2, 2, 2, 2), growth=(1, 2, 4, 4), strides=(2, 2, 2, 1)
    ),
    "resnet34": partial(ResNet, depths=(3, 4, 6, 3)),
}
"""Every backbone by name; a variant states only what differs from its family.

All take `width` (channels of the first stage) and `stem` (32 or 224, the image size it is for).
"""


class Outputs(NamedTuple):
    """What training needs of a whole pass; lists run from the shallowest exit to the deepest."""

    logits: list[Tensor]
    """Each `[N, classes]`."""
    pooled: list[Tensor]
    """Each `[N, C_last]`: the head's features before its classifier."""


class MultiExitNet(nn.Module):
    """A backbone with an exit after each stage.

    Stages and exits are numbered 1..E from shallow to deep. The whole network is all stages in
    turn, so serving may stop between any two.

    Args:
        backbone: a stem plus stages.
        classes: number of classes.
        attention: whether heads have attention gates.
        keep: the exits to keep, rising; what is deeper than the last is dropped, and stages up to
            a kept exit are run as one. All by default. The weights' names stay the same.

    Raises:
        ValueError: `keep` is empty, does not rise or names no exit.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        attention: bool = True,
        keep: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        channels = backbone.stage_channels
        everything = range(1, len(channels) + 1)
        self.kept = tuple(everything if keep is None else keep)
        if not self.kept or sorted(set(self.kept) & set(everything)) != list(self.kept):
            raise ValueError(f"kept exits must rise within 1..{len(channels)}, not {self.kept}")
        backbone.drop_stages(self.kept[-1])
        self.backbone = backbone
        self.heads = nn.ModuleDict(
            {str(k - 1): ExitHead(channels[k - 1 :], classes, attention) for k in self.kept}
        )

    @property
    def exits(self) -> int:
        """How many exits there are."""
        return len(self.heads)

    def head(self, k: int) -> ExitHead:
        """The head of exit `k`, 1..exits."""
        return cast(ExitHead, self.heads[str(self.kept[k - 1] - 1)])

    def blocks(self, k: int) -> list[nn.Module]:
        """The trunk's blocks between exit k-1 and exit `k`, the stem aside."""
        first = self.kept[k - 2] if k > 1 else 0
        return [b for stage in self.backbone.stages[first : self.kept[k - 1]] for b in stage]

    def features(self, k: int, x: Tensor) -> Tensor:
        """Run the trunk of stage `k`: images (k = 1) or stage k-1's features to features."""
        if k == 1:
            x = self.backbone.stem(x)
        for block in self.blocks(k):
            x = block(x)
        return x

    def run_stage(self, k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run stage `k` with its head.

        Args:
            k: the stage, 1..exits.
            x: normalised images `[N, 3, H, W]` for stage 1, else the features that stage k-1
                returned.

        Returns:
            Features `[N, C_k, H_k, W_k]` for stage k+1, and this exit's logits `[N, classes]`.
        """
        x = self.features(k, x)
        return x, self.head(k)(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images `[N, 3, H, W]` to the logits of every exit, shallow to deep."""
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        """Like `forward`, with the pooled features that distillation compares."""
        out = Outputs([], [])
        for k in range(1, self.exits + 1):
            x = self.features(k, x)
            head = self.head(k)
            pooled = head.pooled(x)
            out.pooled.append(pooled)
            out.logits.append(head.fc(pooled))
        return out


def build(architecture: str, classes: int, **arguments: Any) -> MultiExitNet:
    """Build a network by its registered name.

    Args:
        architecture: a key of `ARCHITECTURES`.
        classes: number of classes.
        arguments: `width`, `stem` (backbone), `attention` and `keep` (heads).

    Raises:
        ValueError: an unknown architecture or argument.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"unknown architecture {architecture!r}; known are {known}")
    unknown = arguments.keys() - {"width", "stem", "attention", "keep"}
    if unknown:
        raise ValueError(f"unknown architecture argument {', '.join(sorted(unknown))}")
    if arguments.get("stem", 32) not in STEMS:
        raise ValueError(f"stem must be one of {STEMS}")
    head = {k: arguments.pop(k) for k in ("attention", "keep") if k in arguments}
    return MultiExitNet(ARCHITECTURES[architecture](**arguments), classes, **head)


def build_from(
    state: Mapping[str, Tensor], architecture: str, classes: int, **arguments: Any
) -> MultiExitNet:
    """Build a network in eval mode and give it these weights, without initialising any first.

    Raises:
        RuntimeError: the weights' names or shapes differ from the network's.
    """
    with torch.device("meta"):
        net = build(architecture, classes, **arguments)
    net.load_state_dict(dict(state), assign=True)
    return net.eval()
