"""The pieces that a run is made of."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model.bundle import save_bundle
from model.network import build
from tests.training.conftest import CPU, PREPROCESS, image_set, tiny_net, tiny_recipe
from training import train
from training.captured import record_cuda
from training.data import Listing
from training.distributed import Processes, processes
from training.ema import Average
from training.folder import Folder
from training.loop import fit
from training.pretrained import load_pretrained, load_trained
from training.recipe import Recipe
from training.run import TrainingError, start
from training.schedule import pace
from training.stream import Stream
from training.student import Student
from training.teacher import Teacher, load_teacher
from training.train import short_steps


def rates(recipe, steps=300):
    return [pace(recipe, step, steps).learning_rate for step in range(steps)]


def test_cosine_warms_up_in_a_line_and_ends_at_nothing():
    found = rates(Recipe(warmup=0.1, learning_rate=0.2))
    assert found[0] == pytest.approx(0.2 / 30)
    assert found[14] == pytest.approx(0.1)
    assert max(found) == found[29] == pytest.approx(0.2)
    assert found[30 + 135] == pytest.approx(0.1)
    assert 0 <= found[-1] < 1e-4
    assert found[30:] == sorted(found[30:], reverse=True)


def test_steps_divide_at_one_third_two_thirds_and_ten_from_the_end():
    found = rates(Recipe(schedule="steps", warmup=0, epochs=250), steps=250)
    tenths = [e for e in range(1, 250) if found[e] < found[e - 1] * 0.5]
    assert tenths == [83, 166, 240]
    assert found[0] == 0.1 and found[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(("epochs", "borders"), [(12, [4, 8]), (30, [10, 20]), (40, [13, 26, 30])])
def test_steps_of_a_short_run_divide_in_order(epochs, borders):
    found = rates(Recipe(schedule="steps", warmup=0, epochs=epochs), steps=epochs)
    assert [e for e in range(1, epochs) if found[e] < found[e - 1] * 0.5] == borders


def test_steps_of_a_short_run_begin_undivided():
    assert rates(Recipe(schedule="steps", warmup=0, epochs=2), steps=10)[0] == 0.1


def test_one_cycle_lowers_the_momentum_while_the_rate_is_high():
    recipe = Recipe(schedule="one-cycle", warmup=0.3, momentum=0.95)
    paces = [pace(recipe, step, 100) for step in range(100)]
    top = max(range(100), key=lambda i: paces[i].learning_rate)
    assert top == 29 and paces[top].momentum == pytest.approx(0.85)
    assert paces[99].momentum == pytest.approx(0.95, abs=1e-3)
    assert paces[0].learning_rate < 0.01


def test_one_cycle_never_lowers_the_momentum_below_nothing():
    recipe = Recipe(schedule="one-cycle", momentum=0.05)
    momenta = [pace(recipe, step, 100).momentum for step in range(100)]
    assert min(momenta) == 0 and momenta[99] == pytest.approx(0.05, abs=1e-3)


def test_a_constant_rate_stays_after_its_warm_up():
    assert set(rates(Recipe(schedule="constant", warmup=0.1))[30:]) == {0.1}


def test_the_average_of_what_never_changes_is_that():
    net = tiny_net()
    average = Average(net, 0.9)
    for _ in range(3):
        average.update(net)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(average.state[name], value)


def test_the_average_moves_by_one_minus_its_decay():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = Average(net, 0.9)
    average.updates = 1000  # past the first steps, in which it forgets faster
    nn.init.ones_(net.weight)
    average.update(net)
    assert average.state["weight"].item() == pytest.approx(0.1)
    average.update(net)
    assert average.state["weight"].item() == pytest.approx(0.19)


def test_the_average_soon_forgets_where_it_started():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = Average(net, 0.9999)
    nn.init.ones_(net.weight)
    for _ in range(30):
        average.update(net)
    assert average.state["weight"].item() > 0.99


def test_running_statistics_are_averaged_and_counters_copied():
    net = nn.BatchNorm2d(2)
    average = Average(net, 0.5)
    average.updates = 1000
    net.running_mean.fill_(4.0)
    net.num_batches_tracked.fill_(7)
    average.update(net)
    assert average.state["running_mean"].tolist() == [2.0, 2.0]
    assert average.state["num_batches_tracked"] == 7


def test_a_lent_average_is_given_back_even_after_an_error():
    net = nn.Linear(2, 2)
    own = net.weight.detach().clone()
    average = Average(net, 0.5)
    average.state["weight"].fill_(3.0)
    with pytest.raises(RuntimeError), average.applied(net):
        assert (net.weight == 3).all()
        raise RuntimeError
    assert torch.equal(net.weight, own)


def test_a_student_computes_what_its_network_does(make_student):
    x = torch.randn(2, 3, 16, 16)
    for student in (make_student(), make_student(equilibrium=True, adapt=True)):
        for ours, plain in zip(student(x).logits, student.net(x), strict=True):
            assert torch.equal(ours, plain)


def test_equilibrium_shares_the_trunks_gradient_among_the_exits_left(make_student):
    x = torch.randn(2, 3, 16, 16)
    stem = []
    for exit in range(4):
        parts = []
        for equilibrium in (False, True):
            student = make_student(equilibrium=equilibrium)
            student(x).logits[exit].sum().backward()
            parts.append(student.net.backbone.conv1.weight.grad)
        stem.append((parts[1] / parts[0]).median().item())
    # Whichever exit the loss is at, its share of the trunk's gradient is one of four.
    assert stem == pytest.approx([0.25] * 4, rel=1e-3)


def test_equilibrium_leaves_heads_alone(make_student):
    x = torch.randn(2, 3, 16, 16)
    grads = []
    for equilibrium in (False, True):
        student = make_student(equilibrium=equilibrium)
        student(x).logits[0].sum().backward()
        grads.append(student.net.head(1).fc.weight.grad)
    torch.testing.assert_close(*grads)


def test_adapters_map_to_the_width_of_their_teacher():
    deepest = Student(tiny_net(), adapt=True)
    assert {a.out_features for a in deepest.adapters} == {deepest.net.head(4).fc.in_features}
    assert len(deepest(torch.randn(2, 3, 16, 16)).adapted) == 3


def test_idle_adapters_neither_run_nor_learn():
    student = Student(tiny_net())
    assert student(torch.randn(2, 3, 16, 16)).adapted == []
    assert not any(p.requires_grad for p in student.adapters.parameters())


def test_weight_decay_spares_biases_and_normalisation_unless_told():
    spared = start(tiny_net(), tiny_recipe(weight_decay=0.1), CPU.device).optimizer.param_groups
    assert [g["weight_decay"] for g in spared] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in spared[1]["params"])
    every = tiny_recipe(weight_decay=0.1, decay_all=True)
    assert {
        g["weight_decay"] for g in start(tiny_net(), every, CPU.device).optimizer.param_groups
    } == {0.1}


CLASSES = ("dark", "light", "middle")


def save(path, net, classes=CLASSES, **arguments):
    save_bundle(
        path,
        net.eval(),
        name="teacher",
        version="1",
        architecture="resnet10",
        arguments={"width": 8, **arguments},
        classes=classes,
        preprocess=PREPROCESS,
        training={},
    )
    return path


def test_only_a_device_without_bf16_is_said_to_be_slow_in_it(capsys):
    def said(precision, device="cpu", has=False):
        processes = Processes(torch.device(device))
        train.warn_of_detour(precision, processes, lambda dtype, device: has)
        return capsys.readouterr().err

    assert "--precision fp32 is faster" in said("bf16")
    assert "--precision fp16 is faster" in said("bf16", device="cuda")
    assert said("bf16", has=True) == said("fp32") == said("fp16", device="cuda") == ""
    assert said("bf16", device="cuda", has=True) == ""


def test_a_teacher_answers_with_its_deepest_exit(tmp_path):
    teacher = load_teacher(
        save(tmp_path, tiny_net(5)), ("dark", "light", "middle"), torch.device("cpu")
    )
    pixels = image_set(4).pixels
    expected = teacher.net(PREPROCESS.normalise(pixels))[-1]
    assert torch.equal(teacher(pixels), expected)
    assert not teacher(pixels).requires_grad and not teacher.net.training


def test_a_teacher_of_another_size_sees_the_image_scaled(tmp_path):
    net = tiny_net(5).eval()
    large = PREPROCESS.model_copy(update={"size": 32})
    assert Teacher(net, large, torch.device("cpu"))(image_set(4).pixels).shape == (4, 3)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    path = save(tmp_path, tiny_net(5), classes=("a", "b", "c"))
    with pytest.raises(TrainingError, match="knows 3 classes that are not the 3 of the data"):
        load_teacher(path, ("dark", "light", "middle"), torch.device("cpu"))


@pytest.mark.slow
def test_a_student_comes_to_agree_with_its_teacher(make_work):
    taught = tiny_net(5)
    with torch.no_grad():  # a teacher with a mind of its own: everything is dark
        taught.head(4).fc.weight.zero_()
        taught.head(4).fc.bias.copy_(torch.tensor([8.0, 0.0, 0.0]))
    teacher = Teacher(taught, PREPROCESS, torch.device("cpu"))
    run, work = make_work(epochs=6, teacher=teacher, teacher_weight=1.0, distillation_weight=0.0)
    fit(run, work)
    answers = run.net.eval()(PREPROCESS.normalise(image_set(12).pixels))[-1].argmax(1)
    assert answers.tolist() == [0] * 12
    assert {"teacher/1", "teacher/4"} <= set(run.names)


@pytest.mark.slow
def test_a_bundle_is_where_training_goes_on(tmp_path):
    trained, net = tiny_net(5), tiny_net(1)
    load_trained(net, save(tmp_path, trained), CLASSES)
    for name, value in trained.state_dict().items():  # bundles keep half precision
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("classes", [CLASSES[:2], CLASSES[::-1]], ids=["fewer", "in other order"])
def test_a_bundle_of_other_classes_gives_everything_but_its_classifiers(tmp_path, classes):
    save(tmp_path, tiny_net(5))
    net = build("resnet10", len(classes), width=8)
    fresh = net.head(1).fc.weight.clone()
    load_trained(net, tmp_path, classes)
    assert torch.equal(net.head(1).fc.weight, fresh)
    torch.testing.assert_close(
        net.backbone.state_dict(), tiny_net(5).backbone.state_dict(), rtol=1e-3, atol=1e-3
    )


def test_a_bundle_of_another_network_is_no_start(tmp_path):
    wider = build("resnet10", 3, width=16)
    with pytest.raises(TrainingError, match="is of another network: it differs at "):
        load_trained(wider, save(tmp_path, tiny_net(5)), CLASSES)


@pytest.mark.parametrize("form", ["safetensors", "torch", "nested"])
def test_a_plain_backbone_is_where_training_starts(tmp_path, form):
    published = build("resnet10", 3, width=8).backbone
    state = {**published.state_dict(), "fc.weight": torch.zeros(1000, 32)}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, file)
    elif form == "torch":
        torch.save(state, file)
    else:
        wrapped = {f"module.{k}": v for k, v in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, file)
    net = tiny_net(1)
    load_pretrained(net, tiny_net().backbone, file)
    for name, value in published.state_dict().items():
        assert torch.equal(net.backbone.state_dict()[name], value)


def test_a_shorter_network_starts_from_the_front_of_a_whole_backbone(tmp_path):
    published = build("resnet10", 3, width=8).backbone
    torch.save(published.state_dict(), tmp_path / "w.pth")
    net = tiny_net(1, keep=[1, 2])
    load_pretrained(net, tiny_net().backbone, tmp_path / "w.pth")
    assert torch.equal(net.backbone.conv1.weight, published.conv1.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: build("resnet10", 3, width=16).backbone.state_dict(),
            "does not fit this backbone",
        ),
        (lambda: {"weights": 3}, "is not a state dict of plain weights"),
        (lambda: math.sqrt, "is not a state dict of plain weights"),
        (lambda: b"PK half a file", "is not a state dict of plain weights"),
        (lambda: b"\x80\x02]q\x00.", "is not a state dict of plain weights"),
        (lambda: b"", "is not a state dict of plain weights"),
    ],
)
def test_weights_that_cannot_be_used_say_why(tmp_path, content, message):
    made = content()
    if isinstance(made, bytes):
        (tmp_path / "w.pth").write_bytes(made)
    else:
        torch.save(made, tmp_path / "w.pth")
    with pytest.raises(TrainingError, match=message):
        load_pretrained(tiny_net(), tiny_net().backbone, tmp_path / "w.pth")


def test_missing_weights_are_said(tmp_path):
    with pytest.raises(TrainingError, match="cannot read"):
        load_pretrained(tiny_net(), tiny_net().backbone, tmp_path / "none.pth")


def test_a_process_with_a_card_tells_the_others_by_it(monkeypatch):
    started = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    dist = torch.distributed
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: started.append((*a, k)))
    for name, value in (("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda value=value: value)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda: None)
    card = torch.device("cuda", 1)
    with processes("auto") as mine:
        assert (mine.device, mine.rank, mine.count) == (card, 1, 2)
    assert started == [card, ("nccl", {"device_id": card})]


def on_a_card(size, images=None, count=1, **options):
    training = image_set() if images is None else images
    data = Folder(training, training, None, PREPROCESS.model_copy(update={"size": size}), "", "")
    return short_steps(data, Recipe(**options), Processes(torch.device("cuda"), count=count))


def test_steps_over_small_images_on_a_card_are_captured_and_augmented_in_blocks():
    assert on_a_card(32, batch_size=128) == (record_cuda, 32)
    assert on_a_card(224, batch_size=128) == (record_cuda, 1)
    assert on_a_card(32, batch_size=128, count=2) == (None, 32)


def test_steps_elsewhere_are_taken_one_by_one(tmp_path):
    listing = Listing(("a",), (tmp_path / "a/1.png",), (0,))
    assert on_a_card(32, Stream(listing, PREPROCESS)) == (None, 1)
    data = Folder(image_set(), image_set(), None, PREPROCESS, "", "")
    assert short_steps(data, Recipe(), CPU) == (None, 1)
