"""Every architecture trains with every term."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.architectures import ARCHITECTURES
from model.backbone import projected
from model.network import build
from tests.conftest import ROOT
from tests.model.networks import quick_or_slow
from tests.training.conftest import CPU, tiny_net, tiny_recipe
from training.losses import total
from training.objective import objective
from training.run import start
from training.student import Student


def two_steps(net, distill_from="next"):
    """Train on noise with all that reaches into a network; returns the losses' terms."""
    recipe = tiny_recipe(feature_weight=0.1, equilibrium=True, distill_from=distill_from)
    run = start(net, recipe, CPU.device)
    run.student.train()
    x, ids = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for _ in range(2):
        terms = objective(recipe, run.student(x), ids)
        run.optimizer.zero_grad()
        total(terms).backward()
        run.optimizer.step()
    assert all(p.grad is not None for p in run.student.parameters())
    assert total(terms).isfinite()
    return terms


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_two_steps_with_every_term(name):
    torch.manual_seed(0)
    terms = two_steps(build(name, 3, width=16 if name.endswith("lite") else 8))
    assert {term.split("/")[0] for term in terms} == {"label", "distillation", "feature"}


class StridedPointwise(TorchDispatchMode):
    """Counts the 1x1 convolutions that leave pixels out."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            _, weight, _, stride, *_ = args
            self.count += weight.shape[2:] == (1, 1) and max(stride) > 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("name", quick_or_slow(ARCHITECTURES))
def test_no_strided_1x1_convolution_is_trained_on_a_processor(name):
    """Its backward pass writes past its memory where few channels come in."""
    net = build(name, 3, width=16 if name.endswith("lite") else 8).train()
    with StridedPointwise() as seen:
        net(torch.randn(2, 3, 32, 32))
    assert seen.count == 0


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 9])
def test_a_shortcut_is_the_same_while_training(side):
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(4, 6, 1, 2, bias=False), torch.randn(2, 4, side, side)
    torch.testing.assert_close(projected(convolution.train(), x), projected(convolution.eval(), x))


NARROW = """
import torch
from model.resnet import Projection

torch.set_num_threads(1)
for channels in (4, 8):
    shortcut = Projection(channels, 16, 2).to(memory_format=torch.channels_last)
    for side in (46, 48, 56, 64):
        x = torch.randn(50, channels, side, side).to(memory_format=torch.channels_last)
        for _ in range(3):
            shortcut(x.requires_grad_()).sum().backward()
"""


def test_a_narrow_shortcut_does_not_end_the_process():
    """On a processor with AVX-512, torch's own convolution does."""
    subprocess.run([sys.executable, "-c", NARROW], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "arguments",
    [{"exits": "blocks"}, {"head": "compact"}, {"attention": False}, {"keep": [2, 4]}],
    ids=str,
)
@pytest.mark.parametrize(
    "distill_from",
    ["next", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepest", "ensemble"))],
)
def test_every_shape_takes_two_steps_from_every_teacher(arguments, distill_from):
    torch.manual_seed(0)
    net = build("resnet50", 3, width=8, **arguments)
    terms = two_steps(net, distill_from)
    assert len([t for t in terms if t.startswith("label")]) == net.exits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # as torch itself does
@pytest.mark.parametrize(
    "options", [{}, {"equilibrium": True, "adapt": True, "next_deeper": True}], ids=["plain", "all"]
)
def test_a_compiled_student_is_one_graph_that_outlasts_validation(options):
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds to import

    torch._dynamo.reset()
    student, counter = Student(tiny_net(), **options), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(student, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        student.train()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = forward(x)
        sum(logits.float().sum() for logits in outputs.logits).backward()
        with torch.inference_mode():
            student.net.eval()(x)
    assert counter.frame_count == 1
    assert all(p.grad is not None for p in student.net.parameters())
