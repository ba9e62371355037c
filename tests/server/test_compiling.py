"""Compiled stages come into a running server, or it says why they do not."""

import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from model.bundle import BundleError, load_servable
from model.fold import fold_stages
from model.numerics import suits_cpu
from model.policy import Calibration, Measure, Rule
from model.quantisation import observe, quantise
from server.__main__ import main
from server.agreement import disagreement, outputs_of
from server.compile import compile_unit
from server.compile import main as compile_main
from server.compiled import CompiledUnit
from server.compiling import Compiling
from server.costs import CostTable, batch_sizes
from server.engine import Engine
from server.metrics import EngineMetrics, Metrics
from server.overload import Level, OverloadController
from server.runner import Runner
from server.scheduler import Scheduler
from server.served import Served
from server.settings import Settings
from server.units import Unit, example_inputs, make_units
from tests.conftest import PREPROCESS, ROOT, encode, noise, running, until
from tests.model.networks import FAMILIES, images, tiny
from tests.program import fake_program
from tests.server.test_engine import FakeLoop, FakePromise

CPU = torch.device("cpu")
FULL_DEPTH = Rule((2.0, 2.0, 2.0, 0.0), 1, 4)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)


def compute(seconds):
    """Keep a thread busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class FakeFolder:
    """Programs that are the eager units, each called by the name of its file."""

    def __init__(self, bundle, units):
        self.bundle = bundle
        self.units = units
        self.broken = set()
        self.wrong = set()
        self.waiting = set()

    def load(self, file, dtype, workers, threads):
        if file.name in self.broken:
            raise RuntimeError("it is damaged")
        stage, size = map(int, re.findall(r"\d+", file.name))

        def wait():
            if file.name in self.waiting:
                another = threading.Thread(target=compute, args=(0.02,))
                another.start()
                another.join()

        off = 0.5 if file.name in self.wrong else 0.0
        return fake_program(self.bundle, self.units, stage, size, meanwhile=wait, off=off)


@pytest.fixture
def units(bundle):
    return make_units(bundle, CPU, torch.float32)


@pytest.fixture
def folder(bundle, units):
    return FakeFolder(bundle, units)


@pytest.fixture
def compiling(bundle, bundle_path, units, folder, tmp_path):
    """Of batches of 1 and 2, with every program in the cache."""
    chosen = Settings(bundle=bundle_path, cache_dir=tmp_path, max_batch=2)
    one = Compiling(chosen, bundle, units, torch.float32, load=folder.load)
    for stage in (1, 2, 3, 4):
        for size in (1, 2):
            one._programs.file(stage, size).touch()
    return one


def handed_over(compiling):
    said = []
    compiling.use_ready(lambda stage, size, program, seconds: said.append((stage, size)))
    return said


@pytest.mark.slow
def test_every_program_is_handed_over_once(compiling):
    assert not compiling.complete
    assert sorted(handed_over(compiling)) == [(k, n) for k in (1, 2, 3, 4) for n in (1, 2)]
    assert compiling.complete
    assert handed_over(compiling) == []


@pytest.mark.slow
def test_what_the_cache_holds_is_handed_over_in_the_background_and_no_compiler_begun(compiling):
    said, teams = [], []
    compiling.compile_in_background(lambda *use: said.append(use[:2]), teams.append)
    compiling._thread.join(20)
    assert sorted(said) == [(k, n) for k in (1, 2, 3, 4) for n in (1, 2)]
    assert compiling.complete and compiling._process is None


@pytest.mark.slow
@pytest.mark.parametrize(("compile", "waits"), [("auto", False), ("require", True)])
def test_only_where_compiled_stages_are_required_is_a_full_cache_waited_for(
    serve, bundle_path, compiling, folder, png, tmp_path, monkeypatch, compile, waits
):
    checked = threading.Event()

    def load(*file):
        assert waits or checked.wait(20)
        return folder.load(*file)

    monkeypatch.setattr("server.loaded.Compiling", partial(Compiling, load=load))
    with serve(compile=compile, cache_dir=tmp_path, max_batch=2) as server:
        assert server.served.ready
        assert server.served.loaded._compiling.complete == waits
        assert server.post(png).status_code == 200
        checked.set()
        until(lambda: server.served.loaded._compiling.complete)
        assert server.post(png).status_code == 200


@pytest.mark.slow
def test_a_broken_program_makes_way_for_a_new_one(compiling, folder, caplog):
    folder.broken = {"stage2-batch1.bin"}
    assert (2, 1) not in handed_over(compiling)
    file = compiling._programs.file(2, 1)
    assert not file.exists()
    assert not compiling.complete
    assert "cannot be used (it is damaged)" in caplog.text
    folder.broken = set()
    file.touch()  # as the compiler would
    assert handed_over(compiling) == [(2, 1)]
    assert compiling.complete


@pytest.mark.slow
def test_a_program_that_disagrees_is_never_used_and_said_once(compiling, folder, caplog):
    folder.wrong = {"stage3-batch2.bin"}
    assert (3, 2) not in handed_over(compiling)
    assert handed_over(compiling) == []
    assert not compiling.complete
    assert caplog.text.count("differs from the eager stage by 5.0e-01") == 1


@pytest.mark.slow
def test_a_program_that_disagrees_begins_no_compiler_at_each_start(compiling, folder):
    folder.wrong = {"stage3-batch2.bin"}
    compiling.compile_in_background(lambda *_: None, lambda *_: None)
    compiling._thread.join(20)
    assert compiling._process is None


@pytest.mark.slow
def test_what_other_threads_do_meanwhile_does_not_make_a_program_slower(compiling, folder):
    folder.waiting = {"stage1-batch1.bin"}
    shares = {}
    compiling.use_ready(lambda stage, size, program, share: shares.update({(stage, size): share}))
    assert shares[1, 1] < 3.0  # by the clock on the wall it takes 20 times as long


def test_require_without_a_compiler_stops_the_start(bundle_path, no_compiler, capsys, monkeypatch):
    monkeypatch.setattr("server.__main__.configure", lambda *_: None)  # the log stays pytest's
    flags = ("--compile", "require", "--port", "0")
    assert main(["--bundle", str(bundle_path), *flags]) == 2
    said = "error: COMPILE is require, but OpenVINO cannot be imported"
    assert capsys.readouterr().err.startswith(said)


def test_auto_without_a_compiler_serves_eagerly_with_one_warning(
    serve, no_compiler, png, tmp_path, caplog
):
    with serve(compile="auto", cache_dir=tmp_path) as server:
        server.served.loaded._compiling._thread.join(10)
        assert server.post(png).status_code == 200
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    (warning,) = warnings
    said = "stages stay uncompiled, so answers take longer: OpenVINO cannot be imported"
    assert warning.startswith(said)


@pytest.fixture
def no_folder(tmp_path, monkeypatch):
    """A cache that cannot be made, where no temporary folder can be made either."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    return tmp_path / "file" / "cache"


