"""The whole loop of a run in one process, which imports the libraries and loads the base model only once.

run_process.sh takes it (by start.py) for runs on the CPU, and wherever Resident=1 is given. The calls, their order and their
results are those of its own loop over the scripts, which Resident=0 takes.
"""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from b2diffurl.configuration.command_line import run_script
from b2diffurl.configuration.loop import Call
from b2diffurl.configuration.plan import make_plan
from b2diffurl.experiment import lock
from b2diffurl.models import policy
from b2diffurl.phases.evaluate import evaluate_and_show, evaluate_and_warn, evaluate_due, tell_verdict
from b2diffurl.phases.finished import calls_left
from b2diffurl.phases.sample import sample_stage
from b2diffurl.phases.select import select_stage
from b2diffurl.phases.train import train_stage

VERBS = {"sample": sample_stage, "select": select_stage, "train": train_stage}


def run_stages(config: ConfigDict, left: Sequence[Call] | None = None) -> None:
    """Make the calls that are `left`, in order, then tell the verdict. None: look first what is left of the run.

    Ends early where a call lacks the file that it needs: scores are being made elsewhere (reward `file`).
    """
    if max(config.num_processes, int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError("Resident=1 is for one process. Give NumProcesses, and leave Resident out or set it to 0.")
    first = make_plan(config)
    root = first.stage.root
    with policy.keeping_models(), lock.holding(root):
        for call in calls_left(first) if left is None else left:
            if not call.is_possible(root):
                return
            if call.stage is None:  # the evaluations at the end of the run
                # What an evaluation before the last one would show, the last one does.
                judge = evaluate_and_show if call.is_last else evaluate_and_warn
                judge(first.settings, call.checkpoints, call.prompts, [call.sampler])
            elif call.script == "eval":
                evaluate_due(first.settings, call.stage)
            else:
                # A plan for each call: it reads what the calls before it have written.
                config.run_name = f"stage{call.stage}"
                VERBS[call.script](make_plan(config))
    tell_verdict(first.settings)


if __name__ == "__main__":
    run_script("run", run_stages)
