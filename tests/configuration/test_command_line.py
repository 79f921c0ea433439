"""Command lines: flags of every key, mistakes in two lines, and the ways to name a configuration."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import pytest
from conftest import (
    CONFIG,
    PRESETS,
    ROOT,
    assert_same,
    experiment,
    get_config,
    parse_command,
    run_script,
    run_stage,
    script_arguments,
)

from b2diffurl.configuration import command_line
from b2diffurl.configuration.keys import flatten
from b2diffurl.experiment.stage import Stage


@pytest.mark.parametrize("preset", PRESETS)
def test_every_key_can_be_set_on_the_command_line(preset, tmp_path):
    """A command line that gives each key another value of its type yields exactly that configuration."""
    given = flatten(get_config(preset).to_dict())
    for key, value in given.items():
        kind = type(value)
        if value is None or key == "preset":
            continue  # reward.weights: a dict, by RewardWeights below; the preset is chosen behind --config
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


def test_a_recursion_error_is_no_proof_of_brackets():
    """It may come from a library's reader of JSON or from a fault of ours: the log tells. Without a log it is not hidden."""
    error = RecursionError("maximum recursion depth exceeded")
    said, hint = command_line.explain(error, Path("log/tiny.log"))
    assert "or this program has a fault" in said and "log/tiny.log" in hint
    assert command_line.explain(error, None) is None


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_a_script_in_order(overrides, tmp_path, number):
    """Its exit code tells the signal, its log how to go on; no lock is left, and the same command ends in the same bits."""
    settings = overrides | {"sample.num_batches_per_epoch": 8}
    child = children.start(tmp_path, script_arguments("sample", settings))
    log = tmp_path / "log" / "tiny.log"
    while not log.is_file() or "first batch" not in log.read_text():
        assert child.is_alive()
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(20)
    assert child.exitcode == 128 + number
    assert f"sample: stopped by {number.name}; run the same command again" in log.read_text()
    assert not (experiment(tmp_path) / "run.lock").exists()
    assert not Stage(experiment(tmp_path), 0).finished("sample")
    assert children.run(tmp_path, script_arguments("sample", settings)) == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    run_stage(whole, settings, verbs=["sample"])
    (tmp_path / "model").rename(tmp_path / "resumed")
    (tmp_path / "resumed" / "lora").rename(tmp_path / "lora")
    assert_same(tmp_path / "lora", whole / "model" / "lora")


def test_two_signals_at_once_are_one(monkeypatch):
    """As after a Ctrl-C in a terminal, which run_process.sh passes on: nothing is printed of the second."""
    complaints, both = [], {signal.SIGINT, signal.SIGTERM}
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    with pytest.raises(KeyboardInterrupt) as stopped, command_line.stopping_in_order():
        signal.pthread_sigmask(signal.SIG_BLOCK, both)  # inherited by children, so it must not outlast the test
        try:
            for number in both:
                signal.pthread_kill(threading.get_ident(), number)  # another thread would take what is sent to the process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    assert not both & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert stopped.value.args == (signal.SIGINT,)
    assert complaints == []


def test_what_does_not_listen_ends_all_the_same(monkeypatch):
    """A script that is deep in a library, where Python's handlers do not run, ends after the time of grace."""
    ended, done = [], threading.Event()
    monkeypatch.setattr(command_line, "GRACE_SEC", 0.2)
    monkeypatch.setattr(command_line.os, "_exit", lambda code: (ended.append(code), done.set()))
    with pytest.raises(KeyboardInterrupt), command_line.stopping_in_order(), command_line.ending_by_force():
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds in C
    assert done.wait(1)
    assert ended == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_signals_end_nothing(monkeypatch):
    """One that a library listens to, such as SIGCHLD of a DataLoader's workers, is none to stop; SIGTERM after it is."""
    ended, heard, done = [], [], threading.Event()
    monkeypatch.setattr(command_line, "GRACE_SEC", 0.1)
    monkeypatch.setattr(command_line.os, "_exit", lambda code: (ended.append(code), done.set()))
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: heard.append(number))
    try:
        with command_line.stopping_in_order(), command_line.ending_by_force():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)
        assert (heard, ended) == ([signal.SIGUSR1], [])
        with pytest.raises(KeyboardInterrupt), command_line.stopping_in_order(), command_line.ending_by_force():
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)  # seconds in C
        assert done.wait(1)
        assert ended == [128 + signal.SIGTERM]
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- several processes ----


def fails_once(images, prompts):
    """A reward that fails in the second process, once."""
    mark = Path("failed_once")
    if os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        raise ValueError("the second process has no luck")
    return images.float().mean((1, 2, 3)) / 255


@pytest.mark.long
def test_a_process_that_fails_ends_all_and_the_next_run_goes_on(overrides, tmp_path):
    """Under torchrun, as run_process.sh starts it: within a minute, with that process's error; then the scores are those of
    one process."""
    settings = overrides | {"reward.name": f"{__name__}:fails_once", "reward.batch_size": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        run_stage(folder, settings, verbs=["sample"])
    run_stage(one, settings, verbs=["select"])
    argv = script_arguments("select", settings | {"num_processes": 2})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / argv[0])]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"}
    failed = subprocess.run([*launch, *argv[1:]], cwd=two, env=environment, capture_output=True, text=True, timeout=100)
    assert failed.returncode != 0
    assert time.time() - (two / "failed_once").stat().st_mtime < 60
    assert "the second process has no luck" in failed.stderr
    assert "process 1: select failed" in (two / "log" / "tiny.log").read_text()
    assert not Stage(experiment(two), 0).finished("select")
    ended = subprocess.run([*launch, *argv[1:]], cwd=two, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    (two / "failed_once").unlink()
    found, expected = (Stage(experiment(folder), 0) for folder in (two, one))
    assert found.scores.read_bytes() == expected.scores.read_bytes()
    assert found.selection.read_bytes() == expected.selection.read_bytes()
    assert found.manifest("select")["num_processes"] == 2
