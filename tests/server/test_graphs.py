"""Captured units: their buffers, where running a unit again stands for a CUDA graph."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.capturing import AS_IT_IS, Capturing, card_capturing
from server.card import CardMemory
from server.costs import batch_sizes
from server.engine import Engine
from server.errors import Draining
from server.fusing import fuse
from server.graphs import WARM_UP_RUNS, Captured, CudaCapture
from server.host import HostMemory
from server.runner import Runner
from server.served import Served
from server.settings import Settings
from server.staging import card_staging
from tests.card import CARD, CPU, card_memory, rerun, staging

LARGEST = 4
IMAGES = list(np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8))


WITHIN = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}
"""How far a confidence on a card may be from the processor's, in float32."""


def capturing(runner, bundle, capture, device=CPU, dtype=torch.float32):
    stages = card_staging() if device == CARD else staging()
    return Capturing(bundle, runner.units, dtype, capture, stages, {})


def with_all(runner, capturing):
    """A runner that runs nothing but captured units."""

    def use(stage, size, program, seconds):
        runner.use_program(stage, size, program, 1e-9 * size)

    capturing.use_all(LARGEST, use, required=True)
    return runner


@pytest.fixture(scope="module")
def eager(bundle):
    return Runner(bundle, CPU, torch.float32)


@pytest.fixture(scope="module")
def captured(bundle):
    runner = Runner(bundle, CPU, torch.float32, card_memory())
    return with_all(runner, capturing(runner, bundle, rerun))


@pytest.fixture(scope="module")
def expected(eager):
    """By stage, every image's probabilities when it runs alone and eagerly."""
    said = []
    inputs = [[image] for image in IMAGES]
    for stage in range(1, eager.exits + 1):
        outputs = [eager.run(stage, one) for one in inputs]
        said.append([o.probabilities[0] for o in outputs])
        inputs = [eager.keep(o, (0,)) for o in outputs]
    return said


@pytest.mark.slow
def test_every_stage_and_size_is_captured_and_preferred(captured):
    for stage in range(1, captured.exits + 1):
        for n in range(1, LARGEST + 1):
            program = captured._plan(stage, n)
            assert isinstance(program, Captured)
            assert len(program.buffers[0]) == min(s for s in batch_sizes(LARGEST) if s >= n)


def test_all_sizes_of_a_stage_share_their_input_buffers_in_channels_last(captured):
    for stage in range(1, captured.exits + 1):
        programs = [captured._plan(stage, n) for n in (1, 2, 4)]
        assert len({p.buffers[0].data_ptr() for p in programs}) == 1
    for stage in range(2, captured.exits + 1):
        features = captured._plan(stage, 4).buffers[0]
        assert features.is_contiguous(memory_format=torch.channels_last)


