"""Which numerics the network is served in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from model.bundle import Bundle
from model.numerics import DTYPES, Suits, name_of, suits
from model.policy import Policy
from server.runner import Runner

log = logging.getLogger("offramp")

TRIED_SIZE = 8
"""A single image's time is mostly that of calling operations one by one, which compiling saves in
any numerics; a batch's tells what the arithmetic itself takes."""
ROUNDS = 3
"""Taken in turn, the fastest of each counting, so that what else runs does not decide."""


def choose_dtype(
    asked: str,
    bundle: Bundle,
    device: torch.device,
    suits: Suits = suits,
) -> torch.dtype:
    """The numerics that were asked for, or with `auto` those that suit device and policy.

    A policy's guarantee is for the numerics that it was certified in, so `auto` never takes
    narrower ones on CPU. It takes float32 instead where that is faster, which loses nothing. It
    never takes int8, which loses accuracy of its own.

    Args:
        asked: as the settings say.
        bundle: with a policy.
        device: where it will run.
        suits: whether a device computes in a dtype.

    Raises:
        ValueError: int8 where it cannot be served.
    """
    policy = bundle.calibrated
    if asked == "int8":
        _check_int8(policy, device, suits(torch.int8, device))
    certified = policy.dtypes or (name_of(torch.float32),)
    dtype = DTYPES[asked] if asked != "auto" else _suiting(certified, bundle, device, suits)
    served = name_of(dtype)
    if served not in certified:
        log.warning(
            "the policy was certified in %s and the network is served in %s, where its guarantee "
            "does not hold: set DTYPE=%s, or calibrate with --dtype %s",
            *(" and ".join(certified), served, certified[0], served),
        )
    if device.type == "cuda" and not suits(dtype, device):
        log.warning(
            "this card has no instructions for %s: DTYPE=float16 is faster here, with a policy "
            "that was calibrated in it",
            served,
        )
    return dtype


def _check_int8(policy: Policy, device: torch.device, suits: bool) -> None:
    if device.type != "cpu":
        raise ValueError(f"DTYPE is int8, which is for CPU, and the device is {device.type}")
    if not suits:
        raise ValueError("DTYPE is int8, which needs a processor with AVX2; this one has none")
    log.info(
        "in int8 the full network loses at most %.2f points of accuracy against float32, with "
        "probability %g; early exits come on top",
        100 * policy.for_int8().accuracy_loss_bound,
        1 - policy.delta,
    )


def _suiting(
    certified: Sequence[str],
    bundle: Bundle,
    device: torch.device,
    suits: Suits,
) -> torch.dtype:
    if device.type == "cuda":
        half = [name for name in ("float16", "bfloat16") if name in certified]
        return DTYPES[half[0]] if half else torch.float16
    if "bfloat16" not in certified or not suits(torch.bfloat16, device):
        return torch.float32
    runners = {d: Runner(bundle, device, d) for d in (torch.bfloat16, torch.float32)}
    rounds = [{d: _batch_seconds(r) for d, r in runners.items()} for _ in range(ROUNDS)]
    taken = {d: min(seconds[d] for seconds in rounds) for d in runners}
    said = ", ".join(f"{1e3 * seconds:.1f} ms in {name_of(d)}" for d, seconds in taken.items())
    log.info("%s images at once: %s", TRIED_SIZE, said)
    return min(taken, key=lambda dtype: taken[dtype])


def _batch_seconds(runner: Runner) -> float:
    return sum(row[TRIED_SIZE] for row in runner.warm_up((TRIED_SIZE,)).values())
