"""Nothing spoils a run: another run, a signal, a process that fails, settings that have changed.

That a killed run ends in the same bits is in test_pipeline.py, and in faults/ at every moment.
"""

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
from conftest import ROOT, assert_same, experiment, run_script, run_stage, script_arguments, snapshot

from b2diffurl.configuration import command_line
from b2diffurl.experiment import lock
from b2diffurl.experiment.stage import Stage

# ---- one run at a time ----


@pytest.fixture
def other_run():
    """A process that lives."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_second_run_is_refused_while_the_first_one_lives(workplace, overrides, other_run):
    """Every phase names the process and the host of the first run and changes nothing; when that one is dead, killed or not,
    the same command goes on, and the lock is gone in the end."""
    root = experiment(workplace)
    lock.take(root, other_run.pid)
    lock_text = json.loads((root / "run.lock").read_text())
    lock_text["processes"] = lock_text["processes"][:1]  # as if its script were that process
    (root / "run.lock").write_text(json.dumps(lock_text))
    before = snapshot(workplace)
    for verb in ("sample", "select", "train"):
        ended = run_script(workplace, verb, overrides)
        assert ended.code == 2
        assert f"process {other_run.pid} on {lock_text['host']}" in ended.stderr
        assert len(ended.stderr.splitlines()) == 2
        assert snapshot(workplace) == before
    other_run.kill()
    other_run.wait()
    assert run_script(workplace, "sample", overrides).code == 0
    assert not (root / "run.lock").exists()


@pytest.mark.parametrize(
    ("change", "silence_sec", "refused"),
    [
        ({"host": "elsewhere"}, 0, True),
        ({"host": "elsewhere"}, lock.SILENCE_SEC + 10, False),
        ({"boot": "before"}, 0, True),  # of this name: another machine, a container, or this one before it was started anew
        ({"boot": "before"}, lock.SILENCE_SEC + 10, False),
        ({"processes": [[os.getppid(), "1"]]}, 0, False),  # the number is another process's now
        (None, 0, False),  # cut off by a crash
        ({"processes": []}, 0, False),  # damaged
        ({"host": 1}, 0, False),
    ],
)
def test_which_locks_count(tmp_path, other_run, change, silence_sec, refused):
    """One of another machine while it is marked; one of this machine while its process lives."""
    lock.take(tmp_path, other_run.pid)
    path = tmp_path / "run.lock"
    found = json.loads(path.read_text()) | {"processes": [[other_run.pid, lock.started(other_run.pid)]]}
    path.write_text("" if change is None else json.dumps(found | change))
    os.utime(path, (time.time() - silence_sec,) * 2)
    if refused:
        with pytest.raises(ValueError, match="is being worked on by"):
            lock.take(tmp_path, os.getpid())
    else:
        lock.take(tmp_path, os.getpid())
        assert json.loads(path.read_text())["processes"][0][0] == os.getpid()


@pytest.mark.parametrize(
    "text", [b"123", b"[]", b"{}", b'{"hosu": "a"}', b"\xff\xfe", b'{"host": "a", "boot": "", "processes": [7]}']
)
def test_a_damaged_lock_is_nobodys(tmp_path, text):
    (tmp_path / "run.lock").write_bytes(text)
    lock.take(tmp_path, os.getpid())
    assert lock.is_ours(tmp_path, os.getpid())


def test_a_run_that_was_taken_for_dead_stops(tmp_path, other_run, monkeypatch):
    """Another one has the lock when it wakes: it neither marks nor deletes that, and ends."""
    monkeypatch.setattr(lock, "HEARTBEAT_SEC", 0.05)
    path = tmp_path / "run.lock"
    with pytest.raises(KeyboardInterrupt), command_line.stopping_in_order(), lock.holding(tmp_path):
        marked = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns > marked
        theirs = json.loads(path.read_text()) | {"processes": [[other_run.pid, lock.started(other_run.pid)]]}
        path.write_text(json.dumps(theirs))
        os.utime(path, (1, 1))
        time.sleep(10)
    assert json.loads(path.read_text()) == theirs
    assert path.stat().st_mtime == 1


def test_judging_keeps_its_runs_lock(tmp_path, other_run, monkeypatch):
    """run_eval.py of run_process.sh marks that one's lock while it works; alone it takes none."""
    monkeypatch.setattr(lock, "HEARTBEAT_SEC", 0.05)
    path = tmp_path / "run.lock"
    with lock.within_run(tmp_path):
        assert not path.exists()
    monkeypatch.setenv(lock.OWNER, str(other_run.pid))
    with lock.within_run(tmp_path):
        os.utime(path, (1, 1))
        time.sleep(0.3)
        assert path.stat().st_mtime > 1
    assert lock.is_ours(tmp_path, other_run.pid)


