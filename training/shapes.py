"""The network that a shape describes."""

from __future__ import annotations

from typing import Any

import torch

from model.backbone import Backbone
from model.network import MultiExitNet, build
from training.folder import SMALL
from training.presets import Shape


def build_net(
    shape: Shape, classes: int, size: int, plain: bool
) -> tuple[MultiExitNet, dict[str, Any]]:
    """A fresh network with the arguments that build it again.

    Args:
        shape: what was asked for.
        classes: number of classes.
        size: side of the square input.
        plain: whether to leave out all exits but the last.

    Raises:
        ValueError: an unknown architecture, or arguments that it cannot take.
    """
    arguments: dict[str, Any] = {"stem": shape.stem or (32 if size <= SMALL else 224)}
    for name in ("width", "head"):
        if getattr(shape, name) is not None:
            arguments[name] = getattr(shape, name)
    for name in ("attention", "exits"):
        if getattr(shape, name) != getattr(Shape(), name):
            arguments[name] = getattr(shape, name)
    keep = [int(e) for e in shape.keep.split(",")] if shape.keep else None
    if plain:
        keep = [keep[-1] if keep else _exits(shape.architecture, classes, arguments)]
    if keep:
        arguments["keep"] = keep
    return build(shape.architecture, classes, **arguments), arguments


def whole_backbone(architecture: str, classes: int, arguments: dict[str, Any]) -> Backbone:
    """The backbone of such a network before anything behind its last exit is dropped."""
    uncut = {name: value for name, value in arguments.items() if name != "keep"}
    return build(architecture, classes, **uncut).backbone


def _exits(architecture: str, classes: int, arguments: dict[str, Any]) -> int:
    with torch.device("meta"):
        return build(architecture, classes, **arguments).exits
