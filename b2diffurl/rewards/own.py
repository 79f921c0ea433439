"""A user's own reward function, named `package.module:function` and found on the Python path.

A function of a notebook is in no module; `given` makes it known by a name like those.
"""

import ast
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
GIVEN: dict[str, tuple[Callable, Path]] = {}  # functions in no module, by name, each with the file of its recorded source


@contextmanager
def given(functions: Mapping[str, tuple[Callable, Path]]) -> Iterator[None]:
    """Inside the block these functions are rewards: {name, as module:function: (the function, the file of its source)}."""
    before = dict(GIVEN)
    GIVEN.update(functions)
    try:
        yield
    finally:
        GIVEN.clear()
        GIVEN.update(before)


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    import_function(name)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    if name in GIVEN:
        return [GIVEN[name][1]]
    # The module that is named, and the one that defines the function, if the first only imports it.
    function = import_function(name)
    modules = {name.partition(":")[0], getattr(function, "__module__", None) or ""}
    sources = {
        one: getattr(sys.modules.get(one), "__file__", None)
        for one in modules
        if one.split(".")[0] not in sys.stdlib_module_names
    }
    return sorted({path for one, source in sources.items() if source for path in modules_beside(Path(source), one)})


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    function = import_function(name)

    @wraps(function)
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor | tuple[Tensor, Parts]:
        with blamed(f"reward {name}"), state_of(name)():
            return function(images, prompts)

    return reward


def modules_beside(source: Path, module: str) -> list[Path]:
    """The file `source` of a module, and the files of all modules that it imports from beside it, directly or not.

    Beside it is the folder that its top package or module lies in. Only the package itself counts if that folder is one of
    installed packages. What is imported under a computed name is not found, and data files are not looked for.
    """
    depth = module.count(".") + (source.name == "__init__.py")
    folder, top = source.parents[depth], module.split(".")[0]
    installed = {"site-packages", "dist-packages"} & set(folder.parts)
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path in found or path.suffix != ".py":
            continue
        found.add(path)
        for parts in imported_names(path, folder):
            if parts[0] != "b2diffurl" and (parts[0] == top or not installed):
                prefixes = [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
                waiting += [
                    file for one in prefixes for file in (one.with_suffix(".py"), one / "__init__.py") if file.is_file()
                ]
    return sorted(found | {source})


def imported_names(path: Path, folder: Path) -> list[tuple[str, ...]]:
    """What a Python file imports anywhere in it, as the parts of absolute names; of `from a import b` both a and a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parents[node.level - 1].relative_to(folder).parts if node.level else ()
            base = (*package, *(node.module.split(".") if node.module else ()))
            names += [(*base, alias.name) for alias in node.names]
    return names


def import_function(name: str) -> Callable:
    """Import the function called `package.module:function`; a ValueError if the name is malformed or there is none."""
    if name in GIVEN:
        return GIVEN[name][0]
    module, _, function = name.partition(":")
    hint = "write package.module:function, and keep the package where you give the command, or on PYTHONPATH"
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
