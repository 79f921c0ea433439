"""What a relative path means. One that the user gives lies in the directory where the command was given, whatever program
made of it since. One in a preset or in a record of an experiment is a `resource`: it lies in what comes with this program if
it is there, else in the directory where the scripts work.

What comes with this program, its presets, prompt files and small models, is SHIPPED: the repository, or a folder of the
installed package. Scripts of a repository work in it, so it holds their experiments and logs, too. An installed package is
never written to: its scripts work in the user's directory.

`~` is the home folder in all of them.
"""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSTALLED = PACKAGE / "shipped"  # a wheel has it (pyproject.toml), a repository has not
SHIPPED = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
FOLDERS = ("config", "model/shapes", "model/shapes_flow")  # of SHIPPED: where a relative path may mean something in it
CONFIG_FILE = "config/stage_process.py"  # the presets; always the file that is shipped
STARTED_IN = "B2DIFFURL_STARTED_IN"  # the environment variable in which run_process.sh keeps the user's directory


def in_clone(verb: str) -> str:
    """How people give a command in a clone of the repository: run is `bash run_process.sh`, eval `python run_eval.py`."""
    if verb == "run":
        return "bash run_process.sh"
    return f"python run_{verb}.py" if verb in ("sample", "select", "train", "eval") else f"python -m b2diffurl.{verb}"


def command(verb: str) -> str:
    """How people give a command: as `in_clone`, or `b2diffurl <verb>` where the package is installed."""
    return f"b2diffurl {verb}" if SHIPPED == INSTALLED else in_clone(verb)


RUN = command("run")


def go_to_work() -> None:
    """Remember the user's directory, and go to the repository, if there is one, unless run_process.sh has done so.

    Modules of the user's directory can then be imported, such as a reward, and the presets, by the user's own configuration.
    They come last, so that they never stand in for another module.
    """
    if STARTED_IN not in os.environ:
        os.environ[STARTED_IN] = os.getcwd()
        if SHIPPED != INSTALLED:
            os.chdir(SHIPPED)
    sys.path += [folder for folder in (str(user_directory()), str(SHIPPED)) if folder not in sys.path]


def resource(name: str | Path) -> Path:
    """Where a path in a preset or in a record of an experiment leads; as it reads, but for `~`, unless it is shipped.

    What is shipped is found from any directory, and comes before a file of the same name there. Records keep `name`, so that
    an experiment does not depend on where the program lies.
    """
    path = Path(os.path.expanduser(name))
    return SHIPPED / path if is_shipped(path) and not is_same_file(".", SHIPPED) else path


def is_shipped(path: Path) -> bool:
    """Whether a relative path means something that comes with this program."""
    inside = any(path.is_relative_to(folder) for folder in FOLDERS)
    return inside and ".." not in path.parts and os.path.exists(SHIPPED / path)


def user_directory() -> Path:
    """The directory where the user gave the command."""
    return Path(os.environ.get(STARTED_IN, "")).absolute()


def user_path(given: str) -> str:
    """The path that the user means by `given`. Where the scripts work in the user's directory it stays, but for `~`.

    So the records of an experiment do not depend on where the repository lies. What is shipped is meant only where the user
    has no file of that name. Blank text stays as it is.
    """
    path = os.path.expanduser(given)
    own = os.path.join(user_directory(), path)
    if is_shipped(Path(path)):
        return own if os.path.exists(own) and not is_same_file(own, SHIPPED / path) else path
    return path if is_same_file(user_directory(), ".") or not path.strip() else own


def user_model(given: str) -> str:
    """What the user means by a model: a hub id if it reads like one and is no path, else `user_path`."""
    path = user_path(given)
    return given if is_hub_id(given) and not os.path.exists(path) else path


def is_hub_id(name: str) -> bool:
    """Whether a model's name reads like owner/name of the Hugging Face hub. `model/` is a folder of the repository."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "model/"))


def same_place(one: str, other: str) -> bool:
    """Whether two paths, or two hub ids, mean the same, though one of them may be relative or lead over a link."""
    return one == other or is_same_file(resource(one), resource(other))


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to the same place, where there need be nothing."""
    return os.path.realpath(one) == os.path.realpath(other)