def test_the_clock_is_the_disks(tmp_path):
    assert abs(lock.clock_of_disk(tmp_path) - time.time()) < 5
    assert lock.clock_of_disk(tmp_path / "missing") == pytest.approx(time.time(), abs=5)


def test_a_script_leaves_the_lock_to_run_process(workplace, overrides, other_run, monkeypatch):
    """What a script of run_process.sh works under is that one's lock; another machine's scripts take none."""
    path = experiment(workplace) / "run.lock"
    monkeypatch.setenv(lock.OWNER, str(other_run.pid))
    assert run_script(workplace, "sample", overrides).code == 0
    assert [number for number, _ in json.loads(path.read_text())["processes"]] == [other_run.pid, os.getpid()]
    monkeypatch.setenv(lock.OWNER, "0")
    path.unlink()
    assert run_script(workplace, "sample", overrides).code == 0
    assert not path.exists()


def test_only_one_of_many_gets_the_lock(tmp_path):
    """Processes that ask at the same moment."""
    code = "import os, sys; from pathlib import Path; from b2diffurl.experiment import lock; "
    code += "lock.take(Path(sys.argv[1]), os.getpid()); print('mine', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(asker.poll() is not None for asker in askers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = [asker.communicate("")[0].strip() for asker in askers]
    assert sorted(ended) == [""] * 3 + ["mine"]


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


def test_what_does_not_listen_ends_all_the_same(monkeypatch):
    """A script that is deep in a library, where Python's handlers do not run, ends after the time of grace."""
    ended, done = [], threading.Event()
    monkeypatch.setattr(command_line, "GRACE_SEC", 0.2)
    monkeypatch.setattr(command_line.os, "_exit", lambda code: (ended.append(code), done.set()))
    with pytest.raises(KeyboardInterrupt), command_line.stopping_in_order():
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
        with command_line.stopping_in_order():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)
        assert (heard, ended) == ([signal.SIGUSR1], [])
        with pytest.raises(KeyboardInterrupt), command_line.stopping_in_order():
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
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
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


def test_another_number_of_processes_than_asked_for_is_refused(overrides, tmp_path):
    """As where a launcher quietly starts one."""
    ended = run_script(tmp_path, "sample", overrides | {"num_processes": 2})
    assert ended.code == 2
    assert "num_processes is 2, but this is one of 1" in ended.stderr
    assert not snapshot(tmp_path)


# ---- settings that have changed ----


def test_a_change_is_refused_unless_it_is_allowed(workplace, overrides):
    """The error lists what differs; allowed, the change counts from the next stage's beginning and is recorded once."""
    changed = overrides | {"train.learning_rate": 1e-3, "sample.guidance_scale": 3.0, "stage_cnt": 3, "run_name": "stage2"}
    before = snapshot(workplace)
    ended = run_script(workplace, "sample", changed)
    assert ended.code == 2
    assert "sample.guidance_scale is 3.0, was 5.0; train.learning_rate is 0.001, was 0.01" in ended.stderr
    assert "--config.allow_config_change" in ended.stderr
    assert snapshot(workplace) == before
    allowed = changed | {"allow_config_change": True}
    for verb in ("sample", "select", "train"):
        assert run_script(workplace, verb, allowed).code == 0
    record = json.loads((experiment(workplace) / "config.json").read_text())
    assert record["config"]["train"]["learning_rate"] == 1e-3
    assert [change["stage"] for change in record["changed"]] == [2]
    assert run_script(workplace, "train", changed).code == 0  # it is the experiment's configuration now
    assert run_script(workplace, "train", overrides | {"run_name": "stage0"}).code == 2


def test_no_change_in_the_middle_of_a_stage(overrides, tmp_path):
    run_stage(tmp_path, overrides, verbs=["sample"])
    before = snapshot(tmp_path)
    ended = run_script(tmp_path, "select", overrides | {"eval.pos_threshold": 1.0, "allow_config_change": True})
    assert ended.code == 2
    assert "stage0 is half done with another configuration: eval.pos_threshold is 1.0, was 0.5" in ended.stderr
    assert snapshot(tmp_path) == before
