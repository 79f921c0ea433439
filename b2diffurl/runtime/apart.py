"""What code of the user's changes in the process, kept apart from the run.

A user's module may seed random numbers, change directory, set torch's default type, or leave a handler for a signal. Such
state belongs to the whole process, so it would change what the run does next.
"""

import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from b2diffurl.runtime.logs import logger

DENORMAL = 5e-324  # the smallest float64
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1)
CUDNN = ("enabled", "benchmark", "deterministic")
PRECISE = (
    torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn,
)  # fmt: skip


class Apart:
    """A process state of one's own for a user's code.

    Inside `with apart():` the code finds what it has set in an earlier block, and after the block the process is as before.
    So what a module sets when it is imported holds whenever its functions are called, and never elsewhere.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}  # the states that the code has changed, as it left them

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = read()
        write(self.kept, before)
        inside = read() if self.kept else before
        try:
            yield
        finally:
            after = read()
            self.kept |= {name: value for name, value in after.items() if value != inside[name]}
            write(before, after)


@contextmanager
def unchanged() -> Iterator[None]:
    """After the block the process's state is what it was before."""
    before = read()
    try:
        yield
    finally:
        write(before, read())


def read() -> dict[str, Any]:
    """The process's state by name."""
    return {name: get() for name, (get, _) in STATES.items()}


def write(wanted: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Set the states that differ from what they are now. Only those: setting even the same number of threads has effects."""
    for name, value in wanted.items():
        if value != now[name]:
            STATES[name][1](value)


# ---- states that no single function of a library sets ----


def working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # somebody has deleted it
        return ""


def set_environment(wanted: Mapping[str, str]) -> None:
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def set_signal_handlers(wanted: Sequence[Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # where code cannot have set one
    for number, handler in zip(SIGNALS, wanted, strict=True):
        if handler is not None:  # None: a library has set it in C, which Python cannot
            signal.signal(number, handler)


def our_log() -> tuple[Any, ...]:
    return logger.disabled, logger.level, logger.propagate, list(logger.handlers), logging.root.manager.disable


def set_our_log(wanted: tuple[Any, ...]) -> None:
    logger.disabled, level, logger.propagate, logger.handlers, disabled_level = wanted
    logger.setLevel(level)  # also forgets which levels were found to be enabled
    logging.disable(disabled_level)


def set_warnings(wanted: tuple[list, Any]) -> None:
    warnings.resetwarnings()  # also forgets which warnings the old filters have let pass
    warnings.filters[:], warnings.showwarning = wanted


def set_default_device(device: torch.device) -> None:
    # None for the CPU: with a device of its own torch would ask for it at every new tensor.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def precisions() -> tuple[str | bool, ...]:
    """How exact float32 products are, by torch's older and its newer settings."""
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the code has set a newer one to something else
        older = "", False
    return *older, *(part.fp32_precision for part in PRECISE)


def set_precisions(wanted: tuple[Any, ...]) -> None:
    matmul, convolution, *newer = wanted
    if matmul:
        torch.set_float32_matmul_precision(matmul)  # sets the newer ones, too
        torch.backends.cudnn.allow_tf32 = convolution
    for part, precision in zip(PRECISE, newer, strict=True):
        part.fp32_precision = precision


def numpy_random_state() -> tuple[Any, ...]:
    name, numbers, *more = np.random.get_state()
    return name, numbers.tobytes(), *more


def set_numpy_random_state(wanted: tuple[Any, ...]) -> None:
    name, numbers, *more = wanted
    np.random.set_state((name, np.frombuffer(numbers, np.uint32), *more))


def torch_random_states() -> list[bytes]:
    """The states of the CPU and, once CUDA is in use, of each of its devices."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_cuda)]


def set_torch_random_states(wanted: Sequence[bytes]) -> None:
    cpu, *on_cuda = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in wanted)
    torch.set_rng_state(cpu)
    for index, state in enumerate(on_cuda):
        torch.cuda.set_rng_state(state, index)


def cudnn() -> tuple[bool, ...]:
    return tuple(getattr(torch.backends.cudnn, name) for name in CUDNN)


def set_cudnn(wanted: tuple[bool, ...]) -> None:
    for name, value in zip(CUDNN, wanted, strict=True):
        setattr(torch.backends.cudnn, name, value)


def set_streams(wanted: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = wanted


# By name: how to read a state, and how to set it.
STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "working directory": (working_directory, lambda path: path and os.chdir(path)),
    "environment": (lambda: dict(os.environ), set_environment),
    "locale": (lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    "signal handlers": (lambda: [signal.getsignal(number) for number in SIGNALS], set_signal_handlers),
    "stdout and stderr": (lambda: (sys.stdout, sys.stderr), set_streams),
    "log": (our_log, set_our_log),
    "warnings": (lambda: (list(warnings.filters), warnings.showwarning), set_warnings),
    "time limit of sockets": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "random": (random.getstate, random.setstate),
    "numpy random": (numpy_random_state, set_numpy_random_state),
    "numpy errors": (np.geterr, lambda kinds: np.seterr(**kinds)),
    "torch random": (torch_random_states, set_torch_random_states),
    "CUDA device": (lambda: torch.cuda.is_initialized() and torch.cuda.current_device(), torch.cuda.set_device),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, set_default_device),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "denormals": (lambda: DENORMAL * 1.0 == 0.0, torch.set_flush_denormal),
    "deterministic": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "precision of products": (precisions, set_precisions),
    "cudnn": (cudnn, set_cudnn),
}
