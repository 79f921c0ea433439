"""What run_process.sh does, in one process: start-up, imports and loading the base model are paid once."""

import json
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from b2diffurl import evaluate, policy, report
from b2diffurl.checks import check
from b2diffurl.experiment import alone_in, make_plan
from b2diffurl.results import headline
from b2diffurl.sample import sample_stage
from b2diffurl.script import run_script
from b2diffurl.select import select_stage
from b2diffurl.tracking import track
from b2diffurl.train import train_stage


def run_stages(config: ConfigDict) -> None:
    """Every stage by the functions of the three scripts, judged when it is due, and in the end base and tuned model."""
    if max(config.num_processes, int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError("Resident=1 is for one process. Without it each script is started on its own.")
    policy.keep_models()
    with alone_in(config):
        for index in range(config.stage_cnt):
            config.run_name = f"stage{index}"
            sample_stage(config)
            select_stage(config)
            if not make_plan(config).stage.finished("select"):
                return  # reward `file`: scores are being made elsewhere
            train_stage(config)
            judge_due(config)
        judge(config, ["base", "last"], ["train", "test"], ["training"])
        results = judge(config, ["base", "last"], ["test"], ["deployed"])
    print(json.dumps(headline(results[-1])), flush=True)


def judge(
    config: ConfigDict, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[dict[str, Any]]:
    """Evaluate, and show it in report and trackers."""
    results = evaluate.evaluate(config, checkpoints, prompt_sets, evaluate.named_samplers(config, samplers))
    show(config)
    return results


def judge_due(config: ConfigDict) -> None:
    """After the newest stage of a run: judge it if it is its turn by config.eval.every; report and trackers in any case."""
    check(config)
    if evaluate.is_newest(config):
        evaluate.evaluate_due(config)
        show(config)


def show(config: ConfigDict) -> None:
    root = evaluate.experiment_folder(config)
    report.refresh(root)
    track(config, root)


if __name__ == "__main__":
    run_script("process", run_stages)
