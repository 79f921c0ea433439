"""What every script needs around its work: flags, the log, signals, errors that users can read."""

import atexit
import contextlib
import errno
import gc
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from safetensors import SafetensorError

from b2diffurl.configuration.typos import CHOICE_OF_PRESET, PRESET_KEY, bad_value, did_you_mean, unknown_option
from b2diffurl.runtime import ambient, paths
from b2diffurl.runtime.logs import log_of, logger, name_log, set_up_logging, set_up_streams, show
from b2diffurl.runtime.paths import CONFIG_FILE
from b2diffurl.runtime.processes import OWNER, ending_with_masters

GC_THRESHOLD = 50_000  # new objects between two garbage collections; imports make millions, so Python's 700 costs seconds
FLAGS = flags.FLAGS

# Errors whose message is enough for the user: settings, files and disks, numbers that are not finite, missing packages.
MISTAKES = (ValueError, OSError, FloatingPointError, ImportError, SafetensorError)
# Parts of the errors that a process raises when another process of the run has died.
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
STOPS = (signal.SIGTERM, signal.SIGINT)  # the signals that end a run
GRACE_SEC = 10  # from a signal to the forced end of the process

# The preset's own settings, before the command line overrides any. None where no script runs, as in the benchmarks.
PRESET: ContextVar[dict[str, Any] | None] = ContextVar("PRESET", default=None)


def run_script(verb: str, main: Callable[[ConfigDict], Any]) -> None:
    """Parse the flags and call `main(config)`. Errors that users can mend end in two lines and exit code 2."""
    set_up_command(verb)
    config, preset = parse_flags()
    log_file = open_log(verb, config["exp_name"], config["log_path"], config["save_path"])
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(gc.freeze)  # or Python would walk all imported objects once more as it ends, which takes a second
    try:
        with stopping_in_order(), ending_by_force(), ending_with_masters(), named_preset(preset):
            make_room_for_prompts(verb, config, preset)
            main(config)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        logger.warning("%s: stopped by %s; run the same command again to go on", verb, signal.Signals(number).name)
        sys.exit(128 + number)
    except (*MISTAKES, RuntimeError, MemoryError) as error:
        logger.debug("%s failed", verb, exc_info=True)
        explanation = explain(error, log_file)
        if explanation is None:
            raise
        said, hint = explanation
        die(f"{verb}: {said}", hint=hint)


def set_up_command(verb: str) -> None:
    """What every command needs before anything else: streams, a usable environment, the directory where it works."""
    set_up_streams()
    ambient.calm_warnings()
    ambient.refuse_telemetry()
    try:
        ambient.require_usable()
    except ValueError as error:
        die(f"{verb}: {error}.", hint="Then run the same command again.")
    try:
        paths.go_to_work()
    except OSError as error:
        die(f"{verb}: {error}", hint=f"{remedy(error)}.")


def open_log(verb: str, exp_name: str, log_path: str, save_path: str) -> Path | None:
    """Start logging into the experiment's log (`log_of`) and return its path; a dry run has no log.

    This happens before the configuration is checked, so the names are checked here.
    """
    from b2diffurl.configuration.limits import Folder, Name, check_value

    try:
        check_value("exp_name", exp_name, Name())
        check_value("log_path", log_path, Folder())
        check_value("save_path", save_path, Folder())
    except ValueError as error:
        die(f"{verb}: {error}", hint="Mend it and run the same command again.")
    dry = "dry_run" in FLAGS and FLAGS.dry_run
    root = Path(save_path) / exp_name
    try:
        log_file = None if dry else log_of(Path(log_path), root)
        set_up_logging(log_file, stream=sys.stderr if "json" in FLAGS and FLAGS.json else None)
        if log_file:
            name_log(log_file, root)
    except OSError as error:
        die(f"{verb}: the log cannot be written: {error}", hint=f"{remedy(error, '--config.log_path')}.")
    return log_file


@contextmanager
def named_preset(settings: dict[str, Any] | None) -> Iterator[None]:
    """Set PRESET to these settings inside the block."""
    token = PRESET.set(settings)
    try:
        yield
    finally:
        PRESET.reset(token)


