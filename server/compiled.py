"""A compiled unit, from its file to its answers."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.numerics import carrier

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What OpenVINO calls numerics; eight-bit convolutions it finds by itself, among float32."""
DIGEST_BYTES = hashlib.sha256().digest_size


class CompiledUnit:
    """Runs a unit that OpenVINO compiled, without holding Python's lock meanwhile.

    Features cross its borders channels last and in its own numerics, which is how both torch and
    OpenVINO have them in memory, so that nothing is converted on the way. Inputs and outputs stay
    where OpenVINO put them: making a tensor known to it anew takes longer than copying an image's
    features.

    Args:
        file: as `write_compiled` wrote it.
        dtype: what it computes in, as it was compiled for.
        workers: how many threads may call it at the same time without waiting for each other.
        threads: inside one operation of each.

    Raises:
        RuntimeError, OSError: the file is missing or broken, or there is no OpenVINO.
    """

    def __init__(self, file: Path, dtype: torch.dtype, workers: int = 1, threads: int = 1) -> None:
        # Without streams each thread that calls computes by itself. A stream has threads of its
        # own: handing over to them and back took up to a third of a small stage's time.
        streams = workers if threads > 1 else 0
        options = {
            **options_for(dtype),
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads * max(1, streams),
        }
        self._mapped = _read(file)  # weights stay there, which OpenVINO does not hold on to
        shared = openvino().Tensor(self._mapped, shared_memory=True)
        self._network = core().import_model(shared, "CPU", options)
        self._own = threading.local()

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The inputs of the thread that asks, `[N, C, H, W]` where they are features."""
        if not hasattr(self._own, "request"):
            self._prepare_thread()
        buffers: list[Tensor] = self._own.buffers
        return buffers

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The unit's outputs, which this thread's next call of the unit overwrites.

        Args:
            tensors: of the shapes that it was compiled for; its buffers are taken as they are.

        Raises:
            RuntimeError: the unit failed.
        """
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            if tensor is not buffer:
                buffer.copy_(tensor)
        self._own.request.infer()
        outputs: list[Tensor] = self._own.outputs
        return outputs

    def _prepare_thread(self) -> None:
        own, request = self._own, self._network.create_infer_request()
        own.inputs = [request.get_input_tensor(i) for i in range(len(self._network.inputs))]
        own.given = [request.get_output_tensor(i) for i in range(len(self._network.outputs))]
        own.buffers = [_borrow(tensor) for tensor in own.inputs]
        own.outputs = [_borrow(tensor) for tensor in own.given]
        for buffer in own.buffers:
            buffer.zero_()  # what a batch leaves free is computed too: no chance numbers
        own.request = request


def openvino() -> Any:
    """The package, imported only where something is compiled.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise RuntimeError(f"OpenVINO cannot be imported ({error})") from error
    return openvino


@functools.cache
def core() -> Any:
    """The process's one OpenVINO, kept for as long as it lives.

    It gives the thread that makes it another stack for signals, and frees that stack when the last
    network goes that it made, on whichever thread that is: the next signal would end the process.

    Raises:
        RuntimeError: it is not installed.
    """
    return openvino().Core()


def options_for(dtype: torch.dtype) -> dict[str, Any]:
    """What OpenVINO must be told when it compiles a unit, and again when it loads it."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[carrier(dtype)],
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # the threads that call are the server's to place
    }


def write_compiled(network: Any, file: Path) -> None:
    """Write a compiled network, and after it its digest, since OpenVINO trusts what it reads."""
    data = network.export_model().getvalue()
    file.write_bytes(data + hashlib.sha256(data).digest())


def is_features(tensor: Tensor) -> bool:
    """Whether a unit's input or output is `[N, C, H, W]`, or the same channels last."""
    return tensor.is_floating_point() and tensor.ndim == 4


def _read(file: Path) -> np.ndarray:
    """What `write_compiled` was given; mapped, so that weights are not in memory twice over."""
    if file.stat().st_size <= DIGEST_BYTES:
        raise RuntimeError("it is cut off")
    whole = np.memmap(file, np.uint8, mode="c")
    data, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(data.data).digest() != digest.tobytes():
        raise RuntimeError("it is damaged")
    return data


def _borrow(given: Any) -> Tensor:
    """One of OpenVINO's tensors as torch's, in the same memory; features `[N, C, H, W]`."""
    if given.element_type == openvino().Type.bf16:
        tensor = torch.from_numpy(given.data.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(given.data)
    return tensor.permute(0, 3, 1, 2) if is_features(tensor) else tensor
