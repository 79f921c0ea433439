"""What every script needs around its one verb: flags, logging, device, precision, errors a user can read."""

import errno
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from safetensors import SafetensorError
from tqdm.auto import tqdm

from b2diffurl.ranges import check_log

CONFIG_FILE = "config/stage_process.py"
QUICK_START = 50_000  # objects between two garbage collections: importing torch, diffusers and transformers makes millions
FLAGS = flags.FLAGS

LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")  # of errors where another one failed
GRACE_SEC = 10  # from a signal to stop to the end, however busy

T, R = TypeVar("T"), TypeVar("R")

logger = logging.getLogger("b2diffurl")


def run_script(verb: str, main: Callable[[ConfigDict], Any]) -> None:
    """Parse the flags and call `main(config)`. A mistake of the user's ends in two lines and exit code 2."""
    config = parse_flags()
    try:
        check_log(config.exp_name, config.log_path)
    except ValueError as error:
        die(f"{verb}: {error}", hint="Mend it and run the same command again.")
    dry = "dry_run" in FLAGS and FLAGS.dry_run
    log_file = None if dry else Path(config.log_path) / f"{config.exp_name}.log"
    try:
        set_up_logging(log_file)
    except OSError as error:
        die(f"{verb}: the log cannot be written: {error}", hint=f"{remedy(error, '--config.log_path')}.")
    gc.set_threshold(QUICK_START)
    look = f"; the traceback is in {log_file}" if log_file else ""
    try:
        with stopping_in_order():
            main(config)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        logger.warning("%s: stopped by %s; run the same command again to go on", verb, signal.Signals(number).name)
        sys.exit(128 + number)
    except (ValueError, OSError, FloatingPointError, ImportError, SafetensorError) as error:
        logger.debug("%s failed", verb, exc_info=True)
        said = "; ".join([str(error), *getattr(error, "__notes__", ())])
        die(f"{verb}: {said}", hint=f"{remedy(error, '--config.save_path')}{look}.")
    except (RuntimeError, MemoryError) as error:
        logger.debug("%s failed", verb, exc_info=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(text in str(error) for text in LOST):
            die(
                f"{verb}: another process of this run has ended",
                hint=f"Its error stands in {log_file}: process <number>.",
            )
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            die(f"{verb}: torch.compile failed: {error}", hint=f"Go on without it by --config.compile=False{look}.")
        from b2diffurl.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sizes = ("sample.micro_batch_size", "sample.decode_batch_size", "train.micro_batch_size", "reward.batch_size")
        knobs = f"{', '.join(sizes)} or, where it is judged, eval.batch_size"
        more = "take train.gradient_checkpointing=True or a smaller pretrained.resolution"
        die(f"{verb}: {error}", hint=f"Lower {knobs}, or {more}, and run the command again: it goes on where it stopped.")


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """SIGTERM, which preemption sends, and SIGINT end what goes on inside by a KeyboardInterrupt with their number.

    What has not come to an end GRACE_SEC later, say because it waits for another process, ends all the same: files are
    whole or not there at any moment.
    """
    ended = threading.Event()
    heard, hears = os.pipe()
    os.set_blocking(hears, False)

    def stop(number: int, _frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):  # the first one counts
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    def insist() -> None:
        if (number := os.read(heard, 1)) and not ended.wait(GRACE_SEC):
            name = signal.Signals(number[0]).name
            logger.warning("stopped by %s, without waiting any longer; run the same command again to go on", name)
            os._exit(128 + number[0])
        os.close(heard)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(hears)
    threading.Thread(target=insist, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        os.close(hears)
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_flags() -> ConfigDict:
    """The configuration with its overrides, locked."""
    what = "Configuration, CONFIG.py:PRESET; any key by --config.KEY."
    try:
        config_flags.DEFINE_config_file("config", CONFIG_FILE, what)
        rest = FLAGS(sys.argv)
        config = FLAGS.config.lock()
    except (AttributeError, KeyError) as error:
        die(f"unknown key {error} on the command line", hint=f"Every key stands with a comment in {CONFIG_FILE}.")
    except Exception as error:  # absl, ml_collections and the config file each raise their own kinds
        reason = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        die(reason[-1], hint=f"Every key stands with a comment in {CONFIG_FILE}.")
    if len(rest) > 1:
        die(f"unexpected argument {rest[1]!r}", hint="Options look like --config.train.learning_rate=1e-4.")
    return config


def remedy(error: BaseException, key: str = "") -> str:
    """What to do about an error; `key` is the option that says where files are written, if there is one."""
    match getattr(error, "errno", None):
        case errno.ENOSPC | errno.EDQUOT:
            return "Make room on that disk and run the same command again: it goes on where it stopped"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            other = f", or give another by {key}," if key else ""
            return f"Make that place writable{other} and run the same command again"
    return "Mend it and run the same command again"


def die(message: str, *, hint: str) -> None:
    print(f"error: {' '.join(message.split())}\n       {hint}", file=sys.stderr)
    sys.exit(2)


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


def make_accelerator(config: ConfigDict, num_threads: int, *, shared: bool = True) -> Any:
    """An Accelerator on the chosen CUDA device if there is one, else on the CPU; `num_threads` 0 keeps torch's default. What
    is not `shared` is one process's work, however many a run has."""
    import torch
    from accelerate import Accelerator
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if num_threads:
        torch.set_num_threads(num_threads)
    cuda, precision = choose_device(config)
    if cuda and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(config.dev_id)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision)
    if shared and config.num_processes and accelerator.num_processes != config.num_processes:
        raise ValueError(
            f"num_processes is {config.num_processes}, but this is one of {accelerator.num_processes}. Start it by torchrun "
            "--nproc_per_node, as run_process.sh does with NumProcesses."
        )
    return accelerator


def choose_device(config: ConfigDict) -> tuple[bool, str]:
    """Whether CUDA is used, and the precision (no, fp16, bf16); a ValueError for what this machine has not got."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda and "LOCAL_RANK" not in os.environ and not 0 <= config.dev_id < torch.cuda.device_count():
        raise ValueError(f"dev_id is {config.dev_id}; this machine has CUDA devices 0..{torch.cuda.device_count() - 1}")
    precision = resolve_precision(config.mixed_precision, cuda=cuda)
    if precision == "fp16" and not cuda:
        raise ValueError("mixed_precision is fp16, which needs CUDA. On the CPU use no, or bf16.")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"mixed_precision is bf16, which {torch.cuda.get_device_name()} lacks. Use fp16, or no.")
    return cuda, precision


def resolve_precision(wanted: str, *, cuda: bool) -> str:
    """`auto`: none on the CPU; on CUDA bf16 where the device has it, else fp16."""
    if wanted != "auto":
        return wanted
    if not cuda:
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Behind:
    """Does one job at a time in a thread, beside what goes on meanwhile; at most one waits, so memory does not grow."""

    def __init__(self) -> None:
        self.pool, self.job = ThreadPoolExecutor(1), None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def do(self, work: Callable[[], Any]) -> None:
        """Begin with `work` when the job before is done, whose error is raised here."""
        self.wait()
        self.job = self.pool.submit(work)

    def wait(self) -> Any:
        """What the last job returned, once it is done; its error is raised here."""
        return self.job.result() if self.job else None


def ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Each item with its `work(item)`, the next one's being done in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            coming.append((item, pool.submit(work, item)))
            if len(coming) > 1:
                first, job = coming.popleft()
                yield first, job.result()
        for last, job in coming:
            yield last, job.result()


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds what the block takes to `seconds`."""
    started = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started


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
