"""Configuration: presets, keys, command lines, the variables of run_process.sh, and the commands of README and docs."""

import ast
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import time
from pathlib import Path

import conftest
import pytest
from conftest import ROOT, flags, get_config, make_config, parse_command, run_script

from b2diffurl.configuration.command_line import named_preset
from b2diffurl.configuration.keys import KEYS, flatten
from b2diffurl.configuration.loop import calls
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.rules import check
from b2diffurl.configuration.settings import read_settings
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.objectives.options import limits

PRESETS = ("shapes", "sd14", "sd14_10gb", "b2", "bs", "bpt", "ddpo")
ARMS = {  # of the study: what each changes of b2, beside its name
    "b2": {},
    "bs": {"curriculum": "fixed"},
    "bpt": {"sampling": "independent"},
    "ddpo": {"sampling": "independent", "curriculum": "fixed", "split_step_left": "T", "eval.selection": "all"},
}
CONFIG = f"--config={ROOT}/config/stage_process.py"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_are_locked(preset):
    """Every preset passes the checks, and takes neither a key it lacks nor a value of another type."""
    config = get_config(preset)
    check(config)
    for key, section in [("no_such_key", config), ("no_such_key", config.train)]:
        with pytest.raises((AttributeError, KeyError)):
            section[key] = 1
    with pytest.raises(TypeError):
        config.split_time = "five"
    assert not [key for key, value in flatten(config.to_dict()).items() if isinstance(value, list)]


def test_the_presets_named_here_are_all():
    """PRESETS of the file, and an unknown name lists them."""
    with pytest.raises(ValueError) as error:
        get_config("sd15")
    assert str(error.value) == "unknown preset 'sd15'; known: " + ", ".join(PRESETS)