BATCHES = st.lists(
    st.tuples(st.integers(1, LARGEST), st.lists(st.booleans(), min_size=4, max_size=4)),
    min_size=1,
    max_size=12,
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(BATCHES, st.randoms(use_true_random=False))
def test_every_row_is_its_own_whatever_ran_before_beside_or_after_it(
    captured, expected, batches, chance
):
    """Images enter in batches, some leave, the others join those of other batches."""
    waiting = {stage: [] for stage in range(1, captured.exits + 2)}
    waiting[1] = list(enumerate(IMAGES))
    for n, stay in batches:
        stage = chance.choice([k for k in range(1, captured.exits + 1) if waiting[k]])
        chance.shuffle(waiting[stage])
        batch, waiting[stage] = waiting[stage][:n], waiting[stage][n:]
        output = captured.run(stage, [what for _, what in batch])
        assert n >= len(batch) == len(output.probabilities) == len(output.confidences)
        for (i, _), said in zip(batch, output.probabilities, strict=True):
            np.testing.assert_allclose(said, expected[stage - 1][i], atol=1e-4)
        staying = [place for place, on in enumerate(stay[: len(batch)]) if on]
        kept = captured.keep(output, staying)
        waiting[stage + 1] += [(batch[k][0], row) for k, row in zip(staying, kept, strict=True)]
        if not any(waiting[k] for k in range(1, captured.exits + 1)):
            break


def test_what_was_said_of_a_batch_outlives_the_next(captured):
    first = captured.run(1, IMAGES[:2])
    before = first.probabilities.copy()
    captured.run(1, IMAGES[2:4])
    np.testing.assert_array_equal(first.probabilities, before)


def test_rows_last_once_kept_and_only_then(captured):
    output = captured.run(1, IMAGES[:2])
    kept = captured.keep(output, (0, 1))  # a whole batch
    features = kept[0].features.clone()
    captured.run(1, IMAGES[2:4])
    assert torch.equal(kept[0].features, features)
    assert not torch.equal(output.features, features)
    assert kept[0].features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("few", [0, 8])
def test_rows_between_others_are_picked_as_they_are(captured, monkeypatch, few):
    monkeypatch.setattr("server.card.FEW_SLICES", few)
    output = captured.run(1, IMAGES[:4])
    there = list(zip(output.features.clone(), output.passed.clone(), strict=True))
    kept = captured.keep(output, (0, 3))
    assert kept[0].features.is_contiguous(memory_format=torch.channels_last)
    assert len(kept[0].features) == len(kept) == 2
    for row, (features, passed) in zip(kept, there[::3], strict=True):
        assert torch.equal(row.features[row.place], features)
        assert torch.equal(row.passed[row.place], passed)


def test_numbers_that_are_none_do_not_spread_from_padding(captured, expected):
    program = captured._plan(2, 3)
    with torch.inference_mode():
        for buffer in program.buffers:
            buffer.fill_(float("nan"))
    rows = captured.keep(captured.run(1, IMAGES[:3]), range(3))
    output = captured.run(2, rows)
    np.testing.assert_allclose(output.probabilities, expected[1][:3], atol=1e-4)


def attempt(bundle, capture, required=False):
    runner, used = Runner(bundle, CPU, torch.float32), []
    capturing(runner, bundle, capture).use_all(2, lambda *program: used.append(program), required)
    return used


def no_card(work):
    raise RuntimeError("operation not permitted when stream is capturing")


def stuck(work):
    """Replays that read what was there when it was captured."""
    return lambda: None, work()


def fails_at_the_last():
    left = iter(range(7))  # of eight

    def capture(work):
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rerun(work)

    return capture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capture", "said"),
    [
        (no_card, "not permitted when stream is capturing"),
        (fails_at_the_last(), "out of memory"),
        (stuck, "stage 1, captured for batches of 2, differs from the eager one by"),
    ],
)
def test_a_failed_or_wrong_capture_leaves_every_stage_eager_with_one_warning(
    bundle, caplog, capture, said
):
    assert attempt(bundle, capture) == []
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("stages run without CUDA graphs, so answers take longer: ")
    assert said in warning


