"""--help of the scripts. It is shown before anything is imported that takes seconds."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from b2diffurl.runtime.logs import set_up_streams, show
from b2diffurl.runtime.paths import CONFIG_FILE, RUN, command, resource

HELP = ("-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull")
LEFT, WIDTH = 28, 120  # where the text beside an option begins, and where its lines end


def run_script(verb: str, main: Callable[[Any], Any]) -> None:
    """Show --help if it is asked for. Otherwise parse the flags and call `main(config)` (command_line.py)."""
    if not set(HELP).isdisjoint(sys.argv[1:]):
        set_up_streams()
        show(*usage(main.__globals__["__doc__"]))
        return
    from b2diffurl.configuration import command_line  # imports torch, which takes seconds

    command_line.run_script(verb, main)


def usage(doc: str) -> Iterator[str]:
    """The lines of --help for the script with this docstring, `What it does: an example of its call`."""
    what, _, example = inspect.cleandoc(doc).partition(": ")
    script = next(word for word in example.split() if word.endswith(".py"))
    given = command(script.removeprefix("run_").removesuffix(".py"))
    example = example.replace(f"python {script}", given)
    yield from (f"usage: {given} [--config={CONFIG_FILE}:PRESET] [--config.KEY=VALUE ...] [OPTION ...]", "")
    yield from (f"{what}.", "", "Options:", "")
    yield from option(f"--config={CONFIG_FILE}:PRESET", "The settings to begin with (default: those of the preset shapes).")
    yield from option("--config.KEY=VALUE", "Another value for a setting, as often as you like.")
    yield from option("--config.exp_name=NAME", "The experiment; by default it has the preset's name.")
    yield from option("--config.run_name=stage0", "The stage to work on.")
    for flag in own_flags():
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        name = f"--{flag.name}={flag.name.upper()}"
        if flag.boolean:
            name, default = f"--[no]{flag.name}" if default else f"--{flag.name}", "yes" if default else ""
        yield from option(name, flag.help + ("" if default in (None, "") else f" (default: {default})"))
    yield from ("", "Examples:", "", f"    {example}")
    of_another_run = f"{given} --config={CONFIG_FILE}:sd14 --config.exp_name=my_run"  # the preset comes before the settings
    yield from (f"    {example.replace(given, of_another_run)}", "", f"{CONFIG_FILE}:", "")
    yield from (ast.get_docstring(ast.parse(resource(CONFIG_FILE).read_text())) or "").splitlines()
    yield from ("", f"docs/configuration.md explains the settings. For a whole run: {RUN} --help")


def option(name: str, text: str) -> Iterator[str]:
    """An option with its text beside it, or below it if its name is long."""
    lines = textwrap.wrap(text, WIDTH - LEFT)
    first = f"    {name}"
    if len(first) < LEFT:
        yield f"{first:<{LEFT}}{lines.pop(0)}"
    else:
        yield first
    yield from (" " * LEFT + line for line in lines)


def own_flags() -> list[flags.Flag]:
    """The flags that the script itself has defined, but for those that only run_process.sh gives."""
    modules = flags.FLAGS.flags_by_module_dict()
    return [flag for module, defined in modules.items() if not module.startswith("absl") for flag in defined]
