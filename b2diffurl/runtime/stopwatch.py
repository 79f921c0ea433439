"""A clock that stands still while the process is paused (by SIGSTOP, or with a virtual machine).

A thread looks at the clock every TICK_SEC. If it has missed its turn by more than PAUSE_SEC the process was not running. The
time during which a laptop sleeps is not counted by the clock anyway.
"""

import threading
import time
from collections.abc import Callable

TICK_SEC, PAUSE_SEC = 1, 30


class Stopwatch:
    """Seconds without pauses: `working_sec`. The thread begins with the first call."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.paused, self.seen = clock, 0.0, None
        self.guard = threading.Lock()

    def working_sec(self) -> float:
        """Seconds since an arbitrary moment, without the pauses since the first call."""
        with self.guard:
            if self.seen is None:
                self.seen = self.clock()
                threading.Thread(target=self.watch, daemon=True).start()
            return self.look()

    def look(self) -> float:
        """The time now. If nobody has looked for so long that there was a pause, it is taken off."""
        now = self.clock()
        if now - self.seen > PAUSE_SEC:
            self.paused += now - self.seen - TICK_SEC
        self.seen = now
        return now - self.paused

    def watch(self) -> None:
        while True:
            time.sleep(TICK_SEC)
            with self.guard:
                self.look()


working_sec = Stopwatch().working_sec
