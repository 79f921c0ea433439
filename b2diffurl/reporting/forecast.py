"""How long a run takes, and how far it is: (work that is left) * (seconds for one of each), as a range.

The work follows from the settings (budget.py) and the loop of calls (loop.py). The seconds are measured: in the experiment's
latest stages and evaluations, or in the first sampling batch before a stage is finished. The range is to hold in 9 of 10
forecasts. Waiting for people's scores (reward `file`) is left out, and pauses are (runtime/stopwatch.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.loop import Call, calls
from b2diffurl.configuration.settings import Settings, combined_text
from b2diffurl.experiment.metrics import judgings
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_list, warned_rows
from b2diffurl.models import family_of
from b2diffurl.models.known import expected_family
from b2diffurl.runtime.logs import duration

NUM_LATEST = 5  # finished stages that count, so that a faster or slower machine soon shows
LONGEST_REPORT_SEC = 30  # a run that takes longer from one stage to the next, without evaluations, was stopped
LONGEST_IMPORT_SEC = 30  # a process that imports its packages for longer was paused
REPORT_SEC = 4.0  # of drawing the report after a stage, before that is measured
JUDGING = 1.3  # what judging takes of the time of sampling and scoring as many images: it also loads, and measures diversity
SCORING_SHARE = 0.1  # of sampling an image, which scoring one may take, before that is measured
FINISHED_FORMAT = "%Y-%m-%dT%H:%M:%S%z"

# The errors of forecasts, as standard deviations of logarithms, found by runs such as those of benchmarks/forecast.py. First
# those of what is not measured yet, each in proportion to its share of the time.
GUESSED = {"scoring": 1.0, "training": 0.5, "judging": 0.35, "reports": 0.8}
STAGE_SPREAD, NUM_PRIOR = 0.25, 3  # of a stage's pace, on a machine that others use, too; it counts as so many stages
DRIFT = 0.8  # part of that variance which all stages to come have in common
NINE_OF_TEN = 1.645  # standard deviations on each side


# ---- time ----


@dataclass(frozen=True)
class Work:
    """Amounts of work."""

    evaluations: float = 0  # of the network without gradients, to sample
    decoded: float = 0  # images to decode and write
    images: float = 0  # to score
    transitions: float = 0  # to train on
    judged_evaluations: float = 0  # of the network, to judge
    judged: float = 0  # images to judge
    processes: float = 0  # to start
    reports: float = 0  # to draw

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Pace:
    """Seconds for one of each kind of work."""

    evaluation: float
    decode: float
    image: float
    transition: float
    process: float
    report: float
    judging: float = JUDGING
    guessed: frozenset[str] = frozenset()  # the kinds of `kinds` that are not measured
    spread: float = STAGE_SPREAD  # of a stage's pace, log
    num_stages: float = 1  # that have been measured

    def kinds(self, work: Work) -> dict[str, float]:
        """{kind of work: seconds}."""
        judged = self.evaluation * work.judged_evaluations + (self.decode + self.image) * work.judged
        return {
            "sampling": self.evaluation * work.evaluations + self.decode * work.decoded,
            "scoring": self.image * work.images,
            "training": self.transition * work.transitions,
            "judging": self.judging * judged,
            "processes": self.process * work.processes,
            "reports": self.report * work.reports,
        }

    def seconds(self, work: Work) -> float:
        return sum(self.kinds(work).values())


@dataclass(frozen=True)
class Range:
    """Seconds, between which the truth lies in 9 of 10 forecasts."""

    low: float
    middle: float
    high: float

    @property
    def text(self) -> str:
        """`about 3.1 min (2.4 to 4.0)`."""
        return f"about {duration(self.middle)} ({span_text(self.low, self.high)})"


def expected(pace: Pace, work: Work) -> Range:
    """How long the work takes at this pace."""
    kinds = pace.kinds(work)
    total = sum(kinds.values())
    if not total:
        return Range(0, 0, 0)
    guessed = sum((kinds[kind] / total * GUESSED[kind]) ** 2 for kind in pace.guessed)
    factor = math.exp(NINE_OF_TEN * math.sqrt(pace.spread**2 * (DRIFT + 1 / pace.num_stages) + guessed))
    return Range(total / factor, total, total * factor)


def measured_pace(settings: Settings) -> Pace | None:
    """The median pace of the latest finished stages; None if none is finished."""
    latest = finished_stages(settings.output.root, "train")[-NUM_LATEST:]
    paces = [(stage, pace) for stage in latest if (pace := stage_pace(settings, stage))]
    if not paces:
        return None
    found = {key: median(getattr(pace, key) for _, pace in paces) for key in ("evaluation", "decode", "image")}
    trained = [pace.transition for _, pace in paces if "training" not in pace.guessed]
    process = median(pace.process for _, pace in paces)
    reports = [took for stage in latest if (took := report_sec(settings, stage, process)) is not None]
    pace = Pace(
        **found,
        transition=median(trained) if trained else median(pace.transition for _, pace in paces),
        process=process,
        report=median(reports) if reports else process + REPORT_SEC,
        guessed=frozenset({*(() if trained else ("training",)), *(() if reports else ("reports",)), "judging"}),
        num_stages=len(paces),
    )
    plain = replace(pace, judging=1.0)
    if factors := [took / plain.seconds(judged) for judged, took in judged_works(settings.output.root)]:
        pace = replace(pace, judging=median(factors[-NUM_LATEST:]), guessed=pace.guessed - {"judging"})
    return replace(pace, spread=measured_spread([relative(one, pace) for _, one in paces]))


def measured_spread(logs: Sequence[float]) -> float:
    """The standard deviation of a stage's pace, from the `logs` of paces over their median; of few stages STAGE_SPREAD."""
    return math.sqrt((NUM_PRIOR * STAGE_SPREAD**2 + sum(log**2 for log in logs)) / (NUM_PRIOR + len(logs) - 1))


