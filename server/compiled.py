"""A compiled unit, from its file to its answers."""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.numerics import carrier

# By it OpenVINO tells its makers of every import, from a fork of whoever imports: of a server that
# would be one amid its threads, which keeps the port. Without it OpenVINO takes a stub of its own.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""What OpenVINO calls numerics; eight-bit convolutions it finds by itself, among float32."""
DIGEST_BYTES = hashlib.sha256().digest_size


class CompiledUnit:
    """Runs a unit that OpenVINO compiled, without holding Python's lock meanwhile.

    Features cross its borders channels last and in its own numerics, which is how both torch and
    OpenVINO have them in memory, so that nothing is converted on the way. Inputs and outputs stay
    where OpenVINO put them: making an array known to it anew takes longer than copying an image's
    features, and copies of its outputs would be made only to be copied again.

    Args:
        file: as `write_compiled` wrote it.
        dtype: what it computes in, as it was compiled for.
        workers: how many threads may run it at the same time without waiting for each other.
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
    def buffers(self) -> Sequence[np.ndarray]:
        """The inputs of the thread that asks, as `server.host.array_of` has them."""
        if not hasattr(self._own, "request"):
            self._prepare_thread()
        buffers: list[np.ndarray] = self._own.buffers
        return buffers

    def run(self) -> Sequence[np.ndarray]:
        """Run on this thread's buffers; its next run of the unit overwrites the outputs.

        Raises:
            RuntimeError: the unit failed.
        """
        self._own.request.infer(share_outputs=True)
        outputs: list[np.ndarray] = self._own.outputs
        return outputs

    def _prepare_thread(self) -> None:
        own, request = self._own, self._network.create_infer_request()
        own.buffers = [
            _borrow(request.get_input_tensor(i)) for i in range(len(self._network.inputs))
        ]
        own.outputs = [
            _borrow(request.get_output_tensor(i)) for i in range(len(self._network.outputs))
        ]
        for buffer in own.buffers:
            buffer.fill(0)  # what a batch leaves free is computed too: no chance numbers
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

    The thread that makes it gets another stack for signals. OpenVINO frees that stack with the last
    of its networks, on whichever thread that happens, and the next signal would end the process.

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


def _read(file: Path) -> np.ndarray:
    """What `write_compiled` was given; mapped, so that weights are not in memory twice over."""
    if file.stat().st_size <= DIGEST_BYTES:
        raise RuntimeError("it is cut off")
    whole = np.memmap(file, np.uint8, mode="c")
    data, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(data.data).digest() != digest.tobytes():
        raise RuntimeError("it is damaged")
    return data


def _borrow(tensor: Any) -> np.ndarray:
    """One of OpenVINO's tensors as an array in the same memory, which lives as long; bfloat16 as
    uint16."""
    array: np.ndarray = tensor.data
    return array.view(np.uint16) if tensor.element_type == openvino().Type.bf16 else array
