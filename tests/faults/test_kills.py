"""A small experiment on the embedded model that is killed again and again ends as if it had not been.

    python -m pytest -m faults tests/faults

Each test prints what it did and adds it to kills.json of the folder $FAULT_RESULTS, if that is set.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from children import ROOT, Fault, run, start
from conftest import assert_same, flags

from b2diffurl.runtime.files import read_json_lines

pytestmark = pytest.mark.faults

SETTINGS = {
    "exp_name": "tiny", "num_threads": 1, "stage_cnt": 2, "split_step_left": 2, "split_step_right": 3, "split_time": 3,
    "sample.num_steps": 4, "sample.batch_size": 2, "sample.num_batches_per_epoch": 2, "reward.batch_size": 8,
    "eval.num_images": 4, "eval.batch_size": 4, "eval.every": 2, "eval.diversity": "('clip',)",
    "selection.pos_threshold": 0.1, "selection.neg_threshold": -0.1, "train.num_epochs": 2, "train.save_interval": 1,
    "train.batch_size": 2,
}  # fmt: skip
IMAGES = 12  # of a stage
ARGUMENTS = ["--config=config/stage_process.py:shapes", *flags(SETTINGS)]
PROCESS = ["b2diffurl/resident.py", *ARGUMENTS]  # the whole run in one process
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # that a random moment meets
RANDOM_KILLS, SHELL_KILLS = 40, 8

# What each phase writes and does, in order: a file's path, or one of the moments before_step, after_step and appended.
STEPS = {
    "sample": (
        r"images/00000\.png", r"images/00005\.png", r"tree\.json", r"tree\.png", r"samples/batch_00000",
        r"images/00006\.png", r"samples/batch_00001", r"prompts\.json", r"metrics/sample\.jsonl", r"sample\.json",
    ),
    "select": (
        r"scores\.jsonl", r"selection\.json", r"selected/batch_\d+", r"metrics/select\.jsonl", r"select\.json",
    ),
    "train": (
        r"metrics/train\.jsonl", "before_step", "after_step", "appended",
        r"checkpoint_1\.tmp/pytorch_lora", r"checkpoint_1\.tmp/optimizer", r"checkpoint_1\.tmp/state", r"checkpoint_1$",
        "before_step", "after_step", "appended", r"checkpoint_2\.tmp/pytorch_lora", r"checkpoint_2$", r"train\.json",
    ),
}  # fmt: skip
JUDGED = (r"eval/.*/00000\.png", r"eval/.*/result\.json", r"eval\.jsonl", r"report/\w+\.png", r"report\.html")
PHASES = (*STEPS, "evaluate")


def chosen_faults() -> list[tuple[str, Fault]]:
    """(phase, fault) in the order in which one long run meets them: each kind of file half written and just renamed in the
    first stage, whole but not renamed in the second."""
    faults = [("sample", Fault("half", r"tiny/config\.json"))]
    for index, moments in enumerate((("half", "renamed"), ("whole",))):
        for phase, steps in STEPS.items():
            for step in steps:
                if step in ("before_step", "after_step"):
                    faults.append((phase, Fault(step)))
                elif step == "appended":
                    faults.append((phase, Fault(step, rf"stage{index}/metrics/train")))
                else:
                    faults += [(phase, Fault(moment, rf"stage{index}/(.*/)?{step}")) for moment in moments]
    return faults + [("evaluate", Fault(moment, path)) for path in JUDGED for moment in ("half", "renamed")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The experiment, never interrupted."""
    folder = prepare(tmp_path_factory.mktemp("whole"))
    assert run(folder, PROCESS) == 0, (folder / "log" / "children.log").read_text()[-3000:]
    return folder


def prepare(folder: Path) -> Path:
    """A folder in which the scripts find what they find in the project's."""
    folder.mkdir(exist_ok=True)
    (folder / "model").mkdir()
    (folder / "model" / "shapes").symlink_to(ROOT / "model" / "shapes")
    for name in ("config", "b2diffurl", *(path.name for path in ROOT.glob("run_*"))):
        (folder / name).symlink_to(ROOT / name)
    return folder


def experiment(folder: Path) -> Path:
    return folder / "model" / "lora" / "tiny"