def test_sd14_keeps_the_reference_values():
    """The numbers of the paper's setting, one by one."""
    reference = {
        "pretrained.model": "CompVis/stable-diffusion-v1-4",
        "reward.name": "clip",
        "reward.clip.model": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "stage_cnt": 100,
        "split_step_left": 14,
        "split_step_right": 20,
        "split_time": 5,
        "sample.num_steps": 20,
        "sample.eta": 1.0,
        "sample.guidance_scale": 5.0,
        "sample.batch_size": 8,
        "sample.num_batches_per_epoch": 32,
        "eval.history_cnt": 8,
        "eval.pos_threshold": 0.5,
        "eval.neg_threshold": -0.5,
        "train.num_epochs": 2,
        "train.batch_size": 2,
        "train.gradient_accumulation_steps": 64,
        "train.learning_rate": 1e-4,
        "train.adam_beta1": 0.9,
        "train.adam_beta2": 0.999,
        "train.adam_weight_decay": 1e-4,
        "train.adam_epsilon": 1e-8,
        "train.max_grad_norm": 1.0,
        "train.eps": 0.1,
        "train.adv_clip_max": 5.0,
        "train.lora_rank": 4,
        "train.step_weight": "none",
        "train.objective": "ddpo",
        "curriculum": "progressive",
        "sampling": "branch",
        "eval.selection": "pairs",
        "eval.advantage": "prompt",
    }
    found = flatten(get_config("sd14").to_dict())
    assert {key: found[key] for key in reference} == reference


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_of_the_study_is_what_its_name_says_and_nothing_else(arm):
    """It differs from b2 in nothing but its name and the keys that define it; its stages train L growing to R, L, or all T
    steps."""
    b2, config = get_config("b2"), get_config(arm)
    expected = flatten(b2.to_dict()) | {"exp_name": arm, "preset": arm} | ARMS[arm]
    num_steps = b2.sample.num_steps
    assert flatten(config.to_dict()) == {key: num_steps if value == "T" else value for key, value in expected.items()}
    schedule = read_settings(config).schedule
    steps = {schedule.num_trained_steps(stage) for stage in range(config.stage_cnt)}
    growing = {*range(b2.split_step_left, num_steps + 1)}
    assert steps == {"b2": growing, "bpt": growing, "bs": {b2.split_step_left}, "ddpo": {num_steps}}[arm]
    assert len(growing) > 1


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_any_arm_runs_with_any_objective_that_its_selection_allows(arm, objective):
    """Only d3po, which wants pairs of branches, is not for independent images."""
    config = get_config(arm)
    config.train.objective = objective
    config.train.num_epochs = 1
    if objective == "d3po" and config.sampling == "independent":
        with pytest.raises(ValueError, match="d3po"):
            check(config)
    else:
        check(config)


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
            elif isinstance(node, ast.arg) and path.parent.name == "rewards":  # whose settings are keyword arguments
                read.add(node.arg)
    names = {key.rpartition(".")[2] for key in flatten(get_config("shapes").to_dict())}
    assert names - read == set()
    for name in names:
        assert re.search(rf"^    \w+\.{name} = \S.*  # \S", source, re.MULTILINE), name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_has_a_row_and_every_row_is_a_key(preset):
    assert KEYS.keys() == flatten(get_config(preset).to_dict()).keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_can_be_set_on_the_command_line(preset, tmp_path):
    """A command line that gives each key another value of its type yields exactly that configuration."""
    given = flatten(get_config(preset).to_dict())
    for key, value in given.items():
        kind = type(value)
        if value is None:
            continue  # reward.weights: a dict, by RewardWeights below
        given[key] = (
            not value if kind is bool else "other" if kind is str else ("other",) if kind is tuple else kind(value + 1)
        )
    argv = ["run_train.py", f"{CONFIG}:{preset}", *(f"--config.{key}={value}" for key, value in given.items())]
    ended = parse_command(tmp_path, argv)
    assert ended.code == 0, ended.stderr
    assert flatten(json.loads(ended.stdout)) == json.loads(json.dumps(given))


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--config.no_such_key=1", "no_such_key"),
        ("--config.train.no_such_key=1", "no_such_key"),
        ("--no_such_flag=1", "no_such_flag"),
        ("--config.split_time=five", "five"),
        ("--config.split_time=2.5", "2.5"),
        ("--config.train.learning_rate=fast", "fast"),
        ("--config.train.use_8bit_adam=maybe", "maybe"),
        ("--config.train=1", "train"),
        ("stage1", "stage1"),
    ],
)
def test_a_mistake_on_the_command_line_is_two_lines(tmp_path, argument, named):
    """Unknown key or flag, wrong type, stray word: exit code 2, two lines that name it, nothing written."""
    ended = run_script(tmp_path, "sample", {}, argument)
    assert ended.code == 2
    assert ended.stdout == ""
    first, second = ended.stderr.splitlines()
    assert first.startswith("error: ")
    assert named in first
    assert second.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["--config=FILE", "-config=FILE", "--config FILE", "-config FILE", "--flagfile=flags"])
def test_the_config_file_may_be_named_in_any_form_of_absl(tmp_path, form):
    """In one word or two, with one dash or two, or in a file of flags; what comes after it changes the preset it names."""
    file = f"{ROOT}/config/stage_process.py:b2"
    (tmp_path / "flags").write_text(f"--config={file}\n")
    argv = ["run_train.py", *form.replace("FILE", file).split(), "--config.seed=7", "--noconfig.allow_tf32"]
    ended = parse_command(tmp_path, argv)
    assert ended.code == 0, ended.stderr
    expected = flatten(get_config("b2").to_dict()) | {"seed": 7, "allow_tf32": False}
    assert flatten(json.loads(ended.stdout)) == json.loads(json.dumps(expected))


# ---- what differs from the preset ----

OWN_FILE = """
import runpy

def get_config(preset):
    open("runs", "a").write(preset)
    config = runpy.run_path("{root}/config/stage_process.py")["get_config"]("sd14")
    config.preset = preset
    config.seed = 5
    config.reward.weights = {{"jpeg_compressibility": 2.0}}
    return config
"""


