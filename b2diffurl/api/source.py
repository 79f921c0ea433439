"""The source of a function that was defined in a notebook, with all that it uses there: what makes it this function.

It is written into the experiment, so that one can read later what was rewarded, and compared when the run goes on.
"""

import ast
import dis
import functools
import hashlib
import inspect
import linecache
import math
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from b2diffurl.configuration.rules import SECRET, check_secrets
from b2diffurl.rewards.own import modules_beside
from b2diffurl.runtime import files

HEADER = '"""The reward `{name}`, as it was given to b2diffurl.finetune, and what it used around it."""\n'
UNSEEN = "not_in_this_file"  # the variable that lists, in a recorded source, what has a checksum only
PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...))


def recorded_source(function: Callable) -> str:
    """A Python module with the function and what it uses: modules as imports, other functions and classes of the notebook
    by their source, plain values as such, tensors and networks by a checksum.

    Names that the function looks up inside itself, and files that it reads, are not looked into. A ValueError says what
    cannot be recorded, and what to do.
    """
    require_function(function)
    parts = Parts(function.__name__)
    parts.add_function(function.__name__, inspect.unwrap(function))
    text = parts.text()
    check_secrets({f"the source of the reward {function.__name__}": text})
    return text


def changed_names(one: str, other: str) -> list[str]:
    """The names of what is another in two recorded sources, or in one of them only. [] if they are the same."""
    before, after = pieces(one), pieces(other)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def pieces(source: str) -> dict[str, str]:
    """Each thing in a recorded source by its name, as text without comments and layout."""
    found = {}
    for node in ast.parse(source).body[1:]:  # the first is the docstring
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {one.asname or one.name: ast.dump(node) for one in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and ast.unparse(node.targets[0]) == UNSEEN:
            found |= ast.literal_eval(node.value)
        else:
            found[ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else node.name] = ast.dump(node)
    return found


def require_function(function: Any) -> None:
    """Raise a ValueError unless this is a function made by `def`, which has a name and a source of its own."""
    hint = "Give a function: def my_reward(images, prompts): …"
    if isinstance(function, functools.partial) or not isinstance(function, types.FunctionType):
        raise ValueError(f"the reward is a {type(function).__name__}, whose source cannot be recorded. {hint}")
    if function.__name__ == "<lambda>":
        raise ValueError(f"the reward is a lambda, which has no name to record it by. {hint}")


@dataclass
class Parts:
    """The pieces of a recorded source, each once, in the order in which they are met."""

    name: str  # of the reward
    imports: dict[str, str] = field(default_factory=dict)  # {name in the notebook: the line that imports it}
    values: dict[str, str] = field(default_factory=dict)  # {name: its value as Python writes it}
    unseen: dict[str, str] = field(default_factory=dict)  # {name: what it is, with a checksum}
    sources: dict[str, str] = field(default_factory=dict)  # {name: source of a function or class}
    met: dict[str, Any] = field(default_factory=dict)  # {name: the thing itself}

    def add_function(self, name: str, function: types.FunctionType) -> None:
        """Add whatever a function uses, and then the function itself."""
        self.met[name] = function
        source = source_of(name, function)
        for used, value in sorted(surroundings(function, ast.parse(source).body[0]).items()):
            self.add(used, value)
        self.sources[name] = source

    def add(self, name: str, value: Any) -> None:
        """Add what the notebook calls `name`."""
        if name in self.met:
            if self.met[name] is not value:
                raise ValueError(
                    f"the reward {self.name} uses two things of the name {name!r}, so its source cannot be recorded. "
                    "Give them different names."
                )
            return
        self.met[name] = value
        function = inspect.unwrap(value) if callable(value) else value  # such as one under functools.cache
        if isinstance(value, types.ModuleType):
            self.add_import(name, value.__name__, f"import {value.__name__}", value.__name__)
        elif importable(value):
            home, called = value.__module__, value.__qualname__
            self.add_import(name, home, f"from {home} import {called}", called)
        elif isinstance(function, types.FunctionType):
            self.add_function(name, function)
        elif isinstance(value, type):
            self.add_class(name, value)
        elif SECRET.search(name) and isinstance(value, str):
            self.unseen[name] = "a secret"  # its checksum would help to guess it
        elif is_plain(value):
            self.values[name] = written(value)
        else:
            self.unseen[name] = identity(self.name, name, value)
            for kind in sorted(kinds_in(value), key=lambda kind: kind.__qualname__):  # a network does what its class says
                if importable(kind):
                    self.add_own_module(kind.__module__)
                else:
                    self.add(kind.__name__, kind)

    def add_import(self, name: str, module: str, line: str, called: str) -> None:
        """Add the import of `called` as `name`, and a checksum of its module's files unless it is an installed package."""
        self.imports[name] = line if called == name else f"{line} as {name}"
        self.add_own_module(module)

    def add_own_module(self, module: str) -> None:
        """Add a checksum of a module's files unless it is an installed package."""
        if found := own_modules(module):
            checksum = files.digest([files.sha256(path) for path in found])
            self.unseen[module] = f"a module of your own, SHA-256 of its files {checksum}"

    def add_class(self, name: str, kind: type) -> None:
        """Add a class of the notebook: its source, and what its methods use."""
        source = source_of(name, kind)
        definition = ast.parse(source).body[0]
        home = vars(sys.modules.get(kind.__module__, types))
        uses = {used: home[used] for used in {*names_around(definition), *names_in_body(definition)} if used in home}
        for method in methods_of(kind):
            uses |= surroundings(method, definition)
        for used, value in sorted(uses.items()):
            if value is not kind and used != "__class__":
                self.add(used, value)
        self.sources[name] = source

    def text(self) -> str:
        """The module. What uses another thing comes after it."""
        unseen = [f"{UNSEEN} = {{", *(f"    {name!r}: {what!r}," for name, what in sorted(self.unseen.items())), "}"]
        blocks = [
            HEADER.format(name=self.name),
            "\n".join(self.imports[name] for name in sorted(self.imports)),
            "\n".join(f"{name} = {value}" for name, value in sorted(self.values.items())),
            "\n".join(unseen) if self.unseen else "",
            *(f"\n{source.rstrip()}" for source in self.sources.values()),
        ]
        return "\n\n".join(block for block in blocks if block).replace("\n\n\n\n", "\n\n\n") + "\n"


def surroundings(function: types.FunctionType, definition: ast.AST) -> dict[str, Any]:
    """What a function takes from around it, by name: globals, variables of the function that it was made in, and the names
    in its decorators, annotations and defaults."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not set yet: a function that is defined later, and that calls this one
            found[name] = cell.cell_contents
    used = {*names_used(function.__code__), *names_around(definition)}
    found |= {name: function.__globals__[name] for name in used if name in function.__globals__}
    found = {name: value for name, value in found.items() if not re.fullmatch("__.*__", name)}  # a module's own, as __name__
    return {name: value for name, value in found.items() if getattr(value, "__wrapped__", value) is not function}


def names_around(definition: ast.AST) -> Iterator[str]:
    """The names in the decorators, bases, annotations and defaults of a definition and of those inside it."""
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            head = [
                *node.decorator_list,
                *getattr(node, "bases", ()),
                getattr(node, "args", None),
                getattr(node, "returns", None),
            ]
            for part in filter(None, head):
                yield from (one.id for one in ast.walk(part) if isinstance(one, ast.Name))


def names_in_body(definition: ast.ClassDef) -> Iterator[str]:
    """The names that a class reads while it is made, outside its methods."""
    for statement in definition.body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (one.id for one in ast.walk(statement) if isinstance(one, ast.Name))


def names_used(code: types.CodeType) -> Iterator[str]:
    """The global names that a function's code reads, in functions inside it, too."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names_used(inner)


def source_of(name: str, thing: Any) -> str:
    """The definition of a function or a class, without indentation, as that of `name`."""
    try:
        if getattr(thing, "__name__", "") == "<lambda>":
            return f"{name} = {lambda_text(thing)}\n"
        text = class_text(thing) if isinstance(thing, type) else textwrap.dedent(inspect.getsource(thing))
        node = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        raise ValueError(
            f"the source of {name!r} is not known, so what is rewarded cannot be recorded. Write it into a cell or a file, "
            f"such as my_rewards.py, and import it from there."
        ) from None
    if name == node.name:
        return text
    # It goes by another name here, as the function inside a decorator does, which is the bare one.
    head, *body = text.splitlines(keepends=True)[node.lineno - 1 :]
    return re.sub(rf"\b{node.name}\b", name, head, count=1) + "".join(body)


def lambda_text(function: types.FunctionType) -> str:
    """The source of a lambda alone; an OSError if its line has several that differ."""
    lines, _ = inspect.findsource(function)
    found = {
        ast.unparse(node)
        for node in ast.walk(ast.parse("".join(lines)))
        if isinstance(node, ast.Lambda) and node.lineno == function.__code__.co_firstlineno
    }
    if len(found) != 1:
        raise OSError("there are several lambdas in its line, or none")
    return found.pop()


def class_text(kind: type) -> str:
    """The source of a class. A kernel's has no file where inspect would look for it: its methods say in which cell it is."""
    cells = [method.__code__.co_filename for method in methods_of(kind)]
    cells += [name for name, entry in reversed(linecache.cache.items()) if len(entry) == 4 and entry[1] is None]
    for cell in cells:
        lines = linecache.getlines(cell)
        with suppress(SyntaxError):
            for node in ast.walk(ast.parse("".join(lines))):
                if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
                    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno]).rstrip("\n") + "\n")
    return textwrap.dedent(inspect.getsource(kind))


