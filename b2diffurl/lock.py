"""One run at a time in an experiment: the file run.lock says whose turn it is.

A run is the process of run_process.sh with the script that now works for it, or a script that was started alone. On its own
machine a run that has died is known by its processes; on another one by its silence, for a run marks the file now and then.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from b2diffurl import files

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
    threading.Thread(target=mark, args=(path_in(root), ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if owner() == os.getpid():
            path_in(root).unlink(missing_ok=True)
            with suppress(OSError):
                root.rmdir()  # where nothing has come of it


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
        if holder and not is_same(holder, processes[0]) and is_alive(holder, os.fstat(file.fileno()).st_mtime):
            raise ValueError(
                f"{root} is being worked on by process {holder['processes'][0][0]} on {holder['host']}. Wait until it has "
                f"ended, or stop it; if it is gone for good, delete {path_in(root)}."
            )
        with files.naming(path_in(root)):  # where the disk is full
            me = {"host": socket.gethostname(), "boot": boot(), "processes": processes}
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(me).encode() + b"\n")


@contextmanager
def exclusively(path: Path) -> Iterator[Any]:
    """The file, made if need be, open for reading and writing, by one process at a time where the file system has locks."""
    while True:
        file = path.open("a+")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # it was deleted before it was ours
    with file:
        file.seek(0)
        yield file


def parse(text: str) -> dict[str, Any] | None:
    """Who has the lock; None of a file that was just made, or cut off by a crash."""
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    return None


def is_same(holder: dict[str, Any], owner: list) -> bool:
    return (holder["host"], holder["boot"], holder["processes"][0]) == (socket.gethostname(), boot(), owner)


def is_alive(holder: dict[str, Any], marked: float) -> bool:
    """Whether a run goes on that last marked the lock at time `marked`."""
    if holder["host"] != socket.gethostname():
        return time.time() - marked < SILENCE_SEC
    return holder["boot"] == boot() and any(when and when == started(number) for number, when in holder["processes"])


def boot() -> str:
    """Names the time since this machine was started, where it says so."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


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


def mark(path: Path, ended: threading.Event) -> None:
    """Touch the lock until the work has ended."""
    while not ended.wait(HEARTBEAT_SEC):
        with suppress(OSError):
            os.utime(path)
