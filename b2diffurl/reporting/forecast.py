"""How long a run takes, and how far it is.

Amounts follow from the configuration (amounts.py). Seconds are measured: in the experiment's latest stages, and before one
is finished in the first sampling batch. Waiting for people (reward `file`) is not among them.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from ml_collections import ConfigDict

from b2diffurl.configuration.budget import (
    at_most,
    most_selected,
    most_updates,
    num_chosen_steps,
    num_evaluations,
    num_images,
    planned_steps,
    stage_steps,
)
from b2diffurl.configuration.settings import describe_reward
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_list, warned_rows
from b2diffurl.objectives import OBJECTIVES

NUM_LATEST = 5  # finished stages by which time is told, so that a faster or slower machine soon shows
LONGEST_IMPORT_SEC = 30  # of Python's packages; what took longer was a pause
FINISHED_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


# ---- time ----


@dataclass(frozen=True)
class Work:
    """What is left to do."""

    evaluations: float = 0  # of the network, without gradients; decoding goes with them
    images: float = 0  # scored
    transitions: float = 0  # trained on
    processes: float = 0  # started

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Pace:
    """Seconds for one of each, in the order of `Work`."""

    evaluation: float
    image: float
    transition: float
    process: float

    def seconds(self, work: Work) -> float:
        return sum(cost * amount for cost, amount in zip(astuple(self), astuple(work), strict=True))


def measured_pace(config: ConfigDict, root: Path) -> Pace | None:
    """Medians over the latest finished stages; None before there is one."""
    paces = [pace for stage in finished_stages(root, "train")[-NUM_LATEST:] if (pace := stage_pace(config, stage))]
    return Pace(*(median(values) for values in zip(*map(astuple, paces), strict=True))) if paces else None


def stage_pace(config: ConfigDict, stage: Stage) -> Pace | None:
    """None for a stage of which no part was timed. `share` is what the seconds of an interrupted phase are of."""
    sampled, selected, trained = (stage.manifest(phase) for phase in PHASES)
    evaluations = sampled["num_evaluations"] * sampled["seconds"].get("share", 1)
    transitions = trained["num_transitions"] * trained["seconds"].get("share", 1)
    if not evaluations:
        return None
    evaluation = sampled["seconds"]["sample"] / evaluations
    return Pace(
        evaluation=evaluation,
        image=selected["seconds"]["score"] / selected["num_images"],
        transition=trained["seconds"]["train"] / transitions if transitions else passes(config) * evaluation,
        process=start_up(trained, finished_at(trained) - finished_at(selected) - trained["seconds"]["train"]),
    )


def start_up(trained: dict[str, Any], between: float) -> float:
    """Seconds that a process takes to start: what lay `between` two phases beside their work, or if that was a pause, what
    is known of it, loading."""
    load = trained["seconds"]["load"]
    return between if load < between < 3 * load + LONGEST_IMPORT_SEC else load


def finished_at(manifest: dict[str, Any]) -> float:
    return datetime.strptime(manifest["finished"], FINISHED_FORMAT).timestamp()


def passes(config: ConfigDict) -> int:
    """What a trained transition costs in evaluations: forward, and as much backward through weights that are frozen; and
    forward through the base policy for an objective that asks it."""
    return 2 + OBJECTIVES[config.train.objective].needs_base


def first_pace(config: ConfigDict, num_trained_steps: int, batch: float, load: float) -> Pace:
    """From the seconds for the first sampling batch of all processes, and for loading; scoring is not known yet."""
    evaluation = batch * config.sample.num_batches_per_epoch / num_evaluations(config, num_trained_steps)
    return Pace(evaluation, 0.0, passes(config) * evaluation, load)


def work_left(config: ConfigDict, root: Path) -> Work:
    """Of the stages' unfinished phases, with as much selected as in the latest stages, or else the most that can be; and of
    evaluations."""
    latest = [stage.manifest("select") for stage in finished_stages(root, "select")[-NUM_LATEST:]]
    shares = [manifest["num_selected"] / manifest["num_images"] for manifest in latest]
    expected = median(shares) * num_images(config) if shares else most_selected(config)
    stages = (Stage(root, index) for index in range(config.stage_cnt))
    unfinished = [stage for stage in stages if not stage.finished("train")]
    left = judging_left(config, [stage.index for stage in unfinished])
    for stage in unfinished:
        num_steps = stage_steps(config, stage)
        selected = stage.manifest("select")["num_selected"] if stage.finished("select") else expected
        asked = {
            "sample": Work(evaluations=num_evaluations(config, num_steps), processes=1),
            "select": Work(images=num_images(config), processes=1),
            "train": Work(transitions=config.train.num_epochs * selected * num_chosen_steps(config, num_steps), processes=1),
        }
        left = sum((work for phase, work in asked.items() if not stage.finished(phase)), left)
    return left


def judging_left(config: ConfigDict, unfinished: Sequence[int]) -> Work:
    """While the stages `unfinished` are to be trained: of base and tuned model, as run_process.sh has them judged.

    That is on held-out prompts every eval.every stages, and in the end on training and held-out prompts with training's
    sampler and on held-out ones with the deployed one.
    """
    every = config.eval.every
    due = [index for index in range(config.stage_cnt) if every and (index + 1) % every == 0]
    still_due = [index for index in due if index in unfinished]
    judged_base = len(still_due) < len(due)
    sets = len(still_due) + 4 - judged_base - (config.stage_cnt - 1 in due)  # of eval.num_images each
    steps = sets * config.sample.num_steps + 2 * config.eval.deployed.num_steps
    judged = config.eval.num_images
    return Work(evaluations=judged * steps, images=judged * (sets + 2), processes=len(unfinished) + 2)


def spent(root: Path, pace: Pace) -> float:
    """Seconds that the finished stages of the experiment have taken, without evaluations and pauses."""
    seconds = 0.0
    for stage in finished_stages(root, "train"):
        for phase, part in (("sample", "sample"), ("select", "score"), ("train", "train")):
            timed = stage.manifest(phase)["seconds"]
            seconds += timed[part] / (timed.get("share") or 1) + pace.process
    return seconds


# ---- log lines ----

UNTOLD = "how long the rest takes cannot be told: "  # from a damaged record of another stage, which stops no work


def plan_line(config: ConfigDict, root: Path) -> str:
    """What will be trained, and how long that takes."""
    steps, images = planned_steps(config, root), num_images(config)
    parts = [
        f"LoRA rank {config.train.lora_rank} on {config.pretrained.model}",
        f"reward {describe_reward(config.reward)}",
        f"{config.stage_cnt} stages of {images} images ({config.stage_cnt * images})",
        f"S {span(steps)} of {config.sample.num_steps}",
        f"{at_most(config)}{config.stage_cnt * most_updates(config)} updates",
        f"seed {config.seed}",
        time_text(config, root),
        *warned_text(root),
    ]
    return f"plan: {', '.join(parts)}"


def time_text(config: ConfigDict, root: Path) -> str:
    pace, done = measured_pace(config, root), num_done(config, root)
    if done == config.stage_cnt:
        return "all stages done"
    if pace is None:
        return "minutes known after the first batch"
    return f"{done} of {config.stage_cnt} stages done, about {duration(pace.seconds(work_left(config, root)))} left"


def first_batch_text(config: ConfigDict, root: Path, num_trained_steps: int, batch: float, load: float) -> str:
    """`batch` and `load` as `first_pace` takes them."""
    try:
        seconds = first_pace(config, num_trained_steps, batch, load).seconds(work_left(config, root))
    except (ValueError, OSError, KeyError) as error:
        return f"first batch in {batch:.1f} s; {UNTOLD}{error}"
    return f"first batch in {batch:.1f} s; the run takes {at_most(config)}about {duration(seconds)}"


def stage_done_line(config: ConfigDict, stage: Stage) -> str:
    """After a stage's training."""
    try:
        pace, done = measured_pace(config, stage.root), num_done(config, stage.root)
        said = f"stage{stage.index} done: {done} of {config.stage_cnt} stages"
        if pace is not None:
            left = f"about {duration(pace.seconds(work_left(config, stage.root)))} left"
            said += f", {duration(spent(stage.root, pace))} so far, {left}"
        return ", ".join([said, *warned_text(stage.root)])
    except (ValueError, OSError, KeyError) as error:
        return f"stage{stage.index} done; {UNTOLD}{error}"


def warned_text(root: Path) -> list[str]:
    """Which stages warned, if any did."""
    stages = [row["stage"] for row in warned_rows(root)]
    return [f"warnings in {stage_list(stages)} (see report.html)"] if stages else []


def num_done(config: ConfigDict, root: Path) -> int:
    return sum(stage.index < config.stage_cnt for stage in finished_stages(root, "train"))


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.4 h or 5.1 days."""
    for unit, size, end in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < end:
            return number(seconds / size, unit)
    return number(seconds / 86400, "days")


def number(value: float, unit: str) -> str:
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def span(steps: Sequence[int]) -> str:
    return f"{min(steps)}..{max(steps)}" if len(set(steps)) > 1 else str(steps[0])
