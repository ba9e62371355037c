"""Networks written for runtimes other than this one, each verified against torch."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from model.network import MultiExitNet

TOLERANCE = 1e-3
"""Largest difference allowed in any output, as a share of the largest output."""
TRACED_BATCH = 2
VERIFIED_BATCHES = (1, 3)


class ExportError(ValueError):
    """A written program that does not compute what the network does."""


class Stage(nn.Module):
    """One stage as a module: its input to features and logits; the deepest to logits alone."""

    def __init__(self, net: MultiExitNet, k: int) -> None:
        super().__init__()
        self.net, self.k = net, k

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.net.run_stage(self.k, x)
        return (logits,) if self.k == self.net.exits else (features, logits)


class Whole(nn.Module):
    """All stages as a module: images to the logits of every exit, shallow to deep."""

    def __init__(self, net: MultiExitNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(x))


def write_programs(
    net: MultiExitNet, size: int, format: str, per_stage: bool, out: Path
) -> Iterator[tuple[Path, float]]:
    """Write `network.onnx`, or `stage_1.onnx` and so on, with a dynamic batch size.

    A file has its name only once it is verified.

    Args:
        net: in eval mode.
        size: side of the images, in pixels.
        format: a key of `FORMATS`.
        per_stage: whether each stage becomes a file of its own.
        out: folder, made if missing.

    Yields:
        Each file with the largest difference from torch, as a share of the largest output.

    Raises:
        ExportError: the difference is beyond `TOLERANCE`, or a package is missing.
    """
    check_packages(format)
    out.mkdir(parents=True, exist_ok=True)
    write, read = FORMATS[format]
    x = torch.randn(TRACED_BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    for name, module, inputs in _modules(net, x, per_stage):
        file, partial = out / f"{name}.{format}", out / f"{name}.partial.{format}"
        try:
            write(module.eval(), inputs, partial)
            difference = _verify(module, read(partial), inputs, file)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        yield file, difference


def check_packages(format: str) -> None:
    """Raise ExportError, saying what to install, unless all that a format takes is there."""
    missing = [p for p in PACKAGES.get(format, ()) if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(
            f"{format} takes {' and '.join(missing)}, of the extra `export`; "
            "run: pip install '.[export]'"
        )


def _modules(
    net: MultiExitNet, x: Tensor, per_stage: bool
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    if not per_stage:
        yield "network", Whole(net), x
        return
    for k in range(1, net.exits + 1):
        yield f"stage_{k}", Stage(net, k), x
        with torch.inference_mode():
            x = net.features(k, x)
        x = x.clone()  # an inference tensor may not be traced


@torch.inference_mode()
def _verify(
    module: nn.Module, program: Callable[[Tensor], list[Tensor]], example: Tensor, file: Path
) -> float:
    worst = 0.0
    for batch in VERIFIED_BATCHES:
        x = example[:1].repeat(batch, 1, 1, 1) * torch.linspace(0.5, 1, batch).view(-1, 1, 1, 1)
        for ours, theirs in zip(module(x), program(x), strict=True):
            by = _difference(ours, theirs)
            if not by <= TOLERANCE:  # so that NaN fails, which no maximum would show
                raise ExportError(
                    f"{file} differs from the network by {by:.1e} of its largest output"
                )
            worst = max(worst, by)
    return worst


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, as a share of our largest output; NaN where either side has one."""
    largest = (ours - theirs).abs().max()
    return 0.0 if largest == 0 else float(largest / ours.abs().max())


def _names(module: nn.Module) -> list[str]:
    if isinstance(module, Whole):
        return [f"logits_{k}" for k in range(1, module.net.exits + 1)]
    assert isinstance(module, Stage)
    deepest = module.k == module.net.exits
    return ["logits"] if deepest else ["features", "logits"]


def _write_onnx(module: nn.Module, x: Tensor, file: Path) -> None:
    # It warns of every optional package that is not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    first = isinstance(module, Whole) or getattr(module, "k", 1) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        program = torch.onnx.export(
            module,
            (x,),
            dynamo=True,
            verbose=False,
            input_names=["images" if first else "features_in"],
            output_names=_names(module),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    program.save(str(file))


def _read_onnx(file: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime  # an optional dependency, wanted by this format alone

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def _write_pt2(module: nn.Module, x: Tensor, file: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes), file)


def _read_pt2(file: Path) -> Callable[[Tensor], list[Tensor]]:
    program = torch.export.load(file).module()
    return lambda x: list(program(x))


FORMATS = {"onnx": (_write_onnx, _read_onnx), "pt2": (_write_pt2, _read_pt2)}
"""How to write a module to a file, and how to read it back as a function."""
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Optional ones that a format takes, all of the extra `export`."""
