"""Seeds: a hash of their key, no two alike, and no global state."""

import hashlib

import torch

from b2diffurl.algorithm.seeding import generator, stable_seed


def test_seed_is_the_hash_of_its_key():
    """63 bits of the SHA-256 of the key in JSON, the same in every process and version of Python."""
    expected = int.from_bytes(hashlib.sha256(b'[300, 0, "sample", 7]').digest()[:8], "big") >> 1
    assert stable_seed(300, 0, "sample", 7) == expected
    assert generator(300, 0, "sample", 7).initial_seed() == expected


def test_no_two_keys_share_their_noise():
    """Seed, stage, phase and batch each change the seed; (seed 1, stage 0) has nothing of (seed 0, stage 1)."""
    keys = [(s, i, p, b) for s in range(4) for i in range(4) for p in ("prompts", "sample", "train") for b in range(10)]
    assert len({stable_seed(*key) for key in keys}) == len(keys)
    one, other = (torch.randn(8, generator=generator(*key)) for key in [(1, 0, "sample", 0), (0, 1, "sample", 0)])
    assert not torch.equal(one, other)
    assert torch.equal(one, torch.randn(8, generator=generator(1, 0, "sample", 0)))


def test_global_random_state_is_neither_used_nor_changed():
    """Drawing from a key ignores torch's global generator and leaves it alone."""
    torch.manual_seed(1)
    before, one = torch.get_rng_state(), torch.randn(4, generator=generator(0, "a"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.randn(4, generator=generator(0, "a")), one)
