"""Seconds of work, without those in which the process was paused."""

import signal
import subprocess
import sys
import time

import pytest

from b2diffurl.runtime import stopwatch
from b2diffurl.runtime.stopwatch import Stopwatch


def test_a_pause_does_not_count():
    """By a clock that is set by hand: short steps count, a night counts as one tick."""
    now = [100.0]
    watch = Stopwatch(lambda: now[0])
    watch.watch = lambda: None  # the thread, which would look at the same clock
    begun = watch.working_sec()
    for step, counted in ((5, 5), (29, 34), (8 * 3600, 34 + stopwatch.TICK_SEC), (2, 36 + stopwatch.TICK_SEC)):
        now[0] += step
        assert watch.working_sec() - begun == counted


CHILD = """
from b2diffurl.runtime import stopwatch
import sys, time
stopwatch.TICK_SEC, stopwatch.PAUSE_SEC = 0.1, 1
begun, seen = time.perf_counter(), stopwatch.working_sec()
print("go", flush=True)
while time.perf_counter() - begun < 4:
    time.sleep(0.05)
print(stopwatch.working_sec() - seen)
"""


@pytest.mark.long
def test_a_stopped_process():
    """SIGSTOP for two of four seconds: so long it has not worked. A threshold of one second instead of half a minute."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "go\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(2)
        child.send_signal(signal.SIGCONT)
        worked = float(child.stdout.read())
    assert 1.5 < worked < 3
