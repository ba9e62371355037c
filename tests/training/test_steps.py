"""Every architecture trains with every term."""

import pytest
import torch

from model.architectures import ARCHITECTURES
from model.network import build
from tests.training.conftest import CPU, tiny_net, tiny_recipe
from training.losses import total
from training.objective import objective
from training.run import TrainingError, check_kernels, start
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


def test_a_network_too_narrow_for_the_processor_is_refused():
    check_kernels(build("resnet10", 3, width=8), "AVX2")
    check_kernels(build("resnet10", 3, width=4), "AVX512")
    with pytest.raises(TrainingError, match="fewer than 8 channels"):
        check_kernels(build("resnet10", 3, width=4), "AVX2")


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
