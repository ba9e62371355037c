"""The laws of a multi-exit network, over every registered architecture."""

import threading

import pytest
import torch
from torch import nn

from model.fold import fold_stages
from model.network import build, build_from
from tests.model.networks import CLASSES, FAMILIES, exact, images, rows, tiny

EVERY = pytest.mark.parametrize(("architecture", "stem"), rows())


def by_stages(net, x):
    logits = []
    for k in range(1, net.exits + 1):
        x, out = net.run_stage(k, x)
        logits.append(out)
    return logits


@pytest.mark.parametrize(("architecture", "stem"), rows(quick_stems=(32, 224)))
@torch.inference_mode()
def test_stage_by_stage_equals_the_whole_forward(architecture, stem):
    net, x = tiny(architecture, stem), images(stem, 2)
    for staged, whole in zip(by_stages(net, x), net(x), strict=True):
        assert torch.equal(staged, whole)


@EVERY
@torch.inference_mode()
def test_a_batch_equals_its_images_one_by_one(architecture, stem):
    net, x = exact(architecture, stem), images(stem, 3).double()
    singles = zip(*(net(one) for one in x.split(1)), strict=True)
    for batched, single in zip(net(x), singles, strict=True):
        torch.testing.assert_close(batched, torch.cat(single), rtol=1e-6, atol=1e-6)
        assert (batched[0] - batched[1]).abs().max() > 1e-3  # images are told apart


@EVERY
@torch.inference_mode()
def test_folded_stages_equal_the_network(architecture, stem):
    net, x = exact(architecture, stem), images(stem, 2).double()
    whole, logits = net(x), []
    for stage in fold_stages(net):
        x, out = stage(x)
        logits.append(out)
    for folded, eager in zip(logits, whole, strict=True):
        torch.testing.assert_close(folded, eager, rtol=1e-6, atol=1e-6)


class Slow(nn.Module):
    """A network of one stage; whoever traces it waits until another thread has called another."""

    exits = 1

    def __init__(self, meanwhile):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.meanwhile = meanwhile

    def __deepcopy__(self, memo):
        return self

    def run_stage(self, k, x):
        thread = threading.Thread(target=self.meanwhile)
        thread.start()
        thread.join()
        x = self.norm(x)
        return x, x


def test_networks_that_other_threads_run_are_not_disturbed_while_one_is_folded():
    """A server runs one bundle while it folds another."""
    net, x, said = tiny("resnet18"), images(32, 2), []
    whole = torch.inference_mode()(lambda: net(x))
    fold_stages(Slow(lambda: said.append(whole())).eval())
    for heard, right in zip(said[0], whole(), strict=True):
        assert torch.equal(heard, right)


