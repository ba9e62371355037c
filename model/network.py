"""The multi-exit network, whose primitive is running one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.architectures import ARCHITECTURES
from model.backbone import PUBLISHED_WIDTH, STEMS, Backbone, Block
from model.exits import HEADS, ExitHead

ARGUMENTS = ("width", "stem", "attention", "keep", "head", "exits")
PLACES = ("stages", "blocks")


class MultiExitNet(nn.Module):
    """A backbone with an exit after each stage, or after each block.

    Stages and exits are numbered 1..E from shallow to deep, and stage k is what runs between exit
    k-1 and exit k. The whole network is all stages in turn, so serving may stop between any two.

    Args:
        backbone: a stem plus stages.
        classes: number of classes.
        attention: whether heads have attention gates.
        keep: the exits to keep, rising; what is deeper than the last is dropped, and stages up to
            a kept exit are run as one. All by default. The weights' names stay the same.
        head: the kind of head, a key of `HEADS`; by default what the backbone's family has.
        exits: where they are, one of `PLACES`.

    Raises:
        ValueError: `keep` is empty, does not rise or names no exit.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        attention: bool = True,
        keep: Sequence[int] | None = None,
        head: str | None = None,
        exits: str = "stages",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.places = exits
        paths = self._paths
        everything = range(1, len(paths) + 1)
        self.kept = tuple(everything if keep is None else keep)
        if not self.kept or sorted(set(self.kept) & set(everything)) != list(self.kept):
            raise ValueError(f"kept exits must rise within 1..{len(paths)}, not {self.kept}")
        backbone.drop(b for section in self._sections[self.kept[-1] :] for b in section)
        make = HEADS[head or backbone.default_head]
        self.heads = nn.ModuleDict(
            {str(k - 1): make(paths[k - 1], classes, attention) for k in self.kept}
        )

    @property
    def _sections(self) -> list[list[Block]]:
        """The trunk's blocks between one place for an exit and the next, whichever are kept."""
        stages = self.backbone.stages
        if self.places == "blocks":
            return [[block] for stage in stages for block in stage]
        return [list(stage) for stage in stages]

    @property
    def _paths(self) -> list[list[int]]:
        """For each place, the channels there and at the end of every later stage."""
        ends = self.backbone.stage_channels
        return [
            [block.channels, *ends[i + 1 :]]
            for i, stage in enumerate(self.backbone.stages)
            for block in (stage if self.places == "blocks" else stage[-1:])
        ]

    @property
    def exits(self) -> int:
        """How many exits there are."""
        return len(self.heads)

    def head(self, k: int) -> ExitHead:
        """The head of exit `k`, 1..exits."""
        return cast(ExitHead, self.heads[str(self.kept[k - 1] - 1)])

    def blocks(self, k: int) -> list[nn.Module]:
        """The trunk's modules between exit k-1 and exit `k`, the stem aside."""
        first = self.kept[k - 2] if k > 1 else 0
        sections = self._sections[first : self.kept[k - 1]]
        return [module for section in sections for block in section for module in block.modules]

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
        out = []
        for k in range(1, self.exits + 1):
            x, logits = self.run_stage(k, x)
            out.append(logits)
        return out

    def deepest(self, x: Tensor) -> Tensor:
        """Normalised images `[N, 3, H, W]` to the last exit's logits alone, without other heads."""
        for k in range(1, self.exits + 1):
            x = self.features(k, x)
        logits: Tensor = self.head(self.exits)(x)
        return logits


def build(architecture: str, classes: int, **arguments: Any) -> MultiExitNet:
    """Build a network by its registered name.

    Args:
        architecture: a key of `ARCHITECTURES`.
        classes: number of classes.
        arguments: `width`, `stem` (of the backbone), `attention`, `keep`, `head`, `exits` (of the
            network).

    Raises:
        ValueError: an unknown architecture or argument, or a value that means nothing.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"unknown architecture {architecture!r}; known are {known}")
    unknown = arguments.keys() - set(ARGUMENTS)
    if unknown:
        raise ValueError(f"unknown architecture argument {', '.join(sorted(unknown))}")
    if arguments.get("width", PUBLISHED_WIDTH) < 1:
        raise ValueError("width must be at least 1")
    _one_of("stem", arguments.get("stem", STEMS[0]), STEMS)
    _one_of("head", arguments.get("head"), (None, *HEADS))
    _one_of("exits", arguments.get("exits", PLACES[0]), PLACES)
    backbone = {k: arguments.pop(k) for k in ("width", "stem") if k in arguments}
    return MultiExitNet(ARCHITECTURES[architecture](**backbone), classes, **arguments)


def _one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        shown = ", ".join(str(a) for a in allowed if a is not None)
        raise ValueError(f"{name} must be one of {shown}, not {value}")


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