class Clock:
    """Goes a little further each time that it is read, and by a second wherever it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now

    def tick(self):
        self.now += 1


def ways_taken(bundle, compute, clock=time.perf_counter):
    """By stage and size, where convolutions may be fused so."""
    runner, taken = Runner(bundle, CPU, torch.float32), []
    ways = {"fused": lambda unit: fuse(unit, compute)}
    units = runner.units
    capturing = Capturing(bundle, units, torch.float32, rerun, staging(), ways, clock)
    capturing.use_all(2, lambda _, __, program, ___: taken.append(program.way), required=True)
    return taken


def in_parts(convolution, x, other):
    out = convolution(x)
    return torch.relu(out if other is None else out + other)


@pytest.mark.slow
def test_stages_are_captured_as_they_are_where_fusing_fails(bundle):
    def wrong(convolution, x, other):
        return in_parts(convolution, x, other) + 1

    assert ways_taken(bundle, wrong) == [AS_IT_IS] * 8


@pytest.mark.slow
def test_stages_are_captured_as_they_are_where_fusing_gains_nothing(bundle):
    clock = Clock()

    def slow(convolution, x, other):
        clock.tick()
        return in_parts(convolution, x, other)

    assert ways_taken(bundle, slow, clock) == [AS_IT_IS] * 8


@pytest.mark.slow
def test_a_fused_stage_is_taken_where_it_is_faster(bundle):
    clock = Clock()
    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: clock.tick() if isinstance(module, torch.nn.ReLU) else None
    ):
        assert ways_taken(bundle, in_parts, clock) == ["fused"] * 8


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "eagerly"), [(HostMemory, True), (card_memory, False)])
def test_a_card_runs_nothing_eagerly_that_a_graph_can_run(bundle, memory, eagerly):
    runner = Runner(bundle, CPU, torch.float32, memory())
    runner.warm_up((1, 2, 4))
    program = object()
    runner.use_program(1, 4, program, 1e9)
    assert runner._plan(1, 3) is (None if eagerly else program)
    assert runner._plan(2, 3) is None
    assert runner._plan(1, 5) is None


@pytest.mark.slow
@pytest.mark.parametrize("draining", [False, True])
def test_a_start_on_a_card_prepares_its_worker_unless_told_to_end(
    bundle_path, monkeypatch, draining
):
    prepared = []
    monkeypatch.setattr("server.loaded.Runner", lambda bundle, _, dtype: Runner(bundle, CPU, dtype))
    monkeypatch.setattr(Engine, "prepare", lambda engine, work: prepared.append(work()))

    served = Served(Settings(bundle=bundle_path, device="cpu", compile="off", max_batch=2))
    served.loaded._use_programs = lambda *handing_over: setattr(served, "draining", draining)
    served.loaded.device = CARD
    served.warm_up()
    served.close()
    assert [list(seconds[1]) for seconds in prepared] == ([] if draining else [[1, 2]])


class Failing(CardMemory):
    """Of a card on which nothing runs."""

    def __init__(self, error):
        super().__init__(CPU, staging())
        self._error = error

    def run_eagerly(self, unit, inputs):
        raise self._error


def test_a_card_that_is_full_is_told_from_one_that_computes_nothing(bundle):
    full = Failing(torch.OutOfMemoryError("CUDA out of memory"))
    Runner(bundle, CPU, torch.float32, full).probe()
    dead = Failing(RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Runner(bundle, CPU, torch.float32, dead).probe()


def test_capturing_ends_early_where_nobody_wants_it_any_more(bundle):
    runner, used, asked = Runner(bundle, CPU, torch.float32), [], iter([False, True])
    with pytest.raises(Draining):
        capturing(runner, bundle, rerun).use_all(
            2, lambda *program: used.append(program), False, lambda: next(asked)
        )
    assert not used and not list(asked)


def test_warming_up_ends_early_where_nobody_wants_it_any_more(bundle):
    runner, asked = Runner(bundle, CPU, torch.float32), iter([False, True])
    with pytest.raises(Draining):
        runner.warm_up((1, 2, 3), draining=lambda: next(asked))
    assert not list(asked)


def test_a_failed_capture_ends_a_start_that_requires_it(bundle):
    with pytest.raises(RuntimeError, match="not permitted"):
        attempt(bundle, no_card, required=True)


class Workspaces:
    """cuBLAS's only one, made of the memory that is given out when it is first used."""

    def __init__(self):
        self._memory, self._made_of = "ordinary", None

    def use(self):
        self._made_of = self._made_of or self._memory
        return self._made_of

    def forget(self):
        self._made_of = None

    @contextmanager
    def record(self, *_, **__):
        self._memory = "the pool's"
        try:
            yield
        finally:
            self._memory = "ordinary"


@pytest.fixture
def workspaces(monkeypatch):
    """Of a made-up card that only tells what it computes in."""
    one = Workspaces()
    for name in ("graph_pool_handle", "Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", one.record)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", one.forget, raising=False)
    return one


def test_what_a_graph_computes_in_is_its_pools_and_what_warms_up_stays_out_of_it(workspaces):
    capture, used = CudaCapture(), []
    for _ in range(2):
        capture(lambda: used.append(workspaces.use()))
    assert used == [*["ordinary"] * WARM_UP_RUNS, "the pool's"] * 2


def test_nothing_computes_in_the_pool_after_a_capture_that_failed(workspaces):
    def fails():
        if workspaces.use() != "ordinary":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaCapture()(fails)
    assert workspaces.use() == "ordinary"


