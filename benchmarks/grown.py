"""A long experiment from a short one: its last stage again and again, with manifests that fit one another.

So what grows with the number of stages can be measured without training for days. Every reader accepts the copies. Their
rewards rise with the stage, so that curves have something to show.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from b2diffurl.experiment.evaluation_table import identity
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import PHASES, Stage
from b2diffurl.runtime import files

REWRITTEN = (".json", ".jsonl")  # what differs from stage to stage; all other files are links to those of the first copy
RISE = 0.3  # of the mean reward, from the first stage to the last


def grow(root: Path, target: Path, num_stages: int, *, every: int = 0, num_history: int = 8) -> Path:
    """Copy the finished experiment in folder `root` to `target`, with `num_stages` stages; returns `target`.

    Its first two stages are those of `root`, the others copies of the second. `every` so many stages have an evaluation, a
    copy of that of the second (0: none but the last); the last one also has all that the second has. A stage's scores are
    normalised with those of `num_history` before it.
    """
    first, last = Stage(root, 0), Stage(root, 1)
    scores = [one.manifest("select")["files"][one.scores.name]["sha256"] for one in (first, last)]
    shutil.copytree(root, target, ignore=ignored)
    for index in range(2, num_stages):
        before = range(max(0, index - num_history), index)
        history = {f"stage{n}": scores[min(n, 1)] for n in before}  # all copies have the scores of the second stage
        copy_stage(last, Stage(target, index), num_stages, history)
    grow_evaluations(root, target, num_stages, every)
    record = files.read_json(root / "config.json")
    record["config"]["stage_cnt"] = num_stages
    files.write_record(target / "config.json", record)
    return target


def ignored(folder: str, names: Iterable[str]) -> list[str]:
    """What a copy does not take along: the report, and what a run that was stopped has left."""
    return [name for name in names if name in ("report", "report.html", "verdict.json") or name.endswith(files.TEMPORARY)]


def copy_stage(one: Stage, copy: Stage, num_stages: int, history: dict[str, str]) -> None:
    """Make a stage that could have followed the ones before it, from the finished stage `one`."""
    shutil.copytree(one.folder, copy.folder, copy_function=link)
    manifests = {phase: one.manifest(phase) for phase in PHASES}
    lora = manifests["train"]["files"][find_lora(one.folder).relative_to(one.folder).as_posix()]["sha256"]
    manifests["sample"]["policy"]["lora_sha256"] = manifests["train"]["policy"]["lora_sha256"] = lora
    rise = RISE * (copy.index / num_stages) + 0.02 * math.sin(copy.index)
    (event,) = [json.loads(line) for line in one.metrics("select").read_text().splitlines()]
    event |= {"stage": copy.index, "reward_mean": event["reward_mean"] + rise}
    files.write_json_lines(copy.metrics("select"), [event])
    scored = manifests["select"]
    scored["files"][f"metrics/{copy.metrics('select').name}"] = files.describe(copy.metrics("select"))
    scored["reward_mean"] += rise
    scored["figures"]["reward"][0] += rise
    scored["made_from"]["history"] = history
    for phase, manifest in manifests.items():
        files.write_record(copy.manifest_path(phase), manifest | {"stage": copy.index})


def link(source: str, target: str) -> None:
    """A copy of a file that takes no room, if nothing writes into it."""
    (shutil.copyfile if source.endswith(REWRITTEN) else os.link)(source, target)


def grow_evaluations(root: Path, target: Path, num_stages: int, every: int) -> None:
    """Give the new stages copies of the second stage's evaluations, in eval.jsonl and in eval/."""
    path = target / "eval.jsonl"
    if not path.is_file():
        return
    rows = files.read_json_lines(path)
    judged = [index for index in range(2, num_stages) if every and (index + 1) % every == 0]
    of_second = [row for row in rows if row["checkpoint"] == "stage1"]
    usual = [row for row in of_second if (row["prompts"], row["sampler"]) == ("test", "training")]
    for index in dict.fromkeys([*judged, *([num_stages - 1] if num_stages > 2 else [])]):
        for row in of_second if index == num_stages - 1 else usual:
            rows.append(copy_evaluation(root, target, row, index, RISE * index / num_stages))
    files.write_json_lines(path, rows, sealed=True)


def copy_evaluation(root: Path, target: Path, row: dict[str, Any], index: int, rise: float) -> dict[str, Any]:
    """A row of stage `index` that could follow `row`, which is of stage 1; its folder has the same images."""
    lora = row["lora"].replace("stage1/", f"stage{index}/")
    sha256 = files.sha256(target / lora)
    folder = f"eval/stage{index}_{Path(row['prompts']).stem}_{identity(row['conditions'], sha256)}"
    shutil.copytree(root / row["folder"], target / folder, copy_function=link, dirs_exist_ok=True)
    gain = {f"{key}_gain": row[f"{key}_gain"] + rise for key in ("reward", "accuracy") if row.get(f"{key}_gain") is not None}
    figures = {key: row[key] + rise for key in ("reward", "accuracy") if row.get(key) is not None}
    names = {"checkpoint": f"stage{index}", "stage": index, "lora": lora, "folder": folder}
    return row | names | figures | gain
