"""The table of keys: every key of a preset has a row, a comment and a reader."""

import ast
import re

import pytest
from conftest import PRESETS, ROOT, get_config

from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.objectives.options import limits


def test_every_key_has_a_comment_and_is_read():
    """Each key stands on a line of its own with a comment, and some code outside the mere checking of values reads it, or an
    objective takes it as an option."""
    source = (ROOT / "config" / "stage_process.py").read_text()
    read = {key.removeprefix("train.") for key, _ in limits([objective.options for objective in OBJECTIVES.values()])}
    for path in [*(ROOT / "b2diffurl").rglob("*.py"), *ROOT.glob("run_*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("check") and path.name == "rules.py":
                node.body = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.FunctionDef):  # that a section of settings is handed to by keywords
                read |= {one.arg for one in node.args.kwonlyargs}
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                read |= {one.value for one in node.args[:1] if isinstance(one, ast.Constant)}
            elif isinstance(node, ast.arg) and path.parent.name == "rewards":  # whose settings are keyword arguments
                read.add(node.arg)
    names = {key.rpartition(".")[2] for key in flatten(get_config("shapes").to_dict())}
    assert names - read == set()
    for name in names:
        assert re.search(rf"^    \w+\.{name} = \S.*  # \S", source, re.MULTILINE), name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_has_a_row_and_every_row_is_a_key(preset):
    assert KEYS.keys() == flatten(get_config(preset).to_dict()).keys()
