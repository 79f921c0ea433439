"""The evaluate phase: judge checkpoints, and bring the report and the trackers up to date."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import evaluate, named_samplers, prompt_images
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.reporting import page
from b2diffurl.reporting.trackers import track


def evaluate_and_show(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[dict[str, Any]]:
    """Judge checkpoints on prompt sets with samplers, all given by name, and update report and trackers.

    `measure.evaluate` says which names there are. Returns one result for each combination.
    """
    results = evaluate(settings, checkpoints, prompt_sets, named_samplers(settings, samplers))
    show(settings)
    return results


def evaluate_due(settings: Settings, index: int) -> None:
    """After the training of stage `index`: judge it and the base if eval.every says so, and update report and trackers.

    They are judged on held-out prompts with training's sampler. Nothing happens if a later stage has been trained already.
    """
    trained = finished_stages(settings.output.root, "train")
    if not trained or trained[-1].index != index:
        return
    every = settings.judging.every
    if every and (index + 1) % every == 0:
        evaluate(settings, ["base", f"stage{index}"], ["test"], {"training": training_sampler(settings)})
    show(settings)


def draw_prompt(settings: Settings, checkpoint: str, prompt: str, sampler: str) -> Path:
    """Draw images of one prompt by the base and by the checkpoint, on the same noise, and return the picture's path."""
    chosen = named_samplers(settings, [sampler])[sampler]
    images = prompt_images(settings, checkpoint, prompt, chosen)
    return page.draw_prompt(settings.output.root, prompt, images, sampler)


def show(settings: Settings) -> None:
    """Update report and trackers from the experiment's files."""
    page.refresh(settings.output.root)
    track(settings.output)
