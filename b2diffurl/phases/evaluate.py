"""An evaluation and what is shown of it: report and trackers."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.rules import check
from b2diffurl.evaluation import measure
from b2diffurl.experiment.folder import experiment_folder
from b2diffurl.reporting import page
from b2diffurl.reporting.trackers import track


def judge(
    config: ConfigDict, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[dict[str, Any]]:
    """Evaluate, and show it in report and trackers."""
    results = measure.evaluate(config, checkpoints, prompt_sets, measure.named_samplers(config, samplers))
    show(config)
    return results


def judge_due(config: ConfigDict) -> None:
    """After the newest stage of a run: judge it if it is its turn by config.eval.every; report and trackers in any case."""
    check(config)
    if measure.is_newest(config):
        measure.evaluate_due(config)
        show(config)


def show(config: ConfigDict) -> None:
    root = experiment_folder(config)
    page.refresh(root)
    track(config, root)
