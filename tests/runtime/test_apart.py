"""A user's code changes the process it runs in; the run does not see it, and the code finds it again."""

import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import warnings

import numpy as np
import pytest
import torch

from b2diffurl.runtime.apart import STATES, Apart
from b2diffurl.runtime.logs import logger

# Of each state: how people change it, and how to see whether it has changed.
CHANGES = {
    "working directory": ("os.chdir('/')", os.getcwd),
    "environment": ("os.environ['ADDED'] = '1'; del os.environ['PATH']", lambda: dict(os.environ)),
    "locale": ("locale.setlocale(locale.LC_ALL, 'C.UTF-8' if locale.setlocale(locale.LC_ALL) == 'C' else 'C')",
               lambda: locale.setlocale(locale.LC_ALL)),
    "signal handlers": ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", lambda: signal.getsignal(signal.SIGTERM)),
    "stdout and stderr": ("sys.stdout = open(os.devnull)", lambda: sys.stdout),
    "log": ("logger.disabled = True; logging.disable()", lambda: logger.isEnabledFor(logging.ERROR)),
    "warnings": ("warnings.simplefilter('error')", lambda: list(warnings.filters)),
    "time limit of sockets": ("socket.setdefaulttimeout(3)", socket.getdefaulttimeout),
    "garbage collection": ("gc.disable()", gc.isenabled),
    "recursion limit": ("sys.setrecursionlimit(5432)", sys.getrecursionlimit),
    "random": ("random.seed(0)", random.getstate),
    "numpy random": ("np.random.seed(0)", lambda: np.random.get_state()[1].tolist()),
    "numpy errors": ("np.seterr(all='raise')", np.geterr),
    "torch random": ("torch.manual_seed(0)", lambda: torch.get_rng_state().tolist()),
    "threads": ("torch.set_num_threads(torch.get_num_threads() + 1)", torch.get_num_threads),
    "default dtype": ("torch.set_default_dtype(torch.float64)", lambda: torch.zeros(1).dtype),
    "default device": ("torch.set_default_device('meta')", lambda: torch.zeros(1).device),
    "gradients": ("torch.set_grad_enabled(False)", torch.is_grad_enabled),
    "anomaly detection": ("torch.autograd.set_detect_anomaly(True)", torch.is_anomaly_enabled),
    "denormals": ("torch.set_flush_denormal(True)", lambda: float(np.float32(1e-40) * np.float32(1))),
    "deterministic": ("torch.use_deterministic_algorithms(True)", torch.are_deterministic_algorithms_enabled),
    "precision of products": ("torch.set_float32_matmul_precision('medium')", torch.get_float32_matmul_precision),
    "cudnn": ("torch.backends.cudnn.benchmark = True", lambda: torch.backends.cudnn.benchmark),
}  # fmt: skip


def test_every_state_is_tried():
    """But for the one that only a GPU has."""
    assert STATES.keys() - CHANGES.keys() == {"CUDA device"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_is_as_before_and_the_code_finds_what_it_has_set(name):
    """Also if the code ends in an error; and a second time."""
    change, look = CHANGES[name]
    apart, before = Apart(), look()
    with pytest.raises(KeyError), apart():
        exec(f"{change}\nraise KeyError")
    assert look() == before
    for _ in range(2):
        with apart():
            assert look() != before
        assert look() == before


@pytest.mark.parametrize(
    "change",
    [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cudnn.allow_tf32 = False",
    ],
)
def test_precision_by_any_of_torchs_names(change):
    """Mixing its older and newer names makes torch raise where they are read; the run never does."""

    def look() -> tuple:
        matmul = torch.backends.cuda.matmul
        return (
            torch.get_float32_matmul_precision(),
            matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            matmul.fp32_precision,
        )

    before = look()
    with Apart()():
        exec(change)
    assert look() == before


def test_random_numbers_go_on_from_block_to_block():
    """A reward that draws noise draws other noise at its next call, from the seed that it has set."""
    apart, expected = Apart(), torch.randn(4, generator=torch.Generator().manual_seed(7))
    with apart():
        torch.manual_seed(7)
        first = torch.randn(2)
    torch.randn(5)
    with apart():
        assert torch.equal(torch.cat([first, torch.randn(2)]), expected)
