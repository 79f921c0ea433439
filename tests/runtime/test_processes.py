"""A script does not outlive those that it works for."""

import os
import signal
import subprocess
import time

import pytest

from b2diffurl.configuration.command_line import stopping_in_order
from b2diffurl.runtime import processes


@pytest.fixture
def master():
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_a_script_ends_with_its_run(master, monkeypatch):
    """run_process.sh gets SIGKILL, which it cannot hand on: its script stops as by SIGTERM, also while the dead one has not
    been waited for."""
    monkeypatch.setattr(processes, "LOOK_SEC", 0.02)
    monkeypatch.setenv(processes.OWNER, str(master.pid))
    with pytest.raises(KeyboardInterrupt) as stopped, stopping_in_order(), processes.ending_with_masters():
        time.sleep(0.2)  # it lives, and nothing happens
        master.kill()
        time.sleep(10)
    assert stopped.value.args == (signal.SIGTERM,)


def test_a_worker_ends_with_torchrun(monkeypatch):
    """The process that started it is gone, and another one has become its parent's number."""
    monkeypatch.setattr(processes, "LOOK_SEC", 0.02)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert processes.masters() == [os.getppid()]
    answers = iter(["1"])
    monkeypatch.setattr(processes, "started", lambda process: next(answers, "2"))
    with pytest.raises(KeyboardInterrupt), stopping_in_order(), processes.ending_with_masters():
        time.sleep(10)


def test_a_script_whose_run_ended_before_it_looked_stops_at_once(master, monkeypatch):
    """run_process.sh was killed while its script was starting."""
    master.kill()
    master.wait()
    monkeypatch.setenv(processes.OWNER, str(master.pid))
    with pytest.raises(KeyboardInterrupt), stopping_in_order(), processes.ending_with_masters():
        time.sleep(10)


def test_a_worker_whose_torchrun_ended_before_it_looked_stops_at_once(monkeypatch):
    """The first process has become its parent. Started by no run_process.sh, torchrun may be that one, as in a container."""
    monkeypatch.setattr(processes, "LOOK_SEC", 0.02)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stopping_in_order(), processes.ending_with_masters():
        time.sleep(0.2)
    monkeypatch.setenv(processes.OWNER, "0")
    with pytest.raises(KeyboardInterrupt), stopping_in_order(), processes.ending_with_masters():
        time.sleep(10)


def test_a_script_alone_has_nobody_to_end_with(monkeypatch):
    """It may go on when its shell is closed; so may those of machines without the lock."""
    for value in (None, "0"):
        if value:
            monkeypatch.setenv(processes.OWNER, value)
        assert processes.masters() == []


def test_after_the_work_nobody_is_watched(master, monkeypatch):
    monkeypatch.setattr(processes, "LOOK_SEC", 0.02)
    monkeypatch.setenv(processes.OWNER, str(master.pid))
    with stopping_in_order():
        with processes.ending_with_masters():
            pass
        master.kill()
        time.sleep(0.2)
