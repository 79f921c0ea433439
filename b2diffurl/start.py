"""What run_process.sh runs first: check everything, take the lock, name folder and stages; or print the plan."""

from absl import flags
from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import run_script
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.experiment import lock
from b2diffurl.reporting import dry_run, forecast
from b2diffurl.runtime.logs import logger


def begin(config: ConfigDict) -> None:
    """Check the whole configuration, and print the plan if that is all that is asked for (--dry_run); else take the lock for
    run_process.sh, print the experiment's folder and the names of all its stages, and log the plan in one line."""
    plan = make_plan(config)
    load_prompts(config.eval.prompt_file)  # refused now rather than when the run is judged
    if flags.FLAGS.dry_run:
        print(dry_run.describe(config, plan))
        return
    if owner := lock.owner():
        lock.take(plan.stage.root, owner)
    print(plan.stage.root)
    print(" ".join(f"stage{index}" for index in range(config.stage_cnt)))
    logger.info(forecast.plan_line(config, plan.stage.root))


if __name__ == "__main__":
    flags.DEFINE_boolean("dry_run", False, "Print the plan (stages, images, updates, disk, time) and do nothing.")
    run_script("process", begin)