def test_auto_without_a_folder_for_programs_serves_eagerly_with_one_warning(
    serve, no_folder, png, caplog
):
    with serve(compile="auto", cache_dir=no_folder) as server:
        assert server.post(png).status_code == 200
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("stages stay uncompiled, so answers take longer: no folder")


def test_require_without_a_folder_for_programs_says_so(bundle_path, no_folder):
    chosen = Settings(bundle=bundle_path, max_batch=1, cache_dir=no_folder)
    served = Served(chosen.model_copy(update={"compile": "require"}))
    try:
        with pytest.raises(BundleError, match="COMPILE is require, but no folder can hold"):
            served.warm_up()
    finally:
        served.close()


TELLS = """
import sys

def stop(event, _):
    if event in ("os.fork", "os.posix_spawn", "subprocess.Popen") or event.startswith("socket."):
        print(event, flush=True)
        raise PermissionError(event)

from server.compiled import core
sys.addaudithook(stop)
core()
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
"""


@pytest.mark.slow
def test_openvino_tells_nobody_that_it_is_imported(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", TELLS],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_command_without_a_compiler_is_one_sentence_and_status_2(no_compiler, capsys):
    assert compile_main([]) == 2
    assert capsys.readouterr().err.startswith("error: OpenVINO cannot be imported")


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_warning(bundle, units, tmp_path, caplog):
    chosen = Settings(bundle=tmp_path / "gone", cache_dir=tmp_path, max_batch=1)
    compiling = Compiling(chosen, bundle, units, torch.float32)
    compiling.compile_in_background(lambda *_: None, lambda *_: None)
    compiling._thread.join(60)
    compiling.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("stages stay uncompiled")
    assert "is not a bundle" in warning


def test_a_compiler_that_was_stopped_before_it_began_never_does(
    bundle, bundle_path, units, tmp_path
):
    chosen = Settings(bundle=bundle_path, cache_dir=tmp_path, max_batch=1)
    compiling = Compiling(chosen, bundle, units, torch.float32)
    compiling.stop()
    assert list(compiling.compile()) == []
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("wanted", ["auto", "require"])
def test_a_server_that_drains_before_it_is_warm_compiles_nothing(
    bundle_path, tmp_path, caplog, wanted
):
    caplog.set_level(logging.INFO)
    chosen = Settings(bundle=bundle_path, cache_dir=tmp_path, max_batch=1, compile=wanted)

    served = Served(chosen)
    use_programs = served.loaded._use_programs

    def told(*handing_over):
        served.draining = True
        served.stop_compiling()  # as the signal does, when there is nothing to stop
        use_programs(*handing_over)

    served.loaded._use_programs = told
    served.warm_up()
    served.close()
    assert not list(tmp_path.rglob("*.bin"))
    assert "ready" not in caplog.text


def test_an_interrupt_is_not_for_the_compiler(compiling):
    process = compiling._begin(["sleep", "30"])
    os.kill(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    compiling.stop()
    with process:
        assert process.wait(10) == -signal.SIGTERM
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Swapping:
    """An engine over a real runner, driven step by step, with programs to change over to."""

    def __init__(self, bundle):
        self.bundle = bundle
        self.runner = Runner(bundle, CPU, torch.float32)
        self.costs = CostTable(self.runner.warm_up(batch_sizes(4)))
        controller = OverloadController([Level(0.01, FULL_DEPTH.thresholds[:-1])], None)
        metrics = EngineMetrics(Metrics(4), "tiny", [1, 2, 3, 4])
        scheduler = Scheduler(self.costs, controller, 4)
        self.engine = Engine(scheduler, self.runner, metrics, 0.0, promise=FakePromise)
        self.ran = 0

    def answers(self, images, swap_after):
        """Every image's answer, with the change between two batches."""
        tickets = [
            self.engine.submit(i, FULL_DEPTH, self.engine._clock(), loop=FakeLoop()) for i in images
        ]
        steps = 0
        while steps == 0 or self.engine.step(False):
            if steps == swap_after:
                self.engine.call(self._change_over)
            steps += 1
        return [ticket.promise.results for ticket in tickets]

    def _change_over(self):
        for stage in range(1, 5):
            for size in batch_sizes(4):
                self.runner.use_program(stage, size, self._program(stage, size), 1e-9)
            self.costs.replace(stage, self.runner.expected(stage, 4))

    def _program(self, stage, size):
        return fake_program(self.bundle, self.runner.units, stage, size, meanwhile=self._count)

    def _count(self):
        self.ran += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "swap_after", [pytest.param(n, marks=[] if n in (0, 3) else pytest.mark.slow) for n in range(7)]
)
def test_no_answer_is_lost_or_changed_when_programs_come_between_two_batches(bundle, swap_after):
    images = list(np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8))
    never, swapping = Swapping(bundle), Swapping(bundle)
    expected = never.answers(images, None)
    answers = swapping.answers(images, swap_after)
    assert never.ran == 0 < swapping.ran
    for said, was in zip(answers, expected, strict=True):
        (said,), (was,) = said, was
        assert said.exit == 4
        np.testing.assert_allclose(said.probabilities, was.probabilities, atol=1e-4)


