"""The recorded source of a function that a notebook defines."""

import ast
import linecache
import sys
import types
from collections.abc import Callable

import pytest
import torch

from b2diffurl.api.source import UNSEEN, changed_names, recorded_source

NOTEBOOK = '''
import functools
import math
import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = 0.5
NAMES = {"red": [0, 1.5]}
NET = torch.nn.Linear(1, 1)
API_KEY = "sk-very-secret-indeed"

@functools.cache
def table():
    return torch.arange(3.0)

def scaled(values: Tensor, by=SCALE):
    return [value * by for value in values if NAMES]

class Box:
    """Holds nothing."""

    def content(self):
        return F.relu(table())

def redness(images, prompts):  # what is rewarded
    red = images.float().mean((1, 2))[:, 0]
    return torch.stack(scaled(red)) + Box().content()[0] + NET.weight[0, 0] * len(API_KEY)
'''


@pytest.fixture
def notebook(monkeypatch) -> Callable[[str], types.SimpleNamespace]:
    """notebook(source) -> what it defines, as a kernel would: in __main__, its source known to linecache."""

    def run(source: str) -> types.SimpleNamespace:
        name = f"<cell {len(linecache.cache)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        main = types.ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", main)
        exec(compile(source, name, "exec"), main.__dict__)
        return types.SimpleNamespace(**main.__dict__)

    return run


def test_what_is_recorded_is_the_reward(notebook):
    """The recorded module, run with the network that has only a checksum, scores as the function does."""
    cell = notebook(NOTEBOOK)
    text = recorded_source(cell.redness)
    recorded: dict = {}
    exec(text, recorded)
    unseen = recorded[UNSEEN]
    assert set(unseen) == {"NET", "API_KEY"}
    assert cell.API_KEY not in text
    recorded |= {"NET": cell.NET, "API_KEY": cell.API_KEY}
    images, prompts = torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8), ["a", "b"]
    assert torch.equal(recorded["redness"](images, prompts), cell.redness(images, prompts))
    for unused in ("math", "numpy"):
        assert unused not in text


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("# what is rewarded", "# another comment", True),
        ("values if NAMES", "values   if NAMES", True),
        ("SCALE = 0.5", "SCALE = 0.25", False),  # a value
        ("[0, 1.5]", "[0, 1.25]", False),  # a value inside another
        ("value * by", "value + by", False),  # a function that it calls
        ("torch.arange(3.0)", "torch.ones(3)", False),  # one under a decorator, called by a class
        ("F.relu", "F.silu", False),  # a method of a class
        ("Linear(1, 1)", "Linear(1, 1).requires_grad_(False)", True),
    ],
)
def test_a_change_is_told_from_a_new_layout(notebook, old, new, same):
    assert old in NOTEBOOK
    sources = []
    for source in (NOTEBOOK, NOTEBOOK.replace(old, new)):
        torch.manual_seed(0)  # of the network's weights
        sources.append(recorded_source(notebook(source).redness))
    assert (not changed_names(*sources)) == same


def test_other_weights_are_another_reward(notebook):
    torch.manual_seed(0)
    cell = notebook(NOTEBOOK)
    before = recorded_source(cell.redness)
    with torch.no_grad():
        cell.NET.weight += 1e-6
    assert changed_names(before, recorded_source(cell.redness))


def test_a_closure_is_recorded(notebook):
    made = "def outer(weight):\n    def inner(images, prompts):\n        return images.sum() * weight\n    return inner\n"
    cell = notebook(made)
    text = recorded_source(cell.outer(2.5))
    assert "weight = 2.5" in text
    assert [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)] == ["inner"]


def test_a_module_of_the_users_counts_by_its_files(notebook, module):
    name = module("def half(x):\n    return x / 2\n")
    cell = notebook(f"from {name} import half\ndef reward(images, prompts):\n    return half(images.sum())\n")
    before = recorded_source(cell.reward)
    assert f"from {name} import half" in before
    module("def half(x):\n    return x / 4\n")
    assert changed_names(before, recorded_source(cell.reward))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "file = open('/dev/null')\ndef reward(images, prompts):\n    return file.read()\n",
            "uses 'file', a _io.TextIOWrapper",
        ),
        ("reward = lambda images, prompts: images\n", "is a lambda, which has no name"),
        ("import functools\nreward = functools.partial(print, 1)\n", "is a partial"),
        ("import torch\nreward = torch.nn.Linear(1, 1)\n", "is a Linear"),
    ],
)
def test_what_cannot_be_recorded_is_refused(notebook, source, said):
    with pytest.raises(ValueError, match=said):
        recorded_source(notebook(source).reward)


def test_a_function_typed_at_a_prompt_is_refused():
    typed: dict = {"__name__": "__main__"}
    exec("def reward(images, prompts):\n    return images\n", typed)
    with pytest.raises(ValueError, match="the source of 'reward' is not known"):
        recorded_source(typed["reward"])


def test_a_secret_in_the_source_is_refused(notebook, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh12345678")
    cell = notebook("def reward(images, prompts):\n    return len('abcdefgh12345678')\n")
    with pytest.raises(ValueError, match="MY_TOKEN"):
        recorded_source(cell.reward)


def test_a_kernel_s_classes_values_and_lambdas(notebook):
    """A class without methods, and one by its own decorator; sets, which each process orders anew; what has no literal; a
    function under another name; the recorded module does the same."""
    cell = notebook(
        "import re\nimport torch\nimport numpy as np\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "@dataclass\nclass Limits:\n    low: float = 0.5\n\n"
        "COLOURS, TOP, ONE = {'red', 'green', 'blue'}, float('inf'), (1,)\n"
        "WEIGHTS, WORD, HERE = np.arange(6.0).reshape(2, 3).T, re.compile('r.d'), Path('here')\n"
        "def twice(score):\n    def inner(images, prompts):\n        return 2 * score(images, prompts)\n    return inner\n"
        "@twice\ndef reward(images, prompts):\n"
        "    return min(TOP, Limits().low + len(COLOURS) + len(ONE)) + half(len(prompts))\n"
        "def whole(call):\n    def others(images, prompts):\n        return call(WEIGHTS, WORD, HERE)\n    return others\n"
        "half, others = (lambda number: number\n    / 2), whole(lambda *all: len(all))\n"
    )
    text = recorded_source(cell.reward)
    recorded: dict = {"__name__": "recorded"}
    sys.modules["recorded"] = types.ModuleType("recorded")  # where dataclasses look
    exec(text, recorded)
    assert recorded["inner"](None, ["a"]) == cell.reward(None, ["a"]) == 10
    assert "COLOURS = {'blue', 'green', 'red'}" in text
    del sys.modules["recorded"]
    recorded_source(cell.others)


def test_another_forward_of_a_network_is_another_reward(notebook):
    source = (
        "import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x)\n"
        "NET = torch.nn.Sequential(Net(1, 1))\ndef reward(images, prompts):\n    return NET(images)\n"
    )
    texts = []
    for one in (source, source.replace("forward(x)", "forward(-x)")):
        torch.manual_seed(0)
        texts.append(recorded_source(notebook(one).reward))
    assert changed_names(*texts) == ["Net"]
