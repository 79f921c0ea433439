"""What an experiment's files say of its course: one row a stage, one a stage's update, one an evaluation.

Readers of an experiment (report, trackers, model card) share this; nothing here writes.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import PHASES, Stage, finished_stages
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

SETS = {"test": "Held-out prompts", "train": "Training prompts"}  # those that an experiment has of its own
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


def evaluation_rows(root: Path, **wanted: Any) -> list[Row]:
    """The course of an experiment as judged: rows of eval.jsonl in which each key has the wanted value, of the
    base and of the last checkpoint of each stage, in their order.

    Rows can be compared where they were made under the same conditions. Of each prompt set and sampler there are those of
    the conditions with the most rows, so that a look with other settings does not take the place of a curve; of equals,
    the newest. Each row gets `queries`, the images scored before its checkpoint was made, 0 for the base.
    """
    queries = {row["stage"]: row["queries"] for row in stage_rows(root)} | {None: 0}
    course = ("base", *(f"stage{index}" for index in queries))
    found = [row | {"queries": queries[row["stage"]]} for row in every_evaluation(root) if row["checkpoint"] in course]
    rows = list(
        {tuple(row[key] for key in ("checkpoint", "prompts", "sampler", "conditions")): row for row in found}.values()
    )
    counts = Counter((row["prompts"], row["sampler"], row["conditions"]) for row in rows)
    chosen: dict[tuple, str] = {}
    for row in reversed(rows):
        judged = (row["prompts"], row["sampler"])
        if counts[*judged, row["conditions"]] > counts[*judged, chosen.get(judged)]:
            chosen[judged] = row["conditions"]
    kept = [row for row in rows if row["conditions"] == chosen[row["prompts"], row["sampler"]]]
    kept = [row for row in kept if all(row.get(key) == value for key, value in wanted.items())]
    return sorted(kept, key=lambda row: -1 if row["stage"] is None else row["stage"])


def every_evaluation(root: Path) -> list[Row]:
    """All rows of eval.jsonl."""
    path = root / "eval.jsonl"
    return files.read_json_lines(path) if path.is_file() else []


def set_title(prompts: str) -> str:
    """What a prompt set is called: Held-out prompts, Training prompts, or a file's name."""
    return SETS.get(prompts, Path(prompts).name)


def set_name(prompts: str) -> str:
    """A prompt set in a name: `test`, `train`, or a file's stem with a checksum of its path."""
    return prompts if prompts in SETS else f"{Path(prompts).stem}_{files.digest(prompts)[:6]}"


def mean(numbers: Sequence[float | None]) -> float | None:
    """Of those that are numbers."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
