"""Randomness from stable keys: the same key gives the same numbers in any process, on any world size."""

import hashlib
import json

import torch


def stable_seed(*key: int | str) -> int:
    """63-bit seed, the SHA-256 of the key: neighbouring keys are unrelated, so (1, 0) shares nothing with (0, 1)."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one key such as (seed, stage, phase, batch). Noise is drawn on the CPU and then moved, so that
    every device sees the same."""
    return torch.Generator().manual_seed(stable_seed(*key))
