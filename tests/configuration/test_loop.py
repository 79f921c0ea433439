"""run_process.sh: its variables, the calls it makes, the signals it hands on."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, get_config, make_config, parse_command, process_variables, start

from b2diffurl.configuration.keys import flatten
from b2diffurl.configuration.loop import calls
from b2diffurl.configuration.settings import read_settings

VARIABLES = {
    "ExpName": ("exp_name", "other"),
    "SavePath": ("save_path", "other"),
    "ModelVersion": ("pretrained.model", "other"),
    "PromptFile": ("prompt_file", "other"),
    "EvalPromptFile": ("eval.prompt_file", "others"),
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
    "History_Cnt": ("selection.history_cnt", 9),
    "PosThreshold": ("selection.pos_threshold", 0.75),
    "NegThreshold": ("selection.neg_threshold", -0.75),
    "SplitTime": ("split_time", 11),
    "Sampling": ("sampling", "independent"),
    "Advantage": ("selection.advantage", "group"),
    "Selection": ("selection.images", "all"),
    "Objective": ("train.objective", "dpok"),
    "SaveInterval": ("train.save_interval", 12),
    "Dev_Id": ("dev_id", 13),
    "EvalEvery": ("eval.every", 14),
    "Reward": ("reward.name", "jpeg_compressibility"),
    "RewardWeights": ("reward.weights", {"clip": 1.0, "my.rewards:beauty": -0.5}),
    "Watch": ("reward.watch", ("shapes", "my.rewards:beauty")),
    "TrackWith": ("track_with", ("wandb", "tensorboard")),
}
OTHERS = (
    "Preset", "Resident", "NumProcesses", "NumMachines", "MachineRank", "MainProcessIp", "MainProcessPort", "Launcher",
    "Python",
)  # fmt: skip
# What a stub for `python -m b2diffurl.start` writes into the file --calls: a run of two stages.
TWO_STAGES = list(calls(read_settings(make_config({"stage_cnt": 2}))))
CALLS = "".join("\t".join(("call", one.needs, f"run_{one.script}.py", *one.flags)) + "\n" for one in TWO_STAGES)
PLAN = f"folder\tfolder\n{CALLS}end\n".replace("\t", r"\t").replace("\n", r"\n")
# Every call of the stub prints, and what it prints looks like a call.
STUB = """#!/bin/bash
if [ "$1" = -c ]; then exit; fi    # asked for its version and packages
for one in "$@"; do case "$one" in --calls=*) printf "{plan}" > "${{one#--calls=}}" ;; esac; done
"""
NOISE = "call\t.\trun_noise.py\n"


def stubbed(tmp_path: Path, variables: dict[str, str], *arguments: str, plan: str = PLAN) -> tuple[list, dict[str, str]]:
    """The command run_process.sh and its environment, with a `python` on the PATH that only notes how it was called."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    noted = f'printf "%q " "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls; printf "{NOISE!r}"'.replace("'", "")
    stub.write_text(STUB.format(plan=plan) + noted)
    stub.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in {*VARIABLES, *OTHERS}}
    environment |= variables | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    return ["bash", ROOT / "run_process.sh", *arguments], environment


def called(tmp_path: Path, variables: dict[str, str], *arguments: str, plan: str = PLAN) -> tuple[list[list[str]], str]:
    """The commands run_process.sh runs, and its stdout."""
    command, environment = stubbed(tmp_path, variables, *arguments, plan=plan)
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
    assert stdout == NOISE * len(calls)
    for call in calls:
        settings = [argument for argument in call if argument.startswith("--config") and "run_name" not in argument]
        assert settings == ["--config=config/stage_process.py:shapes", "--config.train.step_weight=none"]
    assert calls[-2][-3:] == ["--checkpoint=base,last", "--prompts=train,test", "--sampler=training"]
    assert calls[-1][-3:] == ["--checkpoint=base,last", "--prompts=test", "--sampler=deployed"]


