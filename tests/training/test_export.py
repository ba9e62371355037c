"""What is exported computes what the bundle's network computes."""

import copy
import math

import pytest
import torch

from model.bundle import load_bundle, load_servable
from tests.training.bundles import write_bundle, write_noisy_images
from training.__main__ import main
from training.export import cut
from training.programs import FORMATS, PACKAGES, TOLERANCE, ExportError, write_programs


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    path = write_bundle(root / "bundle")
    data = write_noisy_images(root / "data", 40)
    assert main(["calibrate", str(path), "--data", str(data)]) == 0
    return path


@pytest.fixture(scope="module")
def net(bundle_path):
    return load_bundle(bundle_path).net


def images(n):
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def export(bundle_path, out, *options):
    return main(["export", str(bundle_path), "--out", str(out), *map(str, options)])


@pytest.mark.slow
@pytest.mark.parametrize("exit", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_a_cut_bundle_serves_alone_what_that_exit_said(bundle_path, net, tmp_path, exit, capsys):
    assert export(bundle_path, tmp_path / "cut", "--exit", exit) == 0
    small = load_servable(tmp_path / "cut")
    assert small.net.exits == 1
    with torch.inference_mode():
        assert torch.equal(small.net(images(5))[0], net(images(5))[exit - 1])
    said = capsys.readouterr().out
    assert all(name in said for name in ("weights, MB", "parameters, M", "MACs, M"))
    assert said.endswith(f"wrote {tmp_path / 'cut'}\n")


def test_cutting_drops_the_other_heads_and_the_deeper_stages(bundle_path, tmp_path):
    export(bundle_path, tmp_path / "cut", "--exit", 2)
    full, small = load_bundle(bundle_path).description, load_bundle(tmp_path / "cut").description
    assert small.exits[-1].macs < full.exits[1].macs < full.exits[-1].macs
    assert small.exits[-1].parameters < full.exits[1].parameters
    assert small.training["cut_from_weights_sha256"] == full.weights_sha256
    sizes = [(p / "weights.safetensors").stat().st_size for p in (bundle_path, tmp_path / "cut")]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.slow
def test_a_cut_bundle_keeps_its_numerics_and_can_be_calibrated(bundle_path, tmp_path, capsys):
    export(bundle_path, tmp_path / "cut", "--exit", 2)
    whole, small = load_bundle(bundle_path).policy, load_bundle(tmp_path / "cut").policy
    assert whole.dtypes == small.dtypes != ()
    data = write_noisy_images(tmp_path / "data", 40)
    options = ["--data", str(data), "--dtype", "float32"]
    assert main(["calibrate", str(tmp_path / "cut"), *options]) == 0
    assert "there is one exit, so nothing is skipped and nothing lost" in capsys.readouterr().out
    points = load_servable(tmp_path / "cut").policy.operating_points
    assert {(p.thresholds, p.mean_macs, p.certified) for p in points} == {((), 1.0, True)}


@pytest.mark.slow
@pytest.mark.parametrize("per_stage", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore")  # of the exporters' own dependencies
def test_programs_agree_with_the_network_at_any_batch_size(net, tmp_path, format, per_stage):
    written = list(write_programs(net, 16, format, per_stage, tmp_path))
    assert [f.stem for f, _ in written] == (
        ["stage_1", "stage_2", "stage_3", "stage_4"] if per_stage else ["network"]
    )
    assert all(difference <= TOLERANCE for _, difference in written)
    read = FORMATS[format][1]
    for batch in (1, 4, 7):
        x = images(batch)
        with torch.no_grad():
            expected = net(x)
        if not per_stage:
            got = read(written[0][0])(x)
        else:
            got = []
            for file, _ in written:
                *features, logits = read(file)(x)
                x = features[0] if features else x
                got.append(logits)
        for ours, theirs in zip(expected, got, strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max()


def written(compute):
    """A format whose programs all compute the same."""
    return (lambda module, x, file: file.touch(), lambda file: compute)


def with_logits(net, scale):
    """The same network but for its deepest logits."""
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in changed.head(4).fc.parameters():
            parameter.mul_(scale)
    return changed


@pytest.mark.parametrize("scale", [2, math.nan, math.inf])
def test_a_program_that_computes_something_else_is_refused(net, tmp_path, monkeypatch, scale):
    monkeypatch.setitem(FORMATS, "pt2", written(with_logits(net, scale)))
    with pytest.raises(ExportError, match="differs from the network by"):
        list(write_programs(net, 16, "pt2", False, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_network_that_computes_nan_is_not_exported(net, tmp_path, monkeypatch):
    broken = with_logits(net, math.nan)
    monkeypatch.setitem(FORMATS, "pt2", written(broken))
    with pytest.raises(ExportError, match="differs from the network by nan"):
        list(write_programs(broken, 16, "pt2", False, tmp_path))


def test_a_program_may_compute_nothing_but_zeros_where_the_network_does(net, tmp_path, monkeypatch):
    silent = with_logits(net, 0)
    monkeypatch.setitem(FORMATS, "pt2", written(silent))
    ((_, difference),) = write_programs(silent, 16, "pt2", False, tmp_path)
    assert difference == 0


def test_a_missing_package_is_named_before_anything_is_written(
    bundle_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(PACKAGES, "onnx", ("torch", "no_such_package"))
    assert export(bundle_path, tmp_path / "out", "--format", "onnx") == 2
    assert "onnx takes no_such_package, of the extra `export`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cut_program_says_what_is_left_of_the_network(bundle_path, tmp_path, monkeypatch, capsys):
    cut_net = cut(load_bundle(bundle_path), 2)
    monkeypatch.setitem(FORMATS, "pt2", written(cut_net))
    assert export(bundle_path, tmp_path, "--format", "pt2", "--exit", 2) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("exit 2", "parameters, M", "MACs, M"))
    assert [p.name for p in tmp_path.iterdir()] == ["network.pt2"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--exit", 5], "has exits 1 to 4, not 5"),
        ([], "say where to cut with --exit, or what to write with --format"),
        (["--exit", 2, "--per-stage"], "--per-stage is for onnx and pt2"),
    ],
)
def test_a_wrong_export_is_one_clear_sentence(bundle_path, tmp_path, capsys, options, sentence):
    assert export(bundle_path, tmp_path / "out", *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_bundle_is_never_exported_onto_itself(bundle_path, capsys):
    assert export(bundle_path, bundle_path, "--exit", 1) == 2
    assert "is the bundle itself" in capsys.readouterr().err
