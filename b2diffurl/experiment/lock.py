"""One run at a time in an experiment: the file run.lock says whose turn it is.

A run is the process of run_process.sh with the script that now works for it, or a script that was started alone. On its own
machine a run that has died is known by its processes; on another one by its silence, for a run marks the file now and then.
"""

import fcntl
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

HEARTBEAT_SEC, SILENCE_SEC = 20, 180  # marked so often; taken for dead after so long
OWNER = "B2DIFFURL_RUN"  # in the environment of a script of run_process.sh: that one's process; 0 where it has not the lock


@contextmanager
def holding(root: Path) -> Iterator[None]:
    """Keep other runs out of the experiment in `root` meanwhile; a ValueError names the run that is in it.

    A script of run_process.sh leaves the lock behind: that one gives it up when all is done.
    """
    if not owner():
        yield
        return
    take(root, owner())
    ended = threading.Event()
    threading.Thread(target=mark, args=(root, owner(), ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if owner() == os.getpid() and is_ours(root, owner()):
            path_in(root).unlink(missing_ok=True)
            with suppress(OSError):
                root.rmdir()  # where nothing has come of it


def within_run(root: Path) -> AbstractContextManager[None]:
    """Keep a lock that this script's run has; one that was started alone goes beside what runs."""
    return holding(root) if OWNER in os.environ else nullcontext()


def owner() -> int:
    """The process of this one's run; 0 where another process, or another machine's, has the lock for it."""
    return 0 if int(os.environ.get("RANK", 0)) > 0 else int(os.environ.get(OWNER, os.getpid()))


def path_in(root: Path) -> Path:
    return root / "run.lock"


def take(root: Path, owner: int) -> None:
    """Write that process `owner` of this machine has its turn, unless another run has it that lives."""
    processes = [[number, started(number)] for number in dict.fromkeys((owner, os.getpid()))]
    root.mkdir(parents=True, exist_ok=True)
    with exclusively(path_in(root)) as file:
        holder = parse(file.read())
        silence = clock_of_disk(root) - os.fstat(file.fileno()).st_mtime
        if holder and not is_same(holder, processes[0]) and is_alive(holder, silence):
            raise ValueError(
                f"{root} is being worked on by process {holder['processes'][0][0]} on {holder['host']}. Wait until it has "
                f"ended, or stop it; if it is gone for good, delete {path_in(root)}."
            )
        with files.naming(path_in(root)):  # where the disk is full
            me = {"host": socket.gethostname(), "boot": here(), "processes": processes}
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(me).encode() + b"\n")


@contextmanager
def exclusively(path: Path) -> Iterator[Any]:
    """The file, made if need be, open for reading and writing, by one process at a time where the file system has locks."""
    while True:
        file = path.open("a+", errors="replace")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # it was deleted before it was ours
    with file:
        file.seek(0)
        yield file


def parse(text: str) -> dict[str, Any] | None:
    """Who has the lock; None of a file that was just made, cut off by a crash or damaged."""
    with suppress(ValueError, KeyError, TypeError, IndexError):
        found = json.loads(text)
        [[number, _], *_] = found["processes"]
        if isinstance(found["host"], str) and isinstance(found["boot"], str) and isinstance(number, int):
            return found
    return None


def is_ours(root: Path, owner: int) -> bool:
    """Whether the lock is still that process's; another run takes it from one that has been silent for long."""
    try:
        holder = parse(path_in(root).read_text(errors="replace"))
    except OSError:
        return False
    return holder is not None and is_same(holder, [owner, started(owner)])


def is_same(holder: dict[str, Any], owner: list) -> bool:
    return (holder["host"], holder["boot"], holder["processes"][0]) == (socket.gethostname(), here(), owner)


def is_alive(holder: dict[str, Any], silence: float) -> bool:
    """Whether a run goes on that last marked the lock `silence` seconds ago."""
    if (holder["host"], holder["boot"]) != (socket.gethostname(), here()):
        return silence < SILENCE_SEC
    return any(when and when == started(number) for number, when in holder["processes"])


def here() -> str:
    """Names what process numbers hold in, where the system says so: this start of the machine, this container."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def clock_of_disk(folder: Path) -> float:
    """Now, by the clock that gives the times of files there, which may be another machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def started(process: int) -> str:
    """When a process of this machine was started; "" if there is none of that number that still runs."""
    try:
        if not Path("/proc/self/stat").is_file():
            os.kill(process, 0)
            return "running"
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]  # field 22: in clock ticks since boot


def mark(root: Path, owner: int, ended: threading.Event) -> None:
    """Touch the lock until the work has ended; or stop it, where another run has taken the lock meanwhile."""
    while not ended.wait(HEARTBEAT_SEC):
        if is_ours(root, owner):
            with suppress(OSError):
                os.utime(path_in(root))
        elif path_in(root).is_file() and not ended.is_set():
            logger.warning("%s has been taken over by another run, for this one was silent too long", root)
            os.kill(os.getpid(), signal.SIGTERM)
            return