@pytest.mark.parametrize(("on_gpu", "num_processes", "resident"), [(False, 0, True), (True, 0, False), (False, 2, False)])
def test_start_makes_the_calls_itself_on_the_cpu(empty, overrides, monkeypatch, on_gpu, num_processes, resident):
    """On a GPU each script gives its memory back by ending; and not if the configuration wants several processes."""
    made = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setattr("b2diffurl.resident.run_stages", lambda config, left: made.extend(left))
    for asked, alone in (("auto", resident), ("no", False)):
        ended = start(empty, overrides | {"num_processes": num_processes}, f"--calls={empty}/calls", f"--alone={asked}")
        assert ended.code == 0, ended.stderr
        lines = (empty / "calls").read_text().splitlines()
        assert ("resident" in lines) == bool(made) == alone
        assert lines[-1] == "end"
        made.clear()


TORCHRUN = ["-m", "torch.distributed.run"]
CLUSTER = {"NumProcesses": "4", "NumMachines": "2", "MainProcessIp": "10.0.0.1"}
RENDEZVOUS = ["--master_addr=10.0.0.1", "--master_port=29500", "--rdzv_conf=timeout=7200"]


@pytest.mark.parametrize(
    ("variables", "resident"),
    [({}, True), ({"NumProcesses": "1"}, True), ({"Resident": "0"}, False), ({"NumProcesses": "2"}, False),
     ({"Launcher": "python"}, False), (CLUSTER, False)],
)  # fmt: skip
def test_one_process_makes_all_calls_where_start_says_so(tmp_path, variables, resident):
    """Not where the user asks for scripts, several processes, machines or a launcher."""
    calls, _ = called(tmp_path, variables, plan=PLAN.replace(r"\ncall", r"\nresident\ncall", 1) if resident else PLAN)
    assert f"--alone={'auto' if resident else 'no'}" in calls[0]
    assert (len(calls) == 1) == resident


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
    stub.write_text(STUB.format(plan=PLAN) + f'if [ "$1" != -m ]; then echo $$ > {tmp_path}/child; exec sleep 100; fi')
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
    calls, stdout = called(tmp_path, {}, "--config.train.step_weight=none", flag, plan=r"end\n")
    assert [call[:2] for call in calls] == [["-m", "b2diffurl.start"]]
    assert calls[0][-2:] == ["--config.train.step_weight=none", flag]
    assert stdout == NOISE


@pytest.mark.parametrize("plan", ["", r"folder\tfolder\n", r"folder\tfolder\ncall\t.\trun_sample.py\n"])
def test_without_a_whole_list_of_calls_nothing_is_run(tmp_path, plan):
    """A first process that ends well without it, as by an exit(0) in a module that it imports, is a failure."""
    with pytest.raises(subprocess.CalledProcessError) as failed:
        called(tmp_path, {}, plan=plan)
    assert failed.value.returncode == 1
    assert "without a list of calls" in failed.value.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("NumProcesses", value) for value in ("99999999999999999999", "08", "-1", "1.5", "two", "1e3")),
        *(("NumMachines", value) for value in ("0", "99999999999999999999")),
        ("MachineRank", "1"),
        ("MainProcessPort", "0x50"),
    ],
)
def test_numbers_with_which_bash_cannot_compute_are_refused(tmp_path, name, value):
    """In two lines of ours, before anything is started."""
    command, environment = stubbed(tmp_path, {name: value})
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 2)
    assert ended.stderr.startswith("error: ")
    assert not (tmp_path / "calls").exists()


