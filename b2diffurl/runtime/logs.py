"""The log that people tail, and progress bars on their terminal."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

logger = logging.getLogger("b2diffurl")


def set_up_logging(log_file: Path | None, *, console_too: bool = True) -> None:
    """Events, one a line, to stdout and `log_file`, which also gets tracebacks; of other processes than the first only what
    went wrong.

    Where stdout is that very file (`bash run_process.sh > log/shapes.log`) it gets each line once, tracebacks too.
    """
    rank = int(os.environ.get("RANK", 0))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
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
    """Whether a stream writes into that file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:  # no such file, or a stream that is none
        return False


class Forgiving(logging.Handler):
    """One that stops no run, and says nothing of its own: lines wait where the disk has no room for them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class LogFile(Forgiving, logging.FileHandler):
    def close(self) -> None:
        with suppress(OSError):
            super().close()


class Console(Forgiving, logging.StreamHandler):
    """Lines that do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def progress(iterable: Any, description: str) -> Any:
    """The iterable; on a terminal with a progress bar."""
    return tqdm(iterable, desc=description, leave=False, disable=not shows_progress())


def progress_bar(total: float, description: str, unit: str) -> tqdm:
    """A bar that `update(amount)` moves on, by fractions too, with the time that is left; without a terminal nothing."""
    form = "{desc}: {percentage:3.0f} % |{bar}| {n:.0f}/{total:.0f} {unit}, {elapsed}, {remaining} left{postfix}"
    how = {"bar_format": form, "miniters": 0, "leave": False, "disable": not shows_progress()}
    return tqdm(total=total, desc=description, unit=unit, **how)


def shows_progress() -> bool:
    """Whether this is the first process, and its stderr a terminal."""
    return sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0
