"""Randomness from stable keys: the same key gives the same numbers in any process, on any world size."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor


def stable_seed(*key: int | str) -> int:
    """63-bit seed, the SHA-256 of the key: neighbouring keys are unrelated, so (1, 0) shares nothing with (0, 1)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one key such as (seed, stage, phase, batch). Noise is drawn on the CPU and then moved, so that
    every device sees the same."""
    return torch.Generator().manual_seed(stable_seed(*key))


def noise_source(rng: torch.Generator, device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
    """shape -> standard normal noise on the device, without waiting for what the device still works on."""
    pinned = device.type == "cuda"

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=rng, pin_memory=pinned).to(device, non_blocking=True)

    return noise
