"""Random numbers from stable keys: the same key gives the same numbers in any process, whatever was drawn before."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor


def stable_seed(*key: int | str) -> int:
    """A 63-bit seed from the SHA-256 of the key, so that neighbouring keys such as (0, 1) and (1, 0) share nothing.

    Python's own `hash` would not do: for strings it differs from process to process.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch's seeds are signed: 63 bits fit


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, stage, phase, batch).

    Noise is drawn on the CPU and then moved, so that every device gets the same.
    """
    return torch.Generator().manual_seed(stable_seed(*key))


def noise_source(rng: torch.Generator, device: torch.device) -> Callable[[tuple[int, ...]], Tensor]:
    """A function shape -> standard normal noise on `device`, drawn from `rng` on the CPU.

    On CUDA the copy is asynchronous: the CPU does not wait for work that the GPU has not finished.
    """
    pinned = device.type == "cuda"  # copies are asynchronous from pinned memory only

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=rng, pin_memory=pinned).to(device, non_blocking=True)

    return noise
