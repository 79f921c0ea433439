"""The wheel in an environment of its own, with what its list of dependencies asks for, outside the repository.

Making the environment takes minutes; B2DIFFURL_ENVIRONMENT=FOLDER names one in which the wheel is installed already.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, snapshot

pytestmark = pytest.mark.wheel

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
# The embedded model and as few images as make an update: a run to an evaluated LoRA.
FEW = [
    f"--config.{key}={value}"
    for key, value in {
        "num_threads": 1, "split_time": 2, "sample.batch_size": 4, "sample.num_batches_per_epoch": 1, "eval.num_images": 4,
        "eval.every": 0, "eval.diversity": "()", "eval.deployed.num_steps": 4, "train.num_epochs": 1,
        "train.save_interval": 1,
    }.items()
]  # fmt: skip


def made(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """What a command prints that must work. It sees nothing of the repository, nor of the tests."""
    environment = {key: value for key, value in os.environ.items() if key not in ("B2DIFFURL_STARTED_IN", "PYTHONPATH")}
    ended = subprocess.run(list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    made(sys.executable, "-m", "venv", folder / "builder")
    made(folder / "builder/bin/pip", "install", "-q", "hatchling")
    made(folder / "builder/bin/python", "-m", "hatchling", "build", "-d", folder)
    made(folder / "builder/bin/pip", "wheel", "-q", "--no-deps", "-w", folder / "again", *folder.glob("*.tar.gz"))
    return folder


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory, request) -> Path:
    """The folder of programs of the environment with the wheel."""
    if given := os.environ.get("B2DIFFURL_ENVIRONMENT"):
        return Path(given, "bin").absolute()
    folder = tmp_path_factory.mktemp("environment")
    made(sys.executable, "-m", "venv", folder)
    torch = re.search(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0]
    made(folder / "bin/pip", "install", "-q", torch, *request.getfixturevalue("built").glob("*.whl"))
    return folder / "bin"


@pytest.fixture(scope="module")
def package(bin_folder) -> Path:
    """The folder of the installed package."""
    (found,) = bin_folder.parent.glob("lib/python3*/site-packages/b2diffurl")
    return found


@pytest.fixture(scope="module")
def folder(bin_folder, package, tmp_path_factory) -> Iterator[Path]:
    """A folder of the user's in which the wheel has made a run. Nothing may have changed in the package at the end."""
    before = snapshot(package)
    folder = tmp_path_factory.mktemp("user")
    (folder / "random.py").write_text("raise ImportError('a file of the user hides a library')\n")
    made(bin_folder / "b2diffurl", "run", *FEW, cwd=folder, StageCnt="1", ExpName="first")
    yield folder
    assert snapshot(package) == before


def test_the_wheel_holds_the_package_and_what_is_shipped_alone(built):
    """Every file that git has of them, nothing else; the one made from the source distribution is the same."""
    tracked = made("git", "ls-files", "b2diffurl", "config", "model", "run_*").split()
    tracked = [name for name in tracked if name not in ("model/shapes/figures.json", "model/shapes/.gitignore")]
    wanted = {name if name.startswith("b2diffurl/") else f"b2diffurl/shipped/{name}" for name in tracked}
    (wheel,), (again,) = built.glob("*.whl"), built.glob("again/*.whl")
    found = [set(zipfile.ZipFile(one).namelist()) for one in (wheel, again)]
    assert {name for name in found[0] if ".dist-info/" not in name} == wanted
    assert found[0] == found[1]
    assert wheel.stat().st_size < 13_000_000


def test_a_run_goes_to_an_evaluated_lora(folder, bin_folder):
    """Into the folder where the command was given; then judged, reported, exported and listed from there."""
    root = folder / "model" / "lora" / "first"
    assert (root / "stage0" / "train.json").is_file() and (folder / "log" / "first.log").is_file()
    assert len((root / "eval.jsonl").read_text().splitlines()) == 6
    program, run = bin_folder / "b2diffurl", ["--config.exp_name=first", *FEW]
    said = made(
        program, "eval", *run, "--checkpoint=base,last", "--sampler=training", "--config.eval.seed=5", "--json", cwd=folder
    )
    assert json.loads(said.splitlines()[-1])["n_images"] == 4
    assert made(program, "report", "first", cwd=folder).strip() == "model/lora/first/report.html"
    for form in ("diffusers", "kohya", "pipeline"):
        made(program, "export", "first", "--format", form, cwd=folder)
        assert list((root / "export" / form).glob("**/*.safetensors"))


def test_an_experiment_goes_on_in_a_clone_and_back(folder, bin_folder):
    """Its record has the names that a clone has; each takes what the other has made as its own, though the user has a file
    of a shipped one's name."""
    config = json.loads((folder / "model/lora/first/config.json").read_text())["config"]
    assert config["pretrained"]["model"] == "model/shapes/base"
    assert config["prompt_file"] == "config/prompt/shapes_relation_train_all.json"
    (folder / "config" / "prompt").mkdir(parents=True)
    (folder / config["prompt_file"]).write_text('["a cat"]')
    stage = ["--config.exp_name=first", "--config.stage_cnt=2", "--config.run_name=stage1", *FEW]
    made(bin_folder / "python", ROOT / "run_sample.py", *stage, "--config.save_path=model/lora", cwd=folder)
    made(bin_folder / "b2diffurl", "select", *stage, cwd=folder)
    made(bin_folder / "python", ROOT / "run_train.py", *stage, "--config.save_path=model/lora", cwd=folder)
    assert (folder / "model/lora/first/stage1/train.json").is_file()
    assert json.loads((folder / "model/lora/first/config.json").read_text())["config"] == config


def test_a_reward_and_a_configuration_of_the_user_s_folder(folder, bin_folder):
    """They are found there by each script; Resident=0 calls the scripts, as runs on a GPU do."""
    (folder / "my_rewards.py").write_text("def size(images, prompts):\n    return images.float().mean((1, 2, 3))\n")
    (folder / "mine.py").write_text("from config.stage_process import get_config\n")
    given = [
        "--config=mine.py:shapes",
        "--config.run_name=stage0",
        "--config.exp_name=own",
        "--config.reward.name=my_rewards:size",
    ]
    made(bin_folder / "b2diffurl", "sample", *given, *FEW, cwd=folder)
    run = {"Resident": "0", "StageCnt": "1", "ExpName": "own", "Reward": "my_rewards:size"}
    made(bin_folder / "b2diffurl", "run", *FEW, cwd=folder, **run)
    assert (folder / "model/lora/own/stage0/train.json").is_file()


def test_a_refused_run_ends_as_the_script_does(folder, bin_folder):
    """The exit code of a refusal passes through, in two lines."""
    command = [bin_folder / "b2diffurl", "run", "--config.seed=none"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 2


@pytest.mark.skipif(not NOTEBOOK.is_file(), reason="there is no notebook yet")
def test_the_notebook_runs_with_the_wheel(tmp_path, bin_folder):
    """Its cells from top to bottom, as one program, where there is nothing else."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "quickstart.py").write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    made(bin_folder / "python", "quickstart.py", cwd=tmp_path, MPLBACKEND="agg")