class Asking(threading.Thread):
    """A client that asks the same again and again, and keeps every answer."""

    def __init__(self, server, image):
        super().__init__()
        self.server = server
        self.image = image
        self.answers = []
        self.enough = threading.Event()

    def run(self):
        while not self.enough.wait(0.1):  # the compiler needs the cores too
            response = self.server.post(self.image, explain="true", max_accuracy_loss=0.0)
            self.answers.append((response.status_code, response.json()))


@pytest.fixture(scope="module")
def compiled(bundle_path, tmp_path_factory):
    """A cache that a server filled, and what its clients were told from its start to then."""
    cache = tmp_path_factory.mktemp("cache")
    chosen = Settings(
        bundle=bundle_path,
        cache_dir=cache,
        max_batch=1,
        threads=1,
        compile="auto",
        default_deadline_ms=None,  # however long a compiler keeps the cores
    )
    with running(Served(chosen)) as server:
        clients = [Asking(server, encode(noise(seed=i))) for i in range(3)]
        for client in clients:
            client.start()
        compiling = server.served.loaded._compiling
        compiling._thread.join(60)
        complete, told = compiling.complete, len(clients[0].answers)
        runner = server.served.engine._runner
        until(lambda: all(runner._plan(stage, 1) for stage in (1, 2, 3, 4)))
        for client in clients:
            client.enough.set()
            client.join(20)
    assert complete
    assert told > 1
    return cache, [client.answers for client in clients]


