"""The first command of run_process.sh: check everything, take the lock, write the list of calls. Or print the plan.

The list is what is left of the run's loop (phases/finished.py). With --alone this process makes all calls itself, else
run_process.sh walks the list. It goes through a file of its own, --calls: anything may print to stdout, such as a module
that the configuration imports.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch
from absl import flags
from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import die, run_script
from b2diffurl.configuration.loop import is_needed
from b2diffurl.configuration.plan import checked_settings, make_plan
from b2diffurl.configuration.prompts import named_prompts, overlap_text
from b2diffurl.configuration.rules import faults
from b2diffurl.experiment import lock
from b2diffurl.phases.doubts import doubts
from b2diffurl.phases.finished import calls_left
from b2diffurl.reporting import dry_run, forecast
from b2diffurl.reporting.forecast import next_stage
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger, show


def start(config: ConfigDict) -> None:
    """Check the whole configuration. With --dry_run, print the plan for people and do nothing else.

    Otherwise take the lock for run_process.sh, and log the plan in a line. The file --calls, whole or absent, says what is
    to be done:

        folder <TAB> the experiment's folder
        resident                                          this process makes all calls
        call <TAB> a file that the call needs <TAB> script <TAB> flag <TAB> flag …      one line for each call
        end                                                                             the only line after a dry run
    """
    if flags.FLAGS.dry_run:
        preview(config)
        return
    plan = make_plan(config)
    overlap = overlap_text(plan.settings.prompts)  # a bad file is refused now, not hours later by the first evaluation
    with lock.holding(plan.stage.root):  # of run_process.sh, which keeps it
        for doubt in doubts(plan):
            logger.warning("%s", doubt)
        logger.info(forecast.plan_line(plan.settings))
        if overlap:
            logger.warning("plan: %s", overlap)
        left = calls_left(plan)
    needed = [call for call in left if is_needed(call, plan.settings)]
    lines = [["call", call.needs, f"run_{call.script}.py", *call.flags] for call in needed]
    alone = is_alone(flags.FLAGS.alone, config.num_processes)
    write_calls([["folder", str(plan.stage.root)], *([["resident"]] if alone else []), *lines])
    if alone:
        from b2diffurl.resident import run_stages  # imports all phases

        run_stages(config, left)


def is_alone(asked: str, num_processes: int) -> bool:
    """Whether this process makes all calls: if it is `asked` to, or by `auto` on the CPU."""
    # On a GPU each script gives its memory back by ending. On the CPU that is not short, and starting takes longest.
    return asked == "yes" or (asked == "auto" and not torch.cuda.is_available() and num_processes <= 1)


def preview(config: ConfigDict) -> None:
    """Show the plan, and everything for which the run would be refused. Exits with code 2 if there is something."""
    from b2diffurl.phases.preflight import FAULTS, inspect  # imports the libraries, for which a run's start need not wait

    if wrong := [*map(str, faults(config))]:
        refuse(wrong)
    try:
        plan = make_plan(config)
        overlap_text(plan.settings.prompts)  # reads the held-out prompts, too
        config.run_name = f"stage{next_stage(plan.settings)}"
        found = inspect(make_plan(config))
    except FAULTS as error:
        refuse(without_plan(config, error))
    with suppress(*(FAULTS if found.faults else ())):  # the plan of a damaged base model cannot be made
        text = dry_run.describe(plan, found.downloads).splitlines()
        show(*text, *(f"{'warning':<13}{doubt}" for doubt in doubts(plan)))
    if found.faults:
        refuse(found.faults)
    show("", "ready: the run would start. Only it can tell whether the weights are sound and a batch fits into memory.")
    write_calls([])


def without_plan(config: ConfigDict, error: Exception) -> list[str]:
    """Every fault that can be found where no plan can be made, because of `error`, which comes first."""
    from b2diffurl.phases.preflight import FAULTS, inspect_settings, sentence

    found = [sentence(error)]
    with suppress(*FAULTS):  # of config.json, which is then that error
        settings = checked_settings(config)
        for name in ("train", "test"):
            try:
                named_prompts(settings.prompts, name)
            except FAULTS as other:
                found.append(sentence(other))
        found += inspect_settings(settings).faults
    return [*dict.fromkeys(found)]


def refuse(wrong: Sequence[str]) -> NoReturn:
    """End the dry run with a line for each fault."""
    die(*wrong, hint=f"Mend {'it' if len(wrong) == 1 else 'these'} and run the same command again.")


def write_calls(lines: list[list[str]]) -> None:
    """Write the file for run_process.sh, if it has asked for it."""
    if flags.FLAGS.calls:
        text = "".join("\t".join(line) + "\n" for line in [*lines, ["end"]])
        files.write_bytes(Path(flags.FLAGS.calls), text.encode(errors="surrogateescape"))


if __name__ == "__main__":
    flags.DEFINE_boolean("dry_run", False, "Check all, print the plan (stages, images, updates, disk, time) and do nothing.")
    flags.DEFINE_enum("alone", "no", ["no", "auto", "yes"], "Make all calls in this process: run_process.sh's own use.")
    flags.DEFINE_string("calls", "", "Write the list of calls to this file: run_process.sh's own use.")
    run_script("run", start)
