"""How long a run takes, and how far it is: (work that is left) * (seconds for one of each).

The work follows from the settings (budget.py) and the loop of calls (loop.py). The seconds are measured: in the experiment's
latest stages, or in the first sampling batch before a stage is finished. Waiting for people's scores (reward `file`) is left
out.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.loop import Call, calls
from b2diffurl.configuration.settings import Settings
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_list, warned_rows

NUM_LATEST = 5  # finished stages that count, so that a faster or slower machine soon shows
LONGEST_IMPORT_SEC = 30  # a process that imports its packages for longer was paused
FINISHED_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


# ---- time ----


@dataclass(frozen=True)
class Work:
    """Amounts of work."""

    evaluations: float = 0  # of the network without gradients; the time of decoding is counted with them
    images: float = 0  # to score
    transitions: float = 0  # to train on
    processes: float = 0  # to start

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Pace:
    """Seconds for one of each kind of work, in the order of `Work`."""

    evaluation: float
    image: float
    transition: float
    process: float

    def seconds(self, work: Work) -> float:
        return sum(cost * amount for cost, amount in zip(astuple(self), astuple(work), strict=True))


def measured_pace(settings: Settings) -> Pace | None:
    """The median pace of the latest finished stages; None if none is finished."""
    latest = finished_stages(settings.output.root, "train")[-NUM_LATEST:]
    paces = [pace for stage in latest if (pace := stage_pace(settings, stage))]
    return Pace(*(median(values) for values in zip(*map(astuple, paces), strict=True))) if paces else None


def stage_pace(settings: Settings, stage: Stage) -> Pace | None:
    """The pace of one finished stage; None if none of its sampling was timed.

    A phase that was interrupted records the seconds of its last process only, and as `share` the part of the phase that
    this process did.
    """
    sampled, selected, trained = (stage.manifest(phase) for phase in PHASES)
    evaluations = sampled["num_evaluations"] * sampled["seconds"].get("share", 1)
    transitions = trained["num_transitions"] * trained["seconds"].get("share", 1)
    if not evaluations:
        return None
    evaluation = sampled["seconds"]["sample"] / evaluations
    by_evaluations = evaluations_per_transition(settings) * evaluation
    # A stage that selected nothing trained on nothing: then the costs of evaluations tell those of transitions.
    return Pace(
        evaluation=evaluation,
        image=selected["seconds"]["score"] / selected["num_images"],
        transition=trained["seconds"]["train"] / transitions if transitions else by_evaluations,
        process=start_up(trained, finished_at(trained) - finished_at(selected) - trained["seconds"]["train"]),
    )


def start_up(trained: dict[str, Any], between: float) -> float:
    """Seconds that a process takes to start: imports, and loading of the model.

    They are the time `between` the ends of two phases without the second one's work. If that is so long that the run must
    have been stopped in between, only the recorded loading counts.
    """
    load = trained["seconds"]["load"]
    return between if load < between < 3 * load + LONGEST_IMPORT_SEC else load


def finished_at(manifest: dict[str, Any]) -> float:
    """When a phase was finished, in seconds since 1970."""
    return datetime.strptime(manifest["finished"], FINISHED_FORMAT).timestamp()


def first_pace(settings: Settings, window: Window, batch_sec: float, load_sec: float) -> Pace:
    """The pace before a stage is finished, from the seconds of the first sampling batch and of loading.

    Several processes sample a batch each at the same time, so `batch_sec` must be divided by their number. Scoring counts as
    0, because nothing has been scored yet.
    """
    num_evaluations = Budget.of(settings).num_evaluations(window)
    evaluation = batch_sec * settings.sampling.num_batches / num_evaluations
    return Pace(evaluation, 0.0, evaluations_per_transition(settings) * evaluation, load_sec)


def evaluations_per_transition(settings: Settings) -> float:
    """What training a transition, or a noised image, costs in evaluations of sampling. Guidance doubles either cost."""
    sampled, trained = (2 - (scale == 1) for scale in (settings.sampling.guidance_scale, settings.training.guidance.scale))
    return settings.training.objective.num_passes * trained / sampled


def work_left(settings: Settings) -> Work:
    """The work of all calls that are not done.

    How many trajectories a stage will select is not known: the latest stages' median share, or before them the maximum.
    """
    root, budget = settings.output.root, Budget.of(settings)
    latest = [stage.manifest("select") for stage in finished_stages(root, "select")[-NUM_LATEST:]]
    shares = [manifest["num_selected"] / manifest["num_images"] for manifest in latest]
    expected = median(shares) * budget.num_images if shares else budget.most_selected
    left = evaluations_left(settings, finished={stage.index for stage in finished_stages(root, "train")})
    for call in calls(settings):
        if call.script == "eval":
            continue  # `evaluations_left` has them
        stage = Stage(root, call.stage)
        if not stage.finished(call.script) and not stage.finished("train"):
            left += phase_work(settings, budget, stage, call, expected)
    return left


def phase_work(settings: Settings, budget: Budget, stage: Stage, call: Call, expected: float) -> Work:
    """The work of one phase of a stage. `expected` is the number of selected trajectories if select is not finished."""
    window = budget.window(stage)
    match call.script:
        case "sample":
            return Work(evaluations=budget.num_evaluations(window), processes=1)
        case "select":
            return Work(images=budget.num_images, processes=1)
    selected = stage.manifest("select")["num_selected"] if stage.finished("select") else expected
    transitions = settings.training.num_epochs * budget.most_transitions(selected, window.num_steps)
    return Work(transitions=transitions, processes=1)


def evaluations_left(settings: Settings, *, finished: set[int]) -> Work:
    """The work of the run's evaluations that are not done. Those due after the stages `finished` count as done."""
    num_stages, judging = settings.schedule.num_stages, settings.judging
    done, left, processes = set(), set(), 0
    for call in calls(settings):
        evaluations = call.evaluations(num_stages, judging.every)
        if call.stage in finished:
            done |= evaluations
        elif call.script == "eval":
            left |= evaluations
            processes += 1
    num_steps = {"training": settings.sampling.num_steps, "deployed": judging.deployed.num_steps}
    left -= done  # a call may ask for an evaluation that an earlier call has made, such as the base model's; it is read back
    num_evaluations = sum(judging.num_images * num_steps[sampler] for _, _, sampler in left)
    return Work(evaluations=num_evaluations, images=judging.num_images * len(left), processes=processes)


