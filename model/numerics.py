"""Numerics that a network is served in."""

from __future__ import annotations

from collections.abc import Callable

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}

Suits = Callable[[torch.dtype, torch.device], bool]
"""Whether a device computes in a dtype without taking a detour."""


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as policies and settings hold it."""
    return str(dtype).removeprefix("torch.")


def carrier(dtype: torch.dtype) -> torch.dtype:
    """What values are in between two convolutions: integers stay within one."""
    return torch.float32 if dtype is torch.int8 else dtype


def suits_cpu(dtype: torch.dtype) -> bool:
    """Whether this processor computes in a dtype without taking a detour."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.int8:
        has = torch.cpu.get_capabilities()
        return has["architecture"] != "x86_64" or has["avx2"]
    return dtype is torch.float32


def suits(dtype: torch.dtype, device: torch.device) -> bool:
    """As `Suits`; a card before Ampere emulates bfloat16."""
    if device.type == "cpu":
        return suits_cpu(dtype)
    return dtype is not torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)


def likely_dtypes(device_type: str) -> tuple[torch.dtype, ...]:
    """What a server with `DTYPE=auto` may take on this machine, given a policy for all of them."""
    if device_type == "cuda":
        return (torch.float16,)
    return tuple(dtype for dtype in (torch.float32, torch.bfloat16) if suits_cpu(dtype))


def keep_float32_whole() -> None:
    """Have a card compute float32 as processors do, not rounded to ten bits."""
    torch.backends.cudnn.allow_tf32 = False