def test_an_experiment_records_how_it_differs_from_the_preset_of_the_file_it_was_begun_with(tmp_path, overrides):
    """Each setting that the command line changed, with the preset's value, and nothing that the file itself has otherwise;
    for that the file is run no second time."""
    mixture = {"jpeg_compressibility": 1.0}
    settings = overrides | {"reward.weights": mixture, "eval.diversity": "('layout',)", "train.eps": 0.2}
    (tmp_path / "own.py").write_text(OWN_FILE.format(root=ROOT))
    argv = ["run_sample.py", f"--config={tmp_path}/own.py:mine", *flags(settings), "--config.sample.eta=1.0"]
    ended = conftest.call(tmp_path, argv, lambda: runpy.run_path(str(ROOT / argv[0]), run_name="__main__"))
    assert ended.code == 0, ended.stderr
    assert (tmp_path / "runs").read_text() == "mine"
    found = json.loads((tmp_path / "model" / "lora" / "tiny" / "config.json").read_text())["differs_from_preset"]
    preset = flatten(get_config("sd14").to_dict()) | {"reward.weights": {"jpeg_compressibility": 2.0}}
    given = settings | {"eval.diversity": ["layout"]}
    expected = {key: [value, preset[key]] for key, value in given.items() if value != preset[key]}
    assert found == json.loads(json.dumps(expected))
    assert found["reward.weights"] == [mixture, {"jpeg_compressibility": 2.0}]


def test_what_is_recorded_of_the_preset_holds_no_secret(overrides, tmp_path):
    """A preset's password is refused even where the command line replaces it, for the record has both."""
    preset = get_config("sd14")
    preset.reward.http.url = "http://me:secret@localhost:1/"
    with named_preset(preset.to_dict()), pytest.raises(ValueError, match=r"reward\.http\.url has a user name or a password"):
        make_plan(make_config(overrides, save_path=str(tmp_path)))


# ---- run_process.sh ----

VARIABLES = {
    "ExpName": ("exp_name", "other"),
    "SavePath": ("save_path", "other"),
    "ModelVersion": ("pretrained.model", "other"),
    "PromptFile": ("prompt_file", "other"),
    "RandomPrompt": ("prompt_random_choose", 0),
    "Seed": ("seed", 7),
    "Beta1": ("train.beta1", 0.5),
    "Beta2": ("train.beta2", 0.25),
    "BatchCnt": ("sample.num_batches_per_epoch", 3),
    "StageCnt": ("stage_cnt", 2),
    "Curriculum": ("curriculum", "reversed"),
    "SplitStepLeft": ("split_step_left", 3),
    "SplitStepRight": ("split_step_right", 4),
    "TrainEpoch": ("train.num_epochs", 5),
    "AccStep": ("train.gradient_accumulation_steps", 6),
    "LR": ("train.learning_rate", 0.125),
    "NumStep": ("sample.num_steps", 8),
    "History_Cnt": ("eval.history_cnt", 9),
    "PosThreshold": ("eval.pos_threshold", 0.75),
    "NegThreshold": ("eval.neg_threshold", -0.75),
    "SplitTime": ("split_time", 11),
    "Sampling": ("sampling", "independent"),
    "Advantage": ("eval.advantage", "group"),
    "Selection": ("eval.selection", "all"),
    "Objective": ("train.objective", "dpok"),
    "SaveInterval": ("train.save_interval", 12),
    "Dev_Id": ("dev_id", 13),
    "EvalEvery": ("eval.every", 14),
    "Reward": ("reward.name", "jpeg_compressibility"),
    "RewardWeights": ("reward.weights", {"clip": 1.0, "my.rewards:beauty": -0.5}),
    "Watch": ("reward.watch", ("shapes", "my.rewards:beauty")),
    "TrackWith": ("track_with", ("wandb", "tensorboard")),
}


OTHERS = ("Preset", "Resident", "NumProcesses", "NumMachines", "MachineRank", "MainProcessIp", "MainProcessPort", "Launcher")
# What a stub for `python -m b2diffurl.start` says: a run of two stages.
CALLS = "".join("\t".join(("call", one.needs, f"run_{one.script}.py", *one.flags)) + "\n" for one in calls(2))
PLAN = f"folder\n{CALLS}PLAN\n".replace("\t", r"\t").replace("\n", r"\n")