@pytest.mark.slow
def test_no_answer_is_lost_or_changed_while_a_server_compiles(compiled):
    for answers in compiled[1]:
        assert {status for status, _ in answers} == {200}
        first = answers[0][1]["seen"]
        for _, answer in answers:
            assert [s["class_id"] for s in answer["seen"]] == [s["class_id"] for s in first]
            said = [s["confidence"] for s in answer["seen"]]
            assert said == pytest.approx([s["confidence"] for s in first], abs=2e-3)


@pytest.mark.slow
def test_compiled_units_equal_the_eager_ones_at_every_stage(compiled, bundle, units):
    files = {f.name: f for f in compiled[0].rglob("*.bin")}
    assert len(files) == len(units)
    inputs = example_inputs(units, bundle, 1)
    for k, unit in enumerate(units, start=1):
        program = CompiledUnit(files[f"stage{k}-batch1.bin"], torch.float32)
        assert disagreement(program, unit, inputs[k - 1], torch.float32) is None
        with torch.inference_mode():
            features, _, _ = unit(*inputs[k - 1])
            torch.testing.assert_close(
                outputs_of(program, inputs[k - 1])[0], features, atol=1e-4, rtol=1e-4
            )


@pytest.mark.slow
def test_a_unit_keeps_to_one_thread(compiled):
    (file,) = compiled[0].rglob("stage1-batch1.bin")
    program = CompiledUnit(file, torch.float32)
    assert not program.buffers[0].any()
    program.run()
    own, all_threads = time.thread_time(), time.process_time()
    for _ in range(300):
        program.run()
    own, all_threads = time.thread_time() - own, time.process_time() - all_threads
    assert all_threads < 1.5 * own


@pytest.mark.slow
def test_a_team_gives_the_same_answer(compiled, bundle, units):
    (file,) = compiled[0].rglob("stage1-batch1.bin")
    team = CompiledUnit(file, torch.float32, threads=2)
    (inputs, *_) = example_inputs(units, bundle, 1)
    assert disagreement(team, units[0], inputs, torch.float32) is None
    assert team._network.get_property("INFERENCE_NUM_THREADS") == 2


