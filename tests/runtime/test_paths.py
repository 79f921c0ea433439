"""Where a relative path lies: the user's in the directory where the command was given, all others in the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, make_config, parse_command, start

from b2diffurl.configuration.keys import KEYS, flatten, meant_paths
from b2diffurl.configuration.limits import File, Folder, ModelName
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.recorded import differences
from b2diffurl.experiment.folder import find_experiment, resolve_checkpoint
from b2diffurl.models import check_base
from b2diffurl.runtime import paths
from b2diffurl.runtime.hub import find_local, locate

PLACES = sorted(key for key, row in KEYS.items() if isinstance(row.limit, (File, Folder, ModelName)))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The user's directory, in which the command is given; it holds base/ and prompts.txt. The home folder is another."""
    (tmp_path / "user" / "base").mkdir(parents=True)
    (tmp_path / "user" / "prompts.txt").write_text("a cat\n")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(paths.STARTED_IN, str(tmp_path / "user"))
    return tmp_path / "user"


def test_every_path_of_the_configuration_is_known_as_one():
    """By their defaults: whatever has a slash in it and is no URL, and what its comment calls a path."""
    config = flatten(make_config({}, "shapes").to_dict()) | flatten(make_config({}).to_dict())
    assert {key for key, value in config.items() if "/" in str(value)} <= set(PLACES)
    assert {"save_path", "log_path", "prompt_file", "eval.prompt_file", "resume_from", "pretrained.config"} <= set(PLACES)
    assert len(PLACES) == 20


@pytest.mark.parametrize("key", PLACES)
def test_a_path_that_the_user_gives_is_the_user_s(key, elsewhere):
    """Relative to the user's directory, with ~ replaced; what the preset gave stays the repository's."""
    home = os.environ["HOME"]
    for given, meant in (
        ("base", f"{elsewhere}/base"),
        ("./a b/ü $x/", f"{elsewhere}/./a b/ü $x/"),
        ("../base", f"{elsewhere}/../base"),
        ("~/runs", f"{home}/runs"),
        ("~", home),
        ("/srv/base", "/srv/base"),
        (" ", " "),
        ("", ""),
    ):
        assert meant_paths({key: given}, {key}) == {key: meant}
    assert meant_paths({key: "model/lora"}, set()) == {key: "model/lora"}
    assert meant_paths({key: "~/runs"}, set()) == {key: f"{home}/runs"}


def test_a_hub_id_is_no_path_unless_there_is_one(elsewhere):
    """owner/name stays, for a model; of a prompt file it is a path; a folder of that name wins, as before."""
    assert paths.user_model("owner/name") == "owner/name"
    assert paths.user_path("owner/name") == f"{elsewhere}/owner/name"
    (elsewhere / "owner" / "name").mkdir(parents=True)
    assert paths.user_model("owner/name") == f"{elsewhere}/owner/name"
    assert paths.user_model("base") == f"{elsewhere}/base"


def test_in_the_repository_a_path_stays_as_it_was_given(monkeypatch, tmp_path):
    """So records are as they were, and the repository may move; reached over a link, it is the same directory."""
    (tmp_path / "link").symlink_to(os.getcwd())
    for here in (".", os.getcwd(), str(tmp_path / "link")):
        monkeypatch.setenv(paths.STARTED_IN, here)
        assert paths.user_path("config/prompt/x.json") == "config/prompt/x.json"


def test_a_model_recorded_by_another_path_to_it_is_no_change(overrides, tmp_path, monkeypatch):
    """Begun with a relative path or with ~, gone on with from another directory; another model is a change still."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clip").mkdir()
    (tmp_path / "other").mkdir()

    def record(model: str) -> dict:
        return {"config": make_config(overrides | {"reward.clip.model": model}).to_dict(), "prompts_sha256": ""}

    for before in ("clip", "~/clip", "./clip/"):
        assert differences(record(before), record(str(tmp_path / "clip"))) == ()
        assert differences(record(before), record(str(tmp_path / "other"))) != ()
    assert differences(record("owner/name"), record("owner/another")) != ()


SHIPPED_PROMPTS = "config/prompt/shapes_relation_test.json"


def test_what_is_shipped_is_found_from_any_directory(elsewhere, monkeypatch):
    """Presets, their prompts and models, by their relative paths; an experiment's record is that of the repository."""
    here = make_plan(make_config({}, "shapes"))
    monkeypatch.delenv(paths.STARTED_IN)
    monkeypatch.chdir(elsewhere)
    assert load_prompts(SHIPPED_PROMPTS) == json.loads((ROOT / SHIPPED_PROMPTS).read_text())
    for model in ("model/shapes/base", "model/shapes/clip", "./model/shapes_flow/"):
        assert locate(model, patterns=[]) == find_local(model, "") == ROOT / model
    assert paths.same_place("model/shapes/clip", f"{ROOT}/model/shapes/clip")
    plan = make_plan(make_config({}, "shapes"))
    assert (plan.record.content, plan.prompts) == (here.record.content, here.prompts)
    assert check_base(plan.settings.model) is None
    assert not any(elsewhere.joinpath(name).exists() for name in ("model", "log", "config"))


def test_nothing_else_is_taken_from_the_repository(elsewhere, monkeypatch):
    """Experiments, logs, other files beside the package, and ways out of its folders lie where they are looked for."""
    monkeypatch.chdir(elsewhere)
    for name in (
        "model/lora",
        "model",
        "log",
        "README.md",
        "config/../README.md",
        "config/none",
        "/etc/passwd",
        "o/name",
        "",
    ):
        assert paths.resource(name) == Path(name)
    assert paths.resource("~/config") == Path(os.environ["HOME"], "config")


