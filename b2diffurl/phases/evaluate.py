"""The evaluate phase: judge checkpoints, and bring the report and the trackers up to date."""

from collections.abc import Mapping, Sequence
from operator import mul
from pathlib import Path
from typing import Any

from b2diffurl.configuration.loop import is_shown
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.settings import SamplerSettings, Settings
from b2diffurl.evaluation.choice import choose
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.evaluation.measure import Result, evaluate, every_checkpoint, named_samplers, prompt_images
from b2diffurl.experiment.evaluation_table import evaluation_rows, every_evaluation, headline
from b2diffurl.experiment.metrics import record_judging
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.phases.health import in_words
from b2diffurl.reporting import page, verdict
from b2diffurl.reporting.trackers import track
from b2diffurl.reporting.verdict_text import choice_lines
from b2diffurl.runtime.logs import announce, logger
from b2diffurl.runtime.stopwatch import working_sec


def evaluate_and_show(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[Result]:
    """`evaluate_and_warn`, and update report and trackers."""
    results = evaluate_and_warn(settings, checkpoints, prompt_sets, samplers)
    show(settings)
    return results


def evaluate_and_warn(
    settings: Settings, checkpoints: Sequence[str], prompt_sets: Sequence[str], samplers: Sequence[str]
) -> list[Result]:
    """Judge checkpoints on prompt sets with samplers, all given by name, and warn of reward hacking.

    `measure.evaluate` says which names there are. Returns one result for each combination.
    """
    results = evaluate_timed(settings, checkpoints, prompt_sets, named_samplers(settings, samplers))
    warn_of_hacking(settings, results)
    return results


def judge_best(settings: Settings, prompts: str, sampler: str, validation: str) -> dict[str, Any]:
    """Judge base and every stage, choose the best and tell how good it is; returns its row, with the `choice` in it.

    It is chosen on the prompt set `validation`, or on half of `prompts`, and judged on `prompts`, or on the other half.
    """
    if not settings.judging.judge and "file" in settings.rewards.weights:
        raise ValueError("neither a reward nor a judge scores these images, so no checkpoint is best. Set eval.judge.")
    judged, chosen = (
        {prompt for _, prompt in named_prompts(settings.prompts, name)[: settings.judging.num_images]} if name else set()
        for name in (prompts, validation)
    )
    if not validation and len(judged) < 2:
        raise ValueError(
            f"--best chooses by one half of the prompts and judges by the other, but --prompts={prompts} has a single one. "
            "Give another file to choose by, such as --validation=train."
        )
    if validation and judged <= chosen:
        raise ValueError(
            f"--validation={validation} has every prompt of --prompts={prompts}: it would be chosen and judged by the same "
            "prompts. Give a file of others, or leave out --validation, which chooses by one half and judges by the other."
        )
    sets = [name for name in (validation, prompts) if name]
    results = evaluate_and_show(settings, every_checkpoint(settings.output.root), sets, [sampler])
    choice = choose(results, sampler, seed=settings.judging.seed, validation=validation)
    announce("", *choice_lines(settings.output.root, choice))
    return headline(choice.best) | {"choice": choice.to_json()}


def evaluate_timed(
    settings: Settings,
    checkpoints: Sequence[str],
    prompt_sets: Sequence[str],
    samplers: Mapping[str, SamplerSettings],
    *,
    after: int | None = None,
) -> list[dict[str, Any]]:
    """`measure.evaluate`, with a record for forecasts of how long it took. `after` is the stage after which it was due."""
    root, started = settings.output.root, working_sec()
    known = {row["folder"] for row in every_evaluation(root, [])}
    results = evaluate(settings, checkpoints, prompt_sets, samplers)
    if made := [result for result in results if result["folder"] not in known]:
        num_images = [result["n_images"] for result in made]
        steps = [result["num_steps"] for result in made]
        evaluations = sum(map(mul, num_images, steps))
        record_judging(root, working_sec() - started, after=after, images=sum(num_images), evaluations=evaluations)
    return results


def evaluate_due(settings: Settings, index: int) -> None:
    """After the training of stage `index`: judge it and the base if eval.every says so, and update report and trackers.

    They are judged on held-out prompts with training's sampler. Nothing happens if a later stage has been trained already.
    In a long run report and trackers are updated more and more rarely (`loop.is_shown`).
    """
    trained = finished_stages(settings.output.root, "train")
    if not trained or trained[-1].index != index:
        return
    due = settings.judging.due(index)
    if due:
        judged = ["base", f"stage{index}"], ["test"], {"training": training_sampler(settings)}
        warn_of_hacking(settings, evaluate_timed(settings, *judged, after=index))
    # A run that waits for people's scores is looked at while it waits.
    waits = settings.rewards.made_elsewhere
    if waits or is_shown(index + 1) or (due and is_shown((index + 1) // settings.judging.every)):
        show(settings)
    elif due:
        verdict.refresh(settings.output.root)


def draw_prompt(settings: Settings, checkpoint: str, prompt: str, sampler: str) -> Path:
    """Draw images of one prompt by the base and by the checkpoint, on the same noise, and return the picture's path."""
    chosen = named_samplers(settings, [sampler])[sampler]
    images = prompt_images(settings, checkpoint, prompt, chosen)
    return page.draw_prompt(settings.output.root, prompt, images, sampler)


def warn_of_hacking(settings: Settings, results: Sequence[Result]) -> None:
    """Log the signs of reward hacking of the newest stage that these results are about."""
    stages = [one["stage"] for one in results if one["stage"] is not None]
    if not stages:  # the base can be judged without any experiment
        return
    root, judged = settings.output.root, {(max(stages), one["prompts"], one["sampler"]) for one in results}
    for warning in verdict.signs_of_evaluations(root, evaluation_rows(root)):
        if (warning["stage"], warning["prompts"], warning["sampler"]) in judged:
            logger.warning("stage%d eval: %s", warning["stage"], in_words(warning))


def tell_verdict(settings: Settings) -> None:
    """Show the verdict on the run, and write it into the log; or say what it lacks."""
    if found := verdict.refresh(settings.output.root):
        announce("", *found["text"])
    else:
        announce("No verdict: judge the base model and a stage alike, by --checkpoint=base,last.")


def show(settings: Settings) -> None:
    """Update verdict, report and trackers from the experiment's files."""
    verdict.refresh(settings.output.root)
    page.refresh(settings.output.root)
    track(settings.output)
