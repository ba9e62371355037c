"""A bundle comes back as it was saved, or is refused with a sentence that says what to run."""

import copy
import hashlib
import json
import math
import shutil

import pytest
import torch

from model.bundle import (
    DESCRIPTION,
    POLICY,
    BundleError,
    load_bundle,
    load_servable,
    save_bundle,
    save_description,
)
from tests.conftest import CLASSES, PREPROCESS
from tests.model.networks import images, tiny


def save(path, net, architecture="resnet10", command="by hand", **arguments):
    return save_bundle(
        path,
        net,
        name="tiny",
        version="1",
        architecture=architecture,
        arguments={"width": 8} | arguments,
        classes=CLASSES[:5],
        preprocess=PREPROCESS,
        training={"command": command},
    )


@pytest.fixture
def folder(bundle_path, tmp_path):
    """A calibrated bundle that a test may damage."""
    return shutil.copytree(bundle_path, tmp_path / "bundle")


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.inference_mode()
def test_loaded_equals_saved_but_for_half_precision(tmp_path):
    net, x = tiny("resnet10"), images(32, 4)
    save(tmp_path, net)
    loaded = load_bundle(tmp_path).net
    assert not loaded.training
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    for ours, theirs in zip(loaded(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_weight_too_large_for_half_precision_is_kept_whole(tmp_path):
    net = copy.deepcopy(tiny("resnet10"))
    net.backbone.bn1.running_var[0] = 1e5
    save(tmp_path, net)
    assert load_bundle(tmp_path).net.backbone.bn1.running_var[0] == 1e5


def test_a_description_that_cannot_be_written_leaves_the_old_bundle(folder):
    with pytest.raises(ValueError, match="utf-8"):
        save(folder, tiny("resnet10"), command="caf\udce9")
    load_bundle(folder)


def test_a_description_of_another_number_of_exits_is_refused(folder):
    exits = json.loads((folder / DESCRIPTION).read_text())["exits"]
    edit(folder / DESCRIPTION, exits=exits[:-1])
    with pytest.raises(BundleError, match="has 4 exits, the network 3"):
        load_bundle(folder)
    (folder / POLICY).unlink()
    with pytest.raises(BundleError, match="there are 4 exits, and 3 are described"):
        load_bundle(folder)


@pytest.mark.parametrize("std", [0.0, math.inf])
def test_a_preprocess_that_no_image_survives_is_refused(folder, std):
    preprocess = json.loads((folder / DESCRIPTION).read_text())["preprocess"]
    edit(folder / DESCRIPTION, preprocess=preprocess | {"std": [std, 0.2, 0.2]})
    with pytest.raises(BundleError, match=r"malformed at preprocess\.std\.0"):
        load_bundle(folder)


@pytest.mark.slow
@torch.inference_mode()
def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
    first = load_bundle(folder)
    fields = first.description.model_dump(exclude={"exits", "weights_sha256", "preprocess"})
    again = save_bundle(
        tmp_path / "again", first.net, preprocess=first.description.preprocess, **fields
    )
    assert again == first.description


def test_the_description_counts_each_exit(tmp_path):
    exits = save(tmp_path, tiny("resnet10")).exits
    assert [e.exit for e in exits] == [1, 2, 3, 4]
    assert sorted({e.macs for e in exits}) == [e.macs for e in exits]
    assert exits[-1].parameters == sum(p.numel() for p in tiny("resnet10").parameters())


def test_cut_networks_travel_with_the_exits_they_kept(tmp_path):
    save(tmp_path, tiny("resnet10", keep=(2, 3)), keep=[2, 3])
    assert load_bundle(tmp_path).net.kept == (2, 3)


def test_saving_weights_anew_drops_the_policy_made_for_the_old_ones(folder):
    save(folder, tiny("resnet10"))
    assert load_bundle(folder).policy is None


def test_a_servable_bundle_has_a_policy_for_its_weights(folder):
    bundle = load_servable(folder)
    assert bundle.policy.weights_sha256 == bundle.description.weights_sha256


def refused(folder, sentence, load=load_bundle):
    with pytest.raises(BundleError, match=sentence) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    refused(tmp_path, r"is not a bundle: cannot read bundle\.json .*run: python -m training train")


def test_a_bundle_without_weights_is_refused(folder):
    (folder / "weights.safetensors").unlink()
    refused(folder, r"cannot read weights\.safetensors .*run: python -m training train")


def test_a_bundle_without_a_policy_loads_but_is_not_servable(folder):
    (folder / "policy.json").unlink()
    assert load_bundle(folder).policy is None
    refused(folder, r"has no policy\.json; run: python -m training calibrate", load_servable)


def test_damaged_weights_are_refused(folder):
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(folder, r"is not the file that bundle\.json describes .*copy the bundle again")


def test_a_policy_for_other_weights_is_refused(folder):
    edit(folder / "policy.json", weights_sha256="0" * 64)
    refused(folder, "was made for other weights; run: python -m training calibrate")


def test_a_policy_with_other_exits_is_refused(folder):
    policy = json.loads((folder / "policy.json").read_text())
    points = [p | {"thresholds": p["thresholds"][:2]} for p in policy["operating_points"]]
    edit(
        folder / "policy.json",
        calibrations=policy["calibrations"][:3],
        operating_points=points,
    )
    refused(folder, "has 3 exits, the network 4; run: python -m training calibrate")


@pytest.mark.parametrize("file", ["bundle.json", "policy.json"])
def test_a_file_that_is_not_json_is_refused(folder, file):
    (folder / file).write_text("{")
    refused(folder, f"{file} is malformed at the file: Invalid JSON")


def test_a_field_of_the_wrong_kind_is_named(folder):
    edit(folder / "bundle.json", preprocess={"size": 4, "mean": [0, 0, 0], "std": [1, 1, 1]})
    refused(folder, r"bundle\.json is malformed at preprocess\.size: .*greater than or equal to 8")


@pytest.mark.parametrize("field", ["name", "version"])
@pytest.mark.parametrize("text", ["", ".", "..", "acme/pets", "two\nlines", "\x00", "\x7f", "\x85"])
def test_what_cannot_be_a_part_of_a_path_names_no_bundle(folder, field, text):
    edit(folder / "bundle.json", **{field: text})
    cannot = "cannot be a part of a URL's path: .*; give it another in bundle"
    refused(folder, rf"malformed at {field}: '.*' {cannot}\.json")


@pytest.mark.parametrize("text", ["a b", "50%", "%2F", "...", "v1.2", "été", "\N{CAT}", "\\"])
def test_any_other_text_names_a_bundle(folder, text):
    edit(folder / "bundle.json", name=text, version=text)
    assert load_bundle(folder).description.name == text


def test_an_unknown_field_is_named(folder):
    edit(folder / "bundle.json", colour="red")
    refused(folder, r"bundle\.json is malformed at colour: Extra inputs")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"architecture": "resnet19"}, "unknown architecture 'resnet19'"),
        ({"arguments": {"width": 16}}, "size mismatch"),
        ({"arguments": {"width": 8, "depth": 2}}, "unknown architecture argument depth"),
        ({"arguments": {"width": "wide"}}, "str"),
        ({"classes": ["a", "b"]}, "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_the_description_are_refused(folder, fields, sentence):
    edit(folder / "bundle.json", **fields)
    refused(folder, f"(?s)weights and description disagree: .*{sentence}")


def test_a_weights_file_that_is_no_safetensors_is_refused(folder):
    description = load_bundle(folder).description
    garbage = b"not safetensors"
    (folder / "weights.safetensors").write_bytes(garbage)
    digest = hashlib.sha256(garbage).hexdigest()
    save_description(folder, description.model_copy(update={"weights_sha256": digest}))
    (folder / "policy.json").unlink()
    refused(folder, "weights and description disagree")