def test_who_wins_where_the_user_has_a_file_of_a_shipped_one_s_name(elsewhere, monkeypatch):
    """What the user gives is the user's file, if there is one, else the shipped one. What the preset gives is shipped."""
    monkeypatch.chdir(elsewhere)
    given, not_given = ({"prompt_file"}, set())
    assert meant_paths({"prompt_file": SHIPPED_PROMPTS}, given) == {"prompt_file": SHIPPED_PROMPTS}
    own = elsewhere / SHIPPED_PROMPTS
    own.parent.mkdir(parents=True)
    own.write_text('["a cat"]')
    for keys, prompts in ((given, ["a cat"]), (not_given, json.loads((ROOT / SHIPPED_PROMPTS).read_text()))):
        assert load_prompts(meant_paths({"prompt_file": SHIPPED_PROMPTS}, keys)["prompt_file"]) == prompts
    (elsewhere / "model" / "shapes" / "clip").mkdir(parents=True)
    assert paths.user_model("model/shapes/clip") == f"{elsewhere}/model/shapes/clip"
    assert paths.user_model("model/shapes/base") == "model/shapes/base"


def test_an_installed_package_works_where_the_command_is_given(elsewhere, monkeypatch):
    """What the user gives stays relative, as in a repository; modules there are found, after all others."""
    shipped = shutil.copytree(ROOT / "config", elsewhere.parent / "package" / "config").parent
    for name in ("SHIPPED", "INSTALLED"):
        monkeypatch.setattr(paths, name, shipped)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(paths.STARTED_IN)
    monkeypatch.chdir(elsewhere)
    paths.go_to_work()
    assert os.getcwd() == os.environ[paths.STARTED_IN] == str(elsewhere)
    assert sys.path[-2:] == [str(elsewhere), str(shipped)]
    assert [paths.user_path(name) for name in ("runs", "prompts.txt")] == ["runs", "prompts.txt"]
    assert paths.resource(SHIPPED_PROMPTS) == shipped / SHIPPED_PROMPTS
    assert paths.resource("prompts.txt").read_text() == "a cat\n"


def test_experiments_and_checkpoints_by_the_user_s_paths(elsewhere):
    """Given to report, export and run_eval.py; the error says where it was looked for."""
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "config.json").touch()
    (elsewhere / "lora.safetensors").touch()
    assert find_experiment("run") == elsewhere / "run"
    assert resolve_checkpoint(elsewhere / "run", "lora.safetensors") == elsewhere / "lora.safetensors"
    for find in (find_experiment, lambda name: resolve_checkpoint(elsewhere / "run", name)):
        with pytest.raises(FileNotFoundError, match=str(elsewhere / "none")):
            find("none")


def test_a_configuration_file_of_the_user_s(elsewhere, tmp_path):
    """By a relative path; the name of our own file is the repository's even where the user has one of that name."""
    own = f'import runpy\nget_config = runpy.run_path("{ROOT}/config/stage_process.py")["get_config"]\n'
    (elsewhere / "mine.py").write_text(own)
    (elsewhere / "config").mkdir()
    (elsewhere / "config" / "stage_process.py").write_text("raise ValueError('the wrong one')\n")
    (elsewhere / "more.flags").write_text("--config.seed=7\n")
    for named in (["--config=mine.py:b2"], ["--config", "mine.py:b2"], ["--config=config/stage_process.py:b2"]):
        ended = parse_command(
            tmp_path, ["run_train.py", *named, "--flagfile=more.flags", "--config.prompt_file=prompts.txt"]
        )
        assert ended.code == 0, ended.stderr
        found = json.loads(ended.stdout.splitlines()[-1])  # before it, that the prompts are the user's own
        assert (found["preset"], found["seed"], found["prompt_file"]) == ("b2", 7, f"{elsewhere}/prompts.txt")


def test_errors_say_where_a_file_was_looked_for(elsewhere, overrides, tmp_path):
    for key in ("prompt_file", "eval.prompt_file", "resume_from"):
        assert_refused(start(tmp_path, overrides | {key: "missing"}, "--dry_run"), f"{elsewhere}/missing")
    for name in ("missing", "./missing"):
        with pytest.raises(FileNotFoundError, match=rf"no model at {elsewhere}/(\./)?missing"):
            locate(paths.user_model(name), patterns=[])
    with pytest.raises(FileNotFoundError, match=f"there is no {elsewhere}/owner/name"):
        locate(paths.user_model("owner/name"), patterns=[])


@pytest.mark.long
def test_scripts_that_are_started_elsewhere_work_in_the_repository(tmp_path):
    """As run_process.sh does: the default configuration, its prompts, model and folder of experiments are the repository's,
    what is given lies in the user's directory."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    environment = {key: value for key, value in os.environ.items() if key != paths.STARTED_IN} | {"HOME": str(tmp_path)}
    environment |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    given = ["--dry_run", "--config.prompt_file=prompts.txt", "--config.save_path=~/runs"]
    script = subprocess.run(
        ["bash", ROOT / "run_process.sh", *given], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert script.returncode == 0, script.stderr
    assert f"shapes in {tmp_path}/runs/shapes, new" in script.stdout
    assert re.search(rf"1 of {tmp_path}/prompts.txt; held-out: \d+ of config/prompt/shapes_", script.stdout)
    assert list(tmp_path.iterdir()) == [tmp_path / "prompts.txt"]
    direct = subprocess.run(
        [sys.executable, ROOT / "run_eval.py", "--config.exp_name=none", "--config.log_path=logs", "--checkpoint=lora"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert direct.returncode == 2
    assert f"no LoRA at {tmp_path}/lora" in direct.stderr
    assert (tmp_path / "logs" / "none.log").is_file()
