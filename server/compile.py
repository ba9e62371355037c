"""The command that compiles stages ahead of time: python -m server.compile --bundle DIR.

The server runs it beside itself, so that its answers do not wait for a compiler; an operator may
run it before, to fill the cache of an image or a machine. It says a line for each program.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.bundle import Bundle, BundleError, load_servable
from model.files import put_in_place
from model.numerics import DTYPES, carrier
from server.compiled import (
    PRECISIONS,
    core,
    openvino,
    options_for,
    write_compiled,
)
from server.costs import batch_sizes
from server.programs import Programs
from server.settings import Settings
from server.units import Unit, example_inputs, is_features, make_units

READY = "ready"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what is missing; a failure is one sentence and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        openvino()
        os.nice(10)  # answers go first
        warnings.filterwarnings("ignore")  # torch's own
        compile_missing(arguments)
    except (BundleError, ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compile_missing(arguments: argparse.Namespace) -> None:
    """Compile every unit and batch size that the cache lacks."""
    torch.set_num_threads(arguments.threads)
    bundle = load_servable(arguments.bundle)
    dtype = DTYPES[arguments.dtype]
    programs = Programs(arguments.cache_dir, bundle, dtype, arguments.threads)
    programs.remove_stale()
    units = traceable_units(bundle, dtype)
    for size in order(arguments.max_batch):
        inputs = example_inputs(units, bundle, size)
        for stage, unit in enumerate(units, start=1):
            file = programs.file(stage, size)
            if not file.exists():
                began = time.perf_counter()
                compile_unit(unit, inputs[stage - 1], dtype, file)
                seconds = time.perf_counter() - began
                print(f"{READY} stage {stage} batch {size} in {seconds:.1f} s: {file}", flush=True)


def traceable_units(bundle: Bundle, dtype: torch.dtype) -> list[Unit]:
    """What to compile for these numerics: in float32, with the roundings of int8."""
    given = torch.int8 if dtype is torch.int8 else torch.float32
    return make_units(bundle, torch.device("cpu"), given)


def order(max_batch: int) -> list[int]:
    """Batch sizes in the order of worth: single images, then what a load needs, then the rest."""
    sizes = batch_sizes(max_batch)
    first = [s for s in (1, 8, max_batch) if s in sizes]
    return list(dict.fromkeys([*first, *reversed(sizes)]))


class Bordered(nn.Module):
    """A module whose features come and go channels last: `[N, H, W, C]`.

    That is how OpenVINO computes, but what comes straight from a convolution with a shortcut's sum
    is copied twice to be handed out so; behind another operation it is not. Hence the clamp to the
    range of bfloat16, which changes no value.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As the module."""
        given = [t.permute(0, 3, 1, 2) if is_features(t) else t for t in inputs]
        outputs = self._module(*given)
        largest = torch.finfo(torch.bfloat16).max
        return tuple(
            t.clamp(-largest, largest).permute(0, 2, 3, 1) if is_features(t) else t for t in outputs
        )


@torch.no_grad()
def compile_unit(
    unit: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, file: Path
) -> None:
    """Compile a unit for the shapes of these inputs, and put it in place at once.

    A fixed batch size lets the weights be packed beforehand: of resnet18-lite in int8, a single
    image takes 0.77 ms with a free one and 0.61 with a fixed one (one Zen 5 core, OpenVINO 2026.4).

    Args:
        unit: in float32.
        inputs: of the unit.
        dtype: what it is to compute in.
        file: where to put it; `server.compiled.CompiledUnit` runs it.
    """
    given = tuple(
        t.float().permute(0, 2, 3, 1).contiguous() if is_features(t) else t for t in inputs
    )
    traced = torch.jit.trace(Bordered(unit).eval(), given, check_trace=False)
    network = _with_borders(_converted(traced, given), dtype)
    compiled = core().compile_model(network, "CPU", options_for(dtype))
    put_in_place(file, lambda partial: write_compiled(compiled, partial))


def _converted(traced: Any, inputs: Sequence[Tensor]) -> Any:
    """The traced module as OpenVINO's own, for exactly these shapes.

    By its front end itself, which is all of `openvino.convert_model` that this needs.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    front_end = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
    network = front_end.convert(front_end.load(decoder))
    for parameter, tensor in zip(network.get_parameters(), inputs, strict=True):
        parameter.set_partial_shape(openvino().PartialShape(list(tensor.shape)))
        parameter.set_element_type(openvino().Type(tensor.numpy().dtype))
    network.validate_nodes_and_infer_types()
    return network


def _with_borders(network: Any, dtype: torch.dtype) -> Any:
    """The network with features in `dtype` on both sides."""
    from openvino.preprocess import PrePostProcessor

    border = PrePostProcessor(network)
    kind = getattr(openvino().Type, PRECISIONS[carrier(dtype)])
    for i, port in enumerate(network.inputs):
        if port.element_type.is_real() and len(port.shape) == 4:
            border.input(i).tensor().set_element_type(kind)
    for i, port in enumerate(network.outputs):
        if len(port.shape) == 4:
            border.output(i).tensor().set_element_type(kind)
    return border.build()


def _parser() -> argparse.ArgumentParser:
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    parser = argparse.ArgumentParser(
        prog="python -m server.compile",
        description=__doc__.split("\n", 1)[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=defaults["bundle"], help="what is served")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="as it will serve; the server's log says which it chose",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=defaults["threads"],
        help="inside one operation, as it will serve",
    )
    parser.add_argument(
        "--max-batch", type=int, default=defaults["max_batch"], help="as it will serve"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=defaults["cache_dir"], help="where programs are kept"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