@EVERY
def test_weights_load_into_a_network_built_without_any(architecture, stem):
    net = tiny(architecture, stem)
    again = build_from(net.state_dict(), architecture, CLASSES, width=8, stem=stem)
    x = images(stem, 1)
    with torch.inference_mode():
        for ours, theirs in zip(again(x), net(x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [True, False])
@torch.inference_mode()
def test_a_cut_network_says_what_the_whole_one_says_at_that_exit(attention):
    net, x = tiny("resnet18", attention=attention), images(32, 2)
    whole = net(x)
    for exit in range(1, net.exits + 1):
        names = build("resnet18", CLASSES, width=8, attention=attention, keep=[exit]).state_dict()
        weights = {k: v for k, v in net.state_dict().items() if k in names}
        cut = build_from(weights, "resnet18", CLASSES, width=8, attention=attention, keep=[exit])
        assert cut.exits == 1
        assert torch.equal(cut(x)[0], whole[exit - 1])


@torch.inference_mode()
def test_kept_exits_are_numbered_anew_and_run_all_stages_up_to_theirs():
    net, x = tiny("resnet18"), images(32, 2)
    names = build("resnet18", CLASSES, width=8, keep=[2, 4]).state_dict()
    weights = {k: v for k, v in net.state_dict().items() if k in names}
    kept = build_from(weights, "resnet18", CLASSES, width=8, keep=[2, 4])
    second, fourth = by_stages(kept, x)
    assert torch.equal(second, net(x)[1])
    assert torch.equal(fourth, net(x)[3])


@pytest.mark.parametrize("keep", [[], [2, 1], [1, 1], [0], [5], [4, 5]])
def test_kept_exits_rise_and_exist(keep):
    with pytest.raises(ValueError, match=r"must rise within 1\.\.4"):
        build("resnet10", CLASSES, width=8, keep=keep)


def test_a_cut_network_holds_nothing_deeper_and_no_other_head():
    names = build("resnet18", CLASSES, width=8, keep=[2]).state_dict()
    assert not [n for n in names if ".layer3." in n or ".layer4." in n]
    assert {n.split(".")[1] for n in names if n.startswith("heads.")} == {"1"}


def test_a_head_without_attention_has_no_gate():
    assert not [n for n in tiny("resnet10", attention=False).state_dict() if ".gate." in n]
    gates = {n.split(".")[1] for n in tiny("resnet10").state_dict() if ".gate." in n}
    assert gates == {"0", "1", "2"}  # the deepest exit never has one


@torch.inference_mode()
def test_heads_never_change_what_the_trunk_hands_on():
    net, x = tiny("resnet18"), images(32, 2)
    features, _ = net.run_stage(1, x)
    assert torch.equal(features, net.features(1, x))


@pytest.mark.parametrize(
    ("architecture", "arguments", "sentence"),
    [
        ("resnet19", {}, "unknown architecture 'resnet19'; known are .*resnet18"),
        ("resnet18", {"depth": 3}, "unknown architecture argument depth"),
        ("resnet18", {"stem": 64}, "stem must be one of 32, 224, not 64"),
        ("resnet18", {"head": "huge"}, "head must be one of paper, compact, not huge"),
        ("resnet18", {"exits": "pixels"}, "exits must be one of stages, blocks, not pixels"),
        ("resnet18", {"width": 0}, "width must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(architecture, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(architecture, CLASSES, **arguments)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_from(tiny("resnet10").state_dict(), "resnet10", CLASSES, width=16)


LATER = ("resnext50-32x4d", "wide-resnet16-4", "pyramidnet101-240", "se-resnet18")
"""Variants of the residual blocks that the others have; the slow tests try them too."""
BY_FAMILY = pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=pytest.mark.slow if a in LATER else []) for a in FAMILIES],
)


@BY_FAMILY
@torch.inference_mode()
def test_exits_after_blocks_leave_the_trunk_as_it_is(architecture):
    by_stage, by_block = tiny(architecture), tiny(architecture, exits="blocks")
    assert list(by_stage.backbone.state_dict()) == list(by_block.backbone.state_dict())
    assert by_block.exits == sum(len(stage) for stage in by_stage.backbone.stages)
    x = images(32, 2)
    for staged, whole in zip(by_stages(by_block, x), by_block(x), strict=True):
        assert torch.equal(staged, whole)


@pytest.mark.slow
@BY_FAMILY
@torch.inference_mode()
def test_a_network_cut_at_any_block_says_what_the_whole_one_says_there(architecture):
    net, x = tiny(architecture, exits="blocks"), images(32, 1)
    whole = net(x)
    for exit in (2, net.exits - 1):
        arguments = {"width": 8, "exits": "blocks", "keep": [exit]}
        names = build(architecture, CLASSES, **arguments).state_dict()
        weights = {k: v for k, v in net.state_dict().items() if k in names}
        cut = build_from(weights, architecture, CLASSES, **arguments)
        torch.testing.assert_close(cut(x)[0], whole[exit - 1])


def test_every_block_of_resnet18_is_a_place_for_an_exit():
    net = tiny("resnet18", exits="blocks")
    assert net.exits == 8
    assert [len(net.blocks(k)) for k in range(1, 9)] == [1] * 8
    assert [len(net.head(k).align) for k in range(1, 9)] == [3, 3, 2, 2, 1, 1, 0, 0]


@BY_FAMILY
@pytest.mark.parametrize("head", ["paper", "compact"])
@torch.inference_mode()
def test_every_family_takes_every_head(architecture, head):
    net, x = tiny(architecture, head=head), images(32, 2)
    assert all(logits.shape == (2, CLASSES) for logits in net(x))
    narrowed = [net.head(k).fc.in_features < net.head(net.exits).fc.in_features for k in (1, 2)]
    assert narrowed == [head == "compact"] * 2


def test_bottlenecks_have_compact_heads_and_the_others_the_papers():
    for architecture, head in [("resnet18", "paper"), ("resnet50", "compact")]:
        with torch.device("meta"):
            default = build(architecture, CLASSES).state_dict()
            named = build(architecture, CLASSES, head=head).state_dict()
        assert {k: v.shape for k, v in default.items()} == {k: v.shape for k, v in named.items()}


def test_a_compact_head_halves_the_resolution_before_it_mixes_channels():
    with torch.device("meta"):
        head = build("resnet50", 100).head(1)
    assert [block[0].stride for block in head.align] == [(2, 2)] * 3
    assert [block[1].in_channels for block in head.align] == [256, 256, 512]
    assert [block[1].out_channels for block in head.align] == [256, 512, 1024]
    assert head.gate.block[1].out_channels == 32
    assert head.fc.in_features == 1024


@BY_FAMILY
def test_a_backbone_cut_short_loads_the_whole_pretrained_one(architecture):
    state = dict(tiny(architecture).backbone.state_dict())
    state |= {"fc.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}
    cut = build(architecture, CLASSES, width=8, keep=[1]).backbone
    cut.load_pretrained(state)
    assert cut.state_dict().keys() < state.keys()
    assert all(torch.equal(v, state[k]) for k, v in cut.state_dict().items())


@pytest.mark.parametrize("size", [17, 75, pytest.param(40, marks=pytest.mark.slow)])
@BY_FAMILY
@torch.inference_mode()
def test_images_need_not_be_of_the_size_that_the_stem_is_for(architecture, size):
    logits = tiny(architecture)(torch.randn(2, 3, size, size))
    assert all(out.isfinite().all() for out in logits)


def test_a_variant_builds_what_its_name_says():
    counts = {
        "resnext50-32x4d": lambda net: net.backbone.layer1[0].conv2.groups == 32,
        "resnext29-8x64d": lambda net: net.backbone.layer1[0].conv2.groups == 8,
        "wide-resnet50-2": lambda net: net.backbone.layer1[0].conv2.out_channels == 128,
        "se-resnet50": lambda net: net.backbone.layer1[0].se.fc1.out_channels == 16,
    }
    with torch.device("meta"):
        assert all(law(build(name, CLASSES)) for name, law in counts.items())
