"""An evaluation and what is shown of it: report and trackers."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from b2diffurl import evaluate, report
from b2diffurl.checks import check
from b2diffurl.names import experiment_folder
from b2diffurl.tracking import track


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
    root = experiment_folder(config)
    report.refresh(root)
    track(config, root)