def relative(one: Pace, other: Pace) -> float:
    """The logarithm of how much slower a stage's sampling was."""
    return math.log(max(one.evaluation, 1e-9) / max(other.evaluation, 1e-9))


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
    decode = sampled["seconds"].get("decode", 0.0)
    evaluation = (sampled["seconds"]["sample"] - decode) / evaluations
    process = start_up(trained, finished_at(trained) - finished_at(selected) - trained["seconds"]["train"])
    # A stage that selected nothing trained on nothing: then the costs of evaluations tell those of transitions.
    untrained = evaluations_per_transition(settings) * evaluation
    return Pace(
        evaluation=evaluation,
        decode=decode / (selected["num_images"] * sampled["seconds"].get("share", 1)),
        image=selected["seconds"]["score"] / selected["num_images"],
        transition=trained["seconds"]["train"] / transitions if transitions else untrained,
        process=process,
        report=process + REPORT_SEC,
        guessed=frozenset() if transitions else frozenset({"training"}),
    )


def report_sec(settings: Settings, stage: Stage, process: float) -> float | None:
    """Seconds between the end of a stage and the next one's sampling that were no evaluation: of the report, mostly.

    None if the next stage is not sampled, or not in one go, or if the run was stopped in between. `process` is what a
    process takes to start, of which the next stage's sampling is one.
    """
    following = Stage(stage.root, stage.index + 1)
    sampled = following.manifest("sample") if following.finished("sample") else {}
    if not sampled or sampled["seconds"].get("share", 1) < 1:
        return None
    begun = finished_at(sampled) - sampled["seconds"]["sample"] - sampled["seconds"]["load"]
    judged = sum(one["seconds"] for one in judgings(stage.root) if one["after"] == stage.index)
    if settings.judging.due(stage.index) and not judged:
        return None
    report = begun - finished_at(stage.manifest("train")) - judged - process
    return max(0.0, report) if report < LONGEST_REPORT_SEC else None


def judged_works(root: Path) -> Iterator[tuple[Work, float]]:
    """The work of each call that judged checkpoints, and its seconds, in order."""
    for one in judgings(root):
        yield Work(judged_evaluations=one["evaluations"], judged=one["images"]), one["seconds"]


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


def first_pace(settings: Settings, window: Window, batch_sec: float, decode_sec: float, load_sec: float) -> Pace:
    """The pace before a stage is finished, from the seconds of the first sampling batch, of its decoding and of loading.

    Several processes sample a batch each at the same time, so both must be divided by their number. All that comes later is
    guessed: scoring from sampling, training from the number of passes through the network.
    """
    budget, num_batches = Budget.of(settings), settings.sampling.num_batches
    evaluation = (batch_sec - decode_sec) * num_batches / budget.num_evaluations(window)
    return Pace(
        evaluation=evaluation,
        decode=decode_sec * num_batches / budget.num_images,
        image=0.0 if settings.rewards.made_elsewhere else SCORING_SHARE * batch_sec * num_batches / budget.num_images,
        transition=evaluations_per_transition(settings) * evaluation,
        process=load_sec,
        report=load_sec + REPORT_SEC,
        guessed=frozenset(GUESSED),
        num_stages=0.5,
    )


def evaluations_per_transition(settings: Settings) -> float:
    """What training a transition, or a noised image, costs in evaluations of sampling."""
    known = expected_family(settings.model)
    passes = family_of(known).num_passes if known else lambda scale: 2 - (scale == 1)
    sampled, trained = map(passes, (settings.sampling.guidance_scale, settings.training.guidance.scale))
    return settings.training.objective.num_passes * trained / sampled