def explain(error: BaseException, log_file: Path | None) -> tuple[str, str] | None:
    """(what went wrong, what to do) for the user; None for a bug of ours, whose traceback says more."""
    traceback_in = f"; the traceback is in {log_file}" if log_file else ""
    if isinstance(error, MISTAKES):
        said = "; ".join([str(error), *getattr(error, "__notes__", ())])
        return said, f"{remedy(error, '--config.save_path')}{traceback_in}."
    if isinstance(error, RecursionError) and log_file:
        said = f"{error}: a library has read a file with too many brackets within brackets, or this program has a fault"
        return said, f"The traceback in {log_file} says which."
    if lost_another_process(error):
        return "another process of this run has ended", f"Its error stands in {log_file}: process <number>."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile failed: {error}", f"Go on without it by --config.compile=False{traceback_in}."
    from b2diffurl.runtime.batch_sizes import is_out_of_memory  # imports torch, which takes seconds

    if is_out_of_memory(error):
        sizes = ("sample.micro_batch_size", "sample.decode_batch_size", "train.micro_batch_size", "reward.batch_size")
        knobs = f"{', '.join(sizes)} or, where it is judged, eval.batch_size"
        more = "take train.gradient_checkpointing=True or a smaller pretrained.resolution"
        return str(error), f"Lower {knobs}, or {more}, and run the command again: it goes on where it stopped."
    return None


