"""The table of keys: every key of a preset has a row, a comment and a reader."""

import ast
import json
import re

import pytest
from conftest import CONFIG, PRESETS, ROOT, get_config, parse_command
from ml_collections import ConfigDict

from b2diffurl.configuration.keys import KEYS, TODAYS_NAME, by_todays_names, flatten
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


# ---- older names ----

OLDER = {  # the paper's repository has three of them, an earlier version of this one the others
    "eval.history_cnt": ("selection.history_cnt", 3),
    "eval.advantage": ("selection.advantage", "group"),
    "eval.selection": ("selection.images", "all"),
    "eval.pos_threshold": ("selection.pos_threshold", 0.75),
    "eval.neg_threshold": ("selection.neg_threshold", -0.75),
}
BY_TODAYS_NAME = dict(OLDER.values())
BY_OLDER_NAME = {older: value for older, (_, value) in OLDER.items()}


def parsed(folder, *flags: str, file: str = f"{ROOT}/config/stage_process.py:b2") -> dict:
    """All settings of a command line."""
    ended = parse_command(folder, ["run_train.py", f"--config={file}", *flags])
    assert ended.code == 0, ended.stderr
    return flatten_as_is(json.loads(ended.stdout))


def flatten_as_is(nested: dict, prefix: str = "") -> dict:
    """By whatever names there are, unlike `flatten`."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten_as_is(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def test_an_older_name_on_the_command_line_is_the_same_setting(tmp_path):
    """The configuration is that of today's names, and has no key of an older one."""
    older = parsed(tmp_path, *(f"--config.{key}={value}" for key, value in BY_OLDER_NAME.items()))
    assert older == parsed(tmp_path, *(f"--config.{key}={value}" for key, value in BY_TODAYS_NAME.items()))
    assert older.keys() & OLDER.keys() == set()
    assert {key: older[key] for key in BY_TODAYS_NAME} == BY_TODAYS_NAME


@pytest.mark.parametrize("made", ["ours['get_config']('b2')", "reference()", "old_copy()"])
def test_a_config_file_may_set_older_names(tmp_path, made):
    """Of a preset, which is locked; of the reference; and in a copy of the file from before there were today's names."""
    sets = "\n".join(f"    config.{key} = {value!r}" for key, value in BY_OLDER_NAME.items())
    (tmp_path / "own.py").write_text(
        f"import runpy\nours = runpy.run_path('{ROOT}/config/stage_process.py')\nglobals().update(ours)\n"
        f"def old_copy():\n    config = reference()\n    del config.selection\n    return config\n"
        f"def get_config(preset):\n    config = {made}\n{sets}\n    return config\n"
    )
    found = parsed(tmp_path, file=f"{tmp_path}/own.py:b2")
    assert {key: found[key] for key in BY_TODAYS_NAME} == BY_TODAYS_NAME
    assert found.keys() == KEYS.keys() | {"reward.weights"}


@pytest.mark.parametrize("last", ["eval", "selection"])
def test_two_names_with_different_values_are_refused_in_a_sentence(tmp_path, last):
    """In either order; with the same value they are one setting."""
    first = {"eval": "selection", "selection": "eval"}[last]
    both = (f"--config.{first}.pos_threshold=0.75", f"--config.{last}.pos_threshold=0.5")
    ended = parse_command(tmp_path, ["run_train.py", f"{CONFIG}:b2", *both])
    assert ended.code == 2
    values = {first: 0.75, last: 0.5}
    said = f"error: selection.pos_threshold is {values['selection']} and eval.pos_threshold, an older name of the same key, "
    assert ended.stderr.startswith(f"{said}{values['eval']}; give one of them")
    assert len(ended.stderr.splitlines()) == 2
    same = (f"--config.{first}.pos_threshold=0.75", f"--config.{last}.pos_threshold=0.75")
    assert parsed(tmp_path, *same)["selection.pos_threshold"] == 0.75


def test_two_names_of_one_key_in_a_configuration_are_refused():
    """As in a file that mixes an old copy with today's section."""
    config = ConfigDict({"eval": {"pos_threshold": 0.75}, "selection": {"pos_threshold": 0.5}})
    with pytest.raises(ValueError, match=r"selection.pos_threshold is 0.5 and eval.pos_threshold.* 0.75; give one"):
        by_todays_names(config)


def test_every_older_name_can_be_set_in_a_preset():
    """config/stage_process.py has each that was ever a key with the same values."""
    nested = get_config("b2").to_dict()
    shared = {f"eval.{name}" for name in nested["eval"]} - {f"eval.{name}" for name in flatten(nested)}
    assert shared & TODAYS_NAME.keys() == OLDER.keys()
