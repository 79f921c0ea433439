"""The log, one line an event; what is shown to people; and progress bars on a terminal.

Prompts, file names and answers of servers are shown, too. Nothing in them may move the cursor or look like a line of ours:
`printable` escapes it.
"""

import hashlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets bars of text, which is well
    from tqdm.auto import tqdm

logger = logging.getLogger("b2diffurl")
IN_NOTEBOOK: ContextVar[bool] = ContextVar("IN_NOTEBOOK", default=False)  # whether bars are shown without a terminal
LINE_SEC = 60  # between two lines of a phase that takes long, at least
LOG_OF = " log of the experiment in "  # in the first line of a log, before the experiment's folder


def set_up_logging(log_file: Path | None, *, console_too: bool = True, stream: TextIO | None = None) -> None:
    """Log to stdout, or another stream, and to `log_file`, which also gets tracebacks.

    Only the run's first process logs more than warnings. If stdout is redirected into that very file
    (`bash run_process.sh > log/shapes.log`), each line is written once.
    """
    rank = int(os.environ.get("RANK", 0))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # absl has a handler of its own, which would write each line again
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    console = Console(stream or sys.stdout)
    redirected = log_file is not None and is_file(console.stream, log_file)
    console.setLevel(logging.DEBUG if redirected else logging.INFO)
    handlers: list[logging.Handler] = [console] if console_too else []
    if log_file and not redirected:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(LogFile(log_file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        if rank:
            handler.addFilter(lambda record: record.levelno >= logging.WARNING or bool(record.exc_info))
        name = f"process {rank}: " if rank else ""
        handler.setFormatter(Printable(f"%(asctime)s {name}%(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def log_of(folder: Path, root: Path) -> Path:
    """The log of the experiment in folder `root`: <folder>/<its name>.log.

    If an experiment of that name in another folder logs there, this one has a log of its own, with a checksum in its name.
    """
    log = folder / f"{root.name}.log"
    here, there = printable(str(root.resolve())), logged_root(log)
    if there in ("", here) or not Path(there).is_dir():  # it may have been moved
        return log
    return folder / f"{root.name}.{hashlib.sha256(here.encode()).hexdigest()[:6]}.log"


def logged_root(log: Path) -> str:
    """The experiment's folder that the first line of a log names; "" if there is none."""
    with suppress(OSError), log.open(errors="replace") as file:
        return file.readline(10_000).rstrip("\n").partition(LOG_OF)[2]
    return ""


def name_log(log: Path, root: Path) -> None:
    """Begin a new log with the experiment's folder, and say so if it is not the usual one."""
    if int(os.environ.get("RANK", 0)) or log.stat().st_size:
        return
    logger.debug("%s%s", LOG_OF.lstrip(), root.resolve())
    if log.name != f"{root.name}.log":
        logger.info("the log is %s: %s.log is that of another experiment of this name", log, root.name)


def set_up_streams() -> None:
    """Make stdin, stdout and stderr ones that cannot stop a run: closed ones are opened on nothing, and what a terminal's
    encoding lacks is written as an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            with suppress(OSError):
                os.fstat(number)
                continue  # a file has been opened under its number since
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one; else a data file would get it
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(*lines: str, stream: TextIO | None = None) -> None:
    """Print lines for people, on stdout unless another stream is given. That nobody reads them (`| head -1`) is no error."""
    stream = stream or sys.stdout
    try:
        print(*(printable(line) for line in lines), sep="\n", file=stream, flush=True)
    except OSError:
        abandon(stream)


def announce(*lines: str) -> None:
    """Show lines for people, as they are, and write them into the log file, too."""
    show(*lines)
    for handler in logger.handlers:
        if isinstance(handler, LogFile):  # none if stdout goes there already
            for line in filter(None, lines):
                handler.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, "%s", (line,), None))


def abandon(stream: TextIO) -> None:
    """Send what a stream still holds, and whatever comes, to nowhere: its reader is gone."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: str, keep: str = "") -> str:
    """The text with an escape such as `\\x1b` or `\\n` for each character that cannot be printed, but for those to keep."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


def shorten(text: str, length: int) -> str:
    """The beginning of a text, at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


class Printable(logging.Formatter):
    """Log lines in which everything can be printed. Only a traceback has several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:  # noqa: N802
        return "\n".join(printable(line) for part in traceback.format_exception(*exc_info) for line in part.splitlines())


def is_file(stream: TextIO, path: Path) -> bool:
    """Whether a stream writes into the file `path`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except OSError:  # there is no such file, or the stream has no file descriptor
        return False


class Forgiving(logging.Handler):
    """A handler that never stops a run: if the disk is full, its lines wait in memory instead of raising an error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError) and isinstance(self, Console):
            abandon(self.stream)  # otherwise Python would try again at its end, and exit with code 120
        elif not isinstance(error, OSError):
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


class Progress(tqdm):
    """A progress bar if stderr is a terminal. If the work takes longer than a minute the log gets a line now and then, too:
    after each minute, and after ten of them each time a tenth more of the time has passed.

    The lines go into the log file, and without a bar to stdout.
    """

    def __init__(self, total: float, title: str, unit: str):
        self.title, self.amount, self.unit_name, self.advanced = title, total, unit, 0.0
        self.began = self.told = time.monotonic()
        form = "{desc}: {percentage:3.0f} % |{bar}| {n:.0f}/{total:.0f} {unit}, {elapsed}, {remaining} left{postfix}"
        how = {"bar_format": form, "miniters": 0, "leave": False, "disable": not shows_progress()}
        super().__init__(total=total, desc=title, unit=unit, **how)

    def update(self, n: float = 1) -> bool | None:
        """Advance by `n`, which may be a fraction."""
        self.advanced += n
        now = time.monotonic()
        if now - self.told >= max(LINE_SEC, (now - self.began) / 10) and 0 < self.advanced < self.amount:
            self.tell(now - self.began)
            self.told = now
        return super().update(n)

    def tell(self, seconds: float) -> None:
        """Write the line: how much is done after so many seconds, and how long the rest takes at that pace."""
        left = seconds * (self.amount - self.advanced) / self.advanced
        logger.log(
            logging.INFO if self.disable else logging.DEBUG,
            "%s: %.0f of %.0f %s, %s, about %s left",
            self.title, self.advanced, self.amount, self.unit_name, duration(seconds), duration(left),
        )  # fmt: skip


def duration(seconds: float) -> str:
    """A duration in words: 45 s, 12 min, 3.4 h, 5.1 days."""
    for unit, size, end in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < end:
            return number(seconds / size, unit)
    return number(seconds / 86400, "days")


def number(value: float, unit: str) -> str:
    """A number with its unit; one decimal below 10, none above."""
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def progress(items: Sequence[Any], description: str, unit: str) -> Iterator[Any]:
    """The items one after the other, with their progress."""
    with Progress(len(items), description, unit) as bar:
        for item in items:
            yield item
            bar.update()


def shows_progress() -> bool:
    """Whether this is the run's first process and its stderr is a terminal, or a notebook."""
    return (IN_NOTEBOOK.get() or sys.stderr.isatty()) and int(os.environ.get("RANK", 0)) == 0


@contextmanager
def showing_progress(wanted: bool) -> Iterator[None]:
    """Inside the block progress bars are shown if `wanted`, also where stderr is no terminal: a notebook draws them."""
    token = IN_NOTEBOOK.set(wanted)
    try:
        yield
    finally:
        IN_NOTEBOOK.reset(token)
