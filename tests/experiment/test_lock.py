"""A second run is refused while the first one lives, and a dead one's lock is nobody's."""

import json
import multiprocessing
import os
import subprocess
import time
from multiprocessing import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
from conftest import experiment, run_script, snapshot

from b2diffurl.configuration import command_line
from b2diffurl.experiment import lock


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
        (tmp_path / "new").write_text(json.dumps(theirs))
        (tmp_path / "new").replace(path)  # at once, as a run does: the signal could come before a text is written
        time.sleep(10)
    marked = path.stat().st_mtime_ns
    time.sleep(0.3)
    assert json.loads(path.read_text()) == theirs
    assert path.stat().st_mtime_ns == marked


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


def test_the_lock_stays_where_it_is_when_the_work_goes_elsewhere(tmp_path, monkeypatch):
    """A reward of the user's may change the directory: the lock is marked all the same, and deleted in the end."""
    monkeypatch.setattr(lock, "HEARTBEAT_SEC", 0.05)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "tiny" / "run.lock"
    with lock.holding(Path("tiny")):
        os.chdir("elsewhere")
        os.utime(path, (1, 1))
        time.sleep(0.3)
        assert path.stat().st_mtime > 1
    assert not path.parent.exists()


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


def test_the_living_one_is_named(tmp_path, other_run):
    """run_process.sh was killed while its script works on: that is whom to wait for, and the lock is not to be deleted."""
    lock.take(tmp_path, other_run.pid)
    other_run.kill()
    other_run.wait()
    with pytest.raises(ValueError, match=f"by process {os.getpid()} on .* or stop it.$") as refused:
        lock.take(tmp_path, os.getppid())
    assert "delete" not in str(refused.value)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "second name"])
def test_the_lock_is_not_written_through_a_link(tmp_path, kind):
    """Nor into anything else that somebody has put in its place: it is replaced, and the target stays."""
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "run.lock"
    makers = {"pipe": os.mkfifo, "second name": lambda path: path.hardlink_to(tmp_path / "precious")}
    target = tmp_path / ("precious" if kind == "link" else "nowhere")
    makers.get(kind, lambda path: path.symlink_to(target))(path)
    lock.take(tmp_path, os.getpid())
    assert path.is_file() and not path.is_symlink() and lock.is_ours(tmp_path, os.getpid())
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_only_one_of_many_gets_the_lock(tmp_path):
    """Processes that ask at the same moment."""
    fork = multiprocessing.get_context("fork")
    together, answers, end = fork.Barrier(4), fork.Queue(), fork.Event()
    askers = [fork.Process(target=ask, args=(tmp_path, together, answers, end), daemon=True) for _ in range(4)]
    for asker in askers:
        asker.start()
    assert sorted(answers.get(timeout=60) for _ in askers) == ["another's"] * 3 + ["mine"]
    end.set()
    for asker in askers:
        asker.join()


def ask(root: Path, together: Barrier, answers: Queue, end: Event) -> None:
    """Ask for the lock as soon as all do, and live on with it until the end."""
    together.wait()
    try:
        lock.take(root, os.getpid())
        answers.put("mine")
    except ValueError:
        answers.put("another's")
    end.wait()
