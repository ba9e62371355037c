"""A unit as if it were compiled."""

import torch

from server.host import array_of, tensor_of
from server.units import example_inputs


class FakeProgram:
    """Runs an eager unit over arrays.

    Args:
        unit: what it runs.
        inputs: tensors, whose batch size is its own.
        meanwhile: called in each run.
        off: added to everything that is said.
    """

    def __init__(self, unit, inputs, meanwhile=lambda: None, off=0.0):
        self.unit = unit
        self.buffers = [array_of(tensor.clone()) for tensor in inputs]
        self.meanwhile = meanwhile
        self.off = off

    @torch.inference_mode()
    def run(self):
        self.meanwhile()
        features, said, passed = self.unit(*map(tensor_of, self.buffers))
        return [array_of(output) for output in (features, said + self.off, passed)]


def fake_program(bundle, units, stage, size, **how):
    """Of one of a bundle's units, in front of random inputs."""
    inputs = example_inputs(units, bundle, size)[stage - 1]
    return FakeProgram(units[stage - 1], inputs, **how)
