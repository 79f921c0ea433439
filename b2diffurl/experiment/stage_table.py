"""An experiment's course as rows: one a stage, one a stage's update.

The readers of an experiment (report, trackers, model card, forecast) share this; nothing here writes.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.runtime.logs import logger

Row = dict[str, Any]


def stage_rows(root: Path) -> list[Row]:
    """One row for each stage that has been selected, in order.

    `queries` counts the images scored by then, this stage's included. Then come the figures of the metric `select`
    (docs/evaluation.md), and of those stages that are trained `num_updates`, `max_abs_log_ratio_first` (at the first update;
    None without one) and means over the updates of `loss`, `grad_norm` and `clip_fraction`. `seconds/<phase>/<part>` are the
    phases' own.
    """
    rows, queries = [], 0
    for stage in finished_stages(root, "select"):
        sampled, scored = stage.manifest("sample"), stage.manifest("select")
        queries += scored["num_images"]
        row: Row = {"stage": stage.index, "queries": queries, "num_trained_steps": sampled["num_trained_steps"]}
        for event in read_events(stage.metrics("select"), "select"):
            row |= {key: value for key, value in event.items() if key not in ("event", "load", "score", "write")}
        if stage.finished("train"):
            row |= training_figures(stage)
        for phase in PHASES:
            if stage.finished(phase):
                seconds = stage.manifest(phase)["seconds"]
                row |= {f"seconds/{phase}/{part}": value for part, value in seconds.items() if part != "share"}
        rows.append(row)
    return rows


def training_figures(stage: Stage) -> Row:
    updates = read_events(stage.metrics("train"), "update")
    means = {key: mean([update.get(key) for update in updates]) for key in ("loss", "grad_norm", "clip_fraction")}
    first = updates[0]["max_abs_log_ratio"] if updates else None
    return {"num_updates": len(updates), "max_abs_log_ratio_first": first} | means


def updates_before(stage: Stage, count: int) -> list[Row]:
    """The latest `count` updates of the stages before this one."""
    found: list[Row] = []
    for index in reversed(range(stage.index)):
        before = Stage(stage.root, index)
        if not before.finished("train"):
            break
        try:
            before.verify("train", "metrics")
            found = read_events(before.metrics("train"), "update") + found
        except ValueError as error:  # they are what updates are compared with, and decide nothing
            logger.warning("stage%d train: %s", stage.index, error)
        if len(found) >= count:
            break
    return found[-count:]


def warned_rows(root: Path) -> list[Row]:
    """What the phases warned of (see `b2diffurl.phases.health`), each with its `stage` and `phase`, in order."""
    found = []
    for stage in finished_stages(root, "select"):
        for phase in ("select", "train"):
            warned = stage.manifest(phase).get("warnings", []) if stage.finished(phase) else []
            found += [{"stage": stage.index, "phase": phase} | one for one in warned]
    return found


def stage_list(indices: Sequence[int]) -> str:
    """Such as `stage 3`, or `stages 2, 5-8`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    named = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"stage{'s' if len(set(indices)) > 1 else ''} {named}"


def per_step_rows(root: Path, key: str) -> dict[int, dict[int, float]]:
    """{stage: {timestep: mean over its updates}} of a metric such as `log_ratio_per_step`, for stages that are trained."""
    found = {}
    for stage in finished_stages(root, "train"):
        updates = [update for update in read_events(stage.metrics("train"), "update") if key in update]
        if updates:
            columns = defaultdict(list)
            for update in updates:
                for t, value in zip(update["timesteps"], update[key], strict=True):
                    columns[t].append(value)
            values = {t: mean(column) for t, column in sorted(columns.items(), reverse=True)}
            found[stage.index] = {t: value for t, value in values.items() if value is not None}
    return found


def mean(numbers: Sequence[float | None]) -> float | None:
    """Of those that are numbers."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
