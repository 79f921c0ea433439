"""How long a run takes, and how far it is.

Amounts follow from the settings (budget.py) and the loop of calls (loop.py). Seconds are measured in the experiment's latest
stages, or before one is finished in the first sampling batch. Waiting for people (reward `file`) is left out.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.loop import Call, calls
from b2diffurl.configuration.settings import Settings
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_list, warned_rows
from b2diffurl.objectives import Objective

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


def measured_pace(settings: Settings) -> Pace | None:
    """Medians over the latest finished stages; None before there is one."""
    latest = finished_stages(settings.output.root, "train")[-NUM_LATEST:]
    paces = [pace for stage in latest if (pace := stage_pace(settings.training.objective, stage))]
    return Pace(*(median(values) for values in zip(*map(astuple, paces), strict=True))) if paces else None


def stage_pace(objective: Objective, stage: Stage) -> Pace | None:
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
        transition=trained["seconds"]["train"] / transitions if transitions else passes(objective) * evaluation,
        process=start_up(trained, finished_at(trained) - finished_at(selected) - trained["seconds"]["train"]),
    )


def start_up(trained: dict[str, Any], between: float) -> float:
    """Seconds that a process takes to start: what lay `between` two phases beside their work, or if that was a pause, what
    is known of it, loading."""
    load = trained["seconds"]["load"]
    return between if load < between < 3 * load + LONGEST_IMPORT_SEC else load


def finished_at(manifest: dict[str, Any]) -> float:
    return datetime.strptime(manifest["finished"], FINISHED_FORMAT).timestamp()


def passes(objective: Objective) -> int:
    """What a trained transition costs in evaluations of the network.

    It is run forward, and as much backward, for the gradient of frozen weights is not computed; an objective that asks for
    the base policy runs it forward once more.
    """
    return 2 + objective.needs_base


def first_pace(settings: Settings, num_trained_steps: int, batch_sec: float, load_sec: float) -> Pace:
    """From the seconds for the first sampling batch of all processes, and for loading; scoring is not known yet."""
    num_evaluations = Budget.of(settings).num_evaluations(num_trained_steps)
    evaluation = batch_sec * settings.sampling.num_batches / num_evaluations
    return Pace(evaluation, 0.0, passes(settings.training.objective) * evaluation, load_sec)


def work_left(settings: Settings) -> Work:
    """Of the calls that are not done, with as much selected as in the latest stages, or else the most that can be."""
    root, budget = settings.output.root, Budget.of(settings)
    latest = [stage.manifest("select") for stage in finished_stages(root, "select")[-NUM_LATEST:]]
    shares = [manifest["num_selected"] / manifest["num_images"] for manifest in latest]
    expected = median(shares) * budget.num_images if shares else budget.most_selected
    left = judging_left(settings, finished={stage.index for stage in finished_stages(root, "train")})
    for call in calls(settings.schedule.num_stages):
        if call.script == "eval":
            continue
        stage = Stage(root, call.stage)
        if not stage.finished(call.script) and not stage.finished("train"):
            left += phase_work(settings, budget, stage, call, expected)
    return left


def phase_work(settings: Settings, budget: Budget, stage: Stage, call: Call, expected: float) -> Work:
    """Of one phase of a stage; `expected` trajectories are selected, if the selection has not been made."""
    num_steps = budget.num_trained_steps(stage)
    match call.script:
        case "sample":
            return Work(evaluations=budget.num_evaluations(num_steps), processes=1)
        case "select":
            return Work(images=budget.num_images, processes=1)
    selected = stage.manifest("select")["num_selected"] if stage.finished("select") else expected
    transitions = settings.training.num_epochs * selected * budget.num_chosen_steps(num_steps)
    return Work(transitions=transitions, processes=1)


def judging_left(settings: Settings, *, finished: set[int]) -> Work:
    """Of the run's evaluations, where the stages `finished` have been trained, and judged if that was due."""
    num_stages, judging = settings.schedule.num_stages, settings.judging
    done, left, processes = set(), set(), 0
    for call in calls(num_stages):
        found = call.evaluations(num_stages, judging.every)
        if call.stage in finished:
            done |= found
        elif call.script == "eval":
            left |= found
            processes += 1
    num_steps = {"training": settings.sampling.num_steps, "deployed": judging.deployed.num_steps}
    asked = left - done  # what has been judged is read back
    evaluations = sum(judging.num_images * num_steps[sampler] for _, _, sampler in asked)
    return Work(evaluations=evaluations, images=judging.num_images * len(asked), processes=processes)


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


def plan_line(settings: Settings) -> str:
    """What will be trained, and how long that takes."""
    root, budget, num_stages = settings.output.root, Budget.of(settings), settings.schedule.num_stages
    parts = [
        f"LoRA rank {settings.model.lora_rank} on {settings.model.name}",
        f"reward {settings.rewards.description}",
        f"{num_stages} stages of {budget.num_images} images ({num_stages * budget.num_images})",
        f"S {span(budget.planned_steps(root))} of {settings.sampling.num_steps}",
        f"{budget.at_most}{num_stages * budget.most_updates} updates",
        f"seed {settings.schedule.seed}",
        time_text(settings),
        *warned_text(root),
    ]
    return f"plan: {', '.join(parts)}"


def time_text(settings: Settings) -> str:
    """How many stages are done, and how long the others take."""
    pace, done, num_stages = measured_pace(settings), num_done(settings), settings.schedule.num_stages
    if done == num_stages:
        return "all stages done"
    if pace is None:
        return "minutes known after the first batch"
    return f"{done} of {num_stages} stages done, about {duration(pace.seconds(work_left(settings)))} left"


def first_batch_text(settings: Settings, num_trained_steps: int, batch_sec: float, load_sec: float) -> str:
    """How long the run takes by its first sampling batch; see `first_pace`."""
    try:
        seconds = first_pace(settings, num_trained_steps, batch_sec, load_sec).seconds(work_left(settings))
    except (ValueError, OSError, KeyError) as error:
        return f"first batch in {batch_sec:.1f} s; {UNTOLD}{error}"
    return f"first batch in {batch_sec:.1f} s; the run takes {Budget.of(settings).at_most}about {duration(seconds)}"


def stage_done_line(settings: Settings, stage: Stage) -> str:
    """After a stage's training: how many stages are done, and how long the others take."""
    try:
        pace, done = measured_pace(settings), num_done(settings)
        said = f"stage{stage.index} done: {done} of {settings.schedule.num_stages} stages"
        if pace is not None:
            left = f"about {duration(pace.seconds(work_left(settings)))} left"
            said += f", {duration(spent(stage.root, pace))} so far, {left}"
        return ", ".join([said, *warned_text(stage.root)])
    except (ValueError, OSError, KeyError) as error:
        return f"stage{stage.index} done; {UNTOLD}{error}"


def warned_text(root: Path) -> list[str]:
    """Which stages warned, if any did."""
    stages = [row["stage"] for row in warned_rows(root)]
    return [f"warnings in {stage_list(stages)} (see report.html)"] if stages else []


def num_done(settings: Settings) -> int:
    """Stages of the run that have been trained; the experiment may have had more."""
    return sum(stage.index < settings.schedule.num_stages for stage in finished_stages(settings.output.root, "train"))


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