def work_left(settings: Settings) -> Work:
    """The work of all calls that are not done.

    How many trajectories a stage will select is not known: the latest stages' median share, or before them the maximum.
    """
    root, budget = settings.output.root, Budget.of(settings)
    latest = [stage.manifest("select") for stage in finished_stages(root, "select")[-NUM_LATEST:]]
    shares = [manifest["num_selected"] / manifest["num_images"] for manifest in latest]
    expected = median(shares) * budget.num_images if shares else budget.most_selected
    trained = {stage.index for stage in finished_stages(root, "train")}
    left = evaluations_left(settings, finished=trained)
    for call in calls(settings):
        if call.script == "eval" or call.stage in trained:
            continue  # `evaluations_left` has the evaluations
        stage = Stage(root, call.stage)
        if not stage.finished(call.script):
            left += phase_work(settings, budget, stage, call, expected)
    return left


def phase_work(settings: Settings, budget: Budget, stage: Stage, call: Call, expected: float) -> Work:
    """The work of one phase of a stage. `expected` is the number of selected trajectories if select is not finished."""
    window = budget.window(stage)
    match call.script:
        case "sample":
            return Work(evaluations=budget.num_evaluations(window), decoded=budget.num_images, processes=1)
        case "select":
            return Work(images=budget.num_images, processes=1)
    selected = stage.manifest("select")["num_selected"] if stage.finished("select") else expected
    transitions = settings.training.num_epochs * budget.most_transitions(selected, window.num_steps)
    return Work(transitions=transitions, processes=1)


def evaluations_left(settings: Settings, *, finished: set[int]) -> Work:
    """The work of the run's evaluations that are not done. Those due after the stages `finished` count as done."""
    num_stages, judging = settings.schedule.num_stages, settings.judging
    done, left, reports = set(), set(), 1  # the end of the run, which takes as long as one
    for call in calls(settings):
        evaluations = call.evaluations(num_stages, judging.every)
        if call.stage in finished:
            done |= evaluations
        elif call.script == "eval":
            left |= evaluations
            reports += 1
    num_steps = {"training": settings.sampling.num_steps, "deployed": judging.deployed.num_steps}
    left -= done  # a call may ask for an evaluation that an earlier call has made, such as the base model's; it is read back
    num_evaluations = sum(judging.num_images * num_steps[sampler] for _, _, sampler in left)
    return Work(judged_evaluations=num_evaluations, judged=judging.num_images * len(left), reports=reports)


def spent(root: Path, pace: Pace) -> float:
    """Seconds that the experiment's finished stages have taken, without evaluations and pauses."""
    seconds = 0.0
    for stage in finished_stages(root, "train"):
        for phase, part in (("sample", "sample"), ("select", "score"), ("train", "train")):
            timed = stage.noted(phase)["seconds"]
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
        f"reward {settings.rewards.description}{combined_text(settings.rewards.combine)}",
        f"{num_stages} stage{'s' * (num_stages > 1)} of {budget.num_images} images ({num_stages * budget.num_images})",
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
    return f"{done} of {num_stages} stages done, {expected(pace, work_left(settings)).text} left"


def first_batch_text(settings: Settings, window: Window, batch_sec: float, decode_sec: float, load_sec: float) -> str:
    """After the first sampling batch: how long the whole run takes (`first_pace`)."""
    try:
        took = expected(first_pace(settings, window, batch_sec, decode_sec, load_sec), work_left(settings))
    except (ValueError, OSError, KeyError) as error:
        return f"first batch in {batch_sec:.1f} s; {UNTOLD}{error}"
    return f"first batch in {batch_sec:.1f} s; the run takes {Budget.of(settings).at_most}{took.text}"


def stage_done_line(settings: Settings, stage: Stage) -> str:
    """The log line that ends a stage: how many stages are done, how long they took, and how long the others take."""
    try:
        pace, done = measured_pace(settings), num_done(settings)
        said = f"stage{stage.index} done: {done} of {settings.schedule.num_stages} stages"
        if pace is not None:
            left = expected(pace, work_left(settings)).text
            said += f", {duration(spent(stage.root, pace))} so far, {left} left"
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


def next_stage(settings: Settings) -> int:
    """The first stage that is not trained; the last one if all are."""
    indices = range(settings.schedule.num_stages)
    return next((index for index in indices if not Stage(settings.output.root, index).finished("train")), indices[-1])


def span_text(low: float, high: float) -> str:
    """Two durations, in one unit where they have the same: `2.4 to 4.0 min`, `50 s to 1.8 min`."""
    (low_number, low_unit), (high_number, high_unit) = (duration(one).split() for one in (low, high))
    return f"{low_number}{'' if low_unit == high_unit else f' {low_unit}'} to {high_number} {high_unit}"


def span(steps: Sequence[int]) -> str:
    """Smallest and largest, `2..5`, or the one value that all have."""
    return f"{min(steps)}..{max(steps)}" if len(set(steps)) > 1 else str(steps[0])