def methods_of(kind: type) -> list[types.FunctionType]:
    """The functions in a class, also those under a property, classmethod or staticmethod."""
    found = []
    for value in vars(kind).values():
        parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,)
        found += [
            inspect.unwrap(getattr(part, "__func__", part)) for part in parts if callable(getattr(part, "__func__", part))
        ]
    return [one for one in found if isinstance(one, types.FunctionType) and one.__code__.co_filename != "<string>"]


def importable(thing: Any) -> bool:
    """Whether this is a function or class of a module that can be imported again, and not of the notebook."""
    if not isinstance(thing, types.FunctionType | types.BuiltinFunctionType | type):
        return False
    return thing.__module__ not in (None, "__main__", "__mp_main__") and "<locals>" not in thing.__qualname__


def is_plain(value: Any) -> bool:
    """Whether a value is numbers and text alone, in lists and dicts that are written as they are."""
    if type(value) in (list, tuple, set, frozenset):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    return type(value) in PLAIN


def written(value: Any) -> str:
    """A plain value as Python reads it again; the same text in every process, whose sets have orders of their own."""
    if type(value) is float and not math.isfinite(value):
        return f"float({str(value)!r})"
    if type(value) is dict:
        return f"{{{', '.join(f'{written(key)}: {written(one)}' for key, one in value.items())}}}"
    if type(value) in (set, frozenset):
        inside = f"{{{', '.join(sorted(map(written, value)))}}}" if value else "set()"
        return inside if type(value) is set else f"frozenset({inside})"
    if type(value) in (list, tuple):
        inside = ", ".join(map(written, value))
        return f"[{inside}]" if type(value) is list else f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def kinds_in(value: Any) -> set[type]:
    """The classes of a network and of all networks in it."""
    return {type(one) for one in value.modules()} if isinstance(value, torch.nn.Module) else set()


