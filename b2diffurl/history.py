"""What an experiment's files say of its course: one row a stage, one a stage's update, one an evaluation.

Readers of an experiment (report, trackers, model card) share this; nothing here writes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2diffurl import files
from b2diffurl.metrics import read_events
from b2diffurl.stage import Stage, finished_stages

SETS = {"test": "held-out prompts", "train": "training prompts"}  # those that an experiment has of its own
Row = dict[str, Any]


def stage_rows(root: Path) -> list[Row]:
    """One row for each stage that has been selected, in order.

    `queries` counts the images scored by then, this stage's included. Then come the figures of the metric `select` (README,
    "Where things are"), and of those stages that are trained `num_updates`, `max_abs_log_ratio_first` (at the first update;
    None without one) and means over the updates of `loss`, `grad_norm` and `clip_fraction`. `seconds/<phase>/<part>` are the
    phases' own.
    """
    rows, queries = [], 0
    for stage in finished_stages(root, "select"):
        sampled, scored = stage.manifest("sample"), stage.manifest("select")
        queries += scored["num_images"]
        row: Row = {"stage": stage.index, "queries": queries, "num_trained_steps": sampled["num_trained_steps"]}
        for event in read_events(stage.metrics("select"), "select"):
            row |= {key: value for key, value in event.items() if key not in ("event", "load", "score")}
        if stage.finished("train"):
            row |= training_figures(stage)
        for phase in ("sample", "select", "train"):
            if stage.finished(phase):
                row |= {f"seconds/{phase}/{part}": value for part, value in stage.manifest(phase)["seconds"].items()}
        rows.append(row)
    return rows


def training_figures(stage: Stage) -> Row:
    updates = read_events(stage.metrics("train"), "update")
    means = {key: mean([update.get(key) for update in updates]) for key in ("loss", "grad_norm", "clip_fraction")}
    first = updates[0]["max_abs_log_ratio"] if updates else None
    return {"num_updates": len(updates), "max_abs_log_ratio_first": first} | means


def per_step_rows(root: Path, key: str) -> dict[int, dict[int, float]]:
    """{stage: {timestep: mean over its updates}} of a metric such as `log_ratio_per_step`, for stages that are trained."""
    found = {}
    for stage in finished_stages(root, "train"):
        updates = [update for update in read_events(stage.metrics("train"), "update") if key in update]
        if updates:
            columns = zip(*(update[key] for update in updates), strict=True)
            values = {t: mean(column) for t, column in zip(updates[0]["timesteps"], columns, strict=True)}
            found[stage.index] = {t: value for t, value in values.items() if value is not None}
    return found


def evaluation_rows(root: Path, **wanted: Any) -> list[Row]:
    """The rows of eval.jsonl (see `b2diffurl.results`) in which each key has the wanted value, in order of their stage.

    Of rows for the same prompts and sampler only those made under the newest's conditions, which alone can be compared.
    Each gets `queries`, the images scored before its checkpoint was made: 0 for the base; rows of checkpoints from outside
    this experiment have None.
    """
    path = root / "eval.jsonl"
    rows = files.read_json_lines(path) if path.is_file() else []
    queries = {row["stage"]: row["queries"] for row in stage_rows(root)}
    for row in rows:
        row["queries"] = 0 if row["checkpoint"] == "base" else queries.get(row["stage"])
    newest = {(row["prompts"], row["sampler"]): row["conditions"] for row in rows}
    rows = [row for row in rows if row["conditions"] == newest[row["prompts"], row["sampler"]]]
    kept = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return sorted(kept, key=lambda row: -1 if row["stage"] is None else row["stage"])


def mean(numbers: Sequence[float | None]) -> float | None:
    """Of those that are numbers."""
    numbers = [number for number in numbers if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
