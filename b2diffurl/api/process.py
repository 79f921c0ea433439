"""The process that a notebook runs in: it is somebody else's, so it is left as it was found."""

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from b2diffurl.configuration.command_line import explain, stopping_in_order
from b2diffurl.runtime import ambient, apart
from b2diffurl.runtime.logs import logger, set_up_logging, showing_progress

AT_WORK = threading.Lock()  # only one call at a time can have the process's state to itself


@contextmanager
def borrowed(log_file: Path | None, *, quiet: bool) -> Iterator[None]:
    """Work in the user's process: log to `log_file` and, unless `quiet`, to stdout; afterwards all is as it was.

    That is threads, default dtype, random numbers, signal handlers, loggers, environment and the like (runtime/apart.py). An
    interrupt stops the work in order, as Ctrl-C stops a script. A ValueError refuses a second call at the same time.
    """
    if not AT_WORK.acquire(blocking=False):
        raise ValueError("another call of b2diffurl is at work in this process. Wait until it has ended, or use a script")
    with ExitStack() as restoring:
        restoring.callback(AT_WORK.release)
        restoring.callback(give_back_memory)
        restoring.enter_context(apart.unchanged())
        restoring.enter_context(torch.inference_mode(False))
        restoring.enter_context(as_in_a_script())
        restoring.enter_context(own_accelerator())
        restoring.enter_context(same_bars())
        ambient.calm_warnings()
        ambient.refuse_telemetry()
        ambient.require_usable()
        restoring.callback(close_log)
        if quiet:
            restoring.enter_context(redirect_stdout(restoring.enter_context(open(os.devnull, "w"))))
        set_up_logging(log_file, console_too=not quiet)
        restoring.enter_context(showing_progress(in_notebook() and not quiet))
        in_main = threading.current_thread() is threading.main_thread()
        restoring.enter_context(stopping_in_order() if in_main else nullcontext())
        with explained(log_file):
            yield


@contextmanager
def as_in_a_script() -> Iterator[None]:
    """Inside the block torch computes as it does in a new process, whatever the user has set: with gradients, in float32."""
    before = apart.read()
    fresh = {"gradients": True, "default dtype": torch.float32, "default device": torch.device("cpu"), "denormals": False}
    apart.write(fresh, before)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def explained(log_file: Path | None) -> Iterator[None]:
    """Give an error of the block what a script would say of it, and log its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("stopped; call it again with the same arguments to go on")
        raise KeyboardInterrupt from None
    except Exception as error:
        logger.debug("failed", exc_info=True)
        if isinstance(error, RuntimeError | MemoryError) and (explanation := explain(error, log_file)):
            error.add_note(explanation[1])
        raise


@contextmanager
def own_accelerator() -> Iterator[None]:
    """Inside the block accelerate chooses device and precision anew; the user's own choice is there again after it."""
    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


@contextmanager
def same_bars() -> Iterator[None]:
    """After the block transformers and huggingface_hub show progress bars if they did before."""
    bars, hub_off = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    try:
        yield
    finally:
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        (disable_progress_bars if hub_off else enable_progress_bars)()


def give_back_memory() -> None:
    """Free what the work has left in memory, on a GPU, too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def close_log() -> None:
    """Close the log's files; the loggers themselves are restored with the rest."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose stderr is no terminal and shows progress bars all the same."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
