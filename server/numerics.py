"""Which numerics the network is served in."""

from __future__ import annotations

import logging

import torch

from model.bundle import Bundle
from server.runner import Runner

log = logging.getLogger("offramp")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRIED_SIZES = (1, 8)


def choose_dtype(asked: str, bundle: Bundle, device: torch.device) -> torch.dtype:
    """The numerics that were asked for, or with `auto` those that suit device and policy.

    A policy's guarantee is for the numerics that it was calibrated in, so `auto` never takes
    narrower ones on CPU. It takes float32 instead where that is faster, which loses nothing.
    """
    assert bundle.policy is not None
    calibrated = bundle.policy.dtype or "float32"
    dtype = DTYPES[asked] if asked != "auto" else _suiting(calibrated, bundle, device)
    served = _name(dtype)
    if served != calibrated:
        log.warning(
            "the policy was calibrated in %s and the network is served in %s; its guarantee holds "
            "for %s: set DTYPE=%s, or calibrate with --dtype %s",
            *(calibrated, served, calibrated, calibrated, served),
        )
    return dtype


def _suiting(calibrated: str, bundle: Bundle, device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.float16 if calibrated == "float32" else DTYPES[calibrated]
    if calibrated != "bfloat16" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    taken = {
        dtype: _seconds_of_all_stages(bundle, device, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    }
    said = ", ".join(f"{1e3 * seconds:.1f} ms in {_name(d)}" for d, seconds in taken.items())
    log.info("%s images one by one and at once: %s", TRIED_SIZES[-1], said)
    return min(taken, key=lambda dtype: taken[dtype])


def _seconds_of_all_stages(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> float:
    """Of as many single images as the larger batch has, plus that batch."""
    measured = Runner(bundle, device, dtype).warm_up(TRIED_SIZES)
    one, many = (sum(row[size] for row in measured.values()) for size in TRIED_SIZES)
    return TRIED_SIZES[-1] * one + many


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