# --- on a card -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_card(bundle):
    runner = Runner(bundle, CARD, torch.float16)
    return with_all(runner, card_capturing(bundle, runner.units, torch.float16))


@pytest.mark.gpu
def test_cuda_graphs_say_what_the_cpu_says(on_card, expected):
    inputs = IMAGES[:3]
    for stage in range(1, on_card.exits + 1):
        output = on_card.run(stage, inputs)
        inputs = on_card.keep(output, range(3))
        np.testing.assert_allclose(output.probabilities, expected[stage - 1][:3], atol=0.05)


@pytest.mark.gpu
def test_cuda_graphs_are_replayed_by_another_thread_than_captured_them(on_card, expected):
    with ThreadPoolExecutor(1) as engine:
        said = engine.submit(on_card.run, 1, IMAGES[:3]).result().probabilities
    np.testing.assert_allclose(said, expected[0][:3], atol=0.05)


@pytest.mark.gpu
def test_a_graph_that_goes_takes_nothing_from_one_that_stays():
    """Of a product over so many rows that cuBLAS adds up its parts in a workspace."""
    left, right = (torch.randn(32768, 640, device=CARD, dtype=torch.float16) for _ in range(2))
    capture = CudaCapture()

    def work():
        return (left.T @ right,)

    replay, (product,) = capture(work)
    expected = work()[0].clone()
    capture(work)  # a graph that goes at once
    capture(work)  # before which what nobody holds goes back to the card
    product.zero_()
    replay()
    torch.testing.assert_close(product, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_server_on_a_card_answers_as_one_on_a_processor(serve, server, png, dtype):
    asked = {"explain": "true", "max_accuracy_loss": 0}
    expected = server.post(png, **asked).json()
    with serve(device="cuda", compile="require", dtype=dtype) as on_card:
        answer = on_card.post(png, **asked).json()
        assert on_card.metric("gpu_memory_bytes", kind="allocated") > 0
        assert not on_card.served.failed
    assert answer["exit"] == expected["exit"] == 4
    for seen, other in zip(answer["seen"], expected["seen"], strict=True):
        assert seen["confidence"] == pytest.approx(other["confidence"], abs=WITHIN[dtype])


@pytest.mark.gpu
def test_replays_in_any_order_disturb_no_row_that_was_kept(on_card, expected):
    kept = [on_card.keep(on_card.run(1, IMAGES[i : i + n]), range(n)) for i, n in ((0, 1), (1, 4))]
    inputs = kept[1]
    for stage in (2, 3, 4):
        inputs = on_card.keep(on_card.run(stage, inputs), range(4))
    said = on_card.run(2, [kept[1][3], kept[0][0]]).probabilities
    np.testing.assert_allclose(said, [expected[1][4], expected[1][0]], atol=0.05)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype, torch says
def test_a_stage_batch_waits_for_the_card_once(on_card, monkeypatch):
    waits = []
    monkeypatch.setattr("server.card.FEW_SLICES", 1)
    synchronise = torch.cuda.Event.synchronize
    monkeypatch.setattr(
        torch.cuda.Event, "synchronize", lambda e: (waits.append(e), synchronise(e))[1]
    )
    torch.cuda.set_sync_debug_mode("error")  # any other way of waiting fails
    try:
        on_card.keep(on_card.run(1, IMAGES[:3]), (0, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_card_usable(bundle):
    def no_graph(work):
        def waits():
            outputs = work()
            if torch.cuda.is_current_stream_capturing():
                outputs[0].cpu()
            return outputs

        return CudaCapture()(waits)

    runner = Runner(bundle, CARD, torch.float16)
    before = runner.run(1, IMAGES[:2]).confidences
    used = []
    capturing(runner, bundle, no_graph, CARD, torch.float16).use_all(
        2, lambda *program: used.append(program), required=False
    )
    assert not used
    assert not torch.cuda.is_current_stream_capturing()
    with ThreadPoolExecutor(1) as engine:
        assert engine.submit(runner.run, 1, IMAGES[:2]).result().confidences == before
