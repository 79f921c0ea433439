"""What a relative path means. One that the user gives lies in the directory where the command was given, whatever program
made of it since; one in a preset or in a record of an experiment lies in this repository, where every script works.

`~` is the home folder in both.
"""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STARTED_IN = "B2DIFFURL_STARTED_IN"  # the environment variable in which run_process.sh keeps the user's directory


def work_in_repository() -> None:
    """Remember the user's directory and go to the repository, unless run_process.sh has done so."""
    if STARTED_IN not in os.environ:
        os.environ[STARTED_IN] = os.getcwd()
        os.chdir(REPOSITORY)


def user_directory() -> Path:
    """The directory where the user gave the command."""
    return Path(os.environ.get(STARTED_IN, "")).absolute()


def user_path(given: str) -> str:
    """The path that the user means by `given`. Whoever works in the repository gets it as it was given, but for `~`.

    So the records of an experiment do not depend on where the repository lies. Blank text stays as it is.
    """
    path = os.path.expanduser(given)
    here = os.path.realpath(user_directory()) == os.path.realpath(".")
    return path if here or not path.strip() else os.path.join(user_directory(), path)


def user_model(given: str) -> str:
    """What the user means by a model: a hub id if it reads like one and is no path, else `user_path`."""
    path = user_path(given)
    return given if is_hub_id(given) and not os.path.exists(path) else path


def is_hub_id(name: str) -> bool:
    """Whether a model's name reads like owner/name of the Hugging Face hub. `model/` is a folder of the repository."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "model/"))


def same_place(one: str, other: str) -> bool:
    """Whether two paths, or two hub ids, mean the same, though one of them may be relative or lead over a link."""
    return one == other or os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))
