"""A user's own reward function, named `package.module:function` and found on the Python path."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Parts, Reward
from b2diffurl.runtime.apart import Apart

APART: dict[str, Apart] = {}  # by module


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    import_function(name)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    # The module that defines the function, which is another one if the named module only imports it.
    source = getattr(importlib.import_module(import_function(name).__module__), "__file__", None)
    return [Path(source)] if source else []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    function = import_function(name)

    @wraps(function)
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor | tuple[Tensor, Parts]:
        with blamed(f"reward {name}"), state_of(name)():
            return function(images, prompts)

    return reward


def import_function(name: str) -> Callable:
    """Import the function called `package.module:function`; a ValueError if the name is malformed or there is none."""
    module, _, function = name.partition(":")
    hint = "write package.module:function, and keep the package beside the scripts or on PYTHONPATH"
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f"reward {name!r} is no package.module:function; give it like my_rewards:redness")
    missing = None
    with blamed(f"reward {name}: importing {module}"), state_of(name)():
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ModuleNotFoundError as error:
            # Is it this module that is missing, or one that it imports? The latter is a bug in the user's code.
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            missing = error
    if missing:
        raise ValueError(f"reward {name!r}: {missing}; {hint}")
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}; {hint}")
    return found


def state_of(name: str) -> Apart:
    """The process state in which the functions of a user's module run."""
    return APART.setdefault(name.partition(":")[0], Apart())


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises in the block into a RuntimeError: it shows the traceback, which finds the bug.

    sys.exit() is among it, because a run must not end as if its work were done.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and error.args:  # the signal that has stopped this run is no bug
            raise
        raise RuntimeError(f"{what} raised {error!r}") from error
    if any(stream and stream.closed for stream in (sys.stdout, sys.stderr)):
        raise RuntimeError(f"{what} has closed stdout or stderr, which the run writes to")
