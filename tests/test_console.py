"""The command b2diffurl, and what an installed package asks for (pyproject.toml)."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, assert_refused, call, run_script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from b2diffurl import __main__ as console
from b2diffurl import __version__
from b2diffurl.runtime import paths
from b2diffurl.runtime.paths import FOLDERS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT = PROJECT["tool"]["hatch"]["build"]["targets"]


def command(folder, *words: str):
    return call(folder, ["b2diffurl", *words], console.main)


def test_without_a_command_it_lists_them_on_one_screen_and_at_once():
    """In a process of its own, to see that no library is imported; --help is the same."""
    look = (
        "import sys; from b2diffurl.__main__ import main; main(); assert not {'torch', 'numpy', 'absl'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(ended.stdout.splitlines()) <= 24 and max(map(len, ended.stdout.splitlines())) <= 120
    for name in console.COMMANDS:
        same = paths.in_clone(name)
        assert re.search(rf"^    {name} .* {same}$", ended.stdout, re.MULTILINE)
    for words in (["--help"], ["-h"]):
        assert command(ROOT, *words).stdout == ended.stdout
    assert command(ROOT, "--version").stdout == f"b2diffurl {__version__}\n"


def test_every_command_has_its_script_or_module():
    for same in map(paths.in_clone, console.COMMANDS):
        target = same.split()[-1]
        if not target.startswith("b2diffurl."):
            assert (ROOT / target).is_file() and target in BUILT["wheel"]["force-include"]
        else:
            assert importlib.util.find_spec(target)


@pytest.mark.parametrize(
    ("given", "meant"), [("smaple", "did you mean sample"), ("tran", "train"), ("xyz", "there are run, s")]
)
def test_an_unknown_command_names_the_nearest(given, meant, empty):
    assert_refused(command(empty, given, "--config.seed=1"), given, meant)


def test_a_script_s_command_is_the_script(empty):
    """The same flags, output and exit code; here of a mistake, which every script finds at once."""
    given = [f"--config={ROOT}/config/stage_process.py:b2", "--config.train.learning_rate=-1", "--config.run_name=stage0"]
    for verb in ("sample", "select", "train", "eval"):
        here = command(empty, verb, *given)
        there = run_script(empty, verb, {"train.learning_rate": -1, "run_name": "stage0"}, preset="b2")
        assert_refused(here, f"{verb}: .*learning_rate is -1")
        assert (here.code, here.stderr) == (there.code, there.stderr)


def test_a_module_s_command_is_the_module(empty):
    for verb in ("report", "export", "label"):
        assert_refused(command(empty, verb, "none"), f"{verb}: no experiment 'none'")


def test_run_becomes_run_process_sh(monkeypatch, empty):
    """With its arguments and environment; of this Python; and a module of the user's directory hides no library."""
    became = []
    monkeypatch.setattr(os, "execvpe", lambda *given: became.append(given) or sys.exit(7))
    monkeypatch.setenv("StageCnt", "3")
    monkeypatch.delenv("Python", raising=False)
    assert command(empty, "run", "--dry_run", "--config.seed=1 2").code == 7
    (file, words, environment), *_ = became
    assert (file, words) == ("bash", ["bash", f"{ROOT}/run_process.sh", "--dry_run", "--config.seed=1 2"])
    assert environment["StageCnt"] == "3" and environment["PYTHONSAFEPATH"] == "1"
    assert environment["Python"] == sys.executable

    def missing(*_):
        raise FileNotFoundError("bash")

    monkeypatch.setattr(os, "execvpe", missing)
    assert_refused(command(empty, "run"), "needs bash")


def pins(file: str) -> dict[str, str]:
    """{package: the exact version} of a file of requirements, without those of the files that it includes."""
    lines = (ROOT / file).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}


def test_the_wheel_asks_for_the_packages_that_figures_were_measured_with():
    """The same packages, each pin in its range, and no range without an upper end."""
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [one for name, some in extras.items() if name != "rewards" for one in some]
    for asked, file in ((PROJECT["project"]["dependencies"], "requirements.txt"), (optional, "requirements-rewards.txt")):
        ranges = {canonicalize_name(one.name): one.specifier for one in map(Requirement, asked)}
        pinned = pins(file)
        assert ranges.keys() == pinned.keys()
        for name, version in pinned.items():
            assert version in ranges[name], name
            assert {one.operator for one in ranges[name]} == {">=", "<"}, name
    everything = Requirement(*extras["rewards"])
    assert everything.name == "b2diffurl" and everything.extras == extras.keys() - {"rewards"}
    assert "2.11.0" in Requirement(PROJECT["project"]["dependencies"][0]).specifier


def test_what_is_shipped_is_what_is_looked_for_there():
    """The wheel has every folder in which the package looks for what is shipped, and puts all of it under its own name."""
    folders = {one for one in BUILT["wheel"]["only-include"] if one != "b2diffurl"}
    assert all(one.startswith(FOLDERS) and (ROOT / one).is_dir() for one in folders)
    assert all(any(f"{one}/".startswith(f"{folder}/") for one in folders) for folder in FOLDERS)
    moved = BUILT["wheel"]["sources"] | BUILT["wheel"]["force-include"]
    assert all(inside == f"b2diffurl/shipped/{given}" for given, inside in moved.items())
    assert all(one.split("/")[0] in moved for one in folders)
    assert {*folders, *BUILT["wheel"]["force-include"]} <= set(BUILT["sdist"]["only-include"])
