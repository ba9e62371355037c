"""Compiling a network, which takes more of a machine than running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from training.run import TrainingError


@contextmanager
def compiling(asked: bool) -> Iterator[None]:
    """Within this, a network that was asked to be compiled runs, for the first time perhaps.

    Raises:
        TrainingError: it cannot be compiled, where there is no compiler for instance.
    """
    try:
        yield
    except RuntimeError as error:
        if not asked:
            raise
        from torch._dynamo.exc import TorchDynamoException  # takes a second, unless it is there

        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)  # what a backend raised says more
        first = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise TrainingError(
            f"the network cannot be compiled ({first}); leave --compile out"
        ) from error