@pytest.mark.slow
def test_workers_may_call_a_unit_at_the_same_time(compiled, bundle, units):
    (file,) = compiled[0].rglob("stage1-batch1.bin")
    program = CompiledUnit(file, torch.float32, workers=2)
    (inputs, *_) = example_inputs(units, bundle, 1)
    with torch.inference_mode():
        expected = units[0](*inputs)[1]
        with ThreadPoolExecutor(2) as workers:
            said = list(workers.map(lambda _: outputs_of(program, inputs)[1].clone(), range(50)))
    for one in said:
        torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_signal_is_heard_after_another_thread_frees_a_unit(compiled):
    (file,) = compiled[0].rglob("stage1-batch1.bin")
    units, heard = [CompiledUnit(file, torch.float32)], []
    freeing = threading.Thread(target=units.clear)
    freeing.start()
    freeing.join()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        signal.raise_signal(signal.SIGUSR1)  # ends the process where its stack is gone
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_program_is_compiled_anew(compiled, bundle, bundle_path, units, caplog, damage):
    cache, _ = compiled
    (file,) = cache.rglob("stage4-batch1.bin")
    whole = file.read_bytes()
    half = len(whole) // 2
    file.write_bytes(whole[:half] + (bytes(half) if damage == "overwritten" else b""))
    chosen = Settings(bundle=bundle_path, cache_dir=cache, max_batch=1)
    compiling = Compiling(chosen, bundle, units, torch.float32)
    assert (4, 1) not in handed_over(compiling)
    assert caplog.text.count("cannot be used") == 1
    assert [line.split(" in ")[0] for line in compiling.compile()] == ["ready stage 4 batch 1"]
    assert handed_over(compiling) == [(4, 1)]
    assert compiling.complete


@pytest.mark.slow
def test_rows_that_are_kept_outlast_the_next_batch(compiled, bundle, units):
    """A compiled unit's outputs are overwritten by the thread's next call."""
    runner = Runner(bundle, CPU, torch.float32)
    for file in compiled[0].rglob("stage*-batch1.bin"):
        unit = CompiledUnit(file, torch.float32)
        runner.use_program(int(file.name[len("stage")]), 1, unit, 0.0)
    first, second = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    kept = runner.keep(runner.run(1, [first]), (0,))
    runner.run(1, [second])
    eager = Runner(bundle, CPU, torch.float32)
    expected = eager.run(2, eager.keep(eager.run(1, [first]), (0,)))
    np.testing.assert_allclose(runner.run(2, kept).probabilities, expected.probabilities, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    FAMILIES,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_every_kind_of_block_is_compiled(architecture, dtype, tmp_path):
    if not suits_cpu(dtype):
        pytest.skip("this processor has no AVX2")
    net = tiny(architecture)
    stages = fold_stages(net)
    if dtype is torch.int8:
        stages = quantise(stages, observe(stages, [images(32, 8)]))
    inputs = (torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),)
    for k, stage in enumerate(stages):
        calibration = Calibration(temperature=1.0, carry=0.5 * (k > 0))
        normalise = PREPROCESS if k == 0 else None
        unit = Unit(stage, calibration, Measure.MARGIN, normalise, torch.float32).eval()
        compile_unit(unit, inputs, dtype, tmp_path / "unit.bin")
        program = CompiledUnit(tmp_path / "unit.bin", dtype)
        assert disagreement(program, unit, inputs, dtype) is None
        if dtype is torch.int8 and platform.machine() == "x86_64":
            assert convolutions_in_eight_bits(program) == 1.0
        with torch.inference_mode():
            features, _, log_probabilities = unit(*inputs)
        inputs = features.clone(), log_probabilities.clone()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere others compute")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_no_compiled_unit_copies_features_at_its_borders(tmp_path):
    bundle = load_servable(ROOT / "model" / "default")
    units = make_units(bundle, CPU, torch.float32)
    for unit, inputs in zip(units[1:], example_inputs(units, bundle, 1)[1:], strict=True):
        compile_unit(unit, inputs, torch.float32, tmp_path / "unit.bin")
        for operation in operations(CompiledUnit(tmp_path / "unit.bin", torch.float32)):
            moves = operation.get_rt_info()["layerType"].value in ("Reorder", "Transpose")
            if moves and len(operation.output(0).partial_shape) == 4:
                assert operation.get_friendly_name().endswith("_fake")  # a name alone


def convolutions_in_eight_bits(program):
    """The share of a unit's convolutions that compute in integers."""
    said = [o.get_rt_info() for o in operations(program)]
    kinds = [o["primitiveType"].value for o in said if "Conv" in o["layerType"].value]
    return sum("I8" in kind for kind in kinds) / len(kinds)


def operations(program):
    """What a compiled unit consists of, as OpenVINO runs it."""
    return program._network.get_runtime_model().get_ops()
