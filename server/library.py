"""A compiled unit's shared library."""

from __future__ import annotations

import ctypes
import tempfile
import zipfile
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_size_t, c_void_p, py_object
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = c_void_p, [py_object, c_char_p]


class Library:
    """Runs a unit that AOTInductor compiled, without holding Python's lock meanwhile.

    torch's own loader (`AOTIModelPackageLoader.run`) keeps the lock while it computes, so that the
    event loop stands still as long as the engine works. A call through `ctypes` lets it go. The
    functions called are AOTInductor's C interface (`aoti_runtime/interface.h`).

    Args:
        file: the package, as `torch._inductor.aoti_compile_and_package` wrote it.
        workers: how many threads may call it at the same time without waiting for each other.

    Raises:
        RuntimeError, OSError: the file is missing or broken, or holds what only torch's loader can
            run.
    """

    def __init__(self, file: Path, workers: int = 1) -> None:
        library = _open(file)
        try:
            self._start(library, workers)
        except AttributeError as error:
            raise RuntimeError(f"{file} is no compiled unit: {error}") from error

    def _start(self, library: ctypes.CDLL, workers: int) -> None:
        self._run = library.AOTInductorModelContainerRun
        pointers = POINTER(c_void_p)
        self._run.argtypes = [c_void_p, pointers, c_size_t, pointers, c_size_t, c_void_p, c_void_p]
        self._run.restype = c_int32
        self._container = c_void_p()
        made = library.AOTInductorModelContainerCreateWithDevice(
            ctypes.byref(self._container), c_size_t(workers), b"cpu", None
        )
        outputs = c_size_t()
        counted = library.AOTInductorModelContainerGetNumOutputs(
            self._container, ctypes.byref(outputs)
        )
        if made or counted:
            raise RuntimeError("a compiled unit cannot be started")
        self._outputs = outputs.value

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs; its inputs must have the shapes that it was compiled for.

        Raises:
            RuntimeError: the unit failed; torch has then written why to stderr.
        """
        # torch gives a thread its number of threads at its first own operation, and this is none:
        # without asking, oneDNN would take every core for the first units that a thread runs.
        torch.get_num_threads()
        aoti: Any = torch._C._aoti
        handles = aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        inputs = (c_void_p * len(handles))(*(_pointer_of(handle, None) for handle in handles))
        outputs = (c_void_p * self._outputs)()
        failed = self._run(self._container, inputs, len(inputs), outputs, self._outputs, None, None)
        if failed:
            raise RuntimeError("a compiled unit failed")
        given: list[Tensor] = aoti.alloc_tensors_by_stealing_from_void_ptrs(
            [_new_capsule(pointer, None, None) for pointer in outputs]
        )
        return given


def _open(file: Path) -> ctypes.CDLL:
    """Load the one shared library of a package; a loaded one outlives its file."""
    try:
        with zipfile.ZipFile(file) as package, tempfile.TemporaryDirectory() as folder:
            names = [name for name in package.namelist() if name.endswith(".so")]
            if len(names) != 1:
                raise RuntimeError(f"{file} holds {len(names)} libraries")
            return ctypes.CDLL(package.extract(names[0], folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{file} is broken: {error}") from error