def test_what_is_left_of_another_run_is_not_handed_on(tmp_path):
    """RANK and the like of a launcher that is gone, which would make a run of one process take itself for the second."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(plan=PLAN) + f'echo "${{RANK-}}${{LOCAL_RANK-}}${{WORLD_SIZE-}}" >> {tmp_path}/given')
    stub.chmod(0o755)
    left = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1", "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", ROOT / "run_process.sh"], env=os.environ | left, check=True, timeout=60)
    assert set((tmp_path / "given").read_text().splitlines()) == {""}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(tmp_path, closed):
    """Every call is made all the same, and stdout and stderr of the calls are open: a data file must not get its number."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB.format(plan=PLAN) + f"ls /dev/fd/1 /dev/fd/2 > {tmp_path}/open; echo >> {tmp_path}/calls")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"bash {ROOT}/run_process.sh {closed}"], env=environment, check=True, timeout=60)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1 + 10
    assert len((tmp_path / "open").read_text().splitlines()) == 2


def test_the_list_of_calls_is_not_open_in_the_scripts(tmp_path):
    """A script that read from its descriptor would take calls away."""
    command, environment = stubbed(tmp_path, {})
    with (tmp_path / "bin" / "python").open("a") as stub:
        stub.write(f"\nif ( : <&3 ) 2> /dev/null; then touch {tmp_path}/open; fi\n")
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1 + 10
    assert not (tmp_path / "open").exists()


def test_there_is_a_folder_for_logs():
    """In a fresh clone, too: a shell opens `bash run_process.sh > log/NAME` before anything of ours runs."""
    assert (ROOT / "log" / ".gitignore").is_file()


def test_every_variable_of_run_process_sets_its_key(tmp_path):
    """Each documented variable, from the environment, ends up in the key it stands for, in each script."""
    variables = {name: str(value) for name, (_, value) in VARIABLES.items()}
    variables |= {"Watch": "shapes, my.rewards:beauty", "TrackWith": "wandb,tensorboard"}
    assert process_variables() == {*VARIABLES, *OTHERS}
    calls, _ = called(tmp_path, variables | {"Preset": "sd14"})
    for call in calls[1:]:
        argv = [argument.replace("--config=config", f"--config={ROOT}/config") for argument in call]
        ended = parse_command(tmp_path, argv)
        assert ended.code == 0, ended.stderr
        found = flatten(json.loads(ended.stdout))
        reference = json.loads(json.dumps(flatten(flatten(get_config("sd14").to_dict()) | dict(VARIABLES.values()))))
        assert found | {"run_name": ""} == reference | {"run_name": ""}


def test_a_call_that_needs_nothing_is_possible_before_the_folder_is_there(tmp_path):
    """As on a machine that has not the lock, and so has not made the experiment's folder; scores are waited for."""
    sample, _, train, _ = list(calls(read_settings(make_config({"stage_cnt": 1, "reward.name": "file"}))))[:4]
    assert sample.is_possible(tmp_path / "new")
    assert not train.is_possible(tmp_path / "new")
    (tmp_path / "stage0").mkdir()
    (tmp_path / "stage0" / "select.json").touch()
    assert train.is_possible(tmp_path)
    assert all(call.is_possible(tmp_path / "new") for call in TWO_STAGES)


def test_an_average_is_judged_beside_the_lora_at_the_end(config):
    """Between the base and the LoRA, so that the last line that run_eval.py prints is still the LoRA's; without an average
    nothing else is judged."""
    for decay, judged in ((0.0, "base,last"), (0.9, "base,last/ema,last")):
        config.train.ema = decay
        found = [call for call in calls(read_settings(config)) if call.stage is None]
        assert [call.flags for call in found] == [
            ["--noverdict", f"--checkpoint={judged}", "--prompts=train,test", "--sampler=training"],
            [f"--checkpoint={judged}", "--prompts=test", "--sampler=deployed"],
        ]
    assert found[1].evaluations(2, 0) == {(name, "test", "deployed") for name in ("base", "stage1/ema", "stage1")}


# ---- the shell: --help, switches, misspelt variables, the interpreter ----


