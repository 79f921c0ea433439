"""One run at a time in an experiment: the file run.lock names the run that works in it.

A run is run_process.sh with the script that it has started, or a script that was started alone. A lock may outlive its run,
so whether the run is alive is asked each time. On this machine its processes tell. Processes of another machine cannot be
seen, so there its silence tells: a living run touches the file every HEARTBEAT_SEC.

    {"host": name, "boot": `boot_and_container`, "processes": [[process id, `started`], …]}

The first process is the lock's owner: that of run_process.sh, or of the script that was started alone.
"""

import fcntl
import json
import os
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger
from b2diffurl.runtime.processes import OWNER, started

HEARTBEAT_SEC, SILENCE_SEC = 20, 180  # a run touches its lock so often; a silent one counts as dead after so long


@contextmanager
def holding(root: Path) -> Iterator[None]:
    """Hold the lock of the experiment in `root` while the block runs; a ValueError names another run that holds it.

    A stage's folder has a lock of its own, for the page on which people judge its images: one at a time.
    A script of run_process.sh leaves the lock behind for the next script; run_process.sh deletes it in the end. A process
    without an owner (see `owner`) holds nothing.
    """
    if not owner():
        yield
        return
    take(root, owner())
    root = root.absolute()  # code of the user's, such as a reward, may go to another directory in the meantime
    # A daemon thread: it must not keep a process alive that ends by an error.
    ended = threading.Event()
    threading.Thread(target=keep_marking, args=(root, owner(), ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if owner() == os.getpid() and is_ours(root, owner()):
            path_in(root).unlink(missing_ok=True)
            with suppress(OSError):
                root.rmdir()  # succeeds only if it is empty: a run that was refused leaves no folder


def within_run(root: Path) -> AbstractContextManager[None]:
    """Hold the lock of run_process.sh if this script works for it; started alone, go on beside any other run.

    run_eval.py uses it: evaluating beside a run is allowed.
    """
    return holding(root) if OWNER in os.environ else nullcontext()


def owner() -> int:
    """The process id that the lock of this run names; 0 if another process or machine of the run holds it for this one."""
    return 0 if int(os.environ.get("RANK", 0)) > 0 else int(os.environ.get(OWNER, os.getpid()))


def path_in(root: Path) -> Path:
    return root / "run.lock"


def take(root: Path, owner: int) -> None:
    """Write process `owner` of this machine into the lock; a ValueError names another run that holds it and is alive."""
    processes = [[number, started(number)] for number in dict.fromkeys((owner, os.getpid()))]
    root.mkdir(parents=True, exist_ok=True)
    # Read and write in one turn: of two runs that start at once, the second one reads what the first one wrote.
    with exclusively(path_in(root)) as file:
        holder = parse(file.read())
        require_free(root, holder, processes[0], silence=clock_of_disk(root) - os.fstat(file.fileno()).st_mtime)
        with files.naming(path_in(root)):  # the disk may be full
            me = {"host": socket.gethostname(), "boot": boot_and_container(), "processes": processes}
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps(me).encode() + b"\n")


def refuse_another(root: Path) -> None:
    """Raise the error that `take` would raise, without writing anything."""
    with suppress(FileNotFoundError, NotADirectoryError):
        silence = time.time() - path_in(root).lstat().st_mtime
        me = owner() or os.getpid()
        require_free(root, parse(path_in(root).read_text(errors="replace")), [me, started(me)], silence=silence)


def require_free(root: Path, holder: dict[str, Any] | None, owner: list, *, silence: float) -> None:
    """Raise a ValueError if a lock's `holder` is another than `owner`, and alive."""
    if holder and not is_same(holder, owner) and is_alive(holder, silence):
        raise ValueError(f"{root} is being worked on by {holder_text(holder, path_in(root))}.")


@contextmanager
def exclusively(path: Path) -> Iterator[Any]:
    """Open a file for reading and writing, one process at a time, and create it if it is missing.

    On a file system without locks several processes may have it open.
    """
    # What somebody else put in the lock's place, such as a link to a file of ours, is no lock, and must not be written into.
    while True:
        if os.path.lexists(path) and not is_own_file(path.lstat()):
            path.unlink()
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+", errors="replace")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # While this process waited, the one before may have deleted the file: a lock on that one keeps nobody out.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    with file:
        file.seek(0)
        yield file


def at_work(root: Path) -> bool:
    """Whether a run is at work in the experiment in `root`. Only looks: the lock stays as it is."""
    try:
        text, touched = path_in(root).read_text(errors="replace"), path_in(root).lstat().st_mtime
    except OSError:
        return False
    holder = parse(text)
    return holder is not None and is_alive(holder, clock_of_disk(root) - touched)


def is_own_file(status: os.stat_result) -> bool:
    """Whether this is a plain file that has no other name: what is written into it is written nowhere else."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def parse(text: str) -> dict[str, Any] | None:
    """The content of a lock file; None if the file is new, cut off by a crash, or damaged."""
    with suppress(ValueError, KeyError, TypeError, IndexError):
        found = files.parse_json(text)
        [[number, _], *_] = found["processes"]
        if isinstance(found["host"], str) and isinstance(found["boot"], str) and isinstance(number, int):
            return found
    return None


def is_ours(root: Path, owner: int) -> bool:
    """Whether the lock still names process `owner` of this machine; another run may have taken it after a long silence."""
    try:
        holder = parse(path_in(root).read_text(errors="replace"))
    except OSError:
        return False
    return holder is not None and is_same(holder, [owner, started(owner)])


def is_same(holder: dict[str, Any], owner: list) -> bool:
    """Whether a lock names this owner, [process id, start time]."""
    return (holder["host"], holder["boot"], holder["processes"][0]) == (socket.gethostname(), boot_and_container(), owner)


def is_alive(holder: dict[str, Any], silence: float) -> bool:
    """Whether the run that a lock names, and that touched it `silence` seconds ago, is alive."""
    if (holder["host"], holder["boot"]) != (socket.gethostname(), boot_and_container()):
        return silence < SILENCE_SEC  # its processes cannot be seen from here
    return bool(living(holder))


def living(holder: dict[str, Any]) -> list[int]:
    """The processes of a lock of this machine that are alive: run_process.sh may be dead while its script works on."""
    return [number for number, when in holder["processes"] if when and when == started(number)]


def holder_text(holder: dict[str, Any], path: Path) -> str:
    """Who holds a lock, and what to do. Only of another machine it can be unknown whether the run is gone."""
    if (holder["host"], holder["boot"]) == (socket.gethostname(), boot_and_container()):
        return f"process {living(holder)[0]} on {holder['host']}. Wait until it has ended, or stop it"
    return (
        f"process {holder['processes'][0][0]} on {holder['host']}. Wait until it has ended, or stop it; if it is gone "
        f"for good, wait {SILENCE_SEC // 60} minutes, or delete {path}"
    )


def boot_and_container() -> str:
    """This start of the machine and this container, within which process ids are unique; "" on a system without /proc."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def clock_of_disk(folder: Path) -> float:
    """The time now by the clock that stamps files in `folder`. On a shared disk that is another machine's clock."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # a new file gets its time from the disk's machine
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def keep_marking(root: Path, owner: int, ended: threading.Event) -> None:
    """Touch the lock every HEARTBEAT_SEC until `ended`. If another run has taken it, stop this process by SIGTERM.

    That happens to a run that was suspended, or cut off from the disk, for longer than SILENCE_SEC.
    """
    while not ended.wait(HEARTBEAT_SEC):
        if is_ours(root, owner):
            with suppress(OSError):
                os.utime(path_in(root), follow_symlinks=False)
        elif path_in(root).is_file() and not ended.is_set():
            logger.warning("%s has been taken over by another run, because this one was silent too long", root)
            os.kill(os.getpid(), signal.SIGTERM)
            return
