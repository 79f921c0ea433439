"""The first command of run_process.sh: check everything, take the lock, print the list of calls. Or print the plan.

The list is the loop of the run (configuration/loop.py), which run_process.sh then walks: call after call of run_<script>.py.
"""

from absl import flags
from ml_collections import ConfigDict

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.command_line import run_script
from b2diffurl.configuration.loop import calls
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.experiment import lock
from b2diffurl.models import family
from b2diffurl.phases.preflight import check_sampler
from b2diffurl.reporting import dry_run, forecast
from b2diffurl.runtime.logs import logger


def start(config: ConfigDict) -> None:
    """Check the whole configuration. With --dry_run, print the plan for people and do nothing else.

    Otherwise take the lock for run_process.sh, and print these lines for it to read:

        the experiment's folder
        call <TAB> a file that the call needs <TAB> script <TAB> flag <TAB> flag …      one line for each call
        the plan, for the log
    """
    plan = make_plan(config)
    if family(plan.settings.model).sizes(plan.settings.model):  # its files are here, so nothing is downloaded for this
        check_sampler(plan, max(Budget.of(plan.settings).planned_steps(plan.stage.root)))
    load_prompts(plan.settings.prompts.held_out_file)  # a bad file is refused now, not hours later by the first evaluation
    if flags.FLAGS.dry_run:
        family(plan.settings.model).check(plan.settings.model)
        print(dry_run.describe(plan))
        return
    if owner := lock.owner():  # 0 on the other machines of a cluster, which leave the lock to the first one
        lock.take(plan.stage.root, owner)
    print(plan.stage.root)
    for call in calls(plan.settings.schedule.num_stages, waits=plan.settings.rewards.made_elsewhere):
        print("call", call.needs, f"run_{call.script}.py", *call.flags, sep="\t")
    logger.info(forecast.plan_line(plan.settings))


if __name__ == "__main__":
    flags.DEFINE_boolean("dry_run", False, "Print the plan (stages, images, updates, disk, time) and do nothing.")
    run_script("process", start)
