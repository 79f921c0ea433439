"""The command `b2diffurl` of an installed package. Each of its commands is a script of the repository, or a module that is a
command, with the same options, output and exit code."""

import os
import runpy
import sys
from typing import NoReturn

from b2diffurl import __version__
from b2diffurl.configuration.typos import nearest
from b2diffurl.runtime.logs import show
from b2diffurl.runtime.paths import INSTALLED, SHIPPED, in_clone

COMMANDS = {
    "run": "a whole run; given again, it goes on",
    "sample": "sample the images of one stage",
    "select": "score them, and select those that are trained on",
    "train": "train the LoRA on these",
    "eval": "judge checkpoints, or draw one prompt",
    "report": "write the report of an experiment",
    "results": "list experiments, or compare some",
    "export": "export a LoRA or a pipeline, with a model card",
    "label": "judge the images of a stage in a browser",
}


def main() -> None:
    """Do what the command line says; without a command, list them. An unknown command ends in two lines and exit code 2."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h", "help"):
        show(*usage())
    elif command == "--version":
        show(f"b2diffurl {__version__}")
    elif command in COMMANDS:
        become(in_clone(command).split()[1:], words)
    else:
        near = nearest(command, COMMANDS)
        meant = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}."
        show(
            f"error: b2diffurl has no command {command!r}; {meant}", "       b2diffurl --help lists them.", stream=sys.stderr
        )
        sys.exit(2)


def usage() -> list[str]:
    """The lines of --help."""
    where = "where you give the command" if SHIPPED == INSTALLED else f"in {SHIPPED}"
    return [
        "b2diffurl tunes a text-to-image model by a reward, with B2-DiffuRL (backward training, branched sampling).",
        "",
        "    b2diffurl COMMAND [OPTIONS]",
        "",
        *(f"    {name:<8}  {what:<50}  {in_clone(name)}" for name, what in COMMANDS.items()),
        "",
        "On the right, the same in a clone of the repository. `b2diffurl COMMAND --help` lists the options of a command.",
        "",
        "    b2diffurl run                                              the small model of the quick start, on the CPU",
        "    Preset=sd14_nft ExpName=mine b2diffurl run --dry_run       what a run of Stable Diffusion would do",
        "",
        f"Settings are variables before `run`, and --config.KEY=VALUE. Experiments lie in model/lora {where}.",
    ]


def become(target: list[str], words: list[str]) -> None:
    """Run what is called as `target` in a repository with the options `words`: a shell script, a script, or a module."""
    *how, name = target
    if name.endswith(".sh"):
        exec_shell(name, words)
    sys.argv = [name, *words]
    if how:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[0] = str(SHIPPED / name)
        runpy.run_path(sys.argv[0], run_name="__main__")


def exec_shell(name: str, words: list[str]) -> NoReturn:
    """Become a shell script of the package, so that signals and its exit code are its own.

    It runs this Python, and takes no module of the user's directory for one of the libraries.
    """
    python = os.environ.get("Python") or sys.executable  # noqa: SIM112 (a variable of run_process.sh)
    try:
        os.execvpe("bash", ["bash", str(SHIPPED / name), *words], os.environ | {"Python": python, "PYTHONSAFEPATH": "1"})
    except FileNotFoundError:
        show(
            f"error: {name} needs bash, which is not here",
            "       Install it, and run the same command again.",
            stream=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
