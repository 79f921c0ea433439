"""The course of an experiment as rows, one for each stage or update, read from manifests and metrics.

Report, trackers, model card and forecast share these rows. Nothing here writes.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl.experiment.damage import skipping
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.runtime.logs import logger

Row = dict[str, Any]
MOST_NAMED = 16  # stages, or rows of stages, that a sentence names


def stage_rows(root: Path) -> list[Row]:
    """`stage_row` of each stage whose select phase is finished, in order, with `queries`. A damaged stage is left out."""
    damaged: list[str] = []
    rows: list[Row | None] = []
    for stage in finished_stages(root, "select"):
        rows.append(None)
        with skipping(damaged, f"stage {stage.index}"):
            rows[-1] = stage_row(stage)
    return with_queries(rows)


def image_rows(root: Path) -> list[Row]:
    """Stage, num_images and `queries` of each scored stage, in order. A damaged one is left out. Far less is read than for
    `stage_rows`."""
    rows: list[Row | None] = []
    for stage in finished_stages(root, "select"):
        rows.append(None)
        with skipping([], f"stage {stage.index}"):
            rows[-1] = {"stage": stage.index, "num_images": stage.noted("select")["num_images"]}
    return with_queries(rows)


def with_queries(rows: Sequence[Row | None]) -> list[Row]:
    """The rows with `queries`, the images scored so far, the row's own included.

    None stands for a stage that cannot be read: it is taken to have scored as many images as the one before, or after, it.
    """
    known = [row["num_images"] for row in rows if row]
    found, queries, count = [], 0, known[0] if known else 0
    for row in rows:
        count = row["num_images"] if row else count
        queries += count
        found += [row | {"queries": queries}] if row else []
    return found


def stage_row(stage: Stage) -> Row:
    """A row of a stage whose select phase is finished; a ValueError names a damaged file.

    stage, num_trained_steps   i, S
    num_images                 images scored
    reward_mean, …             the figures of select.jsonl (docs/evaluation.md)
    num_updates, …             if the stage is trained: `training_figures`
    seconds/<phase>/<part>     wall time, from the manifests of its finished phases
    """
    sampled, scored = stage.manifest("sample"), stage.manifest("select")
    row: Row = {"stage": stage.index, "num_images": scored["num_images"], "num_trained_steps": sampled["num_trained_steps"]}
    events = read_events(stage.metrics("select"), "select")
    if not events:
        raise ValueError(f"{stage.metrics('select')} is missing or empty")
    for event in events:
        # Its seconds are left out: they are in the manifests, under the names of all phases.
        row |= {key: value for key, value in event.items() if key not in ("event", "stage", "load", "score", "write")}
    if stage.finished("train"):
        row |= training_figures(stage)
    for phase in PHASES:
        if stage.finished(phase):
            seconds = stage.manifest(phase)["seconds"]
            row |= {f"seconds/{phase}/{part}": value for part, value in seconds.items() if part != "share"}
    return row


def training_figures(stage: Stage) -> Row:
    """Number of updates, means over them of loss, grad_norm and clip_fraction, and the first one's max_abs_log_ratio.

    That ratio is between the policy that sampled and the same policy before any update, so it should be near 0.
    """
    updates = read_events(stage.metrics("train"), "update")
    means = {key: mean([update.get(key) for update in updates]) for key in ("loss", "grad_norm", "clip_fraction")}
    first = updates[0]["max_abs_log_ratio"] if updates else None
    return {"num_updates": len(updates), "max_abs_log_ratio_first": first} | means


def updates_before(stage: Stage, count: int) -> list[Row]:
    """The last `count` updates before this stage, from as many earlier stages as they take.

    Stops at a stage that is not trained. Skips one whose metrics are damaged, and the log names the file.
    """
    updates: list[Row] = []
    for index in reversed(range(stage.index)):
        before = Stage(stage.root, index)
        if not before.finished("train"):
            break
        try:
            before.verify("train", "metrics")
            updates = read_events(before.metrics("train"), "update") + updates
        except ValueError as error:  # only warnings depend on these updates, so a damaged file stops nothing
            logger.warning("stage%d train: %s", stage.index, error)
        if len(updates) >= count:
            break
    return updates[-count:]


def warned_rows(root: Path) -> list[Row]:
    """Every warning of the phases (`b2diffurl.phases.health`), in order: its own entries, `stage` and `phase`."""
    trained = {stage.index for stage in finished_stages(root, "train")}
    scored = finished_stages(root, "select")
    return [row for stage in scored for row in stage_warnings(stage, trained=stage.index in trained)]


def stage_warnings(stage: Stage, *, trained: bool | None = None) -> list[Row]:
    """The rows of `warned_rows` of one scored stage. `trained` is whether it is, if that is known."""
    rows = []
    phases = ("select", "train") if (stage.finished("train") if trained is None else trained) else ("select",)
    for phase in phases:
        rows += [{"stage": stage.index, "phase": phase} | warning for warning in stage.noted(phase).get("warnings", [])]
    return rows


def stage_list(indices: Sequence[int]) -> str:
    """Stages in words: `stage 3`, `stages 2, 5-8`; of many the first and the last: `stages 2, 5-8, …, 990 (310 in all)`."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    named = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    more = ""
    if len(named) > MOST_NAMED:
        named, more = [*named[: MOST_NAMED - 1], "…", named[-1]], f" ({len(set(indices))} in all)"
    return f"stage{'s' if len(set(indices)) > 1 else ''} {', '.join(named)}{more}"


def per_step_rows(root: Path, key: str) -> dict[int, dict[float, float]]:
    """{stage: `step_means`} of the trained stages that have the metric `key`."""
    means = {stage.index: step_means(stage, key) for stage in finished_stages(root, "train")}
    return {index: values for index, values in means.items() if values is not None}


def step_means(stage: Stage, key: str) -> dict[float, float] | None:
    """{timestep: mean over the stage's updates} of a metric by step, such as `log_ratio_per_step`; None if it has none.

    Timesteps from noise to image. An update may train some of a stage's steps (timestep_fraction).
    """
    updates = [update for update in read_events(stage.metrics("train"), "update") if key in update]
    if not updates:
        return None
    columns = defaultdict(list)  # {timestep: its value in each update}
    for update in updates:
        for t, value in zip(update["timesteps"], update[key], strict=True):
            columns[t].append(value)
    values = {t: mean(column) for t, column in sorted(columns.items(), reverse=True)}
    return {t: value for t, value in values.items() if value is not None}


def mean(numbers: Sequence[float | None]) -> float | None:
    """The mean of those that are not None; None if all are."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