def spent(root: Path, pace: Pace) -> float:
    """Seconds that the experiment's finished stages have taken, without evaluations and pauses."""
    seconds = 0.0
    for stage in finished_stages(root, "train"):
        for phase, part in (("sample", "sample"), ("select", "score"), ("train", "train")):
            timed = stage.manifest(phase)["seconds"]
            # `share`: see `stage_pace`. select records none, and 0 says that the last process found all work done.
            seconds += timed[part] / (timed.get("share") or 1) + pace.process
    return seconds


# ---- log lines ----

UNTOLD = "how long the rest takes cannot be told: "  # because another stage's record is damaged; the work goes on


def plan_line(settings: Settings) -> str:
    """The log line that begins a run: what will be trained, and how long it takes."""
    root, budget, num_stages = settings.output.root, Budget.of(settings), settings.schedule.num_stages
    parts = [
        f"LoRA rank {settings.model.lora.rank} on {settings.model.name}",
        f"reward {settings.rewards.description}",
        f"{num_stages} stages of {budget.num_images} images ({num_stages * budget.num_images})",
        f"S {span([window.num_steps for window in budget.planned_windows(root)])} of {settings.sampling.num_steps}",
        f"{budget.at_most}{num_stages * budget.most_updates} updates",
        f"seed {settings.schedule.seed}",
        time_text(settings),
        *warned_text(root),
    ]
    return f"plan: {', '.join(parts)}"


def time_text(settings: Settings) -> str:
    """How many stages are done, and how long the others take, if that can be told."""
    pace, done, num_stages = measured_pace(settings), num_done(settings), settings.schedule.num_stages
    if done == num_stages:
        return "all stages done"
    if pace is None:
        return "minutes known after the first batch"
    return f"{done} of {num_stages} stages done, about {duration(pace.seconds(work_left(settings)))} left"


def first_batch_text(settings: Settings, window: Window, batch_sec: float, load_sec: float) -> str:
    """After the first sampling batch: how long the whole run takes (`first_pace`)."""
    try:
        seconds = first_pace(settings, window, batch_sec, load_sec).seconds(work_left(settings))
    except (ValueError, OSError, KeyError) as error:
        return f"first batch in {batch_sec:.1f} s; {UNTOLD}{error}"
    return f"first batch in {batch_sec:.1f} s; the run takes {Budget.of(settings).at_most}about {duration(seconds)}"


def stage_done_line(settings: Settings, stage: Stage) -> str:
    """The log line that ends a stage: how many stages are done, how long they took, and how long the others take."""
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
    """[a hint at the stages that warned], or [] if none did."""
    stages = [row["stage"] for row in warned_rows(root)]
    return [f"warnings in {stage_list(stages)} (see report.html)"] if stages else []


def num_done(settings: Settings) -> int:
    """How many of the run's stages are trained. The experiment may have more, of a run with a larger stage_cnt."""
    return sum(stage.index < settings.schedule.num_stages for stage in finished_stages(settings.output.root, "train"))


def duration(seconds: float) -> str:
    """A duration in words: 45 s, 12 min, 3.4 h, 5.1 days."""
    for unit, size, end in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < end:
            return number(seconds / size, unit)
    return number(seconds / 86400, "days")


def number(value: float, unit: str) -> str:
    """A number with its unit; one decimal below 10, none above."""
    return f"{value:.{0 if value >= 10 else 1}f} {unit}"


def span(steps: Sequence[int]) -> str:
    """Smallest and largest, `2..5`, or the one value that all have."""
    return f"{min(steps)}..{max(steps)}" if len(set(steps)) > 1 else str(steps[0])
