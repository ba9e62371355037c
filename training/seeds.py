"""Seeds that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A seed for this purpose, always the same, unlike that for any other."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator on `device` seeded by `seed_of`.

    Every step seeds its own, so that a run goes on from any step without a stored random state.
    """
    return torch.Generator(device).manual_seed(seed_of(*parts))
