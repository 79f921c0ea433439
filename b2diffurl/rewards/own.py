"""A user's own reward function, named `package.module:function` and found on the Python path."""

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Parts, Reward


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
        try:
            return function(images, prompts)
        except Exception as error:  # a bug in the user's code: a RuntimeError shows its traceback, a ValueError would not
            raise RuntimeError(f"reward {name} raised {error!r}") from error

    return reward


def import_function(name: str) -> Callable:
    """Import the function called `package.module:function`; a ValueError if the name is malformed or there is none."""
    module, _, function = name.partition(":")
    hint = "write package.module:function, and keep the package beside the scripts or on PYTHONPATH"
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f"reward {name!r} is no package.module:function; give it like my_rewards:redness")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        # Is it this module that is missing, or one that it imports? The latter is a bug in the user's code.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"reward {name!r}: {error}; {hint}") from None
        raise RuntimeError(f"reward {name}: importing {module} raised {error!r}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}; {hint}")
    return found
