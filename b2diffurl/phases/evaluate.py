"""Judge checkpoints, and show what was found in report and trackers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import evaluate, named_samplers, prompt_images
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.reporting import page
from b2diffurl.reporting.trackers import track


def judge(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[dict[str, Any]]:
    """Evaluate these checkpoints, as `measure.evaluate` does, and show the results."""
    results = evaluate(settings, checkpoints, prompt_sets, named_samplers(settings, samplers))
    show(settings)
    return results


def judge_due(settings: Settings, index: int) -> None:
    """After stage `index`: judge it and the base on held-out prompts, if it is its turn by eval.every, and show the run.

    Where a later stage has been trained already, there is nothing to do.
    """
    trained = finished_stages(settings.output.root, "train")
    if not trained or trained[-1].index != index:
        return
    every = settings.judging.every
    if every and (index + 1) % every == 0:
        evaluate(settings, ["base", f"stage{index}"], ["test"], {"training": training_sampler(settings)})
    show(settings)


def draw_prompt(settings: Settings, checkpoint: str, prompt: str, sampler: str) -> Path:
    """A picture of one prompt's images by the base and by the checkpoint, on the same noise; returns its path."""
    chosen = named_samplers(settings, [sampler])[sampler]
    images = prompt_images(settings, checkpoint, prompt, chosen)
    return page.draw_prompt(settings.output.root, prompt, images, sampler)


def show(settings: Settings) -> None:
    """Bring report and trackers up to date."""
    page.refresh(settings.output.root)
    track(settings.output)