def shell(
    tmp_path: Path, variables: dict[str, str], *arguments: str, script: str = "run_process.sh"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of run_process.sh with a stub for `python`."""
    command, environment = stubbed(tmp_path, variables, *arguments)
    command = command if script == "run_process.sh" else [script, *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help_lists_every_variable_and_every_preset(tmp_path, flag):
    """Each with the comment that stands beside it, from wherever it is called; nothing is started."""
    code, stdout, stderr = shell(tmp_path, {}, flag)
    assert (code, stderr) == (0, "")
    lines = (ROOT / "run_process.sh").read_text().splitlines()
    comments = {line.partition("=")[0]: line.rpartition("  # ")[2] for line in lines if ":-" in line and "  # " in line}
    for name in (*VARIABLES, *OTHERS):
        assert any(line.split()[:1] == [name] and comments[name] in line for line in stdout.splitlines()), name
    presets = runpy.run_path(str(ROOT / "config" / "stage_process.py"))["PRESETS"]
    assert all(re.search(rf"\b{preset}\b", stdout) for preset in presets)
    assert "StageCnt         number of stages" in stdout
    assert "(default: 29500)" in stdout
    assert not (tmp_path / "calls").exists()


def test_it_is_executable(tmp_path):
    code, stdout, _ = shell(tmp_path, {}, "--help", script=str(ROOT / "run_process.sh"))
    assert (code, "Variables:" in stdout) == (0, True)
    mode = subprocess.run(["git", "ls-files", "-s", "run_process.sh"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert mode.stdout.startswith("100755") or not mode.stdout  # not where the files were copied without git


@pytest.mark.parametrize(
    ("word", "number"),
    [("yes", 1), ("true", 1), ("True", 1), ("ON", 1), ("1", 1), ("no", 0), ("False", 0), ("off", 0), ("0", 0)],
)
def test_a_switch_may_be_a_word(tmp_path, word, number):
    """Resident and RandomPrompt, as 1 and 0."""
    calls, _ = called(tmp_path, {"Resident": word, "RandomPrompt": word})
    assert all(f"--config.prompt_random_choose={number}" in call for call in calls)
    assert f"--alone={'yes' if number else 'no'}" in calls[0]


@pytest.mark.parametrize("name", ["Resident", "RandomPrompt"])
@pytest.mark.parametrize("value", ["maybe", "2", "yess", " ", "-1"])
def test_a_switch_that_is_neither_is_refused(tmp_path, name, value):
    code, _, stderr = shell(tmp_path, {name: value})
    assert (code, stderr.splitlines()[0]) == (2, f"error: {name} is '{value}'; it is 1 (yes) or 0 (no)")
    assert not (tmp_path / "calls").exists()


def test_a_variable_behind_the_command_is_refused(tmp_path):
    """It would have no effect there; what only looks like one goes on to the scripts."""
    code, _, stderr = shell(tmp_path, {}, "--dry_run", "Preset=sd14")
    assert (code, len(stderr.splitlines())) == (2, 2)
    assert "Give it before the command: Preset=sd14 bash run_process.sh" in stderr
    assert not (tmp_path / "calls").exists()
    (tmp_path / "other").mkdir()
    assert shell(tmp_path / "other", {}, "Presets=sd14")[0] == 0


def test_a_variable_that_is_misspelt_in_case_is_warned_of(tmp_path):
    """And one with other underscores; the run goes on. The right ones and PYTHON, which is used elsewhere, pass."""
    wrong = {"Expname": "a", "STAGE_CNT": "3", "DevId": "1", "lr": "2", "PYTHON": "x"}
    code, _, stderr = shell(tmp_path, wrong | {"Seed": "5", "ExpName": "b", "Dev_Id": "0"})
    assert code == 0
    said = "warning: {} is set, which has no effect here; the variable is {}".format
    meant = {"Expname": "ExpName", "STAGE_CNT": "StageCnt", "DevId": "Dev_Id", "lr": "LR"}
    assert sorted(stderr.splitlines()) == sorted(said(*pair) for pair in meant.items())


def interpreter(folder: Path, name: str, answer: str) -> Path:
    """A program that answers every question with a line and notes its calls."""
    path = folder / name
    path.write_text(
        f'#!/bin/bash\nif [ "$1" = -c ]; then {answer}; exit; fi\n{STUB.format(plan=PLAN)}echo "$0" >> {folder}/ran'
    )
    path.chmod(0o755)
    return path


def with_interpreters(folder: Path, answers: dict[str, str], **variables: str) -> tuple[int, str]:
    """Exit code and stderr of run_process.sh where only these interpreters are on the PATH."""
    for name, answer in answers.items():
        interpreter(folder, name, answer)
    for name in ("bash", "awk", "sed", "sleep", "dirname", "mktemp", "grep", "tail", "rm", "rmdir"):
        (folder / name).symlink_to(shutil.which(name))
    ended = subprocess.run(
        ["bash", ROOT / "run_process.sh"], env=variables | {"PATH": str(folder)}, capture_output=True, text=True, timeout=60
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("answers", "variables", "chosen"),
    [
        ({"python": ":", "python3": ":"}, {}, "python"),
        ({"python3": ":"}, {}, "python3"),
        ({"python": ":", "other": ":"}, {"Python": "other"}, "other"),
    ],
)
def test_the_interpreter_is_found(tmp_path, answers, variables, chosen):
    """`python`, or `python3` where there is no `python`, or the one that is given; for every call."""
    assert with_interpreters(tmp_path, answers, **variables) == (0, "")
    ran = (tmp_path / "ran").read_text().splitlines()
    assert {Path(one).name for one in ran} == {chosen}
    assert len(ran) == 1 + 10


@pytest.mark.parametrize(
    ("answers", "variables", "said"),
    [
        ({}, {}, "error: there is neither python nor python3"),
        ({"python3": "echo is Python 3.9; 3.11 or newer is needed"}, {}, "python3 is Python 3.9; 3.11 or newer is needed"),
        ({"python": "echo lacks torch"}, {}, "pip install -r requirements.txt"),
        ({"python": ":"}, {"Python": "/no/such"}, "error: /no/such cannot be run"),
    ],
)
def test_an_interpreter_that_cannot_run_this_is_named(tmp_path, answers, variables, said):
    """In two lines of ours, whose remedy is a command, before anything is started."""
    if any("3.9" in answer for answer in answers.values()):
        answers = {name: f"echo '{answer.removeprefix('echo ')}'" for name, answer in answers.items()}
    code, stderr = with_interpreters(tmp_path, answers, **variables)
    assert code == 2
    assert said in stderr
    assert not (tmp_path / "ran").exists()


def test_the_question_put_to_the_interpreter_is_answered_by_this_one(tmp_path):
    """With what it lacks: nothing here, and torch where packages of the environment are not seen."""
    question = re.search(r"-c '(import sys\n.*?)'\)", (ROOT / "run_process.sh").read_text(), re.DOTALL)[1]
    ask = [sys.executable, "-c", question]
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == ""
    alone = subprocess.run([*ask[:1], "-I", "-S", *ask[1:]], capture_output=True, text=True, check=True)
    assert alone.stdout.startswith("lacks torch")


def test_a_run_outlives_its_temporary_files(tmp_path):
    """Something that cleans /tmp deletes the list of calls while one process makes them all: the run ends as it should."""
    folder, stub = tmp_path / "run", tmp_path / "python"
    folder.mkdir()
    stub.write_text(f"""#!/bin/bash
for given in "$@"; do case "$given" in --calls=*) calls="${{given#--calls=}}" ;; esac; done
if [ -z "${{calls:-}}" ]; then exit 0; fi
printf 'lock [[%s, 1]]' "$B2DIFFURL_RUN" > {folder}/run.lock
printf 'folder\\t{folder}\\nresident\\nend\\n' > "$calls"
sleep 1
rm -r "$(dirname "$calls")"
""")
    stub.chmod(0o755)
    ended = subprocess.run(
        ["bash", ROOT / "run_process.sh"], env=os.environ | {"Python": str(stub)}, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not folder.exists()  # the lock is taken away, and the folder, which is empty