def check_result(folder: Path, whole: Path) -> None:
    """The same bits in every file of the experiment but for times and the report that shows them; nothing is left over, and
    no image has two scores."""
    root = experiment(folder)
    assert not [path for path in root.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    for stage in ("stage0", "stage1"):
        assert [row["id"] for row in read_json_lines(root / stage / "scores.jsonl")] == list(range(IMAGES))
    copies = []
    for place in (folder, whole):
        copies.append(shutil.copytree(experiment(place), place / "compared"))
        shutil.rmtree(copies[-1] / "report")
        (copies[-1] / "report.html").unlink()
    assert_same(*copies)
    for copy in copies:
        shutil.rmtree(copy)


def report(what: str, figures: dict) -> None:
    print(f"\n{what}: {json.dumps(figures)}")
    if "FAULT_RESULTS" in os.environ:
        path = Path(os.environ["FAULT_RESULTS"]) / "kills.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | {what: figures}, indent=1) + "\n")


def test_killed_at_chosen_moments(whole, tmp_path):
    """One run, killed while it writes each kind of file and around it, and in the middle of updates."""
    folder = prepare(tmp_path / "run")
    kills, missed = Counter(), []
    for phase, fault in chosen_faults():
        code = run(folder, PROCESS, fault)
        if (folder / "log" / "reached").is_file():
            (folder / "log" / "reached").unlink()
            assert code == -fault.signal
            kills[phase] += 1
        else:
            missed.append((phase, fault))
            assert code == 0, (folder / "log" / "children.log").read_text()[-3000:]
    assert not missed
    assert all(kills[phase] >= 10 for phase in PHASES), kills
    assert run(folder, PROCESS) == 0
    check_result(folder, whole)
    report("chosen moments", dict(kills) | {"runs ended": 1, "failures": 0})


def test_killed_at_random_moments(whole, tmp_path):
    """Runs that are killed after random times, by random signals, and started again until they end."""
    rng = random.Random(0)
    kills, by_signal, ended = Counter(), Counter(), 0
    folder = prepare(tmp_path / "run0")
    while sum(kills.values()) < RANDOM_KILLS:
        log = folder / "log" / "tiny.log"
        before = log.stat().st_size if log.is_file() else 0
        child, number = start(folder, PROCESS), rng.choice(SIGNALS)
        child.join(0.5 + rng.random() * 4)
        said = log.read_text()[before:] if log.is_file() else ""
        if child.is_alive() and said:  # work has begun
            os.kill(child.pid, number)
            child.join(30)
            assert child.exitcode in (-signal.SIGKILL, 128 + number) or child.exitcode == 0
            phases = re.findall(r"stage\d (sample|select|train): (?!already)", said) or ["evaluate"]
            kills["evaluate" if "eval " in said else phases[-1]] += 1
            by_signal[signal.Signals(number).name] += 1
        else:
            child.join()
            assert child.exitcode == 0
        if child.exitcode == 0:
            check_result(folder, whole)
            ended += 1
            folder = prepare(tmp_path / f"run{ended}")
    assert run(folder, PROCESS) == 0
    check_result(folder, whole)
    report("random moments", dict(kills) | dict(by_signal) | {"runs ended": ended + 1, "failures": 0})


@pytest.mark.parametrize("resident", ["1", "0"])
def test_the_shell_script_stopped(whole, tmp_path, resident):
    """run_process.sh as users start it, in one process or in one for each script, stopped by a scheduler, by Ctrl-C and by
    force: it says how to go on, leaves no process, and the same command ends the run."""
    rng = random.Random(1)
    folder = prepare(tmp_path / "run")
    environment = os.environ | {
        "Preset": "shapes",
        "Resident": resident,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", "run_process.sh", *flags(SETTINGS)]
    kills = Counter()
    for turn in range(SHELL_KILLS):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)[turn % 3]
        if (experiment(folder) / "stage1" / "train.json").is_file():  # nothing is left to be stopped
            folder = prepare(tmp_path / f"run{turn}")
        with (folder / "out.log").open("w") as out:
            run_of = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True, preexec_fn=listen
            )
            while not (folder / "log" / "tiny.log").is_file() or not re.search(
                r"stage\d (sample|train|select): (?!already|plan)", (folder / "out.log").read_text()
            ):
                assert run_of.poll() is None, (folder / "out.log").read_text()
                time.sleep(0.05)
            time.sleep(rng.random() * 8)
            began = time.monotonic()
            os.kill(run_of.pid, number)  # to it alone: its script must end, too
            code = run_of.wait(30)
        said = (folder / "out.log").read_text()
        assert time.monotonic() - began < 30
        assert code == (-number if number == signal.SIGKILL else 128 + number), said
        if number != signal.SIGKILL:
            assert "run the same command again" in said
        while alive(run_of.pid) and time.monotonic() - began < 30:
            time.sleep(0.1)
        assert not alive(run_of.pid)
        kills[signal.Signals(number).name] += 1
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    check_result(folder, whole)
    report("run_process.sh", dict(kills) | {"runs ended": 1, "failures": 0})


def listen() -> None:
    """Ctrl-C reaches what is started, also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(session: int) -> list[str]:
    """Processes of that session that have not ended."""
    found = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]