def lost_another_process(error: BaseException) -> bool:
    """Whether the error only says that another process of this run has died. That process has logged the cause."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(text in str(error) for text in LOST)


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Inside the block SIGTERM (preemption) and SIGINT (Ctrl-C) raise a KeyboardInterrupt with the signal's number."""

    # A second Ctrl-C must not interrupt the cleaning up. Not SIG_IGN: Python complains of it, with a traceback, if the
    # second signal is there already, as after a Ctrl-C in a terminal, which run_process.sh passes on.
    def stop(number: int, _frame: object) -> None:
        for each in STOPS:
            signal.signal(each, lambda *_: None)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_by_force() -> Iterator[None]:
    """If the process is still there GRACE_SEC after a signal, for example because it waits for another process, end it.

    That is safe: at any moment a file is either whole or absent.
    """
    ended = threading.Event()
    read_end, write_end = os.pipe()  # Python writes into it the number of every signal that has a handler
    os.set_blocking(write_end, False)

    # A thread, because a signal handler runs only between two bytecodes of the main thread, which may be stuck in C code.
    def insist() -> None:
        while (heard := os.read(read_end, 1)) and heard[0] not in STOPS:
            pass
        if heard and not ended.wait(GRACE_SEC):
            name = signal.Signals(heard[0]).name
            logger.warning("stopped by %s, without waiting any longer; run the same command again to go on", name)
            os._exit(128 + heard[0])
        os.close(read_end)

    wakeup = signal.set_wakeup_fd(write_end)
    threading.Thread(target=insist, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        os.close(write_end)


def parse_flags() -> tuple[ConfigDict, dict[str, Any]]:
    """The configuration with its overrides, locked; and the settings of its preset, without them."""
    from b2diffurl.configuration.keys import by_todays_names, flatten, meant_paths  # imports torch, which takes seconds

    what = "Configuration, CONFIG.py:PRESET; any key by --config.KEY."
    where_keys_stand = f"Every key stands with a comment in {CONFIG_FILE}; --help says more."
    preset: dict[str, Any] = {}
    try:
        with contextlib.chdir(paths.user_directory()):  # where --config and --flagfile have their files
            config_flags.DEFINE_config_file("config", config_path(CONFIG_FILE), what)
            # Parse in two halves, to see the preset before the overrides change it.
            before, after = split_at_preset([sys.argv[0], *FLAGS.read_flags_from_files(sys.argv[1:], force_gnu=True)])
            unexpected = FLAGS(before)[1:]  # loads the preset
            preset = {} if unexpected else by_todays_names(FLAGS.config.to_dict())
            unexpected = unexpected or FLAGS([sys.argv[0], *after])[1:]  # overrides it
        refuse_two_names()
        refuse_preset_key(preset)
        config = None if unexpected else by_todays_names(FLAGS.config.unlock()).lock()
        if config:
            config.update_from_flattened_dict(meant_paths(flatten(config.to_dict()), given_keys()))
    except Exception as error:  # absl, ml_collections and the config file each raise their own kinds
        die(said_of(error, flatten(preset)), hint=where_keys_stand)
    if unexpected:
        near = did_you_mean(unexpected[0].partition("=")[0], flatten(preset), other_options())
        die(f"unexpected argument {unexpected[0]!r}{near}", hint="Options look like --config.train.learning_rate=1e-4.")
    return config, preset


def said_of(error: Exception, settings: Mapping[str, Any]) -> str:
    """What is wrong with the command line, in a sentence. `error` came from parsing it.

    `settings` are the preset's, by dotted key; {} if it could not be loaded.
    """
    from b2diffurl.configuration.keys import KEYS, TODAYS_NAME

    # A key that there is not stops already the loading of the preset.
    known = dict.fromkeys(TODAYS_NAME) | dict(settings or KEYS)
    if said := unknown_option(sys.argv[1:], known, other_options()):
        return said
    if (match := re.match(r"flag --(config\.[\w.]+=.*?): ", str(error), re.DOTALL)) and (
        said := bad_value(match[1], settings)
    ):
        return said
    reason = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return re.sub(r"^(\w+Error: )+|\[Errno \d+\] ", "", reason[-1])


def other_options() -> list[str]:
    """The names of the options that are no keys."""
    return [name for name in FLAGS if not name.startswith("config.")]


def given_keys() -> set[str]:
    """The keys that the command line sets, by today's names."""
    from b2diffurl.configuration.keys import TODAYS_NAME

    names = (name.removeprefix("config.") for name in FLAGS if name.startswith("config.") and FLAGS[name].present)
    return {TODAYS_NAME.get(name, name) for name in names}


def make_room_for_prompts(verb: str, config: ConfigDict, preset: dict[str, Any]) -> None:
    """Let what a preset has for its own prompts alone step back where the user has given others, and say so."""
    given = given_keys()
    if given.isdisjoint(("prompt_file", "prompt", "eval.prompt_file")):
        return
    from b2diffurl.configuration.keys import flatten
    from b2diffurl.configuration.own_prompts import step_back  # imports torch, which takes seconds

    changes, said = step_back(flatten(config.to_dict()), flatten(preset), given)
    config.update_from_flattened_dict(changes)
    for sentence in said:
        logger.log(logging.INFO if tells_of_the_run() else logging.DEBUG, "%s: %s", verb, sentence)


def tells_of_the_run() -> bool:
    """Whether this process says what concerns the whole run: the first one of run_process.sh, or a script started alone."""
    return "calls" in FLAGS or OWNER not in os.environ


def refuse_two_names() -> None:
    """Refuse a key that the command line gives by two of its names, with different values."""
    from b2diffurl.configuration.keys import TODAYS_NAME, refuse_two_values

    for older, key in TODAYS_NAME.items():
        one, other = (FLAGS[name] if (name := f"config.{each}") in FLAGS else None for each in (key, older))
        if None not in (one, other) and one.present and other.present:
            refuse_two_values(key, one.value, older, other.value)


def refuse_preset_key(preset: Mapping[str, Any]) -> None:
    """Refuse --config.preset with another name: it would only be recorded, and the settings would be this preset's."""
    name = f"config.{PRESET_KEY}"
    if name in FLAGS and FLAGS[name].present and FLAGS[name].value != preset.get(PRESET_KEY):
        raise ValueError(f"--config.{PRESET_KEY} chooses no preset; that is done by {CHOICE_OF_PRESET}")


def split_at_preset(words: list[str]) -> tuple[list[str], list[str]]:
    """Cut a command line behind its --config flag, and put in where that file is.

    Overrides, --config.KEY=VALUE, must come after that flag.
    """
    words, cut = list(words), 1
    for n, word in enumerate(words[1:], 1):
        if re.fullmatch(r"--?config(=.*)?", word, re.DOTALL):
            cut = n + 1 if "=" in word else n + 2
            for at in range(cut - 1, min(cut, len(words))):  # the word that names the file
                flag, file = re.fullmatch(r"(--?config=)?(.*)", words[at], re.DOTALL).groups("")
                words[at] = flag + config_path(file)
    return words[:cut], words[cut:]


def config_path(given: str) -> str:
    """Where a config file FILE:PRESET lies. The name of our own is the shipped one, whatever the user's directory has."""
    own = given.partition(":")[0] == CONFIG_FILE
    return os.path.relpath(paths.SHIPPED / given) if own else os.path.expanduser(given)


def remedy(error: BaseException, key: str = "") -> str:
    """What the user can do about an error. `key` is the option that sets where files are written, if there is one."""
    match getattr(error, "errno", None):
        case errno.ENOSPC | errno.EDQUOT:
            return "Make room on that disk and run the same command again: it goes on where it stopped"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            other = f", or give another by {key}," if key else ""
            return f"Make that place writable{other} and run the same command again"
    return "Mend it and run the same command again"


def die(*messages: str, hint: str) -> NoReturn:
    """End the process with a line for each message, one that says what to do, and exit code 2."""
    errors = [f"error: {' '.join(message.split())}" for message in messages]
    show(*errors, f"       {hint}", stream=sys.stderr)
    sys.exit(2)
