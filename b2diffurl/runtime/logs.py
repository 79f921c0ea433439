"""The log, one line an event, and progress bars on a terminal."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

logger = logging.getLogger("b2diffurl")


def set_up_logging(log_file: Path | None, *, console_too: bool = True) -> None:
    """Log to stdout and to `log_file`, which also gets tracebacks. Only the run's first process logs more than warnings.

    If stdout is redirected into that very file (`bash run_process.sh > log/shapes.log`), each line is written once.
    """
    rank = int(os.environ.get("RANK", 0))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # absl has a handler of its own, which would write each line again
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    console = Console(sys.stdout)
    redirected = log_file is not None and is_file(sys.stdout, log_file)
    console.setLevel(logging.DEBUG if redirected else logging.INFO)
    handlers: list[logging.Handler] = [console] if console_too else []
    if log_file and not redirected:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(LogFile(log_file))
    for handler in handlers:
        if rank:
            handler.addFilter(lambda record: record.levelno >= logging.WARNING or bool(record.exc_info))
        name = f"process {rank}: " if rank else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def is_file(stream: TextIO, path: Path) -> bool:
    """Whether a stream writes into the file `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:  # there is no such file, or the stream has no file descriptor
        return False


class Forgiving(logging.Handler):
    """A handler that never stops a run: if the disk is full, its lines wait in memory instead of raising an error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class LogFile(Forgiving, logging.FileHandler):
    """A log file on a disk that may be full."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class Console(Forgiving, logging.StreamHandler):
    """A stream whose lines do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def progress(iterable: Any, description: str) -> Any:
    """The iterable, with a progress bar if stderr is a terminal."""
    return tqdm(iterable, desc=description, leave=False, disable=not shows_progress())


def progress_bar(total: float, description: str, unit: str) -> tqdm:
    """A progress bar with the time left; `update(amount)` advances it, also by fractions. Without a terminal, nothing."""
    form = "{desc}: {percentage:3.0f} % |{bar}| {n:.0f}/{total:.0f} {unit}, {elapsed}, {remaining} left{postfix}"
    how = {"bar_format": form, "miniters": 0, "leave": False, "disable": not shows_progress()}
    return tqdm(total=total, desc=description, unit=unit, **how)


def shows_progress() -> bool:
    """Whether this is the run's first process and its stderr is a terminal."""
    return sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0