def identity(reward: str, name: str, value: Any) -> str:
    """What a value is, with a checksum of all numbers in it; a ValueError if it is nothing that has one."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, re.Pattern):
        return f"{kind}, {value.pattern!r}, flags {value.flags}"
    if isinstance(value, torch.device | torch.dtype | np.dtype | types.BuiltinFunctionType | os.PathLike):
        return f"{kind}, {value}"
    if text := text_of(value):
        return f"{kind}, SHA-256 of its settings {hashlib.sha256(text.encode()).hexdigest()}"
    tensors = tensors_of(value)
    if tensors is None:
        raise ValueError(
            f"the reward {reward} uses {name!r}, a {kind}, which cannot be recorded: a change of it would go unnoticed. "
            f"Make it inside the function, or write the reward into a file, such as my_rewards.py, and import it from there."
        )
    checksum = hashlib.sha256()
    for part, tensor in sorted(tensors.items()):
        checksum.update(f"{part} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        checksum.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{kind}, SHA-256 of its numbers {checksum.hexdigest()}"


def tensors_of(value: Any) -> Mapping[str, torch.Tensor] | None:
    """The numbers of a tensor, an array or a network, by name; None for anything else."""
    if isinstance(value, torch.nn.Module):
        return value.state_dict()
    if isinstance(value, torch.Tensor):
        return {"": value}
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        array = np.array(value, ndmin=1, order="C")
        return {"": torch.from_numpy(array.view(np.uint8).copy()), f"{array.dtype} {array.shape}": torch.zeros(0)}
    return None


def text_of(value: Any) -> str:
    """The settings of a processor or tokenizer of transformers as JSON; "" for anything else."""
    if backend := getattr(value, "backend_tokenizer", None):
        return backend.to_str()
    return value.to_json_string() if hasattr(value, "to_json_string") else ""


def own_modules(module: str) -> list[Path]:
    """The files of a module of the user's own and of those it imports from beside it; [] for an installed package."""
    source = getattr(sys.modules.get(module), "__file__", None)
    top = module.partition(".")[0]
    installed = {"site-packages", "dist-packages"} & set(Path(source or "").parts)
    if not source or installed or top in sys.stdlib_module_names or top == "b2diffurl":
        return []
    return modules_beside(Path(source), module)
