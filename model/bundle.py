"""One servable folder: weights, description, policy, report."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from model.files import write_atomically
from model.macs import count_stages, cumulative_macs, cumulative_parameters
from model.network import MultiExitNet, build_from
from model.policy import Policy
from model.preprocess import Preprocess

WEIGHTS = "weights.safetensors"
DESCRIPTION = "bundle.json"
POLICY = "policy.json"
REPORT = "report"

PART_OF_A_PATH = re.compile(r"(?!\.\.?$)[^/\x00-\x1f\x7f-\x9f\ud800-\udfff]+")

Model = TypeVar("Model", bound=BaseModel)


class BundleError(Exception):
    """A folder that cannot be served; the message says why and what to run."""


def check_name(text: str) -> str:
    """A bundle's name or version, if it can be what it is in paths of V2: one part of them.

    Raises:
        ValueError: it cannot.
    """
    if not PART_OF_A_PATH.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be a part of a URL's path: that is neither empty nor . nor .., "
            "and has no slash, no control character and nothing that UTF-8 lacks"
        )
    return text


Name = Annotated[str, AfterValidator(check_name)]


class Exit(BaseModel):
    """What it costs to answer from one exit, earlier heads included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exit: int = Field(ge=1, description="1 is the shallowest")
    macs: int = Field(ge=0, description="multiply-accumulates an image")
    parameters: int = Field(ge=0, description="parameters that such an image uses")
    accuracy: float | None = Field(None, ge=0, le=1, description="top-1 as served, on test images")
    alone: float | None = Field(None, ge=0, le=1, description="top-1 of this exit by itself")


class Description(BaseModel):
    """Everything about a network but its weights and its policy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    version: Name
    architecture: str = Field(description="a name in model.architectures")
    arguments: dict[str, Any] = Field(description="the architecture's arguments")
    classes: tuple[str, ...] = Field(min_length=1, description="labels, by class id")
    preprocess: Preprocess
    exits: tuple[Exit, ...] = Field(min_length=1, description="shallow to deep")
    training: dict[str, Any] = Field(description="provenance: command, data, versions")
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded bundle; `policy` is None until it has been calibrated."""

    path: Path
    description: Description
    net: MultiExitNet
    policy: Policy | None

    @property
    def calibrated(self) -> Policy:
        """The policy of a bundle that was calibrated.

        Raises:
            BundleError: it was not.
        """
        if self.policy is None:
            raise BundleError(
                f"{self.path} has no {POLICY}; run: python -m training calibrate {self.path} "
                "--data DIR"
            )
        return self.policy


def save_bundle(path: Path, net: MultiExitNet, **description: Any) -> Description:
    """Write weights and description; the policy comes from calibration.

    Weights are in half precision, but for those tensors that it cannot hold.

    Args:
        path: the bundle's folder, made if missing.
        net: the trained network.
        description: the fields of `Description` that the weights do not determine.
    """
    tensors = {k: _halved(v) for k, v in net.state_dict().items()}
    weights = save(tensors)
    size = description["preprocess"].size
    costs = count_stages(net, size)
    macs, parameters = cumulative_macs(costs), cumulative_parameters(costs)
    exits = [
        Exit(exit=k, macs=m, parameters=p)
        for k, (m, p) in enumerate(zip(macs, parameters, strict=True), start=1)
    ]
    full = Description(
        **description, exits=tuple(exits), weights_sha256=hashlib.sha256(weights).hexdigest()
    )
    text = _json(full)  # before anything is written that it would have to fit
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS, weights)
    write_atomically(path / DESCRIPTION, text)
    (path / POLICY).unlink(missing_ok=True)  # it was made for other weights
    return full


def save_description(path: Path, description: Description) -> None:
    """Write `bundle.json`."""
    write_atomically(path / DESCRIPTION, _json(description))


def save_policy(path: Path, policy: Policy) -> None:
    """Write `policy.json`."""
    write_atomically(path / POLICY, _json(policy))


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=2).encode() + b"\n"


def load_servable(path: Path) -> Bundle:
    """Load a bundle that has a policy made for its weights.

    Raises:
        BundleError: it has none, or anything that `load_bundle` refuses.
    """
    bundle = load_bundle(path)
    _ = bundle.calibrated  # or say what is missing
    return bundle


def load_bundle(path: Path, with_policy: bool = True) -> Bundle:
    """Load and verify a bundle, calibrated or not. The network is in eval mode and fp32.

    Args:
        path: its folder.
        with_policy: whether to look at the policy, which calibration is about to replace.

    Raises:
        BundleError: a file is missing or malformed, or digests disagree.
    """
    description = _parse(path, DESCRIPTION, Description)
    weights = _read(path, WEIGHTS)
    digest = hashlib.sha256(weights).hexdigest()
    if digest != description.weights_sha256:
        raise BundleError(
            f"{path / WEIGHTS} is not the file that {DESCRIPTION} describes (its SHA-256 differs); "
            "copy the bundle again, or run: python -m training train"
        )
    calibrated = with_policy and (path / POLICY).exists()
    policy = _parse(path, POLICY, Policy) if calibrated else None
    if policy and policy.weights_sha256 != digest:
        raise BundleError(
            f"{path / POLICY} was made for other weights; "
            f"run: python -m training calibrate {path} --data DIR"
        )
    if policy and len(policy.calibrations) != len(description.exits):
        raise BundleError(
            f"{path / POLICY} has {len(policy.calibrations)} exits, the network "
            f"{len(description.exits)}; run: python -m training calibrate {path} --data DIR"
        )
    return Bundle(path, description, _network(path, description, weights), policy)


def _network(path: Path, description: Description, weights: bytes) -> MultiExitNet:
    try:
        state = {k: _widened(v) for k, v in load(weights).items()}
        classes = len(description.classes)
        net = build_from(state, description.architecture, classes, **description.arguments)
        if net.exits != (described := len(description.exits)):
            raise ValueError(f"there are {net.exits} exits, and {described} are described")
        return net
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: weights and description disagree: {error}") from error


def _parse(path: Path, name: str, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(_read(path, name))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        said = first["msg"].removeprefix("Value error, ")  # of a check of our own
        if where in ("name", "version"):
            said += f"; give it another in {name}"
        raise BundleError(f"{path / name} is malformed at {where}: {said}") from error


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} is not a bundle: cannot read {name} ({error.strerror}); "
            "run: python -m training train --data DIR"
        ) from error


def _halved(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
    fits = not (half.isinf() & tensor.isfinite()).any()
    return (half if fits else tensor).cpu().contiguous()


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