def called(tmp_path: Path, variables: dict[str, str], *arguments: str, plan: str = PLAN) -> tuple[list[list[str]], str]:
    """The commands run_process.sh runs, with a `python` on the PATH that only says how it was called, and its stdout."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\nprintf "{plan}"')
    stub.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in {*VARIABLES, *OTHERS}}
    environment |= variables | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "run_process.sh", *arguments]
    ended = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()], ended.stdout


def test_run_process_goes_through_the_stages(tmp_path):
    """First the configuration is checked and the plan is said, then sample, select, train and, when due, judge each stage in
    order, then base and last are judged; what it was given goes to each of them, and no key is set that nobody named."""
    calls, stdout = called(tmp_path, {}, "--config.train.step_weight=none")
    verbs = [f"run_{verb}.py" for verb in ("sample", "select", "train", "eval")]
    assert [call[0] for call in calls] == ["-m", *verbs, *verbs, "run_eval.py", "run_eval.py"]
    names = [argument.partition("=")[2] for call in calls for argument in call if "run_name" in argument]
    assert names == ["stage0"] * 4 + ["stage1"] * 4
    assert [call[-1] == "--due" for call in calls] == ([False] + ([False] * 3 + [True]) * 2 + [False] * 2)
    assert stdout == "PLAN\n" + f"folder\n{CALLS}PLAN\n" * (len(calls) - 1)
    for call in calls:
        settings = [argument for argument in call if argument.startswith("--config") and "run_name" not in argument]
        assert settings == ["--config=config/stage_process.py:shapes", "--config.train.step_weight=none"]
    assert calls[-2][-3:] == ["--checkpoint=base,last", "--prompts=train,test", "--sampler=training"]
    assert calls[-1][-3:] == ["--checkpoint=base,last", "--prompts=test", "--sampler=deployed"]


TORCHRUN = ["-m", "torch.distributed.run"]
CLUSTER = {"NumProcesses": "4", "NumMachines": "2", "MainProcessIp": "10.0.0.1"}
RENDEZVOUS = ["--master_addr=10.0.0.1", "--master_port=29500", "--rdzv_conf=timeout=7200"]


@pytest.mark.parametrize(
    ("variables", "launch", "num_processes", "judges"),
    [
        ({"NumProcesses": "1"}, [], 1, True),
        ({"NumProcesses": "2"}, [*TORCHRUN, "--nproc_per_node=2", "--standalone"], 2, True),
        (CLUSTER, [*TORCHRUN, "--nproc_per_node=4", "--nnodes=2", "--node_rank=0", *RENDEZVOUS], 8, True),
        (
            CLUSTER | {"MachineRank": "1"},
            [*TORCHRUN, "--nproc_per_node=4", "--nnodes=2", "--node_rank=1", *RENDEZVOUS],
            8,
            False,
        ),
        (
            {"Launcher": "python -m accelerate.commands.launch --multi_gpu", "NumProcesses": "3"},
            ["-m", "accelerate.commands.launch", "--multi_gpu"],
            3,
            True,
        ),
    ],
)
def test_run_process_starts_as_many_processes_as_asked_for(tmp_path, variables, launch, num_processes, judges):
    """Each phase by a launcher, and told how many processes it must be one of; machine 0 alone judges."""
    calls, _ = called(tmp_path, variables)
    phases = [call for call in calls if any(f"run_{verb}.py" in call for verb in ("sample", "select", "train"))]
    assert len(phases) == 6
    for call in phases:
        assert call[: len(launch)] == launch
        assert call[len(launch)].startswith("run_")
        assert f"--config.num_processes={num_processes}" in call
    assert any("run_eval.py" in call for call in calls) == judges


def test_run_process_hands_a_signal_on(tmp_path):
    """SIGTERM to the script alone ends its child, too; exit code 143, and it says how to go on."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        f'#!/bin/bash\nif [ "$1" = -m ]; then printf "{PLAN}"; else echo $$ > {tmp_path}/child; exec sleep 100; fi'
    )
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", ROOT / "run_process.sh"], env=environment, stderr=subprocess.PIPE, text=True) as script:
        while not (tmp_path / "child").is_file() or not (tmp_path / "child").read_text():
            time.sleep(0.01)
        script.terminate()
        assert script.wait(10) == 143
        assert "run the same command again" in script.stderr.read()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


