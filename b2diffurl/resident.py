"""What run_process.sh does, in one process: start-up, imports and loading the base model are paid once."""

import json
import os

from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import run_script
from b2diffurl.configuration.plan import make_plan
from b2diffurl.evaluation.statistics import headline
from b2diffurl.experiment import lock
from b2diffurl.models import policy
from b2diffurl.phases.evaluate import judge, judge_due
from b2diffurl.phases.sample import sample_stage
from b2diffurl.phases.select import select_stage
from b2diffurl.phases.train import train_stage


def run_stages(config: ConfigDict) -> None:
    """Every stage by the functions of the three scripts, judged when it is due, and in the end base and tuned model."""
    if max(config.num_processes, int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError("Resident=1 is for one process. Without it each script is started on its own.")
    policy.keep_models()
    with lock.holding(make_plan(config).stage.root):
        for index in range(config.stage_cnt):
            config.run_name = f"stage{index}"
            plan = make_plan(config)
            sample_stage(plan)
            select_stage(plan)
            if not plan.stage.finished("select"):
                return  # reward `file`: scores are being made elsewhere
            train_stage(plan)
            judge_due(config)
        judge(config, ["base", "last"], ["train", "test"], ["training"])
        results = judge(config, ["base", "last"], ["test"], ["deployed"])
    print(json.dumps(headline(results[-1])), flush=True)


if __name__ == "__main__":
    run_script("process", run_stages)
