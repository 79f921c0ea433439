"""Processes of this machine: whether one is alive, and ending with the one that started this."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from b2diffurl.runtime.logs import logger

# The environment variable by which run_process.sh tells its scripts its own process id: the owner of the experiment's lock.
# 0 on all machines but the first, which holds the lock for all.
OWNER = "B2DIFFURL_RUN"
LOOK_SEC = 1  # so often a script looks whether those that it works for are alive


def started(process: int) -> str:
    """When the process with this id was started, as text to compare; "" if no such process runs.

    An id alone is not enough: after a process has ended, the system gives its id to another one.
    """
    try:
        if not Path("/proc/self/stat").is_file():  # macOS: only whether it runs can be told
            os.kill(process, 0)  # signal 0 sends nothing, and raises if there is no such process
            return "running"
        # Field 2 is the program's name in brackets, which may hold spaces and brackets itself.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]  # Z: ended, not yet waited for; field 22 of stat: clock ticks since boot


def masters() -> list[int]:
    """The processes that this one must not outlive: run_process.sh, and torchrun. None for a script that was started alone.

    They cannot stop it when they are killed by force, so it looks after them itself.
    """
    owner = int(os.environ.get(OWNER, 0))
    return [*([owner] if owner else []), *([os.getppid()] if "TORCHELASTIC_RUN_ID" in os.environ else [])]


def lost_torchrun() -> bool:
    """Whether torchrun has ended, so that the system's first process has become the parent of this one.

    Under run_process.sh torchrun cannot be that process itself. Alone in a container it can.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and OWNER in os.environ and os.getppid() == 1


@contextmanager
def ending_with_masters() -> Iterator[None]:
    """Inside the block this process gets SIGTERM, as if it were stopped, once one of `masters` has ended.

    That may have been before the block, while this process was importing its libraries.
    """
    ended = threading.Event()
    alive = {process: started(process) for process in masters()}
    if lost_torchrun():
        alive[os.getppid()] = ""

    def look() -> None:
        while not ended.is_set():
            for process, when in alive.items():
                if (not when or started(process) != when) and not ended.is_set():
                    logger.warning("process %d, for which this one works, has ended", process)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            ended.wait(LOOK_SEC)

    if alive:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