@pytest.mark.parametrize("flag", ["--dry_run", "--dry_run=true", "-dry_run"])
def test_a_dry_run_calls_nothing_else(tmp_path, flag):
    """However it is written, it goes to the first process, whose words are handed on, and there is no second one."""
    calls, stdout = called(tmp_path, {}, "--config.train.step_weight=none", flag, plan=r"experiment a\npreset b\n")
    assert [call[:2] for call in calls] == [["-m", "b2diffurl.start"]]
    assert calls[0][-2:] == ["--config.train.step_weight=none", flag]
    assert stdout == "experiment a\npreset b\n"


def test_there_is_a_folder_for_logs():
    """In a fresh clone, too: a shell opens `bash run_process.sh > log/NAME` before anything of ours runs."""
    assert (ROOT / "log" / ".gitignore").is_file()


def test_every_variable_of_run_process_sets_its_key(tmp_path):
    """Each documented variable, from the environment, ends up in the key it stands for, in each script."""
    variables = {name: str(value) for name, (_, value) in VARIABLES.items()}
    variables |= {"Watch": "shapes, my.rewards:beauty", "TrackWith": "wandb,tensorboard"}
    source = (ROOT / "run_process.sh").read_text()
    assert set(re.findall(r"^(\w+)=\"\$\{\1:-", source, re.MULTILINE)) == {*VARIABLES, *OTHERS}
    calls, _ = called(tmp_path, variables | {"Preset": "sd14"})
    for call in calls[1:]:
        argv = [argument.replace("--config=config", f"--config={ROOT}/config") for argument in call]
        ended = parse_command(tmp_path, argv)
        assert ended.code == 0, ended.stderr
        found = flatten(json.loads(ended.stdout))
        reference = json.loads(json.dumps(flatten(flatten(get_config("sd14").to_dict()) | dict(VARIABLES.values()))))
        assert found | {"run_name": ""} == reference | {"run_name": ""}


# ---- README and docs ----


def commands() -> list[tuple[str, str]]:
    """(file, command) of every bash block in README.md and docs/: continued lines joined, here-documents left out."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            subprocess.run(["bash", "-n", "-c", block], check=True, timeout=60)
            block = re.sub(r"<<-?'?(\w+)'?\n.*?^\1$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
            lines = [line.strip() for line in block.splitlines()]
            found += [(path.name, line) for line in lines if line and not line.startswith("#")]
    return found


def test_the_pages_have_commands():
    """Quick start and tests in README, word for word, and the single scripts in docs/, are there to be checked."""
    lines = commands()
    readme = [line for name, line in lines if name == "README.md"]
    assert "pip install -r requirements.txt && bash run_process.sh" in readme
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest -n 2 --dist worksteal"
    assert tests in readme
    text = "\n".join(line for _, line in lines)
    for script in ("run_sample.py", "run_select.py", "run_train.py", "run_eval.py"):
        assert script in text


def test_documented_commands_parse(tmp_path):
    """Every bash block is valid bash; the scripts, modules and requirement files its commands name exist, their
    variables are run_process.sh's, and their flags are accepted."""
    for name, line in commands():
        for command in re.split(r"&&|;|\|", line):
            words = shlex.split(command, comments=True)
            variables = [words.pop(0).partition("=")[0] for _ in range(len(words)) if re.match(r"\w+=", words[0])]
            check_command(tmp_path, f"{name}: {line}", words, variables)


def check_command(folder: Path, where: str, words: list[str], variables: list[str]) -> None:
    if words[:2] == ["python", "-"]:
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), where
    elif words[0] == "python" and words[1].startswith("run_"):
        argv = [word.replace("--config=config", f"--config={ROOT}/config") for word in words[1:]]
        if not any(word.startswith("--config=") for word in argv):  # the default file, as where the scripts lie
            argv.append(f"{CONFIG}:shapes")
        assert parse_command(folder, argv).code == 0, where
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file(), where
    if words[:2] == ["bash", "run_process.sh"]:
        assert {*variables} <= {*VARIABLES, *OTHERS}, where
        settings = [word for word in words[2:] if word != "--dry_run"]
        assert parse_command(folder, ["run_train.py", f"{CONFIG}:shapes", *settings]).code == 0, where
    for word, following in itertools.pairwise(words):
        assert word != "-r" or (ROOT / following).is_file(), where
